// What forward and backward share: the problem's geometry, visible key ranges, rotation while packing, scratch memory,
// scheduling.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/scratch.h"
#include "common/simd.h"
#include "common/tasks.h"

namespace astrobiogen::attention {

using at::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kTaskRows = 64;  // query rows (token, head of the group) of one task
constexpr int64_t kMaxHeadDim = 256;
constexpr float kLog2E = 1.44269504088896f, kLn2 = 0.693147180559945f;

struct Options {
  bool causal;
  double scale;
  int64_t window;
  double softcap;
  bool interleaved;
};

// Sizes, visible ranges and rotary angles (converted to Scalar, contiguous, alive as long as this object).
template <typename Scalar>
struct Geometry {
  int64_t batch, queries, keys, heads, kv_heads, group, dim;
  int64_t rotary = 0;  // pairs
  int64_t angle_rows = 0, angle_batch = 0;
  bool interleaved = false;
  Scalar scale = 0, softcap = 0;
  std::vector<int32_t> low{}, high{};  // [queries] keys seen: low <= key < high; both never decrease
  const Scalar *cos = nullptr, *sin = nullptr, *sinks = nullptr;
  Tensor cos_storage{}, sin_storage{}, sinks_storage{};

  int64_t rows() const { return queries * group; }  // of one (batch, kv head)
  const Scalar* angles(const Scalar* table, int64_t b, int64_t row_from_end) const {
    return table + b * angle_batch + (angle_rows - row_from_end) * rotary;
  }
};

void visible_ranges(int64_t queries, int64_t keys, const Options& options, const Optional& cu_seqlens,
                    std::vector<int32_t>& low, std::vector<int32_t>& high);

template <typename Scalar>
Geometry<Scalar> make_geometry(const Tensor& q, const Tensor& k, const Optional& cos, const Optional& sin,
                               const Optional& cu_seqlens, const Optional& sinks, const Options& options) {
  constexpr auto kType = c10::CppTypeToScalarType<Scalar>::value;
  Geometry<Scalar> g{q.size(0), q.size(1), k.size(1), q.size(2), k.size(2), q.size(2) / k.size(2), q.size(3)};
  g.interleaved = options.interleaved;
  g.scale = static_cast<Scalar>(options.scale);
  g.softcap = static_cast<Scalar>(options.softcap);
  visible_ranges(g.queries, g.keys, options, cu_seqlens, g.low, g.high);
  if (cos && sin) {
    g.cos_storage = cos->to(kType).contiguous();
    g.sin_storage = sin->to(kType).contiguous();
    g.rotary = cos->size(-1);
    g.angle_rows = cos->size(-2);
    g.angle_batch = cos->dim() == 3 ? g.angle_rows * g.rotary : 0;
    g.cos = g.cos_storage.template const_data_ptr<Scalar>();
    g.sin = g.sin_storage.template const_data_ptr<Scalar>();
  }
  if (sinks) {
    g.sinks_storage = sinks->to(kType).contiguous();
    g.sinks = g.sinks_storage.template const_data_ptr<Scalar>();
  }
  return g;
}

// [B, S, heads, D] with unit stride along D.
template <typename T>
struct Rows {
  T* data;
  int64_t batch, token, head;
  T* at(int64_t b, int64_t s, int64_t h) const { return data + b * batch + s * token + h * head; }
};

inline Tensor unit_stride(const Tensor& t) { return t.stride(-1) == 1 || t.size(-1) == 1 ? t : t.contiguous(); }

template <typename T>
Rows<const T> rows_of(const Tensor& t) {
  return {t.const_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

template <typename T>
Rows<T> mutable_rows_of(Tensor& t) {
  return {t.mutable_data_ptr<T>(), t.stride(0), t.stride(1), t.stride(2)};
}

// out[0..dim) = rotation of in by the angles at `cos`, `sin` (sign -1: the inverse), times `factor`.
template <typename Scalar, typename In, typename Out>
ASTRO_INLINE void rotate_row(const Geometry<Scalar>& g, const In* in, const Scalar* cos, const Scalar* sin, Scalar sign,
                             Scalar factor, Out* out) {
  if (g.rotary > 0 && g.interleaved) {
    for (int64_t i = 0; i < g.rotary; ++i) {
      const Scalar a = static_cast<Scalar>(in[2 * i]), b = static_cast<Scalar>(in[2 * i + 1]), s = sin[i] * sign;
      out[2 * i] = static_cast<Out>((a * cos[i] - b * s) * factor);
      out[2 * i + 1] = static_cast<Out>((a * s + b * cos[i]) * factor);
    }
  } else {
    for (int64_t i = 0; i < g.rotary; ++i) {
      const Scalar a = static_cast<Scalar>(in[i]), b = static_cast<Scalar>(in[i + g.rotary]), s = sin[i] * sign;
      out[i] = static_cast<Out>((a * cos[i] - b * s) * factor);
      out[i + g.rotary] = static_cast<Out>((a * s + b * cos[i]) * factor);
    }
  }
  for (int64_t i = 2 * g.rotary; i < g.dim; ++i) out[i] = static_cast<Out>(static_cast<Scalar>(in[i]) * factor);
}

// Rotated (if `turn`) copy [B, heads, S, D] of in [B, S, heads, D] in the compute type.
template <typename Scalar, typename T>
void pack(const Geometry<Scalar>& g, const Rows<const T>& in, int64_t tokens, int64_t heads, bool turn, Scalar* out) {
  at::parallel_for(0, g.batch * tokens, std::max<int64_t>(1, 32768 / (heads * g.dim)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / tokens, s = i % tokens;
      for (int64_t h = 0; h < heads; ++h) {
        Scalar* to = out + ((b * heads + h) * tokens + s) * g.dim;
        const T* from = in.at(b, s, h);
        if (turn && g.rotary > 0)
          rotate_row(g, from, g.angles(g.cos, b, tokens - s), g.angles(g.sin, b, tokens - s), Scalar{1}, Scalar{1}, to);
        else
          for (int64_t d = 0; d < g.dim; ++d) to[d] = static_cast<Scalar>(from[d]);
      }
    }
  });
}

// Whether all of `count` numbers are finite. In integers, which the compiler turns into vectors: the exponent of Inf
// and NaN is all ones.
inline bool all_finite(const float* p, int64_t count) {
  uint32_t carries = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, p + i, sizeof(bits));
    carries |= (bits & 0x7fffffffu) + 0x00800000u;
  }
  return carries < 0x80000000u;
}

