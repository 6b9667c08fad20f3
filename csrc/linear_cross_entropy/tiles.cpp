// The fused loss by PyTorch's products, for bf16 on CPUs that multiply bf16 in hardware (oneDNN) and for fp32 on cores
// whose BLAS leads: both gradients in one pass, or the backward of a loss per token.
//
// The vocabulary is cut into tiles of columns. One walk over them makes the logits, rounded to the dtype of x as
// F.linear rounds them, and the sums of every row; a second one turns each tile into the gradient of the logits, in
// scratch, and multiplies it twice. In between the logits of the first tokens, as many as there are hidden columns,
// wait in the memory that the weight's gradient will take, tile by tile; those of further tokens in memory of their
// own, of bf16 a third of all tokens at a time, of fp32 at most 288. The gradient of x is summed over the tiles in
// fp32, each tile's share having been rounded once to the dtype of x.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common/core.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "linear_cross_entropy/products.h"

namespace astrobiogen::linear_cross_entropy {

using at::Tensor;

// Fewest tokens per block: below, the products slow down (32 tokens: half the speed).
constexpr int64_t kFewestTokens = 128;
// Most tokens per block of fp32: 4 bytes per logit, beside the 8 of eager's.
constexpr int64_t kMostFloatTokens = 288;
// fp32 where MKL leads: the fewest hidden columns for which its products are faster than the own ones, and the most
// tokens, of which the own blocks would be padding by half.
constexpr int64_t kFewestBlasHidden = 1024, kMostBlasTokens = 16;
// Bytes of the logits of a tile, and its fewest columns.
constexpr int64_t kTileBytes = 1 << 22, kFewestColumns = 256;

// Columns [first, first + columns) of the logits of some tokens.
template <typename Z>
struct Tile {
  const Z* logits;  // [tokens, columns]
  Z* grad_logits;   // [tokens, columns]; may be `logits`
  int64_t first, columns, vocabulary;
  const int64_t* target;
  Options options;
  // Per token: what its columns so far sum up to, and the target's logit; then lse, and the gradient of its loss.
  RowSums* sums;
  float* target_logit;
  const double* lse;
  const float* grad;

  int64_t column(int64_t row) const { return target[row] - first; }
  bool holds(int64_t row) const { return column(row) >= 0 && column(row) < columns; }
};

ASTRO_INLINE float cap(float v, float softcap) { return softcap > 0.0f ? softcap * std::tanh(v / softcap) : v; }

struct TileSums {
  template <Level L, typename Z>
  static ASTRO_INLINE void run(const Tile<Z>& a, int64_t begin, int64_t end) {
    const float softcap = static_cast<float>(a.options.softcap);
    for (int64_t row = begin; row < end; ++row) {
      const Z* z = a.logits + row * a.columns;
      a.sums[row].add(row_sums<kWidth<L>>(z, a.columns, softcap));
      if (a.holds(row)) a.target_logit[row] = cap(static_cast<float>(z[a.column(row)]), softcap);
    }
  }
};

struct TileGradLogits {
  template <Level L, typename Z>
  static ASTRO_INLINE void run(const Tile<Z>& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Z* to = a.grad_logits + row * a.columns;
      if (a.target[row] == a.options.ignore_index)
        std::fill(to, to + a.columns, Z(0.0f));  // exactly 0, also where grad is Inf or NaN
      else grad_logits<kWidth<L>>(a, a.logits + row * a.columns, to, row);
    }
  }

  template <int N, typename Z>
  static ASTRO_INLINE void grad_logits(const Tile<Z>& a, const Z* z, Z* to, int64_t row) {
    using Vector = simd::F<N>;
    const Options& o = a.options;
    const float lse = static_cast<float>(a.lse[row]), scale = a.grad[row], softcap = static_cast<float>(o.softcap);
    const int64_t whole = a.columns - a.columns % (2 * N), column = a.column(row);
    const float softmax = scale * (1.0f + 2.0f * static_cast<float>(o.z_loss) * lse) *
                          static_cast<float>(lost_in_rounding<float>(a.lse[row]));
    const float uniform = scale * static_cast<float>(o.label_smoothing / static_cast<double>(a.vocabulary));
    const float logit = a.holds(row) ? cap(static_cast<float>(z[column]), softcap) : 0.0f;
    const auto grad_logit = [=](Vector v) ASTRO_LAMBDA_INLINE {
      if (!(softcap > 0.0f)) return exp_below(v - lse) * softmax - uniform;
      const Vector z = capped<N>(v, softcap);
      return (exp_below(z - lse) * softmax - uniform) * (1.0f - (z / softcap) * (z / softcap));
    };
    for (int64_t j = 0; j < whole; j += 2 * N) {
      const auto v = simd::load_pair<N>(z + j);
      simd::store_pair<N>(to + j, simd::Pair<N>{grad_logit(v.first), grad_logit(v.second)});
    }
    const auto one_grad_logit = [=](float v) {  // of a capped logit
      const float derivative = softcap > 0.0f ? 1.0f - (v / softcap) * (v / softcap) : 1.0f;
      return (std::exp(v - lse) * softmax - uniform) * derivative;
    };
    for (int64_t j = whole; j < a.columns; ++j) to[j] = Z(one_grad_logit(cap(static_cast<float>(z[j]), softcap)));
    if (!a.holds(row)) return;
    const float derivative = softcap > 0.0f ? 1.0f - (logit / softcap) * (logit / softcap) : 1.0f;
    to[column] = Z(one_grad_logit(logit) - scale * static_cast<float>(1.0 - o.label_smoothing) * derivative);
  }
};

