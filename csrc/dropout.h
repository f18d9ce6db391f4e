// Counter-based dropout, with an optional residual added: out = residual + mask * f(x) / (1 - p),
// the second term times the row's factor where there are factors.
// f is the identity or tanh-GELU; for the backward pass of the latter, f(x) = x * gelu'(gelu_at).
//
// With a tangent dx, no residual and tanh-GELU, also d_out = mask * gelu'(x) dx / (1 - p); backward,
// from the gradients x of out and d_grad of d_out at the point gelu_at, those of the point and of dx:
//     out = mask * (x gelu' + d_grad dx gelu'') / (1 - p),   d_out = mask * d_grad gelu' / (1 - p).
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

struct Dropout {
    const float* x;         // [B, P, C]
    const float* residual;  // [B, P, C] or null
    const float* gelu_at;   // [B, P, C] or null
    const float* dx;        // [B, P, C] or null; then there is d_out, and with gelu_at d_grad
    const float* d_grad;    // [B, P, C] or null
    bool gelu;
    float* out;             // [B, P, C]; may be x
    float* d_out;           // [B, P, C] or null
    const int64_t* rows;    // [B]
    int64_t batch, positions, channels;
    uint64_t seed;
    uint32_t site;
    // The words of the positions: offset + stride * i, modulo 2^32.
    uint64_t position_offset, position_stride;
    const float* row_scale;  // [B] that the kept ones are multiplied by, or null
    uint32_t threshold;  // kept where word >= threshold
    float scale;
};

struct DropoutKernels {
    int64_t (*chunks)(const Dropout*);  // work items
    void (*apply)(const Dropout*, int64_t begin, int64_t end);
};

FMREC_DECLARE_TABLE(DropoutKernels, dropout)

}  // namespace fmrec
