#pragma once
// Runs the thread blocks of a launch one after another, each thread as a fiber. A thread runs until
// it reaches a barrier or a warp collective and goes on once all that must meet there have come.
// When nobody can go on, the launch ends with an error that says who waits where.
//
// Shared memory is what the library holds in thread-local variables (`__shared__` makes them so:
// this finds them all, those of templates too) and a dynamic part. Both are filled with 0xFF before
// each block: NaN in every floating-point type.

#include "fibers.h"

#include <link.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace cuda_on_host {

using Where = std::source_location;
// What the lanes of a warp bring to a collective, by lane; null for lanes that do not take part.
using Offers = std::array<void*, 32>;
// Gives every lane its result, in the memory its offer points to.
using Complete = void (*)(const Offers& offers);

inline constexpr unsigned kMostThreads = 1024, kMostSharedBytes = 227 << 10;

struct Thread {
  enum class State { ready, at_barrier, in_warp, left };

  Fiber fiber;
  State state;
  uint3 index;
  Where where;
  unsigned mask;
  Complete complete;
  void* offer;
};

struct Machine {
  std::vector<Thread> threads = std::vector<Thread>(kMostThreads);
  std::vector<unsigned char> dynamic = std::vector<unsigned char>(kMostSharedBytes + 2 * kGuardBytes);
  std::function<void()> kernel;
  std::string error;
  unsigned count = 0, running = 0;
  // Of the current block: threads at the barrier, one of them, threads that have left, one of them.
  unsigned at_barrier = 0, someone_there = 0, left = 0, someone_gone = 0;
  // What threads bring to the barrier they are at, ored together, and what was brought to the last.
  unsigned brought = 0, taken = 0;
  size_t dynamic_bytes = 0, static_bytes = 0;
  char* static_begin = nullptr;
  // A missing barrier mostly shows as a difference between the two orders.
  bool backwards = false;

  static constexpr size_t kGuardBytes = 1024;

  // Aligned to the guard's size.
  unsigned char* dynamic_begin() {
    const auto address = reinterpret_cast<uintptr_t>(dynamic.data());
    return dynamic.data() + (kGuardBytes - address % kGuardBytes) % kGuardBytes;
  }
};

static Machine machine;
// Says which of the process's thread-local blocks belongs to this library.
static thread_local char shared_memory_anchor;

inline std::string text(const dim3& at) {
  return "(" + std::to_string(at.x) + "," + std::to_string(at.y) + "," + std::to_string(at.z) + ")";
}

inline std::string text(const uint3& at) { return text(dim3(at.x, at.y, at.z)); }

