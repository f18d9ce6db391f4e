#include "linear.h"

#include "gemm.h"
#if defined(__AMX_BF16__)
#include "amx_pack.h"
#endif

namespace fmrec {
namespace {

// Onto the sums of the rows before, which one row after the other would round too often.
void add_rows(const float* rows, int64_t count, int64_t width, float* sums) {
    for (int64_t j = 0; j < width; j += FLOATS) {
        f32v total = load(rows + j);
        for (int64_t i = 1; i < count; ++i) total += load(rows + i * width + j);
        store(sums + j, load(sums + j) + total);
    }
}

#if defined(__AMX_BF16__)

// Rows of a block, and the depth that they are packed for at a time (96 kB).
const int64_t HEIGHT = 32, DEPTH = 512;

FMREC_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

template <int PLANES>
void pack_planes(const float* source, int64_t row, int64_t column, int64_t depth, int64_t columns,
                 float* panels) {
    // One block of the depth after the other, as `product` goes through them.
    uint16_t* to = (uint16_t*)panels;
    for (int64_t k = 0; k < depth; k += DEPTH) {
        const int64_t deep = at_most(depth - k, DEPTH);
        if (column == 1) {
            amx_split<PLANES, false, STRIPS_INSIDE>(source + k * row, row, columns, deep, to);
        } else {
            amx_split<PLANES, false, DEPTH_INSIDE>(source + k * row, column, columns, deep, to);
        }
        to += amx_columns_size(deep, columns, PLANES);
    }
}

template <int PLANES>
void product_of_planes(const LinearProduct* p, int64_t begin, int64_t end) {
    alignas(64) uint16_t a[HEIGHT * DEPTH * PLANES];
    const TileState tiles;
    const int64_t last = at_most(end * LINEAR_ROWS, p->rows), columns = p->columns;
    for (int64_t first = begin * LINEAR_ROWS; first < last; first += HEIGHT) {
        const int64_t rows = at_most(last - first, HEIGHT);
        const uint16_t* b = (const uint16_t*)p->panels;
        float* out = p->out + first * columns;
        for (int64_t k = 0; k < p->depth; k += DEPTH) {
            const int64_t deep = at_most(p->depth - k, DEPTH);
            amx_split<PLANES, true, DEPTH_INSIDE>(p->in + first * p->depth + k, p->depth, rows,
                                                  deep, a);
            const AmxProduct block = {a, b, k > 0 ? nullptr : p->bias, nullptr, k > 0, out, columns,
                                      deep};
            amx_multiply<PLANES>(&block, rows, columns);
            b += amx_columns_size(deep, columns, PLANES);
        }
    }
}

template <int PLANES>
void gradient_of_planes(const LinearGradient* g, int64_t begin, int64_t end) {
    const int64_t chunks = (g->rows + LINEAR_CHUNK - 1) / LINEAR_CHUNK;
    uint16_t* a = (uint16_t*)(g->scratch + begin * linear_gradient_scratch(g->narrow, g->wide));
    uint16_t* b = a + amx_rows_size(g->narrow, LINEAR_CHUNK, PLANES);
    for (int64_t part = begin; part < end; ++part) {
        float* partial = g->partial + part * g->narrow * g->wide;
        const int64_t last = chunks * (part + 1) / LINEAR_PARTS;
        for (int64_t chunk = chunks * part / LINEAR_PARTS; chunk < last; ++chunk) {
            const int64_t first = chunk * LINEAR_CHUNK;
            const int64_t rows = at_most(g->rows - first, LINEAR_CHUNK);
            if (g->product) product_of_planes<PLANES>(g->product, chunk, chunk + 1);
            const TileState tiles;
            amx_split<PLANES, true, STRIPS_INSIDE>(g->a + first * g->narrow, g->narrow, g->narrow,
                                                   rows, a);
            amx_split<PLANES, false, STRIPS_INSIDE>(g->b + first * g->wide, g->wide, g->wide, rows,
                                                    b);
            const AmxProduct block = {a, b, nullptr, nullptr, true, partial, g->wide, rows};
            amx_multiply<PLANES>(&block, g->narrow, g->wide);
            if (g->grad) {
                add_rows(g->grad + first * g->width_of_grad, rows, g->width_of_grad,
                         g->sums + part * g->width_of_grad);
            }
        }
    }
}

// The function of as many planes.
#define FMREC_OF_PLANES(function, planes) \
    ((planes) == 1 ? function<1> : (planes) == 2 ? function<2> : function<LINEAR_PLANES>)

void pack(const float* source, int64_t row, int64_t column, int64_t depth, int64_t columns,
          int planes, float* panels) {
    FMREC_OF_PLANES(pack_planes, planes)(source, row, column, depth, columns, panels);
}

void product(const LinearProduct* p, int64_t begin, int64_t end) {
    FMREC_OF_PLANES(product_of_planes, p->planes)(p, begin, end);
}

void gradient(const LinearGradient* g, int64_t begin, int64_t end) {
    FMREC_OF_PLANES(gradient_of_planes, g->planes)(g, begin, end);
}

#undef FMREC_OF_PLANES

#else

// Rows that meet a panel while it is in the first-level cache.
const int64_t HEIGHT = 48;

void pack(const float* source, int64_t row, int64_t column, int64_t depth, int64_t columns,
          int, float* panels) {
    for (int64_t first = 0; first < columns; first += LINEAR_PANEL) {
        const int64_t width = columns - first < LINEAR_PANEL ? columns - first : LINEAR_PANEL;
        for (int64_t k = 0; k < depth; ++k) {
            const float* from = source + k * row + first * column;
            for (int64_t j = 0; j < width; ++j) panels[k * width + j] = from[j * column];
        }
        panels += depth * width;
    }
}

void product(const LinearProduct* p, int64_t begin, int64_t end) {
    const int64_t last = end * LINEAR_ROWS < p->rows ? end * LINEAR_ROWS : p->rows;
    for (int64_t first = begin * LINEAR_ROWS; first < last; first += HEIGHT) {
        const int64_t rows = last - first < HEIGHT ? last - first : HEIGHT;
        for (int64_t j = 0; j < p->columns; j += LINEAR_PANEL) {
            const int64_t width = p->columns - j < LINEAR_PANEL ? p->columns - j : LINEAR_PANEL;
            const Product block = {p->in + first * p->depth, p->depth, 1, p->panels + j * p->depth,
                                   width, p->bias ? p->bias + j : nullptr, nullptr, false,
                                   p->out + first * p->columns + j, p->columns, p->depth};
            multiply(&block, rows, width);
        }
    }
}

void gradient(const LinearGradient* g, int64_t begin, int64_t end) {
    // A panel of b that stays in the first-level cache while all columns of a pass it.
    alignas(64) float panel[LINEAR_CHUNK * LINEAR_PANEL];
    const int64_t chunks = (g->rows + LINEAR_CHUNK - 1) / LINEAR_CHUNK;
    for (int64_t part = begin; part < end; ++part) {
        float* partial = g->partial + part * g->narrow * g->wide;
        const int64_t last = chunks * (part + 1) / LINEAR_PARTS;
        for (int64_t chunk = chunks * part / LINEAR_PARTS; chunk < last; ++chunk) {
            const int64_t first = chunk * LINEAR_CHUNK;
            const int64_t rows = g->rows - first < LINEAR_CHUNK ? g->rows - first : LINEAR_CHUNK;
            if (g->product) product(g->product, chunk, chunk + 1);
            for (int64_t j = 0; j < g->wide; j += LINEAR_PANEL) {
                const int64_t width = g->wide - j < LINEAR_PANEL ? g->wide - j : LINEAR_PANEL;
                for (int64_t k = 0; k < rows; ++k) {
                    __builtin_memcpy(panel + k * width, g->b + (first + k) * g->wide + j,
                                     (size_t)width * sizeof(float));
                }
                const Product block = {g->a + first * g->narrow, 1, g->narrow, panel, width,
                                       nullptr, nullptr, true, partial + j, g->wide, rows};
                multiply(&block, g->narrow, width);
            }
            if (g->grad) {
                add_rows(g->grad + first * g->width_of_grad, rows, g->width_of_grad,
                         g->sums + part * g->width_of_grad);
            }
        }
    }
}

#endif

}  // namespace

namespace FMREC_ISA {
extern const LinearKernels linear = {pack, product, gradient};
}

}  // namespace fmrec
