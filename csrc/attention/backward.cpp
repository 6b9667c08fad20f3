// Backward of attention on the CPU: five matrix products per tile (scores, dP, dQ, dV, dK), probabilities recomputed
// from the saved log-sum-exp.
//
// dK and dV of a (batch, kv head) are summed by up to kTargetTasks / pairs tasks, each with its own fp32 buffers over a
// fixed subset of the query blocks, and then added in a fixed order: the split depends on the shape only, so any thread
// count gives the same bits, and nothing is atomic.
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "attention/geometry.h"
#include "attention/kernels.h"
#include "attention/panel.h"
#include "common/dtypes.h"
#include "common/simd.h"

namespace astrobiogen::attention {

typedef int16_t i16x8 __attribute__((vector_size(16)));

constexpr int64_t kTargetTasks =
    16;  // enough for 16 cores at batch 1; each further split costs one more fp32 copy of dK and dV

// By what a row's dO is multiplied, and its dlse, so that all products with the recomputed probabilities are as if
// those summed up to 1: their factor, the row's correction and what the unit of log 2 adds to it. In half precision
// the rounding of the probabilities' results is larger.
template <typename T>
float row_factor(const Rest<T>* rest, const float* lse, int64_t index) {
  if constexpr (!std::is_same_v<T, float>) return 1.0f;
  const float factor = static_cast<float>(rest[index] * std::exp2(shift_of(lse[index]) - in_log2(lse[index])));
  return all_finite(&factor, 1) ? factor : 1.0f;
}

// <factor dO, O>. dO is rounded after the factor, as `pack_panels` rounds it: dP - delta cancels.
template <typename T>
float dot_unrounded(float factor, const T* grad, const T* out, const Rest<T>* rest, int64_t dim) {
  constexpr bool kHalf = !std::is_same_v<T, float>;
  simd::f32x8 lanes = {};
  int64_t d = 0;
  for (; d + 8 <= dim; d += 8) {
    simd::f32x8 exact = simd::load8(out + d);
    if constexpr (kHalf) {
      i16x8 words;
      std::memcpy(&words, rest + d, sizeof(words));
      exact = (simd::f32x8)((simd::i32x8)exact + __builtin_convertvector(words, simd::i32x8));
    }
    lanes += simd::load8(grad + d) * factor * exact;
  }
  float sum = 0.0f;
  for (int i = 0; i < 8; ++i) sum += lanes[i];
  for (; d < dim; ++d) {
    float exact = static_cast<float>(out[d]);
    if constexpr (kHalf) exact = unrounded(exact, rest[d]);
    sum += static_cast<float>(grad[d]) * factor * exact;
  }
  return sum;
}

template <typename T>
struct Context {
  const Geometry<float>& g;
  const Kernels& kernel;
  int64_t width, padded, blocks, splits;
  const float *keys, *finite_keys, *values;  // packed [B, Hkv, Sk, D]
  const uint8_t* lost_keys;                  // [B, Hkv, Sk], whether a key is not finite; null where all are
  Rows<const T> q, grad, out;
  const Rest<T>* rest;
  Rows<T> grad_q;
  const float *lse, *grad_lse;
  float* delta;     // [B, Hq, Sq]
  float* partials;  // [pairs][splits][2][Sk][padded]
};

struct Workspace {
  float *scratch, *queries, *query_rows, *grads, *grad_rows, *grad_queries, *lse, *delta, *factors;
};

int64_t workspace_floats(int64_t dim, int64_t padded) { return 2 * kScratch + kTaskRows * (3 * dim + 2 * padded + 3); }

Workspace split_workspace(float* p, int64_t dim, int64_t padded) {
  Workspace w{};
  w.scratch = p;
  w.queries = w.scratch + 2 * kScratch;
  w.grads = w.queries + kTaskRows * dim;
  w.grad_queries = w.grads + kTaskRows * dim;
  w.query_rows = w.grad_queries + kTaskRows * dim;
  w.grad_rows = w.query_rows + kTaskRows * padded;
  w.lse = w.grad_rows + kTaskRows * padded;
  w.delta = w.lse + kTaskRows;
  w.factors = w.delta + kTaskRows;
  return w;
}

// The factor of dO, delta_i = factor_i (<dO_i, O_i> - dlse_i), and the log-sum-exp in units of log 2 (0 for a row that
// sees nothing: all its scores are masked, and its O is 0 whatever dO is). O is taken as it was before rounding: dP -
// delta cancels where a softmax is peaked.
template <typename T>
void row_constants(const Context<T>& c, const TaskRows& t, const Workspace& w, const int32_t* low,
                   const int32_t* high) {
  for (int64_t i = 0; i < t.panels * c.width; ++i) {
    w.lse[i] = w.delta[i] = 0.0f;
    w.factors[i] = 1.0f;
    if (i >= t.count) continue;
    const int64_t token = (t.first + i) / c.g.group, head = t.kv_head * c.g.group + (t.first + i) % c.g.group;
    const int64_t index = (t.batch * c.g.heads + head) * c.g.queries + token;
    const T *grad = c.grad.at(t.batch, token, head), *out = c.out.at(t.batch, token, head);
    const float factor = w.factors[i] = row_factor<T>(c.rest, c.lse, index);
    float delta = 0.0f;
    const int64_t place = ((t.batch * c.g.queries + token) * c.g.heads + head) * c.g.dim;
    if (low[i] < high[i]) delta = dot_unrounded<T>(factor, grad, out, c.rest + place, c.g.dim);
    if (c.grad_lse != nullptr) delta -= factor * c.grad_lse[index];
    w.delta[i] = c.delta[index] = delta;
    w.lse[i] = std::isinf(c.lse[index]) && c.lse[index] < 0.0f ? 0.0f : shift_of(c.lse[index]);
    if (c.lost_keys == nullptr || low[i] >= high[i]) continue;
    const uint8_t* lost = c.lost_keys + (t.batch * c.g.kv_heads + t.kv_head) * c.g.keys;
    if (std::any_of(lost + low[i], lost + high[i], [](uint8_t key) { return key != 0; }))
      w.lse[i] = std::numeric_limits<float>::quiet_NaN();
  }
}

template <typename T>
void write_grad_queries(const Context<T>& c, const TaskRows& t, const float* panels) {
  float row[kMaxHeadDim];
  for (int64_t i = 0; i < t.count; ++i) {
    const int64_t token = (t.first + i) / c.g.group, head = t.kv_head * c.g.group + (t.first + i) % c.g.group;
    const float* from = panels + i / c.width * c.g.dim * c.width + i % c.width;
    for (int64_t d = 0; d < c.g.dim; ++d) row[d] = from[d * c.width];
    const int64_t from_end = c.g.queries - token;
    rotate_row(c.g, row, c.g.angles(c.g.cos, t.batch, from_end), c.g.angles(c.g.sin, t.batch, from_end), -1.0f,
               c.g.scale, c.grad_q.at(t.batch, token, head));
  }
}

// A gradient that is not finite reaches dV of the keys that its row sees, and no other. (dQ and dK get it from delta;
// what is not finite in a query, or in a key that the row sees, makes the row's log-sum-exp NaN and reaches all
// gradients through the probabilities.)
template <typename T>
void add_marked(const Context<T>& c, const TaskRows& t, uint64_t marked, const int32_t* low, const int32_t* high,
                float* grad_values) {
  for (int64_t i = 0; i < t.count; ++i) {
    if ((marked >> i & 1) == 0) continue;
    const T* grad = c.grad.at(t.batch, (t.first + i) / c.g.group, t.kv_head * c.g.group + (t.first + i) % c.g.group);
    for (int64_t d = 0; d < c.g.dim; ++d)
      if (const float x = static_cast<float>(grad[d]); !all_finite(&x, 1))
        for (int64_t key = low[i]; key < high[i]; ++key) grad_values[key * c.padded + d] += x;
  }
}

// Query blocks split, split + splits, ... of one (batch, kv head).
template <typename T>
void backward_task(const Context<T>& c, int64_t pair, int64_t split, const Workspace& w) {
  const Geometry<float>& g = c.g;
  const int64_t matrix = g.keys * c.padded;
  float* grad_keys = c.partials + (pair * c.splits + split) * 2 * matrix;
  std::fill_n(grad_keys, 2 * matrix, 0.0f);
  const float factor = g.softcap > 0.0f ? g.scale / g.softcap : g.scale * kLog2E;
  int32_t low[kTaskRows], high[kTaskRows];
  for (int64_t block = split; block < c.blocks; block += c.splits) {
    const TaskRows t = task_rows(g, pair, block, c.width);
    visible_keys(g, t, c.width, low, high);
    pack_panels<T>(g, t, c.q, true, factor, c.width, w.queries, w.query_rows, c.padded);
    row_constants(c, t, w, low, high);
    const uint64_t marked =
        pack_panels<T>(g, t, c.grad, false, 1.0f, c.width, w.grads, w.grad_rows, c.padded, w.factors);
    std::fill_n(w.grad_queries, t.panels * c.width * g.dim, 0.0f);
    const int64_t start = pair * g.keys * g.dim;
    const bool lost = std::any_of(w.lse, w.lse + t.count, [](float x) { return std::isnan(x); });
    c.kernel.backward({c.keys + start,
                       c.finite_keys + start,
                       c.values + start,
                       g.dim,
                       c.padded,
                       t.panels,
                       w.queries,
                       w.query_rows,
                       w.grads,
                       w.grad_rows,
                       w.lse,
                       w.delta,
                       low,
                       high,
                       lost,
                       g.softcap * kLog2E,
                       w.grad_queries,
                       grad_keys,
                       grad_keys + matrix,
                       w.scratch});
    if (marked != 0) add_marked(c, t, marked, low, high, grad_keys + matrix);
    write_grad_queries(c, t, w.grad_queries);
  }
}

// Adds the splits in order, turns dK back and writes both in the input's dtype.
template <typename T>
void write_grad_keys(const Context<T>& c, const Rows<T>& grad_k, const Rows<T>& grad_v) {
  const Geometry<float>& g = c.g;
  const int64_t matrix = g.keys * c.padded;
  // The packed queries carried scale / softcap, or scale * log2(e).
  const float factor = g.softcap > 0.0f ? g.softcap : kLn2;
  at::parallel_for(0, g.batch * g.kv_heads * g.keys, std::max<int64_t>(1, 16384 / g.dim),
                   [&](int64_t begin, int64_t end) {
                     float sums[2][kMaxHeadDim];
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t pair = i / g.keys, key = i % g.keys, b = pair / g.kv_heads, h = pair % g.kv_heads;
                       const float* from = c.partials + pair * c.splits * 2 * matrix + key * c.padded;
                       for (int part = 0; part < 2; ++part) {
                         std::memcpy(sums[part], from + part * matrix, g.dim * sizeof(float));
                         for (int64_t split = 1; split < c.splits; ++split)
                           for (int64_t d = 0; d < g.dim; ++d) sums[part][d] += from[(2 * split + part) * matrix + d];
                       }
                       const int64_t from_end = g.keys - key;
                       rotate_row(g, sums[0], g.angles(g.cos, b, from_end), g.angles(g.sin, b, from_end), -1.0f, factor,
                                  grad_k.at(b, key, h));
                       T* to = grad_v.at(b, key, h);
                       for (int64_t d = 0; d < g.dim; ++d) to[d] = static_cast<T>(sums[1][d]);
                     }
                   });
}

