// Backward of a channel or group norm with activation over channel-last rows: gradient of the norm's input, and of its
// weight and bias.
//
// With h = (z - mean) rstd, u = gamma h + beta, d = dy act'(u), e = gamma d:   dgamma = sum d h,   dbeta = sum d,
//   dz = rstd (e - mean(e) - h mean(e h))     (RMS norm: without mean(e))
// where the means run over the channels of a position, or over a group's channels and positions. A channel norm is one
// pass; a group norm's means follow from the per-channel sums that dgamma and dbeta need anyway, so it is two. Partials
// per chunk of positions, added in order.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>

#include <optional>
#include <tuple>

#include "common/dtypes.h"
#include "conv_nd/norm/norm.h"

namespace astrobiogen::conv_nd {

using at::Tensor;
using simd::f32x16;
using simd::kLanes;

namespace {

constexpr int64_t kMaxChunks = 32;
constexpr int64_t kGrain = 16384;
// Positions whose sums are taken in fp32 before they go to fp64: a rounding error grows with the length of such a run.
constexpr int64_t kRun = 64;

struct Backward {
  const void *grad, *z;
  void* grad_z;
  at::ScalarType dtype;
  int64_t channels, activation;
  bool centred;                        // layer norm
  const float *gamma, *beta;           // [channels]; 1 and 0 where the norm has none
  const float *mean, *rstd;            // channel norms: [positions]; group norm: of this sample, spread over [channels]
  const float *grad_mean, *grad_proj;  // group norm, second pass: mean(e), mean(e h) per channel
  float *sum_d, *sum_dh;               // [channels], added to
};

template <typename T>
ASTRO_INLINE f32x16 lanes_of(const T* p, int64_t left) {
  return left >= kLanes ? simd::load(p) : simd::load_partial(p, left);
}

template <typename T>
ASTRO_INLINE void add_lanes(T* p, f32x16 v, int64_t left) {
  put(p, lanes_of(p, left) + v, left, false);
}

// Calls rows(begin, end, sum_d, sum_dh) for runs of positions, whose sums of `channels` channels go to `sums`
// [2][channels].
template <typename Rows>
void in_runs(int64_t begin, int64_t end, int64_t channels, double* sums, const Rows& rows) {
  std::vector<float> run(2 * channels);
  for (int64_t first = begin; first < end; first += kRun) {
    rows(first, std::min(end, first + kRun), run.data(), run.data() + channels);
    for (int64_t i = 0; i < 2 * channels; ++i) sums[i] += run[i], run[i] = 0.0f;
  }
}

template <typename T>
ASTRO_INLINE void channel_rows(const Backward& b, int64_t begin, int64_t end, float* e_row, float* h_row) {
  const int64_t c = b.channels;
  for (int64_t p = begin; p < end; ++p) {
    const T *grad = static_cast<const T*>(b.grad) + p * c, *z = static_cast<const T*>(b.z) + p * c;
    T* to = static_cast<T*>(b.grad_z) + p * c;
    const float mean = b.centred ? b.mean[p] : 0.0f, rstd = b.rstd[p];
    f32x16 sum = simd::splat(0.0f), projection = simd::splat(0.0f);
    for (int64_t i = 0; i < c; i += kLanes) {
      const int64_t left = c - i;
      f32x16 h = (lanes_of(z + i, left) - mean) * rstd;
      const f32x16 gamma = lanes_of(b.gamma + i, left);
      const f32x16 d = lanes_of(grad + i, left) *
                       activation_slope(gamma * h + lanes_of(b.beta + i, left), b.activation),
                   e = gamma * d;
      add_lanes(b.sum_d + i, d, left);
      add_lanes(b.sum_dh + i, d * h, left);
      simd::store(e_row + i, e);
      simd::store(h_row + i, h);
      sum += e;  // absent lanes: gamma = 0
      projection += e * h;
    }
    const float m = b.centred ? simd::sum(sum) / static_cast<float>(c) : 0.0f,
                q = simd::sum(projection) / static_cast<float>(c);
    for (int64_t i = 0; i < c; i += kLanes)
      put(to + i, (simd::load(e_row + i) - m - simd::load(h_row + i) * q) * rstd, c - i, false);
  }
}

template <typename T, bool Sums>
ASTRO_INLINE void group_rows(const Backward& b, int64_t begin, int64_t end) {
  const int64_t c = b.channels;
  for (int64_t p = begin; p < end; ++p) {
    const T *grad = static_cast<const T*>(b.grad) + p * c, *z = static_cast<const T*>(b.z) + p * c;
    for (int64_t i = 0; i < c; i += kLanes) {
      const int64_t left = c - i;
      const f32x16 rstd = lanes_of(b.rstd + i, left), h = (lanes_of(z + i, left) - lanes_of(b.mean + i, left)) * rstd,
                   gamma = lanes_of(b.gamma + i, left);
      const f32x16 d =
          lanes_of(grad + i, left) * activation_slope(gamma * h + lanes_of(b.beta + i, left), b.activation);
      if constexpr (Sums) {
        add_lanes(b.sum_d + i, d, left);
        add_lanes(b.sum_dh + i, d * h, left);
      } else {
        const f32x16 v = (gamma * d - lanes_of(b.grad_mean + i, left) - h * lanes_of(b.grad_proj + i, left)) * rstd;
        put(static_cast<T*>(b.grad_z) + p * c + i, v, left, false);
      }
    }
  }
}

struct ChannelRows {
  template <Level L>
  static ASTRO_INLINE void run(const Backward& b, int64_t begin, int64_t end, float* e_row, float* h_row) {
    for_dtype(b.dtype, [&]<typename T>() ASTRO_LAMBDA_INLINE { channel_rows<T>(b, begin, end, e_row, h_row); });
  }
};

template <bool Sums>
struct GroupRows {
  template <Level L>
  static ASTRO_INLINE void run(const Backward& b, int64_t begin, int64_t end) {
    for_dtype(b.dtype, [&]<typename T>() ASTRO_LAMBDA_INLINE { group_rows<T, Sums>(b, begin, end); });
  }
};

void channel_backward(Backward b, int64_t positions, Tensor& sums) {
  const int64_t c = b.channels, chunks = std::clamp<int64_t>(positions * c / kGrain, 1, kMaxChunks),
                padded = (c + kLanes - 1) / kLanes * kLanes;
  Tensor partial = at::zeros({chunks, 2, c}, sums.options());
  double* to = partial.mutable_data_ptr<double>();
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> rows(2 * padded);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const auto some = [&](int64_t first, int64_t last, float* sum_d, float* sum_dh) {
        Backward mine = b;
        mine.sum_d = sum_d, mine.sum_dh = sum_dh;
        dispatch<ChannelRows>(mine, first, last, rows.data(), rows.data() + padded);
      };
      in_runs(positions * chunk / chunks, positions * (chunk + 1) / chunks, c, to + chunk * 2 * c, some);
    }
  });
  sums = partial.sum(0);
}

