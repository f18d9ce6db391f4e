// The transformer stack, last position out, over weights packed once for the matrix kernel.
#pragma once

#include <stdint.h>

#include "isa.h"

namespace fmrec {

// Rows of activations are padded to whole units of columns, whatever the instruction set, and the
// padding holds zeros. A packed matrix [depth, columns] lies in panels of PANEL columns, the last
// one narrower: in a panel the columns of one row are consecutive, and row follows row.
constexpr int64_t UNIT = 16, PANEL = 64;

FMREC_INLINE constexpr int64_t round_up(int64_t size, int64_t unit) {
    return (size + unit - 1) / unit * unit;
}

// Inner features of the feed-forward computed at a time. Whole panels.
constexpr int64_t INNER = 2 * PANEL;

// A matrix [depth, columns], packed, and its bias; both padded with zeros to whole units. For the
// instruction set amx the matrix is Encoder::planes planes of B (csrc/amx.h), of at most INNER rows
// one after the other if it is the feed-forward's outer one, and `weight` is null; for others
// `planes`.
struct PackedLinear {
    const float* weight;
    const float* bias;
    int64_t depth, columns;
    const uint16_t* planes;
};
// Planes of the operands of float32 products. Two make products closer than tf32's, one bfloat16's.
constexpr int MOST_PLANES = 3;

struct PackedNorm {
    const float* weight;
    const float* bias;
};

struct PackedBlock {
    PackedNorm norm1, norm2;
    PackedLinear query, key, value, output, inner, outer;
    // Of the last block, for amx: the key's weight as [features, depth], planes only.
    const uint16_t* key_back;
};

struct Encoder {
    const PackedBlock* blocks;
    int64_t num_blocks, channels, heads, length;
    int64_t tap;  // the block whose output is tapped, or -1
    // Fave's variant: RMS norms in the blocks, and queries and keys rotated by their position.
    bool rms;
    const float* rotary;  // [L, D / H]: cosines, then sines, of half a head each; or null
    // Of the linear layers' operands, 1 to MOST_PLANES; of the instruction set amx only: all others
    // multiply in float32.
    int planes;
};

// Of the rows of activations.
FMREC_INLINE constexpr int64_t row_stride(int64_t channels) {
    // A unit more than needed: rows at a power of two would meet in a few sets of the cache.
    return round_up(channels, UNIT) + UNIT;
}

// Sequences of different lengths, at most L, one after the other: sequence s of a group has the
// rows start[s] - start[0] up to start[s + 1] - start[0] of x and of the mask. Its first token may
// stand for many equal ones: `key_bias` [count], the logarithm of their number, is added to the
// scores that it gets as a key. Null: all of length L; no bias.
struct Ragged {
    const int64_t* start;
    const float* key_bias;
};

// Sequences go through the stack in groups, so that a block's weights serve all of a group while
// they are in the cache. run() works in place: x [count, L, row_stride], mask [count, L];
// last and tapped (or null) [count, row_stride] hold the outputs at the last position.
// run_ragged() takes short sequences several at a time through the matrix products.
struct EncoderKernels {
    int64_t (*scratch)(const Encoder*, int64_t count);  // floats
    void (*run)(const Encoder*, float* x, const float* mask, int64_t count, float* last,
                float* tapped, float* scratch);
    void (*run_ragged)(const Encoder*, float* x, const float* mask, const Ragged*, int64_t count,
                       float* last, float* tapped, float* scratch);
    // `count` planes of the matrix whose element (k, j) is weight[k * row + j * column], one of the
    // two 1; null where the instruction set has none.
    void (*pack)(const float* weight, int64_t row, int64_t column, int64_t depth, int64_t columns,
                 int count, uint16_t* planes);
};

// All of x [batch, L, D]: out and tapped (or null) are [batch, D].
struct EncoderBatch {
    Encoder encoder;
    const float* x;
    const float* mask;
    const float* first_key_bias;  // [batch], or null
    float* out;
    float* tapped;
};

struct EncoderBatchKernels {
    int64_t (*scratch)(const EncoderBatch*, int64_t count);  // floats
    void (*run)(const EncoderBatch*, int64_t begin, int64_t end, float* scratch);
};

FMREC_DECLARE_TABLE(EncoderKernels, encoder)
FMREC_DECLARE_TABLE(EncoderBatchKernels, encoder_batch)

}  // namespace fmrec
