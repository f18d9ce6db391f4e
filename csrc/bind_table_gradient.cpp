#include "bindings.h"

#include <memory>
#include <stdexcept>
#include <vector>

#include "memory.h"
#include "parallel.h"
#include "table_gradient.h"

namespace fmrec {
namespace {

// Numbers below which a second thread costs more than it brings.
constexpr std::int64_t TABLE_GRADIENT_GRAIN = 1 << 16;
// Lookups of one row that are summed in one go. A row of more, as padding's is, is cut into pieces
// of as many, which threads share; so its sum is the same for any number of threads, and its
// rounding errors do not grow with every lookup.
constexpr std::int32_t PIECE = 256;

// The ids of one lookup, and the gradients [N, D] of what it gave.
struct Part {
    py::array ids, gradient;
};

struct Lookups {
    const std::int64_t* ids;
    const float* gradient;
    std::int64_t count;
};

// Sums of the rows [V], of the pieces of long rows, and what both read.
struct Plan {
    std::unique_ptr<const float*[]> sources;
    std::vector<std::int32_t> rows, pieces;
    Floats partial;  // [pieces, D]
};

Plan make_plan(const std::vector<Lookups>& parts, std::int64_t items, std::int64_t width,
               std::int64_t total) {
    const std::size_t size = static_cast<std::size_t>(items);
    std::vector<std::int32_t> next(size, 0), long_rows;
    for (const Lookups& part : parts) {
        for (std::int64_t i = 0; i < part.count; ++i) {
            const std::int64_t id = part.ids[i];
            if (id < 0 || id >= items) {
                throw std::invalid_argument("ids must satisfy 0 <= id < " + std::to_string(items) +
                                            ", got " + std::to_string(id));
            }
            ++next[static_cast<std::size_t>(id)];
        }
    }
    Plan plan;
    plan.rows.resize(size + 1);
    // From each row's count to the place of its first source; a long row's sources are its pieces.
    std::int32_t place = 0, pieces = 0;
    for (std::size_t row = 0; row < size; ++row) {
        plan.rows[row] = place;
        const std::int32_t count = next[row];
        if (count > PIECE) {
            long_rows.push_back(static_cast<std::int32_t>(row));
            place += (count + PIECE - 1) / PIECE;
            pieces += (count + PIECE - 1) / PIECE;
        } else {
            next[row] = place;
            place += count;
        }
    }
    plan.rows[size] = place;
    plan.sources.reset(new const float*[static_cast<std::size_t>(total + pieces)]);
    plan.partial = allocate_floats(pieces * width, false);
    // The lookups of the long rows lie behind all rows' sources.
    const float* partial = plan.partial.get();
    for (const std::int32_t row : long_rows) {
        const std::int32_t count = next[static_cast<std::size_t>(row)];
        const float** source = plan.sources.get() + plan.rows[static_cast<std::size_t>(row)];
        for (std::int32_t first = 0; first < count; first += PIECE) {
            plan.pieces.push_back(place + first);
            *source++ = partial;
            partial += width;
        }
        next[static_cast<std::size_t>(row)] = place;
        place += count;
    }
    plan.pieces.push_back(place);
    for (const Lookups& part : parts) {
        for (std::int64_t i = 0; i < part.count; ++i) {
            plan.sources[static_cast<std::size_t>(next[static_cast<std::size_t>(part.ids[i])]++)] =
                part.gradient + i * width;
        }
    }
    return plan;
}

void table_gradient(const py::list& ids, const py::list& gradients, const py::object& out_,
                    int num_threads) {
    py::array out = output<float>(out_, "out", 2);
    check_threads(num_threads);
    if (ids.size() != gradients.size()) {
        throw py::value_error("ids and gradients must be as many, got " +
                              std::to_string(ids.size()) + " and " +
                              std::to_string(gradients.size()));
    }
    const std::int64_t items = out.shape(0), width = out.shape(1);
    std::vector<Part> held;
    std::vector<Lookups> parts;
    std::int64_t total = 0;
    for (std::size_t i = 0; i < ids.size(); ++i) {
        const py::array part = input<std::int64_t>(ids[i], "ids", 1),
                        gradient = input<float>(gradients[i], "gradients", 2);
        check_shape(gradient, "gradients", "[N, D]", {part.shape(0), width});
        check_overlap(out, "out", gradient, "gradients", false);
        held.push_back({part, gradient});
        parts.push_back({data<std::int64_t>(part), data<float>(gradient), part.shape(0)});
        total += part.shape(0);
    }
    // Pieces are fewer than lookups.
    if (total >= INT32_MAX / 2 || items >= INT32_MAX) {
        throw py::value_error("lookups must number below 2**30 and rows below 2**31 - 1, got " +
                              std::to_string(total) + " and " + std::to_string(items));
    }
    const TableGradientKernels& kernels = FMREC_TABLE(table_gradient);
    float* const to = target(out);
    py::gil_scoped_release release;
    const Plan plan = make_plan(parts, items, width, total);
    const std::int64_t pieces = static_cast<std::int64_t>(plan.pieces.size()) - 1;
    const RowSums of_pieces{plan.sources.get(), plan.pieces.data(), plan.partial.get(), width};
    parallel_items(num_threads, pieces, pieces * PIECE * width >= TABLE_GRADIENT_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) {
                       kernels.sums(&of_pieces, begin, end);
                   });
    const RowSums of_rows{plan.sources.get(), plan.rows.data(), to, width};
    parallel_ranges(
        num_threads, (plan.rows.back() + items) * width >= TABLE_GRADIENT_GRAIN,
        [&](std::int64_t t, std::int64_t threads) {
            return balanced(plan.rows.data(), items, t, threads);
        },
        [&](std::int64_t begin, std::int64_t end) { kernels.sums(&of_rows, begin, end); });
}

}  // namespace

void bind_table_gradient(py::module_& m) {
    m.def("table_gradient", &table_gradient, py::arg("ids"), py::arg("gradients"), py::arg("out"),
          py::arg("num_threads"),
          "out [V, D] = zeros with each of the gradients [N, D] added to the rows of its ids [N].");
}

}  // namespace fmrec
