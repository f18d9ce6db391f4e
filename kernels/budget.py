"""Compile every Triton kernel without a GPU and hold it to its budget (`budgets.json`).

    python -m fmrec_fast.kernels.budget            # a table; exit status 1 if a budget is broken
    python -m fmrec_fast.kernels.budget --write    # the table becomes the budget
    python -m fmrec_fast.kernels.budget --json     # the same for programs
    python -m fmrec_fast.kernels.budget encoder dropout    # these modules alone

A kernel module lists what to compile in `COMPILE_CASES`, dicts with the keys

    kernel      a function under @triton.jit whose name ends in _kernel
    signature   argument name -> Triton type; "{dtype}" stands for the element type
    constants   tl.constexpr argument name -> value
    threads     threads per program
    options     further compiler options
    name        what to call the case, if one kernel is compiled with several constants (optional)
    dtypes      instead of float32 and bfloat16 (optional)
    target      the one it is for, e.g. "cuda:90" (optional)
    backends    "cuda" or "hip", if it is not compiled for both (optional)

Budgets are for the Triton version that they name, for registers differ by a few between
versions. Registers are budgeted in the 8 per thread in
which the hardware hands them out, bytes of stack (spills) and of shared memory exactly.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent
BUDGETS = FOLDER / "budgets.json"
# Modules without kernels of their own.
NO_KERNELS = {
    "__init__", "budget", "launch", "layers", "philox", "plans", "rotary", "tiles", "transformer",
    "tune",
}  # fmt: skip
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
TYPES = DTYPES | {"float16": "fp16"}
# (backend, architecture, lanes of a warp)
TARGETS = [("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64)]
RESOURCES = ("registers", "stack", "shared")
REGISTER_GRANULE = 8
# Each holds a compiler, about 1 GB at the most.
MOST_WORKERS = 8


def kernel_modules() -> list[str]:
    """The stems of the kernel modules."""
    return sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in NO_KERNELS)


def compile_all(stems: list[str]) -> tuple[dict[str, dict], list[str]]:
    """What each case of these modules needs, by "module.kernel dtype target"; and problems."""
    from triton.runtime.jit import JITFunction

    jobs, problems = {}, []
    for stem in stems:
        module = importlib.import_module(f"fmrec_fast.kernels.{stem}")
        cases = getattr(module, "COMPILE_CASES", [])
        for name, value in vars(module).items():
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                if not any(case["kernel"] is value for case in cases):
                    problems.append(f"kernels/{stem}.py: {name} is not in COMPILE_CASES")
        if not cases:
            problems.append(f"kernels/{stem}.py has no COMPILE_CASES")
        for index, case in enumerate(cases):
            name = case.get("name", case["kernel"].__name__)
            for dtype in case.get("dtypes", DTYPES):
                for target in TARGETS:
                    if target[0] not in case.get("backends", ("cuda", "hip")):
                        continue
                    label = f"{target[0]}:{target[1]}"
                    if case.get("target", label) == label:
                        jobs[f"{stem}.{name} {dtype} {label}"] = (stem, index, dtype, target)
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(jobs, pool.map(_measure_job, jobs.values()))), problems


def _measure_job(job: tuple[str, int, str, tuple]) -> dict:
    stem, index, dtype, target = job
    module = importlib.import_module(f"fmrec_fast.kernels.{stem}")
    return measure(module.COMPILE_CASES[index], dtype, target)


def measure(case: dict, dtype: str, target: tuple) -> dict:
    """Compile one case.

    Returns:
        registers, stack and shared (bytes), instructions, and how many accesses to device memory
        the code has of each width: {"load 16 bytes": 2, ...}.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants = case["kernel"], case["constants"]
    types = {name: kind.format(dtype=TYPES.get(dtype)) for name, kind in case["signature"].items()}
    types |= dict.fromkeys(constants, "constexpr")
    signature = {name: types.pop(name) for name in kernel.arg_names}
    if types:
        raise ValueError(f"{kernel.__name__} has no arguments {sorted(types)}")
    # Tensors that torch allocates begin at multiples of 16 bytes.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    binary = triton.compile(
        ASTSource(kernel, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget(*target),
        options={"num_warps": max(case["threads"] // target[2], 1), **case["options"]},
    )
    if target[0] == "cuda":
        needs = _read_cubin(binary.asm["cubin"]) | {"accesses": _ptx_accesses(binary.asm["ptx"])}
    else:
        needs = _read_amdgcn(binary.asm["amdgcn"])
    # The launch adds what Triton asks for to what the binary says; from Hopper on the latter
    # has the 1024 bytes that CUDA reserves in every block with shared memory.
    needs["shared"] += binary.metadata.shared
    return needs


def _read_cubin(cubin: bytes) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [str(tool), "--dump-resource-usage", "--dump-sass", str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {word: int(n) for word, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"] + usage["LOCAL"],
        "shared": usage["SHARED"],
        "instructions": sum(word != "NOP" for word in code),
    }


def _ptx_accesses(ptx: str) -> dict[str, int]:
    found = re.findall(r"\b(ld|st)\.global[\w.:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return _widths((kind == "ld", int(lanes or 1) * int(bits) // 8) for kind, lanes, bits in found)


def _read_amdgcn(assembly: str) -> dict:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", assembly)[1])

    code = re.findall(r"^\t((?:[vs]|ds|global|buffer|flat|scratch)_\w+)", assembly, re.MULTILINE)
    pattern = r"(?:global|buffer|flat)_(load|store)_(?:dword(?:x(\d))?|([us]?byte|[us]?short))"
    accesses = []
    for word in code:
        if match := re.match(pattern, word):
            kind, lanes, small = match.groups()
            size = (1 if "byte" in small else 2) if small else 4 * int(lanes or 1)
            accesses.append((kind == "load", size))
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "shared": field("group_segment_fixed_size"),
        "instructions": sum(word != "s_nop" for word in code),
        "accesses": _widths(accesses),
    }


def _widths(accesses) -> dict[str, int]:
    counts = Counter(f"{'load' if load else 'store'} {size} bytes" for load, size in accesses)
    return dict(sorted(counts.items()))


def budget_for(measured: dict[str, dict]) -> dict[str, dict]:
    """The budget that `measured` just meets."""
    budgets = {key: {name: needs[name] for name in RESOURCES} for key, needs in measured.items()}
    for budget in budgets.values():
        budget["registers"] += -budget["registers"] % REGISTER_GRANULE
    return budgets


def check(measured: dict[str, dict], budgets: dict[str, dict]) -> list[str]:
    """What breaks the budget, one sentence each; [] if nothing does."""
    problems = [f"{key}: in budgets.json, but no such case" for key in budgets.keys() - measured]
    for key, needs in measured.items():
        if key not in budgets:
            problems.append(f"{key}: not in budgets.json")
            continue
        for name in RESOURCES:
            if needs[name] > budgets[key][name]:
                problems.append(f"{key}: {name} {needs[name]}, budget {budgets[key][name]}")
    return sorted(problems)


def read_budgets() -> tuple[str, dict[str, dict]]:
    """The Triton version that the budgets are for, and the budgets."""
    file = json.loads(BUDGETS.read_text())
    return file["triton"], file["budgets"]


def write_budgets(version: str, budgets: dict[str, dict]) -> None:
    lines = (f"    {json.dumps(key)}: {json.dumps(budgets[key])}" for key in sorted(budgets))
    head = f'{{\n  "triton": {json.dumps(version)},\n  "budgets": {{\n'
    BUDGETS.write_text(head + ",\n".join(lines) + "\n  }\n}\n")


def _table(measured: dict[str, dict], budgets: dict[str, dict]) -> str:
    rows = ["| kernel | dtype | target | registers | stack | shared | instructions | accesses |"]
    rows.append("|---|---|---|---|---|---|---|---|")
    for key, needs in measured.items():
        allowed = budgets.get(key, {})
        cells = key.split(" ")
        cells += [f"{needs[name]} / {allowed.get(name, '-')}" for name in RESOURCES]
        cells.append(str(needs["instructions"]))
        cells.append(", ".join(f"{n} x {width}" for width, n in needs["accesses"].items()))
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    every = kernel_modules()
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(every)}")
    parser.add_argument("--write", action="store_true", help="make the table the budget")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    options = parser.parse_args(arguments)
    stems = options.modules or every
    if unknown := sorted(set(stems) - set(every)):
        parser.error(f"modules must be among {every}, got {unknown}")
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        parser.error("interpreted kernels cannot be compiled: unset TRITON_INTERPRET")
    import triton

    version, budgets = read_budgets()
    if options.write and options.modules and version != triton.__version__:
        parser.error(f"the budgets are for Triton {version}: write those of all modules at once")
    measured, problems = compile_all(stems)
    kept = {k: b for k, b in budgets.items() if options.modules and k.split(".")[0] not in stems}
    if options.write:
        version, budgets = triton.__version__, kept | budget_for(measured)
        write_budgets(version, budgets)
    problems += check(measured, {k: b for k, b in budgets.items() if k not in kept})
    if options.json:
        versions = {"triton": triton.__version__, "budgets_for": version}
        print(json.dumps(versions | {"measured": measured, "problems": problems}, indent=1))
    else:
        print(f"Triton {triton.__version__}, budgets for {version}.")
        print("Used / budget; bytes; instructions and accesses as they stand in the code.\n")
        print(_table(measured, budgets))
        print(*problems, sep="\n", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
