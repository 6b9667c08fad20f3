// Attention along the edges of a graph on the CPU, forward and backward. Formulas:
// astrobiogen/kernels/edge_attention/reference.py.
//
// A receiver's edges lie together in `by_receiver`, a sender's in `by_sender`: every sum is one loop in a fixed order,
// no atomics, the same bits for any thread count. Per edge the forward reads a row of k and of v (heads x D, from L2
// for a batch of metabolic networks: 8,256 x 32 fp32 are 1 MB), keeps its scores in L1 and writes nothing. The backward
// writes p and ds per edge and head (fp32) in the receivers' loop and reads them in the senders'.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

#include "edge_attention/edge_attention.h"
#include "edge_attention/checks.h"
#include "edge_attention/heads.h"
#include "edge_attention/row.h"

namespace astrobiogen::edge_attention {

using at::Tensor;

constexpr int64_t kGrain = 64;  // nodes per task: about 300 edges of a metabolic network, some 10 us

template <int64_t W>
using Width = std::integral_constant<int64_t, W>;

// Calls body with the heads' width as a constant where it is a usual one: loops over a narrow head cost more than its
// arithmetic.
template <typename Body>
ASTRO_INLINE void with_width(int64_t width, Body&& body) {
  if (width == 8) body(Width<8>{});
  else if (width == 16) body(Width<16>{});
  else if (width == 32) body(Width<32>{});
  else body(width);
}

template <typename T, typename W>
ASTRO_INLINE void forward_nodes(const Forward<T>& a, int64_t first, int64_t last, W width) {
  using A = Wide<T>;
  const Problem<T>& in = a.in;
  const int64_t heads = in.heads, columns = in.columns();
  const A lowest = -std::numeric_limits<A>::infinity();
  std::vector<A> query(columns), sums(columns), highest(heads), total(heads), scores;
  std::vector<uint8_t> blind(heads);
  for (int64_t node = first; node < last; ++node) {
    const int64_t begin = in.lists.receiver_start[node], count = in.lists.receiver_start[node + 1] - begin;
    const int64_t* edges = in.lists.by_receiver + begin;
    reserve(scores, count * heads);
    widen<T>(in.q[node], columns, in.scale, query.data());
    std::fill(highest.begin(), highest.end(), lowest);
    std::fill(total.begin(), total.end(), A(0));
    std::fill(sums.begin(), sums.end(), A(0));
    for (int64_t e = 0; e < count; ++e) {
      const T *key = in.k[in.lists.sender[edges[e]]], *bias = in.bias + edges[e] * heads;
      for (int64_t h = 0; h < heads; ++h) {
        const A product = dot(query.data() + h * width, key + h * width, width);
        const A score = cuts(bias[h]) ? lowest : product + static_cast<A>(bias[h]);
        scores[e * heads + h] = score;
        if (score > highest[h] || score != score) highest[h] = score;  // NaN stays
      }
    }
    for (int64_t h = 0; h < heads; ++h) blind[h] = highest[h] == lowest, highest[h] = blind[h] ? A(0) : highest[h];
    for (int64_t e = 0; e < count; ++e)
      for (int64_t h = 0; h < heads; ++h) scores[e * heads + h] -= highest[h];
    exponentials(scores.data(), count * heads);
    for (int64_t e = 0; e < count; ++e) {
      const T *value = in.v[in.lists.sender[edges[e]]], *bias = in.bias + edges[e] * heads;
      for (int64_t h = 0; h < heads; ++h) {
        if (blind[h] || cuts(bias[h])) continue;
        const A weight = scores[e * heads + h];
        total[h] += weight;
        add(sums.data() + h * width, weight, value + h * width, width);
      }
    }
    for (int64_t h = 0; h < heads; ++h) {
      const A inverse = blind[h] ? A(0) : A(1) / total[h];
      round_to<T>(sums.data() + h * width, width, inverse, a.out + node * columns + h * width);
      a.lse[node * heads + h] = blind[h] ? lowest : highest[h] + std::log(total[h]);
    }
  }
}

// Per head g·out, from its terms since out was rounded to T, and 1 / the sum of the weights; both begin at 0.
template <typename A>
ASTRO_INLINE void own_and_total(const A* weights, const A* slopes, int64_t count, int64_t heads, A* own, A* total) {
  for (int64_t e = 0; e < count; ++e)
    for (int64_t h = 0; h < heads; ++h) {
      own[h] += weights[e * heads + h] * slopes[e * heads + h];
      total[h] += weights[e * heads + h];
    }
  // The weights sum up to 1 but for the rounding of lse, which grows with the scores.
  for (int64_t h = 0; h < heads; ++h) total[h] = total[h] == A(0) ? A(0) : A(1) / total[h], own[h] *= total[h];
  // What the slopes leave of a sum that is 0 is the rounding of `own`; neighbours' rows are alike, so it would add up
  // over nodes.
  for (int64_t h = 0; h < heads; ++h) {
    A rest = A(0);
    for (int64_t e = 0; e < count; ++e) rest += weights[e * heads + h] * (slopes[e * heads + h] - own[h]);
    own[h] += rest * total[h];
  }
}

// dq, dbias, and p and ds for the senders.
template <typename T, typename W>
ASTRO_INLINE void backward_receivers(const Backward<T>& a, int64_t first, int64_t last, W width) {
  using A = Wide<T>;
  const Problem<T>& in = a.in;
  const int64_t heads = in.heads, columns = in.columns();
  std::vector<A> query(columns), grad(columns), sums(columns), own(heads), total(heads), weights, slopes;
  std::vector<uint8_t> cut;
  bool found = false;
  for (int64_t node = first; node < last; ++node) {
    const int64_t begin = in.lists.receiver_start[node], count = in.lists.receiver_start[node + 1] - begin;
    const int64_t* edges = in.lists.by_receiver + begin;
    reserve(weights, count * heads), reserve(slopes, count * heads), reserve(cut, count * heads);
    widen<T>(in.q[node], columns, in.scale, query.data());
    widen<T>(a.grad[node], columns, A(1), grad.data());
    std::fill(sums.begin(), sums.end(), A(0));
    std::fill(own.begin(), own.end(), A(0));
    std::fill(total.begin(), total.end(), A(0));
    for (int64_t e = 0; e < count; ++e) {
      const int64_t from = in.lists.sender[edges[e]];
      const T *key = in.k[from], *value = in.v[from], *bias = in.bias + edges[e] * heads;
      for (int64_t h = 0; h < heads; ++h) {
        const A lse = a.lse[node * heads + h];
        const A score = dot(query.data() + h * width, key + h * width, width) + static_cast<A>(bias[h]);
        const A slope = dot(grad.data() + h * width, value + h * width, width);
        const bool none = cuts(bias[h]);
        cut[e * heads + h] = none;
        weights[e * heads + h] = none ? A(0) : score - lse;
        slopes[e * heads + h] = none ? A(0) : slope;
      }
    }
    exponentials(weights.data(), count * heads);
    for (int64_t i = 0; i < count * heads; ++i)
      if (cut[i]) weights[i] = A(0), found = true;
    own_and_total(weights.data(), slopes.data(), count, heads, own.data(), total.data());
    for (int64_t e = 0; e < count; ++e) {
      const T* key = in.k[in.lists.sender[edges[e]]];
      for (int64_t h = 0; h < heads; ++h) {
        const A weight = cut[e * heads + h] ? A(0) : weights[e * heads + h] * total[h];
        const A slope = cut[e * heads + h] ? A(0) : weight * (slopes[e * heads + h] - own[h]);
        a.weight[edges[e] * heads + h] = weight, a.slope[edges[e] * heads + h] = slope;
        a.grad_bias[edges[e] * heads + h] = static_cast<T>(slope);
        if (cut[e * heads + h]) continue;
        add(sums.data() + h * width, slope, key + h * width, width);
      }
    }
    round_to<T>(sums.data(), columns, in.scale, a.grad_q + node * columns);
  }
  if (found) a.cut->store(true, std::memory_order_relaxed);
}

template <typename T>
void forward_cut(const Forward<T>& a, int64_t node) {
  forward_nodes<T>(a, node, node + 1, a.in.width);
}

template <typename T>
void backward_cut(const Backward<T>& a, int64_t node) {
  backward_receivers<T>(a, node, node + 1, a.in.width);
}

template <typename T, typename W>
ASTRO_INLINE void backward_senders(const Backward<T>& a, int64_t first, int64_t last, W width) {
  using A = Wide<T>;
  const Problem<T>& in = a.in;
  const int64_t heads = in.heads, columns = in.columns();
  const bool cut = a.cut->load(std::memory_order_relaxed);
  std::vector<A> keys(columns), values(columns);
  for (int64_t node = first; node < last; ++node) {
    std::fill(keys.begin(), keys.end(), A(0));
    std::fill(values.begin(), values.end(), A(0));
    for (int64_t at = in.lists.sender_start[node]; at < in.lists.sender_start[node + 1]; ++at) {
      const int64_t edge = in.lists.by_sender[at], to = in.lists.receiver[edge];
      const T *query = in.q[to], *grad = a.grad[to];
      for (int64_t h = 0; h < heads; ++h) {
        if (cut && a.weight[edge * heads + h] == A(0)) continue;
        add(keys.data() + h * width, a.slope[edge * heads + h], query + h * width, width);
        add(values.data() + h * width, a.weight[edge * heads + h], grad + h * width, width);
      }
    }
    round_to<T>(keys.data(), columns, in.scale, a.grad_k + node * columns);
    round_to<T>(values.data(), columns, A(1), a.grad_v + node * columns);
  }
}

// Four wide heads do not fit the registers, and the backward holds two such rows.
template <typename T, typename W>
constexpr bool fits_four = false;
template <typename T, int64_t W>
constexpr bool fits_four<T, Width<W>> = !std::is_same_v<T, double> && W <= 16;

// Four heads at a time where they fill vectors, else one by one: `one` and `four` call the functions for a type and a
// width.
template <typename T, typename One, typename FourHeads>
ASTRO_INLINE void nodes(const Problem<T>& in, One&& one, FourHeads&& four) {
  with_width(in.width, [&]<typename W>(W width) ASTRO_LAMBDA_INLINE {
    if constexpr (fits_four<T, W>)
      if (in.heads % kHeads == 0) return four(width);
    one(width);
  });
}

template <typename T>
struct ForwardNodes {
  template <Level L>
  static ASTRO_INLINE void run(const Forward<T>& a, int64_t first, int64_t last) {
    nodes(
        a.in, [&](auto width) ASTRO_LAMBDA_INLINE { forward_nodes<T>(a, first, last, width); },
        [&]<int64_t W>(Width<W>) ASTRO_LAMBDA_INLINE { forward_fours<T, W>(a, first, last); });
  }
};

template <typename T>
struct BackwardReceivers {
  template <Level L>
  static ASTRO_INLINE void run(const Backward<T>& a, int64_t first, int64_t last) {
    nodes(
        a.in, [&](auto width) ASTRO_LAMBDA_INLINE { backward_receivers<T>(a, first, last, width); },
        [&]<int64_t W>(Width<W>) ASTRO_LAMBDA_INLINE { backward_receiver_fours<T, W>(a, first, last); });
  }
};

template <typename T>
struct BackwardSenders {
  template <Level L>
  static ASTRO_INLINE void run(const Backward<T>& a, int64_t first, int64_t last) {
    nodes(
        a.in, [&](auto width) ASTRO_LAMBDA_INLINE { backward_senders<T>(a, first, last, width); },
        [&]<int64_t W>(Width<W>) ASTRO_LAMBDA_INLINE { backward_sender_fours<T, W>(a, first, last); });
  }
};

// Nodes may lie any distance apart; heads and columns must be dense.
Tensor dense_rows(const Tensor& t) {
  const bool dense =
      (t.size(2) == 1 || t.stride(2) == 1) && (t.size(1) == 1 || t.stride(1) == t.size(2)) && t.stride(0) >= 0;
  return dense ? t : t.contiguous();
}

template <typename T>
Rows<T> rows_of(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0)};
}

