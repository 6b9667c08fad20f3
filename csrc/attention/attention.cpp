// Attention on the CPU: registration, checks and the forward driver. Formulas: astrobiogen/kernels/attention/README.md.
//
// One task = 64 query rows (tokens x the heads that share one key/value head) of one (batch, kv head): K and V stream
// through the cache once per task and serve the whole group. K is rotated while it is packed to [B, Hkv, Sk, D] fp32, Q
// while it is packed into panels; nothing of size Sq x Sk exists.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <limits>
#include <tuple>

#include "attention/checks.h"
#include "attention/decode.h"
#include "attention/geometry.h"
#include "attention/kernels.h"
#include "attention/panel.h"
#include "attention/results.h"
#include "common/dtypes.h"

namespace astrobiogen::attention {

void visible_ranges(int64_t queries, int64_t keys, const Options& options, const Optional& cu_seqlens,
                    std::vector<int32_t>& low, std::vector<int32_t>& high) {
  low.assign(queries, 0);
  high.assign(queries, static_cast<int32_t>(keys));
  if (cu_seqlens) {
    const Tensor bounds = cu_seqlens->to(at::kLong).contiguous();
    const int64_t* bound = bounds.const_data_ptr<int64_t>();
    const int64_t last = bounds.numel() - 1;
    TORCH_CHECK_VALUE(last >= 0, "cu_seqlens must have shape [n + 1], got no element");
    TORCH_CHECK_VALUE(bound[0] == 0 && bound[last] <= queries,
                      "cu_seqlens must start at 0 and end at most at S = ", queries, ", got ", bound[0], " .. ",
                      bound[last]);
    for (int64_t segment = 0; segment < last; ++segment)  // all of them before the first is used
      TORCH_CHECK_VALUE(bound[segment] <= bound[segment + 1], "cu_seqlens must not decrease, got ", bound[segment],
                        " before ", bound[segment + 1]);
    for (int64_t segment = 0; segment < last; ++segment) {
      std::fill(low.begin() + bound[segment], low.begin() + bound[segment + 1], static_cast<int32_t>(bound[segment]));
      std::fill(high.begin() + bound[segment], high.begin() + bound[segment + 1],
                static_cast<int32_t>(bound[segment + 1]));
    }
    for (int64_t i = bound[last]; i < queries; ++i) low[i] = high[i] = static_cast<int32_t>(bound[last]);
  }
  const int64_t window = std::min(options.window, queries + keys);  // farther than any key, and no sum overflows
  for (int64_t i = 0; i < queries; ++i) {
    const int64_t position = i + keys - queries;
    int64_t begin = low[i], end = high[i];
    if (window > 0) begin = std::max(begin, position - window + 1);
    if (window > 0) end = std::min(end, position + window);
    if (options.causal) end = std::min(end, position + 1);
    end = std::max<int64_t>(end, 0);
    low[i] = static_cast<int32_t>(std::min(begin, end));
    high[i] = static_cast<int32_t>(end);
  }
}

// Writes one task's rows.
template <typename T>
void write_rows(const Geometry<float>& g, const TaskRows& t, int64_t width, const float* panels, const float* maximum,
                const float* total, const Results<T>& to) {
  float row[kMaxHeadDim];
  for (int64_t i = 0; i < t.count; ++i) {
    const int64_t token = (t.first + i) / g.group, head = t.kv_head * g.group + (t.first + i) % g.group;
    const float* from = panels + i / width * g.dim * width + i % width;
    for (int64_t d = 0; d < g.dim; ++d) row[d] = from[d * width];
    write_row<T>(g, to, t.batch, token, head, row, maximum[i], total[i]);
  }
}

// K (rotated) and V as fp32 rows: packed copies [B, Hkv, Sk, D], or the tensor itself where it already is fp32 and too
// few queries would share a copy.
struct KeyRows {
  Tensor storage;
  Rows<const float> rows;
};

// Takes what is not finite out of packed values [pairs, Sk, D]; returns the rows where that was.
std::vector<int64_t> silence_rows(const Tensor& packed, int64_t dim) {
  float* values = packed.mutable_data_ptr<float>();
  std::vector<int64_t> found;
  if (finite_tensor(packed)) return found;
  for (int64_t row = 0; row < packed.numel() / dim; ++row) {
    if (all_finite(values + row * dim, dim)) continue;
    silence(values + row * dim, dim);
    found.push_back(row);
  }
  return found;
}

// What `silence_rows` took out reaches the queries that see it, and no other.
template <typename T>
void add_silenced(const Geometry<float>& g, const TaskRows& t, int64_t width, const std::vector<int64_t>& rows,
                  const Rows<const T>& values, const int32_t* low, const int32_t* high, float* panels) {
  for (const int64_t row : rows) {
    const int64_t key = row % g.keys;
    if (row / g.keys != t.batch * g.kv_heads + t.kv_head) continue;
    const T* value = values.at(t.batch, key, t.kv_head);
    for (int64_t i = 0; i < t.count; ++i) {
      if (key < low[i] || key >= high[i]) continue;
      float* to = panels + i / width * g.dim * width + i % width;
      for (int64_t d = 0; d < g.dim; ++d)
        if (const float x = static_cast<float>(value[d]); !all_finite(&x, 1)) to[d * width] += x;
    }
  }
}

template <typename T>
KeyRows key_rows(const Geometry<float>& g, const Tensor& t, bool turn, bool copy) {
  if constexpr (std::is_same_v<T, float>) {
    if (!copy && !(turn && g.rotary > 0)) return {t, rows_of<float>(t)};
  }
  Tensor storage = at::empty({g.batch, g.kv_heads, g.keys, g.dim}, t.options().dtype(at::kFloat));
  pack<float, T>(g, rows_of<T>(t), g.keys, g.kv_heads, turn, storage.mutable_data_ptr<float>());
  return {storage, {storage.const_data_ptr<float>(), storage.stride(0), storage.stride(2), storage.stride(1)}};
}

template <typename T>
void forward_typed(const Inputs& in, Tensor& out, Tensor& lse, Tensor& rest) {
  const Geometry<float> g = make_geometry<float>(in.q, in.k, in.cos, in.sin, in.cu_seqlens, in.sinks, in.options);
  const Results<T> results = results_of<T>(out, lse, rest);
  // Where a gradient is wanted the backward pass recomputes the scores, and must round them as the forward did: with
  // panels. A difference in the last place of a score of 200 changes its probability by 1e-5.
  if (rest.numel() == 0 && decode_forward<T>(g, in, results)) return;
  const Kernels& kernel = kernels();
  const int64_t width = kernel.width, blocks = (g.rows() + kTaskRows - 1) / kTaskRows, pairs = g.batch * g.kv_heads;
  bool copy_values = blocks > 1;
  if constexpr (std::is_same_v<T, float>) copy_values = copy_values || !partly_seen_are_finite(g, rows_of<float>(in.v));
  const KeyRows k = key_rows<T>(g, in.k, true, blocks > 1), v = key_rows<T>(g, in.v, false, copy_values);
  const bool copied = copy_values || !std::is_same_v<T, float>;
  const std::vector<int64_t> silenced = copied ? silence_rows(v.storage, g.dim) : std::vector<int64_t>{};
  const Rows<const T> q = rows_of<T>(in.q);
  const float factor = g.softcap > 0.0f ? g.scale / g.softcap : g.scale * kLog2E;
  const int64_t panel_floats = kTaskRows * g.dim;
  run_tasks(pairs * blocks, 2 * panel_floats + 4 * kTaskRows + kScratch, [&](int64_t task, float* scratch) {
    // The last query blocks see the most keys under a causal mask: longest first.
    const TaskRows t = task_rows(g, task % pairs, blocks - 1 - task / pairs, width);
    float *queries = scratch + kScratch, *accumulator = queries + panel_floats, *maximum = accumulator + panel_floats;
    float* total = maximum + kTaskRows;
    int32_t low[kTaskRows], high[kTaskRows];
    visible_keys(g, t, width, low, high);
    pack_panels<T>(g, t, q, true, factor, width, queries, nullptr, 0);
    std::fill_n(accumulator, t.panels * width * g.dim, 0.0f);
    for (int64_t i = 0; i < t.panels * width; ++i) {
      const float sink = g.sinks != nullptr && i < t.count
                             ? g.sinks[t.kv_head * g.group + (t.first + i) % g.group] * kLog2E
                             : -std::numeric_limits<float>::infinity();
      maximum[i] = sink;
      total[i] = sink == -std::numeric_limits<float>::infinity() ? 0.0f : 1.0f;
    }
    kernel.forward({k.rows.at(t.batch, 0, t.kv_head), v.rows.at(t.batch, 0, t.kv_head), k.rows.token, v.rows.token,
                    g.dim, t.panels, queries, accumulator, maximum, total, low, high, g.softcap * kLog2E, scratch});
    if (!silenced.empty()) add_silenced<T>(g, t, width, silenced, rows_of<T>(in.v), low, high, accumulator);
    write_rows<T>(g, t, width, accumulator, maximum, total, results);
  });
}

Inputs inputs(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cos, const Optional& sin,
              const Optional& cu_seqlens, const Optional& sinks, const Options& options) {
  return {unit_stride(q), unit_stride(k), unit_stride(v), cos, sin, cu_seqlens, sinks, options};
}

ForwardResult attention(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cos, const Optional& sin,
                        const Optional& cu_seqlens, const Optional& sinks, bool causal, double scale, int64_t window,
                        double softcap, bool interleaved, bool keep) {
  constexpr check::Op op("astrobiogen::attention");
  check_arguments(op, q, k, v, cos, sin, cu_seqlens, sinks, scale, window, softcap);
  const Inputs in = inputs(q, k, v, cos, sin, cu_seqlens, sinks, {causal, scale, window, softcap, interleaved});
  const bool wide = q.scalar_type() == at::kDouble;
  Tensor out = at::empty(q.sizes(), q.options());
  Tensor lse = at::empty({q.size(0), q.size(2), q.size(1)}, q.options().dtype(wide ? at::kDouble : at::kFloat));
  const bool half = !wide && q.scalar_type() != at::kFloat;
  const auto kept = half ? q.options().dtype(at::kShort) : lse.options();
  Tensor rest = at::empty(keep ? (half ? q : lse).sizes() : at::IntArrayRef({0}), kept);
  if (out.numel() == 0) return {out, lse, rest};
  if (wide) forward_double(in, out, lse, rest);
  else for_dtype(q.scalar_type(), [&]<typename T>() { forward_typed<T>(in, out, lse, rest); });
  return {out, lse, rest};
}

BackwardResult attention_backward(const Optional& grad_out, const Optional& grad_lse, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& rest,
                                  const Optional& cos, const Optional& sin, const Optional& cu_seqlens,
                                  const Optional& sinks, bool causal, double scale, int64_t window, double softcap,
                                  bool interleaved) {
  constexpr check::Op op("astrobiogen::attention_backward");
  check_arguments(op, q, k, v, cos, sin, cu_seqlens, sinks, scale, window, softcap);
  check_results(op, grad_out, grad_lse, q, out, lse, rest);
  const Inputs in = inputs(q, k, v, cos, sin, cu_seqlens, sinks, {causal, scale, window, softcap, interleaved});
  const Tensor grad = grad_out ? unit_stride(*grad_out) : at::zeros(out.sizes(), out.options());
  const Optional grad_of_lse = grad_lse ? std::optional(grad_lse->contiguous()) : std::nullopt;
  return backward(in, grad, grad_of_lse, unit_stride(out), lse.contiguous(), rest.contiguous());
}

}  // namespace astrobiogen::attention

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("attention", &astrobiogen::attention::attention);
  m.impl("attention_backward", &astrobiogen::attention::attention_backward);
}
