#include "dropout_layer_norm.h"

#include "block_half.h"

namespace fmrec {
namespace {

const int64_t ROWS = DROPOUT_NORM_ROWS;

struct Scratch {
    float *dropped, *products;
    uint32_t* words;
};

int64_t lay_out(const DropoutLayerNorm* a, float* memory, Scratch* s) {
    float* const start = memory;
    s->dropped = take(&memory, ROWS * a->width);
    s->products = take(&memory, ROWS * a->width);
    s->words = (uint32_t*)take(&memory, words_size(a->width));
    return memory - start;
}

int64_t scratch(const DropoutLayerNorm* a) {
    Scratch s;
    return lay_out(a, nullptr, &s);
}

// out = dropout of a row of `in` [M, D]; it may be that row.
FMREC_INLINE void drop_row(const DropoutLayerNorm* a, int64_t row, const float* in, float* out) {
    const uint8_t* bits = (const uint8_t*)(a->kept + row * norm_mask_words(a->width));
    for (int64_t j = 0; j < a->width; j += FLOATS) {
        store(out + j, masked(bits, j, load(in + row * a->width + j) * a->scale));
    }
}

void forward(const DropoutLayerNorm* a, int64_t begin, int64_t end, float* memory) {
    Scratch s;
    lay_out(a, memory, &s);
    const int64_t width = a->width, all = a->batch * a->positions;
    const int64_t bytes = 8 * norm_mask_words(width);
    const LayerNorm norm = {a->weight, a->bias, width, width};
    CounterWalk walk;
    make_walk(&walk, (uint64_t)width / 4, a->position_offset, a->position_stride);
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item * ROWS, rows = at_most(all - first, ROWS);
        const float* x = a->x + first * width;
        if (a->kept) {
            const Masks masks = {(uint8_t*)a->kept, a->positions, bytes,
                                 a->rows,           a->seed,      a->threshold};
            // Beyond the mask the last word of a row has zeros.
            __builtin_memset((uint8_t*)a->kept + first * bytes, 0, (size_t)(rows * bytes));
            draw_mask(&masks, &walk, first, rows, width, a->site, 0, s.words);
            for (int64_t i = 0; i < rows; ++i) {
                drop_row(a, first + i, a->x, s.dropped + i * width);
            }
            x = s.dropped;
        }
        layer_norm(&norm, x, a->out + first * width, width, rows);
    }
}

void backward(const DropoutLayerNorm* a, int64_t begin, int64_t end, float* memory) {
    Scratch s;
    lay_out(a, memory, &s);
    const int64_t width = a->width, all = a->batch * a->positions;
    const int64_t items = (all + ROWS - 1) / ROWS;
    for (int64_t part = begin; part < end; ++part) {
        const int64_t last = items * (part + 1) / a->parts;
        float *d_weight = a->partial + part * 2 * width, *d_bias = d_weight + width;
        for (int64_t item = items * part / a->parts; item < last; ++item) {
            const int64_t first = item * ROWS, rows = at_most(all - first, ROWS);
            const float* x = a->kept ? s.dropped : a->x + first * width;
            const float* grad = a->grad + first * width;
            float* out = a->out + first * width;
            add_rows(grad, width, rows, width, d_bias);
            for (int64_t i = 0; i < rows; ++i) {
                if (a->kept) drop_row(a, first + i, a->x, s.dropped + i * width);
                norm_backward_row<false>(a->weight, width, x + i * width, grad + i * width,
                                         s.products + i * width, out + i * width);
                if (a->kept) drop_row(a, first + i, a->out, out + i * width);
            }
            add_rows(s.products, width, rows, width, d_weight);
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const DropoutLayerNormKernels dropout_layer_norm = {scratch, forward, backward};
}

}  // namespace fmrec
