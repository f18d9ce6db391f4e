#include "item_ranking.h"

#include "gemm.h"

namespace fmrec {
namespace {

// out[j][i] = in[i][j] for a square of FLOATS x FLOATS.
FMREC_INLINE void transpose(const f32v* in, f32v* out) {
#if defined(__AVX512F__)
    __m512 a[16], b[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_ps((__m512)in[i], (__m512)in[i + 1]);
        b[i + 1] = _mm512_unpackhi_ps((__m512)in[i], (__m512)in[i + 1]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        const __m512d low0 = _mm512_castps_pd(b[i]), low1 = _mm512_castps_pd(b[i + 2]);
        const __m512d high0 = _mm512_castps_pd(b[i + 1]), high1 = _mm512_castps_pd(b[i + 3]);
        a[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(low0, low1));
        a[i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low0, low1));
        a[i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(high0, high1));
        a[i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(high0, high1));
    }
    // Quarter q of a[4 g + c] is column 4 q + c of rows 4 g .. 4 g + 3.
#pragma GCC unroll 16
    for (int c = 0; c < 4; ++c) {
        const __m512 even0 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88);
        const __m512 even1 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88);
        const __m512 odd0 = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
        const __m512 odd1 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
        out[c] = (f32v)_mm512_shuffle_f32x4(even0, even1, 0x88);
        out[4 + c] = (f32v)_mm512_shuffle_f32x4(odd0, odd1, 0x88);
        out[8 + c] = (f32v)_mm512_shuffle_f32x4(even0, even1, 0xdd);
        out[12 + c] = (f32v)_mm512_shuffle_f32x4(odd0, odd1, 0xdd);
    }
#elif defined(__AVX2__)
    __m256 a[8], b[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 2) {
        b[i] = _mm256_unpacklo_ps((__m256)in[i], (__m256)in[i + 1]);
        b[i + 1] = _mm256_unpackhi_ps((__m256)in[i], (__m256)in[i + 1]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i += 4) {
        const __m256d low0 = _mm256_castps_pd(b[i]), low1 = _mm256_castps_pd(b[i + 2]);
        const __m256d high0 = _mm256_castps_pd(b[i + 1]), high1 = _mm256_castps_pd(b[i + 3]);
        a[i] = _mm256_castpd_ps(_mm256_unpacklo_pd(low0, low1));
        a[i + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(low0, low1));
        a[i + 2] = _mm256_castpd_ps(_mm256_unpacklo_pd(high0, high1));
        a[i + 3] = _mm256_castpd_ps(_mm256_unpackhi_pd(high0, high1));
    }
#pragma GCC unroll 8
    for (int c = 0; c < 4; ++c) {
        out[c] = (f32v)_mm256_permute2f128_ps(a[c], a[4 + c], 0x20);
        out[4 + c] = (f32v)_mm256_permute2f128_ps(a[c], a[4 + c], 0x31);
    }
#elif defined(__SSE2__)
    __m128 a = (__m128)in[0], b = (__m128)in[1], c = (__m128)in[2], d = (__m128)in[3];
    _MM_TRANSPOSE4_PS(a, b, c, d);
    out[0] = (f32v)a;
    out[1] = (f32v)b;
    out[2] = (f32v)c;
    out[3] = (f32v)d;
#else
    for (int i = 0; i < FLOATS; ++i) {
        for (int j = 0; j < FLOATS; ++j) out[j][i] = in[i][j];
    }
#endif
}

typedef uint16_t bfloat16;

FMREC_INLINE float as_float(uint32_t bits) {
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

FMREC_INLINE float widened(float x) { return x; }
FMREC_INLINE float widened(bfloat16 x) { return as_float((uint32_t)x << 16); }
FMREC_INLINE float widened(int8_t x) { return (float)x; }

// FLOATS elements. As instructions: GCC 12 converts vectors of other widths element by element.
FMREC_INLINE f32v widened_vector(const float* source) { return load(source); }
FMREC_INLINE f32v widened_vector(const bfloat16* source) {
#if defined(__AVX512F__)
    const __m256i half = _mm256_loadu_si256((const __m256i*)source);
    return (f32v)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif defined(__AVX2__)
    const __m128i half = _mm_loadu_si128((const __m128i*)source);
    return (f32v)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
    f32v out;
    for (int i = 0; i < FLOATS; ++i) out[i] = widened(source[i]);
    return out;
#endif
}
FMREC_INLINE f32v widened_vector(const int8_t* source) {
#if defined(__AVX512F__)
    const __m128i small = _mm_loadu_si128((const __m128i*)source);
    return (f32v)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(small));
#elif defined(__AVX2__)
    const __m128i small = _mm_loadl_epi64((const __m128i*)source);
    return (f32v)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(small));
#else
    f32v out;
    for (int i = 0; i < FLOATS; ++i) out[i] = widened(source[i]);
    return out;
#endif
}

