#include "bindings.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "item_cross_entropy.h"
#include "memory.h"
#include "parallel.h"

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t XENT_GRAIN = 1 << 18, XENT_SUM_GRAIN = 1 << 20;

// Rows whose gradients a part sums at a time, so that its partial sums stay in its L2.
constexpr std::int64_t XENT_PARTIAL_FLOATS = 1 << 17;

// What forward and the adjoint share: inputs, packed rows, scratch, and how the work is split.
struct XentCall {
    ItemCrossEntropy a{};
    std::vector<py::array> arrays;  // keeps them alive
    std::int64_t tiles = 0, chunks = 0, parts = 0;
    Floats columns, panels, scratch;
    bool worth_it = false;

    const float* optional(const py::object& object, const char* name, std::int64_t size) {
        if (object.is_none()) return nullptr;
        arrays.push_back(input<float>(object, name, 1));
        check_shape(arrays.back(), name, "[V]", {size});
        return data<float>(arrays.back());
    }

    XentCall(const py::object& rep_, const py::object& weight_, const py::object& bias_,
             const py::object& smoothing_, const py::object& target_, double scale,
             const py::object& cache_, int num_threads) {
        const py::array rep = input<float>(rep_, "rep", 2), weight = input<float>(weight_, "weight", 2);
        const py::array wanted = input<std::int64_t>(target_, "target", 1);
        check_threads(num_threads);
        a.batch = rep.shape(0);
        a.width = rep.shape(1);
        a.items = weight.shape(0);
        check_shape(weight, "weight", "[V, D]", {a.items, a.width});
        check_shape(wanted, "target", "[B]", {a.batch});
        if (a.items < 1) throw py::value_error("weight must have at least one row, got none");
        arrays = {rep, weight, wanted};
        a.rep = data<float>(rep);
        a.weight = data<float>(weight);
        a.target = data<std::int64_t>(wanted);
        a.bias = optional(bias_, "bias", a.items);
        a.smoothing = optional(smoothing_, "smoothing", a.items);
        a.scale = static_cast<float>(scale);
        tiles = (a.items + XENT_ITEMS - 1) / XENT_ITEMS;
        chunks = (a.batch + XENT_ROWS - 1) / XENT_ROWS;
        if (!cache_.is_none()) {
            py::array cache = output<float>(cache_, "cache", 1);
            check_shape(cache, "cache", "[tiles * chunks * block]",
                        {tiles * chunks * XENT_ITEMS * XENT_ROWS});
            a.cache = target(cache);
            arrays.push_back(cache);
        }
        worth_it = a.batch * a.items * a.width >= XENT_GRAIN;
        parts = worth_it && num_threads > 1 ? std::min<std::int64_t>(num_threads, tiles) : 1;
        columns = allocate_floats(chunks * xent_packed(a.width), false);
        panels = allocate_floats(chunks * xent_packed(a.width), false);
        scratch = allocate_floats(parts * xent_scratch(a.width), false);
        a.columns = columns.get();
        a.panels = panels.get();
        a.scratch = scratch.get();
    }

    // work(part, first tile, last tile), every part by a thread of its own.
    template <typename Work>
    void run(int num_threads, Work work) {
        parallel_items(num_threads, parts, worth_it, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t part = begin; part < end; ++part) {
                work(part, tiles * part / parts, tiles * (part + 1) / parts);
            }
        });
    }

    void pack(const ItemCrossEntropyKernels& kernels, int num_threads) {
        parallel_items(num_threads, chunks, worth_it, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t chunk = begin; chunk < end; ++chunk) kernels.pack(&a, chunk);
        });
    }
};

