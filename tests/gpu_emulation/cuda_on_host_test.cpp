// Kernels that show what the launch shim must do; tests/ops/test_cuda_on_host.py calls them.

#include "cuda_on_host.h"

#include "common/dynamic_shared.cuh"

using cuda_on_host::launch;

// Tree sums, through a shared array that belongs to a template.
template <int threads>
__global__ void sum_rows(const float* x, float* sums, int columns) {
  __shared__ float parts[threads];
  const int t = threadIdx.x;
  float part = 0;
  for (int c = t; c < columns; c += threads) {
    part += x[int64_t{blockIdx.x} * columns + c];
  }
  parts[t] = part;
  __syncthreads();
  for (int half = threads / 2; half > 0; half /= 2) {
    if (t < half) {
      parts[t] += parts[t + half];
    }
    __syncthreads();
  }
  if (t == 0) {
    sums[blockIdx.x] = parts[0];
  }
}

CUDA_ON_HOST_EXPORT void sum(const float* x, float* sums, int64_t rows, int64_t columns) {
  launch(rows, 256, 0, &sum_rows<256>, x, sums, static_cast<int>(columns));
}

// out[step][thread] of one block.
__global__ void shuffles(const double* x, double* out) {
  const int t = threadIdx.x, n = blockDim.x;
  const unsigned all = 0xFFFFFFFF;
  out[0 * n + t] = __shfl_sync(all, x[t], 3);
  out[1 * n + t] = __shfl_sync(all, x[t], t + 1, 8);
  out[2 * n + t] = __shfl_xor_sync(all, x[t], 5);
  out[3 * n + t] = __shfl_up_sync(all, x[t], 2u, 16);
  out[4 * n + t] = __shfl_down_sync(all, x[t], 3u);
  out[5 * n + t] = __shfl_sync(all, static_cast<float>(x[t]), t / 2);
}

CUDA_ON_HOST_EXPORT void shuffle(const double* x, double* out, int64_t threads) {
  launch(1, threads, 0, &shuffles, x, out);
}

// Halves of a warp meet on their own, at different lines.
__global__ void votes(const int* x, unsigned* out) {
  const int t = threadIdx.x;
  if (t % 32 < 16) {
    out[t] = __ballot_sync(0x0000FFFF, x[t]);
  } else {
    out[t] = __ballot_sync(0xFFFF0000, x[t]);
  }
  __syncwarp();
  out[t] += (__any_sync(0xFFFFFFFF, x[t]) ? 0 : 7u) + (__all_sync(0xFFFFFFFF, x[t]) ? 11u : 0);
}

CUDA_ON_HOST_EXPORT void vote(const int* x, unsigned* out, int64_t threads) { launch(1, threads, 0, &votes, x, out); }

__global__ void indices(int* out) {
  const unsigned block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const unsigned at = block * blockDim.x * blockDim.y * blockDim.z + thread;
  const unsigned digits[] = {blockIdx.z, blockIdx.y, blockIdx.x, threadIdx.z, threadIdx.y, threadIdx.x};
  out[at] = 0;
  for (unsigned digit : digits) {
    out[at] = 10 * out[at] + static_cast<int>(digit);
  }
}

CUDA_ON_HOST_EXPORT void index(int* out) { launch(dim3(2, 3, 2), dim3(3, 2, 4), 0, &indices, out); }

// What a block finds in its shared memory, static and dynamic, and leaves there for the next.
__global__ void found_and_left(float* found) {
  __shared__ float word;
  float* dynamic = growkernels::dynamic_shared<float>();
  found[2 * blockIdx.x] = word;
  found[2 * blockIdx.x + 1] = dynamic[3];
  word = dynamic[3] = 5;
}

CUDA_ON_HOST_EXPORT void poison(float* found, int64_t blocks) { launch(blocks, 1, 16, &found_and_left, found); }

__global__ void overrun() { growkernels::dynamic_shared<float>()[4] = 1; }

CUDA_ON_HOST_EXPORT void write_too_far() { launch(1, 1, 16, &overrun); }

__global__ void counts(int* total, float* sum, int* largest, int* last) {
  atomicAdd(total, 1);
  atomicAdd(sum, 0.5f);
  atomicMax(largest, threadIdx.x);
  for (int old = *last; old < 9;) {
    old = atomicCAS(last, old, old + 1);
  }
}

CUDA_ON_HOST_EXPORT void count(int* total, float* sum, int* largest, int* last) {
  launch(4, 100, 0, &counts, total, sum, largest, last);
}

// out[step][thread]: whether thread `step` of the block exists.
__global__ void block_votes(int* out, int steps) {
  for (int step = 0; step < steps; ++step) {
    out[step * blockDim.x + threadIdx.x] = __syncthreads_or(static_cast<int>(threadIdx.x) == step);
  }
}

CUDA_ON_HOST_EXPORT void block_vote(int* out, int64_t threads, int64_t steps) {
  launch(1, threads, 0, &block_votes, out, static_cast<int>(steps));
}

// Each thread reads its neighbour's word; without the barrier that is a race.
__global__ void neighbours(int* out, bool barrier) {
  __shared__ int words[64];
  const int t = threadIdx.x;
  words[t] = t;
  if (barrier) {
    __syncthreads();
  }
  out[t] = words[(t + 1) % 64];
}

CUDA_ON_HOST_EXPORT void read_neighbour(int* out, int64_t barrier) { launch(1, 64, 0, &neighbours, out, barrier != 0); }

enum Mistake { kSomeLeave, kTwoBarriers, kBarrierAndWarp, kAbsentSource, kForeignMask, kTwoCollectives };

__global__ void mistakes(Mistake mistake) {
  const int t = threadIdx.x;
  switch (mistake) {
    case kSomeLeave:
      if (t != 5) {
        __syncthreads();
      }
      break;
    case kTwoBarriers:
      if (t < 32) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case kBarrierAndWarp:
      if (t == 7) {
        __syncwarp();
      } else {
        __syncthreads();
      }
      break;
    case kAbsentSource:
      if (t < 32) {
        __shfl_sync(0x0000000F, t, 9);
      }
      break;
    case kForeignMask:
      __syncwarp(0x0000FFFF);
      break;
    case kTwoCollectives:
      if (t % 2) {
        __ballot_sync(0xFFFFFFFF, 1);
      } else {
        __syncwarp();
      }
      break;
  }
}

CUDA_ON_HOST_EXPORT void make_mistake(int64_t mistake) {
  launch(dim3(2, 2), 64, 0, &mistakes, static_cast<Mistake>(mistake));
}

CUDA_ON_HOST_EXPORT void launch_shape(int64_t blocks, int64_t threads, int64_t shared_bytes) {
  launch(blocks, threads, shared_bytes, &overrun);
}
