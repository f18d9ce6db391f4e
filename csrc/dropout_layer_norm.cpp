#include "dropout_layer_norm.h"

#include "block_half.h"

namespace fmrec {
namespace {

const int64_t ROWS = DROPOUT_NORM_ROWS;

struct Scratch {
    float *dropped, *sums;
    uint32_t* words;
};

int64_t lay_out(const DropoutLayerNorm* a, float* memory, Scratch* s) {
    float* const start = memory;
    s->dropped = take(&memory, ROWS * a->width);
    s->sums = take(&memory, 2 * a->width);
    s->words = (uint32_t*)take(&memory, words_size(a->width));
    return memory - start;
}

int64_t scratch(const DropoutLayerNorm* a) {
    Scratch s;
    return lay_out(a, nullptr, &s);
}

FMREC_INLINE const uint8_t* bits_of(const DropoutLayerNorm* a, int64_t row) {
    return a->kept ? (const uint8_t*)(a->kept + row * norm_mask_words(a->width)) : nullptr;
}

void forward(const DropoutLayerNorm* a, int64_t begin, int64_t end, float* memory) {
    Scratch s;
    lay_out(a, memory, &s);
    const int64_t width = a->width, all = a->batch * a->positions;
    const int64_t bytes = 8 * norm_mask_words(width);
    const LayerNorm norm = {a->weight, a->bias, width, width};
    const float scale = a->scale;
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
                const uint8_t* bits = bits_of(a, first + i);
                for (int64_t j = 0; j < width; j += FLOATS) {
                    const f32v scaled = load(x + i * width + j) * scale;
                    store(s.dropped + i * width + j, masked(bits, j, scaled));
                }
            }
            x = s.dropped;
        }
        layer_norm(&norm, x, a->out + first * width, width, rows);
    }
}

// The gradient of a row of x; those of weight and bias are added to `sums`.
FMREC_INLINE void backward_row(const DropoutLayerNorm* a, int64_t row, float* dropped,
                               float* sums) {
    const int64_t width = a->width;
    const float share = 1.0f / (float)width, scale = a->scale;
    const float *x = a->x + row * width, *grad = a->grad + row * width, *weight = a->weight;
    const uint8_t* bits = bits_of(a, row);
    float* out = a->out + row * width;
    f32v total = broadcast(0.0f), squares = total, plain = total, mixed = total;
    for (int64_t j = 0; j < width; j += FLOATS) {
        const f32v value = masked(bits, j, load(x + j) * scale);
        store(dropped + j, value);
        total += value;
    }
    const f32v mean = broadcast(sum(total) * share);
    for (int64_t j = 0; j < width; j += FLOATS) {
        const f32v d = load(dropped + j) - mean, g = load(grad + j) * load(weight + j);
        squares += d * d;
        plain += g;
        mixed += g * d;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) * share + 1e-12f);
    const f32v offset = broadcast(sum(plain) * share);
    const f32v slope = broadcast(sum(mixed) * share * factor * factor);
    for (int64_t j = 0; j < width; j += FLOATS) {
        const f32v d = load(dropped + j) - mean, g = load(grad + j);
        const f32v of_x = (g * load(weight + j) - offset - d * slope) * factor;
        store(out + j, masked(bits, j, of_x * scale));
        store(sums + j, load(sums + j) + g * d * factor);
        store(sums + width + j, load(sums + width + j) + g);
    }
}

void backward(const DropoutLayerNorm* a, int64_t begin, int64_t end, float* memory) {
    Scratch s;
    lay_out(a, memory, &s);
    const int64_t width = a->width, all = a->batch * a->positions;
    const int64_t items = (all + ROWS - 1) / ROWS;
    for (int64_t part = begin; part < end; ++part) {
        const int64_t last = items * (part + 1) / a->parts;
        for (int64_t item = items * part / a->parts; item < last; ++item) {
            const int64_t first = item * ROWS, rows = at_most(all - first, ROWS);
            // Sums of their own: one row after the other would round those of a part too often.
            for (int64_t j = 0; j < 2 * width; ++j) s.sums[j] = 0.0f;
            for (int64_t i = 0; i < rows; ++i) {
                backward_row(a, first + i, s.dropped + i * width, s.sums);
            }
            float* partial = a->partial + part * 2 * width;
            for (int64_t j = 0; j < 2 * width; ++j) partial[j] += s.sums[j];
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const DropoutLayerNormKernels dropout_layer_norm = {scratch, forward, backward};
}

}  // namespace fmrec
