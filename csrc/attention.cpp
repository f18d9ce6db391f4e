#include "attention.h"

#include "attention_head.h"
#include "gemm.h"
#include "philox.h"
#include "transpose.h"

namespace fmrec {
namespace {

// One head of one sequence, in rows that are padded to whole units. The columns of the padding,
// and the rows beyond the last position, are zeros: nothing ever writes to them.
struct Head {
    float* query;       // [keys, width], times its scale and log2(e)
    float* key;         // [keys, width]
    float* value;       // [keys, width]
    float* grad;        // [keys, width]
    float* transposed;  // [width, keys]
    float* mixed;       // [L, width]: a result, where it cannot be written to its place at once
    float* scores;      // [L, keys]; then 2^scores, which times its factor is the probability
    float* factor;      // [L]
    float* dropped;     // [L, keys]: the probabilities after dropout
    float* d_scores;    // [L, keys]
    float* ones;        // [keys]
    float* natural;     // [keys]: 1 / log2(e)
    float* hidden;      // [keys]: 0, and -infinity at the padding
    uint32_t* words;    // of the stream: [L, groups, 4]
    int64_t width, keys, groups;  // padded; groups of channels
};

int64_t lay_out(const Attention* a, float* memory, Head* h) {
    float* const start = memory;
    h->width = round_up(a->channels / a->heads, UNIT);
    h->keys = round_up(a->length, UNIT);
    h->groups = (a->length + 3) / 4;
    float** const parts[] = {&h->query, &h->key, &h->value, &h->grad, &h->transposed, &h->mixed};
    for (float** part : parts) *part = take(&memory, h->keys * h->width);
    float** const squares[] = {&h->scores, &h->dropped, &h->d_scores};
    for (float** square : squares) *square = take(&memory, a->length * h->keys);
    h->ones = take(&memory, h->keys);
    h->natural = take(&memory, h->keys);
    h->hidden = take(&memory, h->keys);
    h->factor = take(&memory, h->keys);
    // A unit more: the last row is read in whole vectors.
    const uint64_t counters = a->drop ? (uint64_t)(a->length * h->groups) : 0;
    h->words = (uint32_t*)take(&memory, 4 * (int64_t)round_up_counters(counters) + UNIT);
    return memory - start;
}

int64_t scratch(const Attention* a) {
    Head h;
    return lay_out(a, nullptr, &h);
}

// The scratch's constants, and the walk over a head's counters.
void prepare(const Attention* a, float* memory, Head* h, CounterWalk* walk) {
    lay_out(a, memory, h);
    for (int64_t j = 0; j < h->keys; ++j) {
        h->ones[j] = 1.0f;
        h->natural[j] = 0.69314718f;
        h->hidden[j] = j < a->length ? 0.0f : -__builtin_inff();
    }
    if (a->drop) make_walk(walk, (uint64_t)h->groups, 0, 1);
}

FMREC_INLINE void transpose(const Head* h, const float* in) {
    for (int64_t i = 0; i < h->keys; i += 4) {
        for (int64_t j = 0; j < h->width; j += 4) {
            transpose4(in + i * h->width + j, h->width, h->ones + i,
                       h->transposed + j * h->keys + i, h->keys);
        }
    }
}

// A product whose result, `rows` rows of a head's columns, goes to `out`.
FMREC_INLINE void multiply_out(const Head* h, Product p, int64_t rows, int64_t columns, float* out,
                               int64_t out_row) {
    const bool whole = columns == h->width;
    p.c = whole ? out : h->mixed;
    p.c_row = whole ? out_row : h->width;
    multiply(&p, rows, h->width);
    if (!whole) gather(h->mixed, h->width, rows, columns, out, out_row);
}

// Asks for the rows that the work after this one begins with: a head's columns of a sequence are
// short pieces far apart, which the processor does not foresee. Pieces of `out` are written.
FMREC_INLINE void fetch_piece(const float* piece, int64_t columns, bool write) {
    for (int64_t j = 0; j < columns; j += 16) {
        if (write) {
            __builtin_prefetch(piece + j, 1, 2);
        } else {
            __builtin_prefetch(piece + j, 0, 2);
        }
    }
}

FMREC_INLINE void fetch_next(const Attention* a, int64_t sequence, int64_t head, int64_t i) {
    if (++head == a->heads) {
        head = 0;
        if (++sequence == a->batch) return;
    }
    const int64_t columns = a->channels / a->heads, at = sequence * a->length + i;
    const int64_t first = head * columns;
    const float* qkv = a->qkv + 3 * at * a->channels + first;
    for (int64_t part = a->query_scale[at] == 0.0f; part < 3; ++part) {
        fetch_piece(qkv + part * a->channels, columns, false);
    }
    if (!a->grad) {
        fetch_piece(a->out + at * a->channels + first, columns, true);
        return;
    }
    fetch_piece(a->grad + at * a->channels + first, columns, false);
    const float* d_qkv = a->out + 3 * at * a->channels + first;
    for (int64_t part = 0; part < 3; ++part) {
        fetch_piece(d_qkv + part * a->channels, columns, true);
    }
}

// Everything up to the probabilities; those of the padding's queries, all alike, are left out.
void probabilities(const Attention* a, const Head* h, const CounterWalk* walk, int64_t sequence,
                   int64_t head, int64_t padding) {
    const int64_t columns = a->channels / a->heads, length = a->length, row = 3 * a->channels;
    const float* qkv = a->qkv + sequence * length * row + head * columns;
    const float* query_scale = a->query_scale + sequence * length;
    for (int64_t i = padding; i < length; ++i) {
        const float factor = query_scale[i] * 1.44269504f;
        const float* in = qkv + i * row;
        float* out = h->query + i * h->width;
rotate_row(in, angles_at(a, i), 1.0f, factor, columns, out);
    }
    gather(qkv + 2 * a->channels, row, length, columns, h->value, h->width);
    if (padding < length) {
        for (int64_t i = 0; i < length; ++i) {
            rotate_row(qkv + a->channels + i * row, angles_at(a, i), 1.0f, 1.0f, columns,
                       h->key + i * h->width);
        }
        transpose(h, h->key);
        float* scores = h->scores + padding * h->keys;
        const Product p = {h->query + padding * h->width, h->width, 1, h->transposed, h->keys,
                           h->hidden, nullptr, false, scores, h->keys, columns};
        multiply(&p, length - padding, h->keys);
        for (int64_t i = padding; i < length; ++i) {
            h->factor[i] = softmax_row(h->scores + i * h->keys, h->keys);
        }
    }
    if (a->drop) {
        const uint64_t counters = (uint64_t)(length * h->groups);
        fill_words(walk, (uint64_t)head * counters, counters, a->site,
                   (uint32_t)a->rows[sequence], a->seed, h->words);
    }
}

// dropped = dropout of the probabilities, the padding's included.
void drop_row(const Attention* a, const Head* h, int64_t i, bool uniform) {
    const float share = 1.0f / (float)a->length, factor = h->factor[i];
    const float* in = h->scores + i * h->keys;
    float* out = h->dropped + i * h->keys;
    const uint32_t* words = h->words + i * 4 * h->groups;
    for (int64_t j = 0; j < h->keys; j += FLOATS) {
        const f32v p = uniform ? broadcast(share) : load(in + j) * factor;
        store(out + j, a->drop ? kept(a->threshold, words + j, p * a->scale) : p);
    }
}

void forward(const Attention* a, int64_t begin, int64_t end, float* memory) {
    Head h;
    CounterWalk walk;
    prepare(a, memory, &h, &walk);
    const int64_t columns = a->channels / a->heads, length = a->length;
    for (int64_t s = begin; s < end; ++s) {
        const int64_t padding = padding_of(a->query_scale + s * length, length);
        for (int64_t n = 0; n < a->heads; ++n) {
            probabilities(a, &h, &walk, s, n, padding);
            for (int64_t i = 0; i < length; ++i) {
                fetch_next(a, s, n, i);
                drop_row(a, &h, i, i < padding);
            }
            const Product values = {h.dropped, h.keys, 1, h.value, h.width, nullptr, nullptr,
                                    false, nullptr, 0, length};
            multiply_out(&h, values, length, columns,
                         a->out + s * length * a->channels + n * columns, a->channels);
        }
    }
}

// As drop_row, and from the gradient with respect to the dropped probabilities, in place, that
// with respect to the scores: P * (dP - sum(dP * P)).
FMREC_INLINE void d_softmax_row(const Attention* a, const Head* h, int64_t i) {
    const float* p = h->scores + i * h->keys;
    float* d = h->d_scores + i * h->keys;
    float* dropped = h->dropped + i * h->keys;
    const uint32_t* words = h->words + i * 4 * h->groups;
    const int64_t keys = h->keys;
    const float factor = h->factor[i];
    f32v total = broadcast(0.0f);
    if (a->drop) {
        const uint32_t threshold = a->threshold;
        const float scale = a->scale;
        for (int64_t j = 0; j < keys; j += FLOATS) {
            const f32v share = load(p + j) * factor;
            const f32v d_p = kept(threshold, words + j, load(d + j) * scale);
            total += d_p * share;
            store(dropped + j, kept(threshold, words + j, share * scale));
            store(d + j, d_p);
        }
    } else {
        for (int64_t j = 0; j < keys; j += FLOATS) {
            const f32v share = load(p + j) * factor;
            total += load(d + j) * share;
            store(dropped + j, share);
        }
    }
    const float mean = sum(total);
    for (int64_t j = 0; j < keys; j += FLOATS) {
        store(d + j, load(p + j) * factor * (load(d + j) - mean));
    }
}

void backward(const Attention* a, int64_t begin, int64_t end, float* memory) {
    Head h;
    CounterWalk walk;
    prepare(a, memory, &h, &walk);
    const int64_t columns = a->channels / a->heads, length = a->length, row = 3 * a->channels;
    const uint64_t bytes = (uint64_t)columns * sizeof(float);
    for (int64_t s = begin; s < end; ++s) {
        const float* query_scale = a->query_scale + s * length;
        const int64_t padding = padding_of(query_scale, length), queries = length - padding;
        for (int64_t n = 0; n < a->heads; ++n) {
            float* d_query = a->out + s * length * row + n * columns;
            float* d_key = d_query + a->channels;
            float* d_value = d_key + a->channels;
            probabilities(a, &h, &walk, s, n, padding);
            gather(a->grad + s * length * a->channels + n * columns, a->channels, length, columns,
                   h.grad, h.width);
            float* d_scores = h.d_scores + padding * h.keys;
            if (queries > 0) {
                transpose(&h, h.value);
                const Product d_dropped = {h.grad + padding * h.width, h.width, 1, h.transposed,
                                           h.keys, nullptr, nullptr, false, d_scores, h.keys,
                                           columns};
                multiply(&d_dropped, queries, h.keys);
            }
            for (int64_t i = 0; i < length; ++i) {
                fetch_next(a, s, n, i);
                if (i < padding) {
                    drop_row(a, &h, i, true);
                } else {
                    d_softmax_row(a, &h, i);
                }
            }
            if (a->result) {
                const Product values = {h.dropped, h.keys, 1, h.value, h.width, nullptr, nullptr,
                                        false, nullptr, 0, length};
                multiply_out(&h, values, length, columns,
                             a->result + s * length * a->channels + n * columns, a->channels);
            }
            const Product d_values = {h.dropped, 1, h.keys, h.grad, h.width, nullptr, nullptr,
                                      false, nullptr, 0, length};
            multiply_out(&h, d_values, length, columns, d_value, row);
            for (int64_t i = 0; i < padding; ++i) __builtin_memset(d_query + i * row, 0, bytes);
            if (queries == 0) {
                for (int64_t i = 0; i < length; ++i) __builtin_memset(d_key + i * row, 0, bytes);
                continue;
            }
            const Product d_queries = {d_scores, h.keys, 1, h.key, h.width, nullptr,
                                       query_scale + padding, false, nullptr, 0, length};
            multiply_out(&h, d_queries, queries, columns, d_query + padding * row, row);
            const Product d_keys = {d_scores, 1, h.keys, h.query + padding * h.width, h.width,
                                    nullptr, h.natural, false, nullptr, 0, queries};
            multiply_out(&h, d_keys, length, columns, d_key, row);
            for (int64_t i = 0; a->rotary && i < length; ++i) {
                float* const parts[] = {d_query + i * row, d_key + i * row};
                for (float* part : parts) {
                    rotate_row(part, angles_at(a, i), -1.0f, 1.0f, columns, part);
                }
            }
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const AttentionKernels attention = {scratch, forward, backward};
}

}  // namespace fmrec
