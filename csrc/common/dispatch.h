// Instruction-set levels of the CPU kernels, chosen at run time: one binary carries every kernel for AVX-512, AVX2 and
// the baseline of the platform.
//
// A kernel is a struct with `template <Level L> static ASTRO_INLINE void run(arguments...)`;
// `dispatch<Kernel>(arguments...)` calls the copy that was compiled for the level in use. Everything below `run` is
// always_inline and takes its instruction set from that copy. Unlike GCC's target_clones this works for templates,
// tells the kernel its level, and lets tests and benchmarks run a lower level than the machine has (`set_level`).
#pragma once

#include "common/simd.h"

namespace astrobiogen {

enum class Level : int { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The level that kernels run at: the highest this CPU and this build offer, or what `set_level` lowered it to.
// (module.cpp)
Level level();
Level highest_level();
// Throws std::invalid_argument above `highest_level()`. Not for use while kernels run on other threads.
void set_level(Level wanted);

// On a lambda inside a kernel: it takes the kernel's instruction set only if it is inlined.
#define ASTRO_LAMBDA_INLINE __attribute__((always_inline))

// Lanes of the widest fp32 register of a level.
template <Level L>
inline constexpr int kWidth = L == Level::kAvx512 ? 16 : 8;

#if defined(__x86_64__) && defined(__gnu_linux__)
#define ASTRO_HAS_LEVELS 1
template <class Kernel, class... Arguments>
__attribute__((target("arch=x86-64-v4"))) void run_avx512(Arguments&... arguments) {
  Kernel::template run<Level::kAvx512>(arguments...);
}
template <class Kernel, class... Arguments>
__attribute__((target("arch=x86-64-v3"))) void run_avx2(Arguments&... arguments) {
  Kernel::template run<Level::kAvx2>(arguments...);
}
#endif

template <class Kernel, class... Arguments>
void dispatch(Arguments&&... arguments) {
#if defined(ASTRO_HAS_LEVELS)
  switch (level()) {
    case Level::kAvx512: return run_avx512<Kernel>(arguments...);
    case Level::kAvx2: return run_avx2<Kernel>(arguments...);
    case Level::kBaseline: break;
  }
#endif
  Kernel::template run<Level::kBaseline>(arguments...);
}

}  // namespace astrobiogen
