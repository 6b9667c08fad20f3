// RMSNorm on the CPU, forward and backward, with the residual addition fused. Formulas:
// astrobiogen/kernels/rms_norm/reference.py.
//
// Memory-bound: forward reads x twice, the second time from L1/L2 (a row of 4352 floats is 17 KB), and writes y once;
// while it writes, it asks for the next row. Two tensors in and two out go one of each per walk over the row: asking
// for x while the sum is written, and for the residual while y is, takes 0.80 to 0.90 of a copy's time in bf16, all
// four in the second walk 1.05 to 1.12. The weight gradient is summed into one fp32 row per run of rows, and the runs
// of a block in fp64; the block count depends on the shape only, so any thread count gives the same bits.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/dtypes.h"
#include "common/pairs.h"
#include "common/scratch.h"
#include "rms_norm/double.h"

namespace astrobiogen::rms_norm {

using at::Tensor;

// Weight-gradient partials: at most this many fp64 rows, little beside any input that has as many blocks.
constexpr int64_t kMaxBlocks = 16;
// A block below this many elements costs more to schedule (~5 us) than to compute.
constexpr int64_t kGrainElements = 16384;
// Vectors of 8 lanes at every level: wider ones gain nothing here (the op's notes), and one order of the weight serves
// all.
constexpr int kLanes = 8;
// Terms of one chain of fp32 additions, after which its sum goes to a double: columns of a row, and rows of the
// weight gradient. A rounding error grows with the length of a chain: one over 300,000 columns or 1,000,000 rows was
// 20 to 40 times as inexact as PyTorch's sums.
constexpr int64_t kRunColumns = 16384, kRunRows = 128;
constexpr int64_t kPair = 2 * kLanes;
using Pair = simd::Pair<kLanes>;

int64_t padded(int64_t columns) { return (columns + kPair - 1) / kPair * kPair; }

template <typename T>
struct Forward {
  const T* x;
  const T* residual;    // null: no addition
  T* sum;               // written only with a residual
  const float* weight;  // in the order of Pair of T, padded with zeros to a multiple of kPair
  T* y;
  float* rstd;
  int64_t hidden;
  float eps;
  bool streamed;  // y and sum bypass the cache
};

template <typename T>
struct Backward {
  const T* grad_y;
  const T* x;
  const T* grad_sum;    // null: no second gradient
  const float* weight;  // in the order of Pair of T, padded with zeros to a multiple of kPair
  const float* rstd;
  T* grad_x;
  int64_t hidden;
  bool streamed;  // grad_x bypasses the cache
};

template <int Index>
using Chain = std::integral_constant<int, Index>;

// The sum of one number per column in four chains, which hide the 4-cycle latency of the multiply-add, and a double
// that takes them up.
struct RowSum {
  simd::f32x8 chains[2][2] = {};
  double before = 0.0;

