// What the gradient formulas in C++ share.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>

#include <optional>

namespace astrobiogen {

// Whether a forward-mode derivative runs through one of these tensors. `torch::autograd::Function` has no rule for it
// in C++, PyTorch's operators have: a formula takes them then. (Inside `torch.func` no formula is reached:
// astrobiogen/kernels/registry.py.)
inline bool has_tangent(const at::Tensor& x) { return x.defined() && x._fw_grad(0).defined(); }
inline bool has_tangent(const std::optional<at::Tensor>& x) { return x.has_value() && has_tangent(*x); }
inline bool has_tangent(bool) { return false; }
template <typename... Tensors>
bool any_tangent(const Tensors&... tensors) {
  return (has_tangent(tensors) || ...);
}

// Whether autograd will ask for the gradient of one of these tensors.
inline bool needs_gradient(const at::Tensor& x) { return x.defined() && x.requires_grad(); }
inline bool needs_gradient(const std::optional<at::Tensor>& x) { return x.has_value() && needs_gradient(*x); }
template <typename... Tensors>
bool any_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (needs_gradient(tensors) || ...);
}

// An op of the library by its name, called through the dispatcher: a backward op's own rule then refuses a second
// derivative.
template <typename Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

// `call(arguments...)` past autograd.
template <typename Call, typename... Arguments>
auto below_autograd(const Call& call, const Arguments&... arguments) {
  const at::AutoDispatchBelowADInplaceOrView below;
  return call.call(arguments...);
}

// A backward op: through its own rule, which is in Python and takes longer than a small gradient, only where a
// derivative of it may be asked for.
template <typename Call, typename... Arguments>
auto gradients(const Call& call, const Arguments&... arguments) {
  return at::GradMode::is_enabled() || any_tangent(arguments...) ? call.call(arguments...)
                                                                 : below_autograd(call, arguments...);
}

}  // namespace astrobiogen
