#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef FMREC_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fmrec {

namespace {

const char* const NAMES[ISA_COUNT] = {"scalar", "avx2", "avx512", "amx"};

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

#ifdef FMREC_AMX
// Whether the CPU has AMX-TILE, AMX-BF16 and AVX512-BF16, the system keeps their state (bits 17
// and 18 of XCR0), and this process may use it.
bool amx_permitted() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;  // OSXSAVE
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const unsigned tiles = (1u << 17) | (1u << 18);
    if ((low & tiles) != tiles) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    if (!(d & (1u << 22)) || !(d & (1u << 24))) return false;  // AMX-BF16, AMX-TILE
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return false;
    const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

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
    throw std::invalid_argument(std::string(what) + " must be one of scalar, avx2, avx512, amx; got '" +
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
#ifdef FMREC_AMX
    if (isa == Isa::amx) {
        static const bool permitted = amx_permitted();
        return permitted && isa_supported(Isa::avx512);
    }
#else
    if (isa == Isa::amx) return false;
#endif
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
