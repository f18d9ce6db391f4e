#include "bindings.h"

#include <atomic>

#include "memory.h"
#include "parallel.h"
#include "self_attention.h"

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t SELF_ATTENTION_GRAIN = 1 << 20;

constexpr int PARAMETERS = 2 + 2 * SELF_ATTENTION_LAYERS;
const char* const NAMES[PARAMETERS] = {"norm_weight",   "norm_bias",  "query_weight", "query_bias",
                                       "key_weight",    "key_bias",   "value_weight", "value_bias",
                                       "output_weight", "output_bias"};

// The norm's, then weight and bias of each layer.
bool is_matrix(int parameter) { return parameter >= 2 && parameter % 2 == 0; }

// The arrays that both directions read; they hold the memory while the kernels run.
struct SelfAttentionInputs {
    py::array x, query_scale, parameters[PARAMETERS];
};

// Where a list of parameters, or of their gradients, lie.
void check_parameters(const py::sequence& given, const char* name) {
    if (py::len(given) != PARAMETERS) {
        throw py::value_error(std::string(name) + " must be " + std::to_string(PARAMETERS) +
                              " arrays, got " + std::to_string(py::len(given)));
    }
}

void check_parameter(const py::array& array, int i, std::int64_t width) {
    if (is_matrix(i)) {
        check_shape(array, NAMES[i], "[D, D]", {width, width});
    } else {
        check_shape(array, NAMES[i], "[D]", {width});
    }
}

// Of the last position the layers' products are few, and always in float32.
const SelfAttentionKernels& self_attention_kernels(const SelfAttention& a, bool last_only,
                                                   const std::string& precision) {
    const int planes = training_planes_of(precision);
    if (last_only) return FMREC_TABLE(self_attention_last);
    const bool fp16 = isa() == Isa::amx_fp16;
    if (planes == 1) return FMREC_TABLE(self_attention_bf16);
    if (planes == 2) {
        return fp16 ? FMREC_TABLE(self_attention_tf32_fp16) : FMREC_TABLE(self_attention_tf32);
    }
    if (fp16) return FMREC_TABLE(self_attention_float32_fp16);
    bool bytes = isa() == Isa::amx;
    for (int i = 0; bytes && i < SELF_ATTENTION_LAYERS; ++i) {
        bytes = no_outliers(a.weights[i], a.width, a.width);
    }
    return bytes ? FMREC_TABLE(self_attention_float32_int8) : FMREC_TABLE(self_attention);
}

void self_attention_common(SelfAttention& a, SelfAttentionInputs& in, const py::object& x,
                           const py::object& query_scale, const py::sequence& parameters,
                           const py::object& rows, const py::object& seed, const py::object& site,
                           double p, std::int64_t num_heads, bool last_only) {
    in.x = input<float>(x, "x", 3);
    in.query_scale = input<float>(query_scale, "query_scale", 2);
    const DropoutRate rate = dropout_rate(p);
    a.batch = in.x.shape(0);
    a.length = in.x.shape(1);
    a.width = in.x.shape(2);
    if (a.length < 1) throw py::value_error("x must have at least one position, got none");
    check_width(a.width, "D");
    if (num_heads < 1 || a.width % num_heads) {
        throw py::value_error("num_heads must divide D = " + std::to_string(a.width) + ", got " +
                              std::to_string(num_heads));
    }
    if (last_only) check_width(a.width / num_heads, "D / num_heads of the last position");
    a.heads = num_heads;
    check_shape(in.query_scale, "query_scale", "[B, L]", {a.batch, a.length});
    check_parameters(parameters, "parameters");
    for (int i = 0; i < PARAMETERS; ++i) {
        in.parameters[i] =
            input<float>(parameters[static_cast<std::size_t>(i)], NAMES[i], is_matrix(i) ? 2 : 1);
        check_parameter(in.parameters[i], i, a.width);
    }
    const py::array names = input<std::int64_t>(rows, "rows", 1);
    check_shape(names, "rows", "[B]", {a.batch});
    a.x = data<float>(in.x);
    a.query_scale = data<float>(in.query_scale);
    a.norm_weight = data<float>(in.parameters[0]);
    a.norm_bias = data<float>(in.parameters[1]);
    for (int i = 0; i < SELF_ATTENTION_LAYERS; ++i) {
        a.weights[i] = data<float>(in.parameters[2 + 2 * i]);
        a.biases[i] = data<float>(in.parameters[3 + 2 * i]);
    }
    a.rows = data<std::int64_t>(names);  // which its owner, an argument of the call, keeps
    a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    a.site = static_cast<std::uint32_t>(read_int64(site, "site"));
    a.threshold = rate.threshold;
    a.scale = rate.scale;
}

