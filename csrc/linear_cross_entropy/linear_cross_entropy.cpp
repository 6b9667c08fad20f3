// Linear layer + cross-entropy on the CPU, forward and backward. Formulas:
// astrobiogen/kernels/linear_cross_entropy/reference.py.
//
// The logits exist only as one reused tile of tokens x vocabulary, which the BLAS fills (at::mm_out) and one pass
// reads. Forward: one GEMM and an online log-sum-exp over the vocabulary tiles. Backward: recomputes each tile (the
// same GEMM, so the same bits), turns it into the gradient of the logits in place and multiplies it twice; both
// products accumulate in fp32 (fp64 for fp64). The vocabulary is the outer loop: a tile of the weight, and of its
// gradient, stays in the cache while all tokens pass.
//
// bf16 on CPUs that multiply it in hardware has tiles of bf16 (the backward is in linear_cross_entropy/tiles.cpp).
// Elsewhere bf16, and fp16 everywhere, go through fp32 tiles: fp32 GEMMs are exact on them, and machines without such
// units run the half-precision GEMM ~50x slower.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/simd.h"
#include "linear_cross_entropy/linear_cross_entropy.h"
#include "linear_cross_entropy/checks.h"
#include "linear_cross_entropy/products.h"

namespace astrobiogen::linear_cross_entropy {

using at::Tensor;

// Tokens per tile. Above ~256 rows the GEMM's speed no longer depends on it.
constexpr int64_t kTokens = 512;
// Logits per tile: 1 MB of fp32, which stays in the cache between the GEMMs; wider tiles were slower (the op's notes).
constexpr int64_t kTile = 512 * 512;
// Widest tile: with few tokens the fp32 copy of a half-precision weight tile must stay small too.
constexpr int64_t kMaxColumns = 4096;
// Rows are handed to threads in pieces of at least this many logits; below, waking a thread (~5 us) costs more than it
// saves.
constexpr int64_t kGrainElements = 16384;

// Running sums of one token over the vocabulary tiles seen so far. Doubles: hundreds of tiles must not cost digits,
// nor what is common to all logits.
template <typename T>
struct Running {
  T maximum;
  double sum_exp;  // of exp(z - maximum)
  double sum;      // of z

