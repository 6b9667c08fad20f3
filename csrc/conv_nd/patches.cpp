// Convolution whose windows do not overlap (stride = kernel, no padding): the patch stem of a network. fp32.
//
// y[p, o] = sum over k of x[base(p) + offset(k)] w[k, o], k over channels and taps, read where x lies: no copy of the
// patches, which have the size of x. Register blocks as the other kernels': 8 patches x up to 48 outputs under AVX-512
// (24 sums, 3 weights, 1 broadcast), 6 x 16 under AVX2. A chain of sums is at most kChain long. The weight gradient
// runs 8 (6) terms k x outputs along kPatches patches at a time; its partials depend on the shape only, so any thread
// count gives the same bits. Outputs that would fill at most kLone lanes of a vector of their own (33 = 2 x 16 + 1) are
// computed with the terms in the lanes instead, eight neighbours in x at a time.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "common/dispatch.h"
#include "common/stream.h"
#include "conv_nd/direct.h"
#include "conv_nd/patches.h"
#include "gemm/microkernel.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

constexpr int64_t kChain = 256;
constexpr int64_t kPatches = 128;  // of one pass of the weight gradient: 24 KiB of output gradients, x from L2
constexpr int64_t kMaxBlocks = 16;
constexpr int64_t kBlockPatches = 1024;  // patches below which a partial costs more than it saves
constexpr int64_t kRun = 8, kLone = 2;

template <Level L>
struct Block {
  using Vec = simd::F<astrobiogen::kWidth<L>>;
  static constexpr int kPositions = L == Level::kAvx512 ? 8 : 6, kVectors = L == Level::kAvx512 ? 3 : 2;
  static constexpr int64_t kLanes = kWidth<L>;
};

// Where the windows lie in x, in elements.
struct Windows {
  std::vector<int64_t> count, step;  // per axis, batch first
  std::vector<int64_t> offset;       // per term k of a window
  bool runs = false;                 // terms come in runs of kRun neighbours in x

  int64_t patches() const { return std::accumulate(count.begin(), count.end(), int64_t{1}, std::multiplies<>()); }
  int64_t terms() const { return static_cast<int64_t>(offset.size()); }

  int64_t base(int64_t patch) const {
    int64_t at = 0;
    for (size_t axis = count.size(); axis-- > 0; patch /= count[axis]) at += patch % count[axis] * step[axis];
    return at;
  }
};

Windows windows(const Tensor& x, at::IntArrayRef kernel) {
  Windows w;
  w.count = {x.size(0)}, w.step = {x.stride(0)}, w.offset = {0};
  const auto spread = [&w](int64_t size, int64_t stride) {
    std::vector<int64_t> longer;
    for (int64_t offset : w.offset)
      for (int64_t at = 0; at < size; ++at) longer.push_back(offset + at * stride);
    w.offset = std::move(longer);
  };
  spread(x.size(1), x.stride(1));
  for (size_t axis = 0; axis < kernel.size(); ++axis) {
    w.count.push_back(x.size(2 + axis) / kernel[axis]);
    w.step.push_back(x.stride(2 + axis) * kernel[axis]);
    spread(kernel[axis], x.stride(2 + axis));
  }
  w.runs = x.stride(-1) == 1 && kernel.back() % kRun == 0;
  return w;
}

// Window starts of patches [first, first + count), then the last one again up to `padded`.
void fill_bases(const Windows& w, const float* x, int64_t first, int64_t count, int64_t padded, const float** to) {
  for (int64_t p = 0; p < padded; ++p) to[p] = x + w.base(first + std::min(p, count - 1));
}

// The outputs as panels of up to kVectors vectors, widths as even as they come, then the lone ones.
template <Level L>
struct Columns {
  int64_t outputs, vectors, panels, lone;

  Columns(int64_t outputs, bool runs) : outputs(outputs) {
    const int64_t lanes = Block<L>::kLanes, rest = outputs % lanes;
    lone = runs && rest <= kLone && outputs > rest ? rest : 0;
    vectors = (outputs - lone + lanes - 1) / lanes;
    panels = (vectors + Block<L>::kVectors - 1) / Block<L>::kVectors;
  }
  int64_t begin(int64_t panel) const { return panel * vectors / panels * Block<L>::kLanes; }  // first output
  int64_t lanes(int64_t panel) const { return begin(panel + 1) - begin(panel); }
  int64_t present(int64_t panel) const { return std::min(lanes(panel), outputs - lone - begin(panel)); }
  int64_t all_lanes() const { return vectors * Block<L>::kLanes; }

