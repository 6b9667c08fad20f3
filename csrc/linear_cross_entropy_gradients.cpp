// Linear layer + cross-entropy with both gradients in one forward pass, for fp32 and a scalar loss: three matrix products instead of the four of
// `linear_cross_entropy` + `linear_cross_entropy_backward`, which compute the logits twice.
//
// The tokens are cut into blocks of 96 (more if there are many); the logits of one block against the whole vocabulary are the only large buffer: 96 x
// 32,000 x 4 B = 12.3 MB where eager adds 130 MB at 512 tokens. They stand token-last, [vocabulary][tokens], so that the softmax runs lane by lane,
// without a reduction inside a vector. Per block:
//   1. logits and running log-sum-exp, in parallel over chunks of the vocabulary (fixed size, merged in order: the bits do not depend on the threads);
//   2. the gradient of the logits in place, and the weight's gradient, in parallel over the same chunks;
//   3. the gradient of x, in parallel over panels of hidden columns.
// Bytes per block: the weight twice and its gradient in and out, 4 V H x 4 B, against 6 x 96 V H flops: at 512 x 512 x 32,000 1.5 GB beside 50 GFLOP.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "linear_cross_entropy.h"
#include "linear_cross_entropy_gemm.h"

namespace astrobiogen::linear_cross_entropy {

using at::Tensor;

// Tokens per block: a multiple of every panel width and of every R. With T tokens eager adds 8 T V bytes; 96 tokens are 4 x 96 V, below a tenth of that
// from T = 480 on. More tokens per block are fewer passes over the weight and its gradient; above 288 the traffic is below a tenth of the products.
constexpr int64_t kBlockTokens = 96;
constexpr int64_t kMostBlockTokens = 3 * kBlockTokens;
// Vocabulary rows per task: a multiple of every R; the logits of 192 rows are 74 KB, and there are three numbers per chunk and token.
constexpr int64_t kChunk = 192;
constexpr int64_t kMostRows = 12;  // the largest R
// Depth of one walk over hidden columns: 12 rows of the weight are 24 KB, a panel of x 64 KB.
constexpr int64_t kDepth = 512;
// Vocabulary rows per walk of the third product: a panel of 32 columns is 16 KB, half of the first-level cache.
constexpr int64_t kVocabularyDepth = 128;

// Hidden columns per task of the third product, and lanes are rounded up to it: a multiple of both panel widths.
constexpr int64_t kPanel = 32;

struct Block {
  const float *x, *weight;
  const int64_t* target;
  int64_t hidden, vocabulary, tokens;  // live tokens of this block
  int64_t lanes;                       // tokens rounded up to kPanel
  int64_t stride;                      // of a row of logits
  Options options;
  float* logits;        // [vocabulary rounded up to kMostRows][stride]
  float* x_panels;      // [lanes / P][hidden][P]: x transposed
  float* x_rows;        // [hidden / P][lanes][P]: x in panels of columns
  float* maximum;       // [chunks][lanes]
  float* sum_exp;       // [chunks][lanes]
  float* total;         // [chunks][lanes]: sum of the logits
  float* lse;           // [lanes]
  float* kept;          // [lanes]: 1, or 0 for an ignored token and a padded lane
  float* softmax;       // [lanes]: factor of exp(z - lse)
  float* uniform;       // [lanes]
  float* onehot;        // [lanes]
  float* grad_x;        // [tokens][hidden], or null
  float* grad_weight;   // [vocabulary][hidden], or null
  bool first;           // grad_weight is still uninitialised memory

  int64_t chunks() const { return (vocabulary + kChunk - 1) / kChunk; }
};

// x of the block in both layouts. Lanes past the tokens are zero.
struct PackX {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b) {
    constexpr int P = Blocking<L>::P;
    for (int64_t t = 0; t < b.lanes; ++t) {
      float* to = b.x_panels + t / P * b.hidden * P + t % P;
      if (t < b.tokens)
        for (int64_t h = 0; h < b.hidden; ++h) to[h * P] = b.x[t * b.hidden + h];
      else
        for (int64_t h = 0; h < b.hidden; ++h) to[h * P] = 0.0f;
    }
    if (b.grad_weight == nullptr) return;
    for (int64_t h = 0; h < b.hidden; h += P) {
      float* to = b.x_rows + h * b.lanes;
      copy_panel(b.x + h, b.hidden, b.tokens, std::min<int64_t>(P, b.hidden - h), P, to);
      std::memset(to + b.tokens * P, 0, (b.lanes - b.tokens) * P * sizeof(float));
    }
  }
};

