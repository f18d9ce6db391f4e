"""Interleaved timing, work counted, machine facts, and the JSON they are written to.

A case is a set of variants of one computation on the same data. First all of them must agree;
then they are warmed up alike; then they run in rounds, every variant once a round, so that
whatever the machine does in between meets all of them.
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fmrec_fast import extension, use_backend
from fmrec_fast.backend import MISSING, Backend, availability, current_backend, dispatch_log
from fmrec_fast.environment import processor

SCHEMA = 1
# A 99th percentile of fewer rounds than this would be the maximum by another name.
ROUNDS_FOR_P99 = 100
ROUNDS_OF_THE_SLOW = 2
ALLOCATOR_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
RAISED = 1 << 30


@dataclass
class Timing:
    """One variant's seconds, one entry a round, and the FLOPs counted in one run of it."""

    name: str
    seconds: list[float] = field(default_factory=list)
    flops: int | None = None
    note: str = ""

    def summary(self) -> dict[str, Any]:
        """The rounds with their median, quartiles and percentiles."""
        ordered = sorted(self.seconds)
        several = len(ordered) > 1
        quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if several else None
        percentiles = None
        if len(ordered) >= ROUNDS_FOR_P99:
            percentiles = statistics.quantiles(ordered, n=100, method="inclusive")
        return {
            "rounds": len(ordered),
            "median_s": statistics.median(ordered),
            "q1_s": quartiles[0] if quartiles else None,
            "q3_s": quartiles[2] if quartiles else None,
            "min_s": ordered[0],
            "p50_s": statistics.median(ordered),
            "p99_s": percentiles[98] if percentiles else None,
            "flops": self.flops,
            "note": self.note,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Work:
    """What the operation needs at least, whoever computes it; integer arithmetic of random
    numbers is not counted.

    Args:
        bytes: its inputs read once and its outputs written once.
        flops: floating-point operations of its definition, skipping what cannot be seen in the
            result.
    """

    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Limits:
    """What the machine does at most, measured: bytes/s of a copy, FLOP/s of a float32 product."""

    copy_bytes_per_s: float
    matmul_flops_per_s: float
    how: str

    def seconds(self, work: Work) -> float:
        """The least time in which this machine could do the work."""
        return max(work.bytes / self.copy_bytes_per_s, work.flops / self.matmul_flops_per_s)


@dataclass
class Record:
    """One case: who was compared on what, that they agreed, and how long each took."""

    op: str
    case: str
    sizes: dict[str, Any]
    ours: str
    equality: dict[str, Any]
    timings: list[Timing]
    work: Work | None = None
    items: int | None = None
    note: str = ""
    left_out: dict[str, str] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)

    def times_as_fast(self, name: str, than: str | None = None) -> float:
        """How many times as long as ours (or `than`) a variant took, by the medians."""
        medians = {t.name: statistics.median(t.seconds) for t in self.timings}
        return medians[name] / medians[than or self.ours]

    def to_dict(self, limits: Limits) -> dict[str, Any]:
        """Plain values; the ratios say how many times as long as ours a variant took."""
        variants = {timing.name: timing.summary() for timing in self.timings}
        reference = variants[self.ours]["median_s"]
        for values in variants.values():
            values["times_ours"] = values["median_s"] / reference
            if self.items and values["flops"] is not None:
                values["flops_per_recommendation"] = values["flops"] / self.items
            if values["flops"] is not None:
                rate = values["flops"] / values["median_s"]
                values["fraction_of_matmul_rate"] = rate / limits.matmul_flops_per_s
            if self.work is not None:
                values["fraction_of_limit"] = limits.seconds(self.work) / values["median_s"]
        for name, extra in self.memory.items():
            # Peak beyond inputs and gradients.
            variants[name]["extra_bytes"] = extra
        return {
            "op": self.op,
            "case": self.case,
            "sizes": self.sizes,
            "ours": self.ours,
            "equality": self.equality,
            "work": None if self.work is None else asdict(self.work),
            "note": self.note,
            "left_out": self.left_out,
            "variants": variants,
        }


class Disagreement(AssertionError):
    """Variants that should compute the same do not; nothing is timed."""


