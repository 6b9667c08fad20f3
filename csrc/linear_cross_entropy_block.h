// The tasks of the fused loss on one block of tokens; linear_cross_entropy_gradients.cpp puts them together.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "linear_cross_entropy.h"
#include "linear_cross_entropy_gemm.h"

namespace astrobiogen::linear_cross_entropy {

// Vocabulary rows per task: a multiple of every R. At hidden size 512 the rows are 295 KB: those that the product after the logits finds in the second-level
// cache, and the next ones on their way to it, leave room for the sums in 1 MB.
constexpr int64_t kChunk = 144;
constexpr int64_t kMostRows = 12;  // the largest R
// Depth of one walk over hidden columns for the logits: a panel of x is 64 KB.
constexpr int64_t kDepth = 512;
// Groups of R vocabulary rows of the weight's gradient that take turns on a panel of x: 48 rows of 512 columns are 98 KB.
constexpr int64_t kTurns = 4;
// Hidden columns of the weight that are taken together for the gradient of x: a multiple of every R and of a line of memory; 144 rows are 28 KB.
constexpr int64_t kStrip = 48;
// Rows of weight, in floats, that stay in the second-level cache between two products: 1 MB.
constexpr int64_t kNear = 1 << 18;
// Lanes are rounded up to it: a multiple of both panel widths.
constexpr int64_t kPanel = 32;
constexpr int64_t kMostLanes = 288;

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// Exponentials are taken relative to a logit at most this much below the largest so far, and so are at most e^8 = 2981. One that follows every new largest
// logit would move in most chunks for one of 96 tokens, and each move is another pass over the sums.
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
  float* product;       // [lanes / P][hidden rounded up to kMostRows][P]: what stands in `logits` times the weight, transposed; or null
  float* factor;        // [lanes]: of `product` in the gradient of x
};

struct Block {
  const float *x, *weight;
  const int64_t* target;
  int64_t hidden, vocabulary, tokens;  // live tokens of this block
  int64_t lanes;                       // tokens rounded up to kPanel; the stride of a row of logits
  Options options;
  float* logits;        // [vocabulary rounded up to kMostRows][lanes]; then exp(logit - shift(base)), or the slopes
  float* packed_x;      // [lanes / P][hidden][P], x transposed; then [hidden / P][lanes][P], its rows times `factor`
  float* base;          // [chunks][lanes]: largest logit of the chunk; after `follow`, what its exponentials are relative to
  float* top;           // [lanes]: the largest base
  float* target_logit;  // [lanes]
  float* kept;          // [lanes]: 1, or 0 for an ignored token and a padded lane
  float* lse;           // [lanes]
  float* softmax;       // [lanes]: of the gradient of a logit z that which multiplies exp(z - lse)
  float* uniform;       // [lanes]
  float* onehot;        // [lanes]
  float* factor;        // [lanes]: from exp(z - shift(top)), or the slopes, to the gradient of the logits, but for the target's `onehot`
  float* grad_x;        // [tokens][hidden], or null
  float* grad_weight;   // [vocabulary][hidden], or null
  bool first;           // grad_weight is still uninitialised memory

