#include "encoder.h"

#if defined(__AMX_BF16__)
#include "amx_pack.h"
#endif
#include "gemm.h"
#include "gelu.h"
#include "layer_norm.h"
#include "transpose.h"

namespace fmrec {
namespace {

// Rows that sequences share a matrix product up to. Elsewhere, where only ragged ones do: a panel
// of weights, once it is in the first-level cache, serves them all. On AMX: strips of 32 rows are
// filled, and the weights' planes, which do not stay in the second-level cache, come to it once for
// half a group of the paper's length.
#if defined(__AMX_BF16__)
const int64_t CHUNK_ROWS = 400;
#else
const int64_t CHUNK_ROWS = 96;
#endif

// Memory of a chunk's block, all rows padded; R is as many as a chunk has: L, or more up to
// CHUNK_ROWS.
struct Workspace {
    float* normed;      // [R, stride]
    float* query;       // [R + 3, stride]; then the heads' mixed values
    float* key;         // [R, stride]
    float* value;       // [R, stride]
    float* transposed;  // [stride, queries]: query, channels by positions
    float* scores;      // [L, queries]
    float* factor;      // [queries]
    float* inner;       // [max(R, count), INNER + UNIT]
    float* last_normed; // [count, stride]
    float* last_mixed;  // [count, stride]
    float* row;         // [2, stride]
#if defined(__AMX_BF16__)
    uint16_t* planes;        // of [max(R, count heads), D]
    uint16_t* inner_planes;  // of [max(R, count), INNER]
    float* by_head;          // [count heads + 3, stride]
    float* turned;           // [count heads + 3, stride]
#endif
};

// Of the positions' queries, or of the heads' of the last one.
int64_t padded_queries(const Encoder* e) {
    return round_up(e->length > e->heads ? e->length : e->heads, UNIT);
}

// Hands out `count` floats at multiples of 64 bytes.
FMREC_INLINE float* take(float** memory, int64_t count) {
    float* part = *memory;
    *memory += round_up(count, UNIT);
    return part;
}

int64_t lay_out(const Encoder* e, int64_t count, float* memory, Workspace* w) {
    float* const start = memory;
    const int64_t stride = row_stride(e->channels), queries = padded_queries(e);
    // What one sequence takes should stay in the cache, and is cleared at every call.
    const int64_t all = count * e->length, most_rows = all < CHUNK_ROWS ? all : CHUNK_ROWS;
    const int64_t rows = e->length > most_rows ? e->length : most_rows;
    w->normed = take(&memory, rows * stride);
    w->query = take(&memory, (rows + 3) * stride);
    w->key = take(&memory, rows * stride);
    w->value = take(&memory, rows * stride);
    w->transposed = take(&memory, stride * queries);
    w->scores = take(&memory, e->length * queries);
    w->factor = take(&memory, queries);
    w->inner = take(&memory, (rows > count ? rows : count) * (INNER + UNIT));
    w->last_normed = take(&memory, count * stride);
    w->last_mixed = take(&memory, count * stride);
    w->row = take(&memory, 2 * stride);
#if defined(__AMX_BF16__)
    const int64_t heads = count * e->heads, split = rows > heads ? rows : heads;
    w->planes = (uint16_t*)take(&memory, amx_rows_size(split, e->channels, e->planes) / 2);
    w->inner_planes =
        (uint16_t*)take(&memory, amx_rows_size(rows > count ? rows : count, INNER, e->planes) / 2);
    w->by_head = take(&memory, (heads + 3) * stride);
    w->turned = take(&memory, (heads + 3) * stride);
#endif
    return memory - start;
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

#if !defined(__AMX_BF16__)
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
#endif

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

// Queries of one sequence and what they attend to; rows are row_stride apart.
struct Attended {
    const float* query;  // [queries, D]
    const float* mask;   // [queries], which a query is multiplied by: a padded one attends uniformly
    int64_t queries;
    const float* key;    // [length, D]
    const float* value;  // [length, D]
    int64_t length;
    float key_bias;      // of the first key
    float* mixed;        // [queries, D], may be the queries
};

// Multi-head attention.
void attention(const Encoder* e, const Workspace* w, const Attended* a) {
    const int64_t stride = row_stride(e->channels), width = e->channels / e->heads;
    const int64_t queries = a->queries, columns = round_up(queries, UNIT), length = a->length;
    // The scale of the scores, and base 2 for the exponentials.
    const float log2e = 1.44269504f, scale = log2e / __builtin_sqrtf((float)width);
    for (int64_t i = 0; i < queries; ++i) w->factor[i] = a->mask[i] * scale;
    for (int64_t i = queries; i < columns; ++i) w->factor[i] = 0.0f;
    // Scores are kept keys by queries, so that the softmax goes down the columns.
    transpose_scaled(a->query, stride, queries, e->channels, w->factor, w->transposed, columns);
    for (int64_t h = 0; h < e->heads; ++h) {
        const Product scores = {a->key + h * width, stride, 1, w->transposed + h * width * columns,
                                columns, nullptr, nullptr, false, w->scores, columns, width};
        multiply(&scores, length, columns);
        if (a->key_bias != 0.0f) {
            for (int64_t j = 0; j < columns; ++j) w->scores[j] += a->key_bias * log2e;
        }
        softmax_columns(w->scores, columns, length, columns, w->factor);
        // The columns beyond the head's are the next head's, and written again by it.
        const Product values = {w->scores, 1, columns, a->value + h * width, stride, nullptr,
                                w->factor, false, a->mixed + h * width, stride, length};
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

FMREC_INLINE int64_t row_of(const Encoder* e, const Ragged* r, int64_t s) {
    return r && r->start ? r->start[s] - r->start[0] : s * e->length;
}

FMREC_INLINE float bias_of(const Ragged* r, int64_t s) {
    return r && r->key_bias ? r->key_bias[s] : 0.0f;
}

// The first sequence after the chunk that begins with `first`: as many as CHUNK_ROWS hold.
FMREC_INLINE int64_t chunk_end(const Encoder* e, const Ragged* r, int64_t first, int64_t count) {
    int64_t end = first + 1;
#if !defined(__AMX_BF16__)
    if (!r) return end;
#endif
    const int64_t limit = row_of(e, r, first) + CHUNK_ROWS;
    while (end < count && row_of(e, r, end + 1) <= limit) ++end;
    return end;
}

FMREC_INLINE void copy_row(float* target, const float* source, int64_t columns) {
    for (int64_t j = 0; j < columns; j += FLOATS) store(target + j, load(source + j));
}

#if defined(__AMX_BF16__)
#include "encoder_amx.h"
#else

// The norm of `rows` rows, their keys and their values.
FMREC_INLINE void keys_and_values(const Encoder* e, const PackedBlock* b, const Workspace* w,
                                  const float* x, int64_t rows) {
    const int64_t stride = row_stride(e->channels);
    const LayerNorm norm = {b->norm1.weight, b->norm1.bias, e->channels,
                            round_up(e->channels, UNIT), e->rms};
    layer_norm(&norm, x, w->normed, stride, rows);
    linear(w->normed, stride, &b->key, false, w->key, stride, rows);
    // Whole sequences of L rows, one or several: a ragged group is never rotated.
    for (int64_t first = 0; first < rows; first += e->length) {
        const int64_t rest = rows - first;
        rotate_rows(e, w->key + first * stride, rest < e->length ? rest : e->length, 0);
    }
    linear(w->normed, stride, &b->value, false, w->value, stride, rows);
}

// x = block(x) at all positions of one sequence. Queries of the left padding are zeros and share
// one result.
void block(const Encoder* e, const PackedBlock* b, const Workspace* w, float* x,
           const float* mask) {
    const int64_t stride = row_stride(e->channels), padded = round_up(e->channels, UNIT);
    const int64_t length = e->length;
    keys_and_values(e, b, w, x, length);
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
        const Attended a = {w->query, mask + padding, queries, w->key,  w->value,
                            length,   0.0f,           w->query};
        attention(e, w, &a);
        linear(w->query, stride, &b->output, true, x + padding * stride, stride, queries);
    }
    feed_forward(e, b, x, length, w->normed, w->inner);
}

// x = block(x) at all positions of the sequences first .. end - 1, a chunk; x is the group's.
void ragged_block(const Encoder* e, const PackedBlock* b, const Workspace* w, float* x,
                  const float* mask, const Ragged* r, int64_t first, int64_t end) {
    const int64_t stride = row_stride(e->channels), base = row_of(e, r, first);
    const int64_t rows = row_of(e, r, end) - base;
    x += base * stride;
    keys_and_values(e, b, w, x, rows);
    linear(w->normed, stride, &b->query, false, w->query, stride, rows);
    for (int64_t s = first; s < end; ++s) {
        const int64_t row = row_of(e, r, s) - base, length = row_of(e, r, s + 1) - base - row;
        float* query = w->query + row * stride;
        const Attended a = {query,  mask + base + row, length, w->key + row * stride,
                            w->value + row * stride, length, bias_of(r, s), query};
        attention(e, w, &a);
    }
    linear(w->query, stride, &b->output, true, x, stride, rows);
    feed_forward(e, b, x, rows, w->normed, w->inner);
}

void run_ragged(const Encoder* e, float* x, const float* mask, const Ragged* r, int64_t count,
                float* last, float* tapped, float* scratch) {
    Workspace w;
    lay_out(e, count, scratch, &w);
    const int64_t stride = row_stride(e->channels), padded = round_up(e->channels, UNIT);
    for (int64_t n = 0; n + 1 < e->num_blocks; ++n) {
        const PackedBlock* b = e->blocks + n;
        for (int64_t s = 0, end = 0; s < count; s = end) {
            end = chunk_end(e, r, s, count);
            if (r) {
                ragged_block(e, b, &w, x, mask, r, s, end);
            } else {
                block(e, b, &w, x + s * e->length * stride, mask + s * e->length);
            }
        }
        for (int64_t s = 0; n == e->tap && s < count; ++s) {
            copy_row(tapped + s * stride, x + (row_of(e, r, s + 1) - 1) * stride, padded);
        }
    }
    // Of the last block only the last position's query, output and feed-forward.
    const PackedBlock* b = e->blocks + e->num_blocks - 1;
    for (int64_t first = 0, end = 0; first < count; first = end) {
        end = chunk_end(e, r, first, count);
        const int64_t base = row_of(e, r, first);
        keys_and_values(e, b, &w, x + base * stride, row_of(e, r, end) - base);
        for (int64_t s = first; s < end; ++s) {
            const int64_t position = row_of(e, r, s + 1) - 1;
            copy_row(w.last_normed + s * stride, w.normed + (position - base) * stride, padded);
            copy_row(last + s * stride, x + position * stride, padded);
        }
        linear(w.last_normed + first * stride, stride, &b->query, false, w.query, stride,
               end - first);
        for (int64_t s = first; s < end; ++s) {
            rotate_rows(e, w.query + (s - first) * stride, 1, e->length - 1);
            const int64_t row = row_of(e, r, s) - base, length = row_of(e, r, s + 1) - base - row;
            const Attended a = {w.query + (s - first) * stride, mask + base + row + length - 1, 1,
                                w.key + row * stride, w.value + row * stride, length,
                                bias_of(r, s), w.last_mixed + s * stride};
            attention(e, &w, &a);
        }
    }
    linear(w.last_mixed, stride, &b->output, true, last, stride, count);
    feed_forward(e, b, last, count, w.last_mixed, w.inner);
    for (int64_t s = 0; e->tap == e->num_blocks - 1 && s < count; ++s) {
        copy_row(tapped + s * stride, last + s * stride, padded);
    }
}

void (*const pack_planes)(const float*, int64_t, int64_t, int64_t, int64_t, int,
                          uint16_t*) = nullptr;
#endif

void run(const Encoder* e, float* x, const float* mask, int64_t count, float* last, float* tapped,
         float* scratch) {
    run_ragged(e, x, mask, nullptr, count, last, tapped, scratch);
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
    const Ragged biased = {nullptr, a->first_key_bias + (a->first_key_bias ? begin : 0)};
    run_ragged(e, x, a->mask + begin * e->length, a->first_key_bias ? &biased : nullptr, count,
               last, a->tapped ? tapped : nullptr, memory);
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
extern const EncoderKernels encoder = {scratch, run, run_ragged, pack_planes};
extern const EncoderBatchKernels encoder_batch = {batch_scratch, run_batch};
}

}  // namespace fmrec
