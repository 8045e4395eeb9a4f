#pragma once
// y_i = sum_m w[m, i] (x_m . v_i) x_m for all neurons i, k vectors v each. A block of rows X is held in
// L2 while it meets the vectors, one tile of them after the other:
//   P = X V^T,   P *= W,   Y += P^T X,
// so that the product P lives in cache and x is loaded once for both. A tile holds the first vectors of its
// neurons, then their second ones and so on, each lot of which meets the same weights. The second product takes P as
// the first left it (portable_transposed_tile); bfloat16 tiles want it transposed, which the multiplication by W does
// on the way.
//
// Threads take items (neurons, range of rows) from one queue.

#include "common/gemm_tile.h"
#include "common/work_queue.h"
#include "splitting/cpu_load.h"

namespace growkernels::splitting {

// P[m, i] *= W[m, i].
template <typename In, typename Acc>
struct ApplyWeights {
  template <int bytes>
  [[gnu::always_inline]] static inline void run(Acc* p, int64_t p_stride, int64_t rows, int64_t neurons, Rows<In> w) {
    for (int64_t m = 0; m < rows; ++m) {
      for (int64_t i = 0; i < neurons; ++i) {
        p[m * p_stride + i] *= cast<Acc>(w.data[m * w.stride + i]);
      }
    }
  }
};

// P[m, i] W[m, i], rounded to bfloat16.
template <typename In>
struct Weighted {
  using Element = float;
  using Out = at::BFloat16;
  const float* p;
  int64_t p_stride;
  Rows<In> w;
  [[gnu::always_inline]] inline float operator()(int64_t m, int64_t i) const {
    return p[m * p_stride + i] * cast<float>(w.data[m * w.stride + i]);
  }
  [[gnu::always_inline]] static inline at::BFloat16 out(float x) {
    return at::BFloat16(static_cast<uint16_t>(bfloat16_bits(x)), at::BFloat16::from_bits());
  }
};

// In: dtype of the tensors. Operand: dtype that tiles are multiplied in.
template <typename In, typename Operand>
class Kernel {
  using Acc = accumulate_t<In>;
  static constexpr bool interleaved = std::is_same_v<Operand, at::BFloat16>;
  static constexpr bool sums_in_place = std::is_same_v<In, Acc>;

 public:
  // y: [n, k, width] contiguous.
  Kernel(const Problem& problem, In* y)
      : problem_(problem),
        k_(problem.vectors_per_neuron()),
        width_(problem.width()),
        y_(y),
        plan_(make_plan(problem)),
        sums_(plan_.ranges.size()) {
    for (const Range& range : plan_.ranges) {
      sums_.add(range.items, elements_of(range));
    }
    sums_.begin();
  }

  void run() {
    take_from_queue(
        plan_.items, plan_.parallel, [&] { return Worker(problem_); },
        [&](const Item& item, Worker& worker) { run_item(item, worker); });
  }

 private:
  struct Worker {
    explicit Worker(const Problem& problem) : loader(problem) {}
    ~Worker() {
      if constexpr (interleaved) {
        release_bfloat16_tiles();
      }
    }
    Loader<In, Operand> loader;
    Scratch<In> ordered;
    Scratch<Operand> vectors, weighted, interleaved_rows;
    Scratch<Acc> transposed, products, sums;
  };

  int64_t elements_of(const Range& range) const { return (range.end - range.begin) * k_ * width_; }

  void run_item(const Item& item, Worker& worker) {
    const Range& range = plan_.ranges[item.range];
    const int64_t elements = elements_of(range);
    In* y = y_ + range.begin * k_ * width_;
    Acc* const part = sums_.part(item.range, item.index);
    Acc* sums = part;
    if constexpr (sums_in_place) {
      sums = part != nullptr ? part : y;
    } else {
      sums = part != nullptr ? part : worker.sums.at_least(elements);
    }
    sum_products(item, range, worker, sums);
    if (!sums_.complete(item.range)) {
      return;
    }
    if (part != nullptr) {
      sums = sums_.part(item.range, 0);
    }
    if constexpr (sums_in_place) {
      if (sums != y) {
        std::copy_n(sums, elements, y);
      }
    } else {
      std::transform(sums, sums + elements, y, [](Acc sum) { return static_cast<In>(sum); });
    }
  }

