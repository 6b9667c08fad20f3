// What the gradient formulas in C++ share.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

namespace astrobiogen {

// Whether a forward-mode derivative runs through one of these tensors. `torch::autograd::Function` has no rule for it
// in C++, PyTorch's operators have: a formula takes them then. (Inside `torch.func` no formula is reached:
// astrobiogen/kernels/registry.py.)
inline bool has_tangent(const at::Tensor& x) { return x.defined() && x._fw_grad(0).defined(); }
inline bool has_tangent(const std::optional<at::Tensor>& x) { return x.has_value() && has_tangent(*x); }
template <typename... Tensors>
bool any_tangent(const Tensors&... tensors) {
  return (has_tangent(tensors) || ...);
}

// An op of the library by its name, called through the dispatcher: a backward op's own rule then refuses a second
// derivative.
template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace astrobiogen