  template <int Index>
  ASTRO_INLINE void add(Chain<Index>, simd::f32x8 first, simd::f32x8 second) {
    chains[Index][0] += first;
    chains[Index][1] += second;
  }
  ASTRO_INLINE float of_chains() const {
    return simd::sum(simd::join(chains[0][0] + chains[1][0], chains[0][1] + chains[1][1]));
  }
  ASTRO_INLINE void take_up() {
    before += of_chains();
    chains[0][0] = chains[0][1] = chains[1][0] = chains[1][1] = simd::f32x8{};
  }
  ASTRO_INLINE float mean(int64_t columns) const {
    if (columns <= kRunColumns) return of_chains() / static_cast<float>(columns);  // a double's division takes longer
    return static_cast<float>((before + of_chains()) / static_cast<double>(columns));
  }
};

// Calls body(first column, whole pair?, live columns, chain) for a row, in runs whose sums `sum` takes up;
// neighbouring pairs get chains 0 and 1, for sums whose additions would wait for each other (a compile-time index:
// chosen at run time, the sums live in memory and the forward takes 1.6 times as long). The last pair may be partial.
template <typename Body>
ASTRO_INLINE void walk(int64_t hidden, RowSum& sum, Body&& body) {
  int64_t j = 0;
  for (; hidden - j > kRunColumns; sum.take_up())
    for (const int64_t end = j + kRunColumns; j < end; j += 2 * kPair) {
      body(j, std::true_type{}, kPair, Chain<0>{});
      body(j + kPair, std::true_type{}, kPair, Chain<1>{});
    }
  for (; j + 2 * kPair <= hidden; j += 2 * kPair) {
    body(j, std::true_type{}, kPair, Chain<0>{});
    body(j + kPair, std::true_type{}, kPair, Chain<1>{});
  }
  if (j + kPair <= hidden) {
    body(j, std::true_type{}, kPair, Chain<0>{});
    j += kPair;
  }
  if (j < hidden) body(j, std::false_type{}, hidden - j, Chain<1>{});
}

// The same from the last column to the first: what a walk before it read last is still in L1. A row, the weight and
// whatever else a walk reads pass 32 KB together, so a second walk in the first one's direction would find nothing
// there (residual fp32 0.94 of a copy's time, backwards 0.88).
template <typename Body>
ASTRO_INLINE void walk_back(int64_t hidden, Body&& body) {
  int64_t j = hidden / kPair * kPair;
  if (j < hidden) body(j, std::false_type{}, hidden - j, Chain<1>{});
  for (; j >= 2 * kPair; j -= 2 * kPair) {
    body(j - kPair, std::true_type{}, kPair, Chain<0>{});
    body(j - 2 * kPair, std::true_type{}, kPair, Chain<1>{});
  }
  if (j > 0) body(0, std::true_type{}, kPair, Chain<0>{});
}

template <typename T, bool Whole>
ASTRO_INLINE Pair get(const T* p, int64_t live, std::bool_constant<Whole>) {
  if constexpr (Whole) return simd::load_pair<kLanes>(p);
  else return simd::load_pair_partial<kLanes>(p, live);
}

template <Level L, simd::Round R, bool Streamed, typename T, bool Whole>
ASTRO_INLINE void put(T* p, Pair v, int64_t live, std::bool_constant<Whole>) {
  if constexpr (Whole) simd::put_pair<L, R, kLanes>(p, v, Streamed);
  else simd::put_pair_partial<L, R, kLanes>(p, v, live);
}

// The lines of the pair at p; of half precision a line holds both chains' pairs.
template <typename T, int Index>
ASTRO_INLINE void prefetch(const T* p, Chain<Index>) {
  if constexpr (sizeof(T) == 4 || Index == 0) simd::prefetch(p);
}

// The column that a walk reaches when a walk back reaches j: the next row is asked for from its start, where it will be
// read first.
ASTRO_INLINE int64_t mirrored(int64_t hidden, int64_t j) { return std::max<int64_t>(0, hidden - kPair - j); }

// The next row lies `a.hidden` further on; asking for one past the end does no harm.
template <typename T, Level L, bool Add, bool Streamed>
ASTRO_INLINE void forward_row(const Forward<T>& a, int64_t row, T* scratch) {
  using namespace simd;
  const int64_t hidden = a.hidden;
  const T *x = a.x + row * hidden, *residual = Add ? a.residual + row * hidden : nullptr;
  RowSum squares;
  T *y = a.y + row * hidden, *sum = Add ? a.sum + row * hidden : nullptr;
  walk(hidden, squares, [&](int64_t j, auto whole, int64_t live, auto chain) ASTRO_LAMBDA_INLINE {
    Pair v = get(x + j, live, whole);
    if constexpr (Add) {
      if constexpr (Streamed) prefetch(x + hidden + j, chain);
      const Pair r = get(residual + j, live, whole);
      v = rounded<T, kLanes>(
          {v.first + r.first, v.second + r.second});  // the norm must see the very numbers the caller gets
      put_pair<L, Round::kExact, kLanes>(scratch + j, v, false);
      put<L, Round::kExact, Streamed>(sum + j, v, live, whole);
    }
    squares.add(chain, v.first * v.first, v.second * v.second);
  });
  const float rstd = 1.0f / std::sqrt(squares.mean(hidden) + a.eps);
  a.rstd[row] = rstd;
  const T *from = Add ? scratch : x, *next = (Add ? residual : x) + hidden;
  walk_back(hidden, [&](int64_t j, auto whole, int64_t live, auto chain) ASTRO_LAMBDA_INLINE {
    if constexpr (Streamed) prefetch(next + mirrored(hidden, j), chain);
    const Pair v = get(from + j, live, whole), w = load_pair<kLanes>(a.weight + j);
    put<L, Round::kAway, Streamed>(y + j, {v.first * rstd * w.first, v.second * rstd * w.second}, live, whole);
  });
}

// Adds this row's grad_y * x * rstd to grad_weight (in the order of the weight) while the row is in L1.
template <typename T, Level L, bool Add, bool Streamed>
ASTRO_INLINE void backward_row(const Backward<T>& a, int64_t row, float* grad_weight) {
  using namespace simd;
  const int64_t hidden = a.hidden;
  const T *x = a.x + row * hidden, *grad_y = a.grad_y + row * hidden,
          *grad_sum = Add ? a.grad_sum + row * hidden : nullptr;
  const float rstd = a.rstd[row];
  RowSum dots;
  walk(hidden, dots, [&](int64_t j, auto whole, int64_t live, auto chain) ASTRO_LAMBDA_INLINE {
    if constexpr (Streamed) prefetch(x + hidden + j, chain);
    const Pair v = get(x + j, live, whole), g = get(grad_y + j, live, whole);
    const Pair w = load_pair<kLanes>(a.weight + j), so_far = load_pair<kLanes>(grad_weight + j);
    const f32x8 first = g.first * (v.first * rstd), second = g.second * (v.second * rstd);
    dots.add(chain, first * w.first, second * w.second);
    store_pair<kLanes>(grad_weight + j, {so_far.first + first, so_far.second + second});
  });
  const float correction = dots.mean(hidden) * rstd;
  T* grad_x = a.grad_x + row * hidden;
  walk_back(hidden, [&](int64_t j, auto whole, int64_t live, auto chain) ASTRO_LAMBDA_INLINE {
    if constexpr (Streamed) {
      prefetch(grad_y + hidden + mirrored(hidden, j), chain);
      if constexpr (Add) prefetch(grad_sum + hidden + mirrored(hidden, j), chain);
    }
    const Pair v = get(x + j, live, whole), g = get(grad_y + j, live, whole), w = load_pair<kLanes>(a.weight + j);
    Pair value{(g.first * w.first - v.first * correction) * rstd, (g.second * w.second - v.second * correction) * rstd};
    if constexpr (Add) {
      const Pair other = get(grad_sum + j, live, whole);
      value = {value.first + other.first, value.second + other.second};
    }
    put<L, Round::kAway, Streamed>(grad_x + j, value, live, whole);
  });
}

template <typename T, bool Add>
struct ForwardRows {
  template <Level L>
  static ASTRO_INLINE void run(const Forward<T>& a, int64_t begin, int64_t end) {
    // The rounded sum of one row stays here, in L1, for the second walk: what went past the cache cannot be read back
    // cheaply.
    AlignedArray<T> scratch(Add ? padded(a.hidden) : 0);
    if (a.streamed)
      for (int64_t row = begin; row < end; ++row) forward_row<T, L, Add, true>(a, row, scratch.data());
    else
      for (int64_t row = begin; row < end; ++row) forward_row<T, L, Add, false>(a, row, scratch.data());
    simd::stream_fence();
  }
};

template <typename T, bool Add>
struct BackwardRows {
  template <Level L>
  // `grad_weight` takes up what `run_sum`, zeros before and after, sums of each run of rows.
  static ASTRO_INLINE void run(const Backward<T>& a, int64_t begin, int64_t end, float* run_sum, double* grad_weight) {
    for (int64_t first = begin; first < end; first += kRunRows) {
      const int64_t last = std::min(end, first + kRunRows);
      if (a.streamed)
        for (int64_t row = first; row < last; ++row) backward_row<T, L, Add, true>(a, row, run_sum);
      else
        for (int64_t row = first; row < last; ++row) backward_row<T, L, Add, false>(a, row, run_sum);
      for (int64_t j = 0; j < padded(a.hidden); ++j) grad_weight[j] += run_sum[j], run_sum[j] = 0.0f;
    }
    simd::stream_fence();
  }
};

// The weight as the kernels read it.
template <typename T>
AlignedArray<float> weight_table(const Tensor& weight) {
  const Tensor plain = weight.to(at::kFloat).contiguous();
  AlignedArray<float> table(padded(plain.numel()));
  simd::arrange<T>(plain.const_data_ptr<float>(), plain.numel(), table.data());
  return table;
}

template <typename T>
void forward_typed(const Tensor& x, const Tensor* residual, Tensor* sum, const Tensor& weight, double eps, Tensor& y,
                   Tensor& rstd) {
  const AlignedArray<float> table = weight_table<T>(weight);
  const Forward<T> args{x.const_data_ptr<T>(),
                        residual == nullptr ? nullptr : residual->const_data_ptr<T>(),
                        sum == nullptr ? nullptr : sum->mutable_data_ptr<T>(),
                        table.data(),
                        y.mutable_data_ptr<T>(),
                        rstd.mutable_data_ptr<float>(),
                        x.size(-1),
                        static_cast<float>(eps),
                        simd::can_stream(y.const_data_ptr<T>(), y.size(-1), y.numel()) &&
                            (sum == nullptr || simd::can_stream(sum->const_data_ptr<T>(), y.size(-1), y.numel()))};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / args.hidden);
  at::parallel_for(0, rstd.numel(), grain, [&](int64_t begin, int64_t end) {
    if (args.residual == nullptr) dispatch<ForwardRows<T, false>>(args, begin, end);
    else dispatch<ForwardRows<T, true>>(args, begin, end);
  });
}