FMREC_INLINE int64_t item_at(const ItemRanking* a, int64_t position) {
    return a->items ? a->items[position] : position;
}

FMREC_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// FLOATS items of a panel, from its `first` on; beyond the panel's last item, that one again.
template <typename Element>
FMREC_INLINE void items_of(const ItemRanking* a, int64_t begin, int64_t count, int64_t first,
                           const Element** rows) {
    for (int64_t i = 0; i < FLOATS; ++i) {
        const int64_t item = item_at(a, begin + least(first + i, count - 1));
        rows[i] = (const Element*)a->weight + item * a->depth;
    }
}

// Channels k .. k + FLOATS - 1 of FLOATS items, a vector of items for each.
template <typename Element>
FMREC_INLINE void channels_of(const Element* const* rows, int64_t k, f32v* channels) {
    f32v square[FLOATS];
#pragma GCC unroll 16
    for (int i = 0; i < FLOATS; ++i) square[i] = widened_vector(rows[i] + k);
    transpose(square, channels);
}

template <typename Element>
FMREC_INLINE f32v channel_of(const Element* const* rows, int64_t k) {
    f32v channel;
    for (int i = 0; i < FLOATS; ++i) channel[i] = widened(rows[i][k]);
    return channel;
}

// The items at positions [begin, begin + count) as the columns of `panel`, [depth, RANKING_PANEL].
template <typename Element>
void pack_as(const ItemRanking* a, int64_t begin, int64_t count, float* panel) {
    const int64_t depth = a->depth;
    for (int64_t first = 0; first < RANKING_PANEL; first += FLOATS) {
        const Element* rows[FLOATS];
        items_of(a, begin, count, first, rows);
        float* out = panel + first;
        int64_t k = 0;
        for (; k + FLOATS <= depth; k += FLOATS) {
            f32v channels[FLOATS];
            channels_of(rows, k, channels);
#pragma GCC unroll 16
            for (int j = 0; j < FLOATS; ++j) store(out + (k + j) * RANKING_PANEL, channels[j]);
        }
        for (; k < depth; ++k) store(out + k * RANKING_PANEL, channel_of(rows, k));
    }
}

// scores [RANKING_PANEL] of one row without packing; the sums are those of the packed product.
template <typename Element>
void score_row_as(const ItemRanking* a, int64_t row, int64_t begin, int64_t count, float* scores) {
    const int64_t depth = a->depth;
    const float* rep = a->rep + row * depth;
    // The next panel is asked for line by line: a burst would wait for the memory.
    const int64_t next = a->items ? 0 : RANKING_PANEL * depth;
    for (int64_t first = 0; first < RANKING_PANEL; first += FLOATS) {
        const Element* rows[FLOATS];
        items_of(a, begin, count, first, rows);
        f32v total = broadcast(0.0f);
        int64_t k = 0;
        for (; k + FLOATS <= depth; k += FLOATS) {
            if (k * (int64_t)sizeof(Element) % 64 == 0) {
#pragma GCC unroll 16
                for (int i = 0; i < FLOATS; ++i) __builtin_prefetch(rows[i] + k + next, 0, 2);
            }
            f32v channels[FLOATS];
            channels_of(rows, k, channels);
#pragma GCC unroll 16
            for (int j = 0; j < FLOATS; ++j) total += broadcast(rep[k + j]) * channels[j];
        }
        for (; k < depth; ++k) total += broadcast(rep[k]) * channel_of(rows, k);
        store(scores + first, total);
    }
}

