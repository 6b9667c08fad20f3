// The gradient formulas of `rms_norm` and `add_rms_norm` for CPU tensors in C++. A Python formula
// (astrobiogen/kernels/rms_norm/op.py, which serves other devices) costs about 40 us per call and gradient, more than
// the arithmetic of 256 rows of 64; a small model has dozens of norms.
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/Functions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "common/autograd.h"

namespace astrobiogen::rms_norm {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

Two slopes(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& rstd, const Tensor& grad_sum) {
  static const auto call =
      op<Two(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&)>(
          "astrobiogen::rms_norm_backward");
  return gradients(call, grad, x, weight, rstd,
                   grad_sum.defined() ? std::optional<Tensor>(grad_sum) : std::optional<Tensor>());
}

struct Norm : torch::autograd::Function<Norm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto call = op<Two(const Tensor&, const Tensor&, double)>("astrobiogen::rms_norm");
    auto [y, rstd] = call.call(x, weight, eps);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({rstd});
    ctx->save_for_backward({x, weight, rstd});
    return {y, rstd};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return variable_list(3);
    const auto saved = ctx->get_saved_variables();
    auto [grad_x, grad_weight] = slopes(grads[0], saved[0], saved[1], saved[2], Tensor());
    return {grad_x, grad_weight, Tensor()};
  }
};

struct AddNorm : torch::autograd::Function<AddNorm> {
  static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& residual, const Tensor& weight,
                               double eps) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto call =
        op<Three(const Tensor&, const Tensor&, const Tensor&, double)>("astrobiogen::add_rms_norm");
    auto [y, total, rstd] = call.call(x, residual, weight, eps);
    ctx->set_materialize_grads(false);
    ctx->mark_non_differentiable({rstd});
    ctx->save_for_backward({total, weight, rstd});
    return {y, total, rstd};
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    if (!grads[0].defined()) return {grads[1], grads[1], Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    auto [grad_total, grad_weight] = slopes(grads[0], saved[0], saved[1], saved[2], grads[1]);
    return {grad_total, grad_total, grad_weight, Tensor()};
  }
};

// The definition in PyTorch's operators, for forward-mode derivatives.
Two composed(const Tensor& x, const Tensor& weight, double eps) {
  const auto exact = at::promote_types(x.scalar_type(), at::kFloat);
  const Tensor wide = x.to(exact), rstd = (wide.square().mean(-1, true) + eps).rsqrt();
  return {(wide * rstd * weight.to(exact)).to(x.scalar_type()), rstd.squeeze(-1)};
}

Two norm(const Tensor& x, const Tensor& weight, double eps) {
  if (any_tangent(x, weight)) return composed(x, weight, eps);
  const variable_list out = Norm::apply(x, weight, eps);
  return {out[0], out[1]};
}

Three add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
  if (any_tangent(x, residual, weight)) {
    const Tensor total = x + residual;
    auto [y, rstd] = composed(total, weight, eps);
    return {y, total, rstd};
  }
  const variable_list out = AddNorm::apply(x, residual, weight, eps);
  return {out[0], out[1], out[2]};
}

}  // namespace astrobiogen::rms_norm

TORCH_LIBRARY_IMPL(astrobiogen, AutogradCPU, m) {
  m.impl("rms_norm", &astrobiogen::rms_norm::norm);
  m.impl("add_rms_norm", &astrobiogen::rms_norm::add_norm);
}
