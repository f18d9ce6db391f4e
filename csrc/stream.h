// The small draws of the noise stream, one name (row, step) at a time: what fmrec_fast/noise.py
// defines beside the noise that other kernels generate where they need it.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

struct Stream {
    const int64_t* rows;  // [B]
    float* out;           // [B, D]
    int64_t channels;     // D
    uint64_t seed;
    uint32_t step;
};

struct StreamKernels {
    // Of position 0, for rows [begin, end).
    void (*normals)(const Stream*, int64_t begin, int64_t end);
    void (*uniforms)(const Stream*, int64_t begin, int64_t end);
    // out[j] = words 0 (low) and 1 (high) at counter (first + j, 0, 0, 0).
    void (*words)(uint64_t seed, uint64_t first, int64_t count, int64_t* out);
};

FMREC_DECLARE_TABLE(StreamKernels, stream)

}  // namespace fmrec
