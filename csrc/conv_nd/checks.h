// What the convolution ops demand of their arguments; the C++ side of astrobiogen/kernels/conv_nd/arguments.py.
#pragma once

#include "common/checks.h"
#include "conv_nd/geometry.h"

namespace astrobiogen::conv_nd {

using at::Tensor;
using Optional = std::optional<Tensor>;

// The geometry's lists as the ops' schemas list them.
struct Lists {
  at::IntArrayRef stride, padding, mode, dilation;
  int64_t groups;
};

inline void check_lists(const check::Op& op, const Lists& g, size_t axes) {
  op.size(axes, "the number of spatial axes", 1, kMaxAxes);
  op.length(g.stride.size(), "stride", axes, "one per spatial axis");
  op.length(g.padding.size(), "padding", axes, "one per spatial axis");
  op.length(g.mode.size(), "mode", axes, "one per spatial axis");
  op.length(g.dilation.size(), "dilation", axes, "one per spatial axis");
  op.size(g.groups, "groups", 1, check::kLargest);
  for (size_t axis = 0; axis < axes; ++axis) {
    op.size(g.stride[axis], "every stride", 1, check::kLargest);
    op.size(g.padding[axis], "every padding", 0, check::kLargest);
    op.size(g.mode[axis], "every mode", kZeros, kPole);
    op.size(g.dilation[axis], "every dilation", 1, check::kLargest);
  }
}

// A halo is copied from the axis that it extends, beyond a pole from half a turn further along the next one.
inline void check_halo(const check::Op& op, const Lists& g, at::IntArrayRef size, size_t axis) {
  if (g.mode[axis] == kZeros || g.mode[axis] == kReplicate) return;
  op.size(g.padding[axis], "the padding of a circular, reflected or pole axis", 0,
          g.mode[axis] == kReflect ? size[axis] - 1 : size[axis]);
  if (g.mode[axis] != kPole) return;
  TORCH_CHECK_VALUE(axis + 1 < size.size() && size[axis + 1] % 2 == 0, op.name(), ": mode ", int64_t{kPole},
                    " (pole) needs a following axis of even size, got sizes ", size, " and modes ", g.mode);
}

// Sizes of the convolution's input, kernel and output; the lists have been checked.
inline void check_sizes(const check::Op& op, const Lists& g, at::IntArrayRef size, at::IntArrayRef kernel,
                        at::IntArrayRef out) {
  for (size_t axis = 0; axis < size.size(); ++axis) {
    op.size(size[axis], "every spatial size", 1);
    op.size(kernel[axis], "every kernel size", 1);
    check_halo(op, g, size, axis);
    const int64_t padded = check::sum(size[axis], 2 * g.padding[axis]);
    const int64_t reach = check::sum(check::product(g.dilation[axis], kernel[axis] - 1), 1);
    TORCH_CHECK_VALUE(reach <= padded, op.name(), ": the kernel must fit into the padded axis, got a reach of ", reach,
                      " rows (kernel ", kernel, ", dilation ", g.dilation, ") over ", padded, " (sizes ", size,
                      ", padding ", g.padding, ") on spatial axis ", axis);
    if (out.empty()) continue;
    const int64_t expected = (padded - reach) / g.stride[axis] + 1;
    TORCH_CHECK_VALUE(out[axis] == expected, op.name(), ": the convolution's output must have size ", expected,
                      " on spatial axis ", axis, " (size ", size[axis], ", kernel ", kernel[axis], "), got ",
                      out[axis]);
  }
}

inline void check_volume(const check::Op& op, const Tensor& x, const char* name) {
  op.floating(x, name);
  op.rank(x, name, 3, kMaxAxes + 2, "[B, C, *spatial] with 1 to 5 spatial axes");
  op.size(x.size(1), "the channels", 1);
}

inline void check_bias(const check::Op& op, const Optional& bias, const char* name, const Tensor& x, int64_t channels) {
  if (!bias) return;
  op.dtype(*bias, name, x.scalar_type());
  op.shape(*bias, name, {channels}, "[O], one per output channel");
}

// weight [O, C / groups, *kernel] of the convolution.
inline void check_weight(const check::Op& op, const Tensor& weight, const Tensor& x, int64_t groups) {
  op.dtype(weight, "weight", x.scalar_type());
  op.rank(weight, "weight", x.dim(), x.dim(), "[channels, channels / groups, *kernel] with a size per spatial axis");
  op.size(weight.size(0), "the weight's first axis", 1);
  op.size(weight.size(1), "the weight's second axis", 1);
  op.divides(groups, "groups", weight.size(0), "the weight's first axis");
}

inline void check_conv(const check::Op& op, const Tensor& x, const Tensor& weight, const Optional& bias, const Lists& g,
                       int64_t activation) {
  check_volume(op, x, "x");
  check_lists(op, g, x.dim() - 2);
  check_weight(op, weight, x, g.groups);
  op.size(check::product(weight.size(1), g.groups), "the weight's second axis times groups", x.size(1), x.size(1));
  check_bias(op, bias, "bias", x, weight.size(0));
  check_sizes(op, g, x.sizes().slice(2), weight.sizes().slice(2), {});
  op.size(activation, "activation", kNone, kGelu);
}

inline void check_norm(const check::Op& op, const Tensor& x, int64_t channels, const Optional& gamma,
                       const Optional& beta, int64_t norm, int64_t norm_groups) {
  op.size(norm, "norm", kRms, kGroup);
  op.size(norm_groups, "norm_groups", 1, norm == kGroup ? channels : 1);
  op.divides(norm_groups, "norm_groups", channels, "the output channels");
  check_bias(op, gamma, "norm_weight", x, channels);
  check_bias(op, beta, "norm_bias", x, channels);
}

inline void check_norm_backward(const check::Op& op, const Tensor& grad, const Tensor& pre_activation,
                                const Optional& gamma, const Optional& beta, const Tensor& mean, const Tensor& rstd,
                                int64_t norm, int64_t norm_groups, int64_t activation) {
  check_volume(op, pre_activation, "kept");
  op.like(grad, "grad", pre_activation, "the shape of kept");
  check_norm(op, pre_activation, pre_activation.size(1), gamma, beta, norm, norm_groups);
  op.size(activation, "activation", kNone, kGelu);
  std::vector<int64_t> shape = pre_activation.sizes().vec();
  if (norm == kGroup) shape = {pre_activation.size(0), norm_groups};
  else shape.erase(shape.begin() + 1);
  op.dtype(rstd, "rstd", check::exact(pre_activation));
  op.shape(rstd, "rstd", shape, "[B, groups] of a group norm, else [B, *spatial]");
  op.dtype(mean, "mean", check::exact(pre_activation));
  if (norm != kRms) op.shape(mean, "mean", shape, "[B, groups] of a group norm, else [B, *spatial]");
}

inline void check_transpose(const check::Op& op, const Tensor& x, const Tensor& weight, const Optional& bias,
                            const Lists& g, at::IntArrayRef size) {
  check_volume(op, x, "x");
  check_lists(op, g, x.dim() - 2);
  op.length(size.size(), "size", x.dim() - 2, "one per spatial axis");
  check_weight(op, weight, x, g.groups);
  op.size(weight.size(0), "the weight's first axis", x.size(1), x.size(1));
  op.size(check::product(weight.size(1), g.groups), "the output channels", 1, check::kLargest);
  check_bias(op, bias, "bias", x, weight.size(1) * g.groups);
  check_sizes(op, g, size, weight.sizes().slice(2), x.sizes().slice(2));
}

inline void check_weight_grad(const check::Op& op, const Tensor& grad, const Tensor& x, at::IntArrayRef kernel,
                              const Lists& g) {
  check_volume(op, x, "x");
  check_lists(op, g, x.dim() - 2);
  op.dtype(grad, "grad", x.scalar_type());
  op.rank(grad, "grad", x.dim(), x.dim(), "[B, O, *out] with the axes of x");
  op.size(grad.size(0), "the batch of grad", x.size(0), x.size(0));
  op.size(grad.size(1), "the channels of grad", 1);
  op.length(kernel.size(), "kernel", x.dim() - 2, "one per spatial axis");
  op.divides(g.groups, "groups", x.size(1), "the channels of x");
  op.divides(g.groups, "groups", grad.size(1), "the channels of grad");
  check_sizes(op, g, x.sizes().slice(2), kernel, grad.sizes().slice(2));
}

}  // namespace astrobiogen::conv_nd
