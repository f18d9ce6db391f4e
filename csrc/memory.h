// Memory of the host's side. What is large is kept when it is freed, for the next of its size: mapped
// and cleared afresh, memory costs more than many a kernel that fills it.
#pragma once

#include <cstdint>
#include <memory>

namespace fmrec {

// Floats at a multiple of 64 bytes. Throws std::bad_alloc.
float* take_floats(std::int64_t count);

// Gives back what take_floats gave.
void give_floats(float* memory);

// Hands all that is kept to the system. Returns its bytes.
std::int64_t release_memory();

// Freed with its owner. Not copyable.
struct FreeFloats {
    void operator()(float* memory) const { give_floats(memory); }
};
typedef std::unique_ptr<float[], FreeFloats> Floats;

// Throws std::bad_alloc.
Floats allocate_floats(std::int64_t count, bool zeroed);

// Asks for huge pages under the whole ones of them that [memory, memory + bytes) covers: faulting
// a large result in by pages of 4 kB can take longer than to compute it.
void prefer_huge_pages(float* memory, std::int64_t bytes);

}  // namespace fmrec
