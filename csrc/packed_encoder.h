// The weights of a transformer stack, packed: see PackedLinear. Host code.
#pragma once

#include <cstdint>
#include <vector>

#include "encoder.h"
#include "memory.h"

namespace fmrec {

// Parameters of one block as they lie in memory: Linear weights are [out, in].
enum BlockArray {
    NORM1_WEIGHT, NORM1_BIAS, QUERY_WEIGHT, QUERY_BIAS, KEY_WEIGHT, KEY_BIAS,
    VALUE_WEIGHT, VALUE_BIAS, OUTPUT_WEIGHT, OUTPUT_BIAS, NORM2_WEIGHT, NORM2_BIAS,
    INNER_WEIGHT, INNER_BIAS, OUTER_WEIGHT, OUTER_BIAS, BLOCK_ARRAYS
};

struct BlockArrays {
    const float* array[BLOCK_ARRAYS];
};

class PackedEncoder {
  public:
    // `blocks` at least one; `features` is the feed-forward's inner width. Blocks with RMS norms
    // have no norm biases (null). `rotary` is Encoder::rotary for `length` positions, or null;
    // `planes` is Encoder::planes, which nothing but the instruction set amx reads.
    PackedEncoder(const std::vector<BlockArrays>& blocks, std::int64_t channels,
                  std::int64_t features, std::int64_t heads, const float* rotary,
                  std::int64_t length, int planes);
    PackedEncoder(const PackedEncoder&) = delete;
    PackedEncoder& operator=(const PackedEncoder&) = delete;

    const std::vector<PackedBlock>& blocks() const { return blocks_; }
    std::int64_t channels() const { return channels_; }
    std::int64_t heads() const { return heads_; }
    std::int64_t bytes() const { return bytes_; }
    bool rms() const { return rms_; }
    const float* rotary() const { return rotary_; }
    std::int64_t length() const { return length_; }
    int planes() const { return planes_; }
    // Whether the weights are in tiles, as the instruction set amx reads them, or in panels, as all
    // others do: decided by the one in use when they were packed.
    bool tiles() const { return tiles_; }

  private:
    Floats memory_;
    std::vector<PackedBlock> blocks_;
    std::int64_t channels_, heads_, bytes_, length_;
    const float* rotary_ = nullptr;
    int planes_;
    bool tiles_, rms_;
};

}  // namespace fmrec