  // body<vectors>() of a panel.
  template <typename Body>
  ASTRO_INLINE void with_width(int64_t panel, Body body) const {
    const int64_t width = lanes(panel) / Block<L>::kLanes;
    if (width == 1) body.template operator()<1>();
    else if (width == 2) body.template operator()<2>();
    else if constexpr (Block<L>::kVectors > 2) body.template operator()<3>();
  }
};

struct Forward {
  const Windows* windows;
  const float *x, *weight, *bias;  // weight [O][K]; bias may be null
  float* y;                        // [patches][O]
  int64_t outputs;
};

// The weight as [panels][K][lanes of the panel], absent outputs zero.
template <Level L>
ASTRO_INLINE void pack(const Forward& a, const Columns<L>& columns, std::vector<float>& packed) {
  const int64_t terms = a.windows->terms();
  packed.assign(terms * columns.all_lanes(), 0.0f);
  for (int64_t panel = 0; panel < columns.panels; ++panel)
    for (int64_t o = 0; o < columns.present(panel); ++o)
      for (int64_t k = 0; k < terms; ++k)
        packed[columns.begin(panel) * terms + k * columns.lanes(panel) + o] =
            a.weight[(columns.begin(panel) + o) * terms + k];
}

// Asks for element offset[k] of the next windows, a window per step.
struct NextWindows {
  static constexpr int kSteps = 1;
  const float* const* next;
  const int64_t* offset;
  int count;
  ASTRO_INLINE void operator()(int64_t k) const { simd::prefetch(next[k % count] + offset[k]); }
};

template <Level L, int V>
ASTRO_INLINE void multiply(const float* const* base, const float* const* next, const int64_t* offset, int64_t terms,
                           const float* w, float* sums) {
  using B = Block<L>;
  const auto left = [=](int m, int64_t k) ASTRO_LAMBDA_INLINE { return base[m][offset[k]]; };
  const NextWindows ahead{next, offset, B::kPositions};
  gemm::block<typename B::Vec, B::kPositions, V>(terms, left, w, V * B::kLanes, sums, V * B::kLanes, gemm::AddTo{},
                                                 ahead);
}

// One lone output of the patches at `base`: [kPositions] from its weights [K].
template <Level L>
ASTRO_INLINE void multiply_lone(const float* const* base, const std::vector<int64_t>& offset, const float* w,
                                float bias, float* to) {
  using B = Block<L>;
  simd::f32x8 acc[B::kPositions] = {};
  for (size_t k = 0; k < offset.size(); k += kRun) {
    const simd::f32x8 value = simd::load8(w + k);
    for (int m = 0; m < B::kPositions; ++m) acc[m] += simd::load8(base[m] + offset[k]) * value;
  }
  for (int m = 0; m < B::kPositions; ++m) {
    to[m] = bias;
    for (int lane = 0; lane < kRun; ++lane) to[m] += acc[m][lane];
  }
}

struct ForwardPatches {
  template <Level L>
  static ASTRO_INLINE void run(const Forward& a, int64_t begin, int64_t end) {
    using B = Block<L>;
    const Columns<L> columns(a.outputs, a.windows->runs);
    std::vector<float> packed;
    pack<L>(a, columns, packed);
    const int64_t terms = a.windows->terms();
    const float *base[B::kPositions], *next[B::kPositions];
    fill_bases(*a.windows, a.x, begin, std::min<int64_t>(B::kPositions, end - begin), B::kPositions, next);
    alignas(64) float sums[B::kPositions * B::kVectors * B::kLanes], bias[B::kVectors * B::kLanes] = {};
    for (int64_t first = begin; first < end; first += B::kPositions) {
      const int64_t live = std::min<int64_t>(B::kPositions, end - first);
      std::copy(next, next + B::kPositions, base);
      const int64_t after = std::min(first + B::kPositions, end - 1);
      fill_bases(*a.windows, a.x, after, std::min<int64_t>(B::kPositions, end - after), B::kPositions, next);
      float* rows = a.y + first * a.outputs;
      for (int64_t panel = 0; panel < columns.panels; ++panel) {
        const int64_t o = columns.begin(panel), lanes = columns.lanes(panel), present = columns.present(panel);
        if (a.bias != nullptr) std::copy_n(a.bias + o, present, bias);
        for (int m = 0; m < B::kPositions; ++m) std::copy_n(bias, lanes, sums + m * lanes);
        columns.with_width(panel, [&]<int V>() ASTRO_LAMBDA_INLINE {
          for (int64_t k = 0; k < terms; k += kChain)
            multiply<L, V>(base, next, a.windows->offset.data() + k, std::min(kChain, terms - k),
                           packed.data() + o * terms + k * lanes, sums);
        });
        for (int64_t p = 0; p < live; ++p)
          std::memcpy(rows + p * a.outputs + o, sums + p * lanes, present * sizeof(float));
      }
      for (int64_t o = a.outputs - columns.lone; o < a.outputs; ++o) {
        multiply_lone<L>(base, a.windows->offset, a.weight + o * terms, a.bias != nullptr ? a.bias[o] : 0.0f, sums);
        for (int64_t p = 0; p < live; ++p) rows[p * a.outputs + o] = sums[p];
      }
    }
  }
};

