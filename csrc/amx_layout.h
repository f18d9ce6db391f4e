// How the operands of csrc/amx.h lie in memory. Shared with host sources.
//
// A tile is 1 KiB: 16 rows or columns by 32 of the depth, of which k and k + 16 (k < 16) are a pair,
// next to each other. Of A the 16 pairs of a row are consecutive, of B pair by pair the 16 columns.
// Tiles are consecutive in the order [pair of
// strips][tile of depth][plane][strip of the pair]; a strip is 16 rows of A or 16 columns of B, and
// the last one has no partner where their number is odd. Rows and depth are padded with zeros.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

constexpr int64_t AMX_TILE = 512;  // bfloat16 numbers

FMREC_INLINE constexpr int64_t round_to(int64_t size, int64_t unit) {
    return (size + unit - 1) / unit * unit;
}

// Numbers (uint16_t) in the planes of A [rows, depth].
FMREC_INLINE constexpr int64_t amx_rows_size(int64_t rows, int64_t depth, int64_t planes) {
    return round_to(rows, 16) * round_to(depth, 32) * planes;
}

// Of B [depth, columns].
FMREC_INLINE constexpr int64_t amx_columns_size(int64_t depth, int64_t columns, int64_t planes) {
    return round_to(columns, 16) * round_to(depth, 32) * planes;
}

}  // namespace fmrec
