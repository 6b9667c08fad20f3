// Checks of an op's arguments: the first lines of every function that is registered with PyTorch's dispatcher.
//
// The public Python functions check too, with more helpful words, but `torch.ops.astrobiogen.*` is open to anybody: to
// exported graphs, to other languages, to code that was written for another version. A kernel takes pointers and sizes
// on trust, so a wrong argument that gets past this point ends the process or is wrong in silence. One helper per kind;
// all of an op's checks together take some 10 to 50 ns. They read no tensor's values, except where an index is one.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>

namespace astrobiogen::check {

using at::Tensor;

// The largest stride, padding, dilation, or number of groups, and the longest axis where kernels count in 32 bits.
constexpr int64_t kLargest = std::numeric_limits<int32_t>::max();
constexpr int64_t kAnyRank = std::numeric_limits<int64_t>::max();

// a + b and a * b, or the largest integer where that overflows: for comparisons with a size.
inline int64_t sum(int64_t a, int64_t b) {
  int64_t result;
  return __builtin_add_overflow(a, b, &result) ? std::numeric_limits<int64_t>::max() : result;
}
inline int64_t product(int64_t a, int64_t b) {
  int64_t result;
  return __builtin_mul_overflow(a, b, &result) ? std::numeric_limits<int64_t>::max() : result;
}

// The dtype of sums over `t`: fp64 for fp64, else fp32.
inline at::ScalarType exact(const Tensor& t) { return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// Every check names the op, the argument, what was got and what is expected.
class Op {
 public:
  explicit constexpr Op(const char* name) : op_(name) {}

  // On the CPU, strided, and inside its storage (a freed or shrunk one is a state that optimizers and FSDP leave).
  void tensor(const Tensor& t, const char* name) const {
    TORCH_CHECK_VALUE(t.defined(), op_, ": ", name, " must be a tensor, got an undefined one");
    TORCH_CHECK_VALUE(t.is_cpu() && t.layout() == at::kStrided && t.has_storage(), op_, ": ", name,
                      " must be a dense tensor on the device cpu, got layout ", t.layout(), " on ", t.device());
    const int64_t held = static_cast<int64_t>(t.storage().nbytes()),
                  used = t.numel() == 0 ? 0 : end_of(t) * t.element_size();
    TORCH_CHECK_VALUE(used <= held, op_, ": ", name, " must lie inside its storage, got ", held, " bytes where shape ",
                      t.sizes(), " needs ", used);
  }

  void floating(const Tensor& t, const char* name) const {
    tensor(t, name);
    const auto type = t.scalar_type();
    TORCH_CHECK_TYPE(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf || type == at::kDouble, op_, ": ",
                     name, " must be float32, bfloat16, float16 or float64, got ", type);
  }

  void dtype(const Tensor& t, const char* name, at::ScalarType expected) const {
    tensor(t, name);
    TORCH_CHECK_TYPE(t.scalar_type() == expected, op_, ": ", name, " must be ", expected, ", got ", t.scalar_type());
  }

  void rank(const Tensor& t, const char* name, int64_t lowest, int64_t highest, const char* shape) const {
    TORCH_CHECK_VALUE(lowest <= t.dim() && t.dim() <= highest, op_, ": ", name, " must have shape ", shape, ", got ",
                      t.sizes());
  }

  void shape(const Tensor& t, const char* name, at::IntArrayRef expected, const char* meaning) const {
    TORCH_CHECK_VALUE(t.sizes() == expected, op_, ": ", name, " must have shape ", expected, " (", meaning, "), got ",
                      t.sizes());
  }

  // Dtype and shape.
  void like(const Tensor& t, const char* name, const Tensor& other, const char* meaning) const {
    dtype(t, name, other.scalar_type());
    shape(t, name, other.sizes(), meaning);
  }
  void like(const std::optional<Tensor>& t, const char* name, const Tensor& other, const char* meaning) const {
    if (t) like(*t, name, other, meaning);
  }

  // [..., last] with the leading axes of `other`.
  void rows_like(const Tensor& t, const char* name, const Tensor& other, int64_t last, const char* meaning) const {
    const int64_t axes = other.dim();
    const bool fits = t.dim() == axes && axes > 0 && t.size(-1) == last &&
                      std::equal(t.sizes().begin(), t.sizes().end() - 1, other.sizes().begin());
    TORCH_CHECK_VALUE(fits, op_, ": ", name, " must have shape [..., ", last, "] (", meaning,
                      ") with the leading axes of ", other.sizes(), ", got ", t.sizes());
  }

  void size(int64_t got, const char* name, int64_t lowest,
            int64_t highest = std::numeric_limits<int64_t>::max()) const {
    TORCH_CHECK_VALUE(lowest <= got && got <= highest, op_, ": ", name, " must be in [", lowest, ", ", highest,
                      "], got ", got);
  }

  void divides(int64_t divisor, const char* name, int64_t number, const char* of) const {
    TORCH_CHECK_VALUE(divisor > 0 && number % divisor == 0, op_, ": ", name, " must be > 0 and divide ", of, " = ",
                      number, ", got ", divisor);
  }

  void length(size_t got, const char* name, size_t expected, const char* meaning) const {
    TORCH_CHECK_VALUE(got == expected, op_, ": ", name, " must have ", expected, " entries (", meaning, "), got ", got);
  }

  void finite(double got, const char* name, double lowest, double highest = std::numeric_limits<double>::max()) const {
    TORCH_CHECK_VALUE(lowest <= got && got <= highest, op_, ": ", name, " must be a finite number in [", lowest, ", ",
                      highest, "], got ", got);
  }
  void finite(double got, const char* name) const { finite(got, name, std::numeric_limits<double>::lowest()); }
  void positive(double got, const char* name) const { finite(got, name, std::numeric_limits<double>::min()); }

  // Values of a contiguous index tensor, all in [0, count).
  void indices(const Tensor& t, const char* name, int64_t count) const {
    const int64_t* values = t.const_data_ptr<int64_t>();
    const int64_t entries = t.numel();
    bool inside = true;  // without a way out of the loop, which then takes a vector at a time
    for (int64_t i = 0; i < entries; ++i) inside &= static_cast<uint64_t>(values[i]) < static_cast<uint64_t>(count);
    if (inside) [[likely]]
      return;
    for (int64_t i = 0; i < entries; ++i)
      TORCH_CHECK_VALUE(values[i] >= 0 && values[i] < count, op_, ": ", name, " must hold values in [0, ", count,
                        "), got ", values[i], " at position ", i);
  }

  const char* name() const { return op_; }

 private:
  // Elements of the storage up to the last one that `t` reaches.
  static int64_t end_of(const Tensor& t) {
    if (t.is_contiguous()) return t.storage_offset() + t.numel();
    int64_t last = t.storage_offset();
    for (int64_t axis = 0; axis < t.dim(); ++axis) last = sum(last, product(t.size(axis) - 1, t.stride(axis)));
    return last + 1;
  }

  const char* op_;
};

}  // namespace astrobiogen::check
