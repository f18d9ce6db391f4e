// The dense gradient of lookups in a table: each row of the table gets the sum of the gradients of
// the places that looked it up.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

// Sum k is that of sources[starts[k] .. starts[k + 1]), in this order.
struct RowSums {
    const float* const* sources;  // [width] each
    const int32_t* starts;
    float* out;                   // [sums, width]
    int64_t width;
};

struct TableGradientKernels {
    void (*sums)(const RowSums*, int64_t begin, int64_t end);
};

FMREC_DECLARE_TABLE(TableGradientKernels, table_gradient)

}  // namespace fmrec
