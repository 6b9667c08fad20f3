// Linear layers of narrow widths on the CPU in fp32: y = x W^T + b, and the gradients. Formulas: astrobiogen/kernels/linear/reference.py.
//
// A BLAS packs both operands, whatever their size. Here one of them is a matrix of at most 512 x 512 that stays in the cache and the other one is read
// once, so only the small one is packed (and nothing for the weight's gradient). Measured in benchmarks/bench_linear.py; other sizes and dtypes go to PyTorch.
//
// A block of registers: R rows x 2 vectors of N lanes. AVX-512: 8 x 2 accumulators; AVX2: 4 x 2. Per step of the depth, R x 2 multiply-adds meet 2 vector
// loads and R broadcasts.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/dispatch.h"
#include "common/pairs.h"

namespace astrobiogen::linear {

using at::Tensor;

constexpr int64_t kMostWidth = 512;   // of either side of the weight
constexpr int64_t kFewestRows = 64;   // below, packing the weight costs more than it saves
constexpr int64_t kFewestWork = 1 << 17;  // multiply-adds
// Rows that meet one panel of the packed weight before the next panel: 64 x 136 floats are 35 KB, a second-level cache's worth at the largest width.
constexpr int64_t kRows = 64;
// Rows per partial sum of the weight's gradient: a panel of 32 columns is 16 KB; the sum of 65 such sums also rounds less than one of 8,256 terms.
constexpr int64_t kDepth = 128;

template <Level L>
struct Blocking {
  static constexpr int N = kWidth<L>;
  static constexpr int R = L == Level::kAvx512 ? 8 : 4;
  static constexpr int P = 2 * N;  // columns of a panel
};

constexpr int64_t kWidestPanel = 32;
constexpr int64_t kMostBlockRows = 8;

// c[r][0 .. V N) (+)= start[0 .. V N) + sum_k a[r row_step + k depth_step] b[k ldb + 0 .. V N) for R rows r.
template <Level L, int V, bool Add>
ASTRO_INLINE void multiply(const float* a, int64_t row_step, int64_t depth_step, const float* b, int64_t ldb, int64_t depth, const float* start, float* c,
                           int64_t ldc) {
  constexpr int N = Blocking<L>::N, R = Blocking<L>::R;
  using Vector = simd::F<N>;
  using Memory = typename simd::Lanes<N>::FloatMemory;
  Vector sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < V; ++n) sums[r][n] = start == nullptr ? Vector{} : *reinterpret_cast<const Memory*>(start + n * N);
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[V];
#pragma GCC unroll 2
    for (int n = 0; n < V; ++n) right[n] = *reinterpret_cast<const Memory*>(b + k * ldb + n * N);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const float left = a[r * row_step + k * depth_step];
#pragma GCC unroll 2
      for (int n = 0; n < V; ++n) sums[r][n] += left * right[n];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < V; ++n) {
      Memory* to = reinterpret_cast<Memory*>(c + r * ldc + n * N);
      if constexpr (Add) *to += sums[r][n];
      else *to = sums[r][n];
    }
}

// The same for the first `live` columns of a panel and `rows` rows of c; a, b and start have whole blocks.
template <Level L, bool Add>
ASTRO_INLINE void multiply_edge(const float* a, int64_t row_step, int64_t depth_step, const float* b, int64_t ldb, int64_t depth, const float* start,
                                float* c, int64_t ldc, int64_t rows, int64_t live) {
  constexpr int N = Blocking<L>::N, R = Blocking<L>::R, P = Blocking<L>::P;
  alignas(64) float block[R * P];
  if (live > N) multiply<L, 2, false>(a, row_step, depth_step, b, ldb, depth, start, block, P);
  else multiply<L, 1, false>(a, row_step, depth_step, b, ldb, depth, start, block, P);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t j = 0; j < live; ++j) c[r * ldc + j] = Add ? c[r * ldc + j] + block[r * P + j] : block[r * P + j];
}

// out [rows, columns] = a [rows, depth] times a matrix in panels [columns / P][depth][P], plus bias in panels (or null).
struct Product {
  const float* a;
  const float* panels;
  const float* bias;
  float* out;
  int64_t rows, depth, columns;
};

