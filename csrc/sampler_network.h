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
    // Tied padding: the padded prefix of a sequence, n positions, is one token with the first
    // position's lam and multiplicity n, so that sequence b has M = start[b + 1] - start[b] =
    // L - n + 1 rows (as many for n = 0, which comes to the same). Null: L rows each.
    const int64_t* start;  // [B + 1]
    int64_t group_rows;    // of the group with most rows
};

}  // namespace fmrec
