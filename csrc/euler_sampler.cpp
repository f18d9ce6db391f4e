#include "euler_sampler.h"

#include "sampler_step.h"

namespace fmrec {
namespace {

int64_t scratch(const EulerSampler* a, int64_t count) {
    const int64_t stride = row_stride(a->encoder.channels);
    return (group_rows(a, count) + 2 * count) * stride + step_scratch(a) + group_scratch(a, count) +
           FMREC_ISA::encoder.scratch(&a->encoder, count);
}

void run(const EulerSampler* a, int64_t begin, int64_t end, float* memory) {
    const Encoder* encoder = &a->encoder;
    const int64_t channels = encoder->channels, stride = row_stride(channels);
    const int64_t count = end - begin, rows = group_rows(a, count);
    float* x = memory;                     // [rows, stride]: activations
    float* state = x + rows * stride;      // [count, stride]: where the flow has come to
    float* last = state + count * stride;  // [count, stride]
    SamplerStep step;
    Group group;
    float* rest = make_step(a, last + count * stride, &step);
    rest = make_group(a, begin, count, 1, rest, &group);
    for (int64_t i = 0; i < rows * stride; ++i) x[i] = 0.0f;
    for (int64_t s = 0; s < count; ++s) {
        for (int64_t j = 0; j < channels; ++j) {
            const int64_t at = (begin + s) * channels + j;
            state[s * stride + j] = a->z0[at];
            if (a->trajectory) a->out[at] = a->z0[at];
        }
    }
    for (int64_t i = 0; i < a->steps; ++i) {
        for (int64_t s = 0; s < count; ++s) {
            fuse_noise(&step, begin + s, i, state + s * stride, x + group.start[s] * stride);
        }
        FMREC_ISA::encoder.run_ragged(encoder, x, group.mask, group.shape, count, last, nullptr,
                                      rest);
        float* out = a->out + (a->trajectory ? (i + 1) * a->batch * channels : 0);
        for (int64_t s = 0; s < count; ++s) {
            layer_norm(&step.norm, last + s * stride, step.prediction, stride, 1);
            const float* z0 = a->z0 + (begin + s) * channels;
            float* z = state + s * stride;
            // As published: the difference from the start, not from where the flow has come to.
            for (int64_t j = 0; j < channels; ++j) {
                const float from = a->velocity ? 0.0f : z0[j];
                z[j] += (step.prediction[j] - from) / (float)a->steps;
            }
            if (a->trajectory || i + 1 == a->steps) {
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
