// Plan of the own CPU convolution kernels: which axes are computed by pairs, which input rows a tile reads, and the packed weight.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "conv_nd/direct.h"

namespace astrobiogen::conv_nd {

namespace {

// Of the live products of an axis, the share that is left when it is paired; 1 where it cannot be.
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

// Channels per group and positions of a row from which the last axis is paired. Kernel 3 x 3, both gradients: from here on 0.75 to 1.0 of the time without;
// with 32 channels or 4 to 12 positions 0.87 to 1.22, where a pair's sums cost what its products save and register blocks are not filled.
constexpr int64_t kPairChannels = 64, kPairWidth = 16;

// The best axes to pair, best first; -1 where there is none.
std::array<int64_t, kMaxPairs> choose_pairs(at::IntArrayRef size, at::IntArrayRef kernel, const Geometry& g, double& share) {
  std::array<int64_t, kMaxPairs> chosen{-1, -1};
  share = 1.0;
  for (int64_t slot = 0; slot < kMaxPairs; ++slot) {
    double best = 1.0 / kPairGain;
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

Axis make_axis(const Geometry& g, int64_t axis, int64_t size, int64_t kernel, bool paired) {
  Axis a;
  a.size = size, a.kernel = kernel, a.out = g.output_size(axis, size, kernel), a.paired = paired;
  a.tiles = paired ? (a.out + 1) / 2 : a.out;
  a.taps = paired ? 1 : kernel, a.reads = paired ? 4 : kernel;
  a.source.assign(a.tiles * a.reads, -1);
  a.rolled.assign(a.tiles * a.reads, 0);
  for (int64_t t = 0; t < a.tiles; ++t)
    for (int64_t k = 0; k < a.reads; ++k) {
      const int64_t o = paired ? 2 * t + k : t * g.stride[axis] + k * g.dilation[axis];
      if (paired && o >= a.out + 2) continue;  // only the absent second output of an odd axis' last pair reads this
      const int64_t p = o - g.padding[axis];
      a.source[t * a.reads + k] = source_row(g.mode[axis], p, size);
      a.rolled[t * a.reads + k] = g.mode[axis] == kPole && (p < 0 || p >= size);
    }
  return a;
}

using simd::f32x16;

// The four points of a pair from the three taps, `from` and `to` steps apart.
ASTRO_INLINE void four_points(const f32x16* tap, int64_t from, f32x16* point, int64_t to) {
  const f32x16 ends = (tap[0] + tap[2 * from]) * 0.5f, middle = tap[from] * 0.5f;
  point[0] = tap[0], point[to] = ends + middle, point[2 * to] = ends - middle, point[3 * to] = tap[2 * from];
}

// The weights of all points of one input channel, outer tap and block of output channels: from rows `lanes` [kernel rows][taps_w][block], the first one at
// `base`, to `to` [points][last points] of `point_step` floats.
struct PackPoints {
  template <Level L>
  static ASTRO_INLINE void run(const Plan& plan, const KernelRows& kernel, const float* lanes, int64_t base, int64_t point_step, float* to) {
    using namespace simd;
    const bool last = plan.last_paired();
    for (int64_t v = 0; v < plan.block; v += kLanes) {
      f32x16 point[3 * kMaxPoints];  // [taps of a paired last axis][points]
      for (int64_t w = 0; w < plan.taps_w; ++w) {
        const auto row = [&](int64_t i, int64_t j) ASTRO_LAMBDA_INLINE {
          return load(lanes + ((base + i * kernel.step[0] + j * kernel.step[1]) * plan.taps_w + w) * plan.block + v);
        };
        f32x16 *mine = point + (last ? w * plan.points : 0), tap[9], half[12];
        if (plan.pairs == 0) mine[0] = row(0, 0);
        if (plan.pairs == 1) {
          for (int64_t i = 0; i < 3; ++i) tap[i] = row(i, 0);
          four_points(tap, 1, mine, 1);
        }
        if (plan.pairs == 2) {
          for (int64_t k = 0; k < 9; ++k) tap[k] = row(k / 3, k % 3);
          for (int64_t j = 0; j < 3; ++j) four_points(tap + j, 3, half + j, 3);
          for (int64_t i = 0; i < 4; ++i) four_points(half + 3 * i, 1, mine + 4 * i, 1);
        }
        for (int64_t p = 0; !last && p < plan.points; ++p) store(to + p * point_step + w * plan.group_channels * plan.block + v, mine[p]);
      }
      for (int64_t p = 0; last && p < plan.points; ++p) {
        f32x16 four[4];
        four_points(point + p, plan.points, four, 1);
        for (int64_t k = 0; k < 4; ++k) store(to + (4 * p + k) * point_step + v, four[k]);
      }
    }
  }
};

}  // namespace

double paired_share(const at::Tensor& rows, at::IntArrayRef kernel, const Geometry& g) {
  double share = 1.0;
  choose_pairs(rows.sizes().slice(1, g.axes()), kernel, g, share);
  return share;
}

Plan make_plan(const at::Tensor& rows, int64_t outputs, at::IntArrayRef kernel, const Geometry& g, Pairing pairing) {
  Plan plan;
  const int64_t axes = g.axes(), last = axes - 1, missing = kMaxAxes - axes;
  const at::IntArrayRef size = rows.sizes().slice(1, axes);
  plan.batch = rows.size(0), plan.channels = rows.size(-1), plan.outputs = outputs, plan.groups = g.groups;
  plan.group_channels = plan.channels / g.groups, plan.group_outputs = outputs / g.groups;
  plan.block = wide_registers() && plan.group_outputs > 16 ? 32 : 16;
  plan.group_blocks = (plan.group_outputs + plan.block - 1) / plan.block, plan.blocks = plan.group_blocks * g.groups;
  double share = 1.0;
  std::array<int64_t, kMaxPairs> chosen{-1, -1};
  if (pairing != Pairing::kNone) chosen = choose_pairs(size, kernel, g, share);
  for (int64_t at = 0; at < kRowAxes; ++at) {
    const int64_t axis = at - missing;
    Axis& a = plan.axes[at];
    if (axis < 0) {
      a.source.assign(1, 0), a.rolled.assign(1, 0);
      continue;
    }
    const bool paired = axis == chosen[0] || axis == chosen[1];
    a = make_axis(g, axis, size[axis], kernel[axis], paired);
    if (paired) plan.pair_axis[plan.pairs++] = at, plan.points *= 4, plan.tile_rows *= 2;
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
  if (pairing == Pairing::kAll && kernel[last] == 3 && plan.stride_w == 1 && plan.dilation_w == 1 && plan.out_width >= kPairWidth && plan.group_channels >= kPairChannels) {
    plan.last_points = 4;
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

bool find_line(const Plan& plan, const Tile& tile, int64_t point, int64_t tap, Line& line) {
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
    const int64_t pair = at == plan.pair_axis[0] && plan.pairs == 2 ? point / 4 : point % 4;
    for (int which = 0; which < (a.paired ? 2 : 1); ++which) {
      const int64_t read = base + (a.paired ? kPointRow[pair][which] : taps[at]);
      if (a.source[read] < 0) continue;
      const float sign = which == 1 ? kPointSign[pair] : 1.0f;
      for (int k = 0; k < count; ++k) next[found++] = {rows[k].index * a.size + a.source[read], rows[k].sign * sign, rows[k].rolled != (a.rolled[read] != 0)};
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
      if (a.paired) {
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
    for (int64_t at = kRowAxes - 1; at >= 0; --at) row += rest % plan.axes[at].taps * step[at], rest /= plan.axes[at].taps;
    rows.base.push_back(row);
  }
  for (int64_t pair = 0; pair < plan.pairs; ++pair) rows.step[pair] = step[plan.pair_axis[pair]];
  return rows;
}

at::Tensor pack_weight(const at::Tensor& weight, const Plan& plan) {
  const at::Tensor plain = weight.to(at::kFloat).contiguous();
  at::Tensor packed = at::empty({plan.points, plan.last_points, plan.blocks, plan.taps, plan.row_taps, plan.block}, plain.options());
  const KernelRows kernel = kernel_rows(plan);
  const int64_t size = kernel.count * plan.taps_w, b_ = plan.block, point_step = plan.blocks * plan.taps * plan.row_taps * b_;
  const float* from = plain.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  at::parallel_for(0, plan.blocks * plan.group_channels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> lanes(size * b_);  // one input channel of one block: [kernel][block]
    for (int64_t item = begin; item < end; ++item) {
      const int64_t block = item / plan.group_channels, c = item % plan.group_channels, inside = block % plan.group_blocks * b_;
      const int64_t channel = block / plan.group_blocks * plan.group_outputs + inside, present = std::min(b_, plan.group_outputs - inside);
      std::fill(lanes.begin(), lanes.end(), 0.0f);
      for (int64_t lane = 0; lane < present; ++lane)
        for (int64_t k = 0; k < size; ++k) lanes[k * b_ + lane] = from[((channel + lane) * plan.group_channels + c) * size + k];
      for (int64_t tap = 0; tap < plan.taps; ++tap)
        dispatch<PackPoints>(plan, kernel, static_cast<const float*>(lanes.data()), kernel.base[tap], point_step,
                             to + ((block * plan.taps + tap) * plan.row_taps + c) * b_);
    }
  });
  return packed;
}

}  // namespace astrobiogen::conv_nd
