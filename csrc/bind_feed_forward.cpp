#include "bindings.h"

#include <atomic>

#include "feed_forward.h"
#include "memory.h"
#include "parallel.h"

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t FEED_FORWARD_GRAIN = 1 << 20;

// The arrays that both directions read; they hold the memory while the kernels run.
struct FeedForwardInputs {
    py::array x, norm_weight, norm_bias, w1, b1, w2;
};

void feed_forward_common(FeedForward& a, const FeedForwardInputs& in, double p) {
    const DropoutRate rate = dropout_rate(p);
    a.batch = in.x.shape(0);
    a.positions = in.x.shape(1);
    a.width = in.x.shape(2);
    a.inner = in.w1.shape(0);
    check_width(a.width, "D");
    check_width(a.inner, "F");
    check_shape(in.norm_weight, "norm_weight", "[D]", {a.width});
    check_shape(in.norm_bias, "norm_bias", "[D]", {a.width});
    check_shape(in.w1, "w1", "[F, D]", {a.inner, a.width});
    check_shape(in.b1, "b1", "[F]", {a.inner});
    check_shape(in.w2, "w2", "[D, F]", {a.width, a.inner});
    a.x = data<float>(in.x);
    a.norm_weight = data<float>(in.norm_weight);
    a.norm_bias = data<float>(in.norm_bias);
    a.w1 = data<float>(in.w1);
    a.b1 = data<float>(in.b1);
    a.w2 = data<float>(in.w2);
    a.threshold = rate.threshold;
    a.scale = rate.scale;
}

const FeedForwardKernels& feed_forward_kernels(const FeedForward& a, const std::string& precision) {
    const int planes = training_planes_of(precision);
    const bool fp16 = isa() == Isa::amx_fp16;
    if (planes == 1) return FMREC_TABLE(feed_forward_bf16);
    if (planes == 2) {
        return fp16 ? FMREC_TABLE(feed_forward_tf32_fp16) : FMREC_TABLE(feed_forward_tf32);
    }
    if (fp16) return FMREC_TABLE(feed_forward_float32_fp16);
    const bool bytes = isa() == Isa::amx && no_outliers(a.w1, a.inner, a.width) &&
                       no_outliers(a.w2, a.width, a.inner);
    return bytes ? FMREC_TABLE(feed_forward_float32_int8) : FMREC_TABLE(feed_forward);
}

bool worth_it(const FeedForward& a) {
    return a.batch * a.positions * a.width * a.inner >= FEED_FORWARD_GRAIN;
}

const char* const FEED_FORWARD_KEPT = "[B, P, ceil((F + 2 D) / 64)]";

void feed_forward_forward(const py::object& x_, const py::object& norm_weight_,
                          const py::object& norm_bias_, const py::object& w1_,
                          const py::object& b1_, const py::object& w2_, const py::object& b2_,
                          const py::object& rows_, const py::object& seed, const py::object& site,
                          const py::object& position_offset, const py::object& position_stride,
                          double p, const py::object& kept_, const py::object& out_,
                          int num_threads, const std::string& precision) {
    const FeedForwardInputs in{
        input<float>(x_, "x", 3),                 input<float>(norm_weight_, "norm_weight", 1),
        input<float>(norm_bias_, "norm_bias", 1), input<float>(w1_, "w1", 2),
        input<float>(b1_, "b1", 1),               input<float>(w2_, "w2", 2)};
    const py::array b2 = input<float>(b2_, "b2", 1), rows = input<std::int64_t>(rows_, "rows", 1);
    py::array out = output<float>(out_, "out", 3);
    check_threads(num_threads);
    FeedForward a{};
    feed_forward_common(a, in, p);
    check_shape(b2, "b2", "[D]", {a.width});
    check_shape(rows, "rows", "[B]", {a.batch});
    check_shape(out, "out", "[B, P, D]", {a.batch, a.positions, a.width});
    check_overlap(out, "out", in.x, "x", false);
    const MaskWords kept =
        masks_to_write(kept_, p, FEED_FORWARD_KEPT,
                       {a.batch, a.positions, mask_words(a.width, a.inner)}, in.x, out);
    a.kept = kept.words;
    a.b2 = data<float>(b2);
    a.rows = data<std::int64_t>(rows);
    a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    a.site = static_cast<std::uint32_t>(read_int64(site, "site"));
    a.position_offset = static_cast<std::uint64_t>(read_int64(position_offset, "position_offset"));
    a.position_stride = static_cast<std::uint64_t>(read_int64(position_stride, "position_stride"));
    const FeedForwardKernels& kernels = feed_forward_kernels(a, precision);
    if (is_empty(out)) return;
    a.out = target(out);
    py::gil_scoped_release release;
    const Floats packed = allocate_floats(kernels.packed(&a), false);
    a.packed = packed.get();
    kernels.pack_forward(&a);
    prefer_huge_pages(a.out, a.batch * a.positions * a.width * 4);
    const std::int64_t slab = kernels.scratch(&a);
    const Floats memory = allocate_floats(num_threads * slab, false);
    const std::int64_t chunks =
        (a.batch * a.positions + FEED_FORWARD_ROWS - 1) / FEED_FORWARD_ROWS;
    std::atomic<std::int64_t> next_slab{0};
    parallel_items(num_threads, chunks, worth_it(a), [&](std::int64_t begin, std::int64_t end) {
        kernels.forward(&a, begin, end, memory.get() + next_slab.fetch_add(1) * slab);
    });
}

