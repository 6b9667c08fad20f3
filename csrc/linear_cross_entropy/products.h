// Vector functions of the fused loss, and its three products on tiles of its own: fp32, register-blocked, no packing of
// the weight beyond what the cache needs.
//
// A block of the registers: R rows x two vectors, as many rows as leave room for two loads and a broadcast. Per step of
// the depth each row adds a broadcast and two multiply-adds to the two loads that all share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/pairs.h"
#include "gemm/microkernel.h"

namespace astrobiogen::linear_cross_entropy {

template <Level L>
struct Blocking {
  static constexpr int N = kWidth<L>;
  static constexpr int R = L == Level::kAvx512 ? 12 : 6;
  static constexpr int P = 2 * N;  // columns of a block, and of a panel
};

// Lines of memory that a product asks for while it multiplies, at most one per four steps of its depth: all at once
// they would take every miss that a core can wait for, and the product's own loads would queue behind them. At 512 x
// 512 x 32,000 logits and the product for dx take 2.37 times the time of one product's arithmetic with the next rows of
// the weight asked for, 2.49 without.
struct Ahead {
  static constexpr int64_t kLine = 16;  // floats
  const float* from;
  int64_t lines;

  ASTRO_INLINE void operator()(int64_t step) const {
    if (step < lines) simd::prefetch(from + step * kLine);
  }
  // What falls to product `call` of `calls` of the `floats` from `all` on.
  static ASTRO_INLINE Ahead share(const float* all, int64_t floats, int64_t call, int64_t calls) {
    const int64_t lines = floats / kLine, first = call * lines / calls;
    return {all + first * kLine, (call + 1) * lines / calls - first};
  }
};

// The same for `rows` rows of Width floats, `stride` apart.
template <int64_t Width>
struct RowsAhead {
  static constexpr int64_t kLines = Width / Ahead::kLine;
  const float* from;
  int64_t stride, first, lines;

  ASTRO_INLINE void operator()(int64_t step) const {
    const int64_t line = first + step;
    if (step < lines) simd::prefetch(from + line / kLines * stride + line % kLines * Ahead::kLine);
  }
  static ASTRO_INLINE RowsAhead share(const float* all, int64_t rows, int64_t stride, int64_t call, int64_t calls) {
    const int64_t first = call * rows * kLines / calls;
    return {all, stride, first, (call + 1) * rows * kLines / calls - first};
  }
};

// The lines of c and what `more` asks for.
template <int64_t Width, class More>
struct LinesOf {
  static constexpr int kSteps = 4;
  RowsAhead<Width> own;
  const More& more;
  ASTRO_INLINE void operator()(int64_t call) const {
    own(call);
    more(call);
  }
};

// c[r][0 .. P) = (Add ? c : 0) + sum_k a[r row_step + k depth_step] b[k ldb + 0 .. P) for R rows r. The lines of c are
// asked for while the sums form.
template <Level L, bool Add, class Requests = gemm::NothingAhead>
ASTRO_INLINE void multiply(const float* a, int64_t row_step, int64_t depth_step, const float* b, int64_t ldb,
                           int64_t depth, float* c, int64_t ldc, const Requests& ahead = {}) {
  constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
  using Vector = simd::F<Blocking<L>::N>;
  const auto left = [=](int r, int64_t k) ASTRO_LAMBDA_INLINE { return a[r * row_step + k * depth_step]; };
  const LinesOf<P, Requests> requests{{c, ldc, 0, R * RowsAhead<P>::kLines}, ahead};
  if constexpr (Add) gemm::block<Vector, R, 2>(depth, left, b, ldb, c, ldc, gemm::AddTo{}, requests);
  else gemm::block<Vector, R, 2>(depth, left, b, ldb, c, ldc, gemm::Overwrite{}, requests);
}

using simd::exp_below;

template <int N>
ASTRO_INLINE simd::F<N> capped(simd::F<N> z, float softcap) {
  if constexpr (N == 8) return softcap * simd::tanh(z / softcap);
  else return simd::join(softcap * simd::tanh(simd::low(z) / softcap), softcap * simd::tanh(simd::high(z) / softcap));
}

// What the log-sum-exp of one row of logits is made of.
struct RowSums {
  float maximum;   // of the capped logits
  double sum_exp;  // of exp(z - maximum), or of exp(z) while the maximum is -Inf
  double total;    // of z
  float shift() const { return maximum == -std::numeric_limits<float>::infinity() ? 0.0f : maximum; }

