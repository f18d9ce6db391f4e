#include "noise_fusion.h"

#include "philox.h"

namespace fmrec {
namespace {

// Counters generated at a time: 8 KiB of normals stay in the first-level cache between their
// generation and their use.
const int64_t CHUNK = 512;

int64_t chunks_per_row(const NoiseFusion* a) {
    const int64_t counters = (a->channels + 3) / 4 * a->length;
    return (counters + CHUNK - 1) / CHUNK;
}

// Calls visit(values, position, channel, count) for every run of channels in the counters
// [start, start + count) of a row. Whole rows are one run where the channels fill their groups.
template <typename Visit>
FMREC_INLINE void for_each_run(const NoiseFusion* a, const float* values, int64_t start,
                               int64_t count, Visit visit) {
    const int64_t groups = (a->channels + 3) / 4;
    int64_t position = start / groups, group = start % groups;
    while (count > 0) {
        const int64_t n = groups - group < count ? groups - group : count;
        const int64_t channel = 4 * group;
        const int64_t rest = a->channels - channel;
        visit(values, position, channel, rest < 4 * n ? rest : 4 * n);
        values += 4 * n;
        count -= n;
        group = 0;
        ++position;
    }
}

template <typename Visit>
FMREC_INLINE void for_each_chunk(const NoiseFusion* a, int64_t begin, int64_t end, Visit visit) {
    const int64_t groups = (a->channels + 3) / 4, counters = groups * a->length;
    const int64_t per_row = chunks_per_row(a);
    CounterWalk walk;
    make_walk(&walk, (uint64_t)groups, 0, 1);
    alignas(64) float values[4 * CHUNK];
    for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / per_row, start = item % per_row * CHUNK;
        const int64_t count = counters - start < CHUNK ? counters - start : CHUNK;
        fill_normals(&walk, (uint64_t)start, (uint64_t)count, a->step, (uint32_t)a->rows[b],
                     a->seed, a->delta, a->delta, values);
        for_each_run(a, values, start, count,
                     [&](const float* lam, int64_t position, int64_t channel, int64_t n) {
                         visit(lam, b, position, channel, n);
                     });
    }
}

void forward(const NoiseFusion* a, int64_t begin, int64_t end) {
    for_each_chunk(a, begin, end,
                   [a](const float* lam, int64_t b, int64_t position, int64_t channel, int64_t n) {
                       const int64_t at = (b * a->length + position) * a->channels + channel;
                       const float* e = a->input + at;
                       const float* shift = a->shift + b * a->channels + channel;
                       float* out = a->out + at;
#pragma omp simd
                       for (int64_t i = 0; i < n; ++i) out[i] = e[i] + lam[i] * shift[i];
                   });
}

void lam(const NoiseFusion* a, int64_t begin, int64_t end) {
    for_each_chunk(a, begin, end,
                   [a](const float* lam, int64_t b, int64_t position, int64_t channel, int64_t n) {
                       const int64_t at = (b * a->length + position) * a->channels + channel;
                       __builtin_memcpy(a->out + at, lam, (uint64_t)n * sizeof(float));
                   });
}

void backward(const NoiseFusion* a, int64_t begin, int64_t end) {
    for (int64_t i = begin * a->channels; i < end * a->channels; ++i) a->out[i] = 0.0f;
    const int64_t per_row = chunks_per_row(a);
    for_each_chunk(a, begin * per_row, end * per_row,
                   [a](const float* lam, int64_t b, int64_t position, int64_t channel, int64_t n) {
                       const int64_t at = (b * a->length + position) * a->channels + channel;
                       const float* grad = a->input + at;
                       float* d_shift = a->out + b * a->channels + channel;
#pragma omp simd
                       for (int64_t i = 0; i < n; ++i) d_shift[i] += lam[i] * grad[i];
                   });
}

int64_t chunks(const NoiseFusion* a) { return a->batch * chunks_per_row(a); }

}  // namespace

namespace FMREC_ISA {
extern const NoiseFusionKernels noise_fusion = {chunks, forward, lam, backward};
}

}  // namespace fmrec
