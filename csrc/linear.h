// out = x weight^T + bias on many rows, and its gradients. Widths are multiples of 16.
#pragma once

#include <stdint.h>

#include "amx_layout.h"
#include "isa.h"

namespace fmrec {

// Columns of a packed panel: the widest tile of every instruction set divides it.
constexpr int64_t LINEAR_PANEL = 64;
// Rows of a work item, and rows that a weight gradient sums before it touches its accumulators.
constexpr int64_t LINEAR_ROWS = 96, LINEAR_CHUNK = LINEAR_ROWS;
// Partial sums of a weight gradient: their number does not depend on the threads, so neither do
// the results.
constexpr int64_t LINEAR_PARTS = 8;

// Planes of the operands, at most; they count for the instruction set amx only.
constexpr int LINEAR_PLANES = 3;

// out [rows, columns] = in [rows, depth] B + bias, B packed by `pack` in as many planes.
struct LinearProduct {
    const float* in;
    const float* panels;
    const float* bias;  // or null
    float* out;
    int64_t rows, depth, columns;
    int planes;
};

// partial[part] [narrow, wide] = (a^T b) over the part's rows; a is the narrower of the two.
struct LinearGradient {
    const float* a;     // [rows, narrow]
    const float* b;     // [rows, wide]
    const float* grad;  // a or b: the one whose columns are summed into `sums`, or null
    int64_t rows, narrow, wide, width_of_grad;
    float* partial;  // [LINEAR_PARTS, narrow, wide], zeroed
    float* sums;     // [LINEAR_PARTS, width_of_grad], zeroed
    float* scratch;  // of each part, linear_gradient_scratch floats
    int planes;
    // Computed on the way, from the chunk of the gradient that is in the cache; or null.
    const LinearProduct* product;
};

// Floats of the packed B, whatever the instruction set: with AMX up to three bfloat16s a number.
FMREC_INLINE int64_t linear_packed(int64_t depth, int64_t columns) {
    return amx_columns_size(depth, columns, LINEAR_PLANES) / 2;
}

// With AMX: the operands of a chunk of rows, packed.
FMREC_INLINE int64_t linear_gradient_scratch(int64_t narrow, int64_t wide) {
    return amx_rows_size(narrow + wide, LINEAR_CHUNK, LINEAR_PLANES) / 2;
}

struct LinearKernels {
    // Element (k, j) of B, depth x columns, is at source[k * row + j * column].
    void (*pack)(const float* source, int64_t row, int64_t column, int64_t depth, int64_t columns,
                 int planes, float* panels);
    void (*multiply)(const LinearProduct*, int64_t begin, int64_t end);   // items of LINEAR_ROWS
    void (*gradient)(const LinearGradient*, int64_t begin, int64_t end);  // parts
};

FMREC_DECLARE_TABLE(LinearKernels, linear)

}  // namespace fmrec
