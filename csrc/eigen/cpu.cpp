#include "common/kernels_ran.h"
#include "common/vector_width.h"
#include "eigen/eigen.h"
#include "eigen/jacobi.h"
#include "eigen/tridiagonal.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

namespace growkernels::eigen {
namespace {

// What torch hands over and takes back: [n, m, m] matrices, [n, k] values, [n, k, m] vectors.
template <typename T>
struct Matrices {
  const T* a;
  T* values;
  T* vectors;
  int64_t m, k;
};

// values and vectors of one matrix, smallest first; NaN throughout where it is not finite.
template <typename T>
void store_ascending(const double* a, const double* rows, int64_t lanes, int64_t m, T* values, T* vectors,
                     std::vector<int64_t>& order) {
  bool finite = true;
  for (int64_t i = 0; i < m; ++i) {
    order[i] = i;
    finite = finite && std::isfinite(a[lower(i, i) * lanes]);
  }
  if (!finite) {
    std::fill_n(values, m, std::numeric_limits<T>::quiet_NaN());
    std::fill_n(vectors, m * m, std::numeric_limits<T>::quiet_NaN());
    return;
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return a[lower(i, i) * lanes] < a[lower(j, j) * lanes]; });
  for (int64_t i = 0; i < m; ++i) {
    values[i] = static_cast<T>(a[lower(order[i], order[i]) * lanes]);
    for (int64_t r = 0; r < m; ++r) {
      vectors[i * m + r] = static_cast<T>(rows[(order[i] * m + r) * lanes]);
    }
  }
}

// The lower triangles of `used` matrices, one in each lane; lanes to spare repeat the last.
template <typename T>
void take_triangles(const T* matrices, int64_t used, int64_t lanes, int64_t m, double* a) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const T* row = matrices + (std::min(lane, used - 1) * m + i) * m;
      for (int64_t j = 0; j <= i; ++j) {
        a[lower(i, j) * lanes + lane] = static_cast<double>(row[j]);
      }
    }
  }
}

template <typename T>
struct EigenLoop {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const Matrices<T>* all, int64_t begin, int64_t end) {
    constexpr int64_t lanes = bytes / sizeof(double);
    using V = Vector<double, bytes>;
    const int64_t m = all->m, triangle = lower(m, 0);
    std::vector<double> a(triangle * lanes), rows(m * m * lanes);
    std::vector<int64_t> order(m);
    for (int64_t first = begin; first < end; first += lanes) {
      const int64_t used = std::min(lanes, end - first);
      take_triangles(all->a + first * m * m, used, lanes, m, a.data());
      jacobi_eigenpairs(reinterpret_cast<V*>(a.data()), reinterpret_cast<V*>(rows.data()), m);
      for (int64_t lane = 0; lane < used; ++lane) {
        store_ascending(a.data() + lane, rows.data() + lane, lanes, m, all->values + (first + lane) * m,
                        all->vectors + (first + lane) * m * m, order);
      }
    }
  }
};

template <typename T>
struct SmallestLoop {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(const Matrices<T>* all, int64_t begin, int64_t end) {
    constexpr int64_t lanes = bytes / sizeof(double);
    using V = Vector<double, bytes>;
    const int64_t m = all->m, k = all->k, triangle = lower(m, 0);
    std::vector<double> memory((triangle + tridiagonal_scratch(m)) * lanes), found(k * (m + 1) * lanes);
    V *a = reinterpret_cast<V*>(memory.data()), *values = reinterpret_cast<V*>(found.data()), *rows = values + k;
    for (int64_t first = begin; first < end; first += lanes) {
      const int64_t used = std::min(lanes, end - first);
      take_triangles(all->a + first * m * m, used, lanes, m, memory.data());
      V largest{}, finite = V{} + 1.0;
      for (int64_t i = 0; i < triangle; ++i) {
        V size = a[i];
        take_magnitude(size);
        largest = size > largest ? size : largest;
        finite = size <= std::numeric_limits<double>::max() ? finite : V{};
      }
      const V unit = largest > 0 ? largest : V{} + 1.0;
      for (int64_t i = 0; i < triangle; ++i) {
        a[i] /= unit;
      }
      smallest_eigenpairs(a, m, k, values, rows);
      for (int64_t lane = 0; lane < used; ++lane) {
        const double none = std::numeric_limits<double>::quiet_NaN();
        T *value = all->values + (first + lane) * k, *vector = all->vectors + (first + lane) * k * m;
        for (int64_t i = 0; i < k; ++i) {
          value[i] = static_cast<T>(finite[lane] > 0 ? values[i][lane] * unit[lane] : none);
        }
        for (int64_t i = 0; i < k * m; ++i) {
          vector[i] = static_cast<T>(finite[lane] > 0 ? rows[i][lane] : none);
        }
      }
    }
  }
};

// So few of all pairs cost less one by one than all of them by rotations.
bool few(int64_t k, int64_t m) { return 4 * k <= m; }

std::tuple<at::Tensor, at::Tensor> symmetric_eigs(const at::Tensor& a, std::optional<int64_t> pairs) {
  check_matrices(a);
  const int64_t n = a.size(0), m = a.size(1), wanted = check_pairs(a, pairs), k = few(wanted, m) ? wanted : m;
  at::Tensor values = at::empty({n, k}, a.options()), vectors = at::empty({n, k, m}, a.options());
  if (values.numel() == 0) {
    return {values.narrow(1, 0, wanted), vectors.narrow(1, 0, wanted)};
  }
  note(Ran::Portable);
  const at::Tensor matrices = a.contiguous();
  AT_DISPATCH_FLOATING_TYPES(a.scalar_type(), "symmetric_eigs", [&] {
    const Matrices<scalar_t> all{matrices.const_data_ptr<scalar_t>(), values.mutable_data_ptr<scalar_t>(),
                                 vectors.mutable_data_ptr<scalar_t>(), m, k};
    // Some 20 m^3 operations for each matrix, or 2 m^3 for few pairs; a thread should get a hundred thousand.
    const int64_t grain = std::max<int64_t>(8, 8 * (1000 / (m * m * m)));
    at::parallel_for(0, n, grain, [&](int64_t begin, int64_t end) {
      if (k == m) {
        widest<EigenLoop<scalar_t>>(&all, begin, end);
      } else {
        widest<SmallestLoop<scalar_t>>(&all, begin, end);
      }
    });
  });
  if (wanted == k) {
    return {values, vectors};
  }
  return {values.narrow(1, 0, wanted).contiguous(), vectors.narrow(1, 0, wanted).contiguous()};
}

}  // namespace

TORCH_LIBRARY_IMPL(growkernels, CPU, m) { m.impl("symmetric_eigs", &symmetric_eigs); }

}  // namespace growkernels::eigen
