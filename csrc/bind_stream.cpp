#include "bindings.h"

#include "parallel.h"
#include "stream.h"

namespace fmrec {
namespace {

// Numbers below which a second thread costs more than it brings.
constexpr std::int64_t STREAM_GRAIN = 1 << 14;

typedef void (*StreamKernel)(const Stream*, std::int64_t, std::int64_t);

void run_rows(StreamKernel StreamKernels::*kernel, const py::object& rows_, const py::object& seed,
              const py::object& step, const py::object& out_, int num_threads) {
    const py::array rows = input<std::int64_t>(rows_, "rows", 1);
    py::array out = output<float>(out_, "out", 2);
    check_threads(num_threads);
    check_shape(rows, "rows", "[B]", {out.shape(0)});
    Stream a{};
    a.rows = data<std::int64_t>(rows);
    a.channels = out.shape(1);
    a.seed = static_cast<std::uint64_t>(read_int64(seed, "seed"));
    a.step = static_cast<std::uint32_t>(read_int64(step, "step"));
    const StreamKernel run = FMREC_TABLE(stream).*kernel;
    if (is_empty(out)) return;
    a.out = target(out);
    py::gil_scoped_release release;
    parallel_items(num_threads, out.shape(0), out.size() >= STREAM_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) { run(&a, begin, end); });
}

void stream_normals(const py::object& rows, const py::object& seed, const py::object& step,
                    const py::object& out, int num_threads) {
    run_rows(&StreamKernels::normals, rows, seed, step, out, num_threads);
}

void stream_uniforms(const py::object& rows, const py::object& seed, const py::object& step,
                     const py::object& out, int num_threads) {
    run_rows(&StreamKernels::uniforms, rows, seed, step, out, num_threads);
}

void stream_words(const py::object& seed_, const py::object& first_, const py::object& out_,
                  int num_threads) {
    py::array out = output<std::int64_t>(out_, "out", 1);
    check_threads(num_threads);
    const std::uint64_t seed = static_cast<std::uint64_t>(read_int64(seed_, "seed")),
                        first = static_cast<std::uint64_t>(read_int64(first_, "first"));
    const StreamKernels& kernels = FMREC_TABLE(stream);
    std::int64_t* words = static_cast<std::int64_t*>(out.mutable_data());
    py::gil_scoped_release release;
    parallel_items(num_threads, out.size(), out.size() >= STREAM_GRAIN,
                   [&](std::int64_t begin, std::int64_t end) {
                       kernels.words(seed, first + static_cast<std::uint64_t>(begin), end - begin,
                                     words + begin);
                   });
}

}  // namespace

void bind_stream(py::module_& m) {
    m.def("stream_normals", &stream_normals, py::arg("rows"), py::arg("seed"), py::arg("step"),
          py::arg("out"), py::arg("num_threads"),
          "out [B, D] = the stream's normals at counters (channel // 4, 0, step, row).");
    m.def("stream_uniforms", &stream_uniforms, py::arg("rows"), py::arg("seed"), py::arg("step"),
          py::arg("out"), py::arg("num_threads"), "The same of uniforms in [0, 1).");
    m.def("stream_words", &stream_words, py::arg("seed"), py::arg("first"), py::arg("out"),
          py::arg("num_threads"),
          "out[j] = words 0 (low) and 1 (high) of the stream at counter (first + j, 0, 0, 0).");
}

}  // namespace fmrec
