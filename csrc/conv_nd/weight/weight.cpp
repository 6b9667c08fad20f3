// Own CPU weight gradient: dW[k, o] = sum over positions of x[position + k] dy[position, o], the adjoint of the forward
// kernel's tiles.
//
// The gradient of a transformed weight is (its input lines) x (its share of dy): with F(2,3) 4 products for 2 outputs
// instead of 6, and the transform's adjoint gives the taps, g0 = m0 + (m1 + m2) / 2, g1 = (m1 - m2) / 2, g2 = (m1 + m2)
// / 2 + m3 (conv_nd/weight/taps.cpp). Per group of tiles, component and block of channels, dy's rows are combined once
// to [positions][block], and transformed where the last axis is a Winograd axis; then register blocks of 8 taps x 32
// channels (AVX-512; 16 x 16 or, AVX2, 6 x 16) run along the positions. Sums go to one partial per chunk of tiles; the
// number of chunks depends on the shape only, so any thread count gives the same bits.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <vector>

#include "common/tasks.h"
#include "conv_nd/weight/output_gradient.h"
#include "conv_nd/weight/taps.h"
#include "gemm/microkernel.h"

namespace astrobiogen::conv_nd {

using at::Tensor;

namespace {

constexpr int64_t kMaxChunks = 32;
// All partials together: a twentieth of x and dy, at least this.
constexpr int64_t kPartialBytes = 1024 * 1024;
// Sums that one unit of work writes again and again: half of a small L2.
constexpr int64_t kUnitBytes = 256 * 1024;
constexpr int64_t kLineBytes = 128 * 1024;  // lines of all components, or of a group of tiles, are kept up to this

// A line of input and where the output gradients that it meets begin.
struct Piece {
  const float* x;
  int64_t grad;
};

// One outer tap of a component: the pieces [first, last) of its tiles.
struct LiveTap {
  int64_t tap, first, last;
};

struct Scratch {
  std::vector<float> lines, row, sums;        // row: `build_line`'s
  std::vector<float> grad, packed, winograd;  // a group's rows of dy, [blocks][tile rows][kSegment][block]; of one
                                              // component and block; of its last components
  std::vector<Piece> pieces;
  std::vector<LiveTap> taps;
};

// The pieces of one outer tap, `count` positions each, from float `offset` of their lines on; `grad`
// [positions][block].
struct Operands {
  const Piece* pieces;
  int64_t size, offset;
  const float* grad;
  int64_t grad_step;  // positions of `grad` per position of the pieces: 2 takes every second one
  int64_t count;
};

// The positions of one call are summed for themselves and then added: two short chains of additions instead of one over
// all positions of a chunk, which was 3 times as inexact as eager's at 4,096 positions.
template <typename Vec, int N, int M>
ASTRO_INLINE void block(const Plan& plan, const Operands& from, int64_t at, float* sums) {
  constexpr int64_t kBlock = N * sizeof(Vec) / sizeof(float);
  Vec acc[M][N] = {};
  for (int64_t k = 0; k < from.size; ++k) {
    const float *x = from.pieces[k].x + from.offset + at, *grad = from.grad + from.pieces[k].grad * from.grad_step;
    const auto left = [x, step = plan.position_step](int m, int64_t p) ASTRO_LAMBDA_INLINE { return x[m + p * step]; };
    gemm::multiply_add<Vec, M, N>(acc, from.count, left, grad, from.grad_step * kBlock);
  }
  gemm::write_block<Vec, M, N>(acc, sums, kBlock, gemm::AddTo{});
}

template <typename Vec, int N, int M>
ASTRO_INLINE void products(const Plan& plan, const Operands& from, float* sums) {
  constexpr int64_t kBlock = N * sizeof(Vec) / sizeof(float);
  int64_t i = 0;
  const auto step = [&]<int Size>() ASTRO_LAMBDA_INLINE {
    block<Vec, N, Size>(plan, from, i, sums + i * kBlock);
    i += Size;
  };
  const bool sixes = plan.run_length % 8 != 0 && plan.run_length % 6 == 0;
  while (!sixes && plan.run_length - i >= M) step.template operator()<M>();
  if constexpr (M > 8)
    while (!sixes && plan.run_length - i >= 8) step.template operator()<8>();
  while (plan.run_length - i >= 6) step.template operator()<6>();
  while (plan.run_length - i >= 4) step.template operator()<4>();
  while (plan.run_length - i >= 2) step.template operator()<2>();
  while (i < plan.run_length) step.template operator()<1>();
}

struct Products {
  template <Level L>
  static ASTRO_INLINE void run(const Plan& plan, const Operands& from, float* sums) {
    if constexpr (L != Level::kAvx512) products<simd::f32x8, 2, 6>(plan, from, sums);
    else if (plan.block == 16) products<simd::f32x16, 1, 16>(plan, from, sums);
    else products<simd::f32x16, 2, 8>(plan, from, sums);
  }
};

// The sums of `size` tiles from `index` on. More than one tile only where a row is one segment: their rows of dy stand
// one after the other, as if they were one row, so that the sums of a register block are read and written once per
// group. Beyond four, lines and rows of dy no longer fit into L2 beside the sums.
class Group {
 public:
  Group(const Job& job, int64_t index, int64_t size, int64_t first_tap, int64_t taps, const Share& share,
        Scratch& scratch, float* sums)
      : job_(job),
        plan_(*job.plan),
        share_(share),
        s_(scratch),
        sums_(sums),
        size_(size),
        first_tap_(first_tap),
        taps_(taps),
        width_(std::min(plan_.out_width, kSegment)),
        ahead_(job, index + size,
               (share.last_component - share.first_component) * (share.last_block - share.first_block)) {
    for (int64_t r = 0; r < size; ++r) tiles_[r] = tile_at(plan_, index + r), tile_outputs(plan_, tiles_[r], rows_[r]);
  }

