// Own CPU weight gradient for few input channels: dW[k, o] = sum over positions of x[position + k] dy[position, o].
//
// Per output row, dy is packed once to [blocks][positions][16]; then for each live kernel row a register block of 6 taps x 16 channels runs along the
// row. Sums go to one partial per chunk of rows; the number of chunks depends on the shape only, so any thread count gives the same bits.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <atomic>
#include <vector>

#include "conv_nd_direct.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

constexpr int64_t kMaxChunks = 32;
constexpr int64_t kPartialBytes = 32 * 1024 * 1024;  // all partials together

struct Job {
  const Plan* plan;
  const void* grad;
  at::ScalarType dtype;
  float* partial;  // [blocks][kernel_rows][row_taps][16]
};

template <typename Vec, int M>
ASTRO_INLINE void block(const Plan& plan, const float* x, const float* grad, float* sums) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float);
  constexpr int kParts = kBlock / kWidth;
  Vec acc[M][kParts];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kParts; ++v) acc[m][v] = load_as<Vec>(sums + m * kBlock + v * kWidth);
  for (int64_t p = 0; p < plan.out_width; ++p, x += plan.position_step, grad += kBlock) {
    Vec value[kParts];
    for (int v = 0; v < kParts; ++v) value[v] = load_as<Vec>(grad + v * kWidth);
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < kParts; ++v) acc[m][v] += value[v] * x[m];
  }
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < kParts; ++v) store_as<Vec>(sums + m * kBlock + v * kWidth, acc[m][v]);
}

template <typename T>
ASTRO_INLINE void pack_grad(const Plan& plan, const T* grad, float* packed) {
  for (int64_t b = 0; b < plan.blocks; ++b) {
    const int64_t inside = b % plan.group_blocks * kBlock, channel = b / plan.group_blocks * plan.group_outputs + inside;
    const int64_t lanes = std::min(kBlock, plan.group_outputs - inside);
    for (int64_t p = 0; p < plan.out_width; ++p) {
      const T* from = grad + p * plan.outputs + channel;
      simd::store(packed + (b * plan.out_width + p) * kBlock, lanes == kBlock ? simd::load(from) : simd::load_partial(from, lanes));
    }
  }
}

template <typename Vec, int M>
ASTRO_INLINE void row(const Job& job, int64_t index, std::vector<Tap>& taps, float* packed) {
  const Plan& plan = *job.plan;
  const int64_t start = index * plan.out_width * plan.outputs;
  if (job.dtype == at::kFloat) pack_grad(plan, static_cast<const float*>(job.grad) + start, packed);
  else if (job.dtype == at::kBFloat16) pack_grad(plan, static_cast<const c10::BFloat16*>(job.grad) + start, packed);
  else pack_grad(plan, static_cast<const c10::Half*>(job.grad) + start, packed);
  live_taps(plan, index, taps);
  for (int64_t b = 0; b < plan.blocks; ++b) {
    const float* grad = packed + b * plan.out_width * kBlock;
    const int64_t offset = b / plan.group_blocks * plan.group_channels;
    for (const Tap& tap : taps) {
      float* sums = job.partial + (b * plan.kernel_rows + tap.kernel_row) * plan.row_taps * kBlock;
      for (int64_t run = 0; run < plan.run_count; ++run) {
        const float* x = tap.x + offset + run * plan.run_step;
        float* to = sums + run * plan.run_length * kBlock;
        int64_t i = 0;
        for (; plan.run_length - i >= M; i += M) block<Vec, M>(plan, x + i, grad, to + i * kBlock);
        for (; plan.run_length - i >= 4; i += 4) block<Vec, 4>(plan, x + i, grad, to + i * kBlock);
        for (; plan.run_length - i >= 2; i += 2) block<Vec, 2>(plan, x + i, grad, to + i * kBlock);
        for (; i < plan.run_length; ++i) block<Vec, 1>(plan, x + i, grad, to + i * kBlock);
      }
    }
  }
}

ASTRO_MULTIVERSION void row_eight(const Job& job, int64_t index, std::vector<Tap>& taps, float* packed) { row<f32x8, 6>(job, index, taps, packed); }
ASTRO_MULTIVERSION void row_sixteen(const Job& job, int64_t index, std::vector<Tap>& taps, float* packed) {
  row<simd::f32x16, 12>(job, index, taps, packed);
}

}  // namespace

Tensor direct_weight_grad(const Tensor& grad, const Tensor& rows, at::IntArrayRef kernel, const Geometry& geometry) {
  const Plan plan = make_plan(rows, grad.size(-1), kernel, geometry);
  const int64_t size = plan.blocks * plan.kernel_rows * plan.row_taps * kBlock, count = plan.out_rows();
  const int64_t chunks = std::max<int64_t>(1, std::min({kMaxChunks, kPartialBytes / (4 * size), count}));
  Tensor partial = at::zeros({chunks, plan.blocks, plan.kernel_rows, plan.row_taps, kBlock}, rows.options().dtype(at::kFloat));
  float* sums = partial.mutable_data_ptr<float>();
  const auto run = wide_registers() ? row_sixteen : row_eight;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(at::get_num_threads(), chunks), 1, [&](int64_t begin, int64_t end) {
    std::vector<Tap> taps;
    std::vector<float> packed(plan.blocks * plan.out_width * kBlock);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t chunk = next++; chunk < chunks; chunk = next++) {
        const Job job{&plan, grad.const_data_ptr(), grad.scalar_type(), sums + chunk * size};
        for (int64_t index = count * chunk / chunks; index < count * (chunk + 1) / chunks; ++index) run(job, index, taps, packed.data());
      }
  });
  for (int64_t chunk = 1; chunk < chunks; ++chunk) partial[0].add_(partial[chunk]);
  std::vector<int64_t> shape{plan.outputs, plan.group_channels};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  // [groups, blocks, kernel_rows, taps_w, C, 16] -> [groups, blocks, 16, C, kernel_rows, taps_w], absent channels cut off.
  return partial[0]
      .reshape({plan.groups, plan.group_blocks, plan.kernel_rows, plan.taps_w, plan.group_channels, kBlock})
      .permute({0, 1, 5, 4, 2, 3})
      .reshape({plan.groups, plan.group_blocks * kBlock, plan.group_channels, plan.kernel_rows, plan.taps_w})
      .narrow(1, 0, plan.group_outputs)
      .reshape(shape)
      .contiguous();
}

}  // namespace astrobiogen::conv_nd
