// Convolution over one to five axes as a sum of ATen convolutions over the last three (oneDNN where ATen uses it),
// channels innermost.
//
// One call per live tap of the leading axes, on exactly the rows that the tap can reach, so no zero halo is copied for
// them and dead taps cost nothing. Where one tap reaches every output it goes first and its result is the accumulator:
// one pass over the output less.
#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <functional>
#include <optional>
#include <tuple>

#include "conv_nd/geometry.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

struct OuterTap {
  std::vector<int64_t> index;
  std::vector<std::array<int64_t, 2>> output;  // [low, high) per outer axis
  std::vector<std::array<int64_t, 3>> input;   // [first, last + 1), step per outer axis
  int64_t outputs = 1;                         // outer positions reached
};

std::vector<OuterTap> outer_taps(const Geometry& g, at::IntArrayRef size, at::IntArrayRef out, at::IntArrayRef kernel) {
  std::vector<OuterTap> taps{OuterTap{}};
  for (int64_t axis = 0; axis + kInnerAxes < g.axes(); ++axis) {
    std::vector<OuterTap> longer;
    for (const OuterTap& prefix : taps)
      for (int64_t k = 0; k < kernel[axis]; ++k) {
        const int64_t stride = g.stride[axis], shift = k * g.dilation[axis] - g.padding[axis];
        const auto [low, high] = live_range(out[axis], size[axis], stride, shift);
        if (low == high) continue;
        OuterTap tap = prefix;
        tap.index.push_back(k);
        tap.output.push_back({low, high});
        tap.input.push_back({low * stride + shift, (high - 1) * stride + shift + 1, stride});
        tap.outputs *= high - low;
        longer.push_back(std::move(tap));
      }
    taps = std::move(longer);
  }
  std::stable_sort(taps.begin(), taps.end(),
                   [](const OuterTap& a, const OuterTap& b) { return a.outputs > b.outputs; });
  return taps;
}

Tensor cut_output(Tensor rows, const OuterTap& tap) {
  for (size_t axis = 0; axis < tap.output.size(); ++axis)
    rows = rows.slice(1 + axis, tap.output[axis][0], tap.output[axis][1]);
  return rows;
}

Tensor cut_input(Tensor rows, const OuterTap& tap) {
  for (size_t axis = 0; axis < tap.input.size(); ++axis)
    rows = rows.slice(1 + axis, tap.input[axis][0], tap.input[axis][1], tap.input[axis][2]);
  return rows;
}

// [A, C, *axes] of contiguous rows [A, *axes, C], as ATen's convolutions take it. One channel has any stride; where it
// is 1 ATen calls the tensor channels-last, and oneDNN (3.12, brg_conv_fwd) then reads wrong rows when a stride of 2 or
// more over the last axis leaves a single output. The plain strides are the same memory and take its other kernel.
Tensor native(const Tensor& rows) {
  const Tensor moved = from_channels_last(rows);
  return rows.size(-1) == 1 ? rows.reshape({rows.numel()}).view(moved.sizes()) : moved;
}

Tensor cut_weight(Tensor weight, const OuterTap& tap) {
  for (int64_t k : tap.index) weight = weight.select(2, k);
  return native(to_channels_last(weight));
}

// The leading axes folded into the batch: [B', C, *last three], channels innermost.
Tensor volume(const Tensor& rows, int64_t axes) {
  std::vector<int64_t> shape{-1};
  for (int64_t at = std::max<int64_t>(1, rows.dim() - 1 - kInnerAxes); at < rows.dim(); ++at)
    shape.push_back(rows.size(at));
  if (axes <= kInnerAxes) shape[0] = rows.size(0);
  else shape[0] = rows.numel() == 0 ? 0 : -1;
  return native(rows.reshape(shape).contiguous());
}

// A kernel of one tap over the last three axes is a matrix product per outer tap, [positions, C] x [C, O]: on rows as
// they are, added to the result in place. As convolutions of ATen these took 3 times as long (a copy of the volume, a
// result of its own, an addition). Not where an axis is circular: which rows a matrix kernel computes as its remainder
// depends on where the circle was cut, and with it their last bits.
bool is_product(const Geometry& whole, const Geometry& g, at::IntArrayRef kernel) {
  bool product = g.groups == 1 && std::find(whole.mode.begin(), whole.mode.end(), kCircular) == whole.mode.end();
  for (int64_t axis = std::max<int64_t>(0, g.axes() - kInnerAxes); axis < g.axes(); ++axis)
    product &= kernel[axis] == 1 && g.stride[axis] == 1 && g.padding[axis] == 0;
  return product;
}

