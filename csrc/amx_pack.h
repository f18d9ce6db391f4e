// Packing for csrc/amx.h at the rate that operands of a few hundred columns need: a number is
// split once for as few as 128 products.
//
// Splitting into bfloat16s takes integer instructions, since those of AVX512-BF16 would have to be
// shuffled: three planes are exact, whatever the direction that the first ones round in. Included like
// amx.h, which says what becomes of infinity and NaN.
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

// --- float16s ---------------------------------------------------------------------------------

// The halves of a float16 pair, 16 of them: x in the lower half of each, y in the upper.
FMREC_INLINE __m512i pair_halves(__m256i x, __m256i y) {
    static const uint16_t order[32] = {0,  16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8,  24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = _mm512_inserti64x4(_mm512_castsi256_si512(x), y, 1);
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), both);
}

// As split_pairs: PAIRED 16 pairs (x, y), of which a tile of B is made; else x and then y, the 32
// numbers of a row of A.
template <int PLANES, bool PAIRED>
FMREC_INLINE void split_halves(f32v x, f32v y, uint16_t* out, int64_t spacing) {
    const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
#pragma GCC unroll 2
    for (int p = 0; p < PLANES; ++p) {
        const __m256i low = _mm512_cvtps_ph((__m512)x, nearest);
        const __m256i high = _mm512_cvtps_ph((__m512)y, nearest);
        uint16_t* const to = out + p * spacing * AMX_TILE;
        if constexpr (PAIRED) {
            store(to, pair_halves(low, high));
        } else {
            store(to, low);
            store(to + 16, high);
        }
        x -= (f32v)_mm512_cvtph_ps(low);
        y -= (f32v)_mm512_cvtph_ps(high);
    }
}

FMREC_INLINE __mmask16 not_finite(u32v bits) {
    return _mm512_cmpgt_epu32_mask((__m512i)bits, _mm512_set1_epi32(0x7f7fffff));
}

// What the sums are multiplied by, of rows or columns whose numbers are of magnitudes up to `largest`
// (their bits). Of float16s the inverse of a power of two, at most 2^126, that makes the largest 2^14 or
// more, and less than 2^15. Of bytes, in units of the highest digit, the inverse of what makes the
// largest 8355700: a little less than 127 in all digits, for it may be rounded up.
template <int SPLIT>
FMREC_INLINE f32v inverse_factor(u32v largest) {
    if constexpr (in_int8(SPLIT)) {
        const f32v most = (f32v)_mm512_max_epu32((__m512i)largest, _mm512_set1_epi32(24 << 23));
        return (f32v)_mm512_mask_mov_ps((__m512)(most * (0x1p16f / 8355700.0f)),
                                        not_finite(largest), (__m512)broadcast(__builtin_nanf("")));
    } else {
        const u32v power = 268u - (largest >> 23);
        return (f32v)(0x7f000000u -
                      ((u32v)_mm512_min_epu32((__m512i)power, _mm512_set1_epi32(253)) << 23));
    }
}

// The factor itself; NaN where the numbers are not all finite.
template <int SPLIT>
FMREC_INLINE f32v factor_of(f32v inverse) {
    if constexpr (in_int8(SPLIT)) return 0x1p16f / inverse;
    return (f32v)(0x7f000000u - (u32v)inverse);
}

template <bool FINITE>
FMREC_INLINE u32v larger(u32v largest, f32v x) {
    const __m512i bits = (__m512i)((u32v)x & 0x7fffffffu), most = _mm512_set1_epi32(0x7f7fffff);
    if constexpr (!FINITE) return (u32v)_mm512_max_epu32((__m512i)largest, bits);
    const __mmask16 counts = _mm512_cmple_epu32_mask(bits, most);
    return (u32v)_mm512_mask_max_epu32((__m512i)largest, counts, (__m512i)largest, bits);
}

// The largest of each of 16 vectors.
FMREC_INLINE u32v largest_of_each(const u32v* v) {
    __m512i a[8], b[4], c[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        const __m512i x = (__m512i)v[2 * i], y = (__m512i)v[2 * i + 1];
        a[i] = _mm512_max_epu32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const __m512i x = a[2 * i], y = a[2 * i + 1];
        b[i] = _mm512_max_epu32(_mm512_unpacklo_epi64(x, y), _mm512_unpackhi_epi64(x, y));
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
        const __m512i x = b[2 * i], y = b[2 * i + 1];
        c[i] = _mm512_max_epu32(_mm512_shuffle_i32x4(x, y, 0x88),
                                _mm512_shuffle_i32x4(x, y, 0xdd));
    }
    return (u32v)_mm512_max_epu32(_mm512_shuffle_i32x4(c[0], c[1], 0x88),
                                  _mm512_shuffle_i32x4(c[0], c[1], 0xdd));
}

