// Sixteen-lane fp32 vectors for the CPU kernels, and their loads and stores from fp32, bf16 and fp16 memory.
//
// GCC and Clang vector extensions: the compiler lowers a 64-byte vector to one AVX-512 register, two AVX2 registers or four NEON/SSE ones.
// Everything here is always_inline and takes its instruction set from the caller. A kernel's entry point is marked ASTRO_MULTIVERSION, so
// that one binary carries AVX-512, AVX2 and baseline code and the loader picks at run time.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(__x86_64__) && defined(__gnu_linux__)
#define ASTRO_MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define ASTRO_MULTIVERSION
#endif
#define ASTRO_INLINE __attribute__((always_inline)) inline

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // 64-byte vectors never cross a real call: all helpers are inlined
#endif

namespace astrobiogen::simd {

constexpr int64_t kLanes = 16;

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

ASTRO_INLINE f32x16 splat(float value) { return f32x16{} + value; }

ASTRO_INLINE f32x16 load(const float* p) {
  f32x16 v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

ASTRO_INLINE f32x16 load(const c10::BFloat16* p) {
  u16x16 half;
  std::memcpy(&half, p, sizeof(half));
  u32x16 wide = __builtin_convertvector(half, u32x16) << 16;
  f32x16 v;
  std::memcpy(&v, &wide, sizeof(v));
  return v;
}

// Exact for all fp16 values, subnormals, infinities and NaN included: shift into the fp32 field, rescale by 2^112, repair the exponent of Inf/NaN.
ASTRO_INLINE f32x16 load(const c10::Half* p) {
  u16x16 half;
  std::memcpy(&half, p, sizeof(half));
  u32x16 wide = __builtin_convertvector(half, u32x16);
  u32x16 magnitude = (wide & 0x7fffu) << 13;
  f32x16 scaled;
  std::memcpy(&scaled, &magnitude, sizeof(scaled));
  scaled *= 0x1p112f;
  u32x16 bits;
  std::memcpy(&bits, &scaled, sizeof(bits));
  u32x16 special = (u32x16)((wide & 0x7c00u) == 0x7c00u);
  bits = (special & (magnitude | 0x7f800000u)) | (~special & bits);
  bits |= (wide & 0x8000u) << 16;
  f32x16 v;
  std::memcpy(&v, &bits, sizeof(v));
  return v;
}

ASTRO_INLINE void store(float* p, f32x16 v) { std::memcpy(p, &v, sizeof(v)); }

// Round to nearest even; NaN stays NaN.
ASTRO_INLINE u16x16 round_bfloat16(f32x16 v) {
  u32x16 bits;
  std::memcpy(&bits, &v, sizeof(bits));
  u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  u32x16 nan = (u32x16)(v != v);
  rounded = (nan & 0x7fc0u) | (~nan & rounded);
  return __builtin_convertvector(rounded, u16x16);
}

ASTRO_INLINE void store(c10::BFloat16* p, f32x16 v) {
  const u16x16 half = round_bfloat16(v);
  std::memcpy(p, &half, sizeof(half));
}

// fp16 on the CPU exists for correctness, not speed (no native path on the measured machines): the scalar conversion of c10 is exact and enough.
ASTRO_INLINE void store(c10::Half* p, f32x16 v) {
  for (int64_t lane = 0; lane < kLanes; ++lane) p[lane] = static_cast<c10::Half>(static_cast<float>(v[lane]));
}

// Stores that bypass the cache: a cached store first reads the line it overwrites, a third of the traffic of a kernel that reads once and writes
// once. Worth it for outputs past kStreamBytes, which no later reader would find in L2 anyway. `p` must be 16-byte aligned (`can_stream`), and
// the writing thread ends with `stream_fence`. Elsewhere than on x86, and for fp16, an ordinary store.
constexpr int64_t kStreamBytes = int64_t{4} << 20;

template <typename T>
ASTRO_INLINE bool can_stream(const T* p, int64_t row, int64_t total) {
  return total * static_cast<int64_t>(sizeof(T)) >= kStreamBytes && reinterpret_cast<uintptr_t>(p) % 16 == 0 && row * sizeof(T) % 16 == 0;
}

ASTRO_INLINE void stream(float* p, f32x16 v) {
#if defined(__SSE2__)
  __m128 quarter[4];
  std::memcpy(quarter, &v, sizeof(v));
  for (int k = 0; k < 4; ++k) _mm_stream_ps(p + 4 * k, quarter[k]);
#else
  store(p, v);
#endif
}

ASTRO_INLINE void stream(c10::BFloat16* p, f32x16 v) {
#if defined(__SSE2__)
  const u16x16 rounded = round_bfloat16(v);
  __m128i half[2];
  std::memcpy(half, &rounded, sizeof(rounded));
  for (int k = 0; k < 2; ++k) _mm_stream_si128(reinterpret_cast<__m128i*>(p) + k, half[k]);
#else
  store(p, v);
#endif
}

ASTRO_INLINE void stream(c10::Half* p, f32x16 v) { store(p, v); }

ASTRO_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
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
