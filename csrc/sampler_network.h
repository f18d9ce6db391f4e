// What evaluating the sampler's network reads (FMRec eq. 14 and 23): noise fusion, encoder, final
// norm. Shared by the samplers.
#pragma once

#include <stdint.h>

#include "encoder.h"

namespace fmrec {

struct SamplerNetwork {
    Encoder encoder;
    const float* e;            // [B, L, D]
    const float* mask;         // [B, L]
    const float* taus;         // [q, D]
    const float* noise;        // lam [q, B, L, D], or null: the stream's
    const int64_t* rows;       // [B], and
    uint64_t seed;             // the stream's key
    float delta;
    const float* norm_weight;  // [D], of the final norm
    const float* norm_bias;    // [D]
    int64_t batch, steps;
};

}  // namespace fmrec
