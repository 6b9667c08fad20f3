// Subnormal numbers as zero, for products with numbers that may become arbitrarily small.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace astrobiogen {

// While it lives, this thread reads and writes fp32 numbers below 2^-126 = 1.2e-38 as 0: x86 cores take over a hundred
// cycles for each operation on one. Kernels in between must be calls, as those of `dispatch` are: compilers move
// arithmetic across a change of the mode.
class FlushSubnormals {
#if defined(__x86_64__)
  static constexpr unsigned kFlushToZero = 0x8000, kSubnormalsAreZero = 0x0040;
  const unsigned before_ = _mm_getcsr();

 public:
  FlushSubnormals() { _mm_setcsr(before_ | kFlushToZero | kSubnormalsAreZero); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
#else
 public:
  FlushSubnormals() = default;
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

}  // namespace astrobiogen
