// How the operands of csrc/amx.h lie in memory. Shared with host sources.
//
// A tile is 1 KiB: 16 rows or columns by 32 of the depth, of which k and k + 16 (k < 16) are a pair,
// next to each other (of float16s: k and k + 1, k even). Of A the 16 pairs of a row are consecutive,
// of B pair by pair the 16 columns. Tiles are consecutive in the order [pair of
// strips][tile of depth][plane][strip of the pair]; a strip is 16 rows of A or 16 columns of B, and
// the last one has no partner where their number is odd. Rows and depth are padded with zeros. Before
// the tiles of a pair of strips, or of the last one, float16s have the factors of its rows or columns.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

constexpr int64_t AMX_TILE = 512;  // numbers of 16 bits

// How operands are split (csrc/amx.h): into 1 to 3 bfloat16s, or into 1 or 2 float16s.
constexpr int FLOAT16 = 4;
FMREC_INLINE constexpr int planes_in(int split) { return split & 3; }
FMREC_INLINE constexpr bool in_float16(int split) { return (split & FLOAT16) != 0; }

FMREC_INLINE constexpr int64_t round_to(int64_t size, int64_t unit) {
    return (size + unit - 1) / unit * unit;
}

// Numbers (uint16_t) of a row or column in all planes: a factor, a float, takes the place of two.
FMREC_INLINE constexpr int64_t amx_row_size(int64_t depth, int split) {
    return round_to(depth, 32) * planes_in(split) + (in_float16(split) ? 2 : 0);
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
