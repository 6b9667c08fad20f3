// Lines of input for the own CPU convolution kernels: sums of up to four rows, widened to fp32, with the last axis'
// halo written out.
#include "common/dtypes.h"
#include "conv_nd/direct.h"

namespace astrobiogen::conv_nd {

namespace {

// Pieces of up to kMaxTile rows that are added up: to[i] = sum over k of sign[k] * from[k][i]. The products are exact.
template <typename T, int Count>
ASTRO_INLINE void add_up(const T* const* from, const float* sign, float* to, int64_t size) {
  int64_t i = 0;
  for (; size - i >= simd::kLanes; i += simd::kLanes) {
    simd::f32x16 v = simd::load(from[0] + i) * sign[0];
    for (int k = 1; k < Count; ++k) v += simd::load(from[k] + i) * sign[k];
    simd::store(to + i, v);
  }
  for (; i < size; ++i) {
    float v = static_cast<float>(from[0][i]) * sign[0];
    for (int k = 1; k < Count; ++k) v += static_cast<float>(from[k][i]) * sign[k];
    to[i] = v;
  }
}

template <typename T>
ASTRO_INLINE void add_up_any(const T* const* from, const float* sign, int count, float* to, int64_t size) {
  if (count == 1) add_up<T, 1>(from, sign, to, size);
  else if (count == 2) add_up<T, 2>(from, sign, to, size);
  else if (count == 3) add_up<T, 3>(from, sign, to, size);
  else add_up<T, 4>(from, sign, to, size);
}

struct AddUp {
  template <Level L, typename T>
  static ASTRO_INLINE void run(const T* const* from, const float* sign, int count, float* to, int64_t size) {
    add_up_any(from, sign, count, to, size);
  }
};

template <typename T>
void build(const Plan& plan, const T* x, const Line& line, int64_t begin, int64_t end, float* to) {
  const int64_t c = plan.channels, w = plan.width, low = begin * plan.stride_w - plan.pad_w,
                high = low + plan.reach(begin, end);
  const auto piece = [&](int64_t p, int64_t source,
                         int64_t count) {  // `count` positions from column `source` on, no wrap inside
    const T* from[kMaxTile];
    for (int k = 0; k < line.count; ++k) {
      int64_t column = source;
      if (line.rolled[k]) column = source + w / 2 < w ? source + w / 2 : source - w / 2;
      from[k] = x + (line.row[k] * w + column) * c;
    }
    dispatch<AddUp>(static_cast<const T* const*>(from), line.sign, line.count, to + (p - low) * c, count * c);
  };
  const auto halo = [&](int64_t p) {
    const int64_t source = source_row(plan.mode_w, p, w);
    if (source < 0) std::memset(to + (p - low) * c, 0, c * sizeof(float));
    else piece(p, source, 1);
  };
  const int64_t first = std::min(std::max<int64_t>(low, 0), high), last = std::max(first, std::min(high, w));
  for (int64_t p = low; p < first; ++p) halo(p);
  if (line.any_rolled && first < w / 2 && last > w / 2) {
    piece(first, first, w / 2 - first);
    piece(w / 2, w / 2, last - w / 2);
  } else if (last > first) {
    piece(first, first, last - first);
  }
  for (int64_t p = last; p < high; ++p) halo(p);
}

// The input transform of every tile of two outputs, from positions 2 t to 2 t + 3 of a row.
struct InputTransform {
  template <Level L>
  static ASTRO_INLINE void run(const float* row, int64_t steps, int64_t channels, float* to) {
    const int64_t step = steps * channels;
    const auto components = [&](const float* x, float* component, auto get, auto set) ASTRO_LAMBDA_INLINE {
      const auto x0 = get(x), x1 = get(x + channels), x2 = get(x + 2 * channels), x3 = get(x + 3 * channels);
      set(component, x0 - x2), set(component + step, x1 + x2), set(component + 2 * step, x2 - x1),
          set(component + 3 * step, x3 - x1);
    };
    for (int64_t t = 0; t < steps; ++t, row += 2 * channels, to += channels) {
      int64_t c = 0;
      for (; channels - c >= simd::kLanes; c += simd::kLanes)
        components(
            row + c, to + c, [](const float* p) ASTRO_LAMBDA_INLINE { return simd::load(p); },
            [](float* p, simd::f32x16 v) ASTRO_LAMBDA_INLINE { simd::store(p, v); });
      for (; c < channels; ++c)
        components(
            row + c, to + c, [](const float* p) ASTRO_LAMBDA_INLINE { return *p; },
            [](float* p, float v) ASTRO_LAMBDA_INLINE { *p = v; });
    }
  }
};

void build_any(const Plan& plan, const void* x, at::ScalarType dtype, const Line& line, int64_t begin, int64_t end,
               float* to) {
  for_dtype(dtype, [&]<typename T>() { build(plan, static_cast<const T*>(x), line, begin, end, to); });
}

}  // namespace

void build_line(const Plan& plan, const void* x, at::ScalarType dtype, const Line& line, int64_t begin, int64_t end,
                float* to, float* scratch) {
  if (!plan.winograd_last()) return build_any(plan, x, dtype, line, begin, end, to);
  build_any(plan, x, dtype, line, begin, end, scratch);
  const int64_t reach = plan.reach(begin, end);  // of an odd number of outputs the last tile's second one is absent
  std::fill_n(scratch + reach * plan.channels, plan.channels, 0.0f);
  dispatch<InputTransform>(static_cast<const float*>(scratch), plan.steps(end - begin), plan.channels, to);
}

}  // namespace astrobiogen::conv_nd
