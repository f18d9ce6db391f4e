#include "bindings.h"

#include <cstdlib>
#include <memory>
#include <new>

#include "history_cells.h"
#include "history_loss.h"
#include "parallel.h"
#include "stream.h"

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t HISTORY_LOSS_GRAIN = 1 << 17;

bool is_flag(const py::dtype& dtype) {
    return dtype.equal(py::dtype::of<bool>()) || dtype.equal(py::dtype::of<std::uint8_t>());
}

// Memory that is not initialised, freed with its owner.
struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
typedef std::unique_ptr<std::int32_t[], Free> Indices;

Indices allocate(std::int64_t count, bool zeroed) {
    const std::size_t size = static_cast<std::size_t>(count > 0 ? count : 1);
    void* memory = zeroed ? std::calloc(size, sizeof(std::int32_t))
                          : std::malloc(size * sizeof(std::int32_t));
    if (!memory) throw std::bad_alloc();
    return Indices(static_cast<std::int32_t*>(memory));
}

// The cells in use, gathered by `key` with a counting sort: bucket k holds, in their own order,
// the cells order[starts[k] .. starts[k + 1]).
struct Buckets {
    Indices order, starts;
};

Buckets make_buckets(const std::int64_t* key, const std::uint8_t* use, std::int64_t cells,
                     std::int64_t keys) {
    Buckets buckets{allocate(cells, false), allocate(keys + 2, true)};
    // Counted two places up, so that the placing below turns counts[k + 1] into starts[k + 1].
    std::int32_t* counts = buckets.starts.get();
    for (std::int64_t m = 0; m < cells; ++m) counts[key[m] + 2] += use[m] != 0;
    for (std::int64_t k = 0; k < keys; ++k) counts[k + 2] += counts[k + 1];
    for (std::int64_t m = 0; m < cells; ++m) {
        if (use[m]) buckets.order[static_cast<std::size_t>(counts[key[m] + 1]++)] =
            static_cast<std::int32_t>(m);
    }
    return buckets;
}

// Checks what forward and backward share and fills it in. Returns the number of cells.
std::int64_t history_common(HistoryLoss& a, const py::array& hidden, const py::array& weight,
                            const py::array& rows, const py::array& cols, const py::array& use) {
    const std::int64_t cells = rows.shape(0), batch = hidden.shape(0), items = weight.shape(0);
    check_shape(weight, "weight", "[V, H]", {items, hidden.shape(1)});
    check_shape(cols, "cols", "[M]", {cells});
    check_shape(use, "use", "[M]", {cells});
    if (cells >= INT32_MAX || items >= INT32_MAX - 2 || batch >= INT32_MAX - 2) {
        throw py::value_error("cells, rows and columns must each number below 2**31 - 2, got " +
                              std::to_string(cells) + ", " + std::to_string(batch) + ", " +
                              std::to_string(items));
    }
    a.rows = data<std::int64_t>(rows);
    a.cols = data<std::int64_t>(cols);
    for (std::int64_t m = 0; m < cells; ++m) {
        if (a.rows[m] < 0 || a.rows[m] >= batch) {
            throw py::value_error("rows[" + std::to_string(m) + "] must satisfy 0 <= row < " +
                                  std::to_string(batch) + ", got " + std::to_string(a.rows[m]));
        }
        if (a.cols[m] < 0 || a.cols[m] >= items) {
            throw py::value_error("cols[" + std::to_string(m) + "] must satisfy 0 <= col < " +
                                  std::to_string(items) + ", got " + std::to_string(a.cols[m]));
        }
    }
    a.hidden = data<float>(hidden);
    a.weight = data<float>(weight);
    a.features = hidden.shape(1);
    return cells;
}

