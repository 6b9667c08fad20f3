// Own CPU weight gradient: dW[k, o] = sum over positions of x[position + k] dy[position, o], the adjoint of the forward kernel's tiles.
//
// The gradient of a point's weight is (its input lines) x (its share of dy): with F(2,3) 4 products for 2 outputs instead of 6, and the three taps come
// back as g0 = m0 + (m1 + m2) / 2, g1 = (m1 - m2) / 2, g2 = (m1 + m2) / 2 + m3. Per tile, point and block of
// channels, dy's rows are added up once to [positions][block]; then register blocks of 8 taps x 32 channels (AVX-512; 16 x 16 or, AVX2, 6 x 16) run along the positions.
// Sums go to one partial per chunk of tiles; the number of chunks depends on the shape only, so any thread count gives the same bits.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <atomic>
#include <vector>

#include "common/pairs.h"
#include "conv_nd_direct.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

constexpr int64_t kMaxChunks = 32;
// All partials together: a twentieth of x and dy, at least this.
constexpr int64_t kPartialBytes = 1024 * 1024;
// Sums that one unit of work writes again and again: half of a small L2.
constexpr int64_t kUnitBytes = 256 * 1024;
constexpr int64_t kSegment = 128;  // positions of the last axis at a time
constexpr int64_t kLineBytes = 128 * 1024;  // lines of all points are kept up to this

struct Job {
  const Plan* plan;
  const void *x, *grad;
  at::ScalarType dtype;
  int64_t chunks, subsets, subset;  // chunks of tiles x subsets of outer taps
  bool resident;                    // the lines of all points are kept, and blocks of channels are the outer loop
  bool large;                       // dy is larger than a cache: it is prefetched
};

struct Scratch {
  std::vector<float> lines, grad, packed, sums;  // grad: a tile's rows of dy, [blocks][tile rows][kSegment][block]; packed: of one point and block
  std::vector<int64_t> taps;                     // live ones, of `lines`
};

// The positions of one call are summed for themselves and then added: two short chains of additions instead of one over all positions of a chunk, which
// was 3 times as inexact as eager's at 4,096 positions.
template <typename Vec, int N, int M>
ASTRO_INLINE void block(const Plan& plan, const float* x, const float* grad, int64_t count, float* sums) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float), kBlock = N * kWidth;
  Vec acc[M][N] = {};
  for (int64_t p = 0; p < count; ++p, x += plan.position_step, grad += kBlock) {
    Vec value[N];
    for (int v = 0; v < N; ++v) value[v] = load_as<Vec>(grad + v * kWidth);
    for (int m = 0; m < M; ++m) {
      const float scale = x[m];
      for (int v = 0; v < N; ++v) acc[m][v] += value[v] * scale;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) {
      float* to = sums + m * kBlock + v * kWidth;
      store_as<Vec>(to, load_as<Vec>(to) + acc[m][v]);
    }
}

