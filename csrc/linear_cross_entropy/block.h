// The tasks of the fused loss on one block of tokens; linear_cross_entropy/gradients.cpp puts them together.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "linear_cross_entropy/linear_cross_entropy.h"
#include "linear_cross_entropy/products.h"

namespace astrobiogen::linear_cross_entropy {

// Vocabulary rows per task: a multiple of every R. At hidden size 512 the rows are 295 KB: those that the product after
// the logits finds in the second-level cache, and the next ones on their way to it, leave room for the sums in 1 MB.
constexpr int64_t kChunk = 144;
constexpr int64_t kMostRows = 12;  // the largest R
// Depth of one walk over hidden columns for the logits: a panel of x is 64 KB.
constexpr int64_t kDepth = 512;
// Panels of tokens that take turns on R rows of the weight: 192 KB of x, which stay in the second-level cache for the
// whole chunk.
constexpr int64_t kTurns = 3;
// Hidden columns of the weight that are taken together for the gradient of x: a multiple of every R and of a line of
// memory; 144 rows are 28 KB.
constexpr int64_t kStrip = 48;
// Rows of weight, in floats, that stay in the second-level cache between two products: 1 MB.
constexpr int64_t kNear = 1 << 18;
// Lanes are rounded up to it: a multiple of both panel widths.
constexpr int64_t kPanel = 32;
// Between rows of the gradients of a chunk's logits, so that they do not share the cache's sets.
constexpr int64_t kGap = 16;

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Exponentials are taken relative to a logit at most this much below the largest so far, and so are at most e^8 = 2981.
// One that follows every new largest logit would move in most chunks for one of 96 tokens, and each move is another
// pass over the sums.
constexpr float kSlack = 8.0f;

// exp(-Inf) = 0 is to be added, and not NaN, while all logits are -Inf.
template <class T>
ASTRO_INLINE T shift(T base) {
  return base == kLowest ? T{} : base;
}

// Consecutive chunks of the vocabulary with sums of their own.
struct Segment {
  int64_t first, last;  // chunks [first, last)
  double* sum_exp;      // [lanes]: of the chunks so far, relative to shift(base) of the last of them
  double* total;        // [lanes]: of the logits
  float*
      product;  // [lanes / P][hidden rounded up to kMostRows][P]: what is stored times the weight, transposed; or null
  float* factor;  // [lanes]: of `product` in the gradient of x
};

struct Block {
  const float *x, *weight;
  const int64_t* target;
  int64_t hidden, vocabulary, tokens;  // live tokens of this block
  int64_t lanes;                       // tokens rounded up to kPanel
  Options options;
  float* store = nullptr;  // per chunk from begin(chunk) store_row on: [lanes / P][rows][P], logits, then exp(logit -
                           // shift(base)) or what GradLogits stores
  int64_t store_row = 0;   // floats per vocabulary row: lanes, or hidden where `store` is grad_weight
  float* packed_x = nullptr;  // [lanes / P][hidden][P], x transposed; then [hidden / P][lanes][P], times `factor`
  float* base = nullptr;  // [chunks][lanes]: largest logit of the chunk; after `follow`, the base of its exponentials
  float* top = nullptr;   // [lanes]: the largest base
  float* target_logit = nullptr;  // [lanes]
  float* kept = nullptr;          // [lanes]: 1, or 0 for an ignored token and a padded lane
  float* lse = nullptr;           // [lanes]
  float* softmax = nullptr;       // [lanes]: of the gradient of a logit z that which multiplies exp(z - lse)
  float* uniform = nullptr;       // [lanes]
  float* onehot = nullptr;        // [lanes]
  float* factor = nullptr;  // [lanes]: from exp(z - shift(top)), or from what GradLogits stores, to the gradient of the
                            // logits, but for the target's `onehot`
  float* grad_x = nullptr;  // [tokens][hidden], or null
  float* grad_weight = nullptr;  // [vocabulary][hidden], or null
  bool first = true;             // grad_weight is still uninitialised memory

