// Memory of the host's side.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace fmrec {

// Memory of floats at a multiple of 64 bytes, freed with its owner. Not copyable.
struct FreeFloats {
    void operator()(float* memory) const { std::free(memory); }
};
typedef std::unique_ptr<float[], FreeFloats> Floats;

// Throws std::bad_alloc.
Floats allocate_floats(std::int64_t count, bool zeroed);

// Asks for huge pages under the whole ones of them that [memory, memory + bytes) covers: faulting
// a large result in by pages of 4 kB can take longer than to compute it.
void prefer_huge_pages(float* memory, std::int64_t bytes);

}  // namespace fmrec
