// The SwiGLU block y = (silu(x G^T) * (x U^T)) D^T on the CPU in fp32 for narrow widths, forward and backward.
// Formulas: astrobiogen/kernels/swiglu_mlp/reference.py.
//
// Rows pass in chunks that stay in the second-level cache from the first product to the last: between x and y only gate
// and up are written, for the backward, and there silu(gate) * up, its gradient, and those of gate and up exist for one
// chunk at a time. The composition of three linear layers and `swiglu` writes and reads each of them (9 tensors of
// [rows, intermediate]).
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "common/autograd.h"
#include "common/checks.h"
#include "common/core.h"
#include "common/entry.h"
#include "common/gate.h"
#include "gemm/blocks.h"

namespace astrobiogen::swiglu_mlp {

using at::Tensor;
using gemm::Outputs;
using gemm::Pack;
using gemm::Product;
using gemm::Rows;
using gemm::WeightGradient;

// Floats of one chunk of [rows, intermediate]: 64 KB, of which the backward holds four.
constexpr int64_t kChunk = 1 << 14;
constexpr int64_t kFewestRows = 32;
// Segments of rows with a partial sum of the weights' gradients each: their number does not depend on the threads, so
// neither do the bits.
constexpr int64_t kSegmentRows = 256, kMostSegments = 16;

// On a core whose BLAS leads, the largest weights of one block that the cache between the products still makes up for,
// and those of which it does so from some rows on.
constexpr int64_t kBlasWeights = 2048, kBlasTallWeights = 8192, kBlasTallRows = 512;

struct Sizes {
  int64_t rows, hidden, inner;

  int64_t chunk() const { return std::clamp<int64_t>(kChunk / inner, kFewestRows, gemm::kDepth); }
  // The last chunk of a segment takes what is left over, so a chunk is up to twice as long.
  int64_t buffer() const { return 2 * chunk(); }
  // Rows of the gradients of gate and up lie a line further apart than a power of two, which would share the cache's
  // sets.
  int64_t step() const { return 2 * inner + 16; }
  int64_t segments() const { return std::clamp<int64_t>(rows / kSegmentRows, 1, kMostSegments); }
  int64_t begin(int64_t segment) const { return rows * segment / segments(); }
  int64_t end(int64_t segment) const { return begin(segment + 1); }
};

// Calls body(first row, rows) for the chunks of [begin, end).
template <typename Body>
ASTRO_INLINE void in_chunks(const Sizes& s, int64_t begin, int64_t end, Body&& body) {
  const int64_t chunks = std::max<int64_t>(1, (end - begin) / s.chunk());
  for (int64_t c = 0; c < chunks; ++c) {
    const int64_t first = begin + c * s.chunk();
    body(first, (c + 1 == chunks ? end : first + s.chunk()) - first);
  }
}

struct Forward {
  Sizes s;
  const float *x, *both, *down;  // panels of [G; U] transposed and of D transposed
  float *gates, *out;            // [rows, 2 inner] (gate, up) and [rows, hidden]
};

struct ForwardRows {
  template <Level L>
  static ASTRO_INLINE void run(const Forward& f, float* product, int64_t begin, int64_t end) {
    const int64_t hidden = f.s.hidden, inner = f.s.inner;
    in_chunks(f.s, begin, end, [&](int64_t first, int64_t rows) ASTRO_LAMBDA_INLINE {
      float* gates = f.gates + first * 2 * inner;
      Rows::run<L>({f.x + first * hidden, hidden, f.both, nullptr, gates, 2 * inner, hidden, 2 * inner}, 0, rows);
      for (int64_t row = 0; row < rows; ++row) gated<kWidth<L>>(gates + row * 2 * inner, inner, product + row * inner);
      Rows::run<L>({product, inner, f.down, nullptr, f.out + first * hidden, hidden, inner, hidden}, 0, rows);
    });
  }

