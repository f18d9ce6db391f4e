// Counter-based dropout, with an optional residual added: out = residual + mask * f(x) / (1 - p).
// f is the identity or tanh-GELU; for the backward pass of the latter, f(x) = x * gelu'(gelu_at),
// and for that of its tangents f(x) = x * times * gelu''(gelu_at).
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

struct Dropout {
    const float* x;         // [B, P, C]
    const float* residual;  // [B, P, C] or null
    const float* gelu_at;   // [B, P, C] or null
    const float* times;     // [B, P, C] or null; only with gelu_at
    bool gelu;
    float* out;             // [B, P, C]; may be x
    const int64_t* rows;    // [B]
    int64_t batch, positions, channels;
    uint64_t seed;
    uint32_t site;
    // The words of the positions: offset + stride * i, modulo 2^32.
    uint64_t position_offset, position_stride;
    uint32_t threshold;  // kept where word >= threshold
    float scale;
};

struct DropoutKernels {
    int64_t (*chunks)(const Dropout*);  // work items
    void (*apply)(const Dropout*, int64_t begin, int64_t end);
};

FMREC_DECLARE_TABLE(DropoutKernels, dropout)

}  // namespace fmrec
