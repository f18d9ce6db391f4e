#include "bindings.h"

#include "noise_fusion.h"
#include "parallel.h"

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t NOISE_GRAIN = 1 << 14;

void noise_common(NoiseFusion& a, const py::array& full, const py::array& rows,
                  const py::object& seed, const py::object& step, double delta) {
    check_shape(rows, "rows", "[B]", {full.shape(0)});
    a.rows = data<std::int64_t>(rows);
    a.batch = full.shape(0);
    a.length = full.shape(1);
    a.channels = full.shape(2);
    a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    a.step = static_cast<std::uint32_t>(read_int64(step, "step"));
    a.delta = static_cast<float>(delta);
}

void noise_fusion_forward(const py::object& e_, const py::object& shift_, const py::object& rows_,
                          const py::object& seed, const py::object& step, double delta,
                          const py::object& out_, int num_threads) {
    const py::array e = input<float>(e_, "e", 3), shift = input<float>(shift_, "shift", 2),
                    rows = input<std::int64_t>(rows_, "rows", 1);
    py::array out = output<float>(out_, "out", 3);
    check_threads(num_threads);
    NoiseFusion a{};
    noise_common(a, e, rows, seed, step, delta);
    check_shape(shift, "shift", "[B, D]", {a.batch, a.channels});
    check_shape(out, "out", "[B, L, D]", {a.batch, a.length, a.channels});
    check_overlap(out, "out", e, "e", true);
    check_overlap(out, "out", shift, "shift", false);
    const NoiseFusionKernels& kernels = FMREC_TABLE(noise_fusion);
    if (is_empty(out)) return;
    a.input = data<float>(e);
    a.shift = data<float>(shift);
    a.out = target(out);
    py::gil_scoped_release release;
    parallel_items(num_threads, kernels.chunks(&a), a.batch * a.length * a.channels >= NOISE_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { kernels.forward(&a, begin, end); });
}

void noise_lambda(const py::object& rows_, const py::object& seed, const py::object& step,
                  double delta, const py::object& out_, int num_threads) {
    const py::array rows = input<std::int64_t>(rows_, "rows", 1);
    py::array out = output<float>(out_, "out", 3);
    check_threads(num_threads);
    NoiseFusion a{};
    noise_common(a, out, rows, seed, step, delta);
    const NoiseFusionKernels& kernels = FMREC_TABLE(noise_fusion);
    if (is_empty(out)) return;
    a.out = target(out);
    py::gil_scoped_release release;
    parallel_items(num_threads, kernels.chunks(&a), a.batch * a.length * a.channels >= NOISE_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { kernels.lam(&a, begin, end); });
}

void noise_fusion_backward(const py::object& grad_, const py::object& rows_, const py::object& seed,
                           const py::object& step, double delta, const py::object& d_shift_,
                           int num_threads) {
    const py::array grad = input<float>(grad_, "grad", 3),
                    rows = input<std::int64_t>(rows_, "rows", 1);
    py::array d_shift = output<float>(d_shift_, "d_shift", 2);
    check_threads(num_threads);
    NoiseFusion a{};
    noise_common(a, grad, rows, seed, step, delta);
    check_shape(d_shift, "d_shift", "[B, D]", {a.batch, a.channels});
    check_overlap(d_shift, "d_shift", grad, "grad", false);
    const NoiseFusionKernels& kernels = FMREC_TABLE(noise_fusion);
    if (is_empty(d_shift)) return;
    a.input = data<float>(grad);
    a.out = target(d_shift);
    py::gil_scoped_release release;
    parallel_items(num_threads, a.batch, a.batch * a.length * a.channels >= NOISE_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { kernels.backward(&a, begin, end); });
}

}  // namespace

void bind_noise_fusion(py::module_& m) {
    m.def("noise_fusion_forward", &noise_fusion_forward, py::arg("e"), py::arg("shift"),
          py::arg("rows"), py::arg("seed"), py::arg("step"), py::arg("delta"), py::arg("out"),
          py::arg("num_threads"),
          "out = e + lam * shift[:, None, :], lam of the noise stream. out may be e.");
    m.def("noise_fusion_backward", &noise_fusion_backward, py::arg("grad"), py::arg("rows"),
          py::arg("seed"), py::arg("step"), py::arg("delta"), py::arg("d_shift"),
          py::arg("num_threads"), "d_shift = (lam * grad).sum(1), lam regenerated.");
    m.def("noise_lambda", &noise_lambda, py::arg("rows"), py::arg("seed"), py::arg("step"),
          py::arg("delta"), py::arg("out"), py::arg("num_threads"), "out = lam.");
}

}  // namespace fmrec
