#include "euler_sampler.h"

#include "layer_norm.h"
#include "philox.h"

namespace fmrec {
namespace {

int64_t counters_per_position(const EulerSampler* a) { return (a->encoder.channels + 3) / 4; }

// lam of one sequence, as many floats as the generator writes.
int64_t lam_size(const EulerSampler* a) {
    const int64_t counters = counters_per_position(a) * a->encoder.length;
    return 4 * (int64_t)round_up_counters((uint64_t)counters);
}

int64_t scratch(const EulerSampler* a, int64_t count) {
    const int64_t stride = row_stride(a->encoder.channels);
    const int64_t activations = count * (a->encoder.length + 2) * stride + 4 * stride;
    return activations + round_up(lam_size(a), UNIT) +
           FMREC_ISA::encoder.scratch(&a->encoder, count);
}

// x = e + lam * shift for one sequence; the padding of x's rows holds zeros and keeps them.
FMREC_INLINE void fuse(const EulerSampler* a, const float* e, const float* lam, int64_t lam_row,
                       const float* shift, float* x) {
    const int64_t channels = a->encoder.channels, stride = row_stride(channels);
    for (int64_t i = 0; i < a->encoder.length; ++i) {
        float* target = x + i * stride;
        const float* source = e + i * channels;
        const float* factor = lam + i * lam_row;
#pragma omp simd
        for (int64_t j = 0; j < channels; ++j) target[j] = source[j] + factor[j] * shift[j];
    }
}

void run(const EulerSampler* a, int64_t begin, int64_t end, float* memory) {
    const Encoder* encoder = &a->encoder;
    const int64_t channels = encoder->channels, length = encoder->length;
    const int64_t stride = row_stride(channels), padded = round_up(channels, UNIT);
    const int64_t count = end - begin, sequence = length * stride;
    float* x = memory;                       // [count, L, stride]: activations
    float* state = x + count * sequence;     // [count, stride]: where the flow has come to
    float* last = state + count * stride;    // [count, stride]
    float* weight = last + count * stride;   // [stride], [stride]: the final norm, padded
    float* bias = weight + stride;
    float* shift = bias + stride;            // [stride]
    float* prediction = shift + stride;      // [stride]
    float* drawn = prediction + stride;      // [L, 4 ceil(D / 4)]
    float* rest = drawn + round_up(lam_size(a), UNIT);
    const int64_t groups = counters_per_position(a);
    CounterWalk walk;
    make_walk(&walk, (uint64_t)groups, 0, 1);
    for (int64_t i = 0; i < count * sequence; ++i) x[i] = 0.0f;
    for (int64_t j = 0; j < stride; ++j) {
        weight[j] = j < channels ? a->norm_weight[j] : 0.0f;
        bias[j] = j < channels ? a->norm_bias[j] : 0.0f;
    }
    for (int64_t s = 0; s < count; ++s) {
        for (int64_t j = 0; j < channels; ++j) {
            const int64_t at = (begin + s) * channels + j;
            state[s * stride + j] = a->z0[at];
            if (a->trajectory) a->out[at] = a->z0[at];
        }
    }
    const LayerNorm norm = {weight, bias, channels, padded};
    for (int64_t step = 0; step < a->steps; ++step) {
        const float* tau = a->taus + step * channels;
        for (int64_t s = 0; s < count; ++s) {
            const int64_t b = begin + s;
            const float* lam = drawn;
            int64_t lam_row = 4 * groups;
            if (a->noise) {
                lam = a->noise + (step * a->batch + b) * length * channels;
                lam_row = channels;
            } else {
                fill_normals(&walk, 0, (uint64_t)(groups * length), (uint32_t)step,
                             (uint32_t)a->rows[b], a->seed, a->delta, a->delta, drawn);
            }
            for (int64_t j = 0; j < channels; ++j) shift[j] = state[s * stride + j] + tau[j];
            fuse(a, a->e + b * length * channels, lam, lam_row, shift, x + s * sequence);
        }
        FMREC_ISA::encoder.run(encoder, x, a->mask + begin * length, count, last, nullptr, rest);
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
