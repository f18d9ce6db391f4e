// Which instruction set the kernels run with.
//
// Every kernel source (KERNEL_SOURCES in setup.py) is compiled once per instruction set, each
// time with -DFMREC_ISA=<name>, which names the namespace its functions lie in. This header is shared by those translation units and by the host ones, so it holds
// declarations only: an inline function or a template instantiated under AVX-512 flags could be
// the copy that the linker keeps for everybody.
#pragma once

// Declares one table of kernels in the namespace of every instruction set. A table that was not
// built (another architecture) is declared but never referenced.
#define FMREC_DECLARE_TABLE(Type, name)                    \
    namespace scalar { extern const Type name; }           \
    namespace avx2 { extern const Type name; }             \
    namespace avx512 { extern const Type name; }           \
    namespace amx { extern const Type name; }

// The table of the chosen instruction set. Throws, through fmrec::isa(), where
// FMREC_FAST_ISA names one that cannot be had.
#ifdef FMREC_X86
#ifdef FMREC_AMX
#define FMREC_AMX_TABLE(name) ::fmrec::isa() >= ::fmrec::Isa::amx ? ::fmrec::amx::name :
#else
#define FMREC_AMX_TABLE(name)
#endif
#define FMREC_TABLE(name)                                           \
    (FMREC_AMX_TABLE(name)                                          \
     ::fmrec::isa() == ::fmrec::Isa::avx512 ? ::fmrec::avx512::name \
     : ::fmrec::isa() == ::fmrec::Isa::avx2 ? ::fmrec::avx2::name   \
                                            : ::fmrec::scalar::name)
#else
#define FMREC_TABLE(name) (::fmrec::isa(), ::fmrec::scalar::name)
#endif

// For helpers of the kernel sources: internal linkage and no call.
#define FMREC_INLINE static inline __attribute__((always_inline))

namespace fmrec {

// amx is avx512 with AVX512-BF16 and matrix products on AMX tiles (csrc/amx.h), amx_fp16 the same with
// tiles of float16s: its kernels lie beside amx's, which stand in where there are none.
enum class Isa : int { scalar = 0, avx2 = 1, avx512 = 2, amx = 3, amx_fp16 = 4 };
constexpr int ISA_COUNT = 5;

const char* isa_name(Isa isa);

// Built into this library and supported by this CPU and operating system. Asks Linux, once, for the
// process' permission to use AMX tiles; a refusal means no support.
bool isa_supported(Isa isa);

// Whether it may be chosen by name: supported, or amx_fp16 on a CPU that says amx only but does execute
// it, as virtual machines do whose hypervisor leaves the flag out. Finds out in a child process.
bool isa_runs(Isa isa);

// The chosen one: set_isa's, else FMREC_FAST_ISA's, else the widest supported. Throws
// std::invalid_argument where the name is unknown or unsupported.
Isa isa();

// Chooses by name for the rest of the process.
void set_isa(const char* name);

}  // namespace fmrec