// Sets what is not finite to 0.
inline void silence(float* p, int64_t count) {
  for (int64_t i = 0; i < count; ++i) p[i] = all_finite(p + i, 1) ? p[i] : 0.0f;
}

inline bool finite_tensor(const Tensor& t) {
  std::atomic<bool> finite{true};
  const float* p = t.const_data_ptr<float>();
  at::parallel_for(0, t.numel(), 65536, [&](int64_t begin, int64_t end) {
    if (!all_finite(p + begin, end - begin)) finite = false;
  });
  return finite;
}

// A result in half precision and what its rounding took away: `rest` is the difference of the bits of the fp32 number
// and of the rounded one, widened. bf16 and normal fp16 numbers come back exactly; fp16 subnormals and what
// overflowed stay as rounded.
inline int16_t rest_of(float exact, float rounded) {
  int32_t bits, base;
  std::memcpy(&bits, &exact, sizeof(bits));
  std::memcpy(&base, &rounded, sizeof(base));
  return all_finite(&rounded, 1) ? static_cast<int16_t>(std::clamp(bits - base, -32768, 32767)) : int16_t{0};
}

// What the forward pass keeps for the backward pass against rounding: of the output in half precision, as `rest_of`
// says, else of the log-sum-exp, as `correction_of` says.
template <typename T>
using Rest = std::conditional_t<sizeof(T) == 2, int16_t, T>;

inline float unrounded(float rounded, int16_t rest) {
  int32_t bits;
  std::memcpy(&bits, &rounded, sizeof(bits));
  bits += rest;
  std::memcpy(&rounded, &bits, sizeof(bits));
  return rounded;
}

// The log-sum-exp in units of log 2.
inline double in_log2(float lse) { return static_cast<double>(lse) * 1.4426950408889634; }

// The same as the tiles subtract it, rounded once whether or not the compiler fuses operations.
inline float shift_of(float lse) { return static_cast<float>(in_log2(lse)); }

// 1 / sum_j exp(s_j - lse): by this the probabilities that are recomputed from a rounded lse must be multiplied to sum
// up to 1. `top`, in units of log 2, and `total` are those of the online softmax. 1 where nothing is seen or not
// finite.
inline float correction_of(float lse, float top, float total) {
  const float correction = static_cast<float>(std::exp2(in_log2(lse) - top) / total);
  return all_finite(&correction, 1) ? correction : 1.0f;
}

// As astrobiogen::run_tasks, with zeros for scratch.
template <class Work>
void run_tasks(int64_t count, int64_t scratch_floats, const Work& work) {
  const auto make_scratch = [=] { return AlignedArray<float>(scratch_floats); };
  astrobiogen::run_tasks(count, make_scratch,
                         [&](int64_t task, AlignedArray<float>& scratch) { work(task, scratch.data()); });
}

using ForwardResult = std::tuple<Tensor, Tensor, Tensor>;
using BackwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Inputs {
  Tensor q, k, v;
  Optional cos, sin, cu_seqlens, sinks;
  Options options;
};

BackwardResult backward(const Inputs& in, const Tensor& grad_out, const Optional& grad_lse, const Tensor& out,
                        const Tensor& lse, const Tensor& rest);
void forward_double(const Inputs& in, Tensor& out, Tensor& lse, Tensor& rest);
void backward_double(const Inputs& in, const Tensor& grad_out, const Optional& grad_lse, const Tensor& out,
                     const Tensor& lse, const Tensor& rest, Tensor& grad_q, Tensor& grad_k, Tensor& grad_v,
                     Tensor& grad_sinks);

}  // namespace astrobiogen::attention
