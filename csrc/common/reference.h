// The plain PyTorch definition of an op, from C++.
#pragma once

#include "common/autograd.h"

namespace astrobiogen {

// What serves a device without kernels (astrobiogen/kernels/registry.py): for fp64, where it is not slower than loops.
template <typename Result, typename... Arguments>
Result reference(const char* name, const Arguments&... arguments) {
  return op<Result(const Arguments&...)>(name).redispatch(c10::DispatchKeySet(), arguments...);
}

}  // namespace astrobiogen
