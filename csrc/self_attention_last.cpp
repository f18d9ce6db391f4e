// The last position's attention needs no keys and values: its score with the key W_k n_t + b_k is
// (W_k^T q) . n_t plus q . b_k, which softmax does not see, and its output is
// W_v sum(p_t n_t) + b_v sum(p_t), head by head. So a sequence's rows are read, normed, and met by H
// vectors, here called turned queries; everything else is rows of a group of sequences.
#include "attention_head.h"
#include "block_half.h"
#include "self_attention.h"

namespace fmrec {
namespace {

// Sequences that go through it together.
const int64_t GROUP = 32;

int64_t group(const SelfAttention*) { return GROUP; }

struct Scratch {
    // [GROUP, D]
    float *last, *queries, *values, *sums, *d_branch, *d_values, *d_queries, *d_last, *d_row;
    float *turned, *mixed, *d_mixed, *d_turned;  // [GROUP, H, D]
    float *shares, *d_shares;                    // [GROUP, H]
    float *probabilities, *dropped;              // [GROUP, H, keys]
    float *normed, *d_normed;                    // [L, D]
    float* d_scores;                             // [H, keys]
    float *left, *left_head, *transposed, *transposed_head, *right;
    uint32_t *words, *mask_words;
    int64_t keys, part;  // positions, padded; channels of a head
};

int64_t lay_out(const SelfAttention* a, float* memory, Scratch* s) {
    float* const start = memory;
    const int64_t width = a->width, heads = a->heads;
    s->keys = round_up(a->length, UNIT);
    s->part = width / heads;
    float** const rows[] = {&s->last,     &s->queries,   &s->values, &s->sums, &s->d_branch,
                            &s->d_values, &s->d_queries, &s->d_last, &s->d_row};
    for (float** part : rows) *part = take(&memory, GROUP * width);
    float** const of_heads[] = {&s->turned, &s->mixed, &s->d_mixed, &s->d_turned};
    for (float** part : of_heads) *part = take(&memory, GROUP * heads * width);
    s->shares = take(&memory, GROUP * heads);
    s->d_shares = take(&memory, GROUP * heads);
    s->probabilities = take(&memory, GROUP * heads * s->keys);
    s->dropped = take(&memory, GROUP * heads * s->keys);
    s->normed = take(&memory, a->length * width);
    s->d_normed = take(&memory, a->length * width);
    s->d_scores = take(&memory, heads * s->keys);
    s->left = take(&memory, left_size<EXACT>(GROUP, width));
    s->left_head = take(&memory, left_size<EXACT>(GROUP, s->part));
    s->transposed = take(&memory, left_size<EXACT>(width, GROUP));
    s->transposed_head = take(&memory, left_size<EXACT>(s->part, GROUP));
    s->right = take(&memory, right_size<EXACT>(GROUP, width));
    const uint64_t counters = (uint64_t)(heads * ((a->length + 3) / 4));
    s->words = (uint32_t*)take(&memory, 4 * (int64_t)round_up_counters(counters) + UNIT);
    s->mask_words = (uint32_t*)take(&memory, words_size(width));
    return memory - start;
}

int64_t scratch(const SelfAttention* a) {
    Scratch s;
    return lay_out(a, nullptr, &s);
}

// --- weights ----------------------------------------------------------------------------------

// Of a layer as a whole, of a head's columns of a product, and of what meets a head's channels.
FMREC_INLINE int64_t layer_size(const SelfAttention* a) {
    return right_size<EXACT>(a->width, a->width);
}
FMREC_INLINE int64_t columns_size(const SelfAttention* a) {
    return right_size<EXACT>(a->width, a->width / a->heads);
}
FMREC_INLINE int64_t channels_size(const SelfAttention* a) {
    return right_size<EXACT>(a->width / a->heads, a->width);
}

int64_t packed(const SelfAttention* a) {
    return 4 * layer_size(a) + 2 * a->heads * (columns_size(a) + channels_size(a));
}

// The packed weights, in this order: queries and output as x W^T reads them; of each head W_k as
// q W_k does, and W_v as mixed W_v^T does; then for the backward pass the other way about.
struct Packed {
    float *query, *output, *turn, *value, *query_adjoint, *output_adjoint, *turn_adjoint,
        *value_adjoint;
};

Packed places(const SelfAttention* a) {
    Packed p;
    p.query = a->packed;
    p.output = p.query + layer_size(a);
    p.turn = p.output + layer_size(a);
    p.value = p.turn + a->heads * channels_size(a);
    p.query_adjoint = p.value + a->heads * columns_size(a);
    p.output_adjoint = p.query_adjoint + layer_size(a);
    p.turn_adjoint = p.output_adjoint + layer_size(a);
    p.value_adjoint = p.turn_adjoint + a->heads * columns_size(a);
    return p;
}

void pack_forward(const SelfAttention* a) {
    const Packed p = places(a);
    const int64_t width = a->width, part = width / a->heads;
    pack<EXACT>(a->weights[QUERY], 1, width, width, width, p.query);
    pack<EXACT>(a->weights[OUTPUT], 1, width, width, width, p.output);
    for (int64_t h = 0; h < a->heads; ++h) {
        pack<EXACT>(a->weights[KEY] + h * part * width, width, 1, part, width,
                    p.turn + h * channels_size(a));
        pack<EXACT>(a->weights[VALUE] + h * part * width, 1, width, width, part,
                    p.value + h * columns_size(a));
    }
}

void pack_backward(const SelfAttention* a) {
    const Packed p = places(a);
    const int64_t width = a->width, part = width / a->heads;
    pack_forward(a);
    pack<EXACT>(a->weights[QUERY], width, 1, width, width, p.query_adjoint);
    pack<EXACT>(a->weights[OUTPUT], width, 1, width, width, p.output_adjoint);
    for (int64_t h = 0; h < a->heads; ++h) {
        pack<EXACT>(a->weights[KEY] + h * part * width, 1, width, width, part,
                    p.turn_adjoint + h * columns_size(a));
        pack<EXACT>(a->weights[VALUE] + h * part * width, width, 1, part, width,
                    p.value_adjoint + h * channels_size(a));
    }
}

// --- both directions --------------------------------------------------------------------------

FMREC_INLINE LayerNorm norm_of(const SelfAttention* a) {
    return {a->norm_weight, a->norm_bias, a->width, a->width};
}

FMREC_INLINE const float* rows_of(const SelfAttention* a, int64_t sequence) {
    return a->x + sequence * a->length * a->width;
}

FMREC_INLINE float scale_of(const SelfAttention* a, int64_t sequence) {
    return a->query_scale[sequence * a->length + a->length - 1];
}

FMREC_INLINE float dot(const float* x, const float* y, int64_t count) {
    f32v total = broadcast(0.0f);
    for (int64_t j = 0; j < count; j += FLOATS) total += load(x + j) * load(y + j);
    return sum(total);
}

FMREC_INLINE void add_scaled(const float* x, float factor, int64_t count, float* out) {
    for (int64_t j = 0; j < count; j += FLOATS)
        store(out + j, load(out + j) + load(x + j) * factor);
}

// out[h, t] = vectors[h] . normed[t]
FMREC_INLINE void meet(const SelfAttention* a, const Scratch* s, const float* vectors, float* out) {
    for (int64_t t = 0; t < a->length; ++t) {
        for (int64_t h = 0; h < a->heads; ++h) {
            out[h * s->keys + t] = dot(vectors + h * a->width, s->normed + t * a->width, a->width);
        }
    }
}

// out[h] = sum of weights[h, t] normed[t]
FMREC_INLINE void mix(const SelfAttention* a, const Scratch* s, const float* weights, float* out) {
    const int64_t width = a->width;
    __builtin_memset(out, 0, (size_t)(a->heads * width) * sizeof(float));
    for (int64_t t = 0; t < a->length; ++t) {
        for (int64_t h = 0; h < a->heads; ++h) {
            add_scaled(s->normed + t * width, weights[h * s->keys + t], width, out + h * width);
        }
    }
}

// Everything up to the values of the sequences [first, first + count).
void attend(const SelfAttention* a, const Packed* p, const CounterWalk* walk, const Scratch* s,
            int64_t first, int64_t count) {
    const int64_t width = a->width, heads = a->heads, part = s->part, keys = s->keys;
    const LayerNorm norm = norm_of(a);
    for (int64_t g = 0; g < count; ++g) {
        layer_norm(&norm, rows_of(a, first + g) + (a->length - 1) * width, s->last + g * width,
                   width, 1);
    }
    product<EXACT>(left<EXACT>(s->last, width, count, width, s->left),
                   packed_right(p->query, width), width, count, width, a->biases[QUERY], false,
                   s->queries, width);
    for (int64_t g = 0; g < count; ++g) {
        // A padded query's scores are 0, whatever the query.
        const float scale = scale_of(a, first + g);
        float* q = s->queries + g * width;
        for (int64_t j = 0; j < width; j += FLOATS) {
            store(q + j, scale == 0.0f ? broadcast(0.0f) : load(q + j) * scale);
        }
    }
    for (int64_t h = 0; h < heads; ++h) {
        product<EXACT>(left<EXACT>(s->queries + h * part, width, count, part, s->left_head),
                       packed_right(p->turn + h * channels_size(a), width), part, count, width,
                       nullptr, false, s->turned + h * width, heads * width);
    }
    const uint64_t groups = (uint64_t)((a->length + 3) / 4);
    for (int64_t g = 0; g < count; ++g) {
        layer_norm(&norm, rows_of(a, first + g), s->normed, width, a->length);
        float* probabilities = s->probabilities + g * heads * keys;
        float* dropped = s->dropped + g * heads * keys;
        meet(a, s, s->turned + g * heads * width, probabilities);
        if (a->kept) {
            fill_words(walk, 0, (uint64_t)heads * groups, a->site, (uint32_t)a->rows[first + g],
                       a->seed, s->words);
        }
        for (int64_t h = 0; h < heads; ++h) {
            float* row = probabilities + h * keys;
            for (int64_t t = 0; t < keys; ++t) {
                row[t] = t < a->length ? row[t] * 1.44269504f : -__builtin_inff();
            }
            const float factor = softmax_row(row, keys);
            const uint32_t* words = s->words + 4 * (uint64_t)h * groups;
            f32v share = broadcast(0.0f);
            for (int64_t t = 0; t < keys; t += FLOATS) {
                const f32v chance = load(row + t) * factor;
                const f32v stays =
                    a->kept ? kept(a->threshold, words + t, chance * a->scale) : chance;
                store(row + t, chance);
                store(dropped + h * keys + t, stays);
                share += stays;
            }
            s->shares[g * heads + h] = sum(share);
        }
        mix(a, s, dropped, s->mixed + g * heads * width);
    }
    for (int64_t h = 0; h < heads; ++h) {
        const float* bias = a->biases[VALUE] + h * part;
        finish_product<EXACT>(
            left<EXACT>(s->mixed + h * width, heads * width, count, width, s->left),
            packed_right(p->value + h * columns_size(a), part), width, count, part, s->sums,
            [=](int64_t g, int64_t column, const auto& sums, int64_t wide) {
                float* out = s->values + g * width + h * part + column;
                const float share = s->shares[g * heads + h];
                for (int64_t j = 0; j < wide; j += FLOATS) {
                    store(out + j, sums(j) + load(bias + column + j) * share);
                }
            });
    }
}

void make_walks(const SelfAttention* a, CounterWalk* walk, CounterWalk* mask_walk) {
    const uint64_t last = (uint64_t)a->length - 1;
    // A position of the probabilities' stream is head * L + query.
    make_walk(walk, (uint64_t)((a->length + 3) / 4), last, (uint64_t)a->length);
    make_walk(mask_walk, (uint64_t)a->width / 4, last, 1);
}

// --- forward ----------------------------------------------------------------------------------

void forward(const SelfAttention* a, int64_t begin, int64_t end, float* memory) {
    const TileState tiles{};
    (void)tiles;
    Scratch s;
    lay_out(a, memory, &s);
    const Packed p = places(a);
    const int64_t width = a->width, bytes = 8 * self_attention_words(width);
    CounterWalk walk, mask_walk;
    make_walks(a, &walk, &mask_walk);
    for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i * GROUP, count = at_most(a->batch - first, GROUP);
        uint8_t* const kept = a->kept ? (uint8_t*)a->kept + first * bytes : nullptr;
        if (kept) {
            const Masks masks = {(uint8_t*)a->kept, 1, bytes, a->rows, a->seed, a->threshold};
            __builtin_memset(kept, 0, (size_t)(count * bytes));
            draw_mask(&masks, &mask_walk, first, count, width, a->site + 1, 0, s.mask_words);
        }
        attend(a, &p, &walk, &s, first, count);
        finish_product<EXACT>(
            left<EXACT>(s.values, width, count, width, s.left), packed_right(p.output, width),
            width, count, width, s.sums,
            [=](int64_t g, int64_t column, const auto& sums, int64_t wide) {
                const uint8_t* bits = kept ? kept + g * bytes : nullptr;
                const float* x = rows_of(a, first + g) + (a->length - 1) * width + column;
                float* out = a->out + (first + g) * width + column;
                for (int64_t j = 0; j < wide; j += FLOATS) {
                    const f32v h = sums(j) + load(a->biases[OUTPUT] + column + j);
                    store(out + j, load(x + j) + masked(bits, column + j, h * a->scale));
                }
            });
    }
}

// --- backward ---------------------------------------------------------------------------------

struct Gradients {
    float* weights[SELF_ATTENTION_LAYERS];
    float* biases[SELF_ATTENTION_LAYERS];
    float *norm_weight, *norm_bias;
};

Gradients gradients_at(const SelfAttention* a, float* partial) {
    Gradients d;
    for (float*& weight : d.weights) {
        weight = partial;
        partial += a->width * a->width;
    }
    for (float*& bias : d.biases) {
        bias = partial;
        partial += a->width;
    }
    d.norm_weight = partial;
    d.norm_bias = partial + a->width;
    return d;
}

// From the gradients of mixed and shares those of the turned queries and of all rows but the last,
// whose gradient of the norm's result is kept for later.
void attend_backward(const SelfAttention* a, const Scratch* s, const Gradients* d, int64_t first,
                     int64_t g) {
    const int64_t width = a->width, heads = a->heads, keys = s->keys, length = a->length;
    const LayerNorm norm = norm_of(a);
    const float* x = rows_of(a, first + g);
    layer_norm(&norm, x, s->normed, width, length);
    const float* d_mixed = s->d_mixed + g * heads * width;
    const float* turned = s->turned + g * heads * width;
    const float* probabilities = s->probabilities + g * heads * keys;
    const float* dropped = s->dropped + g * heads * keys;
    meet(a, s, d_mixed, s->d_scores);
    for (int64_t h = 0; h < heads; ++h) {
        float* d_row = s->d_scores + h * keys;
        const float *chance = probabilities + h * keys, *stays = dropped + h * keys;
        const float d_share = s->d_shares[g * heads + h];
        f32v total = broadcast(0.0f);
        for (int64_t t = length; t < keys; ++t) d_row[t] = 0.0f;
        for (int64_t t = 0; t < keys; t += FLOATS) {
            // What was dropped is 0; a probability that is 0 itself has no gradient either.
            const u32v mask = (u32v)(load(stays + t) != 0.0f);
            const f32v d_chance = (f32v)((u32v)((load(d_row + t) + d_share) * a->scale) & mask);
            total += d_chance * load(chance + t);
            store(d_row + t, d_chance);
        }
        const float mean = sum(total);
        for (int64_t t = 0; t < keys; t += FLOATS) {
            store(d_row + t, load(chance + t) * (load(d_row + t) - mean));
        }
    }
    mix(a, s, s->d_scores, s->d_turned + g * heads * width);
    for (int64_t t = 0; t < length; ++t) {
        float* d_row = s->d_normed + t * width;
        for (int64_t j = 0; j < width; j += FLOATS) {
            f32v total = broadcast(0.0f);
            for (int64_t h = 0; h < heads; ++h) {
                total += load(d_mixed + h * width + j) * dropped[h * keys + t];
                total += load(turned + h * width + j) * s->d_scores[h * keys + t];
            }
            store(d_row + j, total);
        }
    }
    const int64_t rest = length - 1;
    add_rows(s->d_normed, width, rest, width, d->norm_bias);
    float* d_x = a->out + (first + g) * length * width;
    for (int64_t t = 0; t < rest; ++t) {
        float* d_norm = s->d_normed + t * width;
        norm_backward_row<false>(a->norm_weight, width, x + t * width, d_norm, d_norm,
                                 d_x + t * width);
    }
    add_rows(s->d_normed, width, rest, width, d->norm_weight);
    __builtin_memcpy(s->d_row + g * width, s->d_normed + rest * width,
                     (size_t)width * sizeof(float));
}

void backward_group(const SelfAttention* a, const Packed* p, const CounterWalk* walk,
                    const Scratch* s, int64_t first, int64_t count, const Gradients* d) {
    const int64_t width = a->width, heads = a->heads, part = s->part;
    const int64_t bytes = 8 * self_attention_words(width);
    attend(a, p, walk, s, first, count);
    for (int64_t g = 0; g < count; ++g) {
        const uint8_t* bits = a->kept ? (const uint8_t*)a->kept + (first + g) * bytes : nullptr;
        for (int64_t j = 0; j < width; j += FLOATS) {
            const f32v grad = load(a->grad + (first + g) * width + j);
            store(s->d_branch + g * width + j, masked(bits, j, grad * a->scale));
        }
    }
    add_rows(s->d_branch, width, count, width, d->biases[OUTPUT]);
    product<EXACT>(left_transposed<EXACT>(s->d_branch, width, count, width, s->transposed),
                   right<EXACT>(s->values, width, count, width, s->right), count, width, width,
                   nullptr, true, d->weights[OUTPUT], width);
    product<EXACT>(left<EXACT>(s->d_branch, width, count, width, s->left),
                   packed_right(p->output_adjoint, width), width, count, width, nullptr, false,
                   s->d_values, width);
    for (int64_t g = 0; g < count; ++g) {
        for (int64_t h = 0; h < heads; ++h) {
            const float* d_value = s->d_values + g * width + h * part;
            s->d_shares[g * heads + h] = dot(d_value, a->biases[VALUE] + h * part, part);
            add_scaled(d_value, s->shares[g * heads + h], part, d->biases[VALUE] + h * part);
        }
    }
    for (int64_t h = 0; h < heads; ++h) {
        const float* d_value = s->d_values + h * part;
        product<EXACT>(left_transposed<EXACT>(d_value, width, count, part, s->transposed_head),
                       right<EXACT>(s->mixed + h * width, heads * width, count, width, s->right),
                       count, part, width, nullptr, true, d->weights[VALUE] + h * part * width,
                       width);
        product<EXACT>(left<EXACT>(d_value, width, count, part, s->left_head),
                       packed_right(p->value_adjoint + h * channels_size(a), width), part, count,
                       width, nullptr, false, s->d_mixed + h * width, heads * width);
    }
    for (int64_t g = 0; g < count; ++g) attend_backward(a, s, d, first, g);
    for (int64_t h = 0; h < heads; ++h) {
        const float* d_turned = s->d_turned + h * width;
        product<EXACT>(
            left_transposed<EXACT>(s->queries + h * part, width, count, part, s->transposed_head),
            right<EXACT>(d_turned, heads * width, count, width, s->right), count, part, width,
            nullptr, true, d->weights[KEY] + h * part * width, width);
        finish_product<EXACT>(left<EXACT>(d_turned, heads * width, count, width, s->left),
                              packed_right(p->turn_adjoint + h * columns_size(a), part), width,
                              count, part, s->sums,
                              [=](int64_t g, int64_t column, const auto& sums, int64_t wide) {
                                  float* out = s->d_queries + g * width + h * part + column;
                                  const float scale = scale_of(a, first + g);
                                  for (int64_t j = 0; j < wide; j += FLOATS) {
                                      store(out + j, sums(j) * scale);
                                  }
                              });
    }
    add_rows(s->d_queries, width, count, width, d->biases[QUERY]);
    product<EXACT>(left_transposed<EXACT>(s->d_queries, width, count, width, s->transposed),
                   right<EXACT>(s->last, width, count, width, s->right), count, width, width,
                   nullptr, true, d->weights[QUERY], width);
    product<EXACT>(left<EXACT>(s->d_queries, width, count, width, s->left),
                   packed_right(p->query_adjoint, width), width, count, width, nullptr, true,
                   s->d_row, width);
    add_rows(s->d_row, width, count, width, d->norm_bias);
    for (int64_t g = 0; g < count; ++g) {
        const int64_t row = (first + g) * a->length + a->length - 1;
        float *d_x = a->out + row * width, *d_norm = s->d_row + g * width;
        __builtin_memcpy(d_x, a->grad + (first + g) * width, (size_t)width * sizeof(float));
        norm_backward_row<true>(a->norm_weight, width, a->x + row * width, d_norm, d_norm, d_x);
    }
    add_rows(s->d_row, width, count, width, d->norm_weight);
}

void backward(const SelfAttention* a, int64_t begin, int64_t end, float* memory) {
    const TileState tiles{};
    (void)tiles;
    Scratch s;
    lay_out(a, memory, &s);
    const Packed p = places(a);
    CounterWalk walk, mask_walk;
    make_walks(a, &walk, &mask_walk);
    const int64_t groups = (a->batch + GROUP - 1) / GROUP;
    for (int64_t part = begin; part < end; ++part) {
        const int64_t size = self_attention_partial(a->width);
        float* partial = a->partial + part * size;
        __builtin_memset(partial, 0, (size_t)size * sizeof(float));
        const Gradients d = gradients_at(a, partial);
        const int64_t last = groups * (part + 1) / a->parts;
        for (int64_t i = groups * part / a->parts; i < last; ++i) {
            const int64_t first = i * GROUP, count = at_most(a->batch - first, GROUP);
            backward_group(a, &p, &walk, &s, first, count, &d);
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const SelfAttentionKernels self_attention_last = {
    group, packed, scratch, pack_forward, pack_backward, forward, backward};
}

}  // namespace fmrec
