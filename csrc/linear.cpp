#include "linear.h"

#include "gemm.h"
#if defined(__AMX_BF16__)
#include "amx_pack.h"
#endif

namespace fmrec {
namespace {

FMREC_INLINE int64_t at_most(int64_t n, int64_t limit) { return n < limit ? n : limit; }

// Onto the sums of the rows before, which one row after the other would round too often.
void add_rows(const float* rows, int64_t row, int64_t count, int64_t width, float* sums) {
    for (int64_t j = 0; j < width; j += FLOATS) {
        f32v total = load(rows + j);
        for (int64_t i = 1; i < count; ++i) total += load(rows + i * row + j);
        store(sums + j, load(sums + j) + total);
    }
}

// The rows of an A with row = 1.
void add_transposed(const LinearProduct* p, int64_t first, int64_t rows) {
    for (int64_t k = 0; k < p->depth; k += LINEAR_CHUNK) {
        add_rows(p->in + first + k * p->step, p->step, at_most(p->depth - k, LINEAR_CHUNK), rows,
                 p->sums + first);
    }
}

#if defined(__AMX_BF16__)

// Depth that operands are packed for at a time. Rows of a block of A: those of a tile, unless B is
// larger, in bytes, than what the second-level cache holds beside them, and comes from further away
// each time: then each of its panels meets TALL of them (384 kB).
const int64_t DEPTH = 512, TALL = 4 * LINEAR_ROWS, NEAR = 1 << 20;

template <int PLANES>
void pack_planes(const LinearPacking* p, int64_t begin, int64_t end) {
    const int64_t first = begin * LINEAR_PANEL;
    const int64_t columns = at_most(end * LINEAR_PANEL, p->columns) - first;
    // One block of the depth after the other, as `product` goes through them.
    uint16_t* block = (uint16_t*)p->panels;
    for (int64_t k = 0; k < p->depth; k += DEPTH) {
        const int64_t deep = at_most(p->depth - k, DEPTH);
        const float* from = p->source + k * p->row + first * p->column;
        uint16_t* to = block + amx_columns_size(deep, first, PLANES);
        if (p->column == 1) {
            amx_split<PLANES, false, STRIPS_INSIDE>(from, p->row, columns, deep, to);
        } else {
            amx_split<PLANES, false, DEPTH_INSIDE>(from, p->column, columns, deep, to);
        }
        block += amx_columns_size(deep, p->columns, PLANES);
    }
}

template <int PLANES>
void product_of_planes(const LinearProduct* p, int64_t begin, int64_t end) {
    alignas(64) uint16_t a[TALL * DEPTH * PLANES];
    const TileState tiles;
    const int64_t last = at_most(end * LINEAR_ROWS, p->rows), columns = p->columns;
    const bool near = 2 * amx_columns_size(at_most(p->depth, DEPTH), columns, PLANES) <= NEAR;
    const int64_t height = near ? LINEAR_ROWS : TALL, width = near ? columns : LINEAR_PANEL;
    for (int64_t first = begin * LINEAR_ROWS; first < last; first += height) {
        const int64_t rows = at_most(last - first, height);
        const uint16_t* b = (const uint16_t*)p->panels;
        for (int64_t k = 0; k < p->depth; k += DEPTH) {
            const int64_t deep = at_most(p->depth - k, DEPTH);
            const float* from = p->in + first * p->row + k * p->step;
            if (p->step == 1) {
                amx_split<PLANES, true, DEPTH_INSIDE>(from, p->row, rows, deep, a);
            } else {
                amx_split<PLANES, true, STRIPS_INSIDE>(from, p->step, rows, deep, a);
            }
            for (int64_t j = 0; j < columns; j += width) {
                const int64_t wide = at_most(columns - j, width);
                const uint16_t* next = b + amx_columns_size(deep, wide, PLANES);
                const AmxProduct block = {a, b, k > 0 || !p->bias ? nullptr : p->bias + j, nullptr,
                                          k > 0, p->out + first * columns + j, columns, deep,
                                          j + wide < columns ? next : nullptr};
                amx_multiply<PLANES>(&block, rows, wide);
                b = next;
            }
        }
        if (p->sums) add_transposed(p, first, rows);
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
            if (g->product) {
                product_of_planes<PLANES>(g->product, first / LINEAR_ROWS,
                                          (first + LINEAR_CHUNK) / LINEAR_ROWS);
            }
            const TileState tiles;
            amx_split<PLANES, true, STRIPS_INSIDE>(g->a + first * g->narrow, g->narrow, g->narrow,
                                                   rows, a);
            amx_split<PLANES, false, STRIPS_INSIDE>(g->b + first * g->wide, g->wide, g->wide, rows,
                                                    b);
            const AmxProduct block = {a, b, nullptr, nullptr, true, partial, g->wide, rows};
            amx_multiply<PLANES>(&block, g->narrow, g->wide);
            if (g->grad) {
                add_rows(g->grad + first * g->width_of_grad, g->width_of_grad, rows,
                         g->width_of_grad, g->sums + part * g->width_of_grad);
            }
        }
    }
}

// The function of as many planes.
#define FMREC_OF_PLANES(function, planes) \
    ((planes) == 1 ? function<1> : (planes) == 2 ? function<2> : function<LINEAR_PLANES>)

void pack(const LinearPacking* p, int64_t begin, int64_t end) {
    FMREC_OF_PLANES(pack_planes, p->planes)(p, begin, end);
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

void pack(const LinearPacking* p, int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t first = panel * LINEAR_PANEL;
        const int64_t width = at_most(p->columns - first, LINEAR_PANEL);
        float* to = p->panels + p->depth * first;
        for (int64_t k = 0; k < p->depth; ++k) {
            const float* from = p->source + k * p->row + first * p->column;
            for (int64_t j = 0; j < width; ++j) to[k * width + j] = from[j * p->column];
        }
    }
}

void product(const LinearProduct* p, int64_t begin, int64_t end) {
    const int64_t last = at_most(end * LINEAR_ROWS, p->rows);
    // The sums of a gradient, which are long, in pieces.
    const int64_t deep = p->step == 1 ? p->depth : LINEAR_CHUNK;
    for (int64_t first = begin * LINEAR_ROWS; first < last; first += HEIGHT) {
        const int64_t rows = at_most(last - first, HEIGHT);
        for (int64_t j = 0; j < p->columns; j += LINEAR_PANEL) {
            const int64_t width = at_most(p->columns - j, LINEAR_PANEL);
            for (int64_t k = 0; k < p->depth; k += deep) {
                const Product block = {p->in + first * p->row + k * p->step, p->row, p->step,
                                       p->panels + j * p->depth + k * width, width,
                                       p->bias ? p->bias + j : nullptr, nullptr, k > 0,
                                       p->out + first * p->columns + j, p->columns,
                                       at_most(p->depth - k, deep)};
                multiply(&block, rows, width);
            }
        }
        if (p->sums) add_transposed(p, first, rows);
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
            const int64_t rows = at_most(g->rows - first, LINEAR_CHUNK);
            if (g->product) {
                product(g->product, first / LINEAR_ROWS, (first + LINEAR_CHUNK) / LINEAR_ROWS);
            }
            for (int64_t j = 0; j < g->wide; j += LINEAR_PANEL) {
                const int64_t width = at_most(g->wide - j, LINEAR_PANEL);
                for (int64_t k = 0; k < rows; ++k) {
                    __builtin_memcpy(panel + k * width, g->b + (first + k) * g->wide + j,
                                     (size_t)width * sizeof(float));
                }
                const Product block = {g->a + first * g->narrow, 1, g->narrow, panel, width,
                                       nullptr, nullptr, true, partial + j, g->wide, rows};
                multiply(&block, g->narrow, width);
            }
            if (g->grad) {
                add_rows(g->grad + first * g->width_of_grad, g->width_of_grad, rows,
                         g->width_of_grad, g->sums + part * g->width_of_grad);
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
