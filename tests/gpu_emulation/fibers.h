#pragma once
// Stacks that one operating-system thread switches between. A switch saves the registers a call
// must preserve and nothing else: ucontext also saves the signal mask, which costs a system call
// each time. Other processors than x86-64 use ucontext all the same.

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if !defined(__x86_64__) && !defined(CUDA_ON_HOST_UCONTEXT)
#define CUDA_ON_HOST_UCONTEXT
#endif

#ifdef CUDA_ON_HOST_UCONTEXT
#include <ucontext.h>
#else
extern "C" __attribute__((visibility("hidden"))) void cuda_on_host_switch_stack(void** leave, void* enter);
// System V ABI: rbx, rbp, r12 to r15 and the stack pointer belong to the caller.
asm(R"(
.text
.hidden cuda_on_host_switch_stack
.globl cuda_on_host_switch_stack
.type cuda_on_host_switch_stack, @function
cuda_on_host_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch_stack, . - cuda_on_host_switch_stack
)");
#endif

namespace cuda_on_host {

// A function on a stack of its own that gives way to whoever resumed it, and is resumed again. The
// function never returns; a fiber can be started afresh at any time. The memory is never given
// back: fibers serve all launches of the process.
class Fiber {
 public:
  void start(void (*function)()) {
    if (stack_ == nullptr) {
      void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) {
        std::abort();
      }
      stack_ = static_cast<uint64_t*>(memory);
    }
    stack_[0] = kCanary;
#ifdef CUDA_ON_HOST_UCONTEXT
    getcontext(&own_);
    own_.uc_stack.ss_sp = stack_;
    own_.uc_stack.ss_size = kStackBytes;
    own_.uc_link = nullptr;
    makecontext(&own_, function, 0);
#else
    uint64_t* top = stack_ + kStackBytes / sizeof(uint64_t);
    // What the switch pops: six registers and the function's address; below it, as after a call,
    // the return address, which is never used.
    top[-1] = 0;
    top[-2] = reinterpret_cast<uint64_t>(function);
    own_ = top - 8;
#endif
  }

  void resume() {
#ifdef CUDA_ON_HOST_UCONTEXT
    swapcontext(&resumer_, &own_);
#else
    cuda_on_host_switch_stack(&resumer_, own_);
#endif
  }

  // Called on this fiber's stack: goes back to where it was resumed.
  void give_way() {
#ifdef CUDA_ON_HOST_UCONTEXT
    swapcontext(&own_, &resumer_);
#else
    cuda_on_host_switch_stack(&own_, resumer_);
#endif
  }

  [[nodiscard]] bool overflowed() const { return stack_[0] != kCanary; }

 private:
  static constexpr size_t kStackBytes = 256 << 10;
  static constexpr uint64_t kCanary = 0x5afe57acc0ffee11;

  uint64_t* stack_ = nullptr;
#ifdef CUDA_ON_HOST_UCONTEXT
  ucontext_t own_, resumer_;
#else
  void* own_ = nullptr;
  void* resumer_ = nullptr;
#endif
};

}  // namespace cuda_on_host