// The [O, C] matrix of an outer tap, or a view of it in a weight gradient.
Tensor tap_matrix(Tensor weight, const OuterTap& tap) {
  for (int64_t k : tap.index) weight = weight.select(2, k);
  return weight.reshape({weight.size(0), weight.size(1)});
}

// body(left, right) on matrices [positions, channels] that cover both: whole where memory allows, else per index of the
// leading axis.
void in_matrices(const Tensor& left, const Tensor& right, const std::function<void(Tensor, const Tensor&)>& body) {
  if (left.numel() == 0) return;
  if (left.is_contiguous() && right.is_contiguous())
    return body(left.view({-1, left.size(-1)}), right.view({-1, right.size(-1)}));
  for (int64_t at = 0; at < left.size(0); ++at) in_matrices(left[at], right[at], body);
}

struct Inner {
  std::vector<int64_t> stride, padding, dilation, none;
  explicit Inner(const Geometry& g) {
    const auto last = [&](const std::vector<int64_t>& v) {
      return std::vector<int64_t>(v.end() - std::min<int64_t>(kInnerAxes, g.axes()), v.end());
    };
    stride = last(g.stride), padding = last(g.padding), dilation = last(g.dilation);
    none.assign(stride.size(), 0);
  }
};

std::vector<int64_t> spatial(const Tensor& rows) { return rows.sizes().slice(1, rows.dim() - 2).vec(); }

std::vector<int64_t> rows_shape(int64_t batch, at::IntArrayRef size, int64_t channels) {
  std::vector<int64_t> shape{batch};
  shape.insert(shape.end(), size.begin(), size.end());
  shape.push_back(channels);
  return shape;
}

// total's part += volume, or total = volume for a first tap that reaches everything.
void accumulate(Tensor& total, const Tensor& result, const std::vector<int64_t>& shape, bool whole,
                const std::function<Tensor(Tensor)>& part) {
  const Tensor rows = result.movedim(1, -1);
  if (!total.defined()) {
    if (whole) {
      total = rows.contiguous().view(shape);
      return;
    }
    total = at::zeros(shape, rows.options());
  }
  Tensor target = part(total);
  target.add_(rows.reshape(target.sizes()));
}

}  // namespace

Crop crop(const Geometry& g, at::IntArrayRef size, at::IntArrayRef kernel) {
  Crop result{g, std::vector<int64_t>(kernel.size(), 0), kernel.vec()};
  for (int64_t axis = 0; axis < g.axes(); ++axis) {
    if (g.mode[axis] != kZeros) continue;
    const int64_t out = g.output_size(axis, size[axis], kernel[axis]);
    const auto live = [&](int64_t k) {
      const auto [low, high] = live_range(out, size[axis], g.stride[axis], k * g.dilation[axis] - g.padding[axis]);
      return low < high;
    };
    int64_t head = 0, tail = 0;
    while (head + 1 < kernel[axis] && !live(head)) ++head;
    while (head + tail + 1 < kernel[axis] && !live(kernel[axis] - 1 - tail)) ++tail;
    const int64_t rest = g.padding[axis] - head * g.dilation[axis];
    if (head != tail || rest < 0) continue;
    result.geometry.padding[axis] = rest;
    result.first[axis] = head;
    result.count[axis] = kernel[axis] - head - tail;
  }
  return result;
}

Tensor crop_weight(Tensor weight, const Crop& crop) {
  for (size_t axis = 0; axis < crop.first.size(); ++axis)
    weight = weight.narrow(2 + axis, crop.first[axis], crop.count[axis]);
  return weight;
}

