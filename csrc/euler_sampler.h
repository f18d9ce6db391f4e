// All q Euler steps of the sampler (FMRec eq. 23): noise fusion, encoder, final norm, update.
#pragma once

#include <stdint.h>

#include "encoder.h"

namespace fmrec {

struct EulerSampler {
    Encoder encoder;
    const float* e;            // [B, L, D]
    const float* mask;         // [B, L]
    const float* z0;           // [B, D]
    const float* taus;         // [q, D]
    const float* noise;        // lam [q, B, L, D], or null: the stream's
    const int64_t* rows;       // [B], and
    uint64_t seed;             // the stream's key
    float delta;
    const float* norm_weight;  // [D], of the final norm
    const float* norm_bias;    // [D]
    float* out;                // [B, D], or the trajectory [q + 1, B, D]
    int64_t batch, steps;
    bool trajectory;
};

// Works on the sequences [begin, end), together: see EncoderKernels.
struct EulerSamplerKernels {
    int64_t (*scratch)(const EulerSampler*, int64_t count);  // floats
    void (*run)(const EulerSampler*, int64_t begin, int64_t end, float* scratch);
};

FMREC_DECLARE_TABLE(EulerSamplerKernels, euler_sampler)

}  // namespace fmrec
