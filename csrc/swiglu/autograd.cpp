// The gradient formulas of `swiglu` and `swiglu_packed` for CPU tensors in C++, and the short ways into both. A Python
// formula (astrobiogen/kernels/swiglu/op.py, which serves other devices) costs more than the arithmetic of some rows.
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <tuple>

#include "common/autograd.h"
#include "common/entry.h"

namespace astrobiogen::swiglu {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

const auto& separate_op() {
  static const auto call = op<Tensor(const Tensor&, const Tensor&)>("astrobiogen::swiglu");
  return call;
}

const auto& packed_op() {
  static const auto call = op<Tensor(const Tensor&)>("astrobiogen::swiglu_packed");
  return call;
}

struct Separate : torch::autograd::Function<Separate> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate, const Tensor& up) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({gate, up});
    return below_autograd(separate_op(), gate, up);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto call =
        op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&)>("astrobiogen::swiglu_backward");
    if (!grads[0].defined()) return variable_list(2);
    const auto saved = ctx->get_saved_variables();
    auto [of_gate, of_up] = gradients(call, grads[0], saved[0], saved[1]);
    return {of_gate, of_up};
  }
};

struct Packed : torch::autograd::Function<Packed> {
  static Tensor forward(AutogradContext* ctx, const Tensor& gate_up) {
    ctx->set_materialize_grads(false);
    ctx->save_for_backward({gate_up});
    return below_autograd(packed_op(), gate_up);
  }

  static variable_list backward(AutogradContext* ctx, variable_list grads) {
    static const auto call = op<Tensor(const Tensor&, const Tensor&)>("astrobiogen::swiglu_packed_backward");
    if (!grads[0].defined()) return variable_list(1);
    return {gradients(call, grads[0], ctx->get_saved_variables()[0])};
  }
};

// The definition in PyTorch's operators, for forward-mode derivatives.
Tensor composed(const Tensor& gate, const Tensor& up) {
  const auto exact = at::promote_types(gate.scalar_type(), at::kFloat);
  return (at::silu(gate.to(exact)) * up.to(exact)).to(gate.scalar_type());
}

Tensor differentiable(const Tensor& gate, const Tensor& up) {
  if (any_tangent(gate, up)) return composed(gate, up);
  return any_gradient(gate, up) ? Separate::apply(gate, up) : below_autograd(separate_op(), gate, up);
}

Tensor differentiable_packed(const Tensor& gate_up) {
  if (any_tangent(gate_up)) {
    const auto halves = gate_up.chunk(2, -1);
    return composed(halves[0], halves[1]);
  }
  return any_gradient(gate_up) ? Packed::apply(gate_up) : below_autograd(packed_op(), gate_up);
}

// swiglu(gate, up).
PyObject* from_python(PyObject*, entry::Arguments given, Py_ssize_t count) {
  if (count != 2 || !entry::undisturbed()) return entry::declined();
  const Tensor *gate = entry::plain(given[0]), *up = entry::plain(given[1]);
  if (gate == nullptr || up == nullptr || gate->scalar_type() != up->scalar_type() || gate->sizes() != up->sizes())
    return entry::declined();
  return entry::result_of([&] { return separate_op().call(*gate, *up); });
}

// swiglu_packed(gate_up).
PyObject* packed_from_python(PyObject*, entry::Arguments given, Py_ssize_t count) {
  if (count != 1 || !entry::undisturbed()) return entry::declined();
  const Tensor* gate_up = entry::plain(given[0]);
  if (gate_up == nullptr || gate_up->dim() == 0 || gate_up->size(-1) % 2 != 0) return entry::declined();
  return entry::result_of([&] { return packed_op().call(*gate_up); });
}

const entry::Entry kSeparate("swiglu", &from_python, "ops.swiglu for plain CPU tensors that fit; else None.");
const entry::Entry kPacked("swiglu_packed", &packed_from_python, "The same for ops.swiglu_packed.");

}  // namespace astrobiogen::swiglu

TORCH_LIBRARY_IMPL(astrobiogen, AutogradCPU, m) {
  m.impl("swiglu", &astrobiogen::swiglu::differentiable);
  m.impl("swiglu_packed", &astrobiogen::swiglu::differentiable_packed);
}
