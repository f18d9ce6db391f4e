#include "isa.h"

#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#ifdef FMREC_AMX
#include <cpuid.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace fmrec {

namespace {

const char* const NAMES[ISA_COUNT] = {"scalar", "avx2", "avx512", "amx", "amx_fp16"};

// -1 until the first use.
std::atomic<int> chosen{-1};

std::string supported_names() {
    std::string names;
    for (int i = 0; i < ISA_COUNT; ++i) {
        if (isa_runs(static_cast<Isa>(i))) {
            names += names.empty() ? "" : ", ";
            names += NAMES[i];
        }
    }
    return names;
}

#ifdef FMREC_AMX
// Whether the CPU has AMX-TILE, AMX-BF16, AMX-INT8 and AVX512-BF16, the system keeps their state (bits 17
// and 18 of XCR0), and this process may use it.
bool amx_permitted() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & (1u << 27))) return false;  // OSXSAVE
    unsigned low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const unsigned tiles = (1u << 17) | (1u << 18);
    if ((low & tiles) != tiles) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned wanted = (1u << 22) | (1u << 24) | (1u << 25);  // AMX-BF16, AMX-TILE, AMX-INT8
    if ((d & wanted) != wanted) return false;
    if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !(a & (1u << 5))) return false;
    const long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
    return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

bool says_amx_fp16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 21));
}

// Whether TDPFP16PS executes. The child makes no call but system calls, which any process may after
// a fork; the parent learns how it ended.
bool executes_amx_fp16() {
    const pid_t child = fork();
    if (child < 0) return false;
    if (child == 0) {
        const rlimit no_core = {0, 0};
        setrlimit(RLIMIT_CORE, &no_core);
        signal(SIGILL, SIG_DFL);
        // One byte by one row of every tile: palette, start row, reserved, bytes, rows.
        struct alignas(64) Config {
            unsigned char palette, start_row, reserved[14];
            unsigned short row_bytes[16];
            unsigned char rows[16];
        };
        static const Config config = {1, 0, {}, {4, 4, 4}, {1, 1, 1}};
        __asm__ volatile(
            ".byte 0xc4, 0xe2, 0x78, 0x49, 0x00\n"  // ldtilecfg (%%rax)
            ".byte 0xc4, 0xe2, 0x6b, 0x5c, 0xc1\n"  // tdpfp16ps %%tmm2, %%tmm1, %%tmm0
            ".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0"    // tilerelease
            :
            : "a"(&config)
            : "memory");
        _exit(0);
    }
    int status = 0;
    while (waitpid(child, &status, 0) < 0) {
        if (errno != EINTR) return false;
    }
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}
#endif

Isa parse(const char* name, const char* what) {
    for (int i = 0; i < ISA_COUNT; ++i) {
        if (std::strcmp(name, NAMES[i]) == 0) {
            if (isa_runs(static_cast<Isa>(i))) {
                return static_cast<Isa>(i);
            }
            throw std::invalid_argument(std::string(what) + " is '" + name +
                                        "', which this CPU or build does not support; supported: " +
                                        supported_names());
        }
    }
    throw std::invalid_argument(std::string(what) + " must be one of scalar, avx2, avx512, amx, amx_fp16; got '" +
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
    if (isa == Isa::amx_fp16) return isa_supported(Isa::amx) && says_amx_fp16();
#else
    if (isa >= Isa::amx) return false;
#endif
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
#else
    return false;
#endif
}

bool isa_runs(Isa isa) {
    if (isa_supported(isa)) return true;
#ifdef FMREC_AMX
    if (isa == Isa::amx_fp16 && isa_supported(Isa::amx)) {
        static const bool executes = executes_amx_fp16();
        return executes;
    }
#endif
    return false;
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
