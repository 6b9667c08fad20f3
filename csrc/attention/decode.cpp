// The driver of attention with few query rows per key/value head (attention/decode_tile.h has the arithmetic).
//
// The keys are cut into chunks whose size depends on the problem only, never on the threads; a task is one chunk of one
// head, or of all heads where they lie side by side in a token's row. Each leaves a partial maximum, sum and output per
// row, and these are merged in the order of the chunks: any thread count gives the same bits.
#include "attention/decode.h"

#include <ATen/ops/empty.h>

#include <limits>

#include "attention/decode_tile.h"
#include "common/dispatch.h"

namespace astrobiogen::attention {

namespace decode {

constexpr int64_t kMaxRows = 16;           // more fill the panels of attention/tile.h
constexpr int64_t kChunkElements = 32768;  // of K, that a task reads at least
constexpr int64_t kSerialWork = 1 << 18;   // multiply-adds of one product that are not worth waking threads for

// How a problem is cut, and where its parts lie.
struct Plan {
  int64_t lanes;                  // N
  int64_t block_rows;             // RB
  int64_t blocks;                 // per key/value head
  int64_t dim;                    // padded
  int64_t first, last;            // keys that some row sees
  int64_t full_first, full_last;  // keys that every row sees
  int64_t task_heads, chunk, chunks;
  bool serial;

  int64_t state() const { return blocks * (2 * lanes + block_rows * dim); }
  int64_t queries() const { return blocks * block_rows * dim; }
};

// E: the type in which K and V are read in place, or float for staged copies.
template <typename E>
Plan make_plan(const Geometry<float>& g, const Tensor& k) {
  Plan p{};
  p.lanes = level() == Level::kAvx512 ? 16 : 8;
  const int64_t rows = g.rows(), step = sizeof(E) == 4 ? p.lanes : 2 * p.lanes;
  p.block_rows = rows >= 3 ? 4 : rows;
  p.blocks = (rows + p.block_rows - 1) / p.block_rows;
  p.dim = (g.dim + step - 1) / step * step;
  p.first = p.full_first = *std::min_element(g.low.begin(), g.low.end());
  p.last = *std::max_element(g.high.begin(), g.high.end());
  p.full_last = *std::min_element(g.high.begin(), g.high.end());
  p.full_first = *std::max_element(g.low.begin(), g.low.end());
  p.task_heads = k.stride(1) > k.stride(2) ? g.kv_heads : 1;
  const int64_t keys = std::max<int64_t>({kChunkElements / (p.task_heads * g.dim), 16 * rows, 1});
  p.chunk = (keys + kTileKeys - 1) / kTileKeys * kTileKeys;
  p.chunks = (p.last - p.first + p.chunk - 1) / p.chunk;
  p.serial = g.batch * g.kv_heads * (p.last - p.first) * g.dim * rows < kSerialWork;
  return p;
}

// Element d of a row within a padded row in the order in which E is read.
template <typename E>
void arrange_row(const float* row, int64_t dim, int64_t lanes, float* to) {
  if constexpr (sizeof(E) == 4) {
    std::copy_n(row, dim, to);
  } else {
    for (int64_t d = 0; d < dim; d += 2 * lanes)
      for (int64_t i = 0; i < lanes; ++i) {
        to[d + i] = row[d + 2 * i];
        to[d + lanes + i] = row[d + 2 * i + 1];
      }
  }
}

template <typename E>
void restore_row(const float* row, int64_t dim, int64_t lanes, float factor, float* to) {
  if constexpr (sizeof(E) == 4) {
    for (int64_t d = 0; d < dim; ++d) to[d] += row[d] * factor;
  } else {
    for (int64_t d = 0; d < dim; d += 2 * lanes)
      for (int64_t i = 0; i < lanes; ++i) {
        to[d + 2 * i] += row[d + i] * factor;
        to[d + 2 * i + 1] += row[d + lanes + i] * factor;
      }
  }
}

// Rows of T as fp32 rows of `padded` columns, zero from `dim` on; rotated if `cos` is given: row i by the angles at
// cos + i rotary.
template <typename T>
struct Stage {
  template <Level L>
  static ASTRO_INLINE void run(const Geometry<float>& g, const T* from, int64_t stride, int64_t count, int64_t padded,
                               const float* cos, const float* sin, float* to) {
    alignas(64) float row[kMaxHeadDim];
    for (int64_t i = 0; i < count; ++i, from += stride, to += padded) {
      float* target = cos == nullptr ? to : row;
      int64_t d = 0;
      for (; d + simd::kHalfLanes <= g.dim; d += simd::kHalfLanes) simd::store8(target + d, simd::load8(from + d));
      for (; d < g.dim; ++d) target[d] = static_cast<float>(from[d]);
      if (cos != nullptr) rotate_row(g, row, cos + i * g.rotary, sin + i * g.rotary, 1.0f, 1.0f, to);
      for (d = g.dim; d < padded; ++d) to[d] = 0.0f;
    }
  }
};

// Every key/value head's query rows, rotated and scaled: [pairs][blocks RB][dim], zero where there is none.
template <typename E, typename T>
void pack_queries(const Geometry<float>& g, const Plan& p, const Rows<const T>& q, float* to) {
  const float factor = g.softcap > 0.0f ? g.scale / g.softcap : g.scale * kLog2E;
  std::fill_n(to, g.batch * g.kv_heads * p.queries(), 0.0f);
  const int64_t grain = std::max<int64_t>(1, 32768 / p.queries());
  at::parallel_for(0, g.batch * g.kv_heads, grain, [&](int64_t begin, int64_t end) {
    alignas(64) float row[kMaxHeadDim];
    for (int64_t pair = begin; pair < end; ++pair)
      for (int64_t i = 0; i < g.rows(); ++i) {
        const int64_t b = pair / g.kv_heads, token = i / g.group, head = pair % g.kv_heads * g.group + i % g.group;
        const T* from = q.at(b, token, head);
        if (g.rotary > 0) {
          const int64_t from_end = g.queries - token;
          rotate_row(g, from, g.angles(g.cos, b, from_end), g.angles(g.sin, b, from_end), 1.0f, factor, row);
        } else {
          for (int64_t d = 0; d < g.dim; ++d) row[d] = static_cast<float>(from[d]) * factor;
        }
        arrange_row<E>(row, g.dim, p.lanes, to + pair * p.queries() + i * p.dim);
      }
  });
}

template <typename E>
void run_tile(int64_t block_rows, const Tile<E>& tile) {
  if (block_rows == 4) dispatch<Kernel<E, 4>>(tile);
  else if (block_rows == 2) dispatch<Kernel<E, 2>>(tile);
  else dispatch<Kernel<E, 1>>(tile);
}

// One problem: what the tasks read and write.
template <typename E, typename T>
struct Problem {
  const Geometry<float>& g;
  const Plan p;
  const Rows<const T> k, v;
  float *queries, *states;  // [pairs][queries()], [pairs][chunks][state()]

