// Splitting work over threads.
//
// OpenMP is used here and nowhere else. The library is compiled with -fopenmp but not linked with
// an OpenMP runtime: its GOMP_* symbols resolve to the runtime that torch has loaded globally, so
// that the process has one thread pool, not two that fight for the cores.
#pragma once

#include <cstdint>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace fmrec {

// fork() copies the calling thread only. libgomp's other threads are then missing from a pool that
// still counts them, and a parallel region would wait for them for ever: a child stays serial.
bool in_forked_child();

// Called once, when the module is loaded.
void watch_forks();

// Calls work(begin, end) on consecutive ranges that cover [0, items). `boundary(t, threads)` is
// the first item of thread t of `threads`. Serial where the work is worth no second thread.
template <typename Boundary, typename Work>
void parallel_ranges(int num_threads, bool worth_it, Boundary boundary, Work work) {
#ifdef _OPENMP
    if (num_threads > 1 && worth_it && !in_forked_child()) {
        // All threads or one: libgomp rebuilds its pool when the size of the team changes.
#pragma omp parallel num_threads(num_threads)
        {
            const std::int64_t threads = omp_get_num_threads(), t = omp_get_thread_num();
            const std::int64_t begin = boundary(t, threads), end = boundary(t + 1, threads);
            if (begin < end) {
                work(begin, end);
            }
        }
        return;
    }
#else
    (void)num_threads;
    (void)worth_it;
#endif
    const std::int64_t begin = boundary(std::int64_t{0}, std::int64_t{1});
    const std::int64_t end = boundary(std::int64_t{1}, std::int64_t{1});
    if (begin < end) {
        work(begin, end);
    }
}

// Equal shares of `items` work items.
template <typename Work>
void parallel_items(int num_threads, std::int64_t items, bool worth_it, Work work) {
    parallel_ranges(
        num_threads, worth_it && items > 1,
        [items](std::int64_t t, std::int64_t threads) { return items * t / threads; }, work);
}

// The first bucket of thread t, where bucket k holds starts[k] .. starts[k + 1]: each thread gets
// about the same number of buckets and members together.
inline std::int64_t balanced(const std::int32_t* starts, std::int64_t buckets, std::int64_t t,
                             std::int64_t threads) {
    if (t == threads) return buckets;
    const std::int64_t wanted = (starts[buckets] + buckets) * t / threads;
    std::int64_t low = 0, high = buckets;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (starts[middle] + middle < wanted) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

}  // namespace fmrec