struct Arguments {
  Tensor q, k, v, bias, receiver, sender, by_receiver, receiver_start, by_sender, sender_start;
  double scale;

  template <typename T>
  Problem<T> problem() const {
    const auto index = [](const Tensor& t) { return t.const_data_ptr<int64_t>(); };
    return {rows_of<T>(q),
            rows_of<T>(k),
            rows_of<T>(v),
            bias.const_data_ptr<T>(),
            q.size(1),
            q.size(2),
            q.size(0),
            k.size(0),
            static_cast<Wide<T>>(scale),
            {index(receiver), index(sender), index(by_receiver), index(receiver_start), index(by_sender),
             index(sender_start)}};
  }
};

// `edges`: the tensors of `EdgeLists`, in order.
Arguments arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias, at::TensorList edges,
                    double scale) {
  return {dense_rows(q),
          dense_rows(k),
          dense_rows(v),
          bias.contiguous(),
          edges[0].contiguous(),
          edges[1].contiguous(),
          edges[2].contiguous(),
          edges[3].contiguous(),
          edges[4].contiguous(),
          edges[5].contiguous(),
          scale};
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                                   at::TensorList edges, double scale) {
  constexpr check::Op op("astrobiogen::edge_attention");
  check_arguments(op, q, k, v, bias, edges, scale);
  const Arguments all = arguments(q, k, v, bias, edges, scale);
  check_order(op, "receiver", all.receiver, all.by_receiver, all.receiver_start);
  check_order(op, "sender", all.sender, all.by_sender, all.sender_start);
  Tensor out = at::empty(q.sizes(), q.options()),
         lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(wide_dtype(q.scalar_type())));
  for_floating_dtype(q.scalar_type(), [&]<typename T>() {
    const Forward<T> a{all.problem<T>(), out.mutable_data_ptr<T>(), lse.mutable_data_ptr<Wide<T>>()};
    at::parallel_for(0, q.size(0), kGrain,
                     [&](int64_t begin, int64_t end) { dispatch<ForwardNodes<T>>(a, begin, end); });
  });
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const Tensor& bias, const Tensor& lse,
                                                    at::TensorList edges, double scale) {
  constexpr check::Op op("astrobiogen::edge_attention_backward");
  check_arguments(op, q, k, v, bias, edges, scale);
  op.like(grad_any, "grad", q, "the shape of q");
  op.dtype(lse, "lse", wide_dtype(q.scalar_type()));
  op.shape(lse, "lse", {q.size(0), q.size(1)}, "[N, heads]");
  const Arguments all = arguments(q, k, v, bias, edges, scale);
  check_order(op, "receiver", all.receiver, all.by_receiver, all.receiver_start);
  check_order(op, "sender", all.sender, all.by_sender, all.sender_start);
  const Tensor grad = dense_rows(grad_any), log_sum = lse.contiguous();
  const auto like = [](const Tensor& t) { return at::empty(t.sizes(), t.options()); };
  Tensor grad_q = like(q), grad_k = like(k), grad_v = like(v), grad_bias = like(bias);
  Tensor weight = at::empty(bias.sizes(), bias.options().dtype(wide_dtype(q.scalar_type()))), slope = like(weight);
  std::atomic<bool> cut{false};
  for_floating_dtype(q.scalar_type(), [&]<typename T>() {
    using A = Wide<T>;
    const Backward<T> a{all.problem<T>(),
                        rows_of<T>(grad),
                        log_sum.const_data_ptr<A>(),
                        weight.mutable_data_ptr<A>(),
                        slope.mutable_data_ptr<A>(),
                        &cut,
                        grad_q.mutable_data_ptr<T>(),
                        grad_k.mutable_data_ptr<T>(),
                        grad_v.mutable_data_ptr<T>(),
                        grad_bias.mutable_data_ptr<T>()};
    at::parallel_for(0, q.size(0), kGrain,
                     [&](int64_t begin, int64_t end) { dispatch<BackwardReceivers<T>>(a, begin, end); });
    at::parallel_for(0, k.size(0), kGrain,
                     [&](int64_t begin, int64_t end) { dispatch<BackwardSenders<T>>(a, begin, end); });
  });
  return {grad_q, grad_k, grad_v, grad_bias};
}

