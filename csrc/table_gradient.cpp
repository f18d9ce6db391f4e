#include "table_gradient.h"

#include <stddef.h>

#include "vector.h"

namespace fmrec {
namespace {

// Channels [at, at + N vectors) of the sum of some sources; the sums stay in registers.
template <int N>
FMREC_INLINE void sum_vectors(const float* const* sources, int64_t count, int64_t at, float* out) {
    f32v sums[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sums[n] = broadcast(0.0f);
    for (int64_t i = 0; i < count; ++i) {
        const float* source = sources[i] + at;
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) sums[n] += load(source + n * FLOATS);
    }
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) store(out + at + n * FLOATS, sums[n]);
}

void sums(const RowSums* a, int64_t begin, int64_t end) {
    const int64_t width = a->width;
    for (int64_t k = begin; k < end; ++k) {
        const float* const* sources = a->sources + a->starts[k];
        const int64_t count = a->starts[k + 1] - a->starts[k];
        float* out = a->out + k * width;
        if (count == 0) {
            __builtin_memset(out, 0, (size_t)width * sizeof(float));
            continue;
        }
        int64_t at = 0;
        for (; at + 8 * FLOATS <= width; at += 8 * FLOATS) sum_vectors<8>(sources, count, at, out);
        for (; at + FLOATS <= width; at += FLOATS) sum_vectors<1>(sources, count, at, out);
        for (; at < width; ++at) {
            float sum = 0.0f;
            for (int64_t i = 0; i < count; ++i) sum += sources[i][at];
            out[at] = sum;
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const TableGradientKernels table_gradient = {sums};
}

}  // namespace fmrec
