#pragma once
// Memory of one worker that lasts for one call and grows on demand; growing forgets what was in it.

#include <c10/core/CPUAllocator.h>

#include <cstdint>

namespace growkernels {

template <typename T>
class Scratch {
 public:
  T* at_least(int64_t count) {
    if (count > count_) {
      memory_ = c10::GetCPUAllocator()->allocate(count * sizeof(T));
      count_ = count;
    }
    return static_cast<T*>(memory_.get());
  }

 private:
  at::DataPtr memory_;
  int64_t count_ = 0;
};

}  // namespace growkernels