const char* const SELF_ATTENTION_KEPT =
    "[B, positions that leave, ceil(D / 64), and of all positions H (L // 64 + 1) more]";

std::int64_t kept_words(const SelfAttention& a, bool last_only) {
    return last_only ? self_attention_words(a.width) : self_attention_kept_words(&a);
}

bool worth_it(const SelfAttention& a) {
    return a.batch * a.length * a.width * a.width >= SELF_ATTENTION_GRAIN;
}

std::int64_t groups_of(const SelfAttention& a, const SelfAttentionKernels& kernels) {
    const std::int64_t size = kernels.group(&a);
    return (a.batch + size - 1) / size;
}

void self_attention_forward(const py::object& x, const py::object& query_scale,
                            const py::sequence& parameters, const py::object& rows,
                            const py::object& seed, const py::object& site, double p,
                            const py::object& kept_, const py::object& out_, std::int64_t num_heads,
                            bool last_only, int num_threads, const std::string& precision) {
    check_threads(num_threads);
    SelfAttention a{};
    SelfAttentionInputs in;
    self_attention_common(a, in, x, query_scale, parameters, rows, seed, site, p, num_heads,
                          last_only);
    py::array out = output<float>(out_, "out", 3);
    const std::int64_t positions = last_only ? 1 : a.length;
    check_shape(out, "out", "[B, positions that leave, D]", {a.batch, positions, a.width});
    check_overlap(out, "out", in.x, "x", false);
    check_overlap(out, "out", in.query_scale, "query_scale", false);
    const MaskWords kept = masks_to_write(
        kept_, p, SELF_ATTENTION_KEPT, {a.batch, positions, kept_words(a, last_only)}, in.x, out);
    a.kept = kept.words;
    const SelfAttentionKernels& kernels = self_attention_kernels(a, last_only, precision);
    if (is_empty(out)) return;
    a.out = target(out);
    py::gil_scoped_release release;
    const Floats packed = allocate_floats(kernels.packed(&a), false);
    a.packed = packed.get();
    kernels.pack_forward(&a);
    prefer_huge_pages(a.out, a.batch * positions * a.width * 4);
    const std::int64_t slab = kernels.scratch(&a);
    const Floats memory = allocate_floats(num_threads * slab, true);
    std::atomic<std::int64_t> next_slab{0};
    parallel_items(
        num_threads, groups_of(a, kernels), worth_it(a), [&](std::int64_t begin, std::int64_t end) {
            kernels.forward(&a, begin, end, memory.get() + next_slab.fetch_add(1) * slab);
        });
}

