// Checks of the arguments that the bindings share.
//
// Arrays arrive as numpy arrays (tensor.detach().numpy() shares the tensor's memory), so the
// module needs no torch headers and one build serves every torch version. Nothing is converted:
// an array of another type or layout is refused, because a silent copy would swallow the result.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <string>

#include "isa.h"

namespace py = pybind11;

namespace fmrec {

std::string text(const py::handle& object);

template <typename T>
const char* dtype_text();
template <>
inline const char* dtype_text<float>() { return "float32"; }
template <>
inline const char* dtype_text<std::int64_t>() { return "int64"; }

template <typename T>
bool is_dtype(const py::dtype& dtype) { return dtype.equal(py::dtype::of<T>()); }

// A checked array: C-contiguous, aligned, of the wanted type and number of dimensions.
py::array checked_array(const py::object& object, const char* name, const char* dtypes,
                        bool dtype_fits(const py::dtype&), py::ssize_t ndim, bool writeable);

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

inline float* target(py::array& array) { return static_cast<float*>(array.mutable_data()); }

// Whether there is anything to do: the kernels divide by the number of groups.
inline bool is_empty(const py::array& array) { return array.size() == 0; }

// `expected` names the agreement in words: "[B, D]".
void check_shape(const py::array& array, const char* name, const char* expected,
                 std::initializer_list<py::ssize_t> shape);

// An output may be an input (in place, where `same` allows it) but not half of one.
void check_overlap(const py::array& out, const char* out_name, const py::array& in,
                   const char* in_name, bool same_allowed);

// A Python int or a 0-dimensional int64 array, read now.
std::int64_t read_int64(const py::object& object, const char* name);

// At least 1, and the same.
int check_threads(int num_threads);

// A positive multiple of 16.
void check_width(std::int64_t width, const char* what);

// Adds `parts` arrays of `size` numbers, one after the other, up into the first.
void add_parts(float* total, std::int64_t parts, std::int64_t size, int num_threads);

// How the operands of products are split (csrc/amx.h) in 'float32' (3), 'tf32' (2) or 'bf16' (1).
int planes_of(const std::string& precision);

// The same for training, where 'bf16' rounds the operands: without AMX tiles, which do that, it
// throws. 'tf32' is then float32, which is closer.
int training_planes_of(const std::string& precision);

// Whether every number of a matrix is finite and within 8 times the root mean square of its row, and
// of its column. Tiles of bytes (csrc/amx.h) round a row to multiples of its largest number: one
// operand may have a number far above the others, but not both.
bool no_outliers(const float* matrix, std::int64_t rows, std::int64_t columns);

// Dropout keeps what meets a word of the stream that is at least the threshold, times scale.
struct DropoutRate {
    std::uint32_t threshold;
    float scale;
};
DropoutRate dropout_rate(double p);

// Masks of a dropout, a bit a channel, which must be given where p > 0: an int64 array of `shape`,
// which `expected` names in words; null words where it is None.
struct MaskWords {
    py::array array;  // holds the memory
    std::int64_t* words;
};
MaskWords masks_to_read(const py::object& kept, double p, const char* expected,
                      std::initializer_list<py::ssize_t> shape);
// The same, not overlapping `x` or `out`.
MaskWords masks_to_write(const py::object& kept, double p, const char* expected,
                       std::initializer_list<py::ssize_t> shape, const py::array& x,
                       const py::array& out);

// One function an op adds what it has to the module.
void bind_attention(py::module_& m);
void bind_dropout(py::module_& m);
void bind_dropout_layer_norm(py::module_& m);
void bind_encoder(py::module_& m);
void bind_euler_sampler(py::module_& m);
void bind_feed_forward(py::module_& m);
void bind_fingerprint(py::module_& m);
void bind_history_loss(py::module_& m);
void bind_item_cross_entropy(py::module_& m);
void bind_item_ranking(py::module_& m);
void bind_linear(py::module_& m);
void bind_memory(py::module_& m);
void bind_noise_fusion(py::module_& m);
void bind_picard_sweep(py::module_& m);
void bind_recommend(py::module_& m);
void bind_rms_norm(py::module_& m);
void bind_self_attention(py::module_& m);
void bind_stream(py::module_& m);
void bind_table_gradient(py::module_& m);

}  // namespace fmrec