void history_loss_forward(const py::object& hidden_, const py::object& weight_,
                          const py::object& bias_, const py::object& rows_,
                          const py::object& cols_, const py::object& label_,
                          const py::object& use_, const py::object& residual_, int num_threads) {
    const py::array hidden = input<float>(hidden_, "hidden", 2),
                    weight = input<float>(weight_, "weight", 2),
                    bias = input<float>(bias_, "bias", 1),
                    rows = input<std::int64_t>(rows_, "rows", 1),
                    cols = input<std::int64_t>(cols_, "cols", 1),
                    label = input<float>(label_, "label", 1),
                    use = checked_array(use_, "use", "bool or uint8", is_flag, 1, false);
    py::array residual = output<float>(residual_, "residual", 1);
    check_threads(num_threads);
    HistoryLoss a{};
    const std::int64_t cells = history_common(a, hidden, weight, rows, cols, use);
    check_shape(bias, "bias", "[V]", {weight.shape(0)});
    check_shape(label, "label", "[M]", {cells});
    check_shape(residual, "residual", "[M]", {cells});
    check_overlap(residual, "residual", hidden, "hidden", false);
    check_overlap(residual, "residual", weight, "weight", false);
    check_overlap(residual, "residual", bias, "bias", false);
    check_overlap(residual, "residual", label, "label", false);
    const HistoryLossKernels& kernels = FMREC_TABLE(history_loss);
    a.bias = data<float>(bias);
    a.label = data<float>(label);
    a.residual = target(residual);
    const std::uint8_t* flags = data<std::uint8_t>(use);
    const std::int64_t items = weight.shape(0);
    py::gil_scoped_release release;
    const Buckets columns = make_buckets(a.cols, flags, cells, items);
    a.order = columns.order.get();
    const std::int64_t used = columns.starts[static_cast<std::size_t>(items)];
    for (std::int64_t m = 0; m < cells; ++m) {
        if (!flags[m]) a.residual[m] = 0.0f;
    }
    parallel_items(num_threads, used, used * a.features >= HISTORY_LOSS_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { kernels.forward(&a, begin, end); });
}

void history_loss_backward(const py::object& hidden_, const py::object& weight_,
                           const py::object& rows_, const py::object& cols_, const py::object& g_,
                           const py::object& use_, const py::object& d_hidden_,
                           const py::object& d_weight_, const py::object& d_bias_,
                           int num_threads) {
    const py::array hidden = input<float>(hidden_, "hidden", 2),
                    weight = input<float>(weight_, "weight", 2),
                    rows = input<std::int64_t>(rows_, "rows", 1),
                    cols = input<std::int64_t>(cols_, "cols", 1), g = input<float>(g_, "g", 1),
                    use = checked_array(use_, "use", "bool or uint8", is_flag, 1, false);
    check_threads(num_threads);
    HistoryLoss a{};
    const std::int64_t cells = history_common(a, hidden, weight, rows, cols, use);
    const std::int64_t batch = hidden.shape(0), items = weight.shape(0);
    check_shape(g, "g", "[M]", {cells});
    a.g = data<float>(g);
    if (!d_hidden_.is_none()) {
        py::array d_hidden = output<float>(d_hidden_, "d_hidden", 2);
        check_shape(d_hidden, "d_hidden", "[B, H]", {batch, a.features});
        check_overlap(d_hidden, "d_hidden", hidden, "hidden", false);
        check_overlap(d_hidden, "d_hidden", weight, "weight", false);
        check_overlap(d_hidden, "d_hidden", g, "g", false);
        a.d_hidden = target(d_hidden);
    }
    if (!d_weight_.is_none()) {
        py::array d_weight = output<float>(d_weight_, "d_weight", 2);
        check_shape(d_weight, "d_weight", "[V, H]", {items, a.features});
        check_overlap(d_weight, "d_weight", hidden, "hidden", false);
        check_overlap(d_weight, "d_weight", weight, "weight", false);
        check_overlap(d_weight, "d_weight", g, "g", false);
        a.d_weight = target(d_weight);
    }
    if (!d_bias_.is_none()) {
        py::array d_bias = output<float>(d_bias_, "d_bias", 1);
        check_shape(d_bias, "d_bias", "[V]", {items});
        check_overlap(d_bias, "d_bias", g, "g", false);
        a.d_bias = target(d_bias);
    }
    const HistoryLossKernels& kernels = FMREC_TABLE(history_loss);
    const std::uint8_t* flags = data<std::uint8_t>(use);
    py::gil_scoped_release release;
    if (a.d_hidden) {
        const Buckets by_row = make_buckets(a.rows, flags, cells, batch);
        a.order = by_row.order.get();
        a.starts = by_row.starts.get();
        parallel_ranges(
            num_threads, (cells + batch) * a.features >= HISTORY_LOSS_GRAIN,
            [&](std::int64_t t, std::int64_t threads) {
                return balanced(a.starts, batch, t, threads);
            },
            [&](std::int64_t begin, std::int64_t end) { kernels.backward_rows(&a, begin, end); });
    }
    if (a.d_weight || a.d_bias) {
        const Buckets by_column = make_buckets(a.cols, flags, cells, items);
        a.order = by_column.order.get();
        a.starts = by_column.starts.get();
        parallel_ranges(
            num_threads, a.d_weight && (cells + items) * a.features >= HISTORY_LOSS_GRAIN,
            [&](std::int64_t t, std::int64_t threads) {
                return balanced(a.starts, items, t, threads);
            },
            [&](std::int64_t begin, std::int64_t end) {
                kernels.backward_columns(&a, begin, end);
            });
    }
}

