#include "memory.h"

#include <cstring>
#include <new>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace fmrec {

Floats allocate_floats(std::int64_t count, bool zeroed) {
    void* memory = nullptr;
    const std::size_t size = static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(float);
    if (posix_memalign(&memory, 64, size) != 0) throw std::bad_alloc();
    if (zeroed) std::memset(memory, 0, size);
    return Floats(static_cast<float*>(memory));
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