  int64_t chunks() const { return (vocabulary + kChunk - 1) / kChunk; }
  int64_t begin(int64_t chunk) const { return chunk * kChunk; }
  int64_t end(int64_t chunk) const { return std::min(vocabulary, (chunk + 1) * kChunk); }
  int64_t rows(int64_t chunk) const { return end(chunk) - begin(chunk); }
  float* stored(int64_t chunk) const { return store + begin(chunk) * store_row; }
  int64_t wide() const { return (hidden + kMostRows - 1) / kMostRows * kMostRows; }
  // Of a chunk: exponentials, and for label smoothing logits, relative to the same base.
  int64_t sums() const { return options.label_smoothing > 0.0 ? 2 : 1; }
  // The gradient of the logits is exp(z) times a factor of the token, but for the target's: the weight can meet the
  // exponentials at once, while its rows and they are in the cache, and the factor, known after the last chunk, is for
  // [tokens, hidden] numbers instead of [tokens, vocabulary].
  bool proportional() const { return !(options.softcap > 0.0) && !(options.label_smoothing > 0.0); }
};

template <int N>
using Memory = typename simd::Lanes<N>::FloatMemory;

template <int N>
ASTRO_INLINE Memory<N>& lanes_at(float* p) {
  return *reinterpret_cast<Memory<N>*>(p);
}
template <int N>
ASTRO_INLINE const Memory<N>& lanes_at(const float* p) {
  return *reinterpret_cast<const Memory<N>*>(p);
}

// to[k][0 .. Width) = from[k][0 .. Width). In vectors: the memcpy of `copy_panel` per row would take a fifth of the
// time of the products with 48 columns.
template <Level L, int64_t Width>
ASTRO_INLINE void copy_rows(const float* from, int64_t from_stride, int64_t rows, float* to, int64_t to_stride) {
  constexpr int N = Blocking<L>::N;
  for (int64_t k = 0; k < rows; ++k)
    for (int64_t n = 0; n < Width; n += N)
      lanes_at<N>(to + k * to_stride + n) = lanes_at<N>(from + k * from_stride + n);
}

// x transposed, for the logits. Lanes past the tokens are zero.
struct PackColumns {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b) {
    constexpr int P = Blocking<L>::P;
    for (int64_t panel = 0; panel < b.lanes; panel += P)
      for (int64_t h = 0; h < b.hidden; ++h) {
        float* to = b.packed_x + panel * b.hidden + h * P;
        for (int64_t t = panel; t < panel + P; ++t) to[t - panel] = t < b.tokens ? b.x[t * b.hidden + h] : 0.0f;
      }
  }
};

// Rows of x in panels of columns, times `factor`; exactly 0 for an ignored token, whatever it holds.
struct PackRows {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b) {
    constexpr int P = Blocking<L>::P;
    for (int64_t h = 0; h < b.hidden; h += P) {
      const int64_t width = std::min<int64_t>(P, b.hidden - h);
      for (int64_t t = 0; t < b.lanes; ++t) {
        float* to = b.packed_x + h * b.lanes + t * P;
        const bool kept = b.kept[t] != 0.0f;
        for (int64_t j = 0; j < P; ++j) to[j] = kept && j < width ? b.x[t * b.hidden + h + j] * b.factor[t] : 0.0f;
      }
    }
  }
};

