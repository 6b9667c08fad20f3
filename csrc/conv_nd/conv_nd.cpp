// The CPU kernels of the ops conv_nd, conv_transpose_nd and conv_nd_weight_grad: the choice between the own kernels and
// the composition of ATen convolutions. The rule and the figures behind it: astrobiogen/kernels/conv_nd/README.md.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <optional>
#include <tuple>

#include "conv_nd/checks.h"
#include "conv_nd/norm/norm.h"
#include "conv_nd/patches.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

// Input channels per group up to which the own kernels beat the composition without Winograd axes.
constexpr int64_t kFewChannels = 4;
// Outputs per group below which most lanes of a register block would be idle.
constexpr int64_t kManyOutputs = 8;
// Share of the live products that Winograd axes must leave at most for the own kernels to win at any width.
constexpr double kWinogradShare = 0.75;
// Outputs from this size on ask for huge pages.
constexpr int64_t kHugeBytes = int64_t{4} << 20;

Geometry geometry_of(at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef mode, at::IntArrayRef dilation,
                     int64_t groups) {
  return {stride.vec(), padding.vec(), mode.vec(), dilation.vec(), groups};
}

// One tap over the last three axes: ATen's convolution of such a volume costs a copy, a result of its own and an
// addition per outer tap.
bool pointwise(at::IntArrayRef kernel) {
  const int64_t axes = static_cast<int64_t>(kernel.size());
  return axes > kInnerAxes &&
         std::all_of(kernel.end() - kInnerAxes, kernel.end(), [](int64_t taps) { return taps == 1; });
}

bool own_kernel(const Tensor& rows, int64_t inputs, int64_t outputs, at::IntArrayRef kernel, const Geometry& geometry) {
  if (rows.scalar_type() == at::kDouble || outputs < kManyOutputs) return false;
  return inputs <= kFewChannels || pointwise(kernel) || winograd_share(rows, kernel, geometry) <= kWinogradShare;
}

// An infinite or NaN weight must not reach outputs whose taps it does not belong to, as a component would carry it.
bool winograd_allowed(const Tensor& weight) { return weight.abs().max().item<float>() < 1e30f; }

// The rows beyond a pole that lies before a row axis: written out, since their roll changes the row.
Geometry after_far_poles(Geometry geometry) {
  const Geometry before = geometry;
  for (int64_t axis = 0; axis < geometry.axes(); ++axis)
    if (far_pole(before, axis)) geometry.mode[axis] = kZeros, geometry.padding[axis] = 0;
  return geometry;
}

// Trailing axes of one tap without stride or padding are one long axis: rows and weight are the same memory. Short rows
// cost more in finding and copying lines than in products.
struct Flat {
  Geometry geometry;
  int64_t axes;  // that are left

  Flat(const Geometry& whole, at::IntArrayRef kernel) : geometry(whole), axes(whole.axes()) {
    const auto plain = [&](int64_t axis) {
      return kernel[axis] == 1 && whole.stride[axis] == 1 && whole.padding[axis] == 0;
    };
    if (!plain(axes - 1)) return;
    while (axes > 1 && plain(axes - 2)) --axes;
    for (auto* part : {&geometry.stride, &geometry.padding, &geometry.mode, &geometry.dilation}) part->resize(axes);
    geometry.mode[axes - 1] = kZeros;
  }

  // Sizes of the spatial axes.
  std::vector<int64_t> sizes(at::IntArrayRef size) const {
    std::vector<int64_t> result(size.begin(), size.begin() + axes);
    for (size_t axis = axes; axis < size.size(); ++axis) result.back() *= size[axis];
    return result;
  }
  Tensor rows(const Tensor& t) const {
    std::vector<int64_t> shape = sizes(t.sizes().slice(1, t.dim() - 2));
    shape.insert(shape.begin(), t.size(0)), shape.push_back(t.size(-1));
    return t.view(shape);
  }
  Tensor weight(const Tensor& t) const {
    std::vector<int64_t> shape = sizes(t.sizes().slice(2));
    shape.insert(shape.begin(), {t.size(0), t.size(1)});
    return t.reshape(shape);
  }
};

PartialStatistics own_forward(const Tensor& rows, const Tensor& weight, const Geometry& geometry,
                              const Epilogue& epilogue, Winograd winograd) {
  const Flat flat(geometry, weight.sizes().slice(2));
  return direct_forward(flat.rows(rows), flat.weight(weight), flat.geometry, epilogue,
                        winograd_allowed(weight) ? winograd : Winograd::kNone);
}