FMREC_INLINE void score_row(const ItemRanking* a, int64_t row, int64_t begin, int64_t count,
                            float* scores) {
    switch (a->type) {
        case TableType::float32: score_row_as<float>(a, row, begin, count, scores); break;
        case TableType::bfloat16: score_row_as<bfloat16>(a, row, begin, count, scores); break;
        case TableType::int8: score_row_as<int8_t>(a, row, begin, count, scores); break;
    }
}

FMREC_INLINE void pack(const ItemRanking* a, int64_t begin, int64_t count, float* panel) {
    switch (a->type) {
        case TableType::float32: pack_as<float>(a, begin, count, panel); break;
        case TableType::bfloat16: pack_as<bfloat16>(a, begin, count, panel); break;
        case TableType::int8: pack_as<int8_t>(a, begin, count, panel); break;
    }
}

FMREC_INLINE int64_t element_bytes(TableType type) {
    return type == TableType::float32 ? 4 : type == TableType::bfloat16 ? 2 : 1;
}

// Asks for part `share` of `shares` of the next panel's items, while this one is worked on.
FMREC_INLINE void fetch_ahead(const ItemRanking* a, int64_t begin, int64_t end, int64_t share,
                              int64_t shares) {
    const int64_t line = 64, row = a->depth * element_bytes(a->type);
    const int64_t first = begin + RANKING_PANEL, last = least(first + RANKING_PANEL, end);
    if (a->items) {
        for (int64_t i = first + share; i < last; i += shares) {
            const char* at = (const char*)a->weight + a->items[i] * row;
            for (int64_t b = 0; b < row; b += line) __builtin_prefetch(at + b, 0, 2);
        }
        return;
    }
    const int64_t lines = last > first ? ((last - first) * row + line - 1) / line : 0;
    const char* at = (const char*)a->weight + first * row;
    for (int64_t i = lines * share / shares; i < lines * (share + 1) / shares; ++i) {
        __builtin_prefetch(at + i * line, 0, 2);
    }
}

// What the scores of a panel are made from.
struct Panel {
    const ItemRanking* a;
    int64_t begin, count;
    bool packed;
    float *items, *scores;
    const float *factor, *offset;
    alignas(64) float factors[RANKING_PANEL], offsets[RANKING_PANEL];
};

// The values of the panel's items, or null where there are none.
FMREC_INLINE const float* of_panel(const ItemRanking* a, const float* values, int64_t begin,
                                   int64_t count, float* out) {
    if (!values) return nullptr;
    for (int64_t i = 0; i < RANKING_PANEL; ++i) {
        out[i] = values[item_at(a, begin + least(i, count - 1))];
    }
    return out;
}

// For a single row packing would be the most of the work.
FMREC_INLINE void open_panel(Panel* p, const ItemRanking* a, int64_t rows, int64_t begin,
                             int64_t end, float* scratch) {
    p->a = a;
    p->begin = begin;
    p->count = least(end - begin, RANKING_PANEL);
    p->packed = rows > 1;
    p->items = scratch;
    p->scores = scratch + RANKING_PANEL * a->depth;
    if (p->packed) pack(a, begin, p->count, p->items);
    p->factor = of_panel(a, a->scale, begin, p->count, p->factors);
    p->offset = of_panel(a, a->bias, begin, p->count, p->offsets);
}

