#include "bindings.h"

#include <atomic>

#include "attention.h"
#include "encoder.h"
#include "memory.h"
#include "parallel.h"

namespace fmrec {
namespace {

// Scores times channels below which a second thread costs more than it brings.
constexpr std::int64_t GRAIN = 1 << 16;

// What forward and backward share, checked and filled in.
void attention_common(Attention& a, const py::array& qkv, const py::array& query_scale,
                      const py::array& rows, const py::object& seed, const py::object& site,
                      double p, std::int64_t num_heads) {
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
                                            GRAIN;
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
                       int num_threads) {
    const py::array qkv = input<float>(qkv_, "qkv", 3),
                    query_scale = input<float>(query_scale_, "query_scale", 2),
                    rows = input<std::int64_t>(rows_, "rows", 1);
    py::array out = output<float>(out_, "out", 3);
    check_threads(num_threads);
    Attention a{};
    attention_common(a, qkv, query_scale, rows, seed, site, p, num_heads);
    check_shape(out, "out", "[B, L, D]", {a.batch, a.length, a.channels});
    check_overlap(out, "out", qkv, "qkv", false);
    check_overlap(out, "out", query_scale, "query_scale", false);
    check_overlap(out, "out", rows, "rows", false);
    const AttentionKernels& kernels = FMREC_TABLE(attention);
    if (is_empty(out)) return;
    a.out = target(out);
    py::gil_scoped_release release;
    run_attention(a, kernels.scratch(&a), num_threads, kernels.forward);
}

void attention_backward(const py::object& grad_, const py::object& qkv_,
                        const py::object& query_scale_, const py::object& rows_,
                        const py::object& seed, const py::object& site, double p,
                        const py::object& d_qkv_, std::int64_t num_heads, int num_threads) {
    const py::array grad = input<float>(grad_, "grad", 3), qkv = input<float>(qkv_, "qkv", 3),
                    query_scale = input<float>(query_scale_, "query_scale", 2),
                    rows = input<std::int64_t>(rows_, "rows", 1);
    py::array d_qkv = output<float>(d_qkv_, "d_qkv", 3);
    check_threads(num_threads);
    Attention a{};
    attention_common(a, qkv, query_scale, rows, seed, site, p, num_heads);
    check_shape(grad, "grad", "[B, L, D]", {a.batch, a.length, a.channels});
    check_shape(d_qkv, "d_qkv", "[B, L, 3 D]", {a.batch, a.length, 3 * a.channels});
    check_overlap(d_qkv, "d_qkv", grad, "grad", false);
    check_overlap(d_qkv, "d_qkv", qkv, "qkv", false);
    check_overlap(d_qkv, "d_qkv", query_scale, "query_scale", false);
    check_overlap(d_qkv, "d_qkv", rows, "rows", false);
    const AttentionKernels& kernels = FMREC_TABLE(attention);
    if (is_empty(d_qkv)) return;
    a.grad = data<float>(grad);
    a.out = target(d_qkv);
    py::gil_scoped_release release;
    run_attention(a, kernels.scratch(&a), num_threads, kernels.backward);
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention_forward", &attention_forward, py::arg("qkv"), py::arg("query_scale"),
          py::arg("rows"), py::arg("seed"), py::arg("site"), py::arg("p"), py::arg("out"),
          py::arg("num_heads"), py::arg("num_threads"),
          "out = dropout(softmax((query_scale * q) k^T)) v, head by head.");
    m.def("attention_backward", &attention_backward, py::arg("grad"), py::arg("qkv"),
          py::arg("query_scale"), py::arg("rows"), py::arg("seed"), py::arg("site"),
          py::arg("p"), py::arg("d_qkv"), py::arg("num_heads"), py::arg("num_threads"),
          "Adjoint of attention_forward in qkv; masks and probabilities are computed anew.");
}

}  // namespace fmrec
