// Norm over the channels of a convolution's output, with activation: forward behind the own kernels or over a finished
// sum, and the backward. Formulas: astrobiogen/kernels/conv_nd/README.md.
#pragma once

#include <optional>
#include <tuple>

#include "conv_nd/epilogue.h"

namespace astrobiogen::conv_nd {

// Rows [positions][channels] of fp32, bf16 or fp16 behind a norm.
struct NormTarget {
  int64_t channels;
  at::ScalarType dtype;  // of y and pre_activation
  const Epilogue* epilogue;
};

// Channel norms: statistics, pre-activation, y of positions [first, first + count) from z [count][channels] without
// bias.
void normalize_positions(const NormTarget& target, const float* z, int64_t first, int64_t count);

// Group norm, first half: adds the bias to z [count][channels] in place and writes it to the epilogue's
// `pre_activation` (or `y`), and its mean and sum of squared deviations per group to slot `slot` of `mean` and `rstd`.
void partial_groups(const NormTarget& target, float* z, int64_t first, int64_t count, int64_t slot);

// Group norm, second half: partial statistics -> mean and rstd [batch][groups], then y from z in one pass.
// `z` and `y` may be the same rows.
void finish_groups(const at::Tensor& z, at::Tensor& y, const PartialStatistics& partial, const Epilogue& epilogue,
                   at::Tensor& mean, at::Tensor& rstd);

// Statistics and normalisation of a whole finished convolution, fp32 rows `total` without bias: fills y,
// pre_activation, mean, rstd as the op returns them.
struct NormResult {
  at::Tensor y, pre_activation, mean,
      rstd;  // channels last; pre_activation, mean and rstd are empty unless asked for, mean also for an RMS norm
};
NormResult normalize_rows(const at::Tensor& total, at::ScalarType dtype, Epilogue epilogue, bool keep);

// fp64, by ATen.
NormResult normalize_plain(const at::Tensor& total, const std::optional<at::Tensor>& gamma,
                           const std::optional<at::Tensor>& beta, int64_t norm, int64_t norm_groups, double eps,
                           int64_t activation, bool keep);

std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward_plain(
    const at::Tensor& grad, const at::Tensor& pre_activation, const std::optional<at::Tensor>& gamma,
    const std::optional<at::Tensor>& beta, const at::Tensor& mean, const at::Tensor& rstd, int64_t norm,
    int64_t norm_groups, int64_t activation);

// The op conv_nd_norm_backward for the other types.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_backward(const at::Tensor& grad, const at::Tensor& pre_activation,
                                                             const std::optional<at::Tensor>& gamma,
                                                             const std::optional<at::Tensor>& beta,
                                                             const at::Tensor& mean, const at::Tensor& rstd,
                                                             int64_t norm, int64_t norm_groups, int64_t activation);

}  // namespace astrobiogen::conv_nd
