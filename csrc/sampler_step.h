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

// lam of one sequence, as many floats as the generator writes in two pieces.
FMREC_INLINE int64_t lam_size(const SamplerNetwork* a) {
    const int64_t counters = counters_per_position(a) * a->encoder.length;
    return 4 * ((int64_t)round_up_counters((uint64_t)counters) + COUNTERS);
}

// Rows of activations of row b of the batch, and of a group of `count` sequences.
FMREC_INLINE int64_t rows_of(const SamplerNetwork* a, int64_t b) {
    return a->start ? a->start[b + 1] - a->start[b] : a->encoder.length;
}

FMREC_INLINE int64_t group_rows(const SamplerNetwork* a, int64_t count) {
    return a->start ? a->group_rows : count * a->encoder.length;
}

// Row i of a sequence of `rows` rows is this position: of a padded prefix, only the first.
FMREC_INLINE int64_t position_of(const SamplerNetwork* a, int64_t rows, int64_t i) {
    return i == 0 ? 0 : i + a->encoder.length - rows;
}

// What the encoder needs to know of a group beside its activations.
struct Group {
    int64_t* start;   // [count + 1]: the first row of each sequence
    float* mask;      // [rows]
    float* key_bias;  // [count]
    Ragged ragged;
    const Ragged* shape;  // `ragged`, or null where all sequences have L rows
};

FMREC_INLINE int64_t group_scratch(const SamplerNetwork* a, int64_t count) {
    return round_up(2 * (count + 1), UNIT) + round_up(group_rows(a, count), UNIT) +
           round_up(count, UNIT);
}

// The group of the points first .. first + count - 1, of which every row of the batch has
// `points`. Takes group_scratch() floats of `memory` and returns what lies behind them.
FMREC_INLINE float* make_group(const SamplerNetwork* a, int64_t first, int64_t count,
                               int64_t points, float* memory, Group* group) {
    const int64_t length = a->encoder.length;
    group->start = (int64_t*)memory;
    group->mask = memory + round_up(2 * (count + 1), UNIT);
    group->key_bias = group->mask + round_up(group_rows(a, count), UNIT);
    group->start[0] = 0;
    for (int64_t s = 0; s < count; ++s) {
        const int64_t b = (first + s) / points, rows = rows_of(a, b);
        group->start[s + 1] = group->start[s] + rows;
        group->key_bias[s] = __builtin_logf((float)(length - rows + 1));
        for (int64_t i = 0; i < rows; ++i) {
            group->mask[group->start[s] + i] = a->mask[b * length + position_of(a, rows, i)];
        }
    }
    group->ragged = Ragged{group->start, group->key_bias};
    group->shape = a->start ? &group->ragged : nullptr;
    return group->key_bias + round_up(count, UNIT);
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

// lam of the rows of one sequence, from the stream.
FMREC_INLINE void draw_lam(const SamplerStep* step, int64_t b, int64_t i, int64_t rows) {
    const SamplerNetwork* a = step->network;
    const uint64_t groups = step->walk.groups;
    const uint64_t skipped = (uint64_t)(a->encoder.length - rows);
    uint64_t done = 0;
    if (skipped > 0) {  // what the first piece writes beyond its row, the second overwrites
        fill_normals(&step->walk, 0, groups, (uint32_t)i, (uint32_t)a->rows[b], a->seed, a->delta,
                     a->delta, step->drawn);
        done = 1;
    }
    if (done < (uint64_t)rows) {
        fill_normals(&step->walk, groups * (skipped + done), groups * ((uint64_t)rows - done),
                     (uint32_t)i, (uint32_t)a->rows[b], a->seed, a->delta, a->delta,
                     step->drawn + 4 * groups * done);
    }
}

// x = e + lam (state + tau) of row b at step i; the padding of x's rows holds zeros and keeps them.
FMREC_INLINE void fuse_noise(const SamplerStep* step, int64_t b, int64_t i, const float* state,
                             float* x) {
    const SamplerNetwork* a = step->network;
    const int64_t channels = a->encoder.channels, length = a->encoder.length;
    const int64_t stride = row_stride(channels), rows = rows_of(a, b);
    const int64_t drawn_row = 4 * counters_per_position(a);
    const float* given = a->noise ? a->noise + (i * a->batch + b) * length * channels : nullptr;
    if (!given) draw_lam(step, b, i, rows);
    const float* tau = a->taus + i * channels;
    float* shift = step->shift;
    for (int64_t j = 0; j < channels; ++j) shift[j] = state[j] + tau[j];
    const float* e = a->e + b * length * channels;
    for (int64_t r = 0; r < rows; ++r) {
        const int64_t p = position_of(a, rows, r);
        float* target = x + r * stride;
        const float* source = e + p * channels;
        const float* factor = given ? given + p * channels : step->drawn + r * drawn_row;
#pragma omp simd
        for (int64_t j = 0; j < channels; ++j) target[j] = source[j] + factor[j] * shift[j];
    }
}

}  // namespace
}  // namespace fmrec
