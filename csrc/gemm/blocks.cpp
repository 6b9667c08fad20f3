// Which layers the blocks serve. Measured in benchmarks/bench_linear.py.
#include "gemm/blocks.h"

#include "common/core.h"

namespace astrobiogen::gemm {

using at::Tensor;

namespace {

constexpr int64_t kMostWidth = 512;  // of either side of the weight
constexpr int64_t kFewestRows = 64;  // below, packing the weight costs more than it saves
constexpr int64_t kFewestOutputs =
    8;  // below, the rows of a block are mostly padding, and a matrix-vector product serves
constexpr int64_t kFewestWork = 1 << 17;  // multiply-adds

}  // namespace

int64_t block_rows() { return level() == Level::kAvx512 ? Blocking<Level::kAvx512>::R : Blocking<Level::kAvx2>::R; }
int64_t panel_width() { return level() == Level::kAvx512 ? Blocking<Level::kAvx512>::P : Blocking<Level::kAvx2>::P; }

bool serves_block(const Tensor& x, const Tensor& weight, int64_t rows) {
  return x.scalar_type() == at::kFloat && weight.scalar_type() == at::kFloat && weight.size(0) <= kMostWidth &&
         weight.size(1) <= kMostWidth && weight.size(0) >= kFewestOutputs && rows >= kFewestRows &&
         rows * weight.numel() >= kFewestWork && level() != Level::kBaseline;
}

bool serves(const Tensor& x, const Tensor& weight, int64_t rows) {
  return core() != Core::kIntel && serves_block(x, weight, rows);
}

int64_t rows_of(const Tensor& x) { return x.size(-1) == 0 ? 0 : x.numel() / x.size(-1); }

}  // namespace astrobiogen::gemm
