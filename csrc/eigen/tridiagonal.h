#pragma once
// The k smallest eigenpairs of many symmetric matrices, one matrix in each lane of a vector: Householder's
// tridiagonal form, bisection by Sturm counts, inverse iteration (Golub and Van Loan, Matrix Computations,
// sections 8.3 and 8.4; Barth, Martin and Wilkinson, 1967). Bisection counts: no eigenvalue can be passed over.
// Elements are at most 1 in size. No torch here.

#include "eigen/jacobi.h"

#include <cstdint>

namespace growkernels::eigen {

// Halvings of an interval of at most 2 m to 2^-52 and less.
inline constexpr int kBisections = 64;
// One from a random start suffices but for bad luck.
inline constexpr int kInverseIterations = 3;

// What one solve needs, each element a vector of V; `rows` are m of m elements for k = m.
template <typename V>
struct Tridiagonal {
  int64_t m;
  V* a;         // lower triangle; becomes the reflections, without their first elements
  V* diagonal;  // m
  V* beside;    // m; element i couples i and i + 1, the last is zero
  V* heads;     // m; the reflections' first elements
  V* factors;   // m; a reflection is 1 - factor v v^T
  V* scratch;   // 5 m
};

// Leaves T in diagonal and beside, and in `a` what Q^T A Q = T is made of.
template <typename V>
[[gnu::always_inline]] inline void to_tridiagonal(const Tridiagonal<V>& t) {
  const int64_t m = t.m;
  V *v = t.scratch, *p = t.scratch + m;
  for (int64_t j = 0; j + 2 < m; ++j) {
    V square{};
    for (int64_t i = j + 1; i < m; ++i) {
      v[i] = t.a[lower(i, j)];
      p[i] = V{};
      square += v[i] * v[i];
    }
    V length = square;
    take_square_root(length);
    const V first = v[j + 1];
    const V head = first < 0 ? first - length : first + length;
    const V factor = length > 0 ? 1.0 / (length * (first < 0 ? length - first : length + first)) : V{};
    v[j + 1] = head;
    t.heads[j] = head;
    t.factors[j] = factor;
    t.beside[j] = first < 0 ? length : -length;
    // p = factor A v from the lower triangle alone.
    for (int64_t i = j + 1; i < m; ++i) {
      const V* row = t.a + lower(i, 0);
      const V mine = v[i];
      V sum{};
      for (int64_t c = j + 1; c < i; ++c) {
        sum += row[c] * v[c];
        p[c] += row[c] * mine;
      }
      p[i] += sum + row[i] * mine;
    }
    V along{};
    for (int64_t i = j + 1; i < m; ++i) {
      p[i] *= factor;
      along += p[i] * v[i];
    }
    along *= 0.5 * factor;
    for (int64_t i = j + 1; i < m; ++i) {
      p[i] -= along * v[i];
    }
    for (int64_t i = j + 1; i < m; ++i) {
      V* row = t.a + lower(i, 0);
      const V mine = v[i], other = p[i];
      for (int64_t c = j + 1; c <= i; ++c) {
        row[c] -= mine * p[c] + other * v[c];
      }
    }
  }
  for (int64_t i = 0; i < m; ++i) {
    t.diagonal[i] = t.a[lower(i, i)];
  }
  t.beside[m - 1] = V{};
  if (m > 1) {
    t.beside[m - 2] = t.a[lower(m - 1, m - 2)];
  }
}

// Eigenvalue `index`, counted from the smallest.
template <typename V>
[[gnu::always_inline]] inline void bisect(const Tridiagonal<V>& t, int64_t index, V& value) {
  constexpr double pivot = 0x1p-960;
  V low = t.diagonal[0], high = t.diagonal[0], above{};
  for (int64_t i = 0; i < t.m; ++i) {
    V size = t.beside[i];
    take_magnitude(size);
    const V radius = size + above, bottom = t.diagonal[i] - radius, top = t.diagonal[i] + radius;
    low = bottom < low ? bottom : low;
    high = top > high ? top : high;
    above = size;
  }
  for (int step = 0; step < kBisections; ++step) {
    const V middle = 0.5 * (low + high);
    V ratio = t.diagonal[0] - middle, smaller{};
    for (int64_t i = 0;; ++i) {
      V size = ratio;
      take_magnitude(size);
      ratio = size < pivot ? V{} - pivot : ratio;
      smaller += ratio < 0 ? V{} + 1.0 : V{};
      if (i + 1 == t.m) {
        break;
      }
      ratio = t.diagonal[i + 1] - middle - t.beside[i] * t.beside[i] / ratio;
    }
    const auto beyond = smaller > static_cast<double>(index);
    high = beyond ? middle : high;
    low = beyond ? low : middle;
  }
  value = 0.5 * (low + high);
}

// Takes from x its components along the `count` unit rows, and makes it one of them.
template <typename V>
[[gnu::always_inline]] inline void orthonormalise(const V* rows, int64_t count, V* x, int64_t m) {
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t row = 0; row < count; ++row) {
      const V* other = rows + row * m;
      V share{};
      for (int64_t i = 0; i < m; ++i) {
        share += other[i] * x[i];
      }
      for (int64_t i = 0; i < m; ++i) {
        x[i] -= share * other[i];
      }
    }
    V largest{};
    for (int64_t i = 0; i < m; ++i) {
      V size = x[i];
      take_magnitude(size);
      largest = size > largest ? size : largest;
    }
    const V unit = largest > 0 ? 1.0 / largest : V{};
    V square{};
    for (int64_t i = 0; i < m; ++i) {
      x[i] *= unit;
      square += x[i] * x[i];
    }
    V length = square;
    take_square_root(length);
    for (int64_t i = 0; i < m; ++i) {
      x[i] /= length;
    }
  }
}

