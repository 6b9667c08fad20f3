// SwiGLU on the CPU, forward and backward, from separate or packed gate and up. Formulas: astrobiogen/kernels/swiglu/reference.py.
//
// Memory-bound: every input element is read once and every output element written once. Inputs may have any strides over their leading axes; only
// an input whose last axis is not contiguous is copied first. Contiguous inputs are treated as one long row, so that an odd width has no tails.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <tuple>
#include <type_traits>

#include "common/math.h"

namespace astrobiogen::swiglu {

using at::Tensor;

// Columns per task: long rows are cut here, so that [1, 10^7] runs on all threads; three fp32 streams of one task (48 KB) stay near L1.
constexpr int64_t kChunk = 4096;
// A thread's share below this many elements costs more to schedule (~5 us) than to compute.
constexpr int64_t kGrainElements = 16384;
constexpr int64_t kMaxAxes = 64;  // PyTorch's own limit

// The leading axes that the inputs do not let merge, and the row length left over. Outputs are dense rows `out_stride` apart.
struct Layout {
  int64_t axes = 0;
  int64_t rows = 1, columns = 0, chunks = 0;
  int64_t out_stride = 0;
  std::array<int64_t, kMaxAxes> sizes;  // innermost first
};

template <typename T>
struct Input {
  const T* data = nullptr;
  std::array<int64_t, kMaxAxes> strides;

  ASTRO_INLINE const T* row(const Layout& layout, int64_t index) const {
    const T* p = data;
    for (int64_t axis = 0; axis < layout.axes; ++axis) {
      p += index % layout.sizes[axis] * strides[axis];
      index /= layout.sizes[axis];
    }
    return p;
  }
};

template <typename T>
struct Forward {
  Layout layout;
  Input<T> gate, up;
  T* product;
  bool streamed;  // product bypasses the cache
};

template <typename T>
struct Backward {
  Layout layout;
  Input<T> gate, up, grad;
  T *grad_gate, *grad_up;
  T* product;     // null: not wanted
  bool streamed;  // the outputs bypass the cache
};

// sigmoid(g) and sigmoid(-g) from one exponential and one division; both keep their relative accuracy on either side of zero.
struct Gate {
  simd::f32x8 open, shut;
};

ASTRO_INLINE Gate gate_of(simd::f32x8 g) {
  const simd::f32x8 e = simd::exp_nonpositive(simd::negative_abs(g));
  const simd::f32x8 large = 1.0f / (1.0f + e);
  const simd::f32x8 small = e * large;
  return {simd::select_negative(g, small, large), simd::select_negative(g, large, small)};
}

ASTRO_INLINE double sigmoid(double g) {
  const double e = std::exp(-std::abs(g));
  return (g < 0.0 ? e : 1.0) / (1.0 + e);
}

template <typename T>
ASTRO_INLINE void put(T* p, simd::f32x8 v, bool streamed) {
  if (streamed) simd::stream8(p, v);
  else simd::store8(p, v);
}

template <typename T>
ASTRO_INLINE void forward_row(const T* gate, const T* up, T* product, int64_t count, bool streamed) {
  using namespace simd;
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t j = 0; j < count; ++j) product[j] = gate[j] * swiglu::sigmoid(gate[j]) * up[j];
  } else {
    int64_t j = 0;
    for (; j + kHalfLanes <= count; j += kHalfLanes) {
      const f32x8 g = load8(gate + j);
      put(product + j, g * gate_of(g).open * load8(up + j), streamed);
    }
    if (j < count) {
      const f32x8 g = load8_partial(gate + j, count - j);
      store8_partial(product + j, g * gate_of(g).open * load8_partial(up + j, count - j), count - j);
    }
  }
}

struct Gradients {
  simd::f32x8 gate, up, product;
};

ASTRO_INLINE Gradients gradients_of(simd::f32x8 g, simd::f32x8 u, simd::f32x8 grad) {
  const Gate s = gate_of(g);
  const simd::f32x8 silu = g * s.open;
  return {grad * u * (s.open * (1.0f + g * s.shut)), grad * silu, silu * u};
}

