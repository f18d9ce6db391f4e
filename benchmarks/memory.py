"""Peak memory of a sampler: ``python -m benchmarks.memory NAME B`` prints the bytes it added.

On a CPU it is measured in a process of its own: the memory that one call added to the resident set
at its peak, model and histories not counted. On a GPU the allocator counts it.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.inputs import FULL
from benchmarks.samplers import Samplers

STEPS = 2  # memory does not grow with them, except for 'parallel', which takes all


def resident() -> int:
    """Bytes of this process that are in memory now (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def on_cuda(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes that one call of `run` adds at its peak, by the CUDA allocator."""
    run()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def in_fresh_process(name: str, batch: int) -> int:
    """What `main` prints, from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", name, str(batch)]
    folder = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the bytes."""
    name, batch = arguments or sys.argv[1:]
    samplers = Samplers(FULL, torch.device("cpu"), int(batch))
    steps = FULL.steps if name == "parallel" else STEPS
    run = getattr(samplers, name)
    run(STEPS, 1)  # what is allocated once stays out of the count
    before = resident()
    run(steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(max(0, peak - before))


if __name__ == "__main__":
    main()
