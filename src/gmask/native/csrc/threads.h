// How is work shared between threads? Pieces of what is left, each smaller than the one before: a thread which the machine
// holds up does less, all end together, and memory is read in long runs.
// Which thread does a piece changes nothing in it. With OpenMP the threads are those that PyTorch's own operations have
// just used.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gmask {

// The bytes that a thread should have to read before it is worth being told.
constexpr int64_t kWorthAThread = int64_t(128) << 10;

// Calls `work(first, last)` for pieces of [0, count), each a multiple of `step` long but for the last.
template <class Work>
void share(int64_t count, int64_t step, int threads, const Work& work) {
  const int64_t steps = (count + step - 1) / step;
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, steps)));
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    for (int64_t first = next.load(); first < steps;) {
      const int64_t last = first + std::max<int64_t>(1, (steps - first) / (4 * threads));
      if (!next.compare_exchange_weak(first, last)) continue;
      work(first * step, std::min(last * step, count));
      first = next.load();
    }
  };
  if (threads == 1) return take();
#ifdef _OPENMP
#pragma omp parallel num_threads(threads)
  take();
#else
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(take);
  take();
  for (std::thread& other : others) other.join();
#endif
}

// Calls `work(index)` for each of [0, count).
template <class Work>
void share_each(int64_t count, int threads, const Work& work) {
  share(count, 1, threads, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) work(index);
  });
}

}  // namespace gmask
