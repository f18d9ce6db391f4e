#include "bindings.h"

#include "dropout.h"
#include "parallel.h"

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t GRAIN = 1 << 15;

void dropout(const py::object& x_, const py::object& residual_, const py::object& rows_,
             const py::object& seed, const py::object& site, const py::object& position_offset,
             const py::object& position_stride, double p, const py::object& out_,
             int num_threads, bool gelu, const py::object& gelu_at_, const py::object& times_) {
    const py::array x = input<float>(x_, "x", 3), rows = input<std::int64_t>(rows_, "rows", 1);
    py::array out = output<float>(out_, "out", 3);
    check_threads(num_threads);
    const DropoutRate rate = dropout_rate(p);
    Dropout a{};
    a.batch = x.shape(0);
    a.positions = x.shape(1);
    a.channels = x.shape(2);
    check_shape(rows, "rows", "[B]", {a.batch});
    check_shape(out, "out", "[B, P, C]", {a.batch, a.positions, a.channels});
    check_overlap(out, "out", x, "x", true);
    py::array residual;
    if (!residual_.is_none()) {
        residual = input<float>(residual_, "residual", 3);
        check_shape(residual, "residual", "[B, P, C]", {a.batch, a.positions, a.channels});
        check_overlap(out, "out", residual, "residual", true);
        a.residual = data<float>(residual);
    }
    py::array gelu_at;
    if (!gelu_at_.is_none()) {
        gelu_at = input<float>(gelu_at_, "gelu_at", 3);
        check_shape(gelu_at, "gelu_at", "[B, P, C]", {a.batch, a.positions, a.channels});
        check_overlap(out, "out", gelu_at, "gelu_at", true);
        a.gelu_at = data<float>(gelu_at);
    }
    py::array times;
    if (!times_.is_none()) {
        if (gelu_at_.is_none()) throw py::value_error("times needs gelu_at, got None");
        times = input<float>(times_, "times", 3);
        check_shape(times, "times", "[B, P, C]", {a.batch, a.positions, a.channels});
        check_overlap(out, "out", times, "times", true);
        a.times = data<float>(times);
    }
    a.gelu = gelu;
    a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    a.site = static_cast<std::uint32_t>(read_int64(site, "site"));
    a.position_offset = static_cast<std::uint64_t>(read_int64(position_offset, "position_offset"));
    a.position_stride = static_cast<std::uint64_t>(read_int64(position_stride, "position_stride"));
    a.threshold = rate.threshold;
    a.scale = rate.scale;
    const DropoutKernels& kernels = FMREC_TABLE(dropout);
    if (is_empty(out)) return;
    a.x = data<float>(x);
    a.rows = data<std::int64_t>(rows);
    a.out = target(out);
    py::gil_scoped_release release;
    parallel_items(num_threads, kernels.chunks(&a),
                   a.batch * a.positions * a.channels >= GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { kernels.apply(&a, begin, end); });
}

}  // namespace

void bind_dropout(py::module_& m) {
    m.def("dropout", &dropout, py::arg("x"), py::arg("residual").none(true), py::arg("rows"),
          py::arg("seed"), py::arg("site"), py::arg("position_offset"),
          py::arg("position_stride"), py::arg("p"), py::arg("out"), py::arg("num_threads"),
          py::arg("gelu") = false, py::arg("gelu_at").none(true) = py::none(),
          py::arg("times").none(true) = py::none(),
          "out = residual + where(word >= round(p * 2**32), f(x) / (1 - p), 0), f the identity, "
          "tanh-GELU (gelu), x * gelu'(gelu_at), or x * times * gelu''(gelu_at). out may be x.");
}

}  // namespace fmrec
