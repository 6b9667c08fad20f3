// What the own CPU kernels of the convolution share: the plan of one call, the lines of input that a tile reads, register-wide vectors.
//
// A convolution is seen as rows along the last axis; the taps over the (at most four) axes before it are "kernel rows". Where such a row axis has
// kernel 3, stride 1 and dilation 1, two neighbouring outputs are computed together from four "points" instead of six products (Winograd's F(2,3)):
//
//   points  m0 = (d0 - d2) g0,  m1 = (d1 + d2) (g0 + g1 + g2) / 2,  m2 = (d2 - d1) (g0 - g1 + g2) / 2,  m3 = (d3 - d1) g2
//   outputs y0 = m0 + m1 + m2,  y1 = m1 - m2 + m3
//
// with d the four input rows and g the taps. On two axes at once 16 points replace 36 products. Circular axes are not paired in the forward: which
// outputs share a tile would depend on where the circle was cut, and rolling the input could change the output's last bits. Gradients take pairs along
// the last axis too, 64 points for 216 products, where channels and rows are enough for products to outweigh the sums of neighbouring positions.
#pragma once

#include <ATen/core/Tensor.h>

#include "common/dispatch.h"
#include "conv_nd/geometry.h"

namespace astrobiogen::conv_nd {

constexpr int64_t kRowAxes = kMaxAxes - 1;
constexpr int64_t kMaxPairs = 2;    // axes computed by pairs of outputs
constexpr int64_t kMaxPoints = 16;  // 4 per paired axis
constexpr int64_t kMaxTile = 4;     // output rows of one tile

// Which two of the four input rows a point combines, and the sign of the second; the first has +1.
constexpr int64_t kPointRow[4][2] = {{0, 2}, {1, 2}, {2, 1}, {3, 1}};
constexpr float kPointSign[4] = {-1.0f, 1.0f, -1.0f, -1.0f};
// What a point adds to the two outputs.
constexpr float kPointOutput[4][2] = {{1.0f, 0.0f}, {1.0f, 1.0f}, {1.0f, -1.0f}, {0.0f, 1.0f}};

struct Axis {
  int64_t size = 1, out = 1, kernel = 1;
  bool paired = false;
  int64_t tiles = 1;            // out, or pairs of outputs
  int64_t taps = 1;             // kernel, or 1 where paired
  int64_t reads = 1;            // rows that a tile reads: kernel, or 4 where paired
  std::vector<int64_t> source;  // [tiles][reads] -> row of the axis, -1: zero
  std::vector<char> rolled;     // [tiles][reads]: the row lies beyond a pole, seen from the other side
};

struct Plan {
  int64_t batch, channels, outputs, groups, group_channels, group_outputs;
  int64_t block, group_blocks, blocks;  // output channels of one register block: 16 or 32
  std::array<Axis, kRowAxes> axes;      // missing leading axes have size 1
  int64_t pairs = 0, points = 1, taps = 1, tile_rows = 1;
  std::array<int64_t, kMaxPairs> pair_axis{-1, -1};
  int64_t width, out_width, taps_w, pad_w, stride_w, dilation_w, mode_w;  // last axis
  int64_t position_step, run_count, run_length, run_step;  // floats: between neighbour outputs; a kernel row is run_count runs of run_length floats
  int64_t row_taps;      // floats of x that one kernel row multiplies, taps_w * group_channels, or of one point of a paired last axis
  int64_t last_points = 1;  // 4 where the last axis is paired: a line is then four lines of pairs

  int64_t tiles() const { return batch * axes[0].tiles * axes[1].tiles * axes[2].tiles * axes[3].tiles; }
  // Rows of x (positions along the last axis) that outputs [begin, end) read, and the floats they take.
  int64_t reach(int64_t begin, int64_t end) const { return (end - 1 - begin) * stride_w + dilation_w * (taps_w - 1) + 1; }
  bool last_paired() const { return last_points > 1; }
  // What the inner loops take of `count` outputs of the last axis: positions or pairs.
  int64_t steps(int64_t count) const { return last_paired() ? (count + 1) / 2 : count; }
  // Floats of the line that `count` outputs read, and between two points of a paired last axis in it.
  int64_t line_floats(int64_t count) const { return (last_paired() ? last_points * steps(count) : reach(0, count)) * channels; }
  int64_t line_step(int64_t count) const { return steps(count) * channels; }
  // Floats of one row of input, with its halo and a position of zeros: scratch of `build_line` where the last axis is paired.
  int64_t scratch_floats(int64_t count) const { return last_paired() ? (reach(0, count) + 1) * channels : 0; }
};

// The row axes that can be paired save at least this share of the products (dead taps counted as saved by both ways).
constexpr double kPairGain = 1.2;

Plan make_plan(const at::Tensor& rows, int64_t outputs, at::IntArrayRef kernel, const Geometry& geometry, Pairing pairing);

// Of the products that touch data, the share that pairing leaves: 1 where no axis is paired, at best 4/9.
double paired_share(const at::Tensor& rows, at::IntArrayRef kernel, const Geometry& geometry);

// One tile: where it lies.
struct Tile {
  int64_t batch;
  std::array<int64_t, kRowAxes> at;
};

Tile tile_at(const Plan& plan, int64_t index);

// The sum of at most four signed input rows that one (point, tap) of a tile multiplies.
struct Line {
  int count = 0;
  int64_t row[kMaxTile];  // row index into x [rows][width][channels]
  float sign[kMaxTile];
  bool rolled[kMaxTile];
  bool any_rolled = false;
};

// False where every row is zero padding.
bool find_line(const Plan& plan, const Tile& tile, int64_t point, int64_t tap, Line& line);

// Output rows of a tile: index [0, tile_rows) -> row of y [rows][out_width][outputs], or -1 past the end of a paired axis.
void tile_outputs(const Plan& plan, const Tile& tile, int64_t* rows);

// Kernel rows (flat over the row axes) of the outer taps, paired axes at tap 0, and the distance of the paired axes' taps (0 where there is none).
struct KernelRows {
  std::vector<int64_t> base;
  std::array<int64_t, kMaxPairs> step{0, 0};
  int64_t count = 1;
};

KernelRows kernel_rows(const Plan& plan);

// [O, C / groups, *kernel] -> [points][last points][blocks][taps][row_taps][block] in fp32, absent channels zero.
at::Tensor pack_weight(const at::Tensor& weight, const Plan& plan);

// True where a 64-byte vector is one register. The inner loops use vectors of exactly one register (eight lanes under AVX2): the compiler spills
// 64-byte vectors there.
inline bool wide_registers() { return level() == Level::kAvx512; }

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

// Writes the padded line that outputs [begin, end) of the last axis read, from position begin * stride - padding on: fp32 [reach][channels], or, where
// that axis is paired, its sums [last points][steps][channels]. `scratch`: `scratch_floats`.
void build_line(const Plan& plan, const void* x, at::ScalarType dtype, const Line& line, int64_t begin, int64_t end, float* to, float* scratch);

}  // namespace astrobiogen::conv_nd