template <typename T>
ASTRO_INLINE void backward_row(const T* gate, const T* up, const T* grad, T* grad_gate, T* grad_up, T* product, int64_t count,
                               bool streamed) {
  using namespace simd;
  if constexpr (std::is_same_v<T, double>) {
    for (int64_t j = 0; j < count; ++j) {
      const double open = swiglu::sigmoid(gate[j]), shut = swiglu::sigmoid(-gate[j]);
      grad_gate[j] = grad[j] * up[j] * open * (1.0 + gate[j] * shut);
      grad_up[j] = grad[j] * gate[j] * open;
      if (product != nullptr) product[j] = gate[j] * open * up[j];
    }
  } else {
    int64_t j = 0;
    for (; j + kHalfLanes <= count; j += kHalfLanes) {
      const Gradients d = gradients_of(load8(gate + j), load8(up + j), load8(grad + j));
      put(grad_gate + j, d.gate, streamed);
      put(grad_up + j, d.up, streamed);
      if (product != nullptr) put(product + j, d.product, streamed);
    }
    if (j < count) {
      const int64_t rest = count - j;
      const Gradients d = gradients_of(load8_partial(gate + j, rest), load8_partial(up + j, rest), load8_partial(grad + j, rest));
      store8_partial(grad_gate + j, d.gate, rest);
      store8_partial(grad_up + j, d.up, rest);
      if (product != nullptr) store8_partial(product + j, d.product, rest);
    }
  }
}

template <typename T>
ASTRO_INLINE void run_tasks(const Forward<T>& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / a.layout.chunks, column = task % a.layout.chunks * kChunk;
    const int64_t count = std::min(kChunk, a.layout.columns - column);
    forward_row(a.gate.row(a.layout, row) + column, a.up.row(a.layout, row) + column, a.product + row * a.layout.out_stride + column, count,
                a.streamed);
  }
  simd::stream_fence();
}

template <typename T>
ASTRO_INLINE void run_tasks(const Backward<T>& a, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    const int64_t row = task / a.layout.chunks, column = task % a.layout.chunks * kChunk;
    const int64_t count = std::min(kChunk, a.layout.columns - column);
    const int64_t out = row * a.layout.out_stride + column;
    backward_row(a.gate.row(a.layout, row) + column, a.up.row(a.layout, row) + column, a.grad.row(a.layout, row) + column, a.grad_gate + out,
                 a.grad_up + out, a.product == nullptr ? nullptr : a.product + out, count, a.streamed);
  }
  simd::stream_fence();
}

// One overload per dtype: function multiversioning does not take templates.
#define ASTRO_SWIGLU_ENTRY(T)                                                                                   \
  ASTRO_MULTIVERSION void run(const Forward<T>& a, int64_t begin, int64_t end) { run_tasks(a, begin, end); }  \
  ASTRO_MULTIVERSION void run(const Backward<T>& a, int64_t begin, int64_t end) { run_tasks(a, begin, end); }
ASTRO_SWIGLU_ENTRY(float)
ASTRO_SWIGLU_ENTRY(c10::BFloat16)
ASTRO_SWIGLU_ENTRY(c10::Half)
ASTRO_SWIGLU_ENTRY(double)
#undef ASTRO_SWIGLU_ENTRY

Tensor unit_columns(const Tensor& x) { return x.dim() == 0 || x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous(); }

// Merge the axes of equally shaped tensors, innermost first, as long as every one of them (and the output rows) is dense across the seam.
template <size_t N>
Layout merge(const std::array<Tensor, N>& tensors, std::array<std::array<int64_t, kMaxAxes>, N>& strides, int64_t out_stride) {
  const Tensor& first = tensors[0];
  const int64_t columns = first.dim() == 0 ? 1 : first.size(-1);
  Layout layout;
  layout.columns = columns;
  bool flat = out_stride == columns;  // still growing the row itself
  for (int64_t axis = first.dim() - 2; axis >= 0; --axis) {
    const int64_t size = first.size(axis);
    if (size == 1) continue;
    const int64_t last = layout.axes - 1;
    bool dense = flat || last >= 0;
    for (size_t t = 0; t < N && dense; ++t)
      dense = tensors[t].stride(axis) == (flat ? layout.columns : strides[t][last] * layout.sizes[last]);
    if (dense && flat) {
      layout.columns *= size;
      continue;
    }
    flat = false;
    if (dense) {
      layout.sizes[last] *= size;
      layout.rows *= size;
      continue;
    }
    for (size_t t = 0; t < N; ++t) strides[t][layout.axes] = tensors[t].stride(axis);
    layout.sizes[layout.axes++] = size;
    layout.rows *= size;
  }
  layout.out_stride = out_stride == columns ? layout.columns : out_stride;  // dense outputs grow with the row
  layout.chunks = (layout.columns + kChunk - 1) / kChunk;
  return layout;
}

// Large outputs whose rows all start on a 16-byte line. Chunks are multiples of 16 bytes, so one long row needs only its own start aligned.
template <typename T>
bool can_stream(const Layout& layout, const T* p) {
  return simd::can_stream(p, layout.rows > 1 ? layout.out_stride : 0, layout.rows * layout.columns);
}

template <typename Args>
void launch(const Args& args) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::min(kChunk, std::max<int64_t>(1, args.layout.columns)));
  at::parallel_for(0, args.layout.rows * args.layout.chunks, grain, [&](int64_t begin, int64_t end) { run(args, begin, end); });
}

