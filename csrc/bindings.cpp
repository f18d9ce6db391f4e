// The Python module fmrec_fast._C: checks its arguments, lets go of the GIL and splits the work.
//
// Arrays arrive as numpy arrays (tensor.detach().numpy() shares the tensor's memory), so the
// module needs no torch headers and one build serves every torch version. Nothing is converted:
// an array of another type or layout is refused, because a silent copy would swallow the result.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "attention.h"
#include "dropout.h"
#include "encoder.h"
#include "euler_sampler.h"
#include "history_loss.h"
#include "isa.h"
#include "item_cross_entropy.h"
#include "linear.h"
#include "noise_fusion.h"
#include "packed_encoder.h"
#include "parallel.h"
#include "picard_sweep.h"
#include "ranking.h"
#include "recommend.h"

namespace py = pybind11;

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t GRAIN_NOISE = 1 << 14;
constexpr std::int64_t GRAIN_DROPOUT = 1 << 15;
constexpr std::int64_t GRAIN_HISTORY = 1 << 17;
constexpr std::int64_t GRAIN_LINEAR = 1 << 20;
constexpr std::int64_t GRAIN_XENT = 1 << 18;
constexpr std::int64_t GRAIN_ATTENTION = 1 << 16;  // scores times channels

// Sequences in a group: at most this many, and at most this many floats of activations.
constexpr std::int64_t MOST_IN_GROUP = 8;
constexpr std::int64_t GROUP_FLOATS = 1 << 16;

std::string text(const py::handle& object) { return py::cast<std::string>(py::str(object)); }

std::string type_text(const py::handle& object) {
    return py::cast<std::string>(py::type::of(object).attr("__name__"));
}

template <typename T>
const char* dtype_text();
template <>
const char* dtype_text<float>() { return "float32"; }
template <>
const char* dtype_text<std::int64_t>() { return "int64"; }

// A checked array: C-contiguous, aligned, of the wanted type and number of dimensions.
py::array checked_array(const py::object& object, const char* name, const char* dtypes,
                        bool dtype_fits(const py::dtype&), py::ssize_t ndim, bool writeable) {
    if (!py::isinstance<py::array>(object)) {
        throw py::type_error(std::string(name) + " must be a numpy array of " + dtypes + ", got " +
                             type_text(object));
    }
    py::array array = py::reinterpret_borrow<py::array>(object);
    if (!dtype_fits(array.dtype())) {
        throw py::type_error(std::string(name) + " must be of dtype " + dtypes + ", got " +
                             text(array.dtype()));
    }
    if (array.ndim() != ndim) {
        throw py::value_error(std::string(name) + " must have " + std::to_string(ndim) +
                              " dimensions, got shape " + text(array.attr("shape")));
    }
    if (!(array.flags() & py::array::c_style)) {
        throw py::value_error(std::string(name) + " must be C-contiguous, got shape " +
                              text(array.attr("shape")) + " with strides " +
                              text(array.attr("strides")) + " bytes");
    }
    if (reinterpret_cast<std::uintptr_t>(array.data()) %
        static_cast<std::uintptr_t>(array.itemsize())) {
        throw py::value_error(std::string(name) + " must be aligned to its elements of " +
                              std::to_string(array.itemsize()) + " bytes");
    }
    if (writeable && !array.writeable()) {
        throw py::value_error(std::string(name) + " must be writeable, got a read-only array");
    }
    return array;
}

template <typename T>
bool is_dtype(const py::dtype& dtype) { return dtype.equal(py::dtype::of<T>()); }

bool is_flag(const py::dtype& dtype) {
    return dtype.equal(py::dtype::of<bool>()) || dtype.equal(py::dtype::of<std::uint8_t>());
}

template <typename T>
py::array input(const py::object& object, const char* name, py::ssize_t ndim) {
    return checked_array(object, name, dtype_text<T>(), is_dtype<T>, ndim, false);
}

template <typename T>
py::array output(const py::object& object, const char* name, py::ssize_t ndim) {
    return checked_array(object, name, dtype_text<T>(), is_dtype<T>, ndim, true);
}

template <typename T>
const T* data(const py::array& array) { return static_cast<const T*>(array.data()); }

float* target(py::array& array) { return static_cast<float*>(array.mutable_data()); }

// `expected` names the agreement in words: "[B, D]".
void check_shape(const py::array& array, const char* name, const char* expected,
                 std::initializer_list<py::ssize_t> shape) {
    py::ssize_t axis = 0;
    bool equal = true;
    for (const py::ssize_t size : shape) {
        equal = equal && array.shape(axis++) == size;
    }
    if (!equal) {
        py::tuple wanted(shape.size());
        axis = 0;
        for (const py::ssize_t size : shape) {
            wanted[static_cast<std::size_t>(axis++)] = py::int_(size);
        }
        throw py::value_error(std::string(name) + " must have shape " + expected + " = " +
                              text(wanted) + ", got " + text(array.attr("shape")));
    }
}

// An output may be an input (in place, where `same` allows it) but not half of one.
void check_overlap(const py::array& out, const char* out_name, const py::array& in,
                   const char* in_name, bool same_allowed) {
    const auto out_begin = reinterpret_cast<std::uintptr_t>(out.data());
    const auto in_begin = reinterpret_cast<std::uintptr_t>(in.data());
    const std::uintptr_t out_size = static_cast<std::uintptr_t>(out.nbytes());
    const std::uintptr_t in_size = static_cast<std::uintptr_t>(in.nbytes());
    if (out_size == 0 || in_size == 0 || out_begin + out_size <= in_begin ||
        in_begin + in_size <= out_begin) {
        return;
    }
    if (same_allowed && out_begin == in_begin && out_size == in_size) {
        return;
    }
    throw py::value_error(std::string(out_name) + " must not overlap " + in_name);
}

// A Python int or a 0-dimensional int64 array, read now.
std::int64_t read_int64(const py::object& object, const char* name) {
    if (py::isinstance<py::array>(object)) {
        const py::array array = py::reinterpret_borrow<py::array>(object);
        if (!is_dtype<std::int64_t>(array.dtype()) || array.ndim() != 0) {
            throw py::type_error(std::string(name) + " must be an int or a 0-dimensional int64 " +
                                 "array, got " + text(array.dtype()) + " of shape " +
                                 text(array.attr("shape")));
        }
        std::int64_t value;
        std::memcpy(&value, array.data(), sizeof value);
        return value;
    }
    if (!PyLong_Check(object.ptr()) || PyBool_Check(object.ptr())) {
        throw py::type_error(std::string(name) + " must be an int or a 0-dimensional int64 array, "
                             "got " + text(py::repr(object)));
    }
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(object.ptr(), &overflow);
    if (overflow != 0) {
        throw py::value_error(std::string(name) + " must satisfy -2**63 <= " + name +
                              " < 2**63, got " + text(object));
    }
    return value;
}

int check_threads(int num_threads) {
    if (num_threads < 1) {
        throw py::value_error("num_threads must be at least 1, got " + std::to_string(num_threads));
    }
    return num_threads;
}

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