// p->scores [rows, RANKING_PANEL] of rows [row, row + rows).
void score(const Panel* p, int64_t row, int64_t rows) {
    const ItemRanking* a = p->a;
    float* const scores = p->scores;
    if (p->packed) {
        const Product block = {a->rep + row * a->depth, a->depth, 1, p->items, RANKING_PANEL,
                               nullptr, nullptr, false, scores, RANKING_PANEL, a->depth};
        multiply(&block, rows, RANKING_PANEL);
    } else {
        score_row(a, row, p->begin, p->count, scores);
    }
    if (!p->factor && !p->offset) return;
    for (int64_t at = 0; at < rows * RANKING_PANEL; at += FLOATS) {
        f32v value = load(scores + at);
        if (p->factor) value *= load(p->factor + at % RANKING_PANEL);
        if (p->offset) value += load(p->offset + at % RANKING_PANEL);
        store(scores + at, value);
    }
}

// Bit i: not (x[i] <= y[i]), which holds where one is NaN.
FMREC_INLINE uint64_t not_at_most(f32v x, f32v y) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, (__m512)y, _CMP_NLE_UQ);
#elif defined(__AVX2__)
    return (uint64_t)_mm256_movemask_ps(_mm256_cmp_ps((__m256)x, (__m256)y, _CMP_NLE_UQ));
#elif defined(__SSE2__)
    return (uint64_t)_mm_movemask_ps(_mm_cmpnle_ps((__m128)x, (__m128)y));
#else
    uint64_t bits = 0;
    for (int i = 0; i < FLOATS; ++i) bits |= (uint64_t)!(x[i] <= y[i]) << i;
    return bits;
#endif
}

FMREC_INLINE uint64_t key_of(float score, int64_t position) {
    const float value = score == score ? score + 0.0f : __builtin_nanf("");  // one zero, one NaN
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof bits);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (uint32_t)~(uint32_t)position;
}

FMREC_INLINE float score_of(uint64_t key) {
    const uint32_t bits = (uint32_t)(key >> 32);
    return as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

FMREC_INLINE bool contains(const int64_t* ids, int64_t begin, int64_t end, int64_t id) {
    while (begin < end) {
        const int64_t middle = begin + (end - begin) / 2;
        if (ids[middle] == id) return true;
        if (ids[middle] < id) begin = middle + 1;
        else end = middle;
    }
    return false;
}

void insert(const ItemRanking* a, const BestItems* best, int64_t row, float score,
            int64_t position) {
    const uint64_t key = key_of(score, position);
    if (key <= best->worst[row]) return;
    if (a->excluded &&
        contains(a->excluded, a->starts[row], a->starts[row + 1], item_at(a, position))) {
        return;
    }
    uint64_t* keys = best->keys + row * best->capacity;
    keys[best->count[row]++] = key;
    if (best->count[row] < best->capacity) return;
    best->keep_best(keys, best->capacity, best->k);
    best->count[row] = best->k;
    best->worst[row] = keys[best->k - 1];
    best->threshold[row] = score_of(best->worst[row]);
}

void best_items(const ItemRanking* a, const BestItems* best, int64_t first, int64_t last,
                int64_t begin, int64_t end, float* scratch) {
    Panel panel;
    const float* const scores = scratch + RANKING_PANEL * a->depth;
    const int64_t tiles = (last - first + RANKING_ROWS - 1) / RANKING_ROWS;
    for (int64_t at = begin; at < end; at += RANKING_PANEL) {
        open_panel(&panel, a, last - first, at, end, scratch);
        const int64_t count = panel.count;
        const uint64_t there = count < 64 ? ((uint64_t)1 << count) - 1 : ~(uint64_t)0;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t row = first + t * RANKING_ROWS;
            const int64_t rows = least(last - row, RANKING_ROWS);
            if (panel.packed) fetch_ahead(a, at, end, t, tiles);
            score(&panel, row, rows);
            for (int64_t i = 0; i < rows; ++i) {
                const float* of_row = scores + i * RANKING_PANEL;
                const f32v threshold = broadcast(best->threshold[row + i]);
                uint64_t found = 0;
#pragma GCC unroll 16
                for (int v = 0; v < RANKING_PANEL / FLOATS; ++v) {
                    found |= not_at_most(load(of_row + v * FLOATS), threshold) << (v * FLOATS);
                }
                for (found &= there; found; found &= found - 1) {
                    const int lane = __builtin_ctzll(found);
                    insert(a, best, row + i, of_row[lane], at + lane);
                }
            }
        }
    }
}

