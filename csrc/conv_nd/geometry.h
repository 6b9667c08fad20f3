// Sizes and index arithmetic of a convolution over one to five axes; the C++ side of
// astrobiogen/kernels/conv_nd/geometry.py.
//
// "Rows" below is a contiguous tensor [B, *spatial, C], channels innermost.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

namespace astrobiogen::conv_nd {

constexpr int64_t kMaxAxes = 5;
constexpr int64_t kInnerAxes = 3;  // convolutions of ATen and oneDNN stop here
enum Mode : int64_t { kZeros, kCircular, kReflect, kReplicate, kPole };
enum Activation : int64_t { kNone, kSilu, kGelu };
enum Norm : int64_t { kNoNorm, kRms, kLayer, kGroup };

struct Geometry {
  std::vector<int64_t> stride, padding, mode, dilation;
  int64_t groups = 1;

  int64_t axes() const { return static_cast<int64_t>(stride.size()); }

  // What is left after the halos of all axes that are not zero-padded were copied.
  Geometry after_halo() const {
    Geometry rest = *this;
    for (int64_t axis = 0; axis < axes(); ++axis)
      if (mode[axis] != kZeros) rest.mode[axis] = kZeros, rest.padding[axis] = 0;
    return rest;
  }

  int64_t output_size(int64_t axis, int64_t size, int64_t kernel) const {
    return (size + 2 * padding[axis] - dilation[axis] * (kernel - 1) - 1) / stride[axis] + 1;
  }

  std::vector<int64_t> output_size(at::IntArrayRef size, at::IntArrayRef kernel) const {
    std::vector<int64_t> out;
    for (int64_t axis = 0; axis < axes(); ++axis) out.push_back(output_size(axis, size[axis], kernel[axis]));
    return out;
  }
};

inline int64_t floor_divide(int64_t a, int64_t b) { return a / b - ((a % b != 0 && (a < 0) != (b < 0)) ? 1 : 0); }

// The outputs o in [first, second) of [0, out) whose input o * stride + shift lies in [0, size).
inline std::pair<int64_t, int64_t> live_range(int64_t out, int64_t size, int64_t stride, int64_t shift) {
  const int64_t low = std::max<int64_t>(0, -floor_divide(shift, stride));
  const int64_t high = std::min(out, floor_divide(size - 1 - shift, stride) + 1);
  return {low, std::max(low, high)};
}

// The row that padded position p of an axis reads, or -1 for a zero. Beyond a pole: the mirrored row, whose following
// axis is rolled.
inline int64_t source_row(int64_t mode, int64_t p, int64_t size) {
  if (p >= 0 && p < size) return p;
  if (mode == kCircular) return p < 0 ? p + size : p - size;
  if (mode == kReflect) return p < 0 ? -p : 2 * (size - 1) - p;
  if (mode == kReplicate) return p < 0 ? 0 : size - 1;
  if (mode == kPole) return p < 0 ? -1 - p : 2 * size - 1 - p;
  return -1;
}

inline at::Tensor to_channels_last(const at::Tensor& x) { return x.movedim(1, -1).contiguous(); }
inline at::Tensor from_channels_last(const at::Tensor& rows) { return rows.movedim(-1, 1); }

// Which halos `add_halo` writes out: of every axis that is not zero-padded, or only of pole axes that lie before a row
// axis (the own kernels read other halos in place).
enum class Halo { kAll, kFarPoles };

inline bool far_pole(const Geometry& g, int64_t axis) { return g.mode[axis] == kPole && axis + 2 < g.axes(); }

// The part of the kernel that can reach data. A zero-padded axis shorter than the kernel's reach has taps that only
// ever see zeros; they are cut off where that leaves the same padding at both ends.
struct Crop {
  Geometry geometry;
  std::vector<int64_t> first, count;
};

// conv_nd/compose.cpp
Crop crop(const Geometry& geometry, at::IntArrayRef size, at::IntArrayRef kernel);
at::Tensor crop_weight(at::Tensor weight, const Crop& crop);

// conv_nd/compose.cpp: sums of ATen convolutions over the last three axes, fp32 or fp64 rows.
at::Tensor add_halo(at::Tensor rows, const Geometry& geometry, Halo which);
at::Tensor fold_halo(at::Tensor rows, const Geometry& geometry);
at::Tensor compose_forward(const at::Tensor& rows, const at::Tensor& weight, const Geometry& geometry);
at::Tensor compose_transpose(const at::Tensor& grad, const at::Tensor& weight, const Geometry& geometry,
                             at::IntArrayRef size);
at::Tensor compose_weight_grad(const at::Tensor& grad, const at::Tensor& rows, at::IntArrayRef kernel,
                               const Geometry& geometry);

// Which axes may be Winograd axes (conv_nd/direct.h): none, the ones before the last, or the last one too, circular or
// not.
enum class Winograd { kNone, kRows, kAll };

// conv_nd/direct.cpp, conv_nd/weight/weight.cpp: own kernels; fp32, bf16 or fp16 rows, fp32 arithmetic.
struct Epilogue;

// Of a group norm's input, per sample and slot of `counts[slot]` positions: mean and sum of squared deviations
// [batch][slots][groups].
struct PartialStatistics {
  at::Tensor mean, squares;
  std::vector<int64_t> counts;
};

// The statistics are defined where the epilogue has a group norm and there are outputs.
PartialStatistics direct_forward(const at::Tensor& rows, const at::Tensor& weight, const Geometry& geometry,
                                 const Epilogue& epilogue, Winograd winograd);
at::Tensor direct_weight_grad(const at::Tensor& grad, const at::Tensor& rows, at::IntArrayRef kernel,
                              const Geometry& geometry);

}  // namespace astrobiogen::conv_nd
