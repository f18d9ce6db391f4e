#include "self_attention.h"

#include "attention.h"
#include "block_half.h"

namespace fmrec {
namespace {

// Rows of the sequences that go through it together, at most; one sequence may have more.
const int64_t ROWS = 160;
// Of many sequences, in bytes: a weight's gradient sums whole tiles of 64 rows.
const int64_t MORE_ROWS = 256, MANY = 64 * MORE_ROWS;

template <int PLANES>
int64_t group(const SelfAttention* a) {
    const bool bytes = PLANES == EXACT_INT8 && PLANES != EXACT;
    const bool more = bytes && a->batch * a->length >= MANY;
    const int64_t rows = more ? MORE_ROWS : ROWS;
    return a->length < rows ? rows / a->length : 1;
}

struct Scratch {
    float *normed, *queries, *qkv, *mixed, *sums;
    float *d_branch, *d_mixed, *d_qkv, *d_normed, *d_queries;
    float *left, *left_queries, *transposed, *right, *right_queries;
    float* attention;
    uint32_t* words;
    int64_t* real;  // rows whose queries are wanted: the padding's scores are all alike
    int64_t queried;
};

Attention attention_of(const SelfAttention* a, int64_t first, int64_t sequences, const Scratch* s) {
    Attention b = {};
    b.qkv = s->qkv;
    b.query_scale = a->query_scale + first * a->length;
    b.rows = a->rows + first;
    b.out = s->mixed;
    b.batch = sequences;
    b.length = a->length;
    b.channels = a->width;
    b.heads = a->heads;
    b.seed = a->seed;
    b.site = a->site;
    b.drop = a->kept != nullptr;
    b.kept_row = self_attention_kept_words(a);
    if (b.drop) {
        b.kept = (uint64_t*)a->kept + first * a->length * b.kept_row;
        b.kept += self_attention_words(a->width);
    }
    b.threshold = a->threshold;
    b.scale = a->scale;
    b.cached = true;
    return b;
}

template <int PLANES>
int64_t lay_out(const SelfAttention* a, float* memory, Scratch* s) {
    float* const start = memory;
    const int64_t rows = group<PLANES>(a) * a->length, width = a->width;
    float** const parts[] = {&s->normed,   &s->queries, &s->mixed,    &s->sums,
                             &s->d_branch, &s->d_mixed, &s->d_normed, &s->d_queries};
    for (float** part : parts) *part = take(&memory, rows * width);
    s->qkv = take(&memory, 3 * rows * width);
    s->d_qkv = take(&memory, 3 * rows * width);
    s->left = take(&memory, left_size<PLANES>(rows, width));
    s->left_queries = take(&memory, left_size<PLANES>(rows, width));
    s->transposed = take(&memory, left_size<PLANES>(width, rows));
    s->right = take(&memory, right_size<PLANES>(rows, width));
    s->right_queries = take(&memory, right_size<PLANES>(rows, width));
    s->words = (uint32_t*)take(&memory, words_size(width));
    s->real = (int64_t*)take(&memory, 2 * rows);
    const Attention b = attention_of(a, 0, 1, s);
    s->attention = take(&memory, FMREC_ISA::attention.scratch(&b));
    return memory - start;
}

template <int PLANES>
int64_t scratch(const SelfAttention* a) {
    Scratch s = {};
    return lay_out<PLANES>(a, nullptr, &s);
}

// --- weights ----------------------------------------------------------------------------------

template <int PLANES>
FMREC_INLINE int64_t layer_size(const SelfAttention* a) {
    return right_size<PLANES>(a->width, a->width);
}

template <int PLANES>
int64_t packed(const SelfAttention* a) {
    return 7 * layer_size<PLANES>(a);
}

// As x W^T reads W.
template <int PLANES>
FMREC_INLINE void pack_layer(const SelfAttention* a, int layer, int64_t place) {
    pack<PLANES>(a->weights[layer], 1, a->width, a->width, a->width,
                 a->packed + place * layer_size<PLANES>(a));
}

// As d W reads it.
template <int PLANES>
FMREC_INLINE void pack_adjoint(const SelfAttention* a, int layer, int64_t place) {
    pack<PLANES>(a->weights[layer], a->width, 1, a->width, a->width,
                 a->packed + place * layer_size<PLANES>(a));
}

template <int PLANES>
FMREC_INLINE Operand weights_at(const SelfAttention* a, int64_t place) {
    return packed_right(a->packed + place * layer_size<PLANES>(a), a->width);
}

// Where pack_forward puts OUTPUT, and pack_backward the adjoints.
const int64_t ADJOINT = 3;

template <int PLANES>
void pack_forward(const SelfAttention* a) {
    for (int layer = QUERY; layer <= OUTPUT; ++layer) pack_layer<PLANES>(a, layer, layer);
}

template <int PLANES>
void pack_backward(const SelfAttention* a) {
    for (int layer = QUERY; layer <= VALUE; ++layer) pack_layer<PLANES>(a, layer, layer);
    for (int layer = QUERY; layer <= OUTPUT; ++layer) {
        pack_adjoint<PLANES>(a, layer, ADJOINT + layer);
    }
}

// --- both directions --------------------------------------------------------------------------

// Norm and projections of the sequences [first, first + sequences), and the rows that query.
template <int PLANES>
void project(const SelfAttention* a, Scratch* s, int64_t first, int64_t sequences) {
    const int64_t length = a->length, width = a->width, rows = sequences * length;
    const LayerNorm norm = {a->norm_weight, a->norm_bias, width, width};
    layer_norm(&norm, a->x + first * length * width, s->normed, width, rows);
    const Operand normed = left<PLANES>(s->normed, width, rows, width, s->left);
    for (int layer = KEY; layer <= VALUE; ++layer) {
        product<PLANES>(normed, weights_at<PLANES>(a, layer), width, rows, width, a->biases[layer],
                        false, s->qkv + layer * width, 3 * width);
    }
    s->queried = 0;
    for (int64_t q = 0; q < sequences; ++q) {
        for (int64_t i = padding_of(a->query_scale + (first + q) * length, length); i < length;
             ++i) {
            const int64_t row = q * length + i;
            __builtin_memcpy(s->queries + s->queried * width, s->normed + row * width,
                             (size_t)width * sizeof(float));
            s->real[s->queried++] = row;
        }
    }
    const Operand queries = left<PLANES>(s->queries, width, s->queried, width, s->left_queries);
    finish_product<PLANES>(queries, weights_at<PLANES>(a, QUERY), width, s->queried, width, s->sums,
                           [=](int64_t row, int64_t column, const auto& sums, int64_t count) {
                               float* out = s->qkv + 3 * s->real[row] * width + column;
                               for (int64_t j = 0; j < count; j += FLOATS) {
                                   store(out + j,
                                         sums(j) + load(a->biases[QUERY] + column + j));
                               }
                           });
}

// --- forward ----------------------------------------------------------------------------------

template <int PLANES>
void forward(const SelfAttention* a, int64_t begin, int64_t end, float* memory) {
    const TileState tiles{};
    (void)tiles;
    Scratch s;
    lay_out<PLANES>(a, memory, &s);
    const int64_t length = a->length, width = a->width, bytes = 8 * self_attention_kept_words(a);
    CounterWalk walk;
    make_walk(&walk, (uint64_t)width / 4, 0, 1);
    const int64_t size = group<PLANES>(a);
    for (int64_t g = begin; g < end; ++g) {
        const int64_t first = g * size, sequences = at_most(a->batch - first, size);
        const int64_t row = first * length, rows = sequences * length;
        uint8_t* const kept = a->kept ? (uint8_t*)a->kept + row * bytes : nullptr;
        if (kept) {
            const Masks masks = {(uint8_t*)a->kept, length, bytes, a->rows, a->seed, a->threshold};
            // Beyond the mask the last word of a row has zeros.
            __builtin_memset(kept, 0, (size_t)(rows * bytes));
            draw_mask(&masks, &walk, row, rows, width, a->site + 1, 0, s.words);
        }
        project<PLANES>(a, &s, first, sequences);
        const Attention attention = attention_of(a, first, sequences, &s);
        FMREC_ISA::attention.forward(&attention, 0, sequences, s.attention);
        const float* x = a->x + row * width;
        float* out = a->out + row * width;
        const Operand mixed = left<PLANES>(s.mixed, width, rows, width, s.left);
        finish_product<PLANES>(
            mixed, weights_at<PLANES>(a, OUTPUT), width, rows, width, s.sums,
            [=](int64_t i, int64_t column, const auto& sums, int64_t count) {
                const uint8_t* bits = kept ? kept + i * bytes : nullptr;
                const int64_t at = i * width + column;
                for (int64_t j = 0; j < count; j += FLOATS) {
                    const f32v h = sums(j) + load(a->biases[OUTPUT] + column + j);
                    store(out + at + j, load(x + at + j) + masked(bits, column + j, h * a->scale));
                }
            });
    }
}

// --- backward ---------------------------------------------------------------------------------

template <int PLANES>
void backward_group(const SelfAttention* a, Scratch* s, int64_t first, int64_t sequences,
                    float* partial) {
    const int64_t length = a->length, width = a->width, bytes = 8 * self_attention_kept_words(a);
    const int64_t row = first * length, rows = sequences * length, size = width * width;
    const uint8_t* kept = a->kept ? (const uint8_t*)a->kept + row * bytes : nullptr;
    const float* grad = a->grad + row * width;
    float* d_x = a->out + row * width;
    float* const d_biases = partial + SELF_ATTENTION_LAYERS * size;
    float* const d_norm_weight = d_biases + SELF_ATTENTION_LAYERS * width;
    // The residual's gradient goes to d_x.
    for (int64_t i = 0; i < rows; ++i) {
        const uint8_t* bits = kept ? kept + i * bytes : nullptr;
        for (int64_t j = 0; j < width; j += FLOATS) {
            const f32v g = load(grad + i * width + j);
            store(d_x + i * width + j, g);
            store(s->d_branch + i * width + j, masked(bits, j, g * a->scale));
        }
    }
    add_rows(s->d_branch, width, rows, width, d_biases + OUTPUT * width);
    product<PLANES>(left<PLANES>(s->d_branch, width, rows, width, s->left),
                    weights_at<PLANES>(a, ADJOINT + OUTPUT), width, rows, width, nullptr, false,
                    s->d_mixed, width);
    project<PLANES>(a, s, first, sequences);
    Attention attention = attention_of(a, first, sequences, s);
    attention.grad = s->d_mixed;
    attention.out = s->d_qkv;
    attention.result = s->mixed;
    FMREC_ISA::attention.backward(&attention, 0, sequences, s->attention);
    product<PLANES>(left_transposed<PLANES>(s->d_branch, width, rows, width, s->transposed),
                    right<PLANES>(s->mixed, width, rows, width, s->right), rows, width, width,
                    nullptr, true, partial + OUTPUT * size, width);
    const Operand normed = right<PLANES>(s->normed, width, rows, width, s->right);
    for (int layer = KEY; layer <= VALUE; ++layer) {
        const float* d = s->d_qkv + layer * width;
        product<PLANES>(left<PLANES>(d, 3 * width, rows, width, s->left),
                        weights_at<PLANES>(a, ADJOINT + layer), width, rows, width, nullptr,
                        layer > KEY, s->d_normed, width);
        product<PLANES>(left_transposed<PLANES>(d, 3 * width, rows, width, s->transposed), normed,
                        rows, width, width, nullptr, true, partial + layer * size, width);
        add_rows(d, 3 * width, rows, width, d_biases + layer * width);
    }
    const int64_t queried = s->queried;
    for (int64_t i = 0; i < queried; ++i) {
        __builtin_memcpy(s->d_queries + i * width, s->d_qkv + 3 * s->real[i] * width,
                         (size_t)width * sizeof(float));
    }
    if (queried > 0) {
        finish_product<PLANES>(left<PLANES>(s->d_queries, width, queried, width, s->left),
                               weights_at<PLANES>(a, ADJOINT + QUERY), width, queried, width,
                               s->sums,
                               [=](int64_t i, int64_t column, const auto& sums, int64_t count) {
                                   float* out = s->d_normed + s->real[i] * width + column;
                                   for (int64_t j = 0; j < count; j += FLOATS) {
                                       store(out + j, load(out + j) + sums(j));
                                   }
                               });
        product<PLANES>(left_transposed<PLANES>(s->d_queries, width, queried, width, s->transposed),
                        right<PLANES>(s->queries, width, queried, width, s->right_queries), queried,
                        width, width, nullptr, true, partial + QUERY * size, width);
        add_rows(s->d_queries, width, queried, width, d_biases + QUERY * width);
    }
    add_rows(s->d_normed, width, rows, width, d_norm_weight + width);
    const float* x = a->x + row * width;
    for (int64_t i = 0; i < rows; ++i) {
        float* d_norm = s->d_normed + i * width;
        norm_backward_row<true>(a->norm_weight, width, x + i * width, d_norm, d_norm,
                                d_x + i * width);
    }
    add_rows(s->d_normed, width, rows, width, d_norm_weight);
}

template <int PLANES>
void backward(const SelfAttention* a, int64_t begin, int64_t end, float* memory) {
    const TileState tiles{};
    (void)tiles;
    Scratch s;
    lay_out<PLANES>(a, memory, &s);
    const int64_t size = group<PLANES>(a), groups = (a->batch + size - 1) / size;
    for (int64_t part = begin; part < end; ++part) {
        const int64_t count = self_attention_partial(a->width);
        float* partial = a->partial + part * count;
        __builtin_memset(partial, 0, (size_t)count * sizeof(float));
        const int64_t last = groups * (part + 1) / a->parts;
        for (int64_t g = groups * part / a->parts; g < last; ++g) {
            backward_group<PLANES>(a, &s, g * size, at_most(a->batch - g * size, size), partial);
        }
    }
}

template <int PLANES>
constexpr SelfAttentionKernels kernels() {
    return {group<PLANES>,
            packed<PLANES>,
            scratch<PLANES>,
            pack_forward<PLANES>,
            pack_backward<PLANES>,
            forward<PLANES>,
            backward<PLANES>};
}

}  // namespace

namespace FMREC_ISA {
extern const SelfAttentionKernels self_attention = kernels<EXACT>();
extern const SelfAttentionKernels self_attention_tf32 = kernels<HALVES>();
extern const SelfAttentionKernels self_attention_bf16 = kernels<ROUNDED>();
extern const SelfAttentionKernels self_attention_float32_int8 = kernels<EXACT_INT8>();
extern const SelfAttentionKernels self_attention_float32_fp16 = kernels<EXACT_FP16>();
extern const SelfAttentionKernels self_attention_tf32_fp16 = kernels<HALVES_FP16>();
}  // namespace FMREC_ISA

}  // namespace fmrec
