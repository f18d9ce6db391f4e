// C = A B (+ bias) on AMX tiles of 16- or 8-bit numbers, accurate to float32 by splitting the operands.
//
// Floats: a float32 number is the sum of three bfloat16: a = a0 + a1 + a2, each the remainder rounded to
// nearest. Of the nine products of the parts, here called planes, the six a_i b_j with
// i + j <= 2 are kept; those dropped are below 2^-24 |a b|. With two planes (three products) the
// result is closer than operands rounded to tf32 give; with one it is the product of the operands
// rounded to bfloat16. The sums are float32. Numbers below 2^-126, also as planes, count as 0.
//
// With AMX-FP16 (the instruction set amx_fp16) a number is the sum of two float16, 22 bits, and three
// products do: a0 b0, a0 b1, a1 b0; what is dropped is below 2^-22 |a b|. One float16 has the bits of
// a tf32. Their range is small, so that every row of A and every column of B is multiplied by the
// power of two that brings its largest number to 2^14 or more; the sums are multiplied by the inverse
// of both. Numbers below 2^-39 of the largest of their row or column count as 0.
//
// Bytes: every row of A and column of B is multiplied by a factor that brings its largest number to
// 127.5 * 2^16 and rounded to integers, whose three digits to the base of 256, each from -128 to 127,
// are the planes. Tiles of bytes are twice as deep in the same time, so that six products cost what
// three of bfloat16s do. They are exact, as are the sums in 32 bits of those of equal i + j (up to a
// depth of 2^15), of which each needs tiles of its own; the three sums meet as float32. What is
// dropped, and what is left of numbers rounded to integers, is below 2^-22 max|a| max|b| a product, of
// the row and the column, and of either sign. That is float32's own rounding as long as one of the two
// has no number far above its others; whoever calls sees to it. Numbers of rows and columns that have
// none above 2^-103 are rounded to multiples of 2^-126.
//
// Infinity and NaN: a row or column of bytes that has one is NaN as a whole. In floats, where an
// operand is not finite, or so large that rounding it to bfloat16 is infinite (3.39e38), its products
// with several planes are not finite, but may be NaN instead of infinity. Rows and columns keep apart.
//
// Included by the kernel translation units of the instruction set amx only; everything here has
// internal linkage. Every element of C is the same sum in the same order whatever tile it falls
// into: a row's result does not depend on how many rows there are.
#pragma once

#include "amx_layout.h"
#include "vector.h"

namespace fmrec {
namespace {

// Tiles 0 .. 3 accumulate 32 x 32 of C, 4 and 5 are of A, 6 and 7 of B; all 16 rows of 64 bytes.
// The state is a thread's own: held from the start of a task to its end.
struct TileState {
    TileState() {
        struct alignas(64) Config {
            uint8_t palette, start_row, reserved[14];
            uint16_t row_bytes[16];
            uint8_t rows[16];
        };
        static const Config config = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64},
                                      {16, 16, 16, 16, 16, 16, 16, 16}};
        _tile_loadconfig(&config);
    }
    ~TileState() { _tile_release(); }
    TileState(const TileState&) = delete;
    TileState& operator=(const TileState&) = delete;
};

// Rows `row` and up of A's planes of bfloat16: where their tile of `depth_tile` begins, and how far
// apart its planes are, in tiles. `rows` is the number of rows of all of A.
template <int PLANES>
FMREC_INLINE uint16_t* row_of_planes(uint16_t* planes, int64_t rows, int64_t depth_tiles,
                                     int64_t row, int64_t depth_tile, int64_t* spacing) {
    const int64_t pair = row / 32, left = rows - 32 * pair;
    const int64_t tiles = left > 16 ? 2 : 1;
    *spacing = tiles;
    return planes + 2 * pair * depth_tiles * PLANES * AMX_TILE +
           (depth_tile * PLANES * tiles + row % 32 / 16) * AMX_TILE + row % 16 * 32;
}

// The compiler does not know what a tile load reads.
FMREC_INLINE void memory_is_written() { __asm__ volatile("" ::: "memory"); }

// A block of sums, at most 32 x 32 (of bytes one for each i + j, integers), and the first of its rows
// that is not finished.
constexpr int64_t SUMS = 32 * 32;

struct SumsBlock {
    const float* sums;  // [height, 32]
    int64_t row, column, height, width, next;
    const float *row_factors, *column_factors;  // of float16s and bytes
};

