// Output gradients as a weight gradient reads them: the rows of dy of a group of tiles, spread over blocks of channels,
// combined per component of the Winograd axes, and asked for ahead.
#pragma once

#include <vector>

#include "common/dtypes.h"
#include "common/stream.h"
#include "conv_nd/direct.h"

namespace astrobiogen::conv_nd {

namespace {

constexpr int64_t kSegment = 128;  // positions of the last axis at a time
constexpr int64_t kMaxGroup = 8;   // tiles whose short rows are one row of positions

struct Job {
  const Plan* plan;
  const void *x, *grad;
  at::ScalarType dtype;
  int64_t chunks, subsets, subset;  // chunks of tiles x subsets of outer taps
  int64_t group;                    // tiles at a time
  bool resident;                    // the lines of all components are kept, and blocks of channels are the outer loop
  bool large;                       // dy is larger than a cache: it is prefetched
};

// What one unit of work sums of its tiles: some of the components and blocks of output channels.
struct Share {
  int64_t first_component, last_component, first_block, last_block;
};

// One row of dy as fp32 [blocks][tile rows][positions][block] (this row's part of it), absent channels zero. All
// channels of a position together: dy is read in its order, once per tile. Read per block of channels and component, it
// missed the cache every time (pack 78 ms, products 37 ms on the stem).
template <typename T>
ASTRO_INLINE void spread_row(const Plan& plan, const T* from, int64_t count, const Share& share, float* to,
                             int64_t step) {
  using namespace simd;
  for (int64_t p = 0; p < count; ++p, from += plan.outputs)
    for (int64_t b = share.first_block; b < share.last_block; ++b) {
      const int64_t inside = b % plan.group_blocks * plan.block,
                    channel = b / plan.group_blocks * plan.group_outputs + inside;
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
  static ASTRO_INLINE void run(const Job& job, int64_t first, int64_t count, const Share& share, float* to,
                               int64_t step) {
    const int64_t offset = first * job.plan->outputs;
    for_dtype(job.dtype, [&]<typename T>() ASTRO_LAMBDA_INLINE {
      spread_row(*job.plan, static_cast<const T*>(job.grad) + offset, count, share, to, step);
    });
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

// The adjoint of the output transform along the last axis, [4][tiles][steps][block], from rows [tiles][count][block].
// Of whole tiles only the sums and differences: the outer components take every second position where it lies.
struct OutputTransformAdjoint {
  template <Level L>
  static ASTRO_INLINE void run(const float* from, int64_t tiles, int64_t count, int64_t block, float* to) {
    using namespace simd;
    const int64_t steps = (count + 1) / 2, component = tiles * steps * block;
    const bool whole = count % 2 == 0;
    for (int64_t r = 0; r < tiles; ++r)
      for (int64_t t = 0; t < steps; ++t, to += block)
        for (int64_t v = 0; v < block; v += kLanes) {
          const float* at = from + (r * count + 2 * t) * block + v;
          const f32x16 first = load(at), second = 2 * t + 1 < count ? load(at + block) : splat(0.0f);
          store(to + component + v, first + second), store(to + 2 * component + v, first - second);
          if (!whole) store(to + v, first), store(to + 3 * component + v, second);
        }
  }
};

// Which rows of a tile one component's gradient adds up, and their signs.
struct GradRows {
  int count = 0;
  int64_t which[kMaxTile];
  float sign[kMaxTile];
};

// Rows past the end of a Winograd axis are zeros: they are left out in twos, so that two or four remain.
GradRows grad_rows(const Plan& plan, int64_t component) {
  GradRows result;
  for (int64_t which = 0; which < plan.tile_rows; ++which) {
    float factor = 1.0f;
    if (plan.winograd_axes == 1) factor = kOutputSign[component][which];
    if (plan.winograd_axes == 2) factor = kOutputSign[component / 4][which / 2] * kOutputSign[component % 4][which % 2];
    if (factor == 0.0f) continue;
    result.which[result.count] = which, result.sign[result.count++] = factor;
  }
  return result;
}

// Asks for the rows of dy of some tiles, a few lines at a time beside the products of those before: the stem's 126 MB
// are then in L2 when they are spread.
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

}  // namespace

}  // namespace astrobiogen::conv_nd
