// SwiGLU of one vector at every dtype, forward and backward. Formulas: astrobiogen/kernels/swiglu/reference.py.
#pragma once

#include <type_traits>

#include "common/gate.h"

namespace astrobiogen::swiglu {

// 2^f for |f| <= 1/2, lowest power last, and the constant that rounds to whole numbers and adds the exponent's bias.
inline constexpr float kCubic[4] = {0.05517167f, 0.24261112f, 0.69326099f, 0.99992807f};
inline constexpr float kLog2e = 0x1.715476p0f, kRound = 0x1.8p23f + 127.0f;

// What bf16 needs: 1 + e^-g to a hundredth of its unit in the last place, Inf where the sigmoid rounds to 0.
// 2^t = 2^n 2^f with a minimax cubic for 2^f. AVX-512, which alone has sixteen lanes, splits and scales in one
// instruction each, an eighth of the time. Elsewhere n goes through the rounding constant, and the clamps are integer
// ones (sign-magnitude order), which leave the two multiply-add pipes alone.
template <int N>
ASTRO_INLINE simd::F<N> one_plus_exp(simd::F<N> g) {
  using Vector = simd::F<N>;
#if defined(ASTRO_HAS_LEVELS) && !defined(__clang__)
  if constexpr (N == 16) {
    constexpr int kFloor = 9, kCurrent = 4;  // t - floor(t); the rounding mode in force
    const Vector t = g * -kLog2e;
    const Vector f = __builtin_ia32_reduceps512_mask_round(t, kFloor, Vector{}, -1, kCurrent);
    Vector p = f * 0.07802452f + 0.22606716f;
    p = p * f + 0.69583354f;
    p = p * f + 0.99992522f;
    return __builtin_ia32_scalefps512_mask(p, t, Vector{}, -1, kCurrent) + 1.0f;  // p 2^floor(t)
  }
#endif
  using I = typename simd::Lanes<N>::I;
  using U = typename simd::Lanes<N>::U;
  const I highest = (I)simd::broadcast<N>(88.02f);
  const U lowest = (U)simd::broadcast<N>(-88.8f);  // its power of two is Inf
  const I below = (I)g < highest ? (I)g : highest;
  const Vector x = (Vector)((U)below < lowest ? (U)below : lowest);
  const Vector shifted = x * -kLog2e + kRound;
  const Vector f = x * -kLog2e - (shifted - kRound);
  Vector p = f * kCubic[0] + kCubic[1];
  p = p * f + kCubic[2];
  p = p * f + kCubic[3];
  return p * (Vector)((I)shifted << 23) + 1.0f;
}

// The product silu(g) u in two steps, so that they can be loops of their own.
template <typename T, int N>
ASTRO_INLINE simd::F<N> exponential_of(simd::F<N> g) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) return one_plus_exp<N>(g);
  else return simd::exp_negative<N>(g);
}

template <typename T, int N>
ASTRO_INLINE simd::F<N> product_of(simd::F<N> g, simd::F<N> e, simd::F<N> u) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) return g / e * u;
  else return g * ((typename simd::Lanes<N>::I)g < 0 ? e : simd::broadcast<N>(1.0f)) / (1.0f + e) * u;
}

template <typename V>
struct Gradients {
  V gate, up, product;
};

template <typename T, int N>
ASTRO_INLINE Gradients<simd::F<N>> gradients_of(simd::F<N> g, simd::F<N> u, simd::F<N> grad) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    const simd::F<N> open = 1.0f / one_plus_exp<N>(g), silu = g * open;
    return {grad * u * (open + silu * (1.0f - open)), grad * silu, silu * u};
  } else {
    const simd::Gate<N> s = simd::gate_of<N>(g);
    const simd::F<N> silu = g * s.open;
    return {grad * u * (s.open * (1.0f + g * s.shut)), grad * silu, silu * u};
  }
}

}  // namespace astrobiogen::swiglu
