// The op conv_nd_bias_grad: sums of a gradient over batch and positions, one per channel. One streaming read, all
// channels side by side.
//
// Every chunk of rows sums blocks of kBlockRows rows in registers, the blocks in fp32, the chunks in fp64: rounding
// errors grow with the length of a block and the number of blocks, not with the number of positions. Chunks depend on
// the shape only: any thread count gives the same bits.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <vector>

#include "common/dispatch.h"
#include "common/dtypes.h"
#include "conv_nd/checks.h"
#include "conv_nd/geometry.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

constexpr int64_t kBlockRows = 64;
constexpr int64_t kMaxChunks = 32;
constexpr int64_t kGrain = 32768;  // elements of one chunk: below, scheduling costs more than the sums
constexpr int kVectors = 8;        // registers of sums: 128 channels under AVX-512, 64 under AVX2

template <typename Vec, typename T>
ASTRO_INLINE Vec load_vector(const T* p) {
  if constexpr (sizeof(Vec) == sizeof(simd::f32x16)) return simd::load(p);
  else return simd::load8(p);
}

template <typename Vec, int N, typename T>
ASTRO_INLINE void panel(const T* rows, int64_t step, int64_t count, float* sums) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float);
  for (int64_t first = 0; first < count; first += kBlockRows) {
    Vec acc[N] = {};
    for (int64_t p = first; p < std::min(first + kBlockRows, count); ++p)
      for (int v = 0; v < N; ++v) acc[v] += load_vector<Vec>(rows + p * step + v * kWidth);
    for (int v = 0; v < N; ++v)
      for (int64_t lane = 0; lane < kWidth; ++lane) sums[v * kWidth + lane] += acc[v][lane];
  }
}

template <typename Vec, typename T>
ASTRO_INLINE void add_rows(const T* rows, int64_t channels, int64_t count, float* sums) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float);
  int64_t c = 0;
  for (; channels - c >= kVectors * kWidth; c += kVectors * kWidth)
    panel<Vec, kVectors>(rows + c, channels, count, sums + c);
  for (; channels - c >= 2 * kWidth; c += 2 * kWidth) panel<Vec, 2>(rows + c, channels, count, sums + c);
  for (; channels - c >= kWidth; c += kWidth) panel<Vec, 1>(rows + c, channels, count, sums + c);
  for (; c < channels; ++c)
    for (int64_t first = 0; first < count; first += kBlockRows) {
      float sum = 0.0f;
      for (int64_t p = first; p < std::min(first + kBlockRows, count); ++p)
        sum += static_cast<float>(rows[p * channels + c]);
      sums[c] += sum;
    }
}

struct AddRows {
  template <Level L>
  static ASTRO_INLINE void run(const void* rows, at::ScalarType dtype, int64_t channels, int64_t first, int64_t count,
                               float* sums) {
    using Vec = simd::F<kWidth<L>>;
    for_dtype(dtype, [&]<typename T>() ASTRO_LAMBDA_INLINE {
      add_rows<Vec>(static_cast<const T*>(rows) + first * channels, channels, count, sums);
    });
  }
};

Tensor conv_nd_bias_grad(const Tensor& grad) {
  constexpr check::Op op("astrobiogen::conv_nd_bias_grad");
  check_volume(op, grad, "grad");
  if (grad.numel() == 0) return at::zeros({grad.size(1)}, grad.options());
  const Tensor rows = to_channels_last(grad);
  const int64_t channels = rows.size(-1), positions = rows.numel() / channels;
  if (rows.scalar_type() == at::kDouble) return rows.reshape({positions, channels}).sum(0);
  const int64_t chunks = std::clamp<int64_t>(rows.numel() / kGrain, 1, kMaxChunks);
  std::vector<float> partial(chunks * channels, 0.0f);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = positions * chunk / chunks, last = positions * (chunk + 1) / chunks;
      dispatch<AddRows>(rows.const_data_ptr(), rows.scalar_type(), channels, first, last - first,
                        partial.data() + chunk * channels);
    }
  });
  Tensor result = at::empty({channels}, rows.options().dtype(at::kFloat));
  float* to = result.mutable_data_ptr<float>();
  for (int64_t c = 0; c < channels; ++c) {
    double sum = 0.0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * channels + c];
    to[c] = static_cast<float>(sum);
  }
  return result.to(rows.scalar_type());
}

}  // namespace

}  // namespace astrobiogen::conv_nd

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) { m.impl("conv_nd_bias_grad", &astrobiogen::conv_nd::conv_nd_bias_grad); }