void feed_forward_backward(const py::object& grad_, const py::object& x_,
                           const py::object& norm_weight_, const py::object& norm_bias_,
                           const py::object& w1_, const py::object& b1_, const py::object& w2_,
                           double p, const py::object& kept_, const py::object& d_x_,
                           const py::object& d_norm_weight_, const py::object& d_norm_bias_,
                           const py::object& d_w1_, const py::object& d_b1_,
                           const py::object& d_w2_, const py::object& d_b2_, int num_threads,
                           const std::string& precision) {
    const FeedForwardInputs in{
        input<float>(x_, "x", 3),                 input<float>(norm_weight_, "norm_weight", 1),
        input<float>(norm_bias_, "norm_bias", 1), input<float>(w1_, "w1", 2),
        input<float>(b1_, "b1", 1),               input<float>(w2_, "w2", 2)};
    const py::array grad = input<float>(grad_, "grad", 3);
    py::array d_x = output<float>(d_x_, "d_x", 3);
    py::array d_norm_weight = output<float>(d_norm_weight_, "d_norm_weight", 1);
    py::array d_norm_bias = output<float>(d_norm_bias_, "d_norm_bias", 1);
    py::array d_w1 = output<float>(d_w1_, "d_w1", 2), d_b1 = output<float>(d_b1_, "d_b1", 1);
    py::array d_w2 = output<float>(d_w2_, "d_w2", 2), d_b2 = output<float>(d_b2_, "d_b2", 1);
    check_threads(num_threads);
    FeedForward a{};
    feed_forward_common(a, in, p);
    check_shape(grad, "grad", "[B, P, D]", {a.batch, a.positions, a.width});
    check_shape(d_x, "d_x", "[B, P, D]", {a.batch, a.positions, a.width});
    check_shape(d_norm_weight, "d_norm_weight", "[D]", {a.width});
    check_shape(d_norm_bias, "d_norm_bias", "[D]", {a.width});
    check_shape(d_w1, "d_w1", "[F, D]", {a.inner, a.width});
    check_shape(d_b1, "d_b1", "[F]", {a.inner});
    check_shape(d_w2, "d_w2", "[D, F]", {a.width, a.inner});
    check_shape(d_b2, "d_b2", "[D]", {a.width});
    check_overlap(d_x, "d_x", grad, "grad", false);
    check_overlap(d_x, "d_x", in.x, "x", false);
    const MaskWords kept =
        masks_to_read(kept_, p, FEED_FORWARD_KEPT,
                      {a.batch, a.positions, mask_words(a.width, a.inner)});
    a.kept = kept.words;
    const FeedForwardKernels& kernels = feed_forward_kernels(a, precision);
    a.grad = data<float>(grad);
    a.out = target(d_x);
    float* const sums_to[] = {target(d_b1), target(d_b2), target(d_norm_weight),
                              target(d_norm_bias)};
    float *const to_w1 = target(d_w1), *const to_w2 = target(d_w2);
    py::gil_scoped_release release;
    const std::int64_t chunks =
        (a.batch * a.positions + FEED_FORWARD_BACK_ROWS - 1) / FEED_FORWARD_BACK_ROWS;
    a.parts = chunks < FEED_FORWARD_PARTS ? chunks : FEED_FORWARD_PARTS;
    const std::int64_t part = feed_forward_partial(a.width, a.inner);
    const Floats partial = allocate_floats((a.parts > 0 ? a.parts : 1) * part, a.parts == 0);
    a.partial = partial.get();
    if (a.parts > 0) {
        const Floats packed = allocate_floats(kernels.packed(&a), false);
        a.packed = packed.get();
        kernels.pack_backward(&a);
        prefer_huge_pages(a.out, a.batch * a.positions * a.width * 4);
        const std::int64_t slab = kernels.scratch(&a);
        const Floats memory = allocate_floats(a.parts * slab, false);
        parallel_items(num_threads, a.parts, worth_it(a),
                       [&](std::int64_t begin, std::int64_t end) {
                           kernels.backward(&a, begin, end, memory.get() + begin * slab);
                       });
    }
    float* const total = partial.get();
    add_parts(total, a.parts, part, num_threads);
    const std::int64_t size = a.width * a.inner;
    for (std::int64_t f = 0; f < a.inner; f += FEED_FORWARD_BACK_PANEL) {
        const std::int64_t columns =
            a.inner - f < FEED_FORWARD_BACK_PANEL ? a.inner - f : FEED_FORWARD_BACK_PANEL;
        const float *const of_w1 = total + f * a.width, *const of_w2 = of_w1 + size;
        for (std::int64_t j = 0; j < columns; ++j) {
            float* to = to_w1 + (f + j) * a.width;
            for (std::int64_t d = 0; d < a.width; ++d) to[d] = of_w1[d * columns + j];
        }
        for (std::int64_t d = 0; d < a.width; ++d) {
            float* to = to_w2 + d * a.inner + f;
            for (std::int64_t j = 0; j < columns; ++j) to[j] = of_w2[d * columns + j];
        }
    }
    const float* from = total + 2 * size;
    for (int i = 0; i < 4; ++i) {
        const std::int64_t count = i == 0 ? a.inner : a.width;
        for (std::int64_t n = 0; n < count; ++n) sums_to[i][n] = from[n];
        from += count;
    }
}

}  // namespace