  template <int N>
  static ASTRO_INLINE void gated(const float* gate, int64_t inner, float* product) {
    const float* up = gate + inner;
    int64_t j = 0;
    for (; j + N <= inner; j += N)
      simd::store_as<simd::F<N>>(
          product + j, simd::silu<N>(simd::load_as<simd::F<N>>(gate + j)) * simd::load_as<simd::F<N>>(up + j));
    for (; j < inner; ++j) product[j] = gate[j] / (1.0f + std::exp(-gate[j])) * up[j];
  }
};

struct Backward {
  Sizes s;
  const float *grad, *x, *gates;
  const float *down, *both;  // panels of D and of [G; U]
  float* grad_x;             // or null
};

// Buffers of one thread.
struct Scratch {
  std::vector<float> product, slopes;  // silu(gate) * up and its gradient; then the gradients of gate and up
  explicit Scratch(const Sizes& s) : product(s.buffer() * s.inner), slopes(s.buffer() * (s.inner + s.step())) {}
};

struct BackwardRows {
  // grad_both [2 inner, hidden] and grad_down [hidden, inner] take this segment's part; null if not wanted.
  template <Level L>
  static ASTRO_INLINE void run(const Backward& b, Scratch& scratch, int64_t begin, int64_t end, float* grad_both,
                               float* grad_down) {
    const int64_t hidden = b.s.hidden, inner = b.s.inner, blocks = gemm::Blocking<L>::R;
    float *product = scratch.product.data(), *of_product = scratch.slopes.data(),
          *of_gates = of_product + b.s.buffer() * inner;
    in_chunks(b.s, begin, end, [&](int64_t first, int64_t rows) ASTRO_LAMBDA_INLINE {
      const float *grad = b.grad + first * hidden, *x = b.x + first * hidden;
      Rows::run<L>({grad, hidden, b.down, nullptr, of_product, inner, hidden, inner}, 0, rows);
      for (int64_t row = 0; row < rows; ++row)
        slopes<kWidth<L>>(b.gates + (first + row) * 2 * inner, of_product + row * inner, inner, product + row * inner,
                          of_gates + row * b.s.step());
      if (b.grad_x != nullptr)
        Rows::run<L>({of_gates, b.s.step(), b.both, nullptr, b.grad_x + first * hidden, hidden, 2 * inner, hidden}, 0,
                     rows);
      if (grad_both == nullptr) return;
      Outputs::run<L>({of_gates, b.s.step(), x, grad_both, rows, 2 * inner, hidden}, 0,
                      (2 * inner + blocks - 1) / blocks);
      Outputs::run<L>({grad, hidden, product, grad_down, rows, hidden, inner}, 0, (hidden + blocks - 1) / blocks);
    });
  }

