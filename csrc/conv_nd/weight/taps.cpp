// Weight gradient of the own CPU convolution: components of Winograd axes become taps again, in vectors over output
// channels, and leave as dW lies.
#include <vector>

#include "conv_nd/weight/taps.h"

namespace astrobiogen::conv_nd {

namespace {

using simd::f32x16;

// The adjoint of the weight transform: three taps from four components.
ASTRO_INLINE void weight_transform_adjoint(const f32x16* component, int64_t step, f32x16* tap) {
  const f32x16 half = (component[step] + component[2 * step]) * 0.5f;
  tap[0] = component[0] + half, tap[1] = (component[step] - component[2 * step]) * 0.5f,
  tap[2] = half + component[3 * step];
}

// One channel of one kernel row: from `from` of the first component, `component_step` floats apart, to [taps of the
// Winograd axes] of `step` floats.
struct RowTaps {
  template <Level L>
  static ASTRO_INLINE void run(const Plan& plan, const Sums& sums, const float* from, int64_t component_step, float* to,
                               int64_t step) {
    using namespace simd;
    for (int64_t v = 0; v < plan.block; v += kLanes) {
      f32x16 component[kMaxComponents], row[4][3], tap[3];
      for (int64_t k = 0; k < plan.components; ++k) {
        component[k] = splat(0.0f);
        for (int64_t chunk = 0; chunk < sums.chunks; ++chunk)
          component[k] += load(from + chunk * sums.chunk_step + k * component_step + v);
      }
      if (plan.winograd_axes == 0) store(to + v, component[0]);
      if (plan.winograd_axes == 1) {
        weight_transform_adjoint(component, 1, tap);
        for (int64_t i = 0; i < 3; ++i) store(to + i * step + v, tap[i]);
      }
      if (plan.winograd_axes < 2) continue;
      for (int64_t k = 0; k < 4; ++k) weight_transform_adjoint(component + 4 * k, 1, row[k]);
      for (int64_t j = 0; j < 3; ++j) {
        weight_transform_adjoint(row[0] + j, 3, tap);
        for (int64_t i = 0; i < 3; ++i) store(to + (3 * i + j) * step + v, tap[i]);
      }
    }
  }
};

// The last axis' four components, `block` floats apart, to three taps in their place.
struct LastTaps {
  template <Level L>
  static ASTRO_INLINE void run(float* found, int64_t block) {
    for (int64_t v = 0; v < block; v += simd::kLanes) {
      f32x16 component[4], tap[3];
      for (int64_t k = 0; k < 4; ++k) component[k] = simd::load(found + k * block + v);
      weight_transform_adjoint(component, 1, tap);
      for (int64_t w = 0; w < 3; ++w) simd::store(found + w * block + v, tap[w]);
    }
  }
};

}  // namespace

void write_taps(const Plan& plan, const KernelRows& kernel, const Sums& sums, int64_t b, float* grad_weight) {
  const int64_t taps = std::min(sums.subset, plan.taps - sums.first_tap), size = kernel.count * plan.taps_w;
  const int64_t last_step = plan.blocks * sums.subset * plan.row_taps * plan.block,
                component_step = plan.last_components * last_step;
  const int64_t outer = plan.winograd_axes > 0 ? 3 : 1, inner = plan.winograd_axes > 1 ? 3 : 1;
  // Along the last axis a kernel row has its taps, channels apart, or components.
  const int64_t width = plan.winograd_last() ? plan.last_components : plan.taps_w, step = width * plan.block;
  const int64_t width_step = plan.winograd_last() ? last_step : plan.group_channels * plan.block;
  const int64_t inside = b % plan.group_blocks * plan.block,
                channel = b / plan.group_blocks * plan.group_outputs + inside;
  const int64_t lanes = std::min(plan.block, plan.group_outputs - inside);
  std::vector<float> found(outer * inner * step);  // [taps of the Winograd axes][width][block]
  for (int64_t tap = 0; tap < taps; ++tap)
    for (int64_t c = 0; c < plan.group_channels; ++c) {
      const float* from = sums.data + ((b * sums.subset + tap) * plan.row_taps + c) * plan.block;
      for (int64_t w = 0; w < width; ++w)
        dispatch<RowTaps>(plan, sums, from + w * width_step, component_step, found.data() + w * plan.block, step);
      if (plan.winograd_last())
        for (int64_t k = 0; k < outer * inner; ++k) dispatch<LastTaps>(found.data() + k * step, plan.block);
      for (int64_t lane = 0; lane < lanes; ++lane) {
        float* to = grad_weight + ((channel + lane) * plan.group_channels + c) * size +
                    kernel.base[sums.first_tap + tap] * plan.taps_w;
        for (int64_t i = 0; i < outer; ++i)
          for (int64_t j = 0; j < inner; ++j)
            for (int64_t w = 0; w < plan.taps_w; ++w)
              to[(i * kernel.step[0] + j * kernel.step[1]) * plan.taps_w + w] =
                  found[(i * inner + j) * step + w * plan.block + lane];
      }
    }
}

}  // namespace astrobiogen::conv_nd
