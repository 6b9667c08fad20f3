// 2 N consecutive elements as two vectors of N fp32 lanes (N = 8, or 16 on AVX-512), for kernels that do the same to
// every element.
//
// The two vectors hold the elements in the order that costs least to load and store: first and second half for fp32 and
// fp16; even and odd elements for bf16, which one shift and one mask widen (2 instructions for 16 elements at any
// level, no shuffles) and a shift and a blend narrow. fp32 tables that meet them, such as a norm's weight, are brought
// into the same order once (`arrange`).
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/dispatch.h"
#include "common/stream.h"

namespace astrobiogen::simd {

template <int N>
struct Pair {
  F<N> first, second;
};

template <int N>
ASTRO_INLINE Pair<N> load_pair(const float* p) {
  using Memory = typename Lanes<N>::FloatMemory;
  return {*reinterpret_cast<const Memory*>(p), *reinterpret_cast<const Memory*>(p + N)};
}

template <int N>
ASTRO_INLINE Pair<N> load_pair(const c10::BFloat16* p) {
  using U = typename Lanes<N>::U;
  const U words = *reinterpret_cast<const typename Lanes<N>::WordMemory*>(p);
  return {(F<N>)(words << 16), (F<N>)(words & 0xffff0000u)};
}

template <int N>
ASTRO_INLINE Pair<N> load_pair(const c10::Half* p) {
  if constexpr (N == 8) return {load8(p), load8(p + 8)};
  else return {join(load8(p), load8(p + 8)), join(load8(p + 16), load8(p + 24))};
}

// How fp32 becomes bf16. NaN must have no bit set below its upper half, else the carry may turn it into a number: true
// of every NaN that comes from bf16 and of every NaN the processor makes; `arrange` sees to fp32 tables.
enum class Round {
  kEven,   // to nearest, ties to even: for what may well be a tie, such as the sum of two bf16 numbers
  kAway,   // to nearest, ties away from zero: the same largest error for one instruction instead of four; for results
           // that are inexact in fp32
  kExact,  // not at all: the lower half is zero
};

// The result stands in the upper half of each lane.
template <Round R, int N>
ASTRO_INLINE typename Lanes<N>::U round_bf16(F<N> v) {
  const typename Lanes<N>::U bits = (typename Lanes<N>::U)v;
  if constexpr (R == Round::kEven) return (bits + ((bits >> 16) & 1u)) + 0x7fffu;
  else if constexpr (R == Round::kAway) return bits + 0x8000u;
  else return bits;
}

template <Level L, Round R, int N>
ASTRO_INLINE typename Lanes<N>::U narrow(Pair<N> v) {
  using U = typename Lanes<N>::U;
  const U first = round_bf16<R, N>(v.first) >> 16, second = round_bf16<R, N>(v.second);
#if defined(ASTRO_HAS_SHUFFLES)
  if constexpr (N == 8 && L != Level::kBaseline) {  // the odd halfwords of `second`: one blend
    typedef uint16_t Halfwords __attribute__((vector_size(32)));
    return (U)__builtin_shufflevector((Halfwords)first, (Halfwords)second, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27,
                                      12, 29, 14, 31);
  }
#endif
  if constexpr (R == Round::kExact) return first | second;
  return first | (second & 0xffff0000u);
}

template <int N>
ASTRO_INLINE void store_pair(float* p, Pair<N> v) {
  using Memory = typename Lanes<N>::FloatMemory;
  *reinterpret_cast<Memory*>(p) = v.first;
  *reinterpret_cast<Memory*>(p + N) = v.second;
}

template <int N>
ASTRO_INLINE void store_pair(c10::Half* p, Pair<N> v) {
  if constexpr (N == 8) {
    store8(p, v.first);
    store8(p + 8, v.second);
  } else {
    store8(p, low(v.first));
    store8(p + 8, high(v.first));
    store8(p + 16, low(v.second));
    store8(p + 24, high(v.second));
  }
}

template <int N, Level L = Level::kBaseline, Round R = Round::kEven>
ASTRO_INLINE void store_pair(c10::BFloat16* p, Pair<N> v) {
  *reinterpret_cast<typename Lanes<N>::WordMemory*>(p) = narrow<L, R, N>(v);
}

// `v` as T holds it, still in fp32.
template <typename T, int N>
ASTRO_INLINE Pair<N> rounded(Pair<N> v) {
  if constexpr (std::is_same_v<T, float>) {
    return v;
  } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return {(F<N>)(round_bf16<Round::kEven, N>(v.first) & 0xffff0000u),
            (F<N>)(round_bf16<Round::kEven, N>(v.second) & 0xffff0000u)};
  } else {
    alignas(64) T elements[2 * N];
    store_pair<N>(elements, v);
    return load_pair<N>(elements);
  }
}

template <Level L, Round R, int N, typename T>
ASTRO_INLINE void put_pair(T* p, Pair<N> v, bool streamed) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (streamed) stream<L>(p, narrow<L, R, N>(v));
    else store_pair<N, L, R>(p, v);
  } else if constexpr (std::is_same_v<T, float>) {
    if (streamed) {
      stream<L>(p, v.first);
      stream<L>(p + N, v.second);
    } else {
      store_pair<N>(p, v);
    }
  } else {
    store_pair<N>(p, v);
  }
}

// Fewer than 2 Size / sizeof(T) elements, by halves: memcpy with a length known only at run time is a call.
template <size_t Size, typename T>
ASTRO_INLINE void copy_few(T* to, const T* from, int64_t count) {
  if constexpr (Size >= sizeof(T)) {
    constexpr int64_t kPiece = Size / sizeof(T);
    if (count & kPiece) {
      std::memcpy(to, from, Size);
      to += kPiece;
      from += kPiece;
    }
    copy_few<Size / 2>(to, from, count);
  }
}

// The first `count` of 2 N elements (0 < count <= 2 N); the others are 0. Touches nothing past p + count.
template <int N, typename T>
ASTRO_INLINE Pair<N> load_pair_partial(const T* p, int64_t count) {
  alignas(64) T elements[2 * N] = {};
  copy_few<2 * N * sizeof(T)>(elements, p, count);
  return load_pair<N>(elements);
}

template <Level L, Round R, int N, typename T>
ASTRO_INLINE void put_pair_partial(T* p, Pair<N> v, int64_t count) {
  alignas(64) T elements[2 * N];
  put_pair<L, R, N>(elements, v, false);
  copy_few<2 * N * sizeof(T)>(p, elements, count);
}

// Where element i of a table stands once the table is in the order of Pair<8> of T.
template <typename T>
ASTRO_INLINE int64_t arranged(int64_t i) {
  if constexpr (!std::is_same_v<T, c10::BFloat16>) return i;
  const int64_t within = i % 16;
  return i - within + within % 2 * 8 + within / 2;
}

// fp32 `table` of `count` elements in the order of Pair<8> of T, with zeros up to a multiple of 16; NaN as the
// processor's own.
template <typename T>
void arrange(const float* table, int64_t count, float* to) {
  std::fill(to, to + (count + 15) / 16 * 16, 0.0f);
  for (int64_t i = 0; i < count; ++i)
    to[arranged<T>(i)] = table[i] == table[i] ? table[i] : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace astrobiogen::simd
