// Rotary position embedding on the CPU, for any rotary width; its gradient is the same kernel with sin negated.
// Formulas: astrobiogen/kernels/rope/reference.py.
//
// Memory-bound: x is read once and the result written once; a token's cos and sin are read from L1 by all of its heads.
// x may have any strides over batch, tokens and heads (a slice of a fused projection, a transposed cache); only a head
// whose columns are not contiguous is copied first.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/checks.h"
#include "common/dispatch.h"
#include "common/dtypes.h"
#include "common/math.h"

namespace astrobiogen::rope {

using at::Tensor;

// A thread's share below this many elements costs more to schedule (~5 us) than to compute.
constexpr int64_t kGrainElements = 16384;

template <typename T>
struct Rotation {
  using Table = Wide<T>;
  const T* x;
  const Table *cos, *sin;  // dense rows of `half`
  T* out;                  // dense [B, S, heads, width]
  int64_t length, heads, width, half;
  int64_t batch_stride, token_stride, head_stride;
  int64_t table_batch_stride;  // 0: one table for all of the batch
  bool interleaved;
  Table sign;
};

// Columns j and j + half of one head, eight pairs at a time. The last vector overlaps the one before instead of leaving
// a tail: half = 34 is five vectors, at 0, 8, 16, 24 and 26.
template <typename T>
ASTRO_INLINE void rotate_halves(const T* x, const float* cos, const float* sin, float sign, T* out, int64_t half) {
  using namespace simd;
  if (half < kHalfLanes) {
    if (half == 0) return;
    const f32x8 a = load8_partial(x, half), b = load8_partial(x + half, half);
    const f32x8 c = load8_partial(cos, half), s = load8_partial(sin, half) * sign;
    store8_partial(out, a * c - b * s, half);
    store8_partial(out + half, b * c + a * s, half);
    return;
  }
  for (int64_t j = 0; j < half; j += kHalfLanes) {
    const int64_t at = std::min(j, half - kHalfLanes);
    const f32x8 a = load8(x + at), b = load8(x + half + at);
    const f32x8 c = load8(cos + at), s = load8(sin + at) * sign;
    store8(out + at, a * c - b * s);
    store8(out + half + at, b * c + a * s);
  }
}

// Swaps lanes 2i and 2i + 1.
ASTRO_INLINE simd::f32x8 swap_pairs(simd::f32x8 v) {
  typedef uint64_t u64x4 __attribute__((vector_size(32)));
  u64x4 pairs;
  std::memcpy(&pairs, &v, sizeof(v));
  pairs = (pairs >> 32) | (pairs << 32);
  std::memcpy(&v, &pairs, sizeof(v));
  return v;
}

// Columns 2i and 2i + 1 of one head; cos comes doubled (c0 c0 c1 c1 ...) and sin doubled with alternating sign (-s0 s0
// -s1 s1 ...).
template <typename T>
ASTRO_INLINE void rotate_pairs(const T* x, const float* cos, const float* sin, T* out, int64_t rotary) {
  using namespace simd;
  if (rotary < kHalfLanes) {
    if (rotary == 0) return;
    const f32x8 v = load8_partial(x, rotary);
    store8_partial(out, v * load8_partial(cos, rotary) + swap_pairs(v) * load8_partial(sin, rotary), rotary);
    return;
  }
  for (int64_t j = 0; j < rotary; j += kHalfLanes) {
    const int64_t at = std::min(j, rotary - kHalfLanes);  // rotary is even, so the overlapping vector starts on a pair
    const f32x8 v = load8(x + at);
    store8(out + at, v * load8(cos + at) + swap_pairs(v) * load8(sin + at));
  }
}

// fp64 in plain loops: PyTorch's operators take 5 times as long.
ASTRO_INLINE void rotate_double(const double* x, const double* cos, const double* sin, double sign, double* out,
                                int64_t half, bool interleaved) {
  for (int64_t j = 0; j < half; ++j) {
    const int64_t first = interleaved ? 2 * j : j, second = interleaved ? 2 * j + 1 : j + half;
    const double a = x[first], b = x[second];
    out[first] = a * cos[j] - b * sin[j] * sign;
    out[second] = b * cos[j] + a * sin[j] * sign;
  }
}

template <typename T>
ASTRO_INLINE void rotate_tokens(const Rotation<T>& a, int64_t begin, int64_t end) {
  using Table = typename Rotation<T>::Table;
  const int64_t rotary = 2 * a.half;
  const bool pairs = a.interleaved && !std::is_same_v<T, double>;
  std::vector<Table> doubled(pairs ? 2 * rotary : 0);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t batch = token / a.length, position = token % a.length;
    const Table* cos = a.cos + batch * a.table_batch_stride + position * a.half;
    const Table* sin = a.sin + batch * a.table_batch_stride + position * a.half;
    if (pairs) {
      for (int64_t j = 0; j < a.half; ++j) {
        doubled[2 * j] = doubled[2 * j + 1] = cos[j];
        doubled[rotary + 2 * j] = -sin[j] * a.sign;
        doubled[rotary + 2 * j + 1] = sin[j] * a.sign;
      }
      cos = doubled.data();
      sin = doubled.data() + rotary;
    }
    const T* x = a.x + batch * a.batch_stride + position * a.token_stride;
    T* out = a.out + token * a.heads * a.width;
    for (int64_t head = 0; head < a.heads; ++head, x += a.head_stride, out += a.width) {
      if constexpr (std::is_same_v<T, double>) rotate_double(x, cos, sin, a.sign, out, a.half, a.interleaved);
      else if (pairs) rotate_pairs(x, cos, sin, out, rotary);
      else rotate_halves(x, cos, sin, a.sign, out, a.half);
      for (int64_t j = rotary; j < a.width; ++j) out[j] = x[j];
    }
  }
}

