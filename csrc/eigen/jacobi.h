#pragma once
// All eigenpairs of many small symmetric matrices, one matrix in each lane of a vector: cyclic Jacobi
// rotations (Golub and Van Loan, Matrix Computations, section 8.5). No torch here: V may be a vector
// of doubles, or a plain double where one thread owns one matrix.

#include "eigen/constants.h"

#include <cmath>
#include <cstdint>
#include <limits>

namespace growkernels::eigen {

// Element (i, j), i >= j, of a symmetric matrix of which the lower triangle is stored.
inline int64_t lower(int64_t i, int64_t j) { return i * (i + 1) / 2 + j; }

// Functions of vectors work in place: returning one would depend on the caller's instruction set.
template <typename V>
[[gnu::always_inline]] inline void take_square_root(V& x) {
  if constexpr (requires { x[0]; }) {
    for (uint64_t lane = 0; lane < sizeof(V) / sizeof(x[0]); ++lane) {
      x[lane] = std::sqrt(x[lane]);
    }
  } else {
    x = std::sqrt(x);
  }
}

template <typename V>
[[gnu::always_inline]] inline void take_magnitude(V& x) {
  x = x < 0 ? -x : x;
}

template <typename M>
[[gnu::always_inline]] inline bool any(const M& mask) {
  if constexpr (requires { mask[0]; }) {
    auto found = mask[0];
    for (uint64_t lane = 1; lane < sizeof(M) / sizeof(mask[0]); ++lane) {
      found |= mask[lane];
    }
    return found != 0;
  } else {
    return mask;
  }
}

template <typename V>
[[gnu::always_inline]] inline void rotate(V& p, V& q, const V& cosine, const V& sine) {
  const V old = p;
  p = cosine * old - sine * q;
  q = sine * old + cosine * q;
}

// a: the lower triangle of an m x m matrix; its diagonal becomes the eigenvalues, in no order, or NaN
// where the matrix is not finite.
// rows: m x m; row i becomes the unit eigenvector of diagonal element i.
// A lane whose matrix is done, or is not finite, is rotated by the identity while others go on, so
// that no result depends on which matrices share a vector.
template <typename V>
[[gnu::always_inline]] inline void jacobi_eigenpairs(V* a, V* rows, int64_t m) {
  V largest{}, finite = V{} + 1.0;
  for (int64_t i = 0; i < lower(m, 0); ++i) {
    V size = a[i];
    take_magnitude(size);
    largest = size > largest ? size : largest;
    finite = size <= std::numeric_limits<double>::max() ? finite : V{};
  }
  // No rotation touches NaN beside the diagonal: it exceeds nothing.
  const V unless_finite = finite > 0 ? V{} : V{} + std::numeric_limits<double>::quiet_NaN();
  for (int64_t i = 0; i < m; ++i) {
    a[lower(i, i)] += unless_finite;
  }
  for (int64_t i = 0; i < m * m; ++i) {
    rows[i] = V{} + (i % (m + 1) == 0 ? 1.0 : 0.0);
  }
  const V negligible = kJacobiTolerance * largest;
  bool rotated = true;
  for (int sweep = 0; rotated && sweep < kJacobiSweeps; ++sweep) {
    rotated = false;
    for (int64_t p = 1; p < m; ++p) {
      for (int64_t q = 0; q < p; ++q) {
        const V coupling = a[lower(p, q)];
        V size = coupling;
        take_magnitude(size);
        const auto live = size > negligible;
        if (!any(live)) {
          continue;
        }
        rotated = true;
        const V tau = (a[lower(q, q)] - a[lower(p, p)]) / (live ? coupling + coupling : V{} + 1.0);
        V root = 1.0 + tau * tau;
        take_square_root(root);
        const V tangent = live ? (tau < 0 ? 1.0 / (tau - root) : 1.0 / (tau + root)) : V{};
        V secant = 1.0 + tangent * tangent;
        take_square_root(secant);
        const V cosine = 1.0 / secant;
        const V sine = tangent * cosine;
        a[lower(p, p)] -= tangent * coupling;
        a[lower(q, q)] += tangent * coupling;
        a[lower(p, q)] = live ? V{} : coupling;
        for (int64_t r = 0; r < q; ++r) {
          rotate(a[lower(p, r)], a[lower(q, r)], cosine, sine);
        }
        for (int64_t r = q + 1; r < p; ++r) {
          rotate(a[lower(p, r)], a[lower(r, q)], cosine, sine);
        }
        for (int64_t r = p + 1; r < m; ++r) {
          rotate(a[lower(r, p)], a[lower(r, q)], cosine, sine);
        }
        for (int64_t r = 0; r < m; ++r) {
          rotate(rows[p * m + r], rows[q * m + r], cosine, sine);
        }
      }
    }
  }
}

}  // namespace growkernels::eigen
