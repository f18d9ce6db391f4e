#include "feed_forward.h"

#include "gelu.h"
#include "gemm.h"
#include "layer_norm.h"
#include "philox.h"
#if defined(__AMX_BF16__)
#include "amx_pack.h"
#endif

namespace fmrec {
namespace {

const int64_t ROWS = FEED_FORWARD_ROWS, PANEL = FEED_FORWARD_PANEL;

FMREC_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// --- products --------------------------------------------------------------------------------

// An operand as the products below read it: with AMX planes, else a matrix in memory.
struct Operand {
    const float* at;
    int64_t row, depth;  // strides; of B, `row` is that of the depth
};

#if defined(__AMX_BF16__)

const int PLANES = 3;

FMREC_INLINE int64_t left_size(int64_t rows, int64_t depth) {
    return amx_rows_size(rows, depth, PLANES) / 2;
}

FMREC_INLINE int64_t right_size(int64_t depth, int64_t columns) {
    return amx_columns_size(depth, columns, PLANES) / 2;
}

// `in` [rows, depth] as A.
FMREC_INLINE Operand left(const float* in, int64_t rows, int64_t depth, float* memory) {
    amx_split<PLANES, true, DEPTH_INSIDE>(in, depth, rows, depth, (uint16_t*)memory);
    return {memory, 0, 0};
}

// The transpose of `in` [depth, rows] as A.
FMREC_INLINE Operand left_transposed(const float* in, int64_t depth, int64_t rows, float* memory) {
    amx_split<PLANES, true, STRIPS_INSIDE>(in, rows, rows, depth, (uint16_t*)memory);
    return {memory, 0, 0};
}

// `in` [depth, columns] as B.
FMREC_INLINE Operand right(const float* in, int64_t depth, int64_t columns, float* memory) {
    amx_split<PLANES, false, STRIPS_INSIDE>(in, columns, columns, depth, (uint16_t*)memory);
    return {memory, 0, 0};
}

// Element (k, j) of B is at source[k * row + j * column], and one of the strides is 1.
void pack(const float* source, int64_t row, int64_t column, int64_t depth, int64_t columns,
          float* to) {
    if (column == 1) {
        amx_split<PLANES, false, STRIPS_INSIDE>(source, row, columns, depth, (uint16_t*)to);
    } else {
        amx_split<PLANES, false, DEPTH_INSIDE>(source, column, columns, depth, (uint16_t*)to);
    }
}

FMREC_INLINE Operand packed_right(const float* packed, int64_t) { return {packed, 0, 0}; }

// Calls finish(row, column, sums, width) on pieces of the rows of A B.
template <typename Finish>
FMREC_INLINE void finish_product(Operand a, Operand b, int64_t depth, int64_t rows,
                                 int64_t columns, float*, const Finish& finish) {
    amx_blocks<PLANES, PLANES>(
        (const uint16_t*)a.at, (const uint16_t*)b.at, depth, rows, columns,
        [&finish](auto pieces, int64_t row, int64_t column, const float* sums, int64_t width) {
            for (int r = 0; r < decltype(pieces)::count; ++r) {
                finish(row + r, column, sums + 32 * r, width);
            }
        });
}

FMREC_INLINE void product(Operand a, Operand b, int64_t depth, int64_t rows, int64_t columns,
                          const float* bias, bool add, float* out, int64_t out_row) {
    const AmxProduct p = {(const uint16_t*)a.at, (const uint16_t*)b.at, bias, nullptr, add, out,
                          out_row, depth};
    amx_multiply<PLANES>(&p, rows, columns);
}

#else

struct TileState {};

FMREC_INLINE int64_t left_size(int64_t, int64_t) { return 0; }
FMREC_INLINE int64_t right_size(int64_t depth, int64_t columns) { return depth * columns; }
FMREC_INLINE Operand left(const float* in, int64_t, int64_t depth, float*) {
    return {in, depth, 1};
}
FMREC_INLINE Operand left_transposed(const float* in, int64_t, int64_t rows, float*) {
    return {in, 1, rows};
}
FMREC_INLINE Operand right(const float* in, int64_t, int64_t columns, float*) {
    return {in, columns, 0};
}
FMREC_INLINE Operand packed_right(const float* packed, int64_t columns) {
    return {packed, columns, 0};
}

void pack(const float* source, int64_t row, int64_t column, int64_t depth, int64_t columns,
          float* to) {
    for (int64_t k = 0; k < depth; ++k) {
        for (int64_t j = 0; j < columns; ++j) to[k * columns + j] = source[k * row + j * column];
    }
}

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

template <typename Finish>
FMREC_INLINE void finish_product(Operand a, Operand b, int64_t depth, int64_t rows,
                                 int64_t columns, float* sums, const Finish& finish) {
    product(a, b, depth, rows, columns, nullptr, false, sums, columns);
    for (int64_t i = 0; i < rows; ++i) finish(i, 0, sums + i * columns, columns);
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

// The masks of rows [first, first + rows), whose channels begin at the bit `to` of a row.
void draw_mask(const FeedForward* a, const CounterWalk* walk, int64_t first, int64_t rows,
               int64_t channels, uint32_t site, int64_t to, uint32_t* words) {
    const int64_t groups = channels / 4, bytes = 8 * mask_words(a->width, a->inner);
    const int64_t most = channels < WORDS ? WORDS / channels : 1;
    for (int64_t done = 0; done < rows;) {
        const int64_t row = first + done, position = row % a->positions;
        // Up to the end of the sequence.
        const int64_t count = at_most(at_most(rows - done, a->positions - position), most);
        fill_words(walk, (uint64_t)(position * groups), (uint64_t)(count * groups), site,
                   (uint32_t)a->rows[row / a->positions], a->seed, words);
        for (int64_t i = 0; i < count; ++i) {
            uint8_t* out = (uint8_t*)a->kept + (row + i) * bytes + to / 8;
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

// --- both directions --------------------------------------------------------------------------

FMREC_INLINE float* take(float** memory, int64_t count) {
    float* part = *memory;
    *memory += (count + 15) / 16 * 16;
    return part;
}

struct Scratch {
    float *normed, *d_normed, *rows, *inner, *slopes, *d_hidden, *sums;
    float *left, *transposed, *left_rows, *transposed_rows, *left_hidden, *right;
    uint32_t* words;
};

int64_t lay_out(const FeedForward* a, float* memory, Scratch* s) {
    float* const start = memory;
    const int64_t width = a->width;
    s->normed = take(&memory, ROWS * width);
    s->d_normed = take(&memory, ROWS * width);
    s->rows = take(&memory, ROWS * width);
    s->inner = take(&memory, ROWS * PANEL);
    s->slopes = take(&memory, ROWS * PANEL);
    s->d_hidden = take(&memory, ROWS * PANEL);
    s->sums = take(&memory, ROWS * PANEL);
    s->left = take(&memory, left_size(ROWS, width));
    s->transposed = take(&memory, left_size(width, ROWS));
    s->left_rows = take(&memory, left_size(ROWS, width));
    s->transposed_rows = take(&memory, left_size(width, ROWS));
    s->left_hidden = take(&memory, left_size(ROWS, PANEL));
    s->right = take(&memory, right_size(ROWS, PANEL));
    s->words = (uint32_t*)take(&memory, words_size(a->inner > width ? a->inner : width));
    return memory - start;
}

int64_t scratch(const FeedForward* a) {
    Scratch s;
    return lay_out(a, nullptr, &s);
}

// The weights in panels of the inner layer: of each one all that a chunk of rows reads in a row.
FMREC_INLINE int64_t panel_packed(const FeedForward* a, int64_t columns) {
    return right_size(a->width, columns) + right_size(columns, a->width);
}

int64_t packed(const FeedForward* a) {
    const int64_t panels = (a->inner + PANEL - 1) / PANEL;
    return panels * (panel_packed(a, PANEL) + right_size(a->width, PANEL));
}

void pack_forward(const FeedForward* a) {
    float* to = a->packed;
    for (int64_t f = 0; f < a->inner; f += PANEL) {
        const int64_t columns = at_most(a->inner - f, PANEL);
        pack(a->w1 + f * a->width, 1, a->width, a->width, columns, to);
        to += right_size(a->width, columns);
        pack(a->w2 + f, 1, a->inner, columns, a->width, to);
        to += right_size(columns, a->width);
    }
}

void pack_backward(const FeedForward* a) {
    float* to = a->packed;
    for (int64_t f = 0; f < a->inner; f += PANEL) {
        const int64_t columns = at_most(a->inner - f, PANEL);
        pack(a->w1 + f * a->width, 1, a->width, a->width, columns, to);
        to += right_size(a->width, columns);
        pack(a->w2 + f, a->inner, 1, a->width, columns, to);
        to += right_size(a->width, columns);
        pack(a->w1 + f * a->width, a->width, 1, columns, a->width, to);
        to += right_size(columns, a->width);
    }
}

FMREC_INLINE LayerNorm norm_of(const FeedForward* a) {
    return {a->norm_weight, a->norm_bias, a->width, a->width};
}

// --- forward ----------------------------------------------------------------------------------

void forward(const FeedForward* a, int64_t begin, int64_t end, float* memory) {
    const TileState tiles{};
    (void)tiles;
    Scratch s;
    lay_out(a, memory, &s);
    const int64_t width = a->width, inner = a->inner, bytes = 8 * mask_words(width, inner);
    const int64_t all = a->batch * a->positions;
    const LayerNorm norm = norm_of(a);
    CounterWalk inner_walk, outer_walk;
    make_walk(&inner_walk, (uint64_t)inner / 4, a->position_offset, a->position_stride);
    make_walk(&outer_walk, (uint64_t)width / 4, a->position_offset, a->position_stride);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        const int64_t first = chunk * ROWS, rows = at_most(all - first, ROWS);
        const float* x = a->x + first * width;
        const uint8_t* kept = a->kept ? (const uint8_t*)a->kept + first * bytes : nullptr;
        const float scale = a->scale;
        if (kept) {
            // Beyond the masks the last word of a row has zeros.
            __builtin_memset((uint8_t*)a->kept + first * bytes, 0, (size_t)(rows * bytes));
            draw_mask(a, &inner_walk, first, rows, inner, a->site, 0, s.words);
            draw_mask(a, &outer_walk, first, rows, width, a->site + 1, inner, s.words);
            draw_mask(a, &outer_walk, first, rows, width, a->site + 2, inner + width, s.words);
        }
        layer_norm(&norm, x, s.normed, width, rows);
        const Operand normed = left(s.normed, rows, width, s.left);
        const float* weights = a->packed;
        for (int64_t f = 0; f < inner; f += PANEL) {
            const int64_t columns = at_most(inner - f, PANEL);
            const float* bias = a->b1 + f;
            float* const activated = s.inner;
            finish_product(
                normed, packed_right(weights, columns), width, rows, columns, s.sums,
                [=](int64_t row, int64_t column, const float* sums, int64_t count) {
                    float* out = activated + row * columns + column;
                    const uint8_t* bits = kept ? kept + row * bytes : nullptr;
                    for (int64_t j = 0; j < count; j += FLOATS) {
                        const f32v h = gelu(load(sums + j) + load(bias + column + j));
                        store(out + j, masked(bits, f + column + j, h * scale));
                    }
                });
            weights += right_size(width, columns);
            product(left(s.inner, rows, columns, s.left_hidden), packed_right(weights, width),
                    columns, rows, width, f ? nullptr : a->b2, f > 0, s.rows, width);
            weights += right_size(columns, width);
        }
        float* out = a->out + first * width;
        for (int64_t i = 0; i < rows; ++i) {
            const uint8_t* bits = kept ? kept + i * bytes : nullptr;
            for (int64_t j = 0; j < width; j += FLOATS) {
                const f32v branch = masked(bits, inner + j, load(s.rows + i * width + j) * scale);
                const f32v sum = (load(x + i * width + j) + branch) * scale;
                store(out + i * width + j, masked(bits, inner + width + j, sum));
            }
        }
    }
}

// --- backward ---------------------------------------------------------------------------------

// Onto the sums of the chunks before, which one row after the other would round too often.
FMREC_INLINE void add_rows(const float* rows, int64_t count, int64_t width, float* sums) {
    for (int64_t j = 0; j < width; j += FLOATS) {
        f32v total = load(rows + j);
        for (int64_t i = 1; i < count; ++i) total += load(rows + i * width + j);
        store(sums + j, load(sums + j) + total);
    }
}

// d_norm becomes the gradient of the normed row times the norm's own values, for the sums of its
// weight; `out`, which holds the gradient of the residual, gets that of the norm's input added.
FMREC_INLINE void norm_backward_row(const FeedForward* a, const float* x, float* d_norm,
                                    float* out) {
    const int64_t width = a->width;
    const float share = 1.0f / (float)width;
    f32v total = broadcast(0.0f), squares = total, plain = total, mixed = total;
    for (int64_t j = 0; j < width; j += FLOATS) total += load(x + j);
    const f32v mean = broadcast(sum(total) * share);
    for (int64_t j = 0; j < width; j += FLOATS) {
        const f32v d = load(x + j) - mean, g = load(d_norm + j) * load(a->norm_weight + j);
        squares += d * d;
        plain += g;
        mixed += g * d;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) * share + 1e-12f);
    const f32v offset = broadcast(sum(plain) * share);
    const f32v slope = broadcast(sum(mixed) * share * factor * factor);
    for (int64_t j = 0; j < width; j += FLOATS) {
        const f32v d = load(x + j) - mean, g = load(d_norm + j);
        store(out + j, load(out + j) +
                           (g * load(a->norm_weight + j) - offset - d * slope) * factor);
        store(d_norm + j, g * d * factor);
    }
}

void backward_chunk(const FeedForward* a, const Scratch* s, int64_t first, int64_t rows,
                    float* d_w1, float* d_w2, float* sums) {
    const int64_t width = a->width, inner = a->inner, bytes = 8 * mask_words(width, inner);
    const uint8_t* kept = a->kept ? (const uint8_t*)a->kept + first * bytes : nullptr;
    const float scale = a->scale;
    const float* x = a->x + first * width;
    const float* grad = a->grad + first * width;
    float* d_x = a->out + first * width;
    float *d_b1 = sums, *d_b2 = d_b1 + inner, *d_weight = d_b2 + width, *d_bias = d_weight + width;
    const LayerNorm norm = norm_of(a);
    layer_norm(&norm, x, s->normed, width, rows);
    const Operand normed = left(s->normed, rows, width, s->left);
    const Operand normed_transposed = left_transposed(s->normed, rows, width, s->transposed);
    // The residual's gradient goes to d_x, the branch's to s->rows.
    for (int64_t i = 0; i < rows; ++i) {
        const uint8_t* bits = kept ? kept + i * bytes : nullptr;
        for (int64_t j = 0; j < width; j += FLOATS) {
            const f32v g = masked(bits, inner + width + j, load(grad + i * width + j) * scale);
            store(d_x + i * width + j, g);
            store(s->rows + i * width + j, masked(bits, inner + j, g * scale));
        }
    }
    add_rows(s->rows, rows, width, d_b2);
    const Operand d_outer = left(s->rows, rows, width, s->left_rows);
    const Operand d_outer_transposed =
        left_transposed(s->rows, rows, width, s->transposed_rows);
    const float* weights = a->packed;
    for (int64_t f = 0; f < inner; f += PANEL) {
        const int64_t columns = at_most(inner - f, PANEL);
        const float* bias = a->b1 + f;
        float *const activated = s->inner, *const slopes = s->slopes;
        float* const d_hidden = s->d_hidden;
        // GELU and its derivative are finished under the products of their own layer: what is left
        // for the next one is a multiplication.
        finish_product(
            normed, packed_right(weights, columns), width, rows, columns, s->sums,
            [=](int64_t row, int64_t column, const float* of, int64_t count) {
                const int64_t at = row * columns + column;
                const uint8_t* bits = kept ? kept + row * bytes : nullptr;
                for (int64_t j = 0; j < count; j += FLOATS) {
                    const f32v h = load(of + j) + load(bias + column + j);
                    f32v slope;
                    const f32v value = gelu_and_derivative(h, &slope) * scale;
                    store(slopes + at + j, slope * scale);
                    store(activated + at + j, masked(bits, f + column + j, value));
                }
            });
        weights += right_size(width, columns);
        finish_product(
            d_outer, packed_right(weights, columns), width, rows, columns, s->sums,
            [=](int64_t row, int64_t column, const float* of, int64_t count) {
                const int64_t at = row * columns + column;
                const uint8_t* bits = kept ? kept + row * bytes : nullptr;
                for (int64_t j = 0; j < count; j += FLOATS) {
                    const f32v d = load(of + j) * load(slopes + at + j);
                    store(d_hidden + at + j, masked(bits, f + column + j, d));
                }
            });
        weights += right_size(width, columns);
        product(d_outer_transposed, right(s->inner, rows, columns, s->right), rows, width, columns,
                nullptr, true, d_w2 + f * width, columns);
        product(normed_transposed, right(s->d_hidden, rows, columns, s->right), rows, width,
                columns, nullptr, true, d_w1 + f * width, columns);
        add_rows(s->d_hidden, rows, columns, d_b1 + f);
        product(left(s->d_hidden, rows, columns, s->left_hidden), packed_right(weights, width),
                columns, rows, width, nullptr, f > 0, s->d_normed, width);
        weights += right_size(columns, width);
    }
    add_rows(s->d_normed, rows, width, d_bias);
    for (int64_t i = 0; i < rows; ++i) {
        norm_backward_row(a, x + i * width, s->d_normed + i * width, d_x + i * width);
    }
    add_rows(s->d_normed, rows, width, d_weight);
}

void backward(const FeedForward* a, int64_t begin, int64_t end, float* memory) {
    const TileState tiles{};
    (void)tiles;
    Scratch s;
    lay_out(a, memory, &s);
    const int64_t all = a->batch * a->positions, chunks = (all + ROWS - 1) / ROWS;
    const int64_t size = a->width * a->inner;
    for (int64_t part = begin; part < end; ++part) {
        float* partial = a->partial + part * feed_forward_partial(a->width, a->inner);
        const int64_t last = chunks * (part + 1) / a->parts;
        for (int64_t chunk = chunks * part / a->parts; chunk < last; ++chunk) {
            const int64_t first = chunk * ROWS;
            backward_chunk(a, &s, first, at_most(all - first, ROWS), partial, partial + size,
                           partial + 2 * size);
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const FeedForwardKernels feed_forward = {packed,        scratch, pack_forward,
                                                pack_backward, forward, backward};
}

}  // namespace fmrec
