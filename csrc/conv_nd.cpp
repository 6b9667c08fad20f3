// The CPU kernels of the ops conv_nd, conv_transpose_nd and conv_nd_weight_grad: the choice between the own kernels and the composition of ATen
// convolutions. The rule and the figures behind it: astrobiogen/kernels/conv_nd/README.md.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/silu.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "conv_nd_geometry.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

// Input channels per group up to which the own fp32 kernels beat the composition.
constexpr int64_t kFewChannels = 4;

Geometry geometry_of(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef mode, at::IntArrayRef dilation, int64_t groups) {
  return {stride.vec(), padding.vec(), mode.vec(), dilation.vec(), groups};
}

bool own_kernel(const Tensor& x, int64_t group_channels, int64_t group_outputs) {
  if (x.scalar_type() == at::kDouble) return false;
  return group_channels <= kFewChannels && group_outputs >= 8;
}

// The pole's copied rows are rolled, which no index table can say: they are written out before the own kernels run.
Geometry after_pole(Geometry geometry) {
  for (int64_t axis = 0; axis < geometry.axes(); ++axis)
    if (geometry.mode[axis] == kPole) geometry.mode[axis] = kZeros, geometry.padding[axis] = 0;
  return geometry;
}

at::ScalarType arithmetic(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

Tensor empty_rows(const Tensor& x, at::IntArrayRef out, int64_t channels) {
  std::vector<int64_t> shape{x.size(0)};
  shape.insert(shape.end(), out.begin(), out.end());
  shape.push_back(channels);
  return at::empty(shape, x.options());
}

std::tuple<Tensor, Tensor> conv_nd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride,
                                   at::IntArrayRef padding, at::IntArrayRef mode, at::IntArrayRef dilation, int64_t groups, int64_t activation,
                                   bool keep) {
  const Geometry geometry = geometry_of(stride, padding, mode, dilation, groups);
  Tensor rows = to_rows(x), kept = keep ? Tensor() : at::empty({0}, x.options());
  if (own_kernel(x, weight.size(1), weight.size(0) / groups)) {
    const std::vector<int64_t> out = geometry.output_size(x.sizes().slice(2), weight.sizes().slice(2));
    Tensor y = empty_rows(x, out, weight.size(0));
    if (keep) kept = at::empty_like(y);
    rows = add_halo(rows, geometry, true);
    const std::optional<Tensor> wide = bias ? std::optional(bias->to(at::kFloat).contiguous()) : std::nullopt;
    direct_forward(rows, weight, wide ? wide->const_data_ptr<float>() : nullptr, after_pole(geometry), activation, y, keep ? &kept : nullptr);
    return {from_rows(y), keep ? from_rows(kept) : kept};
  }
  Tensor total = compose_forward(rows.to(arithmetic(x)), weight.to(arithmetic(x)), geometry);
  if (bias) total.add_(bias->to(arithmetic(x)));
  if (keep) kept = total.to(x.scalar_type());
  if (activation == kSilu) total = keep ? at::silu(total) : at::silu_(total);
  if (activation == kGelu) total = keep ? at::gelu(total) : at::gelu_(total);
  return {from_rows(total.to(x.scalar_type())), keep ? from_rows(kept) : kept};
}

Tensor conv_transpose_nd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, at::IntArrayRef stride, at::IntArrayRef padding,
                         at::IntArrayRef mode, at::IntArrayRef dilation, int64_t groups, at::IntArrayRef size) {
  const Geometry geometry = geometry_of(stride, padding, mode, dilation, groups);
  Tensor total = compose_transpose(to_rows(x).to(arithmetic(x)), weight.to(arithmetic(x)), geometry, size);
  if (bias) total = total.add(bias->to(arithmetic(x)));
  return from_rows(total.to(x.scalar_type()).contiguous());
}

Tensor conv_nd_weight_grad(const Tensor& grad, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride, at::IntArrayRef padding,
                           at::IntArrayRef mode, at::IntArrayRef dilation, int64_t groups) {
  const Geometry geometry = geometry_of(stride, padding, mode, dilation, groups);
  if (own_kernel(x, x.size(1) / groups, grad.size(1) / groups))
    return direct_weight_grad(to_rows(grad), add_halo(to_rows(x), geometry, true), kernel, after_pole(geometry)).to(x.scalar_type());
  return compose_weight_grad(to_rows(grad).to(arithmetic(x)), to_rows(x).to(arithmetic(x)), kernel, geometry).to(x.scalar_type());
}

}  // namespace

}  // namespace astrobiogen::conv_nd

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("conv_nd", &astrobiogen::conv_nd::conv_nd);
  m.impl("conv_transpose_nd", &astrobiogen::conv_nd::conv_transpose_nd);
  m.impl("conv_nd_weight_grad", &astrobiogen::conv_nd::conv_nd_weight_grad);
}
