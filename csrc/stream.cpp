#include "stream.h"

#include "philox.h"

namespace fmrec {
namespace {

// Counters generated at a time: their words stay in the first-level cache until they are read.
const int64_t CHUNK = 512;

// Calls fill(walk, start, counters, row, target, n) for every run of at most 4 CHUNK channels; n
// channels of what it fills are the target's.
template <typename Fill>
FMREC_INLINE void for_each_run(const Stream* a, int64_t begin, int64_t end, Fill fill) {
    const int64_t groups = (a->channels + 3) / 4;
    CounterWalk walk;
    make_walk(&walk, (uint64_t)groups, 0, 1);
    for (int64_t b = begin; b < end; ++b) {
        for (int64_t start = 0; start < groups; start += CHUNK) {
            const int64_t counters = groups - start < CHUNK ? groups - start : CHUNK;
            const int64_t rest = a->channels - 4 * start;
            fill(&walk, (uint64_t)start, (uint64_t)counters, (uint32_t)a->rows[b],
                 a->out + b * a->channels + 4 * start, rest < 4 * counters ? rest : 4 * counters);
        }
    }
}

void normals(const Stream* a, int64_t begin, int64_t end) {
    alignas(64) float values[4 * CHUNK];
    for_each_run(a, begin, end,
                 [&](const CounterWalk* walk, uint64_t start, uint64_t counters, uint32_t row,
                     float* target, int64_t n) {
                     fill_normals(walk, start, counters, a->step, row, a->seed, 0.0f, 1.0f, values);
                     __builtin_memcpy(target, values, (uint64_t)n * sizeof(float));
                 });
}

void uniforms(const Stream* a, int64_t begin, int64_t end) {
    alignas(64) uint32_t drawn[4 * CHUNK];
    for_each_run(a, begin, end,
                 [&](const CounterWalk* walk, uint64_t start, uint64_t counters, uint32_t row,
                     float* target, int64_t n) {
                     fill_words(walk, start, counters, a->step, row, a->seed, drawn);
#pragma omp simd
                     for (int64_t i = 0; i < n; ++i) {
                         const int32_t x = (int32_t)drawn[i];
                         target[i] = (float)(x ^ (x >> 31)) * 4.6566127342e-10f;
                     }
                 });
}

void words(uint64_t seed, uint64_t first, int64_t count, int64_t* out) {
    alignas(64) uint32_t drawn[4 * CHUNK];
    CounterWalk walk;
    // Of a single position, whose groups are all the counters.
    make_walk(&walk, (uint64_t)1 << 32, 0, 0);
    for (int64_t done = 0; done < count; done += CHUNK) {
        const int64_t n = count - done < CHUNK ? count - done : CHUNK;
        fill_words(&walk, first + (uint64_t)done, (uint64_t)n, 0, 0, seed, drawn);
        for (int64_t j = 0; j < n; ++j) {
            out[done + j] =
                (int64_t)((uint64_t)drawn[4 * j] | (uint64_t)drawn[4 * j + 1] << 32);
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const StreamKernels stream = {normals, uniforms, words};
}

}  // namespace fmrec
