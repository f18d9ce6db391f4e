// The logits of chosen cells of hidden @ weight^T + bias, and the adjoint: the history loss
// looks at a few cells of each row, so the [B, V] matrix is never formed.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

struct HistoryLoss {
    const float* hidden;    // [B, H]
    const float* weight;    // [V, H]
    const float* bias;      // [V]; forward only
    const int64_t* rows;    // [M]
    const int64_t* cols;    // [M]
    const float* label;     // [M]; forward only
    const float* g;         // [M]; backward only
    float* residual;        // [M]; forward only
    float* d_hidden;        // [B, H] or null
    float* d_weight;        // [V, H] or null
    float* d_bias;          // [V] or null
    int64_t features;       // H
    // Cells in use, gathered by row or by column: bucket k is order[starts[k] .. starts[k + 1]).
    const int32_t* order;
    const int32_t* starts;
};

// forward works on ranges of the column-ordered cells, the adjoints on ranges of rows or columns.
// Within a bucket the cells keep their own order, so a sum is the same for any number of threads.
struct HistoryLossKernels {
    void (*forward)(const HistoryLoss*, int64_t begin, int64_t end);
    void (*backward_rows)(const HistoryLoss*, int64_t begin, int64_t end);
    void (*backward_columns)(const HistoryLoss*, int64_t begin, int64_t end);
};

FMREC_DECLARE_TABLE(HistoryLossKernels, history_loss)

}  // namespace fmrec
