#include "attention.h"

#include "attention_head.h"
#include "block_half.h"
#include "gemm.h"
#include "listed_rows.h"
#include "philox.h"
#include "transpose.h"

namespace fmrec {
namespace {

// One head of one sequence, in rows that are padded to whole units. The columns of the padding,
// and the rows beyond the last position, are zeros: nothing ever writes to them.
struct Head {
    float* query;       // [keys, width], times its scale and log2(e)
    float* key;         // [keys, width]
    float* value;       // [64 mask_words, width], of which the last is zeros
    float* grad;        // the same
    float* transposed;  // [width, keys]
    float* mixed;       // [L, width]: a result, where it cannot be written to its place at once
    float* scores;      // [L, keys]; then 2^scores, which times its factor is the probability
    float* factor;      // [L]
    float* dropped;     // [L, keys]: the probabilities after dropout
    float* d_scores;    // [L, keys]
    float* ones;        // [keys]
    float* natural;     // [keys]: 1 / log2(e)
    float* hidden;      // [keys]: 0, and -infinity at the padding
    float* base;        // [width]: what all of the padding's queries, or their keys, have in common
    uint32_t* words;    // of the stream: [L, groups, 4]
    uint64_t* drawn;    // [L, mask_words]: masks, where they are not kept
    uint64_t* listed;   // [64 mask_words, mask_words]: keys of the padding's queries
    uint64_t* columns;  // [64 mask_words, mask_words]: the same transposed, queries of the keys
    const uint64_t* bits;  // the masks of this head, in rows of bits_row words
    int64_t bits_row;
    int64_t width, keys, groups, mask_words;  // padded; groups of channels
};

// Groups of keys that are drawn of a query: some more than there are, where that is less work.
int64_t groups_of(const Attention* a, int64_t keys) {
    const int64_t groups = (a->length + 3) / 4, padded = keys / 4;
    return padded * 4 <= groups * 5 && shares_groups((uint64_t)padded) ? padded : groups;
}

int64_t lay_out(const Attention* a, float* memory, Head* h) {
    float* const start = memory;
    h->width = round_up(a->channels / a->heads, UNIT);
    h->keys = round_up(a->length, UNIT);
    h->groups = groups_of(a, h->keys);
    h->mask_words = attention_words(a->length);
    const int64_t rows = 64 * h->mask_words;
    float** const parts[] = {&h->query, &h->key, &h->transposed, &h->mixed};
    for (float** part : parts) *part = take(&memory, h->keys * h->width);
    h->value = take(&memory, rows * h->width);
    h->grad = take(&memory, rows * h->width);
    float** const squares[] = {&h->scores, &h->dropped, &h->d_scores};
    for (float** square : squares) *square = take(&memory, a->length * h->keys);
    h->ones = take(&memory, h->keys);
    h->natural = take(&memory, h->keys);
    h->hidden = take(&memory, h->keys);
    h->factor = take(&memory, h->keys);
    h->base = take(&memory, h->width);
    // A unit more: the last row is read in whole vectors.
    const uint64_t counters = a->drop ? (uint64_t)(a->length * h->groups) : 0;
    h->words = (uint32_t*)take(&memory, 4 * (int64_t)round_up_counters(counters) + UNIT);
    uint64_t** const masks[] = {&h->drawn, &h->listed, &h->columns};
    for (uint64_t** mask : masks) *mask = (uint64_t*)take(&memory, 2 * rows * h->mask_words);
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
    if (a->cached) return;
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

// The bits of the word that stand for keys, or queries, before the one at `end`.
FMREC_INLINE uint64_t bits_before(int64_t end, int64_t word) {
    const int64_t left = end - 64 * word;
    return left >= 64 ? ~0ull : left > 0 ? ~(~0ull << left) : 0;
}

// The masks of a head: drawn, or read where forward has kept them.
void find_masks(const Attention* a, Head* h, const CounterWalk* walk, int64_t sequence,
                int64_t head) {
    uint64_t* bits = h->drawn;
    h->bits_row = h->mask_words;
    if (a->kept) {
        bits = a->kept + sequence * a->length * a->kept_row + head * h->mask_words;
        h->bits_row = a->kept_row;
    }
    h->bits = bits;
    if (a->kept && a->grad) return;
    const uint64_t counters = (uint64_t)(a->length * h->groups);
    fill_words(walk, (uint64_t)head * counters, counters, a->site, (uint32_t)a->rows[sequence],
               a->seed, h->words);
    for (int64_t i = 0; i < a->length; ++i) {
        const uint32_t* words = h->words + i * 4 * h->groups;
        for (int64_t w = 0; w < h->mask_words; ++w) {
            uint64_t word = 0;
            for (int64_t j = 0; j < at_most(h->keys - 64 * w, 64); j += FLOATS) {
                word |= (uint64_t)kept_bits(words + 64 * w + j, a->threshold) << j;
            }
            bits[i * h->bits_row + w] = word & bits_before(a->length, w);
        }
    }
}

// The mask of query i, as `select` reads it; null where nothing drops.
FMREC_INLINE const uint8_t* bits_of(const Attention* a, const Head* h, int64_t i) {
    return a->drop ? (const uint8_t*)(h->bits + i * h->bits_row) : nullptr;
}

// Everything up to the probabilities; those of the padding's queries, all alike, are left out.
void probabilities(const Attention* a, Head* h, const CounterWalk* walk, int64_t sequence,
                   int64_t head, int64_t padding) {
    const int64_t columns = a->channels / a->heads, length = a->length, row = 3 * a->channels;
    const float* qkv = a->qkv + sequence * length * row + head * columns;
    const float* query_scale = a->query_scale + sequence * length;
    for (int64_t i = padding; i < length; ++i) {
        const float factor = query_scale[i] * 1.44269504f;
        const float* in = qkv + i * row;
        rotate_row(in, angles_at(a, i), 1.0f, factor, columns, h->query + i * h->width);
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
    if (a->drop) find_masks(a, h, walk, sequence, head);
}

// dropped = dropout of the probabilities of a query that is no padding.
void drop_row(const Attention* a, const Head* h, int64_t i) {
    const float factor = h->factor[i];
    const float* in = h->scores + i * h->keys;
    float* out = h->dropped + i * h->keys;
    const uint8_t* bits = bits_of(a, h, i);
    if (!bits) {
        for (int64_t j = 0; j < h->keys; j += FLOATS) store(out + j, load(in + j) * factor);
        return;
    }
    for (int64_t j = 0; j < h->keys; j += FLOATS) {
        store(out + j, select(bits, (uint64_t)j, load(in + j) * factor * a->scale));
    }
}

// --- the padding's queries ----------------------------------------------------------------------
// Their probabilities are all 1 / L. So a result is a share of the sum of all values, which is the
// same for all of them, less that of the few that drop; where most drop, that of those that stay.
// Its round-off is that of a sum of all L, at least half of which stay.

// Whether the lists have what stays rather than what drops. Without dropout they are empty.
FMREC_INLINE bool lists_kept(const Attention* a) {
    return a->drop && a->threshold >= 0x80000000u;
}

// The keys that the padding's queries list, and none of the queries up to a multiple of 64.
void list_keys(const Attention* a, const Head* h, int64_t padding) {
    const uint64_t inverted = lists_kept(a) ? 0 : ~0ull;
    const int64_t words = h->mask_words, end = at_most((padding + 63) / 64, words) * 64;
    for (int64_t w = 0; w < words; ++w) {
        const uint64_t keys = bits_before(a->length, w);
        for (int64_t i = 0; i < padding; ++i) {
            h->listed[i * words + w] = (h->bits[i * h->bits_row + w] ^ inverted) & keys;
        }
        for (int64_t i = padding; i < end; ++i) h->listed[i * words + w] = 0;
    }
}

// The padding's queries that list a key.
void list_queries(const Head* h, int64_t padding) {
    const int64_t words = h->mask_words, squares = (padding + 63) / 64;
    for (int64_t u = 0; u < words; ++u) {
        for (int64_t w = 0; w < words; ++w) {
            uint64_t square[64] = {};
            if (u < squares) {
                for (int64_t i = 0; i < 64; ++i) square[i] = h->listed[(64 * u + i) * words + w];
                transpose_bits(square);
            }
            for (int64_t i = 0; i < 64; ++i) h->columns[(64 * w + i) * words + u] = square[i];
        }
    }
}

// `count` results, each of those of the `rows` rows of `in` that it does not drop.
void mix_alike(const Attention* a, const Head* h, const uint64_t* listed, const float* in,
               int64_t rows, int64_t count, float* out, int64_t out_row) {
    const float share = (a->drop ? a->scale : 1.0f) / (float)a->length;
    const bool stays = lists_kept(a);
    sum_rows(in, h->width, rows, h->base);
    for (int64_t j = 0; j < h->width; j += FLOATS) {
        const f32v total = load(h->base + j);
        // Zeros, unless a row is not finite: that shows in all results, as it does where it is
        // multiplied by a probability of 0.
        store(h->base + j, stays ? total - total : total * share);
    }
    const ListedRows p = {listed,  h->mask_words,          in,  h->width,
                          h->base, stays ? share : -share, out, out_row};
    listed_sums(&p, count);
}

// --- forward ----------------------------------------------------------------------------------

// Where rows of a head's columns are written: at their place, or, where the columns are no whole
// units, to `mixed`, from where `deliver` takes them there.
struct Place {
    float* at;
    int64_t row;
};

FMREC_INLINE Place place_for(const Head* h, int64_t columns, float* out, int64_t out_row) {
    return columns == h->width ? Place{out, out_row} : Place{h->mixed, h->width};
}

FMREC_INLINE void deliver(const Head* h, int64_t rows, int64_t columns, float* out,
                          int64_t out_row) {
    if (columns != h->width) gather(h->mixed, h->width, rows, columns, out, out_row);
}

// dropped v, of all queries.
void mix_values(const Attention* a, const Head* h, int64_t padding, float* out) {
    const int64_t columns = a->channels / a->heads, length = a->length;
    const Place place = place_for(h, columns, out, a->channels);
    if (padding > 0) {
        mix_alike(a, h, h->listed, h->value, length, padding, place.at, place.row);
    }
    const Product values = {h->dropped + padding * h->keys, h->keys, 1, h->value, h->width,
                            nullptr, nullptr, false, place.at + padding * place.row, place.row,
                            length};
    multiply(&values, length - padding, h->width);
    deliver(h, length, columns, out, a->channels);
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
            if (a->drop && padding > 0) list_keys(a, &h, padding);
            for (int64_t i = 0; i < length; ++i) {
                fetch_next(a, s, n, i);
                if (i >= padding) drop_row(a, &h, i);
            }
            mix_values(a, &h, padding, a->out + s * length * a->channels + n * columns);
        }
    }
}

// --- backward ---------------------------------------------------------------------------------

// As drop_row, and from the gradient with respect to the dropped probabilities, in place, that
// with respect to the scores: P * (dP - sum(dP * P)).
FMREC_INLINE void d_softmax_row(const Attention* a, const Head* h, int64_t i) {
    const float* p = h->scores + i * h->keys;
    float* d = h->d_scores + i * h->keys;
    float* dropped = h->dropped + i * h->keys;
    const int64_t keys = h->keys;
    const float factor = h->factor[i];
    f32v total = broadcast(0.0f);
    if (a->drop) {
        const uint8_t* bits = bits_of(a, h, i);
        const float scale = a->scale;
        for (int64_t j = 0; j < keys; j += FLOATS) {
            const f32v share = load(p + j) * factor;
            const f32v d_p = select(bits, (uint64_t)j, load(d + j) * scale);
            total += d_p * share;
            store(dropped + j, select(bits, (uint64_t)j, share * scale));
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

// dropped^T grad, of all queries.
void mix_grads(const Attention* a, const Head* h, int64_t padding, float* out) {
    const int64_t columns = a->channels / a->heads, length = a->length;
    const int64_t queries = length - padding, out_row = 3 * a->channels;
    const Place place = place_for(h, columns, out, out_row);
    if (padding > 0) {
        if (a->drop) list_queries(h, padding);
        mix_alike(a, h, h->columns, h->grad, padding, length, place.at, place.row);
    }
    if (queries > 0) {
        const Product d_values = {h->dropped + padding * h->keys, 1, h->keys,
                                  h->grad + padding * h->width, h->width, nullptr, nullptr,
                                  padding > 0, place.at, place.row, queries};
        multiply(&d_values, length, h->width);
    }
    deliver(h, length, columns, out, out_row);
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
            if (a->drop && padding > 0) list_keys(a, &h, padding);
            for (int64_t i = 0; i < length; ++i) {
                fetch_next(a, s, n, i);
                if (i >= padding) d_softmax_row(a, &h, i);
            }
            if (a->result) {
                mix_values(a, &h, padding, a->result + s * length * a->channels + n * columns);
            }
            mix_grads(a, &h, padding, d_value);
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
