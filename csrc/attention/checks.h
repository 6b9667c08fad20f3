// What the ops attention and attention_backward demand of their arguments.
#pragma once

#include "attention/geometry.h"
#include "common/checks.h"

namespace astrobiogen::attention {

inline void check_angles(const check::Op& op, const Tensor& table, const char* name, const Tensor& q, int64_t rows) {
  op.floating(table, name);
  op.rank(table, name, 2, 3, "[max(Sq, Sk), R] or [B, max(Sq, Sk), R]");
  TORCH_CHECK_VALUE(table.size(-2) == rows && (table.dim() == 2 || table.size(0) == q.size(0)), op.name(), ": ", name,
                    " must have shape [", rows, ", R] or [", q.size(0), ", ", rows, ", R] (max(Sq, Sk) rows), got ",
                    table.sizes());
  op.size(table.size(-1), "R, the last axis of cos and sin,", 1, q.size(3) / 2);
}

inline void check_sequences(const check::Op& op, const Tensor& bounds, const Tensor& q, const Tensor& k) {
  op.tensor(bounds, "cu_seqlens");
  TORCH_CHECK_TYPE(bounds.scalar_type() == at::kInt || bounds.scalar_type() == at::kLong, op.name(),
                   ": cu_seqlens must be int32 or int64, got ", bounds.scalar_type());
  op.rank(bounds, "cu_seqlens", 1, 1, "[n + 1]");
  op.size(bounds.numel(), "entries of cu_seqlens", 1);
  TORCH_CHECK_VALUE(q.size(0) == 1 && q.size(1) == k.size(1), op.name(), ": cu_seqlens needs q [1, S, Hq, D] and k ",
                    "[1, S, Hkv, D], got q ", q.sizes(), " and k ", k.sizes());
}

// The values of cu_seqlens are checked where they are read (`visible_ranges`).
inline void check_arguments(const check::Op& op, const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cos,
                            const Optional& sin, const Optional& cu_seqlens, const Optional& sinks, double scale,
                            int64_t window, double softcap) {
  op.floating(q, "q");
  op.rank(q, "q", 4, 4, "[B, Sq, Hq, D]");
  op.size(q.size(3), "D, the last axis of q,", 1, kMaxHeadDim);
  op.dtype(k, "k", q.scalar_type());
  op.rank(k, "k", 4, 4, "[B, Sk, Hkv, D]");
  op.shape(k, "k", {q.size(0), k.size(1), k.size(2), q.size(3)}, "[B, Sk, Hkv, D], B and D of q");
  op.like(v, "v", k, "the shape of k");
  op.divides(k.size(2), "the heads of k", q.size(2), "the heads of q");
  op.size(std::max(q.size(1), k.size(1)), "the tokens of q and of k", 0, check::kLargest);
  op.finite(scale, "scale");
  op.finite(softcap, "softcap", 0.0);
  op.size(window, "window", 0);
  TORCH_CHECK_VALUE(cos.has_value() == sin.has_value(), op.name(), ": cos and sin must be given together, got only ",
                    cos ? "cos" : "sin");
  if (cos) {
    const int64_t rows = std::max(q.size(1), k.size(1));
    check_angles(op, *cos, "cos", q, rows);
    check_angles(op, *sin, "sin", q, rows);
    op.shape(*sin, "sin", cos->sizes(), "the shape of cos");
  }
  if (cu_seqlens) check_sequences(op, *cu_seqlens, q, k);
  if (!sinks) return;
  op.floating(*sinks, "sinks");
  op.shape(*sinks, "sinks", {q.size(2)}, "[Hq], one per query head");
}

inline void check_results(const check::Op& op, const Optional& grad_out, const Optional& grad_lse, const Tensor& q,
                          const Tensor& out, const Tensor& lse, const Tensor& rest) {
  op.like(out, "out", q, "the shape of q");
  op.like(grad_out, "grad_out", q, "the shape of q");
  op.dtype(lse, "lse", check::exact(q));
  op.shape(lse, "lse", {q.size(0), q.size(2), q.size(1)}, "[B, Hq, Sq]");
  op.like(grad_lse, "grad_lse", lse, "the shape of lse");
  const bool rounds = q.scalar_type() == at::kBFloat16 || q.scalar_type() == at::kHalf;
  op.dtype(rest, "rest", rounds ? at::kShort : lse.scalar_type());
  op.shape(rest, "rest", rounds ? q.sizes() : lse.sizes(), "the shape of q in half precision, else that of lse");
}

}  // namespace astrobiogen::attention