// Row `index` of `rows` becomes the eigenvector of T for `value`, orthogonal to the rows before.
template <typename V>
[[gnu::always_inline]] inline void inverse_iteration(const Tridiagonal<V>& t, const V& value, int64_t index, V* rows) {
  constexpr double smallest = 0x1p-52;
  const int64_t m = t.m;
  // Of each row of the triangular factor its diagonal and the two elements after it; the multiplier, and whether the
  // row was exchanged with the next.
  V *pivots = t.scratch, *second = pivots + m, *third = second + m, *multipliers = third + m,
    *exchanged = multipliers + m, *x = rows + index * m;
  V pivot = t.diagonal[0] - value, beside = t.beside[0];
  for (int64_t i = 0; i < m; ++i) {
    const V coupling = t.beside[i], below = i + 1 < m ? t.diagonal[i + 1] - value : V{},
            after = i + 1 < m ? t.beside[i + 1] : V{};
    V size = pivot, other = coupling;
    take_magnitude(size);
    take_magnitude(other);
    const auto exchange = other > size;
    const V safe = size < smallest ? V{} + smallest : pivot;
    pivots[i] = exchange ? coupling : safe;
    second[i] = exchange ? below : beside;
    third[i] = exchange ? after : V{};
    multipliers[i] = (exchange ? pivot : coupling) / pivots[i];
    exchanged[i] = exchange ? V{} + 1.0 : V{};
    pivot = exchange ? beside - multipliers[i] * below : below - multipliers[i] * beside;
    beside = exchange ? V{} - multipliers[i] * after : after;
  }
  uint64_t state = 0x9e3779b97f4a7c15 + static_cast<uint64_t>(index);
  for (int64_t i = 0; i < m; ++i) {
    state = state * 6364136223846793005 + 1442695040888963407;
    x[i] = V{} + (static_cast<double>(state >> 11) * 0x1p-52 - 1.0);
  }
  for (int step = 0; step < kInverseIterations; ++step) {
    for (int64_t i = 0; i + 1 < m; ++i) {
      const auto exchange = exchanged[i] > 0;
      const V first = exchange ? x[i + 1] : x[i], next = exchange ? x[i] : x[i + 1];
      x[i] = first;
      x[i + 1] = next - multipliers[i] * first;
    }
    V next{}, after{};
    for (int64_t i = m - 1; i >= 0; --i) {
      x[i] = (x[i] - second[i] * next - third[i] * after) / pivots[i];
      after = next;
      next = x[i];
    }
    orthonormalise(rows, index, x, m);
  }
}

// From an eigenvector of T to one of A.
template <typename V>
[[gnu::always_inline]] inline void reflect_back(const Tridiagonal<V>& t, V* x) {
  for (int64_t j = t.m - 3; j >= 0; --j) {
    V share = t.heads[j] * x[j + 1];
    for (int64_t i = j + 2; i < t.m; ++i) {
      share += t.a[lower(i, j)] * x[i];
    }
    share *= t.factors[j];
    x[j + 1] -= share * t.heads[j];
    for (int64_t i = j + 2; i < t.m; ++i) {
      x[i] -= share * t.a[lower(i, j)];
    }
  }
}

// Elements beside the lower triangle that a solve needs.
inline int64_t tridiagonal_scratch(int64_t m) { return 9 * m; }

// a: the lower triangle of an m x m matrix, with room for the scratch behind it. values: k; rows: k of m elements.
template <typename V>
[[gnu::always_inline]] inline void smallest_eigenpairs(V* a, int64_t m, int64_t k, V* values, V* rows) {
  V* rest = a + lower(m, 0);
  const Tridiagonal<V> t = {m, a, rest, rest + m, rest + 2 * m, rest + 3 * m, rest + 4 * m};
  to_tridiagonal(t);
  for (int64_t index = 0; index < k; ++index) {
    bisect(t, index, values[index]);
    inverse_iteration(t, values[index], index, rows);
  }
  for (int64_t index = 0; index < k; ++index) {
    reflect_back(t, rows + index * t.m);
  }
}

}  // namespace growkernels::eigen
