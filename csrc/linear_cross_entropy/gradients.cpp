// Linear layer + cross-entropy with both gradients in one forward pass, for fp32 and a scalar loss: three matrix
// products instead of the four of `linear_cross_entropy` + `linear_cross_entropy_backward`, which compute the logits
// twice.
//
// Per block of tokens:
//   1. chunk by chunk of the vocabulary: logits; their exponentials, relative to one that is at most 8 below the
//   largest so far; these times the weight,
//      which is the gradient of x up to a factor per token (with a soft cap or label smoothing it is not, and this
//      product comes in 2 instead);
//   2. chunk by chunk: the gradient of the logits, and the weight's gradient.
// Between 1 and 2 the exponentials of the first block, of as many tokens as there are hidden columns, wait in the
// memory that the weight's gradient will take: each chunk of them is copied to scratch before its rows are written.
// Tokens beyond those come in blocks of 96 or more with memory of their own. Everything stands token-last, so that the
// softmax runs lane by lane, without a reduction inside a vector. Chunks are of a fixed size and merged in order: the
// bits do not depend on the threads. Bytes: the weight read, exponentials written and read, the gradient written.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "common/subnormals.h"
#include "linear_cross_entropy/checks.h"
#include "linear_cross_entropy/gradient_tasks.h"
#include "linear_cross_entropy/linear_cross_entropy.h"

namespace astrobiogen::linear_cross_entropy {

using at::Tensor;

// Tokens per block with memory of its own: a tenth of eager's logits from five blocks on. More tokens per block are
// fewer passes over the weight and its gradient, and more memory (the op's notes).
constexpr int64_t kBlockTokens = 96;
constexpr int64_t kMostBlockTokens = 3 * kBlockTokens;
// Segments of the vocabulary: as many threads work on them without waiting for each other. Their sums of the gradient
// of x are at most a 24th of the logits.
constexpr int64_t kMostSegments = 16, kLogitsPerSum = 24;
// Chunks per thread between two barriers, where several threads share a segment.
constexpr int64_t kChunksPerThread = 2;

// Which lanes count.
void mark_kept(const Block& b) {
  for (int64_t t = 0; t < b.lanes; ++t) b.kept[t] = t < b.tokens && b.target[t] != b.options.ignore_index ? 1.0f : 0.0f;
}

// From the largest logit of each chunk to the base of its exponentials: that of the chunk before, unless it is more
// than kSlack below. All segments start from chunk 0, so that most chunks end with the same base.
void follow(const Block& b, const Segment& s, int64_t first, int64_t last) {
  for (int64_t chunk = std::max<int64_t>(first, 1); chunk < last; ++chunk) {
    const float* before = b.base + (chunk == s.first ? 0 : chunk - 1) * b.lanes;
    float* now = b.base + chunk * b.lanes;
    for (int64_t t = 0; t < b.lanes; ++t) now[t] = now[t] > before[t] + kSlack ? now[t] : before[t];
  }
}

// The sums of one more chunk. Doubles: thousands of chunks must not cost digits of the loss.
void absorb(const Block& b, const Segment& s, int64_t chunk, const float* sums) {
  const float *now = b.base + chunk * b.lanes, *before = now - b.lanes;
  for (int64_t t = 0; t < b.lanes; ++t) {
    s.sum_exp[t] = (chunk > s.first ? s.sum_exp[t] * fall(before[t], now[t]) : 0.0) + sums[t];
    if (b.sums() == 2)
      s.total[t] =
          (chunk > s.first ? s.total[t] : 0.0) + sums[b.lanes + t] + static_cast<double>(b.rows(chunk)) * shift(now[t]);
  }
}

// lse of every token from its segments, in order; the factors of its grad_logits; the sum of the block's losses.
double finish(const Block& b, const std::vector<Segment>& segments, float scale) {
  const Options& o = b.options;
  double loss = 0.0;
  for (const Segment& s : segments) std::fill(s.factor, s.factor + b.lanes, 0.0f);
  for (int64_t t = 0; t < b.lanes; ++t) {
    const auto base = [&](const Segment& s) { return b.base[(s.last - 1) * b.lanes + t]; };
    b.top[t] = kLowest;
    for (const Segment& s : segments) b.top[t] = std::max(b.top[t], base(s));
    b.lse[t] = b.softmax[t] = b.uniform[t] = b.onehot[t] = b.factor[t] = 0.0f;
    if (b.kept[t] == 0.0f) continue;
    double sum_exp = 0.0, total = 0.0;
    for (const Segment& s : segments) {
      s.factor[t] = std::exp(base(s) == kLowest ? 0.0f : base(s) - shift(b.top[t]));
      sum_exp += s.sum_exp[t] * s.factor[t];
      if (b.sums() == 2) total += s.total[t];
    }
    const double exact = shift(b.top[t]) + std::log(sum_exp);
    const float lse = static_cast<float>(exact), logit = b.target_logit[t];
    const double smoothing = o.label_smoothing;
    loss += (1.0 - smoothing) * (exact - logit) + o.z_loss * exact * exact;
    if (smoothing > 0.0) loss += smoothing * (exact - total / static_cast<double>(b.vocabulary));
    const float ratio = o.softcap > 0.0 ? logit / static_cast<float>(o.softcap) : 0.0f;
    b.lse[t] = lse;
    b.softmax[t] = scale * (1.0f + 2.0f * static_cast<float>(o.z_loss) * lse);
    b.uniform[t] = scale * static_cast<float>(smoothing / static_cast<double>(b.vocabulary));
    b.onehot[t] = scale * static_cast<float>(1.0 - smoothing) * (1.0f - ratio * ratio);
    b.factor[t] = b.proportional() ? static_cast<float>(b.softmax[t] / sum_exp) : 1.0f;
    if (!b.proportional()) b.softmax[t] *= static_cast<float>(lost_in_rounding<float>(exact));
    for (const Segment& s : segments) s.factor[t] = b.proportional() ? s.factor[t] * b.factor[t] : 1.0f;
  }
  return loss;
}

// Views into one buffer, so that the memory is seen by PyTorch's allocator and its profiler.
struct Workspace {
  Tensor memory;
  float* next;

