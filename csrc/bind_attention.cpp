#include "bindings.h"

#include <atomic>

#include "attention.h"
#include "encoder.h"
#include "memory.h"
#include "parallel.h"

namespace fmrec {
namespace {

// Scores times channels below which a second thread costs more than it brings.
constexpr std::int64_t ATTENTION_GRAIN = 1 << 16;

// What forward and backward share, checked and filled in.
void attention_common(Attention& a, const py::array& qkv, const py::array& query_scale,
                      const py::array& rows, const py::object& seed, const py::object& site,
                      double p, std::int64_t num_heads, const py::object& rotary_) {
    const DropoutRate rate = dropout_rate(p);
    a.batch = qkv.shape(0);
    a.length = qkv.shape(1);
    if (qkv.shape(2) % 3) {
        throw py::value_error("qkv must have shape [B, L, 3 D], got " +
                              text(qkv.attr("shape")));
    }
    a.channels = qkv.shape(2) / 3;
    if (num_heads < 1 || a.channels % num_heads) {
        throw py::value_error("num_heads must divide D = " + std::to_string(a.channels) +
                              ", got " + std::to_string(num_heads));
    }
    a.heads = num_heads;
    check_shape(query_scale, "query_scale", "[B, L]", {a.batch, a.length});
    check_shape(rows, "rows", "[B]", {a.batch});
    a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    a.site = static_cast<std::uint32_t>(read_int64(site, "site"));
    a.drop = p > 0.0;
    a.threshold = rate.threshold;
    a.scale = rate.scale;
    a.qkv = data<float>(qkv);
    a.query_scale = data<float>(query_scale);
    a.rows = data<std::int64_t>(rows);
    if (rotary_.is_none()) return;
    const py::array rotary = input<float>(rotary_, "rotary", 2);
    const std::int64_t width = a.channels / num_heads;
    if (width % 2) {
        throw py::value_error("a rotated head must have an even width, got " +
                              std::to_string(width));
    }
    check_shape(rotary, "rotary", "[L, D / num_heads]", {a.length, width});
    a.rotary = data<float>(rotary);  // which its owner, an argument of the call, keeps
}

// A tangent, or a gradient of one, beside what it is the tangent of.
py::array another(const py::array& array, const char* name, const char* expected,
                  const py::array& like) {
    check_shape(array, name, expected, {like.shape(0), like.shape(1), like.shape(2)});
    return array;
}

// Whether two arguments that come together are there.
bool given_together(const py::object& a, const char* a_name, const py::object& b,
                    const char* b_name) {
    if (a.is_none() != b.is_none()) {
        throw py::value_error(std::string(a_name) + " and " + b_name +
                              " must be given together, got one of them");
    }
    return !a.is_none();
}

// A thread takes the next few sequences when it is done with its own: padding makes them uneven.
template <typename Run>
void run_attention(const Attention& a, std::int64_t scratch, int num_threads, Run run) {
    constexpr std::int64_t size = 4;
    const std::int64_t groups = (a.batch + size - 1) / size;
    const std::int64_t slabs = groups < num_threads ? groups : num_threads;
    const std::int64_t slab_size = round_up(scratch, UNIT);
    const Floats memory = allocate_floats(slabs * slab_size, true);
    const bool worth_it = groups > 1 && a.batch * a.length * a.length * a.channels >=
                                            ATTENTION_GRAIN;
    std::atomic<std::int64_t> next_group{0}, next_slab{0};
    parallel_items(num_threads, num_threads, worth_it, [&](std::int64_t, std::int64_t) {
        std::int64_t group = next_group.fetch_add(1);
        if (group >= groups) return;
        float* slab = memory.get() + next_slab.fetch_add(1) * slab_size;
        for (; group < groups; group = next_group.fetch_add(1)) {
            const std::int64_t begin = group * size;
            run(&a, begin, begin + size < a.batch ? begin + size : a.batch, slab);
        }
    });
}

void attention_forward(const py::object& qkv_, const py::object& query_scale_,
                       const py::object& rows_, const py::object& seed, const py::object& site,
                       double p, const py::object& out_, std::int64_t num_heads,
                       int num_threads, const py::object& rotary, const py::object& d_qkv_,
                       const py::object& d_out_) {
    const py::array qkv = input<float>(qkv_, "qkv", 3),
                    query_scale = input<float>(query_scale_, "query_scale", 2),
                    rows = input<std::int64_t>(rows_, "rows", 1);
    py::array out = output<float>(out_, "out", 3);
    check_threads(num_threads);
    Attention a{};
    attention_common(a, qkv, query_scale, rows, seed, site, p, num_heads, rotary);
    check_shape(out, "out", "[B, L, D]", {a.batch, a.length, a.channels});
    check_overlap(out, "out", qkv, "qkv", false);
    check_overlap(out, "out", query_scale, "query_scale", false);
    check_overlap(out, "out", rows, "rows", false);
    const bool tangent = given_together(d_qkv_, "d_qkv", d_out_, "d_out");
    py::array d_qkv, d_out;
    if (tangent) {
        d_qkv = another(input<float>(d_qkv_, "d_qkv", 3), "d_qkv", "[B, L, 3 D]", qkv);
        d_out = another(output<float>(d_out_, "d_out", 3), "d_out", "[B, L, D]", out);
        check_overlap(out, "out", d_qkv, "d_qkv", false);
        check_overlap(d_out, "d_out", out, "out", false);
        check_overlap(d_out, "d_out", qkv, "qkv", false);
        check_overlap(d_out, "d_out", d_qkv, "d_qkv", false);
        check_overlap(d_out, "d_out", query_scale, "query_scale", false);
        check_overlap(d_out, "d_out", rows, "rows", false);
        a.d_qkv = data<float>(d_qkv);
        a.d_out = target(d_out);
    }
    const AttentionKernels& kernels =
        tangent ? FMREC_TABLE(attention_tangent) : FMREC_TABLE(attention);
    if (is_empty(out)) return;
    a.out = target(out);
    py::gil_scoped_release release;
    run_attention(a, kernels.scratch(&a), num_threads, kernels.forward);
}

void attention_backward(const py::object& grad_, const py::object& qkv_,
                        const py::object& query_scale_, const py::object& rows_,
                        const py::object& seed, const py::object& site, double p,
                        const py::object& g_qkv_, std::int64_t num_heads, int num_threads,
                        const py::object& rotary, const py::object& d_qkv_,
                        const py::object& d_grad_, const py::object& g_d_qkv_) {
    const py::array grad = input<float>(grad_, "grad", 3), qkv = input<float>(qkv_, "qkv", 3),
                    query_scale = input<float>(query_scale_, "query_scale", 2),
                    rows = input<std::int64_t>(rows_, "rows", 1);
    py::array g_qkv = output<float>(g_qkv_, "g_qkv", 3);
    check_threads(num_threads);
    Attention a{};
    attention_common(a, qkv, query_scale, rows, seed, site, p, num_heads, rotary);
    check_shape(grad, "grad", "[B, L, D]", {a.batch, a.length, a.channels});
    check_shape(g_qkv, "g_qkv", "[B, L, 3 D]", {a.batch, a.length, 3 * a.channels});
    check_overlap(g_qkv, "g_qkv", grad, "grad", false);
    check_overlap(g_qkv, "g_qkv", qkv, "qkv", false);
    check_overlap(g_qkv, "g_qkv", query_scale, "query_scale", false);
    check_overlap(g_qkv, "g_qkv", rows, "rows", false);
    const bool tangent = given_together(d_qkv_, "d_qkv", d_grad_, "d_grad");
    py::array d_qkv, d_grad, g_d_qkv;
    if (given_together(d_qkv_, "d_qkv", g_d_qkv_, "g_d_qkv")) {
        d_qkv = another(input<float>(d_qkv_, "d_qkv", 3), "d_qkv", "[B, L, 3 D]", qkv);
        d_grad = another(input<float>(d_grad_, "d_grad", 3), "d_grad", "[B, L, D]", grad);
        g_d_qkv = another(output<float>(g_d_qkv_, "g_d_qkv", 3), "g_d_qkv", "[B, L, 3 D]", qkv);
        check_overlap(g_qkv, "g_qkv", d_qkv, "d_qkv", false);
        check_overlap(g_qkv, "g_qkv", d_grad, "d_grad", false);
        check_overlap(g_d_qkv, "g_d_qkv", g_qkv, "g_qkv", false);
        check_overlap(g_d_qkv, "g_d_qkv", grad, "grad", false);
        check_overlap(g_d_qkv, "g_d_qkv", d_grad, "d_grad", false);
        check_overlap(g_d_qkv, "g_d_qkv", qkv, "qkv", false);
        check_overlap(g_d_qkv, "g_d_qkv", d_qkv, "d_qkv", false);
        check_overlap(g_d_qkv, "g_d_qkv", query_scale, "query_scale", false);
        check_overlap(g_d_qkv, "g_d_qkv", rows, "rows", false);
        a.d_qkv = data<float>(d_qkv);
        a.d_grad = data<float>(d_grad);
        a.d_out = target(g_d_qkv);
    }
    const AttentionKernels& kernels =
        tangent ? FMREC_TABLE(attention_tangent) : FMREC_TABLE(attention);
    if (is_empty(g_qkv)) return;
    a.grad = data<float>(grad);
    a.out = target(g_qkv);
    py::gil_scoped_release release;
    run_attention(a, kernels.scratch(&a), num_threads, kernels.backward);
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention_forward", &attention_forward, py::arg("qkv"), py::arg("query_scale"),
          py::arg("rows"), py::arg("seed"), py::arg("site"), py::arg("p"), py::arg("out"),
          py::arg("num_heads"), py::arg("num_threads"), py::arg("rotary").none(true) = py::none(),
          py::arg("d_qkv").none(true) = py::none(), py::arg("d_out").none(true) = py::none(),
          "out = dropout(softmax((query_scale * q) k^T)) v, head by head; q and k rotated by "
          "their position where `rotary` is given, cosines and sines of half a head at each "
          "position [L, D / num_heads]. With d_qkv also d_out, the derivative along it.");
    m.def("attention_backward", &attention_backward, py::arg("grad"), py::arg("qkv"),
          py::arg("query_scale"), py::arg("rows"), py::arg("seed"), py::arg("site"),
          py::arg("p"), py::arg("g_qkv"), py::arg("num_heads"), py::arg("num_threads"),
          py::arg("rotary").none(true) = py::none(), py::arg("d_qkv").none(true) = py::none(),
          py::arg("d_grad").none(true) = py::none(), py::arg("g_d_qkv").none(true) = py::none(),
          "Adjoint of attention_forward in qkv, or in qkv and d_qkv, for the gradients of out and "
          "d_out; masks and probabilities are computed anew.");
}

}  // namespace fmrec
