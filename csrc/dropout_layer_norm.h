// Dropout and the layer norm after it in one pass, in training:
//     out = norm(mask * x / (1 - p)) weight + bias.
// The masks are kept for the backward pass, a bit a channel.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

// Rows of a work item: they stay in the first-level cache, at the widths that there are.
constexpr int64_t DROPOUT_NORM_ROWS = 32;
// Partial sums of the parameters' gradients: their number does not depend on the threads, so
// neither do the results.
constexpr int64_t DROPOUT_NORM_PARTS = 16;

struct DropoutLayerNorm {
    const float* x;       // [B, P, D]
    const float* weight;  // [D]; D is a multiple of 16
    const float* bias;    // [D]; forward only
    const float* grad;    // [B, P, D]; backward only
    float* out;           // the result, or the gradient of x
    int64_t* kept;        // [B, P, norm_mask_words(D)], or null: without dropout
    const int64_t* rows;  // [B]; forward only, as what is drawn by
    int64_t batch, positions, width;
    uint64_t seed;
    uint32_t site;
    uint64_t position_offset, position_stride;
    uint32_t threshold;  // kept where word >= threshold
    float scale;
    float* partial;  // [parts, 2, D], zeroed: gradients of weight and bias
    int64_t parts;   // at most the number of items
};

// 64-bit words of a row's mask.
FMREC_INLINE int64_t norm_mask_words(int64_t width) { return (width + 63) / 64; }

struct DropoutLayerNormKernels {
    int64_t (*scratch)(const DropoutLayerNorm*);  // floats, of a thread
    // Items of DROPOUT_NORM_ROWS, and parts of them.
    void (*forward)(const DropoutLayerNorm*, int64_t begin, int64_t end, float* scratch);
    void (*backward)(const DropoutLayerNorm*, int64_t begin, int64_t end, float* scratch);
};

FMREC_DECLARE_TABLE(DropoutLayerNormKernels, dropout_layer_norm)

}  // namespace fmrec