// The sums of a piece of a block.
template <int SPLIT>
struct Sums {
    const float *sums, *row_factors, *column_factors;

    // A vector of row r's, from column j on.
    inline __attribute__((always_inline)) f32v at(int r, int64_t j) const {
        const f32v sum = unscaled(sums + 32 * r + j);
        if constexpr (!has_factors(SPLIT)) return sum;
        return sum * (broadcast(row_factors[r]) * load(column_factors + j));
    }

    inline __attribute__((always_inline)) static f32v unscaled(const float* at) {
        if constexpr (!in_int8(SPLIT)) return load(at);
        return integers(at) + integers(at + SUMS) * 0x1p-8f + integers(at + 2 * SUMS) * 0x1p-16f;
    }

    inline __attribute__((always_inline)) static f32v integers(const float* at) {
        return (f32v)_mm512_cvtepi32_ps(_mm512_loadu_si512(at));
    }
};

template <int COUNT>
struct Rows {
    static constexpr int count = COUNT;
};

// Memory that is wanted next: asked for piece by piece, while the tiles multiply.
struct Ahead {
    const char* at;
    const char* end;
    int64_t lines;  // at a time
};

// A call of its own: the compiler moves nothing of it over the tile instructions.
template <int SPLIT, int COUNT, typename Finish>
__attribute__((noinline)) static void finish_rows(const Finish& finish, SumsBlock* block) {
    const int64_t next = block->next;
    const Sums<SPLIT> sums = {block->sums + 32 * next, block->row_factors + next,
                              block->column_factors};
    finish(Rows<COUNT>(), block->row + next, block->column, sums, block->width);
    block->next += COUNT;
}

// What is left.
template <int SPLIT, typename Finish>
FMREC_INLINE void finish_block(const Finish& finish, SumsBlock* block) {
    while (block->next + 2 <= block->height) finish_rows<SPLIT, 2>(finish, block);
    if (block->next < block->height) finish_rows<SPLIT, 1>(finish, block);
}

