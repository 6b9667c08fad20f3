// Attention along edges, four heads of 8 or 16 columns at a time: the four scores of an edge are one vector, so that
// maxima, exponentials and slopes are vector operations, and the sums over a node's edges stay in registers: less than
// half the time of one head at a time.
#pragma once

#include "edge_attention/edge_attention.h"

namespace astrobiogen::edge_attention {

using f32x4 = simd::F<4>;

constexpr int64_t kHeads = 4;
// Rows are asked for this many edges ahead: they lie anywhere in some MB, and a node has 4.5 edges.
constexpr int64_t kAhead = 6;

ASTRO_INLINE f32x4 load4(const float* p) { return simd::load_as<f32x4>(p); }
ASTRO_INLINE void store4(float* p, f32x4 v) { simd::store_as(p, v); }
template <typename T>
ASTRO_INLINE f32x4 load4(const T* p) {
  return f32x4{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])};
}
template <typename T>
ASTRO_INLINE void store4(T* p, f32x4 v) {
  for (int h = 0; h < kHeads; ++h) p[h] = static_cast<T>(v[h]);
}

// One vector per eight columns of four heads.
template <int64_t W>
struct Four {
  static constexpr int V = W / 8;
  simd::f32x8 part[kHeads][V];

  template <typename T>
  static ASTRO_INLINE Four load(const T* p, float factor) {
    Four row;
    for (int h = 0; h < kHeads; ++h)
      for (int v = 0; v < V; ++v) row.part[h][v] = simd::load8(p + h * W + v * 8) * factor;
    return row;
  }

  template <typename T>
  ASTRO_INLINE f32x4 dots(const T* p) const {
    simd::f32x8 s[kHeads];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      s[h] = part[h][0] * simd::load8(p + h * W);
#pragma GCC unroll 4
      for (int v = 1; v < V; ++v) s[h] += part[h][v] * simd::load8(p + h * W + v * 8);
    }
    const simd::f32x8 low = __builtin_shufflevector(s[0], s[1], 0, 8, 2, 10, 4, 12, 6, 14) +
                            __builtin_shufflevector(s[0], s[1], 1, 9, 3, 11, 5, 13, 7, 15);
    const simd::f32x8 high = __builtin_shufflevector(s[2], s[3], 0, 8, 2, 10, 4, 12, 6, 14) +
                             __builtin_shufflevector(s[2], s[3], 1, 9, 3, 11, 5, 13, 7, 15);
    const simd::f32x8 both = __builtin_shufflevector(low, high, 0, 1, 8, 9, 4, 5, 12, 13) +
                             __builtin_shufflevector(low, high, 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(both, both, 0, 1, 2, 3) + __builtin_shufflevector(both, both, 4, 5, 6, 7);
  }

  // += factor[h] * row of p
  template <typename T>
  ASTRO_INLINE void add(f32x4 factor, const T* p) {
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) part[h][v] += simd::load8(p + h * W + v * 8) * factor[h];
  }

  // As above, without the heads whose weight is 0 if `cut`.
  template <typename T>
  ASTRO_INLINE void add(f32x4 factor, const T* p, bool cut, f32x4 weight) {
    if (!cut) return add(factor, p);
    for (int h = 0; h < kHeads; ++h)
      for (int v = 0; v < V; ++v)
        if (weight[h] != 0.0f) part[h][v] += simd::load8(p + h * W + v * 8) * factor[h];
  }

  template <typename T>
  ASTRO_INLINE void store(T* p, f32x4 factor) const {
    for (int h = 0; h < kHeads; ++h)
      for (int v = 0; v < V; ++v) simd::store8(p + h * W + v * 8, part[h][v] * factor[h]);
  }
};

template <typename T>
ASTRO_INLINE void prefetch_row(const T* row, int64_t columns) {
  for (int64_t j = 0; j < columns; j += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + j);
}

