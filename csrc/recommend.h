// What surrounds the sampler when a recommendation is made: the embedded history, the start.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

// Where the flow starts: from noise; or, in Fave's second stage, from the embedding at one position,
// which is counted from the left edge, or from the first item of the history.
enum class Start { NOISE, ANCHOR, ANCHOR_IN_HISTORY };

struct Recommend {
    const float* items;        // [V, D]
    const float* norm_weight;  // [D], of the norm of embedded items
    const float* norm_bias;    // [D]
    const int64_t* ids;        // [B, L], 0 is padding; all in 0 .. V - 1
    const int64_t* rows;       // [B], and
    uint64_t seed;             // the key of the start's stream
    Start start;
    float keep;                // the chance that a channel of the anchor is kept
    int64_t batch, length, channels;
    float* e;                  // [B, L, D]
    float* mask;               // [B, L]
    float* z0;                 // [B, D]
};

struct RecommendKernels {
    int64_t (*scratch)(const Recommend*);  // floats
    // Fills in e, mask and z0.
    void (*prepare)(const Recommend*, float* scratch);
};

FMREC_DECLARE_TABLE(RecommendKernels, recommend)

}  // namespace fmrec
