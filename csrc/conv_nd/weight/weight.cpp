// Own CPU weight gradient: dW[k, o] = sum over positions of x[position + k] dy[position, o], the adjoint of the forward kernel's tiles.
//
// The gradient of a point's weight is (its input lines) x (its share of dy): with F(2,3) 4 products for 2 outputs instead of 6, and the three taps come
// back as g0 = m0 + (m1 + m2) / 2, g1 = (m1 - m2) / 2, g2 = (m1 + m2) / 2 + m3 (conv_nd/weight/taps.cpp). Per group of tiles, point and block of channels,
// dy's rows are added up once to [positions][block], and pairs of positions where the last axis is paired; then register blocks of 8 taps x 32 channels
// (AVX-512; 16 x 16 or, AVX2, 6 x 16) run along the positions.
// Sums go to one partial per chunk of tiles; the number of chunks depends on the shape only, so any thread count gives the same bits.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <atomic>
#include <vector>

#include "common/pairs.h"
#include "conv_nd/weight/taps.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

constexpr int64_t kMaxChunks = 32;
// All partials together: a twentieth of x and dy, at least this.
constexpr int64_t kPartialBytes = 1024 * 1024;
// Sums that one unit of work writes again and again: half of a small L2.
constexpr int64_t kUnitBytes = 256 * 1024;
constexpr int64_t kSegment = 128;  // positions of the last axis at a time
constexpr int64_t kLineBytes = 128 * 1024;  // lines of all points, or of a group of tiles, are kept up to this
constexpr int64_t kMaxGroup = 8;            // tiles whose short rows are one row of positions

struct Job {
  const Plan* plan;
  const void *x, *grad;
  at::ScalarType dtype;
  int64_t chunks, subsets, subset;  // chunks of tiles x subsets of outer taps
  int64_t group;                    // tiles at a time
  bool resident;                    // the lines of all points are kept, and blocks of channels are the outer loop
  bool large;                       // dy is larger than a cache: it is prefetched
};

// A line of input and where the output gradients that it meets begin.
struct Piece {
  const float* x;
  int64_t grad;
};

// One outer tap of a point: the pieces [first, last) of its tiles.
struct LiveTap {
  int64_t tap, first, last;
};

struct Scratch {
  std::vector<float> lines, row, sums;     // row: `build_line`'s
  std::vector<float> grad, packed, paired;  // a group's rows of dy, [blocks][tile rows][kSegment][block]; of one point and block; of its last points
  std::vector<Piece> pieces;
  std::vector<LiveTap> taps;
};

// What one unit of work sums of its tiles: some of the points and blocks of output channels.
struct Share {
  int64_t first_point, last_point, first_block, last_block;
};

// The pieces of one outer tap, `count` positions each, from float `offset` of their lines on; `grad` [positions][block].
struct Operands {
  const Piece* pieces;
  int64_t size, offset;
  const float* grad;
  int64_t grad_step;  // positions of `grad` per position of the pieces: 2 takes every second one
  int64_t count;
};

