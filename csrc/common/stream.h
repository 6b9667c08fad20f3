// Stores that bypass the cache, and requests for memory before it is needed.
//
// A cached store first reads the line it overwrites, a third of the traffic of a kernel that reads once and writes
// once. Worth it for outputs past kStreamBytes, which no later reader would find in L2 anyway. The writing thread ends
// with `stream_fence`. Elsewhere than on x86 an ordinary store.
#pragma once

#include <cstring>

#include "common/dispatch.h"
#include "common/simd.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif
#if defined(ASTRO_HAS_LEVELS)
#include <immintrin.h>
#endif

namespace astrobiogen::simd {

constexpr int64_t kStreamBytes = int64_t{4} << 20;
constexpr int64_t kStreamAlignment = 64;  // of a 64-byte store

// Whether `total` elements in rows of `row` are worth it and each row starts on an address that can be streamed to.
template <typename T>
ASTRO_INLINE bool can_stream(const T* p, int64_t row, int64_t total) {
  return total * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
         reinterpret_cast<uintptr_t>(p) % kStreamAlignment == 0 && row * sizeof(T) % kStreamAlignment == 0;
}

// Elements from p to the next address that can be streamed to.
template <typename T>
ASTRO_INLINE int64_t until_aligned(const T* p) {
  return static_cast<int64_t>(-reinterpret_cast<uintptr_t>(p) % kStreamAlignment / sizeof(T));
}

// `p` is aligned to the vector. A level with registers of its size writes it at once: as four pieces of 16 bytes a line
// takes twice the time. (An intrinsic needs its caller compiled for its level; the builtin behind it does not.)
template <Level L = Level::kBaseline, typename Vector>
ASTRO_INLINE void stream(void* p, Vector v) {
#if defined(ASTRO_HAS_LEVELS) && defined(__clang__)
  __builtin_nontemporal_store(v, static_cast<Vector*>(p));
#elif defined(__SSE2__)
#if defined(ASTRO_HAS_LEVELS)
  typedef long long Words4 __attribute__((vector_size(32)));
  typedef long long Words8 __attribute__((vector_size(64)));
  if constexpr (sizeof(Vector) == 64 && L == Level::kAvx512)
    return __builtin_ia32_movntdq512(static_cast<Words8*>(p), (Words8)v);
  if constexpr (sizeof(Vector) == 32 && L != Level::kBaseline)
    return __builtin_ia32_movntdq256(static_cast<Words4*>(p), (Words4)v);
#endif
  __m128i part[sizeof(Vector) / sizeof(__m128i)];
  std::memcpy(part, &v, sizeof(v));
  for (size_t k = 0; k < sizeof(Vector) / sizeof(__m128i); ++k) _mm_stream_si128(static_cast<__m128i*>(p) + k, part[k]);
#else
  std::memcpy(p, &v, sizeof(v));
#endif
}

ASTRO_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Asks for one line of memory, into L2. Never faults.
ASTRO_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

}  // namespace astrobiogen::simd