// Whether there is anything to do: the kernels divide by the number of groups.
bool is_empty(const py::array& array) { return array.size() == 0; }

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
    parallel_items(num_threads, kernels.chunks(&a), a.batch * a.length * a.channels >= GRAIN_NOISE,
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
    parallel_items(num_threads, kernels.chunks(&a), a.batch * a.length * a.channels >= GRAIN_NOISE,
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
    parallel_items(num_threads, a.batch, a.batch * a.length * a.channels >= GRAIN_NOISE,
                   [&](std::int64_t begin, std::int64_t end) { kernels.backward(&a, begin, end); });
}

void dropout(const py::object& x_, const py::object& residual_, const py::object& rows_,
             const py::object& seed, const py::object& site, const py::object& position_offset,
             const py::object& position_stride, double p, const py::object& out_,
             int num_threads, bool gelu, const py::object& gelu_at_, const py::object& times_) {
    const py::array x = input<float>(x_, "x", 3), rows = input<std::int64_t>(rows_, "rows", 1);
    py::array out = output<float>(out_, "out", 3);
    check_threads(num_threads);
    if (!(p >= 0.0 && p < 1.0)) {
        throw py::value_error("p must satisfy 0 <= p < 1, got " + text(py::float_(p)));
    }
    Dropout a{};
    a.batch = x.shape(0);
    a.positions = x.shape(1);
    a.channels = x.shape(2);
    check_shape(rows, "rows", "[B]", {a.batch});
    check_shape(out, "out", "[B, P, C]", {a.batch, a.positions, a.channels});
    check_overlap(out, "out", x, "x", true);
    py::array residual;
    if (!residual_.is_none()) {
        residual = input<float>(residual_, "residual", 3);
        check_shape(residual, "residual", "[B, P, C]", {a.batch, a.positions, a.channels});
        check_overlap(out, "out", residual, "residual", true);
        a.residual = data<float>(residual);
    }
    py::array gelu_at;
    if (!gelu_at_.is_none()) {
        gelu_at = input<float>(gelu_at_, "gelu_at", 3);
        check_shape(gelu_at, "gelu_at", "[B, P, C]", {a.batch, a.positions, a.channels});
        check_overlap(out, "out", gelu_at, "gelu_at", true);
        a.gelu_at = data<float>(gelu_at);
    }
    py::array times;
    if (!times_.is_none()) {
        if (gelu_at_.is_none()) throw py::value_error("times needs gelu_at, got None");
        times = input<float>(times_, "times", 3);
        check_shape(times, "times", "[B, P, C]", {a.batch, a.positions, a.channels});
        check_overlap(out, "out", times, "times", true);
        a.times = data<float>(times);
    }
    a.gelu = gelu;
    a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    a.site = static_cast<std::uint32_t>(read_int64(site, "site"));
    a.position_offset = static_cast<std::uint64_t>(read_int64(position_offset, "position_offset"));
    a.position_stride = static_cast<std::uint64_t>(read_int64(position_stride, "position_stride"));
    // Python's round(): halves to even, the rounding mode's default.
    const double threshold = std::nearbyint(p * 4294967296.0);
    a.threshold = static_cast<std::uint32_t>(threshold < 4294967295.0 ? threshold : 4294967295.0);
    a.scale = static_cast<float>(1.0 / (1.0 - p));
    const DropoutKernels& kernels = FMREC_TABLE(dropout);
    if (is_empty(out)) return;
    a.x = data<float>(x);
    a.rows = data<std::int64_t>(rows);
    a.out = target(out);
    py::gil_scoped_release release;
    parallel_items(num_threads, kernels.chunks(&a),
                   a.batch * a.positions * a.channels >= GRAIN_DROPOUT,
                   [&](std::int64_t begin, std::int64_t end) { kernels.apply(&a, begin, end); });
}

// Memory that is not initialised, freed with its owner.
struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
typedef std::unique_ptr<std::int32_t[], Free> Indices;

Indices allocate(std::int64_t count, bool zeroed) {
    const std::size_t size = static_cast<std::size_t>(count > 0 ? count : 1);
    void* memory = zeroed ? std::calloc(size, sizeof(std::int32_t))
                          : std::malloc(size * sizeof(std::int32_t));
    if (!memory) throw std::bad_alloc();
    return Indices(static_cast<std::int32_t*>(memory));
}

// Asks for huge pages under the whole ones of them that [memory, memory + bytes) covers: faulting
// a large result in by pages of 4 kB can take longer than to compute it.
void prefer_huge_pages(float* memory, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t HUGE = std::uintptr_t{1} << 21;
    const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(memory) + HUGE - 1) & ~(HUGE - 1);
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(memory) +
                                static_cast<std::uintptr_t>(bytes)) & ~(HUGE - 1);
    // Only a hint: a kernel without huge pages refuses, and nothing is lost.
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)bytes;
#endif
}

// Both widths of a linear layer must be multiples of 16.
void check_width(std::int64_t width, const char* what) {
    if (width < 1 || width % LINEAR_WIDTH != 0) {
        throw py::value_error(std::string(what) + " must be a positive multiple of 16, got " +
                              std::to_string(width));
    }
}

// out = in B + bias with element (k, j) of B at weight[k * row + j * column].
void linear_product(const LinearKernels& kernels, const float* in, const float* weight,
                    std::int64_t row, std::int64_t column, const float* bias, float* out,
                    std::int64_t rows, std::int64_t depth, std::int64_t columns,
                    int num_threads) {
    const Floats panels = allocate_floats(linear_packed(depth, columns), false);
    prefer_huge_pages(out, rows * columns * 4);
    kernels.pack(weight, row, column, depth, columns, panels.get());
    const LinearProduct p{in, panels.get(), bias, out, rows, depth, columns};
    parallel_items(num_threads, (rows + LINEAR_ROWS - 1) / LINEAR_ROWS,
                   rows * depth * columns >= GRAIN_LINEAR,
                   [&](std::int64_t begin, std::int64_t end) { kernels.multiply(&p, begin, end); });
}

void linear_forward(const py::object& x_, const py::object& weight_, const py::object& bias_,
                    const py::object& out_, int num_threads) {
    const py::array x = input<float>(x_, "x", 2), weight = input<float>(weight_, "weight", 2);
    const py::array bias = input<float>(bias_, "bias", 1);
    py::array out = output<float>(out_, "out", 2);
    check_threads(num_threads);
    const std::int64_t rows = x.shape(0), in = x.shape(1), columns = weight.shape(0);
    check_shape(weight, "weight", "[O, I]", {columns, in});
    check_shape(bias, "bias", "[O]", {columns});
    check_shape(out, "out", "[M, O]", {rows, columns});
    check_width(in, "I");
    check_width(columns, "O");
    check_overlap(out, "out", x, "x", false);
    const LinearKernels& kernels = FMREC_TABLE(linear);
    if (is_empty(out)) return;
    float* const to = target(out);
    py::gil_scoped_release release;
    linear_product(kernels, data<float>(x), data<float>(weight), 1, in, data<float>(bias), to,
                   rows, in, columns, num_threads);
}

void linear_backward(const py::object& grad_, const py::object& x_, const py::object& weight_,
                     const py::object& d_x_, const py::object& d_weight_,
                     const py::object& d_bias_, int num_threads) {
    const py::array grad = input<float>(grad_, "grad", 2), x = input<float>(x_, "x", 2);
    const py::array weight = input<float>(weight_, "weight", 2);
    check_threads(num_threads);
    const std::int64_t rows = x.shape(0), in = x.shape(1), columns = weight.shape(0);
    check_shape(weight, "weight", "[O, I]", {columns, in});
    check_shape(grad, "grad", "[M, O]", {rows, columns});
    check_width(in, "I");
    check_width(columns, "O");
    float *d_x = nullptr, *d_weight = nullptr, *d_bias = nullptr;
    if (!d_x_.is_none()) {
        py::array array = output<float>(d_x_, "d_x", 2);
        check_shape(array, "d_x", "[M, I]", {rows, in});
        d_x = target(array);
    }
    if (!d_weight_.is_none()) {
        py::array array = output<float>(d_weight_, "d_weight", 2);
        check_shape(array, "d_weight", "[O, I]", {columns, in});
        d_weight = target(array);
    }
    if (!d_bias_.is_none()) {
        py::array array = output<float>(d_bias_, "d_bias", 1);
        check_shape(array, "d_bias", "[O]", {columns});
        d_bias = target(array);
    }
    const LinearKernels& kernels = FMREC_TABLE(linear);
    py::gil_scoped_release release;
    if (d_x && rows > 0) {
        linear_product(kernels, data<float>(grad), data<float>(weight), in, 1, nullptr, d_x, rows,
                       columns, in, num_threads);
    }
    if (!d_weight && !d_bias) return;
    const bool swapped = in < columns;  // then the sums are those of the transposed gradient
    LinearGradient g{};
    g.a = swapped ? data<float>(x) : data<float>(grad);
    g.b = swapped ? data<float>(grad) : data<float>(x);
    g.grad = data<float>(grad);
    g.rows = rows;
    g.narrow = swapped ? in : columns;
    g.wide = swapped ? columns : in;
    g.width_of_grad = columns;
    const std::int64_t size = g.narrow * g.wide;
    const Floats partial = allocate_floats(LINEAR_PARTS * size, true);
    const Floats sums = allocate_floats(LINEAR_PARTS * columns, true);
    g.partial = partial.get();
    g.sums = sums.get();
    const Floats scratch =
        allocate_floats(LINEAR_PARTS * linear_gradient_scratch(g.narrow, g.wide), false);
    g.scratch = scratch.get();
    parallel_items(num_threads, LINEAR_PARTS, rows * size >= GRAIN_LINEAR,
                   [&](std::int64_t begin, std::int64_t end) { kernels.gradient(&g, begin, end); });
    for (std::int64_t part = 1; part < LINEAR_PARTS; ++part) {
        for (std::int64_t n = 0; n < size; ++n) g.partial[n] += g.partial[part * size + n];
        for (std::int64_t n = 0; n < columns; ++n) g.sums[n] += g.sums[part * columns + n];
    }
    for (std::int64_t o = 0; d_weight && o < columns; ++o) {
        for (std::int64_t i = 0; i < in; ++i) {
            d_weight[o * in + i] = g.partial[swapped ? i * columns + o : o * in + i];
        }
    }
    for (std::int64_t o = 0; d_bias && o < columns; ++o) d_bias[o] = g.sums[o];
}