  int64_t chunks() const { return (vocabulary + kChunk - 1) / kChunk; }
  int64_t begin(int64_t chunk) const { return chunk * kChunk; }
  int64_t end(int64_t chunk) const { return std::min(vocabulary, (chunk + 1) * kChunk); }
  int64_t wide() const { return (hidden + kMostRows - 1) / kMostRows * kMostRows; }
  int64_t sums() const { return options.label_smoothing > 0.0 ? 2 : 1; }  // of a chunk: exponentials, and for label smoothing logits
  // The gradient of the logits is exp(z) times a factor of the token, but for the target's: the weight can meet the exponentials at once, while its rows
  // and they are in the cache, and the factor, known after the last chunk, is for [tokens, hidden] numbers instead of [tokens, vocabulary].
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

// x transposed, for the logits. Lanes past the tokens are zero.
struct PackColumns {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b) {
    constexpr int P = Blocking<L>::P;
    for (int64_t t = 0; t < b.lanes; ++t) {
      float* to = b.packed_x + t / P * b.hidden * P + t % P;
      if (t < b.tokens)
        for (int64_t h = 0; h < b.hidden; ++h) to[h * P] = b.x[t * b.hidden + h];
      else
        for (int64_t h = 0; h < b.hidden; ++h) to[h * P] = 0.0f;
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

// One vocabulary chunk: logits, capped, their maximum per token, and the logits of the targets.
struct Logits {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, int64_t chunk) {
    constexpr int N = Blocking<L>::N, R = Blocking<L>::R, P = Blocking<L>::P;
    const int64_t first = b.begin(chunk), end = b.end(chunk), panels = b.lanes / P;
    alignas(64) float copy[R * (kDepth + 16)];
    for (int64_t v = first; v < end; v += R) {
      const int64_t live = std::min<int64_t>(R, end - v);
      for (int64_t h = 0; h < b.hidden; h += kDepth) {
        const int64_t depth = std::min(kDepth, b.hidden - h);
        const float* rows = b.weight + v * b.hidden + h;
        int64_t stride = b.hidden;
        if (live < R || b.hidden % 1024 == 0) {  // 4 KB apart, R rows would share the same few lines of the first-level cache
          copy_panel(rows, b.hidden, live, depth, kDepth + 16, copy);
          if (live < R) std::memset(copy + live * (kDepth + 16), 0, (R - live) * (kDepth + 16) * sizeof(float));
          rows = copy;
          stride = kDepth + 16;
        }
        for (int64_t panel = 0; panel < panels; ++panel) {
          const float* x = b.packed_x + (panel * b.hidden + h) * P;
          float* z = b.logits + v * b.lanes + panel * P;
          if (h == 0) multiply<L, false>(rows, stride, 1, x, P, depth, z, b.lanes);
          else multiply<L, true>(rows, stride, 1, x, P, depth, z, b.lanes);
        }
      }
    }
    for (int64_t t = 0; t < b.lanes; t += N) highest<N>(b, chunk, t);
    for (int64_t t = 0; t < b.tokens; ++t)
      if (b.target[t] >= first && b.target[t] < end) b.target_logit[t] = b.logits[b.target[t] * b.lanes + t];
  }

  template <int N>
  static ASTRO_INLINE void highest(const Block& b, int64_t chunk, int64_t t) {
    const float softcap = static_cast<float>(b.options.softcap);
    simd::F<N> maximum = simd::F<N>{} + kLowest;
    for (int64_t v = b.begin(chunk); v < b.end(chunk); ++v) {
      auto& z = lanes_at<N>(b.logits + v * b.lanes + t);
      if (softcap > 0.0f) z = capped<N>(z, softcap);
      maximum = z > maximum ? z : maximum;
    }
    lanes_at<N>(b.base + chunk * b.lanes + t) = maximum;
  }
};

// One vocabulary chunk, after `follow`: its sum of exponentials per token, and of logits behind it if they count; `proportional`: the exponentials in place.
struct Exponentials {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, int64_t chunk, float* sums) {
    constexpr int N = Blocking<L>::N;
    for (int64_t t = 0; t < b.lanes; t += N) {
      if (b.proportional()) add<N, true>(b, chunk, t, sums);
      else add<N, false>(b, chunk, t, sums);
    }
  }

  template <int N, bool InPlace>
  static ASTRO_INLINE void add(const Block& b, int64_t chunk, int64_t t, float* sums) {
    const simd::F<N> base = shift<simd::F<N>>(lanes_at<N>(b.base + chunk * b.lanes + t)), kept = lanes_at<N>(b.kept + t);
    simd::F<N> sum_exp{}, total{};
    for (int64_t v = b.begin(chunk); v < b.end(chunk); ++v) {
      auto& p = lanes_at<N>(b.logits + v * b.lanes + t);
      const simd::F<N> z = p, e = exp_below(z - base);
      sum_exp += e;
      if constexpr (InPlace) p = kept == 0.0f ? simd::F<N>{} : e;
      else total += z;
    }
    lanes_at<N>(sums + t) = sum_exp;
    if (b.sums() == 2) lanes_at<N>(sums + b.lanes + t) = total;
  }
};

// exp(shift(from) - shift(to)) per lane for bases that rise from `from` to `to`; whether one of them is not 1.
ASTRO_INLINE bool falls(const float* from, const float* to, int64_t lanes, float* factor) {
  bool any = false;
  for (int64_t t = 0; t < lanes; ++t) {
    factor[t] = from[t] == to[t] || from[t] == kLowest ? 1.0f : std::exp(from[t] - to[t]);  // from -Inf on: the sums are still 0
    any |= factor[t] != 1.0f;
  }
  return any;
}

// `product` += what stands in `logits` times the weight, for chunks [first, last) of a segment in order and hidden columns [begin, end), multiples of
// kMostRows. Tokens are the lanes: a panel of exponentials (18 KB) stays in the first-level cache while columns of the weight pass as factors.
struct TimesWeight {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, const Segment& s, int64_t first, int64_t last, int64_t begin, int64_t end) {
    alignas(64) float copy[kChunk * kStrip];
    const int64_t columns = std::min(end, b.hidden), strips = (b.hidden + kStrip - 1) / kStrip;
    const bool near = kChunk * b.hidden <= kNear;
    for (int64_t chunk = first; chunk < last; ++chunk) {
      if (b.proportional() && chunk > s.first) raise<L>(b, s, chunk, begin, columns);
      const int64_t v = b.begin(chunk), depth = b.end(chunk) - v, coming = b.begin(chunk + last - first);
      const int64_t floats = std::clamp<int64_t>(b.vocabulary - coming, 0, depth) * b.hidden;  // the rows of the next call
      for (int64_t h = begin; h < columns; h += kStrip) {
        const int64_t width = std::min(kStrip, columns - h);
        Factors factors{b.weight + v * b.hidden + h, b.hidden, width};
        if (near && width == kStrip) {
          times<L>(b, s, chunk, h, factors, [&](int64_t call, int64_t calls) ASTRO_LAMBDA_INLINE {
            return Ahead::share(b.weight + coming * b.hidden, floats, h / kStrip * calls + call, strips * calls);
          });
          continue;
        }
        copy_strip<L>(factors, depth, copy);
        const float* next = b.weight + v * b.hidden + h + kStrip;
        const int64_t rows = h + kStrip < columns ? depth : 0;
        times<L>(b, s, chunk, h, {copy, kStrip, width}, [&](int64_t call, int64_t calls) ASTRO_LAMBDA_INLINE {
          return RowsAhead<kStrip>::share(next, rows, b.hidden, call, calls);
        });
      }
    }
  }

