// The inner kernels of attention on packed fp32 tiles; the drivers (attention/attention.cpp, attention/backward.cpp)
// pack, schedule and write results.
#pragma once

#include <cstdint>

namespace astrobiogen::attention {

// Scores here are in units of log 2: the panel of queries is packed with the factor scale * log2(e), or scale / softcap
// with a softcap, and then softcap * log2(e) * tanh(.) is applied (`softcap` below; 0: none).
struct ForwardTile {
  const float* keys;    // [Sk][key_stride], rotated
  const float* values;  // [Sk][value_stride]
  int64_t key_stride, value_stride, dim;
  int64_t panels;        // panels of W query rows
  const float* queries;  // [panels][dim][W]
  float* out;            // [panels][dim][W], unnormalised; zero on entry
  float* maximum;        // [panels W] running maximum; -Inf, or the sink, on entry
  float* total;          // [panels W] running sum; 0, or 1 with a sink, on entry
  const int32_t* low;    // [panels W] first key that a row sees
  const int32_t* high;   // [panels W] one past the last key
  float softcap;
  float* scratch;  // kScratch floats
};

struct BackwardTile {
  const float* keys;         // [Sk][dim], rotated
  const float* finite_keys;  // the same with 0 for what is not finite: a hidden pair meets it with weight 0
  const float* values;       // [Sk][dim]
  int64_t dim, padded;  // padded: row stride of the row-major tiles, a multiple of the register width, columns from
                        // `dim` on zero
  int64_t panels;
  const float* queries;     // [panels][dim][W]
  const float* query_rows;  // [panels W][padded], the same numbers, finite
  const float* grads;       // [panels][dim][W] gradient of the output
  const float* grad_rows;   // [panels W][padded], finite
  const float* lse;         // [panels W], in units of log 2; finite, or NaN for a row that is lost
  const float* delta;       // [panels W] sum_d grad out - gradient of lse
  const int32_t* low;
  const int32_t* high;
  bool lost;  // some row's lse is NaN
  float softcap;
  float* grad_queries;  // [panels][dim][W], zero on entry
  float* grad_keys;     // [Sk][padded], added to
  float* grad_values;   // [Sk][padded], added to
  float* scratch;       // 2 kScratch floats
};

constexpr int64_t kScratch = 128 * 64;  // at least keys per tile times query rows per task

struct Kernels {
  int64_t width;  // W
  int64_t lanes;  // `padded` is a multiple of this
  void (*forward)(const ForwardTile&);
  void (*backward)(const BackwardTile&);
};

// Those of the instruction-set level in use (common/dispatch.h).
const Kernels& kernels();

}  // namespace astrobiogen::attention
