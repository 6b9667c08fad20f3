// SwiGLU on the CPU, forward and backward, from separate or packed gate and up. Formulas:
// astrobiogen/kernels/swiglu/reference.py.
//
// Memory-bound: every input element is read once and every output element written once. Inputs may have any strides
// over their leading axes; only an input whose last axis is not contiguous is copied first. Contiguous inputs are
// treated as one long row, so that an odd width has no tails.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <tuple>
#include <utility>

#include "common/dispatch.h"
#include "common/dtypes.h"
#include "common/pairs.h"
#include "common/reference.h"
#include "swiglu/checks.h"
#include "swiglu/math.h"

namespace astrobiogen::swiglu {

using at::Tensor;

// Columns per task: long rows are cut here, so that [1, 10^7] runs on all threads. Not shorter: where rows are not
// aligned, both ends of a task are written through the cache (packed [2048, 11605] fp32 with AVX2: three tasks per row
// take 1.47 of a copy's time, one takes 1.33).
constexpr int64_t kChunk = 16384;
// A thread's share below this many elements costs more to schedule (~5 us) than to compute.
constexpr int64_t kGrainElements = 16384;
constexpr int64_t kMaxAxes = 64;  // PyTorch's own limit
// How far ahead separate rows (packed gate and up) are asked for, into L1 and across the row's end. The processor's own
// prefetcher starts anew at every row, about four memory latencies for gate and as many for up (the op's notes). Not
// for one long row: there it only costs.
constexpr int64_t kAheadBytes = 2048;
// Columns whose exponentials are taken before their products. In one loop the chain from load to store, 60 to 80 cycles
// of dependent instructions, is longer than the scheduler's 64 entries cover (fp32 in L1 with AVX2: 1.16 of the time).
constexpr int64_t kBlock = 64;
constexpr int64_t kLineBytes = 64;

// The leading axes that the inputs do not let merge, and the row length left over. Outputs are dense rows `out_stride`
// apart.
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

// Where a task's inputs start.
template <typename T, size_t Count>
using Starts = std::array<const T*, Count>;

// Asks for the lines that hold columns [j, j + Columns) of each input.
template <int64_t Columns, typename T, size_t Count>
ASTRO_INLINE void prefetch(const Starts<T, Count>& inputs, int64_t j) {
  for (const T* input : inputs)
    for (int64_t at = 0; at < Columns; at += kLineBytes / sizeof(T)) __builtin_prefetch(input + j + at, 0, 3);
}

// Calls body(column) for every whole step of `Step` columns from `begin`, asking for this row's inputs kAheadBytes
// further on and, near its end, for those of the row after it. Returns where it stopped: less than a step, or than a
// line, before `count`.
template <int64_t Step, typename T, size_t Count, typename Body>
ASTRO_INLINE int64_t walk_ahead(const Starts<T, Count>& row, const Starts<T, Count>& next, int64_t begin, int64_t count,
                                Body&& body) {
  constexpr int64_t kStride = std::max<int64_t>(Step, kLineBytes / sizeof(T)), kAhead = kAheadBytes / sizeof(T);
  int64_t j = begin;
  for (; j + kStride <= count - kAhead; j += kStride) {
    prefetch<kStride>(row, j + kAhead);
    for (int64_t at = 0; at < kStride; at += Step) body(j + at);
  }
  for (; j + kStride <= count; j += kStride) {
    prefetch<kStride>(next, j + kAhead - count);
    for (int64_t at = 0; at < kStride; at += Step) body(j + at);
  }
  return j;
}

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

// `next`: where the inputs of the row after this one start; null for one long row.
template <typename T, Level L, bool Streamed>
ASTRO_INLINE void forward_row(const Starts<T, 2>& row, const Starts<T, 2>* next, T* product, int64_t count) {
  const auto [gate, up] = row;
  constexpr int N = kWidth<L>;
  const auto exponentials = [](simd::Pair<N> g) ASTRO_LAMBDA_INLINE {
    return simd::Pair<N>{exponential_of<T, N>(g.first), exponential_of<T, N>(g.second)};
  };
  const auto products = [](simd::Pair<N> g, simd::Pair<N> e, simd::Pair<N> u) ASTRO_LAMBDA_INLINE {
    return simd::Pair<N>{product_of<T, N>(g.first, e.first, u.first), product_of<T, N>(g.second, e.second, u.second)};
  };
  const auto partial = [&](int64_t at, int64_t live) ASTRO_LAMBDA_INLINE {
    const auto get = [&](const T* p) ASTRO_LAMBDA_INLINE {
      return at + 2 * N <= count ? simd::load_pair<N>(p + at) : simd::load_pair_partial<N>(p + at, live);
    };
    const auto g = get(gate);
    simd::put_pair_partial<L, simd::Round::kAway, N>(product + at, products(g, exponentials(g), get(up)), live);
  };
  int64_t j = 0;
  if constexpr (Streamed) {  // a row of odd width may start anywhere
    const int64_t edge = std::min(count, simd::until_aligned(product));
    for (; j < edge; j = std::min<int64_t>(edge, j + 2 * N)) partial(j, std::min<int64_t>(2 * N, edge - j));
  }
  const auto put = [&](int64_t at, simd::Pair<N> e) ASTRO_LAMBDA_INLINE {
    const auto v = products(simd::load_pair<N>(gate + at), e, simd::load_pair<N>(up + at));
    simd::put_pair<L, simd::Round::kAway, N>(product + at, v, Streamed);
  };
  const auto block = [&](int64_t start) ASTRO_LAMBDA_INLINE {
    alignas(64) float e[kBlock];
    for (int64_t at = 0; at < kBlock; at += 2 * N)
      simd::store_pair<N>(e + at, exponentials(simd::load_pair<N>(gate + start + at)));
    for (int64_t at = 0; at < kBlock; at += 2 * N) put(start + at, simd::load_pair<N>(e + at));
  };
  if (Streamed && next != nullptr) j = walk_ahead<kBlock>(row, *next, j, count, block);
  for (; j + kBlock <= count; j += kBlock) block(j);
  for (; j + 2 * N <= count; j += 2 * N) put(j, exponentials(simd::load_pair<N>(gate + j)));
  if (j < count) partial(j, count - j);
}

template <typename T, Level L, bool Streamed>
ASTRO_INLINE void backward_row(const Starts<T, 3>& row, const Starts<T, 3>* next, T* grad_gate, T* grad_up, T* product,
                               int64_t count) {
  const auto [gate, up, grad] = row;
  constexpr int N = kWidth<L>;
  const auto both = [](simd::Pair<N> g, simd::Pair<N> u, simd::Pair<N> d) ASTRO_LAMBDA_INLINE {
    const auto a = gradients_of<T, N>(g.first, u.first, d.first), b = gradients_of<T, N>(g.second, u.second, d.second);
    return Gradients<simd::Pair<N>>{{a.gate, b.gate}, {a.up, b.up}, {a.product, b.product}};
  };
  const auto whole = [&](int64_t at) ASTRO_LAMBDA_INLINE {
    const auto d = both(simd::load_pair<N>(gate + at), simd::load_pair<N>(up + at), simd::load_pair<N>(grad + at));
    simd::put_pair<L, simd::Round::kAway, N>(grad_gate + at, d.gate, Streamed);
    simd::put_pair<L, simd::Round::kAway, N>(grad_up + at, d.up, Streamed);
    if (product != nullptr) simd::put_pair<L, simd::Round::kAway, N>(product + at, d.product, Streamed);
  };
  int64_t j = next == nullptr ? 0 : walk_ahead<2 * N>(row, *next, 0, count, whole);
  for (; j + 2 * N <= count; j += 2 * N) whole(j);
  if (j < count) {
    const int64_t rest = count - j;
    const auto d = both(simd::load_pair_partial<N>(gate + j, rest), simd::load_pair_partial<N>(up + j, rest),
                        simd::load_pair_partial<N>(grad + j, rest));
    simd::put_pair_partial<L, simd::Round::kAway, N>(grad_gate + j, d.gate, rest);
    simd::put_pair_partial<L, simd::Round::kAway, N>(grad_up + j, d.up, rest);
    if (product != nullptr) simd::put_pair_partial<L, simd::Round::kAway, N>(product + j, d.product, rest);
  }
}

// Task `index` of a layout: one row, or kChunk columns of a long one.
struct Task {
  int64_t row, column, count;
  Task(const Layout& layout, int64_t index)
      : row(index / layout.chunks),
        column(index % layout.chunks * kChunk),
        count(std::min(kChunk, layout.columns - column)) {}
};

struct Tasks {
  template <typename T>
  static ASTRO_INLINE Starts<T, 2> starts(const Forward<T>& a, const Task& t) {
    return {a.gate.row(a.layout, t.row) + t.column, a.up.row(a.layout, t.row) + t.column};
  }

