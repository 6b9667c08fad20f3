// Plan of the own CPU convolution kernels: which are Winograd axes, which input rows a tile reads, and the packed
// weight.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "conv_nd/direct.h"

namespace astrobiogen::conv_nd {

namespace {

// Of the live products of an axis, the share that is left when it is a Winograd axis; 1 where it cannot be.
double axis_share(int64_t size, int64_t out, int64_t kernel, const Geometry& g, int64_t axis) {
  if (kernel != 3 || g.stride[axis] != 1 || g.dilation[axis] != 1 || g.mode[axis] == kCircular || out < 2) return 1.0;
  int64_t live = 3 * out;
  if (g.mode[axis] == kZeros) {
    live = 0;
    for (int64_t k = 0; k < 3; ++k) {
      const auto [low, high] = live_range(out, size, 1, k - g.padding[axis]);
      live += high - low;
    }
  }
  return live == 0 ? 1.0 : static_cast<double>(4 * ((out + 1) / 2)) / static_cast<double>(live);
}

// Channels per group and positions of a row from which the last axis is a Winograd axis: below, the transforms cost
// what the products save, and register blocks are not filled (the op's notes).
constexpr int64_t kWinogradChannels = 64, kWinogradWidth = 16;

// The best Winograd axes, best first; -1 where there is none.
std::array<int64_t, kMaxWinogradAxes> choose_winograd_axes(at::IntArrayRef size, at::IntArrayRef kernel,
                                                           const Geometry& g, double& share) {
  std::array<int64_t, kMaxWinogradAxes> chosen{-1, -1};
  share = 1.0;
  for (int64_t slot = 0; slot < kMaxWinogradAxes; ++slot) {
    double best = 1.0 / kWinogradGain;
    for (int64_t axis = 0; axis + 1 < g.axes(); ++axis) {
      const double left = axis_share(size[axis], g.output_size(axis, size[axis], kernel[axis]), kernel[axis], g, axis);
      if (left > best || axis == chosen[0]) continue;
      best = left, chosen[slot] = axis;
    }
    if (chosen[slot] < 0) break;
    share *= best;
  }
  if (chosen[1] >= 0 && chosen[1] < chosen[0]) std::swap(chosen[0], chosen[1]);
  return chosen;
}

Axis make_axis(const Geometry& g, int64_t axis, int64_t size, int64_t kernel, bool winograd) {
  Axis a;
  a.size = size, a.kernel = kernel, a.out = g.output_size(axis, size, kernel), a.winograd = winograd;
  a.tiles = winograd ? (a.out + 1) / 2 : a.out;
  a.taps = winograd ? 1 : kernel, a.reads = winograd ? 4 : kernel;
  a.source.assign(a.tiles * a.reads, -1);
  a.rolled.assign(a.tiles * a.reads, 0);
  for (int64_t t = 0; t < a.tiles; ++t)
    for (int64_t k = 0; k < a.reads; ++k) {
      const int64_t o = winograd ? 2 * t + k : t * g.stride[axis] + k * g.dilation[axis];
      if (winograd && o >= a.out + 2) continue;  // only the absent second output of an odd axis' last tile reads this
      const int64_t p = o - g.padding[axis];
      a.source[t * a.reads + k] = source_row(g.mode[axis], p, size);
      a.rolled[t * a.reads + k] = g.mode[axis] == kPole && (p < 0 || p >= size);
    }
  return a;
}

using simd::f32x16;

// The weight transform: four components from three taps, `from` and `to` steps apart.
ASTRO_INLINE void weight_transform(const f32x16* tap, int64_t from, f32x16* component, int64_t to) {
  const f32x16 ends = (tap[0] + tap[2 * from]) * 0.5f, middle = tap[from] * 0.5f;
  component[0] = tap[0], component[to] = ends + middle, component[2 * to] = ends - middle,
  component[3 * to] = tap[2 * from];
}

// The weights of all components of one input channel, outer tap and block of output channels: from rows `lanes` [kernel
// rows][taps_w][block], the first one at `base`, to `to` [components][last components] of `component_step` floats.
struct PackWeight {
  template <Level L>
  static ASTRO_INLINE void run(const Plan& plan, const KernelRows& kernel, const float* lanes, int64_t base,
                               int64_t component_step, float* to) {
    using namespace simd;
    const bool last = plan.winograd_last();
    for (int64_t v = 0; v < plan.block; v += kLanes) {
      f32x16 component[3 * kMaxComponents];  // [taps of a Winograd last axis][components]
      for (int64_t w = 0; w < plan.taps_w; ++w) {
        const auto row = [&](int64_t i, int64_t j) ASTRO_LAMBDA_INLINE {
          return load(lanes + ((base + i * kernel.step[0] + j * kernel.step[1]) * plan.taps_w + w) * plan.block + v);
        };
        f32x16 *mine = component + (last ? w * plan.components : 0), tap[9], half[12];
        if (plan.winograd_axes == 0) mine[0] = row(0, 0);
        if (plan.winograd_axes == 1) {
          for (int64_t i = 0; i < 3; ++i) tap[i] = row(i, 0);
          weight_transform(tap, 1, mine, 1);
        }
        if (plan.winograd_axes == 2) {
          for (int64_t k = 0; k < 9; ++k) tap[k] = row(k / 3, k % 3);
          for (int64_t j = 0; j < 3; ++j) weight_transform(tap + j, 3, half + j, 3);
          for (int64_t i = 0; i < 4; ++i) weight_transform(half + 3 * i, 1, mine + 4 * i, 1);
        }
        for (int64_t p = 0; !last && p < plan.components; ++p)
          store(to + p * component_step + w * plan.group_channels * plan.block + v, mine[p]);
      }
      for (int64_t p = 0; last && p < plan.components; ++p) {
        f32x16 four[4];
        weight_transform(component + p, plan.components, four, 1);
        for (int64_t k = 0; k < 4; ++k) store(to + (4 * p + k) * component_step + v, four[k]);
      }
    }
  }
};

}  // namespace

double winograd_share(const at::Tensor& rows, at::IntArrayRef kernel, const Geometry& g) {
  double share = 1.0;
  choose_winograd_axes(rows.sizes().slice(1, g.axes()), kernel, g, share);
  return share;
}

Plan make_plan(const at::Tensor& rows, int64_t outputs, at::IntArrayRef kernel, const Geometry& g, Winograd winograd) {
  Plan plan;
  const int64_t axes = g.axes(), last = axes - 1, missing = kMaxAxes - axes;
  const at::IntArrayRef size = rows.sizes().slice(1, axes);
  plan.batch = rows.size(0), plan.channels = rows.size(-1), plan.outputs = outputs, plan.groups = g.groups;
  plan.group_channels = plan.channels / g.groups, plan.group_outputs = outputs / g.groups;
  plan.block = wide_registers() && plan.group_outputs > 16 ? 32 : 16;
  plan.group_blocks = (plan.group_outputs + plan.block - 1) / plan.block, plan.blocks = plan.group_blocks * g.groups;
  double share = 1.0;
  std::array<int64_t, kMaxWinogradAxes> chosen{-1, -1};
  if (winograd != Winograd::kNone) chosen = choose_winograd_axes(size, kernel, g, share);
  for (int64_t at = 0; at < kRowAxes; ++at) {
    const int64_t axis = at - missing;
    Axis& a = plan.axes[at];
    if (axis < 0) {
      a.source.assign(1, 0), a.rolled.assign(1, 0);
      continue;
    }
    const bool winograd = axis == chosen[0] || axis == chosen[1];
    a = make_axis(g, axis, size[axis], kernel[axis], winograd);
    if (winograd) plan.winograd_axis[plan.winograd_axes++] = at, plan.components *= 4, plan.tile_rows *= 2;
    plan.taps *= a.taps;
  }
  plan.width = size[last], plan.taps_w = kernel[last], plan.pad_w = g.padding[last], plan.stride_w = g.stride[last];
  plan.dilation_w = g.dilation[last], plan.mode_w = g.mode[last];
  plan.out_width = g.output_size(last, plan.width, kernel[last]);
  plan.position_step = plan.stride_w * plan.channels;
  plan.row_taps = plan.taps_w * plan.group_channels;
  const bool one_run = g.groups == 1 && plan.dilation_w == 1;
  plan.run_count = one_run ? 1 : plan.taps_w;
  plan.run_length = one_run ? plan.row_taps : plan.group_channels;
  plan.run_step = plan.dilation_w * plan.channels;
  if (winograd == Winograd::kAll && kernel[last] == 3 && plan.stride_w == 1 && plan.dilation_w == 1 &&
      plan.out_width >= kWinogradWidth && plan.group_channels >= kWinogradChannels) {
    plan.last_components = 4;
    plan.run_count = 1, plan.run_length = plan.row_taps = plan.group_channels;
  }
  return plan;
}

Tile tile_at(const Plan& plan, int64_t index) {
  Tile tile;
  for (int64_t at = kRowAxes - 1; at >= 0; --at) {
    tile.at[at] = index % plan.axes[at].tiles;
    index /= plan.axes[at].tiles;
  }
  tile.batch = index;
  return tile;
}

bool find_line(const Plan& plan, const Tile& tile, int64_t component, int64_t tap, Line& line) {
  struct Row {
    int64_t index;
    float sign;
    bool rolled;
  };
  Row rows[kMaxTile] = {{tile.batch, 1.0f, false}};
  int count = 1;
  std::array<int64_t, kRowAxes> taps;
  for (int64_t at = kRowAxes - 1; at >= 0; --at) taps[at] = tap % plan.axes[at].taps, tap /= plan.axes[at].taps;
  for (int64_t at = 0; at < kRowAxes; ++at) {
    const Axis& a = plan.axes[at];
    const int64_t base = tile.at[at] * a.reads;
    Row next[kMaxTile];
    int found = 0;
    const int64_t part = at == plan.winograd_axis[0] && plan.winograd_axes == 2 ? component / 4 : component % 4;
    for (int which = 0; which < (a.winograd ? 2 : 1); ++which) {
      const int64_t read = base + (a.winograd ? kInputRow[part][which] : taps[at]);
      if (a.source[read] < 0) continue;
      const float sign = which == 1 ? kInputSign[part] : 1.0f;
      for (int k = 0; k < count; ++k)
        next[found++] = {rows[k].index * a.size + a.source[read], rows[k].sign * sign,
                         rows[k].rolled != (a.rolled[read] != 0)};
    }
    if (found == 0) return false;
    std::copy(next, next + found, rows);
    count = found;
  }
  line.count = count, line.any_rolled = false;
  for (int k = 0; k < count; ++k) {
    line.row[k] = rows[k].index, line.sign[k] = rows[k].sign, line.rolled[k] = rows[k].rolled;
    line.any_rolled |= rows[k].rolled;
  }
  return true;
}

void tile_outputs(const Plan& plan, const Tile& tile, int64_t* rows) {
  for (int64_t which = 0; which < plan.tile_rows; ++which) {
    int64_t row = tile.batch, bit = plan.tile_rows;
    for (int64_t at = 0; at < kRowAxes && row >= 0; ++at) {
      const Axis& a = plan.axes[at];
      int64_t o = tile.at[at];
      if (a.winograd) {
        bit /= 2;
        o = 2 * o + (which / bit) % 2;
      }
      row = o < a.out ? row * a.out + o : -1;
    }
    rows[which] = row;
  }
}

KernelRows kernel_rows(const Plan& plan) {
  KernelRows rows;
  std::array<int64_t, kRowAxes> step;
  for (int64_t at = kRowAxes - 1; at >= 0; --at) step[at] = rows.count, rows.count *= plan.axes[at].kernel;
  for (int64_t tap = 0; tap < plan.taps; ++tap) {
    int64_t rest = tap, row = 0;
    for (int64_t at = kRowAxes - 1; at >= 0; --at)
      row += rest % plan.axes[at].taps * step[at], rest /= plan.axes[at].taps;
    rows.base.push_back(row);
  }
  for (int64_t part = 0; part < plan.winograd_axes; ++part) rows.step[part] = step[plan.winograd_axis[part]];
  return rows;
}

at::Tensor pack_weight(const at::Tensor& weight, const Plan& plan) {
  const at::Tensor plain = weight.to(at::kFloat).contiguous();
  at::Tensor packed = at::empty(
      {plan.components, plan.last_components, plan.blocks, plan.taps, plan.row_taps, plan.block}, plain.options());
  const KernelRows kernel = kernel_rows(plan);
  const int64_t size = kernel.count * plan.taps_w, b_ = plan.block,
                component_step = plan.blocks * plan.taps * plan.row_taps * b_;
  const float* from = plain.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  at::parallel_for(0, plan.blocks * plan.group_channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> lanes(size * b_);  // one input channel of one block: [kernel][block]
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / plan.group_channels, c = item % plan.group_channels,
                    inside = block % plan.group_blocks * b_;
      const int64_t channel = block / plan.group_blocks * plan.group_outputs + inside,
                    present = std::min(b_, plan.group_outputs - inside);
      std::fill(lanes.begin(), lanes.end(), 0.0f);
      for (int64_t lane = 0; lane < present; ++lane)
        for (int64_t k = 0; k < size; ++k)
          lanes[k * b_ + lane] = from[((channel + lane) * plan.group_channels + c) * size + k];
      for (int64_t tap = 0; tap < plan.taps; ++tap)
        dispatch<PackWeight>(plan, kernel, static_cast<const float*>(lanes.data()), kernel.base[tap], component_step,
                             to + ((block * plan.taps + tap) * plan.row_taps + c) * b_);
    }
  });
  return packed;
}

}  // namespace astrobiogen::conv_nd