at::ScalarType arithmetic(const Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// A new large tensor costs a page fault per 4 KiB when it is written (31,000 for the stem's 126 MB: as long as the
// convolution itself); huge pages divide that by 512. Advice only, and only where the kernel is set to take it.
Tensor empty_huge(at::IntArrayRef shape, const at::TensorOptions& options) {
  Tensor result = at::empty(shape, options);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  if (static_cast<int64_t>(result.nbytes()) >= kHugeBytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(result.mutable_data_ptr()), end = begin + result.nbytes();
    const uintptr_t first = (begin + kHuge - 1) / kHuge * kHuge, last = end / kHuge * kHuge;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
  }
#endif
  return result;
}

Tensor empty_channels_last(const Tensor& x, at::IntArrayRef out, int64_t channels) {
  std::vector<int64_t> shape{x.size(0)};
  shape.insert(shape.end(), out.begin(), out.end());
  shape.push_back(channels);
  return empty_huge(shape, x.options());
}

// Whole cache lines only: a register block of 16 or 32 channels covers them where rows of y are multiples of 64 bytes.
bool streamed(const Tensor& y) {
  return y.scalar_type() == at::kFloat && simd::can_stream(y.const_data_ptr<float>(), y.size(-1), y.numel());
}

std::tuple<Tensor, Tensor> conv_nd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                   at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef mode,
                                   at::IntArrayRef dilation, int64_t groups, int64_t activation, bool keep) {
  constexpr check::Op op("astrobiogen::conv_nd");
  check_conv(op, x, weight, bias, {stride, padding, mode, dilation, groups}, activation);
  const Geometry geometry = geometry_of(stride, padding, mode, dilation, groups);
  const bool patches = are_patches(geometry, weight.sizes().slice(2)) && x.scalar_type() != at::kDouble;
  const Tensor rows = patches ? Tensor() : to_channels_last(x);
  Tensor pre_activation = keep ? Tensor() : at::empty({0}, x.options());
  if (!patches && own_kernel(rows, weight.size(1), weight.size(0) / groups, weight.sizes().slice(2), geometry)) {
    const std::vector<int64_t> out = geometry.output_size(x.sizes().slice(2), weight.sizes().slice(2));
    Tensor y = empty_channels_last(x, out, weight.size(0));
    if (keep) pre_activation = empty_huge(y.sizes(), y.options());
    const std::optional<Tensor> wide = bias ? std::optional(bias->to(at::kFloat).contiguous()) : std::nullopt;
    Epilogue epilogue;
    epilogue.bias = wide ? wide->const_data_ptr<float>() : nullptr;
    epilogue.activation = activation;
    epilogue.y = y.mutable_data_ptr(), epilogue.pre_activation = keep ? pre_activation.mutable_data_ptr() : nullptr;
    epilogue.streamed = streamed(y);
    if (y.numel() > 0)
      own_forward(add_halo(rows, geometry, Halo::kFarPoles), weight, after_far_poles(geometry), epilogue,
                  Winograd::kRows);
    return {from_channels_last(y), keep ? from_channels_last(pre_activation) : pre_activation};
  }
  Tensor total;
  if (patches) {
    total = patches_forward(x.to(at::kFloat), weight.to(at::kFloat), bias);
  } else {
    total = compose_forward(rows.to(arithmetic(x)), weight.to(arithmetic(x)), geometry);
    if (bias) total.add_(bias->to(arithmetic(x)));
  }
  if (keep) pre_activation = total.to(x.scalar_type());
  if (activation == kSilu) total = keep ? at::silu(total) : at::silu_(total);
  if (activation == kGelu) total = keep ? at::gelu(total) : at::gelu_(total);
  return {from_channels_last(total.to(x.scalar_type())), keep ? from_channels_last(pre_activation) : pre_activation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> conv_nd_norm(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const std::optional<Tensor>& gamma,
    const std::optional<Tensor>& beta, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef mode,
    at::IntArrayRef dilation, int64_t groups, int64_t norm, int64_t norm_groups, double eps, int64_t activation,
    bool keep) {
  constexpr check::Op op("astrobiogen::conv_nd_norm");
  check_conv(op, x, weight, bias, {stride, padding, mode, dilation, groups}, activation);
  check_norm(op, x, weight.size(0), gamma, beta, norm, norm_groups);
  op.positive(eps, "eps");
  const Geometry geometry = geometry_of(stride, padding, mode, dilation, groups);
  const Tensor rows = to_channels_last(x);
  const auto result = [](const NormResult& r) {
    return std::tuple{from_channels_last(r.y),
                      r.pre_activation.dim() > 1 ? from_channels_last(r.pre_activation) : r.pre_activation, r.mean,
                      r.rstd};
  };
  if (x.scalar_type() == at::kDouble) {
    Tensor total = compose_forward(rows, weight, geometry);
    if (bias) total.add_(*bias);
    return result(normalize_plain(total, gamma, beta, norm, norm_groups, eps, activation, keep));
  }
  const auto single = [](const std::optional<Tensor>& t) {
    return t ? std::optional(t->to(at::kFloat).contiguous()) : std::nullopt;
  };
  const auto wide_bias = single(bias), wide_gamma = single(gamma), wide_beta = single(beta);
  const auto pointer = [](const std::optional<Tensor>& t) { return t ? t->const_data_ptr<float>() : nullptr; };
  Epilogue epilogue;
  epilogue.bias = pointer(wide_bias), epilogue.gamma = pointer(wide_gamma), epilogue.beta = pointer(wide_beta);
  epilogue.norm = norm, epilogue.norm_groups = norm_groups, epilogue.eps = static_cast<float>(eps),
  epilogue.activation = activation;
  if (!own_kernel(rows, weight.size(1), weight.size(0) / groups, weight.sizes().slice(2), geometry))
    return result(normalize_rows(compose_forward(rows.to(at::kFloat), weight.to(at::kFloat), geometry), x.scalar_type(),
                                 epilogue, keep));
  const std::vector<int64_t> out = geometry.output_size(x.sizes().slice(2), weight.sizes().slice(2));
  const auto options = x.options().dtype(at::kFloat);
  NormResult r{empty_channels_last(x, out, weight.size(0)), at::empty({0}, x.options()), at::empty({0}, options),
               at::empty({0}, options)};
  if (keep) r.pre_activation = empty_huge(r.y.sizes(), r.y.options());
  epilogue.y = r.y.mutable_data_ptr(), epilogue.pre_activation = keep ? r.pre_activation.mutable_data_ptr() : nullptr;
  epilogue.streamed = streamed(r.y) && norm != kGroup;  // a group norm's second half reads it again
  if (norm != kGroup && keep) {
    r.rstd = at::empty(r.y.sizes().slice(0, r.y.dim() - 1), options);
    epilogue.rstd = r.rstd.mutable_data_ptr<float>();
    if (norm == kLayer) r.mean = at::empty_like(r.rstd), epilogue.mean = r.mean.mutable_data_ptr<float>();
  }
  if (norm == kGroup) r.mean = at::empty({x.size(0), norm_groups}, options), r.rstd = at::empty_like(r.mean);
  if (r.y.numel() == 0) return result(r);
  const PartialStatistics partial = own_forward(add_halo(rows, geometry, Halo::kFarPoles), weight,
                                                after_far_poles(geometry), epilogue, Winograd::kRows);
  if (norm == kGroup) finish_groups(keep ? r.pre_activation : r.y, r.y, partial, epilogue, r.mean, r.rstd);
  return result(r);
}

std::tuple<Tensor, Tensor, Tensor> conv_nd_norm_backward(const Tensor& grad, const Tensor& pre_activation,
                                                         const std::optional<Tensor>& gamma,
                                                         const std::optional<Tensor>& beta, const Tensor& mean,
                                                         const Tensor& rstd, int64_t norm, int64_t norm_groups,
                                                         int64_t activation) {
  constexpr check::Op op("astrobiogen::conv_nd_norm_backward");
  check_norm_backward(op, grad, pre_activation, gamma, beta, mean, rstd, norm, norm_groups, activation);
  const auto run = pre_activation.scalar_type() == at::kDouble ? norm_backward_plain : norm_backward;
  return run(grad, pre_activation, gamma, beta, mean.contiguous(), rstd.contiguous(), norm, norm_groups, activation);
}

// The adjoint of a convolution with stride 1 as a convolution: taps mirrored, input and output channels exchanged,
// padding d (k - 1) - p. Circular axes whose size does not change stay circular; other halos are computed as rows of
// their own and folded afterwards.
struct Mirror {
  Geometry conv, fold;
  std::vector<int64_t> padded;
  bool possible = true;
};

Mirror mirror(const Geometry& g, at::IntArrayRef source, at::IntArrayRef target, at::IntArrayRef kernel) {
  Mirror m{g, g, target.vec(), true};
  for (int64_t axis = 0; axis < g.axes(); ++axis) {
    const int64_t reach = g.dilation[axis] * (kernel[axis] - 1);
    const bool wraps = g.mode[axis] == kCircular && source[axis] == target[axis] && 2 * g.padding[axis] == reach &&
                       reach - g.padding[axis] <= source[axis];
    m.possible &= g.stride[axis] == 1;
    if (wraps) m.fold.mode[axis] = kZeros;
    const bool halo = m.fold.mode[axis] != kZeros;
    if (halo) m.padded[axis] += 2 * g.padding[axis];
    m.conv.mode[axis] = wraps ? kCircular : kZeros;
    m.conv.padding[axis] = reach - (halo ? 0 : g.padding[axis]);
    m.possible &= m.conv.padding[axis] >= 0;
  }
  return m;
}

Tensor mirrored_weight(const Tensor& weight, int64_t groups) {
  std::vector<int64_t> shape = weight.sizes().vec(), axes;
  for (int64_t axis = 0; axis + 2 < weight.dim(); ++axis) axes.push_back(3 + axis);
  shape[0] /= groups;
  shape.insert(shape.begin(), groups);
  std::vector<int64_t> result = weight.sizes().vec();
  result[0] = weight.size(1) * groups, result[1] = weight.size(0) / groups;
  return weight.reshape(shape).transpose(1, 2).flip(axes).reshape(result);
}

Tensor conv_transpose_nd(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                         at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef mode,
                         at::IntArrayRef dilation, int64_t groups, at::IntArrayRef size) {
  constexpr check::Op op("astrobiogen::conv_transpose_nd");
  check_transpose(op, x, weight, bias, {stride, padding, mode, dilation, groups}, size);
  const Geometry geometry = geometry_of(stride, padding, mode, dilation, groups);
  const Mirror m = mirror(geometry, x.sizes().slice(2), size, weight.sizes().slice(2));
  const Tensor rows = to_channels_last(x);
  if (m.possible && own_kernel(rows, weight.size(0) / groups, weight.size(1), weight.sizes().slice(2), m.conv)) {
    const bool folds = m.padded != size.vec();
    const Tensor source = folds ? rows.to(at::kFloat) : rows;
    Tensor y = empty_channels_last(source, m.padded, weight.size(1) * groups);
    const std::optional<Tensor> wide = bias ? std::optional(bias->to(at::kFloat).contiguous()) : std::nullopt;
    Epilogue epilogue;
    epilogue.bias = wide && !folds ? wide->const_data_ptr<float>() : nullptr;
    epilogue.y = y.mutable_data_ptr();
    epilogue.streamed = streamed(y);
    if (y.numel() > 0) own_forward(source, mirrored_weight(weight, groups), m.conv, epilogue, Winograd::kAll);
    if (!folds) return from_channels_last(y);
    y = fold_halo(y, m.fold);
    if (wide) y.add_(*wide);
    return from_channels_last(y.to(x.scalar_type()));
  }
  const Tensor wide_weight = weight.to(arithmetic(x));
  Tensor total = are_patches(geometry, weight.sizes().slice(2))
                     ? patches_transpose(rows.to(arithmetic(x)), wide_weight, size)
                     : compose_transpose(rows.to(arithmetic(x)), wide_weight, geometry, size);
  if (bias) total = total.add(bias->to(arithmetic(x)));
  return from_channels_last(total.to(x.scalar_type()).contiguous());
}

Tensor conv_nd_weight_grad(const Tensor& grad, const Tensor& x, at::IntArrayRef kernel, at::IntArrayRef stride,
                           at::IntArrayRef padding, at::IntArrayRef mode, at::IntArrayRef dilation, int64_t groups) {
  constexpr check::Op op("astrobiogen::conv_nd_weight_grad");
  check_weight_grad(op, grad, x, kernel, {stride, padding, mode, dilation, groups});
  const Geometry geometry = geometry_of(stride, padding, mode, dilation, groups);
  std::vector<int64_t> shape{grad.size(1), x.size(1) / groups};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  // Beside an axis of no rows a number of channels may be one that no memory holds: ATen refuses its size.
  if (grad.numel() == 0 || x.numel() == 0) return at::zeros(shape, x.options());
  if (are_patches(geometry, kernel) && x.scalar_type() != at::kDouble)
    return patches_weight_grad(to_channels_last(grad).to(at::kFloat), x.to(at::kFloat), kernel).to(x.scalar_type());
  const Tensor rows = to_channels_last(x);
  if (own_kernel(rows, x.size(1) / groups, grad.size(1) / groups, kernel, geometry)) {
    const Flat flat(after_far_poles(geometry), kernel);
    const Tensor sums =
        direct_weight_grad(flat.rows(to_channels_last(grad)), flat.rows(add_halo(rows, geometry, Halo::kFarPoles)),
                           flat.sizes(kernel), flat.geometry);
    return sums.view(shape).to(x.scalar_type());
  }
  return compose_weight_grad(to_channels_last(grad).to(arithmetic(x)), rows.to(arithmetic(x)), kernel, geometry)
      .to(x.scalar_type());
}

}  // namespace

}  // namespace astrobiogen::conv_nd

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("conv_nd", &astrobiogen::conv_nd::conv_nd);
  m.impl("conv_nd_norm", &astrobiogen::conv_nd::conv_nd_norm);
  m.impl("conv_nd_norm_backward", &astrobiogen::conv_nd::conv_nd_norm_backward);
  m.impl("conv_transpose_nd", &astrobiogen::conv_nd::conv_transpose_nd);
  m.impl("conv_nd_weight_grad", &astrobiogen::conv_nd::conv_nd_weight_grad);
}
