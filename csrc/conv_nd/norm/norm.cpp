// Norm over the channels of a convolution's output: statistics, normalisation and activation, forward.
//
// Channel norms take one pass over a position's channels while they are in L1. A group norm needs the whole sample
// first: the convolution leaves mean and sum of squared deviations per row, these are merged in a fixed order in fp64
// (Chan et al.), and one pass scales, shifts and activates.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <cmath>

#include "common/dtypes.h"
#include "conv_nd/norm/norm.h"

namespace astrobiogen::conv_nd {

using at::Tensor;
using simd::f32x16;
using simd::kLanes;

namespace {

constexpr int64_t kGrain = 16384;  // elements of one task: below, scheduling (~5 us) costs more than the work

ASTRO_INLINE f32x16 lanes_of(const float* p, int64_t left, float fill) {
  return left >= kLanes ? simd::load(p) : simd::load_partial(p, left, fill);
}

template <typename T>
ASTRO_INLINE void set_lanes(T* p, f32x16 v, int64_t left, bool streamed) {
  put(p, v, left, streamed);
}

template <typename T>
ASTRO_INLINE void normalize(const NormTarget& t, const float* z, int64_t first, int64_t count) {
  const Epilogue& e = *t.epilogue;
  const int64_t c = t.channels;
  std::vector<float> row(c);
  for (int64_t p = 0; p < count; ++p, z += c) {
    f32x16 sum = simd::splat(0.0f), squares = simd::splat(0.0f);
    for (int64_t i = 0; i < c; i += kLanes) {
      f32x16 v = lanes_of(z + i, c - i, 0.0f);
      if (e.bias != nullptr) v += lanes_of(e.bias + i, c - i, 0.0f);
      put(row.data() + i, v, c - i, false);
      sum += v;
      squares += v * v;
    }
    const int64_t at = first + p;
    float mean = 0.0f, variance = simd::sum(squares) / static_cast<float>(c);
    if (e.norm == kLayer) {  // centred, since sum of squares minus squared sum cancels
      mean = simd::sum(sum) / static_cast<float>(c);
      squares = simd::splat(0.0f);
      for (int64_t i = 0; i < c; i += kLanes) {
        const f32x16 d = lanes_of(row.data() + i, c - i, mean) - mean;
        squares += d * d;
      }
      variance = simd::sum(squares) / static_cast<float>(c);
    }
    const float rstd = 1.0f / std::sqrt(variance + e.eps);
    if (e.mean != nullptr) e.mean[at] = mean;
    if (e.rstd != nullptr) e.rstd[at] = rstd;
    T *y = static_cast<T*>(e.y) + at * c,
      *pre_activation = e.pre_activation == nullptr ? nullptr : static_cast<T*>(e.pre_activation) + at * c;
    for (int64_t i = 0; i < c; i += kLanes) {
      const f32x16 v = lanes_of(row.data() + i, c - i, 0.0f);
      if (pre_activation != nullptr) set_lanes(pre_activation + i, v, c - i, e.streamed);
      f32x16 u = (v - mean) * rstd;
      if (e.gamma != nullptr) u *= lanes_of(e.gamma + i, c - i, 0.0f);
      if (e.beta != nullptr) u += lanes_of(e.beta + i, c - i, 0.0f);
      set_lanes(y + i, activate(u, e.activation), c - i, e.streamed);
    }
  }
}

// The mean goes first: z * scale - mean * scale would cancel where the mean is large.
template <typename T>
ASTRO_INLINE void scale_shift(const T* z, T* y, const float* mean, const float* scale, const float* shift,
                              int64_t channels, int64_t count, int64_t activation, bool streamed) {
  for (int64_t p = 0; p < count; ++p, z += channels, y += channels)
    for (int64_t i = 0; i < channels; i += kLanes) {
      const int64_t left = channels - i;
      const f32x16 v = left >= kLanes ? simd::load(z + i) : simd::load_partial(z + i, left);
      const f32x16 u =
          (v - lanes_of(mean + i, left, 0.0f)) * lanes_of(scale + i, left, 0.0f) + lanes_of(shift + i, left, 0.0f);
      set_lanes(y + i, activate(u, activation), left, streamed);
    }
}

struct Scaling {
  const void* z;
  void* y;
  at::ScalarType dtype;
  const float *mean, *scale, *shift;
  int64_t channels, count, activation;
  bool streamed;
};

struct ScaleShift {
  template <Level L>
  static ASTRO_INLINE void run(const Scaling& s) {
    for_dtype(s.dtype, [&]<typename T>() ASTRO_LAMBDA_INLINE {
      scale_shift(static_cast<const T*>(s.z), static_cast<T*>(s.y), s.mean, s.scale, s.shift, s.channels, s.count,
                  s.activation, s.streamed);
    });
  }
};

// `sums`: of each channel relative to its first position, `pivots`, so that what they have in common costs no digits.
template <typename T>
ASTRO_INLINE void store_groups(const NormTarget& t, float* z, int64_t first, int64_t count, float* pivots,
                               float* sums) {
  const Epilogue& e = *t.epilogue;
  T* to = static_cast<T*>(e.pre_activation != nullptr ? e.pre_activation : e.y) + first * t.channels;
  for (int64_t i = 0; i < t.channels; i += kLanes) {
    const int64_t left = t.channels - i;
    const f32x16 bias = e.bias == nullptr ? simd::splat(0.0f) : lanes_of(e.bias + i, left, 0.0f);
    const f32x16 pivot = lanes_of(z + i, left, 0.0f) + bias;
    f32x16 sum = simd::splat(0.0f);
    put(pivots + i, pivot, left, false);
    for (int64_t p = 0; p < count; ++p) {
      const f32x16 v = lanes_of(z + p * t.channels + i, left, 0.0f) + bias;
      put(z + p * t.channels + i, v, left, false);
      put(to + p * t.channels + i, v, left, false);
      sum += v - pivot;
    }
    put(sums + i, sum, left, false);
  }
}

struct StoreGroups {
  template <Level L>
  static ASTRO_INLINE void run(const NormTarget& t, float* z, int64_t first, int64_t count, float* pivots,
                               float* sums) {
    for_dtype(t.dtype, [&]<typename T>() ASTRO_LAMBDA_INLINE { store_groups<T>(t, z, first, count, pivots, sums); });
  }
};

struct SquaredDeviations {
  template <Level L>
  static ASTRO_INLINE void run(const float* z, const float* mean, int64_t channels, int64_t count, float* squares) {
    for (int64_t i = 0; i < channels; i += kLanes) {
      const int64_t left = channels - i;
      const f32x16 center = lanes_of(mean + i, left, 0.0f);
      f32x16 sum = simd::splat(0.0f);
      for (int64_t p = 0; p < count; ++p) {
        const f32x16 d = lanes_of(z + p * channels + i, left, 0.0f) - center;
        sum += d * d;
      }
      put(squares + i, sum, left, false);
    }
  }
};

struct Normalize {
  template <Level L>
  static ASTRO_INLINE void run(const NormTarget& t, const float* z, int64_t first, int64_t count) {
    for_dtype(t.dtype, [&]<typename T>() ASTRO_LAMBDA_INLINE { normalize<T>(t, z, first, count); });
  }
};

}  // namespace

void normalize_positions(const NormTarget& target, const float* z, int64_t first, int64_t count) {
  dispatch<Normalize>(target, z, first, count);
}

void partial_groups(const NormTarget& t, float* z, int64_t first, int64_t count, int64_t slot) {
  const Epilogue& e = *t.epilogue;
  const int64_t width = t.channels / e.norm_groups;
  std::vector<float> sums(t.channels), means(t.channels);
  dispatch<StoreGroups>(t, z, first, count, means.data(), sums.data());
  for (int64_t g = 0; g < e.norm_groups; ++g) {
    double total = 0.0;
    for (int64_t i = g * width; i < (g + 1) * width; ++i) total += sums[i] + static_cast<double>(count) * means[i];
    const float mean = static_cast<float>(total / static_cast<double>(width * count));
    e.mean[slot * e.norm_groups + g] = mean;
    std::fill_n(means.begin() + g * width, width, mean);
  }
  dispatch<SquaredDeviations>(z, means.data(), t.channels, count, sums.data());
  for (int64_t g = 0; g < e.norm_groups; ++g) {
    double total = 0.0;
    for (int64_t i = 0; i < width; ++i) total += sums[g * width + i];
    e.rstd[slot * e.norm_groups + g] = static_cast<float>(total);
  }
}

namespace {

// mean, scale and shift of every sample and channel, in that order: y = (z - mean) scale + shift.
struct ChannelScales {
  std::vector<float> mean, scale, shift;
};

ChannelScales merge_statistics(const PartialStatistics& partial, int64_t channels, const Epilogue& e, Tensor& mean,
                               Tensor& rstd) {
  const int64_t batch = partial.mean.size(0), groups = e.norm_groups, width = channels / groups,
                slots = static_cast<int64_t>(partial.counts.size());
  const float *means = partial.mean.const_data_ptr<float>(), *squares = partial.squares.const_data_ptr<float>();
  float *mean_to = mean.mutable_data_ptr<float>(), *rstd_to = rstd.mutable_data_ptr<float>();
  ChannelScales result{std::vector<float>(batch * channels), std::vector<float>(batch * channels),
                       std::vector<float>(batch * channels)};
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t g = 0; g < groups; ++g) {
      double seen = 0.0, center = 0.0, spread = 0.0;
      for (int64_t s = 0; s < slots; ++s) {
        const int64_t at = (b * slots + s) * groups + g;
        const double count = static_cast<double>(partial.counts[s] * width), delta = means[at] - center,
                     total = seen + count;
        center += delta * count / total;
        spread += squares[at] + delta * delta * seen * count / total;
        seen = total;
      }
      const double inverse = 1.0 / std::sqrt(spread / seen + e.eps);
      const float rounded = static_cast<float>(center);
      mean_to[b * groups + g] = rounded, rstd_to[b * groups + g] = static_cast<float>(inverse);
      for (int64_t i = g * width; i < (g + 1) * width; ++i) {
        const double factor = inverse * (e.gamma == nullptr ? 1.0f : e.gamma[i]);
        result.mean[b * channels + i] = rounded;
        result.scale[b * channels + i] = static_cast<float>(factor);
        result.shift[b * channels + i] =
            static_cast<float>((e.beta == nullptr ? 0.0f : e.beta[i]) - (center - rounded) * factor);
      }
    }
  return result;
}

}  // namespace