  void add() {
    for (begin_ = 0; begin_ < plan_.out_width; begin_ += kSegment) {
      count_ = std::min(begin_ + kSegment, plan_.out_width) - begin_, steps_ = plan_.steps(count_);
      spread();
      if (job_.resident) {
        clear(share_.first_component);
        for (int64_t component = share_.first_component; component < share_.last_component; ++component)
          build(component);
        for (int64_t b = share_.first_block; b < share_.last_block; ++b)
          for (int64_t component = share_.first_component; component < share_.last_component; ++component)
            multiply(component, b);
      } else {
        for (int64_t component = share_.first_component; component < share_.last_component; ++component) {
          clear(component);
          build(component);
          for (int64_t b = share_.first_block; b < share_.last_block; ++b) multiply(component, b);
        }
      }
    }
  }

 private:
  int64_t row_step() const { return job_.group * width_ * plan_.block; }
  int64_t block_step() const { return plan_.tile_rows * row_step(); }

  // The segment's rows of dy.
  void spread() {
    const int64_t tile_step = count_ * plan_.block;
    for (int64_t r = 0; r < size_; ++r)
      for (int64_t which = 0; which < plan_.tile_rows; ++which) {
        float* to = s_.grad.data() + which * row_step() + r * tile_step;
        if (rows_[r][which] >= 0)
          dispatch<SpreadRow>(job_, rows_[r][which] * plan_.out_width + begin_, count_, share_, to, block_step());
        else
          for (int64_t b = share_.first_block; b < share_.last_block; ++b)
            std::fill_n(to + b * block_step(), tile_step, 0.0f);
      }
  }

  void clear(int64_t component) { s_.pieces.clear(), s_.taps.clear(), first_[component] = 0; }

  // The input lines of a component.
  void build(int64_t component) {
    const int64_t line_size = plan_.line_floats(width_);
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const int64_t before = static_cast<int64_t>(s_.pieces.size());
      for (int64_t r = 0; r < size_; ++r) {
        Line line;
        if (!find_line(plan_, tiles_[r], component, first_tap_ + tap, line)) continue;
        float* to = s_.lines.data() + static_cast<int64_t>(s_.pieces.size()) * line_size;
        build_line(plan_, job_.x, job_.dtype, line, begin_, begin_ + count_, to, s_.row.data());
        s_.pieces.push_back({to, r * steps_ * plan_.block});
      }
      const int64_t after = static_cast<int64_t>(s_.pieces.size());
      if (after > before) s_.taps.push_back({tap, before, after});
    }
    first_[component + 1] = static_cast<int64_t>(s_.taps.size());
  }

