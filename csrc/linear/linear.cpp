// Linear layers of narrow widths on the CPU in fp32: y = x W^T + b, and the gradients. Formulas:
// astrobiogen/kernels/linear/reference.py.
//
// A BLAS packs both operands, whatever their size. Here one of them is a matrix of at most 512 x 512 that stays in the
// cache and the other one is read once, so only the small one is packed (and nothing for the weight's gradient).
// Measured in benchmarks/bench_linear.py; other sizes and dtypes go to PyTorch.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/autograd.h"
#include "common/checks.h"
#include "common/entry.h"
#include "gemm/blocks.h"

namespace astrobiogen::linear {

using at::Tensor;
using gemm::Outputs;
using gemm::Pack;
using gemm::Product;
using gemm::Rows;
using gemm::WeightGradient;

// Rows that meet one panel of the packed weight before the next panel: 64 x 136 floats are 35 KB, a second-level
// cache's worth at the largest width.
constexpr int64_t kRows = 64;

// a [rows, depth] times `matrix`, [columns, depth] if transposed, else [depth, columns].
void product(const float* a, const Tensor& matrix, bool transposed, const float* bias, int64_t rows, int64_t depth,
             int64_t columns, float* out) {
  const int64_t padded = gemm::padded_columns(columns);
  const auto panels = std::make_unique_for_overwrite<float[]>(padded * depth);
  dispatch<Pack>(matrix.const_data_ptr<float>(), depth, columns, transposed, panels.get());
  std::vector<float> starts;
  if (bias != nullptr) starts.assign(bias, bias + columns), starts.resize(padded);
  const Product p{a, depth, panels.get(), bias == nullptr ? nullptr : starts.data(), out, columns, depth, columns};
  const int64_t chunks = rows / kRows, grain = std::max<int64_t>(1, (1 << 18) / (kRows * depth * columns));
  at::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk)
      dispatch<Rows>(p, chunk * kRows, chunk + 1 == chunks ? rows : (chunk + 1) * kRows);
  });
}

void check_layer(const check::Op& op, const Tensor& x, const Tensor& weight) {
  op.floating(x, "x");
  op.rank(x, "x", 1, check::kAnyRank, "[..., K]");
  op.dtype(weight, "weight", x.scalar_type());
  op.rank(weight, "weight", 2, 2, "[N, K]");
  op.shape(weight, "weight", {weight.size(0), x.size(-1)}, "[N, K], K the last axis of x");
}

Tensor forward(const Tensor& x_any, const Tensor& weight_any, const std::optional<Tensor>& bias) {
  constexpr check::Op op("astrobiogen::linear");
  check_layer(op, x_any, weight_any);
  if (bias) {
    op.dtype(*bias, "bias", x_any.scalar_type());
    op.shape(*bias, "bias", {weight_any.size(0)}, "[N], the rows of weight");
  }
  if (!gemm::serves(x_any, weight_any, gemm::rows_of(x_any))) return at::linear(x_any, weight_any, bias);
  const Tensor x = x_any.contiguous(), weight = weight_any.contiguous(),
               start = bias.has_value() ? bias->contiguous() : Tensor();
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = weight.size(0);
  Tensor out = at::empty(shape, x.options());
  product(x.const_data_ptr<float>(), weight, true, start.defined() ? start.const_data_ptr<float>() : nullptr,
          gemm::rows_of(x), weight.size(1), weight.size(0), out.mutable_data_ptr<float>());
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& x_any, const Tensor& weight_any, bool need_x,
                                    bool need_weight) {
  constexpr check::Op op("astrobiogen::linear_backward");
  check_layer(op, x_any, weight_any);
  op.dtype(grad_any, "grad", x_any.scalar_type());
  op.rows_like(grad_any, "grad", x_any, weight_any.size(0), "[..., N], N the rows of weight");
  const Tensor grad = grad_any.contiguous(), weight = weight_any.contiguous();
  const int64_t outputs = weight.size(0), inputs = weight.size(1), rows = gemm::rows_of(x_any);
  const bool own = gemm::serves(x_any, weight, rows);
  Tensor grad_x = at::empty({0}, x_any.options()), grad_weight = at::empty({0}, weight.options());
  if (need_x) {
    grad_x = at::empty(x_any.sizes(), x_any.options());
    if (own)
      product(grad.const_data_ptr<float>(), weight, false, nullptr, rows, outputs, inputs,
              grad_x.mutable_data_ptr<float>());
    else grad_x = at::mm(grad.reshape({-1, outputs}), weight).view(x_any.sizes());
  }
  if (need_weight && own) {
    const Tensor x = x_any.contiguous();
    grad_weight = at::zeros(weight.sizes(), weight.options());
    const WeightGradient w{grad.const_data_ptr<float>(),
                           outputs,
                           x.const_data_ptr<float>(),
                           grad_weight.mutable_data_ptr<float>(),
                           rows,
                           outputs,
                           inputs};
    const int64_t blocks = (outputs + gemm::block_rows() - 1) / gemm::block_rows();
    at::parallel_for(0, blocks, std::max<int64_t>(1, (1 << 20) / (rows * inputs)),
                     [&](int64_t begin, int64_t end) { dispatch<Outputs>(w, begin, end); });
  } else if (need_weight) {
    grad_weight = at::mm(grad.reshape({-1, outputs}).t(), x_any.reshape({-1, inputs}));
  }
  return {grad_x, grad_weight};
}

