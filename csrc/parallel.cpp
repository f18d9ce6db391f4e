#include "parallel.h"

#include <atomic>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#define FMREC_FORKS 1
#endif

namespace fmrec {

namespace {
std::atomic<bool> forked{false};
}

bool in_forked_child() { return forked.load(std::memory_order_relaxed); }

void watch_forks() {
#ifdef FMREC_FORKS
    pthread_atfork(nullptr, nullptr, [] { forked.store(true, std::memory_order_relaxed); });
#endif
}

}  // namespace fmrec