def assert_agreement(
    results: Mapping[str, Mapping[str, Tensor]], baseline: str, tolerance: float
) -> dict[str, Any]:
    """Every variant's named results must equal the baseline's.

    Args:
        results: per variant, tensors by name; only names that the baseline has are compared.
        baseline: the variant that is right by definition.
        tolerance: largest difference, relative to the baseline's largest magnitude. Names that
            start with "d_" are gradients: one that is tiny beside the others (a key bias's is 0
            but for rounding) is measured by a hundredth of the largest of them.

    Returns:
        What the record says about it: the largest error of each variant.

    Raises:
        Disagreement: names the variant, the result and the error.
    """
    errors = {}
    right = results[baseline]
    gradients = [float(t.abs().max()) for key, t in right.items() if _is_gradient(key)]
    floor = max(gradients, default=0.0) / 100
    for name, tensors in results.items():
        if name == baseline:
            continue
        errors[name] = 0.0
        for key, expected in right.items():
            got = tensors[key]
            if got.shape != expected.shape:
                raise Disagreement(
                    f"{key} of {name!r} is {tuple(got.shape)}, of {baseline!r} "
                    f"{tuple(expected.shape)}"
                )
            if expected.numel() == 0:
                continue
            got, expected = got.detach().double(), expected.detach().double()
            scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
            if _is_gradient(key):
                scale = max(scale, floor)
            error = float((got - expected).abs().max()) / scale
            if not error <= tolerance:
                raise Disagreement(
                    f"{key} of {name!r} is off by {error:.3g} of the largest value from "
                    f"{baseline!r}; at most {tolerance:.3g} is allowed"
                )
            errors[name] = max(errors[name], error)
    return {"baseline": baseline, "tolerance": tolerance, "largest_relative_error": errors}


def _is_gradient(key: str) -> bool:
    return key.startswith("d_")


def gradients_of(
    out: Tensor, named: Mapping[str, Tensor], grad: Tensor | None = None
) -> dict[str, Tensor]:
    """`out` and its gradients, by name; leaves that it does not depend on are left out."""
    found = torch.autograd.grad(out, list(named.values()), grad, allow_unused=True)
    present = {f"d_{name}": g for name, g in zip(named, found, strict=True) if g is not None}
    return {"out": out.detach(), **present}


def runnable_backends(op: str, device: torch.device) -> tuple[list[Backend], dict[str, str]]:
    """The backends that can run `op` here, and why each of the others cannot.

    Triton's interpreter is left out: what it takes is not a speed.
    """
    found, left_out = [Backend.REFERENCE], {}
    for backend in (Backend.TRITON, Backend.CPP):
        reason = MISSING.get((op, backend)) or availability(backend, device)
        if reason is None and backend is Backend.TRITON and device.type != "cuda":
            reason = "Triton's interpreter is not timed"
        if reason is None:
            found.append(backend)
        else:
            left_out[backend.value] = reason
    return found, left_out


