#pragma once
// Which inputs an output of a convolution sees along one axis, forward or from the output's gradient to the input's.

#include <algorithm>
#include <cstdint>
#include <vector>

namespace growkernels::convolution {

struct Sliding {
  int64_t kernel, stride, padding, dilation;
};

// Output phase + classes * j sees the input j * step + start through a tap of its phase.
struct AxisMap {
  struct Tap {
    int64_t index, start;
  };

  int64_t in, out, classes, step;
  std::vector<std::vector<Tap>> taps;  // of each phase; those that see no input at all are left out

  int64_t count(int64_t phase) const { return phase < out ? (out - phase + classes - 1) / classes : 0; }
  bool sees(const Tap& tap, int64_t j) const {
    const int64_t i = j * step + tap.start;
    return i >= 0 && i < in;
  }
  // Whether any of the outputs [first, last] of a phase sees the input through the tap.
  bool any_sees(const Tap& tap, int64_t first, int64_t last) const {
    return last * step + tap.start >= 0 && first * step + tap.start < in && (step == 1 || some(tap, first, last));
  }

 private:
  bool some(const Tap& tap, int64_t first, int64_t last) const {
    for (int64_t j = first; j <= last; ++j) {
      if (sees(tap, j)) {
        return true;
      }
    }
    return false;
  }
};

inline void add_tap(AxisMap& map, int64_t phase, AxisMap::Tap tap) {
  const int64_t count = map.count(phase);
  if (count > 0 && map.any_sees(tap, 0, count - 1)) {
    map.taps[phase].push_back(tap);
  }
}

// From an input of `in` pixels to an output of `out`.
inline AxisMap forward_map(const Sliding& s, int64_t in, int64_t out) {
  AxisMap map{in, out, 1, s.stride, std::vector<std::vector<AxisMap::Tap>>(1)};
  for (int64_t k = 0; k < s.kernel; ++k) {
    add_tap(map, 0, {k, k * s.dilation - s.padding});
  }
  return map;
}

// From the gradient of that output to that of the input.
inline AxisMap gradient_map(const Sliding& s, int64_t in, int64_t out) {
  AxisMap map{out, in, s.stride, 1, std::vector<std::vector<AxisMap::Tap>>(s.stride)};
  for (int64_t phase = 0; phase < s.stride; ++phase) {
    for (int64_t k = 0; k < s.kernel; ++k) {
      const int64_t distance = phase + s.padding - k * s.dilation;
      if (distance % s.stride == 0) {
        add_tap(map, phase, {k, distance / s.stride});
      }
    }
  }
  return map;
}

// Where the inputs along an axis are packed: outputs of one phase that follow each other see neighbours.
struct PackedAxis {
  int64_t lowest = 0, pitch = 0, step = 1, count = 0;

  PackedAxis() = default;
  explicit PackedAxis(const AxisMap& map) : step(map.step) {
    bool any = false;
    int64_t end = 0;
    for (int64_t phase = 0; phase < map.classes; ++phase) {
      for (const AxisMap::Tap& tap : map.taps[phase]) {
        const int64_t last = (map.count(phase) - 1) * step + tap.start + 1;
        lowest = any ? std::min(lowest, tap.start) : tap.start;
        end = any ? std::max(end, last) : last;
        any = true;
      }
    }
    pitch = (end - lowest + step - 1) / step;
    count = pitch * step;
  }
  // Of the input i; of consecutive outputs' inputs i, i + step, ... consecutive places.
  int64_t place(int64_t i) const { return (i - lowest) % step * pitch + (i - lowest) / step; }
  int64_t input(int64_t place) const { return place / pitch + place % pitch * step + lowest; }
};

}  // namespace growkernels::convolution