// One head at a time, for nodes with edges that are cut (edge_attention/edge_attention.cpp).
template <typename T>
void forward_cut(const Forward<T>& a, int64_t node);
template <typename T>
void backward_cut(const Backward<T>& a, int64_t node);

ASTRO_INLINE bool any_cut(f32x4 least) {
  const float lowest = -std::numeric_limits<float>::infinity();
  return least[0] == lowest || least[1] == lowest || least[2] == lowest || least[3] == lowest;
}

template <typename T, int64_t W>
ASTRO_INLINE void forward_fours(const Forward<T>& a, int64_t first, int64_t last) {
  const Problem<T>& in = a.in;
  const int64_t heads = in.heads, columns = in.columns(), edges_in_all = in.lists.receiver_start[in.receivers];
  std::vector<float> scores;
  for (int64_t node = first; node < last; ++node) {
    const int64_t begin = in.lists.receiver_start[node], count = in.lists.receiver_start[node + 1] - begin;
    const int64_t* edges = in.lists.by_receiver + begin;
    reserve(scores, count * kHeads);
    for (int64_t g = 0; g < heads; g += kHeads) {
      const auto query = Four<W>::load(in.q[node] + g * W, in.scale);
      f32x4 highest = f32x4{} - std::numeric_limits<float>::infinity(), total = {}, least = {};
      for (int64_t e = 0; e < count; ++e) {
        if (g == 0 && begin + e + kAhead < edges_in_all) {
          const int64_t soon = in.lists.sender[edges[e + kAhead]];
          prefetch_row(in.k[soon], columns), prefetch_row(in.v[soon], columns);
        }
        const f32x4 bias = load4(in.bias + edges[e] * heads + g);
        const f32x4 score = query.dots(in.k[in.lists.sender[edges[e]]] + g * W) + bias;
        least = bias < least ? bias : least;
        store4(scores.data() + e * kHeads, score);
        highest = (score > highest) | (score != score) ? score : highest;  // NaN stays
      }
      if (any_cut(least)) {
        forward_cut<T>(a, node);
        break;
      }
      const simd::f32x8 twice = __builtin_shufflevector(highest, highest, 0, 1, 2, 3, 0, 1, 2, 3);
      for (int64_t j = 0; j < count * kHeads; j += 8) {
        const simd::f32x8 x = simd::load8(scores.data() + j) - twice;
        simd::store8(scores.data() + j, simd::exp_nonpositive(x > 0.0f ? simd::splat8(0.0f) : x));
      }
      Four<W> sums = {};
      for (int64_t e = 0; e < count; ++e) {
        const f32x4 weight = load4(scores.data() + e * kHeads);
        total += weight;
        sums.add(weight, in.v[in.lists.sender[edges[e]]] + g * W);
      }
      sums.store(a.out + node * columns + g * W, count == 0 ? f32x4{} : 1.0f / total);
      for (int h = 0; h < kHeads; ++h)
        a.lse[node * heads + g + h] =
            count == 0 ? -std::numeric_limits<float>::infinity() : highest[h] + std::log(total[h]);
    }
  }
}

