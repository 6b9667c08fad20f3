// What happens to a convolution's sums before they are stored: bias, channel norm, activation. Formulas: astrobiogen/kernels/conv_nd/README.md.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <type_traits>

#include "common/math.h"
#include "conv_nd/direct.h"

namespace astrobiogen::conv_nd {

// z = sums + bias; u = norm(z); y = activation(u). Every pointer but y may be null.
struct Epilogue {
  const float* bias = nullptr;  // [outputs]
  int64_t activation = kNone;
  int64_t norm = kNoNorm, norm_groups = 1;
  const float *gamma = nullptr, *beta = nullptr;  // [outputs]
  float eps = 0.0f;
  void *y = nullptr, *kept = nullptr;  // [positions][outputs]; kept: z
  // Channel norms: [positions]. Group norm: partial mean and sum of squared deviations [rows][norm_groups] of z, which goes to y.
  float *mean = nullptr, *rstd = nullptr;
  bool streamed = false;  // y and kept bypass the cache
};

// Phi(x), the standard normal distribution, from erfc(z), z = |x| / sqrt 2, by the rational Chebyshev fit of Press et al., Numerical Recipes 2nd ed.,
// 6.2 (relative error 1.2e-7).
ASTRO_INLINE simd::f32x8 normal_cdf(simd::f32x8 x) {
  using namespace simd;
  const f32x8 z = abs(x) * 0.70710678118654752f, t = 1.0f / (1.0f + 0.5f * z);
  f32x8 p = t * 0.17087277f - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const f32x8 tail = 0.5f * t * exp(p - z * z);
  const f32x8 bounded = z > 14.0f ? splat8(0.0f) : tail;  // z = Inf would give Inf - Inf above
  return x < 0.0f ? bounded : 1.0f - bounded;
}
ASTRO_INLINE simd::f32x16 normal_cdf(simd::f32x16 x) { return simd::join(normal_cdf(simd::low(x)), normal_cdf(simd::high(x))); }

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
#if defined(__SSE2__)
  if constexpr (std::is_same_v<T, float>) {
    if (streamed) {
      __m128 part[sizeof(Vec) / sizeof(__m128)];
      std::memcpy(part, &v, sizeof(v));
      for (size_t k = 0; k < sizeof(Vec) / sizeof(__m128); ++k) _mm_stream_ps(p + 4 * k, part[k]);
      return;
    }
  }
#endif
  if constexpr (sizeof(Vec) == sizeof(simd::f32x16)) simd::store(p, v);
  else simd::store8(p, v);
}

// The writer of streamed stores ends with this.
inline void streamed_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
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