inline std::string text(const Where& where) {
  const std::string path = where.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

inline bool same(const Where& a, const Where& b) {
  return a.line() == b.line() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

// Ends the launch; called by a thread, never returns to it.
[[noreturn]] inline void fail(const std::string& message, const Where& where) {
  if (machine.error.empty()) {
    machine.error = text(where) + ": block " + text(blockIdx) + ", thread " + text(threadIdx) + ": " + message;
  }
  Thread& self = machine.threads[machine.running];
  self.state = Thread::State::left;
  self.fiber.give_way();
  std::abort();
}

// Returns what all threads have brought, ored together.
inline unsigned meet_block(unsigned bring, const Where& where) {
  const Thread& there = machine.threads[machine.someone_there];
  if (machine.at_barrier > 0 && !same(there.where, where)) {
    fail("__syncthreads() while thread " + text(there.index) + " waits at another one, " + text(there.where), where);
  }
  if (machine.left > 0) {
    fail("__syncthreads() that thread " + text(machine.threads[machine.someone_gone].index) +
             " never reaches: it has left the kernel",
         where);
  }
  machine.someone_there = machine.running;
  machine.brought |= bring;
  if (++machine.at_barrier < machine.count) {
    Thread& self = machine.threads[machine.running];
    self.state = Thread::State::at_barrier;
    self.where = where;
    self.fiber.give_way();
    return machine.taken;
  }
  machine.taken = std::exchange(machine.brought, 0);
  machine.at_barrier = 0;
  for (unsigned i = 0; i < machine.count; ++i) {
    machine.threads[i].state = Thread::State::ready;
  }
  return machine.taken;
}

inline unsigned lane_of(unsigned thread) { return thread % warpSize; }

// If all threads named by the mask of `waiting` that are still there wait for the same collective,
// completes it; says whether it did.
inline bool complete_collective(const Thread& waiting, unsigned first) {
  const unsigned mask = waiting.mask;
  const Complete complete = waiting.complete;
  Offers offers{};
  for (unsigned lane = 0; lane < warpSize && first + lane < machine.count; ++lane) {
    const Thread& thread = machine.threads[first + lane];
    if ((mask >> lane & 1) == 0 || thread.state == Thread::State::left) {
      continue;
    }
    if (thread.state != Thread::State::in_warp || thread.mask != mask || thread.complete != complete) {
      return false;
    }
    offers[lane] = thread.offer;
  }
  complete(offers);
  for (unsigned lane = 0; lane < warpSize; ++lane) {
    if (offers[lane] != nullptr) {
      machine.threads[first + lane].state = Thread::State::ready;
    }
  }
  return true;
}

// A collective of the lanes in `mask`: the last to come completes it for all.
inline void meet_warp(unsigned mask, Complete complete, void* offer, const Where& where) {
  const unsigned lane = lane_of(machine.running), first = machine.running - lane;
  if ((mask >> lane & 1) == 0) {
    fail("a warp collective whose mask does not name the calling lane " + std::to_string(lane), where);
  }
  Thread& self = machine.threads[machine.running];
  self.mask = mask;
  self.complete = complete;
  self.offer = offer;
  self.where = where;
  self.state = Thread::State::in_warp;
  if (!complete_collective(self, first)) {
    self.fiber.give_way();
  }
}

inline void run_thread() {
  machine.kernel();
  ++machine.left;
  machine.someone_gone = machine.running;
  Thread& self = machine.threads[machine.running];
  self.state = Thread::State::left;
  self.fiber.give_way();
  std::abort();
}

inline void resume(unsigned thread) {
  machine.running = thread;
  threadIdx = machine.threads[thread].index;
  machine.threads[thread].fiber.resume();
  if (machine.threads[thread].fiber.overflowed()) {
    machine.error = "block " + text(blockIdx) + ", thread " + text(threadIdx) + ": its stack overflowed";
  }
}

// Runs the threads of a warp until each waits for other warps or has left; says whether any ran.
inline bool run_warp(unsigned first) {
  const unsigned lanes = std::min<unsigned>(warpSize, machine.count - first);
  bool any = false;
  for (bool again = true; again;) {
    again = false;
    for (unsigned step = 0; step < lanes; ++step) {
      const unsigned thread = first + (machine.backwards ? lanes - 1 - step : step);
      if (machine.threads[thread].state == Thread::State::ready) {
        resume(thread);
        if (!machine.error.empty()) {
          return true;
        }
        again = any = true;
      }
    }
    // A lane that left may have been the last that others waited for.
    for (unsigned lane = 0; !again && lane < lanes; ++lane) {
      const Thread& thread = machine.threads[first + lane];
      again = thread.state == Thread::State::in_warp && complete_collective(thread, first);
    }
  }
  return any;
}

inline std::string who_waits() {
  std::string said = "block " + text(blockIdx) + " cannot go on:";
  for (unsigned i = 0; i < machine.count; ++i) {
    const Thread& thread = machine.threads[i];
    const bool as_the_last =
        i > 0 && thread.state == machine.threads[i - 1].state && same(thread.where, machine.threads[i - 1].where);
    if (thread.state == Thread::State::left || as_the_last) {
      continue;
    }
    char mask[32] = "";
    if (thread.state == Thread::State::in_warp) {
      std::snprintf(mask, sizeof(mask), " with mask 0x%x", thread.mask);
    }
    said += " thread " + text(thread.index) + " waits at " +
            (thread.state == Thread::State::at_barrier ? "__syncthreads()" : "a warp collective") + " in " +
            text(thread.where) + mask + ";";
  }
  return said + " " + std::to_string(machine.left) + " of " + std::to_string(machine.count) +
         " threads have left the kernel";
}

// Finds this library's thread-local variables.
inline int find_static_shared(dl_phdr_info* library, size_t, void*) {
  auto* data = static_cast<char*>(library->dlpi_tls_data);
  for (int i = 0; data != nullptr && i < library->dlpi_phnum; ++i) {
    const auto& part = library->dlpi_phdr[i];
    if (part.p_type == PT_TLS && data <= &shared_memory_anchor && &shared_memory_anchor < data + part.p_memsz) {
      machine.static_begin = data;
      machine.static_bytes = part.p_memsz;
      return 1;
    }
  }
  return 0;
}

inline void run_block() {
  std::memset(machine.static_begin, 0xFF, machine.static_bytes);
  unsigned char* dynamic = machine.dynamic_begin();
  std::memset(dynamic, 0xFF, machine.dynamic_bytes + Machine::kGuardBytes);
  for (unsigned i = 0; i < machine.count; ++i) {
    Thread& thread = machine.threads[i];
    thread.state = Thread::State::ready;
    thread.where = Where();
    thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
    thread.fiber.start(&run_thread);
  }
  machine.at_barrier = machine.left = machine.brought = 0;
  const unsigned warps = (machine.count + warpSize - 1) / warpSize;
  for (bool any = true; any && machine.error.empty();) {
    any = false;
    for (unsigned step = 0; step < warps && machine.error.empty(); ++step) {
      any |= run_warp(warpSize * (machine.backwards ? warps - 1 - step : step));
    }
  }
  for (unsigned i = 0; i < machine.count && machine.error.empty(); ++i) {
    if (machine.threads[i].state != Thread::State::left) {
      machine.error = who_waits();
    }
  }
  for (size_t i = 0; i < Machine::kGuardBytes && machine.error.empty(); ++i) {
    if (dynamic[machine.dynamic_bytes + i] != 0xFF) {
      machine.error = "block " + text(blockIdx) + ": wrote beyond its " + std::to_string(machine.dynamic_bytes) +
                      " bytes of dynamic shared memory";
    }
  }
}

// All blocks in order; stops at the first error, which `cuda_on_host_error` then tells.
inline void run_grid(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> kernel) {
  if (!machine.error.empty()) {
    return;
  }
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMostThreads || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7FFFFFFF || grid.y > 65535 || grid.z > 65535 || shared_bytes > kMostSharedBytes) {
    machine.error = "no GPU launches a grid " + text(grid) + " of blocks " + text(block) + " with " +
                    std::to_string(shared_bytes) + " bytes of dynamic shared memory";
    return;
  }
  machine.count = static_cast<unsigned>(threads);
  machine.dynamic_bytes = shared_bytes;
  machine.kernel = std::move(kernel);
  // The first touch allocates them; each operating-system thread has its own.
  *const_cast<volatile char*>(&shared_memory_anchor) = 0;
  dl_iterate_phdr(&find_static_shared, nullptr);
  gridDim = grid;
  blockDim = block;
  for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z) {
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
        run_block();
        if (!machine.error.empty()) {
          return;
        }
      }
    }
  }
}

}  // namespace cuda_on_host

// What went wrong since the last call, or null. The text lives until the next call.
extern "C" __attribute__((visibility("default"), used)) inline const char* cuda_on_host_error() {
  static std::string told;
  told = std::move(cuda_on_host::machine.error);
  cuda_on_host::machine.error.clear();
  return told.empty() ? nullptr : told.c_str();
}

extern "C" __attribute__((visibility("default"), used)) inline void cuda_on_host_backwards(int backwards) {
  cuda_on_host::machine.backwards = backwards != 0;
}
