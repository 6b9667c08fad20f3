// Attention of few query rows per key/value head, such as decoding with a cache.
#pragma once

#include "attention/geometry.h"
#include "attention/results.h"

namespace astrobiogen::attention {

// Writes the results and returns true, or returns false where the path does not serve: many rows, no visible key, or
// values that are not finite where some queries see them and others do not.
template <typename T>
bool decode_forward(const Geometry<float>& g, const Inputs& in, const Results<T>& to);

// Whether every value is finite that some queries see and others do not: for those its weight is 0, and 0 times NaN
// would be NaN.
template <typename T>
bool partly_seen_are_finite(const Geometry<float>& g, const Rows<const T>& values) {
  const auto [first, all_from] = std::minmax_element(g.low.begin(), g.low.end());
  const auto [all_to, last] = std::minmax_element(g.high.begin(), g.high.end());
  for (int64_t key = *first; key < *last; ++key) {
    if (key >= *all_from && key < *all_to) continue;
    for (int64_t b = 0; b < g.batch; ++b)
      for (int64_t h = 0; h < g.kv_heads; ++h) {
        const T* row = values.at(b, key, h);
        for (int64_t d = 0; d < g.dim; ++d)
          if (const float x = static_cast<float>(row[d]); !all_finite(&x, 1)) return false;
      }
  }
  return true;
}

}  // namespace astrobiogen::attention