void finish_groups(const Tensor& z, Tensor& y, const PartialStatistics& partial, const Epilogue& e, Tensor& mean,
                   Tensor& rstd) {
  const int64_t batch = z.size(0), channels = z.size(-1),
                positions = z.numel() / std::max<int64_t>(1, batch * channels);
  const ChannelScales scales = merge_statistics(partial, channels, e, mean, rstd);
  const char* from = static_cast<const char*>(z.const_data_ptr());
  char* to = static_cast<char*>(y.mutable_data_ptr());
  const int64_t row_bytes = channels * z.element_size();
  at::parallel_for(0, batch * positions, 1 + kGrain / channels, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t b = begin / positions, stop = std::min(end, (b + 1) * positions);
      dispatch<ScaleShift>(Scaling{from + begin * row_bytes, to + begin * row_bytes, z.scalar_type(),
                                   scales.mean.data() + b * channels, scales.scale.data() + b * channels,
                                   scales.shift.data() + b * channels, channels, stop - begin, e.activation,
                                   e.streamed});
      begin = stop;
    }
    if (e.streamed) simd::stream_fence();
  });
}

NormResult normalize_rows(const Tensor& total, at::ScalarType dtype, Epilogue e, bool keep) {
  const int64_t channels = total.size(-1), batch = total.size(0),
                positions = batch == 0 ? 0 : total.numel() / batch / channels;
  const bool single = dtype == at::kFloat;
  const auto options = total.options().dtype(dtype);
  NormResult r{total, at::empty({0}, options), at::empty({0}, total.options()), at::empty({0}, total.options())};
  // fp32 rows are normalised where they are; to keep them the normalised ones go elsewhere.
  if (keep || !single) r.y = at::empty(total.sizes(), options);
  if (keep) r.pre_activation = single ? total : at::empty_like(r.y);
  e.y = r.y.mutable_data_ptr(), e.pre_activation = keep ? r.pre_activation.mutable_data_ptr() : nullptr;
  const NormTarget target{channels, dtype, &e};
  float* z = total.mutable_data_ptr<float>();
  if (e.norm != kGroup) {
    if (keep) {
      r.rstd = at::empty(total.sizes().slice(0, total.dim() - 1), total.options());
      if (e.norm == kLayer) r.mean = at::empty_like(r.rstd);
      e.rstd = r.rstd.mutable_data_ptr<float>(), e.mean = e.norm == kLayer ? r.mean.mutable_data_ptr<float>() : nullptr;
    }
    at::parallel_for(0, batch * positions, 1 + kGrain / channels, [&](int64_t begin, int64_t end) {
      normalize_positions(target, z + begin * channels, begin, end - begin);
    });
    return r;
  }
  const int64_t slot = std::max<int64_t>(1, kGrain / channels), slots = (positions + slot - 1) / slot;
  PartialStatistics partial{
      at::empty({batch, slots, e.norm_groups}, total.options()), {}, std::vector<int64_t>(slots, slot)};
  partial.squares = at::empty_like(partial.mean);
  if (slots > 0) partial.counts.back() = positions - (slots - 1) * slot;
  e.mean = partial.mean.mutable_data_ptr<float>(), e.rstd = partial.squares.mutable_data_ptr<float>();
  at::parallel_for(0, batch * slots, 1, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t first = at / slots * positions + at % slots * slot;
      partial_groups(target, z + first * channels, first, partial.counts[at % slots], at);
    }
  });
  r.mean = at::empty({batch, e.norm_groups}, total.options()), r.rstd = at::empty_like(r.mean);
  finish_groups(keep ? r.pre_activation : r.y, r.y, partial, e, r.mean, r.rstd);
  return r;
}

}  // namespace astrobiogen::conv_nd
