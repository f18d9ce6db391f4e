// Softmax cross-entropy over the full item vocabulary, and its gradients, tile by tile: no
// [B, V] matrix is held (but for a bounded cache of scores that the caller may give).
//
// With scores x[v, b] = log2(e) (scale rep[b] . weight[v] + bias[v]), forward gives for each row b
//     top = max_v x,  sum = sum_v 2^(x - top),  x at the target,  dot = sum_v s[v] (x - top),
// and the adjoint takes, with g[v, b] = coefficient[b] 2^(x - top[b]) + s[v] smooth[b]
// - [v is b's target] at_target[b],
//     d_rep[b] = scale sum_v g weight[v],  d_weight[v] = scale sum_b g rep[b],  d_bias[v] = sum_b g.
#pragma once

#include <stdint.h>

#include "amx_layout.h"
#include "isa.h"

namespace fmrec {

// Items of a tile and rows of a chunk: their scores (48 kB) and what multiplies them stay in L2.
constexpr int64_t XENT_ITEMS = 96, XENT_ROWS = 128, XENT_PANEL = 64, XENT_WIDTH = 16;

struct ItemCrossEntropy {
    const float* rep;        // [B, D]
    const float* weight;     // [V, D]
    const float* bias;       // [V] or null
    const float* smoothing;  // s [V], or null: then 1 in forward, 0 in the adjoint
    const int64_t* target;   // [B]; one outside 0 .. V-1 is met nowhere
    int64_t batch, items, width;
    float scale;
    // rep packed by `pack`, a chunk after the other, xent_packed(width) floats each: transposed, and
    // as it lies.
    float* columns;
    float* panels;
    // Scores rep . weight in blocks of [XENT_ITEMS, XENT_ROWS] by tile, then chunk; or null.
    // Forward writes them, the adjoint reads them.
    float* cache;
    // Statistics by row, as long as whole chunks. Forward writes largest, sum and dot of each
    // part (one after the other) and at_target of all; the adjoint reads `largest` and what is
    // below.
    float* largest;
    double* sum;
    double* dot;
    float* at_target;
    const float* coefficient;
    const float* smooth;
    // Adjoint only. A block of scores whose probabilities 2^(x - top) * share[b] all stay below
    // `filter` and that has no target is skipped; filter 0 skips none.
    const float* share;
    float filter;
    int64_t first_chunk, last_chunk;  // the rows it goes over in this call
    float* d_rep;     // of each part [rows of the chunks, padded width], zeroed; or null
    float* d_weight;  // [V, D] or null
    float* d_bias;    // [V] or null
    bool add;         // onto d_weight and d_bias
    float* scratch;   // of each part, xent_scratch(width) floats
};

FMREC_INLINE int64_t xent_padded(int64_t n) {
    return (n + XENT_WIDTH - 1) / XENT_WIDTH * XENT_WIDTH;
}

// Floats of a chunk's packed rows, whatever the instruction set: with AMX three bfloat16s a number.
FMREC_INLINE int64_t xent_packed(int64_t width) {
    return amx_columns_size(width, XENT_ROWS, 3) / 2;
}

// A block of scores and the tile's part of d_weight; packed, the tile's items for the scores and for
// d_rep, and the block.
FMREC_INLINE int64_t xent_scratch(int64_t width) {
    return (XENT_ROWS + xent_padded(width)) * XENT_ITEMS +
           (2 * amx_rows_size(XENT_ITEMS, width, 3) + amx_rows_size(XENT_ITEMS, XENT_ROWS, 3)) / 2;
}

struct ItemCrossEntropyKernels {
    void (*pack)(const ItemCrossEntropy*, int64_t chunk);
    // Tiles begin .. end of XENT_ITEMS items.
    void (*forward)(const ItemCrossEntropy*, int64_t part, int64_t begin, int64_t end);
    void (*backward)(const ItemCrossEntropy*, int64_t part, int64_t begin, int64_t end);
};

FMREC_DECLARE_TABLE(ItemCrossEntropyKernels, item_cross_entropy)

}  // namespace fmrec
