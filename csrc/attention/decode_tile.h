// The inner kernel of attention with few query rows per key/value head: one tile of keys and values, read in place,
// serves all of them.
//
// Lanes run over the head dimension, for the scores as for the output: with few rows a panel of rows (attention/tile.h)
// would leave most lanes empty. RB rows meet KB = N / RB keys in N sums of N lanes, which shuffles turn into one vector
// of scores, [row][key]; maximum and sum run on such vectors and are reduced over a row's KB lanes once per tile.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>

#include "common/dispatch.h"
#include "common/math.h"
#include "common/pairs.h"

namespace astrobiogen::attention::decode {

constexpr int64_t kTileKeys = 64;
constexpr int kMaxBlockRows = 4;

// `queries`, and `state`'s output, have their columns in the order in which `T` is read (`Columns`); scores are in
// units of log 2, as in attention/kernels.h.
template <typename T>
struct Tile {
  const T *keys, *values;            // [count][dim] at the strides below
  const T *next_keys, *next_values;  // the tile after this one, asked for meanwhile; may be null
  int64_t key_stride, value_stride;
  int64_t count;              // at most kTileKeys
  int64_t dim;                // a multiple of `Columns<T, N>::kStep`
  int64_t blocks;             // of RB rows
  const float* queries;       // [blocks RB][dim]
  float* state;               // [blocks] of maximum [N], sum [N], both [row][lane of a key], and output [RB][dim]
  const int32_t *low, *high;  // [blocks RB] the keys of the tile that a row sees; null: all rows see all of them
  float softcap;              // in units of log 2; 0: none
};

// Vectors of N columns as one read gives them: fp32 in order; bf16 in pairs, the even and the odd columns of 2 N.
template <typename T, int N>
struct Columns {
  static constexpr int kVectors = sizeof(T) == 4 ? 1 : 2, kStep = kVectors * N;
  simd::F<N> of[kVectors];