// One vocabulary chunk: logits, capped, and its maximum, sum of exponentials and sum per token.
struct Logits {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, int64_t chunk) {
    constexpr int N = Blocking<L>::N, R = Blocking<L>::R, P = Blocking<L>::P;
    const int64_t first = chunk * kChunk, end = std::min(first + kChunk, b.vocabulary), panels = b.lanes / P;
    alignas(64) float rows[R * (kDepth + 16)];  // rows apart by a line more than a power of two, which would share the cache's sets
    for (int64_t v = first; v < end; v += R) {
      const int64_t live = std::min<int64_t>(R, end - v);
      for (int64_t h = 0; h < b.hidden; h += kDepth) {
        const int64_t depth = std::min(kDepth, b.hidden - h);
        copy_panel(b.weight + v * b.hidden + h, b.hidden, live, depth, kDepth + 16, rows);
        if (live < R) std::memset(rows + live * (kDepth + 16), 0, (R - live) * (kDepth + 16) * sizeof(float));
        for (int64_t panel = 0; panel < panels; ++panel) {
          const float* x = b.x_panels + (panel * b.hidden + h) * P;
          float* z = b.logits + v * b.stride + panel * P;
          if (h == 0) multiply<L, false>(rows, kDepth + 16, 1, x, P, depth, z, b.stride);
          else multiply<L, true>(rows, kDepth + 16, 1, x, P, depth, z, b.stride);
        }
      }
    }
    for (int64_t t = 0; t < b.lanes; t += N) statistics<N>(b, chunk, first, end, t);
  }

  template <int N>
  static ASTRO_INLINE void statistics(const Block& b, int64_t chunk, int64_t first, int64_t end, int64_t t) {
    using Vector = simd::F<N>;
    using Memory = typename simd::Lanes<N>::FloatMemory;
    const float lowest = -std::numeric_limits<float>::infinity(), softcap = static_cast<float>(b.options.softcap);
    Vector maximum = Vector{} + lowest;
    for (int64_t v = first; v < end; ++v) {
      Memory* p = reinterpret_cast<Memory*>(b.logits + v * b.stride + t);
      Vector z = *p;
      if (softcap > 0.0f) *p = z = capped<N>(z, softcap);
      maximum = z > maximum ? z : maximum;
    }
    const Vector shift = maximum == lowest ? Vector{} : maximum;  // all -Inf: exp(-Inf) = 0 is added and not NaN
    Vector sum_exp{}, total{};
    for (int64_t v = first; v < end; ++v) {
      const Vector z = *reinterpret_cast<const Memory*>(b.logits + v * b.stride + t);
      sum_exp += exp_below(z - shift);
      total += z;
    }
    *reinterpret_cast<Memory*>(b.maximum + chunk * b.lanes + t) = maximum;
    *reinterpret_cast<Memory*>(b.sum_exp + chunk * b.lanes + t) = sum_exp;
    *reinterpret_cast<Memory*>(b.total + chunk * b.lanes + t) = total;
  }
};

