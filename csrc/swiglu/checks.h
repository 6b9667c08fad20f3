// What the ops of the gated activation demand of their arguments.
#pragma once

#include "common/checks.h"

namespace astrobiogen::swiglu {

using at::Tensor;

inline void check_halves(const check::Op& op, const Tensor& gate, const Tensor& up) {
  op.floating(gate, "gate");
  op.like(up, "up", gate, "the shape of gate");
}

inline void check_pair(const check::Op& op, const Tensor& grad, const Tensor& gate, const Tensor& up) {
  check_halves(op, gate, up);
  op.like(grad, "grad", gate, "the shape of gate");
}

inline void check_packed(const check::Op& op, const Tensor& gate_up) {
  op.floating(gate_up, "gate_up");
  TORCH_CHECK_VALUE(gate_up.dim() > 0 && gate_up.size(-1) % 2 == 0, op.name(),
                    ": gate_up must have shape [..., 2 I] with an even last axis, got ", gate_up.sizes());
}

inline void check_packed_pair(const check::Op& op, const Tensor& grad, const Tensor& gate_up) {
  check_packed(op, gate_up);
  op.dtype(grad, "grad", gate_up.scalar_type());
  op.rows_like(grad, "grad", gate_up, gate_up.size(-1) / 2, "[..., I], half of gate_up");
}

}  // namespace astrobiogen::swiglu