// sums [16 ROWS, 32] = A's rows times B's columns: ROWS by COLUMNS tiles. Meanwhile the rows of the
// previous block are finished: the tile unit leaves the vector units free for as long as 64 cycles
// at a time, more than the processor looks ahead by itself.
template <int SPLIT, int STORED, int ROWS, int COLUMNS, typename Finish>
static void tile_sums(const uint16_t* a, const uint16_t* b, int64_t depth_tiles, float* sums,
                      SumsBlock* previous, Ahead* ahead, const Finish& finish) {
    constexpr int PLANES = planes_in(SPLIT);
    constexpr bool HALF = in_float16(SPLIT), BYTES = in_int8(SPLIT);
    const int64_t steps = depth_tiles * (PLANES * (PLANES + 1) / 2);
    int64_t due = 0;  // pairs of rows, times steps
    memory_is_written();
#define FMREC_ZERO                                               \
    {                                                            \
        _tile_zero(0);                                           \
        if constexpr (COLUMNS > 1) _tile_zero(1);                \
        if constexpr (ROWS > 1) _tile_zero(2);                   \
        if constexpr (ROWS > 1 && COLUMNS > 1) _tile_zero(3);    \
    }
#define FMREC_STORE(to)                                                                    \
    {                                                                                      \
        _tile_stored(0, to, 128);                                                          \
        if constexpr (COLUMNS > 1) _tile_stored(1, (to) + 16, 128);                        \
        if constexpr (ROWS > 1) _tile_stored(2, (to) + 16 * 32, 128);                      \
        if constexpr (ROWS > 1 && COLUMNS > 1) _tile_stored(3, (to) + 16 * 32 + 16, 128);  \
    }
#define FMREC_LOAD_A(plane)                                                            \
    _tile_loadd(4, a + (plane) * ROWS * AMX_TILE, 64);                                 \
    if constexpr (ROWS > 1) _tile_loadd(5, a + ((plane) * ROWS + 1) * AMX_TILE, 64)
#define FMREC_LOAD_B(plane)                                                            \
    _tile_loadd(6, b + (plane) * COLUMNS * AMX_TILE, 64);                              \
    if constexpr (COLUMNS > 1) _tile_loadd(7, b + ((plane) * COLUMNS + 1) * AMX_TILE, 64)
// TDPFP16PS by its bytes: compilers and assemblers that know the other instructions may not know it.
#define FMREC_MULTIPLY(sum, a, b, vex, operands)                                       \
    if constexpr (HALF) {                                                              \
        __asm__ volatile(".byte 0xc4, 0xe2, " vex ", 0x5c, " operands);                \
    } else if constexpr (BYTES) {                                                      \
        _tile_dpbssd(sum, a, b);                                                       \
    } else {                                                                           \
        _tile_dpbf16ps(sum, a, b);                                                     \
    }
#define FMREC_MULTIPLY_TILES                                                           \
    FMREC_MULTIPLY(0, 4, 6, "0x4b", "0xc4")                                            \
    if constexpr (COLUMNS > 1) { FMREC_MULTIPLY(1, 4, 7, "0x43", "0xcc") }             \
    if constexpr (ROWS > 1) { FMREC_MULTIPLY(2, 5, 6, "0x4b", "0xd5") }                \
    if constexpr (ROWS > 1 && COLUMNS > 1) { FMREC_MULTIPLY(3, 5, 7, "0x43", "0xdd") } \
    for (due += previous->height / 2; due >= steps; due -= steps) {                    \
        finish_rows<SPLIT, 2>(finish, previous);                                       \
    }                                                                                  \
    for (int64_t n = 0; n < ahead->lines && ahead->at < ahead->end; ++n) {             \
        _mm_prefetch(ahead->at, _MM_HINT_T1);                                          \
        ahead->at += 64;                                                               \
    }
    // The sum of most products first, which reads all of the operands.
    for (int level = BYTES ? 2 : -1; level >= 0; --level) {
        FMREC_ZERO
        const uint16_t *const first_a = a, *const first_b = b;
        for (int64_t t = 0; t < depth_tiles; ++t) {
            for (int plane = 0; plane <= level; ++plane) {
                FMREC_LOAD_A(plane);
                FMREC_LOAD_B(level - plane);
                FMREC_MULTIPLY_TILES
            }
            a += PLANES * ROWS * AMX_TILE;
            b += planes_in(STORED) * COLUMNS * AMX_TILE;
        }
        a = first_a;
        b = first_b;
        FMREC_STORE(sums + level * SUMS)
    }
    if constexpr (!BYTES) FMREC_ZERO
    for (int64_t t = 0; !BYTES && t < depth_tiles; ++t) {
        FMREC_LOAD_A(0);
        if constexpr (PLANES > 2) {
            FMREC_LOAD_B(2);
            FMREC_MULTIPLY_TILES
        }
        if constexpr (PLANES > 1) {
            FMREC_LOAD_B(1);
            FMREC_MULTIPLY_TILES
        }
        FMREC_LOAD_B(0);
        FMREC_MULTIPLY_TILES
        if constexpr (PLANES > 1) {
            FMREC_LOAD_A(1);
            FMREC_MULTIPLY_TILES
        }
        if constexpr (PLANES > 2) {
            FMREC_LOAD_B(1);
            FMREC_MULTIPLY_TILES
            FMREC_LOAD_A(2);
            FMREC_LOAD_B(0);
            FMREC_MULTIPLY_TILES
        }
        a += PLANES * ROWS * AMX_TILE;
        b += planes_in(STORED) * COLUMNS * AMX_TILE;
    }
    if constexpr (!BYTES) FMREC_STORE(sums)
#undef FMREC_ZERO
#undef FMREC_STORE
#undef FMREC_LOAD_A
#undef FMREC_LOAD_B
#undef FMREC_MULTIPLY_TILES
#undef FMREC_MULTIPLY
    memory_is_written();
}

