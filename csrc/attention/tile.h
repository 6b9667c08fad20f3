// Register-blocked fp32 products and the vector exponential of the attention kernels, templated on the instruction
// set's blocking.
//
// Lanes run over query rows. A panel is W = 2 L query rows stored column by column ([depth][W]), so scores,
// probabilities and their gradients are [keys][W] tiles: row maximum, sum and rescaling are lane-wise (no shuffle), K
// and V are read in place as broadcasts (no packing, no padding of the head dimension), and the causal waste is a
// panel, not a tile.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/math.h"
#include "gemm/microkernel.h"

namespace astrobiogen::attention {

// L: fp32 lanes of one register. R: rows of the register block, so many that two accumulators for each, two loads and
// one broadcast fit the registers. Keys: keys of
// one tile, a multiple of R; the K and V tiles of D = 68 stay in the 32 KB first-level cache together with the panel.
template <int L_, int R_, int Keys_>
struct Blocking {
  static constexpr int L = L_, R = R_, W = 2 * L_, Keys = Keys_;
  using F = typename simd::Lanes<L_>::F;
  using I = typename simd::Lanes<L_>::I;
};
using Avx512 = Blocking<16, 11, 66>;
using Avx2 = Blocking<8, 6, 60>;
using Baseline = Blocking<4, 6, 60>;

// Query rows per task: the K and V tiles are reused from the cache by this many rows.
constexpr int64_t kRows = 64;

using simd::load_as;
using simd::store_as;

// score = softcap tanh(score) on one panel's columns of a tile.
template <class B>
ASTRO_INLINE void cap_tile(float* tile, int64_t stride, int64_t count, float softcap) {
  using F = typename B::F;
  for (int64_t j = 0; j < count; ++j)
    for (int n = 0; n < 2; ++n) {
      float* p = tile + j * stride + n * B::L;
      store_as<F>(p, simd::tanh_of<F>(load_as<F>(p)) * softcap);
    }
}

enum class Start { kZero, kAdd, kScale };

// c[r][0 .. N L) = start + sum_p a(r, p) b[p][0 .. N L) for R rows; a(r, p) = a[r lda + p], or a[r + p lda] if
// Adjacent. kScale multiplies the old c by the N vectors at `scale` first. The old c is added after the sum and not
// before it: a gradient over many queries is then a sum of short sums and not one long chain, which errs more than
// eager (the op's notes).
template <class B, int R, int N, bool Adjacent, Start kStart>
ASTRO_INLINE void block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c, int64_t ldc,
                        const float* scale) {
  const auto left = [=](int r, int64_t p) ASTRO_LAMBDA_INLINE { return Adjacent ? a[p * lda + r] : a[r * lda + p]; };
  using F = typename B::F;
  if constexpr (kStart == Start::kZero) gemm::block<F, R, N>(depth, left, b, ldb, c, ldc, gemm::Overwrite{});
  if constexpr (kStart == Start::kAdd) gemm::block<F, R, N>(depth, left, b, ldb, c, ldc, gemm::AddTo{});
  if constexpr (kStart == Start::kScale) gemm::block<F, R, N>(depth, left, b, ldb, c, ldc, gemm::AddScaled{scale});
}

// The rows left over: one instantiation per count, chosen at run time.
template <class B, int R, int N, bool Adjacent, Start kStart>
ASTRO_INLINE void rest(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth, float* c,
                       int64_t ldc, const float* scale) {
  if constexpr (R > 0) {
    if (rows == R) block<B, R, N, Adjacent, kStart>(a, lda, b, ldb, depth, c, ldc, scale);
    else rest<B, R - 1, N, Adjacent, kStart>(rows, a, lda, b, ldb, depth, c, ldc, scale);
  }
}

// As `block`, for any number of rows.
template <class B, int N, bool Adjacent, Start kStart>
ASTRO_INLINE void product(int64_t rows, const float* a, int64_t lda, const float* b, int64_t ldb, int64_t depth,
                          float* c, int64_t ldc, const float* scale = nullptr) {
  const int64_t step = Adjacent ? 1 : lda;
  int64_t r = 0;
  for (; r + B::R <= rows; r += B::R)
    block<B, B::R, N, Adjacent, kStart>(a + r * step, lda, b, ldb, depth, c + r * ldc, ldc, scale);
  rest<B, B::R - 1, N, Adjacent, kStart>(rows - r, a + r * step, lda, b, ldb, depth, c + r * ldc, ldc, scale);
}

// tile[key][W] = `hidden_value` where the lane's query does not see the key: lane w sees keys low[w] <= key <
// high[w]; the tile starts at key `first`.
template <class B>
ASTRO_INLINE void mask_tile(float* tile, int64_t stride, int64_t first, int64_t count, const int32_t* low,
                            const int32_t* high, float hidden_value = -__builtin_inff()) {
  using F = typename B::F;
  using I = typename B::I;
  const F hidden = F{} + hidden_value;
  for (int n = 0; n < 2; ++n) {
    I begin, end;
    std::memcpy(&begin, low + n * B::L, sizeof(begin));
    std::memcpy(&end, high + n * B::L, sizeof(end));
    for (int64_t j = 0; j < count; ++j) {
      const I key = I{} + static_cast<int32_t>(first + j);
      float* p = tile + j * stride + n * B::L;
      store_as<F>(p, ((key >= begin) & (key < end)) ? load_as<F>(p) : hidden);
    }
  }
}

// The union and the intersection of the visible key ranges of `count` rows. Rows that see nothing do not widen the
// union but empty the intersection.
struct Range {
  int64_t first, last;            // keys that some row sees
  int64_t full_first, full_last;  // keys that every row sees
};

ASTRO_INLINE Range range_of(const int32_t* low, const int32_t* high, int64_t count) {
  Range range{INT32_MAX, 0, 0, INT32_MAX};
  for (int64_t i = 0; i < count; ++i) {
    if (low[i] < high[i]) {
      range.first = low[i] < range.first ? low[i] : range.first;
      range.last = high[i] > range.last ? high[i] : range.last;
    }
    range.full_first = low[i] > range.full_first ? low[i] : range.full_first;
    range.full_last = high[i] < range.full_last ? high[i] : range.full_last;
  }
  return range;
}

}  // namespace astrobiogen::attention