bool tiles_lead(const Tensor& x) {
  if (x.scalar_type() == at::kBFloat16) return has_bf16_products();
  return x.scalar_type() == at::kFloat && core() == Core::kIntel &&
         (x.size(1) >= kFewestBlasHidden || x.size(0) <= kMostBlasTokens);
}

bool has_bf16_products() {
#if defined(ASTRO_HAS_LEVELS)
  __builtin_cpu_init();
  return level() == Level::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Some tokens against the whole vocabulary.
template <typename Z>
struct Work {
  Tensor x, weight, target;  // [tokens, H], [V, H], [tokens]
  Options options;
  Tensor store;  // logits of tile [first, end) from first * store_row on; empty: they are computed in `scratch` when
                 // their grad_logits are
  int64_t store_row;
  Tensor scratch;  // tokens x columns()
  Tensor grad_x, grad_weight;
  bool first;  // grad_weight is still uninitialised memory

  int64_t tokens() const { return x.size(0); }
  int64_t columns() const {
    const int64_t wanted = kTileBytes / static_cast<int64_t>(sizeof(Z)) / tokens() / 32 * 32;
    return std::min(weight.size(0), std::max(wanted, kFewestColumns));
  }
  Tensor view(const Tensor& memory, int64_t start, int64_t columns) const {
    return memory.narrow(0, start, tokens() * columns).view({tokens(), columns});
  }
  template <typename Function>
  void for_each_tile(const Function& function) const {
    for (int64_t first = 0; first < weight.size(0); first += columns())
      function(first, std::min(columns(), weight.size(0) - first));
  }
  template <class Kernel>
  void visit(const Tile<Z>& tile) const {
    at::parallel_for(0, tokens(), 1, [&](int64_t begin, int64_t end) { dispatch<Kernel>(tile, begin, end); });
  }
};

// lse of every token into `lse`; the sum of the losses.
template <typename Z>
double walk_logits(const Work<Z>& w, double* lse) {
  std::vector<RowSums> sums(w.tokens(), RowSums{-std::numeric_limits<float>::infinity(), 0.0, 0.0});
  std::vector<float> logit(w.tokens());
  const int64_t* y = w.target.template const_data_ptr<int64_t>();
  w.for_each_tile([&](int64_t first, int64_t columns) {
    Tensor logits = w.view(w.store, first * w.store_row, columns);
    at::mm_out(logits, w.x, w.weight.narrow(0, first, columns).t());
    w.template visit<TileSums>({logits.const_data_ptr<Z>(), nullptr, first, columns, w.weight.size(0), y, w.options,
                                sums.data(), logit.data(), nullptr, nullptr});
  });
  const double smoothing = w.options.label_smoothing;
  double sum = 0.0;
  for (int64_t t = 0; t < w.tokens(); ++t) {
    lse[t] = sums[t].shift() + std::log(sums[t].sum_exp);
    if (y[t] == w.options.ignore_index) continue;
    double loss = (1.0 - smoothing) * (lse[t] - logit[t]) + w.options.z_loss * lse[t] * lse[t];
    if (smoothing > 0.0) loss += smoothing * (lse[t] - sums[t].total / static_cast<double>(w.weight.size(0)));
    sum += loss;
  }
  return sum;
}

// Both gradients from lse and the gradient of every token's loss.
template <typename Z>
void walk_grad_logits(const Work<Z>& w, const double* lse, const float* grad) {
  const bool need_x = w.grad_x.defined(), need_weight = w.grad_weight.defined();
  Tensor sum, share;
  if (need_x) {
    sum = at::zeros(w.grad_x.sizes(), w.x.options().dtype(at::kFloat));
    share = at::empty(w.grad_x.sizes(), w.x.options());
  }
  w.for_each_tile([&](int64_t first, int64_t columns) {
    const Tensor weight = w.weight.narrow(0, first, columns);
    Tensor grad_logits = w.view(w.scratch, 0, columns), logits = grad_logits;
    if (w.store.defined()) logits = w.view(w.store, first * w.store_row, columns);
    else at::mm_out(logits, w.x, weight.t());
    w.template visit<TileGradLogits>({logits.const_data_ptr<Z>(), grad_logits.mutable_data_ptr<Z>(), first, columns,
                                      w.weight.size(0), w.target.template const_data_ptr<int64_t>(), w.options, nullptr,
                                      nullptr, lse, grad});
    if (need_x) sum.add_(at::mm_out(share, grad_logits, weight));
    if (!need_weight) return;
    Tensor out = w.grad_weight.narrow(0, first, columns);
    if (w.first) at::mm_out(out, grad_logits.t(), w.x);
    else at::addmm_out(out, out, grad_logits.t(), w.x);
  });
  if (need_x) w.grad_x.copy_(sum);
}

// Undefined where it is not needed.
std::pair<Tensor, Tensor> uninitialised(const Tensor& x, const Tensor& weight, bool need_x, bool need_weight) {
  return {need_x ? at::empty(x.sizes(), x.options()) : Tensor(), !need_weight ? Tensor()
                                                                 : x.size(0) == 0
                                                                     ? at::zeros(weight.sizes(), x.options())
                                                                     : at::empty(weight.sizes(), x.options())};
}

Tensor or_empty(const Tensor& gradient, const Tensor& x) {
  return gradient.defined() ? gradient : at::empty({0}, x.options());
}

// Tokens per block with memory of its own.
template <typename Z>
int64_t usual_tokens(int64_t tokens) {
  if (std::is_same_v<Z, float>) return std::clamp(tokens / 5, kFewestTokens, kMostFloatTokens);
  return std::max((tokens + 2) / 3, kFewestTokens);
}

template <typename Z>
std::tuple<Tensor, Tensor, Tensor> gradients_of(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                float divisor, const Options& o, bool need_x, bool need_weight) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKeySet(c10::DispatchKey::AutocastCPU));
  const int64_t tokens = x.size(0), hidden = x.size(1), vocabulary = weight.size(0);
  const auto [grad_x, grad_weight] = uninitialised(x, weight, need_x, need_weight);
  const int64_t usual = usual_tokens<Z>(tokens), room = need_weight && hidden >= std::min(usual, tokens) ? hidden : 0;
  std::vector<double> lse(tokens);
  const std::vector<float> grad(tokens, 1.0f / divisor);
  Tensor own, scratch;
  double sum = 0.0;
  for (int64_t start = 0; start < tokens;) {
    const bool in_place = start == 0 && room > 0;
    const int64_t count = std::min(in_place ? room : usual, tokens - start);
    if (!in_place && !own.defined()) own = at::empty({count * vocabulary}, x.options());
    Work<Z> w{x.narrow(0, start, count),
              weight,
              target.narrow(0, start, count),
              o,
              in_place ? grad_weight.view({-1}) : own,
              in_place ? hidden : count,
              {},
              need_x ? grad_x.narrow(0, start, count) : Tensor(),
              grad_weight,
              start == 0};
    if (!scratch.defined() || scratch.numel() < count * w.columns())
      scratch = at::empty({count * w.columns()}, x.options());
    w.scratch = scratch;
    sum += walk_logits(w, lse.data() + start);
    walk_grad_logits(w, lse.data() + start, grad.data() + start);
    start += count;
  }
  Tensor total = at::empty({}, x.options().dtype(at::kFloat));
  *total.mutable_data_ptr<float>() = static_cast<float>(sum / divisor);
  return {total, or_empty(grad_x, x), or_empty(grad_weight, x)};
}