  double lse() const { return static_cast<double>(maximum) + std::log(sum_exp); }
};

// `Z`: the dtype of the tile; `T`: of the sums, float or double.
template <typename T, typename Z>
struct Statistics {
  const Z* logits;  // [tokens, columns]
  const int64_t* target;
  Running<T>* running;
  T* target_logit;
  int64_t columns;
  int64_t first;  // vocabulary index of column 0
  T softcap;
};

// The gradient of a logit z is (softmax * exp(z - lse) - uniform - [target] onehot), times the derivative of the cap.
template <typename T>
struct GradLogits {
  T* logits;  // [tokens, columns], overwritten
  const int64_t* target;
  const double* lse;
  const T* grad;
  int64_t columns;
  int64_t first;
  int64_t vocabulary;
  Options options;
};

ASTRO_INLINE simd::f32x8 capped(simd::f32x8 z, float softcap) {
  return softcap > 0.0f ? softcap * simd::tanh(z / softcap) : z;
}

ASTRO_INLINE double capped(double z, double softcap) { return softcap > 0.0 ? softcap * std::tanh(z / softcap) : z; }

// Moves the sums to a new maximum. While everything seen is -Inf the shift is 0, so that exp(-Inf) = 0 is added and not
// NaN.
template <typename T>
ASTRO_INLINE T shift_to(Running<T>& r, T maximum) {
  const T lowest = -std::numeric_limits<T>::infinity();
  const T raised = maximum > r.maximum ? maximum : r.maximum;
  const T shift = raised == lowest ? T(0) : raised;
  if (r.maximum != lowest) r.sum_exp *= std::exp(r.maximum - shift);
  r.maximum = raised;
  return shift;
}

template <Level L, typename Z>
ASTRO_INLINE void statistics_row(const Statistics<float, Z>& a, int64_t row) {
  const Z* z = a.logits + row * a.columns;
  Running<float>& r = a.running[row];
  const RowSums sums = row_sums<kWidth<L>>(z, a.columns, a.softcap);
  const float shift = shift_to(r, sums.maximum);
  r.sum_exp += sums.sum_exp * std::exp(sums.shift() - shift);
  r.sum += sums.total;
  const int64_t column = a.target[row] - a.first;
  if (column >= 0 && column < a.columns)
    a.target_logit[row] = capped(simd::splat8(static_cast<float>(z[column])), a.softcap)[0];
}

// fp64 serves gradient checks: plain loops, whatever the level.
template <Level>
ASTRO_INLINE void statistics_row(const Statistics<double, double>& a, int64_t row) {
  const double* z = a.logits + row * a.columns;
  Running<double>& r = a.running[row];
  double maximum = -std::numeric_limits<double>::infinity();
  for (int64_t j = 0; j < a.columns; ++j) maximum = std::max(maximum, z[j]);
  const double shift = shift_to(r, capped(maximum, a.softcap));
  for (int64_t j = 0; j < a.columns; ++j) {
    const double v = capped(z[j], a.softcap);
    r.sum_exp += std::exp(v - shift);
    r.sum += v;
  }
  const int64_t column = a.target[row] - a.first;
  if (column >= 0 && column < a.columns) a.target_logit[row] = capped(z[column], a.softcap);
}

ASTRO_INLINE simd::f32x8 grad_logit(simd::f32x8 v, float lse, float softmax, float uniform, float softcap) {
  if (!(softcap > 0.0f)) return simd::exp_nonpositive(v - lse) * softmax - uniform;
  const simd::f32x8 ratio = simd::tanh(v / softcap);
  return (simd::exp_nonpositive(softcap * ratio - lse) * softmax - uniform) * (1.0f - ratio * ratio);
}

template <typename T>
ASTRO_INLINE void grad_logit_row(const GradLogits<T>& a, int64_t row) {
  T* z = a.logits + row * a.columns;
  if (a.target[row] == a.options.ignore_index) {  // exactly 0, also where grad is Inf or NaN (the mean over no token)
    std::fill(z, z + a.columns, T(0));
    return;
  }
  const T grad = a.grad[row], lse = static_cast<T>(a.lse[row]), softcap = static_cast<T>(a.options.softcap);
  const T softmax =
      grad * (T(1) + T(2) * static_cast<T>(a.options.z_loss) * lse) * static_cast<T>(lost_in_rounding<T>(a.lse[row]));
  const T uniform = grad * static_cast<T>(a.options.label_smoothing / static_cast<double>(a.vocabulary));
  const int64_t column = a.target[row] - a.first;
  const bool here = column >= 0 && column < a.columns;
  const T onehot = here ? grad * static_cast<T>(1.0 - a.options.label_smoothing) : T(0);
  T cap_slope = T(1);
  if constexpr (std::is_same_v<T, float>) {
    using namespace simd;
    if (here && softcap > 0.0f) {
      const float ratio = tanh(splat(z[column] / softcap))[0];
      cap_slope = 1.0f - ratio * ratio;
    }
    const int64_t whole = a.columns - a.columns % kHalfLanes, rest = a.columns - whole;
    for (int64_t j = 0; j < whole; j += kHalfLanes)
      store8(z + j, grad_logit(load8(z + j), lse, softmax, uniform, softcap));
    if (rest > 0)
      store8_partial(z + whole, grad_logit(load8_partial(z + whole, rest), lse, softmax, uniform, softcap), rest);
  } else {
    for (int64_t j = 0; j < a.columns; ++j) {
      const T ratio = softcap > T(0) ? std::tanh(z[j] / softcap) : T(0);
      const T v = softcap > T(0) ? softcap * ratio : z[j];
      const T derivative = T(1) - ratio * ratio;
      if (j == column) cap_slope = derivative;
      z[j] = (std::exp(v - lse) * softmax - uniform) * derivative;
    }
  }
  if (here) z[column] -= onehot * cap_slope;
}

struct StatisticsRows {
  template <Level L, typename T, typename Z>
  static ASTRO_INLINE void run(const Statistics<T, Z>& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) statistics_row<L>(a, row);
  }
};

