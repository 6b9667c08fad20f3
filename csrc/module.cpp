// The extension module: loading it registers every CPU kernel (static TORCH_LIBRARY_IMPL blocks of the other files).
// Its Python face tells how it was built and what this CPU offers, and has the short ways into ops (common/entry.h).
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include "common/core.h"
#include "common/dispatch.h"
#include "common/entry.h"

namespace astrobiogen {

Level highest_level() {
#if defined(ASTRO_HAS_LEVELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return Level::kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"))
    return Level::kAvx2;
#endif
  return Level::kBaseline;
}

namespace {
std::atomic<Level>& current_level() {
  static std::atomic<Level> current{highest_level()};
  return current;
}
}  // namespace

Level level() { return current_level().load(std::memory_order_relaxed); }

void set_level(Level wanted) {
  if (wanted > highest_level())
    throw std::invalid_argument("this CPU or build does not have the level that was asked for");
  current_level().store(wanted);
}

namespace {
Core found_core() {
#if defined(ASTRO_HAS_LEVELS)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel") && at::hasMKL()) return Core::kIntel;
#endif
  return Core::kOther;
}

std::atomic<Core>& current_core() {
  static std::atomic<Core> current{found_core()};
  return current;
}
}  // namespace

Core core() { return current_core().load(std::memory_order_relaxed); }

void set_core(Core wanted) { current_core().store(wanted); }

std::vector<PyMethodDef>& entry::methods() {
  static std::vector<PyMethodDef> all;
  return all;
}

}  // namespace astrobiogen

namespace {

const char* name_of(astrobiogen::Level level) {
  switch (level) {
    case astrobiogen::Level::kAvx512: return "avx512";
    case astrobiogen::Level::kAvx2: return "avx2";
    case astrobiogen::Level::kBaseline: break;
  }
  return "baseline";
}

astrobiogen::Level level_named(const std::string& name) {
  for (const auto level : {astrobiogen::Level::kBaseline, astrobiogen::Level::kAvx2, astrobiogen::Level::kAvx512})
    if (name == name_of(level)) return level;
  throw std::invalid_argument("level must be 'baseline', 'avx2' or 'avx512', got '" + name + "'");
}

const char* name_of(astrobiogen::Core core) { return core == astrobiogen::Core::kIntel ? "intel" : "other"; }

astrobiogen::Core core_named(const std::string& name) {
  for (const auto core : {astrobiogen::Core::kOther, astrobiogen::Core::kIntel})
    if (name == name_of(core)) return core;
  throw std::invalid_argument("core must be 'intel' or 'other', got '" + name + "'");
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["torch"] = TORCH_VERSION;
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
  module.def(
      "cpu_capability", [] { return name_of(astrobiogen::level()); },
      "Instruction-set level that the kernels run at: 'avx512', 'avx2' or 'baseline'.");
  module.def(
      "cpu_levels",
      [] {
        pybind11::list names;
        for (int level = 0; level <= static_cast<int>(astrobiogen::highest_level()); ++level)
          names.append(name_of(static_cast<astrobiogen::Level>(level)));
        return names;
      },
      "The levels that this CPU and build offer, lowest first.");
  module.def(
      "set_cpu_level", [](const std::string& name) { astrobiogen::set_level(level_named(name)); },
      pybind11::arg("level"), "Run the kernels at a lower level than the CPU has, for tests and benchmarks.");
  module.def(
      "cpu_core", [] { return name_of(astrobiogen::core()); },
      "The core whose rules choose between products: 'intel' (with MKL) or 'other'.");
  module.def(
      "set_cpu_core", [](const std::string& name) { astrobiogen::set_core(core_named(name)); }, pybind11::arg("core"),
      "Choose by the rules of another core, for tests and benchmarks.");
  module.def("build_info", &build_info, "PyTorch and compiler version, C++ standard and whether OpenMP is on.");
  for (PyMethodDef& method : astrobiogen::entry::methods())
    module.add_object(method.ml_name, pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&method, nullptr)));
  module.def("num_threads", [] { return at::get_num_threads(); }, "Threads that a kernel may use now.");
}