template <typename T>
Tensor backward_typed(const Tensor& grad_y, const Tensor& x, const Tensor& weight, const Tensor& rstd,
                      const std::optional<Tensor>& grad_sum, Tensor& grad_x) {
  const AlignedArray<float> table = weight_table<T>(weight);
  const int64_t hidden = x.size(-1), rows = rstd.numel(), width = padded(hidden);
  const Backward<T> args{grad_y.const_data_ptr<T>(),
                         x.const_data_ptr<T>(),
                         grad_sum ? grad_sum->const_data_ptr<T>() : nullptr,
                         table.data(),
                         rstd.const_data_ptr<float>(),
                         grad_x.mutable_data_ptr<T>(),
                         hidden,
                         simd::can_stream(grad_x.const_data_ptr<T>(), hidden, grad_x.numel())};
  const int64_t blocks = std::clamp<int64_t>(rows * hidden / kGrainElements, 1, kMaxBlocks);
  AlignedArray<double> partials(blocks * width);
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    AlignedArray<float> run_sum(width);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * rows / blocks, last = (block + 1) * rows / blocks;
      double* partial = partials.data() + block * width;
      if (args.grad_sum == nullptr) dispatch<BackwardRows<T, false>>(args, first, last, run_sum.data(), partial);
      else dispatch<BackwardRows<T, true>>(args, first, last, run_sum.data(), partial);
    }
  });
  double* total = partials.data();
  for (int64_t block = 1; block < blocks; ++block)
    for (int64_t j = 0; j < width; ++j) total[j] += total[block * width + j];
  Tensor grad_weight = at::empty({hidden}, weight.options().dtype(at::kFloat));
  float* out = grad_weight.mutable_data_ptr<float>();
  for (int64_t j = 0; j < hidden; ++j) out[j] = static_cast<float>(total[simd::arranged<T>(j)]);
  return grad_weight.to(weight.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_any, const Tensor* residual_any, const Tensor& weight,
                                           double eps) {
  const Tensor x = x_any.contiguous();
  const bool add = residual_any != nullptr;
  const Tensor residual = add ? residual_any->contiguous() : Tensor();
  const bool wide = x.scalar_type() == at::kDouble;
  Tensor y = at::empty(x.sizes(), x.options());
  Tensor sum = add ? at::empty(x.sizes(), x.options()) : Tensor();
  Tensor rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(wide ? at::kDouble : at::kFloat));
  if (wide) {
    if (add) sum = at::add(x, residual);
    forward_double(add ? sum : x, weight, eps, y, rstd);
  } else {
    for_dtype(x.scalar_type(), [&]<typename T>() {
      forward_typed<T>(x, add ? &residual : nullptr, add ? &sum : nullptr, weight, eps, y, rstd);
    });
  }
  return {y, sum, rstd};
}