struct GradLogitRows {
  template <Level L, typename T>
  static ASTRO_INLINE void run(const GradLogits<T>& a, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) grad_logit_row(a, row);
  }
};

int64_t grain(int64_t columns) { return std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, columns)); }

// How the matrix of logits is cut. Forward and backward must agree, so that recomputed logits have the same bits.
struct Tiling {
  int64_t tokens;
  int64_t columns;
  Tiling(int64_t all_tokens, int64_t vocabulary)
      : tokens(std::clamp<int64_t>(all_tokens, 1, kTokens)),
        columns(std::min({vocabulary, kMaxColumns, (kTile / tokens + 31) / 32 * 32})) {}
};

// fp16 and bf16 as fp32, everything else as it is; a strided matrix stays strided where the BLAS can take it.
Tensor wide(const Tensor& t) {
  return t.scalar_type() == at::kDouble || t.scalar_type() == at::kFloat ? t : t.to(at::kFloat);
}

Tensor tile_view(const Tensor& buffer, int64_t rows, int64_t columns) {
  return buffer.narrow(0, 0, rows * columns).view({rows, columns});
}

void check_targets(const Tensor& target, int64_t vocabulary, int64_t ignore_index) {
  const int64_t* y = target.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < target.numel(); ++row)
    TORCH_CHECK(y[row] == ignore_index || (y[row] >= 0 && y[row] < vocabulary), "target must hold values in [0, ",
                vocabulary, ") or ignore_index = ", ignore_index, "; got ", y[row], " at flat position ", row);
}

template <typename T>
void finish(const Tensor& target, const Running<T>* running, const T* target_logit, int64_t vocabulary,
            const Options& o, T* loss, double* lse) {
  const int64_t* y = target.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < target.numel(); ++row) {
    const double value = running[row].lse(), surprise = value - static_cast<double>(target_logit[row]);
    lse[row] = value;
    double cost = surprise;
    if (o.label_smoothing > 0.0)
      cost = (1.0 - o.label_smoothing) * surprise +
             o.label_smoothing * (value - running[row].sum / static_cast<double>(vocabulary));
    if (o.z_loss > 0.0) cost += o.z_loss * value * value;
    loss[row] = y[row] == o.ignore_index ? T(0) : static_cast<T>(cost);
  }
}

// In tiles of `Z`: as the weight comes, or fp32 for half precision without products of its own.
template <typename T, typename Z>
std::tuple<Tensor, Tensor> forward_typed(const Tensor& x_any, const Tensor& weight, const Tensor& target,
                                         const Options& o) {
  constexpr at::ScalarType tile_type = c10::CppTypeToScalarType<Z>::value;
  const Tensor x = x_any.to(tile_type);
  const auto sums = x.options().dtype(c10::CppTypeToScalarType<T>::value);
  const int64_t tokens = x.size(0), vocabulary = weight.size(0);
  Tensor loss = at::empty({tokens}, sums), lse = at::empty({tokens}, sums.dtype(at::kDouble));
  if (tokens == 0) return {loss, lse};
  const Tiling tiling(tokens, vocabulary);
  const Tensor buffer = at::empty({tiling.tokens * tiling.columns}, x.options());
  std::vector<Running<T>> running(tokens, Running<T>{-std::numeric_limits<T>::infinity(), 0.0, 0.0});
  std::vector<T> target_logit(tokens, T(0));
  for (int64_t first = 0; first < vocabulary; first += tiling.columns) {
    const int64_t columns = std::min(tiling.columns, vocabulary - first);
    const Tensor w = weight.narrow(0, first, columns).to(tile_type).t();
    for (int64_t start = 0; start < tokens; start += tiling.tokens) {
      const int64_t rows = std::min(tiling.tokens, tokens - start);
      Tensor logits = tile_view(buffer, rows, columns);
      at::mm_out(logits, x.narrow(0, start, rows), w);
      const Statistics<T, Z> a{logits.const_data_ptr<Z>(),
                               target.const_data_ptr<int64_t>() + start,
                               running.data() + start,
                               target_logit.data() + start,
                               columns,
                               first,
                               static_cast<T>(o.softcap)};
      at::parallel_for(0, rows, grain(columns),
                       [&](int64_t begin, int64_t end) { dispatch<StatisticsRows>(a, begin, end); });
    }
  }
  finish<T>(target, running.data(), target_logit.data(), vocabulary, o, loss.mutable_data_ptr<T>(),
            lse.mutable_data_ptr<double>());
  return {loss, lse};
}