def on_backend(op: str, backend: Backend, function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` under `use_backend(backend)`, once it is seen that `op` then runs there.

    Raises:
        RuntimeError: the op ran on another backend, or did not run.
    """

    def run() -> Any:
        with use_backend(backend):
            return function()

    with dispatch_log() as log:
        run()
    ran = {entry.backend for entry in log if entry.op == op}
    if ran != {backend}:
        raise RuntimeError(f"{op} was to run on {backend.value}, the dispatch log says {ran}")
    return run


def declined_by(op: str, backend: Backend, function: Callable[[], Any]) -> str:
    """Why `op` runs its definition for this call though `backend` was named; empty if it does
    not."""
    with use_backend(backend), dispatch_log() as log:
        function()
    return next((entry.reason for entry in log if entry.op == op), "")


def automatic_backend(op: str, function: Callable[[], Any]) -> Backend:
    """The backend that `op` runs on when the caller asks for none."""
    if current_backend() is not Backend.AUTO:
        raise RuntimeError("FMREC_FAST_BACKEND is set; the benchmarks choose the backends")
    with dispatch_log() as log:
        function()
    (ran,) = {entry.backend for entry in log if entry.op == op}
    return ran


class RoundRobin:
    """Times variants in rounds, every variant once a round, the order turning from round to round.

    A variant that has used up the budget alone sits out after `ROUNDS_OF_THE_SLOW` rounds, one
    whose single run takes longer than the budget after that; the record says how many rounds each
    one had.

    Args:
        variants: name to function.
        ours: the one that pytest-benchmark's own clock gets to see, in a run of its own after
            each round.
    """

    def __init__(
        self, variants: Mapping[str, Callable[[], Any]], ours: str, device: torch.device
    ) -> None:
        if ours not in variants:
            raise ValueError(f"ours must be one of {list(variants)}, got {ours!r}")
        self.variants, self.ours = dict(variants), ours
        self.timings = {name: Timing(name) for name in self.variants}
        self.wait = torch.cuda.synchronize if device.type == "cuda" else _nothing
        self.rounds, self.budget = 0, float("inf")

    def once(self, name: str) -> float:
        """Seconds of one run."""
        run = self.variants[name]
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def round(self) -> None:
        """One round."""
        names = list(self.variants)
        turn = self.rounds % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = self.timings[name].seconds
            few = len(seconds) < ROUNDS_OF_THE_SLOW and max(seconds, default=0) < self.budget
            if few or sum(seconds) < self.budget:
                seconds.append(self.once(name))
        self.rounds += 1

    def run(
        self, benchmark: Any, *, budget: float, least: int, most: int, round_s: float | None = None
    ) -> list[Timing]:
        """As many rounds as the budget allows, from `least` to `most`.

        Args:
            benchmark: pytest-benchmark's fixture.
            budget: seconds.
            round_s: what a round takes, about; None runs one (uncounted) to find out.
        """
        if round_s is None:
            round_s = sum(self.once(name) for name in self.variants)
        rounds = max(least, min(most, int(budget / max(round_s, 1e-9))))
        self.budget = budget
        gc.collect()
        benchmark.pedantic(
            self.once, args=(self.ours,), setup=self.round, rounds=rounds, iterations=1
        )
        return list(self.timings.values())


def _nothing() -> None:
    """What there is to wait for on a CPU."""


@contextmanager
def _countable() -> Iterator[FlopCounterMode]:
    # Only attention written as matrix products is visible to the counter on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def count_flops(run: Callable[[int], Any], batch: int) -> int:
    """FLOPs of ``run(batch)``, from counts at two small batches: they are linear in the batch.

    Counted are matrix products (attention's included) by torch's `FlopCounterMode`; elementwise
    arithmetic and work inside C++ or Triton kernels are invisible to it.
    """
    counts = []
    for small in (2, 4):
        with _countable() as counter:
            run(small)
        counts.append(counter.get_total_flops())
    slope = (counts[1] - counts[0]) / 2
    return round(counts[0] + slope * (batch - 2))


def measure_limits(device: torch.device, quick: bool) -> Limits:
    """The copy bandwidth and the rate of a large float32 matrix product, the best of several."""
    size, count, repeats = (1024, 1 << 24, 3) if quick else (4096, 1 << 26, 5)
    wait = torch.cuda.synchronize if device.type == "cuda" else _nothing

    def best(run: Callable[[], Any]) -> float:
        seconds = []
        for _ in range(repeats + 1):
            wait()
            start = time.perf_counter()
            run()
            wait()
            seconds.append(time.perf_counter() - start)
        return min(seconds)

    source = torch.ones(count, device=device)
    target = torch.empty_like(source)
    copy = best(lambda: target.copy_(source))
    a, b = torch.ones(size, size, device=device), torch.ones(size, size, device=device)
    out = torch.empty_like(a)
    product = best(lambda: torch.mm(a, b, out=out))
    how = f"best of {repeats + 1}: copy of {count * 4 >> 20} MiB, product of {size} x {size}"
    return Limits(8 * count / copy, 2 * size**3 / product, how)


def allocator_setting() -> dict[str, Any]:
    """glibc's thresholds as this process was started with, and what that amounts to."""
    values = {name: os.environ.get(name) for name in ALLOCATOR_VARIABLES}
    given = [int(v) for v in values.values() if v is not None]
    if not given:
        name = "default"
    elif len(given) == len(values) and min(given) >= RAISED:
        name = "raised"
    else:
        name = "other"
    return {"setting": name, **values, "LD_PRELOAD": os.environ.get("LD_PRELOAD")}


def _package(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The commit that was measured, with '+' if the tree differs from it."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def compile_obstacle(device: torch.device) -> str | None:
    """None if `torch.compile` can generate code for the device, else the reason why not."""
    compilers = [os.environ.get("CXX"), "g++", "clang++", "c++"]
    if not any(shutil.which(name) for name in compilers if name):
        return "torch.compile needs a C++ compiler, and none is on the path"
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "torch.compile needs triton on CUDA, and it is not installed"
    return None


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a reader must know of the machine to judge the numbers."""
    cuda = device.type == "cuda"
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": processor(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "allocator": allocator_setting(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda if cuda else None,
            "triton": _package("triton"),
            "fmrec_fast": _package("fmrec_fast"),
            "extension": extension.available(),
            "isa": extension.load().isa() if extension.available() else None,
            "os": platform.platform(),
        },
        "revision": _revision(),
    }


def machine_slug(facts: Mapping[str, Any]) -> str:
    """A name for file names, such as 'intel-xeon-processor-2cpu'."""
    name = facts["gpu"] or f"{facts['cpu']} {facts['cores']}cpu"
    plain = re.sub(r"\((r|tm)\)|@.*?ghz", "", name.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def write_results(
    folder: Path,
    what: str,
    facts: Mapping[str, Any],
    settings: Mapping[str, Any],
    limits: Limits,
    records: Iterable[Record],
) -> Path:
    """``<date>-<machine>-<what>.json`` in `folder`; returns its path."""
    now = datetime.datetime.now().astimezone()
    contents = {
        "schema": SCHEMA,
        "date": now.isoformat(timespec="seconds"),
        "machine": facts,
        "settings": settings,
        "limits": asdict(limits),
        "records": [record.to_dict(limits) for record in records],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{now:%Y-%m-%d}-{machine_slug(facts)}-{what}.json"
    path.write_text(json.dumps(contents, indent=1) + "\n")
    return path


def read_results(path: str | Path) -> dict[str, Any]:
    """What `write_results` wrote.

    Raises:
        ValueError: written by another version of this harness.
    """
    contents = json.loads(Path(path).read_text())
    if contents.get("schema") != SCHEMA:
        raise ValueError(f"{path}: expected schema {SCHEMA}, got {contents.get('schema')!r}")
    return contents
