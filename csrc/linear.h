// out = x weight^T + bias on many rows, and its gradients. Widths are multiples of 16.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

// Columns of a packed panel: the widest tile of every instruction set divides it.
enum { LINEAR_PANEL = 64, LINEAR_WIDTH = 16 };
// Rows of a work item, and rows that a weight gradient sums before it touches its accumulators.
enum { LINEAR_ROWS = 48, LINEAR_CHUNK = 96 };
// Partial sums of a weight gradient: their number does not depend on the threads, so neither do
// the results.
enum { LINEAR_PARTS = 8 };

// out [rows, columns] = in [rows, depth] B + bias, B packed by `pack`.
struct LinearProduct {
    const float* in;
    const float* panels;
    const float* bias;  // or null
    float* out;
    int64_t rows, depth, columns;
};

// partial[part] [narrow, wide] = (a^T b) over the part's rows; a is the narrower of the two.
struct LinearGradient {
    const float* a;     // [rows, narrow]
    const float* b;     // [rows, wide]
    const float* grad;  // a or b: the one whose columns are summed into `sums`, or null
    int64_t rows, narrow, wide, width_of_grad;
    float* partial;  // [LINEAR_PARTS, narrow, wide], zeroed
    float* sums;     // [LINEAR_PARTS, width_of_grad], zeroed
};

struct LinearKernels {
    // Element (k, j) of B, depth x columns, is at source[k * row + j * column].
    void (*pack)(const float* source, int64_t row, int64_t column, int64_t depth, int64_t columns,
                 float* panels);
    void (*multiply)(const LinearProduct*, int64_t begin, int64_t end);   // items of LINEAR_ROWS
    void (*gradient)(const LinearGradient*, int64_t begin, int64_t end);  // parts
};

FMREC_DECLARE_TABLE(LinearKernels, linear)

}  // namespace fmrec
