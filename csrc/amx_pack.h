// Packing for csrc/amx.h at the rate that operands of a few hundred columns need: a number is
// split once for as few as 128 products.
//
// Splitting takes integer instructions, since those of AVX512-BF16 would have to be shuffled: three
// planes are exact, whatever the direction that the first ones round in. Included like amx.h, which
// says what becomes of infinity and NaN.
#pragma once

#include "amx.h"

namespace fmrec {
namespace {

// The nearest bfloat16, ties away from zero, as a float's bits. The NaN that overflows here stays
// one as its remainder.
FMREC_INLINE u32v nearest_bf16(f32v x) { return ((u32v)x + 0x8000u) & 0xffff0000u; }

// 16 pairs (x in the lower half, y in the upper) of each plane, `spacing` tiles apart.
template <int PLANES>
FMREC_INLINE void split_pairs(f32v x, f32v y, uint16_t* out, int64_t spacing) {
    if constexpr (PLANES == 1) {
        // Ties to even, as PyTorch rounds.
        const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x));
        const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)y));
        _mm512_storeu_si512(out, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
        return;
    }
#pragma GCC unroll 3
    for (int p = 0; p < PLANES; ++p) {
        // Of three, the last has 8 bits left: nothing to round.
        const bool last = p == 2;
        const u32v low = last ? (u32v)x : nearest_bf16(x);
        const u32v high = last ? (u32v)y & 0xffff0000u : nearest_bf16(y);
        store(out + p * spacing * AMX_TILE, (low >> 16) | high);
        x -= (f32v)low;
        y -= (f32v)high;
    }
}

// 16 rows of 16 floats; zeros beyond rows x columns, which may be less than 1.
FMREC_INLINE void load_square(const float* from, int64_t row, int64_t rows, int64_t columns,
                              f32v* square) {
    const __mmask16 mask = columns >= 16 ? 0xffff : columns > 0 ? (1 << columns) - 1 : 0;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
        square[i] = i < rows ? (f32v)_mm512_maskz_loadu_ps(mask, from + i * row) : f32v{};
    }
}

FMREC_INLINE void transpose_square(f32v* square) {
    __m512 a[16], b[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_ps((__m512)square[i], (__m512)square[i + 1]);
        a[i + 1] = _mm512_unpackhi_ps((__m512)square[i], (__m512)square[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
#pragma GCC unroll 2
        for (int j = 0; j < 2; ++j) {
            const __m512d p = (__m512d)a[i + j], q = (__m512d)a[i + j + 2];
            b[i + 2 * j] = (__m512)_mm512_unpacklo_pd(p, q);
            b[i + 2 * j + 1] = (__m512)_mm512_unpackhi_pd(p, q);
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512 p = _mm512_shuffle_f32x4(b[j], b[j + 4], 0x88);
        const __m512 q = _mm512_shuffle_f32x4(b[j], b[j + 4], 0xdd);
        const __m512 r = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0x88);
        const __m512 s = _mm512_shuffle_f32x4(b[j + 8], b[j + 12], 0xdd);
        square[j] = (f32v)_mm512_shuffle_f32x4(p, r, 0x88);
        square[j + 4] = (f32v)_mm512_shuffle_f32x4(q, s, 0x88);
        square[j + 8] = (f32v)_mm512_shuffle_f32x4(p, r, 0xdd);
        square[j + 12] = (f32v)_mm512_shuffle_f32x4(q, s, 0xdd);
    }
}

// What lies next to each other in memory.
enum Layout { DEPTH_INSIDE, STRIPS_INSIDE };

// An operand (LEFT: A, whose strips are of rows; else B, of columns) that has `strips` rows or columns
// and lies in memory in rows of `row` floats: [strips, depth] or [depth, strips].
template <int PLANES, bool LEFT, Layout LAYOUT>
void amx_split(const float* from, int64_t row, int64_t strips, int64_t depth, uint16_t* planes) {
    const bool transposed = LEFT != (LAYOUT == DEPTH_INSIDE);
    const int64_t depth_tiles = round_to(depth, 32) / 32;
    // Memory rows outside.
    const int64_t outer = LAYOUT == DEPTH_INSIDE ? round_to(strips, 16) / 16 : depth_tiles;
    const int64_t inner = LAYOUT == DEPTH_INSIDE ? depth_tiles : round_to(strips, 16) / 16;
    for (int64_t u = 0; u < outer; ++u) {
        for (int64_t v = 0; v < inner; ++v) {
            const int64_t strip = LAYOUT == DEPTH_INSIDE ? u : v;
            const int64_t tile = LAYOUT == DEPTH_INSIDE ? v : u;
            const int64_t s = 16 * strip, k = 32 * tile;
            const int64_t spacing = strips - s / 32 * 32 > 16 ? 2 : 1;
            uint16_t* out = planes + (strip / 2 * 2 * depth_tiles * PLANES +
                                      tile * PLANES * spacing + strip % 2) * AMX_TILE;
            f32v x[16], y[16];
            if (LAYOUT == DEPTH_INSIDE) {
                const float* at = from + s * row + k;
                load_square(at, row, strips - s, depth - k, x);
                load_square(at + 16, row, strips - s, depth - k - 16, y);
            } else {
                const float* at = from + k * row + s;
                load_square(at, row, depth - k, strips - s, x);
                load_square(at + 16 * row, row, depth - k - 16, strips - s, y);
            }
            if (transposed) {
                transpose_square(x);
                transpose_square(y);
            }
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) split_pairs<PLANES>(x[i], y[i], out + i * 32, spacing);
        }
    }
}

}  // namespace
}  // namespace fmrec
