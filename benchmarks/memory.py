"""Peak memory of one call, measured: resident memory of a fresh process on a CPU, the
allocator's statistics on CUDA.

    python -m benchmarks.memory MODULE FUNCTION ARGUMENTS-AS-JSON

prints, in JSON, by how many bytes the peak of ``FUNCTION(*ARGUMENTS)()`` lies above what was in
use before: FUNCTION prepares the inputs and returns the call.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch


def extra_bytes(module: str, function: str, *arguments: Any) -> int:
    """The bytes, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", module, function, json.dumps(arguments)]
    root = Path(__file__).parent.parent
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])["extra_bytes"]


def measure(run: Any) -> int:
    """By how much ``run()`` raises the peak."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident("VmRSS")
    run()
    # Not getrusage's ru_maxrss, which begins with the parent's.
    return max(resident("VmHWM") - before, 0)


def resident(what: str) -> int:
    """Bytes of this process in memory now (VmRSS) or at most so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status says nothing of {what}")


def main() -> None:
    """The command line above."""
    module, function, arguments = sys.argv[1:]
    run = getattr(importlib.import_module(module), function)(*json.loads(arguments))
    print(json.dumps({"extra_bytes": measure(run)}))


if __name__ == "__main__":
    main()