// One vocabulary chunk: the gradient of the logits in place, then its rows of the weight's gradient.
struct Slopes {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, int64_t chunk) {
    constexpr int N = Blocking<L>::N, R = Blocking<L>::R, P = Blocking<L>::P;
    const int64_t first = chunk * kChunk, end = std::min(first + kChunk, b.vocabulary);
    for (int64_t t = 0; t < b.lanes; t += N) slopes<N>(b, first, end, t);
    for (int64_t t = 0; t < b.tokens; ++t)
      if (b.target[t] >= first && b.target[t] < end && b.kept[t] != 0.0f)
        b.logits[b.target[t] * b.stride + t] -= b.onehot[t];
    if (b.grad_weight == nullptr) return;
    alignas(64) float tile[R * P];
    for (int64_t v = first; v < end; v += R) {
      const int64_t live = std::min<int64_t>(R, end - v);
      const float* slope = b.logits + v * b.stride;
      for (int64_t h = 0; h < b.hidden; h += P) {
        const float* x = b.x_rows + h * b.lanes;
        float* out = b.grad_weight + v * b.hidden + h;
        const int64_t columns = std::min<int64_t>(P, b.hidden - h);
        if (live == R && columns == P) {
          if (!b.first && h + P < b.hidden)  // 12 separate rows: more than the hardware follows
            for (int64_t r = 0; r < R; ++r)
              for (int64_t line = 0; line < P; line += 16) __builtin_prefetch(out + r * b.hidden + P + line, 1, 3);
          if (b.first) multiply<L, false>(slope, b.stride, 1, x, P, b.tokens, out, b.hidden);
          else multiply<L, true>(slope, b.stride, 1, x, P, b.tokens, out, b.hidden);
          continue;
        }
        multiply<L, false>(slope, b.stride, 1, x, P, b.tokens, tile, P);
        for (int64_t r = 0; r < live; ++r)
          for (int64_t j = 0; j < columns; ++j) out[r * b.hidden + j] = tile[r * P + j] + (b.first ? 0.0f : out[r * b.hidden + j]);
      }
    }
  }

  template <int N>
  static ASTRO_INLINE void slopes(const Block& b, int64_t first, int64_t end, int64_t t) {
    using Vector = simd::F<N>;
    using Memory = typename simd::Lanes<N>::FloatMemory;
    const auto at = [t](const float* p) ASTRO_LAMBDA_INLINE { return *reinterpret_cast<const Memory*>(p + t); };
    const Vector lse = at(b.lse), softmax = at(b.softmax), uniform = at(b.uniform), kept = at(b.kept);
    const float softcap = static_cast<float>(b.options.softcap);
    for (int64_t v = first; v < end; ++v) {
      Memory* p = reinterpret_cast<Memory*>(b.logits + v * b.stride + t);
      const Vector z = *p;
      Vector slope = exp_below(z - lse) * softmax - uniform;
      if (softcap > 0.0f) slope *= 1.0f - (z / softcap) * (z / softcap);
      *p = kept == 0.0f ? Vector{} : slope;  // exactly 0 for an ignored token, whatever its logits are
    }
  }
};

// Columns [begin, end) kPanel of grad_x. The vocabulary is the outer loop: one panel at a time over all of it would meet every page of the weight once
// per panel (16 x 16,000 TLB misses per block at 512 x 32,000; 273 instead of 190 ms).
struct GradientX {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, int64_t begin, int64_t end) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    const int64_t first = begin * kPanel, last = std::min(end * kPanel, b.hidden), groups = (b.tokens + R - 1) / R;
    const int64_t panels = (last - first + P - 1) / P, size = groups * R * P;
    std::vector<float> tile(kVocabularyDepth * P), sums(panels * size);  // the weight's columns; [panels][tokens][P]
    for (int64_t v = 0; v < b.vocabulary; v += kVocabularyDepth)
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t h = first + panel * P, depth = std::min(kVocabularyDepth, b.vocabulary - v);
        copy_panel(b.weight + v * b.hidden + h, b.hidden, depth, std::min<int64_t>(P, b.hidden - h), P, tile.data());
        const bool wrap = panel + 1 == panels;
        const float* ahead = b.weight + (wrap ? v + kVocabularyDepth : v) * b.hidden + (wrap ? first : h + P);
        for (int64_t group = 0; group < groups; ++group) {
          for (int64_t k = group * depth / groups; k < (group + 1) * depth / groups; ++k)  // the next tile's rows, shared out over the groups
            for (int64_t line = 0; line < P; line += 16) simd::prefetch(ahead + k * b.hidden + line);
          const float* slope = b.logits + v * b.stride + group * R;
          float* c = sums.data() + panel * size + group * R * P;
          if (v == 0) multiply<L, false>(slope, 1, b.stride, tile.data(), P, depth, c, P);
          else multiply<L, true>(slope, 1, b.stride, tile.data(), P, depth, c, P);
        }
      }
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t t = 0; t < b.tokens; ++t) {
        const int64_t h = first + panel * P;
        std::memcpy(b.grad_x + t * b.hidden + h, sums.data() + panel * size + t * P, std::min<int64_t>(P, b.hidden - h) * sizeof(float));
      }
  }
};

