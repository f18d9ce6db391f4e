#include "euler_sampler.h"

#include "layer_norm.h"
#include "philox.h"

namespace fmrec {
namespace {

int64_t counters_per_position(const EulerSampler* a) { return (a->encoder.channels + 3) / 4; }

// lam of one sequence, as many floats as the generator writes in two pieces.
int64_t lam_size(const EulerSampler* a) {
    const int64_t counters = counters_per_position(a) * a->encoder.length;
    return 4 * ((int64_t)round_up_counters((uint64_t)counters) + COUNTERS);
}

// Rows of activations of `count` sequences.
int64_t rows_of(const EulerSampler* a, int64_t count) {
    return a->start ? a->group_rows : count * a->encoder.length;
}

int64_t scratch(const EulerSampler* a, int64_t count) {
    const int64_t stride = row_stride(a->encoder.channels), rows = rows_of(a, count);
    return (rows + 2 * count + 4) * stride + round_up(lam_size(a), UNIT) + round_up(rows, UNIT) +
           round_up(count, UNIT) + FMREC_ISA::encoder.scratch(&a->encoder, count);
}

// Row i of a sequence of `length` rows is position `position(a, length, i)`: of a padded prefix,
// only the first.
FMREC_INLINE int64_t position(const EulerSampler* a, int64_t length, int64_t i) {
    return i == 0 ? 0 : i + a->encoder.length - length;
}

// x = e + lam * shift for one sequence; the padding of x's rows holds zeros and keeps them.
// `e` and `given` (lam as handed in, or null: `drawn`, row by row) are those of all L positions.
FMREC_INLINE void fuse(const EulerSampler* a, int64_t length, const float* e, const float* given,
                       const float* drawn, const float* shift, float* x) {
    const int64_t channels = a->encoder.channels, stride = row_stride(channels);
    const int64_t drawn_row = 4 * counters_per_position(a);
    for (int64_t i = 0; i < length; ++i) {
        const int64_t p = position(a, length, i);
        float* target = x + i * stride;
        const float* source = e + p * channels;
        const float* factor = given ? given + p * channels : drawn + i * drawn_row;
#pragma omp simd
        for (int64_t j = 0; j < channels; ++j) target[j] = source[j] + factor[j] * shift[j];
    }
}

// lam of the rows of one sequence, from the stream.
FMREC_INLINE void draw(const EulerSampler* a, const CounterWalk* walk, int64_t length,
                       int64_t step, int64_t row, float* drawn) {
    const uint64_t groups = walk->groups;
    const uint64_t skipped = (uint64_t)(a->encoder.length - length);
    uint64_t done = 0;
    if (skipped > 0) {  // what the first piece writes beyond its row, the second overwrites
        fill_normals(walk, 0, groups, (uint32_t)step, (uint32_t)row, a->seed, a->delta, a->delta,
                     drawn);
        done = 1;
    }
    if (done < (uint64_t)length) {
        fill_normals(walk, groups * (skipped + done), groups * ((uint64_t)length - done),
                     (uint32_t)step, (uint32_t)row, a->seed, a->delta, a->delta,
                     drawn + 4 * groups * done);
    }
}

void run(const EulerSampler* a, int64_t begin, int64_t end, float* memory) {
    const Encoder* encoder = &a->encoder;
    const int64_t channels = encoder->channels, length = encoder->length;
    const int64_t stride = row_stride(channels), padded = round_up(channels, UNIT);
    const int64_t count = end - begin, rows = rows_of(a, count);
    float* x = memory;                       // [rows, stride]: activations
    float* state = x + rows * stride;        // [count, stride]: where the flow has come to
    float* last = state + count * stride;    // [count, stride]
    float* weight = last + count * stride;   // [stride], [stride]: the final norm, padded
    float* bias = weight + stride;
    float* shift = bias + stride;            // [stride]
    float* prediction = shift + stride;      // [stride]
    float* drawn = prediction + stride;      // [L, 4 ceil(D / 4)]
    float* mask = drawn + round_up(lam_size(a), UNIT);  // [rows]
    float* key_bias = mask + round_up(rows, UNIT);      // [count]
    float* rest = key_bias + round_up(count, UNIT);
    CounterWalk walk;
    make_walk(&walk, (uint64_t)counters_per_position(a), 0, 1);
    for (int64_t i = 0; i < rows * stride; ++i) x[i] = 0.0f;
    for (int64_t j = 0; j < stride; ++j) {
        weight[j] = j < channels ? a->norm_weight[j] : 0.0f;
        bias[j] = j < channels ? a->norm_bias[j] : 0.0f;
    }
    for (int64_t s = 0, row = 0; s < count; ++s) {
        const int64_t b = begin + s, own = a->start ? a->start[b + 1] - a->start[b] : length;
        for (int64_t i = 0; i < own; ++i, ++row) {
            mask[row] = a->mask[b * length + position(a, own, i)];
        }
        key_bias[s] = a->start ? __builtin_logf((float)(length - own + 1)) : 0.0f;
        for (int64_t j = 0; j < channels; ++j) {
            const int64_t at = b * channels + j;
            state[s * stride + j] = a->z0[at];
            if (a->trajectory) a->out[at] = a->z0[at];
        }
    }
    const LayerNorm norm = {weight, bias, channels, padded};
    const Ragged ragged = {a->start ? a->start + begin : nullptr, key_bias};
    for (int64_t step = 0; step < a->steps; ++step) {
        const float* tau = a->taus + step * channels;
        for (int64_t s = 0, row = 0; s < count; ++s) {
            const int64_t b = begin + s, own = a->start ? a->start[b + 1] - a->start[b] : length;
            const float* given = nullptr;
            if (a->noise) {
                given = a->noise + (step * a->batch + b) * length * channels;
            } else {
                draw(a, &walk, own, step, a->rows[b], drawn);
            }
            for (int64_t j = 0; j < channels; ++j) shift[j] = state[s * stride + j] + tau[j];
            fuse(a, own, a->e + b * length * channels, given, drawn, shift, x + row * stride);
            row += own;
        }
        FMREC_ISA::encoder.run_ragged(encoder, x, mask, a->start ? &ragged : nullptr, count, last,
                                      nullptr, rest);
        float* out = a->out + (a->trajectory ? (step + 1) * a->batch * channels : 0);
        for (int64_t s = 0; s < count; ++s) {
            layer_norm(&norm, last + s * stride, prediction, stride, 1);
            const float* z0 = a->z0 + (begin + s) * channels;
            float* z = state + s * stride;
            // As published: the difference from the start, not from where the flow has come to.
            for (int64_t j = 0; j < channels; ++j) z[j] += (prediction[j] - z0[j]) / (float)a->steps;
            if (a->trajectory || step + 1 == a->steps) {
                for (int64_t j = 0; j < channels; ++j) out[(begin + s) * channels + j] = z[j];
            }
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const EulerSamplerKernels euler_sampler = {scratch, run};
}

}  // namespace fmrec