struct Rows {
  template <Level L>
  static ASTRO_INLINE void run(const Product& p, int64_t first, int64_t last) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    for (int64_t column = 0; column < p.columns; column += P) {
      const int64_t live = std::min<int64_t>(P, p.columns - column);
      const float *panel = p.panels + column * p.depth, *start = p.bias == nullptr ? nullptr : p.bias + column;
      for (int64_t at = first; at < last; at += R) {
        const int64_t row = std::min(at, last - R);  // the last block begins early and writes some rows again
        const float* a = p.a + row * p.depth;
        float* c = p.out + row * p.columns + column;
        if (live == P) multiply<L, 2, false>(a, p.depth, 1, panel, P, p.depth, start, c, p.columns);
        else multiply_edge<L, false>(a, p.depth, 1, panel, P, p.depth, start, c, p.columns, R, live);
      }
    }
  }
};

// to = matrix [columns, depth] (or, not transposed, [depth, columns]) in panels [columns / P][depth][P], zeros behind the last column.
struct Pack {
  template <Level L>
  static ASTRO_INLINE void run(const float* matrix, int64_t depth, int64_t columns, bool transposed, float* to) {
    constexpr int P = Blocking<L>::P;
    for (int64_t column = 0; column < columns; column += P, to += depth * P) {
      const int64_t live = std::min<int64_t>(P, columns - column);
      if (live < P) std::memset(to, 0, depth * P * sizeof(float));
      if (transposed) {
        for (int64_t j = 0; j < live; ++j)
          for (int64_t k = 0; k < depth; ++k) to[k * P + j] = matrix[(column + j) * depth + k];
      } else {
        for (int64_t k = 0; k < depth; ++k) std::memcpy(to + k * P, matrix + k * columns + column, live * sizeof(float));
      }
    }
  }
};

// grad_weight [outputs, inputs] += sum over rows of grad [rows, outputs] x [rows, inputs].
struct WeightGradient {
  const float *grad, *x;
  float* out;
  int64_t rows, outputs, inputs;
};

struct Outputs {
  // Blocks of R outputs, [first, last).
  template <Level L>
  static ASTRO_INLINE void run(const WeightGradient& w, int64_t first, int64_t last) {
    constexpr int R = Blocking<L>::R, P = Blocking<L>::P;
    alignas(64) float right[kDepth * kWidestPanel], left[kDepth * kMostBlockRows];
    for (int64_t row = 0; row < w.rows; row += kDepth) {
      const int64_t depth = std::min(kDepth, w.rows - row);
      for (int64_t column = 0; column < w.inputs; column += P) {
        const int64_t live = std::min<int64_t>(P, w.inputs - column);
        const float* b = w.x + row * w.inputs + column;
        if (live < P) b = edge(b, w.inputs, depth, live, P, right);
        const int64_t ldb = live < P ? P : w.inputs;
        for (int64_t block = first; block < last; ++block) {
          const int64_t output = block * R, wide = std::min<int64_t>(R, w.outputs - output);
          const float* a = w.grad + row * w.outputs + output;
          if (wide < R) a = edge(a, w.outputs, depth, wide, R, left);
          const int64_t step = wide < R ? R : w.outputs;
          float* c = w.out + output * w.inputs + column;
          if (wide == R && live == P) multiply<L, 2, true>(a, 1, step, b, ldb, depth, nullptr, c, w.inputs);
          else multiply_edge<L, true>(a, 1, step, b, ldb, depth, nullptr, c, w.inputs, wide, live);
        }
      }
    }
  }

  // `live` columns of `depth` rows, padded to `width` with zeros.
  static ASTRO_INLINE const float* edge(const float* from, int64_t stride, int64_t depth, int64_t live, int64_t width, float* to) {
    std::memset(to, 0, depth * width * sizeof(float));
    for (int64_t k = 0; k < depth; ++k)
      for (int64_t j = 0; j < live; ++j) to[k * width + j] = from[k * stride + j];
    return to;
  }
};

int64_t block_rows() { return level() == Level::kAvx512 ? Blocking<Level::kAvx512>::R : Blocking<Level::kAvx2>::R; }
int64_t panel_width() { return level() == Level::kAvx512 ? Blocking<Level::kAvx512>::P : Blocking<Level::kAvx2>::P; }

bool serves(const Tensor& x, const Tensor& weight, int64_t rows) {
  return x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat && weight.size(0) <= kMostWidth && weight.size(1) <= kMostWidth &&
         rows >= kFewestRows && rows * weight.numel() >= kFewestWork && level() != Level::kBaseline;
}

int64_t rows_of(const Tensor& x) { return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1); }

