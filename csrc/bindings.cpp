// The Python module fmrec_fast._C: checks its arguments, lets go of the GIL and splits the work.
// Each op's functions are in its bind_<op>.cpp; here are the module and the checks.

#include "bindings.h"

#include <cmath>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace fmrec {

std::string text(const py::handle& object) { return py::cast<std::string>(py::str(object)); }

namespace {

std::string type_text(const py::handle& object) {
    return py::cast<std::string>(py::type::of(object).attr("__name__"));
}

}  // namespace

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

void check_width(std::int64_t width, const char* what) {
    if (width < 1 || width % 16 != 0) {
        throw py::value_error(std::string(what) + " must be a positive multiple of 16, got " +
                              std::to_string(width));
    }
}

void add_parts(float* total, std::int64_t parts, std::int64_t size, int num_threads) {
    // Below so many numbers a second thread costs more than it brings.
    constexpr std::int64_t FEWEST = 1 << 16;
    parallel_items(num_threads, size, parts * size >= FEWEST,
                   [=](std::int64_t begin, std::int64_t end) {
                       for (std::int64_t i = 1; i < parts; ++i) {
                           const float* more = total + i * size;
                           for (std::int64_t n = begin; n < end; ++n) total[n] += more[n];
                       }
                   });
}

int planes_of(const std::string& precision) {
    if (precision == "float32") return 3;
    if (precision == "tf32") return 2;
    if (precision == "bf16") return 1;
    throw py::value_error("precision must be 'float32', 'tf32' or 'bf16', got '" + precision + "'");
}

int training_planes_of(const std::string& precision) {
    const int planes = planes_of(precision);
    if (planes == 1 && isa() < Isa::amx) {
        throw py::value_error(std::string("precision 'bf16' needs the instruction set amx, got ") +
                              isa_name(isa()));
    }
    return planes;
}

bool no_outliers(const float* matrix, std::int64_t rows, std::int64_t columns) {
    constexpr float MOST = 64.0f;  // squared
    std::vector<float> largest(columns, 0.0f), squares(columns, 0.0f);
    for (std::int64_t i = 0; i < rows; ++i) {
        const float* const row = matrix + i * columns;
        float top = 0.0f, sum = 0.0f;
#pragma omp simd reduction(max : top) reduction(+ : sum)
        for (std::int64_t j = 0; j < columns; ++j) {
            const float square = row[j] * row[j];
            top = square > top ? square : top;
            sum += square;
            largest[j] = square > largest[j] ? square : largest[j];
            squares[j] += square;
        }
        // NaN and infinity are not within.
        if (!(top * columns <= MOST * sum) || !std::isfinite(sum)) return false;
    }
    for (std::int64_t j = 0; j < columns; ++j) {
        if (!(largest[j] * rows <= MOST * squares[j])) return false;
    }
    return true;
}

DropoutRate dropout_rate(double p) {
    if (!(p >= 0.0 && p < 1.0)) {
        throw py::value_error("p must satisfy 0 <= p < 1, got " + text(py::float_(p)));
    }
    // Python's round(): halves to even, the rounding mode's default.
    const double threshold = std::nearbyint(p * 4294967296.0);
    return {static_cast<std::uint32_t>(threshold < 4294967295.0 ? threshold : 4294967295.0),
            static_cast<float>(1.0 / (1.0 - p))};
}

namespace {

// None, of a dropout that there is.
bool is_missing(const py::object& kept, double p) {
    if (kept.is_none() && p > 0.0) {
        throw py::value_error("kept must be given where p > 0, got None");
    }
    return kept.is_none();
}

}  // namespace

MaskWords masks_to_read(const py::object& kept, double p, const char* expected,
                      std::initializer_list<py::ssize_t> shape) {
    if (is_missing(kept, p)) return {py::array(), nullptr};
    const py::array array = input<std::int64_t>(kept, "kept", 3);
    check_shape(array, "kept", expected, shape);
    return {array, const_cast<std::int64_t*>(data<std::int64_t>(array))};
}

MaskWords masks_to_write(const py::object& kept, double p, const char* expected,
                       std::initializer_list<py::ssize_t> shape, const py::array& x,
                       const py::array& out) {
    if (is_missing(kept, p)) return {py::array(), nullptr};
    py::array array = output<std::int64_t>(kept, "kept", 3);
    check_shape(array, "kept", expected, shape);
    check_overlap(array, "kept", x, "x", false);
    check_overlap(array, "kept", out, "out", false);
    return {array, static_cast<std::int64_t*>(array.mutable_data())};
}

namespace {

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
        if (isa_runs(static_cast<Isa>(i))) names.append(isa_name(static_cast<Isa>(i)));
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
    isas.append("amx_fp16");
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
    bind_noise_fusion(m);
    bind_attention(m);
    bind_dropout(m);
    bind_dropout_layer_norm(m);
    bind_linear(m);
    bind_item_cross_entropy(m);
    bind_feed_forward(m);
    bind_fingerprint(m);
    bind_history_loss(m);
    bind_item_ranking(m);
    bind_encoder(m);
    bind_euler_sampler(m);
    bind_picard_sweep(m);
    bind_recommend(m);
    bind_rms_norm(m);
    bind_self_attention(m);
    bind_stream(m);
    bind_table_gradient(m);
    bind_memory(m);
    m.def("isa", [] { return std::string(isa_name(isa())); },
          "The instruction set in use: FMREC_FAST_ISA's or the widest supported.");
    m.def("supported_isas", &supported_isas, "Instruction sets built in and supported here.");
    m.def("set_isa", [](const std::string& name) { set_isa(name.c_str()); }, py::arg("name"),
          "Choose the instruction set for the rest of the process.");
    m.def("openmp", &has_openmp, "Whether the kernels were built with OpenMP.");
    m.def("build_info", &build_info, "Compiler, instruction sets, OpenMP, C++ standard.");
}
