#include "bind_encoder.h"
#include "picard_sweep.h"
#include "sequence_groups.h"

namespace fmrec {
namespace {

void picard_sweep(const PackedEncoder& packed, const py::object& norm_weight,
                  const py::object& norm_bias, const py::object& e, const py::object& mask,
                  const py::object& x_, const py::object& taus, const py::object& noise,
                  const py::object& rows, const py::object& seed, double delta,
                  const py::object& out_, int num_threads, bool tied) {
    check_threads(num_threads);
    PicardSweep a{};
    py::array out = output<float>(out_, "out", 3);
    const py::array x = input<float>(x_, "x", 3);
    const NetworkArrays kept = sampler_network(a, packed, norm_weight, norm_bias, e, mask, taus,
                                               noise, rows, seed, delta, out);
    check_shape(x, "x", "[B, q, D]", {a.batch, a.steps, packed.channels()});
    check_shape(out, "out", "[B, q, D]", {a.batch, a.steps, packed.channels()});
    check_overlap(out, "out", x, "x", true);
    const PicardSweepKernels& kernels = FMREC_TABLE(picard_sweep);
    if (is_empty(out)) return;
    a.x = data<float>(x);
    a.out = target(out);
    py::gil_scoped_release release;
    run_sequences(kernels, a, a.steps, tied, num_threads);
}

}  // namespace

void bind_picard_sweep(py::module_& m) {
    m.def("picard_sweep", &picard_sweep, py::arg("packed"), py::arg("norm_weight"),
          py::arg("norm_bias"), py::arg("e"), py::arg("mask"), py::arg("x"), py::arg("taus"),
          py::arg("noise").none(true), py::arg("rows").none(true), py::arg("seed").none(true),
          py::arg("delta"), py::arg("out"), py::arg("num_threads"), py::arg("tied") = false,
          "The network at all points x [B, q, D]: row b at step i. out may be x.");
}

}  // namespace fmrec
