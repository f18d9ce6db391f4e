#include "dropout.h"

#include "gelu.h"
#include "philox.h"

namespace fmrec {
namespace {

// Counters generated at a time: 8 KiB of words stay in the first-level cache.
const int64_t CHUNK = 512;

int64_t chunks_per_row(const Dropout* a) {
    const int64_t counters = (a->channels + 3) / 4 * a->positions;
    return (counters + CHUNK - 1) / CHUNK;
}

int64_t chunks(const Dropout* a) { return a->batch * chunks_per_row(a); }

FMREC_INLINE f32v activated(const Dropout* a, int64_t at) {
    const f32v x = load(a->x + at);
    return a->gelu_at ? x * gelu_derivative(load(a->gelu_at + at)) : gelu(x);
}

// The same for the last few elements, which fill no vector.
void activated_tail(const Dropout* a, int64_t at, int64_t n, float* out) {
    float x[FLOATS] = {}, pre[FLOATS] = {};
    const size_t bytes = (size_t)n * sizeof(float);
    Dropout part = *a;
    __builtin_memcpy(x, a->x + at, bytes);
    part.x = x;
    if (a->gelu_at) {
        __builtin_memcpy(pre, a->gelu_at + at, bytes);
        part.gelu_at = pre;
    }
    store(out, activated(&part, 0));
}

void apply_run_activated(const Dropout* a, const uint32_t* words, int64_t at, int64_t n) {
    const uint32_t threshold = a->threshold;
    const float scale = a->scale;
    const float* residual = a->residual ? a->residual + at : nullptr;
    float* out = a->out + at;
    int64_t i = 0;
    for (; i + FLOATS <= n; i += FLOATS) {
        u32v word;
        __builtin_memcpy(&word, words + i, sizeof word);
        const f32v scaled = activated(a, at + i) * scale;
        const f32v kept = (f32v)((u32v)scaled & (u32v)(word >= threshold));
        store(out + i, residual ? load(residual + i) + kept : kept);
    }
    if (i == n) return;
    float values[FLOATS];
    activated_tail(a, at + i, n - i, values);
    for (int64_t j = 0; i < n; ++i, ++j) {
        const float kept = words[i] >= threshold ? values[j] * scale : 0.0f;
        out[i] = residual ? residual[i] + kept : kept;
    }
}

struct Pair {
    f32v value, tangent;
};

FMREC_INLINE Pair activated_pair(const Dropout* a, int64_t at) {
    const f32v x = load(a->x + at), dx = load(a->dx + at);
    f32v value, first, second;
    if (!a->gelu_at) {
        gelu_derivatives(x, &value, &first, &second);
        return {value, first * dx};
    }
    gelu_derivatives(load(a->gelu_at + at), &value, &first, &second);
    const f32v d_grad = load(a->d_grad + at);
    return {x * first + d_grad * dx * second, d_grad * first};
}

// The same for the last few elements.
Pair activated_pair_tail(const Dropout* a, int64_t at, int64_t n) {
    float memory[4][FLOATS] = {};
    Dropout part = *a;
    const float** const inputs[] = {&part.x, &part.dx, &part.gelu_at, &part.d_grad};
    for (int i = 0; i < 4; ++i) {
        if (!*inputs[i]) continue;
        __builtin_memcpy(memory[i], *inputs[i] + at, (size_t)n * sizeof(float));
        *inputs[i] = memory[i];
    }
    return activated_pair(&part, 0);
}

void apply_run_pairs(const Dropout* a, const uint32_t* words, int64_t at, int64_t n) {
    const uint32_t threshold = a->threshold;
    const float scale = a->scale;
    float *out = a->out + at, *d_out = a->d_out + at;
    for (int64_t i = 0; i < n; i += FLOATS) {
        const int64_t rest = n - i;
        const bool whole = rest >= FLOATS;
        u32v word = {};
        __builtin_memcpy(&word, words + i, whole ? sizeof word : (size_t)rest * sizeof(uint32_t));
        Pair pair = whole ? activated_pair(a, at + i) : activated_pair_tail(a, at + i, rest);
        const u32v kept = (u32v)(word >= threshold);
        pair.value = (f32v)((u32v)(pair.value * scale) & kept);
        pair.tangent = (f32v)((u32v)(pair.tangent * scale) & kept);
        const size_t bytes = whole ? sizeof pair.value : (size_t)rest * sizeof(float);
        __builtin_memcpy(out + i, &pair.value, bytes);
        __builtin_memcpy(d_out + i, &pair.tangent, bytes);
    }
}

// A dropped element is selected away, not multiplied by 0: NaN and infinity drop too.
FMREC_INLINE void apply_run(const Dropout* a, const uint32_t* words, int64_t at, int64_t n) {
    if (a->dx) {
        apply_run_pairs(a, words, at, n);
        return;
    }
    if (a->gelu || a->gelu_at) {
        apply_run_activated(a, words, at, n);
        return;
    }
    const uint32_t threshold = a->threshold;
    const float scale = a->scale;
    const float* x = a->x + at;
    float* out = a->out + at;
    if (a->residual) {
        const float* residual = a->residual + at;
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const float scaled = x[i] * scale;
            out[i] = residual[i] + (words[i] >= threshold ? scaled : 0.0f);
        }
    } else {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) {
            const float scaled = x[i] * scale;
            out[i] = words[i] >= threshold ? scaled : 0.0f;
        }
    }
}

void apply(const Dropout* all, int64_t begin, int64_t end) {
    Dropout row_of = *all;  // with the scale of the row
    const Dropout* a = &row_of;
    const int64_t groups = (a->channels + 3) / 4, counters = groups * a->positions;
    const int64_t per_row = chunks_per_row(a);
    CounterWalk walk;
    make_walk(&walk, (uint64_t)groups, a->position_offset, a->position_stride);
    alignas(64) uint32_t words[4 * CHUNK];
    for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / per_row, start = item % per_row * CHUNK;
        int64_t count = counters - start < CHUNK ? counters - start : CHUNK;
        fill_words(&walk, (uint64_t)start, (uint64_t)count, a->site, (uint32_t)a->rows[b], a->seed,
                   words);
        if (a->row_scale) row_of.scale = all->scale * a->row_scale[b];
        const int64_t row = b * a->positions * a->channels;
        if (a->channels % 4 == 0) {
            // The channels fill their groups: the chunk is one run of the row.
            apply_run(a, words, row + 4 * start, 4 * count);
            continue;
        }
        const uint32_t* run = words;
        int64_t position = start / groups, group = start % groups;
        while (count > 0) {
            const int64_t n = groups - group < count ? groups - group : count;
            const int64_t rest = a->channels - 4 * group;
            apply_run(a, run, row + position * a->channels + 4 * group,
                      rest < 4 * n ? rest : 4 * n);
            run += 4 * n;
            count -= n;
            group = 0;
            ++position;
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const DropoutKernels dropout = {chunks, apply};
}

}  // namespace fmrec
