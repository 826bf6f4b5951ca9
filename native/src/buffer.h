// Memory that a thread keeps for its next call, without values that are set first.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace openelm {

class Buffer {
 public:
  float* floats(int64_t count) {
    if (count > size_) {
      memory_.reset(new (std::align_val_t(64)) float[count]);
      size_ = count;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* p) const { operator delete[](p, std::align_val_t(64)); }
  };
  std::unique_ptr<float[], Free> memory_;
  int64_t size_ = 0;
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace openelm