// a [rows, depth] times `matrix`, [columns, depth] if transposed, else [depth, columns].
void product(const float* a, const Tensor& matrix, bool transposed, const float* bias, int64_t rows, int64_t depth, int64_t columns, float* out) {
  const int64_t padded = (columns + panel_width() - 1) / panel_width() * panel_width();
  const auto panels = std::make_unique_for_overwrite<float[]>(padded * depth);
  dispatch<Pack>(matrix.const_data_ptr<float>(), depth, columns, transposed, panels.get());
  std::vector<float> starts;
  if (bias != nullptr) starts.assign(bias, bias + columns), starts.resize(padded);
  const Product p{a, panels.get(), bias == nullptr ? nullptr : starts.data(), out, rows, depth, columns};
  const int64_t chunks = rows / kRows, grain = std::max<int64_t>(1, (1 << 18) / (kRows * depth * columns));
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) dispatch<Rows>(p, chunk * kRows, chunk + 1 == chunks ? rows : (chunk + 1) * kRows);
  });
}

Tensor forward(const Tensor& x_any, const Tensor& weight_any, const std::optional<Tensor>& bias) {
  if (!serves(x_any, weight_any, rows_of(x_any))) return at::linear(x_any, weight_any, bias);
  const Tensor x = x_any.contiguous(), weight = weight_any.contiguous(), start = bias.has_value() ? bias->contiguous() : Tensor();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor out = at::empty(shape, x.options());
  product(x.const_data_ptr<float>(), weight, true, start.defined() ? start.const_data_ptr<float>() : nullptr, rows_of(x), weight.size(1), weight.size(0),
          out.mutable_data_ptr<float>());
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& weight_any, bool need_x, bool need_weight) {
  const Tensor grad = grad_any.contiguous(), weight = weight_any.contiguous();
  const int64_t outputs = weight.size(0), inputs = weight.size(1), rows = rows_of(x_any);
  const bool own = serves(x_any, weight, rows);
  Tensor grad_x = at::empty({0}, x_any.options()), grad_weight = at::empty({0}, weight.options());
  if (need_x) {
    grad_x = at::empty(x_any.sizes(), x_any.options());
    if (own) product(grad.const_data_ptr<float>(), weight, false, nullptr, rows, outputs, inputs, grad_x.mutable_data_ptr<float>());
    else grad_x = at::mm(grad.reshape({-1, outputs}), weight).view(x_any.sizes());
  }
  if (need_weight && own) {
    const Tensor x = x_any.contiguous();
    grad_weight = at::zeros(weight.sizes(), weight.options());
    const WeightGradient w{grad.const_data_ptr<float>(), x.const_data_ptr<float>(), grad_weight.mutable_data_ptr<float>(), rows, outputs, inputs};
    const int64_t blocks = (outputs + block_rows() - 1) / block_rows();
    at::parallel_for(0, blocks, std::max<int64_t>(1, (1 << 20) / (rows * inputs)), [&](int64_t begin, int64_t end) { dispatch<Outputs>(w, begin, end); });
  } else if (need_weight) {
    grad_weight = at::mm(grad.reshape({-1, outputs}).t(), x_any.reshape({-1, inputs}));
  }
  return {grad_x, grad_weight};
}

// Autograd in C++: a Python formula costs about 40 us per call, as much as the arithmetic of [256, 64] x [64, 64]. `linear_backward` goes through the
// dispatcher, so that its own rule refuses a second derivative.
struct Function : torch::autograd::Function<Function> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    at::AutoDispatchBelowADInplaceOrView below;
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("astrobiogen::linear", "").typed<Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&)>();
    ctx->save_for_backward({x, weight});
    ctx->saved_data["bias"] = bias.has_value();
    return op.call(x, weight, bias);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx, torch::autograd::variable_list grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("astrobiogen::linear_backward", "")
                               .typed<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool, bool)>();
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const bool need_x = ctx->needs_input_grad(0), need_weight = ctx->needs_input_grad(1);
    Tensor grad_x, grad_weight, grad_bias;
    if (need_x || need_weight) std::tie(grad_x, grad_weight) = op.call(grads[0], saved[0], saved[1], need_x, need_weight);
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2)) grad_bias = at::sum(grads[0].reshape({-1, grads[0].size(-1)}), 0);
    return {need_x ? grad_x : Tensor(), need_weight ? grad_weight : Tensor(), grad_bias};
  }
};

Tensor differentiable(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  return Function::apply(x, weight, bias);
}

}  // namespace astrobiogen::linear

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("linear", &astrobiogen::linear::forward);
  m.impl("linear_backward", &astrobiogen::linear::backward);
}

TORCH_LIBRARY_IMPL(astrobiogen, AutogradCPU, m) { m.impl("linear", &astrobiogen::linear::differentiable); }