// The positions of one call are summed for themselves and then added: two short chains of additions instead of one over all positions of a chunk, which
// was 3 times as inexact as eager's at 4,096 positions.
template <typename Vec, int N, int M>
ASTRO_INLINE void block(const Plan& plan, const Operands& from, int64_t at, float* sums) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float), kBlock = N * kWidth;
  Vec acc[M][N] = {};
  for (int64_t k = 0; k < from.size; ++k) {
    const float *x = from.pieces[k].x + from.offset + at, *grad = from.grad + from.pieces[k].grad * from.grad_step;
    for (int64_t p = 0; p < from.count; ++p, x += plan.position_step, grad += from.grad_step * kBlock) {
      Vec value[N];
      for (int v = 0; v < N; ++v) value[v] = load_as<Vec>(grad + v * kWidth);
      for (int m = 0; m < M; ++m) {
        const float scale = x[m];
        for (int v = 0; v < N; ++v) acc[m][v] += value[v] * scale;
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) {
      float* to = sums + m * kBlock + v * kWidth;
      store_as<Vec>(to, load_as<Vec>(to) + acc[m][v]);
    }
}

template <typename Vec, int N, int M>
ASTRO_INLINE void products(const Plan& plan, const Operands& from, float* sums) {
  constexpr int64_t kBlock = N * sizeof(Vec) / sizeof(float);
  int64_t i = 0;
  const auto step = [&]<int Size>() ASTRO_LAMBDA_INLINE {
    block<Vec, N, Size>(plan, from, i, sums + i * kBlock);
    i += Size;
  };
  const bool sixes = plan.run_length % 8 != 0 && plan.run_length % 6 == 0;
  while (!sixes && plan.run_length - i >= M) step.template operator()<M>();
  if constexpr (M > 8)
    while (!sixes && plan.run_length - i >= 8) step.template operator()<8>();
  while (plan.run_length - i >= 6) step.template operator()<6>();
  while (plan.run_length - i >= 4) step.template operator()<4>();
  while (plan.run_length - i >= 2) step.template operator()<2>();
  while (i < plan.run_length) step.template operator()<1>();
}

struct Products {
  template <Level L>
  static ASTRO_INLINE void run(const Plan& plan, const Operands& from, float* sums) {
    if constexpr (L != Level::kAvx512) products<simd::f32x8, 2, 6>(plan, from, sums);
    else if (plan.block == 16) products<simd::f32x16, 1, 16>(plan, from, sums);
    else products<simd::f32x16, 2, 8>(plan, from, sums);
  }
};

// One row of dy as fp32 [blocks][tile rows][positions][block] (this row's part of it), absent channels zero. All channels of a position together: dy is
// read in its order, once per tile. Read per block of channels and point, it missed the cache every time (pack 78 ms, products 37 ms on the stem).
template <typename T>
ASTRO_INLINE void spread_row(const Plan& plan, const T* from, int64_t count, const Share& share, float* to, int64_t step) {
  using namespace simd;
  for (int64_t p = 0; p < count; ++p, from += plan.outputs)
    for (int64_t b = share.first_block; b < share.last_block; ++b) {
      const int64_t inside = b % plan.group_blocks * plan.block, channel = b / plan.group_blocks * plan.group_outputs + inside;
      for (int64_t v = 0; v < plan.block; v += kLanes) {
        const int64_t lanes = std::clamp<int64_t>(plan.group_outputs - inside - v, 0, kLanes);
        f32x16 value = splat(0.0f);
        if (lanes == kLanes) value = load(from + channel + v);
        else if (lanes > 0) value = load_partial(from + channel + v, lanes);
        store(to + b * step + p * plan.block + v, value);
      }
    }
}

struct SpreadRow {
  template <Level L>
  static ASTRO_INLINE void run(const Job& job, int64_t first, int64_t count, const Share& share, float* to, int64_t step) {
    const int64_t offset = first * job.plan->outputs;
    if (job.dtype == at::kFloat) spread_row(*job.plan, static_cast<const float*>(job.grad) + offset, count, share, to, step);
    else if (job.dtype == at::kBFloat16) spread_row(*job.plan, static_cast<const c10::BFloat16*>(job.grad) + offset, count, share, to, step);
    else spread_row(*job.plan, static_cast<const c10::Half*>(job.grad) + offset, count, share, to, step);
  }
};

// The sum of two or four signed rows of dy, `size` floats, a multiple of the vector.
struct Combine {
  template <Level L>
  static ASTRO_INLINE void run(const float* const* from, const float* sign, int count, int64_t size, float* to) {
    using namespace simd;
    for (int64_t i = 0; i < size; i += kLanes) {
      f32x16 sum = load(from[0] + i) * sign[0] + load(from[1] + i) * sign[1];
      if (count == 4) sum += load(from[2] + i) * sign[2] + load(from[3] + i) * sign[3];
      store(to + i, sum);
    }
  }
};

// The gradients of the four points of pairs along the last axis, [4][tiles][steps][block], from rows [tiles][count][block]. Of whole pairs only the sums
// and differences: the outer points take every second position where it lies.
struct PairGrad {
  template <Level L>
  static ASTRO_INLINE void run(const float* from, int64_t tiles, int64_t count, int64_t block, float* to) {
    using namespace simd;
    const int64_t steps = (count + 1) / 2, point = tiles * steps * block;
    const bool whole = count % 2 == 0;
    for (int64_t r = 0; r < tiles; ++r)
      for (int64_t t = 0; t < steps; ++t, to += block)
        for (int64_t v = 0; v < block; v += kLanes) {
          const float* at = from + (r * count + 2 * t) * block + v;
          const f32x16 first = load(at), second = 2 * t + 1 < count ? load(at + block) : splat(0.0f);
          store(to + point + v, first + second), store(to + 2 * point + v, first - second);
          if (!whole) store(to + v, first), store(to + 3 * point + v, second);
        }
  }
};

// Which rows of a tile one point's gradient adds up, and their signs.
struct GradRows {
  int count = 0;
  int64_t which[kMaxTile];
  float sign[kMaxTile];
};

// Rows past the end of a paired axis are zeros: they are left out by pairs, so that two or four remain.
GradRows grad_rows(const Plan& plan, int64_t point) {
  GradRows result;
  for (int64_t which = 0; which < plan.tile_rows; ++which) {
    float factor = 1.0f;
    if (plan.pairs == 1) factor = kPointOutput[point][which];
    if (plan.pairs == 2) factor = kPointOutput[point / 4][which / 2] * kPointOutput[point % 4][which % 2];
    if (factor == 0.0f) continue;
    result.which[result.count] = which, result.sign[result.count++] = factor;
  }
  return result;
}

// Asks for the rows of dy of some tiles, a few lines at a time beside the products of those before: the stem's 126 MB are then in L2 when they are spread.
class Ahead {
 public:
  Ahead(const Job& job, int64_t tile, int64_t steps) {
    const Plan& plan = *job.plan;
    if (!job.large) return;
    const int64_t element = c10::elementSize(job.dtype), whole = plan.out_width * plan.outputs * element;
    for (const int64_t last = std::min(tile + job.group, plan.tiles()); tile < last; ++tile) {
      int64_t rows[kMaxTile];
      tile_outputs(plan, tile_at(plan, tile), rows);
      for (int64_t which = 0; which < plan.tile_rows; ++which)
        if (rows[which] >= 0) row_[count_++] = static_cast<const char*>(job.grad) + rows[which] * whole;
    }
    bytes_ = std::min(plan.out_width, kSegment) * plan.outputs * element;
    step_ = (count_ * bytes_ / kLine + steps) / steps;
  }
  void advance() {
    for (int64_t line = 0; line < step_ && current_ < count_; ++line) {
      simd::prefetch(row_[current_] + at_);
      at_ += kLine;
      if (at_ >= bytes_) at_ = 0, ++current_;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* row_[kMaxTile * kMaxGroup];
  int64_t count_ = 0, current_ = 0, at_ = 0, bytes_ = 0, step_ = 0;
};

// The sums of `size` tiles from `index` on. More than one tile only where a row is one segment: their rows of dy stand one after the other, as if they
// were one row, so that the sums of a register block are read and written once per group (space layer, rows of 32 positions: one tile at a time 60 to
// 71 ms, four 51 to 59, eight, whose lines and rows of dy no longer fit into L2 beside the sums, 57 to 64).
void group_sums(const Job& job, int64_t index, int64_t size, int64_t first_tap, int64_t taps, const Share& share, Scratch& s, float* sums) {
  const Plan& plan = *job.plan;
  const int64_t width = std::min(plan.out_width, kSegment), line_size = plan.line_floats(width);
  Tile tiles[kMaxGroup];
  int64_t rows[kMaxGroup][kMaxTile], first[kMaxPoints + 1] = {0};
  for (int64_t r = 0; r < size; ++r) tiles[r] = tile_at(plan, index + r), tile_outputs(plan, tiles[r], rows[r]);
  const int64_t tap_floats = plan.row_taps * plan.block, point_floats = plan.blocks * job.subset * tap_floats;
  const int64_t row_step = job.group * width * plan.block, block_step = plan.tile_rows * row_step;
  Ahead ahead(job, index + size, (share.last_point - share.first_point) * (share.last_block - share.first_block));
  for (int64_t begin = 0; begin < plan.out_width; begin += kSegment) {
    const int64_t end = std::min(begin + kSegment, plan.out_width), count = end - begin, steps = plan.steps(count), tile_step = count * plan.block;
    for (int64_t r = 0; r < size; ++r)
      for (int64_t which = 0; which < plan.tile_rows; ++which) {
        float* to = s.grad.data() + which * row_step + r * tile_step;
        if (rows[r][which] >= 0) dispatch<SpreadRow>(job, rows[r][which] * plan.out_width + begin, count, share, to, block_step);
        else for (int64_t b = share.first_block; b < share.last_block; ++b) std::fill_n(to + b * block_step, tile_step, 0.0f);
      }
    const auto build = [&](int64_t point) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t before = static_cast<int64_t>(s.pieces.size());
        for (int64_t r = 0; r < size; ++r) {
          Line line;
          if (!find_line(plan, tiles[r], point, first_tap + tap, line)) continue;
          float* to = s.lines.data() + static_cast<int64_t>(s.pieces.size()) * line_size;
          build_line(plan, job.x, job.dtype, line, begin, end, to, s.row.data());
          s.pieces.push_back({to, r * steps * plan.block});
        }
        const int64_t after = static_cast<int64_t>(s.pieces.size());
        if (after > before) s.taps.push_back({tap, before, after});
      }
      first[point + 1] = static_cast<int64_t>(s.taps.size());
    };
    const auto clear = [&](int64_t point) { s.pieces.clear(), s.taps.clear(), first[point] = 0; };
    const auto multiply = [&](int64_t point, int64_t b) {
      ahead.advance();
      const GradRows from = grad_rows(plan, point);
      const auto present = [&](const int64_t* tile) { return std::any_of(from.which, from.which + from.count, [&](int64_t which) { return tile[which] >= 0; }); };
      if (std::none_of(rows, rows + size, present)) return;
      const float* row[kMaxTile];
      for (int k = 0; k < from.count; ++k) row[k] = s.grad.data() + b * block_step + from.which[k] * row_step;
      const float* grad = row[0];  // a single row has the sign +1
      if (from.count > 1) {
        dispatch<Combine>(static_cast<const float* const*>(row), from.sign, from.count, size * tile_step, s.packed.data());
        grad = s.packed.data();
      }
      if (plan.last_paired()) dispatch<PairGrad>(grad, size, count, plan.block, s.paired.data());
      for (int64_t k = 0; k < plan.last_points; ++k) {
        const float* mine = grad;
        int64_t step = 1;
        if (plan.last_paired() && count % 2 == 0 && k % 3 == 0) mine += k / 3 * plan.block, step = 2;
        else if (plan.last_paired()) mine = s.paired.data() + k * size * steps * plan.block;
        for (int64_t at = first[point]; at < first[point + 1]; ++at) {
          const LiveTap& live = s.taps[at];
          Operands operands{s.pieces.data() + live.first, live.last - live.first, b / plan.group_blocks * plan.group_channels + k * plan.line_step(count),
                            mine, step, steps};
          float* to = sums + (point * plan.last_points + k) * point_floats + (b * job.subset + live.tap) * tap_floats;
          for (int64_t run = 0; run < plan.run_count; ++run, operands.offset += plan.run_step, to += plan.run_length * plan.block)
            dispatch<Products>(plan, operands, to);
        }
      }
    };
    if (job.resident) {
      clear(share.first_point);
      for (int64_t point = share.first_point; point < share.last_point; ++point) build(point);
      for (int64_t b = share.first_block; b < share.last_block; ++b)
        for (int64_t point = share.first_point; point < share.last_point; ++point) multiply(point, b);
    } else {
      for (int64_t point = share.first_point; point < share.last_point; ++point) {
        clear(point);
        build(point);
        for (int64_t b = share.first_block; b < share.last_block; ++b) multiply(point, b);
      }
    }
  }
}

}  // namespace

