// Plan of the own CPU convolution kernels: index tables, and one copy of the input in fp32 with the last axis' halo written out, so that the
// taps along the last axis read neighbouring memory and need no masks. The copy is one pass over the input, (1 + halo / width) of its fp32 size.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "conv_nd_direct.h"

namespace astrobiogen::conv_nd {

namespace {

template <typename T>
void copy_line(const T* from, float* to, const Plan& plan, int64_t mode, int64_t pad) {
  const int64_t c = plan.channels;
  for (int64_t p = 0; p < plan.padded_width; ++p) {
    const int64_t source = source_row(mode, p - pad, plan.width);
    for (int64_t i = 0; i < c; ++i) to[p * c + i] = source < 0 ? 0.0f : static_cast<float>(from[source * c + i]);
    if (source == 0 && p == pad) {  // the body in one go
      for (int64_t i = 0; i < plan.width * c; ++i) to[p * c + i] = static_cast<float>(from[i]);
      p += plan.width - 1;
    }
  }
}

template <typename T>
void copy_lines(const at::Tensor& rows, Plan& plan, int64_t mode, int64_t pad) {
  const int64_t lines = rows.numel() / std::max<int64_t>(1, plan.width * plan.channels);
  const T* from = rows.const_data_ptr<T>();
  float* to = plan.input.mutable_data_ptr<float>();
  at::parallel_for(0, lines, 1 + 16384 / (plan.padded_width * plan.channels), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line)
      copy_line(from + line * plan.width * plan.channels, to + line * plan.padded_width * plan.channels, plan, mode, pad);
  });
}

}  // namespace

Plan make_plan(const at::Tensor& rows, int64_t outputs, at::IntArrayRef kernel, const Geometry& g) {
  Plan plan;
  const int64_t axes = g.axes(), last = axes - 1, missing = kMaxAxes - axes;
  plan.batch = rows.size(0), plan.channels = rows.size(-1), plan.outputs = outputs, plan.groups = g.groups;
  plan.group_channels = plan.channels / g.groups, plan.group_outputs = outputs / g.groups;
  plan.group_blocks = (plan.group_outputs + kBlock - 1) / kBlock, plan.blocks = plan.group_blocks * g.groups;
  plan.kernel_rows = 1;
  for (int64_t at = 0; at < kRowAxes; ++at) {
    const int64_t axis = at - missing;
    const bool real = axis >= 0;
    const int64_t size = real ? rows.size(1 + axis) : 1, taps = real ? kernel[axis] : 1;
    plan.size[at] = size, plan.kernel[at] = taps;
    plan.out[at] = real ? g.output_size(axis, size, taps) : 1;
    plan.kernel_rows *= taps;
    plan.source[at].resize(plan.out[at] * taps, 0);
    for (int64_t o = 0; real && o < plan.out[at]; ++o)
      for (int64_t k = 0; k < taps; ++k)
        plan.source[at][o * taps + k] = source_row(g.mode[axis], o * g.stride[axis] + k * g.dilation[axis] - g.padding[axis], size);
  }
  plan.width = rows.size(1 + last), plan.taps_w = kernel[last];
  plan.out_width = g.output_size(last, plan.width, kernel[last]);
  plan.padded_width = plan.width + 2 * g.padding[last];
  plan.position_step = g.stride[last] * plan.channels;
  plan.row_taps = plan.taps_w * plan.group_channels;
  const bool one_run = g.groups == 1 && g.dilation[last] == 1;
  plan.run_count = one_run ? 1 : plan.taps_w;
  plan.run_length = one_run ? plan.row_taps : plan.group_channels;
  plan.run_step = g.dilation[last] * plan.channels;
  const int64_t pad = g.padding[last], mode = g.mode[last];
  if (rows.scalar_type() == at::kFloat && pad == 0) {
    plan.input = rows;
    return plan;
  }
  plan.input = at::empty({rows.numel() / std::max<int64_t>(1, plan.width), plan.padded_width}, rows.options().dtype(at::kFloat));
  if (rows.scalar_type() == at::kFloat) copy_lines<float>(rows, plan, mode, pad);
  else if (rows.scalar_type() == at::kBFloat16) copy_lines<c10::BFloat16>(rows, plan, mode, pad);
  else copy_lines<c10::Half>(rows, plan, mode, pad);
  return plan;
}

void live_taps(const Plan& plan, int64_t row, std::vector<Tap>& taps) {
  std::array<int64_t, kRowAxes> o;
  int64_t rest = row;
  for (int64_t at = kRowAxes - 1; at >= 0; --at) o[at] = rest % plan.out[at], rest /= plan.out[at];
  const int64_t line = plan.padded_width * plan.channels;
  const float* x = plan.input.const_data_ptr<float>();
  const auto& [s0, s1, s2, s3] = plan.source;
  const auto& [k0, k1, k2, k3] = plan.kernel;
  taps.clear();
  for (int64_t a = 0; a < k0; ++a) {
    const int64_t r0 = s0[o[0] * k0 + a];
    for (int64_t b = 0; r0 >= 0 && b < k1; ++b) {
      const int64_t r1 = s1[o[1] * k1 + b];
      for (int64_t c = 0; r1 >= 0 && c < k2; ++c) {
        const int64_t r2 = s2[o[2] * k2 + c];
        for (int64_t d = 0; r2 >= 0 && d < k3; ++d) {
          const int64_t r3 = s3[o[3] * k3 + d];
          if (r3 < 0) continue;
          const int64_t at = (((rest * plan.size[0] + r0) * plan.size[1] + r1) * plan.size[2] + r2) * plan.size[3] + r3;
          taps.push_back({x + at * line, ((a * k1 + b) * k2 + c) * k3 + d});
        }
      }
    }
  }
}

}  // namespace astrobiogen::conv_nd