py::tuple history_cells(const py::object& sequence_, const py::object& num_items, double mask_ratio,
                        const py::object& seed_) {
    const py::array sequence = input<std::int64_t>(sequence_, "sequence", 2);
    const std::int64_t batch = sequence.shape(0), length = sequence.shape(1);
    const std::int64_t items = read_int64(num_items, "num_items");
    const std::uint64_t seed = static_cast<std::uint64_t>(read_int64(seed_, "seed"));
    const std::int64_t limit = std::int64_t{1} << 62;
    if (items < 1 || (batch > 0 && items > limit / batch)) {
        throw py::value_error("num_items must be at least 1 and at most 2**62 / B, got " +
                              std::to_string(items));
    }
    if (!(mask_ratio >= 0.0 &&
          mask_ratio * static_cast<double>(sequence.size()) < static_cast<double>(limit))) {
        throw py::value_error("mask_ratio must be at least 0 and below 2**62 / (B L), got " +
                              text(py::float_(mask_ratio)));
    }
    const StreamKernels& kernels = FMREC_TABLE(stream);
    HistoryCells cells;
    {
        py::gil_scoped_release release;
        cells = draw_history_cells(data<std::int64_t>(sequence), batch, length, items, mask_ratio,
                                   kernels.words, seed);
    }
    py::array_t<std::int64_t> rows(cells.count()), cols(cells.count());
    py::array_t<float> label(cells.count());
    write_history_cells(cells, items, rows.mutable_data(), cols.mutable_data(),
                        label.mutable_data());
    return py::make_tuple(rows, cols, label);
}

}  // namespace

void bind_history_loss(py::module_& m) {
    m.def("history_cells", &history_cells, py::arg("sequence"), py::arg("num_items"),
          py::arg("mask_ratio"), py::arg("seed"),
          "(rows, cols, label) of the cells in use: the ones of the ids in sequence [B, L], and "
          "zeros drawn by the words of seed.");
    m.def("history_loss_forward", &history_loss_forward, py::arg("hidden"), py::arg("weight"),
          py::arg("bias"), py::arg("rows"), py::arg("cols"), py::arg("label"), py::arg("use"),
          py::arg("residual"), py::arg("num_threads"),
          "residual = where(use, (hidden[rows] * weight[cols]).sum(1) + bias[cols] - label, 0).");
    m.def("history_loss_backward", &history_loss_backward, py::arg("hidden"), py::arg("weight"),
          py::arg("rows"), py::arg("cols"), py::arg("g"), py::arg("use"),
          py::arg("d_hidden").none(true), py::arg("d_weight").none(true),
          py::arg("d_bias").none(true), py::arg("num_threads"),
          "Adjoint of the residuals: writes d_hidden, d_weight and d_bias.");
}

}  // namespace fmrec
