// What the kernels of attention along edges share: the problem and its rows.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/dispatch.h"
#include "common/dtypes.h"
#include "common/math.h"

namespace astrobiogen::edge_attention {

constexpr int64_t kLanes = simd::kHalfLanes;

struct Lists {
  const int64_t *receiver, *sender, *by_receiver, *receiver_start, *by_sender, *sender_start;
};

// Rows [heads][D], dense; `step` elements from node to node.
template <typename T>
struct Rows {
  const T* data;
  int64_t step;
  ASTRO_INLINE const T* operator[](int64_t node) const { return data + node * step; }
};

template <typename T>
struct Problem {
  Rows<T> q, k, v;
  const T* bias;  // [E][heads], dense
  int64_t heads, width, receivers, senders;
  Wide<T> scale;
  Lists lists;

  int64_t columns() const { return heads * width; }
};

template <typename T>
struct Forward {
  Problem<T> in;
  T* out;
  Wide<T>* lse;
};

template <typename T>
struct Backward {
  Problem<T> in;
  Rows<T> grad;
  const Wide<T>* lse;
  Wide<T>*weight, *slope;  // p and ds, [E][heads]; both 0 for an edge that is cut
  // Set by the receivers' loop if a bias of -Inf cuts an edge: the senders' loop then leaves out weights of 0.
  std::atomic<bool>* cut;
  T *grad_q, *grad_k, *grad_v, *grad_bias;
};

// A bias of -Inf cuts an edge: what its ends hold, NaN included, reaches nothing.
template <typename T>
ASTRO_INLINE bool cuts(T bias) {
  return static_cast<Wide<T>>(bias) == -std::numeric_limits<Wide<T>>::infinity();
}

// e^x in place, for x <= 0 but for a rounding; `values` is padded to a multiple of 8.
ASTRO_INLINE void exponentials(float* values, int64_t count) {
  for (int64_t j = 0; j < count; j += kLanes) {
    const simd::f32x8 x = simd::load8(values + j);
    simd::store8(values + j, simd::exp_nonpositive(x > 0.0f ? simd::splat8(0.0f) : x));
  }
}

ASTRO_INLINE void exponentials(double* values, int64_t count) {
  for (int64_t j = 0; j < count; ++j) values[j] = std::exp(values[j]);
}

template <typename A>
void reserve(std::vector<A>& values, int64_t count) {
  const int64_t padded = (count + kLanes - 1) / kLanes * kLanes;
  if (static_cast<int64_t>(values.size()) < padded) values.resize(padded, A(0));
}

}  // namespace astrobiogen::edge_attention
