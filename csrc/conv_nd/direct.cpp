// Own CPU forward convolution: tiles of output rows, only live taps, Winograd tiles where axes allow, the epilogue
// before the store.
//
// A unit of work is a few neighbouring tiles and at most kSegment positions of the last axis. Per component and per
// chunk of outer taps, the input lines are built once (sums of up to four rows, fp32, with the last axis' halo), then
// register blocks run over taps and channels as one contiguous run. Register block: 8 positions x 32 channels under
// AVX-512 (16 of 32 registers hold sums; 2 weight loads and 8 broadcasts per 16 FMA), 16 x 16 where a group has at most
// 16 channels, 6 x 16 under AVX2.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <vector>

#include "common/dtypes.h"
#include "common/tasks.h"
#include "conv_nd/norm/norm.h"
#include "conv_nd/register.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

// Weights of one chunk of taps and the lines they meet: half of the 512 KiB L2 of the smallest server cores.
constexpr int64_t kChunkBytes = 256 * 1024;
// Positions of one unit along the last axis: bounds the sums and feeds threads when rows are few and long.
constexpr int64_t kSegment = 128;
// Weights beyond L2 are streamed once per unit: this many positions share a stream.
constexpr int64_t kSharePositions = 256;
constexpr int64_t kSmallWeightBytes = 512 * 1024;
// All components of a block of channels and their lines are kept together where the weights and the lines take at most
// this each.
constexpr int64_t kResidentBytes = 128 * 1024;

struct Job {
  const Plan* plan;
  const void* x;
  at::ScalarType dtype;  // of x, y and pre_activation
  const float* weight;   // [components][last components][blocks][taps][row_taps][block]
  Epilogue epilogue;
  int64_t unit_tiles, segments, segment, chunk;
  int64_t room;   // positions that the sums of a row have room for: a whole number of tiles
  bool resident;  // `resident_unit` instead of `unit`
};

struct Scratch {
  std::vector<float> lines, row, sums, outputs;  // row: `build_line`'s; outputs: of one tile, before a norm
  std::vector<Tap> taps;                         // [unit_tiles][chunk]
  std::vector<int64_t> live;                     // per tile: taps of this chunk
  std::vector<char> started;                     // per tile: its sums of this component hold numbers
};

// The outputs of one tile at one position and vector from its components, `step` floats apart.
template <typename Vec, int Axes>
ASTRO_INLINE void output_transform(const float* sums, int64_t step, Vec* out) {
  if constexpr (Axes == 0) {
    out[0] = load_as<Vec>(sums);
  } else if constexpr (Axes == 1) {
    const Vec m1 = load_as<Vec>(sums + step), m2 = load_as<Vec>(sums + 2 * step);
    out[0] = load_as<Vec>(sums) + m1 + m2;
    out[1] = m1 - m2 + load_as<Vec>(sums + 3 * step);
  } else {
    Vec first[4], second[4];
    for (int j = 0; j < 4; ++j) {
      const Vec m1 = load_as<Vec>(sums + (4 + j) * step), m2 = load_as<Vec>(sums + (8 + j) * step);
      first[j] = load_as<Vec>(sums + j * step) + m1 + m2;
      second[j] = m1 - m2 + load_as<Vec>(sums + (12 + j) * step);
    }
    out[0] = first[0] + first[1] + first[2], out[1] = first[1] - first[2] + first[3];
    out[2] = second[0] + second[1] + second[2], out[3] = second[1] - second[2] + second[3];
  }
}

// Where a tile's outputs go: row `rows[which]` (none if negative) of `width` positions, from position `begin` on.
struct Target {
  const Epilogue* epilogue;
  at::ScalarType dtype;
  const int64_t* rows;
  int64_t width, begin, count;
  bool finished;  // the sums are outputs, not components
};