void check_norm(const check::Op& op, const Tensor& x, const Tensor& weight) {
  op.floating(x, "x");
  op.rank(x, "x", 1, check::kAnyRank, "[..., H]");
  op.size(x.size(-1), "H, the last axis of x,", 1);
  op.floating(weight, "weight");
  op.shape(weight, "weight", {x.size(-1)}, "[H], H the last axis of x");
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  constexpr check::Op op("astrobiogen::rms_norm");
  check_norm(op, x, weight);
  op.finite(eps, "eps", 0.0);
  auto [y, sum, rstd] = forward(x, nullptr, weight, eps);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                double eps) {
  constexpr check::Op op("astrobiogen::add_rms_norm");
  check_norm(op, x, weight);
  op.like(residual, "residual", x, "the shape of x");
  op.finite(eps, "eps", 0.0);
  return forward(x, &residual, weight, eps);
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& grad_y_any, const Tensor& x_any, const Tensor& weight,
                                             const Tensor& rstd_any, const std::optional<Tensor>& grad_sum_any) {
  constexpr check::Op op("astrobiogen::rms_norm_backward");
  check_norm(op, x_any, weight);
  op.like(grad_y_any, "grad_y", x_any, "the shape of x");
  op.like(grad_sum_any, "grad_sum", x_any, "the shape of x");
  op.dtype(rstd_any, "rstd", check::exact(x_any));
  op.shape(rstd_any, "rstd", x_any.sizes().slice(0, x_any.dim() - 1), "[...], the leading axes of x");
  const Tensor grad_y = grad_y_any.contiguous(), x = x_any.contiguous(), rstd = rstd_any.contiguous();
  const std::optional<Tensor> grad_sum = grad_sum_any ? std::optional(grad_sum_any->contiguous()) : std::nullopt;
  Tensor grad_x = at::empty(x.sizes(), x.options());
  if (x.scalar_type() == at::kDouble) return backward_double(grad_y, x, weight, rstd, grad_sum, grad_x);
  Tensor grad_weight;
  for_dtype(x.scalar_type(),
            [&]<typename T>() { grad_weight = backward_typed<T>(grad_y, x, weight, rstd, grad_sum, grad_x); });
  return {grad_x, grad_weight};
}

}  // namespace astrobiogen::rms_norm

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("rms_norm", &astrobiogen::rms_norm::rms_norm);
  m.impl("add_rms_norm", &astrobiogen::rms_norm::add_rms_norm);
  m.impl("rms_norm_backward", &astrobiogen::rms_norm::rms_norm_backward);
}
