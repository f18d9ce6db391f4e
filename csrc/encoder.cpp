#include "encoder.h"

#include "gemm.h"
#include "gelu.h"
#include "layer_norm.h"
#include "transpose.h"

namespace fmrec {
namespace {

// Inner features of the feed-forward computed at a time: with a panel of weights they stay in the
// first-level cache. Whole panels.
const int64_t INNER = 2 * PANEL;

// Memory of one sequence's block, all rows padded.
struct Workspace {
    float* normed;      // [L, stride]
    float* query;       // [L + 3, stride]; then the heads' mixed values
    float* key;         // [L, stride]
    float* value;       // [L, stride]
    float* transposed;  // [stride, queries]: query, channels by positions
    float* scores;      // [L, queries]
    float* factor;      // [queries]
    float* inner;       // [max(L, count), INNER + UNIT]
    float* last_mixed;  // [count, stride]
    float* row;         // [2, stride]
};

int64_t padded_queries(const Encoder* e) { return round_up(e->length, UNIT); }

// Hands out `count` floats at multiples of 64 bytes.
FMREC_INLINE float* take(float** memory, int64_t count) {
    float* part = *memory;
    *memory += round_up(count, UNIT);
    return part;
}

int64_t lay_out(const Encoder* e, int64_t count, float* memory, Workspace* w) {
    float* const start = memory;
    const int64_t stride = row_stride(e->channels), rows = e->length, queries = padded_queries(e);
    w->normed = take(&memory, rows * stride);
    w->query = take(&memory, (rows + 3) * stride);
    w->key = take(&memory, rows * stride);
    w->value = take(&memory, rows * stride);
    w->transposed = take(&memory, stride * queries);
    w->scores = take(&memory, rows * queries);
    w->factor = take(&memory, queries);
    w->inner = take(&memory, (rows > count ? rows : count) * (INNER + UNIT));
    w->last_mixed = take(&memory, count * stride);
    w->row = take(&memory, 2 * stride);
    return memory - start;
}

// c = a weight + bias, or c += ... : inner columns [first, first + columns) of the matrix.
FMREC_INLINE void linear(const float* a, int64_t a_row, const PackedLinear* w, int64_t first,
                         int64_t columns, bool add, float* c, int64_t c_row, int64_t rows) {
    const int64_t padded = round_up(w->columns, UNIT);
    for (int64_t j = 0; j < columns; j += PANEL) {
        const int64_t width = padded - first - j < PANEL ? padded - first - j : PANEL;
        const Product p = {a, a_row, 1, w->weight + (first + j) * w->depth, width,
                           w->bias + first + j, nullptr, add, c + j, c_row, w->depth};
        multiply(&p, rows, width);
    }
}

FMREC_INLINE void linear(const float* a, int64_t a_row, const PackedLinear* w, bool add, float* c,
                         int64_t c_row, int64_t rows) {
    linear(a, a_row, w, 0, round_up(w->columns, UNIT), add, c, c_row, rows);
}

// Tanh-GELU in place: 0.5 h (1 + tanh u) = h / (1 + exp(-2 u)), which nothing cancels in.
FMREC_INLINE void gelu_rows(float* h, int64_t h_row, int64_t rows, int64_t columns) {
    for (int64_t i = 0; i < rows; ++i) {
        for (int64_t j = 0; j < columns; j += FLOATS) {
            store(h + i * h_row + j, gelu(load(h + i * h_row + j)));
        }
    }
}

// Rotates the pairs (j, j + W / 2) of every head in `rows` rows, the first at position `first`.
FMREC_INLINE void rotate_rows(const Encoder* e, float* x, int64_t rows, int64_t first) {
    if (!e->rotary) return;
    const int64_t width = e->channels / e->heads, half = width / 2;
    for (int64_t i = 0; i < rows; ++i) {
        const float* cosine = e->rotary + (first + i) * width;
        const float* sine = cosine + half;
        for (int64_t h = 0; h < e->heads; ++h) {
            float* low = x + i * row_stride(e->channels) + h * width;
            float* high = low + half;
#pragma omp simd
            for (int64_t j = 0; j < half; ++j) {
                const float a = low[j], b = high[j];
                low[j] = a * cosine[j] - b * sine[j];
                high[j] = b * cosine[j] + a * sine[j];
            }
        }
    }
}

// x += feed_forward(norm(x)) on `rows` rows; normed is overwritten.
void feed_forward(const Encoder* e, const PackedBlock* b, float* x, int64_t rows, float* normed,
                  float* inner) {
    const int64_t stride = row_stride(e->channels), padded = round_up(e->channels, UNIT);
    const int64_t inner_row = INNER + UNIT;
    const LayerNorm norm = {b->norm2.weight, b->norm2.bias, e->channels, padded, e->rms};
    layer_norm(&norm, x, normed, stride, rows);
    const int64_t features = b->inner.columns, all = round_up(features, UNIT);
    for (int64_t first = 0; first < features; first += INNER) {
        const int64_t columns = all - first < INNER ? all - first : INNER;
        const int64_t depth = features - first < INNER ? features - first : INNER;
        linear(normed, stride, &b->inner, first, columns, false, inner, inner_row, rows);
        gelu_rows(inner, inner_row, rows, columns);
        for (int64_t j = 0; j < padded; j += PANEL) {
            const int64_t width = padded - j < PANEL ? padded - j : PANEL;
            const Product p = {inner, inner_row, 1,
                               b->outer.weight + j * features + first * width, width,
                               first == 0 ? b->outer.bias + j : nullptr, nullptr, true, x + j,
                               stride, depth};
            multiply(&p, rows, width);
        }
    }
}

// out[j, i] = in[i, j] * factor[i]; rows are rounded up to 4, columns too.
FMREC_INLINE void transpose_scaled(const float* in, int64_t in_row, int64_t rows, int64_t columns,
                                   const float* factor, float* out, int64_t out_row) {
    for (int64_t i = 0; i < rows; i += 4) {
        for (int64_t j = 0; j < columns; j += 4) {
            transpose4(in + i * in_row + j, in_row, factor + i, out + j * out_row + i, out_row);
        }
    }
}

// 2^scores, each column less its largest, in place; factor = 1 / the columns' sums.
FMREC_INLINE void softmax_columns(float* scores, int64_t row, int64_t rows, int64_t columns,
                                  float* factor) {
    for (int64_t j = 0; j < columns; j += FLOATS) {
        f32v largest = load(scores + j);
        for (int64_t i = 1; i < rows; ++i) largest = larger(largest, load(scores + i * row + j));
        f32v total = broadcast(0.0f);
        for (int64_t i = 0; i < rows; ++i) {
            const f32v p = exponential2(load(scores + i * row + j) - largest);
            total += p;
            store(scores + i * row + j, p);
        }
        store(factor + j, 1.0f / total);
    }
}

// Multi-head attention of the `queries` rows of w->query over all keys, into `mixed`, which may
// be w->query. A query is multiplied by its mask first: a padded one attends uniformly.
void attention(const Encoder* e, Workspace* w, const float* mask, int64_t queries, float* mixed) {
    const int64_t stride = row_stride(e->channels), width = e->channels / e->heads;
    const int64_t columns = round_up(queries, UNIT), length = e->length;
    // The scale of the scores, and base 2 for the exponentials.
    const float scale = 1.44269504f / __builtin_sqrtf((float)width);
    for (int64_t i = 0; i < queries; ++i) w->factor[i] = mask[i] * scale;
    for (int64_t i = queries; i < columns; ++i) w->factor[i] = 0.0f;
    // Scores are kept keys by queries, so that the softmax goes down the columns.
    transpose_scaled(w->query, stride, queries, e->channels, w->factor, w->transposed, columns);
    for (int64_t h = 0; h < e->heads; ++h) {
        const Product scores = {w->key + h * width, stride, 1, w->transposed + h * width * columns,
                                columns, nullptr, nullptr, false, w->scores, columns, width};
        multiply(&scores, length, columns);
        softmax_columns(w->scores, columns, length, columns, w->factor);
        // The columns beyond the head's are the next head's, and written again by it.
        const Product values = {w->scores, 1, columns, w->value + h * width, stride, nullptr,
                                w->factor, false, mixed + h * width, stride, length};
        multiply(&values, queries, round_up(width, UNIT));
    }
}

// The mean of the values: what a query of zeros attends to.
FMREC_INLINE void mean_value(const Encoder* e, const float* value, float* out) {
    const int64_t stride = row_stride(e->channels);
    const float share = 1.0f / (float)e->length;
    for (int64_t j = 0; j < stride; j += FLOATS) {
        f32v total = broadcast(0.0f);
        for (int64_t i = 0; i < e->length; ++i) total += load(value + i * stride + j);
        store(out + j, total * share);
    }
}

// x = block(x) at all positions of one sequence.
void block(const Encoder* e, const PackedBlock* b, Workspace* w, float* x, const float* mask) {
    const int64_t stride = row_stride(e->channels), padded = round_up(e->channels, UNIT);
    const int64_t length = e->length;
    const LayerNorm norm = {b->norm1.weight, b->norm1.bias, e->channels, padded, e->rms};
    layer_norm(&norm, x, w->normed, stride, length);
    linear(w->normed, stride, &b->key, false, w->key, stride, length);
    rotate_rows(e, w->key, length, 0);
    linear(w->normed, stride, &b->value, false, w->value, stride, length);
    // Queries of the left padding are zeros and share one result.
    int64_t padding = 0;
    while (padding < length && mask[padding] == 0.0f) ++padding;
    if (padding > 0) {
        float* y = w->row + stride;
        mean_value(e, w->value, w->row);
        linear(w->row, stride, &b->output, false, y, stride, 1);
        for (int64_t i = 0; i < padding; ++i) {
            for (int64_t j = 0; j < padded; j += FLOATS) {
                store(x + i * stride + j, load(x + i * stride + j) + load(y + j));
            }
        }
    }
    const int64_t queries = length - padding;
    if (queries > 0) {
        linear(w->normed + padding * stride, stride, &b->query, false, w->query, stride, queries);
        rotate_rows(e, w->query, queries, padding);
        attention(e, w, mask + padding, queries, w->query);
        linear(w->query, stride, &b->output, true, x + padding * stride, stride, queries);
    }
    feed_forward(e, b, x, length, w->normed, w->inner);
}

FMREC_INLINE void copy_row(float* target, const float* source, int64_t columns) {
    for (int64_t j = 0; j < columns; j += FLOATS) store(target + j, load(source + j));
}

void run(const Encoder* e, float* x, const float* mask, int64_t count, float* last, float* tapped,
         float* scratch) {
    Workspace w;
    lay_out(e, count, scratch, &w);
    const int64_t stride = row_stride(e->channels), padded = round_up(e->channels, UNIT);
    const int64_t length = e->length, sequence = length * stride;
    for (int64_t n = 0; n + 1 < e->num_blocks; ++n) {
        for (int64_t s = 0; s < count; ++s) {
            float* rows = x + s * sequence;
            block(e, e->blocks + n, &w, rows, mask + s * length);
            if (n == e->tap) {
                copy_row(tapped + s * stride, rows + (length - 1) * stride, padded);
            }
        }
    }
    // Of the last block only the last position's query, output and feed-forward.
    const PackedBlock* b = e->blocks + e->num_blocks - 1;
    const LayerNorm norm = {b->norm1.weight, b->norm1.bias, e->channels, padded, e->rms};
    for (int64_t s = 0; s < count; ++s) {
        const float* rows = x + s * sequence;
        layer_norm(&norm, rows, w.normed, stride, length);
        linear(w.normed, stride, &b->key, false, w.key, stride, length);
        rotate_rows(e, w.key, length, 0);
        linear(w.normed, stride, &b->value, false, w.value, stride, length);
        linear(w.normed + (length - 1) * stride, stride, &b->query, false, w.query, stride, 1);
        rotate_rows(e, w.query, 1, length - 1);
        attention(e, &w, mask + s * length + length - 1, 1, w.last_mixed + s * stride);
        copy_row(last + s * stride, rows + (length - 1) * stride, padded);
    }
    linear(w.last_mixed, stride, &b->output, true, last, stride, count);
    feed_forward(e, b, last, count, w.last_mixed, w.inner);
    if (e->tap == e->num_blocks - 1) {
        for (int64_t s = 0; s < count; ++s) {
            copy_row(tapped + s * stride, last + s * stride, padded);
        }
    }
}

int64_t scratch(const Encoder* e, int64_t count) {
    Workspace w;
    return lay_out(e, count, nullptr, &w);
}

// A group's activations and outputs, then what run() needs.
int64_t batch_scratch(const EncoderBatch* a, int64_t count) {
    const int64_t stride = row_stride(a->encoder.channels);
    return count * (a->encoder.length + 2) * stride + scratch(&a->encoder, count);
}

void run_batch(const EncoderBatch* a, int64_t begin, int64_t end, float* memory) {
    const Encoder* e = &a->encoder;
    const int64_t stride = row_stride(e->channels), count = end - begin;
    float* x = take(&memory, count * e->length * stride);
    float* last = take(&memory, count * stride);
    float* tapped = take(&memory, count * stride);
    const uint64_t row_bytes = (uint64_t)e->channels * sizeof(float);
    for (int64_t i = 0; i < count * e->length; ++i) {
        float* row = x + i * stride;
        __builtin_memcpy(row, a->x + (begin * e->length + i) * e->channels, row_bytes);
        for (int64_t j = e->channels; j < stride; ++j) row[j] = 0.0f;
    }
    run(e, x, a->mask + begin * e->length, count, last, a->tapped ? tapped : nullptr, memory);
    for (int64_t s = 0; s < count; ++s) {
        __builtin_memcpy(a->out + (begin + s) * e->channels, last + s * stride, row_bytes);
        if (a->tapped) {
            __builtin_memcpy(a->tapped + (begin + s) * e->channels, tapped + s * stride,
                             row_bytes);
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const EncoderKernels encoder = {scratch, run};
extern const EncoderBatchKernels encoder_batch = {batch_scratch, run_batch};
}

}  // namespace fmrec
