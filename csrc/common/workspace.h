#pragma once
// Scratch memory that a thread keeps from call to call. Fresh memory costs a page fault and a cleared page
// for every part that is touched, which is more than some kernels take to compute in it.

#include "common/huge_pages.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cstdint>

namespace growkernels {

// At least `count` floats, kept for the next call of this thread with the same Owner (any type: it names
// the purpose) unless they are more than 32 MiB. Valid until that call: the caller holds the tensor.
template <typename Owner>
at::Tensor workspace(int64_t count) {
  constexpr int64_t most_kept = int64_t{8} << 20;
  static thread_local at::Tensor kept;
  if (kept.defined() && kept.numel() >= count) {
    return kept;
  }
  const at::Tensor fresh = at::empty({count}, at::kFloat);
  advise_huge_pages(fresh);
  if (count <= most_kept) {
    kept = fresh;
  }
  return fresh;
}

}  // namespace growkernels
