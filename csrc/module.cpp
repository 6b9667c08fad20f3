// The extension module: loading it registers every CPU kernel (static TORCH_LIBRARY_IMPL blocks of the other files).
// Its Python face only tells how it was built and what this CPU offers.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>

#include <string>

namespace {

// The instruction set that ASTRO_MULTIVERSION entry points resolve to on this machine.
std::string cpu_capability() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2";
  return "sse2";
#else
  return "baseline";
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "CPU kernels of astrobiogen; importing the module registers them with PyTorch's dispatcher.";
  module.def("cpu_capability", &cpu_capability, "Instruction set the kernels use here: avx512, avx2, sse2 or baseline.");
  module.def("build_info", &build_info, "Compiler version, C++ standard and whether OpenMP is on.");
  module.def("num_threads", [] { return at::get_num_threads(); }, "Threads that a kernel may use now.");
}
