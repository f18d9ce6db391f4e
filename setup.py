"""Builds fmrec_fast._C; everything declarative is in pyproject.toml.

The kernel sources are compiled once per instruction set (see csrc/isa.h), the rest once.
FMREC_FAST_SKIP_CPP=1 leaves the extension out: the package then runs on PyTorch alone.
FMREC_FAST_SANITIZE=1 builds it with AddressSanitizer and UndefinedBehaviorSanitizer (`make
sanitize`); the process that loads it must have been started with libasan preloaded.
"""

import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

# Compiled as one: whatever includes pybind11 compiles 7 seconds of it anew. A name that two of them
# give to different things does not compile.
BINDING_SOURCES = sorted(str(path) for path in Path("csrc").glob("bind*.cpp"))
HOST_SOURCES = [
    "csrc/history_cells.cpp",
    "csrc/isa.cpp",
    "csrc/memory.cpp",
    "csrc/packed_encoder.cpp",
    "csrc/parallel.cpp",
    "csrc/ranking.cpp",
]
# One op, one stem.
KERNEL_SOURCES = [
    "csrc/attention.cpp",
    "csrc/attention_tangent.cpp",
    "csrc/noise_fusion.cpp",
    "csrc/dropout.cpp",
    "csrc/dropout_layer_norm.cpp",
    "csrc/history_loss.cpp",
    "csrc/encoder.cpp",
    "csrc/euler_sampler.cpp",
    "csrc/feed_forward.cpp",
    "csrc/linear.cpp",
    "csrc/item_ranking.cpp",
    "csrc/recommend.cpp",
    "csrc/rms_norm.cpp",
    "csrc/self_attention.cpp",
    "csrc/self_attention_last.cpp",
    "csrc/stream.cpp",
    "csrc/table_gradient.cpp",
    "csrc/picard_sweep.cpp",
    "csrc/item_cross_entropy.cpp",
    "csrc/fingerprint.cpp",
]
HEADERS = sorted(str(path) for path in Path("csrc").glob("*.h"))

# -fno-trapping-math lets selections become masks; NaN and infinity keep their meaning.
FLAGS = ["-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
# Python's own -g would make the library ten times as large.
FLAGS += ["-Wall", "-Wextra", "-g0"]
ISA_FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": [
        *("-mavx2", "-mfma", "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"),
        # GCC 12 warns about the undefined operand of its own AVX-512 intrinsics.
        *("-mprefer-vector-width=512", "-Wno-maybe-uninitialized"),
    ],
}
# GCC 12 warns about the undefined operand of its intrinsics under another name too.
AMX_FLAGS = ["-mavx512bf16", "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-Wno-uninitialized"]
SANITIZERS = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
# Python's own -fwrapv would hide overflows, and make the compiler take twice as long.
SANITIZERS += ["-fsanitize=address,undefined", "-fstrict-overflow"]


def switched_on(variable: str) -> bool:
    """Whether an environment variable is 1; raises ValueError unless it is 0, 1 or not set."""
    value = os.environ.get(variable, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable} must be 0 or 1, got {value!r}")
    return value == "1"


def builds_for_x86_64() -> bool:
    """Whether the one architecture that is compiled for is x86-64 (a universal build is not)."""
    target = sysconfig.get_platform()
    if target.startswith("macosx"):
        return target.endswith("x86_64") and "arm64" not in os.environ.get("ARCHFLAGS", "")
    return platform.machine().lower() in ("x86_64", "amd64") and sys.maxsize > 2**32


