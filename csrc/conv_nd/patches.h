// Convolution whose windows do not overlap: stride = kernel, no padding, one group. "Rows" as in conv_nd/geometry.h.
#pragma once

#include <optional>

#include "conv_nd/geometry.h"

namespace astrobiogen::conv_nd {

bool are_patches(const Geometry& geometry, at::IntArrayRef kernel);

// fp32 x [B, C, *spatial] with any strides, weight [O, C, *kernel] and bias [O] -> rows [B, *out, O].
at::Tensor patches_forward(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias);

// fp32 or fp64 rows [B, *out, O] -> rows [B, *size, C].
at::Tensor patches_transpose(const at::Tensor& grad, const at::Tensor& weight, at::IntArrayRef size);

// Contiguous fp32 rows [B, *out, O] and x [B, C, *spatial] with any strides -> [O, C, *kernel].
at::Tensor patches_weight_grad(const at::Tensor& grad, const at::Tensor& x, at::IntArrayRef kernel);

}  // namespace astrobiogen::conv_nd
