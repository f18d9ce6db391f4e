// The second half of a transformer block in training, and its gradients:
// out = drop(x + drop(W2 drop(gelu(W1 norm(x) + b1)) + b2)), each drop with a mask of its own.
//
// A chunk of rows goes through all of it while it is in the cache: of the tensors as wide as the
// inner layer none is ever in memory. The backward pass computes them anew and reads the masks, a
// bit an element, because ten rounds of the generator cost more than that. Widths are multiples of 16.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

// Rows of a chunk, and channels of the inner layer that are under way at a time: the depths of the
// products that add up, forward the result's and backward the weights' gradients.
constexpr int64_t FEED_FORWARD_ROWS = 128, FEED_FORWARD_PANEL = 256;
constexpr int64_t FEED_FORWARD_BACK_ROWS = 256, FEED_FORWARD_BACK_PANEL = 128;
// Partial sums of the weights' gradients, at most: their number does not depend on the threads, so
// neither do the results.
constexpr int64_t FEED_FORWARD_PARTS = 8;

struct FeedForward {
    const float* x;  // [M, D], M = batch * positions
    const float* norm_weight;
    const float* norm_bias;
    const float* w1;  // [F, D]
    const float* b1;
    const float* w2;  // [D, F]
    const float* b2;
    float* packed;  // by pack_forward or pack_backward
    int64_t batch, positions, width, inner;
    // Dropout; kept [M, mask_words(width, inner)] is null where nothing is dropped. Bit i of a
    // row is channel i of the inner mask, then come the two of the width.
    const int64_t* rows;  // [batch]
    uint64_t seed;
    uint32_t site;  // of the inner mask; the next two are the others'
    uint64_t position_offset, position_stride;
    uint32_t threshold;
    float scale;
    int64_t* kept;
    float* out;  // [M, D]; in the backward pass d_x
    // Backward only. Of each part: d_w1 (transposed) and d_w2, a panel [D, FEED_FORWARD_BACK_PANEL or what
    // is left] after the other, and the sums d_b1 [F], d_b2, d_norm_weight and d_norm_bias [D].
    const float* grad;  // [M, D]
    float* partial;
    int64_t parts;  // at most the number of chunks
};

// 64-bit words of a row's masks.
FMREC_INLINE int64_t mask_words(int64_t width, int64_t inner) {
    return (inner + 2 * width + 63) / 64;
}

FMREC_INLINE int64_t feed_forward_partial(int64_t width, int64_t inner) {
    return 2 * width * inner + inner + 3 * width;
}

struct FeedForwardKernels {
    // Floats of the packed weights and of a thread's scratch, for either direction.
    int64_t (*packed)(const FeedForward*);
    int64_t (*scratch)(const FeedForward*);
    void (*pack_forward)(const FeedForward*);
    void (*pack_backward)(const FeedForward*);
    // Chunks of rows, and parts of them.
    void (*forward)(const FeedForward*, int64_t begin, int64_t end, float* scratch);
    void (*backward)(const FeedForward*, int64_t begin, int64_t end, float* scratch);
};

FMREC_DECLARE_TABLE(FeedForwardKernels, feed_forward)
// With the operands of all products rounded, to two bfloat16s or to one; without AMX the same.
FMREC_DECLARE_TABLE(FeedForwardKernels, feed_forward_tf32)
FMREC_DECLARE_TABLE(FeedForwardKernels, feed_forward_bf16)
// With tiles of bytes, and with those of float16s.
FMREC_DECLARE_TABLE(FeedForwardKernels, feed_forward_float32_int8)
FMREC_DECLARE_TABLE(FeedForwardKernels, feed_forward_float32_fp16)
FMREC_DECLARE_TABLE(FeedForwardKernels, feed_forward_tf32_fp16)

}  // namespace fmrec
