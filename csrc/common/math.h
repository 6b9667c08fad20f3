// exp, sigmoid and tanh of sixteen fp32 lanes, for the CPU kernels. No tables, no branches.
//
// Worst error over every 37th of the 2^32 bit patterns, against double precision: exp 1.03 ulp, sigmoid 2.31 ulp, tanh 1.44 ulp, with and without
// fused multiply-add. All are right at 0, Inf, overflow and subnormal results, and keep NaN.
//
// The work is done on halves of eight lanes. GCC 12 splits sums and products of a 64-byte vector into two AVX2 instructions, but comparisons, selects
// and reinterpretations into sixteen scalar ones through the stack (SwiGLU forward: 3.5 times slower); at 32 bytes it needs no splitting.
#pragma once

#include "simd.h"

namespace astrobiogen::simd {

constexpr int64_t kHalfLanes = 8;

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
ASTRO_INLINE f32x8 low(f32x16 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
ASTRO_INLINE f32x8 high(f32x16 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
ASTRO_INLINE f32x16 join(f32x8 low, f32x8 high) { return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15); }
#else  // right, but through the stack
ASTRO_INLINE f32x8 low(f32x16 v) {
  f32x8 half;
  std::memcpy(&half, &v, sizeof(half));
  return half;
}
ASTRO_INLINE f32x8 high(f32x16 v) {
  f32x8 half;
  std::memcpy(&half, reinterpret_cast<const char*>(&v) + sizeof(half), sizeof(half));
  return half;
}
ASTRO_INLINE f32x16 join(f32x8 low, f32x8 high) {
  f32x16 v;
  std::memcpy(&v, &low, sizeof(low));
  std::memcpy(reinterpret_cast<char*>(&v) + sizeof(low), &high, sizeof(high));
  return v;
}
#endif

// Loads and stores of eight lanes; the same values as the sixteen-lane ones of simd.h.
ASTRO_INLINE f32x8 load8(const float* p) {
  f32x8 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

ASTRO_INLINE u32x8 load8_bits(const void* p) {
  u16x8 narrow;
  std::memcpy(&narrow, p, sizeof(narrow));
  return __builtin_convertvector(narrow, u32x8);
}

// The interleave with zeros is the shift by 16: 3 AVX2 instructions where GCC 12 makes 6 of a conversion and a shift.
ASTRO_INLINE f32x8 load8(const c10::BFloat16* p) {
#if defined(__clang__) || __GNUC__ >= 12
  u16x8 narrow;
  std::memcpy(&narrow, p, sizeof(narrow));
  return (f32x8)__builtin_shufflevector(u16x8{}, narrow, 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return (f32x8)(load8_bits(p) << 16);
#endif
}

ASTRO_INLINE f32x8 load8(const c10::Half* p) {
  const u32x8 wide = load8_bits(p);
  const u32x8 magnitude = (wide & 0x7fffu) << 13;
  const u32x8 special = (u32x8)((wide & 0x7c00u) == 0x7c00u);  // Inf, NaN
  const u32x8 bits = (u32x8)((f32x8)magnitude * 0x1p112f);
  return (f32x8)((special & (magnitude | 0x7f800000u)) | (~special & bits) | (wide & 0x8000u) << 16);
}

ASTRO_INLINE void store8(float* p, f32x8 v) { std::memcpy(p, &v, sizeof(v)); }

ASTRO_INLINE void store8_bits(void* p, u32x8 bits) {
  const u16x8 narrow = __builtin_convertvector(bits, u16x8);
  std::memcpy(p, &narrow, sizeof(narrow));
}

// Round to nearest even; NaN stays NaN.
ASTRO_INLINE void store8(c10::BFloat16* p, f32x8 v) {
  const u32x8 bits = (u32x8)v, nan = (u32x8)(v != v);
  const u32x8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store8_bits(p, (nan & 0x7fc0u) | (~nan & rounded));
}

// Round to nearest even. Below 2^-14 adding 0.5 leaves the fp16 subnormal in the low bits; above, the exponent is rebased by 112 before rounding.
ASTRO_INLINE void store8(c10::Half* p, f32x8 v) {
  const u32x8 bits = (u32x8)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const u32x8 subnormal = (u32x8)((f32x8)magnitude + 0.5f) - 0x3f000000u;
  const u32x8 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const u32x8 tiny = (u32x8)((f32x8)magnitude < 0x1p-14f), huge = (u32x8)((f32x8)magnitude >= 65536.0f), nan = (u32x8)(v != v);
  u32x8 half = (tiny & subnormal) | (~tiny & normal);
  half = (huge & 0x7c00u) | (~huge & half);
  half = (nan & 0x7e00u) | (~nan & half);
  store8_bits(p, half | sign);
}

// Stores past the cache, as `stream` of simd.h: `p` 16-byte aligned (`can_stream`), `stream_fence` at the end; fp16 is stored as usual.
ASTRO_INLINE void stream8(float* p, f32x8 v) {
#if defined(__SSE2__)
  __m128 half[2];
  std::memcpy(half, &v, sizeof(v));
  for (int k = 0; k < 2; ++k) _mm_stream_ps(p + 4 * k, half[k]);
#else
  store8(p, v);
#endif
}

ASTRO_INLINE void stream8(c10::BFloat16* p, f32x8 v) {
#if defined(__SSE2__)
  c10::BFloat16 rounded[8];
  store8(rounded, v);
  __m128i bits;
  std::memcpy(&bits, rounded, sizeof(bits));
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits);
#else
  store8(p, v);
#endif
}

ASTRO_INLINE void stream8(c10::Half* p, f32x8 v) { store8(p, v); }

// The first `count` lanes (0 < count < 8); the others are 0. Never touches memory past p + count.
template <typename T>
ASTRO_INLINE f32x8 load8_partial(const T* p, int64_t count) {
  f32x8 v = {};
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = static_cast<float>(p[lane]);
  return v;
}

template <typename T>
ASTRO_INLINE void store8_partial(T* p, f32x8 v, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = static_cast<T>(static_cast<float>(v[lane]));
}

ASTRO_INLINE f32x8 splat8(float value) { return f32x8{} + value; }
ASTRO_INLINE f32x8 abs(f32x8 v) { return (f32x8)((i32x8)v & 0x7fffffff); }
ASTRO_INLINE f32x8 negative_abs(f32x8 v) { return (f32x8)((u32x8)v | 0x80000000u); }
// Where the sign bit of `sign` is set, `a`, else `b`: one blend, without a comparison.
ASTRO_INLINE f32x8 select_negative(f32x8 sign, f32x8 a, f32x8 b) { return (i32x8)sign < 0 ? a : b; }

// e^x. x = n ln2 + r with |r| <= ln2 / 2, e^r = 1 + r + r^2 P(r) (P: degree 4, minimax, relative error 3.2e-9), then two exact scalings by powers of
// two: one alone cannot reach 2^128 or subnormal results.
ASTRO_INLINE f32x8 exp(f32x8 x) {
  // e^89 rounds to Inf and e^-104 to 0, so clamping there changes no result and keeps n within 8 bits. Both comparisons are false for NaN.
  x = x > 89.0f ? splat8(89.0f) : x;
  x = x < -104.0f ? splat8(-104.0f) : x;
  const float kRound = 0x1.8p23f;  // adding it rounds to an integer, which then sits in the low mantissa bits
  const f32x8 shifted = x * 0x1.715476p0f + kRound;
  const i32x8 n = (i32x8)shifted - (i32x8)splat8(kRound);
  const f32x8 whole = shifted - kRound;
  f32x8 r = x - whole * 0x1.63p-1f;  // ln2 = 0x1.63p-1 - 0x1.bd0106p-13; the first product is exact: 9 bits times at most 8
  r = r + whole * 0x1.bd0106p-13f;
  f32x8 p = r * 1.38138805e-3f + 8.36906396e-3f;
  p = p * r + 4.16684225e-2f;
  p = p * r + 1.66665182e-1f;
  p = p * r + 4.99999940e-1f;
  p = (p * r) * r + r + 1.0f;
  const i32x8 half = n >> 1;
  return p * (f32x8)((half + 127) << 23) * (f32x8)((n - half + 127) << 23);
}

// e^x for x <= 0 (anything above 0 is undefined), in two thirds of the instructions: n + 191 comes straight out of the rounding constant's low bits
// (its high bits leave by the shift), and 2^(n + 64) 2^-64 reaches the subnormals.
ASTRO_INLINE f32x8 exp_nonpositive(f32x8 x) {
  x = x < -104.0f ? splat8(-104.0f) : x;
  const float kRound = 0x1.8p23f + 191.0f;
  const f32x8 shifted = x * 0x1.715476p0f + kRound;
  const f32x8 whole = shifted - kRound;
  f32x8 r = x - whole * 0x1.63p-1f;
  r = r + whole * 0x1.bd0106p-13f;
  f32x8 p = r * 1.38138805e-3f + 8.36906396e-3f;
  p = p * r + 4.16684225e-2f;
  p = p * r + 1.66665182e-1f;
  p = p * r + 4.99999940e-1f;
  p = (p * r) * r + r + 1.0f;
  return p * (f32x8)((i32x8)shifted << 23) * 0x1p-64f;
}

// 1 / (1 + e^-x), relative accuracy kept on the far negative side too (there it is e^x, not 1 / Inf).
ASTRO_INLINE f32x8 sigmoid(f32x8 x) {
  const f32x8 e = exp_nonpositive(negative_abs(x));
  return select_negative(x, e, splat8(1.0f)) / (1.0f + e);
}

// Odd polynomial below 0.55 (relative error 1e-9), (1 - e) / (1 + e) with e = e^-2|x| above. Keeps the sign of zero.
ASTRO_INLINE f32x8 tanh(f32x8 x) {
  const f32x8 a = abs(x);
  const f32x8 z = a * a;
  f32x8 p = z * -6.27423869e-3f + 2.10716780e-2f;
  p = p * z + -5.38523085e-2f;
  p = p * z + 1.33325860e-1f;
  p = p * z + -3.33333164e-1f;
  const f32x8 small = a + a * (z * p);
  const f32x8 e = exp_nonpositive(-(a + a));
  const f32x8 large = (1.0f - e) / (1.0f + e);
  const i32x8 magnitude = (i32x8)(a < 0.55f ? small : large);
  return (f32x8)(magnitude | ((i32x8)x & static_cast<int32_t>(0x80000000)));
}

ASTRO_INLINE f32x16 abs(f32x16 x) { return join(abs(low(x)), abs(high(x))); }
ASTRO_INLINE f32x16 exp(f32x16 x) { return join(exp(low(x)), exp(high(x))); }
ASTRO_INLINE f32x16 sigmoid(f32x16 x) { return join(sigmoid(low(x)), sigmoid(high(x))); }
ASTRO_INLINE f32x16 tanh(f32x16 x) { return join(tanh(low(x)), tanh(high(x))); }

}  // namespace astrobiogen::simd