// Block b of channels: `sums` [components][component_step], or finished outputs [tile rows][component_step] for Pairs
// == 0.
template <typename Vec, typename T, int Axes>
ASTRO_INLINE void store_block(const Plan& plan, const Target& t, int64_t b, const float* sums, int64_t component_step) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float);
  constexpr int kRows = 1 << Axes;
  const Epilogue& e = *t.epilogue;
  const int64_t inside = b % plan.group_blocks * plan.block,
                channel = b / plan.group_blocks * plan.group_outputs + inside;
  for (int64_t v = 0; v < plan.block; v += kWidth) {
    const int64_t at = channel + v, lanes = std::min<int64_t>(kWidth, plan.group_outputs - inside - v);
    if (lanes <= 0) break;
    const Vec bias = e.bias == nullptr ? Vec{} : load_lanes<Vec>(e.bias + at, lanes, 0.0f);
    const float* from = sums + v;
    for (int64_t p = 0; p < t.count; ++p, from += plan.block) {
      Vec out[kRows];
      output_transform<Vec, Axes>(from, component_step, out);
      for (int which = 0; which < kRows; ++which) {
        if (t.rows[which] < 0) continue;
        const Vec z = out[which] + bias;
        const int64_t target = (t.rows[which] * t.width + t.begin + p) * plan.outputs + at;
        if (e.pre_activation != nullptr) put(static_cast<T*>(e.pre_activation) + target, z, lanes, e.streamed);
        put(static_cast<T*>(e.y) + target, activate(z, e.activation), lanes, e.streamed);
      }
    }
  }
}

template <typename Vec, typename T>
ASTRO_INLINE void store_outputs(const Plan& plan, const Target& t, int64_t b, const float* sums,
                                int64_t component_step) {
  if (t.finished) {
    for (int64_t which = 0; which < plan.tile_rows; ++which) {
      Target row = t;
      row.rows = t.rows + which;
      store_block<Vec, T, 0>(plan, row, b, sums + which * component_step, 0);
    }
  } else if (plan.winograd_axes == 0) {
    store_block<Vec, T, 0>(plan, t, b, sums, component_step);
  } else if (plan.winograd_axes == 1) {
    store_block<Vec, T, 1>(plan, t, b, sums, component_step);
  } else {
    store_block<Vec, T, 2>(plan, t, b, sums, component_step);
  }
}

template <typename Vec>
ASTRO_INLINE void store_any(const Plan& plan, const Target& t, int64_t b, const float* sums, int64_t component_step) {
  for_dtype(t.dtype,
            [&]<typename T>() ASTRO_LAMBDA_INLINE { store_outputs<Vec, T>(plan, t, b, sums, component_step); });
}

struct Positions {
  template <Level L>
  static ASTRO_INLINE void run(const Plan& plan, const Tap* taps, int64_t live, const float* weight, int64_t offset,
                               int64_t count, float* sums, bool overwrite) {
    if constexpr (L != Level::kAvx512)
      positions<simd::f32x8, 2, 6>(plan, taps, live, weight, offset, count, sums, overwrite);
    else if (plan.block == 16) positions<simd::f32x16, 1, 16>(plan, taps, live, weight, offset, count, sums, overwrite);
    else positions<simd::f32x16, 2, 8>(plan, taps, live, weight, offset, count, sums, overwrite);
  }
};

struct WinogradPositions {
  template <Level L>
  static ASTRO_INLINE void run(const Plan& plan, const Tap* taps, int64_t live, const float* weight,
                               ComponentSteps steps, int64_t offset, int64_t count, float* sums, bool overwrite) {
    if constexpr (L != Level::kAvx512)
      winograd_positions<simd::f32x8, 2, 6>(plan, taps, live, weight, steps, offset, count, sums, overwrite);
    else if (plan.block == 16)
      winograd_positions<simd::f32x16, 1, 16>(plan, taps, live, weight, steps, offset, count, sums, overwrite);
    else winograd_positions<simd::f32x16, 2, 8>(plan, taps, live, weight, steps, offset, count, sums, overwrite);
  }
};

struct Store {
  template <Level L>
  static ASTRO_INLINE void run(const Plan& plan, const Target& t, int64_t b, const float* sums,
                               int64_t component_step) {
    store_any<simd::F<kWidth<L>>>(plan, t, b, sums, component_step);
  }
};

