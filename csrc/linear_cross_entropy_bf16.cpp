// The fused loss for bf16 on CPUs that multiply bf16 in hardware, by PyTorch's products (oneDNN, 190 GFLOP/s on one core where fp32 reaches 90) and
// one visit to each row of logits between them: both gradients in one pass, or the backward of a loss per token.
//
// The logits are rounded to bf16, as F.linear rounds them, and a third of the tokens have theirs at a time: 0.7 bytes per logit of the whole matrix, where
// eager (bf16 logits, their fp32 copy, its log-softmax) adds 10. So the weight's gradient is rounded three times instead of once, however many
// tokens there are.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "linear_cross_entropy.h"
#include "linear_cross_entropy_gemm.h"

namespace astrobiogen::linear_cross_entropy {

using at::Tensor;
using Bf16 = c10::BFloat16;

// Fewest tokens per block: below, the products slow down (32 tokens: half the speed).
constexpr int64_t kFewestTokens = 128;

struct Rows {
  Bf16* logits;  // [tokens, vocabulary], overwritten by their gradient
  const int64_t* target;
  int64_t vocabulary;
  Options options;
  // Both gradients in one pass: the loss per token goes out, and every token's gradient has one scale.
  double* loss;
  float scale;
  // The backward of a loss per token: null in one pass.
  const float *lse, *grad;
};

struct LossRows {
  template <Level L>
  static ASTRO_INLINE void run(const Rows& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      Bf16* z = a.logits + row * a.vocabulary;
      const bool ignored = a.target[row] == a.options.ignore_index;
      if (ignored) std::fill(z, z + a.vocabulary, Bf16(0.0f));  // exactly 0, also where grad is Inf or NaN
      if (a.lse != nullptr) {
        if (!ignored) slopes<kWidth<L>>(a, z, a.lse[row], a.grad[row], a.target[row]);
      } else {
        a.loss[row] = ignored ? 0.0 : one<kWidth<L>>(a, z, a.target[row]);
      }
    }
  }

  static ASTRO_INLINE float cap(float v, float softcap) { return softcap > 0.0f ? softcap * std::tanh(v / softcap) : v; }

  // One token: its loss, and its logits turned into their gradient.
  template <int N>
  static ASTRO_INLINE double one(const Rows& a, Bf16* z, int64_t target) {
    const Options& o = a.options;
    const RowSums sums = row_sums<N>(z, a.vocabulary, static_cast<float>(o.softcap));
    const float lse = sums.shift() + static_cast<float>(std::log(sums.sum_exp));
    const float logit = cap(static_cast<float>(z[target]), static_cast<float>(o.softcap));
    slopes<N>(a, z, lse, a.scale, target);
    const double smoothing = o.label_smoothing;
    double loss = (1.0 - smoothing) * (static_cast<double>(lse) - logit) + o.z_loss * lse * lse;
    if (smoothing > 0.0) loss += smoothing * (lse - sums.total / static_cast<double>(a.vocabulary));
    return loss;
  }

  template <int N>
  static ASTRO_INLINE void slopes(const Rows& a, Bf16* z, float lse, float scale, int64_t target) {
    using Vector = simd::F<N>;
    const Options& o = a.options;
    const int64_t whole = a.vocabulary - a.vocabulary % (2 * N);
    const float softcap = static_cast<float>(o.softcap), softmax = scale * (1.0f + 2.0f * static_cast<float>(o.z_loss) * lse);
    const float uniform = scale * static_cast<float>(o.label_smoothing / static_cast<double>(a.vocabulary));
    const float logit = cap(static_cast<float>(z[target]), softcap);
    const auto slope = [=](Vector v) ASTRO_LAMBDA_INLINE {
      if (!(softcap > 0.0f)) return exp_below(v - lse) * softmax - uniform;
      const Vector z = capped<N>(v, softcap);
      return (exp_below(z - lse) * softmax - uniform) * (1.0f - (z / softcap) * (z / softcap));
    };
    for (int64_t j = 0; j < whole; j += 2 * N) {
      const auto v = simd::load_pair<N>(z + j);
      simd::store_pair<N>(z + j, simd::Pair<N>{slope(v.first), slope(v.second)});
    }
    const auto one_slope = [=](float v) {  // of a capped logit
      const float derivative = softcap > 0.0f ? 1.0f - (v / softcap) * (v / softcap) : 1.0f;
      return (std::exp(v - lse) * softmax - uniform) * derivative;
    };
    for (int64_t j = whole; j < a.vocabulary; ++j) {
      z[j] = Bf16(one_slope(cap(static_cast<float>(z[j]), softcap)));
    }
    const float derivative = softcap > 0.0f ? 1.0f - (logit / softcap) * (logit / softcap) : 1.0f;
    z[target] = Bf16(one_slope(logit) - scale * static_cast<float>(1.0 - o.label_smoothing) * derivative);
  }
};

