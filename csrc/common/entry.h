// The short way from Python into an op: a C function that takes a call on plain CPU tensors which fit each other, and
// leaves every other call, by returning None, to the public function's checks and their words.
//
// Checks in Python and a call through `torch.ops` take 4 to 6 us, more than PyTorch's own products of one row.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <optional>
#include <vector>

namespace astrobiogen::entry {

using at::Tensor;

// The functions that the module `_C` has beside its own; filled before it is made. (module.cpp)
std::vector<PyMethodDef>& methods();

using Arguments = PyObject* const*;

// At namespace scope: adds `function` to the module.
struct Entry {
  Entry(const char* name, PyObject* (*function)(PyObject*, Arguments, Py_ssize_t), const char* description) {
    methods().push_back(
        {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, description});
  }
};

// Whether nothing is at work that must see a call from its beginning: autocast, a transform of torch.func, a trace, a
// mode of Python.
inline bool undisturbed() {
  const auto keys = c10::impl::tls_local_dispatch_key_set();
  return (keys.included_ - c10::default_included_set).empty() && !at::impl::torch_function_mode_enabled() &&
         !at::autocast::is_autocast_enabled(at::kCPU);
}

// A dense floating-point tensor on the CPU of PyTorch's own classes, without a wrapper or a lazy sign; else null.
inline const Tensor* plain(PyObject* value) {
  constexpr c10::DispatchKeySet kPlain({c10::DispatchKey::CPU, c10::DispatchKey::ADInplaceOrView,
                                        c10::DispatchKey::AutogradCPU, c10::DispatchKey::AutocastCPU});
  if (!THPVariable_CheckExact(value)) return nullptr;
  const Tensor& t = THPVariable_Unpack(value);
  if (!t.defined() || (t.key_set().raw_repr() & ~kPlain.raw_repr()) != 0) return nullptr;
  const auto type = t.scalar_type();
  return type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble ? &t : nullptr;
}

// body() as Python gets it: None for no tensor, an exception for one. `body` runs without Python's lock.
template <class Body>
PyObject* result_of(const Body& body) {
  HANDLE_TH_ERRORS
  std::optional<Tensor> result;
  {
    const pybind11::gil_scoped_release unlocked;
    result = body();
  }
  return THPVariable_Wrap(*std::move(result));
  END_HANDLE_TH_ERRORS
}

inline PyObject* declined() { Py_RETURN_NONE; }

}  // namespace astrobiogen::entry
