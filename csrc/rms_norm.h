// RMS norm of rows, y = x s w with s = (mean(x^2) + 1e-8)^(-1/2), with its derivative along dx,
// dy = (s dx - s^3 mean(x dx) x) w, and the adjoint of both.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

// Partial sums of the weight's gradient: their number does not depend on the threads, so neither
// do the results. And rows that are summed before they are added to them: one row after the other
// would be rounded too often.
constexpr int64_t RMS_PARTS = 16, RMS_CHUNK = 64;

struct RmsNorm {
    const float* x;       // [rows, channels]
    const float* weight;  // [channels]
    const float* dx;      // [rows, channels], or null: without tangents
    const float* grad;    // of y and of dy [rows, channels]; backward only
    const float* d_grad;
    float* out;           // y, or the gradient of x [rows, channels]
    float* d_out;         // the same of dx
    float* partial;       // [RMS_PARTS, 2, channels], zeroed: sums, and those of a chunk
    int64_t rows, channels;
};

struct RmsNormKernels {
    void (*forward)(const RmsNorm*, int64_t begin, int64_t end);   // rows
    void (*backward)(const RmsNorm*, int64_t begin, int64_t end);  // parts
};

FMREC_DECLARE_TABLE(RmsNormKernels, rms_norm)

}  // namespace fmrec