  float* state(int64_t pair, int64_t chunk) const { return states + (pair * p.chunks + chunk) * p.state(); }
  int64_t tasks() const { return g.batch * (g.kv_heads / p.task_heads) * p.chunks; }
  int64_t scratch() const {
    return std::is_same_v<E, T> && g.rotary == 0 && p.dim == g.dim ? 0 : 2 * kTileKeys * p.dim;
  }

  void clear(float* state) const {
    std::fill_n(state, p.state(), 0.0f);
    for (int64_t block = 0; block < p.blocks; ++block)
      std::fill_n(state + block * (2 * p.lanes + p.block_rows * p.dim), p.lanes,
                  -std::numeric_limits<float>::infinity());
  }

  // Keys [begin, end) of one head; `next` and `next_head` are the tile after it, for as long as there is one.
  void tile(int64_t b, int64_t head, int64_t chunk, int64_t begin, int64_t end, int64_t next, int64_t next_head,
            bool more, float* scratch) const {
    const int64_t pair = b * g.kv_heads + head, count = end - begin;
    Tile<E> t{};
    if constexpr (std::is_same_v<E, T>) {
      t.keys = k.at(b, begin, head);
      t.values = v.at(b, begin, head);
      t.key_stride = k.token;
      t.value_stride = v.token;
      if (more) {
        t.next_keys = k.at(b, next, next_head);
        t.next_values = v.at(b, next, next_head);
      }
    }
    if (this->scratch() > 0) {
      if constexpr (sizeof(E) == 4) stage(b, head, begin, count, scratch);
      t.keys = reinterpret_cast<const E*>(scratch);
      t.values = t.keys + kTileKeys * p.dim;
      t.key_stride = t.value_stride = p.dim;
      t.next_keys = t.next_values = nullptr;
    }
    t.count = count;
    t.dim = p.dim;
    t.blocks = p.blocks;
    t.queries = queries + pair * p.queries();
    t.state = state(pair, chunk);
    t.softcap = g.softcap * kLog2E;
    int32_t low[kMaxRows + kMaxBlockRows], high[kMaxRows + kMaxBlockRows];
    if (begin < p.full_first || end > p.full_last) {
      for (int64_t i = 0; i < p.blocks * p.block_rows; ++i) {
        const int64_t token = std::min(i, g.rows() - 1) / g.group;
        low[i] = static_cast<int32_t>(g.low[token] - begin);
        high[i] = static_cast<int32_t>(g.high[token] - begin);
      }
      t.low = low;
      t.high = high;
    }
    run_tile<E>(p.block_rows, t);
  }

  void stage(int64_t b, int64_t head, int64_t begin, int64_t count, float* scratch) const {
    const float *cos = nullptr, *sin = nullptr;
    if (g.rotary > 0) {
      cos = g.angles(g.cos, b, g.keys - begin);
      sin = g.angles(g.sin, b, g.keys - begin);
    }
    const float* none = nullptr;
    dispatch<Stage<T>>(g, k.at(b, begin, head), k.token, count, p.dim, cos, sin, scratch);
    dispatch<Stage<T>>(g, v.at(b, begin, head), v.token, count, p.dim, none, none, scratch + kTileKeys * p.dim);
  }

