// Products and sums of one head of a row.
#pragma once

#include "edge_attention/edge_attention.h"

namespace astrobiogen::edge_attention {

ASTRO_INLINE float sum_of(simd::f32x8 v) {
#if defined(ASTRO_HAS_SHUFFLES)
  f32x4 half = __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
  half += __builtin_shufflevector(half, half, 2, 3, 0, 1);
  return half[0] + half[1];
#else
  return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
#endif
}

template <typename T>
ASTRO_INLINE float dot(const float* a, const T* b, int64_t count) {
  simd::f32x8 total = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) total += simd::load8(a + j) * simd::load8(b + j);
  if (j < count) total += simd::load8_partial(a + j, count - j) * simd::load8_partial(b + j, count - j);
  return sum_of(total);
}

ASTRO_INLINE double dot(const double* a, const double* b, int64_t count) {
  double total = 0.0;
  for (int64_t j = 0; j < count; ++j) total += a[j] * b[j];
  return total;
}

// to += factor * from
template <typename T>
ASTRO_INLINE void add(float* to, float factor, const T* from, int64_t count) {
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) simd::store8(to + j, simd::load8(to + j) + simd::load8(from + j) * factor);
  for (; j < count; ++j) to[j] += factor * static_cast<float>(from[j]);
}

ASTRO_INLINE void add(double* to, double factor, const double* from, int64_t count) {
  for (int64_t j = 0; j < count; ++j) to[j] += factor * from[j];
}

template <typename T>
ASTRO_INLINE void widen(const T* from, int64_t count, Wide<T> factor, Wide<T>* to) {
  for (int64_t j = 0; j < count; ++j) to[j] = static_cast<Wide<T>>(from[j]) * factor;
}

template <typename T>
ASTRO_INLINE void round_to(const Wide<T>* from, int64_t count, Wide<T> factor, T* to) {
  for (int64_t j = 0; j < count; ++j) to[j] = static_cast<T>(from[j] * factor);
}

}  // namespace astrobiogen::edge_attention
