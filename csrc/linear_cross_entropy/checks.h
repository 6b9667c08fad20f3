// What the ops of the fused loss demand of their arguments; the targets' values are checked by `check_targets`.
#pragma once

#include "common/checks.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace astrobiogen::linear_cross_entropy {

inline void check_arguments(const check::Op& op, const at::Tensor& x, const at::Tensor& weight,
                            const at::Tensor& target, const Options& o) {
  op.floating(x, "x");
  op.rank(x, "x", 2, 2, "[tokens, H]");
  op.size(x.size(1), "H, the last axis of x,", 1);
  op.dtype(weight, "weight", x.scalar_type());
  op.rank(weight, "weight", 2, 2, "[V, H]");
  op.shape(weight, "weight", {weight.size(0), x.size(1)}, "[V, H], H the last axis of x");
  op.size(weight.size(0), "V, the first axis of weight,", 1, check::kLargest);
  op.dtype(target, "target", at::kLong);
  op.shape(target, "target", {x.size(0)}, "[tokens], the first axis of x");
  op.finite(o.label_smoothing, "label_smoothing", 0.0, 1.0);
  op.finite(o.z_loss, "z_loss", 0.0);
  op.finite(o.softcap, "softcap", 0.0);
}

inline void check_upstream(const check::Op& op, const at::Tensor& grad, const at::Tensor& lse, const at::Tensor& x) {
  op.dtype(lse, "lse", at::kDouble);
  op.shape(lse, "lse", {x.size(0)}, "[tokens], the first axis of x");
  op.floating(grad, "grad");
  op.shape(grad, "grad", {x.size(0)}, "[tokens], the first axis of x");
}

}  // namespace astrobiogen::linear_cross_entropy