// lse of every token from its chunks, in order; the factors of its slopes; the sum of the block's losses.
double finish(const Block& b, float scale) {
  const Options& o = b.options;
  double sum = 0.0;
  for (int64_t t = 0; t < b.lanes; ++t) {
    b.lse[t] = b.kept[t] = b.softmax[t] = b.uniform[t] = b.onehot[t] = 0.0f;
    if (t >= b.tokens || b.target[t] == o.ignore_index) continue;
    float maximum = -std::numeric_limits<float>::infinity();
    for (int64_t chunk = 0; chunk < b.chunks(); ++chunk) {
      const float other = b.maximum[chunk * b.lanes + t];
      maximum = other > maximum ? other : maximum;
    }
    const float shift = maximum == -std::numeric_limits<float>::infinity() ? 0.0f : maximum;
    double sum_exp = 0.0, total = 0.0;
    for (int64_t chunk = 0; chunk < b.chunks(); ++chunk) {
      const int64_t at = chunk * b.lanes + t;
      sum_exp += static_cast<double>(b.sum_exp[at]) * std::exp(static_cast<double>(b.maximum[at]) - shift);
      total += b.total[at];
    }
    const float lse = shift + static_cast<float>(std::log(sum_exp));
    const float logit = b.logits[b.target[t] * b.stride + t];
    const double smoothing = o.label_smoothing;
    double loss = (1.0 - smoothing) * (static_cast<double>(lse) - logit) + o.z_loss * lse * lse;
    if (smoothing > 0.0) loss += smoothing * (lse - total / static_cast<double>(b.vocabulary));
    sum += loss;
    const float ratio = o.softcap > 0.0 ? logit / static_cast<float>(o.softcap) : 0.0f;
    b.kept[t] = 1.0f;
    b.lse[t] = lse;
    b.softmax[t] = scale * (1.0f + 2.0f * static_cast<float>(o.z_loss) * lse);
    b.uniform[t] = scale * static_cast<float>(smoothing / static_cast<double>(b.vocabulary));
    b.onehot[t] = scale * static_cast<float>(1.0 - smoothing) * (1.0f - ratio * ratio);
  }
  return sum;
}

// Views into one buffer, so that the memory is seen by PyTorch's allocator and its profiler.
struct Workspace {
  Tensor memory;
  float* next;

