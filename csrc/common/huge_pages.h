#pragma once
// Fresh memory arrives one page at a time, each with a fault into the kernel that clears it. With pages of
// 4 KiB that can take longer than a convolution takes to fill them; 2 MiB pages make it negligible.

#include <ATen/core/Tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace growkernels {

// Asks for huge pages under a tensor that was just allocated and not written yet. Only a hint: where the
// system has none, or the tensor holds no whole one, nothing changes.
inline void advise_huge_pages(const at::Tensor& tensor) {
#ifdef __linux__
  constexpr uintptr_t page = uintptr_t{1} << 21;
  const auto address = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + tensor.nbytes()) / page * page;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

}  // namespace growkernels
