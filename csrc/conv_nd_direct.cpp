// Own CPU forward convolution: one output row at a time, only live taps, bias and activation before the store.
//
// Register block: 6 positions x 16 channels under AVX2 (12 of 16 registers hold sums), 12 x 16 under AVX-512; per weight vector 6 (12) broadcasts of x.
// A row's taps are walked in chunks whose weights and input lines stay in L2; between chunks the sums wait in a [blocks, positions, 16] buffer.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <atomic>
#include <vector>

#include "common/math.h"
#include "conv_nd_direct.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

// Weights and input lines of one chunk of taps: half of the 512 KiB L2 of the smallest server cores.
constexpr int64_t kChunkBytes = 256 * 1024;
// Positions of one unit of work: bounds the buffer of sums (128 x 16 x 4 B = 8 KiB per block) and feeds threads when rows are few and long.
constexpr int64_t kSegment = 128;

struct Job {
  const Plan* plan;
  const float* weight;  // [blocks][kernel_rows][row_taps][16]
  const float* bias;    // [outputs] or null
  int64_t activation, segments, segment;
  void *y, *kept;       // kept may be null
  at::ScalarType dtype;
};

ASTRO_INLINE simd::f32x16 gelu(simd::f32x16 x) {
  using namespace simd;
  // Phi(x) from erfc(z), z = |x| / sqrt 2, by the rational Chebyshev fit of Press et al., Numerical Recipes 2nd ed., 6.2 (relative error 1.2e-7).
  const f32x16 z = abs(x) * 0.70710678118654752f, t = 1.0f / (1.0f + 0.5f * z);
  f32x16 p = t * 0.17087277f - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const f32x16 tail = 0.5f * t * exp(p - z * z);
  const f32x16 bounded = z > 14.0f ? splat(0.0f) : tail;  // z = Inf would give Inf - Inf above
  return x * (x < 0.0f ? bounded : 1.0f - bounded);
}

template <typename Vec, int M>
ASTRO_INLINE void block(const Plan& plan, const Tap* taps, int64_t count, const float* weight, int64_t offset, int64_t position, float* sums) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float);
  constexpr int kParts = kBlock / kWidth;
  Vec acc[M][kParts];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kParts; ++v) acc[m][v] = load_as<Vec>(sums + m * kBlock + v * kWidth);
  const int64_t step = plan.position_step;
  for (int64_t at = 0; at < count; ++at) {
    const float* w = weight + taps[at].kernel_row * plan.row_taps * kBlock;
    const float* line = taps[at].x + offset + position * step;
    for (int64_t run = 0; run < plan.run_count; ++run, line += plan.run_step) {
      const float* x = line;
      for (int64_t i = 0; i < plan.run_length; ++i, ++x, w += kBlock) {
        Vec value[kParts];
        for (int v = 0; v < kParts; ++v) value[v] = load_as<Vec>(w + v * kWidth);
        for (int m = 0; m < M; ++m)
          for (int v = 0; v < kParts; ++v) acc[m][v] += value[v] * x[m * step];
      }
    }
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kParts; ++v) store_as<Vec>(sums + m * kBlock + v * kWidth, acc[m][v]);
}

template <typename Vec, int M>
ASTRO_INLINE void positions(const Plan& plan, const Tap* taps, int64_t count, const float* weight, int64_t offset, int64_t begin, int64_t end,
                            float* sums) {
  int64_t p = begin;
  // Eight left over: 4 + 4 keeps more registers busy than 6 + 2.
  for (; end - p >= M && !(M == 6 && end - p == 8); p += M) block<Vec, M>(plan, taps, count, weight, offset, p, sums + (p - begin) * kBlock);
  for (; end - p >= 4; p += 4) block<Vec, 4>(plan, taps, count, weight, offset, p, sums + (p - begin) * kBlock);
  for (; end - p >= 2; p += 2) block<Vec, 2>(plan, taps, count, weight, offset, p, sums + (p - begin) * kBlock);
  for (; p < end; ++p) block<Vec, 1>(plan, taps, count, weight, offset, p, sums + (p - begin) * kBlock);
}

template <typename T>
ASTRO_INLINE void put(T* p, simd::f32x16 v, int64_t lanes) {
  if (lanes == kBlock) simd::store(p, v);
  else simd::store_partial(p, v, lanes);
}

template <typename T>
ASTRO_INLINE void epilogue(const Job& job, const float* sums, int64_t first, int64_t count, int64_t channel, int64_t lanes) {
  using namespace simd;
  const int64_t outputs = job.plan->outputs;
  T* y = static_cast<T*>(job.y) + first * outputs + channel;
  T* kept = job.kept == nullptr ? nullptr : static_cast<T*>(job.kept) + first * outputs + channel;
  for (int64_t p = 0; p < count; ++p) {
    f32x16 v = load(sums + p * kBlock);
    if (kept != nullptr) put(kept + p * outputs, v, lanes);
    if (job.activation == kSilu) v = v * sigmoid(v);
    if (job.activation == kGelu) v = gelu(v);
    put(y + p * outputs, v, lanes);
  }
}