void group_backward(Backward b, int64_t batch, int64_t positions, const float* mean, const float* rstd, int64_t groups,
                    Tensor& sums) {
  const int64_t c = b.channels, width = c / groups, chunks = std::clamp<int64_t>(positions * c / kGrain, 1, kMaxChunks);
  std::vector<float> spread(4 * batch * c);  // mean, rstd, mean(e), mean(e h) per sample and channel
  const auto part = [&](int64_t which, int64_t sample) { return spread.data() + (which * batch + sample) * c; };
  for (int64_t s = 0; s < batch; ++s)
    for (int64_t i = 0; i < c; ++i)
      part(0, s)[i] = mean[s * groups + i / width], part(1, s)[i] = rstd[s * groups + i / width];
  Tensor partial = at::zeros({batch, chunks, 2, c}, sums.options());
  double* to = partial.mutable_data_ptr<double>();
  const auto sample_of = [&](int64_t s) {
    Backward mine = b;
    mine.mean = part(0, s), mine.rstd = part(1, s), mine.grad_mean = part(2, s), mine.grad_proj = part(3, s);
    return mine;
  };
  at::parallel_for(0, batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t s = item / chunks, chunk = item % chunks;
      const auto some = [&](int64_t first, int64_t last, float* sum_d, float* sum_dh) {
        Backward mine = sample_of(s);
        mine.sum_d = sum_d, mine.sum_dh = sum_dh;
        dispatch<GroupRows<true>>(mine, first, last);
      };
      in_runs(s * positions + positions * chunk / chunks, s * positions + positions * (chunk + 1) / chunks, c,
              to + item * 2 * c, some);
    }
  });
  const Tensor per_sample = partial.sum(1);  // [batch, 2, channels]
  const double* totals = per_sample.const_data_ptr<double>();
  for (int64_t s = 0; s < batch; ++s)
    for (int64_t g = 0; g < groups; ++g) {
      double center = 0.0, projection = 0.0;
      for (int64_t i = g * width; i < (g + 1) * width; ++i) {
        center += static_cast<double>(b.gamma[i]) * totals[s * 2 * c + i];
        projection += static_cast<double>(b.gamma[i]) * totals[(s * 2 + 1) * c + i];
      }
      const double count = static_cast<double>(positions * width);
      std::fill_n(part(2, s) + g * width, width, static_cast<float>(center / count));
      std::fill_n(part(3, s) + g * width, width, static_cast<float>(projection / count));
    }
  at::parallel_for(0, batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t s = item / chunks, chunk = item % chunks;
      dispatch<GroupRows<false>>(sample_of(s), s * positions + positions * chunk / chunks,
                                 s * positions + positions * (chunk + 1) / chunks);
    }
  });
  sums = per_sample.sum(0);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> norm_backward(const Tensor& grad, const Tensor& pre_activation,
                                                 const std::optional<Tensor>& gamma, const std::optional<Tensor>& beta,
                                                 const Tensor& mean, const Tensor& rstd, int64_t norm,
                                                 int64_t norm_groups, int64_t activation) {
  const Tensor g = to_channels_last(grad), z = to_channels_last(pre_activation);
  const int64_t channels = z.size(-1), batch = z.size(0), positions = batch == 0 ? 0 : z.numel() / batch / channels;
  const auto single = mean.options();
  const Tensor wide_gamma = gamma ? gamma->to(at::kFloat).contiguous() : at::empty({channels}, single).fill_(1.0);
  const Tensor wide_beta = beta ? beta->to(at::kFloat).contiguous() : at::zeros({channels}, single);
  Tensor grad_z = at::empty_like(z), sums = at::zeros({2, channels}, single.dtype(at::kDouble));
  Backward b{g.const_data_ptr(),
             z.const_data_ptr(),
             grad_z.mutable_data_ptr(),
             z.scalar_type(),
             channels,
             activation,
             norm == kLayer,
             wide_gamma.const_data_ptr<float>(),
             wide_beta.const_data_ptr<float>(),
             mean.const_data_ptr<float>(),
             rstd.const_data_ptr<float>(),
             nullptr,
             nullptr,
             nullptr,
             nullptr};
  if (z.numel() > 0) {
    if (norm == kGroup)
      group_backward(b, batch, positions, mean.const_data_ptr<float>(), rstd.const_data_ptr<float>(), norm_groups,
                     sums);
    else channel_backward(b, batch * positions, sums);
  }
  return {from_channels_last(grad_z), sums[1].to(z.scalar_type()), sums[0].to(z.scalar_type())};
}

}  // namespace astrobiogen::conv_nd