struct Backward {
  const Windows* windows;
  const float *x, *grad;  // grad [patches][O]
  float* partial;         // [blocks][O][K]
  int64_t outputs, blocks;
};

// Asks for the start of the next group's windows.
struct NextStarts {
  static constexpr int kSteps = 1;
  const float* const* next;
  int64_t offset;
  ASTRO_INLINE void operator()(int64_t p) const { simd::prefetch(next[p] + offset); }
};

template <Level L, int V>
ASTRO_INLINE void correlate(const float* const* base, const float* const* next, int64_t patches, const int64_t* offset,
                            const float* grad, float* sums) {
  using B = Block<L>;
  const auto left = [=](int m, int64_t p) ASTRO_LAMBDA_INLINE { return base[p][offset[m]]; };
  const NextStarts ahead{next, offset[0]};
  gemm::block<typename B::Vec, B::kPositions, V>(patches, left, grad, V * B::kLanes, sums, V * B::kLanes, gemm::AddTo{},
                                                 ahead);
}

// The gradient of a lone output's weights, [K] added to `sums`; `grad` [patches]. Four runs at a time hide the latency
// of the sums.
ASTRO_INLINE void correlate_lone(const float* const* base, int64_t patches, const std::vector<int64_t>& offset,
                                 const float* grad, float* sums) {
  constexpr int kAtOnce = 4;
  const int64_t terms = static_cast<int64_t>(offset.size());
  for (int64_t first = 0; first < terms; first += kAtOnce * kRun) {
    int64_t at[kAtOnce];
    for (int run = 0; run < kAtOnce; ++run) at[run] = offset[std::min(first + run * kRun, terms - kRun)];
    simd::f32x8 acc[kAtOnce] = {};
    for (int64_t p = 0; p < patches; ++p)
      for (int run = 0; run < kAtOnce; ++run) acc[run] += simd::load8(base[p] + at[run]) * grad[p];
    for (int run = 0; run < kAtOnce && first + run * kRun < terms; ++run) {
      float* to = sums + first + run * kRun;
      simd::store8(to, simd::load8(to) + acc[run]);
    }
  }
}

struct BackwardBlock {
  template <Level L>
  static ASTRO_INLINE void run(const Backward& a, int64_t block) {
    using B = Block<L>;
    const Columns<L> columns(a.outputs, a.windows->runs);
    const int64_t terms = a.windows->terms(), padded = (terms + B::kPositions - 1) / B::kPositions * B::kPositions,
                  all = a.windows->patches();
    std::vector<int64_t> offset = a.windows->offset;
    offset.resize(padded, offset.back());
    std::vector<const float*> base(kPatches), next(kPatches);
    std::vector<float> rows(kPatches * columns.all_lanes(), 0.0f), sums(padded * columns.all_lanes(), 0.0f);
    std::vector<float> lone_rows(columns.lone * kPatches), lone_sums(columns.lone * terms, 0.0f);
    const int64_t begin = block * all / a.blocks, end = (block + 1) * all / a.blocks;
    fill_bases(*a.windows, a.x, begin, std::min(kPatches, end - begin), kPatches, next.data());
    for (int64_t first = begin; first < end; first += kPatches) {
      const int64_t live = std::min(kPatches, end - first), after = std::min(first + kPatches, end - 1);
      base.swap(next);
      fill_bases(*a.windows, a.x, after, std::min(kPatches, end - after), kPatches, next.data());
      for (int64_t p = 0; p < live; ++p) {
        const float* from = a.grad + (first + p) * a.outputs;
        for (int64_t panel = 0; panel < columns.panels; ++panel)
          std::memcpy(rows.data() + columns.begin(panel) * kPatches + p * columns.lanes(panel),
                      from + columns.begin(panel), columns.present(panel) * sizeof(float));
        for (int64_t o = 0; o < columns.lone; ++o) lone_rows[o * kPatches + p] = from[a.outputs - columns.lone + o];
      }
      for (int64_t panel = 0; panel < columns.panels; ++panel)
        columns.with_width(panel, [&]<int V>() ASTRO_LAMBDA_INLINE {
          const int64_t o = columns.begin(panel), lanes = columns.lanes(panel);
          for (int64_t k = 0; k < padded; k += B::kPositions)
            correlate<L, V>(base.data(), next.data(), live, offset.data() + k, rows.data() + o * kPatches,
                            sums.data() + o * padded + k * lanes);
        });
      for (int64_t o = 0; o < columns.lone; ++o)
        correlate_lone(base.data(), live, a.windows->offset, lone_rows.data() + o * kPatches,
                       lone_sums.data() + o * terms);
    }
    float* to = a.partial + block * a.outputs * terms;
    for (int64_t panel = 0; panel < columns.panels; ++panel)
      for (int64_t o = 0; o < columns.present(panel); ++o)
        for (int64_t k = 0; k < terms; ++k)
          to[(columns.begin(panel) + o) * terms + k] =
              sums[columns.begin(panel) * padded + k * columns.lanes(panel) + o];
    std::copy(lone_sums.begin(), lone_sums.end(), to + (a.outputs - columns.lone) * terms);
  }
};

}  // namespace

