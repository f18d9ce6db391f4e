// What the two halves of a transformer block in training are made of: products of a chunk of rows
// in the second-level cache, masks kept as bits, and the gradient of a norm. Included by kernel
// translation units only; everything here has internal linkage.
#pragma once

#include "gemm.h"
#include "layer_norm.h"
#include "philox.h"
#include "scratch.h"
#if defined(__AMX_BF16__)
#include "amx_pack.h"
#endif

namespace fmrec {
namespace {

FMREC_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// --- products --------------------------------------------------------------------------------

// How an operand is split in float32, in tf32 and in bf16, in float32 where no weight is far above the
// others, and with AMX-FP16 in float32 and tf32: where there are tiles.
#if defined(__AMX_BF16__)
const int EXACT = 3, HALVES = 2, ROUNDED = 1, EXACT_INT8 = INT8 + 3;
const int EXACT_FP16 = FLOAT16 + 2, HALVES_FP16 = FLOAT16 + 1;
#else
const int EXACT = 3, HALVES = EXACT, ROUNDED = EXACT, EXACT_INT8 = EXACT;
const int EXACT_FP16 = EXACT, HALVES_FP16 = EXACT;
#endif

// An operand as the products below read it: with AMX planes, else a matrix in memory.
struct Operand {
    const float* at;
    int64_t row, depth;  // strides; of B, `row` is that of the depth
};

#if defined(__AMX_BF16__)

template <int PLANES>
FMREC_INLINE int64_t left_size(int64_t rows, int64_t depth) {
    return amx_rows_size(rows, depth, PLANES) / 2;
}

template <int PLANES>
FMREC_INLINE int64_t right_size(int64_t depth, int64_t columns) {
    return amx_columns_size(depth, columns, PLANES) / 2;
}

// `in` [rows, depth], in rows of `row` floats, as A.
template <int PLANES>
FMREC_INLINE Operand left(const float* in, int64_t row, int64_t rows, int64_t depth,
                          float* memory) {
    amx_split<PLANES, true, DEPTH_INSIDE>(in, row, rows, depth, (uint16_t*)memory);
    return {memory, 0, 0};
}

// The transpose of `in` [depth, rows] as A.
template <int PLANES>
FMREC_INLINE Operand left_transposed(const float* in, int64_t row, int64_t depth, int64_t rows,
                                     float* memory) {
    amx_split<PLANES, true, STRIPS_INSIDE>(in, row, rows, depth, (uint16_t*)memory);
    return {memory, 0, 0};
}

// `in` [depth, columns] as B.
template <int PLANES>
FMREC_INLINE Operand right(const float* in, int64_t row, int64_t depth, int64_t columns,
                           float* memory) {
    amx_split<PLANES, false, STRIPS_INSIDE>(in, row, columns, depth, (uint16_t*)memory);
    return {memory, 0, 0};
}

// Element (k, j) of B is at source[k * row + j * column], and one of the strides is 1.
template <int PLANES>
static inline void pack(const float* source, int64_t row, int64_t column, int64_t depth,
                        int64_t columns, float* to) {
    if (column == 1) {
        amx_split<PLANES, false, STRIPS_INSIDE>(source, row, columns, depth, (uint16_t*)to);
    } else {
        amx_split<PLANES, false, DEPTH_INSIDE>(source, column, columns, depth, (uint16_t*)to);
    }
}

FMREC_INLINE Operand packed_right(const float* packed, int64_t) { return {packed, 0, 0}; }

// Calls finish(row, column, sums, width) on pieces of the rows of A B, whose vector at column + j is
// sums(j).
template <int PLANES, typename Finish>
FMREC_INLINE void finish_product(Operand a, Operand b, int64_t depth, int64_t rows,
                                 int64_t columns, float*, const Finish& finish) {
    amx_blocks<PLANES, PLANES>(
        (const uint16_t*)a.at, (const uint16_t*)b.at, depth, rows, columns,
        [&finish](auto pieces, int64_t row, int64_t column, const auto& sums, int64_t width) {
            for (int r = 0; r < decltype(pieces)::count; ++r) {
                finish(row + r, column, [&sums, r](int64_t j) { return sums.at(r, j); }, width);
            }
        });
}

template <int PLANES>
FMREC_INLINE void product(Operand a, Operand b, int64_t depth, int64_t rows, int64_t columns,
                          const float* bias, bool add, float* out, int64_t out_row) {
    const AmxProduct p = {(const uint16_t*)a.at, (const uint16_t*)b.at, bias, nullptr, add, out,
                          out_row, depth};
    amx_multiply<PLANES>(&p, rows, columns);
}

#else

struct TileState {};

template <int PLANES>
FMREC_INLINE int64_t left_size(int64_t, int64_t) { return 0; }
template <int PLANES>
FMREC_INLINE int64_t right_size(int64_t depth, int64_t columns) { return depth * columns; }
template <int PLANES>
FMREC_INLINE Operand left(const float* in, int64_t row, int64_t, int64_t, float*) {
    return {in, row, 1};
}
template <int PLANES>
FMREC_INLINE Operand left_transposed(const float* in, int64_t row, int64_t, int64_t, float*) {
    return {in, 1, row};
}
template <int PLANES>
FMREC_INLINE Operand right(const float* in, int64_t row, int64_t, int64_t, float*) {
    return {in, row, 0};
}
FMREC_INLINE Operand packed_right(const float* packed, int64_t columns) {
    return {packed, columns, 0};
}

template <int PLANES>
static inline void pack(const float* source, int64_t row, int64_t column, int64_t depth,
                        int64_t columns, float* to) {
    for (int64_t k = 0; k < depth; ++k) {
        for (int64_t j = 0; j < columns; ++j) to[k * columns + j] = source[k * row + j * column];
    }
}

template <int PLANES>
FMREC_INLINE void product(Operand a, Operand b, int64_t depth, int64_t rows, int64_t columns,
                          const float* bias, bool add, float* out, int64_t out_row) {
    // Columns of B that stay in the first-level cache while all rows pass them.
    const int64_t strip = 64;
    for (int64_t j = 0; j < columns; j += strip) {
        const Product p = {a.at, a.row, a.depth, b.at + j, b.row, bias ? bias + j : nullptr,
                           nullptr, add, out + j, out_row, depth};
        multiply(&p, rows, at_most(columns - j, strip));
    }
}

template <int PLANES, typename Finish>
FMREC_INLINE void finish_product(Operand a, Operand b, int64_t depth, int64_t rows,
                                 int64_t columns, float* sums, const Finish& finish) {
    product<PLANES>(a, b, depth, rows, columns, nullptr, false, sums, columns);
    for (int64_t i = 0; i < rows; ++i) {
        finish(i, 0, [=](int64_t j) { return load(sums + i * columns + j); }, columns);
    }
}

#endif

// --- masks ------------------------------------------------------------------------------------

// Words of the stream that are drawn at a time, unless a row has more.
const int64_t WORDS = 8192;

FMREC_INLINE int64_t words_size(int64_t channels) {
    return (channels > WORDS ? channels : WORDS) + 4 * COUNTERS;
}

// Bit i: whether word i, of a vector's, is at least the threshold.
FMREC_INLINE uint32_t kept_bits(const uint32_t* words, uint32_t threshold) {
    u32v word;
    __builtin_memcpy(&word, words, sizeof word);
#if defined(__AVX512F__)
    return _mm512_cmpge_epu32_mask((__m512i)word, _mm512_set1_epi32((int)threshold));
#elif defined(__AVX2__)
    return (uint32_t)_mm256_movemask_ps((__m256)(u32v)(word >= threshold));
#else
    uint32_t bits = 0;
    for (int i = 0; i < FLOATS; ++i) bits |= (uint32_t)(word[i] >= threshold) << i;
    return bits;
#endif
}

// x where the bits from `channel` on are set, else 0: selected, so that NaN and infinity drop too.
FMREC_INLINE f32v select(const uint8_t* bits, uint64_t channel, f32v x) {
#if defined(__AVX512F__)
    uint16_t mask;
    __builtin_memcpy(&mask, bits + channel / 8, sizeof mask);
    return (f32v)_mm512_maskz_mov_ps(mask, (__m512)x);
#else
    const uint32_t mask = (uint32_t)bits[channel / 8] >> channel % 8;
#if defined(__AVX2__)
    const u32v lanes = {1, 2, 4, 8, 16, 32, 64, 128};
#else
    const u32v lanes = {1, 2, 4, 8};
#endif
    return (f32v)((u32v)x & (u32v)(((u32v{} + mask) & lanes) != 0));
#endif
}

// Without bits, nothing is dropped.
FMREC_INLINE f32v masked(const uint8_t* bits, int64_t channel, f32v x) {
    return bits ? select(bits, (uint64_t)channel, x) : x;
}

// Where a sequence's positions draw their masks, and where these are kept.
struct Masks {
    uint8_t* kept;  // [sequences * positions, bytes]
    int64_t positions, bytes;
    const int64_t* rows;  // [sequences]
    uint64_t seed;
    uint32_t threshold;
};

// The masks of rows [first, first + rows), whose channels begin at the bit `to` of a row.
static inline void draw_mask(const Masks* a, const CounterWalk* walk, int64_t first, int64_t rows,
                             int64_t channels, uint32_t site, int64_t to, uint32_t* words) {
    const int64_t groups = channels / 4, bytes = a->bytes;
    const int64_t most = channels < WORDS ? WORDS / channels : 1;
    for (int64_t done = 0; done < rows;) {
        const int64_t row = first + done, position = row % a->positions;
        // Up to the end of the sequence.
        const int64_t count = at_most(at_most(rows - done, a->positions - position), most);
        fill_words(walk, (uint64_t)(position * groups), (uint64_t)(count * groups), site,
                   (uint32_t)a->rows[row / a->positions], a->seed, words);
        for (int64_t i = 0; i < count; ++i) {
            uint8_t* out = a->kept + (row + i) * bytes + to / 8;
            const uint32_t* in = words + i * channels;
#if FMREC_VECTOR_BYTES == 64
            for (int64_t j = 0; j < channels; j += 16) {
                const uint16_t bits = (uint16_t)kept_bits(in + j, a->threshold);
                __builtin_memcpy(out + j / 8, &bits, sizeof bits);
            }
#else
            for (int64_t j = 0; j < channels; j += 8) {
                uint32_t bits = 0;
                for (int64_t k = 0; k < 8; k += FLOATS) {
                    bits |= kept_bits(in + j + k, a->threshold) << k;
                }
                out[j / 8] = (uint8_t)bits;
            }
#endif
        }
        done += count;
    }
}

// --- gradients --------------------------------------------------------------------------------

// Onto the sums of the chunks before, which one row after the other would round too often.
FMREC_INLINE void add_rows(const float* rows, int64_t row, int64_t count, int64_t width,
                           float* sums) {
    for (int64_t j = 0; j < width; j += FLOATS) {
        f32v total = broadcast(0.0f);
        for (int64_t i = 0; i < count; ++i) total += load(rows + i * row + j);
        store(sums + j, load(sums + j) + total);
    }
}

// From the gradient of a normed row: `out` becomes that of the norm's input, or has it added (ADD),
// and `products`, which may be d_norm, what the gradient of the weight is the sum of.
template <bool ADD>
FMREC_INLINE void norm_backward_row(const float* weight, int64_t width, const float* x,
                                    const float* d_norm, float* products, float* out) {
    const float share = 1.0f / (float)width;
    f32v total = broadcast(0.0f), squares = total, plain = total, mixed = total;
    for (int64_t j = 0; j < width; j += FLOATS) total += load(x + j);
    const f32v mean = broadcast(sum(total) * share);
    for (int64_t j = 0; j < width; j += FLOATS) {
        const f32v d = load(x + j) - mean, g = load(d_norm + j) * load(weight + j);
        squares += d * d;
        plain += g;
        mixed += g * d;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) * share + 1e-12f);
    const f32v offset = broadcast(sum(plain) * share);
    const f32v slope = broadcast(sum(mixed) * share * factor * factor);
    for (int64_t j = 0; j < width; j += FLOATS) {
        const f32v d = load(x + j) - mean, g = load(d_norm + j);
        const f32v d_x = (g * load(weight + j) - offset - d * slope) * factor;
        store(out + j, ADD ? load(out + j) + d_x : d_x);
        store(products + j, g * d * factor);
    }
}

}  // namespace
}  // namespace fmrec