const auto& layer_op() {
  using Call = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&);
  static const auto call = op<Call>("astrobiogen::linear");
  return call;
}

// Autograd in C++: a Python formula costs about 40 us per call, as much as the arithmetic of a small layer.
struct Function : torch::autograd::Function<Function> {
  static Tensor forward(torch::autograd::AutogradContext* ctx, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias) {
    ctx->save_for_backward({x, weight});
    ctx->saved_data["bias"] = bias.has_value();
    return below_autograd(layer_op(), x, weight, bias);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    static const auto call = op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool, bool)>(
        "astrobiogen::linear_backward");
    if (!grads[0].defined()) return {Tensor(), Tensor(), Tensor()};
    const auto saved = ctx->get_saved_variables();
    const bool need_x = ctx->needs_input_grad(0), need_weight = ctx->needs_input_grad(1);
    Tensor grad_x, grad_weight, grad_bias;
    if (need_x || need_weight)
      std::tie(grad_x, grad_weight) = gradients(call, grads[0], saved[0], saved[1], need_x, need_weight);
    if (ctx->saved_data["bias"].toBool() && ctx->needs_input_grad(2))
      grad_bias = at::sum(grads[0].reshape({-1, grads[0].size(-1)}), 0);
    return {need_x ? grad_x : Tensor(), need_weight ? grad_weight : Tensor(), grad_bias};
  }
};

Tensor differentiable(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  if (any_tangent(x, weight, bias)) return at::linear(x, weight, bias);
  return any_gradient(x, weight, bias) ? Function::apply(x, weight, bias) : below_autograd(layer_op(), x, weight, bias);
}

bool fits(const Tensor& x, const Tensor& weight, const Tensor* bias) {
  const auto type = weight.scalar_type();
  return x.dim() > 0 && weight.dim() == 2 && weight.size(1) == x.size(-1) && x.scalar_type() == type &&
         (bias == nullptr || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->scalar_type() == type));
}

// linear(x, weight, bias or None).
PyObject* from_python(PyObject*, entry::Arguments given, Py_ssize_t count) {
  if (count != 3 || !entry::undisturbed()) return entry::declined();
  const Tensor *x = entry::plain(given[0]), *weight = entry::plain(given[1]);
  const Tensor* bias = given[2] == Py_None ? nullptr : entry::plain(given[2]);
  if (x == nullptr || weight == nullptr || (bias == nullptr && given[2] != Py_None) || !fits(*x, *weight, bias))
    return entry::declined();
  return entry::result_of([&] {
    const auto start = bias == nullptr ? std::nullopt : std::optional<Tensor>(*bias);
    const bool own = gemm::serves(*x, *weight, gemm::rows_of(*x));
    // Gradients of fp32 are the op's, whose backward pass no autocast rounds.
    const bool op = own || (x->scalar_type() == at::kFloat && any_gradient(*x, *weight, start));
    return op ? layer_op().call(*x, *weight, start) : at::linear(*x, *weight, start);
  });
}

const entry::Entry kEntry("linear", &from_python, "ops.linear for plain CPU tensors that fit; else None.");

}  // namespace astrobiogen::linear

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("linear", &astrobiogen::linear::forward);
  m.impl("linear_backward", &astrobiogen::linear::backward);
}

TORCH_LIBRARY_IMPL(astrobiogen, AutogradCPU, m) { m.impl("linear", &astrobiogen::linear::differentiable); }
