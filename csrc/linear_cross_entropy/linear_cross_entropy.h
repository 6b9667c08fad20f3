// What the files of the fused loss share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <cstdint>
#include <tuple>

namespace astrobiogen::linear_cross_entropy {

struct Options {
  int64_t ignore_index;
  double label_smoothing;
  double z_loss;
  double softcap;  // 0: none
};

// exp(lse rounded to T - lse), the factor from exp(z - rounded lse) to exp(z - lse): logits with 1000 in common have
// an lse that fp32 rounds by up to 3e-5, and all their probabilities with it, where a softmax taken relative to the
// largest logit keeps its digits.
template <typename T>
double lost_in_rounding(double lse) {
  const double rounded = static_cast<T>(lse);
  return std::isfinite(rounded) ? std::exp(rounded - lse) : 1.0;
}

// Error unless each target is `ignore_index` or in [0, vocabulary).
void check_targets(const at::Tensor& target, int64_t vocabulary, int64_t ignore_index);

// grad_x with 0 in the rows of ignored tokens: their grad_logit is 0, and 0 times a NaN that the weight may hold would
// be NaN.
at::Tensor without_ignored(at::Tensor grad_x, const at::Tensor& target, int64_t ignore_index);

// The ops `linear_cross_entropy` and `linear_cross_entropy_backward`; lse is fp64 for every dtype of x.
std::tuple<at::Tensor, at::Tensor> forward(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& target,
                                           int64_t ignore_index, double label_smoothing, double z_loss, double softcap);
std::tuple<at::Tensor, at::Tensor> backward(const at::Tensor& grad, const at::Tensor& x, const at::Tensor& weight,
                                            const at::Tensor& target, const at::Tensor& lse, int64_t ignore_index,
                                            double label_smoothing, double z_loss, double softcap, bool need_x,
                                            bool need_weight);

// Whether this CPU multiplies bf16 in hardware (AVX512_BF16); without it PyTorch's bf16 products are about 50 times
// slower than fp32 ones.
bool has_bf16_products();

// Whether the functions below, by PyTorch's products, are the fastest ones for this x on this core.
bool tiles_lead(const at::Tensor& x);

// Summed loss over `divisor`, dx and dweight; fp32 or bf16, contiguous arguments.
std::tuple<at::Tensor, at::Tensor, at::Tensor> gradients_in_tiles(const at::Tensor& x, const at::Tensor& weight,
                                                                  const at::Tensor& target, float divisor,
                                                                  const Options& o, bool need_x, bool need_weight);

// `backward`; fp32 or bf16, contiguous arguments, `grad` in fp32.
std::tuple<at::Tensor, at::Tensor> backward_in_tiles(const at::Tensor& grad, const at::Tensor& x,
                                                     const at::Tensor& weight, const at::Tensor& target,
                                                     const at::Tensor& lse, const Options& o, bool need_x,
                                                     bool need_weight);

}  // namespace astrobiogen::linear_cross_entropy
