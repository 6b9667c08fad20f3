// Own CPU weight gradient: dW[k, o] = sum over positions of x[position + k] dy[position, o], the adjoint of the forward kernel's tiles.
//
// The gradient of a point's weight is (its input lines) x (its share of dy): with F(2,3) 4 products for 2 outputs instead of 6, and the three taps come
// back as g0 = m0 + (m1 + m2) / 2, g1 = (m1 - m2) / 2, g2 = (m1 + m2) / 2 + m3. Per tile and point, dy's rows are added up once to
// [blocks][positions][block]; then register blocks of 8 taps x 32 channels (AVX-512; 16 x 16 or, AVX2, 6 x 16) run along the positions.
// Sums go to one partial per chunk of tiles; the number of chunks depends on the shape only, so any thread count gives the same bits.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <atomic>
#include <vector>

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

struct Job {
  const Plan* plan;
  const void *x, *grad;
  at::ScalarType dtype;
  int64_t chunks, subsets, subset;  // chunks of tiles x subsets of outer taps
};

struct Scratch {
  std::vector<float> line, packed, sums;
};

template <typename Vec, int N, int M>
ASTRO_INLINE void block(const Plan& plan, const float* x, const float* grad, int64_t count, float* sums) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float), kBlock = N * kWidth;
  Vec acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) acc[m][v] = load_as<Vec>(sums + m * kBlock + v * kWidth);
  for (int64_t p = 0; p < count; ++p, x += plan.position_step, grad += kBlock) {
    Vec value[N];
    for (int v = 0; v < N; ++v) value[v] = load_as<Vec>(grad + v * kWidth);
    for (int m = 0; m < M; ++m) {
      const float scale = x[m];
      for (int v = 0; v < N; ++v) acc[m][v] += value[v] * scale;
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) store_as<Vec>(sums + m * kBlock + v * kWidth, acc[m][v]);
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

// Positions outermost: dy's rows are read in their order; channels outermost would read one line of every position and miss the cache each time.
template <typename T, int Count>
ASTRO_INLINE void pack_rows(const Plan& plan, const T* const* from, const float* sign, int64_t count, float* packed, int64_t step) {
  using namespace simd;
  for (int64_t p = 0; p < count; ++p)
    for (int64_t b = 0; b < plan.blocks; ++b) {
      const int64_t inside = b % plan.group_blocks * plan.block, channel = b / plan.group_blocks * plan.group_outputs + inside;
      for (int64_t v = 0; v < plan.block; v += kLanes) {
        const int64_t lanes = std::clamp<int64_t>(plan.group_outputs - inside - v, 0, kLanes), at = p * plan.outputs + channel + v;
        f32x16 sum = splat(0.0f);
        for (int k = 0; k < Count && lanes > 0; ++k) sum += (lanes == kLanes ? load(from[k] + at) : load_partial(from[k] + at, lanes)) * sign[k];
        store(packed + b * step + p * plan.block + v, sum);
      }
    }
}

template <typename T>
ASTRO_INLINE void pack_any(const Job& job, const int64_t* offset, const float* sign, int found, int64_t count, float* packed) {
  const T* from[kMaxTile];
  for (int k = 0; k < found; ++k) from[k] = static_cast<const T*>(job.grad) + offset[k];
  const int64_t step = kSegment * job.plan->block;
  if (found == 1) pack_rows<T, 1>(*job.plan, from, sign, count, packed, step);
  else if (found == 2) pack_rows<T, 2>(*job.plan, from, sign, count, packed, step);
  else pack_rows<T, 4>(*job.plan, from, sign, count, packed, step);
}

struct Pack {
  template <Level L>
  static ASTRO_INLINE void run(const Job& job, const int64_t* offset, const float* sign, int found, int64_t count, float* packed) {
    if (job.dtype == at::kFloat) pack_any<float>(job, offset, sign, found, count, packed);
    else if (job.dtype == at::kBFloat16) pack_any<c10::BFloat16>(job, offset, sign, found, count, packed);
    else pack_any<c10::Half>(job, offset, sign, found, count, packed);
  }
};

// The gradient of one point's products in one tile, packed [blocks][positions][block]; false where no output uses the point.
bool pack_grad(const Job& job, const int64_t* rows, int64_t point, int64_t begin, int64_t count, float* packed) {
  const Plan& plan = *job.plan;
  int64_t offset[kMaxTile];
  float sign[kMaxTile];
  int found = 0;
  for (int64_t which = 0; which < plan.tile_rows; ++which) {
    float factor = 1.0f;
    if (plan.pairs == 1) factor = kPointOutput[point][which];
    if (plan.pairs == 2) factor = kPointOutput[point / 4][which / 2] * kPointOutput[point % 4][which % 2];
    if (factor == 0.0f || rows[which] < 0) continue;
    offset[found] = (rows[which] * plan.out_width + begin) * plan.outputs;
    sign[found++] = factor;
  }
  if (found > 0) dispatch<Pack>(job, offset, sign, found, count, packed);
  return found > 0;
}

void tile_sums(const Job& job, int64_t index, int64_t first_tap, int64_t taps, Scratch& s, float* sums) {
  const Plan& plan = *job.plan;
  const Tile tile = tile_at(plan, index);
  int64_t rows[kMaxTile];
  tile_outputs(plan, tile, rows);
  const int64_t tap_floats = plan.row_taps * plan.block;
  for (int64_t begin = 0; begin < plan.out_width; begin += kSegment) {
    const int64_t end = std::min(begin + kSegment, plan.out_width);
    for (int64_t point = 0; point < plan.points; ++point) {
      if (!pack_grad(job, rows, point, begin, end - begin, s.packed.data())) continue;
      for (int64_t tap = 0; tap < taps; ++tap) {
        Line line;
        if (!find_line(plan, tile, point, first_tap + tap, line)) continue;
        build_line(plan, job.x, job.dtype, line, begin, end, s.line.data());
        for (int64_t b = 0; b < plan.blocks; ++b) {
          const float* grad = s.packed.data() + b * kSegment * plan.block;
          const float* x = s.line.data() + b / plan.group_blocks * plan.group_channels;
          float* to = sums + ((point * plan.blocks + b) * job.subset + tap) * tap_floats;
          for (int64_t k = 0; k < plan.run_count; ++k, x += plan.run_step, to += plan.run_length * plan.block) dispatch<Products>(plan, x, grad, end - begin, to);
        }
      }
    }
  }
}

// Adds up the chunks' partials [points][blocks][subset][row_taps][block] in order and writes the taps of one subset into dW [O, C / groups, *kernel].
void finish(const Job& job, const KernelRows& kernel, int64_t subset, const float* partial, int64_t chunk_step, float* grad_weight) {
  const Plan& plan = *job.plan;
  const int64_t first_tap = subset * job.subset, taps = std::min(job.subset, plan.taps - first_tap), tap_floats = plan.row_taps * plan.block;
  const int64_t point_step = plan.blocks * job.subset * tap_floats, size = kernel.count * plan.taps_w;
  std::vector<float> points(plan.points * plan.block);
  for (int64_t b = 0; b < plan.blocks; ++b)
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

Tensor direct_weight_grad(const Tensor& grad, const Tensor& rows, at::IntArrayRef kernel, const Geometry& geometry, bool pairs) {
  const Plan plan = make_plan(rows, grad.size(-1), kernel, geometry, pairs);
  const int64_t tap_bytes = 4 * plan.points * plan.blocks * plan.row_taps * plan.block, whole = tap_bytes * plan.taps;
  Job job{&plan, rows.const_data_ptr(), grad.const_data_ptr(), rows.scalar_type(), 1, 1, 1};
  job.subset = std::clamp<int64_t>(kUnitBytes / tap_bytes, 1, plan.taps);
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
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), units), 1, [&](int64_t begin, int64_t end) {
    Scratch s;
    s.line.resize(plan.reach(0, kSegment) * plan.channels);
    s.packed.resize(plan.blocks * kSegment * plan.block);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t index = next++; index < units; index = next++) {
        const int64_t subset = index / job.chunks, chunk = index % job.chunks;
        if (job.chunks == 1) s.sums.assign(unit_floats, 0.0f);
        float* target = job.chunks == 1 ? s.sums.data() : sums + index * unit_floats;
        const int64_t first_tap = subset * job.subset, taps = std::min(job.subset, plan.taps - first_tap), count = plan.tiles();
        for (int64_t tile = count * chunk / job.chunks; tile < count * (chunk + 1) / job.chunks; ++tile)
          tile_sums(job, tile, first_tap, taps, s, target);
        if (job.chunks == 1) finish(job, table, subset, s.sums.data(), 0, to);
      }
  });
  if (job.chunks > 1)
    at::parallel_for(0, job.subsets, 1, [&](int64_t begin, int64_t end) {
      for (int64_t subset = begin; subset < end; ++subset) finish(job, table, subset, sums + subset * job.chunks * unit_floats, unit_floats, to);
    });
  return result;
}

}  // namespace astrobiogen::conv_nd
