#include "bindings.h"

#include "dropout.h"
#include "parallel.h"

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t DROPOUT_GRAIN = 1 << 15;

void dropout(const py::object& x_, const py::object& residual_, const py::object& rows_,
             const py::object& seed, const py::object& site, const py::object& position_offset,
             const py::object& position_stride, double p, const py::object& out_,
             int num_threads, bool gelu, const py::object& gelu_at_, const py::object& dx_,
             const py::object& d_grad_, const py::object& d_out_, const py::object& row_scale_) {
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
    py::array dx, d_grad, d_out;
    if (dx_.is_none() != d_out_.is_none()) {
        throw py::value_error("dx and d_out must be given together, got one of them");
    }
    if (d_grad_.is_none() != (dx_.is_none() || gelu_at_.is_none())) {
        throw py::value_error("d_grad must be given with dx and gelu_at, and only with both");
    }
    if (!dx_.is_none()) {
        if (!residual_.is_none() || gelu == !gelu_at_.is_none()) {
            throw py::value_error("dx needs gelu or gelu_at, and no residual");
        }
        dx = input<float>(dx_, "dx", 3);
        check_shape(dx, "dx", "[B, P, C]", {a.batch, a.positions, a.channels});
        check_overlap(out, "out", dx, "dx", false);
        if (!d_grad_.is_none()) {
            d_grad = input<float>(d_grad_, "d_grad", 3);
            check_shape(d_grad, "d_grad", "[B, P, C]", {a.batch, a.positions, a.channels});
            check_overlap(out, "out", d_grad, "d_grad", false);
            a.d_grad = data<float>(d_grad);
        }
        d_out = output<float>(d_out_, "d_out", 3);
        check_shape(d_out, "d_out", "[B, P, C]", {a.batch, a.positions, a.channels});
        check_overlap(d_out, "d_out", out, "out", false);
        check_overlap(d_out, "d_out", x, "x", false);
        check_overlap(d_out, "d_out", dx, "dx", true);
        if (a.gelu_at) check_overlap(d_out, "d_out", gelu_at, "gelu_at", false);
        if (a.d_grad) check_overlap(d_out, "d_out", d_grad, "d_grad", true);
        a.dx = data<float>(dx);
        a.d_out = target(d_out);
    }
    py::array row_scale;
    if (!row_scale_.is_none()) {
        row_scale = input<float>(row_scale_, "row_scale", 1);
        check_shape(row_scale, "row_scale", "[B]", {a.batch});
        check_overlap(out, "out", row_scale, "row_scale", false);
        a.row_scale = data<float>(row_scale);
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
                   a.batch * a.positions * a.channels >= DROPOUT_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { kernels.apply(&a, begin, end); });
}

}  // namespace

void bind_dropout(py::module_& m) {
    m.def("dropout", &dropout, py::arg("x"), py::arg("residual").none(true), py::arg("rows"),
          py::arg("seed"), py::arg("site"), py::arg("position_offset"),
          py::arg("position_stride"), py::arg("p"), py::arg("out"), py::arg("num_threads"),
          py::arg("gelu") = false, py::arg("gelu_at").none(true) = py::none(),
          py::arg("dx").none(true) = py::none(), py::arg("d_grad").none(true) = py::none(),
          py::arg("d_out").none(true) = py::none(),
          py::arg("row_scale").none(true) = py::none(),
          "out = residual + where(word >= round(p * 2**32), f(x) / (1 - p), 0), f the identity, "
          "tanh-GELU (gelu) or x * gelu'(gelu_at). With dx also d_out, the derivative of the "
          "dropped tanh-GELU along it; with gelu_at and d_grad the adjoint of both: the gradients "
          "of the point gelu_at and of dx, from x and d_grad. All but the residual is multiplied by "
          "the row's row_scale [B] where it is given. out may be x.");
}

}  // namespace fmrec
