// What becomes of one query row's unnormalised output: divided, rounded, and what rounding took away.
#pragma once

#include <cmath>
#include <limits>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "attention/geometry.h"
#include "common/simd.h"

namespace astrobiogen::attention {

typedef int16_t i16x8 __attribute__((vector_size(16)));

// Eight words cut off at the ends of int16. (The portable form takes SSE2 9 instructions more.)
ASTRO_INLINE i16x8 saturated(simd::i32x8 words) {
#if defined(__SSE2__)
  __m128i half[2];
  std::memcpy(half, &words, sizeof(half));
  return (i16x8)_mm_packs_epi32(half[0], half[1]);
#else
  words = words > 32767 ? simd::i32x8{} + 32767 : words;
  words = words < -32768 ? simd::i32x8{} - 32768 : words;
  return __builtin_convertvector(words, i16x8);
#endif
}

// Rounds one row, and keeps what rounding takes away unless `rest` is null.
template <typename T>
void round_row(const float* row, int64_t dim, T* to, int16_t* rest) {
  int64_t d = 0;
  for (; d + simd::kHalfLanes <= dim; d += simd::kHalfLanes) {
    const simd::f32x8 exact = simd::load8(row + d);
    simd::store8(to + d, exact);
    if (rest == nullptr) continue;
    const simd::f32x8 rounded = simd::load8(to + d);
    simd::i32x8 words = (simd::i32x8)exact - (simd::i32x8)rounded;
    words &= (rounded - rounded) == 0.0f;  // finite
    const i16x8 narrow = saturated(words);
    std::memcpy(rest + d, &narrow, sizeof(narrow));
  }
  for (; d < dim; ++d) {
    to[d] = static_cast<T>(row[d]);
    if (rest != nullptr) rest[d] = rest_of(row[d], static_cast<float>(to[d]));
  }
}

// Where the results go. `rest` may be null.
template <typename T>
struct Results {
  Rows<T> out;
  Rest<T>* rest;
  float* lse;
};

template <typename T>
Results<T> results_of(Tensor& out, Tensor& lse, Tensor& rest) {
  return {mutable_rows_of<T>(out), rest.numel() > 0 ? rest.mutable_data_ptr<Rest<T>>() : nullptr,
          lse.mutable_data_ptr<float>()};
}

// Divides `row` by the sum in place; writes it, the log-sum-exp, and what rounding took: from the output in half
// precision, from the log-sum-exp in fp32. `maximum` is in units of log 2.
template <typename T>
void write_row(const Geometry<float>& g, const Results<T>& to, int64_t b, int64_t token, int64_t head, float* row,
               float maximum, float total) {
  const bool blind = g.low[token] >= g.high[token];  // sees nothing: 0, also where the sink is not finite
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  for (int64_t d = 0; d < g.dim; ++d) row[d] = blind ? 0.0f : row[d] * inverse;
  const int64_t index = (b * g.heads + head) * g.queries + token;
  to.lse[index] = total == 0.0f ? -std::numeric_limits<float>::infinity() : (maximum + std::log2(total)) * kLn2;
  if constexpr (std::is_same_v<T, float>) {
    std::copy_n(row, g.dim, to.out.at(b, token, head));
    if (to.rest != nullptr) to.rest[index] = correction_of(to.lse[index], maximum, total);
  } else {
    const int64_t place = ((b * g.queries + token) * g.heads + head) * g.dim;
    round_row(row, g.dim, to.out.at(b, token, head), to.rest == nullptr ? nullptr : to.rest + place);
  }
}

}  // namespace astrobiogen::attention
