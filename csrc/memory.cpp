#include "memory.h"

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fmrec {

namespace {

// In front of the floats, and as large as their alignment.
struct Header {
    std::size_t kept_as;  // the size that it is kept under, or 0
};
constexpr std::size_t FRONT = 64, HUGE_PAGE = std::size_t{1} << 21;

// Sizes that are kept, in bytes, and how much of them at most. Under AddressSanitizer none, so that
// it sees what is written beyond an array and what is read of one that is gone.
#if defined(__SANITIZE_ADDRESS__)
constexpr std::size_t LEAST = SIZE_MAX, MOST = 0;
#else
constexpr std::size_t LEAST = std::size_t{1} << 16, MOST = std::size_t{1} << 27;
#endif
constexpr std::size_t ALL = std::size_t{1} << 30;

// Whoever finds it locked does without: after a fork, nobody may be there to unlock it.
struct Kept {
    std::mutex mutex;
    std::multimap<std::size_t, void*> memory;
    std::size_t bytes = 0;
};

Kept& kept() {
    static Kept* const one = new Kept;  // outlives every array
    return *one;
}

// Sizes in steps of an eighth, so that batches of about one size share memory.
std::size_t rounded(std::size_t bytes) {
    std::size_t step = LEAST / 8;
    while (step * 16 <= bytes) step *= 2;
    return (bytes + step - 1) / step * step;
}

std::size_t release(Kept& all) {
    const std::size_t bytes = all.bytes;
    for (const auto& entry : all.memory) std::free(entry.second);
    all.memory.clear();
    all.bytes = 0;
    return bytes;
}

}  // namespace

float* take_floats(std::int64_t count) {
    std::size_t bytes = static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(float) + FRONT;
    const bool keep = bytes >= LEAST && bytes <= MOST;
    void* memory = nullptr;
    if (keep) {
        bytes = rounded(bytes);
        const std::unique_lock<std::mutex> lock(kept().mutex, std::try_to_lock);
        if (lock) {
            const auto found = kept().memory.find(bytes);
            if (found != kept().memory.end()) {
                memory = found->second;
                kept().memory.erase(found);
                kept().bytes -= bytes;
            }
        }
    }
    if (!memory) {
        const std::size_t alignment = keep && bytes >= 2 * HUGE_PAGE ? HUGE_PAGE : FRONT;
        if (posix_memalign(&memory, alignment, bytes) != 0) throw std::bad_alloc();
        if (alignment == HUGE_PAGE) {
            prefer_huge_pages(static_cast<float*>(memory), static_cast<std::int64_t>(bytes));
        }
    }
    static_cast<Header*>(memory)->kept_as = keep ? bytes : 0;
    return reinterpret_cast<float*>(static_cast<char*>(memory) + FRONT);
}

void give_floats(float* floats) {
    if (!floats) return;
    void* const memory = reinterpret_cast<char*>(floats) - FRONT;
    const std::size_t bytes = static_cast<Header*>(memory)->kept_as;
    if (bytes > 0) {
        const std::unique_lock<std::mutex> lock(kept().mutex, std::try_to_lock);
        if (lock) {
            // Sizes that nobody asks for any more must not crowd out those in use.
            if (kept().bytes + bytes > ALL) release(kept());
            kept().memory.emplace(bytes, memory);
            kept().bytes += bytes;
            return;
        }
    }
    std::free(memory);
}

std::int64_t release_memory() {
    const std::unique_lock<std::mutex> lock(kept().mutex, std::try_to_lock);
    return lock ? static_cast<std::int64_t>(release(kept())) : 0;
}

Floats allocate_floats(std::int64_t count, bool zeroed) {
    Floats memory(take_floats(count));
    if (zeroed && count > 0) {
        std::memset(memory.get(), 0, static_cast<std::size_t>(count) * sizeof(float));
    }
    return memory;
}

void prefer_huge_pages(float* memory, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t HUGE = std::uintptr_t{1} << 21;
    const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + HUGE - 1) & ~(HUGE - 1);
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) +
                                static_cast<std::uintptr_t>(bytes)) & ~(HUGE - 1);
    // Only a hint: a kernel without huge pages refuses, and nothing is lost.
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)bytes;
#endif
}

}  // namespace fmrec
