// From a dtype that is known at run time to a type.
#pragma once

#include <ATen/core/Tensor.h>

#include <type_traits>

namespace astrobiogen {

// Calls body<T>() for what the vector kernels take: fp32, bf16 or fp16. The op's checks have refused other dtypes, and
// its caller has led fp64 elsewhere. Inlined, so that a kernel may ask within its level.
template <typename Body>
__attribute__((always_inline)) inline void for_dtype(at::ScalarType dtype, Body&& body) {
  if (dtype == at::kFloat) body.template operator()<float>();
  else if (dtype == at::kBFloat16) body.template operator()<c10::BFloat16>();
  else body.template operator()<c10::Half>();
}

// The same for loops that also take fp64.
template <typename Body>
void for_floating_dtype(at::ScalarType dtype, Body&& body) {
  if (dtype == at::kDouble) body.template operator()<double>();
  else for_dtype(dtype, body);
}

// What sums over T are taken in.
template <typename T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline at::ScalarType wide_dtype(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

}  // namespace astrobiogen
