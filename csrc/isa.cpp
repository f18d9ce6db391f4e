#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace fmrec {

namespace {

const char* const NAMES[ISA_COUNT] = {"scalar", "avx2", "avx512"};

// -1 until the first use.
std::atomic<int> chosen{-1};

std::string supported_names() {
    std::string names;
    for (int i = 0; i < ISA_COUNT; ++i) {
        if (isa_supported(static_cast<Isa>(i))) {
            names += names.empty() ? "" : ", ";
            names += NAMES[i];
        }
    }
    return names;
}

Isa parse(const char* name, const char* what) {
    for (int i = 0; i < ISA_COUNT; ++i) {
        if (std::strcmp(name, NAMES[i]) == 0) {
            if (isa_supported(static_cast<Isa>(i))) {
                return static_cast<Isa>(i);
            }
            throw std::invalid_argument(std::string(what) + " is '" + name +
                                        "', which this CPU or build does not support; supported: " +
                                        supported_names());
        }
    }
    throw std::invalid_argument(std::string(what) + " must be one of scalar, avx2, avx512; got '" +
                                name + "'; supported here: " + supported_names());
}

Isa widest() {
    for (int i = ISA_COUNT - 1; i > 0; --i) {
        if (isa_supported(static_cast<Isa>(i))) {
            return static_cast<Isa>(i);
        }
    }
    return Isa::scalar;
}

}  // namespace

const char* isa_name(Isa isa) { return NAMES[static_cast<int>(isa)]; }

bool isa_supported(Isa isa) {
    if (isa == Isa::scalar) {
        return true;
    }
#ifdef FMREC_X86
    __builtin_cpu_init();
    if (isa == Isa::avx2) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

Isa isa() {
    int value = chosen.load(std::memory_order_relaxed);
    if (value < 0) {
        // Two threads that meet here find the same answer.
        const char* name = std::getenv("FMREC_FAST_ISA");
        const Isa found = name && *name ? parse(name, "FMREC_FAST_ISA") : widest();
        value = static_cast<int>(found);
        chosen.store(value, std::memory_order_relaxed);
    }
    return static_cast<Isa>(value);
}

void set_isa(const char* name) {
    chosen.store(static_cast<int>(parse(name, "isa")), std::memory_order_relaxed);
}

}  // namespace fmrec
