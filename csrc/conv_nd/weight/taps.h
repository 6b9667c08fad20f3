// From the sums of components to the taps of a weight gradient, the last step of conv_nd/weight/weight.cpp.
#pragma once

#include "conv_nd/direct.h"

namespace astrobiogen::conv_nd {

// Sums of one subset of outer taps: per chunk of tiles [components][last components][blocks][subset][row_taps][block].
struct Sums {
  const float* data;
  int64_t chunk_step, chunks;
  int64_t first_tap, subset;
};

// Adds up the chunks in order and writes the subset's taps of block b of output channels into dW [O, C / groups,
// *kernel].
void write_taps(const Plan& plan, const KernelRows& kernel, const Sums& sums, int64_t b, float* grad_weight);

}  // namespace astrobiogen::conv_nd
