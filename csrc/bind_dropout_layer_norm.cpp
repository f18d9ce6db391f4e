#include "bindings.h"

#include <atomic>

#include "dropout_layer_norm.h"
#include "memory.h"
#include "parallel.h"

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t NORM_GRAIN = 1 << 15;

DropoutLayerNorm common(const py::array& x, const py::array& weight, double p) {
    const DropoutRate rate = dropout_rate(p);
    DropoutLayerNorm a{};
    a.batch = x.shape(0);
    a.positions = x.shape(1);
    a.width = x.shape(2);
    check_width(a.width, "D");
    check_shape(weight, "weight", "[D]", {a.width});
    a.x = data<float>(x);
    a.weight = data<float>(weight);
    a.threshold = rate.threshold;
    a.scale = rate.scale;
    return a;
}

std::int64_t items(const DropoutLayerNorm& a) {
    return (a.batch * a.positions + DROPOUT_NORM_ROWS - 1) / DROPOUT_NORM_ROWS;
}

bool worth_it(const DropoutLayerNorm& a) { return a.batch * a.positions * a.width >= NORM_GRAIN; }

const char* const NORM_KEPT = "[B, P, ceil(D / 64)]";

void dropout_layer_norm_forward(const py::object& x_, const py::object& weight_,
                                const py::object& bias_, const py::object& rows_,
                                const py::object& seed, const py::object& site,
                                const py::object& position_offset,
                                const py::object& position_stride, double p,
                                const py::object& kept_, const py::object& out_,
                                int num_threads) {
    const py::array x = input<float>(x_, "x", 3), weight = input<float>(weight_, "weight", 1);
    const py::array bias = input<float>(bias_, "bias", 1);
    const py::array rows = input<std::int64_t>(rows_, "rows", 1);
    py::array out = output<float>(out_, "out", 3);
    check_threads(num_threads);
    DropoutLayerNorm a = common(x, weight, p);
    check_shape(bias, "bias", "[D]", {a.width});
    check_shape(rows, "rows", "[B]", {a.batch});
    check_shape(out, "out", "[B, P, D]", {a.batch, a.positions, a.width});
    check_overlap(out, "out", x, "x", false);
    const MaskWords kept =
        masks_to_write(kept_, p, NORM_KEPT, {a.batch, a.positions, norm_mask_words(a.width)}, x,
                       out);
    a.kept = kept.words;
    a.bias = data<float>(bias);
    a.rows = data<std::int64_t>(rows);
    a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    a.site = static_cast<std::uint32_t>(read_int64(site, "site"));
    a.position_offset = static_cast<std::uint64_t>(read_int64(position_offset, "position_offset"));
    a.position_stride = static_cast<std::uint64_t>(read_int64(position_stride, "position_stride"));
    const DropoutLayerNormKernels& kernels = FMREC_TABLE(dropout_layer_norm);
    if (is_empty(out)) return;
    a.out = target(out);
    py::gil_scoped_release release;
    prefer_huge_pages(a.out, a.batch * a.positions * a.width * 4);
    const std::int64_t slab = kernels.scratch(&a);
    const Floats memory = allocate_floats(num_threads * slab, false);
    std::atomic<std::int64_t> next_slab{0};
    parallel_items(num_threads, items(a), worth_it(a), [&](std::int64_t begin, std::int64_t end) {
        kernels.forward(&a, begin, end, memory.get() + next_slab.fetch_add(1) * slab);
    });
}

void dropout_layer_norm_backward(const py::object& grad_, const py::object& x_,
                                 const py::object& weight_, double p, const py::object& kept_,
                                 const py::object& d_x_, const py::object& d_weight_,
                                 const py::object& d_bias_, int num_threads) {
    const py::array x = input<float>(x_, "x", 3), weight = input<float>(weight_, "weight", 1);
    const py::array grad = input<float>(grad_, "grad", 3);
    py::array d_x = output<float>(d_x_, "d_x", 3);
    py::array d_weight = output<float>(d_weight_, "d_weight", 1);
    py::array d_bias = output<float>(d_bias_, "d_bias", 1);
    check_threads(num_threads);
    DropoutLayerNorm a = common(x, weight, p);
    check_shape(grad, "grad", "[B, P, D]", {a.batch, a.positions, a.width});
    check_shape(d_x, "d_x", "[B, P, D]", {a.batch, a.positions, a.width});
    check_shape(d_weight, "d_weight", "[D]", {a.width});
    check_shape(d_bias, "d_bias", "[D]", {a.width});
    check_overlap(d_x, "d_x", grad, "grad", false);
    check_overlap(d_x, "d_x", x, "x", false);
    const MaskWords kept =
        masks_to_read(kept_, p, NORM_KEPT, {a.batch, a.positions, norm_mask_words(a.width)});
    a.kept = kept.words;
    const DropoutLayerNormKernels& kernels = FMREC_TABLE(dropout_layer_norm);
    a.grad = data<float>(grad);
    a.out = target(d_x);
    float *const to_weight = target(d_weight), *const to_bias = target(d_bias);
    py::gil_scoped_release release;
    a.parts = items(a) < DROPOUT_NORM_PARTS ? items(a) : DROPOUT_NORM_PARTS;
    const Floats partial = allocate_floats((a.parts > 0 ? a.parts : 1) * 2 * a.width, true);
    a.partial = partial.get();
    if (a.parts > 0) {
        prefer_huge_pages(a.out, a.batch * a.positions * a.width * 4);
        const std::int64_t slab = kernels.scratch(&a);
        const Floats memory = allocate_floats(a.parts * slab, false);
        parallel_items(num_threads, a.parts, worth_it(a),
                       [&](std::int64_t begin, std::int64_t end) {
                           kernels.backward(&a, begin, end, memory.get() + begin * slab);
                       });
    }
    add_parts(a.partial, a.parts, 2 * a.width, num_threads);
    for (std::int64_t j = 0; j < a.width; ++j) {
        to_weight[j] = a.partial[j];
        to_bias[j] = a.partial[a.width + j];
    }
}

}  // namespace

void bind_dropout_layer_norm(py::module_& m) {
    m.def("dropout_layer_norm_forward", &dropout_layer_norm_forward, py::arg("x"),
          py::arg("weight"), py::arg("bias"), py::arg("rows"), py::arg("seed"), py::arg("site"),
          py::arg("position_offset"), py::arg("position_stride"), py::arg("p"),
          py::arg("kept").none(true), py::arg("out"), py::arg("num_threads"),
          "out = norm(drop(x)) * weight + bias, the norm of D channels with eps 1e-12; kept gets "
          "the masks, a bit a channel.");
    m.def("dropout_layer_norm_backward", &dropout_layer_norm_backward, py::arg("grad"),
          py::arg("x"), py::arg("weight"), py::arg("p"), py::arg("kept").none(true),
          py::arg("d_x"), py::arg("d_weight"), py::arg("d_bias"), py::arg("num_threads"),
          "Adjoint of dropout_layer_norm_forward in x, weight and bias.");
}

}  // namespace fmrec