void item_cross_entropy_forward(const py::object& rep, const py::object& weight,
                                const py::object& bias, const py::object& smoothing,
                                const py::object& target_, double scale,
                                const py::object& statistics_, const py::object& cache,
                                int num_threads) {
    XentCall call(rep, weight, bias, smoothing, target_, scale, cache, num_threads);
    ItemCrossEntropy& a = call.a;
    py::array statistics = checked_array(statistics_, "statistics", "float64", is_dtype<double>, 2,
                                         true);
    check_shape(statistics, "statistics", "[4, B]", {4, a.batch});
    double* const out = static_cast<double*>(statistics.mutable_data());
    const ItemCrossEntropyKernels& kernels = FMREC_TABLE(item_cross_entropy);
    if (a.batch == 0) return;
    py::gil_scoped_release release;
    const std::int64_t padded = call.chunks * XENT_ROWS;
    const Floats largest = allocate_floats(call.parts * padded, false);
    const Floats at_target = allocate_floats(padded, true);
    std::vector<double> sum(static_cast<std::size_t>(call.parts * padded)), dot(sum.size());
    a.largest = largest.get();
    a.at_target = at_target.get();
    a.sum = sum.data();
    a.dot = dot.data();
    call.pack(kernels, num_threads);
    call.run(num_threads, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
        kernels.forward(&a, part, begin, end);
    });
    // The sums of s over each part's items, to move its `dot` to the common maximum.
    std::vector<double> weights(static_cast<std::size_t>(call.parts));
    for (std::int64_t part = 0; part < call.parts; ++part) {
        const std::int64_t begin = call.tiles * part / call.parts * XENT_ITEMS;
        const std::int64_t end =
            std::min<std::int64_t>(call.tiles * (part + 1) / call.parts * XENT_ITEMS, a.items);
        double& total = weights[static_cast<std::size_t>(part)];
        total = a.smoothing ? 0.0 : static_cast<double>(end - begin);
        for (std::int64_t i = begin; a.smoothing && i < end; ++i) total += a.smoothing[i];
    }
    for (std::int64_t b = 0; b < a.batch; ++b) {
        float top = a.largest[b];
        for (std::int64_t part = 1; part < call.parts; ++part) {
            top = std::max(top, a.largest[part * padded + b]);
        }
        double total = 0.0, moved = 0.0;
        for (std::int64_t part = 0; part < call.parts; ++part) {
            const double fall = static_cast<double>(a.largest[part * padded + b]) - top;
            total += a.sum[part * padded + b] * std::exp2(fall);
            moved += a.dot[part * padded + b] + weights[static_cast<std::size_t>(part)] * fall;
        }
        out[b] = top;
        out[a.batch + b] = total;
        out[2 * a.batch + b] = static_cast<double>(top) - a.at_target[b];
        out[3 * a.batch + b] = moved;
    }
}

