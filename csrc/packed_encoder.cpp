#include "packed_encoder.h"

#include <cstring>

#include "amx_layout.h"
#include "transpose.h"

namespace fmrec {

namespace {

// Floats that a layer takes in panels and, for tiles, its bias alone.
std::int64_t linear_size(std::int64_t depth, std::int64_t columns, bool tiles) {
    return (tiles ? 1 : depth + 1) * round_up(columns, UNIT);
}

// `width` columns of weight [columns, depth] into one panel, zeros beyond the matrix.
void pack_panel(const float* weight, std::int64_t depth, std::int64_t columns, std::int64_t width,
                float* out) {
    const float ones[4] = {1.0f, 1.0f, 1.0f, 1.0f};
    const std::int64_t present = columns < width ? columns : width;
    const std::int64_t deep = depth / 4 * 4, wide = present / 4 * 4;
    for (std::int64_t k = 0; k < deep; k += 4) {
        for (std::int64_t j = 0; j < wide; j += 4) {
            transpose4(weight + j * depth + k, depth, ones, out + k * width + j, width);
        }
    }
    for (std::int64_t k = 0; k < depth; ++k) {
        for (std::int64_t j = k < deep ? wide : 0; j < width; ++j) {
            out[k * width + j] = j < present ? weight[j * depth + k] : 0.0f;
        }
    }
}

const float* pad(const float* vector, std::int64_t columns, float** memory) {
    float* out = *memory;
    const std::int64_t padded = round_up(columns, UNIT);
    for (std::int64_t j = 0; j < padded; ++j) out[j] = vector && j < columns ? vector[j] : 0.0f;
    *memory += padded;
    return out;
}

PackedLinear pack(const float* weight, const float* bias, std::int64_t depth,
                  std::int64_t columns, bool tiles, float** memory) {
    PackedLinear linear{tiles ? nullptr : *memory, nullptr, depth, columns, nullptr};
    const std::int64_t padded = round_up(columns, UNIT);
    for (std::int64_t j = 0; j < padded && !tiles; j += PANEL) {
        const std::int64_t width = padded - j < PANEL ? padded - j : PANEL;
        pack_panel(weight + j * depth, depth, columns - j, width, *memory);
        *memory += width * depth;
    }
    linear.bias = pad(bias, columns, memory);
    return linear;
}

// Floats that `count` planes of a matrix take.
std::int64_t planes_size(std::int64_t depth, std::int64_t columns, int count) {
    return amx_columns_size(depth, columns, count) / 2;
}

// `count` planes of the matrix of `weight` [columns, depth], in parts of at most `part` rows of
// depth; of `weight` [depth, columns] if it is not transposed. Null where there are none.
const std::uint16_t* pack_planes(const float* weight, std::int64_t depth, std::int64_t columns,
                                 std::int64_t part, bool transposed, int count, float** memory) {
#ifdef FMREC_AMX
    if (count > 0) {
        const std::uint16_t* planes = reinterpret_cast<std::uint16_t*>(*memory);
        for (std::int64_t first = 0; first < depth; first += part) {
            const std::int64_t deep = depth - first < part ? depth - first : part;
            amx::encoder.pack(weight + (transposed ? first : first * columns),
                              transposed ? 1 : columns, transposed ? depth : 1, deep, columns,
                              count, reinterpret_cast<std::uint16_t*>(*memory));
            *memory += planes_size(deep, columns, count);
        }
        return planes;
    }
#else
    (void)weight, (void)depth, (void)columns, (void)part, (void)transposed, (void)count;
    (void)memory;
#endif
    return nullptr;
}

}  // namespace

PackedEncoder::PackedEncoder(const std::vector<BlockArrays>& blocks, std::int64_t channels,
                             std::int64_t features, std::int64_t heads, const float* rotary,
                             std::int64_t length, int planes)
    : blocks_(blocks.size()),
      channels_(channels),
      heads_(heads),
      length_(length),
      planes_(planes),
      tiles_(isa() >= Isa::amx),
      rms_(blocks[0].array[NORM1_BIAS] == nullptr) {
    const std::int64_t d = channels, f = features;
    const auto panels = [this](std::int64_t k, std::int64_t n) { return linear_size(k, n, tiles_); };
    const int stored = tiles_ ? planes : 0;
    const auto tiled = [stored](std::int64_t k, std::int64_t n) {
        return planes_size(k, n, stored);
    };
    const std::int64_t block_size = 4 * round_up(d, UNIT) + 4 * panels(d, d) + panels(d, f) +
                                    panels(f, d) + 4 * tiled(d, d) + tiled(d, f) +
                                    f / INNER * tiled(INNER, d) + tiled(f % INNER, d);
    const std::int64_t count = static_cast<std::int64_t>(blocks.size());
    const std::int64_t table = rotary ? length * (channels / heads) : 0;
    const std::int64_t floats = count * block_size + tiled(d, d) + table;
    bytes_ = floats * static_cast<std::int64_t>(sizeof(float));
    memory_ = allocate_floats(floats, false);
    float* memory = memory_.get();
    for (std::size_t n = 0; n < blocks.size(); ++n) {
        const float* const* a = blocks[n].array;
        PackedBlock& b = blocks_[n];
        b.norm1.weight = pad(a[NORM1_WEIGHT], d, &memory);
        b.norm1.bias = pad(a[NORM1_BIAS], d, &memory);
        b.norm2.weight = pad(a[NORM2_WEIGHT], d, &memory);
        b.norm2.bias = pad(a[NORM2_BIAS], d, &memory);
        b.query = pack(a[QUERY_WEIGHT], a[QUERY_BIAS], d, d, tiles_, &memory);
        b.key = pack(a[KEY_WEIGHT], a[KEY_BIAS], d, d, tiles_, &memory);
        b.value = pack(a[VALUE_WEIGHT], a[VALUE_BIAS], d, d, tiles_, &memory);
        b.output = pack(a[OUTPUT_WEIGHT], a[OUTPUT_BIAS], d, d, tiles_, &memory);
        b.inner = pack(a[INNER_WEIGHT], a[INNER_BIAS], d, f, tiles_, &memory);
        b.outer = pack(a[OUTER_WEIGHT], a[OUTER_BIAS], f, d, tiles_, &memory);
        // Whole lines of cache so far: every part above is a multiple of 16 floats.
        PackedLinear* const square[] = {&b.query, &b.key, &b.value, &b.output};
        const int weights[] = {QUERY_WEIGHT, KEY_WEIGHT, VALUE_WEIGHT, OUTPUT_WEIGHT};
        for (int i = 0; i < 4; ++i) {
            square[i]->planes = pack_planes(a[weights[i]], d, d, d, true, stored, &memory);
        }
        b.inner.planes = pack_planes(a[INNER_WEIGHT], d, f, d, true, stored, &memory);
        b.outer.planes = pack_planes(a[OUTER_WEIGHT], f, d, INNER, true, stored, &memory);
        const bool last = n + 1 == blocks.size();
        b.key_back =
            last ? pack_planes(a[KEY_WEIGHT], d, d, d, false, stored, &memory) : nullptr;
    }
    if (rotary) {
        std::memcpy(memory, rotary, static_cast<std::size_t>(table) * sizeof(float));
        rotary_ = memory;
    }
}

}  // namespace fmrec
