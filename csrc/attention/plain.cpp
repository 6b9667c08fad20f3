// Attention in fp64 by plain loops, one score row in memory at a time: serves gradient checks, where fp32 tiles would
// be too coarse.
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>
#include <tuple>

#include "attention/geometry.h"

namespace astrobiogen::attention {

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Packed {
  Geometry<double> g;
  Tensor storage;
  const double *q, *k, *v;  // [B, heads, S, D], q and k rotated

  const double* query(int64_t b, int64_t h, int64_t i) const { return q + ((b * g.heads + h) * g.queries + i) * g.dim; }
  int64_t key_offset(int64_t b, int64_t h, int64_t j) const {
    return ((b * g.kv_heads + h / g.group) * g.keys + j) * g.dim;
  }
};

Packed make_packed(const Inputs& in) {
  Packed p{make_geometry<double>(in.q, in.k, in.cos, in.sin, in.cu_seqlens, in.sinks, in.options),
           {},
           nullptr,
           nullptr,
           nullptr};
  p.storage = at::empty({in.q.numel() + 2 * in.k.numel()}, in.q.options());
  double *q = p.storage.mutable_data_ptr<double>(), *k = q + in.q.numel(), *v = k + in.k.numel();
  pack<double, double>(p.g, rows_of<double>(in.q), p.g.queries, p.g.heads, true, q);
  pack<double, double>(p.g, rows_of<double>(in.k), p.g.keys, p.g.kv_heads, true, k);
  pack<double, double>(p.g, rows_of<double>(in.v), p.g.keys, p.g.kv_heads, false, v);
  p.q = q;
  p.k = k;
  p.v = v;
  return p;
}

double dot(const double* a, const double* b, int64_t n) {
  double sum = 0.0;
  for (int64_t d = 0; d < n; ++d) sum += a[d] * b[d];
  return sum;
}

double score(const Packed& p, const double* query, const double* key) {
  const double raw = dot(query, key, p.g.dim) * p.g.scale;
  return p.g.softcap > 0.0 ? p.g.softcap * std::tanh(raw / p.g.softcap) : raw;
}

}  // namespace

void forward_double(const Inputs& in, Tensor& out, Tensor& lse, Tensor& rest) {
  const Packed p = make_packed(in);
  const Geometry<double>& g = p.g;
  const Rows<double> result = mutable_rows_of<double>(out);
  double *lse_data = lse.mutable_data_ptr<double>(),
         *rest_data = rest.numel() > 0 ? rest.mutable_data_ptr<double>() : nullptr;
  run_tasks(g.batch * g.heads, 0, [&](int64_t task, float*) {
    const int64_t b = task / g.heads, h = task % g.heads;
    std::vector<double> scores(g.keys);
    for (int64_t i = 0; i < g.queries; ++i) {
      double top = g.sinks != nullptr ? g.sinks[h] : -kInfinity;
      for (int64_t j = g.low[i]; j < g.high[i]; ++j) {
        scores[j] = score(p, p.query(b, h, i), p.k + p.key_offset(b, h, j));
        top = std::max(top, scores[j]);
      }
      const double shift = top == -kInfinity ? 0.0 : top;
      double total = g.sinks != nullptr ? std::exp(g.sinks[h] - shift) : 0.0;
      double* to = result.at(b, i, h);
      std::fill_n(to, g.dim, 0.0);
      for (int64_t j = g.low[i]; j < g.high[i]; ++j) {
        const double weight = std::exp(scores[j] - shift);
        const double* value = p.v + p.key_offset(b, h, j);
        total += weight;
        for (int64_t d = 0; d < g.dim; ++d) to[d] += weight * value[d];
      }
      for (int64_t d = 0; d < g.dim; ++d) to[d] = total == 0.0 || g.low[i] >= g.high[i] ? 0.0 : to[d] / total;
      const int64_t index = (b * g.heads + h) * g.queries + i;
      lse_data[index] = total == 0.0 ? -kInfinity : shift + std::log(total);
      const double correction = std::exp(lse_data[index] - shift) / total;
      if (rest_data != nullptr) rest_data[index] = std::isfinite(correction) ? correction : 1.0;
    }
  });
}

void backward_double(const Inputs& in, const Tensor& grad_out, const Optional& grad_lse, const Tensor& out,
                     const Tensor& lse, const Tensor& rest, Tensor& grad_q, Tensor& grad_k, Tensor& grad_v,
                     Tensor& grad_sinks) {
  const Packed p = make_packed(in);
  const Geometry<double>& g = p.g;
  const Rows<const double> grads = rows_of<double>(grad_out), outs = rows_of<double>(out);
  const Rows<double> query_grads = mutable_rows_of<double>(grad_q), key_grads = mutable_rows_of<double>(grad_k),
                     value_grads = mutable_rows_of<double>(grad_v);
  const double *lse_data = lse.const_data_ptr<double>(), *rest_data = rest.const_data_ptr<double>();
  const double* lse_grads = grad_lse ? grad_lse->const_data_ptr<double>() : nullptr;
  double* sink_grads = g.sinks != nullptr ? grad_sinks.mutable_data_ptr<double>() : nullptr;
  grad_k.zero_();
  grad_v.zero_();
  std::vector<double> row(g.dim);
  for (int64_t b = 0; b < g.batch; ++b)  // one thread: the group adds into shared key rows
    for (int64_t h = 0; h < g.heads; ++h)
      for (int64_t i = 0; i < g.queries; ++i) {
        const int64_t index = (b * g.heads + h) * g.queries + i;
        const double* grad = grads.at(b, i, h);
        // A row that sees nothing is 0 whatever `grad` is.
        const double own = g.low[i] < g.high[i] ? dot(grad, outs.at(b, i, h), g.dim) : 0.0;
        const double delta = own - (lse_grads != nullptr ? lse_grads[index] : 0.0);
        if (g.sinks != nullptr && lse_data[index] != -kInfinity)
          sink_grads[h] -= std::exp(g.sinks[h] - lse_data[index]) * rest_data[index] * delta;
        std::fill(row.begin(), row.end(), 0.0);
        for (int64_t j = g.low[i]; j < g.high[i]; ++j) {
          const double *query = p.query(b, h, i), *key = p.k + p.key_offset(b, h, j),
                       *value = p.v + p.key_offset(b, h, j);
          const double s = score(p, query, key), weight = std::exp(s - lse_data[index]) * rest_data[index];
          double grad_score = weight * (dot(grad, value, g.dim) - delta) * g.scale;
          if (g.softcap > 0.0) grad_score *= 1.0 - (s / g.softcap) * (s / g.softcap);
          double *to_key = key_grads.at(b, j, h / g.group), *to_value = value_grads.at(b, j, h / g.group);
          for (int64_t d = 0; d < g.dim; ++d) {
            row[d] += grad_score * key[d];
            to_key[d] += grad_score * query[d];
            to_value[d] += weight * grad[d];
          }
        }
        const int64_t from_end = g.queries - i;
        rotate_row(g, row.data(), g.angles(g.cos, b, from_end), g.angles(g.sin, b, from_end), -1.0, 1.0,
                   query_grads.at(b, i, h));
      }
  for (int64_t b = 0; b < g.batch; ++b)
    for (int64_t j = 0; j < g.keys; ++j)
      for (int64_t h = 0; h < g.kv_heads; ++h) {
        double* to = key_grads.at(b, j, h);
        std::copy_n(to, g.dim, row.begin());
        rotate_row(g, row.data(), g.angles(g.cos, b, g.keys - j), g.angles(g.sin, b, g.keys - j), -1.0, 1.0, to);
      }
}

}  // namespace astrobiogen::attention
