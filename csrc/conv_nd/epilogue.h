// What happens to a convolution's sums before they are stored: bias, channel norm, activation. Formulas:
// astrobiogen/kernels/conv_nd/README.md.
#pragma once

#include <type_traits>

#include "common/math.h"
#include "common/stream.h"
#include "conv_nd/direct.h"

namespace astrobiogen::conv_nd {

// z = sums + bias; u = norm(z); y = activation(u). Every pointer but y may be null.
struct Epilogue {
  const float* bias = nullptr;  // [outputs]
  int64_t activation = kNone;
  int64_t norm = kNoNorm, norm_groups = 1;
  const float *gamma = nullptr, *beta = nullptr;  // [outputs]
  float eps = 0.0f;
  void *y = nullptr, *pre_activation = nullptr;  // [positions][outputs]; pre_activation: z
  // Channel norms: [positions]. Group norm: partial mean and sum of squared deviations [rows][norm_groups] of z, which
  // goes to y.
  float *mean = nullptr, *rstd = nullptr;
  bool streamed = false;  // y and pre_activation bypass the cache
};

// Phi(x), the standard normal distribution. With z = |x| / sqrt 2 and t = 1 / (1 + 0.38 z), erfc(z) e^(z^2) = t Q(t), Q
// of degree 8, minimax (relative error 2.5e-8 up to z = 14, where erfc is 0 in fp32). In fp32 the result is right to a
// relative 6.2 (1 + x^2) 2^-24.
ASTRO_INLINE simd::f32x8 normal_cdf(simd::f32x8 x) {
  using namespace simd;
  const f32x8 t = 1.0f / (1.0f + abs(x) * 0.268700577f);  // 0.38 / sqrt 2
  f32x8 q = t * 0.0584217202f - 0.259860026f;
  q = q * t + 0.359338121f;
  q = q * t - 0.156838292f;
  q = q * t + 0.227218301f;
  q = q * t + 0.139680662f;
  q = q * t + 0.203685211f;
  q = q * t + 0.213944458f;
  q = q * t + 0.214409832f;
  const f32x8 tail = 0.5f * t * q * exp(x * x * -0.5f);
  return x < 0.0f ? tail : 1.0f - tail;
}
ASTRO_INLINE simd::f32x16 normal_cdf(simd::f32x16 x) {
  return simd::join(normal_cdf(simd::low(x)), normal_cdf(simd::high(x)));
}

template <typename Vec>
ASTRO_INLINE Vec activate(Vec v, int64_t activation) {
  if (activation == kSilu) return v * simd::sigmoid(v);
  return activation == kGelu ? v * normal_cdf(v) : v;
}

// The activation's derivative at v.
template <typename Vec>
ASTRO_INLINE Vec activation_slope(Vec v, int64_t activation) {
  if (activation == kSilu) {
    const Vec s = simd::sigmoid(v);
    return s + s * (1.0f - s) * v;
  }
  if (activation == kGelu) return normal_cdf(v) + v * simd::exp(v * v * -0.5f) * 0.39894228040143268f;
  return Vec{} + 1.0f;
}

// fp32 stores that bypass the cache where asked; half precision is stored as usual. `p` is 16-byte aligned then.
template <typename T, typename Vec>
ASTRO_INLINE void put_whole(T* p, Vec v, bool streamed) {
  if constexpr (std::is_same_v<T, float>)
    if (streamed) return simd::stream(p, v);
  if constexpr (sizeof(Vec) == sizeof(simd::f32x16)) simd::store(p, v);
  else simd::store8(p, v);
}

// The first `lanes` lanes only, where fewer are left than a vector holds.
template <typename Vec, typename T>
ASTRO_INLINE void put(T* p, Vec v, int64_t lanes, bool streamed) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float);
  if (lanes >= kWidth) return put_whole(p, v, streamed);
  for (int64_t lane = 0; lane < lanes; ++lane) p[lane] = static_cast<T>(static_cast<float>(v[lane]));
}

template <typename Vec>
ASTRO_INLINE Vec load_lanes(const float* p, int64_t lanes, float fill) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float);
  if (lanes >= kWidth) return load_as<Vec>(p);
  Vec v = Vec{} + fill;
  for (int64_t lane = 0; lane < lanes; ++lane) v[lane] = p[lane];
  return v;
}

}  // namespace astrobiogen::conv_nd