  Workspace(int64_t floats, const Tensor& like)
      : memory(at::empty({floats}, like.options())), next(memory.mutable_data_ptr<float>()) {}
  // Multiples of kPanel floats, so that each begins a line.
  float* take(int64_t floats) { return std::exchange(next, next + floats); }
};

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Tokens per block: a fifth of all of them (eager's extra memory is 8 bytes per logit, this is 4), within the two
// bounds.
int64_t block_tokens(int64_t tokens) {
  const int64_t wanted = std::clamp(tokens / 5 / kBlockTokens * kBlockTokens, kBlockTokens, kMostBlockTokens);
  return std::min(wanted, round_up(tokens, kPanel));
}

// Where one class stands out by more than 87, all others' exponentials are subnormal, and the products would take 40
// times as long.
template <class Kernel, class... Arguments>
void launch(Arguments&&... arguments) {
  const FlushSubnormals flush;
  dispatch<Kernel>(arguments...);
}

template <class Task>
void for_each(int64_t first, int64_t last, const Task& task) {
  at::parallel_for(first, last, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(i);
  });
}

void times_weight(const Block& b, const Segment& s, int64_t first, int64_t last) {
  if (b.grad_x == nullptr) return;
  at::parallel_for(0, round_up(b.hidden, kMostRows) / kMostRows, 1, [&](int64_t begin, int64_t end) {
    launch<TimesWeight>(b, s, first, last, begin * kMostRows, end * kMostRows);
  });
}

// Chunk 0 has its logits already. `sums`: those of `step` chunks.
void walk_logits(const Block& b, const Segment& s, int64_t step, float* sums) {
  for (int64_t first = s.first; first < s.last; first += step) {
    const int64_t last = std::min(first + step, s.last);
    for_each(std::max<int64_t>(first, 1), last, [&](int64_t chunk) { launch<Logits>(b, chunk, step); });
    follow(b, s, first, last);
    for_each(first, last,
             [&](int64_t chunk) { launch<Exponentials>(b, chunk, sums + (chunk - first) * b.sums() * b.lanes); });
    for (int64_t chunk = first; chunk < last; ++chunk) absorb(b, s, chunk, sums + (chunk - first) * b.sums() * b.lanes);
    if (b.proportional()) times_weight(b, s, first, last);
  }
}

// Rows of grad_logits for a thread. Inside another parallel loop, which has chosen by its own number, this number is 0.
float* scratch_of_thread(const Block& b, float* scratch) {
  return scratch + at::get_thread_num() * kChunk * (b.lanes + kGap);
}

void walk_grad_logits(const Block& b, const Segment& s, int64_t step, float* scratch) {
  for (int64_t first = s.first; first < s.last; first += step) {
    const int64_t last = std::min(first + step, s.last);
    for_each(first, last, [&](int64_t chunk) { launch<GradLogits>(b, chunk); });
    if (!b.proportional()) times_weight(b, s, first, last);
    if (b.grad_weight == nullptr) continue;
    for_each(first, last, [&](int64_t chunk) { launch<GradientWeight>(b, chunk, scratch_of_thread(b, scratch)); });
  }
}

// Threads take segments, or, if there are more of them, share one after the other.
int64_t shared_chunks(int64_t segments) {
  return at::get_num_threads() <= segments ? 1 : kChunksPerThread * at::get_num_threads();
}

void run_block(const Block& b, const std::vector<Segment>& segments, float* sums, float* scratch, float scale,
               double& loss) {
  const int64_t count = segments.size(), step = shared_chunks(count);
  const auto each = [&](const auto& walk) {
    if (step == 1) for_each(0, count, walk);
    else
      for (int64_t i = 0; i < count; ++i) walk(i);
  };
  mark_kept(b);
  launch<PackColumns>(b);
  launch<Logits>(b, int64_t{0}, step);
  each([&](int64_t i) { walk_logits(b, segments[i], step, sums + i * b.sums() * b.lanes); });
  loss += finish(b, segments, scale);
  if (b.grad_weight != nullptr) launch<PackRows>(b);
  if (b.grad_weight != nullptr || !b.proportional())
    each([&](int64_t i) { walk_grad_logits(b, segments[i], step, scratch_of_thread(b, scratch)); });
  if (b.grad_x != nullptr)
    at::parallel_for(0, b.tokens, 1, [&](int64_t begin, int64_t end) { launch<GradientX>(b, segments, begin, end); });
}

std::tuple<Tensor, Tensor, Tensor> gradients_float(const Tensor& x_any, const Tensor& weight_any, const Tensor& target,
                                                   float divisor, const Options& o, bool need_x, bool need_weight) {
  const Tensor x = x_any.contiguous(), weight = weight_any.contiguous();
  const int64_t tokens = x.size(0), hidden = x.size(1), vocabulary = weight.size(0);
  Tensor grad_x = need_x ? at::empty({tokens, hidden}, x.options()) : at::empty({0}, x.options());
  Tensor grad_weight = !need_weight  ? at::empty({0}, x.options())
                       : tokens == 0 ? at::zeros({vocabulary, hidden}, x.options())
                                     : at::empty({vocabulary, hidden}, x.options());
  double loss = 0.0;
  const int64_t chunks = (vocabulary + kChunk - 1) / kChunk;
  if (tokens > 0) {
    const int64_t columns = round_up(hidden, kPanel), wide = round_up(hidden, kMostRows), usual = block_tokens(tokens);
    // Until it is written, a row of the weight's gradient has room for the logits of as many tokens as it has columns.
    const int64_t room = need_weight && hidden / kPanel * kPanel >= usual ? hidden / kPanel * kPanel : 0;
    const int64_t most = std::max(std::min(room, round_up(tokens, kPanel)), usual);
    const int64_t count = std::clamp<int64_t>(vocabulary / (kLogitsPerSum * wide), 1, std::min(chunks, kMostSegments));
    const int64_t sums = (o.label_smoothing > 0.0 ? 2 : 1) *
                         (count + shared_chunks(count));  // rows, of which segment i takes those from its i-th sums on
    const int64_t scratch = need_weight ? at::get_num_threads() * kChunk * (most + kGap) : 0;
    const int64_t stored = tokens > room ? vocabulary * std::min(usual, round_up(tokens - room, kPanel)) : 0;
    Workspace w(stored + most * (columns + chunks + 8 + count * ((need_x ? wide : 0) + 5) + sums) + scratch, x);
    for (int64_t start = 0; start < tokens;) {
      w.next = w.memory.mutable_data_ptr<float>();
      const bool in_place = start == 0 && room > 0;
      const int64_t live = std::min(in_place ? room : usual, tokens - start), lanes = round_up(live, kPanel);
      Block b{x.const_data_ptr<float>() + start * hidden,
              weight.const_data_ptr<float>(),
              target.const_data_ptr<int64_t>() + start,
              hidden,
              vocabulary,
              live,
              lanes,
              o};
      b.grad_x = need_x ? grad_x.mutable_data_ptr<float>() + start * hidden : nullptr;
      b.grad_weight = need_weight ? grad_weight.mutable_data_ptr<float>() : nullptr;
      b.first = start == 0;
      b.store = in_place ? b.grad_weight : w.take(vocabulary * lanes);
      b.store_row = in_place ? hidden : lanes;
      b.packed_x = w.take(columns * lanes);
      b.base = w.take(chunks * lanes);
      for (float** row : {&b.top, &b.target_logit, &b.kept, &b.lse, &b.softmax, &b.uniform, &b.onehot, &b.factor})
        *row = w.take(lanes);
      std::vector<Segment> segments;
      for (int64_t i = 0; i < count; ++i) {
        double* sum_exp = reinterpret_cast<double*>(w.take(4 * lanes));
        float* product = need_x ? w.take(wide * lanes) : nullptr;
        segments.push_back(
            {i * chunks / count, (i + 1) * chunks / count, sum_exp, sum_exp + lanes, product, w.take(lanes)});
      }
      float* chunk_sums = w.take(sums * lanes);
      run_block(b, segments, chunk_sums, w.next, 1.0f / divisor, loss);
      start += live;
    }
  }
  Tensor total = at::empty({}, x.options());
  *total.mutable_data_ptr<float>() = static_cast<float>(loss / divisor);
  return {total, grad_x, grad_weight};
}

// fp64, and half precision without bf16 units: the loss and its gradients one after the other.
std::tuple<Tensor, Tensor, Tensor> gradients_composed(const Tensor& x, const Tensor& weight, const Tensor& target,
                                                      const Tensor& divisor, const Options& o, bool need_x,
                                                      bool need_weight) {
  const auto [loss, lse] = forward(x, weight, target, o.ignore_index, o.label_smoothing, o.z_loss, o.softcap);
  const Tensor divisor_like = divisor.to(loss.scalar_type());
  const Tensor grad = at::ones_like(loss).div(divisor_like);
  auto [grad_x, grad_weight] = backward(grad, x, weight, target, lse, o.ignore_index, o.label_smoothing, o.z_loss,
                                        o.softcap, need_x, need_weight);
  return {loss.sum().div(divisor_like), grad_x, grad_weight};
}

std::tuple<Tensor, Tensor, Tensor> gradients(const Tensor& x, const Tensor& weight, const Tensor& target_any,
                                             const Tensor& divisor, int64_t ignore_index, double label_smoothing,
                                             double z_loss, double softcap, bool need_x, bool need_weight) {
  constexpr check::Op op("astrobiogen::linear_cross_entropy_gradients");
  check_arguments(op, x, weight, target_any, {ignore_index, label_smoothing, z_loss, softcap});
  op.tensor(divisor, "divisor");
  op.shape(divisor, "divisor", {}, "one number without axes");
  const Tensor target = target_any.contiguous();
  check_targets(target, weight.size(0), ignore_index);
  const Options o{ignore_index, label_smoothing, z_loss, softcap};
  const auto [loss, grad_x, grad_weight] =
      tiles_lead(x) ? gradients_in_tiles(x.contiguous(), weight.contiguous(), target, divisor.item<float>(), o, need_x,
                                         need_weight)
      : x.scalar_type() != at::kFloat
          ? gradients_composed(x, weight, target, divisor, o, need_x, need_weight)
          : gradients_float(x, weight, target, divisor.item<float>(), o, need_x, need_weight);
  return {loss, without_ignored(grad_x, target, ignore_index), grad_weight};
}

}  // namespace astrobiogen::linear_cross_entropy

TORCH_LIBRARY_IMPL(astrobiogen, CPU, m) {
  m.impl("linear_cross_entropy_gradients", &astrobiogen::linear_cross_entropy::gradients);
}
