// What the own CPU kernels of the convolution share: the plan of one call, the lines of input that a tile reads,
// register-wide vectors.
//
// A convolution is seen as rows along the last axis; the taps over the (at most four) axes before it are "kernel rows".
// Where such a row axis has kernel 3, stride 1 and dilation 1 it is a Winograd axis: F(2,3) computes a tile of two
// outputs from four products instead of six (Lavin and Gray 2015, arXiv:1509.09308). With d the tile's four input rows
// and g the taps, component k of the tile is the product of component k of both transforms:
//
//   input transform   d0 - d2,  d1 + d2,             d2 - d1,             d3 - d1
//   weight transform  g0,       (g0 + g1 + g2) / 2,  (g0 - g1 + g2) / 2,  g2
//   output transform  y0 = m0 + m1 + m2,  y1 = m1 - m2 + m3
//
// On two axes at once 16 components replace 36 products. A circular axis is no Winograd axis in the forward: which
// outputs share a tile would depend on where the circle was cut, and rolling the input could change the output's last
// bits. Gradients transform the last axis too, 64 components for 216 products, where channels and rows are enough for
// products to outweigh the transforms.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/dispatch.h"
#include "conv_nd/geometry.h"

namespace astrobiogen::conv_nd {

constexpr int64_t kRowAxes = kMaxAxes - 1;
constexpr int64_t kMaxWinogradAxes = 2;  // of the row axes
constexpr int64_t kMaxComponents = 16;   // 4 per axis
constexpr int64_t kMaxTile = 4;          // output rows of one tile

// The input transform: which two of the four rows a component combines, and the sign of the second; the first has +1.
constexpr int64_t kInputRow[4][2] = {{0, 2}, {1, 2}, {2, 1}, {3, 1}};
constexpr float kInputSign[4] = {-1.0f, 1.0f, -1.0f, -1.0f};
// The output transform: what a component adds to the two outputs.
constexpr float kOutputSign[4][2] = {{1.0f, 0.0f}, {1.0f, 1.0f}, {1.0f, -1.0f}, {0.0f, 1.0f}};

struct Axis {
  int64_t size = 1, out = 1, kernel = 1;
  bool winograd = false;
  int64_t tiles = 1;            // out, or two outputs each
  int64_t taps = 1;             // kernel, or 1 on a Winograd axis
  int64_t reads = 1;            // rows that a tile reads: kernel, or 4 on a Winograd axis
  std::vector<int64_t> source;  // [tiles][reads] -> row of the axis, -1: zero
  std::vector<char> rolled;     // [tiles][reads]: the row lies beyond a pole, seen from the other side
};

struct Plan {
  int64_t batch, channels, outputs, groups, group_channels, group_outputs;
  int64_t block, group_blocks, blocks;  // output channels of one register block: 16 or 32
  std::array<Axis, kRowAxes> axes;      // missing leading axes have size 1
  int64_t winograd_axes = 0, components = 1, taps = 1, tile_rows = 1;
  std::array<int64_t, kMaxWinogradAxes> winograd_axis{-1, -1};
  int64_t width, out_width, taps_w, pad_w, stride_w, dilation_w, mode_w;  // last axis
  int64_t position_step, run_count, run_length,
      run_step;      // floats: between neighbour outputs; a kernel row is run_count runs of run_length floats
  int64_t row_taps;  // floats of x that one kernel row multiplies, taps_w * group_channels, or of one component of a
                     // Winograd last axis
  int64_t last_components = 1;  // 4 where the last axis is a Winograd axis: a line is then transformed, four lines

  int64_t tiles() const { return batch * axes[0].tiles * axes[1].tiles * axes[2].tiles * axes[3].tiles; }
  // Rows of x (positions along the last axis) that outputs [begin, end) read, and the floats they take.
  int64_t reach(int64_t begin, int64_t end) const {
    return (end - 1 - begin) * stride_w + dilation_w * (taps_w - 1) + 1;
  }
  bool winograd_last() const { return last_components > 1; }
  // What the inner loops take of `count` outputs of the last axis: positions or tiles.
  int64_t steps(int64_t count) const { return winograd_last() ? (count + 1) / 2 : count; }
  // Floats of the line that `count` outputs read, and between two components of a Winograd last axis in it.
  int64_t line_floats(int64_t count) const {
    return (winograd_last() ? last_components * steps(count) : reach(0, count)) * channels;
  }
  int64_t line_step(int64_t count) const { return steps(count) * channels; }
  // Floats of one row of input, with its halo and a position of zeros: scratch of `build_line` where the last axis is a
  // Winograd axis.
  int64_t scratch_floats(int64_t count) const { return winograd_last() ? (reach(0, count) + 1) * channels : 0; }
};

// Winograd axes save at least this share of the products (dead taps counted as saved by both ways).
constexpr double kWinogradGain = 1.2;

Plan make_plan(const at::Tensor& rows, int64_t outputs, at::IntArrayRef kernel, const Geometry& geometry,
               Winograd winograd);

// Of the products that touch data, the share that the Winograd axes leave: 1 where there is none, at best 4/9.
double winograd_share(const at::Tensor& rows, at::IntArrayRef kernel, const Geometry& geometry);

// One tile: where it lies.
struct Tile {
  int64_t batch;
  std::array<int64_t, kRowAxes> at;
};

Tile tile_at(const Plan& plan, int64_t index);

// The sum of at most four signed input rows that one (component, tap) of a tile multiplies.
struct Line {
  int count = 0;
  int64_t row[kMaxTile];  // row index into x [rows][width][channels]
  float sign[kMaxTile];
  bool rolled[kMaxTile];
  bool any_rolled = false;
};

// False where every row is zero padding.
bool find_line(const Plan& plan, const Tile& tile, int64_t component, int64_t tap, Line& line);

// Output rows of a tile: index [0, tile_rows) -> row of y [rows][out_width][outputs], or -1 past the end of a Winograd
// axis.
void tile_outputs(const Plan& plan, const Tile& tile, int64_t* rows);

// Kernel rows (flat over the row axes) of the outer taps, Winograd axes at tap 0, and the distance of their taps (0
// where there is none).
struct KernelRows {
  std::vector<int64_t> base;
  std::array<int64_t, kMaxWinogradAxes> step{0, 0};
  int64_t count = 1;
};

KernelRows kernel_rows(const Plan& plan);

// [O, C / groups, *kernel] -> [components][last components][blocks][taps][row_taps][block] in fp32, absent channels
// zero.
at::Tensor pack_weight(const at::Tensor& weight, const Plan& plan);

// True where a 64-byte vector is one register. The inner loops use vectors of exactly one register (eight lanes under
// AVX2): the compiler spills 64-byte vectors there.
inline bool wide_registers() { return level() == Level::kAvx512; }

using simd::load_as;
using simd::store_as;

// Writes the padded line that outputs [begin, end) of the last axis read, from position begin * stride - padding on:
// fp32 [reach][channels], or, where that axis is a Winograd axis, its transform [last components][steps][channels].
// `scratch`: `scratch_floats`.
void build_line(const Plan& plan, const void* x, at::ScalarType dtype, const Line& line, int64_t begin, int64_t end,
                float* to, float* scratch);

}  // namespace astrobiogen::conv_nd
