// Parts of a kernel's scratch memory. Included by kernel translation units only.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {
namespace {

// The next `count` floats of the memory, at a multiple of 64 bytes if that is where it begins.
FMREC_INLINE float* take(float** memory, int64_t count) {
    float* part = *memory;
    *memory += (count + 15) / 16 * 16;
    return part;
}

}  // namespace
}  // namespace fmrec
