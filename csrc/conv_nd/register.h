// Register blocks of the own CPU forward convolution: a few positions times one block of channels, over taps and
// channels as one contiguous run.
#pragma once

#include "conv_nd/epilogue.h"
#include "gemm/microkernel.h"

namespace astrobiogen::conv_nd {

struct Tap {
  const float* x;
  int64_t tap;
};

template <typename Vec, int N, int M>
ASTRO_INLINE void accumulate(const Plan& plan, const Tap* taps, int64_t count, const float* weight, int64_t offset,
                             Vec (&acc)[M][N]) {
  constexpr int64_t kBlock = N * sizeof(Vec) / sizeof(float);
  const int64_t step = plan.position_step;
  for (int64_t at = 0; at < count; ++at) {
    const float* w = weight + taps[at].tap * plan.row_taps * kBlock;
    const float* line = taps[at].x + offset;
    for (int64_t run = 0; run < plan.run_count; ++run, line += plan.run_step, w += plan.run_length * kBlock) {
      const auto left = [=](int m, int64_t i) ASTRO_LAMBDA_INLINE { return line[m * step + i]; };
      gemm::multiply_add<Vec, M, N>(acc, plan.run_length, left, w, kBlock);
    }
  }
}

template <typename Vec, int N, int M>
ASTRO_INLINE void block(const Plan& plan, const Tap* taps, int64_t count, const float* weight, int64_t offset,
                        float* sums, bool overwrite) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float), kBlock = N * kWidth;
  Vec acc[M][N];
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) acc[m][v] = overwrite ? Vec{} : load_as<Vec>(sums + m * kBlock + v * kWidth);
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
ASTRO_INLINE void positions(const Plan& plan, const Tap* taps, int64_t live, const float* weight, int64_t offset,
                            int64_t count, float* sums, bool overwrite) {
  constexpr int64_t kBlock = N * sizeof(Vec) / sizeof(float);
  in_blocks<M>(count, [&]<int Size>(int64_t p) ASTRO_LAMBDA_INLINE {
    block<Vec, N, Size>(plan, taps, live, weight, offset + p * plan.position_step, sums + p * kBlock, overwrite);
  });
}

// Where the four components of a Winograd last axis lie: floats between two of them in the packed weight and in a line.
struct ComponentSteps {
  int64_t weight, line;
};

// M tiles of two positions of one row: sums [2 M][block]. m1 + m2 starts the sums of m0, m1 - m2 those of m3.
template <typename Vec, int N, int M>
ASTRO_INLINE void winograd_block(const Plan& plan, const Tap* taps, int64_t count, const float* weight,
                                 ComponentSteps steps, int64_t offset, float* sums, bool overwrite) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float), kBlock = N * kWidth;
  constexpr int kOrder[4] = {1, 2, 0, 3};
  alignas(64) float difference[M * kBlock] = {};
  const auto each = [&](auto&& body) ASTRO_LAMBDA_INLINE {
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < N; ++v) body(m, v, m * kBlock + v * kWidth);
  };
  Vec acc[M][N] = {};
  for (int step = 0; step < 4; ++step) {
    const int component = kOrder[step];
    accumulate<Vec, N, M>(plan, taps, count, weight + component * steps.weight, offset + component * steps.line, acc);
    if (component == 1) {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE {
        store_as<Vec>(difference + at, acc[m][v]);
        acc[m][v] = Vec{};
      });
    } else if (component == 2) {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE {
        const Vec other = load_as<Vec>(difference + at);
        store_as<Vec>(difference + at, other - acc[m][v]);
        acc[m][v] += other;
      });
    } else {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE {
        float* to = sums + (2 * m + (component == 3)) * kBlock + v * kWidth;
        store_as<Vec>(to, overwrite ? acc[m][v] : load_as<Vec>(to) + acc[m][v]);
        if (component == 0) acc[m][v] = load_as<Vec>(difference + at);
      });
    }
  }
}

template <typename Vec, int N, int M>
ASTRO_INLINE void winograd_positions(const Plan& plan, const Tap* taps, int64_t live, const float* weight,
                                     ComponentSteps steps, int64_t offset, int64_t count, float* sums, bool overwrite) {
  constexpr int64_t kBlock = N * sizeof(Vec) / sizeof(float);
  in_blocks<M>(plan.steps(count), [&]<int Size>(int64_t p) ASTRO_LAMBDA_INLINE {
    winograd_block<Vec, N, Size>(plan, taps, live, weight, steps, offset + p * plan.position_step,
                                 sums + 2 * p * kBlock, overwrite);
  });
}

