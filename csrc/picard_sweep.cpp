#include "picard_sweep.h"

#include "sampler_step.h"

namespace fmrec {
namespace {

// Activations and outputs of a group, its rows of the mask, and what a step and the encoder need.
int64_t scratch(const PicardSweep* a, int64_t count) {
    const int64_t stride = row_stride(a->encoder.channels);
    return (group_rows(a, count) + count) * stride + group_scratch(a, count) + step_scratch(a) +
           FMREC_ISA::encoder.scratch(&a->encoder, count);
}

void run(const PicardSweep* a, int64_t begin, int64_t end, float* memory) {
    const Encoder* encoder = &a->encoder;
    const int64_t channels = encoder->channels, stride = row_stride(channels);
    const int64_t count = end - begin, rows = group_rows(a, count);
    float* x = memory;                // [rows, stride]: activations
    float* last = x + rows * stride;  // [count, stride]
    SamplerStep step;
    Group group;
    float* rest = make_step(a, last + count * stride, &step);
    rest = make_group(a, begin, count, a->steps, rest, &group);
    for (int64_t i = 0; i < rows * stride; ++i) x[i] = 0.0f;
    for (int64_t s = 0; s < count; ++s) {
        const int64_t b = (begin + s) / a->steps, i = (begin + s) % a->steps;
        fuse_noise(&step, b, i, a->x + (begin + s) * channels, x + group.start[s] * stride);
    }
    FMREC_ISA::encoder.run_ragged(encoder, x, group.mask, group.shape, count, last, nullptr, rest);
    for (int64_t s = 0; s < count; ++s) {
        layer_norm(&step.norm, last + s * stride, step.prediction, stride, 1);
        float* out = a->out + (begin + s) * channels;
        for (int64_t j = 0; j < channels; ++j) out[j] = step.prediction[j];
    }
}

}  // namespace

namespace FMREC_ISA {
extern const PicardSweepKernels picard_sweep = {scratch, run};
}

}  // namespace fmrec
