#include "item_cross_entropy.h"

#include "gemm.h"
#if defined(__AMX_BF16__)
#include "amx_pack.h"
#endif

namespace fmrec {
namespace {

const float LOG2_E = 1.4426950408889634f;
// Below every score, but so that its difference to minus infinity is no NaN.
const float LOWEST = -3.0e38f;

FMREC_INLINE int64_t smallest(int64_t a, int64_t b) { return a < b ? a : b; }

// The items of one tile, and what belongs to each.
struct Items {
    int64_t first, items;
    float bias[XENT_ITEMS];    // times log2(e)
    float weight[XENT_ITEMS];  // s
};

FMREC_INLINE void read_tile(const ItemCrossEntropy* a, int64_t number, float no_smoothing,
                            Items* tile) {
    tile->first = number * XENT_ITEMS;
    tile->items = smallest(a->items - tile->first, XENT_ITEMS);
    for (int64_t i = 0; i < tile->items; ++i) {
        tile->bias[i] = a->bias ? a->bias[tile->first + i] * LOG2_E : 0.0f;
        tile->weight[i] = a->smoothing ? a->smoothing[tile->first + i] : no_smoothing;
    }
}

// The four products. Scratch of a part: a block of scores or gradients g [XENT_ITEMS, XENT_ROWS],
// the tile's part of d_weight [XENT_ITEMS, padded width], and what is packed.
struct Scratch {
    float *g, *d_weight, *packed;
};

FMREC_INLINE Scratch scratch_of(const ItemCrossEntropy* a, int64_t part) {
    float* g = a->scratch + part * xent_scratch(a->width);
    float* d_weight = g + XENT_ITEMS * XENT_ROWS;
    return {g, d_weight, d_weight + XENT_ITEMS * xent_padded(a->width)};
}

#if defined(__AMX_BF16__)

const int PLANES = 3;

FMREC_INLINE uint16_t* packed_for_scores(const Scratch& s) { return (uint16_t*)s.packed; }
FMREC_INLINE uint16_t* packed_for_d_rep(const ItemCrossEntropy* a, const Scratch& s) {
    return packed_for_scores(s) + amx_rows_size(XENT_ITEMS, a->width, PLANES);
}
FMREC_INLINE uint16_t* packed_block(const ItemCrossEntropy* a, const Scratch& s) {
    return packed_for_d_rep(a, s) + amx_rows_size(XENT_ITEMS, a->width, PLANES);
}

void pack(const ItemCrossEntropy* a, int64_t chunk) {
    const int64_t first = chunk * XENT_ROWS, width = a->width;
    const int64_t rows = smallest(a->batch - first, XENT_ROWS);
    const float* rep = a->rep + first * width;
    amx_split<PLANES, false, DEPTH_INSIDE>(
        rep, width, rows, width, (uint16_t*)(a->columns + chunk * xent_packed(width)));
    amx_split<PLANES, false, STRIPS_INSIDE>(
        rep, width, width, rows, (uint16_t*)(a->panels + chunk * xent_packed(width)));
}

FMREC_INLINE void pack_for_scores(const ItemCrossEntropy* a, const Items* tile, const Scratch& s) {
    amx_split<PLANES, true, DEPTH_INSIDE>(a->weight + tile->first * a->width, a->width,
                                          tile->items, a->width, packed_for_scores(s));
}

// x [items, panel] = weight rep^T for one panel of a chunk's rows.
FMREC_INLINE void scores(const ItemCrossEntropy* a, const Items* tile, const Scratch& s,
                         int64_t chunk, int64_t row, int64_t panel, float* x) {
    const uint16_t* columns = (const uint16_t*)(a->columns + chunk * xent_packed(a->width));
    const AmxProduct p = {packed_for_scores(s), columns + amx_columns_size(a->width, row, PLANES),
                          nullptr, nullptr, false, x + row, XENT_ROWS, a->width};
    amx_multiply<PLANES>(&p, tile->items, panel);
}

FMREC_INLINE void pack_for_d_rep(const ItemCrossEntropy* a, const Items* tile, const Scratch& s) {
    amx_split<PLANES, false, STRIPS_INSIDE>(a->weight + tile->first * a->width, a->width,
                                            a->width, tile->items, packed_for_d_rep(a, s));
}

// d_weight [items, D] (+)= g rep.
FMREC_INLINE void sum_d_weight(const ItemCrossEntropy* a, const Items* tile, const Scratch& s,
                               int64_t chunk, int64_t rows, bool add) {
    amx_split<PLANES, true, DEPTH_INSIDE>(s.g, XENT_ROWS, tile->items, rows, packed_block(a, s));
    const int64_t wide = xent_padded(a->width);
    const AmxProduct p = {packed_block(a, s),
                          (const uint16_t*)(a->panels + chunk * xent_packed(a->width)), nullptr,
                          nullptr, add, s.d_weight, wide, rows};
    amx_multiply<PLANES>(&p, tile->items, wide);
}

// d_rep [rows, D] += g^T weight.
FMREC_INLINE void sum_d_rep(const ItemCrossEntropy* a, const Items* tile, const Scratch& s,
                            int64_t rows, float* d_rep) {
    amx_split<PLANES, true, STRIPS_INSIDE>(s.g, XENT_ROWS, rows, tile->items, packed_block(a, s));
    const int64_t wide = xent_padded(a->width);
    const AmxProduct p = {packed_block(a, s), packed_for_d_rep(a, s), nullptr, nullptr, true, d_rep,
                          wide, tile->items};
    amx_multiply<PLANES>(&p, rows, wide);
}

#else

struct TileState {};

void pack(const ItemCrossEntropy* a, int64_t chunk) {
    const int64_t first = chunk * XENT_ROWS, width = a->width, wide = xent_padded(width);
    const int64_t rows = smallest(a->batch - first, XENT_ROWS), row_width = xent_padded(rows);
    const float* rep = a->rep + first * width;
    float* to = a->columns + chunk * xent_packed(width);
    for (int64_t b = 0; b < row_width; b += XENT_PANEL) {
        const int64_t panel = smallest(row_width - b, XENT_PANEL);
        for (int64_t k = 0; k < width; ++k) {
            for (int64_t j = 0; j < panel; ++j) {
                to[k * panel + j] = b + j < rows ? rep[(b + j) * width + k] : 0.0f;
            }
        }
        to += width * panel;
    }
    to = a->panels + chunk * xent_packed(width);
    for (int64_t d = 0; d < wide; d += XENT_PANEL) {
        const int64_t panel = smallest(wide - d, XENT_PANEL);
        for (int64_t b = 0; b < rows; ++b) {
            for (int64_t j = 0; j < panel; ++j) {
                to[b * panel + j] = d + j < width ? rep[b * width + d + j] : 0.0f;
            }
        }
        to += rows * panel;
    }
}

FMREC_INLINE void pack_for_scores(const ItemCrossEntropy*, const Items*, const Scratch&) {}

// x [items, panel] = weight rep^T for one panel of a chunk's rows.
FMREC_INLINE void scores(const ItemCrossEntropy* a, const Items* tile, const Scratch&,
                         int64_t chunk, int64_t row, int64_t panel, float* x) {
    const float* columns = a->columns + chunk * xent_packed(a->width) + row * a->width;
    const Product p = {a->weight + tile->first * a->width, a->width, 1, columns, panel, nullptr,
                       nullptr, false, x + row, XENT_ROWS, a->width};
    multiply(&p, tile->items, panel);
}

// The tile's items [items, D] as panels of columns, for d_rep.
FMREC_INLINE void pack_for_d_rep(const ItemCrossEntropy* a, const Items* tile, const Scratch& s) {
    float* to = s.packed;
    const int64_t width = a->width, wide = xent_padded(width);
    const float* from = a->weight + tile->first * width;
    for (int64_t d = 0; d < wide; d += XENT_PANEL) {
        const int64_t panel = smallest(wide - d, XENT_PANEL);
        const int64_t inside = smallest(width - d, panel);
        for (int64_t i = 0; i < tile->items; ++i) {
            __builtin_memcpy(to, from + i * width + d, (size_t)inside * sizeof(float));
            for (int64_t j = inside; j < panel; ++j) to[j] = 0.0f;
            to += panel;
        }
    }
}

// d_weight [items, D] (+)= g rep.
FMREC_INLINE void sum_d_weight(const ItemCrossEntropy* a, const Items* tile, const Scratch& s,
                               int64_t chunk, int64_t rows, bool add) {
    const int64_t wide = xent_padded(a->width);
    for (int64_t d = 0; d < wide; d += XENT_PANEL) {
        const int64_t panel = smallest(wide - d, XENT_PANEL);
        const Product p = {s.g, XENT_ROWS, 1, a->panels + chunk * xent_packed(a->width) + d * rows,
                           panel, nullptr, nullptr, add, s.d_weight + d, wide, rows};
        multiply(&p, tile->items, panel);
    }
}

// d_rep [rows, D] += g^T weight.
FMREC_INLINE void sum_d_rep(const ItemCrossEntropy* a, const Items* tile, const Scratch& s,
                            int64_t rows, float* d_rep) {
    const int64_t wide = xent_padded(a->width);
    for (int64_t d = 0; d < wide; d += XENT_PANEL) {
        const int64_t panel = smallest(wide - d, XENT_PANEL);
        const Product p = {s.g, 1, XENT_ROWS, s.packed + d * tile->items, panel, nullptr, nullptr,
                           true, d_rep + d, wide, tile->items};
        multiply(&p, rows, panel);
    }
}

#endif

// The statistics of N vectors of rows go on by the scores x of a tile. `before` is the sum of s
// over the part's items until here.
template <int N>
FMREC_INLINE void statistics(const Items* tile, const float* x, f32v factor, double before,
                             float* largest, double* sum, double* dot) {
    f32v top[N], sums[N], dots[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        top[n] = load(largest + n * FLOATS);
        sums[n] = dots[n] = broadcast(0.0f);
    }
    for (int64_t i = 0; i < tile->items; ++i) {
        const f32v bias = broadcast(tile->bias[i]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            top[n] = larger(load(x + i * XENT_ROWS + n * FLOATS) * factor + bias, top[n]);
        }
    }
    for (int64_t i = 0; i < tile->items; ++i) {
        const f32v bias = broadcast(tile->bias[i]), weight = broadcast(tile->weight[i]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const f32v t = load(x + i * XENT_ROWS + n * FLOATS) * factor + bias - top[n];
            sums[n] += exponential2(t);
            dots[n] += t * weight;
        }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        const f32v fall = load(largest + n * FLOATS) - top[n];
        const f32v shrink = exponential2(fall);
        store(largest + n * FLOATS, top[n]);
        for (int i = 0; i < FLOATS; ++i) {
            sum[n * FLOATS + i] = sum[n * FLOATS + i] * shrink[i] + sums[n][i];
            dot[n * FLOATS + i] += before * fall[i] + dots[n][i];
        }
    }
}

void forward(const ItemCrossEntropy* a, int64_t part, int64_t begin, int64_t end) {
    const int64_t chunks = (a->batch + XENT_ROWS - 1) / XENT_ROWS;
    const f32v factor = broadcast(a->scale * LOG2_E);
    float* largest = a->largest + part * chunks * XENT_ROWS;
    double* sum = a->sum + part * chunks * XENT_ROWS;
    double* dot = a->dot + part * chunks * XENT_ROWS;
    for (int64_t b = 0; b < chunks * XENT_ROWS; ++b) {
        largest[b] = LOWEST;
        sum[b] = dot[b] = 0.0;
    }
    double before = 0.0;
    const Scratch scratch = scratch_of(a, part);
    [[maybe_unused]] const TileState tiles;
    Items tile;
    for (int64_t number = begin; number < end; ++number) {
        read_tile(a, number, 1.0f, &tile);
        pack_for_scores(a, &tile, scratch);
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t first = chunk * XENT_ROWS, rows = smallest(a->batch - first, XENT_ROWS);
            const int64_t row_width = xent_padded(rows);
            float* x = a->cache ? a->cache + (number * chunks + chunk) * XENT_ITEMS * XENT_ROWS
                                : scratch.g;
            if (a->cache && (row_width < XENT_ROWS || tile.items < XENT_ITEMS)) {
                // Who copies or compares a cache finds no undefined floats.
                __builtin_memset(x, 0, XENT_ITEMS * XENT_ROWS * sizeof(float));
            }
            for (int64_t b = 0; b < row_width; b += XENT_PANEL) {
                const int64_t panel = smallest(row_width - b, XENT_PANEL);
                scores(a, &tile, scratch, chunk, b, panel, x);
                int64_t j = b;
                for (; j + 4 * FLOATS <= b + panel; j += 4 * FLOATS) {
                    statistics<4>(&tile, x + j, factor, before, largest + first + j,
                                  sum + first + j, dot + first + j);
                }
                for (; j < b + panel; j += FLOATS) {
                    statistics<1>(&tile, x + j, factor, before, largest + first + j,
                                  sum + first + j, dot + first + j);
                }
            }
            for (int64_t b = 0; b < rows; ++b) {
                const uint64_t item = (uint64_t)(a->target[first + b] - tile.first);
                if (item < (uint64_t)tile.items) {
                    a->at_target[first + b] =
                        x[item * XENT_ROWS + b] * factor[0] + tile.bias[item];
                }
            }
        }
        for (int64_t i = 0; i < tile.items; ++i) before += tile.weight[i];
    }
    // A NaN score is lost to the maximum and to 2^x, but not to the plain sum.
    for (int64_t b = 0; b < a->batch; ++b) {
        if (dot[b] != dot[b]) sum[b] = dot[b];
    }
}

// g for N vectors of rows; returns the largest probability where FILTER asks for it.
template <int N, bool FILTER>
FMREC_INLINE float gradients(const ItemCrossEntropy* a, const Items* tile, const float* x,
                             f32v factor, int64_t row, float* g) {
    f32v top[N], coefficient[N], smooth[N], share[N];
    f32v highest = broadcast(0.0f);
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
        top[n] = load(a->largest + row + n * FLOATS);
        coefficient[n] = load(a->coefficient + row + n * FLOATS);
        smooth[n] = load(a->smooth + row + n * FLOATS);
        if (FILTER) share[n] = load(a->share + row + n * FLOATS);
    }
    for (int64_t i = 0; i < tile->items; ++i) {
        const f32v bias = broadcast(tile->bias[i]), weight = broadcast(tile->weight[i]);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            const int64_t at = i * XENT_ROWS + n * FLOATS;
            const f32v e = exponential2(load(x + at) * factor + bias - top[n]);
            if (FILTER) highest = larger(e * share[n], highest);
            store(g + at, e * coefficient[n] + weight * smooth[n]);
        }
    }
    return FILTER ? largest(highest) : 0.0f;
}

