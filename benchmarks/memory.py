"""Peak memory of one call, measured: resident memory of a fresh process on a CPU, the
allocator's statistics on CUDA.

    python -m benchmarks.memory MODULE FUNCTION ARGUMENTS-AS-JSON

prints, in JSON, by how many bytes the peak of ``FUNCTION(*ARGUMENTS)()`` lies above what was in
use before: FUNCTION prepares the inputs and returns the call.
"""

from __future__ import annotations

import importlib
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

STATUS = Path("/proc/self/status")
PEAKS = Path("/proc/self/clear_refs")


def extra_bytes(module: str, function: str, *arguments: Any) -> int:
    """The bytes, from a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.memory",
        module,
        function,
        json.dumps(arguments),
    ]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])["extra_bytes"]


def measure(run: Any) -> int:
    """By how much ``run()`` raises the peak."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if PEAKS.exists():
        PEAKS.write_text("5")  # what the preparation took at most does not count
    before = resident()
    run()
    return max(peak() - before, 0)


def resident() -> int:
    """Bytes of this process in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def peak() -> int:
    """The most bytes of this process in memory so far.

    Not `getrusage`: what it reports starts at the size of the process that started this one.
    """
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def main() -> None:
    """The command line above."""
    module, function, arguments = sys.argv[1:]
    run = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    print(json.dumps({"extra_bytes": measure(run)}))


if __name__ == "__main__":
    main()