  template <typename T>
  static ASTRO_INLINE Starts<T, 3> starts(const Backward<T>& a, const Task& t) {
    return {a.gate.row(a.layout, t.row) + t.column, a.up.row(a.layout, t.row) + t.column,
            a.grad.row(a.layout, t.row) + t.column};
  }

  template <Level L, bool Streamed, typename T>
  static ASTRO_INLINE void task(const Forward<T>& a, const Task& t, const Starts<T, 2>& row, const Starts<T, 2>* next) {
    forward_row<T, L, Streamed>(row, next, a.product + t.row * a.layout.out_stride + t.column, t.count);
  }

  template <Level L, bool Streamed, typename T>
  static ASTRO_INLINE void task(const Backward<T>& a, const Task& t, const Starts<T, 3>& row,
                                const Starts<T, 3>* next) {
    const int64_t out = t.row * a.layout.out_stride + t.column;
    backward_row<T, L, Streamed>(row, next, a.grad_gate + out, a.grad_up + out,
                                 a.product == nullptr ? nullptr : a.product + out, t.count);
  }

  template <Level L, typename Arguments>
  static ASTRO_INLINE void run(const Arguments& a, int64_t begin, int64_t end) {
    auto row = starts(a, Task(a.layout, begin)), next = row;
    for (int64_t index = begin; index < end; ++index, row = next) {
      next = starts(a, Task(a.layout, std::min(index + 1, end - 1)));
      const auto* ahead = a.layout.rows > 1 ? &next : nullptr;
      if (a.streamed) task<L, true>(a, Task(a.layout, index), row, ahead);
      else task<L, false>(a, Task(a.layout, index), row, ahead);
    }
    simd::stream_fence();
  }
};

Tensor unit_columns(const Tensor& x) {
  return x.dim() == 0 || x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

// Merge the axes of equally shaped tensors, innermost first, as long as every one of them (and the output rows) is
// dense across the seam.
template <size_t N>
Layout merge(const std::array<Tensor, N>& tensors, std::array<std::array<int64_t, kMaxAxes>, N>& strides,
             int64_t out_stride) {
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

// Large outputs whose rows all start on a cache line. Chunks are multiples of a line, so one long row needs only its
// own start aligned.
template <typename T>
bool can_stream(const Layout& layout, const T* p) {
  return simd::can_stream(p, layout.rows > 1 ? layout.out_stride : 0, layout.rows * layout.columns);
}

template <typename Args>
void launch(const Args& args) {
  const int64_t grain =
      std::max<int64_t>(1, kGrainElements / std::min(kChunk, std::max<int64_t>(1, args.layout.columns)));
  at::parallel_for(0, args.layout.rows * args.layout.chunks, grain,
                   [&](int64_t begin, int64_t end) { dispatch<Tasks>(args, begin, end); });
}

template <typename T>
void forward_typed(const Tensor& gate, const Tensor& up, Tensor& product) {
  std::array<std::array<int64_t, kMaxAxes>, 2> strides;
  Forward<T> args;
  args.layout = merge<2>({gate, up}, strides, gate.dim() == 0 ? 1 : gate.size(-1));
  args.gate = {gate.const_data_ptr<T>(), strides[0]};
  args.up = {up.const_data_ptr<T>(), strides[1]};
  args.product = product.mutable_data_ptr<T>();
  args.streamed = args.layout.rows * args.layout.columns * sizeof(T) >= simd::kStreamBytes;
  launch(args);
}

// `packed` rows hold both gradients side by side: grad_up is not a tensor of its own then.
template <typename T>
void backward_typed(const Tensor& grad, const Tensor& gate, const Tensor& up, Tensor& grad_gate, Tensor* grad_up,
                    Tensor* product) {
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

Tensor forward(const Tensor& gate_any, const Tensor& up_any) {
  const Tensor gate = unit_columns(gate_any), up = unit_columns(up_any);
  Tensor product = at::empty(gate.sizes(), gate.options());
  if (product.numel() > 0) for_dtype(gate.scalar_type(), [&]<typename T>() { forward_typed<T>(gate, up, product); });
  return product;
}

void backward(const Tensor& grad_any, const Tensor& gate_any, const Tensor& up_any, Tensor& grad_gate, Tensor* grad_up,
              Tensor* product) {
  const Tensor grad = unit_columns(grad_any), gate = unit_columns(gate_any), up = unit_columns(up_any);
  if (gate.numel() > 0)
    for_dtype(gate.scalar_type(),
              [&]<typename T>() { backward_typed<T>(grad, gate, up, grad_gate, grad_up, product); });
}

bool is_double(const Tensor& t) { return t.scalar_type() == at::kDouble; }

Tensor swiglu(const Tensor& gate, const Tensor& up) {
  check_halves(check::Op("astrobiogen::swiglu"), gate, up);
  return is_double(gate) ? reference<Tensor>("astrobiogen::swiglu", gate, up) : forward(gate, up);
}

std::tuple<Tensor, Tensor> swiglu_backward(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  check_pair(check::Op("astrobiogen::swiglu_backward"), grad, gate, up);
  if (is_double(gate)) return reference<std::tuple<Tensor, Tensor>>("astrobiogen::swiglu_backward", grad, gate, up);
  Tensor grad_gate = at::empty(gate.sizes(), gate.options()), grad_up = at::empty(up.sizes(), up.options());
  backward(grad, gate, up, grad_gate, &grad_up, nullptr);
  return {grad_gate, grad_up};
}

std::tuple<Tensor, Tensor, Tensor> swiglu_backward_product(const Tensor& grad, const Tensor& gate, const Tensor& up) {
  check_pair(check::Op("astrobiogen::swiglu_backward_product"), grad, gate, up);
  if (is_double(gate))
    return reference<std::tuple<Tensor, Tensor, Tensor>>("astrobiogen::swiglu_backward_product", grad, gate, up);
  Tensor grad_gate = at::empty(gate.sizes(), gate.options()), grad_up = at::empty(up.sizes(), up.options());
  Tensor product = at::empty(gate.sizes(), gate.options());
  backward(grad, gate, up, grad_gate, &grad_up, &product);
  return {grad_gate, grad_up, product};
}

Tensor swiglu_packed(const Tensor& gate_up) {
  check_packed(check::Op("astrobiogen::swiglu_packed"), gate_up);
  if (is_double(gate_up)) return reference<Tensor>("astrobiogen::swiglu_packed", gate_up);
  const int64_t columns = gate_up.size(-1) / 2;
  return forward(gate_up.narrow(-1, 0, columns), gate_up.narrow(-1, columns, columns));
}

Tensor swiglu_packed_backward(const Tensor& grad, const Tensor& gate_up) {
  check_packed_pair(check::Op("astrobiogen::swiglu_packed_backward"), grad, gate_up);
  if (is_double(gate_up)) return reference<Tensor>("astrobiogen::swiglu_packed_backward", grad, gate_up);
  const int64_t columns = gate_up.size(-1) / 2;
  Tensor grad_packed = at::empty(gate_up.sizes(), gate_up.options());
  backward(grad, gate_up.narrow(-1, 0, columns), gate_up.narrow(-1, columns, columns), grad_packed, nullptr, nullptr);
  return grad_packed;
}

}  // namespace astrobiogen::swiglu

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("swiglu", &astrobiogen::swiglu::swiglu);
  m.impl("swiglu_backward", &astrobiogen::swiglu::swiglu_backward);
  m.impl("swiglu_packed", &astrobiogen::swiglu::swiglu_packed);
  m.impl("swiglu_packed_backward", &astrobiogen::swiglu::swiglu_packed_backward);
  m.impl("swiglu_backward_product", &astrobiogen::swiglu::swiglu_backward_product);
}