// The inverse factors of a strip of `count` rows of memory.
template <int SPLIT, bool FINITE = false>
FMREC_INLINE f32v factors_of_rows(const float* from, int64_t row, int64_t count, int64_t depth) {
    u32v largest[16];
    const __mmask16 rest = (__mmask16)((1 << depth % 16) - 1);
    for (int i = 0; i < 16; ++i) {
        u32v most = {};
        if (i < count) {
            const float* const at = from + i * row;
            for (int64_t k = 0; k + 16 <= depth; k += 16) most = larger<FINITE>(most, load(at + k));
            if (rest) {
                most = larger<FINITE>(
                    most, (f32v)_mm512_maskz_loadu_ps(rest, at + depth / 16 * 16));
            }
        }
        largest[i] = most;
    }
    const u32v most = largest_of_each(largest);
    if constexpr (!FINITE && !in_int8(SPLIT)) {
        if (not_finite(most)) return factors_of_rows<SPLIT, true>(from, row, count, depth);
    }
    return inverse_factor<SPLIT>(most);
}

// Of up to 64 columns of memory, a vector of each 16.
template <int SPLIT, bool FINITE = false>
FMREC_INLINE void factors_of_columns(const float* from, int64_t row, int64_t columns, int64_t depth,
                                     f32v* factors) {
    u32v largest[4] = {};
    __mmask16 masks[4];
    for (int v = 0; v < 4; ++v) {
        const int64_t left = columns - 16 * v;
        masks[v] = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1 << left) - 1) : 0;
    }
    for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
            largest[v] = larger<FINITE>(
                largest[v], (f32v)_mm512_maskz_loadu_ps(masks[v], from + k * row + 16 * v));
        }
    }
    if constexpr (!FINITE && !in_int8(SPLIT)) {
        u32v most = {};
        for (int v = 0; v < 4; ++v) {
            most = (u32v)_mm512_max_epu32((__m512i)most, (__m512i)largest[v]);
        }
        if (not_finite(most)) {
            return factors_of_columns<SPLIT, true>(from, row, columns, depth, factors);
        }
    }
    for (int v = 0; v < 4; ++v) factors[v] = inverse_factor<SPLIT>(largest[v]);
}

// --- bytes ------------------------------------------------------------------------------------

// 16 quadruples of the digits of (w, x, y, z), rounded, of each plane; the first one has the highest.
FMREC_INLINE void split_bytes(f32v w, f32v x, f32v y, f32v z, uint16_t* out, int64_t spacing) {
    // 128 more in each digit makes them those of an unsigned number; then each is shifted back.
    const uint32_t shift = 0x808080u, back = 0x80808080u;
    const u32v a = (u32v)_mm512_cvtps_epi32((__m512)w) + shift;
    const u32v b = (u32v)_mm512_cvtps_epi32((__m512)x) + shift;
    const u32v c = (u32v)_mm512_cvtps_epi32((__m512)y) + shift;
    const u32v d = (u32v)_mm512_cvtps_epi32((__m512)z) + shift;
    // By pairs of bytes, even and odd digits.
    const uint32_t even = 0x00ff00ffu;
    const u32v ab = (a & even) | (b << 8 & ~even), cd = (c & even) | (d << 8 & ~even);
    const u32v odd_ab = (a >> 8 & even) | (b & ~even), odd_cd = (c >> 8 & even) | (d & ~even);
    const u32v highest = ab >> 16 | (cd & 0xffff0000u), lowest = (ab & 0xffffu) | cd << 16;
    const u32v middle = (odd_ab & 0xffffu) | odd_cd << 16;
    store(out, highest ^ back);
    store(out + spacing * AMX_TILE, middle ^ back);
    store(out + 2 * spacing * AMX_TILE, lowest ^ back);
}

// --- operands ---------------------------------------------------------------------------------

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