  void task(int64_t index, float* scratch) const {
    const int64_t groups = g.kv_heads / p.task_heads, chunk = index % p.chunks, rest = index / p.chunks;
    const int64_t b = rest / groups, first_head = rest % groups * p.task_heads;
    const int64_t start = p.first + chunk * p.chunk, stop = std::min(start + p.chunk, p.last);
    for (int64_t h = 0; h < p.task_heads; ++h) clear(state(b * g.kv_heads + first_head + h, chunk));
    for (int64_t begin = start; begin < stop; begin += kTileKeys)
      for (int64_t h = 0; h < p.task_heads; ++h) {
        const bool same = h + 1 < p.task_heads;
        const int64_t next = same ? begin : begin + kTileKeys, next_head = first_head + (same ? h + 1 : 0);
        tile(b, first_head + h, chunk, begin, std::min(begin + kTileKeys, stop), next, next_head, next < stop, scratch);
      }
  }

  // The chunks' parts of one head's rows, in order; the sink is one more part, without an output.
  void merge(int64_t pair, const Results<T>& to) const {
    alignas(64) float row[kMaxHeadDim];
    const float lowest = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < g.rows(); ++i) {
      const int64_t token = i / g.group, head = pair % g.kv_heads * g.group + i % g.group, r = i % p.block_rows;
      const int64_t lanes = p.lanes / p.block_rows, block = i / p.block_rows * (2 * p.lanes + p.block_rows * p.dim);
      const float sink = g.sinks == nullptr ? lowest : g.sinks[head] * kLog2E;
      float top = sink;
      for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
        const float maximum = state(pair, chunk)[block + r * lanes];
        top = maximum > top ? maximum : top;
      }
      const float safe = top == lowest ? 0.0f : top;
      float total = std::exp2(sink - safe);
      std::fill_n(row, g.dim, 0.0f);
      for (int64_t chunk = 0; chunk < p.chunks; ++chunk) {
        const float* part = state(pair, chunk) + block;
        const float weight = std::exp2(part[r * lanes] - safe);
        float sum = 0.0f;
        for (int64_t lane = 0; lane < lanes; ++lane) sum += part[p.lanes + r * lanes + lane];
        total += sum * weight;
        restore_row<E>(part + 2 * p.lanes + r * p.dim, g.dim, p.lanes, weight, row);
      }
      write_row<T>(g, to, pair / g.kv_heads, token, head, row, top, total);
    }
  }
};

template <typename E, typename T>
void solve(const Geometry<float>& g, const Inputs& in, const Results<T>& to) {
  const Plan p = make_plan<E>(g, in.k);
  const int64_t pairs = g.batch * g.kv_heads;
  const Tensor memory =
      at::empty({pairs * (p.queries() + p.chunks * p.state()) + 16}, in.q.options().dtype(at::kFloat));
  float* queries = memory.mutable_data_ptr<float>();
  const Problem<E, T> problem{g, p, rows_of<T>(in.k), rows_of<T>(in.v), queries, queries + pairs * p.queries()};
  pack_queries<E, T>(g, p, rows_of<T>(in.q), queries);
  const auto work = [&](int64_t index, float* scratch) { problem.task(index, scratch); };
  const auto merge = [&](int64_t pair, float*) { problem.merge(pair, to); };
  if (p.serial) {
    AlignedArray<float> scratch(problem.scratch());
    for (int64_t index = 0; index < problem.tasks(); ++index) work(index, scratch.data());
    for (int64_t pair = 0; pair < pairs; ++pair) merge(pair, nullptr);
  } else {
    run_tasks(problem.tasks(), problem.scratch(), work);
    run_tasks(pairs, 0, merge);
  }
}

}  // namespace decode

template <typename T>
bool decode_forward(const Geometry<float>& g, const Inputs& in, const Results<T>& to) {
  if (g.rows() > decode::kMaxRows || g.keys == 0) return false;
  if (*std::max_element(g.high.begin(), g.high.end()) <= *std::min_element(g.low.begin(), g.low.end())) return false;
  if (!partly_seen_are_finite<T>(g, rows_of<T>(in.v))) return false;
  const int64_t pair = level() == Level::kAvx512 ? 32 : 16;
  if (std::is_same_v<T, c10::BFloat16> && g.rotary == 0 && g.dim % pair == 0)
    decode::solve<c10::BFloat16, T>(g, in, to);
  else decode::solve<float, T>(g, in, to);
  return true;
}

template bool decode_forward(const Geometry<float>&, const Inputs&, const Results<float>&);
template bool decode_forward(const Geometry<float>&, const Inputs&, const Results<c10::BFloat16>&);
template bool decode_forward(const Geometry<float>&, const Inputs&, const Results<c10::Half>&);

}  // namespace astrobiogen::attention