// One vocabulary chunk: logits, capped, their maximum per token, and the logits of the targets. `ahead`: chunks to the
// one that this thread takes next.
struct Logits {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, int64_t chunk, int64_t ahead) {
    constexpr int N = Blocking<L>::N, R = Blocking<L>::R, P = Blocking<L>::P;
    const int64_t first = b.begin(chunk), rows = b.rows(chunk), panels = b.lanes / P;
    const int64_t coming = std::min(b.begin(chunk + ahead), b.vocabulary),
                  calls = (rows + R - 1) / R * ((b.hidden + kDepth - 1) / kDepth) * panels;
    const int64_t floats =
        kChunk * b.hidden > kNear ? 0 : (std::min(coming + kChunk, b.vocabulary) - coming) * b.hidden;
    int64_t call = 0;
    for (int64_t h = 0; h < b.hidden; h += kDepth)
      for (int64_t turn = 0; turn < panels; turn += kTurns)
        for (int64_t v = 0; v < rows; v += R) {
          const int64_t stop = std::min(turn + kTurns, panels), live = std::min<int64_t>(R, rows - v),
                        depth = std::min(kDepth, b.hidden - h);
          alignas(64) float copy[R * (kDepth + kGap)];
          const float* weight = b.weight + (first + v) * b.hidden + h;
          int64_t stride = b.hidden;
          if (live < R ||
              b.hidden % 1024 == 0) {  // 4 KB apart, R rows would share the same few lines of the first-level cache
            copy_panel(weight, b.hidden, live, depth, kDepth + kGap, copy);
            if (live < R) std::memset(copy + live * (kDepth + kGap), 0, (R - live) * (kDepth + kGap) * sizeof(float));
            weight = copy;
            stride = kDepth + kGap;
          }
          for (int64_t panel = turn; panel < stop; ++panel, ++call) {
            const float* x = b.packed_x + (panel * b.hidden + h) * P;
            float* z = b.stored(chunk) + (panel * rows + v) * P;
            const Ahead next = Ahead::share(b.weight + coming * b.hidden, floats, call, calls);
            if (live < R) last_rows<L>(weight, x, depth, live, h > 0, z);
            else if (h == 0) multiply<L, false>(weight, stride, 1, x, P, depth, z, P, next);
            else multiply<L, true>(weight, stride, 1, x, P, depth, z, P, next);
          }
        }
    for (int64_t t = 0; t < b.lanes; t += N) highest<L>(b, chunk, t);
    for (int64_t t = 0; t < b.tokens; ++t)
      if (b.target[t] >= first && b.target[t] < first + rows)
        b.target_logit[t] = b.stored(chunk)[(t / P * rows + b.target[t] - first) * P + t % P];
  }

  template <Level L>
  static ASTRO_INLINE void last_rows(const float* weight, const float* x, int64_t depth, int64_t live, bool add,
                                     float* z) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    alignas(64) float sums[R * P];
    multiply<L, false>(weight, kDepth + kGap, 1, x, P, depth, sums, P);
    for (int64_t i = 0; i < live * P; ++i) z[i] = sums[i] + (add ? z[i] : 0.0f);
  }

  template <Level L>
  static ASTRO_INLINE void highest(const Block& b, int64_t chunk, int64_t t) {
    constexpr int N = Blocking<L>::N, P = Blocking<L>::P;
    const float softcap = static_cast<float>(b.options.softcap);
    simd::F<N> maximum = simd::F<N>{} + kLowest;
    float* column = b.stored(chunk) + t / P * b.rows(chunk) * P + t % P;
    for (int64_t v = 0; v < b.rows(chunk); ++v) {
      auto& z = lanes_at<N>(column + v * P);
      if (softcap > 0.0f) z = capped<N>(z, softcap);
      maximum = z > maximum ? z : maximum;
    }
    lanes_at<N>(b.base + chunk * b.lanes + t) = maximum;
  }
};

// One vocabulary chunk, after `follow`: its sum of exponentials per token, and of logits behind it if they count;
// `proportional`: the exponentials in place.
struct Exponentials {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, int64_t chunk, float* sums) {
    for (int64_t t = 0; t < b.lanes; t += Blocking<L>::N) {
      if (b.proportional()) add<L, true>(b, chunk, t, sums);
      else add<L, false>(b, chunk, t, sums);
    }
  }

  template <Level L, bool InPlace>
  static ASTRO_INLINE void add(const Block& b, int64_t chunk, int64_t t, float* sums) {
    constexpr int N = Blocking<L>::N, P = Blocking<L>::P;
    const simd::F<N> base = shift<simd::F<N>>(lanes_at<N>(b.base + chunk * b.lanes + t)),
                     kept = lanes_at<N>(b.kept + t);
    simd::F<N> sum_exp{}, total{};
    float* column = b.stored(chunk) + t / P * b.rows(chunk) * P + t % P;
    for (int64_t v = 0; v < b.rows(chunk); ++v) {
      auto& p = lanes_at<N>(column + v * P);
      const simd::F<N> z = p, e = exp_below(z - base);
      sum_exp += e;
      if constexpr (InPlace) p = kept == 0.0f ? simd::F<N>{} : e;
      else total += z - base;
    }
    lanes_at<N>(sums + t) = sum_exp;
    if (b.sums() == 2) lanes_at<N>(sums + b.lanes + t) = total;
  }
};