// out += a b, or out = a b on the first visit, so that out may be uninitialised memory that holds NaN.
void accumulate(Tensor out, const Tensor& a, const Tensor& b, bool first_visit) {
  if (first_visit) {
    at::mm_out(out, a, b);
  } else {
    at::addmm_out(out, out, a, b);
  }
}

template <typename T>
std::tuple<Tensor, Tensor> backward_typed(const Tensor& grad, const Tensor& x_any, const Tensor& weight,
                                          const Tensor& target, const Tensor& lse, const Options& o, bool need_x,
                                          bool need_weight) {
  const Tensor x = wide(x_any);
  const int64_t tokens = x.size(0), hidden = x.size(1), vocabulary = weight.size(0);
  const bool half = weight.scalar_type() != x.scalar_type();
  if (tokens == 0) {
    return {need_x ? at::empty({0, hidden}, x_any.options()) : at::empty({0}, x_any.options()),
            need_weight ? at::zeros({vocabulary, hidden}, weight.options()) : at::empty({0}, weight.options())};
  }
  Tensor grad_x = need_x ? at::empty({tokens, hidden}, x.options()) : at::empty({0}, x.options());
  Tensor grad_weight =
      need_weight ? at::empty({vocabulary, hidden}, weight.options()) : at::empty({0}, weight.options());
  const Tiling tiling(tokens, vocabulary);
  const Tensor buffer = at::empty({tiling.tokens * tiling.columns}, x.options());
  const Tensor partial = need_weight && half ? at::empty({tiling.columns, hidden}, x.options()) : Tensor();
  for (int64_t first = 0; first < vocabulary; first += tiling.columns) {
    const int64_t columns = std::min(tiling.columns, vocabulary - first);
    const Tensor w = wide(weight.narrow(0, first, columns));
    Tensor grad_w;
    if (need_weight) grad_w = half ? partial.narrow(0, 0, columns) : grad_weight.narrow(0, first, columns);
    for (int64_t start = 0; start < tokens; start += tiling.tokens) {
      const int64_t rows = std::min(tiling.tokens, tokens - start);
      const Tensor x_rows = x.narrow(0, start, rows);
      Tensor logits = tile_view(buffer, rows, columns);
      at::mm_out(logits, x_rows, w.t());
      const GradLogits<T> a{logits.mutable_data_ptr<T>(),
                            target.const_data_ptr<int64_t>() + start,
                            lse.const_data_ptr<double>() + start,
                            grad.const_data_ptr<T>() + start,
                            columns,
                            first,
                            vocabulary,
                            o};
      at::parallel_for(0, rows, grain(columns),
                       [&](int64_t begin, int64_t end) { dispatch<GradLogitRows>(a, begin, end); });
      if (need_x) accumulate(grad_x.narrow(0, start, rows), logits, w, first == 0);
      if (need_weight) accumulate(grad_w, logits.t(), x_rows, start == 0);
    }
    if (need_weight && half) grad_weight.narrow(0, first, columns).copy_(grad_w);
  }
  return {grad_x.to(x_any.scalar_type()), grad_weight};
}

