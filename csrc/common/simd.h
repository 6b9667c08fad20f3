// Sixteen-lane fp32 vectors for the CPU kernels, and their loads and stores from fp32, bf16 and fp16 memory.
//
// GCC and Clang vector extensions: the compiler lowers a 64-byte vector to one AVX-512 register, two AVX2 registers or
// four NEON/SSE ones. Everything here is always_inline and takes its instruction set from the caller (dispatch.h).
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#define ASTRO_INLINE __attribute__((always_inline)) inline

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors never cross a real call: all helpers are inlined
#endif

namespace astrobiogen::simd {

constexpr int64_t kLanes = 16;

constexpr int64_t kHalfLanes = 8;

typedef float f32x16 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

// The same in memory, at any address. Not memcpy: GCC 12 copies 64 bytes through the stack in 16-byte pieces before it
// loads them into AVX2 registers (RMSNorm forward 4 times slower).
typedef float f32x16_memory __attribute__((vector_size(64), aligned(4), may_alias));
typedef float f32x8_memory __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t u32x8_memory __attribute__((vector_size(32), aligned(2), may_alias));
typedef uint32_t u32x16_memory __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t u16x8_memory __attribute__((vector_size(16), aligned(2), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define ASTRO_HAS_SHUFFLES 1
#endif

// The types of N lanes of 32 bits.
template <int N>
struct Lanes;
template <>
struct Lanes<4> {
  typedef float F __attribute__((vector_size(16)));
  typedef int32_t I __attribute__((vector_size(16)));
  typedef float FloatMemory __attribute__((vector_size(16), aligned(4), may_alias));
};
template <>
struct Lanes<8> {
  using F = f32x8;
  using U = u32x8;
  using I = i32x8;
  using FloatMemory = f32x8_memory;
  using WordMemory = u32x8_memory;
};
template <>
struct Lanes<16> {
  using F = f32x16;
  typedef uint32_t U __attribute__((vector_size(64)));
  typedef int32_t I __attribute__((vector_size(64)));
  using FloatMemory = f32x16_memory;
  using WordMemory = u32x16_memory;
};
template <int N>
using F = typename Lanes<N>::F;

template <int N>
ASTRO_INLINE F<N> broadcast(float value) {
  return F<N>{} + value;
}

// A vector of any width from and to fp32 memory at any address.
template <typename Vector>
ASTRO_INLINE Vector load_as(const float* p) {
  return *reinterpret_cast<const typename Lanes<sizeof(Vector) / sizeof(float)>::FloatMemory*>(p);
}

template <typename Vector>
ASTRO_INLINE void store_as(float* p, Vector v) {
  *reinterpret_cast<typename Lanes<sizeof(Vector) / sizeof(float)>::FloatMemory*>(p) = v;
}

#if defined(ASTRO_HAS_SHUFFLES)
ASTRO_INLINE f32x8 low(f32x16 v) { return __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7); }
ASTRO_INLINE f32x8 high(f32x16 v) { return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15); }
ASTRO_INLINE f32x16 join(f32x8 low, f32x8 high) {
  return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
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

// Loads and stores of eight lanes.
ASTRO_INLINE f32x8 load8(const float* p) { return *reinterpret_cast<const f32x8_memory*>(p); }

ASTRO_INLINE u32x8 load8_bits(const void* p) {
  return __builtin_convertvector(*reinterpret_cast<const u16x8_memory*>(p), u32x8);
}

// The interleave with zeros is the shift by 16: 3 AVX2 instructions where GCC 12 makes 6 of a conversion and a shift.
ASTRO_INLINE f32x8 load8(const c10::BFloat16* p) {
#if defined(ASTRO_HAS_SHUFFLES)
  const u16x8 narrow = *reinterpret_cast<const u16x8_memory*>(p);
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

ASTRO_INLINE void store8(float* p, f32x8 v) { *reinterpret_cast<f32x8_memory*>(p) = v; }

ASTRO_INLINE void store8_bits(void* p, u32x8 bits) {
  *reinterpret_cast<u16x8_memory*>(p) = __builtin_convertvector(bits, u16x8);
}

// Round to nearest even; NaN stays NaN.
ASTRO_INLINE void store8(c10::BFloat16* p, f32x8 v) {
  const u32x8 bits = (u32x8)v, nan = (u32x8)(v != v);
  const u32x8 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store8_bits(p, (nan & 0x7fc0u) | (~nan & rounded));
}

// Round to nearest even. Below 2^-14 adding 0.5 leaves the fp16 subnormal in the low bits; above, the exponent is
// rebased by 112 before rounding.
ASTRO_INLINE void store8(c10::Half* p, f32x8 v) {
  const u32x8 bits = (u32x8)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  const u32x8 subnormal = (u32x8)((f32x8)magnitude + 0.5f) - 0x3f000000u;
  const u32x8 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const u32x8 tiny = (u32x8)((f32x8)magnitude < 0x1p-14f), huge = (u32x8)((f32x8)magnitude >= 65536.0f),
              nan = (u32x8)(v != v);
  u32x8 half = (tiny & subnormal) | (~tiny & normal);
  half = (huge & 0x7c00u) | (~huge & half);
  half = (nan & 0x7e00u) | (~nan & half);
  store8_bits(p, half | sign);
}

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

ASTRO_INLINE f32x16 splat(float value) { return f32x16{} + value; }

ASTRO_INLINE f32x16 load(const float* p) { return *reinterpret_cast<const f32x16_memory*>(p); }

ASTRO_INLINE void store(float* p, f32x16 v) { *reinterpret_cast<f32x16_memory*>(p) = v; }

// Half precision as two halves: GCC 12 lowers comparisons, selects and conversions of a 64-byte vector to scalar code
// through the stack on AVX2 (a bf16 store took about 150 instructions), those of a 32-byte vector to a few AVX2 ones.
// fp32 needs none of these.
template <typename T>
ASTRO_INLINE f32x16 load(const T* p) {
  return join(load8(p), load8(p + kHalfLanes));
}

template <typename T>
ASTRO_INLINE void store(T* p, f32x16 v) {
  store8(p, low(v));
  store8(p + kHalfLanes, high(v));
}

// The first `count` lanes (0 < count < 16); the others are `fill`. Never reads past p + count.
template <typename T>
ASTRO_INLINE f32x16 load_partial(const T* p, int64_t count, float fill = 0.0f) {
  f32x16 v = splat(fill);
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = static_cast<float>(p[lane]);
  return v;
}

template <typename T>
ASTRO_INLINE void store_partial(T* p, f32x16 v, int64_t count) {
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = static_cast<T>(static_cast<float>(v[lane]));
}

// Pairwise sum: fixed order, so a repeated run gives the same bits.
ASTRO_INLINE float sum(f32x16 v) {
  float lanes[kLanes];
  std::memcpy(lanes, &v, sizeof(v));
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

}  // namespace astrobiogen::simd
