#include "recommend.h"

#include "encoder.h"
#include "layer_norm.h"
#include "philox.h"

namespace fmrec {
namespace {

int64_t start_size(const Recommend* a) {
    return 4 * (int64_t)round_up_counters((uint64_t)((a->channels + 3) / 4 + 1));
}

int64_t scratch(const Recommend* a) { return 3 * row_stride(a->channels) + start_size(a); }

float uniform(uint32_t word) {
    const int32_t x = (int32_t)word;
    return (float)(x ^ (x >> 31)) * 4.6566127342e-10f;
}

// Fave's anchor of row b, as fmrec_fast/models/fave.py: the position by the word behind those of
// the channels.
void anchor(const Recommend* a, const CounterWalk* walk, int64_t b, uint32_t* words) {
    const int64_t channels = a->channels, length = a->length;
    const uint64_t counters = walk->groups;
    fill_words(walk, 0, counters, 0, (uint32_t)a->rows[b], a->seed, words);
    float count = 0.0f;
    for (int64_t i = 0; i < length; ++i) count += a->mask[b * length + i];
    float index = uniform(words[4 * (counters - 1)]) * count;
    index = index < count - 1.0f ? index : count - 1.0f;
    if (index < 0.0f) index = 0.0f;
    if (a->start == Start::ANCHOR_IN_HISTORY) {
        index += (float)length - count;
        if (index > (float)(length - 1)) index = (float)(length - 1);
    }
    const float* e = a->e + (b * length + (int64_t)index) * channels;
    float* z0 = a->z0 + b * channels;
    for (int64_t j = 0; j < channels; ++j) z0[j] = uniform(words[j]) < a->keep ? e[j] : 0.0f;
}

void prepare(const Recommend* a, float* memory) {
    const int64_t channels = a->channels, stride = row_stride(channels);
    float* weight = memory;       // [stride], [stride]: the norm, padded
    float* bias = weight + stride;
    float* row = bias + stride;   // [stride]
    float* start = row + stride;  // [start_size()]
    for (int64_t j = 0; j < stride; ++j) {
        weight[j] = j < channels ? a->norm_weight[j] : 0.0f;
        bias[j] = j < channels ? a->norm_bias[j] : 0.0f;
        row[j] = 0.0f;
    }
    const LayerNorm norm = {weight, bias, channels, round_up(channels, UNIT)};
    const uint64_t row_bytes = (uint64_t)channels * sizeof(float);
    const float* padding = nullptr;  // the first row of e that is padding: all are equal
    for (int64_t i = 0; i < a->batch * a->length; ++i) {
        float* e = a->e + i * channels;
        a->mask[i] = a->ids[i] > 0 ? 1.0f : 0.0f;
        if (a->ids[i] == 0 && padding) {
            __builtin_memcpy(e, padding, row_bytes);
            continue;
        }
        __builtin_memcpy(row, a->items + a->ids[i] * channels, row_bytes);
        layer_norm(&norm, row, row, stride, 1);
        __builtin_memcpy(e, row, row_bytes);
        for (int64_t j = channels; j < stride; ++j) row[j] = 0.0f;
        if (a->ids[i] == 0) padding = e;
    }
    const uint64_t groups = (uint64_t)(channels + 3) / 4;
    CounterWalk walk;
    if (a->start != Start::NOISE) {
        make_walk(&walk, groups + 1, 0, 1);
        for (int64_t b = 0; b < a->batch; ++b) anchor(a, &walk, b, (uint32_t*)start);
        return;
    }
    make_walk(&walk, groups, 0, 1);
    for (int64_t b = 0; b < a->batch; ++b) {
        fill_normals(&walk, 0, groups, 0, (uint32_t)a->rows[b], a->seed, 0.0f, 1.0f, start);
        __builtin_memcpy(a->z0 + b * channels, start, row_bytes);
    }
}

}  // namespace

namespace FMREC_ISA {
extern const RecommendKernels recommend = {scratch, prepare};
}

}  // namespace fmrec