// Inside a CPU kernel an autocast region must not round our fp32 tiles.
c10::DispatchKeySet no_autocast() { return c10::DispatchKeySet(c10::DispatchKey::AutocastCPU); }

std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& weight, const Tensor& target_any,
                                   int64_t ignore_index, double label_smoothing, double z_loss, double softcap) {
  constexpr check::Op op("astrobiogen::linear_cross_entropy");
  check_arguments(op, x, weight, target_any, {ignore_index, label_smoothing, z_loss, softcap});
  const c10::impl::ExcludeDispatchKeyGuard guard(no_autocast());
  const Tensor target = target_any.contiguous();
  check_targets(target, weight.size(0), ignore_index);
  const Options o{ignore_index, label_smoothing, z_loss, softcap};
  auto [loss, lse] = x.scalar_type() == at::kDouble ? forward_typed<double, double>(x, weight, target, o)
                     : x.scalar_type() == at::kBFloat16 && has_bf16_products()
                         ? forward_typed<float, c10::BFloat16>(x, weight, target, o)
                         : forward_typed<float, float>(x, weight, target, o);
  const int64_t* labels = target.const_data_ptr<int64_t>();
  double* sums = lse.mutable_data_ptr<double>();
  for (int64_t token = 0; token < target.numel(); ++token)
    if (labels[token] == ignore_index) sums[token] = 0.0;
  return {loss, lse};
}

// x with 0 in the rows of ignored tokens: their grad_logit is 0, and 0 times a NaN that such a row may hold would be
// NaN.
Tensor only_kept(const Tensor& x, const Tensor& target, int64_t ignore_index) {
  const int64_t *y = target.const_data_ptr<int64_t>(), *end = y + target.numel();
  return std::find(y, end, ignore_index) == end ? x : x.masked_fill(target.eq(ignore_index).unsqueeze(-1), 0);
}

Tensor without_ignored(Tensor grad_x, const Tensor& target, int64_t ignore_index) {
  if (grad_x.dim() != 2) return grad_x;  // not wanted
  const int64_t* labels = target.const_data_ptr<int64_t>();
  const int64_t bytes = grad_x.size(1) * grad_x.element_size();
  char* rows = static_cast<char*>(grad_x.mutable_data_ptr());
  for (int64_t token = 0; token < grad_x.size(0); ++token)
    if (labels[token] == ignore_index) std::memset(rows + token * bytes, 0, bytes);
  return grad_x;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& weight,
                                    const Tensor& target_any, const Tensor& lse_any, int64_t ignore_index,
                                    double label_smoothing, double z_loss, double softcap, bool need_x,
                                    bool need_weight) {
  constexpr check::Op op("astrobiogen::linear_cross_entropy_backward");
  check_arguments(op, x_any, weight, target_any, {ignore_index, label_smoothing, z_loss, softcap});
  check_upstream(op, grad_any, lse_any, x_any);
  const c10::impl::ExcludeDispatchKeyGuard guard(no_autocast());
  const Tensor target = target_any.contiguous(), lse = lse_any.to(at::kDouble).contiguous();
  const Tensor grad = grad_any.to(x_any.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).contiguous();
  check_targets(target, weight.size(0), ignore_index);
  const Options o{ignore_index, label_smoothing, z_loss, softcap};
  const Tensor x = only_kept(x_any, target, ignore_index);
  const auto [grad_x, grad_weight] =
      tiles_lead(x) ? backward_in_tiles(grad, x.contiguous(), weight.contiguous(), target, lse, o, need_x, need_weight)
      : x.scalar_type() == at::kDouble ? backward_typed<double>(grad, x, weight, target, lse, o, need_x, need_weight)
                                       : backward_typed<float>(grad, x, weight, target, lse, o, need_x, need_weight);
  return {without_ignored(grad_x, target, ignore_index), grad_weight};
}

}  // namespace astrobiogen::linear_cross_entropy

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("linear_cross_entropy", &astrobiogen::linear_cross_entropy::forward);
  m.impl("linear_cross_entropy_backward", &astrobiogen::linear_cross_entropy::backward);
}