// exp(shift(from) - shift(to)) for a base that rises from `from` to `to`. While it is -Inf the sums are 0.
ASTRO_INLINE float fall(float from, float to) { return from == to || from == kLowest ? 1.0f : std::exp(from - to); }

// The same for the lanes of a panel; whether one of them is not 1.
ASTRO_INLINE bool falls(const float* from, const float* to, int64_t lanes, float* factor) {
  bool any = false;
  for (int64_t t = 0; t < lanes; ++t) any |= (factor[t] = fall(from[t], to[t])) != 1.0f;
  return any;
}

// `product` += what is stored times the weight, for chunks [first, last) of a segment in order and hidden columns
// [begin, end), multiples of kMostRows. Tokens are the lanes: a panel of exponentials (18 KB) stays in the first-level
// cache while columns of the weight pass as factors.
struct TimesWeight {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, const Segment& s, int64_t first, int64_t last, int64_t begin,
                               int64_t end) {
    alignas(64) float copy[kChunk * kStrip];
    const int64_t columns = std::min(end, b.hidden);
    const bool near = kChunk * b.hidden <= kNear;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      if (b.proportional() && chunk > s.first) raise<L>(b, s, chunk, begin, columns);
      for (int64_t h = begin; h < columns; h += kStrip) {
        const float* weight = b.weight + b.begin(chunk) * b.hidden + h;
        const Factors factors{weight, b.hidden, std::min(kStrip, columns - h)};
        if (near && factors.columns == kStrip) {
          times<L>(b, s, chunk, h, factors, 0);
          continue;
        }
        if (factors.columns == kStrip) copy_rows<L, kStrip>(weight, b.hidden, b.rows(chunk), copy, kStrip);
        else
          copy_panel(weight, b.hidden, b.rows(chunk), factors.columns, kStrip, copy);  // with zeros behind the columns
        times<L>(b, s, chunk, h, {copy, kStrip, factors.columns}, h + kStrip < columns ? b.rows(chunk) : 0);
      }
    }
  }

  struct Factors {
    const float* first;
    int64_t stride, columns;
  };

  // `coming` rows of the next strip are asked for.
  template <Level L>
  static ASTRO_INLINE void times(const Block& b, const Segment& s, int64_t chunk, int64_t h, const Factors& factors,
                                 int64_t coming) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    const int64_t depth = b.rows(chunk), panels = b.lanes / P, groups = (factors.columns + R - 1) / R;
    const float* next = b.weight + b.begin(chunk) * b.hidden + h + kStrip;
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t group = 0; group < groups; ++group) {
        const float* lanes = b.stored(chunk) + panel * depth * P;
        float* out = s.product + (panel * b.wide() + h + group * R) * P;
        const auto ahead = RowsAhead<kStrip>::share(next, coming, b.hidden, panel * groups + group, panels * groups);
        if (chunk > s.first)
          multiply<L, true>(factors.first + group * R, 1, factors.stride, lanes, P, depth, out, P, ahead);
        else multiply<L, false>(factors.first + group * R, 1, factors.stride, lanes, P, depth, out, P, ahead);
      }
  }

  // Hidden columns [begin, end) of what the chunks before have summed, relative to the base of this one.
  template <Level L>
  static ASTRO_INLINE void raise(const Block& b, const Segment& s, int64_t chunk, int64_t begin, int64_t end) {
    constexpr int N = Blocking<L>::N, P = Blocking<L>::P;
    for (int64_t t = 0; t < b.lanes; t += P) {
      alignas(64) float factor[P];
      if (!falls(b.base + (chunk - 1) * b.lanes + t, b.base + chunk * b.lanes + t, P, factor)) continue;
      for (int64_t h = begin; h < end; ++h)
        for (int n = 0; n < P; n += N) {
          auto& sum = lanes_at<N>(s.product + t * b.wide() + h * P + n);
          sum = sum * lanes_at<N>(factor + n);
        }
    }
  }
};

}  // namespace astrobiogen::linear_cross_entropy
