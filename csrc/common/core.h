// The kinds of processor core whose rules differ: which product of a shape is the fastest one. Measurements: the notes
// of the ops.
#pragma once

namespace astrobiogen {

enum class Core : int {
  kOther = 0,
  kIntel = 1,  // Intel's, with a PyTorch whose BLAS is MKL: its fp32 products are within some percent of the peak
};

// The core that the rules are for: the one found, or what `set_core` put in its place. (module.cpp)
Core core();
// Rules of another core, for tests and benchmarks: every kernel runs on every core. Not for use while kernels run on
// other threads.
void set_core(Core wanted);

}  // namespace astrobiogen
