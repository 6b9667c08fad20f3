// Memory that kernels walk in vectors.
#pragma once

#include <cstdint>
#include <vector>

namespace astrobiogen {

// Zeros on whole cache lines: from malloc, which aligns to 16 bytes, every second 32-byte access crosses two lines, in
// three processes out of four.
template <typename T>
class AlignedArray {
 public:
  explicit AlignedArray(int64_t count) : lines_((count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line)) {}
  T* data() { return reinterpret_cast<T*>(lines_.data()); }
  const T* data() const { return reinterpret_cast<const T*>(lines_.data()); }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64] = {};
  };
  std::vector<Line> lines_;
};

}  // namespace astrobiogen