template <bool FILTER>
FMREC_INLINE float gradients_of_panel(const ItemCrossEntropy* a, const Items* tile, const float* x,
                                      f32v factor, int64_t first, int64_t b, int64_t panel,
                                      float* g) {
    float highest = 0.0f;
    int64_t j = b;
    for (; j + 4 * FLOATS <= b + panel; j += 4 * FLOATS) {
        const float found = gradients<4, FILTER>(a, tile, x + j, factor, first + j, g + j);
        highest = found > highest ? found : highest;
    }
    for (; j < b + panel; j += FLOATS) {
        const float found = gradients<1, FILTER>(a, tile, x + j, factor, first + j, g + j);
        highest = found > highest ? found : highest;
    }
    return highest;
}

void backward(const ItemCrossEntropy* a, int64_t part, int64_t begin, int64_t end) {
    const int64_t width = a->width, wide = xent_padded(width);
    const int64_t chunks = (a->batch + XENT_ROWS - 1) / XENT_ROWS;
    const f32v factor = broadcast(a->scale * LOG2_E);
    const Scratch scratch = scratch_of(a, part);
    float* g = scratch.g;
    [[maybe_unused]] const TileState tiles;
    float d_bias[XENT_ITEMS];
    float* d_rep = a->d_rep
        ? a->d_rep + part * (a->last_chunk - a->first_chunk) * XENT_ROWS * wide : nullptr;
    Items tile;
    for (int64_t number = begin; number < end; ++number) {
        read_tile(a, number, 0.0f, &tile);
        if (!a->cache) pack_for_scores(a, &tile, scratch);
        if (d_rep) pack_for_d_rep(a, &tile, scratch);
        for (int64_t i = 0; i < tile.items; ++i) d_bias[i] = 0.0f;
        bool written = false;  // whether d_weight holds something
        for (int64_t chunk = a->first_chunk; chunk < a->last_chunk; ++chunk) {
            const int64_t first = chunk * XENT_ROWS, rows = smallest(a->batch - first, XENT_ROWS);
            const int64_t row_width = xent_padded(rows);
            float highest = 0.0f;
            for (int64_t b = 0; b < row_width; b += XENT_PANEL) {
                const int64_t panel = smallest(row_width - b, XENT_PANEL);
                const float* x = g;
                if (a->cache) {
                    x = a->cache + (number * chunks + chunk) * XENT_ITEMS * XENT_ROWS;
                } else {
                    scores(a, &tile, scratch, chunk, b, panel, g);
                }
                const float found =
                    a->filter > 0.0f
                        ? gradients_of_panel<true>(a, &tile, x, factor, first, b, panel, g)
                        : gradients_of_panel<false>(a, &tile, x, factor, first, b, panel, g);
                highest = found > highest ? found : highest;
            }
            bool needed = !(highest < a->filter);
            for (int64_t b = 0; b < rows; ++b) {
                const uint64_t item = (uint64_t)(a->target[first + b] - tile.first);
                if (item < (uint64_t)tile.items) {
                    g[item * XENT_ROWS + b] -= a->at_target[first + b];
                    needed = true;
                }
            }
            if (!needed) continue;
            if (a->d_bias) {
                for (int64_t i = 0; i < tile.items; ++i) {
                    // Columns past the rows have coefficients of 0.
                    f32v total = broadcast(0.0f);
                    for (int64_t b = 0; b < row_width; b += FLOATS) {
                        total += load(g + i * XENT_ROWS + b);
                    }
                    d_bias[i] += sum(total);
                }
            }
            if (a->d_weight) sum_d_weight(a, &tile, scratch, chunk, rows, written);
            if (d_rep) {
                sum_d_rep(a, &tile, scratch, rows,
                          d_rep + (chunk - a->first_chunk) * XENT_ROWS * wide);
            }
            written = true;
        }
        for (int64_t i = 0; a->d_weight && i < tile.items; ++i) {
            float* to = a->d_weight + (tile.first + i) * width;
            const float* from = scratch.d_weight + i * wide;
            if (!written) {
                for (int64_t d = 0; !a->add && d < width; ++d) to[d] = 0.0f;
            } else if (a->add) {
                for (int64_t d = 0; d < width; ++d) to[d] += from[d] * a->scale;
            } else {
                for (int64_t d = 0; d < width; ++d) to[d] = from[d] * a->scale;
            }
        }
        for (int64_t i = 0; a->d_bias && i < tile.items; ++i) {
            float* to = a->d_bias + tile.first + i;
            *to = a->add ? *to + d_bias[i] : d_bias[i];
        }
    }
}

}  // namespace

namespace FMREC_ISA {
extern const ItemCrossEntropyKernels item_cross_entropy = {pack, forward, backward};
}

}  // namespace fmrec
