// The norms of conv_nd/norm/norm.h in fp64, by ATen.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>
#include <ATen/ops/zeros.h>

#include "conv_nd/norm/norm.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

// Rows as [batch, positions, groups, channels of a group]; channel norms reduce the last axis, a group norm the second
// too.
struct View {
  std::vector<int64_t> shape;
  std::vector<int64_t> reduced;
  View(const Tensor& rows, int64_t norm, int64_t norm_groups) {
    const int64_t channels = rows.size(-1), batch = rows.size(0), groups = norm == kGroup ? norm_groups : 1;
    shape = {batch, batch == 0 ? 0 : rows.numel() / batch / channels, groups, channels / groups};
    reduced = norm == kGroup ? std::vector<int64_t>{1, 3} : std::vector<int64_t>{3};
  }
  Tensor of(const Tensor& rows) const { return rows.reshape(shape); }
  Tensor per_channel(const Tensor& v) const { return v.reshape({1, 1, shape[2], shape[3]}); }
};

}  // namespace

NormResult normalize_plain(const Tensor& total, const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta,
                           int64_t norm, int64_t norm_groups, double eps, int64_t activation, bool keep) {
  const View view(total, norm, norm_groups);
  const Tensor z = view.of(total), mean = norm == kRms ? at::zeros({}, total.options()) : z.mean(view.reduced, true);
  const Tensor rstd = ((z - mean).square().mean(view.reduced, true) + eps).rsqrt();
  Tensor u = (z - mean) * rstd;
  if (gamma) u = u * view.per_channel(*gamma);
  if (beta) u = u + view.per_channel(*beta);
  if (activation == kSilu) u = at::silu(u);
  if (activation == kGelu) u = at::gelu(u);
  const Tensor nothing = at::empty({0}, total.options());
  std::vector<int64_t> shape = total.sizes().slice(0, total.dim() - 1).vec();
  if (norm == kGroup) shape = {total.size(0), norm_groups};
  const bool pre_activation = keep || norm == kGroup;
  return {u.reshape(total.sizes()), keep ? total : nothing,
          pre_activation && norm != kRms ? mean.reshape(shape).contiguous() : nothing,
          pre_activation ? rstd.reshape(shape).contiguous() : nothing};
}

std::tuple<Tensor, Tensor, Tensor> norm_backward_plain(const Tensor& grad, const Tensor& pre_activation,
                                                       const std::optional<Tensor>& gamma,
                                                       const std::optional<Tensor>& beta, const Tensor& mean,
                                                       const Tensor& rstd, int64_t norm, int64_t norm_groups,
                                                       int64_t activation) {
  const Tensor rows = to_channels_last(pre_activation);
  const View view(rows, norm, norm_groups);
  std::vector<int64_t> stats = view.shape;
  for (int64_t axis : view.reduced) stats[axis] = 1;
  const Tensor z = view.of(rows), inverse = rstd.reshape(stats);
  const Tensor h = (norm == kRms ? z : z - mean.reshape(stats)) * inverse;
  Tensor u = gamma ? h * view.per_channel(*gamma) : h;
  if (beta) u = u + view.per_channel(*beta);
  Tensor d = view.of(to_channels_last(grad));
  if (activation == kSilu) d = at::silu_backward(d, u);
  if (activation == kGelu) d = at::gelu_backward(d, u);
  const Tensor e = gamma ? d * view.per_channel(*gamma) : d;
  Tensor inside = e - h * (e * h).mean(view.reduced, true);
  if (norm != kRms) inside = inside - e.mean(view.reduced, true);
  const std::vector<int64_t> positions{0, 1};
  return {from_channels_last((inside * inverse).reshape(rows.sizes())), (d * h).sum(positions).flatten(),
          d.sum(positions).flatten()};
}

}  // namespace astrobiogen::conv_nd