  // Those of further columns of the row.
  void add(const RowSums& other) {
    const RowSums raised{std::max(maximum, other.maximum), 0.0, total + other.total};
    const auto moved = [&](const RowSums& sums) {
      const bool empty = sums.maximum == -std::numeric_limits<float>::infinity();  // its sum is 0
      return empty ? sums.sum_exp : sums.sum_exp * std::exp(static_cast<double>(sums.maximum) - raised.maximum);
    };
    const double together = moved(*this) + moved(other);
    *this = {raised.maximum, together, raised.total};
  }
};

// Of `columns` logits in fp32, bf16 or fp16, before the cap.
template <int N, typename Z>
ASTRO_INLINE RowSums row_sums(const Z* z, int64_t columns, float softcap) {
  using Vector = simd::F<N>;
  const float lowest = -std::numeric_limits<float>::infinity();
  const int64_t whole = columns - columns % (2 * N);
  const auto cap = [softcap](float v) { return softcap > 0.0f ? softcap * std::tanh(v / softcap) : v; };
  Vector highest[2] = {Vector{} + lowest, Vector{} + lowest};
  for (int64_t j = 0; j < whole; j += 2 * N) {
    const auto v = simd::load_pair<N>(z + j);
    highest[0] = v.first > highest[0] ? v.first : highest[0];
    highest[1] = v.second > highest[1] ? v.second : highest[1];
  }
  RowSums sums{lowest, 0.0, 0.0};
  for (int64_t lane = 0; lane < N; ++lane)
    sums.maximum = std::max(sums.maximum, std::max(highest[0][lane], highest[1][lane]));
  for (int64_t j = whole; j < columns; ++j) sums.maximum = std::max(sums.maximum, static_cast<float>(z[j]));
  sums.maximum = cap(sums.maximum);  // the cap is monotonic
  const float shift = sums.shift();
  Vector exps[2] = {}, totals[2] = {};
  for (int64_t j = 0; j < whole; j += 2 * N) {
    auto v = simd::load_pair<N>(z + j);
    if (softcap > 0.0f) v = {capped<N>(v.first, softcap), capped<N>(v.second, softcap)};
    exps[0] += exp_below(v.first - shift);
    exps[1] += exp_below(v.second - shift);
    totals[0] += v.first - shift;  // what is common to all logits must not cost the sum its digits
    totals[1] += v.second - shift;
  }
  sums.total = static_cast<double>(whole) * shift;
  for (int64_t lane = 0; lane < N; ++lane) {
    sums.sum_exp += static_cast<double>(exps[0][lane]) + exps[1][lane];
    sums.total += static_cast<double>(totals[0][lane]) + totals[1][lane];
  }
  for (int64_t j = whole; j < columns; ++j) {
    const float v = cap(static_cast<float>(z[j]));
    sums.sum_exp += std::exp(v - shift);
    sums.total += v;
  }
  return sums;
}

// to[k][0 .. width) = from[k][0 .. live), zeros behind, for `rows` rows.
ASTRO_INLINE void copy_panel(const float* from, int64_t stride, int64_t rows, int64_t live, int64_t width, float* to) {
  for (int64_t k = 0; k < rows; ++k, from += stride, to += width) {
    std::memcpy(to, from, live * sizeof(float));
    if (live < width) std::memset(to + live, 0, (width - live) * sizeof(float));
  }
}

}  // namespace astrobiogen::linear_cross_entropy