void check_items(const py::array& ids, const char* name, std::int64_t least, std::int64_t items) {
    const std::int64_t* id = data<std::int64_t>(ids);
    for (py::ssize_t i = 0; i < ids.size(); ++i) {
        if (id[i] < least || id[i] >= items) {
            throw py::value_error(std::string(name) + " must be in " + std::to_string(least) +
                                  " .. V - 1 = " + std::to_string(items - 1) + ", got " +
                                  std::to_string(id[i]));
        }
    }
}

// rep [B, D], weight [V, D], and bias and exclude where they are given.
RankingCall ranking_call(const py::array& rep, const py::array& weight, const py::object& scale_,
                         const py::object& bias_, const py::object& exclude_, int num_threads) {
    RankingCall call{};
    call.rows = rep.shape(0);
    call.items = weight.shape(0);
    call.a.depth = rep.shape(1);
    check_shape(weight, "weight", "[V, D]", {call.items, rep.shape(1)});
    if (call.items >= std::int64_t{1} << 31) {
        throw py::value_error("weight must have less than 2**31 rows, got " +
                              std::to_string(call.items));
    }
    call.a.rep = data<float>(rep);
    call.a.weight = weight.data();
    call.a.type = weight.itemsize() == 4   ? TableType::float32
                  : weight.itemsize() == 2 ? TableType::bfloat16
                                           : TableType::int8;
    call.num_threads = check_threads(num_threads);
    if ((call.a.type == TableType::int8) != !scale_.is_none()) {
        throw py::value_error("an int8 weight comes with a scale, no other does");
    }
    if (!scale_.is_none()) {
        const py::array scale = input<float>(scale_, "scale", 1);
        check_shape(scale, "scale", "[V]", {call.items});
        call.a.scale = data<float>(scale);
    }
    if (!bias_.is_none()) {
        const py::array bias = input<float>(bias_, "bias", 1);
        check_shape(bias, "bias", "[V]", {call.items});
        call.a.bias = data<float>(bias);
    }
    if (!exclude_.is_none()) {
        const py::array exclude = input<std::int64_t>(exclude_, "exclude", 2);
        check_shape(exclude, "exclude", "[B, E]", {call.rows, exclude.shape(1)});
        check_items(exclude, "exclude", -1, call.items);
        call.exclude = data<std::int64_t>(exclude);
        call.excludes = exclude.shape(1);
    }
    return call;
}

bool is_table(const py::dtype& dtype) {
    return is_dtype<float>(dtype) || is_dtype<std::uint16_t>(dtype) || is_dtype<std::int8_t>(dtype);
}

py::array item_table(const py::object& weight) {
    return checked_array(weight, "weight", "float32, uint16 or int8", is_table, 2, false);
}

void item_topk(const py::object& rep_, const py::object& weight_, const py::object& scale,
               const py::object& bias, const py::object& exclude, const py::object& candidates_,
               const py::object& scores_, const py::object& ids_, int num_threads) {
    const py::array rep = input<float>(rep_, "rep", 2), weight = item_table(weight_);
    const RankingCall call = ranking_call(rep, weight, scale, bias, exclude, num_threads);
    py::array scores = output<float>(scores_, "scores", 2);
    py::array ids = output<std::int64_t>(ids_, "ids", 2);
    const std::int64_t k = scores.shape(1);
    check_shape(scores, "scores", "[B, k]", {call.rows, k});
    check_shape(ids, "ids", "[B, k]", {call.rows, k});
    const std::int64_t* candidates = nullptr;
    std::int64_t count = 0;
    bool per_row = false;
    if (!candidates_.is_none()) {
        per_row = py::isinstance<py::array>(candidates_) &&
                  py::reinterpret_borrow<py::array>(candidates_).ndim() == 2;
        const py::array array = input<std::int64_t>(candidates_, "candidates", per_row ? 2 : 1);
        count = array.shape(per_row ? 1 : 0);
        if (per_row) check_shape(array, "candidates", "[B, C]", {call.rows, count});
        check_items(array, "candidates", -1, call.items);
        candidates = data<std::int64_t>(array);
    }
    if (is_empty(scores)) return;
    float* const to = target(scores);
    std::int64_t* const to_ids = static_cast<std::int64_t*>(ids.mutable_data());
    py::gil_scoped_release release;
    rank_best(call, candidates, count, per_row, k, to, to_ids);
}

void target_rank(const py::object& rep_, const py::object& weight_, const py::object& bias,
                 const py::object& target_, const py::object& exclude, const py::object& ranks_,
                 int num_threads, const py::object& of_target_) {
    const py::array rep = input<float>(rep_, "rep", 2), weight = item_table(weight_);
    const RankingCall call = ranking_call(rep, weight, py::none(), bias, exclude, num_threads);
    const py::array wanted = input<std::int64_t>(target_, "target", 1);
    py::array ranks = output<std::int64_t>(ranks_, "ranks", 1);
    check_shape(wanted, "target", "[B]", {call.rows});
    const float* of_target = nullptr;
    if (of_target_.is_none()) {
        check_items(wanted, "target", 0, call.items);
    } else {
        const py::array given = input<float>(of_target_, "of_target", 1);
        check_shape(given, "of_target", "[B]", {call.rows});
        of_target = data<float>(given);
    }
    check_shape(ranks, "ranks", "[B]", {call.rows});
    if (is_empty(ranks)) return;
    std::int64_t* const to = static_cast<std::int64_t*>(ranks.mutable_data());
    py::gil_scoped_release release;
    rank_targets(call, data<std::int64_t>(wanted), of_target, to);
}

// The cells in use, gathered by `key` with a counting sort: bucket k holds, in their own order,
// the cells order[starts[k] .. starts[k + 1]).
struct Buckets {
    Indices order, starts;
};

Buckets make_buckets(const std::int64_t* key, const std::uint8_t* use, std::int64_t cells,
                     std::int64_t keys) {
    Buckets buckets{allocate(cells, false), allocate(keys + 2, true)};
    // Counted two places up, so that the placing below turns counts[k + 1] into starts[k + 1].
    std::int32_t* counts = buckets.starts.get();
    for (std::int64_t m = 0; m < cells; ++m) counts[key[m] + 2] += use[m] != 0;
    for (std::int64_t k = 0; k < keys; ++k) counts[k + 2] += counts[k + 1];
    for (std::int64_t m = 0; m < cells; ++m) {
        if (use[m]) buckets.order[static_cast<std::size_t>(counts[key[m] + 1]++)] =
            static_cast<std::int32_t>(m);
    }
    return buckets;
}

// Checks what forward and backward share and fills it in. Returns the number of cells.
std::int64_t history_common(HistoryLoss& a, const py::array& hidden, const py::array& weight,
                            const py::array& rows, const py::array& cols, const py::array& use) {
    const std::int64_t cells = rows.shape(0), batch = hidden.shape(0), items = weight.shape(0);
    check_shape(weight, "weight", "[V, H]", {items, hidden.shape(1)});
    check_shape(cols, "cols", "[M]", {cells});
    check_shape(use, "use", "[M]", {cells});
    if (cells >= INT32_MAX || items >= INT32_MAX - 2 || batch >= INT32_MAX - 2) {
        throw py::value_error("cells, rows and columns must each number below 2**31 - 2, got " +
                              std::to_string(cells) + ", " + std::to_string(batch) + ", " +
                              std::to_string(items));
    }
    a.rows = data<std::int64_t>(rows);
    a.cols = data<std::int64_t>(cols);
    for (std::int64_t m = 0; m < cells; ++m) {
        if (a.rows[m] < 0 || a.rows[m] >= batch) {
            throw py::value_error("rows[" + std::to_string(m) + "] must satisfy 0 <= row < " +
                                  std::to_string(batch) + ", got " + std::to_string(a.rows[m]));
        }
        if (a.cols[m] < 0 || a.cols[m] >= items) {
            throw py::value_error("cols[" + std::to_string(m) + "] must satisfy 0 <= col < " +
                                  std::to_string(items) + ", got " + std::to_string(a.cols[m]));
        }
    }
    a.hidden = data<float>(hidden);
    a.weight = data<float>(weight);
    a.features = hidden.shape(1);
    return cells;
}