  void sum_products(const Item& item, const Range& range, Worker& worker, Acc* sums) {
    const Operand* vectors = pack_vectors(range, worker);
    for (int64_t m = item.begin; m < item.end; m += plan_.rows_per_block) {
      const int64_t count = std::min(plan_.rows_per_block, item.end - m);
      const Rows<Operand> x = worker.loader.rows(m, count, depth_);
      Rows<Operand> right = x;  // operand of the second product
      if constexpr (interleaved) {
        const int64_t depth = padded_depth<Operand>(count);
        Operand* pairs = worker.interleaved_rows.at_least(depth * width_);
        widest<InterleaveRows<Operand>>(x.data, x.stride, count, depth, width_, pairs);
        right = {pairs, width_};
      }
      for (int64_t i = range.begin; i < range.end; i += plan_.neurons_per_tile) {
        const int64_t neurons = std::min(plan_.neurons_per_tile, range.end - i), columns = neurons * k_;
        const int64_t offset = (i - range.begin) * k_;
        Acc* products = worker.products.at_least(count * columns);
        for (int64_t c = 0; c < depth_; c += plan_.columns_per_chunk) {
          const int64_t depth = std::min(plan_.columns_per_chunk, depth_ - c);
          multiply_tile(count, columns, depth, x.data + c, x.stride, vectors + offset * depth_ + c * columns, columns,
                        products, columns, c > 0);
        }
        add_products(products, count, neurons, worker.loader.weights(m, count, i, neurons), right, worker,
                     sums + offset * width_, m > item.begin);
      }
    }
  }

  // sums (+)= (P * W)^T X, one vector of every neuron after the other.
  void add_products(Acc* products, int64_t count, int64_t neurons, Rows<In> weights, Rows<Operand> x, Worker& worker,
                    Acc* sums, bool accumulate) {
    const int64_t columns = neurons * k_;
    for (int64_t q = 0; q < k_; ++q) {
      Acc* const part = products + q * neurons;
      if constexpr (interleaved) {
        const int64_t depth = padded_depth<Operand>(count);
        Operand* weighted = worker.weighted.at_least(neurons * depth);
        using Source = Weighted<In>;
        widest<Transpose<Source>>(Source{part, columns, weights}, count, depth, neurons, weighted);
        multiply_tile(neurons, width_, depth, weighted, depth, x.data, x.stride, sums + q * width_, k_ * width_,
                      accumulate);
      } else {
        widest<ApplyWeights<In, Acc>>(part, columns, count, neurons, weights);
        portable_transposed_tile(neurons, width_, count, part, columns, x.data, x.stride, sums + q * width_,
                                 k_ * width_, accumulate);
      }
    }
  }

  // The vectors of a range as right-hand operands of the first product, tile after tile: V^T, its rows
  // in interleaved pairs for bfloat16.
  const Operand* pack_vectors(const Range& range, Worker& worker) {
    Operand* packed = worker.vectors.at_least((range.end - range.begin) * k_ * depth_);
    Operand* target = packed;
    for (int64_t i = range.begin; i < range.end; i += plan_.neurons_per_tile) {
      const int64_t columns = std::min(plan_.neurons_per_tile, range.end - i) * k_;
      const In* v = in_order(problem_.v.const_data_ptr<In>() + i * k_ * width_, columns / k_, worker);
      if constexpr (interleaved) {
        Acc* transposed = worker.transposed.at_least(columns * width_);
        load_block(v, 1, width_, width_, columns, transposed, columns);
        widest<InterleaveRows<Acc>>(static_cast<const Acc*>(transposed), columns, width_, depth_, columns, target);
      } else {
        load_block(v, 1, width_, width_, columns, target, columns);
      }
      target += columns * depth_;
    }
    return packed;
  }

  // [neurons, k, width] as [k, neurons, width].
  const In* in_order(const In* v, int64_t neurons, Worker& worker) {
    if (k_ == 1) {
      return v;
    }
    In* ordered = worker.ordered.at_least(neurons * k_ * width_);
    for (int64_t i = 0; i < neurons; ++i) {
      for (int64_t q = 0; q < k_; ++q) {
        std::copy_n(v + (i * k_ + q) * width_, width_, ordered + (q * neurons + i) * width_);
      }
    }
    return ordered;
  }

  const Problem& problem_;
  const int64_t k_, width_;
  const int64_t depth_ = padded_depth<Operand>(width_);  // of the first product
  In* const y_;
  const Plan plan_;
  OrderedSums<Acc> sums_;  // one for every range
};

// Compiled in files of their own, by width of the tensors' elements. y: [n, k, width] contiguous.
void run_wide_kernel(const Problem& problem, const at::Tensor& y);
void run_16_bit_kernel(const Problem& problem, const at::Tensor& y);
void run_rounded_kernel(const Problem& problem, const at::Tensor& y);  // float32 by bfloat16 tiles

}  // namespace growkernels::splitting
