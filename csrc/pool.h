// A small thread pool for work that takes microseconds.
#pragma once

#include <cstdint>

namespace fewbit {

// Threads that take part in a call, the caller included; at least 1. They start at the next call, and where the system
// grants fewer, `threads` says how many from then on.
void set_threads(int n);
int threads();

using TaskFunction = void (*)(void *context, int64_t index);

// Calls fn(context, i) for i in [0, tasks) and returns when all are done. Tasks must be independent and not throw.
// When another thread is using the pool, the caller does its tasks alone.
void run_tasks(int64_t tasks, TaskFunction fn, void *context);

template <class F>
void parallel_for(int64_t tasks, const F &body) {
    if (tasks == 1) return body(int64_t{0});
    run_tasks(tasks, [](void *context, int64_t i) { (*static_cast<const F *>(context))(i); },
              const_cast<F *>(&body));
}

}  // namespace fewbit
