#include <random>
#include <stdexcept>

#include "bindings.h"
#include "fingerprint.h"

namespace fmrec {
namespace {

struct Keys {
    std::uint32_t words[LEVELS * DIGEST_KEY];
    Keys() {
        std::random_device random;
        for (std::uint32_t& word : words) word = static_cast<std::uint32_t>(random());
    }
};

std::int64_t pieces(std::int64_t bytes) { return (bytes + DIGESTED - 1) / DIGESTED; }

// Arrays and the bytes they hold now.
class Watch {
  public:
    explicit Watch(const py::sequence& arrays) {
        for (std::size_t i = 0; i < py::len(arrays); ++i) {
            const std::string name = "arrays[" + std::to_string(i) + "]";
            const py::object object = arrays[i];
            const py::ssize_t ndim =
                py::isinstance<py::array>(object) ? py::cast<py::array>(object).ndim() : 1;
            const py::array array = input<float>(object, name.c_str(), ndim);
            kept_.push_back(array);
            parts_.push_back(Bytes{array.data(), array.nbytes()});
        }
    }

    py::bytes read() const {
        Fingerprint found;
        {
            py::gil_scoped_release release;
            found = fingerprint(parts_);
        }
        return py::bytes(reinterpret_cast<const char*>(found.words), sizeof found.words);
    }

    std::int64_t bytes() const {
        std::int64_t total = 0;
        for (const Bytes& part : parts_) total += part.size;
        return total;
    }

  private:
    std::vector<py::array> kept_;
    std::vector<Bytes> parts_;
};

// Whether every dictionary of `ways`, pairs of one and a list, holds the list's very objects.
bool same_values(const py::list& ways) {
    for (const py::handle way : ways) {
        const py::tuple pair = py::cast<py::tuple>(way);
        const py::dict held = py::cast<py::dict>(pair[0]);
        const py::list values = py::cast<py::list>(pair[1]);
        if (PyDict_Size(held.ptr()) != PyList_Size(values.ptr())) return false;
        PyObject *key, *value;
        Py_ssize_t position = 0, i = 0;
        while (PyDict_Next(held.ptr(), &position, &key, &value)) {
            if (PyList_GetItem(values.ptr(), i++) != value) return false;
        }
    }
    return true;
}

}  // namespace

Fingerprint fingerprint(const std::vector<Bytes>& parts) {
    static const Keys keys;
    const FingerprintKernels& kernels = FMREC_TABLE(fingerprint);
    std::int64_t total = 0;
    for (const Bytes& part : parts) total += pieces(part.size);
    std::vector<std::uint64_t> digests(static_cast<std::size_t>(DIGEST_WORDS * total));
    std::uint64_t* out = digests.data();
    for (const Bytes& part : parts) {
        kernels.digest(part.data, part.size, keys.words, out);
        out += DIGEST_WORDS * pieces(part.size);
    }
    for (int level = 1; total > 1; ++level) {
        if (level == LEVELS) throw std::length_error("too many bytes for a fingerprint");
        const std::int64_t bytes = total * static_cast<std::int64_t>(sizeof(Fingerprint));
        total = pieces(bytes);
        std::vector<std::uint64_t> next(static_cast<std::size_t>(DIGEST_WORDS * total));
        kernels.digest(digests.data(), bytes, keys.words + level * DIGEST_KEY, next.data());
        digests.swap(next);
    }
    return total == 0 ? Fingerprint{} : Fingerprint{{digests[0], digests[1]}};
}

void bind_fingerprint(py::module_& m) {
    py::class_<Watch>(m, "Watch", "Float32 arrays, which it keeps, and a hash of their bytes.")
        .def(py::init<const py::sequence&>(), py::arg("arrays"))
        .def("read", &Watch::read, "16 bytes that differ where a bit of an array does.")
        .def_property_readonly("nbytes", &Watch::bytes);
    m.def("same_values", &same_values, py::arg("ways"),
          "Whether each pair's dictionary holds the objects of its list, these and no others.");
}

}  // namespace fmrec
