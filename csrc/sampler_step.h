// One evaluation of the sampler's network at some (row, step) pairs. Included by kernel translation
// units only.
#pragma once

#include "layer_norm.h"
#include "philox.h"
#include "sampler_network.h"

namespace fmrec {
namespace {

FMREC_INLINE int64_t counters_per_position(const SamplerNetwork* a) {
    return (a->encoder.channels + 3) / 4;
}

// lam of one sequence, as many floats as the generator writes.
FMREC_INLINE int64_t lam_size(const SamplerNetwork* a) {
    const int64_t counters = counters_per_position(a) * a->encoder.length;
    return 4 * (int64_t)round_up_counters((uint64_t)counters);
}

// What an evaluation needs beside activations: the final norm's parameters, padded, and memory.
struct SamplerStep {
    const SamplerNetwork* network;
    CounterWalk walk;
    LayerNorm norm;
    float* shift;       // [stride]
    float* prediction;  // [stride]
    float* drawn;       // [L, 4 ceil(D / 4)]
};

FMREC_INLINE int64_t step_scratch(const SamplerNetwork* a) {
    return 4 * row_stride(a->encoder.channels) + round_up(lam_size(a), UNIT);
}

// Takes step_scratch() floats of `memory` and returns what lies behind them.
FMREC_INLINE float* make_step(const SamplerNetwork* a, float* memory, SamplerStep* step) {
    const int64_t channels = a->encoder.channels, stride = row_stride(channels);
    float* weight = memory;
    float* bias = weight + stride;
    for (int64_t j = 0; j < stride; ++j) {
        weight[j] = j < channels ? a->norm_weight[j] : 0.0f;
        bias[j] = j < channels ? a->norm_bias[j] : 0.0f;
    }
    step->network = a;
    step->norm = LayerNorm{weight, bias, channels, round_up(channels, UNIT)};
    step->shift = bias + stride;
    step->prediction = step->shift + stride;
    step->drawn = step->prediction + stride;
    make_walk(&step->walk, (uint64_t)counters_per_position(a), 0, 1);
    return step->drawn + round_up(lam_size(a), UNIT);
}

// x = e + lam (state + tau) of row b at step i; the padding of x's rows holds zeros and keeps them.
FMREC_INLINE void fuse_noise(const SamplerStep* step, int64_t b, int64_t i, const float* state,
                             float* x) {
    const SamplerNetwork* a = step->network;
    const int64_t channels = a->encoder.channels, length = a->encoder.length;
    const int64_t stride = row_stride(channels), groups = counters_per_position(a);
    const float* lam = step->drawn;
    int64_t lam_row = 4 * groups;
    if (a->noise) {
        lam = a->noise + (i * a->batch + b) * length * channels;
        lam_row = channels;
    } else {
        fill_normals(&step->walk, 0, (uint64_t)(groups * length), (uint32_t)i,
                     (uint32_t)a->rows[b], a->seed, a->delta, a->delta, step->drawn);
    }
    const float* tau = a->taus + i * channels;
    float* shift = step->shift;
    for (int64_t j = 0; j < channels; ++j) shift[j] = state[j] + tau[j];
    const float* e = a->e + b * length * channels;
    for (int64_t p = 0; p < length; ++p) {
        float* target = x + p * stride;
        const float* source = e + p * channels;
        const float* factor = lam + p * lam_row;
#pragma omp simd
        for (int64_t j = 0; j < channels; ++j) target[j] = source[j] + factor[j] * shift[j];
    }
}

}  // namespace
}  // namespace fmrec
