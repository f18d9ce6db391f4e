#include "bindings.h"

#include "memory.h"
#include "parallel.h"
#include "rms_norm.h"

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t RMS_NORM_GRAIN = 1 << 15;

py::array like(const py::array& array, const char* name, const py::array& x) {
    check_shape(array, name, "[M, D]", {x.shape(0), x.shape(1)});
    return array;
}

// An output apart from all of `inputs`.
float* apart(py::array& out, const char* name,
             std::initializer_list<std::pair<const py::array*, const char*>> inputs) {
    for (const auto& in : inputs) check_overlap(out, name, *in.first, in.second, false);
    return target(out);
}

// x, weight and, where there are tangents, dx.
RmsNorm common(const py::array& x, const py::array& weight, const py::array* dx) {
    if (x.shape(1) < 1) {
        throw py::value_error("x must have at least one channel, got shape " +
                              text(x.attr("shape")));
    }
    check_shape(weight, "weight", "[D]", {x.shape(1)});
    RmsNorm n{};
    n.rows = x.shape(0);
    n.channels = x.shape(1);
    n.x = data<float>(x);
    n.weight = data<float>(weight);
    n.dx = dx ? data<float>(*dx) : nullptr;
    return n;
}

void together(const py::object& a, const py::object& b, const char* names) {
    if (a.is_none() != b.is_none()) {
        throw py::value_error(std::string(names) + " must be given together, got one of them");
    }
}

void rms_norm_forward(const py::object& x_, const py::object& weight_, const py::object& out_,
                      int num_threads, const py::object& dx_, const py::object& d_out_) {
    const py::array x = input<float>(x_, "x", 2), weight = input<float>(weight_, "weight", 1);
    py::array out = like(output<float>(out_, "out", 2), "out", x), dx, d_out;
    check_threads(num_threads);
    together(dx_, d_out_, "dx and d_out");
    const bool tangent = !dx_.is_none();
    if (tangent) {
        dx = like(input<float>(dx_, "dx", 2), "dx", x);
        d_out = like(output<float>(d_out_, "d_out", 2), "d_out", x);
    }
    RmsNorm n = common(x, weight, tangent ? &dx : nullptr);
    n.out = apart(out, "out", {{&x, "x"}, {&weight, "weight"}});
    if (tangent) {
        check_overlap(out, "out", dx, "dx", false);
        n.d_out = apart(d_out, "d_out",
                        {{&x, "x"}, {&weight, "weight"}, {&dx, "dx"}, {&out, "out"}});
    }
    const RmsNormKernels& kernels = FMREC_TABLE(rms_norm);
    py::gil_scoped_release release;
    parallel_items(num_threads, n.rows, n.rows * n.channels >= RMS_NORM_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { kernels.forward(&n, begin, end); });
}

void rms_norm_backward(const py::object& grad_, const py::object& x_, const py::object& weight_,
                       const py::object& g_x_, const py::object& g_weight_, int num_threads,
                       const py::object& d_grad_, const py::object& dx_,
                       const py::object& g_dx_) {
    const py::array x = input<float>(x_, "x", 2), weight = input<float>(weight_, "weight", 1);
    const py::array grad = like(input<float>(grad_, "grad", 2), "grad", x);
    py::array g_x = like(output<float>(g_x_, "g_x", 2), "g_x", x), dx, d_grad, g_dx;
    py::array g_weight = output<float>(g_weight_, "g_weight", 1);
    check_shape(g_weight, "g_weight", "[D]", {x.shape(1)});
    check_threads(num_threads);
    together(d_grad_, dx_, "d_grad and dx");
    together(dx_, g_dx_, "dx and g_dx");
    const bool tangent = !dx_.is_none();
    if (tangent) {
        dx = like(input<float>(dx_, "dx", 2), "dx", x);
        d_grad = like(input<float>(d_grad_, "d_grad", 2), "d_grad", x);
        g_dx = like(output<float>(g_dx_, "g_dx", 2), "g_dx", x);
    }
    RmsNorm n = common(x, weight, tangent ? &dx : nullptr);
    n.grad = data<float>(grad);
    n.out = apart(g_x, "g_x", {{&x, "x"}, {&weight, "weight"}, {&grad, "grad"}});
    float* const of_weight = apart(g_weight, "g_weight", {{&weight, "weight"}});
    if (tangent) {
        check_overlap(g_x, "g_x", dx, "dx", false);
        check_overlap(g_x, "g_x", d_grad, "d_grad", false);
        n.d_grad = data<float>(d_grad);
        n.d_out = apart(g_dx, "g_dx",
                        {{&x, "x"}, {&weight, "weight"}, {&grad, "grad"}, {&dx, "dx"},
                         {&d_grad, "d_grad"}, {&g_x, "g_x"}});
    }
    const RmsNormKernels& kernels = FMREC_TABLE(rms_norm);
    py::gil_scoped_release release;
    const Floats partial = allocate_floats(RMS_PARTS * 2 * n.channels, true);
    n.partial = partial.get();
    parallel_items(num_threads, RMS_PARTS, n.rows * n.channels >= RMS_NORM_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { kernels.backward(&n, begin, end); });
    for (std::int64_t j = 0; j < n.channels; ++j) {
        float sum = 0.0f;
        for (std::int64_t part = 0; part < RMS_PARTS; ++part) {
            sum += n.partial[2 * part * n.channels + j];
        }
        of_weight[j] = sum;
    }
}

}  // namespace

void bind_rms_norm(py::module_& m) {
    m.def("rms_norm_forward", &rms_norm_forward, py::arg("x"), py::arg("weight"), py::arg("out"),
          py::arg("num_threads"), py::arg("dx").none(true) = py::none(),
          py::arg("d_out").none(true) = py::none(),
          "out = x / sqrt(mean(x^2) + 1e-8) * weight, and with dx d_out, the derivative along it.");
    m.def("rms_norm_backward", &rms_norm_backward, py::arg("grad"), py::arg("x"),
          py::arg("weight"), py::arg("g_x"), py::arg("g_weight"), py::arg("num_threads"),
          py::arg("d_grad").none(true) = py::none(), py::arg("dx").none(true) = py::none(),
          py::arg("g_dx").none(true) = py::none(),
          "Adjoint of rms_norm_forward, for the gradients of out and d_out.");
}

}  // namespace fmrec