// Calls finish(Rows<N>(), row, column, sums, width) on pieces of N rows of A B, 32 apart, 32 or 16
// columns wide, in some order; columns is a multiple of 16. N is 2, of which the first row is even,
// or 1; of `sums`, sums.at(r, j) are those of row + r from column + j on. A is split into SPLIT, B into
// STORED, of which the first planes are used. finish must not write what A and B are in. The thread
// holds a TileState. `next` (or null) is the B that is multiplied afterwards, about as large: in no
// cache, which is where a single sequence finds the weights, it takes as long to read as this product
// takes.
template <int SPLIT, int STORED, typename Finish>
FMREC_INLINE void amx_blocks(const uint16_t* a, const uint16_t* b, int64_t depth, int64_t rows,
                             int64_t columns, const Finish& finish,
                             const uint16_t* next = nullptr) {
    constexpr int PLANES = planes_in(SPLIT);
    constexpr bool FACTORS = has_factors(SPLIT);
    static_assert(PLANES >= 1 && PLANES <= planes_in(STORED), "one to three planes");
    static_assert(FACTORS ? STORED == SPLIT : !has_factors(STORED), "of one type");
    static_assert(in_float16(SPLIT) ? PLANES < 3 : PLANES == 3 || !in_int8(SPLIT), "of use");
    const int64_t depth_tiles = round_to(depth, depth_of_tile(SPLIT)) / depth_of_tile(SPLIT);
    alignas(64) float memory[2][in_int8(SPLIT) ? 3 * SUMS : SUMS];
    SumsBlock previous = {memory[1], 0, 0, 0, 0, 0, nullptr, nullptr};
    int turn = 0;
    const int64_t size = next ? 2 * amx_columns_size(depth, columns, STORED) : 0;
    const int64_t times = round_to(rows, 32) / 32 * (round_to(columns, 32) / 32) * depth_tiles *
                          (PLANES * (PLANES + 1) / 2);
    Ahead ahead = {(const char*)next, (const char*)next + size,
                   times > 0 ? (size / 64 + times - 1) / times : 0};
    for (int64_t i = 0; i < rows; i += 32) {
        const uint16_t* left = a + i * amx_row_size(depth, SPLIT);
        const float* const row_factors = (const float*)left;
        const int64_t height = rows - i < 32 ? rows - i : 32;
        if (FACTORS) left += height > 16 ? 64 : 32;
        for (int64_t j = 0; j < columns; j += 32, turn ^= 1) {
            const uint16_t* right = b + j * amx_row_size(depth, STORED);
            const float* const column_factors = (const float*)right;
            const bool wide = columns - j > 16;
            if (FACTORS) right += wide ? 64 : 32;
            float* sums = memory[turn];
            if (height > 16) {
                if (wide) {
                    tile_sums<SPLIT, STORED, 2, 2>(left, right, depth_tiles, sums, &previous,
                                                    &ahead, finish);
                } else {
                    tile_sums<SPLIT, STORED, 2, 1>(left, right, depth_tiles, sums, &previous,
                                                    &ahead, finish);
                }
            } else if (wide) {
                tile_sums<SPLIT, STORED, 1, 2>(left, right, depth_tiles, sums, &previous, &ahead,
                                                finish);
            } else {
                tile_sums<SPLIT, STORED, 1, 1>(left, right, depth_tiles, sums, &previous, &ahead,
                                                finish);
            }
            // An odd row; products without a depth leave it all.
            finish_block<SPLIT>(finish, &previous);
            previous =
                SumsBlock{sums, i, j, height, wide ? 32 : 16, 0, row_factors, column_factors};
        }
    }
    finish_block<SPLIT>(finish, &previous);
}

// As gemm.h's Product.
struct AmxProduct {
    const uint16_t* a;   // by amx_split (csrc/amx_pack.h), as b
    const uint16_t* b;
    const float* bias;   // [columns], or null
    const float* scale;  // [rows] that the rows of A B are multiplied by, or null
    bool add;            // onto C
    float* c;            // element (i, j) at c[i * c_row + j]
    int64_t c_row;
    int64_t depth;
    const uint16_t* next = nullptr;  // as amx_blocks
};

// `columns` is a multiple of 16; C, bias and B have as many. The thread holds a TileState.
template <int SPLIT, int STORED = SPLIT>
static inline void amx_multiply(const AmxProduct* p, int64_t rows, int64_t columns) {
    const AmxProduct q = *p;
    amx_blocks<SPLIT, STORED>(
        q.a, q.b, q.depth, rows, columns,
        [&q](auto pieces, int64_t row, int64_t column, const auto& sums, int64_t width) {
#pragma GCC unroll 2
            for (int r = 0; r < decltype(pieces)::count; ++r) {
                float* c = q.c + (row + r) * q.c_row + column;
                for (int64_t j = 0; j < width; j += FLOATS) {
                    f32v sum = sums.at(r, j);
                    if (q.bias) sum += load(q.bias + column + j);
                    if (q.scale) sum *= broadcast(q.scale[row + r]);
                    if (q.add) sum += load(c + j);
                    store(c + j, sum);
                }
            }
        },
        q.next);
}

}  // namespace
}  // namespace fmrec