template <typename Vec, int N, int M>
ASTRO_INLINE void products(const Plan& plan, const float* x, const float* grad, int64_t count, float* sums) {
  constexpr int64_t kBlock = N * sizeof(Vec) / sizeof(float);
  int64_t i = 0;
  const auto step = [&]<int Size>() ASTRO_LAMBDA_INLINE {
    block<Vec, N, Size>(plan, x + i, grad, count, sums + i * kBlock);
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
  static ASTRO_INLINE void run(const Plan& plan, const float* x, const float* grad, int64_t count, float* sums) {
    if constexpr (L != Level::kAvx512) products<simd::f32x8, 2, 6>(plan, x, grad, count, sums);
    else if (plan.block == 16) products<simd::f32x16, 1, 16>(plan, x, grad, count, sums);
    else products<simd::f32x16, 2, 8>(plan, x, grad, count, sums);
  }
};

// Blocks of output channels [first, last): a unit's, or a share of them.
struct Blocks {
  int64_t first, last;
};

// One row of dy as fp32 [blocks][tile rows][positions][block] (this row's part of it), absent channels zero. All channels of a position together: dy is
// read in its order, once per tile. Read per block of channels and point, it missed the cache every time (pack 78 ms, products 37 ms on the stem).
template <typename T>
ASTRO_INLINE void spread_row(const Plan& plan, const T* from, int64_t count, Blocks blocks, float* to, int64_t step) {
  using namespace simd;
  for (int64_t p = 0; p < count; ++p, from += plan.outputs)
    for (int64_t b = blocks.first; b < blocks.last; ++b) {
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
  static ASTRO_INLINE void run(const Job& job, int64_t first, int64_t count, Blocks blocks, float* to, int64_t step) {
    const int64_t offset = first * job.plan->outputs;
    if (job.dtype == at::kFloat) spread_row(*job.plan, static_cast<const float*>(job.grad) + offset, count, blocks, to, step);
    else if (job.dtype == at::kBFloat16) spread_row(*job.plan, static_cast<const c10::BFloat16*>(job.grad) + offset, count, blocks, to, step);
    else spread_row(*job.plan, static_cast<const c10::Half*>(job.grad) + offset, count, blocks, to, step);
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

// Asks for the rows of dy of a tile, a few lines at a time beside the products of the tile before: the stem's 126 MB are then in L2 when they are spread.
class Ahead {
 public:
  Ahead(const Job& job, int64_t tile, int64_t steps) {
    const Plan& plan = *job.plan;
    if (tile >= plan.tiles() || !job.large) return;
    int64_t rows[kMaxTile];
    tile_outputs(plan, tile_at(plan, tile), rows);
    const int64_t element = c10::elementSize(job.dtype), whole = plan.out_width * plan.outputs * element;
    for (int64_t which = 0; which < plan.tile_rows; ++which)
      if (rows[which] >= 0) row_[count_++] = static_cast<const char*>(job.grad) + rows[which] * whole;
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
  const char* row_[kMaxTile];
  int64_t count_ = 0, current_ = 0, at_ = 0, bytes_ = 0, step_ = 0;
};

void tile_sums(const Job& job, int64_t index, int64_t first_tap, int64_t taps, Blocks blocks, Scratch& s, float* sums) {
  const Plan& plan = *job.plan;
  const Tile tile = tile_at(plan, index);
  int64_t rows[kMaxTile], first[kMaxPoints + 1] = {0};
  tile_outputs(plan, tile, rows);
  const int64_t tap_floats = plan.row_taps * plan.block, line_size = plan.reach(0, kSegment) * plan.channels;
  const int64_t row_step = kSegment * plan.block, block_step = plan.tile_rows * row_step;
  Ahead ahead(job, index + 1, plan.points * (blocks.last - blocks.first));
  for (int64_t begin = 0; begin < plan.out_width; begin += kSegment) {
    const int64_t end = std::min(begin + kSegment, plan.out_width), count = end - begin;
    for (int64_t which = 0; which < plan.tile_rows; ++which) {
      float* to = s.grad.data() + which * row_step;
      if (rows[which] >= 0) dispatch<SpreadRow>(job, rows[which] * plan.out_width + begin, count, blocks, to, block_step);
      else for (int64_t b = blocks.first; b < blocks.last; ++b) std::fill_n(to + b * block_step, count * plan.block, 0.0f);
    }
    const auto build = [&](int64_t point) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        Line line;
        if (!find_line(plan, tile, point, first_tap + tap, line)) continue;
        build_line(plan, job.x, job.dtype, line, begin, end, s.lines.data() + first[point + 1] * line_size);
        s.taps[first[point + 1]++] = tap;
      }
    };
    const auto multiply = [&](int64_t point, int64_t b) {
      ahead.advance();
      const GradRows from = grad_rows(plan, point);
      const bool present = std::any_of(from.which, from.which + from.count, [&](int64_t which) { return rows[which] >= 0; });
      if (!present) return;
      const float* row[kMaxTile];
      for (int k = 0; k < from.count; ++k) row[k] = s.grad.data() + b * block_step + from.which[k] * row_step;
      const float* grad = row[0];  // a single row has the sign +1
      if (from.count > 1) {
        dispatch<Combine>(static_cast<const float* const*>(row), from.sign, from.count, count * plan.block, s.packed.data());
        grad = s.packed.data();
      }
      for (int64_t at = first[point]; at < first[point + 1]; ++at) {
        const float* x = s.lines.data() + at * line_size + b / plan.group_blocks * plan.group_channels;
        float* to = sums + ((point * plan.blocks + b) * job.subset + s.taps[at]) * tap_floats;
        for (int64_t k = 0; k < plan.run_count; ++k, x += plan.run_step, to += plan.run_length * plan.block) dispatch<Products>(plan, x, grad, count, to);
      }
    };
    if (job.resident) {
      for (int64_t point = 0; point < plan.points; ++point) {
        first[point + 1] = first[point];
        build(point);
      }
      for (int64_t b = blocks.first; b < blocks.last; ++b)
        for (int64_t point = 0; point < plan.points; ++point) multiply(point, b);
    } else {
      for (int64_t point = 0; point < plan.points; ++point) {
        first[point] = first[point + 1] = 0;
        build(point);
        for (int64_t b = blocks.first; b < blocks.last; ++b) multiply(point, b);
      }
    }
  }
}

// Adds up the chunks' partials [points][blocks][subset][row_taps][block] in order and writes the taps of one subset into dW [O, C / groups, *kernel].
void finish(const Job& job, const KernelRows& kernel, int64_t subset, Blocks blocks, const float* partial, int64_t chunk_step, float* grad_weight) {
  const Plan& plan = *job.plan;
  const int64_t first_tap = subset * job.subset, taps = std::min(job.subset, plan.taps - first_tap), tap_floats = plan.row_taps * plan.block;
  const int64_t point_step = plan.blocks * job.subset * tap_floats, size = kernel.count * plan.taps_w;
  std::vector<float> points(plan.points * plan.block);
  for (int64_t b = blocks.first; b < blocks.last; ++b)
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t at = 0; at < plan.row_taps; ++at) {
        const float* from = partial + ((b * job.subset + tap) * plan.row_taps + at) * plan.block;
        for (int64_t point = 0; point < plan.points; ++point)
          for (int64_t lane = 0; lane < plan.block; ++lane) {
            float sum = 0.0f;
            for (int64_t chunk = 0; chunk < job.chunks; ++chunk) sum += from[chunk * chunk_step + point * point_step + lane];
            points[point * plan.block + lane] = sum;
          }
        const int64_t w = at / plan.group_channels, c = at % plan.group_channels, inside = b % plan.group_blocks * plan.block;
        const int64_t channel = b / plan.group_blocks * plan.group_outputs + inside, lanes = std::min(plan.block, plan.group_outputs - inside);
        for (int64_t i = 0; i < (plan.pairs > 0 ? 3 : 1); ++i)
          for (int64_t j = 0; j < (plan.pairs > 1 ? 3 : 1); ++j) {
            const int64_t k = (kernel.base[first_tap + tap] + i * kernel.step[0] + j * kernel.step[1]) * plan.taps_w + w;
            for (int64_t lane = 0; lane < lanes; ++lane) {
              float sum = 0.0f;
              for (int64_t point = 0; point < plan.points; ++point) {
                float factor = 1.0f;
                if (plan.pairs == 1) factor = kPointTap[point][i];
                if (plan.pairs == 2) factor = kPointTap[point / 4][i] * kPointTap[point % 4][j];
                if (factor != 0.0f) sum += factor * points[point * plan.block + lane];
              }
              grad_weight[((channel + lane) * plan.group_channels + c) * size + k] = sum;
            }
          }
      }
}

}  // namespace

Tensor direct_weight_grad(const Tensor& grad, const Tensor& rows, at::IntArrayRef whole_kernel, const Geometry& geometry, bool pairs) {
  const Crop cropped = crop(geometry, rows.sizes().slice(1, geometry.axes()), whole_kernel);
  const at::IntArrayRef kernel = cropped.count;
  const Plan plan = make_plan(rows, grad.size(-1), kernel, cropped.geometry, pairs);
  const int64_t tap_bytes = 4 * plan.points * plan.blocks * plan.row_taps * plan.block, whole = tap_bytes * plan.taps;
  Job job{&plan, rows.const_data_ptr(), grad.const_data_ptr(), rows.scalar_type(), 1, 1, 1, false, static_cast<int64_t>(grad.nbytes()) >= simd::kStreamBytes};
  job.subset = std::clamp<int64_t>(kUnitBytes / tap_bytes, 1, plan.taps);
  job.resident = plan.points * job.subset * plan.reach(0, kSegment) * plan.channels * 4 <= kLineBytes;
  job.subsets = (plan.taps + job.subset - 1) / job.subset;
  const int64_t limit = std::max<int64_t>(kPartialBytes, (rows.numel() + grad.numel()) * rows.element_size() / 20);
  job.chunks = std::clamp<int64_t>(std::min(kMaxChunks / job.subsets, limit / whole), 1, std::max<int64_t>(1, plan.tiles()));
  const int64_t unit_floats = tap_bytes / 4 * job.subset, units = job.chunks * job.subsets;
  // One chunk: a subset's sums are finished where they were made and need no memory beyond the threads'.
  Tensor partial = job.chunks > 1 ? at::zeros({job.subsets, job.chunks, unit_floats}, rows.options().dtype(at::kFloat)) : Tensor();
  std::vector<int64_t> shape{plan.outputs, plan.group_channels};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  Tensor result = at::empty(shape, rows.options().dtype(at::kFloat));
  float *sums = job.chunks > 1 ? partial.mutable_data_ptr<float>() : nullptr, *to = result.mutable_data_ptr<float>();
  const KernelRows table = kernel_rows(plan);
  // Fewer units than threads (one, where 16 points of many channels pass the memory for partials): blocks of output channels are shared out. Each block is
  // summed in the same order whoever does it, so the bits do not change; the input's lines are then added up once per share.
  const int64_t threads = at::get_num_threads(), shares = std::clamp<int64_t>((threads + units - 1) / units, 1, plan.blocks), items = units * shares;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min(threads, items), 1, [&](int64_t begin, int64_t end) {
    Scratch s;
    const int64_t lines = job.subset * (job.resident ? plan.points : 1);
    s.lines.resize(lines * plan.reach(0, kSegment) * plan.channels);
    s.grad.resize(plan.blocks * plan.tile_rows * kSegment * plan.block);
    s.packed.resize(kSegment * plan.block);
    s.taps.resize(lines);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t item = next++; item < items; item = next++) {
        const int64_t index = item / shares, subset = index / job.chunks, chunk = index % job.chunks;
        const Blocks blocks{plan.blocks * (item % shares) / shares, plan.blocks * (item % shares + 1) / shares};
        if (job.chunks == 1) s.sums.assign(unit_floats, 0.0f);
        float* target = job.chunks == 1 ? s.sums.data() : sums + index * unit_floats;
        const int64_t first_tap = subset * job.subset, taps = std::min(job.subset, plan.taps - first_tap), count = plan.tiles();
        for (int64_t tile = count * chunk / job.chunks; tile < count * (chunk + 1) / job.chunks; ++tile)
          tile_sums(job, tile, first_tap, taps, blocks, s, target);
        if (job.chunks == 1) finish(job, table, subset, blocks, s.sums.data(), 0, to);
      }
  });
  if (job.chunks > 1)
    at::parallel_for(0, job.subsets, 1, [&](int64_t begin, int64_t end) {
      for (int64_t subset = begin; subset < end; ++subset) finish(job, table, subset, {0, plan.blocks}, sums + subset * job.chunks * unit_floats, unit_floats, to);
    });
  if (kernel == whole_kernel) return result;
  shape.resize(2);
  shape.insert(shape.end(), whole_kernel.begin(), whole_kernel.end());
  Tensor padded = at::zeros(shape, result.options());
  crop_weight(padded, cropped).copy_(result);
  return padded;
}

}  // namespace astrobiogen::conv_nd