// What does not compare (NaN) is ahead, so that a broken model does not rank well.
FMREC_INLINE bool is_ahead(float score, int64_t item, float of_target, int64_t target) {
    return item < target ? !(score < of_target) : item > target && !(score <= of_target);
}

void count_ahead(const ItemRanking* a, const TargetRank* rank, int64_t first, int64_t last,
                 int64_t begin, int64_t end, float* scratch) {
    Panel panel;
    const float* const scores = scratch + RANKING_PANEL * a->depth;
    const int64_t tiles = (last - first + RANKING_ROWS - 1) / RANKING_ROWS;
    for (int64_t at = begin; at < end; at += RANKING_PANEL) {
        open_panel(&panel, a, last - first, at, end, scratch);
        const int64_t count = panel.count;
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t row0 = first + t * RANKING_ROWS;
            const int64_t rows = least(last - row0, RANKING_ROWS);
            if (panel.packed) fetch_ahead(a, at, end, t, tiles);
            score(&panel, row0, rows);
            for (int64_t i = 0; i < rows; ++i) {
                const int64_t row = row0 + i, target = rank->target[row];
                const float* of_row = scores + i * RANKING_PANEL;
                const float of_target = rank->of_target[row];
                int32_t* ahead = rank->ahead + row * RANKING_COUNTERS;
                if (count < RANKING_PANEL || (at <= target && target < at + RANKING_PANEL)) {
                    for (int64_t j = 0; j < count; ++j) {
                        ahead[0] += is_ahead(of_row[j], at + j, of_target, target);
                    }
                } else {
                    const f32v wanted = broadcast(of_target);
                    i32v total;
                    __builtin_memcpy(&total, ahead, sizeof total);
                    if (at < target) {  // ties count
#pragma GCC unroll 16
                        for (int v = 0; v < RANKING_PANEL / FLOATS; ++v) {
                            total -= ~(i32v)(load(of_row + v * FLOATS) < wanted);
                        }
                    } else {
#pragma GCC unroll 16
                        for (int v = 0; v < RANKING_PANEL / FLOATS; ++v) {
                            total -= ~(i32v)(load(of_row + v * FLOATS) <= wanted);
                        }
                    }
                    store(ahead, total);
                }
                if (!a->excluded) continue;
                // The row's exclusions in this panel: nearly always none.
                const int64_t* excluded = a->excluded;
                int64_t next = rank->next[row];
                const int64_t stop = a->starts[row + 1];
                while (next < stop && excluded[next] < at) ++next;
                for (; next < stop && excluded[next] < at + count; ++next) {
                    const int64_t item = excluded[next];
                    ahead[0] -= is_ahead(of_row[item - at], item, of_target, target);
                }
                rank->next[row] = next;
            }
        }
    }
}

void diagonal(const ItemRanking* a, int64_t first, int64_t last, float* out, float* scratch) {
    Panel panel;
    const float* const scores = scratch + RANKING_PANEL * a->depth;
    for (int64_t at = first; at < last; at += RANKING_PANEL) {
        open_panel(&panel, a, last - first, at, last, scratch);
        for (int64_t i = 0; i < panel.count; ++i) {
            score(&panel, at + i, 1);
            out[at + i] = scores[i];
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const ItemRankingKernels item_ranking = {best_items, count_ahead, diagonal};
}

}  // namespace fmrec
