// What the own CPU kernels of the convolution share: the plan of one call, the haloed fp32 copy of the input, vectors of the machine's own width.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/simd.h"
#include "conv_nd_geometry.h"

namespace astrobiogen::conv_nd {

constexpr int64_t kBlock = 16;  // output channels of one register block
constexpr int64_t kRowAxes = kMaxAxes - 1;

// A convolution seen as rows: a row is one line along the last axis, `kernel rows` are the taps over the four axes before it.
struct Plan {
  int64_t batch, channels, outputs, groups, group_channels, group_outputs, group_blocks, blocks;
  std::array<int64_t, kRowAxes> size, out, kernel;      // missing leading axes have size 1
  std::array<std::vector<int64_t>, kRowAxes> source;    // [out][kernel] -> row of the axis, -1: zero
  int64_t width, padded_width, out_width, taps_w;       // last axis
  int64_t position_step, run_count, run_length, run_step;  // floats: between neighbour outputs; a kernel row is run_count runs of run_length floats
  int64_t kernel_rows, row_taps;                        // row_taps: floats of x that one kernel row multiplies, taps_w * group_channels
  at::Tensor input;                                     // fp32 [rows, padded_width, channels]

  int64_t out_rows() const { return batch * out[0] * out[1] * out[2] * out[3]; }
};

// One live kernel row of one output row: where its input line starts and which weights it takes.
struct Tap {
  const float* x;
  int64_t kernel_row;
};

Plan make_plan(const at::Tensor& rows, int64_t outputs, at::IntArrayRef kernel, const Geometry& geometry);

// The live taps of output row `row`, in the order of the kernel.
void live_taps(const Plan& plan, int64_t row, std::vector<Tap>& taps);

// True where a 64-byte vector is one register.
inline bool wide_registers() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd");
#else
  return false;
#endif
}

// The inner loops use vectors of exactly one register (eight lanes under AVX2): the compiler spills 64-byte vectors there.
typedef float f32x8 __attribute__((vector_size(32)));

template <typename Vec>
ASTRO_INLINE Vec load_as(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename Vec>
ASTRO_INLINE void store_as(float* p, Vec v) {
  std::memcpy(p, &v, sizeof(v));
}

}  // namespace astrobiogen::conv_nd
