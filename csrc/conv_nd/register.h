// Register blocks of the own CPU forward convolution: a few positions times one block of channels, over taps and channels as one contiguous run.
#pragma once

#include "conv_nd/epilogue.h"

namespace astrobiogen::conv_nd {

struct Tap {
  const float* x;
  int64_t tap;
};

template <typename Vec, int N, int M>
ASTRO_INLINE void accumulate(const Plan& plan, const Tap* taps, int64_t count, const float* weight, int64_t offset, Vec (&acc)[M][N]) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float), kBlock = N * kWidth;
  const int64_t step = plan.position_step;
  for (int64_t at = 0; at < count; ++at) {
    const float* w = weight + taps[at].tap * plan.row_taps * kBlock;
    const float* line = taps[at].x + offset;
    for (int64_t run = 0; run < plan.run_count; ++run, line += plan.run_step) {
      const float* x = line;
      for (int64_t i = 0; i < plan.run_length; ++i, ++x, w += kBlock) {
        Vec value[N];
        for (int v = 0; v < N; ++v) value[v] = load_as<Vec>(w + v * kWidth);
        for (int m = 0; m < M; ++m) {
          const float scale = x[m * step];
          for (int v = 0; v < N; ++v) acc[m][v] += value[v] * scale;
        }
      }
    }
  }
}

template <typename Vec, int N, int M>
ASTRO_INLINE void block(const Plan& plan, const Tap* taps, int64_t count, const float* weight, int64_t offset, float* sums, bool fresh) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float), kBlock = N * kWidth;
  Vec acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) acc[m][v] = fresh ? Vec{} : load_as<Vec>(sums + m * kBlock + v * kWidth);
  accumulate<Vec, N, M>(plan, taps, count, weight, offset, acc);
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) store_as<Vec>(sums + m * kBlock + v * kWidth, acc[m][v]);
}

// Calls step<Size>(position) until `count` positions are done, in register blocks of M and less.
template <int M, typename Step>
ASTRO_INLINE void in_blocks(int64_t count, Step step) {
  int64_t p = 0;
  // Eight left over: 4 + 4 keeps more registers busy than 6 + 2.
  for (; count - p >= M && !(M == 6 && count - p == 8); p += M) step.template operator()<M>(p);
  if constexpr (M > 8)
    for (; count - p >= 8; p += 8) step.template operator()<8>(p);
  for (; count - p >= 4; p += 4) step.template operator()<4>(p);
  for (; count - p >= 2; p += 2) step.template operator()<2>(p);
  for (; p < count; ++p) step.template operator()<1>(p);
}

template <typename Vec, int N, int M>
ASTRO_INLINE void positions(const Plan& plan, const Tap* taps, int64_t live, const float* weight, int64_t offset, int64_t count, float* sums, bool fresh) {
  constexpr int64_t kBlock = N * sizeof(Vec) / sizeof(float);
  in_blocks<M>(count, [&]<int Size>(int64_t p) ASTRO_LAMBDA_INLINE {
    block<Vec, N, Size>(plan, taps, live, weight, offset + p * plan.position_step, sums + p * kBlock, fresh);
  });
}

// Where the four points of a paired last axis lie: floats between two of them in the packed weight and in a line.
struct PairSteps {
  int64_t weight, line;
};

// M pairs of positions of one row: sums [2 M][block]. m1 + m2 starts the sums of m0, m1 - m2 those of m3.
template <typename Vec, int N, int M>
ASTRO_INLINE void pair_block(const Plan& plan, const Tap* taps, int64_t count, const float* weight, PairSteps steps, int64_t offset, float* sums, bool fresh) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float), kBlock = N * kWidth;
  constexpr int kOrder[4] = {1, 2, 0, 3};
  alignas(64) float difference[M * kBlock] = {};
  const auto each = [&](auto&& body) ASTRO_LAMBDA_INLINE {
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < N; ++v) body(m, v, m * kBlock + v * kWidth);
  };
  Vec acc[M][N] = {};
  for (int step = 0; step < 4; ++step) {
    const int point = kOrder[step];
    accumulate<Vec, N, M>(plan, taps, count, weight + point * steps.weight, offset + point * steps.line, acc);
    if (point == 1) {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE {
        store_as<Vec>(difference + at, acc[m][v]);
        acc[m][v] = Vec{};
      });
    } else if (point == 2) {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE {
        const Vec other = load_as<Vec>(difference + at);
        store_as<Vec>(difference + at, other - acc[m][v]);
        acc[m][v] += other;
      });
    } else {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE {
        float* to = sums + (2 * m + (point == 3)) * kBlock + v * kWidth;
        store_as<Vec>(to, fresh ? acc[m][v] : load_as<Vec>(to) + acc[m][v]);
        if (point == 0) acc[m][v] = load_as<Vec>(difference + at);
      });
    }
  }
}

