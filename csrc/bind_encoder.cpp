#include <memory>
#include <vector>

#include "bind_encoder.h"
#include "sequence_groups.h"

namespace fmrec {
namespace {

// What parameter of a block is called, and its shape in D (channels) and F (features).
struct BlockArrayName {
    const char* name;
    const char* shape;
};
const BlockArrayName BLOCK_ARRAY_NAMES[BLOCK_ARRAYS] = {
    {"norm1_weight", "[D]"},     {"norm1_bias", "[D]"}, {"query_weight", "[D, D]"},
    {"query_bias", "[D]"},       {"key_weight", "[D, D]"}, {"key_bias", "[D]"},
    {"value_weight", "[D, D]"},  {"value_bias", "[D]"}, {"output_weight", "[D, D]"},
    {"output_bias", "[D]"},      {"norm2_weight", "[D]"}, {"norm2_bias", "[D]"},
    {"w1_weight", "[F, D]"},     {"w1_bias", "[F]"},    {"w2_weight", "[D, F]"},
    {"w2_bias", "[D]"},
};

std::unique_ptr<PackedEncoder> pack_encoder(const py::sequence& blocks, std::int64_t heads,
                                            const py::object& rotary_,
                                            const std::string& precision) {
    const int planes = planes_of(precision);
    if (py::len(blocks) == 0) throw py::value_error("blocks must hold at least one block, got none");
    std::vector<py::array> kept;  // the arrays, for as long as they are read
    std::vector<BlockArrays> arrays;
    py::ssize_t channels = 0, features = 0;
    for (std::size_t n = 0; n < py::len(blocks); ++n) {
        const py::sequence block = blocks[n];
        if (py::len(block) != BLOCK_ARRAYS) {
            throw py::value_error("blocks[" + std::to_string(n) + "] must hold " +
                                  std::to_string(BLOCK_ARRAYS) + " arrays, got " +
                                  std::to_string(py::len(block)));
        }
        BlockArrays pointers{};
        for (int i = 0; i < BLOCK_ARRAYS; ++i) {
            const std::string name =
                "blocks[" + std::to_string(n) + "]." + BLOCK_ARRAY_NAMES[i].name;
            const std::string shape = BLOCK_ARRAY_NAMES[i].shape;
            const bool matrix = shape.find(',') != std::string::npos;
            if ((i == NORM1_BIAS || i == NORM2_BIAS) &&
                py::object(block[static_cast<std::size_t>(i)]).is_none()) {
                continue;
            }
            const py::array array =
                input<float>(block[static_cast<std::size_t>(i)], name.c_str(), matrix ? 2 : 1);
            if (n == 0 && i == NORM1_WEIGHT) channels = array.shape(0);
            if (n == 0 && i == INNER_WEIGHT) features = array.shape(0);
            const py::ssize_t first = shape[1] == 'F' ? features : channels;
            const py::ssize_t second = shape[matrix ? 4 : 1] == 'F' ? features : channels;
            if (matrix) {
                check_shape(array, name.c_str(), shape.c_str(), {first, second});
            } else {
                check_shape(array, name.c_str(), shape.c_str(), {first});
            }
            pointers.array[i] = data<float>(array);
            kept.push_back(array);
        }
        const bool rms = pointers.array[NORM1_BIAS] == nullptr;
        if (rms != (pointers.array[NORM2_BIAS] == nullptr) ||
            (n > 0 && rms != (arrays[0].array[NORM1_BIAS] == nullptr))) {
            throw py::value_error("all norms must have a bias or none, blocks[" +
                                  std::to_string(n) + "] has both or differs");
        }
        arrays.push_back(pointers);
    }
    if (channels < 1 || features < 1) throw py::value_error("D and F must be at least 1, got 0");
    if (heads < 1 || channels % heads != 0) {
        throw py::value_error("num_heads must divide D = " + std::to_string(channels) + ", got " +
                              std::to_string(heads));
    }
    const float* rotary = nullptr;
    py::array table;
    std::int64_t length = 0;
    if (!rotary_.is_none()) {
        table = input<float>(rotary_, "rotary", 2);
        length = table.shape(0);
        if (channels / heads % 2 != 0) {
            throw py::value_error("a rotated head must have an even width, got " +
                                  std::to_string(channels / heads));
        }
        check_shape(table, "rotary", "[L, D / num_heads]", {length, channels / heads});
        rotary = data<float>(table);
    }
    py::gil_scoped_release release;
    return std::unique_ptr<PackedEncoder>(
        new PackedEncoder(arrays, channels, features, heads, rotary, length, planes));
}

void encoder_forward(const PackedEncoder& packed, const py::object& x_, const py::object& mask_,
                     std::int64_t tap, const py::object& out_, const py::object& tapped_,
                     int num_threads, const py::object& first_key_bias_) {
    const py::array x = input<float>(x_, "x", 3), mask = input<float>(mask_, "mask", 2);
    py::array out = output<float>(out_, "out", 2);
    check_threads(num_threads);
    EncoderBatch a{};
    a.encoder = make_encoder(packed, x.shape(1));
    const std::int64_t batch = x.shape(0), channels = packed.channels();
    check_shape(x, "x", "[B, L, D]", {batch, x.shape(1), channels});
    check_shape(mask, "mask", "[B, L]", {batch, x.shape(1)});
    check_shape(out, "out", "[B, D]", {batch, channels});
    check_overlap(out, "out", x, "x", false);
    check_overlap(out, "out", mask, "mask", false);
    if (!tapped_.is_none()) {
        py::array tapped = output<float>(tapped_, "tapped", 2);
        check_shape(tapped, "tapped", "[B, D]", {batch, channels});
        check_overlap(tapped, "tapped", x, "x", false);
        check_overlap(tapped, "tapped", mask, "mask", false);
        check_overlap(tapped, "tapped", out, "out", false);
        if (tap < 0 || tap >= a.encoder.num_blocks) {
            throw py::value_error("tap must be in 0 .. " +
                                  std::to_string(a.encoder.num_blocks - 1) + ", got " +
                                  std::to_string(tap));
        }
        a.encoder.tap = tap;
        a.tapped = target(tapped);
    }
    py::array first_key_bias;
    if (!first_key_bias_.is_none()) {
        first_key_bias = input<float>(first_key_bias_, "first_key_bias", 1);
        check_shape(first_key_bias, "first_key_bias", "[B]", {batch});
        check_overlap(out, "out", first_key_bias, "first_key_bias", false);
        a.first_key_bias = data<float>(first_key_bias);
    }
    const EncoderBatchKernels& kernels = FMREC_TABLE(encoder_batch);
    if (is_empty(out)) return;
    a.x = data<float>(x);
    a.mask = data<float>(mask);
    a.out = target(out);
    py::gil_scoped_release release;
    run_groups(kernels, a, batch, num_threads);
}

}  // namespace

Encoder make_encoder(const PackedEncoder& packed, std::int64_t length) {
    if (packed.tiles() != (isa() >= Isa::amx)) {
        throw py::value_error(std::string("packed must hold weights packed for the instruction set "
                                          "in use, ") + isa_name(isa()) + ", got them packed for " +
                              (packed.tiles() ? "amx" : "one without tiles"));
    }
    if (length < 1) throw py::value_error("there must be at least one position, got L = 0");
    Encoder encoder{};
    encoder.blocks = packed.blocks().data();
    encoder.num_blocks = static_cast<std::int64_t>(packed.blocks().size());
    encoder.channels = packed.channels();
    encoder.heads = packed.heads();
    encoder.length = length;
    encoder.tap = -1;
    encoder.rms = packed.rms();
    encoder.rotary = packed.rotary();
    encoder.planes = packed.planes();
    if (encoder.rotary && packed.length() != length) {
        throw py::value_error("rotary must be for L = " + std::to_string(length) +
                              " positions, got " + std::to_string(packed.length()));
    }
    return encoder;
}

NetworkArrays sampler_network(SamplerNetwork& a, const PackedEncoder& packed,
                              const py::object& norm_weight, const py::object& norm_bias,
                              const py::object& e, const py::object& mask, const py::object& taus,
                              const py::object& noise, const py::object& rows,
                              const py::object& seed, double delta, const py::array& out) {
    NetworkArrays k{input<float>(norm_weight, "norm_weight", 1),
                    input<float>(norm_bias, "norm_bias", 1),
                    input<float>(e, "e", 3),
                    input<float>(mask, "mask", 2),
                    input<float>(taus, "taus", 2),
                    py::array(),
                    py::array()};
    const std::int64_t channels = packed.channels(), length = k.e.shape(1);
    a.encoder = make_encoder(packed, length);
    a.batch = k.e.shape(0);
    a.steps = k.taus.shape(0);
    if (a.steps < 1) throw py::value_error("there must be at least one step, got q = 0");
    check_shape(k.norm_weight, "norm_weight", "[D]", {channels});
    check_shape(k.norm_bias, "norm_bias", "[D]", {channels});
    check_shape(k.e, "e", "[B, L, D]", {a.batch, length, channels});
    check_shape(k.mask, "mask", "[B, L]", {a.batch, length});
    check_shape(k.taus, "taus", "[q, D]", {a.steps, channels});
    const char* const names[] = {"norm_weight", "norm_bias", "e", "mask", "taus"};
    const py::array* const inputs[] = {&k.norm_weight, &k.norm_bias, &k.e, &k.mask, &k.taus};
    for (int i = 0; i < 5; ++i) check_overlap(out, "out", *inputs[i], names[i], false);
    if (!noise.is_none()) {
        k.noise = input<float>(noise, "noise", 4);
        check_shape(k.noise, "noise", "[q, B, L, D]", {a.steps, a.batch, length, channels});
        check_overlap(out, "out", k.noise, "noise", false);
        a.noise = data<float>(k.noise);
    } else {
        k.rows = input<std::int64_t>(rows, "rows", 1);
        check_shape(k.rows, "rows", "[B]", {a.batch});
        check_overlap(out, "out", k.rows, "rows", false);
        a.rows = data<std::int64_t>(k.rows);
        a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    }
    a.delta = static_cast<float>(delta);
    a.norm_weight = data<float>(k.norm_weight);
    a.norm_bias = data<float>(k.norm_bias);
    a.e = data<float>(k.e);
    a.mask = data<float>(k.mask);
    a.taus = data<float>(k.taus);
    return k;
}

void bind_encoder(py::module_& m) {
    py::class_<PackedEncoder>(m, "PackedEncoder",
                              "The weights of a transformer stack, copied and packed.")
        .def(py::init(&pack_encoder), py::arg("blocks"), py::arg("num_heads"),
             py::arg("rotary") = py::none(), py::arg("precision") = "float32",
             "blocks: the arrays of each block, as BlockWeights, None for the biases of RMS norms; "
             "rotary: cosines and sines of half a head at each position [L, D / num_heads]; precision: of "
             "the linear layers' operands on AMX tiles.")
        .def_property_readonly("nbytes", &PackedEncoder::bytes);
    m.def("encoder_forward", &encoder_forward, py::arg("packed"), py::arg("x"), py::arg("mask"),
          py::arg("tap"), py::arg("out"), py::arg("tapped").none(true), py::arg("num_threads"),
          py::arg("first_key_bias").none(true) = py::none(),
          "The last position's output, and that of block tap where tapped is given.");
}

}  // namespace fmrec