bool are_patches(const Geometry& g, at::IntArrayRef kernel) {
  int64_t taps = 1;
  for (int64_t axis = 0; axis < g.axes(); ++axis) {
    if (g.stride[axis] != kernel[axis] || g.padding[axis] != 0 || (g.dilation[axis] != 1 && kernel[axis] != 1))
      return false;
    taps *= kernel[axis];
  }
  return g.groups == 1 && taps > 1;  // a single tap is a plain matrix product
}

Tensor patches_forward(const Tensor& x, const Tensor& weight_any, const std::optional<Tensor>& bias_any) {
  const Tensor weight = weight_any.contiguous();
  const std::optional<Tensor> bias = bias_any ? std::optional(bias_any->to(at::kFloat).contiguous()) : std::nullopt;
  const Windows w = windows(x, weight.sizes().slice(2));
  std::vector<int64_t> shape = w.count;
  shape.push_back(weight.size(0));
  Tensor y = at::empty(shape, x.options());
  if (y.numel() == 0) return y;
  const Forward a{&w,
                  x.const_data_ptr<float>(),
                  weight.const_data_ptr<float>(),
                  bias ? bias->const_data_ptr<float>() : nullptr,
                  y.mutable_data_ptr<float>(),
                  weight.size(0)};
  at::parallel_for(0, w.patches(), kPatches,
                   [&](int64_t begin, int64_t end) { dispatch<ForwardPatches>(a, begin, end); });
  return y;
}

Tensor patches_transpose(const Tensor& grad, const Tensor& weight, at::IntArrayRef size) {
  const at::IntArrayRef kernel = weight.sizes().slice(2);
  const int64_t axes = kernel.size(), outputs = weight.size(0), channels = weight.size(1);
  const Tensor taps = weight.movedim(1, -1).reshape({outputs, -1});  // [O, taps * C]
  std::vector<int64_t> blocks = grad.sizes().slice(0, axes + 1).vec(), order{0}, whole{grad.size(0)};
  blocks.insert(blocks.end(), kernel.begin(), kernel.end());
  blocks.push_back(channels);
  for (int64_t axis = 0; axis < axes; ++axis) {
    order.push_back(1 + axis), order.push_back(1 + axes + axis);
    whole.push_back(grad.size(1 + axis) * kernel[axis]);
  }
  order.push_back(2 * axes + 1), whole.push_back(channels);
  const Tensor rows = at::mm(grad.reshape({-1, outputs}), taps).reshape(blocks).permute(order).reshape(whole);
  std::vector<int64_t> full{grad.size(0)};
  full.insert(full.end(), size.begin(), size.end());
  full.push_back(channels);
  if (full == whole) return rows;
  Tensor result = at::zeros(full, grad.options()), part = result;  // no window reaches the remainder of an axis
  for (int64_t axis = 0; axis < axes; ++axis) part = part.narrow(1 + axis, 0, whole[1 + axis]);
  part.copy_(rows);
  return result;
}

Tensor patches_weight_grad(const Tensor& grad, const Tensor& x, at::IntArrayRef kernel) {
  const Windows w = windows(x, kernel);
  const int64_t outputs = grad.size(-1);
  std::vector<int64_t> shape{outputs, x.size(1)};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  if (grad.numel() == 0 || w.terms() == 0) return at::zeros(shape, grad.options());
  const int64_t blocks = std::clamp<int64_t>(w.patches() / kBlockPatches, 1, kMaxBlocks);
  Tensor partial = at::empty({blocks, outputs, w.terms()}, grad.options());
  const Backward a{
      &w, x.const_data_ptr<float>(), grad.const_data_ptr<float>(), partial.mutable_data_ptr<float>(), outputs, blocks};
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) dispatch<BackwardBlock>(a, block);
  });
  return (blocks == 1 ? partial[0] : partial.sum(0)).view(shape);
}

}  // namespace astrobiogen::conv_nd