  template <int N>
  static ASTRO_INLINE void slopes(const float* gate, const float* of_product, int64_t inner, float* product,
                                  float* of_gate) {
    const float* up = gate + inner;
    float* of_up = of_gate + inner;
    int64_t j = 0;
    for (; j + N <= inner; j += N) {
      const auto g = simd::load_as<simd::F<N>>(gate + j), u = simd::load_as<simd::F<N>>(up + j),
                 d = simd::load_as<simd::F<N>>(of_product + j);
      const auto s = simd::gate_of<N>(g);
      const auto silu = g * s.open;
      simd::store_as<simd::F<N>>(product + j, silu * u);
      simd::store_as<simd::F<N>>(of_gate + j, d * u * (s.open * (1.0f + g * s.shut)));
      simd::store_as<simd::F<N>>(of_up + j, d * silu);
    }
    for (; j < inner; ++j) {
      const float open = 1.0f / (1.0f + std::exp(-gate[j])), silu = gate[j] * open;
      product[j] = silu * up[j];
      of_gate[j] = of_product[j] * up[j] * (open + silu * (1.0f - open));
      of_up[j] = of_product[j] * silu;
    }
  }
};

// [gate; up] as one matrix [2 inner, hidden].
std::vector<float> stacked(const Tensor& gate, const Tensor& up) {
  std::vector<float> both(2 * gate.numel());
  std::memcpy(both.data(), gate.const_data_ptr<float>(), gate.numel() * sizeof(float));
  std::memcpy(both.data() + gate.numel(), up.const_data_ptr<float>(), gate.numel() * sizeof(float));
  return both;
}

std::unique_ptr<float[]> packed(const float* matrix, int64_t depth, int64_t columns, bool transposed) {
  auto panels = std::make_unique_for_overwrite<float[]>(gemm::padded_columns(columns) * depth);
  dispatch<Pack>(matrix, depth, columns, transposed, panels.get());
  return panels;
}

// Whether the one kernel is faster than products one after the other.
bool serves(const Tensor& x, const Tensor& gate, const Tensor& down, const Sizes& s) {
  if (!gemm::serves_block(x, gate, s.rows) || !gemm::serves_block(x, down, s.rows)) return false;
  const int64_t weights = s.hidden * s.inner;
  return core() != Core::kIntel || weights <= kBlasWeights || (weights <= kBlasTallWeights && s.rows >= kBlasTallRows);
}

// Other sizes: PyTorch's products and the SwiGLU kernel.
std::tuple<Tensor, Tensor> compose_forward(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  static const auto swiglu = op<Tensor(const Tensor&)>("astrobiogen::swiglu_packed");
  const Tensor rows = x.reshape({-1, gate.size(1)});
  const int64_t inner = gate.size(0);
  const Tensor gates = at::empty({rows.size(0), 2 * inner}, rows.options());
  Tensor of_gate = gates.narrow(1, 0, inner),
         of_up = gates.narrow(1, inner, inner);  // the weights side by side would be copied in every call
  at::mm_out(of_gate, rows, gate.t());
  at::mm_out(of_up, rows, up.t());
  return {at::mm(swiglu.call(gates), down.t()).view(x.sizes()), gates};
}

// As above, by operators that forward-mode derivatives pass through: none writes into what is given.
std::tuple<Tensor, Tensor> compose_tangents(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  static const auto swiglu = op<Tensor(const Tensor&)>("astrobiogen::swiglu_packed");
  const Tensor gates = at::cat({at::linear(x, gate), at::linear(x, up)}, -1);
  return {at::linear(swiglu.call(gates), down), gates.reshape({-1, gates.size(-1)})};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> compose_backward(const Tensor& grad_any, const Tensor& x,
                                                            const Tensor& gates, const Tensor& gate, const Tensor& up,
                                                            const Tensor& down, bool need_x, bool need_weights) {
  static const auto swiglu = op<Tensor(const Tensor&)>("astrobiogen::swiglu_packed");
  static const auto slopes = op<Tensor(const Tensor&, const Tensor&)>("astrobiogen::swiglu_packed_backward");
  const int64_t inner = gate.size(0);
  const Tensor grad = grad_any.reshape({-1, down.size(0)}), rows = x.reshape({-1, gate.size(1)}),
               of_gates = slopes.call(at::mm(grad, down), gates);
  const Tensor of_gate = of_gates.narrow(1, 0, inner), of_up = of_gates.narrow(1, inner, inner),
               none = at::empty({0}, x.options());
  const Tensor grad_x = need_x ? at::addmm(at::mm(of_gate, gate), of_up, up).view(x.sizes()) : none;
  if (!need_weights) return {grad_x, none, none, none};
  return {grad_x, at::mm(of_gate.t(), rows), at::mm(of_up.t(), rows), at::mm(grad.t(), swiglu.call(gates))};
}

void check_block(const check::Op& op, const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  op.floating(x, "x");
  op.rank(x, "x", 1, check::kAnyRank, "[..., H]");
  op.dtype(gate, "gate", x.scalar_type());
  op.rank(gate, "gate", 2, 2, "[I, H]");
  op.shape(gate, "gate", {gate.size(0), x.size(-1)}, "[I, H], H the last axis of x");
  op.like(up, "up", gate, "the shape of gate");
  op.dtype(down, "down", x.scalar_type());
  op.shape(down, "down", {gate.size(1), gate.size(0)}, "[H, I], gate transposed");
}

// (y, [gate, up] of each row).
std::tuple<Tensor, Tensor> forward(const Tensor& x_any, const Tensor& gate_any, const Tensor& up_any,
                                   const Tensor& down_any) {
  constexpr check::Op op("astrobiogen::swiglu_mlp");
  check_block(op, x_any, gate_any, up_any, down_any);
  const Tensor x = x_any.contiguous(), gate = gate_any.contiguous(), up = up_any.contiguous(),
               down = down_any.contiguous();
  const Sizes s{gemm::rows_of(x), gate.size(1), gate.size(0)};
  if (!serves(x, gate, down, s)) return compose_forward(x, gate, up, down);
  Tensor out = at::empty(x.sizes(), x.options()), gates = at::empty({s.rows, 2 * s.inner}, x.options());
  const std::vector<float> both = stacked(gate, up);
  const auto first = packed(both.data(), s.hidden, 2 * s.inner, true),
             second = packed(down.const_data_ptr<float>(), s.inner, s.hidden, true);
  const Forward f{s,
                  x.const_data_ptr<float>(),
                  first.get(),
                  second.get(),
                  gates.mutable_data_ptr<float>(),
                  out.mutable_data_ptr<float>()};
  at::parallel_for(0, s.segments(), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> product(s.buffer() * s.inner);
    for (int64_t segment = begin; segment < end; ++segment)
      dispatch<ForwardRows>(f, product.data(), s.begin(segment), s.end(segment));
  });
  return {out, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_any, const Tensor& x_any,
                                                    const Tensor& gates_any, const Tensor& gate_any,
                                                    const Tensor& up_any, const Tensor& down_any, bool need_x,
                                                    bool need_weights) {
  constexpr check::Op op("astrobiogen::swiglu_mlp_backward");
  check_block(op, x_any, gate_any, up_any, down_any);
  op.like(grad_any, "grad", x_any, "the shape of x");
  op.dtype(gates_any, "gates", x_any.scalar_type());
  op.shape(gates_any, "gates", {gemm::rows_of(x_any), check::product(2, gate_any.size(0))}, "[rows of x, 2 I]");
  const Tensor gates = gates_any.contiguous();
  const Tensor grad = grad_any.contiguous(), x = x_any.contiguous(), gate = gate_any.contiguous(),
               up = up_any.contiguous(), down = down_any.contiguous();
  const Sizes s{gemm::rows_of(x), gate.size(1), gate.size(0)};
  if (!serves(x, gate, down, s)) return compose_backward(grad, x, gates, gate, up, down, need_x, need_weights);
  Tensor grad_x = need_x ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  const std::vector<float> both = stacked(gate, up);
  const auto second = packed(down.const_data_ptr<float>(), s.hidden, s.inner, false),
             first = packed(both.data(), 2 * s.inner, s.hidden, false);
  const Backward b{s,
                   grad.const_data_ptr<float>(),
                   x.const_data_ptr<float>(),
                   gates.const_data_ptr<float>(),
                   second.get(),
                   first.get(),
                   need_x ? grad_x.mutable_data_ptr<float>() : nullptr};
  const int64_t weights = 3 * s.inner * s.hidden;
  std::vector<float> parts(need_weights ? s.segments() * weights : 0);
  at::parallel_for(0, s.segments(), 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(s);
    for (int64_t segment = begin; segment < end; ++segment) {
      float* part = need_weights ? parts.data() + segment * weights : nullptr;
      dispatch<BackwardRows>(b, scratch, s.begin(segment), s.end(segment), part,
                             need_weights ? part + 2 * s.inner * s.hidden : nullptr);
    }
  });
  if (!need_weights)
    return {grad_x, at::empty({0}, x.options()), at::empty({0}, x.options()), at::empty({0}, x.options())};
  for (int64_t segment = 1; segment < s.segments(); ++segment)
    for (int64_t i = 0; i < weights; ++i) parts[i] += parts[segment * weights + i];
  Tensor grad_gate = at::empty(gate.sizes(), gate.options()), grad_up = at::empty_like(grad_gate),
         grad_down = at::empty(down.sizes(), down.options());
  const int64_t one = s.inner * s.hidden, bytes = one * static_cast<int64_t>(sizeof(float));
  std::memcpy(grad_gate.mutable_data_ptr<float>(), parts.data(), bytes);
  std::memcpy(grad_up.mutable_data_ptr<float>(), parts.data() + one, bytes);
  std::memcpy(grad_down.mutable_data_ptr<float>(), parts.data() + 2 * one, bytes);
  return {grad_x, grad_gate, grad_up, grad_down};
}

const auto& block_op() {
  static const auto call = op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>(
      "astrobiogen::swiglu_mlp");
  return call;
}

struct Function : torch::autograd::Function<Function> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* ctx, const Tensor& x,
                                                const Tensor& gate, const Tensor& up, const Tensor& down) {
    auto [out, gates] = below_autograd(block_op(), x, gate, up, down);
    ctx->save_for_backward({x, gates, gate, up, down});
    ctx->mark_non_differentiable({gates});  // internal: the public function never returns them
    return {out, gates};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 torch::autograd::variable_list grads) {
    static const auto call = op<std::tuple<Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool, bool)>(
        "astrobiogen::swiglu_mlp_backward");
    if (!grads[0].defined()) return torch::autograd::variable_list(4);
    const auto saved = ctx->get_saved_variables();
    const bool need_x = ctx->needs_input_grad(0),
               need_weights = ctx->needs_input_grad(1) || ctx->needs_input_grad(2) || ctx->needs_input_grad(3);
    auto [of_x, of_gate, of_up, of_down] =
        gradients(call, grads[0], saved[0], saved[1], saved[2], saved[3], saved[4], need_x, need_weights);
    if (!need_weights) return {of_x, Tensor(), Tensor(), Tensor()};
    return {need_x ? of_x : Tensor(), of_gate, of_up, of_down};
  }
};

