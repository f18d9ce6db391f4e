#include "bindings.h"

#include "linear.h"
#include "memory.h"
#include "parallel.h"

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t LINEAR_GRAIN = 1 << 20;

// Numbers to pack, likewise.
constexpr std::int64_t PACKING_GRAIN = 1 << 18;

// B with element (k, j) at source[k * row + j * column].
Floats packed(const LinearKernels& kernels, const float* source, std::int64_t row,
              std::int64_t column, std::int64_t depth, std::int64_t columns, int planes,
              int num_threads) {
    Floats panels = allocate_floats(linear_packed(depth, columns), false);
    const LinearPacking p{source, row, column, depth, columns, planes, panels.get()};
    parallel_items(num_threads, (columns + LINEAR_PANEL - 1) / LINEAR_PANEL,
                   depth * columns >= PACKING_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { kernels.pack(&p, begin, end); });
    return panels;
}

void multiply(const LinearKernels& kernels, const LinearProduct& p, int num_threads) {
    prefer_huge_pages(p.out, p.rows * p.columns * 4);
    parallel_items(num_threads, (p.rows + LINEAR_ROWS - 1) / LINEAR_ROWS,
                   p.rows * p.depth * p.columns >= LINEAR_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { kernels.multiply(&p, begin, end); });
}

void linear_forward(const py::object& x_, const py::object& weight_, const py::object& bias_,
                    const py::object& out_, int num_threads, const std::string& precision) {
    const int planes = training_planes_of(precision);
    const py::array x = input<float>(x_, "x", 2), weight = input<float>(weight_, "weight", 2);
    const py::array bias = input<float>(bias_, "bias", 1);
    py::array out = output<float>(out_, "out", 2);
    check_threads(num_threads);
    const std::int64_t rows = x.shape(0), in = x.shape(1), columns = weight.shape(0);
    check_shape(weight, "weight", "[O, I]", {columns, in});
    check_shape(bias, "bias", "[O]", {columns});
    check_shape(out, "out", "[M, O]", {rows, columns});
    check_width(in, "I");
    check_width(columns, "O");
    check_overlap(out, "out", x, "x", false);
    const LinearKernels& kernels = FMREC_TABLE(linear);
    if (is_empty(out)) return;
    float* const to = target(out);
    py::gil_scoped_release release;
    const Floats panels =
        packed(kernels, data<float>(weight), 1, in, in, columns, planes, num_threads);
    multiply(kernels, {data<float>(x), in, 1, panels.get(), data<float>(bias), to, rows, in,
                       columns, planes}, num_threads);
}

void linear_backward(const py::object& grad_, const py::object& x_, const py::object& weight_,
                     const py::object& d_x_, const py::object& d_weight_,
                     const py::object& d_bias_, int num_threads, const std::string& precision) {
    const int planes = training_planes_of(precision);
    const py::array grad = input<float>(grad_, "grad", 2), x = input<float>(x_, "x", 2);
    const py::array weight = input<float>(weight_, "weight", 2);
    check_threads(num_threads);
    const std::int64_t rows = x.shape(0), in = x.shape(1), columns = weight.shape(0);
    check_shape(weight, "weight", "[O, I]", {columns, in});
    check_shape(grad, "grad", "[M, O]", {rows, columns});
    check_width(in, "I");
    check_width(columns, "O");
    float *d_x = nullptr, *d_weight = nullptr, *d_bias = nullptr;
    if (!d_x_.is_none()) {
        py::array array = output<float>(d_x_, "d_x", 2);
        check_shape(array, "d_x", "[M, I]", {rows, in});
        d_x = target(array);
    }
    if (!d_weight_.is_none()) {
        py::array array = output<float>(d_weight_, "d_weight", 2);
        check_shape(array, "d_weight", "[O, I]", {columns, in});
        d_weight = target(array);
    }
    if (!d_bias_.is_none()) {
        py::array array = output<float>(d_bias_, "d_bias", 1);
        check_shape(array, "d_bias", "[O]", {columns});
        d_bias = target(array);
    }
    const LinearKernels& kernels = FMREC_TABLE(linear);
    py::gil_scoped_release release;
    LinearProduct product{data<float>(grad), columns, 1, nullptr, nullptr, d_x, rows, columns, in,
                          planes};
    Floats panels;
    if (d_x && rows > 0) {
        panels = packed(kernels, data<float>(weight), in, 1, columns, in, planes, num_threads);
        product.panels = panels.get();
    }
    const bool few = d_weight && rows > 0 && linear_few_rows(rows, in, columns);
    if (product.panels && (few || (!d_weight && !d_bias))) multiply(kernels, product, num_threads);
    if (!d_weight && !d_bias) return;
    if (few) {
        panels = packed(kernels, data<float>(x), in, 1, rows, in, planes, num_threads);
        const Floats sums = allocate_floats(columns, true);
        multiply(kernels, {data<float>(grad), 1, columns, panels.get(), nullptr, d_weight, columns,
                           rows, in, planes, d_bias ? sums.get() : nullptr}, num_threads);
        for (std::int64_t o = 0; d_bias && o < columns; ++o) d_bias[o] = sums[o];
        return;
    }
    const bool swapped = in < columns;  // then the sums are those of the transposed gradient
    LinearGradient g{};
    g.a = swapped ? data<float>(x) : data<float>(grad);
    g.b = swapped ? data<float>(grad) : data<float>(x);
    g.grad = data<float>(grad);
    g.rows = rows;
    g.narrow = swapped ? in : columns;
    g.wide = swapped ? columns : in;
    g.width_of_grad = columns;
    g.planes = planes;
    g.product = product.panels ? &product : nullptr;
    const std::int64_t size = g.narrow * g.wide;
    const Floats partial = allocate_floats(LINEAR_PARTS * size, true);
    const Floats sums = allocate_floats(LINEAR_PARTS * columns, true);
    g.partial = partial.get();
    g.sums = sums.get();
    const Floats scratch =
        allocate_floats(LINEAR_PARTS * linear_gradient_scratch(g.narrow, g.wide), false);
    g.scratch = scratch.get();
    parallel_items(num_threads, LINEAR_PARTS, rows * size >= LINEAR_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { kernels.gradient(&g, begin, end); });
    add_parts(g.partial, LINEAR_PARTS, size, num_threads);
    add_parts(g.sums, LINEAR_PARTS, columns, num_threads);
    for (std::int64_t o = 0; d_weight && o < columns; ++o) {
        for (std::int64_t i = 0; i < in; ++i) {
            d_weight[o * in + i] = g.partial[swapped ? i * columns + o : o * in + i];
        }
    }
    for (std::int64_t o = 0; d_bias && o < columns; ++o) d_bias[o] = g.sums[o];
}

}  // namespace

void bind_linear(py::module_& m) {
    m.def("linear_forward", &linear_forward, py::arg("x"), py::arg("weight"), py::arg("bias"),
          py::arg("out"), py::arg("num_threads"), py::arg("precision") = "float32",
          "out = x @ weight.T + bias; on AMX tiles the precisions 'tf32' and 'bf16' round the "
          "operands of every product.");
    m.def("linear_backward", &linear_backward, py::arg("grad"), py::arg("x"), py::arg("weight"),
          py::arg("d_x").none(true), py::arg("d_weight").none(true), py::arg("d_bias").none(true),
          py::arg("num_threads"), py::arg("precision") = "float32",
          "d_x = grad @ weight, d_weight = grad.T @ x, d_bias = grad.sum(0), each unless None.");
}

}  // namespace fmrec