// The inverse factors of an operand's rows or columns, to where they belong.
template <int SPLIT, Layout LAYOUT>
FMREC_INLINE void store_factors(const float* from, int64_t row, int64_t strips, int64_t depth,
                                uint16_t* planes) {
    const int64_t size = 32 * amx_row_size(depth, SPLIT);
    if (LAYOUT == DEPTH_INSIDE) {
        for (int64_t s = 0; s < strips; s += 16) {
            store((float*)(planes + s / 32 * size) + s % 32,
                  factors_of_rows<SPLIT>(from + s * row, row, strips - s, depth));
        }
        return;
    }
    for (int64_t s = 0; s < strips; s += 64) {
        f32v factors[4];
        factors_of_columns<SPLIT>(from + s, row, strips - s, depth, factors);
        for (int v = 0; v < 4 && s + 16 * v < strips; ++v) {
            const int64_t first = s + 16 * v;
            store((float*)(planes + first / 32 * size) + first % 32, factors[v]);
        }
    }
}

// An operand (LEFT: A, whose strips are of rows; else B, of columns) that has `strips` rows or columns
// and lies in memory in rows of `row` floats: [strips, depth] or [depth, strips].
template <int SPLIT, bool LEFT, Layout LAYOUT>
void amx_split(const float* from, int64_t row, int64_t strips, int64_t depth, uint16_t* planes) {
    constexpr int PLANES = planes_in(SPLIT), SQUARES = depth_of_tile(SPLIT) / 16;
    constexpr bool FACTORS = has_factors(SPLIT);
    const bool transposed = LEFT != (LAYOUT == DEPTH_INSIDE);
    const int64_t deep = depth_of_tile(SPLIT), depth_tiles = round_to(depth, deep) / deep;
    // Memory rows outside.
    const int64_t outer = LAYOUT == DEPTH_INSIDE ? round_to(strips, 16) / 16 : depth_tiles;
    const int64_t inner = LAYOUT == DEPTH_INSIDE ? depth_tiles : round_to(strips, 16) / 16;
    if constexpr (FACTORS) store_factors<SPLIT, LAYOUT>(from, row, strips, depth, planes);
    for (int64_t u = 0; u < outer; ++u) {
        for (int64_t v = 0; v < inner; ++v) {
            const int64_t strip = LAYOUT == DEPTH_INSIDE ? u : v;
            const int64_t tile = LAYOUT == DEPTH_INSIDE ? v : u;
            const int64_t s = 16 * strip, k = deep * tile;
            const int64_t spacing = strips - s / 32 * 32 > 16 ? 2 : 1;
            uint16_t* const pair = planes + strip / 2 * 32 * amx_row_size(depth, SPLIT);
            uint16_t* const out = pair + (FACTORS ? 32 * spacing : 0) +
                                  (tile * PLANES * spacing + strip % 2) * AMX_TILE;
            f32v x[SQUARES][16], factors;
            alignas(64) float each[16];
            if constexpr (FACTORS) {
                factors = factor_of<SPLIT>(load((const float*)pair + strip % 2 * 16));
                store(each, factors);
            }
#pragma GCC unroll 4
            for (int q = 0; q < SQUARES; ++q) {
                const int64_t at = k + 16 * q;
                if (LAYOUT == DEPTH_INSIDE) {
                    load_square(from + s * row + at, row, strips - s, depth - at, x[q]);
                } else {
                    load_square(from + at * row + s, row, depth - at, strips - s, x[q]);
                }
                if constexpr (FACTORS) {
#pragma GCC unroll 16
                    for (int i = 0; i < 16; ++i) {
                        x[q][i] *= LAYOUT == DEPTH_INSIDE ? broadcast(each[i]) : factors;
                    }
                }
                if (transposed) transpose_square(x[q]);
            }
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                if constexpr (in_int8(SPLIT)) {
                    split_bytes(x[0][i], x[1][i], x[2][i], x[3][i], out + i * 32, spacing);
                } else if constexpr (in_float16(SPLIT) && LEFT) {
                    split_halves<PLANES, false>(x[0][i], x[1][i], out + i * 32, spacing);
                } else if constexpr (in_float16(SPLIT)) {
                    const f32v* const two = x[i / 8] + 2 * (i % 8);
                    split_halves<PLANES, true>(two[0], two[1], out + i * 32, spacing);
                } else {
                    split_pairs<PLANES>(x[0][i], x[1][i], out + i * 32, spacing);
                }
            }
        }
    }
}

}  // namespace
}  // namespace fmrec
