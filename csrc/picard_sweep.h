// The sampler's network at all q points of a guessed trajectory (one Picard sweep of FMRec eq. 23).
#pragma once

#include <stdint.h>

#include "sampler_network.h"

namespace fmrec {

struct PicardSweep : SamplerNetwork {
    const float* x;  // [B, q, D]
    float* out;      // [B, q, D]
};

// Works on the points [begin, end) of B q, together: point b q + i is row b at step i.
struct PicardSweepKernels {
    int64_t (*scratch)(const PicardSweep*, int64_t count);  // floats
    void (*run)(const PicardSweep*, int64_t begin, int64_t end, float* scratch);
};

FMREC_DECLARE_TABLE(PicardSweepKernels, picard_sweep)

}  // namespace fmrec