void self_attention_backward(const py::object& grad_, const py::object& x,
                             const py::object& query_scale, const py::sequence& parameters,
                             const py::object& rows, const py::object& seed, const py::object& site,
                             double p, const py::object& kept_, const py::object& d_x_,
                             const py::sequence& d_parameters_, std::int64_t num_heads,
                             bool last_only, int num_threads, const std::string& precision) {
    check_threads(num_threads);
    SelfAttention a{};
    SelfAttentionInputs in;
    self_attention_common(a, in, x, query_scale, parameters, rows, seed, site, p, num_heads,
                          last_only);
    const std::int64_t positions = last_only ? 1 : a.length;
    const py::array grad = input<float>(grad_, "grad", 3);
    check_shape(grad, "grad", "[B, positions that leave, D]", {a.batch, positions, a.width});
    py::array d_x = output<float>(d_x_, "d_x", 3);
    check_shape(d_x, "d_x", "[B, L, D]", {a.batch, a.length, a.width});
    check_overlap(d_x, "d_x", grad, "grad", false);
    check_overlap(d_x, "d_x", in.x, "x", false);
    check_overlap(d_x, "d_x", in.query_scale, "query_scale", false);
    check_parameters(d_parameters_, "d_parameters");
    py::array d_parameters[PARAMETERS];
    float* d_at[PARAMETERS];
    for (int i = 0; i < PARAMETERS; ++i) {
        d_parameters[i] = output<float>(d_parameters_[static_cast<std::size_t>(i)], NAMES[i],
                                        is_matrix(i) ? 2 : 1);
        check_parameter(d_parameters[i], i, a.width);
        d_at[i] = target(d_parameters[i]);
    }
    const MaskWords kept =
        masks_to_read(kept_, p, SELF_ATTENTION_KEPT,
                      {a.batch, positions, kept_words(a, last_only)});
    a.kept = kept.words;
    const SelfAttentionKernels& kernels = self_attention_kernels(a, last_only, precision);
    a.grad = data<float>(grad);
    a.out = target(d_x);
    py::gil_scoped_release release;
    const std::int64_t groups = groups_of(a, kernels);
    a.parts = groups < SELF_ATTENTION_PARTS ? groups : SELF_ATTENTION_PARTS;
    const std::int64_t part = self_attention_partial(a.width);
    const Floats partial = allocate_floats((a.parts > 0 ? a.parts : 1) * part, a.parts == 0);
    a.partial = partial.get();
    if (a.parts > 0) {
        const Floats packed = allocate_floats(kernels.packed(&a), false);
        a.packed = packed.get();
        kernels.pack_backward(&a);
        prefer_huge_pages(a.out, a.batch * a.length * a.width * 4);
        const std::int64_t slab = kernels.scratch(&a);
        const Floats memory = allocate_floats(num_threads * slab, true);
        std::atomic<std::int64_t> next_slab{0};
        parallel_items(
            num_threads, a.parts, worth_it(a), [&](std::int64_t begin, std::int64_t end) {
                kernels.backward(&a, begin, end, memory.get() + next_slab.fetch_add(1) * slab);
            });
    }
    add_parts(partial.get(), a.parts, part, num_threads);
    const float* from = partial.get();
    const auto copy = [&](int parameter, std::int64_t count) {
        for (std::int64_t n = 0; n < count; ++n) d_at[parameter][n] = from[n];
        from += count;
    };
    for (int i = 0; i < SELF_ATTENTION_LAYERS; ++i) copy(2 + 2 * i, a.width * a.width);
    for (int i = 0; i < SELF_ATTENTION_LAYERS; ++i) copy(3 + 2 * i, a.width);
    copy(0, a.width);
    copy(1, a.width);
}

}  // namespace

void bind_self_attention(py::module_& m) {
    m.def("self_attention_forward", &self_attention_forward, py::arg("x"), py::arg("query_scale"),
          py::arg("parameters"), py::arg("rows"), py::arg("seed"), py::arg("site"), py::arg("p"),
          py::arg("kept").none(true), py::arg("out"), py::arg("num_heads"), py::arg("last_only"),
          py::arg("num_threads"), py::arg("precision") = "float32",
          "out = x + drop(attention(norm(x)) @ output_weight.T + output_bias), of all positions or "
          "of the last; the probabilities drop at `site`, the branch at site + 1. kept gets the "
          "branch's masks, a bit a channel, and of all positions those of the probabilities, a bit "
          "a key. parameters: weight and bias of the norm, and of the query's, key's, value's and "
          "output's layers. Precision 'bf16', on AMX tiles, rounds the operands of the layers' "
          "products.");
    m.def("self_attention_backward", &self_attention_backward, py::arg("grad"), py::arg("x"),
          py::arg("query_scale"), py::arg("parameters"), py::arg("rows"), py::arg("seed"),
          py::arg("site"), py::arg("p"), py::arg("kept").none(true), py::arg("d_x"),
          py::arg("d_parameters"), py::arg("num_heads"), py::arg("last_only"),
          py::arg("num_threads"), py::arg("precision") = "float32",
          "Adjoint of self_attention_forward in x and the parameters.");
}

}  // namespace fmrec