// The first bucket of thread t: each thread's buckets hold about the same number of cells.
std::int64_t balanced(const std::int32_t* starts, std::int64_t keys, std::int64_t t,
                      std::int64_t threads) {
    if (t == 0) return 0;
    if (t == threads) return keys;
    const std::int64_t wanted = static_cast<std::int64_t>(starts[keys]) * t / threads;
    std::int64_t low = 0, high = keys;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (starts[middle] < wanted) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Rows whose gradients a part sums at a time, so that its partial sums stay in its L2.
constexpr std::int64_t XENT_PARTIAL_FLOATS = 1 << 17;

// What forward and the adjoint share: inputs, packed rows, scratch, and how the work is split.
struct XentCall {
    ItemCrossEntropy a{};
    std::vector<py::array> arrays;  // keeps them alive
    std::int64_t tiles = 0, chunks = 0, parts = 0;
    Floats columns, panels, scratch;
    bool worth_it = false;

    const float* optional(const py::object& object, const char* name, std::int64_t size) {
        if (object.is_none()) return nullptr;
        arrays.push_back(input<float>(object, name, 1));
        check_shape(arrays.back(), name, "[V]", {size});
        return data<float>(arrays.back());
    }

    XentCall(const py::object& rep_, const py::object& weight_, const py::object& bias_,
             const py::object& smoothing_, const py::object& target_, double scale,
             const py::object& cache_, int num_threads) {
        const py::array rep = input<float>(rep_, "rep", 2), weight = input<float>(weight_, "weight", 2);
        const py::array wanted = input<std::int64_t>(target_, "target", 1);
        check_threads(num_threads);
        a.batch = rep.shape(0);
        a.width = rep.shape(1);
        a.items = weight.shape(0);
        check_shape(weight, "weight", "[V, D]", {a.items, a.width});
        check_shape(wanted, "target", "[B]", {a.batch});
        if (a.items < 1) throw py::value_error("weight must have at least one row, got none");
        arrays = {rep, weight, wanted};
        a.rep = data<float>(rep);
        a.weight = data<float>(weight);
        a.target = data<std::int64_t>(wanted);
        a.bias = optional(bias_, "bias", a.items);
        a.smoothing = optional(smoothing_, "smoothing", a.items);
        a.scale = static_cast<float>(scale);
        tiles = (a.items + XENT_ITEMS - 1) / XENT_ITEMS;
        chunks = (a.batch + XENT_ROWS - 1) / XENT_ROWS;
        if (!cache_.is_none()) {
            py::array cache = output<float>(cache_, "cache", 1);
            check_shape(cache, "cache", "[tiles * chunks * block]",
                        {tiles * chunks * XENT_ITEMS * XENT_ROWS});
            a.cache = target(cache);
            arrays.push_back(cache);
        }
        worth_it = a.batch * a.items * a.width >= GRAIN_XENT;
        parts = worth_it && num_threads > 1 ? std::min<std::int64_t>(num_threads, tiles) : 1;
        columns = allocate_floats(chunks * xent_packed(a.width), false);
        panels = allocate_floats(chunks * xent_packed(a.width), false);
        scratch = allocate_floats(parts * xent_scratch(a.width), false);
        a.columns = columns.get();
        a.panels = panels.get();
        a.scratch = scratch.get();
    }

    // work(part, first tile, last tile), every part by a thread of its own.
    template <typename Work>
    void run(int num_threads, Work work) {
        parallel_items(num_threads, parts, worth_it, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t part = begin; part < end; ++part) {
                work(part, tiles * part / parts, tiles * (part + 1) / parts);
            }
        });
    }

    void pack(const ItemCrossEntropyKernels& kernels, int num_threads) {
        parallel_items(num_threads, chunks, worth_it, [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t chunk = begin; chunk < end; ++chunk) kernels.pack(&a, chunk);
        });
    }
};

void item_cross_entropy_forward(const py::object& rep, const py::object& weight,
                                const py::object& bias, const py::object& smoothing,
                                const py::object& target_, double scale,
                                const py::object& statistics_, const py::object& cache,
                                int num_threads) {
    XentCall call(rep, weight, bias, smoothing, target_, scale, cache, num_threads);
    ItemCrossEntropy& a = call.a;
    py::array statistics = checked_array(statistics_, "statistics", "float64", is_dtype<double>, 2,
                                         true);
    check_shape(statistics, "statistics", "[4, B]", {4, a.batch});
    double* const out = static_cast<double*>(statistics.mutable_data());
    const ItemCrossEntropyKernels& kernels = FMREC_TABLE(item_cross_entropy);
    if (a.batch == 0) return;
    py::gil_scoped_release release;
    const std::int64_t padded = call.chunks * XENT_ROWS;
    const Floats largest = allocate_floats(call.parts * padded, false);
    const Floats at_target = allocate_floats(padded, true);
    std::vector<double> sum(static_cast<std::size_t>(call.parts * padded)), dot(sum.size());
    a.largest = largest.get();
    a.at_target = at_target.get();
    a.sum = sum.data();
    a.dot = dot.data();
    call.pack(kernels, num_threads);
    call.run(num_threads, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
        kernels.forward(&a, part, begin, end);
    });
    // The sums of s over each part's items, to move its `dot` to the common maximum.
    std::vector<double> weights(static_cast<std::size_t>(call.parts));
    for (std::int64_t part = 0; part < call.parts; ++part) {
        const std::int64_t begin = call.tiles * part / call.parts * XENT_ITEMS;
        const std::int64_t end =
            std::min<std::int64_t>(call.tiles * (part + 1) / call.parts * XENT_ITEMS, a.items);
        double& total = weights[static_cast<std::size_t>(part)];
        total = a.smoothing ? 0.0 : static_cast<double>(end - begin);
        for (std::int64_t i = begin; a.smoothing && i < end; ++i) total += a.smoothing[i];
    }
    for (std::int64_t b = 0; b < a.batch; ++b) {
        float top = a.largest[b];
        for (std::int64_t part = 1; part < call.parts; ++part) {
            top = std::max(top, a.largest[part * padded + b]);
        }
        double total = 0.0, moved = 0.0;
        for (std::int64_t part = 0; part < call.parts; ++part) {
            const double fall = static_cast<double>(a.largest[part * padded + b]) - top;
            total += a.sum[part * padded + b] * std::exp2(fall);
            moved += a.dot[part * padded + b] + weights[static_cast<std::size_t>(part)] * fall;
        }
        out[b] = top;
        out[a.batch + b] = total;
        out[2 * a.batch + b] = static_cast<double>(top) - a.at_target[b];
        out[3 * a.batch + b] = moved;
    }
}