std::tuple<Tensor, Tensor> differentiable(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  if (any_tangent(x, gate, up, down)) return compose_tangents(x, gate, up, down);
  if (!any_gradient(x, gate, up, down)) return below_autograd(block_op(), x, gate, up, down);
  const auto outputs = Function::apply(x, gate, up, down);
  return {outputs[0], outputs[1]};
}

bool fits(const Tensor& x, const Tensor& gate, const Tensor& up, const Tensor& down) {
  const auto type = x.scalar_type();
  return x.dim() > 0 && gate.dim() == 2 && gate.size(1) == x.size(-1) && up.sizes() == gate.sizes() &&
         down.dim() == 2 && down.size(0) == gate.size(1) && down.size(1) == gate.size(0) &&
         gate.scalar_type() == type && up.scalar_type() == type && down.scalar_type() == type;
}

// swiglu_mlp(x, gate, up, down).
PyObject* from_python(PyObject*, entry::Arguments given, Py_ssize_t count) {
  if (count != 4 || !entry::undisturbed()) return entry::declined();
  const Tensor *x = entry::plain(given[0]), *gate = entry::plain(given[1]), *up = entry::plain(given[2]),
               *down = entry::plain(given[3]);
  if (x == nullptr || gate == nullptr || up == nullptr || down == nullptr || !fits(*x, *gate, *up, *down))
    return entry::declined();
  return entry::result_of([&] { return std::get<0>(block_op().call(*x, *gate, *up, *down)); });
}

const entry::Entry kEntry("swiglu_mlp", &from_python, "ops.swiglu_mlp for plain CPU tensors that fit; else None.");

}  // namespace astrobiogen::swiglu_mlp

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("swiglu_mlp", &astrobiogen::swiglu_mlp::forward);
  m.impl("swiglu_mlp_backward", &astrobiogen::swiglu_mlp::backward);
}

TORCH_LIBRARY_IMPL(astrobiogen, AutogradCPU, m) { m.impl("swiglu_mlp", &astrobiogen::swiglu_mlp::differentiable); }
