// The tasks of the fused loss on one block of tokens once lse is known: gradients of the logits, of the weight and of
// x.
#pragma once

#include <vector>

#include "linear_cross_entropy/block.h"

namespace astrobiogen::linear_cross_entropy {

// One vocabulary chunk, when lse is known: what is stored becomes the gradient of the logits, but for `factor` and the
// target's `onehot`.
struct GradLogits {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, int64_t chunk) {
    constexpr int N = Blocking<L>::N, P = Blocking<L>::P;
    const bool proportional = b.proportional();
    const float softcap = static_cast<float>(b.options.softcap);
    for (int64_t t = 0; t < b.lanes; t += P) {
      alignas(64) float factor[P];
      if (proportional && !falls(b.base + chunk * b.lanes + t, b.top + t, P, factor)) continue;
      float* panel = b.stored(chunk) + t * b.rows(chunk);
      for (int64_t v = 0; v < b.rows(chunk); ++v)
        for (int n = 0; n < P; n += N) {
          auto& p = lanes_at<N>(panel + v * P + n);
          if (proportional) p = p * lanes_at<N>(factor + n);
          else p = grad_logit<N>(b, t + n, p, softcap);
        }
    }
  }

  // Exactly 0 for an ignored token, whatever its logits are.
  template <int N>
  static ASTRO_INLINE simd::F<N> grad_logit(const Block& b, int64_t t, simd::F<N> z, float softcap) {
    simd::F<N> grad_logit =
        exp_below(z - lanes_at<N>(b.lse + t)) * lanes_at<N>(b.softmax + t) - lanes_at<N>(b.uniform + t);
    if (softcap > 0.0f) grad_logit *= 1.0f - (z / softcap) * (z / softcap);
    return lanes_at<N>(b.kept + t) == 0.0f ? simd::F<N>{} : grad_logit;
  }
};

// The rows of the weight's gradient of one vocabulary chunk, after GradLogits, by way of `grad_logits`, [kChunk][lanes
// + kGap]: they may come to where the gradients of the logits are.
struct GradientWeight {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, int64_t chunk, float* grad_logits) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    const int64_t first = b.begin(chunk), rows = b.rows(chunk), stride = b.lanes + kGap;
    for (int64_t t = 0; t < b.lanes; t += P)
      copy_rows<L, P>(b.stored(chunk) + t * rows, P, rows, grad_logits + t, stride);
    const int64_t coming = std::min(b.vocabulary - first - rows, kChunk) * b.lanes,
                  calls = (b.hidden + P - 1) / P * ((rows + R - 1) / R);
    int64_t call = 0;
    for (int64_t h = 0; h < b.hidden; h += P)
      for (int64_t v = 0; v < rows; v += R, ++call)
        tile<L>(b, grad_logits + v * stride, first + v, std::min<int64_t>(R, rows - v), h,
                Ahead::share(b.stored(chunk) + rows * b.store_row, coming, call, calls));
    for (int64_t h = 0; h < b.hidden; h += stride)
      subtract_targets(b, first, rows, h, std::min(stride, b.hidden - h), grad_logits, stride);
  }

  // Columns [h, h + columns) of the tokens whose targets are in the chunk. Those of one class meet in `sums`, so that a
  // class of many tokens rounds once per block, and not once per token, at the size of all of them.
  static ASTRO_INLINE void subtract_targets(const Block& b, int64_t first, int64_t rows, int64_t h, int64_t columns,
                                            float* sums, int64_t stride) {
    bool touched[kChunk] = {};
    for (int64_t t = 0; t < b.tokens; ++t) {
      const int64_t row = b.target[t] - first;
      if (b.kept[t] == 0.0f || row < 0 || row >= rows) continue;
      const float* x = b.x + t * b.hidden + h;
      float* sum = sums + row * stride;
      if (!touched[row]) std::fill(sum, sum + columns, 0.0f);
      touched[row] = true;
      for (int64_t j = 0; j < columns; ++j) sum[j] += b.onehot[t] * x[j];
    }
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t j = 0; touched[row] && j < columns; ++j)
        b.grad_weight[(first + row) * b.hidden + h + j] -= sums[row * stride + j];
  }

  template <Level L>
  static ASTRO_INLINE void tile(const Block& b, const float* grad_logits, int64_t v, int64_t live, int64_t h,
                                const Ahead& ahead) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    const float* x = b.packed_x + h * b.lanes;
    float* out = b.grad_weight + v * b.hidden + h;
    const int64_t columns = std::min<int64_t>(P, b.hidden - h);
    if (live == R && columns == P) {
      if (b.first) multiply<L, false>(grad_logits, b.lanes + kGap, 1, x, P, b.tokens, out, b.hidden, ahead);
      else multiply<L, true>(grad_logits, b.lanes + kGap, 1, x, P, b.tokens, out, b.hidden, ahead);
      return;
    }
    alignas(64) float sums[R * P];
    multiply<L, false>(grad_logits, b.lanes + kGap, 1, x, P, b.tokens, sums, P);
    for (int64_t r = 0; r < live; ++r)
      for (int64_t j = 0; j < columns; ++j)
        out[r * b.hidden + j] = sums[r * P + j] + (b.first ? 0.0f : out[r * b.hidden + j]);
  }
};

// The gradient of x of tokens [begin, end) from the segments' products.
struct GradientX {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, const std::vector<Segment>& segments, int64_t begin, int64_t end) {
    constexpr int64_t P = Blocking<L>::P,
                      kColumns =
                          16;  // a line of the gradient at a time, so that the lines of `product` serve all their lanes
    for (int64_t h = 0; h < b.hidden; h += kColumns)
      for (int64_t t = begin; t < end; ++t) {
        const int64_t columns = std::min(kColumns, b.hidden - h);
        float* out = b.grad_x + t * b.hidden + h;
        if (b.kept[t] == 0.0f) {
          std::fill(out, out + columns, 0.0f);
          continue;
        }
        const float* row = b.weight + b.target[t] * b.hidden + h;
        for (int64_t j = 0; j < columns; ++j) out[j] = -b.onehot[t] * row[j];
        for (const Segment& s : segments) {
          const float* sums = s.product + (t / P * b.wide() + h) * P + t % P;
          for (int64_t j = 0; j < columns; ++j) out[j] += sums[j * P] * s.factor[t];
        }
      }
  }
};

}  // namespace astrobiogen::linear_cross_entropy
