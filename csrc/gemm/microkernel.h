// The register block of every fp32 product: R rows x V vectors of sums, fed one step of the depth at a time.
//
// Per step, V vector loads and R broadcasts meet R x V multiply-adds. What differs between the kernels is a parameter:
// the size of the block, where the left factor of a row lies, what memory is asked for meanwhile, and what becomes of
// the sums.
#pragma once

#include <cstdint>

#include "common/dispatch.h"
#include "common/simd.h"

namespace astrobiogen::gemm {

// Called once per kSteps steps of the depth with the number of the call: what is asked for while the sums form.
struct NothingAhead {
  static constexpr int kSteps = 1;
  ASTRO_INLINE void operator()(int64_t) const {}
};

// sums[r][v] += sum over k < depth of left(r, k) * right[k right_step + v N .. + N), N the lanes of a vector.
template <class Vector, int R, int V, class Left, class Requests = NothingAhead>
ASTRO_INLINE void multiply_add(Vector (&sums)[R][V], int64_t depth, const Left& left, const float* right,
                               int64_t right_step, const Requests& ahead = {}) {
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(float);
  const auto step = [&](int64_t k) ASTRO_LAMBDA_INLINE {
    Vector values[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) values[v] = simd::load_as<Vector>(right + k * right_step + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float factor = left(r, k);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += factor * values[v];
    }
  };
  int64_t k = 0;
  for (; k + Requests::kSteps <= depth; k += Requests::kSteps) {
    ahead(k / Requests::kSteps);
#pragma GCC unroll 4
    for (int i = 0; i < Requests::kSteps; ++i) step(k + i);
  }
  for (; k < depth; ++k) step(k);
}

// What becomes of a vector of sums: the numbers to store at `to`, columns [column, column + N) of its row.
struct Overwrite {
  template <class Vector>
  ASTRO_INLINE Vector operator()(Vector sum, const float*, int64_t) const {
    return sum;
  }
};

// The old number is added after the sum and not before it: a long chain of additions would round at its size.
struct AddTo {
  template <class Vector>
  ASTRO_INLINE Vector operator()(Vector sum, const float* to, int64_t) const {
    return sum + simd::load_as<Vector>(to);
  }
};

// The old number times a factor of the column.
struct AddScaled {
  const float* scale;
  template <class Vector>
  ASTRO_INLINE Vector operator()(Vector sum, const float* to, int64_t column) const {
    return sum + simd::load_as<Vector>(to) * simd::load_as<Vector>(scale + column);
  }
};

// A number of the column, such as a bias; null: none.
struct AddStart {
  const float* start;
  template <class Vector>
  ASTRO_INLINE Vector operator()(Vector sum, const float*, int64_t column) const {
    return start == nullptr ? sum : sum + simd::load_as<Vector>(start + column);
  }
};

template <class Vector, int R, int V, class Policy>
ASTRO_INLINE void write_block(const Vector (&sums)[R][V], float* c, int64_t c_step, const Policy& policy) {
  constexpr int64_t kLanes = sizeof(Vector) / sizeof(float);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* to = c + r * c_step + v * kLanes;
      simd::store_as<Vector>(to, policy(sums[r][v], to, v * kLanes));
    }
}

// One block of c from zero sums.
template <class Vector, int R, int V, class Left, class Policy, class Requests = NothingAhead>
ASTRO_INLINE void block(int64_t depth, const Left& left, const float* right, int64_t right_step, float* c,
                        int64_t c_step, const Policy& policy, const Requests& ahead = {}) {
  Vector sums[R][V] = {};
  multiply_add<Vector, R, V>(sums, depth, left, right, right_step, ahead);
  write_block<Vector, R, V>(sums, c, c_step, policy);
}

}  // namespace astrobiogen::gemm
