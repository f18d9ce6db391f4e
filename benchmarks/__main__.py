"""``python -m benchmarks [PYTEST ARGUMENTS]``: the suite under both settings of the allocator.

With glibc's defaults every large float32 result is mapped and faulted in afresh, which on a CPU
costs the peers more than their arithmetic; so they are reported with the thresholds raised too.
Every setting is a process of its own, since glibc reads it at the start.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import ALLOCATOR_VARIABLES, RAISED

SETTINGS = ("default", "raised")


def environment(setting: str) -> dict[str, str]:
    """This process's environment with glibc's thresholds as the setting has them."""
    env = {k: v for k, v in os.environ.items() if k not in ALLOCATOR_VARIABLES}
    if setting == "raised":
        env |= dict.fromkeys(ALLOCATOR_VARIABLES, str(RAISED))
    return env


def main(arguments: Sequence[str] | None = None) -> int:
    """Run pytest once per setting; returns the worst exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run the benchmarks once per allocator setting.",
        epilog="Other arguments go to pytest: --quick, --save, --results DIR, --device, -k, ...",
    )
    parser.add_argument("--allocator", choices=(*SETTINGS, "both"), default="both")
    chosen, others = parser.parse_known_args(arguments)
    folder = Path(__file__).parent
    status = 0
    for setting in SETTINGS if chosen.allocator == "both" else (chosen.allocator,):
        print(f"allocator: {setting}", flush=True)
        command = [sys.executable, "-m", "pytest", str(folder), *others]
        done = subprocess.run(command, env=environment(setting), cwd=folder.parent)
        status = max(status, abs(done.returncode))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
