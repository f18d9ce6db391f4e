// Multi-head self-attention of all positions, with counter-based dropout on the probabilities:
// out = dropout(softmax(query_scale q k^T)) v for each head, with queries and keys that may be
// rotated by their position, and its adjoint. `attention_tangent` computes also the derivative of
// out along d_qkv, and the adjoint of both.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

struct Attention {
    const float* qkv;          // [B, L, 3 D]: queries, keys and values, heads side by side in each
    const float* query_scale;  // [B, L]
    const float* rotary;       // [L, D / H]: cosines, then sines, of half a head each; or null
    const int64_t* rows;       // [B]
    const float* grad;         // [B, L, D]; backward only
    float* out;                // forward: [B, L, D]; backward: [B, L, 3 D]
    float* result;             // [B, L, D]: forward's, from backward without tangents; or null
    // Of attention with its tangent: the same along another direction.
    const float* d_qkv;
    const float* d_grad;
    float* d_out;
    int64_t batch, length, channels, heads;
    uint64_t seed;
    uint32_t site;
    bool drop;           // else rows, seed, site, threshold and scale are not read
    uint32_t threshold;  // kept where word >= threshold
    float scale;
    // The masks, which forward writes and backward reads: bit j % 64 of word j / 64 says whether
    // the query's key j stays, beyond the keys there are zeros. A head's words follow those of the
    // head before, a query's begin `kept_row` words after the query's before. Or null: both draw.
    uint64_t* kept;
    int64_t kept_row;
    bool cached;  // what is read and written is in the cache already: nothing is prefetched
};

// 64-bit words of the masks of a query in one head: one bit at least is no key's.
FMREC_INLINE int64_t attention_words(int64_t length) { return length / 64 + 1; }

// Queries before the first one of a scale other than 0: their scores are all 0.
FMREC_INLINE int64_t padding_of(const float* query_scale, int64_t length) {
    int64_t padding = 0;
    while (padding < length && query_scale[padding] == 0.0f) ++padding;
    return padding;
}

// Sequences [begin, end). Scratch holds zeros at the first call, and may then go on to the next.
struct AttentionKernels {
    int64_t (*scratch)(const Attention*);  // floats
    void (*forward)(const Attention*, int64_t begin, int64_t end, float* scratch);
    void (*backward)(const Attention*, int64_t begin, int64_t end, float* scratch);
};

FMREC_DECLARE_TABLE(AttentionKernels, attention)
FMREC_DECLARE_TABLE(AttentionKernels, attention_tangent)

}  // namespace fmrec
