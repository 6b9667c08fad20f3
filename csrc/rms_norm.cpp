// RMSNorm on the CPU, forward and backward, with the residual addition fused. Formulas: astrobiogen/kernels/rms_norm/reference.py.
//
// Memory-bound: forward reads x twice, the second time from L1/L2 (a row of 4352 floats is 17 KB), and writes y once. The weight gradient is
// summed into one fp32 row per block of rows; the block count depends on the shape only, so any thread count gives the same bits.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/simd.h"

namespace astrobiogen::rms_norm {

using at::Tensor;

// Weight-gradient partials: at most this many fp32 rows, so 16 x 4352 x 4 B = 0.28 MB beside a 35.6 MB input.
constexpr int64_t kMaxBlocks = 16;
// A block below this many elements costs more to schedule (~5 us) than to compute.
constexpr int64_t kGrainElements = 16384;

template <typename T>
struct Forward {
  const T* x;
  const T* residual;  // null: no addition
  T* sum;             // written only with a residual
  const float* weight;
  T* y;
  float* rstd;
  int64_t hidden;
  float eps;
  bool streamed;  // y and sum bypass the cache
};

template <typename T>
struct Backward {
  const T* grad_y;
  const T* x;
  const T* grad_sum;  // null: no second gradient
  const float* weight;
  const float* rstd;
  T* grad_x;
  int64_t hidden;
  bool streamed;  // grad_x bypasses the cache
};

template <typename T>
ASTRO_INLINE void forward_row(const Forward<T>& a, int64_t row, T* scratch) {
  using namespace simd;
  const int64_t hidden = a.hidden, whole = hidden - hidden % kLanes;
  const T* x = a.x + row * hidden;
  if (a.residual != nullptr) {
    const T* residual = a.residual + row * hidden;
    T* sum = a.sum + row * hidden;
    for (int64_t j = 0; j < whole; j += kLanes) store(scratch + j, load(x + j) + load(residual + j));
    for (int64_t j = whole; j < hidden; ++j) scratch[j] = static_cast<T>(static_cast<float>(x[j]) + static_cast<float>(residual[j]));
    if (a.streamed)
      for (int64_t j = 0; j < whole; j += kLanes) stream(sum + j, load(scratch + j));
    else
      std::copy(scratch, scratch + whole, sum);
    std::copy(scratch + whole, scratch + hidden, sum + whole);
    x = scratch;
  }
  f32x16 squares[4] = {};  // four chains hide the 4-cycle add latency
  int64_t j = 0;
  for (; j + 4 * kLanes <= whole; j += 4 * kLanes)
    for (int64_t k = 0; k < 4; ++k) {
      const f32x16 v = load(x + j + k * kLanes);
      squares[k] += v * v;
    }
  for (; j < whole; j += kLanes) {
    const f32x16 v = load(x + j);
    squares[0] += v * v;
  }
  if (whole < hidden) {
    const f32x16 v = load_partial(x + whole, hidden - whole);
    squares[1] += v * v;
  }
  const float mean = simd::sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(hidden);
  const float rstd = 1.0f / std::sqrt(mean + a.eps);
  a.rstd[row] = rstd;
  T* y = a.y + row * hidden;
  if (a.streamed)
    for (j = 0; j < whole; j += kLanes) stream(y + j, load(x + j) * rstd * load(a.weight + j));
  else
    for (j = 0; j < whole; j += kLanes) store(y + j, load(x + j) * rstd * load(a.weight + j));
  if (whole < hidden) {
    const int64_t rest = hidden - whole;
    store_partial(y + whole, load_partial(x + whole, rest) * rstd * load_partial(a.weight + whole, rest), rest);
  }
}

// Adds this row's grad_y * x * rstd to grad_weight while the row is in L1.
template <typename T>
ASTRO_INLINE void backward_row(const Backward<T>& a, int64_t row, float* grad_weight) {
  using namespace simd;
  const int64_t hidden = a.hidden, whole = hidden - hidden % kLanes, rest = hidden - whole;
  const T* x = a.x + row * hidden;
  const T* grad_y = a.grad_y + row * hidden;
  const float rstd = a.rstd[row];
  f32x16 dots[2] = {};
  int64_t j = 0;
  for (; j < whole; j += kLanes) {
    const f32x16 normalised = load(x + j) * rstd, grad = load(grad_y + j);
    const f32x16 product = grad * normalised;
    dots[(j / kLanes) & 1] += product * load(a.weight + j);
    store(grad_weight + j, load(grad_weight + j) + product);
  }
  if (rest > 0) {
    const f32x16 product = load_partial(grad_y + whole, rest) * (load_partial(x + whole, rest) * rstd);
    dots[0] += product * load_partial(a.weight + whole, rest);
    store_partial(grad_weight + whole, load_partial(grad_weight + whole, rest) + product, rest);
  }
  const float correction = simd::sum(dots[0] + dots[1]) / static_cast<float>(hidden) * rstd;
  T* grad_x = a.grad_x + row * hidden;
  const T* grad_sum = a.grad_sum == nullptr ? nullptr : a.grad_sum + row * hidden;
  for (j = 0; j < whole; j += kLanes) {
    f32x16 value = (load(grad_y + j) * load(a.weight + j) - load(x + j) * correction) * rstd;
    if (grad_sum != nullptr) value += load(grad_sum + j);
    if (a.streamed) stream(grad_x + j, value);
    else store(grad_x + j, value);
  }
  if (rest > 0) {
    f32x16 value = (load_partial(grad_y + whole, rest) * load_partial(a.weight + whole, rest) - load_partial(x + whole, rest) * correction) * rstd;
    if (grad_sum != nullptr) value += load_partial(grad_sum + whole, rest);
    store_partial(grad_x + whole, value, rest);
  }
}

template <typename T>
ASTRO_INLINE void forward_rows(const Forward<T>& a, int64_t begin, int64_t end) {
  // The rounded sum of one row stays here, in L1, for the second walk: what went past the cache cannot be read back cheaply.
  std::vector<T> scratch(a.residual == nullptr ? 0 : a.hidden);
  for (int64_t row = begin; row < end; ++row) forward_row(a, row, scratch.data());
  simd::stream_fence();
}

template <typename T>
ASTRO_INLINE void backward_rows(const Backward<T>& a, int64_t begin, int64_t end, float* grad_weight) {
  for (int64_t row = begin; row < end; ++row) backward_row(a, row, grad_weight);
  simd::stream_fence();
}

// One overload per dtype: function multiversioning does not take templates.
#define ASTRO_RMS_NORM_ENTRY(T)                                                                               \
  ASTRO_MULTIVERSION void run(const Forward<T>& a, int64_t begin, int64_t end) { forward_rows(a, begin, end); } \
  ASTRO_MULTIVERSION void run(const Backward<T>& a, int64_t begin, int64_t end, float* grad_weight) {         \
    backward_rows(a, begin, end, grad_weight);                                                                \
  }
ASTRO_RMS_NORM_ENTRY(float)
ASTRO_RMS_NORM_ENTRY(c10::BFloat16)
ASTRO_RMS_NORM_ENTRY(c10::Half)
#undef ASTRO_RMS_NORM_ENTRY

// fp64 serves gradient checks: plain loops, one thread.
std::tuple<Tensor, Tensor> forward_double(const Tensor& x, const Tensor& weight, double eps, Tensor y, Tensor rstd) {
  const Tensor weight_double = weight.to(at::kDouble).contiguous();
  const double *in = x.const_data_ptr<double>(), *w = weight_double.const_data_ptr<double>();
  double *out = y.mutable_data_ptr<double>(), *scale = rstd.mutable_data_ptr<double>();
  const int64_t hidden = x.size(-1);
  for (int64_t row = 0; row < rstd.numel(); ++row, in += hidden, out += hidden) {
    double squares = 0.0;
    for (int64_t j = 0; j < hidden; ++j) squares += in[j] * in[j];
    scale[row] = 1.0 / std::sqrt(squares / static_cast<double>(hidden) + eps);
    for (int64_t j = 0; j < hidden; ++j) out[j] = in[j] * scale[row] * w[j];
  }
  return {y, rstd};
}

std::tuple<Tensor, Tensor> backward_double(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                                           const std::optional<Tensor>& grad_sum, Tensor grad_x) {
  const Tensor weight_double = weight.to(at::kDouble).contiguous();
  Tensor grad_weight = at::zeros({x.size(-1)}, weight_double.options());
  const double *g = grad_y.const_data_ptr<double>(), *in = x.const_data_ptr<double>(), *w = weight_double.const_data_ptr<double>();
  const double *scale = rstd.const_data_ptr<double>(), *other = grad_sum ? grad_sum->const_data_ptr<double>() : nullptr;
  double *out = grad_x.mutable_data_ptr<double>(), *dw = grad_weight.mutable_data_ptr<double>();
  const int64_t hidden = x.size(-1);
  for (int64_t row = 0; row < rstd.numel(); ++row) {
    const int64_t base = row * hidden;
    double dot = 0.0;
    for (int64_t j = 0; j < hidden; ++j) {
      const double product = g[base + j] * in[base + j] * scale[row];
      dot += product * w[j];
      dw[j] += product;
    }
    const double correction = dot / static_cast<double>(hidden) * scale[row];
    for (int64_t j = 0; j < hidden; ++j) {
      out[base + j] = (g[base + j] * w[j] - in[base + j] * correction) * scale[row];
      if (other != nullptr) out[base + j] += other[base + j];
    }
  }
  return {grad_x, grad_weight.to(weight.scalar_type())};
}

template <typename T>
void forward_typed(const Tensor& x, const Tensor* residual, Tensor* sum, const Tensor& weight, double eps, Tensor& y, Tensor& rstd) {
  const Tensor weight_float = weight.to(at::kFloat).contiguous();
  const Forward<T> args{x.const_data_ptr<T>(),
                        residual == nullptr ? nullptr : residual->const_data_ptr<T>(),
                        sum == nullptr ? nullptr : sum->mutable_data_ptr<T>(),
                        weight_float.const_data_ptr<float>(),
                        y.mutable_data_ptr<T>(),
                        rstd.mutable_data_ptr<float>(),
                        x.size(-1),
                        static_cast<float>(eps),
                        simd::can_stream(y.const_data_ptr<T>(), y.size(-1), y.numel()) &&
                            (sum == nullptr || simd::can_stream(sum->const_data_ptr<T>(), y.size(-1), y.numel()))};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / args.hidden);
  at::parallel_for(0, rstd.numel(), grain, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

template <typename T>
Tensor backward_typed(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& rstd, const std::optional<Tensor>& grad_sum,
                      Tensor& grad_x) {
  const Tensor weight_float = weight.to(at::kFloat).contiguous();
  const int64_t hidden = x.size(-1), rows = rstd.numel();
  const Backward<T> args{grad_y.const_data_ptr<T>(),
                         x.const_data_ptr<T>(),
                         grad_sum ? grad_sum->const_data_ptr<T>() : nullptr,
                         weight_float.const_data_ptr<float>(),
                         rstd.const_data_ptr<float>(),
                         grad_x.mutable_data_ptr<T>(),
                         hidden,
                         simd::can_stream(grad_x.const_data_ptr<T>(), hidden, grad_x.numel())};
  const int64_t blocks = std::clamp<int64_t>(rows * hidden / kGrainElements, 1, kMaxBlocks);
  Tensor partials = at::zeros({blocks, hidden}, weight_float.options());
  float* partial = partials.mutable_data_ptr<float>();
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block)
      run(args, block * rows / blocks, (block + 1) * rows / blocks, partial + block * hidden);
  });
  for (int64_t block = 1; block < blocks; ++block)
    for (int64_t j = 0; j < hidden; ++j) partial[j] += partial[block * hidden + j];
  return partials[0].to(weight.scalar_type(), /*non_blocking=*/false, /*copy=*/true);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_any, const Tensor* residual_any, const Tensor& weight, double eps) {
  const Tensor x = x_any.contiguous();
  const bool add = residual_any != nullptr;
  const Tensor residual = add ? residual_any->contiguous() : Tensor();
  const bool wide = x.scalar_type() == at::kDouble;
  Tensor y = at::empty(x.sizes(), x.options());
  Tensor sum = add ? at::empty(x.sizes(), x.options()) : Tensor();
  Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(wide ? at::kDouble : at::kFloat));
  if (wide) {
    if (add) sum = at::add(x, residual);
    forward_double(add ? sum : x, weight, eps, y, rstd);
  } else {
    auto dispatch = [&]<typename T>() {
      forward_typed<T>(x, add ? &residual : nullptr, add ? &sum : nullptr, weight, eps, y, rstd);
    };
    if (x.scalar_type() == at::kFloat) dispatch.template operator()<float>();
    else if (x.scalar_type() == at::kBFloat16) dispatch.template operator()<c10::BFloat16>();
    else dispatch.template operator()<c10::Half>();
  }
  return {y, sum, rstd};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  auto [y, sum, rstd] = forward(x, nullptr, weight, eps);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  return forward(x, &residual, weight, eps);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y_any, const Tensor& x_any, const Tensor& weight, const Tensor& rstd,
                                             const std::optional<Tensor>& grad_sum_any) {
  const Tensor grad_y = grad_y_any.contiguous(), x = x_any.contiguous();
  const std::optional<Tensor> grad_sum = grad_sum_any ? std::optional(grad_sum_any->contiguous()) : std::nullopt;
  Tensor grad_x = at::empty(x.sizes(), x.options());
  switch (x.scalar_type()) {
    case at::kDouble:
      return backward_double(grad_y, x, weight, rstd, grad_sum, grad_x);
    case at::kFloat:
      return {grad_x, backward_typed<float>(grad_y, x, weight, rstd, grad_sum, grad_x)};
    case at::kBFloat16:
      return {grad_x, backward_typed<c10::BFloat16>(grad_y, x, weight, rstd, grad_sum, grad_x)};
    default:
      return {grad_x, backward_typed<c10::Half>(grad_y, x, weight, rstd, grad_sum, grad_x)};
  }
}

}  // namespace astrobiogen::rms_norm

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("rms_norm", &astrobiogen::rms_norm::rms_norm);
  m.impl("add_rms_norm", &astrobiogen::rms_norm::add_rms_norm);
  m.impl("rms_norm_backward", &astrobiogen::rms_norm::rms_norm_backward);
}
