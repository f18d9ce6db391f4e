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
    // Tied padding: the padded prefix of a sequence, n positions, is one token with the first
    // position's lam and multiplicity n, so that sequence b has M = start[b + 1] - start[b] =
    // L - n + 1 rows (as many for n = 0, which comes to the same). Null: L rows each.
    const int64_t* start;  // [B + 1]
    int64_t group_rows;    // of the group with most rows
};

// Works on the sequences [begin, end), together: see EncoderKernels.
struct EulerSamplerKernels {
    int64_t (*scratch)(const EulerSampler*, int64_t count);  // floats
    void (*run)(const EulerSampler*, int64_t begin, int64_t end, float* scratch);
};

FMREC_DECLARE_TABLE(EulerSamplerKernels, euler_sampler)

}  // namespace fmrec
