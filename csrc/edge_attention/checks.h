// What the ops of attention along edges demand of their arguments, the values of `EdgeLists` included.
#pragma once

#include <ATen/core/List.h>

#include <atomic>

#include "common/checks.h"

namespace astrobiogen::edge_attention {

using at::Tensor;

// Nodes per task of the checks below: about 5,000 edges of a metabolic network, some 5 us.
constexpr int64_t kCheckGrain = 1024;

// Whether nodes [first, last) have their own edges, each once and in rising order. Over all nodes, with `start` from 0
// to `edges`, that makes `by` a permutation and all of `index` a node.
inline bool in_order(const int64_t* index, const int64_t* by, const int64_t* start, int64_t edges, int64_t first,
                     int64_t last) {
  bool fits = true;
  for (int64_t node = first; node < last; ++node) {
    const int64_t begin = start[node], end = start[node + 1];
    if (begin < 0 || begin > end || end > edges) return false;
    for (int64_t at = begin, before = -1; at < end; ++at) {
      const int64_t edge = by[at];
      if (static_cast<uint64_t>(edge) >= static_cast<uint64_t>(edges)) return false;
      fits &= index[edge] == node && edge > before;
      before = edge;
    }
  }
  return fits;
}

// The three lists of one end of the edges, `name` and `by_name` and `name`_start, contiguous.
inline void check_order(const check::Op& op, const char* name, const Tensor& index, const Tensor& by,
                        const Tensor& start) {
  const int64_t edges = index.numel(), nodes = start.numel() - 1;
  const int64_t *of_edge = index.const_data_ptr<int64_t>(), *order = by.const_data_ptr<int64_t>();
  const int64_t* bounds = start.const_data_ptr<int64_t>();
  std::atomic<bool> fits{bounds[0] == 0 && bounds[nodes] == edges};
  at::parallel_for(0, nodes, kCheckGrain, [&](int64_t first, int64_t last) {
    if (!in_order(of_edge, order, bounds, edges, first, last)) fits = false;
  });
  if (fits) [[likely]]
    return;
  op.indices(index, name, nodes);
  TORCH_CHECK_VALUE(false, op.name(), ": by_", name, " and ", name, "_start must be the order of ", name,
                    " that `edge_lists` gives, got others");
}

inline void check_list(const check::Op& op, const Tensor& t, const char* name, int64_t entries, const char* meaning) {
  op.dtype(t, name, at::kLong);
  op.shape(t, name, {entries}, meaning);
}

inline void check_arguments(const check::Op& op, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bias,
                            at::TensorList edges, double scale) {
  op.floating(q, "q");
  op.rank(q, "q", 3, 3, "[N, heads, D]");
  op.dtype(k, "k", q.scalar_type());
  op.rank(k, "k", 3, 3, "[M, heads, D]");
  op.shape(k, "k", {k.size(0), q.size(1), q.size(2)}, "[M, heads, D], heads and D of q");
  op.like(v, "v", k, "the shape of k");
  op.length(edges.size(), "edges", 6, "the tensors of EdgeLists");
  op.dtype(edges[0], "receiver", at::kLong);
  op.rank(edges[0], "receiver", 1, 1, "[E]");
  const int64_t count = edges[0].numel();
  check_list(op, edges[1], "sender", count, "[E], as receiver");
  check_list(op, edges[2], "by_receiver", count, "[E], as receiver");
  check_list(op, edges[3], "receiver_start", check::sum(q.size(0), 1), "[N + 1], N nodes of q");
  check_list(op, edges[4], "by_sender", count, "[E], as receiver");
  check_list(op, edges[5], "sender_start", check::sum(k.size(0), 1), "[M + 1], M nodes of k");
  op.dtype(bias, "bias", q.scalar_type());
  op.shape(bias, "bias", {count, q.size(1)}, "[E, heads]");
  op.finite(scale, "scale");
}

}  // namespace astrobiogen::edge_attention
