// The virtual_grad kernels and their launches as host code; tests/ops/test_virtual_grad_cuda_emulated.py
// calls this.

#include "cuda_on_host.h"

#include "virtual_grad/cuda_run.cuh"

#include <numeric>

using namespace growkernels::virtual_grad;
using growkernels::Activation;
using namespace growkernels::virtual_grad::cuda;

namespace {

int64_t launches = 0;

// Workspaces start as NaN.
struct Host {
  int multiprocessors, shared_bytes;
  std::vector<std::vector<double>> workspaces;

  void* workspace(size_t bytes) { return workspaces.emplace_back(bytes / sizeof(double) + 2, std::nan("")).data(); }
  void launch(void (*kernel)(Table), int blocks, int threads, int shared_bytes, const Table& table) {
    ++launches;
    cuda_on_host::launch(blocks, threads, shared_bytes, kernel, table);
  }
};

template <typename First, typename... Rest>
void run_tile(Run<Host>& run, int64_t tile, TileList<First, Rest...> all) {
  if (tile < 0) {
    run.template run<decltype(all)>();
  } else if (tile == 0) {
    run.template run<TileList<First>>();
  } else if constexpr (sizeof...(Rest) > 0) {
    run_tile(run, tile - 1, TileList<Rest...>{});
  }
}

}  // namespace

// positions: [count, 7] pointers h, g, gradient, strides of h and g, samples, width. tile: an entry of the
// dtype's list, or -1 to let the plan choose.
CUDA_ON_HOST_EXPORT void virtual_grad(const int64_t* positions, int64_t count, int64_t dtype, int64_t tile,
                                      int64_t layer, int64_t activation, double scale, int64_t store, float* norms,
                                      float* second_moments, int64_t second_moments_stride, int64_t multiprocessors) {
  Call call{{},
            {static_cast<Layer>(layer), static_cast<Activation>(activation), scale},
            static_cast<Store>(store),
            norms,
            second_moments,
            second_moments_stride};
  for (int64_t l = 0; l < count; ++l) {
    const int64_t* p = positions + 7 * l;
    call.inputs.push_back({reinterpret_cast<const void*>(p[0]), reinterpret_cast<const void*>(p[1]),
                           reinterpret_cast<void*>(p[2]), p[3], p[4], p[5], static_cast<int>(p[6])});
  }
  Host host{static_cast<int>(multiprocessors), 227 << 10, {}};
  Run<Host> run(call, host);
  launches = 0;
  switch (dtype) {
    case 0:
      return run_tile(run, tile, HalfTiles<BFloat16>{});
    case 1:
      return run_tile(run, tile, HalfTiles<Half>{});
    case 2:
      return run_tile(run, tile, FloatTiles{});
    default:
      return run_tile(run, tile, Tf32Tiles{});
  }
}

// Blocks that multiply so many positions [samples, width] in the widest tiles of bfloat16.
CUDA_ON_HOST_EXPORT void planned_blocks(int64_t count, int64_t samples, int64_t width, int64_t multiprocessors,
                                        int64_t* blocks) {
  const Input one{nullptr, nullptr, nullptr, width, width, samples, static_cast<int>(width)};
  const std::vector<Input> inputs(count, one);
  std::vector<int> chosen(count);
  std::iota(chosen.begin(), chosen.end(), 0);
  *blocks = 0;
  for (const Position& p :
       make_plan(inputs, chosen, shape_of<HalfTile<BFloat16, 128, 384, 64, 64, 1>>(), static_cast<int>(multiprocessors))
           .positions) {
    *blocks += p.tiles * p.splits;
  }
}

CUDA_ON_HOST_EXPORT void launches_of_last_call(int64_t* count) { *count = launches; }

CUDA_ON_HOST_EXPORT void let_copies_arrive(int64_t late) {
  growkernels::cuda::emulation::copies_arrive_late = late != 0;
}

// out[i] = the 16-bit number nearest to x[i].
CUDA_ON_HOST_EXPORT void narrow_all(const float* x, uint16_t* bfloats, uint16_t* halves, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    bfloats[i] = growkernels::cuda::narrow<BFloat16>(x[i]).bits;
    halves[i] = growkernels::cuda::narrow<Half>(x[i]).bits;
  }
}

CUDA_ON_HOST_EXPORT void widen_all(float* bfloats, float* halves) {
  for (int bits = 0; bits < 1 << 16; ++bits) {
    bfloats[bits] = growkernels::cuda::widen(BFloat16{static_cast<uint16_t>(bits)});
    halves[bits] = growkernels::cuda::widen(Half{static_cast<uint16_t>(bits)});
  }
}
