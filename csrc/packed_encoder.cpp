#include "packed_encoder.h"

#include <cstring>
#include <new>

#include "parallel.h"

namespace fmrec {

Floats allocate_floats(std::int64_t count, bool zeroed) {
    void* memory = nullptr;
    const std::size_t size = static_cast<std::size_t>(count > 0 ? count : 1) * sizeof(float);
    if (posix_memalign(&memory, 64, size) != 0) throw std::bad_alloc();
    if (zeroed) std::memset(memory, 0, size);
    return Floats(static_cast<float*>(memory));
}

namespace {

std::int64_t linear_size(std::int64_t depth, std::int64_t columns) {
    return round_up((depth + 1) * round_up(columns, UNIT), UNIT);
}

// weight [columns, depth] into panels, `width` columns of each.
void pack_panel(const float* weight, std::int64_t depth, std::int64_t columns, std::int64_t width,
                float* out) {
    // By squares, so that both sides' lines stay in the cache.
    for (std::int64_t k0 = 0; k0 < depth; k0 += UNIT) {
        const std::int64_t k1 = k0 + UNIT < depth ? k0 + UNIT : depth;
        for (std::int64_t j0 = 0; j0 < width; j0 += UNIT) {
            if (columns - j0 >= UNIT) {
                for (std::int64_t k = k0; k < k1; ++k) {
                    for (std::int64_t j = j0; j < j0 + UNIT; ++j) {
                        out[k * width + j] = weight[j * depth + k];
                    }
                }
                continue;
            }
            for (std::int64_t k = k0; k < k1; ++k) {
                for (std::int64_t j = j0; j < j0 + UNIT; ++j) {
                    out[k * width + j] = j < columns ? weight[j * depth + k] : 0.0f;
                }
            }
        }
    }
}

const float* pad(const float* vector, std::int64_t columns, float** memory) {
    float* out = *memory;
    const std::int64_t padded = round_up(columns, UNIT);
    for (std::int64_t j = 0; j < padded; ++j) out[j] = j < columns ? vector[j] : 0.0f;
    *memory += padded;
    return out;
}

PackedLinear pack(const float* weight, const float* bias, std::int64_t depth,
                  std::int64_t columns, float** memory) {
    PackedLinear linear{*memory, nullptr, depth, columns};
    const std::int64_t padded = round_up(columns, UNIT);
    for (std::int64_t j = 0; j < padded; j += PANEL) {
        const std::int64_t width = padded - j < PANEL ? padded - j : PANEL;
        pack_panel(weight + j * depth, depth, columns - j, width, *memory);
        *memory += width * depth;
    }
    linear.bias = pad(bias, columns, memory);
    return linear;
}

}  // namespace

PackedEncoder::PackedEncoder(const std::vector<BlockArrays>& blocks, std::int64_t channels,
                             std::int64_t features, std::int64_t heads, int num_threads)
    : blocks_(blocks.size()), channels_(channels), heads_(heads) {
    const std::int64_t d = channels, f = features;
    const std::int64_t block_size = 4 * round_up(d, UNIT) + 4 * linear_size(d, d) +
                                    linear_size(d, f) + linear_size(f, d);
    const std::int64_t count = static_cast<std::int64_t>(blocks.size());
    bytes_ = count * block_size * static_cast<std::int64_t>(sizeof(float));
    memory_ = allocate_floats(count * block_size, false);
    parallel_items(num_threads, count, true, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t n = begin; n < end; ++n) {
            float* memory = memory_.get() + n * block_size;
            const float* const* a = blocks[static_cast<std::size_t>(n)].array;
            PackedBlock& b = blocks_[static_cast<std::size_t>(n)];
            b.norm1.weight = pad(a[NORM1_WEIGHT], d, &memory);
            b.norm1.bias = pad(a[NORM1_BIAS], d, &memory);
            b.norm2.weight = pad(a[NORM2_WEIGHT], d, &memory);
            b.norm2.bias = pad(a[NORM2_BIAS], d, &memory);
            b.query = pack(a[QUERY_WEIGHT], a[QUERY_BIAS], d, d, &memory);
            b.key = pack(a[KEY_WEIGHT], a[KEY_BIAS], d, d, &memory);
            b.value = pack(a[VALUE_WEIGHT], a[VALUE_BIAS], d, d, &memory);
            b.output = pack(a[OUTPUT_WEIGHT], a[OUTPUT_BIAS], d, d, &memory);
            b.inner = pack(a[INNER_WEIGHT], a[INNER_BIAS], d, f, &memory);
            b.outer = pack(a[OUTER_WEIGHT], a[OUTER_BIAS], f, d, &memory);
        }
    });
}

}  // namespace fmrec
