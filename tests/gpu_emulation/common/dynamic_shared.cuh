#pragma once
// csrc/common/dynamic_shared.cuh for the host.

#include "cuda_on_host.h"

namespace growkernels {

template <typename T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(cuda_on_host::machine.dynamic_begin());
}

}  // namespace growkernels