  // The gradients [tiles][count][block] of component and block, or null where no tile has one.
  const float* gradients(int64_t component, int64_t b) {
    const GradRows from = grad_rows(plan_, component);
    const auto present = [&](const int64_t* tile) {
      return std::any_of(from.which, from.which + from.count, [&](int64_t which) { return tile[which] >= 0; });
    };
    if (std::none_of(rows_, rows_ + size_, present)) return nullptr;
    const float* row[kMaxTile];
    for (int k = 0; k < from.count; ++k) row[k] = s_.grad.data() + b * block_step() + from.which[k] * row_step();
    if (from.count == 1) return row[0];  // a single row has the sign +1
    dispatch<Combine>(static_cast<const float* const*>(row), from.sign, from.count, size_ * count_ * plan_.block,
                      s_.packed.data());
    return s_.packed.data();
  }

  void multiply(int64_t component, int64_t b) {
    ahead_.advance();
    const float* grad = gradients(component, b);
    if (grad == nullptr) return;
    const int64_t tap_floats = plan_.row_taps * plan_.block, component_floats = plan_.blocks * job_.subset * tap_floats;
    if (plan_.winograd_last()) dispatch<OutputTransformAdjoint>(grad, size_, count_, plan_.block, s_.winograd.data());
    for (int64_t k = 0; k < plan_.last_components; ++k) {
      const float* mine = grad;
      int64_t step = 1;
      if (plan_.winograd_last() && count_ % 2 == 0 && k % 3 == 0) mine += k / 3 * plan_.block, step = 2;
      else if (plan_.winograd_last()) mine = s_.winograd.data() + k * size_ * steps_ * plan_.block;
      for (int64_t at = first_[component]; at < first_[component + 1]; ++at) {
        const LiveTap& live = s_.taps[at];
        const int64_t offset = b / plan_.group_blocks * plan_.group_channels + k * plan_.line_step(count_);
        Operands operands{s_.pieces.data() + live.first, live.last - live.first, offset, mine, step, steps_};
        float* to = sums_ + (component * plan_.last_components + k) * component_floats +
                    (b * job_.subset + live.tap) * tap_floats;
        for (int64_t run = 0; run < plan_.run_count;
             ++run, operands.offset += plan_.run_step, to += plan_.run_length * plan_.block)
          dispatch<Products>(plan_, operands, to);
      }
    }
  }

  const Job& job_;
  const Plan& plan_;
  const Share& share_;
  Scratch& s_;
  float* sums_;
  int64_t size_, first_tap_, taps_, width_;
  int64_t begin_ = 0, count_ = 0, steps_ = 0;  // of the segment
  Tile tiles_[kMaxGroup];
  int64_t rows_[kMaxGroup][kMaxTile], first_[kMaxComponents + 1] = {0};
  Ahead ahead_;
};

// Floats of one outer tap of all components and blocks.
int64_t tap_floats(const Plan& plan) {
  return plan.components * plan.last_components * plan.blocks * plan.row_taps * plan.block;
}

Job make_job(const Plan& plan, const Tensor& grad, const Tensor& rows) {
  const int64_t tap_bytes = 4 * tap_floats(plan), whole = tap_bytes * plan.taps;
  Job job{&plan,
          rows.const_data_ptr(),
          grad.const_data_ptr(),
          rows.scalar_type(),
          1,
          1,
          1,
          1,
          false,
          static_cast<int64_t>(grad.nbytes()) >= simd::kStreamBytes};
  job.subset = std::clamp<int64_t>(kUnitBytes / tap_bytes, 1, plan.taps);
  const int64_t width = std::min(plan.out_width, kSegment), line_bytes = 4 * plan.line_floats(width);
  job.resident = plan.components * job.subset * line_bytes <= kLineBytes;
  job.subsets = (plan.taps + job.subset - 1) / job.subset;
  const int64_t limit = std::max<int64_t>(kPartialBytes, (rows.numel() + grad.numel()) * rows.element_size() / 20);
  job.chunks =
      std::clamp<int64_t>(std::min(kMaxChunks / job.subsets, limit / whole), 1, std::max<int64_t>(1, plan.tiles()));
  if (!job.resident && plan.out_width > 0)
    job.group = std::clamp<int64_t>(
        std::min(kSegment / plan.steps(plan.out_width), kLineBytes / (job.subset * line_bytes)), 1, kMaxGroup);
  return job;
}

Scratch make_scratch(const Job& job, int64_t width) {
  const Plan& plan = *job.plan;
  const int64_t lines = job.subset * (job.resident ? plan.components : job.group);
  Scratch s;
  s.lines.resize(lines * plan.line_floats(width)), s.row.resize(plan.scratch_floats(width));
  s.grad.resize(plan.blocks * plan.tile_rows * job.group * width * plan.block);
  s.packed.resize(job.group * width * plan.block);
  if (plan.winograd_last()) s.winograd.resize(plan.last_components * job.group * plan.steps(width) * plan.block);
  s.pieces.reserve(lines), s.taps.reserve(lines);
  return s;
}

}  // namespace

