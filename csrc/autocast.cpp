// Autocast is off inside an op, as inside PyTorch's own: its casts reach every at:: call of a kernel, and would round
// fp32 sums and gradients to half precision. What an op's operands are cast to is decided before, by
// astrobiogen/kernels/autocast.py. Boxed: one function serves all signatures. The other ops call no ATen function
// that autocast casts, and need not pay for it.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/stack.h>
#include <torch/library.h>

namespace {

void without_autocast(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard off(c10::autocast_dispatch_keyset);
  op.callBoxed(stack);
}

void shield(torch::Library& library) {
  for (const char* name :
       {"conv_nd", "conv_transpose_nd", "conv_nd_weight_grad", "conv_nd_bias_grad", "conv_nd_norm",
        "conv_nd_norm_backward", "linear", "linear_backward", "linear_cross_entropy", "linear_cross_entropy_backward",
        "linear_cross_entropy_gradients", "swiglu_mlp", "swiglu_mlp_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&without_autocast>());
}

}  // namespace

TORCH_LIBRARY_IMPL(astrobiogen, AutocastCPU, m) { shield(m); }
TORCH_LIBRARY_IMPL(astrobiogen, AutocastCUDA, m) { shield(m); }