struct RotateTokens {
  template <Level L, typename T>
  static ASTRO_INLINE void run(const Rotation<T>& a, int64_t begin, int64_t end) {
    rotate_tokens(a, begin, end);
  }
};

template <typename T>
void rope_typed(const Tensor& x, const Tensor& cos_any, const Tensor& sin_any, bool interleaved, bool transposed,
                Tensor& out) {
  using Table = typename Rotation<T>::Table;
  const at::ScalarType table_type = wide_dtype(x.scalar_type());
  const Tensor cos = cos_any.to(table_type).contiguous(), sin = sin_any.to(table_type).contiguous();
  const int64_t length = x.size(1), half = cos.size(-1);
  const Rotation<T> args{x.const_data_ptr<T>(),
                         cos.const_data_ptr<Table>(),
                         sin.const_data_ptr<Table>(),
                         out.mutable_data_ptr<T>(),
                         length,
                         x.size(2),
                         x.size(3),
                         half,
                         x.stride(0),
                         x.stride(1),
                         x.stride(2),
                         cos.dim() == 3 && cos.size(0) > 1 ? length * half : 0,
                         interleaved,
                         static_cast<Table>(transposed ? -1 : 1)};
  const int64_t grain = std::max<int64_t>(1, kGrainElements / (args.heads * args.width));
  at::parallel_for(0, x.size(0) * length, grain,
                   [&](int64_t begin, int64_t end) { dispatch<RotateTokens>(args, begin, end); });
}

void check_arguments(const check::Op& op, const Tensor& x, const Tensor& cos, const Tensor& sin) {
  op.floating(x, "x");
  op.rank(x, "x", 4, 4, "[B, S, heads, D]");
  op.floating(cos, "cos");
  op.rank(cos, "cos", 2, 3, "[S, r / 2] or [B, S, r / 2]");
  op.size(cos.size(-2), "S of cos", x.size(1), x.size(1));
  op.size(cos.size(-1), "r / 2, the last axis of cos,", 0, x.size(3) / 2);
  if (cos.dim() == 3 && cos.size(0) != 1) op.size(cos.size(0), "B of cos", x.size(0), x.size(0));
  op.floating(sin, "sin");
  op.shape(sin, "sin", cos.sizes(), "the shape of cos");
}

Tensor rope(const Tensor& x_any, const Tensor& cos, const Tensor& sin, bool interleaved, bool transposed) {
  constexpr check::Op op("astrobiogen::rope");
  check_arguments(op, x_any, cos, sin);
  const Tensor x = x_any.stride(-1) == 1 || x_any.size(-1) == 1 ? x_any : x_any.contiguous();
  Tensor out = at::empty(x.sizes(), x.options());
  if (x.numel() == 0) return out;
  for_floating_dtype(x.scalar_type(), [&]<typename T>() { rope_typed<T>(x, cos, sin, interleaved, transposed, out); });
  return out;
}

}  // namespace astrobiogen::rope

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) { m.impl("rope", &astrobiogen::rope::rope); }