struct AllPositions {
  template <Level L>
  static ASTRO_INLINE void run(const Plan& plan, const Components& components, int64_t offset, int64_t count,
                               const Output& out) {
    if constexpr (L != Level::kAvx512) all_positions<simd::f32x8, 2, 6>(plan, components, offset, count, out);
    else if (plan.block == 16) all_positions<simd::f32x16, 1, 16>(plan, components, offset, count, out);
    else all_positions<simd::f32x16, 2, 8>(plan, components, offset, count, out);
  }
};

void store(const Job& job, const Target& t, const float* sums) {
  const int64_t block_step = job.room * job.plan->block,
                component_step = job.unit_tiles * job.plan->blocks * block_step;
  for (int64_t b = 0; b < job.plan->blocks; ++b)
    dispatch<Store>(*job.plan, t, b, sums + b * block_step, component_step);
}

void find_lines(const Job& job, int64_t first, int64_t tiles, int64_t component, int64_t tap, int64_t begin,
                int64_t end, Scratch& s) {
  const Plan& plan = *job.plan;
  const int64_t line_size = plan.line_floats(job.segment), last = std::min(tap + job.chunk, plan.taps);
  for (int64_t r = 0; r < tiles; ++r) {
    const Tile tile = tile_at(plan, first + r);
    s.live[r] = 0;
    for (int64_t k = tap; k < last; ++k) {
      Line line;
      if (!find_line(plan, tile, component, k, line)) continue;
      const int64_t slot = r * job.chunk + s.live[r]++;
      float* to = s.lines.data() + slot * line_size;
      build_line(plan, job.x, job.dtype, line, begin, end, to, s.row.data());
      s.taps[slot] = {to, k};
    }
  }
}

// The tile's outputs with all of their channels, in L1 or L2 (already there where `sums` is null), then the norm over
// them.
void normalize_tile(const Job& job, const int64_t* rows, const float* sums, int64_t begin, int64_t count, Scratch& s) {
  const Plan& plan = *job.plan;
  const int64_t local[kMaxTile] = {0, 1, 2, 3};
  Epilogue plain;
  plain.y = s.outputs.data();
  if (sums != nullptr) store(job, {&plain, at::kFloat, local, count, 0, count, false}, sums);
  const NormTarget target{plan.outputs, job.dtype, &job.epilogue};
  for (int64_t which = 0; which < plan.tile_rows; ++which) {
    if (rows[which] < 0) continue;
    float* z = s.outputs.data() + which * count * plan.outputs;
    const int64_t first = rows[which] * plan.out_width + begin;
    if (job.epilogue.norm == kGroup)
      partial_groups(target, z, first, count, rows[which] * job.segments + begin / job.segment);
    else normalize_positions(target, z, first, count);
  }
}

void unit(const Job& job, int64_t index, Scratch& s) {
  const Plan& plan = *job.plan;
  const int64_t first = index / job.segments * job.unit_tiles, tiles = std::min(job.unit_tiles, plan.tiles() - first);
  const int64_t begin = index % job.segments * job.segment, end = std::min(begin + job.segment, plan.out_width),
                count = end - begin;
  const int64_t sums_step = job.room * plan.block, tile_step = plan.blocks * sums_step,
                component_step = job.unit_tiles * tile_step;
  const int64_t tap_floats = plan.row_taps * plan.block, block_floats = plan.taps * tap_floats;
  const ComponentSteps component_steps{plan.blocks * block_floats, plan.line_step(count)};
  for (int64_t component = 0; component < plan.components; ++component) {
    std::fill(s.started.begin(), s.started.end(), 0);
    for (int64_t tap = 0; tap < plan.taps; tap += job.chunk) {
      find_lines(job, first, tiles, component, tap, begin, end, s);
      for (int64_t b = 0; b < plan.blocks; ++b) {
        const float* weight = job.weight + (component * plan.last_components * plan.blocks + b) * block_floats;
        const int64_t offset = b / plan.group_blocks * plan.group_channels;
        for (int64_t r = 0; r < tiles; ++r) {
          if (s.live[r] == 0) continue;
          const Tap* taps = s.taps.data() + r * job.chunk;
          float* sums = s.sums.data() + component * component_step + r * tile_step + b * sums_step;
          if (plan.winograd_last())
            dispatch<WinogradPositions>(plan, taps, s.live[r], weight, component_steps, offset, count, sums,
                                        !s.started[r]);
          else dispatch<Positions>(plan, taps, s.live[r], weight, offset, count, sums, !s.started[r]);
        }
      }
      for (int64_t r = 0; r < tiles; ++r) s.started[r] |= s.live[r] > 0;
    }
    for (int64_t r = 0; r < tiles; ++r)
      if (!s.started[r]) std::fill_n(s.sums.data() + component * component_step + r * tile_step, tile_step, 0.0f);
  }
  for (int64_t r = 0; r < tiles; ++r) {
    int64_t rows[kMaxTile];
    tile_outputs(plan, tile_at(plan, first + r), rows);
    const float* sums = s.sums.data() + r * tile_step;
    if (job.epilogue.norm == kNoNorm)
      store(job, {&job.epilogue, job.dtype, rows, plan.out_width, begin, count, false}, sums);
    else normalize_tile(job, rows, sums, begin, count, s);
  }
}

