// Online-softmax forward and backward over one task's query panels, instantiated per instruction set.
#include "attention/kernels.h"

#include "attention/tile.h"
#include "common/dispatch.h"

namespace astrobiogen::attention {

static_assert(Avx512::Keys * kRows <= kScratch && Avx2::Keys * kRows <= kScratch && Baseline::Keys * kRows <= kScratch);

// One panel against `count` keys: new maximum, probabilities in place, sum, and the factor by which older results
// shrink.
template <class B>
ASTRO_INLINE void softmax_tile(float* tile, int64_t count, float* maximum, float* total, float* shrink) {
  using F = typename B::F;
  const F lowest = F{} - __builtin_inff();
  F top[2], safe[2], sum[2] = {};
  for (int n = 0; n < 2; ++n) top[n] = load_as<F>(maximum + n * B::L);
  for (int64_t j = 0; j < count; ++j)
    for (int n = 0; n < 2; ++n) {
      const F s = load_as<F>(tile + j * B::W + n * B::L);
      top[n] = s > top[n] ? s : top[n];
    }
  for (int n = 0; n < 2; ++n) {
    safe[n] = top[n] == lowest ? F{} : top[n];  // nothing visible yet: -Inf - -Inf would be NaN
    store_as(shrink + n * B::L, simd::exp2_unit<F>(load_as<F>(maximum + n * B::L) - safe[n]));
    store_as(maximum + n * B::L, top[n]);
  }
  for (int64_t j = 0; j < count; ++j)
    for (int n = 0; n < 2; ++n) {
      float* p = tile + j * B::W + n * B::L;
      const F probability = simd::exp2_unit<F>(load_as<F>(p) - safe[n]);
      store_as(p, probability);
      sum[n] += probability;
    }
  for (int n = 0; n < 2; ++n) {
    float* p = total + n * B::L;
    store_as(p, load_as<F>(p) * load_as<F>(shrink + n * B::L) + sum[n]);
  }
}

template <class B>
ASTRO_INLINE void forward_tile(const ForwardTile& t) {
  constexpr int64_t W = B::W;
  Range ranges[kRows / 4];
  Range all{INT32_MAX, 0, 0, 0};
  for (int64_t x = 0; x < t.panels; ++x) {
    ranges[x] = range_of(t.low + x * W, t.high + x * W, W);
    all.first = ranges[x].first < all.first ? ranges[x].first : all.first;
    all.last = ranges[x].last > all.last ? ranges[x].last : all.last;
  }
  alignas(64) float shrink[B::W];
  for (int64_t first = all.first; first < all.last; first += B::Keys)
    for (int64_t x = 0; x < t.panels; ++x) {
      const Range& range = ranges[x];
      const int64_t begin = first > range.first ? first : range.first;
      const int64_t end = first + B::Keys < range.last ? first + B::Keys : range.last;
      if (begin >= end) continue;
      const int64_t count = end - begin;
      product<B, 2, false, Start::kZero>(count, t.keys + begin * t.key_stride, t.key_stride, t.queries + x * t.dim * W,
                                         W, t.dim, t.scratch, W);
      if (t.softcap > 0.0f) cap_tile<B>(t.scratch, W, count, t.softcap);
      if (begin < range.full_first || end > range.full_last)
        mask_tile<B>(t.scratch, W, begin, count, t.low + x * W, t.high + x * W);
      softmax_tile<B>(t.scratch, count, t.maximum + x * W, t.total + x * W, shrink);
      product<B, 2, true, Start::kScale>(t.dim, t.values + begin * t.value_stride, t.value_stride, t.scratch, W, count,
                                         t.out + x * t.dim * W, W, shrink);
    }
}

// probability <- P = 2^(S - lse), grad <- dS = P (dP - delta) [(1 - tanh^2)], for one panel's columns. A hidden key has
// P = 0 exactly and gets dS = 0 even where dP is not finite.
template <class B>
ASTRO_INLINE void gradient_tile(float* probability, float* grad, int64_t count, const float* lse, const float* delta,
                                float softcap) {
  using F = typename B::F;
  const float inverse = softcap > 0.0f ? 1.0f / softcap : 0.0f;
  for (int n = 0; n < 2; ++n) {
    const F shift = load_as<F>(lse + n * B::L), mean = load_as<F>(delta + n * B::L);
    for (int64_t j = 0; j < count; ++j) {
      float *p = probability + j * kRows + n * B::L, *g = grad + j * kRows + n * B::L;
      const F score = load_as<F>(p);
      const F weight = simd::exp2_unit<F>(score - shift);
      const F cap = score * inverse;
      const F value = weight * (load_as<F>(g) - mean) * (1.0f - cap * cap);
      store_as(p, weight);
      store_as<F>(g, weight == F{} ? F{} : value);
    }
  }
}

// c[rows][padded] += a^T-like tile [rows][kRows] times b [depth][padded], in column strips of two registers and one odd
// one.
template <class B>
ASTRO_INLINE void add_strips(int64_t rows, const float* a, const float* b, int64_t depth, float* c, int64_t padded) {
  int64_t column = 0;
  for (; column + 2 * B::L <= padded; column += 2 * B::L)
    product<B, 2, false, Start::kAdd>(rows, a, kRows, b + column, padded, depth, c + column, padded);
  if (column < padded) product<B, 1, false, Start::kAdd>(rows, a, kRows, b + column, padded, depth, c + column, padded);
}

template <class B>
ASTRO_INLINE void backward_tile(const BackwardTile& t) {
  constexpr int64_t W = B::W;
  Range ranges[kRows / 4];
  const Range all = range_of(t.low, t.high, t.panels * W);
  for (int64_t x = 0; x < t.panels; ++x) ranges[x] = range_of(t.low + x * W, t.high + x * W, W);
  float *probability = t.scratch, *grad = t.scratch + kScratch;
  for (int64_t first = all.first; first < all.last; first += B::Keys) {
    const int64_t end = first + B::Keys < all.last ? first + B::Keys : all.last, count = end - first;
    const float *keys = t.keys + first * t.dim, *values = t.values + first * t.dim;
    const float* finite_keys = t.finite_keys + first * t.dim;
    int64_t begin_panel = t.panels,
            end_panel = 0;  // rows are ordered by position, so the panels that see this tile are neighbours
    for (int64_t x = 0; x < t.panels; ++x) {
      const Range& range = ranges[x];
      if (range.first >= end || range.last <= first) continue;
      begin_panel = x < begin_panel ? x : begin_panel;
      end_panel = x + 1;
    }
    for (int64_t x = begin_panel; x < end_panel; ++x) {
      const int64_t panel = x * t.dim * W;
      float *p = probability + x * W, *g = grad + x * W;
      product<B, 2, false, Start::kZero>(count, keys, t.dim, t.queries + panel, W, t.dim, p, kRows);
      if (t.softcap > 0.0f) cap_tile<B>(p, kRows, count, t.softcap);
      if (first < ranges[x].full_first || end > ranges[x].full_last)
        mask_tile<B>(p, kRows, first, count, t.low + x * W, t.high + x * W);
      product<B, 2, false, Start::kZero>(count, values, t.dim, t.grads + panel, W, t.dim, g, kRows);
      gradient_tile<B>(p, g, count, t.lse + x * W, t.delta + x * W, t.softcap);
      if (t.lost) {  // -Inf - NaN: the keys that a lost row does not see have P = NaN
        mask_tile<B>(p, kRows, first, count, t.low + x * W, t.high + x * W, 0.0f);
        mask_tile<B>(g, kRows, first, count, t.low + x * W, t.high + x * W, 0.0f);
      }
      product<B, 2, true, Start::kAdd>(t.dim, finite_keys, t.dim, g, kRows, count, t.grad_queries + panel, W);
    }
    if (begin_panel >= end_panel) continue;
    const int64_t row = begin_panel * W, depth = (end_panel - begin_panel) * W;
    add_strips<B>(count, probability + row, t.grad_rows + row * t.padded, depth, t.grad_values + first * t.padded,
                  t.padded);
    add_strips<B>(count, grad + row, t.query_rows + row * t.padded, depth, t.grad_keys + first * t.padded, t.padded);
  }
}

void forward_baseline(const ForwardTile& t) { forward_tile<Baseline>(t); }
void backward_baseline(const BackwardTile& t) { backward_tile<Baseline>(t); }

#if defined(ASTRO_HAS_LEVELS)
__attribute__((target("arch=x86-64-v3"))) void forward_avx2(const ForwardTile& t) { forward_tile<Avx2>(t); }
__attribute__((target("arch=x86-64-v3"))) void backward_avx2(const BackwardTile& t) { backward_tile<Avx2>(t); }
__attribute__((target("arch=x86-64-v4"))) void forward_avx512(const ForwardTile& t) { forward_tile<Avx512>(t); }
__attribute__((target("arch=x86-64-v4"))) void backward_avx512(const BackwardTile& t) { backward_tile<Avx512>(t); }
#endif

const Kernels& kernels() {
  static const Kernels baseline{Baseline::W, Baseline::L, &forward_baseline, &backward_baseline};
#if defined(ASTRO_HAS_LEVELS)
  static const Kernels avx2{Avx2::W, Avx2::L, &forward_avx2, &backward_avx2};
  static const Kernels avx512{Avx512::W, Avx512::L, &forward_avx512, &backward_avx512};
  switch (level()) {
    case Level::kAvx512: return avx512;
    case Level::kAvx2: return avx2;
    case Level::kBaseline: break;
  }
#endif
  return baseline;
}

}  // namespace astrobiogen::attention
