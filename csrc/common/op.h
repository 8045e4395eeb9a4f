#pragma once
// Between torch, which knows an op's arguments by their places, and our code, which knows them by their names.

#include <ATen/core/dispatch/Dispatcher.h>

namespace growkernels {

// `Call` is a struct of an op's arguments in the schema's order, with or without structs inside. run<kernel> is what
// torch calls: it passes them all to kernel(call).
template <typename Call, typename Signature = typename Call::Signature>
struct Unpacked;

template <typename Call, typename Result, typename... Arguments>
struct Unpacked<Call, Result(Arguments...)> {
  template <Result (*kernel)(const Call&)>
  static Result run(Arguments... arguments) {
    return kernel(Call{arguments...});
  }
};

// A registered op as a typed handle, for kernels that pass a call on to the next dispatch key. Keep it in a static
// variable: the look-up takes a lock.
template <typename Signature>
c10::TypedOperatorHandle<Signature> registered_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace growkernels