// A unit of one tile whose components are all finished per register block (`all_components`).
void resident_unit(const Job& job, int64_t index, Scratch& s) {
  const Plan& plan = *job.plan;
  const Tile tile = tile_at(plan, index / job.segments);
  const int64_t begin = index % job.segments * job.segment, end = std::min(begin + job.segment, plan.out_width),
                count = end - begin;
  const int64_t line_size = plan.reach(0, job.segment) * plan.channels,
                block_floats = plan.taps * plan.row_taps * plan.block;
  int64_t first[kMaxComponents + 1] = {0}, found = 0;
  for (int64_t component = 0; component < plan.components; ++component) {
    for (int64_t k = 0; k < plan.taps; ++k) {
      Line line;
      if (!find_line(plan, tile, component, k, line)) continue;
      float* to = s.lines.data() + found * line_size;
      build_line(plan, job.x, job.dtype, line, begin, end, to, s.row.data());
      s.taps[found++] = {to, k};
    }
    first[component + 1] = found;
  }
  int64_t rows[kMaxTile];
  tile_outputs(plan, tile, rows);
  const int64_t local[kMaxTile] = {0, 1, 2, 3}, row_step = job.segment * plan.block;
  Epilogue plain;
  plain.y = s.outputs.data();
  const Epilogue& e = job.epilogue;
  const bool normed = e.norm != kNoNorm;
  // fp32 without an activation or a remainder of channels goes to y from the registers: the stores run beside the
  // products.
  const bool straight = !normed && e.activation == kNone && e.pre_activation == nullptr && job.dtype == at::kFloat &&
                        plan.group_outputs % plan.block == 0;
  Output out{
      {nullptr, nullptr, nullptr, nullptr}, straight ? plan.outputs : plan.block, nullptr, straight && e.streamed};
  const Target target = normed ? Target{&plain, at::kFloat, local, count, 0, count, true}
                               : Target{&job.epilogue, job.dtype, rows, plan.out_width, begin, count, true};
  for (int64_t b = 0; b < plan.blocks; ++b) {
    const Components components{s.taps.data(), first, job.weight + b * block_floats, plan.blocks * block_floats};
    for (int64_t which = 0; which < plan.tile_rows; ++which) {
      if (!straight) out.row[which] = s.sums.data() + which * row_step;
      else if (rows[which] >= 0)
        out.row[which] =
            static_cast<float*>(e.y) + (rows[which] * plan.out_width + begin) * plan.outputs + b * plan.block;
    }
    if (straight && e.bias != nullptr) out.bias = e.bias + b * plan.block;
    dispatch<AllPositions>(plan, components, b / plan.group_blocks * plan.group_channels, count, out);
    if (!straight) dispatch<Store>(plan, target, b, s.sums.data(), row_step);
  }
  if (normed) normalize_tile(job, rows, nullptr, begin, count, s);
}

// Positions of an output row of `width` that are finished together.
int64_t segment_size(int64_t width) {
  const int64_t segments = std::max<int64_t>(1, (width + kSegment - 1) / kSegment);
  return (width + segments - 1) / segments;
}