// d sink_h = -sum_i exp(sink_h - lse_i) delta_i, in a fixed order and in double. A row that sees nothing adds nothing.
void write_grad_sinks(const Geometry<float>& g, const float* lse, const float* delta, float* grad_sinks) {
  for (int64_t h = 0; h < g.heads; ++h) {
    double sum = 0.0;
    for (int64_t b = 0; b < g.batch; ++b)
      for (int64_t i = 0; i < g.queries; ++i) {
        const int64_t index = (b * g.heads + h) * g.queries + i;
        if (lse[index] == -std::numeric_limits<float>::infinity()) continue;
        sum -= std::exp2(in_log2(g.sinks[h]) - shift_of(lse[index])) * delta[index];
      }
    grad_sinks[h] = static_cast<float>(sum);
  }
}

template <typename T>
void backward_typed(const Inputs& in, const Tensor& grad_out, const Optional& grad_lse, const Tensor& out,
                    const Tensor& lse, const Tensor& rest, Tensor& grad_q, Tensor& grad_k, Tensor& grad_v,
                    Tensor& grad_sinks) {
  const Geometry<float> g = make_geometry<float>(in.q, in.k, in.cos, in.sin, in.cu_seqlens, in.sinks, in.options);
  const Kernels& kernel = kernels();
  const int64_t padded = (g.dim + kernel.lanes - 1) / kernel.lanes * kernel.lanes, pairs = g.batch * g.kv_heads;
  const int64_t blocks = (g.rows() + kTaskRows - 1) / kTaskRows;
  const int64_t splits = std::clamp<int64_t>((kTargetTasks + pairs - 1) / pairs, 1, std::max<int64_t>(blocks, 1));
  const auto fp32 = in.q.options().dtype(at::kFloat);
  Tensor packed = at::empty({2, g.batch, g.kv_heads, g.keys, g.dim}, fp32);
  Tensor partials = at::empty({pairs, splits, 2, g.keys, padded}, fp32);
  Tensor delta = at::empty(lse.sizes(), fp32);
  float *keys = packed.mutable_data_ptr<float>(), *values = keys + packed.numel() / 2;
  pack<float, T>(g, rows_of<T>(in.k), g.keys, g.kv_heads, true, keys);
  pack<float, T>(g, rows_of<T>(in.v), g.keys, g.kv_heads, false, values);
  Tensor finite_keys = packed.select(0, 0);
  std::vector<uint8_t> lost_keys;
  if (!finite_tensor(finite_keys)) {
    lost_keys.resize(finite_keys.numel() / g.dim);
    for (size_t key = 0; key < lost_keys.size(); ++key) lost_keys[key] = !all_finite(keys + key * g.dim, g.dim);
    finite_keys = finite_keys.clone();
    silence(finite_keys.mutable_data_ptr<float>(), finite_keys.numel());
  }
  const Context<T> context{g,
                           kernel,
                           kernel.width,
                           padded,
                           blocks,
                           splits,
                           keys,
                           finite_keys.const_data_ptr<float>(),
                           values,
                           lost_keys.empty() ? nullptr : lost_keys.data(),
                           rows_of<T>(in.q),
                           rows_of<T>(grad_out),
                           rows_of<T>(out),
                           rest.const_data_ptr<Rest<T>>(),
                           mutable_rows_of<T>(grad_q),
                           lse.const_data_ptr<float>(),
                           grad_lse ? grad_lse->const_data_ptr<float>() : nullptr,
                           delta.mutable_data_ptr<float>(),
                           partials.mutable_data_ptr<float>()};
  run_tasks(pairs * splits, workspace_floats(g.dim, padded), [&](int64_t task, float* scratch) {
    backward_task(context, task / splits, task % splits, split_workspace(scratch, g.dim, padded));
  });
  write_grad_keys(context, mutable_rows_of<T>(grad_k), mutable_rows_of<T>(grad_v));
  if (in.sinks) write_grad_sinks(g, context.lse, context.delta, grad_sinks.mutable_data_ptr<float>());
}

