// Layer norm of a row in the cache. Included by kernel translation units only.
#pragma once

#include "vector.h"

namespace fmrec {
namespace {

// out = (x - mean) / sqrt(var + 1e-12) * weight + bias over the first `channels` of `padded`
// columns, a multiple of 16; weight and bias are zero in the padding, and so is out.
FMREC_INLINE void layer_norm(const float* x, const float* weight, const float* bias,
                             int64_t channels, int64_t padded, float* out) {
    f32v total = broadcast(0.0f), squares = broadcast(0.0f);
    for (int64_t j = 0; j < padded; j += FLOATS) total += load(x + j);
    const float mean = sum(total) / (float)channels;
    const f32v means = broadcast(mean);
    int64_t j = 0;
    for (; j + FLOATS <= channels; j += FLOATS) {
        const f32v d = load(x + j) - means;
        squares += d * d;
    }
    float variance = sum(squares);
    for (; j < channels; ++j) {
        const float d = x[j] - mean;
        variance += d * d;
    }
    const float root = __builtin_sqrtf(variance / (float)channels + 1e-12f);
    const f32v factors = broadcast(1.0f / root);
    for (j = 0; j < padded; j += FLOATS) {
        store(out + j, (load(x + j) - means) * factors * load(weight + j) + load(bias + j));
    }
}

}  // namespace
}  // namespace fmrec
