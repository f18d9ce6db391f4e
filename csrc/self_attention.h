// The first half of a transformer block in training, and its gradients:
// out = x + drop(W_o attention(W_q n, W_k n, W_v n) + b_o) with n = norm(x) and the published mask,
// of all positions, or of the last one only (`self_attention_last`).
//
// A few sequences go through all of it while they are in the cache: queries, keys, values, scores
// and their gradients are never in memory. The backward pass computes them anew from x and reads the
// masks, a bit an element. Widths are multiples of 16, in `self_attention_last` a head's too.
#pragma once

#include <stdint.h>

#include "attention.h"
#include "isa.h"

namespace fmrec {

// Partial sums of the weights' gradients, at most: their number does not depend on the threads, so
// neither do the results.
constexpr int64_t SELF_ATTENTION_PARTS = 8;
enum SelfAttentionLayer { QUERY, KEY, VALUE, OUTPUT };
constexpr int SELF_ATTENTION_LAYERS = OUTPUT + 1;

struct SelfAttention {
    const float* x;  // [B, L, D]
    const float* norm_weight;
    const float* norm_bias;
    const float* weights[SELF_ATTENTION_LAYERS];  // [D, D] each
    const float* biases[SELF_ATTENTION_LAYERS];   // [D]
    const float* query_scale;                     // [B, L]
    float* packed;                                // by pack_forward or pack_backward
    int64_t batch, length, width, heads;
    // Dropout of the probabilities at `site`, and of the branch at the next one. The masks are kept
    // [B, positions that leave, kept_words]: the branch's, then, of all positions, those of the
    // probabilities, head by head. Null where nothing is dropped.
    const int64_t* rows;  // [B]
    uint64_t seed;
    uint32_t site, threshold;
    float scale;
    int64_t* kept;
    float* out;  // [B, positions that leave, D]; in the backward pass d_x [B, L, D]
    // Backward only. Of each part the gradients of the weights, the biases, norm_weight and
    // norm_bias, one after the other.
    const float* grad;  // as out
    float* partial;
    int64_t parts;  // at most the number of groups
};

// 64-bit words of the branch's mask of a position, and of all that is kept of it.
FMREC_INLINE int64_t self_attention_words(int64_t width) { return (width + 63) / 64; }
FMREC_INLINE int64_t self_attention_kept_words(const SelfAttention* a) {
    return self_attention_words(a->width) + a->heads * attention_words(a->length);
}

FMREC_INLINE int64_t self_attention_partial(int64_t width) {
    return SELF_ATTENTION_LAYERS * width * (width + 1) + 2 * width;
}

struct SelfAttentionKernels {
    // Sequences that go through it together.
    int64_t (*group)(const SelfAttention*);
    // Floats of the packed weights and of a thread's scratch, for either direction. Scratch holds
    // zeros at the first call, and may then go on to the next.
    int64_t (*packed)(const SelfAttention*);
    int64_t (*scratch)(const SelfAttention*);
    void (*pack_forward)(const SelfAttention*);
    void (*pack_backward)(const SelfAttention*);
    // Groups of sequences, and parts of them.
    void (*forward)(const SelfAttention*, int64_t begin, int64_t end, float* scratch);
    void (*backward)(const SelfAttention*, int64_t begin, int64_t end, float* scratch);
};

FMREC_DECLARE_TABLE(SelfAttentionKernels, self_attention)
FMREC_DECLARE_TABLE(SelfAttentionKernels, self_attention_last)
// With the operands of the linear layers' products rounded, to two bfloat16s or to one; without AMX
// the same.
FMREC_DECLARE_TABLE(SelfAttentionKernels, self_attention_tf32)
FMREC_DECLARE_TABLE(SelfAttentionKernels, self_attention_bf16)
// With tiles of bytes, and with those of float16s.
FMREC_DECLARE_TABLE(SelfAttentionKernels, self_attention_float32_int8)
FMREC_DECLARE_TABLE(SelfAttentionKernels, self_attention_float32_fp16)
FMREC_DECLARE_TABLE(SelfAttentionKernels, self_attention_tf32_fp16)

}  // namespace fmrec