bool has_bf16_products() {
#if defined(ASTRO_HAS_LEVELS)
  __builtin_cpu_init();
  return level() == Level::kAvx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// The rows' logits, `visit`ed, and the two products with them, block by block of tokens.
template <typename Visit>
std::tuple<Tensor, Tensor> products(const Tensor& x, const Tensor& weight, bool need_x, bool need_weight, Visit visit) {
  const c10::impl::ExcludeDispatchKeyGuard guard(c10::DispatchKeySet(c10::DispatchKey::AutocastCPU));
  const int64_t tokens = x.size(0), hidden = x.size(1), vocabulary = weight.size(0);
  Tensor grad_x = need_x ? at::empty({tokens, hidden}, x.options()) : at::empty({0}, x.options());
  Tensor grad_weight = !need_weight ? at::empty({0}, x.options())
                       : tokens == 0 ? at::zeros({vocabulary, hidden}, x.options())
                                     : at::empty({vocabulary, hidden}, x.options());
  const int64_t most = std::min(std::max((tokens + 2) / 3, kFewestTokens), tokens);
  Tensor buffer = at::empty({most * vocabulary}, x.options());
  for (int64_t start = 0; start < tokens; start += most) {
    const int64_t count = std::min(most, tokens - start);
    Tensor logits = buffer.narrow(0, 0, count * vocabulary).view({count, vocabulary});
    const Tensor rows = x.narrow(0, start, count);
    at::mm_out(logits, rows, weight.t());
    const Rows a = visit(logits.mutable_data_ptr<Bf16>(), start);
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { dispatch<LossRows>(a, begin, end); });
    if (need_x) {
      Tensor out = grad_x.narrow(0, start, count);
      at::mm_out(out, logits, weight);
    }
    if (need_weight && start == 0) at::mm_out(grad_weight, logits.t(), rows);
    if (need_weight && start > 0) at::addmm_out(grad_weight, grad_weight, logits.t(), rows);
  }
  return {grad_x, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> gradients_bf16(const Tensor& x, const Tensor& weight, const Tensor& target, float divisor, const Options& o,
                                                  bool need_x, bool need_weight) {
  std::vector<double> loss(x.size(0));
  const int64_t* y = target.const_data_ptr<int64_t>();
  auto [grad_x, grad_weight] = products(x, weight, need_x, need_weight, [&](Bf16* logits, int64_t start) {
    return Rows{logits, y + start, weight.size(0), o, loss.data() + start, 1.0f / divisor, nullptr, nullptr};
  });
  double sum = 0.0;
  for (const double value : loss) sum += value;
  Tensor total = at::empty({}, x.options().dtype(at::kFloat));
  *total.mutable_data_ptr<float>() = static_cast<float>(sum / divisor);
  return {total, grad_x, grad_weight};
}

std::tuple<Tensor, Tensor> backward_bf16(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& target, const Tensor& lse,
                                         const Options& o, bool need_x, bool need_weight) {
  const int64_t* y = target.const_data_ptr<int64_t>();
  return products(x, weight, need_x, need_weight, [&](Bf16* logits, int64_t start) {
    return Rows{logits, y + start, weight.size(0), o, nullptr, 0.0f, lse.const_data_ptr<float>() + start, grad.const_data_ptr<float>() + start};
  });
}

}  // namespace astrobiogen::linear_cross_entropy
