// The Python module fmrec_fast._C: checks its arguments, lets go of the GIL and splits the work.
//
// Arrays arrive as numpy arrays (tensor.detach().numpy() shares the tensor's memory), so the
// module needs no torch headers and one build serves every torch version. Nothing is converted:
// an array of another type or layout is refused, because a silent copy would swallow the result.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

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

#include "attention.h"
#include "dropout.h"
#include "encoder.h"
#include "euler_sampler.h"
#include "history_loss.h"
#include "isa.h"
#include "linear.h"
#include "noise_fusion.h"
#include "packed_encoder.h"
#include "parallel.h"

namespace py = pybind11;

namespace fmrec {
namespace {

// Elements of work below which a second thread costs more than it brings.
constexpr std::int64_t GRAIN_NOISE = 1 << 14;
constexpr std::int64_t GRAIN_DROPOUT = 1 << 15;
constexpr std::int64_t GRAIN_HISTORY = 1 << 17;
constexpr std::int64_t GRAIN_LINEAR = 1 << 20;
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
    const Floats panels = allocate_floats(depth * columns, false);
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

// Runs all sequences, group by group: a thread takes the next group when it is done with one.
// A sequence's result does not depend on its group.
template <typename Kernels, typename Arguments>
void run_groups(const Kernels& kernels, const Arguments& a, std::int64_t batch, int num_threads) {
    const std::int64_t size = group_size(a.encoder, batch, num_threads);
    const std::int64_t groups = (batch + size - 1) / size;
    const std::int64_t slabs = groups < num_threads ? groups : num_threads;
    const std::int64_t slab_size = round_up(kernels.scratch(&a, size), UNIT);
    const Floats memory = allocate_floats(slabs * slab_size, true);
    std::atomic<std::int64_t> next_group{0}, next_slab{0};
    parallel_items(num_threads, num_threads, groups > 1, [&](std::int64_t, std::int64_t) {
        std::int64_t group = next_group.fetch_add(1);
        if (group >= groups) return;
        float* slab = memory.get() + next_slab.fetch_add(1) * slab_size;
        for (; group < groups; group = next_group.fetch_add(1)) {
            const std::int64_t begin = group * size;
            kernels.run(&a, begin, begin + size < batch ? begin + size : batch, slab);
        }
    });
}

void encoder_forward(const PackedEncoder& packed, const py::object& x_, const py::object& mask_,
                     std::int64_t tap, const py::object& out_, const py::object& tapped_,
                     int num_threads) {
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
    const EncoderBatchKernels& kernels = FMREC_TABLE(encoder_batch);
    if (is_empty(out)) return;
    a.x = data<float>(x);
    a.mask = data<float>(mask);
    a.out = target(out);
    py::gil_scoped_release release;
    run_groups(kernels, a, batch, num_threads);
}

void euler_sampler(const PackedEncoder& packed, const py::object& norm_weight_,
                   const py::object& norm_bias_, const py::object& e_, const py::object& mask_,
                   const py::object& z0_, const py::object& taus_, const py::object& noise_,
                   const py::object& rows_, const py::object& seed, double delta,
                   const py::object& out_, int num_threads) {
    const py::array norm_weight = input<float>(norm_weight_, "norm_weight", 1),
                    norm_bias = input<float>(norm_bias_, "norm_bias", 1),
                    e = input<float>(e_, "e", 3), mask = input<float>(mask_, "mask", 2),
                    z0 = input<float>(z0_, "z0", 2), taus = input<float>(taus_, "taus", 2);
    check_threads(num_threads);
    EulerSampler a{};
    a.encoder = make_encoder(packed, e.shape(1));
    a.batch = e.shape(0);
    a.steps = taus.shape(0);
    const std::int64_t channels = packed.channels(), length = e.shape(1);
    // All points, or the last one, by the number of dimensions.
    a.trajectory = py::isinstance<py::array>(out_) && py::cast<py::array>(out_).ndim() == 3;
    py::array out = output<float>(out_, "out", a.trajectory ? 3 : 2);
    if (a.steps < 1) throw py::value_error("there must be at least one step, got q = 0");
    check_shape(norm_weight, "norm_weight", "[D]", {channels});
    check_shape(norm_bias, "norm_bias", "[D]", {channels});
    check_shape(e, "e", "[B, L, D]", {a.batch, length, channels});
    check_shape(mask, "mask", "[B, L]", {a.batch, length});
    check_shape(z0, "z0", "[B, D]", {a.batch, channels});
    check_shape(taus, "taus", "[q, D]", {a.steps, channels});
    if (a.trajectory) {
        check_shape(out, "out", "[q + 1, B, D]", {a.steps + 1, a.batch, channels});
    } else {
        check_shape(out, "out", "[B, D]", {a.batch, channels});
    }
    const char* const names[] = {"norm_weight", "norm_bias", "e", "mask", "z0", "taus"};
    const py::array* const inputs[] = {&norm_weight, &norm_bias, &e, &mask, &z0, &taus};
    for (int i = 0; i < 6; ++i) check_overlap(out, "out", *inputs[i], names[i], false);
    py::array noise, rows;
    if (!noise_.is_none()) {
        noise = input<float>(noise_, "noise", 4);
        check_shape(noise, "noise", "[q, B, L, D]", {a.steps, a.batch, length, channels});
        check_overlap(out, "out", noise, "noise", false);
        a.noise = data<float>(noise);
    } else {
        rows = input<std::int64_t>(rows_, "rows", 1);
        check_shape(rows, "rows", "[B]", {a.batch});
        check_overlap(out, "out", rows, "rows", false);
        a.rows = data<std::int64_t>(rows);
        a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    }
    a.delta = static_cast<float>(delta);
    const EulerSamplerKernels& kernels = FMREC_TABLE(euler_sampler);
    if (is_empty(out)) return;
    a.norm_weight = data<float>(norm_weight);
    a.norm_bias = data<float>(norm_bias);
    a.e = data<float>(e);
    a.mask = data<float>(mask);
    a.z0 = data<float>(z0);
    a.taus = data<float>(taus);
    a.out = target(out);
    py::gil_scoped_release release;
    run_groups(kernels, a, a.batch, num_threads);
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
    m.def("history_loss_forward", &history_loss_forward, py::arg("hidden"), py::arg("weight"),
          py::arg("bias"), py::arg("rows"), py::arg("cols"), py::arg("label"), py::arg("use"),
          py::arg("residual"), py::arg("num_threads"),
          "residual = where(use, (hidden[rows] * weight[cols]).sum(1) + bias[cols] - label, 0).");
    m.def("history_loss_backward", &history_loss_backward, py::arg("hidden"), py::arg("weight"),
          py::arg("rows"), py::arg("cols"), py::arg("g"), py::arg("use"),
          py::arg("d_hidden").none(true), py::arg("d_weight").none(true),
          py::arg("d_bias").none(true), py::arg("num_threads"),
          "Adjoint of the residuals: writes d_hidden, adds to d_weight and d_bias.");
    py::class_<PackedEncoder>(m, "PackedEncoder",
                              "The weights of a transformer stack, copied and packed.")
        .def(py::init(&pack_encoder), py::arg("blocks"), py::arg("num_heads"),
             py::arg("rotary") = py::none(),
             "blocks: the arrays of each block, as BlockWeights, None for the biases of RMS norms; "
             "rotary: cosines and sines of half a head at each position [L, D / num_heads].")
        .def_property_readonly("nbytes", &PackedEncoder::bytes);
    m.def("encoder_forward", &encoder_forward, py::arg("packed"), py::arg("x"), py::arg("mask"),
          py::arg("tap"), py::arg("out"), py::arg("tapped").none(true), py::arg("num_threads"),
          "The last position's output, and that of block tap where tapped is given.");
    m.def("euler_sampler", &euler_sampler, py::arg("packed"), py::arg("norm_weight"),
          py::arg("norm_bias"), py::arg("e"), py::arg("mask"), py::arg("z0"), py::arg("taus"),
          py::arg("noise").none(true), py::arg("rows").none(true), py::arg("seed").none(true),
          py::arg("delta"), py::arg("out"), py::arg("num_threads"),
          "q Euler steps from z0: the last point [B, D] or all of them [q + 1, B, D].");
    m.def("isa", [] { return std::string(isa_name(isa())); },
          "The instruction set in use: FMREC_FAST_ISA's or the widest supported.");
    m.def("supported_isas", &supported_isas, "Instruction sets built in and supported here.");
    m.def("set_isa", [](const std::string& name) { set_isa(name.c_str()); }, py::arg("name"),
          "Choose the instruction set for the rest of the process.");
    m.def("openmp", &has_openmp, "Whether the kernels were built with OpenMP.");
    m.def("build_info", &build_info, "Compiler, instruction sets, OpenMP, C++ standard.");
}
