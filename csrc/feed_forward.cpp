#include "feed_forward.h"

#include "block_half.h"
#include "gelu.h"

namespace fmrec {
namespace {

const int64_t ROWS = FEED_FORWARD_ROWS, PANEL = FEED_FORWARD_PANEL;
const int64_t BACK_ROWS = FEED_FORWARD_BACK_ROWS, BACK_PANEL = FEED_FORWARD_BACK_PANEL;

// --- both directions --------------------------------------------------------------------------

struct Scratch {
    float *normed, *d_normed, *rows, *inner, *slopes, *d_hidden, *sums;
    float *left, *transposed, *left_rows, *transposed_rows, *left_hidden, *right;
    uint32_t* words;
};

template <int PLANES>
int64_t lay_out(const FeedForward* a, float* memory, Scratch* s) {
    float* const start = memory;
    const int64_t width = a->width;
    constexpr int64_t MOST_ROWS = ROWS > BACK_ROWS ? ROWS : BACK_ROWS;
    constexpr int64_t MOST_PANEL = PANEL > BACK_PANEL ? PANEL : BACK_PANEL;
    s->normed = take(&memory, MOST_ROWS * width);
    s->d_normed = take(&memory, MOST_ROWS * width);
    s->rows = take(&memory, MOST_ROWS * width);
    s->inner = take(&memory, MOST_ROWS * MOST_PANEL);
    s->slopes = take(&memory, MOST_ROWS * MOST_PANEL);
    s->d_hidden = take(&memory, MOST_ROWS * MOST_PANEL);
    s->sums = take(&memory, MOST_ROWS * MOST_PANEL);
    s->left = take(&memory, left_size<PLANES>(MOST_ROWS, width));
    s->transposed = take(&memory, left_size<PLANES>(width, MOST_ROWS));
    s->left_rows = take(&memory, left_size<PLANES>(MOST_ROWS, width));
    s->transposed_rows = take(&memory, left_size<PLANES>(width, MOST_ROWS));
    s->left_hidden = take(&memory, left_size<PLANES>(MOST_ROWS, MOST_PANEL));
    s->right = take(&memory, right_size<PLANES>(MOST_ROWS, MOST_PANEL));
    s->words = (uint32_t*)take(&memory, words_size(a->inner > width ? a->inner : width));
    return memory - start;
}

template <int PLANES>
int64_t scratch(const FeedForward* a) {
    Scratch s;
    return lay_out<PLANES>(a, nullptr, &s);
}

// The weights in panels of the inner layer: of each one all that a chunk of rows reads in a row.
template <int PLANES>
FMREC_INLINE int64_t panel_packed(const FeedForward* a, int64_t columns) {
    return right_size<PLANES>(a->width, columns) + right_size<PLANES>(columns, a->width);
}

template <int PLANES>
int64_t packed(const FeedForward* a) {
    const auto all = [=](int64_t panel) {
        return (a->inner + panel - 1) / panel *
               (panel_packed<PLANES>(a, panel) + right_size<PLANES>(a->width, panel));
    };
    return all(PANEL) > all(BACK_PANEL) ? all(PANEL) : all(BACK_PANEL);
}

template <int PLANES>
void pack_forward(const FeedForward* a) {
    float* to = a->packed;
    for (int64_t f = 0; f < a->inner; f += PANEL) {
        const int64_t columns = at_most(a->inner - f, PANEL);
        pack<PLANES>(a->w1 + f * a->width, 1, a->width, a->width, columns, to);
        to += right_size<PLANES>(a->width, columns);
        pack<PLANES>(a->w2 + f, 1, a->inner, columns, a->width, to);
        to += right_size<PLANES>(columns, a->width);
    }
}

template <int PLANES>
void pack_backward(const FeedForward* a) {
    float* to = a->packed;
    for (int64_t f = 0; f < a->inner; f += BACK_PANEL) {
        const int64_t columns = at_most(a->inner - f, BACK_PANEL);
        pack<PLANES>(a->w1 + f * a->width, 1, a->width, a->width, columns, to);
        to += right_size<PLANES>(a->width, columns);
        pack<PLANES>(a->w2 + f, a->inner, 1, a->width, columns, to);
        to += right_size<PLANES>(a->width, columns);
        pack<PLANES>(a->w1 + f * a->width, a->width, 1, columns, a->width, to);
        to += right_size<PLANES>(columns, a->width);
    }
}

FMREC_INLINE LayerNorm norm_of(const FeedForward* a) {
    return {a->norm_weight, a->norm_bias, a->width, a->width};
}

// --- forward ----------------------------------------------------------------------------------

template <int PLANES>
void forward(const FeedForward* a, int64_t begin, int64_t end, float* memory) {
    const TileState tiles{};
    (void)tiles;
    Scratch s;
    lay_out<PLANES>(a, memory, &s);
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
            const Masks masks = {(uint8_t*)a->kept, a->positions, bytes,
                                 a->rows,           a->seed,      a->threshold};
            // Beyond the masks the last word of a row has zeros.
            __builtin_memset((uint8_t*)a->kept + first * bytes, 0, (size_t)(rows * bytes));
            draw_mask(&masks, &inner_walk, first, rows, inner, a->site, 0, s.words);
            draw_mask(&masks, &outer_walk, first, rows, width, a->site + 1, inner, s.words);
            draw_mask(&masks, &outer_walk, first, rows, width, a->site + 2, inner + width, s.words);
        }
        layer_norm(&norm, x, s.normed, width, rows);
        const Operand normed = left<PLANES>(s.normed, width, rows, width, s.left);
        const float* weights = a->packed;
        for (int64_t f = 0; f < inner; f += PANEL) {
            const int64_t columns = at_most(inner - f, PANEL);
            const float* bias = a->b1 + f;
            float* const activated = s.inner;
            finish_product<PLANES>(
                normed, packed_right(weights, columns), width, rows, columns, s.sums,
                [=](int64_t row, int64_t column, const auto& sums, int64_t count) {
                    float* out = activated + row * columns + column;
                    const uint8_t* bits = kept ? kept + row * bytes : nullptr;
                    for (int64_t j = 0; j < count; j += FLOATS) {
                        const f32v h = gelu(sums(j) + load(bias + column + j));
                        store(out + j, masked(bits, f + column + j, h * scale));
                    }
                });
            weights += right_size<PLANES>(width, columns);
            product<PLANES>(left<PLANES>(s.inner, columns, rows, columns, s.left_hidden),
                            packed_right(weights, width), columns, rows, width, f ? nullptr : a->b2,
                            f > 0, s.rows, width);
            weights += right_size<PLANES>(columns, width);
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

template <int PLANES>
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
    const Operand normed = left<PLANES>(s->normed, width, rows, width, s->left);
    const Operand normed_transposed =
        left_transposed<PLANES>(s->normed, width, rows, width, s->transposed);
    // The residual's gradient goes to d_x, the branch's to s->rows.
    for (int64_t i = 0; i < rows; ++i) {
        const uint8_t* bits = kept ? kept + i * bytes : nullptr;
        for (int64_t j = 0; j < width; j += FLOATS) {
            const f32v g = masked(bits, inner + width + j, load(grad + i * width + j) * scale);
            store(d_x + i * width + j, g);
            store(s->rows + i * width + j, masked(bits, inner + j, g * scale));
        }
    }
    add_rows(s->rows, width, rows, width, d_b2);
    const Operand d_outer = left<PLANES>(s->rows, width, rows, width, s->left_rows);
    const Operand d_outer_transposed =
        left_transposed<PLANES>(s->rows, width, rows, width, s->transposed_rows);
    const float* weights = a->packed;
    for (int64_t f = 0; f < inner; f += BACK_PANEL) {
        const int64_t columns = at_most(inner - f, BACK_PANEL);
        const float* bias = a->b1 + f;
        float *const activated = s->inner, *const slopes = s->slopes;
        float* const d_hidden = s->d_hidden;
        // GELU and its derivative are finished under the products of their own layer: what is left
        // for the next one is a multiplication.
        finish_product<PLANES>(
            normed, packed_right(weights, columns), width, rows, columns, s->sums,
            [=](int64_t row, int64_t column, const auto& of, int64_t count) {
                const int64_t at = row * columns + column;
                const uint8_t* bits = kept ? kept + row * bytes : nullptr;
                for (int64_t j = 0; j < count; j += FLOATS) {
                    const f32v h = of(j) + load(bias + column + j);
                    f32v slope;
                    const f32v value = gelu_and_derivative(h, &slope) * scale;
                    store(slopes + at + j, slope * scale);
                    store(activated + at + j, masked(bits, f + column + j, value));
                }
            });
        weights += right_size<PLANES>(width, columns);
        finish_product<PLANES>(d_outer, packed_right(weights, columns), width, rows, columns,
                               s->sums,
                               [=](int64_t row, int64_t column, const auto& of, int64_t count) {
                                   const int64_t at = row * columns + column;
                                   const uint8_t* bits = kept ? kept + row * bytes : nullptr;
                                   for (int64_t j = 0; j < count; j += FLOATS) {
                                       const f32v d = of(j) * load(slopes + at + j);
                                       store(d_hidden + at + j, masked(bits, f + column + j, d));
                                   }
                               });
        weights += right_size<PLANES>(width, columns);
        product<PLANES>(d_outer_transposed,
                        right<PLANES>(s->inner, columns, rows, columns, s->right), rows, width,
                        columns, nullptr, true, d_w2 + f * width, columns);
        product<PLANES>(normed_transposed,
                        right<PLANES>(s->d_hidden, columns, rows, columns, s->right), rows, width,
                        columns, nullptr, true, d_w1 + f * width, columns);
        add_rows(s->d_hidden, columns, rows, columns, d_b1 + f);
        product<PLANES>(left<PLANES>(s->d_hidden, columns, rows, columns, s->left_hidden),
                        packed_right(weights, width), columns, rows, width, nullptr, f > 0,
                        s->d_normed, width);
        weights += right_size<PLANES>(columns, width);
    }
    add_rows(s->d_normed, width, rows, width, d_bias);
    for (int64_t i = 0; i < rows; ++i) {
        float* d_norm = s->d_normed + i * width;
        norm_backward_row<true>(a->norm_weight, width, x + i * width, d_norm, d_norm,
                                d_x + i * width);
    }
    add_rows(s->d_normed, width, rows, width, d_weight);
}

template <int PLANES>
void backward(const FeedForward* a, int64_t begin, int64_t end, float* memory) {
    const TileState tiles{};
    (void)tiles;
    Scratch s;
    lay_out<PLANES>(a, memory, &s);
    const int64_t all = a->batch * a->positions, chunks = (all + BACK_ROWS - 1) / BACK_ROWS;
    const int64_t size = a->width * a->inner;
    for (int64_t part = begin; part < end; ++part) {
        const int64_t count = feed_forward_partial(a->width, a->inner);
        float* partial = a->partial + part * count;
        __builtin_memset(partial, 0, (size_t)count * sizeof(float));
        const int64_t last = chunks * (part + 1) / a->parts;
        for (int64_t chunk = chunks * part / a->parts; chunk < last; ++chunk) {
            const int64_t first = chunk * BACK_ROWS;
            backward_chunk<PLANES>(a, &s, first, at_most(all - first, BACK_ROWS), partial,
                                   partial + size, partial + 2 * size);
        }
    }
}

template <int PLANES>
constexpr FeedForwardKernels kernels() {
    return {packed<PLANES>,        scratch<PLANES>, pack_forward<PLANES>,
            pack_backward<PLANES>, forward<PLANES>, backward<PLANES>};
}

}  // namespace

namespace FMREC_ISA {
extern const FeedForwardKernels feed_forward = kernels<EXACT>();
extern const FeedForwardKernels feed_forward_tf32 = kernels<HALVES>();
extern const FeedForwardKernels feed_forward_bf16 = kernels<ROUNDED>();
extern const FeedForwardKernels feed_forward_float32_int8 = kernels<EXACT_INT8>();
extern const FeedForwardKernels feed_forward_float32_fp16 = kernels<EXACT_FP16>();
extern const FeedForwardKernels feed_forward_tf32_fp16 = kernels<HALVES_FP16>();
}  // namespace FMREC_ISA

}  // namespace fmrec