Tensor add_halo(Tensor rows, const Geometry& g, Halo which) {
  for (int64_t axis = 0; axis < g.axes(); ++axis) {
    const int64_t mode = g.mode[axis], pad = g.padding[axis], dim = axis + 1, size = rows.size(dim);
    if (mode == kZeros || pad == 0 || (which == Halo::kFarPoles && !far_pole(g, axis))) continue;
    Tensor left, right;
    if (mode == kCircular) {
      left = rows.narrow(dim, size - pad, pad), right = rows.narrow(dim, 0, pad);
    } else if (mode == kReflect) {
      left = rows.narrow(dim, 1, pad).flip(dim), right = rows.narrow(dim, size - 1 - pad, pad).flip(dim);
    } else if (mode == kReplicate) {
      std::vector<int64_t> shape = rows.sizes().vec();
      shape[dim] = pad;
      left = rows.narrow(dim, 0, 1).expand(shape), right = rows.narrow(dim, size - 1, 1).expand(shape);
    } else {
      const int64_t half = rows.size(dim + 1) / 2;
      left = rows.narrow(dim, 0, pad).flip(dim).roll(half, dim + 1);
      right = rows.narrow(dim, size - pad, pad).flip(dim).roll(half, dim + 1);
    }
    rows = at::cat({left, rows, right}, dim);
  }
  return rows;
}

Tensor fold_halo(Tensor grad, const Geometry& g) {
  for (int64_t axis = g.axes() - 1; axis >= 0; --axis) {
    const int64_t mode = g.mode[axis], pad = g.padding[axis], dim = axis + 1, size = grad.size(dim) - 2 * pad;
    if (mode == kZeros || pad == 0) continue;
    const Tensor left = grad.narrow(dim, 0, pad), right = grad.narrow(dim, pad + size, pad);
    Tensor body = grad.narrow(dim, pad, size).clone(at::MemoryFormat::Contiguous);
    if (mode == kCircular) {
      body.narrow(dim, size - pad, pad).add_(left);
      body.narrow(dim, 0, pad).add_(right);
    } else if (mode == kReflect) {
      body.narrow(dim, 1, pad).add_(left.flip(dim));
      body.narrow(dim, size - 1 - pad, pad).add_(right.flip(dim));
    } else if (mode == kReplicate) {
      body.narrow(dim, 0, 1).add_(left.sum(dim, true));
      body.narrow(dim, size - 1, 1).add_(right.sum(dim, true));
    } else {
      const int64_t half = grad.size(dim + 1) / 2;
      body.narrow(dim, 0, pad).add_(left.flip(dim).roll(half, dim + 1));
      body.narrow(dim, size - pad, pad).add_(right.flip(dim).roll(half, dim + 1));
    }
    grad = body;
  }
  return grad;
}

Tensor compose_forward(const Tensor& x, const Tensor& whole_weight, const Geometry& geometry) {
  const Tensor rows = add_halo(x, geometry, Halo::kAll);
  const Crop cropped = crop(geometry.after_halo(), spatial(rows), whole_weight.sizes().slice(2));
  const Geometry& g = cropped.geometry;
  const Tensor weight = crop_weight(whole_weight, cropped);
  const Inner inner(g);
  const std::vector<int64_t> size = spatial(rows), out = g.output_size(size, weight.sizes().slice(2));
  const std::vector<int64_t> shape = rows_shape(rows.size(0), out, weight.size(0));
  Tensor total;
  if (is_product(geometry, g, weight.sizes().slice(2))) {
    total = at::zeros(shape, rows.options());
    for (const OuterTap& tap : outer_taps(g, size, out, weight.sizes().slice(2))) {
      const Tensor matrix = tap_matrix(weight, tap).t();
      in_matrices(cut_output(total, tap), cut_input(rows, tap),
                  [&](Tensor y, const Tensor& x) { y.addmm_(x, matrix); });
    }
    return total;
  }
  int64_t all = 1;
  for (int64_t axis = 0; axis + kInnerAxes < g.axes(); ++axis) all *= out[axis];
  for (const OuterTap& tap : outer_taps(g, size, out, weight.sizes().slice(2))) {
    const Tensor result = at::convolution(volume(cut_input(rows, tap), g.axes()), cut_weight(weight, tap), std::nullopt,
                                          inner.stride, inner.padding, inner.dilation, false, inner.none, g.groups);
    accumulate(total, result, shape, tap.outputs == all, [&](Tensor t) { return cut_output(t, tap); });
  }
  return total.defined() ? total : at::zeros(shape, rows.options());
}