void bind_feed_forward(py::module_& m) {
    m.def("feed_forward_forward", &feed_forward_forward, py::arg("x"), py::arg("norm_weight"),
          py::arg("norm_bias"), py::arg("w1"), py::arg("b1"), py::arg("w2"), py::arg("b2"),
          py::arg("rows"), py::arg("seed"), py::arg("site"), py::arg("position_offset"),
          py::arg("position_stride"), py::arg("p"), py::arg("kept").none(true), py::arg("out"),
          py::arg("num_threads"), py::arg("precision") = "float32",
          "out = drop(x + drop(drop(gelu(norm(x) @ w1.T + b1)) @ w2.T + b2)), the sites site, "
          "site + 1 and site + 2 from the inside; kept gets the masks, a bit a channel. On AMX "
          "tiles the precisions 'tf32' and 'bf16' round the operands of every product.");
    m.def("feed_forward_backward", &feed_forward_backward, py::arg("grad"), py::arg("x"),
          py::arg("norm_weight"), py::arg("norm_bias"), py::arg("w1"), py::arg("b1"),
          py::arg("w2"), py::arg("p"), py::arg("kept").none(true), py::arg("d_x"),
          py::arg("d_norm_weight"), py::arg("d_norm_bias"), py::arg("d_w1"), py::arg("d_b1"),
          py::arg("d_w2"), py::arg("d_b2"), py::arg("num_threads"),
          py::arg("precision") = "float32",
          "Adjoint of feed_forward_forward in everything that is floating point.");
}

}  // namespace fmrec