  static ASTRO_INLINE Columns read(const T* p) {
    if constexpr (kVectors == 1) {
      return {{simd::load_as<simd::F<N>>(p)}};
    } else {
      const simd::Pair<N> pair = simd::load_pair<N>(p);
      return {{pair.first, pair.second}};
    }
  }
};

// One level of the tree that sums lanes: the sums of neighbours of a, then those of b. Within 128 bits where `Within`,
// else of whole 128-bit quarters.
template <bool Within>
ASTRO_INLINE simd::F<16> add_neighbours(simd::F<16> a, simd::F<16> b) {
#if defined(ASTRO_HAS_SHUFFLES)
  if constexpr (Within)
    return __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  else
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#else
  constexpr int kRun = Within ? 1 : 4;
  simd::F<16> sum = {};
  for (int lane = 0; lane < 16; ++lane) {
    const int group = Within ? lane / 4 * 4 : 0, at = lane - group, half = Within ? 2 : 8;
    const simd::F<16>& from = at < half ? a : b;
    const int first = group + at % half / kRun * 2 * kRun + at % kRun;
    sum[lane] = from[first] + from[first + kRun];
  }
  return sum;
#endif
}

template <bool Within>
ASTRO_INLINE simd::F<8> add_neighbours(simd::F<8> a, simd::F<8> b) {
#if defined(ASTRO_HAS_SHUFFLES)
  if constexpr (Within)
    return __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
  else
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
#else
  const simd::F<16> wide = add_neighbours<Within>(simd::join(a, a), simd::join(b, b));
  simd::F<8> sum = {};
  for (int lane = 0; lane < 8; ++lane) sum[lane] = wide[Within || lane < 4 ? lane : lane + 4];
  return sum;
#endif
}

// Lane i of the result is the sum over the lanes of v[i].
template <int N>
ASTRO_INLINE simd::F<N> sums_of_lanes(simd::F<N> (&v)[N]) {
#pragma GCC unroll 8
  for (int i = 0; i < N / 2; ++i) v[i] = add_neighbours<true>(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < N / 4; ++i) v[i] = add_neighbours<true>(v[2 * i], v[2 * i + 1]);
#pragma GCC unroll 2
  for (int i = 0; i < N / 8; ++i) v[i] = add_neighbours<false>(v[2 * i], v[2 * i + 1]);
  if constexpr (N == 16) v[0] = add_neighbours<false>(v[0], v[1]);
  return v[0];
}

// The largest of each run of `Run` lanes, in all of them. NaN is never larger.
template <int N, int Run>
ASTRO_INLINE simd::F<N> largest_of_runs(simd::F<N> v) {
  alignas(64) float lanes[N];
  simd::store_as(lanes, v);
  for (int first = 0; first < N; first += Run) {
    float top = lanes[first];
    for (int i = 1; i < Run; ++i) top = lanes[first + i] > top ? lanes[first + i] : top;
    for (int i = 0; i < Run; ++i) lanes[first + i] = top;
  }
  return simd::load_as<simd::F<N>>(lanes);
}

// Asks for one row of `dim` elements.
template <typename T>
ASTRO_INLINE void ask_for(const T* row, int64_t dim) {
  for (int64_t d = 0; d < dim; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d, 0, 2);
}

// Scores of RB rows and KB keys, of which the last are repeated where the tile ends before: `last` is its last key.
template <int N, int RB, typename T>
ASTRO_INLINE simd::F<N> score_block(const T* keys, int64_t stride, int64_t last, const float* queries, int64_t dim) {
  using Read = Columns<T, N>;
  constexpr int KB = N / RB;
  simd::F<N> sums[N] = {};
  for (int64_t d = 0; d < dim; d += Read::kStep) {
    simd::F<N> query[RB][Read::kVectors];
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 2
      for (int i = 0; i < Read::kVectors; ++i) query[r][i] = simd::load_as<simd::F<N>>(queries + r * dim + d + i * N);
#pragma GCC unroll 16
    for (int j = 0; j < KB; ++j) {
      const Read key = Read::read(keys + (j < last ? j : last) * stride + d);
#pragma GCC unroll 4
      for (int r = 0; r < RB; ++r)
#pragma GCC unroll 2
        for (int i = 0; i < Read::kVectors; ++i) sums[r * KB + j] += query[r][i] * key.of[i];
    }
  }
  return sums_of_lanes<N>(sums);
}

// -Inf for the keys that a row does not see.
template <int N, int RB>
ASTRO_INLINE void hide(float* scores, int64_t count, const int32_t* low, const int32_t* high) {
  constexpr int KB = N / RB;
  using I = typename simd::Lanes<N>::I;
  alignas(64) int32_t begin[N], end[N], key[N];
  for (int lane = 0; lane < N; ++lane) {
    const int32_t bound = static_cast<int32_t>(count);
    begin[lane] = low == nullptr ? 0 : low[lane / KB];
    end[lane] = high == nullptr || high[lane / KB] > bound ? bound : high[lane / KB];
    key[lane] = lane % KB;
  }
  I first, last, at;
  std::memcpy(&first, begin, sizeof(first));
  std::memcpy(&last, end, sizeof(last));
  std::memcpy(&at, key, sizeof(at));
  const simd::F<N> hidden = simd::broadcast<N>(-__builtin_inff());
  for (int64_t j = 0; j < count; j += KB, at += KB) {
    float* p = scores + j * RB;
    simd::store_as<simd::F<N>>(p, ((at >= first) & (at < last)) ? simd::load_as<simd::F<N>>(p) : hidden);
  }
}

// New maximum and sum of RB rows, probabilities in place; the factor by which older results shrink, per lane.
template <int N, int RB>
ASTRO_INLINE void soften(float* scores, int64_t count, float* maximum, float* total, float* shrink) {
  using F = simd::F<N>;
  constexpr int64_t KB = N / RB;
  const F before = simd::load_as<F>(maximum), lowest = simd::broadcast<N>(-__builtin_inff());
  F top = before;
  for (int64_t j = 0; j < count; j += KB) {
    const F s = simd::load_as<F>(scores + j * RB);
    top = s > top ? s : top;
  }
  top = largest_of_runs<N, KB>(top);
  const F safe = top == lowest ? F{} : top;  // nothing visible yet: -Inf - -Inf would be NaN
  const F factor = simd::exp2_unit<F>(before - safe);
  F sum = simd::load_as<F>(total) * factor;
  for (int64_t j = 0; j < count; j += KB) {
    float* p = scores + j * RB;
    const F probability = simd::exp2_unit<F>(simd::load_as<F>(p) - safe);
    simd::store_as(p, probability);
    sum += probability;
  }
  simd::store_as(maximum, top);
  simd::store_as(total, sum);
  simd::store_as(shrink, factor);
}

// out[r][column .. column + C reads) = shrink[r] * itself + sum over keys of probability * value.
template <int N, int RB, int C, typename T>
ASTRO_INLINE void add_values(const Tile<T>& t, const float* probabilities, const float* shrink, int64_t column,
                             const T* next, float* out) {
  using Read = Columns<T, N>;
  using F = simd::F<N>;
  constexpr int KB = N / RB, V = Read::kVectors;
  F sums[RB][C * V] = {};
  const T* row = t.values + column;
  const float* p = probabilities;
  const auto key = [&](int j) ASTRO_LAMBDA_INLINE {
    Read value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = Read::read(row + c * Read::kStep);
#pragma GCC unroll 4
    for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
      for (int c = 0; c < C * V; ++c) sums[r][c] += p[r * KB + j] * value[c / V].of[c % V];
    row += t.value_stride;
  };
  int64_t first = 0;
  for (; first + KB <= t.count; first += KB, p += N) {
    if (next != nullptr)
      for (int j = 0; j < KB; ++j) ask_for(next + (first + j) * t.value_stride, t.dim);
#pragma GCC unroll 16
    for (int j = 0; j < KB; ++j) key(j);
  }
  for (int j = 0; first + j < t.count; ++j) key(j);
#pragma GCC unroll 4
  for (int r = 0; r < RB; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C * V; ++c) {
      float* to = out + r * t.dim + column + c * N;
      simd::store_as<F>(to, simd::load_as<F>(to) * shrink[r * KB] + sums[r][c]);
    }
}

// Asked for once per tile, not once per block: `Kernel::run` passes `next` with the first block only.
template <int N, int RB, typename T>
ASTRO_INLINE void one_block(const Tile<T>& t, int64_t block, bool ahead) {
  using Read = Columns<T, N>;
  constexpr int64_t KB = N / RB, kReads = (N == 16 ? 4 : 2) / Read::kVectors, kWide = kReads * Read::kStep;
  alignas(64) float scores[kTileKeys * RB], shrink[N];
  const float* queries = t.queries + block * RB * t.dim;
  float *maximum = t.state + block * (2 * N + RB * t.dim), *total = maximum + N, *out = total + N;
  int64_t first = 0;
  for (; first + KB <= t.count; first += KB) {
    if (ahead && t.next_keys != nullptr)
      for (int64_t j = 0; j < KB; ++j) ask_for(t.next_keys + (first + j) * t.key_stride, t.dim);
    simd::store_as(scores + first * RB,
                   score_block<N, RB>(t.keys + first * t.key_stride, t.key_stride, KB - 1, queries, t.dim));
  }
  if (first < t.count)
    simd::store_as(scores + first * RB, score_block<N, RB>(t.keys + first * t.key_stride, t.key_stride,
                                                           t.count - first - 1, queries, t.dim));
  if (t.softcap > 0.0f)
    for (int64_t j = 0; j < t.count; j += KB) {
      float* p = scores + j * RB;
      simd::store_as<simd::F<N>>(p, simd::tanh_of(simd::load_as<simd::F<N>>(p)) * t.softcap);
    }
  if (t.low != nullptr || first < t.count)
    hide<N, RB>(scores, t.count, t.low == nullptr ? nullptr : t.low + block * RB,
                t.high == nullptr ? nullptr : t.high + block * RB);
  soften<N, RB>(scores, t.count, maximum, total, shrink);
  int64_t column = 0;
  for (; column + kWide <= t.dim; column += kWide)
    add_values<N, RB, kReads>(t, scores, shrink, column, ahead && column == 0 ? t.next_values : nullptr, out);
  for (; column < t.dim; column += Read::kStep)
    add_values<N, RB, 1>(t, scores, shrink, column, ahead && column == 0 ? t.next_values : nullptr, out);
}

template <typename T, int RB>
struct Kernel {
  template <Level L>
  static ASTRO_INLINE void run(const Tile<T>& t) {
    for (int64_t block = 0; block < t.blocks; ++block) one_block<kWidth<L>, RB>(t, block, block == 0);
  }
};

}  // namespace astrobiogen::attention::decode