void item_cross_entropy_backward(const py::object& rep, const py::object& weight,
                                 const py::object& bias, const py::object& smoothing,
                                 const py::object& target_, double scale,
                                 const py::object& rows_, double filter, const py::object& cache,
                                 const py::object& d_rep_, const py::object& d_weight_,
                                 const py::object& d_bias_, int num_threads) {
    XentCall call(rep, weight, bias, smoothing, target_, scale, cache, num_threads);
    ItemCrossEntropy& a = call.a;
    const py::array given = input<float>(rows_, "rows", 2);
    check_shape(given, "rows", "[5, B]", {5, a.batch});
    a.filter = static_cast<float>(filter);
    float* d_rep = nullptr;
    if (!d_rep_.is_none()) {
        py::array array = output<float>(d_rep_, "d_rep", 2);
        check_shape(array, "d_rep", "[B, D]", {a.batch, a.width});
        d_rep = target(array);
    }
    if (!d_weight_.is_none()) {
        py::array array = output<float>(d_weight_, "d_weight", 2);
        check_shape(array, "d_weight", "[V, D]", {a.items, a.width});
        a.d_weight = target(array);
    }
    if (!d_bias_.is_none()) {
        py::array array = output<float>(d_bias_, "d_bias", 1);
        check_shape(array, "d_bias", "[V]", {a.items});
        a.d_bias = target(array);
    }
    const ItemCrossEntropyKernels& kernels = FMREC_TABLE(item_cross_entropy);
    py::gil_scoped_release release;
    if (a.batch == 0) {
        std::fill_n(a.d_weight, a.d_weight ? a.items * a.width : 0, 0.0f);
        std::fill_n(a.d_bias, a.d_bias ? a.items : 0, 0.0f);
        return;
    }
    // Whole chunks: what lies past the rows has no probability and coefficients of 0.
    const std::int64_t padded = call.chunks * XENT_ROWS;
    const Floats rows = allocate_floats(5 * padded, true);
    std::fill_n(rows.get() + a.batch, padded - a.batch, 3.0e38f);
    for (std::int64_t row = 0; row < 5; ++row) {
        std::copy_n(data<float>(given) + row * a.batch, a.batch, rows.get() + row * padded);
    }
    a.largest = rows.get();
    a.coefficient = rows.get() + padded;
    a.smooth = rows.get() + 2 * padded;
    a.at_target = rows.get() + 3 * padded;
    a.share = rows.get() + 4 * padded;
    if (a.d_weight) prefer_huge_pages(a.d_weight, a.items * a.width * 4);
    call.pack(kernels, num_threads);
    const std::int64_t wide = xent_padded(a.width);
    const std::int64_t group = XENT_PARTIAL_FLOATS / (XENT_ROWS * (wide + XENT_WIDTH)) + 1;
    for (a.first_chunk = 0; a.first_chunk < call.chunks; a.first_chunk = a.last_chunk) {
        a.last_chunk = std::min(a.first_chunk + group, call.chunks);
        a.add = a.first_chunk > 0;
        const std::int64_t size = (a.last_chunk - a.first_chunk) * XENT_ROWS * wide;
        const Floats partial = allocate_floats(d_rep ? call.parts * size : 0, true);
        a.d_rep = d_rep ? partial.get() : nullptr;
        call.run(num_threads, [&](std::int64_t part, std::int64_t begin, std::int64_t end) {
            kernels.backward(&a, part, begin, end);
        });
        if (!d_rep) continue;
        const std::int64_t first = a.first_chunk * XENT_ROWS;
        const std::int64_t count = std::min(a.last_chunk * XENT_ROWS, a.batch) - first;
        parallel_items(num_threads, count, call.parts * count * wide >= GRAIN_LINEAR,
                       [&](std::int64_t begin, std::int64_t end) {
            for (std::int64_t b = begin; b < end; ++b) {
                float* to = d_rep + (first + b) * a.width;
                const float* from = partial.get() + b * wide;
                for (std::int64_t d = 0; d < a.width; ++d) {
                    float total = from[d];
                    for (std::int64_t part = 1; part < call.parts; ++part) {
                        total += from[part * size + d];
                    }
                    to[d] = total * a.scale;
                }
            }
        });
    }
}

void history_loss_forward(const py::object& hidden_, const py::object& weight_,
                          const py::object& bias_, const py::object& rows_,
                          const py::object& cols_, const py::object& label_,
                          const py::object& use_, const py::object& residual_, int num_threads) {
    const py::array hidden = input<float>(hidden_, "hidden", 2),
                    weight = input<float>(weight_, "weight", 2),
                    bias = input<float>(bias_, "bias", 1),
                    rows = input<std::int64_t>(rows_, "rows", 1),
                    cols = input<std::int64_t>(cols_, "cols", 1),
                    label = input<float>(label_, "label", 1),
                    use = checked_array(use_, "use", "bool or uint8", is_flag, 1, false);
    py::array residual = output<float>(residual_, "residual", 1);
    check_threads(num_threads);
    HistoryLoss a{};
    const std::int64_t cells = history_common(a, hidden, weight, rows, cols, use);
    check_shape(bias, "bias", "[V]", {weight.shape(0)});
    check_shape(label, "label", "[M]", {cells});
    check_shape(residual, "residual", "[M]", {cells});
    check_overlap(residual, "residual", hidden, "hidden", false);
    check_overlap(residual, "residual", weight, "weight", false);
    check_overlap(residual, "residual", bias, "bias", false);
    check_overlap(residual, "residual", label, "label", false);
    const HistoryLossKernels& kernels = FMREC_TABLE(history_loss);
    a.bias = data<float>(bias);
    a.label = data<float>(label);
    a.residual = target(residual);
    const std::uint8_t* flags = data<std::uint8_t>(use);
    const std::int64_t items = weight.shape(0);
    py::gil_scoped_release release;
    const Buckets columns = make_buckets(a.cols, flags, cells, items);
    a.order = columns.order.get();
    const std::int64_t used = columns.starts[static_cast<std::size_t>(items)];
    for (std::int64_t m = 0; m < cells; ++m) {
        if (!flags[m]) a.residual[m] = 0.0f;
    }
    parallel_items(num_threads, used, used * a.features >= GRAIN_HISTORY,
                   [&](std::int64_t begin, std::int64_t end) { kernels.forward(&a, begin, end); });
}

void history_loss_backward(const py::object& hidden_, const py::object& weight_,
                           const py::object& rows_, const py::object& cols_, const py::object& g_,
                           const py::object& use_, const py::object& d_hidden_,
                           const py::object& d_weight_, const py::object& d_bias_,
                           int num_threads) {
    const py::array hidden = input<float>(hidden_, "hidden", 2),
                    weight = input<float>(weight_, "weight", 2),
                    rows = input<std::int64_t>(rows_, "rows", 1),
                    cols = input<std::int64_t>(cols_, "cols", 1), g = input<float>(g_, "g", 1),
                    use = checked_array(use_, "use", "bool or uint8", is_flag, 1, false);
    check_threads(num_threads);
    HistoryLoss a{};
    const std::int64_t cells = history_common(a, hidden, weight, rows, cols, use);
    const std::int64_t batch = hidden.shape(0), items = weight.shape(0);
    check_shape(g, "g", "[M]", {cells});
    a.g = data<float>(g);
    if (!d_hidden_.is_none()) {
        py::array d_hidden = output<float>(d_hidden_, "d_hidden", 2);
        check_shape(d_hidden, "d_hidden", "[B, H]", {batch, a.features});
        check_overlap(d_hidden, "d_hidden", hidden, "hidden", false);
        check_overlap(d_hidden, "d_hidden", weight, "weight", false);
        check_overlap(d_hidden, "d_hidden", g, "g", false);
        a.d_hidden = target(d_hidden);
    }
    if (!d_weight_.is_none()) {
        py::array d_weight = output<float>(d_weight_, "d_weight", 2);
        check_shape(d_weight, "d_weight", "[V, H]", {items, a.features});
        check_overlap(d_weight, "d_weight", hidden, "hidden", false);
        check_overlap(d_weight, "d_weight", weight, "weight", false);
        check_overlap(d_weight, "d_weight", g, "g", false);
        a.d_weight = target(d_weight);
    }
    if (!d_bias_.is_none()) {
        py::array d_bias = output<float>(d_bias_, "d_bias", 1);
        check_shape(d_bias, "d_bias", "[V]", {items});
        check_overlap(d_bias, "d_bias", g, "g", false);
        a.d_bias = target(d_bias);
    }
    const HistoryLossKernels& kernels = FMREC_TABLE(history_loss);
    const std::uint8_t* flags = data<std::uint8_t>(use);
    py::gil_scoped_release release;
    const bool worth_it = cells * a.features >= GRAIN_HISTORY;
    if (a.d_hidden) {
        const Buckets by_row = make_buckets(a.rows, flags, cells, batch);
        a.order = by_row.order.get();
        a.starts = by_row.starts.get();
        parallel_ranges(
            num_threads, worth_it,
            [&](std::int64_t t, std::int64_t threads) {
                return balanced(a.starts, batch, t, threads);
            },
            [&](std::int64_t begin, std::int64_t end) { kernels.backward_rows(&a, begin, end); });
    }
    if (a.d_weight || a.d_bias) {
        const Buckets by_column = make_buckets(a.cols, flags, cells, items);
        a.order = by_column.order.get();
        a.starts = by_column.starts.get();
        parallel_ranges(
            num_threads, worth_it && a.d_weight,
            [&](std::int64_t t, std::int64_t threads) {
                return balanced(a.starts, items, t, threads);
            },
            [&](std::int64_t begin, std::int64_t end) {
                kernels.backward_columns(&a, begin, end);
            });
    }
}

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
                                            const py::object& rotary_) {
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
        new PackedEncoder(arrays, channels, features, heads, rotary, length));
}