template <typename Vec, int N, int M>
ASTRO_INLINE void pair_positions(const Plan& plan, const Tap* taps, int64_t live, const float* weight, PairSteps steps, int64_t offset, int64_t count, float* sums,
                                 bool fresh) {
  constexpr int64_t kBlock = N * sizeof(Vec) / sizeof(float);
  in_blocks<M>(plan.steps(count), [&]<int Size>(int64_t p) ASTRO_LAMBDA_INLINE {
    pair_block<Vec, N, Size>(plan, taps, live, weight, steps, offset + p * plan.position_step, sums + 2 * p * kBlock, fresh);
  });
}

// Where the outputs of a block of channels go: [tile rows], none where null; `step` floats between positions.
struct Output {
  float* row[kMaxTile];
  int64_t step;
  const float* bias;  // of the block, or null
  bool streamed;
};

// Vec is one register here. The whole line at once: as four pieces of 16 bytes streamed stores took twice the time.
template <typename Vec>
ASTRO_INLINE void put_register(float* p, Vec v, bool streamed) {
#if defined(ASTRO_HAS_LEVELS)
  if (streamed) {
    if constexpr (sizeof(Vec) == 64) asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<simd::f32x16_memory*>(p)) : "v"(v));
    else put_whole(p, v, true);
    return;
  }
#endif
  store_as<Vec>(p, v);
}

// What one register block reads of every point: its live taps and its weights.
struct Points {
  const Tap* taps;        // of all points, one after the other
  const int64_t* first;   // [points + 1] into taps
  const float* weight;    // of the block of channels at point 0
  int64_t weight_step;    // between points
};

// The outputs of one register block from all of its points, each added on to what the others made of it: of the four points of a pair, m1 + m2 starts
// the sums of m0, and m1 - m2 those of m3. Nothing but the outputs, from position `at` on, leaves L1. One loop
// over the points: as sixteen copies of its body the code was larger than the instruction cache (stem 76 ms instead of 60).
template <typename Vec, int N, int M>
ASTRO_INLINE void all_points(const Plan& plan, const Points& points, int64_t offset, const Output& out, int64_t position) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float), kBlock = N * kWidth;
  constexpr int kOrder[4] = {1, 2, 0, 3};
  // held: outer pair's point 1, then point 1 - point 2; sum: point 1 + point 2; each for both outputs of the inner pair.
  alignas(64) float difference[M * kBlock] = {}, held[2][M * kBlock] = {}, sum[2][M * kBlock];
  const auto each = [&](auto&& body) ASTRO_LAMBDA_INLINE {
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < N; ++v) body(m, v, m * kBlock + v * kWidth);
  };
  const bool outer = plan.pairs == 2;
  Vec acc[M][N] = {};
  for (int64_t step = 0; step < plan.points; ++step) {
    const int row = outer ? kOrder[step / 4] : 0, inner = kOrder[step % 4];
    const int64_t point = 4 * row + inner, first = points.first[point];
    accumulate<Vec, N, M>(plan, points.taps + first, points.first[point + 1] - first, points.weight + point * points.weight_step, offset, acc);
    if (inner == 1) {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE {
        store_as<Vec>(difference + at, acc[m][v]);
        acc[m][v] = Vec{};
      });
      continue;
    }
    if (inner == 2) {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE {
        const Vec other = load_as<Vec>(difference + at);
        store_as<Vec>(difference + at, other - acc[m][v]);
        acc[m][v] += other;
      });
      if (outer && row == 0) each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE { acc[m][v] += load_as<Vec>(sum[0] + at); });
      if (row == 3) each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE { acc[m][v] += load_as<Vec>(held[0] + at); });
      continue;
    }
    const int which = inner == 3;
    if (row == 2) {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE {
        const Vec other = load_as<Vec>(held[which] + at);
        store_as<Vec>(sum[which] + at, other + acc[m][v]);
        store_as<Vec>(held[which] + at, other - acc[m][v]);
      });
    } else if (row == 1) {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE { store_as<Vec>(held[which] + at, acc[m][v]); });
    } else if (float* to = out.row[(row == 3 ? 2 : 0) + which]; to != nullptr) {
      Vec bias[N] = {};
      for (int v = 0; v < N && out.bias != nullptr; ++v) bias[v] = load_as<Vec>(out.bias + v * kWidth);
      to += position * out.step;
      each([&](int m, int v, int64_t) ASTRO_LAMBDA_INLINE { put_register<Vec>(to + m * out.step + v * kWidth, acc[m][v] + bias[v], out.streamed); });
    }
    if (which == 1) {
      each([&](int m, int v, int64_t) ASTRO_LAMBDA_INLINE { acc[m][v] = Vec{}; });
    } else {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE { acc[m][v] = load_as<Vec>(difference + at); });
      if (outer && row == 0) each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE { acc[m][v] += load_as<Vec>(sum[1] + at); });
      if (row == 3) each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE { acc[m][v] += load_as<Vec>(held[1] + at); });
    }
  }
}

template <typename Vec, int N, int M>
ASTRO_INLINE void all_positions(const Plan& plan, const Points& points, int64_t offset, int64_t count, const Output& out) {
  in_blocks<M>(count, [&]<int Size>(int64_t p) ASTRO_LAMBDA_INLINE {
    all_points<Vec, N, Size>(plan, points, offset + p * plan.position_step, out, p);
  });
}

}  // namespace astrobiogen::conv_nd
