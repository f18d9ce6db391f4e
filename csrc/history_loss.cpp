#include "history_loss.h"

#include <stddef.h>

#include "vector.h"

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

// target (+)= sum of g * row over CELLS cells from `at` on in the order. `index` names the row of
// `matrix` that a cell reads. STREAM asks for a target of whole, aligned vectors.
template <int CELLS, bool ADD, bool STREAM>
FMREC_INLINE void sum_cells(const HistoryLoss* a, int64_t at, const float* matrix,
                            const int64_t* index, float* target) {
    const int64_t n = a->features;
    float g[CELLS + 1];
    const float* row[CELLS + 1];
    for (int c = 0; c < CELLS; ++c) {
        const int32_t m = a->order[at + c];
        g[c] = a->g[m];
        row[c] = matrix + index[m] * n;
    }
    int64_t i = 0;
    for (; i + FLOATS <= n; i += FLOATS) {
        f32v sum = ADD ? load(target + i) : broadcast(0.0f);
#pragma GCC unroll 4
        for (int c = 0; c < CELLS; ++c) sum += broadcast(g[c]) * load(row[c] + i);
        if (STREAM) {
            stream(target + i, sum);
        } else {
            store(target + i, sum);
        }
    }
    for (; i < n; ++i) {
        float sum = ADD ? target[i] : 0.0f;
        for (int c = 0; c < CELLS; ++c) sum += g[c] * row[c][i];
        target[i] = sum;
    }
}

// target = sum of g * row over cells [begin, end) of the order, which may be none; four rows to a
// pass, so that the target is read and written once for four. STREAM: a target past the caches.
template <bool STREAM>
FMREC_INLINE void write_sum(const HistoryLoss* a, int64_t begin, int64_t end, const float* matrix,
                            const int64_t* index, float* target) {
    switch (end - begin) {
        case 0: return sum_cells<0, false, STREAM>(a, begin, matrix, index, target);
        case 1: return sum_cells<1, false, STREAM>(a, begin, matrix, index, target);
        case 2: return sum_cells<2, false, STREAM>(a, begin, matrix, index, target);
        case 3: return sum_cells<3, false, STREAM>(a, begin, matrix, index, target);
        case 4: return sum_cells<4, false, STREAM>(a, begin, matrix, index, target);
    }
    sum_cells<4, false, false>(a, begin, matrix, index, target);
    int64_t at = begin + 4;
    for (; at + 4 <= end; at += 4) sum_cells<4, true, false>(a, at, matrix, index, target);
    for (; at < end; ++at) sum_cells<1, true, false>(a, at, matrix, index, target);
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
    for (int64_t row = begin; row < end; ++row) {
        write_sum<false>(a, a->starts[row], a->starts[row + 1], a->weight, a->cols,
                         a->d_hidden + row * a->features);
    }
}

template <bool STREAM>
FMREC_INLINE void write_columns(const HistoryLoss* a, int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end; ++column) {
        write_sum<STREAM>(a, a->starts[column], a->starts[column + 1], a->hidden, a->rows,
                          a->d_weight + column * a->features);
    }
}

void backward_columns(const HistoryLoss* a, int64_t begin, int64_t end) {
    for (int64_t column = begin; a->d_bias && column < end; ++column) {
        float sum = 0.0f;
        for (int64_t at = a->starts[column]; at < a->starts[column + 1]; ++at) {
            sum += a->g[a->order[at]];
        }
        a->d_bias[column] = sum;
    }
    if (!a->d_weight) return;
    // Most columns have few cells or none: their time is that of writing d_weight.
    if ((uintptr_t)a->d_weight % sizeof(f32v) == 0 && a->features % FLOATS == 0) {
        write_columns<true>(a, begin, end);
        stream_end();
    } else {
        write_columns<false>(a, begin, end);
    }
}

}  // namespace

namespace FMREC_ISA {
extern const HistoryLossKernels history_loss = {forward, backward_rows, backward_columns};
}

}  // namespace fmrec
