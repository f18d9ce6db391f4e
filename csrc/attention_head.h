// What the kernels of attention and of its tangents share: a head's rows in the cache, softmax and
// dropout of one row. Included by kernel translation units only; everything here has internal
// linkage.
#pragma once

#include "attention.h"
#include "encoder.h"
#include "scratch.h"
#include "vector.h"

namespace fmrec {
namespace {

// A head's columns of `rows` rows, as padded rows, and back.
FMREC_INLINE void gather(const float* in, int64_t in_row, int64_t rows, int64_t columns,
                         float* out, int64_t out_row) {
    for (int64_t i = 0; i < rows; ++i) {
        __builtin_memcpy(out + i * out_row, in + i * in_row, (uint64_t)columns * sizeof(float));
    }
}

// out = factor * row, its pairs (j, j + columns / 2) turned by the position's angle: `table` holds
// the cosines of half a head, then the sines; null turns nothing. sign -1 turns back. out may be in.
FMREC_INLINE void rotate_row(const float* in, const float* table, float sign, float factor,
                             int64_t columns, float* out) {
    if (!table) {
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) out[j] = in[j] * factor;
        return;
    }
    const int64_t half = columns / 2;
    const float turned = sign * factor;
#pragma omp simd
    for (int64_t j = 0; j < half; ++j) {
        const float cosine = table[j] * factor, sine = table[half + j] * turned;
        const float low = in[j], high = in[half + j];
        out[j] = low * cosine - high * sine;
        out[half + j] = high * cosine + low * sine;
    }
}

// The angles of position i, or null.
FMREC_INLINE const float* angles_at(const Attention* a, int64_t i) {
    return a->rotary ? a->rotary + i * (a->channels / a->heads) : nullptr;
}

// 2^scores of a row, less its largest, in place; returns 1 / their sum. NaN stays NaN, as it does
// in PyTorch.
FMREC_INLINE float softmax_row(float* row, int64_t keys) {
    f32v most = load(row);
    for (int64_t j = FLOATS; j < keys; j += FLOATS) most = larger(most, load(row + j));
    const float shift = largest(most);
    f32v total = broadcast(0.0f);
    for (int64_t j = 0; j < keys; j += FLOATS) {
        const f32v x = load(row + j) - shift, p = exponential2(x);
        const i32v valid = x == x;
        const f32v result = (f32v)(((i32v)p & valid) | ((i32v)x & ~valid));
        total += result;
        store(row + j, result);
    }
    return 1.0f / sum(total);
}

// x where it is kept, else 0: selected, so that NaN and infinity drop too.
FMREC_INLINE f32v kept(uint32_t threshold, const uint32_t* words, f32v x) {
    u32v word;
    __builtin_memcpy(&word, words, sizeof word);
    return (f32v)((u32v)x & (u32v)(word >= threshold));
}

}  // namespace
}  // namespace fmrec
