#pragma once
// What computes a call, in words for Python: growkernels/ops/plan.py. The functions that dispatch give their reasons
// here, so that what is said cannot differ from what is done.

#include <ATen/core/Dict.h>

#include <string>
#include <tuple>

namespace growkernels {

// Backends that do not compute a call, in the order they were asked, with the reasons.
using Refused = c10::Dict<std::string, std::string>;

// Whether a backend computes a call: an obstacle is a reason against it, null where there is none. Refusals are
// recorded where somebody wants to know.
inline bool takes(const char* backend, const char* obstacle, Refused* refused) {
  if (obstacle != nullptr && refused != nullptr) {
    refused->insert(backend, obstacle);
  }
  return obstacle == nullptr;
}

// The backend, and those refused before it.
using Choice = std::tuple<std::string, Refused>;

}  // namespace growkernels
