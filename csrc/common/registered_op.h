#pragma once
// A registered op as a typed handle, for kernels that pass a call on to the next dispatch key.

#include <ATen/core/dispatch/Dispatcher.h>

namespace growkernels {

// Keep the result in a static variable: the look-up takes a lock.
template <typename Signature>
c10::TypedOperatorHandle<Signature> registered_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace growkernels