template <typename Vec, int M, typename T>
ASTRO_INLINE void unit(const Job& job, int64_t index, std::vector<Tap>& taps, float* buffer) {
  const Plan& plan = *job.plan;
  const int64_t row = index / job.segments, begin = index % job.segments * job.segment, end = std::min(begin + job.segment, plan.out_width);
  const int64_t stride = job.segment * kBlock;
  live_taps(plan, row, taps);
  for (int64_t b = 0; b < plan.blocks; ++b) {
    const int64_t inside = b % plan.group_blocks * kBlock, channel = b / plan.group_blocks * plan.group_outputs + inside;
    const int64_t lanes = std::min(kBlock, plan.group_outputs - inside);
    simd::f32x16 bias = simd::splat(0.0f);
    if (job.bias != nullptr) bias = lanes == kBlock ? simd::load(job.bias + channel) : simd::load_partial(job.bias + channel, lanes);
    for (int64_t p = 0; p < end - begin; ++p) simd::store(buffer + b * stride + p * kBlock, bias);
  }
  const int64_t live = static_cast<int64_t>(taps.size());
  const int64_t tap_bytes = 4 * (plan.row_taps * kBlock + (end - begin) * plan.position_step);
  const int64_t chunk = std::max<int64_t>(1, kChunkBytes / tap_bytes);
  for (int64_t at = 0; at < std::max<int64_t>(1, live); at += chunk) {
    const int64_t count = std::min(chunk, live - at);
    for (int64_t b = 0; b < plan.blocks; ++b) {
      const int64_t group = b / plan.group_blocks, inside = b % plan.group_blocks * kBlock;
      const float* weight = job.weight + b * plan.kernel_rows * plan.row_taps * kBlock;
      positions<Vec, M>(plan, taps.data() + at, count, weight, group * plan.group_channels, begin, end, buffer + b * stride);
      if (at + chunk >= live)
        epilogue<T>(job, buffer + b * stride, row * plan.out_width + begin, end - begin, group * plan.group_outputs + inside,
                    std::min(kBlock, plan.group_outputs - inside));
    }
  }
}

template <typename Vec, int M>
ASTRO_INLINE void unit_any(const Job& job, int64_t index, std::vector<Tap>& taps, float* buffer) {
  if (job.dtype == at::kFloat) unit<Vec, M, float>(job, index, taps, buffer);
  else if (job.dtype == at::kBFloat16) unit<Vec, M, c10::BFloat16>(job, index, taps, buffer);
  else unit<Vec, M, c10::Half>(job, index, taps, buffer);
}

ASTRO_MULTIVERSION void unit_eight(const Job& job, int64_t index, std::vector<Tap>& taps, float* buffer) {
  unit_any<f32x8, 6>(job, index, taps, buffer);
}
ASTRO_MULTIVERSION void unit_sixteen(const Job& job, int64_t index, std::vector<Tap>& taps, float* buffer) {
  unit_any<simd::f32x16, 12>(job, index, taps, buffer);
}

// [O, C / groups, *kernel] -> [blocks][kernel_rows][row_taps][16], absent channels zero.
Tensor pack(const Tensor& weight, const Plan& plan) {
  const Tensor rows = weight.to(at::kFloat).reshape({plan.outputs, plan.group_channels, plan.kernel_rows, plan.taps_w}).permute({0, 2, 3, 1}).contiguous();
  Tensor packed = at::empty({plan.blocks, plan.kernel_rows, plan.row_taps, kBlock}, rows.options());
  const int64_t span = plan.kernel_rows * plan.row_taps;
  const float* from = rows.const_data_ptr<float>();
  float* to = packed.mutable_data_ptr<float>();
  at::parallel_for(0, plan.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t inside = b % plan.group_blocks * kBlock, channel = b / plan.group_blocks * plan.group_outputs + inside;
      for (int64_t lane = 0; lane < kBlock; ++lane)
        for (int64_t k = 0; k < span; ++k)
          to[(b * span + k) * kBlock + lane] = inside + lane < plan.group_outputs ? from[(channel + lane) * span + k] : 0.0f;
    }
  });
  return packed;
}

}  // namespace

void direct_forward(const Tensor& rows, const Tensor& weight, const float* bias, const Geometry& geometry, int64_t activation, Tensor& y,
                    Tensor* kept) {
  if (y.numel() == 0) return;
  const Plan plan = make_plan(rows, weight.size(0), weight.sizes().slice(2), geometry);
  const Tensor packed = pack(weight, plan);
  const int64_t segments = (plan.out_width + kSegment - 1) / kSegment, segment = (plan.out_width + segments - 1) / segments;
  const Job job{&plan, packed.const_data_ptr<float>(), bias, activation, segments, segment, y.mutable_data_ptr(),
                kept == nullptr ? nullptr : kept->mutable_data_ptr(), y.scalar_type()};
  const auto run = wide_registers() ? unit_sixteen : unit_eight;
  const int64_t units = plan.out_rows() * segments;
  std::atomic<int64_t> next{0};  // rows differ in live taps and cores in load: threads take the next row when they are free
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), units);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    std::vector<Tap> taps;
    std::vector<float> buffer(plan.blocks * segment * kBlock);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t index = next++; index < units; index = next++) run(job, index, taps, buffer.data());
  });
}

}  // namespace astrobiogen::conv_nd
