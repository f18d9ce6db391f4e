#include "attention.h"

#include "attention_head.h"
#include "gemm.h"
#include "philox.h"
#include "transpose.h"

namespace fmrec {
namespace {

// With S = q k^T of the scaled queries and T = dq k^T + q dk^T, P = softmax(S), U = T - sum(P T)
// row by row, and the factors M of the mask:
//     out = (M P) v,   d_out = (M P U) v + (M P) dv.
//
// One head of one sequence. A value and its tangent lie side by side in each row, so that one
// product serves both; widths and the padding, which holds zeros, are those of `Head` in
// attention.cpp.
struct Dual {
    float* query;         // [keys, 2 width]: dq, then q, times their scale and log2(e)
    float* key;           // [keys, 2 width]: k, then dk
    float* value;         // [keys, 2 width]: v, then dv
    float* grad;          // [keys, 2 width]: of out, then of d_out
    float* mixed;         // [keys, 2 width]: a result on its way to its place
    float* back;          // [keys, 2 width]: another
    float* key_columns;   // [2 width, keys]: k^T, then dk^T
    float* value_columns; // [2 width, keys]: v^T, then dv^T
    float* p;             // [L, keys]: S, then P
    float* u;             // [L, keys]: T, then U
    float* dropped;       // [L, keys]: M P
    float* d_dropped;     // [L, keys]: M P U
    float* g_s;           // [L, keys]: gradients with respect to S and T
    float* g_t;
    float* ones;          // [keys]
    float* hidden;        // [keys]: 0, and -infinity at the padding
    uint32_t* words;      // of the stream: [L, groups, 4]
    int64_t width, keys, groups;
};

const float LOG2_E = 1.44269504f, LN_2 = 0.69314718f;

int64_t lay_out(const Attention* a, float* memory, Dual* h) {
    float* const start = memory;
    h->width = round_up(a->channels / a->heads, UNIT);
    h->keys = round_up(a->length, UNIT);
    h->groups = (a->length + 3) / 4;
    float** const rows[] = {&h->query, &h->key,  &h->value,       &h->grad,
                            &h->mixed, &h->back, &h->key_columns, &h->value_columns};
    for (float** part : rows) *part = take(&memory, 2 * h->keys * h->width);
    float** const squares[] = {&h->p, &h->u, &h->dropped, &h->d_dropped, &h->g_s, &h->g_t};
    for (float** square : squares) *square = take(&memory, a->length * h->keys);
    h->ones = take(&memory, h->keys);
    h->hidden = take(&memory, h->keys);
    // A unit more: the last row is read in whole vectors.
    const uint64_t counters = a->drop ? (uint64_t)(a->length * h->groups) : 0;
    h->words = (uint32_t*)take(&memory, 4 * (int64_t)round_up_counters(counters) + UNIT);
    return memory - start;
}

int64_t scratch(const Attention* a) {
    Dual h;
    return lay_out(a, nullptr, &h);
}

void prepare(const Attention* a, float* memory, Dual* h, CounterWalk* walk) {
    lay_out(a, memory, h);
    for (int64_t j = 0; j < h->keys; ++j) {
        h->ones[j] = 1.0f;
        h->hidden[j] = j < a->length ? 0.0f : -__builtin_inff();
    }
    if (a->drop) make_walk(walk, (uint64_t)h->groups, 0, 1);
}

FMREC_INLINE void transpose(const Dual* h, const float* in, float* out) {
    for (int64_t i = 0; i < h->keys; i += 4) {
        for (int64_t j = 0; j < 2 * h->width; j += 4) {
            transpose4(in + 2 * i * h->width + j, 2 * h->width, h->ones + i,
                       out + j * h->keys + i, h->keys);
        }
    }
}

// P and T of the queries from `padding` on; the padding's have the same P everywhere, and T = 0.
// Values, and the words of the masks.
void probabilities(const Attention* a, const Dual* h, const CounterWalk* walk, int64_t sequence,
                   int64_t head, int64_t padding) {
    const int64_t columns = a->channels / a->heads, length = a->length, row = 3 * a->channels;
    const int64_t width = h->width, stride = 2 * width, keys = h->keys;
    const int64_t first = sequence * length * row + head * columns;
    const float *qkv = a->qkv + first, *d_qkv = a->d_qkv + first;
    const float* query_scale = a->query_scale + sequence * length;
    gather(qkv + 2 * a->channels, row, length, columns, h->value, stride);
    gather(d_qkv + 2 * a->channels, row, length, columns, h->value + width, stride);
    if (padding < length) {
        for (int64_t i = padding; i < length; ++i) {
            const float factor = query_scale[i] * LOG2_E, *angles = angles_at(a, i);
            float* out = h->query + i * stride;
            rotate_row(d_qkv + i * row, angles, 1.0f, factor, columns, out);
            rotate_row(qkv + i * row, angles, 1.0f, factor, columns, out + width);
        }
        for (int64_t i = 0; i < length; ++i) {
            const float* angles = angles_at(a, i);
            const int64_t at = a->channels + i * row;
            float* out = h->key + i * stride;
            rotate_row(qkv + at, angles, 1.0f, 1.0f, columns, out);
            rotate_row(d_qkv + at, angles, 1.0f, 1.0f, columns, out + width);
        }
        transpose(h, h->key, h->key_columns);
        const int64_t queries = length - padding;
        const float* query = h->query + padding * stride;
        const Product scores = {query + width, stride, 1, h->key_columns, keys, h->hidden, nullptr,
                                false, h->p + padding * keys, keys, columns};
        multiply(&scores, queries, keys);
        const Product slopes = {query, stride, 1, h->key_columns, keys, nullptr, nullptr, false,
                                h->u + padding * keys, keys, width + columns};
        multiply(&slopes, queries, keys);
    }
    if (a->drop) {
        const uint64_t counters = (uint64_t)(length * h->groups);
        fill_words(walk, (uint64_t)head * counters, counters, a->site,
                   (uint32_t)a->rows[sequence], a->seed, h->words);
    }
}

// M P of a query of the padding.
FMREC_INLINE void drop_padding(const Attention* a, const Dual* h, int64_t i) {
    const f32v share = broadcast(1.0f / (float)a->length);
    float* out = h->dropped + i * h->keys;
    const uint32_t* words = h->words + i * 4 * h->groups;
    for (int64_t j = 0; j < h->keys; j += FLOATS) {
        store(out + j, a->drop ? kept(a->threshold, words + j, share * a->scale) : share);
    }
}

// P, U, M P and M P U of another one.
FMREC_INLINE void finish_row(const Attention* a, const Dual* h, int64_t i) {
    const int64_t keys = h->keys, at = i * keys;
    float *p = h->p + at, *u = h->u + at;
    const float factor = softmax_row(p, keys);
    f32v total = broadcast(0.0f);
    for (int64_t j = 0; j < keys; j += FLOATS) {
        const f32v share = load(p + j) * factor;
        total += share * load(u + j);
        store(p + j, share);
    }
    const float mean = sum(total), scale = a->scale;
    const uint32_t* words = h->words + i * 4 * h->groups;
    for (int64_t j = 0; j < keys; j += FLOATS) {
        const f32v share = load(p + j), centred = (load(u + j) - mean) * LN_2;
        store(u + j, centred);
        const f32v slope = share * centred;
        store(h->dropped + at + j, a->drop ? kept(a->threshold, words + j, share * scale) : share);
        store(h->d_dropped + at + j,
              a->drop ? kept(a->threshold, words + j, slope * scale) : slope);
    }
}

void forward(const Attention* a, int64_t begin, int64_t end, float* memory) {
    Dual h;
    CounterWalk walk;
    prepare(a, memory, &h, &walk);
    const int64_t columns = a->channels / a->heads, length = a->length;
    const int64_t width = h.width, stride = 2 * width;
    for (int64_t s = begin; s < end; ++s) {
        const int64_t padding = padding_of(a->query_scale + s * length, length);
        for (int64_t n = 0; n < a->heads; ++n) {
            probabilities(a, &h, &walk, s, n, padding);
            for (int64_t i = 0; i < padding; ++i) drop_padding(a, &h, i);
            for (int64_t i = padding; i < length; ++i) finish_row(a, &h, i);
            const Product both = {h.dropped, h.keys, 1, h.value, stride, nullptr, nullptr, false,
                                  h.mixed, stride, length};
            multiply(&both, length, stride);
            if (padding < length) {
                const Product change = {h.d_dropped + padding * h.keys, h.keys, 1, h.value, stride,
                                        nullptr, nullptr, true,
                                        h.mixed + padding * stride + width, stride, length};
                multiply(&change, length - padding, width);
            }
            const int64_t at = s * length * a->channels + n * columns;
            gather(h.mixed, stride, length, columns, a->out + at, a->channels);
            gather(h.mixed + width, stride, length, columns, a->d_out + at, a->channels);
        }
    }
}

// From the gradients G = g_out v^T + g_d_out dv^T and H = g_d_out v^T with respect to M P and
// M P U, those with respect to S and T, in place: with h = M H and m = sum(h P),
//     g_T = P (h - m),   g_P = M G + (h - m) U,   g_S = P (g_P - sum(g_P P)).
// (That the mean of T depends on P adds to g_P what is the same for all keys, and falls out.)
FMREC_INLINE void gradient_row(const Attention* a, const Dual* h, int64_t i) {
    const int64_t keys = h->keys, at = i * keys;
    const float *p = h->p + at, *u = h->u + at;
    float *g_s = h->g_s + at, *g_t = h->g_t + at;
    const uint32_t* words = h->words + i * 4 * h->groups;
    f32v total = broadcast(0.0f);
    for (int64_t j = 0; j < keys; j += FLOATS) {
        f32v g = load(g_s + j), change = load(g_t + j);
        if (a->drop) {
            g = kept(a->threshold, words + j, g * a->scale);
            change = kept(a->threshold, words + j, change * a->scale);
            store(g_s + j, g);
            store(g_t + j, change);
        }
        total += change * load(p + j);
    }
    const float mean = sum(total);
    total = broadcast(0.0f);
    for (int64_t j = 0; j < keys; j += FLOATS) {
        const f32v share = load(p + j), change = load(g_t + j) - mean;
        const f32v g = load(g_s + j) + change * load(u + j);
        total += g * share;
        store(g_t + j, change * share);
        store(g_s + j, g);
    }
    const float mean_of_g = sum(total);
    for (int64_t j = 0; j < keys; j += FLOATS) {
        store(g_s + j, (load(g_s + j) - mean_of_g) * load(p + j));
    }
}

void backward(const Attention* a, int64_t begin, int64_t end, float* memory) {
    Dual h;
    CounterWalk walk;
    prepare(a, memory, &h, &walk);
    const int64_t columns = a->channels / a->heads, length = a->length, row = 3 * a->channels;
    const int64_t width = h.width, stride = 2 * width, keys = h.keys;
    const uint64_t bytes = (uint64_t)columns * sizeof(float);
    for (int64_t s = begin; s < end; ++s) {
        const float* query_scale = a->query_scale + s * length;
        const int64_t padding = padding_of(query_scale, length), queries = length - padding;
        const int64_t from = padding * stride, square = padding * keys;
        for (int64_t n = 0; n < a->heads; ++n) {
            const int64_t in = s * length * a->channels + n * columns;
            float *g_query = a->out + 3 * s * length * a->channels + n * columns;
            float *g_d_query = a->d_out + 3 * s * length * a->channels + n * columns;
            float *g_key = g_query + a->channels, *g_d_key = g_d_query + a->channels;
            probabilities(a, &h, &walk, s, n, padding);
            gather(a->grad + in, a->channels, length, columns, h.grad, stride);
            gather(a->d_grad + in, a->channels, length, columns, h.grad + width, stride);
            if (queries > 0) {
                transpose(&h, h.value, h.value_columns);
                const Product of_both = {h.grad + from, stride, 1, h.value_columns, keys, nullptr,
                                         nullptr, false, h.g_s + square, keys, width + columns};
                multiply(&of_both, queries, keys);
                const Product of_change = {h.grad + from + width, stride, 1, h.value_columns, keys,
                                           nullptr, nullptr, false, h.g_t + square, keys, columns};
                multiply(&of_change, queries, keys);
            }
            for (int64_t i = 0; i < padding; ++i) drop_padding(a, &h, i);
            for (int64_t i = padding; i < length; ++i) {
                finish_row(a, &h, i);
                gradient_row(a, &h, i);
            }
            // Of the values: (M P)^T g_out + (M P U)^T g_d_out; of their tangents (M P)^T g_d_out.
            const Product values = {h.dropped, 1, keys, h.grad, stride, nullptr, nullptr, false,
                                    h.mixed, stride, length};
            multiply(&values, length, stride);
            if (queries > 0) {
                const Product more = {h.d_dropped + square, 1, keys, h.grad + from + width, stride,
                                      nullptr, nullptr, true, h.mixed, stride, queries};
                multiply(&more, length, width);
            }
            gather(h.mixed, stride, length, columns, g_key + a->channels, row);
            gather(h.mixed + width, stride, length, columns, g_d_key + a->channels, row);
            for (int64_t i = 0; i < padding; ++i) {
                __builtin_memset(g_query + i * row, 0, bytes);
                __builtin_memset(g_d_query + i * row, 0, bytes);
            }
            if (queries == 0) {
                for (int64_t i = 0; i < length; ++i) {
                    __builtin_memset(g_key + i * row, 0, bytes);
                    __builtin_memset(g_d_key + i * row, 0, bytes);
                }
                continue;
            }
            // Of the tangents of the queries g_T k, of the queries g_S k + g_T dk.
            const Product by_slopes = {h.g_t + square, keys, 1, h.key, stride, nullptr, nullptr,
                                       false, h.mixed, stride, length};
            multiply(&by_slopes, queries, stride);
            const Product by_scores = {h.g_s + square, keys, 1, h.key, stride, nullptr, nullptr,
                                       true, h.mixed + width, stride, length};
            multiply(&by_scores, queries, width);
            // Of the keys g_S^T q + g_T^T dq, of their tangents g_T^T q.
            const Product back_by_slopes = {h.g_t + square, 1, keys, h.query + from, stride,
                                            nullptr, nullptr, false, h.back, stride, queries};
            multiply(&back_by_slopes, length, stride);
            const Product back_by_scores = {h.g_s + square, 1, keys, h.query + from + width,
                                            stride, nullptr, nullptr, true, h.back, stride,
                                            queries};
            multiply(&back_by_scores, length, width);
            for (int64_t i = padding; i < length; ++i) {
                const float *angles = angles_at(a, i), *mixed = h.mixed + (i - padding) * stride;
                const float scale = query_scale[i];
                rotate_row(mixed, angles, -1.0f, scale, columns, g_d_query + i * row);
                rotate_row(mixed + width, angles, -1.0f, scale, columns, g_query + i * row);
            }
            for (int64_t i = 0; i < length; ++i) {
                const float *angles = angles_at(a, i), *back = h.back + i * stride;
                rotate_row(back, angles, -1.0f, LN_2, columns, g_key + i * row);
                rotate_row(back + width, angles, -1.0f, LN_2, columns, g_d_key + i * row);
            }
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const AttentionKernels attention_tangent = {scratch, forward, backward};
}

}  // namespace fmrec
