// out = e + lam * shift, lam ~ Normal(delta, delta) of the noise stream, and its adjoint.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

struct NoiseFusion {
    const float* input;   // e (forward) or grad (backward) [B, L, D]; unused by lam
    const float* shift;   // [B, D]; forward only
    float* out;           // [B, L, D], or d_shift [B, D] (backward)
    const int64_t* rows;  // [B]
    int64_t batch, length, channels;
    uint64_t seed;
    uint32_t step;
    float delta;
};

// forward and lam work on chunks (see chunks()), backward on rows of the batch: a row's sum over
// positions is one thread's, so that the result does not depend on how many there are.
struct NoiseFusionKernels {
    int64_t (*chunks)(const NoiseFusion*);  // work items of forward and lam
    void (*forward)(const NoiseFusion*, int64_t begin, int64_t end);
    void (*lam)(const NoiseFusion*, int64_t begin, int64_t end);
    void (*backward)(const NoiseFusion*, int64_t begin, int64_t end);
};

FMREC_DECLARE_TABLE(NoiseFusionKernels, noise_fusion)

}  // namespace fmrec