  struct Factors {
    const float* first;
    int64_t stride, columns;
  };

  template <Level L, class Share>
  static ASTRO_INLINE void times(const Block& b, const Segment& s, int64_t chunk, int64_t h, const Factors& factors, const Share& share) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    const int64_t depth = b.end(chunk) - b.begin(chunk), panels = b.lanes / P, groups = (factors.columns + R - 1) / R;
    for (int64_t panel = 0; panel < panels; ++panel)
      for (int64_t group = 0; group < groups; ++group) {
        const float* lanes = b.logits + b.begin(chunk) * b.lanes + panel * P;
        float* out = s.product + (panel * b.wide() + h + group * R) * P;
        const auto ahead = share(panel * groups + group, panels * groups);
        if (chunk > s.first) multiply<L, true>(factors.first + group * R, 1, factors.stride, lanes, b.lanes, depth, out, P, ahead);
        else multiply<L, false>(factors.first + group * R, 1, factors.stride, lanes, b.lanes, depth, out, P, ahead);
      }
  }

  // To [rows][kStrip], with zeros behind the columns.
  template <Level L>
  static ASTRO_INLINE void copy_strip(const Factors& from, int64_t rows, float* to) {
    constexpr int N = Blocking<L>::N;
    if (from.columns < kStrip) return copy_panel(from.first, from.stride, rows, from.columns, kStrip, to);
    for (int64_t k = 0; k < rows; ++k)  // in vectors: 144 calls of memcpy would take a fifth of the time of the strip's products
      for (int64_t n = 0; n < kStrip; n += N) lanes_at<N>(to + k * kStrip + n) = lanes_at<N>(from.first + k * from.stride + n);
  }

  // Hidden columns [begin, end) of what the chunks before have summed, relative to the base of this one.
  template <Level L>
  static ASTRO_INLINE void raise(const Block& b, const Segment& s, int64_t chunk, int64_t begin, int64_t end) {
    constexpr int N = Blocking<L>::N, P = Blocking<L>::P;
    alignas(64) float factor[kMostLanes];
    if (!falls(b.base + (chunk - 1) * b.lanes, b.base + chunk * b.lanes, b.lanes, factor)) return;
    for (int64_t t = 0; t < b.lanes; t += N)
      for (int64_t h = begin; h < end; ++h) {
        auto& sum = lanes_at<N>(s.product + (t / P * b.wide() + h) * P + t % P);
        sum = sum * lanes_at<N>(factor + t);
      }
  }
};

