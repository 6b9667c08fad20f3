// What the two files of the fused loss share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <tuple>

namespace astrobiogen::linear_cross_entropy {

struct Options {
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: none
};

// Error unless each target is `ignore_index` or in [0, vocabulary).
void check_targets(const at::Tensor& target, int64_t vocabulary, int64_t ignore_index);

// The ops `linear_cross_entropy` and `linear_cross_entropy_backward`.
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target, int64_t ignore_index,
                                           double label_smoothing, double z_loss, double softcap);
std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target,
                                            const at::Tensor& lse, int64_t ignore_index, double label_smoothing, double z_loss, double softcap,
                                            bool need_x, bool need_weight);

}  // namespace astrobiogen::linear_cross_entropy
