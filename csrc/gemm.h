// C = A B (+ bias) for operands in the cache: a register-blocked product of a few rows by a few
// vectors of columns.
//
// Included by kernel translation units only; everything here has internal linkage. Every element
// of C is the sum of its products in order, from the first to the last, whatever tile it falls
// into: a row's result does not depend on how many rows there are.
#pragma once

#include "vector.h"

namespace fmrec {
namespace {

// A tile's accumulators, one vector of B a column and one broadcast element of A must fit into
// the registers: 32 with AVX-512, else 16.
#if defined(__AVX512F__)
enum { TILE_ROWS = 6, TILE_VECTORS = 4 };
#else
enum { TILE_ROWS = 6, TILE_VECTORS = 2 };
#endif

struct Product {
    const float* a;      // element (i, k) at a[i * a_row + k * a_depth]
    int64_t a_row, a_depth;
    const float* b;      // element (k, j) at b[k * b_row + j]
    int64_t b_row;
    const float* bias;   // [columns], or null
    const float* scale;  // [rows] that the rows of A B are multiplied by, or null
    bool add;            // onto C
    float* c;            // element (i, j) at c[i * c_row + j]
    int64_t c_row;
    int64_t depth;
};

template <int ROWS, int VECTORS>
void tile(const Product* p, int64_t row, int64_t column) {
    f32v sums[ROWS][VECTORS];
#pragma GCC unroll 16
    for (int v = 0; v < VECTORS; ++v) {
        const f32v first = p->bias ? load(p->bias + column + v * FLOATS) : broadcast(0.0f);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) sums[i][v] = first;
    }
    const int64_t a_row = p->a_row, a_depth = p->a_depth, b_row = p->b_row;
    const float* a = p->a + row * a_row;
    const float* b = p->b + column;
    for (int64_t k = p->depth; k > 0; --k) {
        f32v columns[VECTORS];
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) columns[v] = load(b + v * FLOATS);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
            const f32v element = broadcast(a[i * a_row]);
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v) sums[i][v] += element * columns[v];
        }
        a += a_depth;
        b += b_row;
    }
    // Read once: a store could change what p points to, for all that the compiler knows.
    const int64_t c_row = p->c_row;
    float* c = p->c + row * c_row + column;
    if (p->scale) {
        const float* scale = p->scale + row;
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v) sums[i][v] *= broadcast(scale[i]);
        }
    }
    if (p->add) {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
            for (int v = 0; v < VECTORS; ++v) sums[i][v] += load(c + i * c_row + v * FLOATS);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
#pragma GCC unroll 16
        for (int v = 0; v < VECTORS; ++v) store(c + i * c_row + v * FLOATS, sums[i][v]);
    }
}

typedef void (*Tile)(const Product*, int64_t row, int64_t column);

template <int VECTORS>
FMREC_INLINE Tile tile_of(int64_t rows) {
    static const Tile tiles[] = {
        tile<1, VECTORS>, tile<2, VECTORS>, tile<3, VECTORS>,
        tile<4, VECTORS>, tile<5, VECTORS>, tile<6, VECTORS>,
    };
    return tiles[rows - 1];
}

// All rows of `vectors` (1 .. TILE_VECTORS) vectors of columns.
template <int VECTORS>
FMREC_INLINE void strip(const Product* p, int64_t rows, int64_t column) {
    // Tiles of equal height, give or take a row: a short last one would wait for its own sums.
    const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (int64_t t = 0, row = 0; t < tiles; ++t) {
        const int64_t height = (rows - row) / (tiles - t);
        tile_of<VECTORS>(height)(p, row, column);
        row += height;
    }
}

// `columns` is a multiple of 16; C, bias and the rows of B have as many.
static inline void multiply(const Product* p, int64_t rows, int64_t columns) {
    int64_t column = 0;
    for (; column + TILE_VECTORS * FLOATS <= columns; column += TILE_VECTORS * FLOATS) {
        strip<TILE_VECTORS>(p, rows, column);
    }
#if defined(__AVX512F__)
    switch ((columns - column) / FLOATS) {
        case 1: strip<1>(p, rows, column); break;
        case 2: strip<2>(p, rows, column); break;
        case 3: strip<3>(p, rows, column); break;
        default: break;
    }
#endif
}

}  // namespace
}  // namespace fmrec