Tensor direct_weight_grad(const Tensor& grad, const Tensor& rows, at::IntArrayRef whole_kernel, const Geometry& geometry) {
  const Crop cropped = crop(geometry, rows.sizes().slice(1, geometry.axes()), whole_kernel);
  const at::IntArrayRef kernel = cropped.count;
  const Plan plan = make_plan(rows, grad.size(-1), kernel, cropped.geometry, Pairing::kAll);
  const int64_t tap_bytes = 4 * plan.points * plan.last_points * plan.blocks * plan.row_taps * plan.block, whole = tap_bytes * plan.taps;
  Job job{&plan, rows.const_data_ptr(), grad.const_data_ptr(), rows.scalar_type(), 1, 1, 1, 1, false, static_cast<int64_t>(grad.nbytes()) >= simd::kStreamBytes};
  job.subset = std::clamp<int64_t>(kUnitBytes / tap_bytes, 1, plan.taps);
  const int64_t width = std::min(plan.out_width, kSegment), line_bytes = 4 * plan.line_floats(width);
  job.resident = plan.points * job.subset * line_bytes <= kLineBytes;
  job.subsets = (plan.taps + job.subset - 1) / job.subset;
  const int64_t limit = std::max<int64_t>(kPartialBytes, (rows.numel() + grad.numel()) * rows.element_size() / 20);
  job.chunks = std::clamp<int64_t>(std::min(kMaxChunks / job.subsets, limit / whole), 1, std::max<int64_t>(1, plan.tiles()));
  if (!job.resident && plan.out_width > 0)
    job.group = std::clamp<int64_t>(std::min(kSegment / plan.steps(plan.out_width), kLineBytes / (job.subset * line_bytes)), 1, kMaxGroup);
  const int64_t unit_floats = tap_bytes / 4 * job.subset, units = job.chunks * job.subsets;
  // Fewer units than threads (one, where the points of many channels pass the memory for partials): points are shared out, then blocks of output channels.
  // Each sum is taken in the same order whoever does it, so the bits do not change. Shared blocks have the input's lines added up once per share.
  const int64_t threads = at::get_num_threads(), wanted = (threads + units - 1) / units;
  const int64_t point_shares = std::clamp<int64_t>(wanted, 1, plan.points), block_shares = std::clamp<int64_t>(wanted / point_shares, 1, plan.blocks);
  const int64_t shares = point_shares * block_shares, items = units * shares;
  // A unit that is one thread's is finished where it was summed and needs no memory beyond the threads'.
  const bool own = job.chunks == 1 && shares == 1;
  Tensor partial = own ? Tensor() : at::zeros({job.subsets, job.chunks, unit_floats}, rows.options().dtype(at::kFloat));
  std::vector<int64_t> shape{plan.outputs, plan.group_channels};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  Tensor result = at::empty(shape, rows.options().dtype(at::kFloat));
  float *sums = own ? nullptr : partial.mutable_data_ptr<float>(), *to = result.mutable_data_ptr<float>();
  const KernelRows table = kernel_rows(plan);
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, items), 1, [&](int64_t begin, int64_t end) {
    Scratch s;
    const int64_t lines = job.subset * (job.resident ? plan.points : job.group);
    s.lines.resize(lines * line_bytes / 4), s.row.resize(plan.scratch_floats(width));
    s.grad.resize(plan.blocks * plan.tile_rows * job.group * width * plan.block);
    s.packed.resize(job.group * width * plan.block);
    if (plan.last_paired()) s.paired.resize(plan.last_points * job.group * plan.steps(width) * plan.block);
    s.pieces.reserve(lines), s.taps.reserve(lines);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t item = next++; item < items; item = next++) {
        const int64_t index = item / shares, subset = index / job.chunks, chunk = index % job.chunks, share = item % shares;
        const int64_t points = share / block_shares, blocks = share % block_shares;
        const Share mine{plan.points * points / point_shares, plan.points * (points + 1) / point_shares, plan.blocks * blocks / block_shares,
                         plan.blocks * (blocks + 1) / block_shares};
        if (own) s.sums.assign(unit_floats, 0.0f);
        float* target = own ? s.sums.data() : sums + index * unit_floats;
        const int64_t first_tap = subset * job.subset, taps = std::min(job.subset, plan.taps - first_tap);
        const int64_t last = plan.tiles() * (chunk + 1) / job.chunks;
        for (int64_t tile = plan.tiles() * chunk / job.chunks; tile < last; tile += job.group)
          group_sums(job, tile, std::min(job.group, last - tile), first_tap, taps, mine, s, target);
        for (int64_t b = 0; own && b < plan.blocks; ++b) write_taps(plan, table, {s.sums.data(), 0, 1, subset * job.subset, job.subset}, b, to);
      }
  });
  if (!own)
    at::parallel_for(0, job.subsets * plan.blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t subset = item / plan.blocks;
        const Sums found{sums + subset * job.chunks * unit_floats, unit_floats, job.chunks, subset * job.subset, job.subset};
        write_taps(plan, table, found, item % plan.blocks, to);
      }
    });
  if (kernel == whole_kernel) return result;
  shape.resize(2);
  shape.insert(shape.end(), whole_kernel.begin(), whole_kernel.end());
  Tensor padded = at::zeros(shape, result.options());
  crop_weight(padded, cropped).copy_(result);
  return padded;
}

}  // namespace astrobiogen::conv_nd