template <typename Z>
std::tuple<Tensor, Tensor> backward_of(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& target,
                                       const Tensor& lse, const Options& o, bool need_x, bool need_weight) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKeySet(c10::DispatchKey::AutocastCPU));
  const auto [grad_x, grad_weight] = uninitialised(x, weight, need_x, need_weight);
  if (x.size(0) > 0) {
    Work<Z> w{x, weight, target, o, {}, 0, {}, grad_x, grad_weight, true};
    w.scratch = at::empty({w.tokens() * w.columns()}, x.options());
    walk_grad_logits(w, lse.const_data_ptr<double>(), grad.const_data_ptr<float>());
  }
  return {or_empty(grad_x, x), or_empty(grad_weight, x)};
}

std::tuple<Tensor, Tensor, Tensor> gradients_in_tiles(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                      float divisor, const Options& o, bool need_x, bool need_weight) {
  return x.scalar_type() == at::kFloat
             ? gradients_of<float>(x, weight, target, divisor, o, need_x, need_weight)
             : gradients_of<c10::BFloat16>(x, weight, target, divisor, o, need_x, need_weight);
}

std::tuple<Tensor, Tensor> backward_in_tiles(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& target, const Tensor& lse, const Options& o, bool need_x,
                                             bool need_weight) {
  return x.scalar_type() == at::kFloat
             ? backward_of<float>(grad, x, weight, target, lse, o, need_x, need_weight)
             : backward_of<c10::BFloat16>(grad, x, weight, target, lse, o, need_x, need_weight);
}

}  // namespace astrobiogen::linear_cross_entropy