// Counting sort: (positions of `index` in stable order, where each value starts); 0.1 ms for 36,800 edges where a radix
// sort and a search take 0.9.
std::tuple<Tensor, Tensor> order(const Tensor& index_any, int64_t count) {
  constexpr check::Op op("astrobiogen::edge_order");
  op.dtype(index_any, "index", at::kLong);
  op.rank(index_any, "index", 1, 1, "[E]");
  op.size(count, "count", 0, std::numeric_limits<int64_t>::max() - 1);
  const Tensor index = index_any.contiguous();
  Tensor positions = at::empty(index.sizes(), index.options()), starts = at::zeros({count + 1}, index.options());
  const int64_t entries = index.numel(), *values = index.const_data_ptr<int64_t>();
  int64_t *to = positions.mutable_data_ptr<int64_t>(), *start = starts.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < entries; ++i) {
    TORCH_CHECK(values[i] >= 0 && values[i] < count, "index must be in [0, ", count, "), got ", values[i],
                " at position ", i);
    ++start[values[i] + 1];
  }
  for (int64_t value = 0; value < count; ++value) start[value + 1] += start[value];
  std::vector<int64_t> next(start, start + count);
  for (int64_t i = 0; i < entries; ++i) to[next[values[i]]++] = i;
  return {positions, starts};
}

}  // namespace astrobiogen::edge_attention

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("edge_order", &astrobiogen::edge_attention::order);
  m.impl("edge_attention", &astrobiogen::edge_attention::forward);
  m.impl("edge_attention_backward", &astrobiogen::edge_attention::backward);
}
