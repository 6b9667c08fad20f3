// Products of a tall matrix with one that fits the cache, in fp32: the blocks of registers behind `linear` and
// `swiglu_mlp`.
//
// A block: R rows x 2 vectors of N lanes. AVX-512: 8 x 2 accumulators; AVX2: 4 x 2. Per step of the depth, R x 2
// multiply-adds meet 2 vector loads and R broadcasts.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "common/dispatch.h"
#include "gemm/microkernel.h"

namespace astrobiogen::gemm {

// Rows per partial sum of the weight's gradient: a panel of 32 columns is 16 KB; the sum of 65 such sums also rounds
// less than one of 8,256 terms.
constexpr int64_t kDepth = 128;

template <Level L>
struct Blocking {
  static constexpr int N = kWidth<L>;
  static constexpr int R = L == Level::kAvx512 ? 8 : 4;
  static constexpr int P = 2 * N;  // columns of a panel
};

constexpr int64_t kWidestPanel = 32;
constexpr int64_t kMostBlockRows = 8;

// c[r][0 .. V N) (+)= start[0 .. V N) + sum_k a[r row_step + k depth_step] b[k ldb + 0 .. V N) for R rows r. `start`
// (or null) comes last: were the sums to begin with a large bias, each of the `depth` additions would round at its
// size.
template <Level L, int V, bool Add>
ASTRO_INLINE void multiply(const float* a, int64_t row_step, int64_t depth_step, const float* b, int64_t ldb,
                           int64_t depth, const float* start, float* c, int64_t ldc) {
  const auto left = [=](int r, int64_t k) ASTRO_LAMBDA_INLINE { return a[r * row_step + k * depth_step]; };
  using Vector = simd::F<Blocking<L>::N>;
  if constexpr (Add) block<Vector, Blocking<L>::R, V>(depth, left, b, ldb, c, ldc, AddTo{});
  else block<Vector, Blocking<L>::R, V>(depth, left, b, ldb, c, ldc, AddStart{start});
}

// The same for the first `live` columns of a panel and `rows` rows of c; a, b and start have whole blocks.
template <Level L, bool Add>
ASTRO_INLINE void multiply_edge(const float* a, int64_t row_step, int64_t depth_step, const float* b, int64_t ldb,
                                int64_t depth, const float* start, float* c, int64_t ldc, int64_t rows, int64_t live) {
  constexpr int N = Blocking<L>::N, R = Blocking<L>::R, P = Blocking<L>::P;
  alignas(64) float found[R * P];
  if (live > N) multiply<L, 2, false>(a, row_step, depth_step, b, ldb, depth, start, found, P);
  else multiply<L, 1, false>(a, row_step, depth_step, b, ldb, depth, start, found, P);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < live; ++j) c[r * ldc + j] = Add ? c[r * ldc + j] + found[r * P + j] : found[r * P + j];
}

// out [rows, columns] = a [rows, depth] times a matrix in panels [columns / P][depth][P], plus bias in panels (or
// null). Rows of a and out may lie apart.
struct Product {
  const float* a;
  int64_t a_step;
  const float* panels;
  const float* bias;
  float* out;
  int64_t out_step;
  int64_t depth, columns;
};

// Rows [first, last) of a product, at least R of them.
struct Rows {
  template <Level L>
  static ASTRO_INLINE void run(const Product& p, int64_t first, int64_t last) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    for (int64_t column = 0; column < p.columns; column += P) {
      const int64_t live = std::min<int64_t>(P, p.columns - column);
      const float *panel = p.panels + column * p.depth, *start = p.bias == nullptr ? nullptr : p.bias + column;
      for (int64_t at = first; at < last; at += R) {
        const int64_t row = std::min(at, last - R);  // the last block begins early and writes some rows again
        const float* a = p.a + row * p.a_step;
        float* c = p.out + row * p.out_step + column;
        if (live == P) multiply<L, 2, false>(a, p.a_step, 1, panel, P, p.depth, start, c, p.out_step);
        else multiply_edge<L, false>(a, p.a_step, 1, panel, P, p.depth, start, c, p.out_step, R, live);
      }
    }
  }
};

// to = matrix [columns, depth] (or, not transposed, [depth, columns]) in panels [columns / P][depth][P], zeros behind
// the last column.
struct Pack {
  template <Level L>
  static ASTRO_INLINE void run(const float* matrix, int64_t depth, int64_t columns, bool transposed, float* to) {
    constexpr int P = Blocking<L>::P;
    for (int64_t column = 0; column < columns; column += P, to += depth * P) {
      const int64_t live = std::min<int64_t>(P, columns - column);
      if (live < P) std::memset(to, 0, depth * P * sizeof(float));
      if (transposed) {
        for (int64_t j = 0; j < live; ++j)
          for (int64_t k = 0; k < depth; ++k) to[k * P + j] = matrix[(column + j) * depth + k];
      } else {
        for (int64_t k = 0; k < depth; ++k)
          std::memcpy(to + k * P, matrix + k * columns + column, live * sizeof(float));
      }
    }
  }
};

// grad_weight [outputs, inputs] += sum over rows of grad [rows, outputs] x [rows, inputs].
struct WeightGradient {
  const float* grad;
  int64_t grad_step;  // between its rows
  const float* x;
  float* out;
  int64_t rows, outputs, inputs;
};

struct Outputs {
  // Blocks of R outputs, [first, last).
  template <Level L>
  static ASTRO_INLINE void run(const WeightGradient& w, int64_t first, int64_t last) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    alignas(64) float right[kDepth * kWidestPanel], left[kDepth * kMostBlockRows];
    for (int64_t row = 0; row < w.rows; row += kDepth) {
      const int64_t depth = std::min(kDepth, w.rows - row);
      for (int64_t column = 0; column < w.inputs; column += P) {
        const int64_t live = std::min<int64_t>(P, w.inputs - column);
        const float* b = w.x + row * w.inputs + column;
        if (live < P) b = edge(b, w.inputs, depth, live, P, right);
        const int64_t ldb = live < P ? P : w.inputs;
        for (int64_t block = first; block < last; ++block) {
          const int64_t output = block * R, wide = std::min<int64_t>(R, w.outputs - output);
          const float* a = w.grad + row * w.grad_step + output;
          if (wide < R) a = edge(a, w.grad_step, depth, wide, R, left);
          const int64_t step = wide < R ? R : w.grad_step;
          float* c = w.out + output * w.inputs + column;
          if (wide == R && live == P) multiply<L, 2, true>(a, 1, step, b, ldb, depth, nullptr, c, w.inputs);
          else multiply_edge<L, true>(a, 1, step, b, ldb, depth, nullptr, c, w.inputs, wide, live);
        }
      }
    }
  }

  // `live` columns of `depth` rows, padded to `width` with zeros.
  static ASTRO_INLINE const float* edge(const float* from, int64_t stride, int64_t depth, int64_t live, int64_t width,
                                        float* to) {
    std::memset(to, 0, depth * width * sizeof(float));
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < live; ++j) to[k * width + j] = from[k * stride + j];
    return to;
  }
};

// Whether the blocks are made for these sizes, and whether they are the fastest product of them on this core.
bool serves_block(const at::Tensor& x, const at::Tensor& weight, int64_t rows);
bool serves(const at::Tensor& x, const at::Tensor& weight, int64_t rows);
int64_t rows_of(const at::Tensor& x);
int64_t block_rows();
int64_t panel_width();

inline int64_t padded_columns(int64_t columns) { return (columns + panel_width() - 1) / panel_width() * panel_width(); }

}  // namespace astrobiogen::gemm
