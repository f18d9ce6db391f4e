// How the operands of csrc/amx.h lie in memory. Shared with host sources.
//
// A tile is 1 KiB: 16 rows or columns by 32 of the depth, of which k and k + 16 (k < 16) are a pair,
// next to each other (of float16s: k and k + 1, k even). Of A the 16 pairs of a row are consecutive,
// of B pair by pair the 16 columns. A tile of bytes is 16 by 64 of the depth, with k, k + 16, k + 32
// and k + 48 next to each other. Tiles are consecutive in the order [pair of
// strips][tile of depth][plane][strip of the pair]; a strip is 16 rows of A or 16 columns of B, and
// the last one has no partner where their number is odd. Rows and depth are padded with zeros. Before
// the tiles of a pair of strips, or of the last one, float16s and bytes have the factors of its rows or
// columns.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

constexpr int64_t AMX_TILE = 512;  // numbers of 16 bits

// How operands are split (csrc/amx.h): into 1 to 3 bfloat16s, into 1 or 2 float16s, or into 3 bytes.
constexpr int FLOAT16 = 4, INT8 = 8;
FMREC_INLINE constexpr int planes_in(int split) { return split & 3; }
FMREC_INLINE constexpr bool in_float16(int split) { return (split & FLOAT16) != 0; }
FMREC_INLINE constexpr bool in_int8(int split) { return (split & INT8) != 0; }
// Whether every row and column has a factor.
FMREC_INLINE constexpr bool has_factors(int split) { return split >= FLOAT16; }
FMREC_INLINE constexpr int64_t depth_of_tile(int split) { return in_int8(split) ? 64 : 32; }

FMREC_INLINE constexpr int64_t round_to(int64_t size, int64_t unit) {
    return (size + unit - 1) / unit * unit;
}

// Numbers (uint16_t) of a row or column in all planes: a factor, a float, takes the place of two.
FMREC_INLINE constexpr int64_t amx_row_size(int64_t depth, int split) {
    const int64_t tiles = (depth + depth_of_tile(split) - 1) / depth_of_tile(split);
    return tiles * 32 * planes_in(split) + (has_factors(split) ? 2 : 0);
}

// Of A [rows, depth].
FMREC_INLINE constexpr int64_t amx_rows_size(int64_t rows, int64_t depth, int split) {
    return round_to(rows, 16) * amx_row_size(depth, split);
}

// Of B [depth, columns].
FMREC_INLINE constexpr int64_t amx_columns_size(int64_t depth, int64_t columns, int split) {
    return round_to(columns, 16) * amx_row_size(depth, split);
}

}  // namespace fmrec