template <typename T>
void forward_typed(const Tensor& gate, const Tensor& up, Tensor& product) {
  std::array<std::array<int64_t, kMaxAxes>, 2> strides;
  Forward<T> args;
  args.layout = merge<2>({gate, up}, strides, gate.dim() == 0 ? 1 : gate.size(-1));
  args.gate = {gate.const_data_ptr<T>(), strides[0]};
  args.up = {up.const_data_ptr<T>(), strides[1]};
  args.product = product.mutable_data_ptr<T>();
  args.streamed = can_stream(args.layout, args.product);
  launch(args);
}

// `packed` rows hold both gradients side by side: grad_up is not a tensor of its own then.
template <typename T>
void backward_typed(const Tensor& grad, const Tensor& gate, const Tensor& up, Tensor& grad_gate, Tensor* grad_up, Tensor* product) {
  const int64_t columns = gate.dim() == 0 ? 1 : gate.size(-1);
  std::array<std::array<int64_t, kMaxAxes>, 3> strides;
  Backward<T> args;
  args.layout = merge<3>({gate, up, grad}, strides, grad_up == nullptr ? 2 * columns : columns);
  args.gate = {gate.const_data_ptr<T>(), strides[0]};
  args.up = {up.const_data_ptr<T>(), strides[1]};
  args.grad = {grad.const_data_ptr<T>(), strides[2]};
  args.grad_gate = grad_gate.mutable_data_ptr<T>();
  args.grad_up = grad_up == nullptr ? args.grad_gate + columns : grad_up->mutable_data_ptr<T>();
  args.product = product == nullptr ? nullptr : product->mutable_data_ptr<T>();
  args.streamed = can_stream(args.layout, args.grad_gate) && can_stream(args.layout, args.grad_up) &&
                  (product == nullptr || can_stream(args.layout, args.product));
  launch(args);
}

template <typename Function>
void dispatch(at::ScalarType type, Function&& function) {
  if (type == at::kFloat) function.template operator()<float>();
  else if (type == at::kBFloat16) function.template operator()<c10::BFloat16>();
  else if (type == at::kHalf) function.template operator()<c10::Half>();
  else function.template operator()<double>();
}

Tensor forward(const Tensor& gate_any, const Tensor& up_any) {
  const Tensor gate = unit_columns(gate_any), up = unit_columns(up_any);
  Tensor product = at::empty(gate.sizes(), gate.options());
  if (product.numel() > 0) dispatch(gate.scalar_type(), [&]<typename T>() { forward_typed<T>(gate, up, product); });
  return product;
}

void backward(const Tensor& grad_any, const Tensor& gate_any, const Tensor& up_any, Tensor& grad_gate, Tensor* grad_up, Tensor* product) {
  const Tensor grad = unit_columns(grad_any), gate = unit_columns(gate_any), up = unit_columns(up_any);
  if (gate.numel() > 0) dispatch(gate.scalar_type(), [&]<typename T>() { backward_typed<T>(grad, gate, up, grad_gate, grad_up, product); });
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  Tensor grad_gate = at::empty(gate.sizes(), gate.options()), grad_up = at::empty(up.sizes(), up.options());
  backward(grad, gate, up, grad_gate, &grad_up, nullptr);
  return {grad_gate, grad_up};
}

std::tuple<Tensor, Tensor, Tensor> swiglu_backward_product(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  Tensor grad_gate = at::empty(gate.sizes(), gate.options()), grad_up = at::empty(up.sizes(), up.options());
  Tensor product = at::empty(gate.sizes(), gate.options());
  backward(grad, gate, up, grad_gate, &grad_up, &product);
  return {grad_gate, grad_up, product};
}

Tensor swiglu_packed(const Tensor& gate_up) {
  const int64_t columns = gate_up.size(-1) / 2;
  return forward(gate_up.narrow(-1, 0, columns), gate_up.narrow(-1, columns, columns));
}

Tensor swiglu_packed_backward(const Tensor& grad, const Tensor& gate_up) {
  const int64_t columns = gate_up.size(-1) / 2;
  Tensor grad_packed = at::empty(gate_up.sizes(), gate_up.options());
  backward(grad, gate_up.narrow(-1, 0, columns), gate_up.narrow(-1, columns, columns), grad_packed, nullptr, nullptr);
  return grad_packed;
}

}  // namespace astrobiogen::swiglu

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("swiglu", &astrobiogen::swiglu::forward);
  m.impl("swiglu_backward", &astrobiogen::swiglu::swiglu_backward);
  m.impl("swiglu_packed", &astrobiogen::swiglu::swiglu_packed);
  m.impl("swiglu_packed_backward", &astrobiogen::swiglu::swiglu_packed_backward);
  m.impl("swiglu_backward_product", &astrobiogen::swiglu::swiglu_backward_product);
}
