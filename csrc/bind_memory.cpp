#include <pybind11/stl.h>

#include <vector>

#include "bindings.h"
#include "memory.h"

namespace fmrec {
namespace {

py::array_t<float> floats(const std::vector<py::ssize_t>& shape) {
    std::int64_t count = 1;
    for (const py::ssize_t size : shape) {
        if (size < 0 || (size > 0 && count > (std::int64_t{1} << 60) / size)) {
            throw py::value_error("shape must have sizes of at least 0 and below 2**60 in all, got " +
                                  text(py::cast(shape)));
        }
        count *= size;
    }
    float* const memory = take_floats(count);
    const py::capsule owner(memory, [](void* p) { give_floats(static_cast<float*>(p)); });
    return py::array_t<float>(shape, memory, owner);
}

}  // namespace

void bind_memory(py::module_& m) {
    m.def("floats", &floats, py::arg("shape"),
          "A new array; where it is large its memory is kept for the next when it goes.");
    m.def("release_memory", &release_memory,
          "Hand the memory that is kept to the system; returns its bytes.");
}

}  // namespace fmrec