Tensor compose_transpose(const Tensor& grad, const Tensor& whole_weight, const Geometry& geometry,
                         at::IntArrayRef size) {
  std::vector<int64_t> padded = size.vec();
  for (int64_t axis = 0; axis < geometry.axes(); ++axis)
    if (geometry.mode[axis] != kZeros) padded[axis] += 2 * geometry.padding[axis];
  const Crop cropped = crop(geometry.after_halo(), padded, whole_weight.sizes().slice(2));
  const Geometry& g = cropped.geometry;
  const Tensor weight = crop_weight(whole_weight, cropped);
  const Inner inner(g);
  const std::vector<int64_t> out = spatial(grad);
  const std::vector<int64_t> shape = rows_shape(grad.size(0), padded, weight.size(1) * g.groups);
  Tensor total;
  if (is_product(geometry, g, weight.sizes().slice(2))) {
    total = at::zeros(shape, grad.options());
    for (const OuterTap& tap : outer_taps(g, padded, out, weight.sizes().slice(2))) {
      const Tensor matrix = tap_matrix(weight, tap);
      in_matrices(cut_input(total, tap), cut_output(grad, tap),
                  [&](Tensor y, const Tensor& x) { y.addmm_(x, matrix); });
    }
    return fold_halo(total, geometry);
  }
  int64_t all = 1;
  for (int64_t axis = 0; axis + kInnerAxes < g.axes(); ++axis) all *= padded[axis];
  for (const OuterTap& tap : outer_taps(g, padded, out, weight.sizes().slice(2))) {
    const Tensor cut = volume(cut_output(grad, tap), g.axes());
    std::vector<int64_t> like{cut.size(0)};
    like.insert(like.end(), shape.end() - 1 - inner.stride.size(), shape.end());
    // Only the shape of the input matters for its gradient; this memory is never touched.
    const Tensor input = native(at::empty(like, grad.options()));
    const Tensor result = std::get<0>(at::convolution_backward(cut, input, cut_weight(weight, tap), std::nullopt,
                                                               inner.stride, inner.padding, inner.dilation, false,
                                                               inner.none, g.groups, {true, false, false}));
    const bool whole = tap.outputs == all &&
                       std::all_of(tap.input.begin(), tap.input.end(), [](const auto& part) { return part[2] == 1; });
    accumulate(total, result, shape, whole, [&](Tensor t) { return cut_input(t, tap); });
  }
  if (!total.defined()) total = at::zeros(shape, grad.options());
  return fold_halo(total, geometry);
}

Tensor compose_weight_grad(const Tensor& grad, const Tensor& x, at::IntArrayRef kernel, const Geometry& geometry) {
  const Tensor rows = add_halo(x, geometry, Halo::kAll);
  const Crop cropped = crop(geometry.after_halo(), spatial(rows), kernel);
  const Geometry& g = cropped.geometry;
  const Inner inner(g);
  std::vector<int64_t> shape{grad.size(-1), rows.size(-1) / g.groups};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  Tensor whole = at::zeros(shape, grad.options());
  const Tensor result = crop_weight(whole, cropped);
  if (is_product(geometry, g, cropped.count)) {
    for (const OuterTap& tap : outer_taps(g, spatial(rows), spatial(grad), cropped.count)) {
      Tensor sum = at::zeros({result.size(0), result.size(1)}, grad.options());
      in_matrices(cut_output(grad, tap), cut_input(rows, tap),
                  [&](Tensor y, const Tensor& x) { sum.addmm_(y.t(), x); });
      Tensor part = result;
      for (int64_t k : tap.index) part = part.select(2, k);
      part.copy_(sum.view(part.sizes()));
    }
    return whole;
  }
  for (const OuterTap& tap : outer_taps(g, spatial(rows), spatial(grad), cropped.count)) {
    Tensor part = result;
    for (int64_t k : tap.index) part = part.select(2, k);
    const Tensor like = native(to_channels_last(part));
    part.copy_(std::get<1>(at::convolution_backward(
        volume(cut_output(grad, tap), g.axes()), volume(cut_input(rows, tap), g.axes()), like, std::nullopt,
        inner.stride, inner.padding, inner.dilation, false, inner.none, g.groups, {false, true, false})));
  }
  return whole;
}

}  // namespace astrobiogen::conv_nd
