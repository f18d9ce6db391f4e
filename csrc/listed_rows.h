// Sums of the rows that bits name: as many additions as there are bits, where a product with a
// matrix of zeros and ones takes all rows. Included by kernel translation units only; everything
// here has internal linkage.
#pragma once

#include "vector.h"

namespace fmrec {
namespace {

struct ListedRows {
    const uint64_t* bits;  // bit k % 64 of bits[i * words + k / 64]: row k is in sum i
    int64_t words;
    const float* rows;   // [64 words, width]; the last one is zeros, and no bit names it
    int64_t width;       // a multiple of 16
    const float* base;   // [width]
    float factor;
    float* out;          // base + factor * sum i, in rows of out_row floats
    int64_t out_row;
};

// VECTORS vectors of columns from `column` on; STRIDE is the width, where it is known.
template <int VECTORS, int STRIDE>
static void add_listed(const ListedRows* p, int64_t count, int64_t column) {
    const int64_t words = p->words, width = STRIDE ? STRIDE : p->width, out_row = p->out_row;
    const float* const rows = p->rows + column;
    const float* const base = p->base + column;
    const float factor = p->factor;
    float* out = p->out + column;
    for (int64_t i = 0; i < count; ++i, out += out_row) {
        f32v sums[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) sums[v] = broadcast(0.0f);
        const float* block = rows;
        for (int64_t w = 0; w + 1 < words; ++w, block += 64 * width) {
            for (uint64_t bits = p->bits[i * words + w]; bits; bits &= bits - 1) {
                const float* row = block + __builtin_ctzll(bits) * width;
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) sums[v] += load(row + v * FLOATS);
            }
        }
        // The last word's eight at a time: a branch after each, of which there are a few at most,
        // would often be foreseen wrongly. After the last one the row of zeros is added.
        for (uint64_t bits = p->bits[i * words + words - 1]; bits;) {
#pragma GCC unroll 8
            for (int n = 0; n < 8; ++n, bits &= bits - 1) {
                const float* row = block + __builtin_ctzll(bits | 1ull << 63) * width;
#pragma GCC unroll 8
                for (int v = 0; v < VECTORS; ++v) sums[v] += load(row + v * FLOATS);
            }
        }
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) {
            store(out + v * FLOATS, load(base + v * FLOATS) + sums[v] * factor);
        }
    }
}

// `count` sums.
static inline void listed_sums(const ListedRows* p, int64_t count) {
    const int64_t vectors = p->width / FLOATS;
    int64_t v = 0;
    if (vectors == 1) return add_listed<1, FLOATS>(p, count, 0);
    if (vectors == 2) return add_listed<2, 2 * FLOATS>(p, count, 0);
    if (vectors == 4) return add_listed<4, 4 * FLOATS>(p, count, 0);
    for (; v + 4 <= vectors; v += 4) add_listed<4, 0>(p, count, v * FLOATS);
    for (; v < vectors; ++v) add_listed<1, 0>(p, count, v * FLOATS);
}

// out = the sum of `count` rows, as four sums that do not wait for each other.
static inline void sum_rows(const float* rows, int64_t width, int64_t count, float* out) {
    for (int64_t j = 0; j < width; j += FLOATS) {
        f32v sums[4] = {};
        int64_t i = 0;
        for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
            for (int n = 0; n < 4; ++n) sums[n] += load(rows + (i + n) * width + j);
        }
        for (; i < count; ++i) sums[0] += load(rows + i * width + j);
        store(out + j, (sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

// Bit j of word i and bit i of word j change places, of 64 words.
static inline void transpose_bits(uint64_t* square) {
    uint64_t low = 0xffffffff;
#pragma GCC unroll 6
    for (int step = 32; step; step /= 2, low ^= low << step) {
        for (int i = 0; i < 64; i += 2 * step) {
            for (int j = i; j < i + step; ++j) {
                const uint64_t moved = (square[j] >> step ^ square[j + step]) & low;
                square[j] ^= moved << step;
                square[j + step] ^= moved;
            }
        }
    }
}

}  // namespace
}  // namespace fmrec
