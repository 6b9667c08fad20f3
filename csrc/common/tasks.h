// Unequal tasks on all threads.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "common/stream.h"

namespace astrobiogen {

// Runs work(task, scratch) for tasks 0 .. count - 1, `scratch` being what `make_scratch()` gave the thread. A thread
// that is free takes the next task: tasks differ in size and cores in load. A result must not depend on who computed
// it.
template <class MakeScratch, class Work>
void run_tasks(int64_t count, const MakeScratch& make_scratch, const Work& work) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    auto scratch = make_scratch();
    for (int64_t task = next.fetch_add(1); task < count; task = next.fetch_add(1)) work(task, scratch);
    simd::stream_fence();
  });
}

}  // namespace astrobiogen
