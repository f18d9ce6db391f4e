// out = x weight^T + bias on many rows, and its gradients. Widths are multiples of 16.
#pragma once

#include <stdint.h>

#include "amx_layout.h"
#include "isa.h"

namespace fmrec {

// Columns of a packed panel: the widest tile of every instruction set divides it.
constexpr int64_t LINEAR_PANEL = 64;
// Rows of a work item, a tile's, and rows that a gradient sums before it touches its accumulators.
constexpr int64_t LINEAR_ROWS = 32, LINEAR_CHUNK = 3 * LINEAR_ROWS;
// Partial sums of a weight gradient: their number does not depend on the threads, so neither do
// the results.
constexpr int64_t LINEAR_PARTS = 8;

// Planes of the operands, at most; they count for the instruction set amx only.
constexpr int LINEAR_PLANES = 3;

// B [depth, columns], whose element (k, j) is at source[k * row + j * column].
struct LinearPacking {
    const float* source;
    int64_t row, column;  // one of them is 1
    int64_t depth, columns;
    int planes;
    float* panels;  // linear_packed floats
};

// out [rows, columns] = A [rows, depth] B + bias, B packed in as many planes.
struct LinearProduct {
    const float* in;
    int64_t row, step;  // element (i, k) of A is at in[i * row + k * step]; one of them is 1
    const float* panels;
    const float* bias;  // or null
    float* out;
    int64_t rows, depth, columns;
    int planes;
    float* sums = nullptr;  // [rows], of the rows of an A with row = 1, or null
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

// Whether a weight's gradient goes over all rows at once, an item of its own rows after the other,
// as it does where partial sums would be larger than the operands.
FMREC_INLINE bool linear_few_rows(int64_t rows, int64_t in, int64_t columns) {
    return LINEAR_PARTS * in * columns > rows * (in + columns);
}

struct LinearKernels {
    void (*pack)(const LinearPacking*, int64_t begin, int64_t end);       // panels
    void (*multiply)(const LinearProduct*, int64_t begin, int64_t end);   // items of LINEAR_ROWS
    void (*gradient)(const LinearGradient*, int64_t begin, int64_t end);  // parts
};

FMREC_DECLARE_TABLE(LinearKernels, linear)

}  // namespace fmrec