Job make_job(const Plan& plan, const Tensor& rows, const Tensor& packed, const Epilogue& epilogue) {
  Job job{&plan, rows.const_data_ptr(), rows.scalar_type(), packed.const_data_ptr<float>(), epilogue, 1, 1, 1, 1, 1,
          false};
  job.segment = segment_size(plan.out_width), job.segments = (plan.out_width + job.segment - 1) / job.segment;
  job.room = plan.steps(job.segment) * (plan.winograd_last() ? 2 : 1);
  if (packed.numel() * 4 > kSmallWeightBytes) job.unit_tiles = std::max<int64_t>(1, kSharePositions / job.segment);
  const int64_t tap_bytes = 4 * (plan.last_components * plan.row_taps * plan.blocks * plan.block / plan.groups +
                                 job.unit_tiles * plan.line_floats(job.segment));
  job.chunk = std::clamp<int64_t>(kChunkBytes / tap_bytes, 1, plan.taps);
  const int64_t lines = plan.components * plan.taps * plan.line_floats(job.segment);
  job.resident = plan.winograd_axes > 0 && !plan.winograd_last() &&
                 packed.numel() / plan.blocks * 4 <= kResidentBytes && lines * 4 <= kResidentBytes;
  return job;
}

Scratch make_scratch(const Job& job) {
  const Plan& plan = *job.plan;
  const int64_t lines = job.resident ? plan.components * plan.taps : job.unit_tiles * job.chunk;
  Scratch s;
  s.lines.resize(lines * plan.line_floats(job.segment)), s.row.resize(plan.scratch_floats(job.segment));
  s.sums.resize(job.resident ? plan.tile_rows * job.segment * plan.block
                             : plan.components * job.unit_tiles * plan.blocks * job.room * plan.block);
  if (job.epilogue.norm != kNoNorm) s.outputs.resize(plan.tile_rows * job.segment * plan.outputs);
  s.taps.resize(lines), s.live.resize(job.unit_tiles), s.started.resize(job.unit_tiles);
  return s;
}

// Room for the statistics of a group norm: one slot per segment of an output row, as `normalize_tile` fills them.
PartialStatistics make_statistics(const Job& job, const Tensor& rows) {
  const Plan& plan = *job.plan;
  int64_t output_rows = 1;
  for (const Axis& axis : plan.axes) output_rows *= axis.out;
  PartialStatistics s;
  s.mean =
      at::empty({plan.batch, output_rows * job.segments, job.epilogue.norm_groups}, rows.options().dtype(at::kFloat));
  s.squares = at::empty_like(s.mean);
  for (int64_t slot = 0; slot < s.mean.size(1); ++slot)
    s.counts.push_back(std::min(job.segment, plan.out_width - slot % job.segments * job.segment));
  return s;
}

}  // namespace

PartialStatistics direct_forward(const Tensor& rows, const Tensor& weight, const Geometry& geometry,
                                 const Epilogue& epilogue, Winograd winograd) {
  const Crop cropped = crop(geometry, rows.sizes().slice(1, geometry.axes()), weight.sizes().slice(2));
  const Plan plan = make_plan(rows, weight.size(0), cropped.count, cropped.geometry, winograd);
  const Tensor packed = pack_weight(crop_weight(weight, cropped), plan);
  Job job = make_job(plan, rows, packed, epilogue);
  PartialStatistics statistics;
  if (epilogue.norm == kGroup) {
    statistics = make_statistics(job, rows);
    job.epilogue.mean = statistics.mean.mutable_data_ptr<float>(),
    job.epilogue.rstd = statistics.squares.mutable_data_ptr<float>();
  }
  const int64_t units = (plan.tiles() + job.unit_tiles - 1) / job.unit_tiles * job.segments;
  const auto scratch = [&] { return make_scratch(job); };
  run_tasks(units, scratch,
            [&](int64_t index, Scratch& s) { job.resident ? resident_unit(job, index, s) : unit(job, index, s); });
  return statistics;
}

}  // namespace astrobiogen::conv_nd