// Where the outputs of a block of channels go: [tile rows], none where null; `step` floats between positions.
struct Output {
  float* row[kMaxTile];
  int64_t step;
  const float* bias;  // of the block, or null
  bool streamed;
};

// Vec is one register here: of the AVX-512 level where it is 64 bytes.
template <typename Vec>
ASTRO_INLINE void put_register(float* p, Vec v, bool streamed) {
  if (streamed) simd::stream<sizeof(Vec) == 64 ? Level::kAvx512 : Level::kBaseline>(p, v);
  else store_as<Vec>(p, v);
}

// What one register block reads of every component: its live taps and its weights.
struct Components {
  const Tap* taps;       // of all components, one after the other
  const int64_t* first;  // [components + 1] into taps
  const float* weight;   // of the block of channels at component 0
  int64_t weight_step;   // between components
};

// The outputs of tile row `which` from `position` on, if the tile has that row.
template <typename Vec, int N, int M>
ASTRO_INLINE void write_outputs(const Output& out, int which, int64_t position, const Vec (&acc)[M][N]) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float);
  float* to = out.row[which];
  if (to == nullptr) return;
  Vec bias[N] = {};
  for (int v = 0; v < N && out.bias != nullptr; ++v) bias[v] = load_as<Vec>(out.bias + v * kWidth);
  to += position * out.step;
  for (int m = 0; m < M; ++m)
    for (int v = 0; v < N; ++v) put_register<Vec>(to + m * out.step + v * kWidth, acc[m][v] + bias[v], out.streamed);
}

// The outputs of one register block from all of its components, each added on to what the others made of it: of the
// four of an axis, m1 + m2 starts the sums of m0, and m1 - m2 those of m3. Nothing but the outputs, from position `at`
// on, leaves L1. One loop over the components: as sixteen copies of its body the code was larger than the instruction
// cache (stem 76 ms instead of 60).
template <typename Vec, int N, int M>
ASTRO_INLINE void all_components(const Plan& plan, const Components& components, int64_t offset, const Output& out,
                                 int64_t position) {
  constexpr int64_t kWidth = sizeof(Vec) / sizeof(float), kBlock = N * kWidth;
  constexpr int kOrder[4] = {1, 2, 0, 3};
  // held: the outer axis' component 1, then 1 - 2; sum: 1 + 2; each for both outputs of the inner axis.
  alignas(64) float difference[M * kBlock] = {}, held[2][M * kBlock] = {}, sum[2][M * kBlock];
  const auto each = [&](auto&& body) ASTRO_LAMBDA_INLINE {
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < N; ++v) body(m, v, m * kBlock + v * kWidth);
  };
  const bool outer = plan.winograd_axes == 2;
  Vec acc[M][N] = {};
  for (int64_t step = 0; step < plan.components; ++step) {
    const int row = outer ? kOrder[step / 4] : 0, inner = kOrder[step % 4];
    const int64_t component = 4 * row + inner, first = components.first[component];
    accumulate<Vec, N, M>(plan, components.taps + first, components.first[component + 1] - first,
                          components.weight + component * components.weight_step, offset, acc);
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
      if (outer && row == 0)
        each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE { acc[m][v] += load_as<Vec>(sum[0] + at); });
      if (row == 3)
        each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE { acc[m][v] += load_as<Vec>(held[0] + at); });
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
    } else {
      write_outputs<Vec, N, M>(out, (row == 3 ? 2 : 0) + which, position, acc);
    }
    if (which == 1) {
      each([&](int m, int v, int64_t) ASTRO_LAMBDA_INLINE { acc[m][v] = Vec{}; });
    } else {
      each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE { acc[m][v] = load_as<Vec>(difference + at); });
      if (outer && row == 0)
        each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE { acc[m][v] += load_as<Vec>(sum[1] + at); });
      if (row == 3)
        each([&](int m, int v, int64_t at) ASTRO_LAMBDA_INLINE { acc[m][v] += load_as<Vec>(held[1] + at); });
    }
  }
}

template <typename Vec, int N, int M>
ASTRO_INLINE void all_positions(const Plan& plan, const Components& components, int64_t offset, int64_t count,
                                const Output& out) {
  in_blocks<M>(count, [&]<int Size>(int64_t p) ASTRO_LAMBDA_INLINE {
    all_components<Vec, N, Size>(plan, components, offset + p * plan.position_step, out, p);
  });
}

}  // namespace astrobiogen::conv_nd