Encoder make_encoder(const PackedEncoder& packed, std::int64_t length) {
    if (packed.tiles() != (isa() == Isa::amx)) {
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
    if (encoder.rotary && packed.length() != length) {
        throw py::value_error("rotary must be for L = " + std::to_string(length) +
                              " positions, got " + std::to_string(packed.length()));
    }
    return encoder;
}

// Sequences that go through the stack together: as many as share a block's weights while their
// activations stay in the cache, and as few as give every thread the same number of groups.
std::int64_t group_size(const Encoder& encoder, std::int64_t batch, std::int64_t num_threads) {
    const std::int64_t sequence = encoder.length * row_stride(encoder.channels);
    std::int64_t most = GROUP_FLOATS / sequence;
    most = most < 1 ? 1 : most > MOST_IN_GROUP ? MOST_IN_GROUP : most;
    const std::int64_t rounds = (batch + num_threads * most - 1) / (num_threads * most);
    return (batch + num_threads * rounds - 1) / (num_threads * rounds);
}

// Runs all groups, from bounds[i] to bounds[i + 1]: a thread takes the next one when it is done.
template <typename Kernels, typename Arguments>
void run_ranges(const Kernels& kernels, const Arguments& a, const std::vector<std::int64_t>& bounds,
                int num_threads) {
    const std::int64_t groups = static_cast<std::int64_t>(bounds.size()) - 1;
    std::int64_t most = 0;
    for (std::int64_t i = 0; i < groups; ++i) {
        const std::int64_t size = bounds[static_cast<std::size_t>(i) + 1] -
                                  bounds[static_cast<std::size_t>(i)];
        most = size > most ? size : most;
    }
    const std::int64_t slabs = groups < num_threads ? groups : num_threads;
    const std::int64_t slab_size = round_up(kernels.scratch(&a, most), UNIT);
    const Floats memory = allocate_floats(slabs * slab_size, true);
    std::atomic<std::int64_t> next_group{0}, next_slab{0};
    parallel_items(num_threads, num_threads, groups > 1, [&](std::int64_t, std::int64_t) {
        std::int64_t group = next_group.fetch_add(1);
        if (group >= groups) return;
        float* slab = memory.get() + next_slab.fetch_add(1) * slab_size;
        for (; group < groups; group = next_group.fetch_add(1)) {
            const std::size_t i = static_cast<std::size_t>(group);
            kernels.run(&a, bounds[i], bounds[i + 1], slab);
        }
    });
}

// Runs all sequences, group by group. A sequence's result does not depend on its group.
template <typename Kernels, typename Arguments>
void run_groups(const Kernels& kernels, const Arguments& a, std::int64_t batch, int num_threads) {
    const std::int64_t size = group_size(a.encoder, batch, num_threads);
    const std::int64_t groups = (batch + size - 1) / size;
    // Equal groups, the larger ones first: 30 sequences on two threads are 8 + 7 on each.
    std::vector<std::int64_t> bounds;
    for (std::int64_t group = 0; group <= groups; ++group) {
        const std::int64_t larger = batch % groups;
        bounds.push_back(group * (batch / groups) + (group < larger ? group : larger));
    }
    run_ranges(kernels, a, bounds, num_threads);
}

// start[b]: the rows before sequence b when the padded prefix of a sequence is one token.
std::vector<std::int64_t> tied_rows(const float* mask, std::int64_t batch, std::int64_t length) {
    std::vector<std::int64_t> start(1, 0);
    for (std::int64_t b = 0; b < batch; ++b) {
        std::int64_t padding = 0;
        while (padding < length && mask[b * length + padding] == 0.0f) ++padding;
        start.push_back(start.back() + length - (padding > 1 ? padding - 1 : 0));
    }
    return start;
}

// Groups of about as many rows as each thread's equal share in a few rounds; each row of the batch
// has `points` sequences. Sets what the arguments hold of tied padding.
template <typename Kernels, typename Arguments>
void run_tied(const Kernels& kernels, Arguments& a, std::int64_t points, int num_threads) {
    const std::vector<std::int64_t> start = tied_rows(a.mask, a.batch, a.encoder.length);
    const std::int64_t most = GROUP_FLOATS / row_stride(a.encoder.channels);
    const std::int64_t total = points * start.back();
    const std::int64_t rounds = (total + num_threads * most - 1) / (num_threads * most);
    const std::int64_t share = (total + num_threads * rounds - 1) / (num_threads * rounds);
    std::vector<std::int64_t> bounds(1, 0);
    std::int64_t rows = 0;
    for (std::int64_t s = 0; s < points * a.batch; ++s) {
        const std::size_t b = static_cast<std::size_t>(s / points);
        rows += start[b + 1] - start[b];
        if (rows >= share || s + 1 == points * a.batch) {
            bounds.push_back(s + 1);
            a.group_rows = rows > a.group_rows ? rows : a.group_rows;
            rows = 0;
        }
    }
    a.start = start.data();
    run_ranges(kernels, a, bounds, num_threads);
    a.start = nullptr;
}

template <typename Kernels, typename Arguments>
void run_sequences(const Kernels& kernels, Arguments& a, std::int64_t points, bool tied,
                   int num_threads) {
    if (tied) {
        run_tied(kernels, a, points, num_threads);
    } else {
        run_groups(kernels, a, points * a.batch, num_threads);
    }
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

// The arrays of a SamplerNetwork, kept while the kernel runs.
struct NetworkArrays {
    py::array norm_weight, norm_bias, e, mask, taus, noise, rows;
};

// Checks what the samplers share and fills it in; `out` must overlap none of it.
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

void euler_sampler(const PackedEncoder& packed, const py::object& norm_weight,
                   const py::object& norm_bias, const py::object& e, const py::object& mask,
                   const py::object& z0_, const py::object& taus, const py::object& noise,
                   const py::object& rows, const py::object& seed, double delta,
                   const py::object& out_, int num_threads, bool tied) {
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
    py::gil_scoped_release release;
    run_sequences(kernels, a, 1, tied, num_threads);
}

// All steps at once, as fmrec_fast/picard.py: from the straight way to the first step's prediction,
// sweeps over all points of a row's trajectory until its residual is at most `tolerance`.
void picard(const EulerSampler& a, const PicardSweepKernels& kernels, double tolerance, bool tied,
            int num_threads) {
    const std::int64_t channels = a.encoder.channels, steps = a.steps, size = a.batch * channels;
    const Floats memory = allocate_floats(2 * steps * size, false);
    float* const points = memory.get();  // [B, q, D]
    float* const predictions = points + steps * size;
    PicardSweep sweep{};
    static_cast<SamplerNetwork&>(sweep) = a;
    sweep.x = a.z0;
    sweep.out = predictions;
    sweep.steps = 1;
    run_sequences(kernels, sweep, 1, tied, num_threads);
    std::vector<double> before(static_cast<std::size_t>(a.batch));
    for (std::int64_t b = 0; b < a.batch; ++b) {
        double squares = 0.0;
        for (std::int64_t j = 0; j < channels; ++j) {
            const std::int64_t at = b * channels + j;
            const float z0 = a.z0[at], velocity = predictions[at] - z0;
            for (std::int64_t i = 0; i < steps; ++i) {
                points[(b * steps + i) * channels + j] =
                    z0 + velocity * (static_cast<float>(i) / static_cast<float>(steps));
            }
            a.out[at] = z0 + velocity;
            squares += static_cast<double>(velocity) * velocity;
        }
        before[static_cast<std::size_t>(b)] = std::sqrt(squares);
    }
    sweep.x = points;
    sweep.steps = steps;
    std::vector<bool> settled(static_cast<std::size_t>(a.batch), false);
    bool all = false;
    // After q - 1 sweeps the result is exact.
    for (std::int64_t n = 1; n < steps && !all; ++n) {
        run_sequences(kernels, sweep, steps, tied, num_threads);
        all = true;
        for (std::int64_t b = 0; b < a.batch; ++b) {
            const std::size_t row = static_cast<std::size_t>(b);
            if (settled[row]) continue;
            double squares = 0.0, moved = 0.0;
            for (std::int64_t j = 0; j < channels; ++j) {
                const std::int64_t at = b * channels + j;
                const float z0 = a.z0[at];
                float sum = 0.0f;
                for (std::int64_t i = 0; i < steps; ++i) {
                    const std::int64_t p = (b * steps + i) * channels + j;
                    points[p] = z0 + sum / static_cast<float>(steps);
                    sum += predictions[p] - z0;
                }
                const float end = z0 + sum / static_cast<float>(steps);
                moved += static_cast<double>(end - a.out[at]) * (end - a.out[at]);
                squares += static_cast<double>(end) * end;
                a.out[at] = end;
            }
            const double change = std::sqrt(moved);
            const double residual = moved / (before[row] * std::sqrt(squares));
            before[row] = change;
            // Not so where it is NaN: then sweeps go on, as many as there are.
            settled[row] = change == 0.0 || residual <= tolerance;
            all = all && settled[row];
        }
    }
}

// From ids to the best items: embedding, start, sampler and ranking in one call. A tolerance above
// 0 chooses the sampler that takes all steps at once.
void recommend(const PackedEncoder& packed, const py::object& norm_weight_,
               const py::object& norm_bias_, const py::object& items_,
               const py::object& embedded_weight_, const py::object& embedded_bias_,
               const py::object& ids_, const py::object& taus_, const py::object& rows_,
               const py::object& seed, const py::object& start_seed, double delta,
               const py::object& exclude, const py::object& scores_, const py::object& best_,
               int num_threads, bool tied, double tolerance) {
    const py::array norm_weight = input<float>(norm_weight_, "norm_weight", 1),
                    norm_bias = input<float>(norm_bias_, "norm_bias", 1),
                    items = input<float>(items_, "items", 2),
                    embedded_weight = input<float>(embedded_weight_, "embedded_weight", 1),
                    embedded_bias = input<float>(embedded_bias_, "embedded_bias", 1),
                    ids = input<std::int64_t>(ids_, "ids", 2),
                    taus = input<float>(taus_, "taus", 2),
                    rows = input<std::int64_t>(rows_, "rows", 1);
    py::array scores = output<float>(scores_, "scores", 2);
    py::array best = output<std::int64_t>(best_, "best", 2);
    check_threads(num_threads);
    const std::int64_t channels = packed.channels(), batch = ids.shape(0), length = ids.shape(1);
    EulerSampler a{};
    a.encoder = make_encoder(packed, length);
    a.batch = batch;
    a.steps = taus.shape(0);
    if (a.steps < 1) throw py::value_error("there must be at least one step, got q = 0");
    check_shape(norm_weight, "norm_weight", "[D]", {channels});
    check_shape(norm_bias, "norm_bias", "[D]", {channels});
    check_shape(items, "items", "[V, D]", {items.shape(0), channels});
    check_shape(embedded_weight, "embedded_weight", "[D]", {channels});
    check_shape(embedded_bias, "embedded_bias", "[D]", {channels});
    check_shape(taus, "taus", "[q, D]", {a.steps, channels});
    check_shape(rows, "rows", "[B]", {batch});
    const std::int64_t k = scores.shape(1);
    check_shape(scores, "scores", "[B, k]", {batch, k});
    check_shape(best, "best", "[B, k]", {batch, k});
    if (k > items.shape(0)) {
        throw py::value_error("k must be at most V = " + std::to_string(items.shape(0)) +
                              ", got " + std::to_string(k));
    }
    const std::int64_t* const id = data<std::int64_t>(ids);
    for (std::int64_t i = 0; i < batch * length; ++i) {
        if (id[i] < 0 || id[i] >= items.shape(0)) {
            throw py::value_error("ids must be in 0 .. " + std::to_string(items.shape(0) - 1) +
                                  ", got " + std::to_string(id[i]));
        }
    }
    a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    a.delta = static_cast<float>(delta);
    a.norm_weight = data<float>(norm_weight);
    a.norm_bias = data<float>(norm_bias);
    a.rows = data<std::int64_t>(rows);
    a.taus = data<float>(taus);
    Recommend r{};
    r.items = data<float>(items);
    r.norm_weight = data<float>(embedded_weight);
    r.norm_bias = data<float>(embedded_bias);
    r.ids = id;
    r.rows = a.rows;
    r.seed = static_cast<std::uint64_t>(read_int64(start_seed, "start_seed"));
    r.batch = batch;
    r.length = length;
    r.channels = channels;
    py::array_t<float> rep({batch, channels});
    const RankingCall ranking =
        ranking_call(rep, items, py::none(), py::none(), exclude, num_threads);
    const RecommendKernels& kernels = FMREC_TABLE(recommend);
    const EulerSamplerKernels& sampler = FMREC_TABLE(euler_sampler);
    if (is_empty(scores)) return;
    float* const to = target(scores);
    std::int64_t* const to_ids = static_cast<std::int64_t*>(best.mutable_data());
    a.out = rep.mutable_data();
    py::gil_scoped_release release;
    const Floats memory = allocate_floats(
        batch * length * (channels + 1) + batch * channels + kernels.scratch(&r), false);
    r.e = memory.get();
    r.mask = r.e + batch * length * channels;
    r.z0 = r.mask + batch * length;
    kernels.prepare(&r, r.z0 + batch * channels);
    a.e = r.e;
    a.mask = r.mask;
    a.z0 = r.z0;
    if (tolerance > 0.0) {
        picard(a, FMREC_TABLE(picard_sweep), tolerance, tied, num_threads);
    } else {
        run_sequences(sampler, a, 1, tied, num_threads);
    }
    rank_best(ranking, nullptr, 0, false, k, to, to_ids);
}

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

// What forward and backward share, checked and filled in.
void attention_common(Attention& a, const py::array& qkv, const py::array& query_scale,
                      const py::array& rows, const py::object& seed, const py::object& site,
                      double p, std::int64_t num_heads) {
    if (!(p >= 0.0 && p < 1.0)) {
        throw py::value_error("p must satisfy 0 <= p < 1, got " + text(py::float_(p)));
    }
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
    // Python's round(): halves to even, the rounding mode's default.
    const double threshold = std::nearbyint(p * 4294967296.0);
    a.threshold = static_cast<std::uint32_t>(threshold < 4294967295.0 ? threshold : 4294967295.0);
    a.scale = static_cast<float>(1.0 / (1.0 - p));
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
                                            GRAIN_ATTENTION;
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

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

py::list supported_isas() {
    py::list names;
    for (int i = 0; i < ISA_COUNT; ++i) {
        if (isa_supported(static_cast<Isa>(i))) names.append(isa_name(static_cast<Isa>(i)));
    }
    return names;
}

py::dict build_info() {
    py::dict info;
#if defined(__clang__)
    info["compiler"] = std::string("clang ") + __clang_version__;
#else
    info["compiler"] = std::string("gcc ") + __VERSION__;
#endif
    py::list isas;
    isas.append("scalar");
#ifdef FMREC_X86
    isas.append("avx2");
    isas.append("avx512");
#ifdef FMREC_AMX
    isas.append("amx");
#endif
#endif
    info["isas"] = isas;
    info["openmp"] = has_openmp();
    info["cxx"] = static_cast<long>(__cplusplus);
    info["pybind11"] = std::to_string(PYBIND11_VERSION_MAJOR) + "." +
                       std::to_string(PYBIND11_VERSION_MINOR);
    return info;
}

}  // namespace
}  // namespace fmrec

PYBIND11_MODULE(_C, m) {
    using namespace fmrec;
    watch_forks();
    m.doc() = "C++ CPU kernels of fmrec_fast; arrays are numpy's and are never converted.";
    m.def("noise_fusion_forward", &noise_fusion_forward, py::arg("e"), py::arg("shift"),
          py::arg("rows"), py::arg("seed"), py::arg("step"), py::arg("delta"), py::arg("out"),
          py::arg("num_threads"),
          "out = e + lam * shift[:, None, :], lam of the noise stream. out may be e.");
    m.def("noise_fusion_backward", &noise_fusion_backward, py::arg("grad"), py::arg("rows"),
          py::arg("seed"), py::arg("step"), py::arg("delta"), py::arg("d_shift"),
          py::arg("num_threads"), "d_shift = (lam * grad).sum(1), lam regenerated.");
    m.def("noise_lambda", &noise_lambda, py::arg("rows"), py::arg("seed"), py::arg("step"),
          py::arg("delta"), py::arg("out"), py::arg("num_threads"), "out = lam.");
    m.def("attention_forward", &attention_forward, py::arg("qkv"), py::arg("query_scale"),
          py::arg("rows"), py::arg("seed"), py::arg("site"), py::arg("p"), py::arg("out"),
          py::arg("num_heads"), py::arg("num_threads"),
          "out = dropout(softmax((query_scale * q) k^T)) v, head by head.");
    m.def("attention_backward", &attention_backward, py::arg("grad"), py::arg("qkv"),
          py::arg("query_scale"), py::arg("rows"), py::arg("seed"), py::arg("site"),
          py::arg("p"), py::arg("d_qkv"), py::arg("num_heads"), py::arg("num_threads"),
          "Adjoint of attention_forward in qkv; masks and probabilities are computed anew.");
    m.def("dropout", &dropout, py::arg("x"), py::arg("residual").none(true), py::arg("rows"),
          py::arg("seed"), py::arg("site"), py::arg("position_offset"),
          py::arg("position_stride"), py::arg("p"), py::arg("out"), py::arg("num_threads"),
          py::arg("gelu") = false, py::arg("gelu_at").none(true) = py::none(),
          py::arg("times").none(true) = py::none(),
          "out = residual + where(word >= round(p * 2**32), f(x) / (1 - p), 0), f the identity, "
          "tanh-GELU (gelu), x * gelu'(gelu_at), or x * times * gelu''(gelu_at). out may be x.");
    m.def("linear_forward", &linear_forward, py::arg("x"), py::arg("weight"), py::arg("bias"),
          py::arg("out"), py::arg("num_threads"), "out = x @ weight.T + bias.");
    m.def("linear_backward", &linear_backward, py::arg("grad"), py::arg("x"), py::arg("weight"),
          py::arg("d_x").none(true), py::arg("d_weight").none(true), py::arg("d_bias").none(true),
          py::arg("num_threads"),
          "d_x = grad @ weight, d_weight = grad.T @ x, d_bias = grad.sum(0), each unless None.");
    m.def("item_cross_entropy_forward", &item_cross_entropy_forward, py::arg("rep"),
          py::arg("weight"), py::arg("bias").none(true), py::arg("smoothing").none(true),
          py::arg("target"), py::arg("scale"), py::arg("statistics"), py::arg("cache").none(true),
          py::arg("num_threads"),
          "statistics [4, B] of the scores x in base 2: max x, sum 2^(x - max), max - x[target], "
          "sum smoothing (x - max); cache keeps the scores for the adjoint.");
    m.def("item_cross_entropy_backward", &item_cross_entropy_backward, py::arg("rep"),
          py::arg("weight"), py::arg("bias").none(true), py::arg("smoothing").none(true),
          py::arg("target"), py::arg("scale"), py::arg("rows"), py::arg("filter"),
          py::arg("cache").none(true), py::arg("d_rep").none(true),
          py::arg("d_weight").none(true), py::arg("d_bias").none(true), py::arg("num_threads"),
          "Adjoint of the statistics; rows [5, B]: max x, coefficient, smooth, at_target, share.");
    m.def("item_cross_entropy_cache", [](std::int64_t batch, std::int64_t items) {
              return (items + XENT_ITEMS - 1) / XENT_ITEMS * ((batch + XENT_ROWS - 1) / XENT_ROWS) *
                     XENT_ITEMS * XENT_ROWS;
          }, py::arg("batch"), py::arg("items"), "Floats of a cache of all scores.");
    m.def("history_loss_forward", &history_loss_forward, py::arg("hidden"), py::arg("weight"),
          py::arg("bias"), py::arg("rows"), py::arg("cols"), py::arg("label"), py::arg("use"),
          py::arg("residual"), py::arg("num_threads"),
          "residual = where(use, (hidden[rows] * weight[cols]).sum(1) + bias[cols] - label, 0).");
    m.def("history_loss_backward", &history_loss_backward, py::arg("hidden"), py::arg("weight"),
          py::arg("rows"), py::arg("cols"), py::arg("g"), py::arg("use"),
          py::arg("d_hidden").none(true), py::arg("d_weight").none(true),
          py::arg("d_bias").none(true), py::arg("num_threads"),
          "Adjoint of the residuals: writes d_hidden, adds to d_weight and d_bias.");
    m.def("item_topk", &item_topk, py::arg("rep"), py::arg("weight"), py::arg("scale").none(true),
          py::arg("bias").none(true), py::arg("exclude").none(true),
          py::arg("candidates").none(true), py::arg("scores"), py::arg("ids"),
          py::arg("num_threads"),
          "scores, ids = the k best of rep @ (scale * weight).T + bias, ties towards the lower id; "
          "weight is float32, bfloat16 (as uint16) or int8.");
    m.def("target_rank", &target_rank, py::arg("rep"), py::arg("weight"),
          py::arg("bias").none(true), py::arg("target"), py::arg("exclude").none(true),
          py::arg("ranks"), py::arg("num_threads"), py::arg("of_target") = py::none(),
          "ranks = 1 + number of items ahead of the target, whose score may be given: then it need "
          "not be an item of this table, and target is where it would be.");
    py::class_<PackedEncoder>(m, "PackedEncoder",
                              "The weights of a transformer stack, copied and packed.")
        .def(py::init(&pack_encoder), py::arg("blocks"), py::arg("num_heads"),
             py::arg("rotary") = py::none(),
             "blocks: the arrays of each block, as BlockWeights, None for the biases of RMS norms; "
             "rotary: cosines and sines of half a head at each position [L, D / num_heads].")
        .def_property_readonly("nbytes", &PackedEncoder::bytes);
    m.def("encoder_forward", &encoder_forward, py::arg("packed"), py::arg("x"), py::arg("mask"),
          py::arg("tap"), py::arg("out"), py::arg("tapped").none(true), py::arg("num_threads"),
          py::arg("first_key_bias").none(true) = py::none(),
          "The last position's output, and that of block tap where tapped is given.");
    m.def("euler_sampler", &euler_sampler, py::arg("packed"), py::arg("norm_weight"),
          py::arg("norm_bias"), py::arg("e"), py::arg("mask"), py::arg("z0"), py::arg("taus"),
          py::arg("noise").none(true), py::arg("rows").none(true), py::arg("seed").none(true),
          py::arg("delta"), py::arg("out"), py::arg("num_threads"), py::arg("tied") = false,
          "q Euler steps from z0: the last point [B, D] or all of them [q + 1, B, D].");
    m.def("picard_sweep", &picard_sweep, py::arg("packed"), py::arg("norm_weight"),
          py::arg("norm_bias"), py::arg("e"), py::arg("mask"), py::arg("x"), py::arg("taus"),
          py::arg("noise").none(true), py::arg("rows").none(true), py::arg("seed").none(true),
          py::arg("delta"), py::arg("out"), py::arg("num_threads"), py::arg("tied") = false,
          "The network at all points x [B, q, D]: row b at step i. out may be x.");
    m.def("recommend", &recommend, py::arg("packed"), py::arg("norm_weight"), py::arg("norm_bias"),
          py::arg("items"), py::arg("embedded_weight"), py::arg("embedded_bias"), py::arg("ids"),
          py::arg("taus"), py::arg("rows"), py::arg("seed"), py::arg("start_seed"),
          py::arg("delta"), py::arg("exclude").none(true), py::arg("scores"), py::arg("best"),
          py::arg("num_threads"), py::arg("tied") = false, py::arg("tolerance") = 0.0,
          "From left-padded ids to the k best items: embedding, start, sampler, ranking.");
    m.def("isa", [] { return std::string(isa_name(isa())); },
          "The instruction set in use: FMREC_FAST_ISA's or the widest supported.");
    m.def("supported_isas", &supported_isas, "Instruction sets built in and supported here.");
    m.def("set_isa", [](const std::string& name) { set_isa(name.c_str()); }, py::arg("name"),
          "Choose the instruction set for the rest of the process.");
    m.def("openmp", &has_openmp, "Whether the kernels were built with OpenMP.");
    m.def("build_info", &build_info, "Compiler, instruction sets, OpenMP, C++ standard.");
}
