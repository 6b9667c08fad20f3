// Packing of one task's query rows into panels, and writing panels back.
#pragma once

#include <cmath>
#include <cstring>

#include "attention/geometry.h"
#include "attention/kernels.h"

namespace astrobiogen::attention {

// The rows of one task: flattened (token, head of the group), head fastest, of one (batch, kv head). The last panel is
// filled up with rows that see nothing.
struct TaskRows {
  int64_t batch, kv_head, first, count, panels;
};

inline TaskRows task_rows(const Geometry<float>& g, int64_t pair, int64_t block, int64_t width) {
  const int64_t first = block * kTaskRows, count = std::min(kTaskRows, g.rows() - first);
  return {pair / g.kv_heads, pair % g.kv_heads, first, count, (count + width - 1) / width};
}

inline void visible_keys(const Geometry<float>& g, const TaskRows& t, int64_t width, int32_t* low, int32_t* high) {
  for (int64_t i = 0; i < t.panels * width; ++i) {
    low[i] = i < t.count ? g.low[(t.first + i) / g.group] : 0;
    high[i] = i < t.count ? g.high[(t.first + i) / g.group] : 0;
  }
}

// panels[x][d][w] = factor * (rotated) row i = x W + w, or factors[i] * it; with `flat`, the same numbers as rows of
// `padded` floats, and 0 where they are not finite: there they meet hidden pairs with weight 0. Rows past the end are
// zero. Returns the bits of the rows that are not finite (with `flat`).
static_assert(kTaskRows <= 64);
template <typename T>
uint64_t pack_panels(const Geometry<float>& g, const TaskRows& t, const Rows<const T>& in, bool turn, float factor,
                     int64_t width, float* panels, float* flat, int64_t padded, const float* factors = nullptr) {
  float row[kMaxHeadDim];
  uint64_t marked = 0;
  for (int64_t i = 0; i < t.panels * width; ++i) {
    if (i < t.count) {
      const int64_t token = (t.first + i) / g.group, head = t.kv_head * g.group + (t.first + i) % g.group;
      const T* from = in.at(t.batch, token, head);
      if (factors != nullptr) factor = factors[i];
      if (turn && g.rotary > 0) {
        const int64_t from_end = g.queries - token;
        rotate_row(g, from, g.angles(g.cos, t.batch, from_end), g.angles(g.sin, t.batch, from_end), 1.0f, factor, row);
      } else {
        for (int64_t d = 0; d < g.dim; ++d) row[d] = static_cast<float>(from[d]) * factor;
      }
    } else {
      std::fill_n(row, g.dim, 0.0f);
    }
    float* to = panels + i / width * g.dim * width + i % width;
    for (int64_t d = 0; d < g.dim; ++d) to[d * width] = row[d];
    if (flat == nullptr) continue;
    std::memcpy(flat + i * padded, row, g.dim * sizeof(float));
    if (all_finite(row, g.dim)) continue;
    silence(flat + i * padded, g.dim);
    marked |= uint64_t{1} << i;
  }
  return marked;
}

}  // namespace astrobiogen::attention