class BuildKernels(build_ext):
    """build_ext that compiles the kernel sources once per instruction set."""

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type != "unix":
            raise RuntimeError(
                "fmrec_fast's extension needs GCC or Clang, found the compiler type "
                f"{self.compiler.compiler_type!r}; FMREC_FAST_SKIP_CPP=1 builds without it"
            )
        macros = []
        isas = {"scalar": ISA_FLAGS["scalar"]}
        if builds_for_x86_64():
            macros.append(("FMREC_X86", "1"))
            isas = dict(ISA_FLAGS)
            if self.compiles_amx():
                macros.append(("FMREC_AMX", "1"))
                isas["amx"] = [*ISA_FLAGS["avx512"], *AMX_FLAGS]
        flags = [*FLAGS, *self.openmp_flags()]
        if switched_on("FMREC_FAST_SANITIZE"):
            flags += SANITIZERS
            ext.extra_link_args = SANITIZERS
        ext.extra_compile_args = flags
        ext.define_macros = macros
        compiler, folder = self.compiler, Path(self.build_temp)
        folder.mkdir(parents=True, exist_ok=True)
        bindings = folder / "all_bindings.cpp"
        bindings.write_text("".join(f'#include "{Path(s).name}"\n' for s in BINDING_SOURCES))
        # What takes longest first.
        jobs: list[tuple[str, str | None]] = [(str(bindings), None)]
        jobs += [(source, isa) for isa in reversed(isas) for source in KERNEL_SOURCES]
        jobs += [(source, None) for source in HOST_SOURCES]

        def compile_one(job: tuple[str, str | None]) -> list[str]:
            source, isa = job
            return compiler.compile(
                [source],
                output_dir=str(folder / (isa or "host")),
                macros=[*macros, ("FMREC_ISA", isa)] if isa else macros,
                include_dirs=ext.include_dirs,
                extra_postargs=[*flags, *isas[isa]] if isa else flags,
            )

        # The threads only wait for the compiler's processes.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        ext.sources = []  # what is left is to link
        # -fopenmp is not among the link flags: it would link a second OpenMP runtime. The
        # symbols resolve to the runtime that torch loads.
        super().build_extension(ext)

    def openmp_flags(self) -> list[str]:
        """GCC's OpenMP, whose calls every runtime torch ships answers to; else `omp simd` only.

        Clang's calls (__kmpc_*) are missing in libgomp, so its OpenMP could not be loaded.
        """
        source = "#if !defined(_OPENMP) || defined(__clang__)\n#error\n#endif\n#include <omp.h>\n"
        if sys.platform == "linux" and self.compiles(source, ["-fopenmp"]):
            return ["-fopenmp"]
        return ["-fopenmp-simd"]

    def compiles_amx(self) -> bool:
        """Whether the compiler knows AMX, on Linux, which must be asked for the permission."""
        source = "#include <immintrin.h>\nvoid f() { _tile_zero(0); _tile_dpbf16ps(0, 1, 2); }\n"
        flags = [*ISA_FLAGS["avx512"], *AMX_FLAGS]
        return sys.platform == "linux" and self.compiles(source, flags)

    def compiles(self, source: str, flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            probe = Path(folder, "probe.cpp")
            probe.write_text(source)
            command = [*self.compiler.compiler_so, *flags, "-c", str(probe)]
            command += ["-o", str(Path(folder, "probe.o"))]
            return subprocess.run(command, capture_output=True).returncode == 0


def extensions() -> list[Extension]:
    if switched_on("FMREC_FAST_SKIP_CPP"):
        return []
    import pybind11

    return [
        Extension(
            "fmrec_fast._C",
            sources=[*BINDING_SOURCES, *HOST_SOURCES],
            include_dirs=["csrc", pybind11.get_include()],
            depends=[*BINDING_SOURCES, *HOST_SOURCES, *KERNEL_SOURCES, *HEADERS],
            language="c++",
        )
    ]


packages = find_namespace_packages(
    include=["fmrec_fast", "fmrec_fast.*"], exclude=["*.__pycache__", "fmrec_fast.kernels*"]
)
setup(
    packages=[*packages, "fmrec_fast.kernels"],
    # The Triton kernels lie in a folder of their own, next to csrc/.
    package_dir={"fmrec_fast": "fmrec_fast", "fmrec_fast.kernels": "kernels"},
    package_data={"fmrec_fast": ["py.typed"], "fmrec_fast.kernels": ["*.json"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildKernels},
)
