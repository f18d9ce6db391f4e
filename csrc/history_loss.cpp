#include "history_loss.h"

namespace fmrec {
namespace {

// Partial sums of a dot product: four vectors of the widest instruction set, so that the
// additions of one do not wait for each other.
const int PARTIAL_SUMS = 64;

FMREC_INLINE float dot(const float* a, const float* b, int64_t n) {
    float sums[PARTIAL_SUMS] = {};
    int64_t i = 0;
    for (; i + PARTIAL_SUMS <= n; i += PARTIAL_SUMS) {
#pragma omp simd
        for (int k = 0; k < PARTIAL_SUMS; ++k) sums[k] += a[i + k] * b[i + k];
    }
    for (int k = 0; i + k < n; ++k) sums[k] += a[i + k] * b[i + k];
    for (int width = PARTIAL_SUMS / 2; width > 0; width /= 2) {
        for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
    }
    return sums[0];
}

// target += sum of g * row over cells [begin, end) of the order, four rows to a pass, so that the
// target is read and written once for four. `index` names the row of `matrix` that a cell reads.
FMREC_INLINE void accumulate(const HistoryLoss* a, int64_t begin, int64_t end,
                             const float* matrix, const int64_t* index, float* target) {
    const int64_t n = a->features;
    int64_t at = begin;
    for (; at + 4 <= end; at += 4) {
        const int32_t* m = a->order + at;
        const float g0 = a->g[m[0]], g1 = a->g[m[1]], g2 = a->g[m[2]], g3 = a->g[m[3]];
        const float* r0 = matrix + index[m[0]] * n;
        const float* r1 = matrix + index[m[1]] * n;
        const float* r2 = matrix + index[m[2]] * n;
        const float* r3 = matrix + index[m[3]] * n;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            target[i] = (((target[i] + g0 * r0[i]) + g1 * r1[i]) + g2 * r2[i]) + g3 * r3[i];
        }
    }
    for (; at < end; ++at) {
        const int32_t m = a->order[at];
        const float g = a->g[m];
        const float* r = matrix + index[m] * n;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) target[i] += g * r[i];
    }
}

void forward(const HistoryLoss* a, int64_t begin, int64_t end) {
    const int64_t n = a->features;
    for (int64_t at = begin; at < end; ++at) {
        // In column order: cells that share a column find its weights in the cache.
        const int32_t m = a->order[at];
        const int64_t column = a->cols[m];
        a->residual[m] = dot(a->hidden + a->rows[m] * n, a->weight + column * n, n) +
                         a->bias[column] - a->label[m];
    }
}

void backward_rows(const HistoryLoss* a, int64_t begin, int64_t end) {
    const int64_t n = a->features;
    for (int64_t row = begin; row < end; ++row) {
        float* target = a->d_hidden + row * n;
        for (int64_t i = 0; i < n; ++i) target[i] = 0.0f;
        accumulate(a, a->starts[row], a->starts[row + 1], a->weight, a->cols, target);
    }
}

void backward_columns(const HistoryLoss* a, int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; ++column) {
        const int64_t first = a->starts[column], last = a->starts[column + 1];
        if (a->d_bias) {
            for (int64_t at = first; at < last; ++at) a->d_bias[column] += a->g[a->order[at]];
        }
        if (a->d_weight && first < last) {
            accumulate(a, first, last, a->hidden, a->rows, a->d_weight + column * a->features);
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const HistoryLossKernels history_loss = {forward, backward_rows, backward_columns};
}

}  // namespace fmrec
