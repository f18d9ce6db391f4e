#include <pybind11/stl.h>

#include <cstring>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

#include "bindings.h"
#include "memory.h"
#include "parallel.h"

namespace fmrec {
namespace {

// Floats that a thread clears at a time, and so many that no cache holds them until they are read.
constexpr std::int64_t PIECE = 1 << 16, MANY = 1 << 23;

// Zeros; `past_caches` without reading first what is there, as a store into a cache does.
void clear(float* memory, std::int64_t count, bool past_caches) {
#ifdef __SSE2__
    if (past_caches) {
        std::int64_t i = 0;
        for (; i + 4 <= count; i += 4) _mm_stream_ps(memory + i, _mm_setzero_ps());
        for (; i < count; ++i) memory[i] = 0.0f;
        _mm_sfence();
        return;
    }
#else
    (void)past_caches;
#endif
    std::memset(memory, 0, static_cast<std::size_t>(count) * sizeof(float));
}

py::array_t<float> floats(const std::vector<py::ssize_t>& shape, bool zeroed, int num_threads) {
    check_threads(num_threads);
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
    py::array_t<float> array(shape, memory, owner);
    if (!zeroed) return array;
    py::gil_scoped_release release;
    parallel_items(num_threads, (count + PIECE - 1) / PIECE, count >= 2 * PIECE,
                   [&](std::int64_t begin, std::int64_t end) {
        const std::int64_t first = begin * PIECE, last = end * PIECE < count ? end * PIECE : count;
        clear(memory + first, last - first, count >= MANY);
    });
    return array;
}

}  // namespace

void bind_memory(py::module_& m) {
    m.def("floats", &floats, py::arg("shape"), py::arg("zeroed") = false,
          py::arg("num_threads") = 1,
          "A new array; where it is large its memory is kept for the next when it goes.");
    m.def("release_memory", &release_memory,
          "Hand the memory that is kept to the system; returns its bytes.");
}

}  // namespace fmrec