Tensor direct_weight_grad(const Tensor& grad, const Tensor& rows, at::IntArrayRef whole_kernel,
                          const Geometry& geometry) {
  const Crop cropped = crop(geometry, rows.sizes().slice(1, geometry.axes()), whole_kernel);
  const at::IntArrayRef kernel = cropped.count;
  const Plan plan = make_plan(rows, grad.size(-1), kernel, cropped.geometry, Winograd::kAll);
  const Job job = make_job(plan, grad, rows);
  const int64_t width = std::min(plan.out_width, kSegment);
  const int64_t unit_floats = tap_floats(plan) * job.subset, units = job.chunks * job.subsets;
  // Fewer units than threads (one, where the components of many channels pass the memory for partials): components are
  // shared out, then blocks of output channels. Each sum is taken in the same order whoever does it, so the bits do not
  // change. Shared blocks have the input's lines added up once per share.
  const int64_t threads = at::get_num_threads(), wanted = (threads + units - 1) / units;
  const int64_t component_shares = std::clamp<int64_t>(wanted, 1, plan.components),
                block_shares = std::clamp<int64_t>(wanted / component_shares, 1, plan.blocks);
  const int64_t shares = component_shares * block_shares, items = units * shares;
  // A unit that is one thread's is finished where it was summed and needs no memory beyond the threads'.
  const bool own = job.chunks == 1 && shares == 1;
  Tensor partial = own ? Tensor() : at::zeros({job.subsets, job.chunks, unit_floats}, rows.options().dtype(at::kFloat));
  std::vector<int64_t> shape{plan.outputs, plan.group_channels};
  shape.insert(shape.end(), kernel.begin(), kernel.end());
  Tensor result = at::empty(shape, rows.options().dtype(at::kFloat));
  float *sums = own ? nullptr : partial.mutable_data_ptr<float>(), *to = result.mutable_data_ptr<float>();
  const KernelRows table = kernel_rows(plan);
  const auto scratch = [&] { return make_scratch(job, width); };
  run_tasks(items, scratch, [&](int64_t item, Scratch& s) {
    const int64_t index = item / shares, subset = index / job.chunks, chunk = index % job.chunks, share = item % shares;
    const int64_t components = share / block_shares, blocks = share % block_shares;
    const Share mine{plan.components * components / component_shares,
                     plan.components * (components + 1) / component_shares, plan.blocks * blocks / block_shares,
                     plan.blocks * (blocks + 1) / block_shares};
    if (own) s.sums.assign(unit_floats, 0.0f);
    float* target = own ? s.sums.data() : sums + index * unit_floats;
    const int64_t first_tap = subset * job.subset, taps = std::min(job.subset, plan.taps - first_tap);
    const int64_t last = plan.tiles() * (chunk + 1) / job.chunks;
    for (int64_t tile = plan.tiles() * chunk / job.chunks; tile < last; tile += job.group)
      Group(job, tile, std::min(job.group, last - tile), first_tap, taps, mine, s, target).add();
    for (int64_t b = 0; own && b < plan.blocks; ++b)
      write_taps(plan, table, {s.sums.data(), 0, 1, subset * job.subset, job.subset}, b, to);
  });
  if (!own)
    at::parallel_for(0, job.subsets * plan.blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t subset = item / plan.blocks;
        const Sums found{sums + subset * job.chunks * unit_floats, unit_floats, job.chunks, subset * job.subset,
                         job.subset};
        write_taps(plan, table, found, item % plan.blocks, to);
      }
    });
  if (kernel == whole_kernel) return result;
  shape.resize(2);
  shape.insert(shape.end(), whole_kernel.begin(), whole_kernel.end());
  Tensor padded = at::zeros(shape, result.options());
  crop_weight(padded, cropped).copy_(result);
  return padded;
}

}  // namespace astrobiogen::conv_nd
