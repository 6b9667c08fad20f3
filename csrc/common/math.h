// exp, sigmoid and tanh of sixteen fp32 lanes, for the CPU kernels. No tables, no branches.
//
// Right to 2.4 units in the last place (tests/kernels/test_cpu_math.py), also at 0, Inf, overflow and subnormal
// results; NaN stays.
//
// The work is done on halves of eight lanes. GCC 12 splits sums and products of a 64-byte vector into two AVX2
// instructions, but comparisons, selects and reinterpretations into sixteen scalar ones through the stack (SwiGLU
// forward: 3.5 times slower); at 32 bytes it needs no splitting.
#pragma once

#include "common/simd.h"

namespace astrobiogen::simd {

ASTRO_INLINE f32x8 abs(f32x8 v) { return (f32x8)((i32x8)v & 0x7fffffff); }
ASTRO_INLINE f32x8 negative_abs(f32x8 v) { return (f32x8)((u32x8)v | 0x80000000u); }
// Where the sign bit of `sign` is set, `a`, else `b`: one blend, without a comparison.
ASTRO_INLINE f32x8 select_negative(f32x8 sign, f32x8 a, f32x8 b) { return (i32x8)sign < 0 ? a : b; }

// e^r for |r| <= ln2 / 2: 1 + r + r^2 P(r) (P: degree 4, minimax, relative error 3.2e-9).
template <class Vector>
ASTRO_INLINE Vector exp_of_fraction(Vector r) {
  Vector p = r * 1.38138805e-3f + 8.36906396e-3f;
  p = p * r + 4.16684225e-2f;
  p = p * r + 1.66665182e-1f;
  p = p * r + 4.99999940e-1f;
  return (p * r) * r + r + 1.0f;
}

// x - whole ln2, ln2 = 0x1.63p-1 - 0x1.bd0106p-13; the first product is exact: 9 bits times at most 8.
template <class Vector>
ASTRO_INLINE Vector exp_fraction(Vector x, Vector whole) {
  const Vector r = x - whole * 0x1.63p-1f;
  return r + whole * 0x1.bd0106p-13f;
}

// e^x, x = n ln2 + r, then two exact scalings by powers of two: one alone cannot reach 2^128 or subnormal results.
ASTRO_INLINE f32x8 exp(f32x8 x) {
  // e^89 rounds to Inf and e^-104 to 0, so clamping there changes no result and keeps n within 8 bits. Both comparisons
  // are false for NaN.
  x = x > 89.0f ? splat8(89.0f) : x;
  x = x < -104.0f ? splat8(-104.0f) : x;
  const float kRound = 0x1.8p23f;  // adding it rounds to an integer, which then sits in the low mantissa bits
  const f32x8 shifted = x * 0x1.715476p0f + kRound;
  const i32x8 n = (i32x8)shifted - (i32x8)splat8(kRound);
  const f32x8 p = exp_of_fraction(exp_fraction(x, shifted - kRound));
  const i32x8 half = n >> 1;
  return p * (f32x8)((half + 127) << 23) * (f32x8)((n - half + 127) << 23);
}

// e^x for -104 <= x <= 43, on vectors of any width, in two thirds of the instructions: n + 191 comes straight out of
// the rounding constant's low bits (its high bits leave by the shift), and 2^(n + 64) 2^-64 reaches the subnormals.
template <class Vector>
ASTRO_INLINE Vector exp_in_range(Vector x) {
  using Words = decltype(x < x);
  const float kRound = 0x1.8p23f + 191.0f;
  const Vector shifted = x * 0x1.715476p0f + kRound;
  const Vector p = exp_of_fraction(exp_fraction(x, shifted - kRound));
  return p * (Vector)((Words)shifted << 23) * 0x1p-64f;
}

// e^x for x <= 43; NaN stays NaN.
template <class Vector>
ASTRO_INLINE Vector exp_below(Vector x) {
  return exp_in_range(x < -104.0f ? Vector{} - 104.0f : x);
}

// e^x for x <= 0 (anything above 0 is undefined).
ASTRO_INLINE f32x8 exp_nonpositive(f32x8 x) { return exp_below(x); }

// 2^x for x <= 1: 2^n 2^f with |f| <= 1/2, degree-6 minimax polynomial (relative error 1.9e-9). Below -126 the result
// is 0. NaN stays NaN: it fails both comparisons and the polynomial carries it.
template <class Vector>
ASTRO_INLINE Vector exp2_unit(Vector x) {
  using Words = decltype(x < x);
  const float kRound = 0x1.8p23f;
  const Vector floor = Vector{} - 126.0f;
  const Vector y = x < floor ? floor : x;
  const Vector shifted = y + kRound;
  const Vector f = y - (shifted - kRound);
  const Words n =
      ((Words)shifted << 23) + (127 << 23);  // the low bits of `shifted` hold n; its exponent bits fall off the left
  Vector p = f * 0x1.41a6fep-13f + 0x1.5f44f0p-10f;
  p = p * f + 0x1.3b2dfep-7f;
  p = p * f + 0x1.c6aed6p-5f;
  p = p * f + 0x1.ebfbdap-3f;
  p = p * f + 0x1.62e430p-1f;
  p = p * f + 1.0f;
  return x < floor ? Vector{} : p * (Vector)n;
}

// 1 / (1 + e^-x), relative accuracy kept on the far negative side too (there it is e^x, not 1 / Inf).
ASTRO_INLINE f32x8 sigmoid(f32x8 x) {
  const f32x8 e = exp_nonpositive(negative_abs(x));
  return select_negative(x, e, splat8(1.0f)) / (1.0f + e);
}

// On one register of any width: odd polynomial below 0.55 (relative error 1e-9), (1 - e) / (1 + e) with e = e^-2|x|
// above. Keeps the sign of zero.
template <class Vector>
ASTRO_INLINE Vector tanh_of(Vector x) {
  using Words = decltype(x < x);
  const Vector a = (Vector)((Words)x & 0x7fffffff);
  const Vector z = a * a;
  Vector p = z * -6.27423869e-3f + 2.10716780e-2f;
  p = p * z + -5.38523085e-2f;
  p = p * z + 1.33325860e-1f;
  p = p * z + -3.33333164e-1f;
  const Vector small = a + a * (z * p);
  const Vector e = exp_below(-(a + a));
  const Vector large = (1.0f - e) / (1.0f + e);
  const Words magnitude = (Words)(a < 0.55f ? small : large);
  return (Vector)(magnitude | ((Words)x & static_cast<int32_t>(0x80000000)));
}
ASTRO_INLINE f32x8 tanh(f32x8 x) { return tanh_of(x); }

ASTRO_INLINE f32x16 abs(f32x16 x) { return join(abs(low(x)), abs(high(x))); }
ASTRO_INLINE f32x16 exp(f32x16 x) { return join(exp(low(x)), exp(high(x))); }
ASTRO_INLINE f32x16 sigmoid(f32x16 x) { return join(sigmoid(low(x)), sigmoid(high(x))); }
ASTRO_INLINE f32x16 tanh(f32x16 x) { return join(tanh(low(x)), tanh(high(x))); }

}  // namespace astrobiogen::simd
