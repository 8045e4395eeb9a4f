#pragma once
// Items of work that threads take from one queue, and sums that several items contribute to. What items add up to
// one sum is kept apart until the last of them is done, and then added in the items' order by whichever thread that
// was: results do not depend on the schedule.

#include "common/scratch.h"
#include "common/vector_width.h"

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace growkernels {

// run(item, worker) for all items. Every thread has a worker of its own, which make_worker() returns.
template <typename Item, typename MakeWorker, typename Run>
void take_from_queue(const std::vector<Item>& items, bool parallel, const MakeWorker& make_worker, const Run& run) {
  const int64_t workers = parallel ? at::get_num_threads() : 1;
  std::atomic<size_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      auto worker = make_worker();
      for (size_t i = next++; i < items.size(); i = next++) {
        run(items[i], worker);
      }
    }
  });
}

template <typename Acc>
class OrderedSums {
 public:
  explicit OrderedSums(size_t sums) { sums_.reserve(sums); }

  // Sums are numbered in the order in which they are added; `items` contribute to this one.
  void add(int64_t items, int64_t elements) {
    sums_.push_back({items, elements, elements_});
    elements_ += items > 1 ? items * elements : 0;
  }

  // Once all are added.
  void begin() {
    unfinished_ = std::make_unique<std::atomic<int64_t>[]>(sums_.size());
    for (size_t s = 0; s < sums_.size(); ++s) {
      unfinished_[s] = sums_[s].items;
    }
    memory_ = scratch_.at_least(elements_);
  }

  // Where an item of this sum puts its part: in memory of its own, or where the caller likes (null) if it is the
  // sum's only one.
  Acc* part(int64_t sum, int64_t item) const {
    const Sum& s = sums_[sum];
    return s.items > 1 ? memory_ + s.first + item * s.elements : nullptr;
  }

  // To be called after every item. Whether it was the sum's last: then part(sum, 0) has become the sum.
  bool complete(int64_t sum) {
    if (--unfinished_[sum] > 0) {
      return false;
    }
    const Sum& s = sums_[sum];
    for (int64_t item = 1; item < s.items; ++item) {
      widest<AddTo>(part(sum, 0), static_cast<const Acc*>(part(sum, item)), s.elements);
    }
    return true;
  }

 private:
  struct Sum {
    int64_t items, elements, first;
  };

  struct AddTo {
    template <int bytes>
    [[gnu::always_inline]] static inline void run(Acc* sums, const Acc* more, int64_t count) {
      for (int64_t e = 0; e < count; ++e) {
        sums[e] += more[e];
      }
    }
  };

  std::vector<Sum> sums_;
  std::unique_ptr<std::atomic<int64_t>[]> unfinished_;
  Scratch<Acc> scratch_;
  Acc* memory_ = nullptr;
  int64_t elements_ = 0;
};

}  // namespace growkernels