BackwardResult backward(const Inputs& in, const Tensor& grad_out, const Optional& grad_lse, const Tensor& out,
                        const Tensor& lse, const Tensor& rest) {
  Tensor grad_q = at::empty(in.q.sizes(), in.q.options());
  Tensor grad_k = at::empty(in.k.sizes(), in.k.options()), grad_v = at::empty(in.v.sizes(), in.v.options());
  const bool wide = in.q.scalar_type() == at::kDouble;
  Tensor grad_sinks =
      at::zeros({in.sinks ? in.sinks->numel() : 0}, in.q.options().dtype(wide && in.sinks ? at::kDouble : at::kFloat));
  if (in.q.numel() == 0) {
    grad_k.zero_();
    grad_v.zero_();
    return {grad_q, grad_k, grad_v, in.sinks ? grad_sinks.to(in.sinks->scalar_type()) : grad_sinks};
  }
  if (wide) backward_double(in, grad_out, grad_lse, out, lse, rest, grad_q, grad_k, grad_v, grad_sinks);
  else
    for_dtype(in.q.scalar_type(), [&]<typename T>() {
      backward_typed<T>(in, grad_out, grad_lse, out, lse, rest, grad_q, grad_k, grad_v, grad_sinks);
    });
  return {grad_q, grad_k, grad_v, in.sinks ? grad_sinks.to(in.sinks->scalar_type()) : grad_sinks};
}

}  // namespace astrobiogen::attention
