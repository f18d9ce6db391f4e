#include "bind_encoder.h"
#include "euler_sampler.h"
#include "sequence_groups.h"

namespace fmrec {
namespace {

void euler_sampler(const PackedEncoder& packed, const py::object& norm_weight,
                   const py::object& norm_bias, const py::object& e, const py::object& mask,
                   const py::object& z0_, const py::object& taus, const py::object& noise,
                   const py::object& rows, const py::object& seed, double delta,
                   const py::object& out_, int num_threads, bool tied, bool velocity) {
    check_threads(num_threads);
    EulerSampler a{};
    // All points, or the last one, by the number of dimensions.
    a.trajectory = py::isinstance<py::array>(out_) && py::cast<py::array>(out_).ndim() == 3;
    py::array out = output<float>(out_, "out", a.trajectory ? 3 : 2);
    const py::array z0 = input<float>(z0_, "z0", 2);
    const NetworkArrays kept = sampler_network(a, packed, norm_weight, norm_bias, e, mask, taus,
                                               noise, rows, seed, delta, out);
    const std::int64_t channels = packed.channels();
    check_shape(z0, "z0", "[B, D]", {a.batch, channels});
    check_overlap(out, "out", z0, "z0", false);
    if (a.trajectory) {
        check_shape(out, "out", "[q + 1, B, D]", {a.steps + 1, a.batch, channels});
    } else {
        check_shape(out, "out", "[B, D]", {a.batch, channels});
    }
    const EulerSamplerKernels& kernels = FMREC_TABLE(euler_sampler);
    if (is_empty(out)) return;
    a.z0 = data<float>(z0);
    a.out = target(out);
    a.velocity = velocity;
    py::gil_scoped_release release;
    run_sequences(kernels, a, 1, tied, num_threads);
}

}  // namespace

void bind_euler_sampler(py::module_& m) {
    m.def("euler_sampler", &euler_sampler, py::arg("packed"), py::arg("norm_weight"),
          py::arg("norm_bias"), py::arg("e"), py::arg("mask"), py::arg("z0"), py::arg("taus"),
          py::arg("noise").none(true), py::arg("rows").none(true), py::arg("seed").none(true),
          py::arg("delta"), py::arg("out"), py::arg("num_threads"), py::arg("tied") = false,
          py::arg("velocity") = false,
          "q Euler steps from z0: the last point [B, D] or all of them [q + 1, B, D].");
}

}  // namespace fmrec