// dq, dbias, and p and ds for the senders.
template <typename T, int64_t W>
ASTRO_INLINE void backward_receiver_fours(const Backward<T>& a, int64_t first, int64_t last) {
  const Problem<T>& in = a.in;
  const int64_t heads = in.heads, columns = in.columns(), edges_in_all = in.lists.receiver_start[in.receivers];
  std::vector<float> weights, slopes;
  for (int64_t node = first; node < last; ++node) {
    const int64_t begin = in.lists.receiver_start[node], count = in.lists.receiver_start[node + 1] - begin;
    const int64_t* edges = in.lists.by_receiver + begin;
    reserve(weights, count * kHeads), reserve(slopes, count * kHeads);
    for (int64_t g = 0; g < heads; g += kHeads) {
      const auto query = Four<W>::load(in.q[node] + g * W, in.scale), grad = Four<W>::load(a.grad[node] + g * W, 1.0f);
      const f32x4 lse = load4(a.lse + node * heads + g);
      f32x4 own = {}, total = {}, least = {};
      for (int64_t e = 0; e < count; ++e) {
        if (g == 0 && begin + e + kAhead < edges_in_all) {
          const int64_t soon = in.lists.sender[edges[e + kAhead]];
          prefetch_row(in.k[soon], columns), prefetch_row(in.v[soon], columns);
        }
        const int64_t from = in.lists.sender[edges[e]];
        const f32x4 bias = load4(in.bias + edges[e] * heads + g);
        least = bias < least ? bias : least;
        store4(weights.data() + e * kHeads, query.dots(in.k[from] + g * W) + bias - lse);
        store4(slopes.data() + e * kHeads, grad.dots(in.v[from] + g * W));
      }
      if (any_cut(least)) {
        backward_cut<T>(a, node);
        break;
      }
      exponentials(weights.data(), count * kHeads);
      for (int64_t e = 0; e < count; ++e) {  // g·out from its terms: out was rounded to T
        own += load4(weights.data() + e * kHeads) * load4(slopes.data() + e * kHeads);
        total += load4(weights.data() + e * kHeads);
      }
      const f32x4 rescale = total == 0.0f ? f32x4{} : 1.0f / total;  // they sum up to 1 but for the rounding of lse
      own *= rescale;
      f32x4 rest = {};  // of a sum that is 0: the rounding of `own` (edge_attention.cpp)
      for (int64_t e = 0; e < count; ++e)
        rest += load4(weights.data() + e * kHeads) * (load4(slopes.data() + e * kHeads) - own);
      own += rest * rescale;
      Four<W> sums = {};
      for (int64_t e = 0; e < count; ++e) {
        const f32x4 weight = load4(weights.data() + e * kHeads) * rescale,
                    slope = weight * (load4(slopes.data() + e * kHeads) - own);
        const int64_t at = edges[e] * heads + g;
        store4(a.weight + at, weight), store4(a.slope + at, slope), store4(a.grad_bias + at, slope);
        sums.add(slope, in.k[in.lists.sender[edges[e]]] + g * W);
      }
      sums.store(a.grad_q + node * columns + g * W, f32x4{} + in.scale);
    }
  }
}

template <typename T, int64_t W>
ASTRO_INLINE void backward_sender_fours(const Backward<T>& a, int64_t first, int64_t last) {
  const Problem<T>& in = a.in;
  const int64_t heads = in.heads, columns = in.columns(), edges_in_all = in.lists.sender_start[in.senders];
  const bool cut = a.cut->load(std::memory_order_relaxed);
  for (int64_t node = first; node < last; ++node) {
    for (int64_t g = 0; g < heads; g += kHeads) {
      Four<W> keys = {}, values = {};
      for (int64_t at = in.lists.sender_start[node]; at < in.lists.sender_start[node + 1]; ++at) {
        if (g == 0 && at + kAhead < edges_in_all) {
          const int64_t soon = in.lists.by_sender[at + kAhead], row = in.lists.receiver[soon];
          prefetch_row(in.q[row], columns), prefetch_row(a.grad[row], columns);
          __builtin_prefetch(a.slope + soon * heads), __builtin_prefetch(a.weight + soon * heads);
        }
        const int64_t edge = in.lists.by_sender[at], to = in.lists.receiver[edge];
        const f32x4 weight = load4(a.weight + edge * heads + g), slope = load4(a.slope + edge * heads + g);
        keys.add(slope, in.q[to] + g * W, cut, weight);
        values.add(weight, a.grad[to] + g * W, cut, weight);
      }
      keys.store(a.grad_k + node * columns + g * W, f32x4{} + in.scale);
      values.store(a.grad_v + node * columns + g * W, f32x4{} + 1.0f);
    }
  }
}

}  // namespace astrobiogen::edge_attention
