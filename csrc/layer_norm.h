// Layer norm of rows in the cache. Included by kernel translation units only.
#pragma once

#include "vector.h"

namespace fmrec {
namespace {

struct LayerNorm {
    const float* weight;  // [padded], zero beyond `channels`
    const float* bias;    // [padded], zero beyond `channels`
    int64_t channels, padded;
    bool rms = false;     // no mean is taken off, and eps is 1e-8
};

template <int ROWS>
FMREC_INLINE void layer_norm_rows(const LayerNorm* n, const float* x, float* out, int64_t stride) {
    const int64_t channels = n->channels, padded = n->padded;
    const float share = 1.0f / (float)channels, eps = n->rms ? 1e-8f : 1e-12f;
    f32v means[ROWS], factors[ROWS];
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) means[r] = factors[r] = broadcast(0.0f);
    for (int64_t j = 0; !n->rms && j < padded; j += FLOATS) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) means[r] += load(x + r * stride + j);
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) means[r] = broadcast(sum(means[r]) * share);
    int64_t whole = 0;
    for (; whole + FLOATS <= channels; whole += FLOATS) {
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const f32v d = load(x + r * stride + whole) - means[r];
            factors[r] += d * d;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; ++r) {
        float squares = sum(factors[r]);
        for (int64_t j = whole; j < channels; ++j) {
            const float d = x[r * stride + j] - means[r][0];
            squares += d * d;
        }
        factors[r] = broadcast(1.0f / __builtin_sqrtf(squares * share + eps));
    }
    for (int64_t j = 0; j < padded; j += FLOATS) {
        const f32v weight = load(n->weight + j), bias = load(n->bias + j);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const f32v d = load(x + r * stride + j) - means[r];
            store(out + r * stride + j, d * factors[r] * weight + bias);
        }
    }
}

// out = (x - mean) / sqrt(var + 1e-12) * weight + bias, or x / sqrt(mean(x^2) + 1e-8) * weight +
// bias, for rows `stride` apart, whose padding holds zeros. Four at a time, because the sums of one
// row wait for each other.
static inline void layer_norm(const LayerNorm* n, const float* x, float* out, int64_t stride,
                              int64_t rows) {
    int64_t i = 0;
    for (; i + 4 <= rows; i += 4) layer_norm_rows<4>(n, x + i * stride, out + i * stride, stride);
    for (; i < rows; ++i) layer_norm_rows<1>(n, x + i * stride, out + i * stride, stride);
}

}  // namespace
}  // namespace fmrec