  Workspace(int64_t floats, const Tensor& like) : memory(at::empty({floats}, like.options())), next(memory.mutable_data_ptr<float>()) {}
  float* take(int64_t floats) { return std::exchange(next, next + (floats + 15) / 16 * 16); }
};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Tokens per block: a fifth of all of them (eager's extra memory is 8 bytes per logit, this is 4), within the two bounds.
int64_t block_tokens(int64_t tokens) {
  const int64_t wanted = std::clamp(tokens / 5 / kBlockTokens * kBlockTokens, kBlockTokens, kMostBlockTokens);
  return std::min(wanted, round_up(tokens, kPanel));
}

void run_block(const Block& b, float scale, double& loss) {
  dispatch<PackX>(b);
  at::parallel_for(0, b.chunks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) dispatch<Logits>(b, chunk);
  });
  loss += finish(b, scale);
  at::parallel_for(0, b.chunks(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) dispatch<Slopes>(b, chunk);
  });
  if (b.grad_x == nullptr) return;
  at::parallel_for(0, round_up(b.hidden, kPanel) / kPanel, 1, [&](int64_t begin, int64_t end) { dispatch<GradientX>(b, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> gradients_float(const Tensor& x_any, const Tensor& weight_any, const Tensor& target, float divisor, const Options& o,
                                                   bool need_x, bool need_weight) {
  const Tensor x = x_any.contiguous(), weight = weight_any.contiguous();
  const int64_t tokens = x.size(0), hidden = x.size(1), vocabulary = weight.size(0);
  Tensor grad_x = need_x ? at::empty({tokens, hidden}, x.options()) : at::empty({0}, x.options());
  Tensor grad_weight = !need_weight ? at::empty({0}, x.options())
                       : tokens == 0 ? at::zeros({vocabulary, hidden}, x.options())
                                     : at::empty({vocabulary, hidden}, x.options());
  double loss = 0.0;
  const int64_t most = block_tokens(tokens), chunks = (vocabulary + kChunk - 1) / kChunk;
  if (tokens > 0) {
    const int64_t wide = round_up(hidden, kPanel);
    const int64_t rows = round_up(vocabulary, kMostRows);
    Workspace w(rows * most + most * (hidden + wide) + 3 * chunks * most + 5 * most + 12 * 16, x);
    for (int64_t start = 0; start < tokens; start += most) {
      w.next = w.memory.mutable_data_ptr<float>();
      const int64_t count = std::min(most, tokens - start), lanes = round_up(count, kPanel);
      Block b{x.const_data_ptr<float>() + start * hidden, weight.const_data_ptr<float>(), target.const_data_ptr<int64_t>() + start,
              hidden, vocabulary, count, lanes, lanes, o};
      b.logits = w.take(rows * lanes + 16);  // a group of 12 tokens may read past the last lane
      b.x_panels = w.take(lanes * hidden);
      b.x_rows = w.take(lanes * wide);
      for (float** statistic : {&b.maximum, &b.sum_exp, &b.total}) *statistic = w.take(chunks * lanes);
      for (float** factor : {&b.lse, &b.kept, &b.softmax, &b.uniform, &b.onehot}) *factor = w.take(lanes);
      b.grad_x = need_x ? grad_x.mutable_data_ptr<float>() + start * hidden : nullptr;
      b.grad_weight = need_weight ? grad_weight.mutable_data_ptr<float>() : nullptr;
      b.first = start == 0;
      run_block(b, 1.0f / divisor, loss);
    }
  }
  Tensor total = at::empty({}, x.options());
  *total.mutable_data_ptr<float>() = static_cast<float>(loss / divisor);
  return {total, grad_x, grad_weight};
}

// fp64, and half precision without bf16 units: the loss and its gradients one after the other.
std::tuple<Tensor, Tensor, Tensor> gradients_composed(const Tensor& x, const Tensor& weight, const Tensor& target, const Tensor& divisor,
                                                      const Options& o, bool need_x, bool need_weight) {
  const auto [loss, lse] = forward(x, weight, target, o.ignore_index, o.label_smoothing, o.z_loss, o.softcap);
  const Tensor divisor_like = divisor.to(loss.scalar_type());
  const Tensor grad = at::ones_like(loss).div(divisor_like);
  auto [grad_x, grad_weight] = backward(grad, x, weight, target, lse, o.ignore_index, o.label_smoothing, o.z_loss, o.softcap, need_x, need_weight);
  return {loss.sum().div(divisor_like), grad_x, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& x, const Tensor& weight, const Tensor& target_any, const Tensor& divisor,
                                             int64_t ignore_index, double label_smoothing, double z_loss, double softcap, bool need_x,
                                             bool need_weight) {
  const Tensor target = target_any.contiguous();
  check_targets(target, weight.size(0), ignore_index);
  const Options o{ignore_index, label_smoothing, z_loss, softcap};
  if (x.scalar_type() == at::kBFloat16 && has_bf16_products())
    return gradients_bf16(x.contiguous(), weight.contiguous(), target, divisor.item<float>(), o, need_x, need_weight);
  if (x.scalar_type() != at::kFloat) return gradients_composed(x, weight, target, divisor, o, need_x, need_weight);
  return gradients_float(x, weight, target, divisor.item<float>(), o, need_x, need_weight);
}

}  // namespace astrobiogen::linear_cross_entropy

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) { m.impl("linear_cross_entropy_gradients", &astrobiogen::linear_cross_entropy::gradients); }