// One vocabulary chunk, when lse is known: what stands in `logits` becomes the gradient of the logits, but for `factor` and the target's `onehot`.
struct Slopes {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, int64_t chunk) {
    constexpr int N = Blocking<L>::N;
    alignas(64) float factor[kMostLanes];
    const bool proportional = b.proportional();
    if (proportional && !falls(b.base + chunk * b.lanes, b.top, b.lanes, factor)) return;
    const float softcap = static_cast<float>(b.options.softcap);
    for (int64_t v = b.begin(chunk); v < b.end(chunk); ++v)
      for (int64_t t = 0; t < b.lanes; t += N) {
        auto& p = lanes_at<N>(b.logits + v * b.lanes + t);
        if (proportional) p = p * lanes_at<N>(factor + t);
        else p = slope<N>(b, t, p, softcap);
      }
  }

  // Exactly 0 for an ignored token, whatever its logits are.
  template <int N>
  static ASTRO_INLINE simd::F<N> slope(const Block& b, int64_t t, simd::F<N> z, float softcap) {
    simd::F<N> slope = exp_below(z - lanes_at<N>(b.lse + t)) * lanes_at<N>(b.softmax + t) - lanes_at<N>(b.uniform + t);
    if (softcap > 0.0f) slope *= 1.0f - (z / softcap) * (z / softcap);
    return lanes_at<N>(b.kept + t) == 0.0f ? simd::F<N>{} : slope;
  }
};

// The rows of the weight's gradient of one vocabulary chunk, after Slopes.
struct GradientWeight {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, int64_t chunk) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    const int64_t first = b.begin(chunk), end = b.end(chunk), panels = (b.hidden + P - 1) / P;
    for (int64_t start = first; start < end; start += kTurns * R) {
      const int64_t stop = std::min(start + kTurns * R, end), calls = panels * kTurns;
      const int64_t floats = std::clamp<int64_t>(b.vocabulary - stop, 0, kTurns * R) * b.hidden;  // the rows of the next turns
      int64_t call = 0;
      for (int64_t h = 0; h < b.hidden; h += P)
        for (int64_t v = start; v < stop; v += R, ++call)
          tile<L>(b, v, std::min<int64_t>(R, end - v), h, Ahead::share(b.grad_weight + stop * b.hidden, floats, call, calls));
    }
    for (int64_t t = 0; t < b.tokens; ++t)
      if (b.kept[t] != 0.0f && b.target[t] >= first && b.target[t] < end)
        for (int64_t h = 0; h < b.hidden; ++h) b.grad_weight[b.target[t] * b.hidden + h] -= b.onehot[t] * b.x[t * b.hidden + h];
  }

  template <Level L>
  static ASTRO_INLINE void tile(const Block& b, int64_t v, int64_t live, int64_t h, const Ahead& ahead) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    const float *slope = b.logits + v * b.lanes, *x = b.packed_x + h * b.lanes;
    float* out = b.grad_weight + v * b.hidden + h;
    const int64_t columns = std::min<int64_t>(P, b.hidden - h);
    if (live == R && columns == P) {
      if (b.first) multiply<L, false>(slope, b.lanes, 1, x, P, b.tokens, out, b.hidden, ahead);
      else multiply<L, true>(slope, b.lanes, 1, x, P, b.tokens, out, b.hidden, ahead);
      return;
    }
    alignas(64) float sums[R * P];
    multiply<L, false>(slope, b.lanes, 1, x, P, b.tokens, sums, P);
    for (int64_t r = 0; r < live; ++r)
      for (int64_t j = 0; j < columns; ++j) out[r * b.hidden + j] = sums[r * P + j] + (b.first ? 0.0f : out[r * b.hidden + j]);
  }
};

// The gradient of x of tokens [begin, end) from the segments' products.
struct GradientX {
  template <Level L>
  static ASTRO_INLINE void run(const Block& b, const std::vector<Segment>& segments, int64_t begin, int64_t end) {
    constexpr int64_t P = Blocking<L>::P, kColumns = 16;  // a line of the gradient at a time, so that the lines of `product` serve all their lanes
    for (int64_t h = 0; h < b.hidden; h += kColumns)
      for (int64_t t = begin; t < end; ++t) {
        const int64_t columns = std::min(kColumns, b.hidden - h);
        float* out = b.grad_x + t * b.hidden + h;
        if (b.kept[t] == 0.0f) {
          std::fill(out, out + columns, 0.0f);
          continue;
        }
        const float* row = b.weight + b.target[t] * b.hidden + h;
        for (int64_t j = 0; j < columns; ++j) out[j] = -b.onehot[t] * row[j];
        for (const Segment& s : segments) {
          const float* sums = s.product + (t / P * b.wide() + h) * P + t % P;
          for (int64_t j = 0; j < columns; ++j) out[j] += sums[j * P] * s.factor[t];
        }
      }
  }
};

}  // namespace astrobiogen::linear_cross_entropy
