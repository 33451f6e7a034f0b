// How is work shared between threads? A few pieces at a time, so that a thread which the machine holds up does less.
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

// Calls `work(first, last)` for pieces of [0, count), each `step` long but for the last.
template <class Work>
void share(int64_t count, int64_t step, int threads, const Work& work) {
  threads = int(std::max<int64_t>(1, std::min<int64_t>(threads, (count + step - 1) / step)));
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    for (int64_t first; (first = next.fetch_add(step)) < count;) work(first, std::min(first + step, count));
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

}  // namespace gmask