void item_cross_entropy_backward(const py::object& rep, const py::object& weight,
                                 const py::object& bias, const py::object& smoothing,
                                 const py::object& target_, double scale,
                                 const py::object& rows_, double filter, const py::object& cache,
                                 const py::object& d_rep_, const py::object& d_weight_,
                                 const py::object& d_bias_, int num_threads) {
    XentCall call(rep, weight, bias, smoothing, target_, scale, cache, num_threads);
    ItemCrossEntropy& a = call.a;
    const py::array given = input<float>(rows_, "rows", 2);
    check_shape(given, "rows", "[5, B]", {5, a.batch});
    a.filter = static_cast<float>(filter);
    float* d_rep = nullptr;
    if (!d_rep_.is_none()) {
        py::array array = output<float>(d_rep_, "d_rep", 2);
        check_shape(array, "d_rep", "[B, D]", {a.batch, a.width});
        d_rep = target(array);
    }
    if (!d_weight_.is_none()) {
        py::array array = output<float>(d_weight_, "d_weight", 2);
        check_shape(array, "d_weight", "[V, D]", {a.items, a.width});
        a.d_weight = target(array);
    }
    if (!d_bias_.is_none()) {
        py::array array = output<float>(d_bias_, "d_bias", 1);
        check_shape(array, "d_bias", "[V]", {a.items});
        a.d_bias = target(array);
    }
    const ItemCrossEntropyKernels& kernels = FMREC_TABLE(item_cross_entropy);
    py::gil_scoped_release release;
    if (a.batch == 0) {
        std::fill_n(a.d_weight, a.d_weight ? a.items * a.width : 0, 0.0f);
        std::fill_n(a.d_bias, a.d_bias ? a.items : 0, 0.0f);
        return;
    }
    // Whole chunks: what lies past the rows has no probability and coefficients of 0.
    const std::int64_t padded = call.chunks * XENT_ROWS;
    const Floats rows = allocate_floats(5 * padded, true);
    std::fill_n(rows.get() + a.batch, padded - a.batch, 3.0e38f);
    for (std::int64_t row = 0; row < 5; ++row) {
        std::copy_n(data<float>(given) + row * a.batch, a.batch, rows.get() + row * padded);
    }
    a.largest = rows.get();
    a.coefficient = rows.get() + padded;
    a.smooth = rows.get() + 2 * padded;
    a.at_target = rows.get() + 3 * padded;
    a.share = rows.get() + 4 * padded;
    if (a.d_weight) prefer_huge_pages(a.d_weight, a.items * a.width * 4);
    call.pack(kernels, num_threads);
    const std::int64_t wide = xent_padded(a.width);
    const std::int64_t group = XENT_PARTIAL_FLOATS / (XENT_ROWS * (wide + XENT_WIDTH)) + 1;
    for (a.first_chunk = 0; a.first_chunk < call.chunks; a.first_chunk = a.last_chunk) {
        a.last_chunk = std::min(a.first_chunk + group, call.chunks);
        a.add = a.first_chunk > 0;
        const std::int64_t size = (a.last_chunk - a.first_chunk) * XENT_ROWS * wide;
        const Floats partial = allocate_floats(d_rep ? call.parts * size : 0, true);
        a.d_rep = d_rep ? partial.get() : nullptr;
        call.run(num_threads, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
            kernels.backward(&a, part, begin, end);
        });
        if (!d_rep) continue;
        const std::int64_t first = a.first_chunk * XENT_ROWS;
        const std::int64_t count = std::min(a.last_chunk * XENT_ROWS, a.batch) - first;
        parallel_items(num_threads, count, call.parts * count * wide >= XENT_SUM_GRAIN,
                       [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t b = begin; b < end; ++b) {
                float* to = d_rep + (first + b) * a.width;
                const float* from = partial.get() + b * wide;
                for (std::int64_t d = 0; d < a.width; ++d) {
                    float total = from[d];
                    for (std::int64_t part = 1; part < call.parts; ++part) {
                        total += from[part * size + d];
                    }
                    to[d] = total * a.scale;
                }
            }
        });
    }
}

}  // namespace

void bind_item_cross_entropy(py::module_& m) {
    m.def("item_cross_entropy_forward", &item_cross_entropy_forward, py::arg("rep"),
          py::arg("weight"), py::arg("bias").none(true), py::arg("smoothing").none(true),
          py::arg("target"), py::arg("scale"), py::arg("statistics"), py::arg("cache").none(true),
          py::arg("num_threads"),
          "statistics [4, B] of the scores x in base 2: max x, sum 2^(x - max), max - x[target], "
          "sum smoothing (x - max); cache keeps the scores for the adjoint.");
    m.def("item_cross_entropy_backward", &item_cross_entropy_backward, py::arg("rep"),
          py::arg("weight"), py::arg("bias").none(true), py::arg("smoothing").none(true),
          py::arg("target"), py::arg("scale"), py::arg("rows"), py::arg("filter"),
          py::arg("cache").none(true), py::arg("d_rep").none(true),
          py::arg("d_weight").none(true), py::arg("d_bias").none(true), py::arg("num_threads"),
          "Adjoint of the statistics; rows [5, B]: max x, coefficient, smooth, at_target, share.");
    m.def("item_cross_entropy_cache", [](std::int64_t batch, std::int64_t items) {
              return (items + XENT_ITEMS - 1) / XENT_ITEMS * ((batch + XENT_ROWS - 1) / XENT_ROWS) *
                     XENT_ITEMS * XENT_ROWS;
          }, py::arg("batch"), py::arg("items"), "Floats of a cache of all scores.");
}

}  // namespace fmrec
