#include "linear.h"

#include "gemm.h"

namespace fmrec {
namespace {

void pack(const float* source, int64_t row, int64_t column, int64_t depth, int64_t columns,
          float* panels) {
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
    for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item * LINEAR_ROWS;
        const int64_t rows = p->rows - first < LINEAR_ROWS ? p->rows - first : LINEAR_ROWS;
        for (int64_t j = 0; j < p->columns; j += LINEAR_PANEL) {
            const int64_t width = p->columns - j < LINEAR_PANEL ? p->columns - j : LINEAR_PANEL;
            const Product block = {p->in + first * p->depth, p->depth, 1, p->panels + j * p->depth,
                                   width, p->bias ? p->bias + j : nullptr, nullptr, false,
                                   p->out + first * p->columns + j, p->columns, p->depth};
            multiply(&block, rows, width);
        }
    }
}

void add_rows(const float* rows, int64_t count, int64_t width, float* sums) {
    for (int64_t j = 0; j < width; j += FLOATS) {
        f32v total = load(sums + j);
        for (int64_t i = 0; i < count; ++i) total += load(rows + i * width + j);
        store(sums + j, total);
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

}  // namespace

namespace FMREC_ISA {
extern const LinearKernels linear = {pack, product, gradient};
}

}  // namespace fmrec
