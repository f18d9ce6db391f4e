"""Time the plans of the persistent kernels on this device and keep the fastest (`tuned.json`).

    python -m fmrec_fast.kernels.tune                      # a table; nothing is changed
    python -m fmrec_fast.kernels.tune --write              # winners go to kernels/tuned.json
    python -m fmrec_fast.kernels.tune --compile cuda:90    # no device: which plans would be timed

What the other kernels' search under FMREC_FAST_AUTOTUNE=1 does at a launch takes here too long for
one: a candidate is a program of thousands of instructions. So the search is a command, and its
results are committed.

Every candidate is compiled first, on all cores; what does not compile, needs more shared memory
than the device has, or spills more than any pinned plan is not timed. The others run the Euler
sampler; one whose result is not that of the pinned plan is left out. The fastest few and the
pinned plan are then timed in turns, and a winner replaces the pinned plan where it is faster by
`GAIN`. The encoder and the Picard sweep take the same plans: their programs are the sampler's with
one step.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import product
from statistics import median
from typing import NamedTuple

import torch
import triton
from triton.errors import TritonError

from fmrec_fast.config import PRECISIONS, FaveConfig
from fmrec_fast.kernels import budget, euler_sampler, plans
from fmrec_fast.kernels.launch import FAMILIES, compile_case
from fmrec_fast.kernels.plans import Network, Plan, TilePlan, Tuned
from fmrec_fast.models.blocks import TransformerStack
from fmrec_fast.models.fave import FaveStack
from fmrec_fast.ops.euler_sampler import SamplerWeights

Candidate = Plan | TilePlan

CHUNKS, STAGES, THREADS = (32, 64, 128), (1, 2), (128, 256, 512)
TILES, PROGRAMS = (16, 32, 64), (1, 2, 4)
# The most bytes of stack to a thread: a little more than any pinned plan has.
MOST_STACK = 2048
# Rounds of the first pass, of the second, and how many plans are in that.
ROUNDS, FINAL_ROUNDS, FINALISTS = 5, 30, 4
GAIN = 0.98
# Of the largest value: how far a candidate's result may be from the pinned plan's.
TOLERANCES = {"float32": 1e-5, "tf32": 5e-3, "bf16": 5e-2}
NETWORKS = ("published", "tied", "fave")
# Of the network that is timed; every block costs the same.
BLOCKS = 4


def candidates(network: Network) -> Iterator[Candidate]:
    """Plans of a network, whatever the device; tied padding comes in tiles, Fave's as a whole."""
    width = network.width
    chunks = [c for c in CHUNKS if c <= 4 * width]
    last = 4096 // width
    if not network.tied:
        stacks = (True, False)
        for chunk, stacked, stages, threads in product(chunks, stacks, STAGES, THREADS):
            yield Plan(network.rows, chunk, last, stacked, stages, threads)
    if not network.rotary:
        tiles = [t for t in TILES if t <= network.rows]
        for tile, chunk, stages, threads, programs in product(
            tiles, chunks, STAGES, THREADS[:2], PROGRAMS
        ):
            yield TilePlan(tile, chunk, last, stages, threads, programs)


def case_of(network: Network, chosen: Candidate, kind: str) -> dict:
    """What `budget` compiles for a candidate."""
    whole = isinstance(chosen, Plan)
    kernel, pointers, scalars, constants = euler_sampler.CASE if whole else euler_sampler.TILED
    if whole and network.rotary:
        pointers += " p_rotary"
    elif whole:
        constants = constants | {"p_rotary": None}
    else:
        constants = constants | {"TIED": network.tied}
    sizes = (network.width, network.num_heads, network.precision, kind)
    return compile_case(kernel, pointers, scalars, constants, chosen, *sizes)


def needs_of(job: tuple[Network, Candidate, str]) -> dict[str, int] | str:
    """Registers, stack and shared memory of a candidate, or why it does not compile."""
    network, chosen, kind = job
    (target,) = (t for t in budget.TARGETS if f"{t[0]}:{t[1]}" == kind)
    try:
        needs = budget.measure(case_of(network, chosen, kind), network.precision, target)
    except (TritonError, RuntimeError, subprocess.SubprocessError) as error:
        return f"does not compile: {str(error).strip().splitlines()[-1]}"
    return {name: needs[name] for name in budget.RESOURCES}


def compiled(jobs: list[tuple[Network, Candidate, str]]) -> Iterator[dict[str, int] | str]:
    """`needs_of` each, in order, by several processes; one that the compiler takes down with it
    costs its own result alone."""
    workers = min(len(os.sched_getaffinity(0)), budget.MOST_WORKERS)
    context = multiprocessing.get_context("spawn")
    done = 0
    while done < len(jobs):
        with ProcessPoolExecutor(workers, context) as pool:
            futures = [pool.submit(needs_of, job) for job in jobs[done:]]
            for future in futures:
                try:
                    result: dict[str, int] | str = future.result()
                except BrokenProcessPool:
                    break
                done += 1
                yield result
            else:
                return
        with ProcessPoolExecutor(1, context) as pool:  # the first of those that may have done it
            try:
                result = pool.submit(needs_of, jobs[done]).result()
            except BrokenProcessPool:
                result = "does not compile: the compiler crashed"
        done += 1
        yield result


class Trial(NamedTuple):
    """A candidate, its median seconds, or why it has none; and what it needs."""

    plan: Candidate
    seconds: float | None
    reason: str
    needs: dict[str, int]


def search(
    given: Iterable[tuple[Candidate, dict[str, int] | str]],
    pinned: Candidate,
    measure: Callable[[Candidate, int], float],
    shared: int,
    *,
    deadline: float = float("inf"),
) -> list[Trial]:
    """Every candidate's trial, the fastest first and those that were not timed last.

    Args:
        given: candidates, each with what it needs or why it does not compile.
        pinned: the plan in force, which is always timed.
        measure: (plan, rounds) -> median seconds; raises ValueError for a wrong result, and what
            Triton raises where the plan does not run.
        shared: bytes of shared memory that a program may have.
        deadline: when (of `time.monotonic`) to time no further candidates.
    """
    trials: list[Trial] = []
    unknown: dict[str, int] = {}
    for chosen, needs in [(pinned, unknown), *given]:
        reason = needs if isinstance(needs, str) else _over(needs, shared)
        if chosen == pinned and trials:
            continue
        seconds = None
        if not reason and trials and time.monotonic() > deadline:
            reason = "no time was left"
        if not reason:
            try:
                seconds = measure(chosen, ROUNDS)
            except (TritonError, RuntimeError, ValueError) as error:
                if chosen == pinned:
                    raise
                reason = str(error).strip().splitlines()[-1]
        trials.append(Trial(chosen, seconds, reason, needs if isinstance(needs, dict) else {}))
    trials.sort(key=_rank)
    finalists = trials[:FINALISTS]
    if all(trial.plan != pinned for trial in finalists):
        finalists.append(next(trial for trial in trials if trial.plan == pinned))
    again = [t for t in finalists if t.seconds is not None]
    # In turns, so that what changes meanwhile changes for all.
    times = [[measure(t.plan, 1) for t in again] for _ in range(FINAL_ROUNDS)]
    medians = {t.plan: median(row[i] for row in times) for i, t in enumerate(again)}
    return sorted((t._replace(seconds=medians.get(t.plan, t.seconds)) for t in trials), key=_rank)


def _rank(trial: Trial) -> float:
    return float("inf") if trial.seconds is None else trial.seconds


def _over(needs: dict[str, int], shared: int) -> str:
    """Which budget a candidate exceeds; empty if none."""
    if needs.get("shared", 0) > shared:
        return f"needs {needs['shared']} bytes of shared memory, there are {shared}"
    if needs.get("stack", 0) > MOST_STACK:
        return f"needs {needs['stack']} bytes of stack, at most {MOST_STACK} are taken"
    return ""


class Sampler:
    """The Euler sampler over random histories and weights, timed under one plan or another."""

    def __init__(
        self, network: Network, length: int, batch: int, steps: int, device: torch.device
    ) -> None:
        g = torch.Generator().manual_seed(0)
        width, heads = network.width, network.num_heads
        if network.rotary:
            config = FaveConfig(
                item_num=2, hidden_size=width, num_heads=heads, num_blocks=BLOCKS, last=0
            )
            stack: TransformerStack = FaveStack(config)
        else:
            stack = TransformerStack(width, BLOCKS, heads, "published")
        blocks, norm = stack.to(device).weights(), torch.ones(width, device=device)
        variant = stack.variant
        self.weights = SamplerWeights(blocks, norm, 0 * norm, heads, "published", 1e-3, variant)
        # Exponential lengths with the mean of Beauty's test histories.
        lengths = -8 * torch.rand(batch, generator=g).log()
        mask = torch.arange(length).flip(0) < lengths.clamp(1, length)[:, None]
        e = torch.randn(batch, length, width, generator=g) * mask[..., None]
        z0 = torch.randn(batch, width, generator=g)
        taus = torch.randn(steps, width, generator=g)
        self.inputs = [t.to(device) for t in (e, mask.float(), z0, taus)]
        self.rows = torch.arange(batch, device=device)
        self.seed = torch.zeros((), dtype=torch.int64, device=device)
        self.network, self.device = network, device
        self.right: torch.Tensor | None = None

    def __call__(self, chosen: Candidate) -> torch.Tensor:
        out = torch.empty_like(self.inputs[2])
        options = (None, self.rows, self.seed, self.network.precision, self.network.tied, out)
        with plans.only(chosen), torch.no_grad():
            euler_sampler.euler_sampler(*self.inputs, self.weights, *options)
        return out

    def measure(self, chosen: Candidate, rounds: int) -> float:
        """Median seconds of `rounds` runs, after one.

        Raises:
            ValueError: the result is not that of the first plan that was measured.
        """
        out = self(chosen)
        if self.right is None:
            self.right = out
        error = float((out - self.right).abs().max() / self.right.abs().max())
        if not error <= TOLERANCES[self.network.precision]:
            raise ValueError(f"its result is off by {error:.1e}")
        return median(_seconds(partial(self, chosen), self.device) for _ in range(rounds))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    interpreted = triton.knobs.runtime.interpret
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not interpreted and not options.compile:
        print("there is no CUDA device: --compile KIND shows what would be timed", file=sys.stderr)
        return 1
    kind, shared = plans.family(device)
    if options.compile:
        kind, shared = options.compile, dict(FAMILIES)[options.compile]
    deadline = time.monotonic() + 60 * options.minutes
    winners: list[Tuned] = []
    for width, length, precision, name in product(
        options.widths, options.lengths, options.precisions, options.networks
    ):
        tied, rotary = name == "tied", name == "fave"
        rows = plans.tile_rows(length)
        network = Network(width, rows, options.heads, precision, tied, rotary)
        pinned = plans.pinned(length, width, options.heads, precision, kind, shared, tied, rotary)
        print(f"\n{kind}, L = {length}, {network}", flush=True)
        if isinstance(pinned, str):
            print(pinned)
            continue
        chosen = [c for c in candidates(network) if c != pinned][: options.most]
        # Interpreted programs are not compiled: they take the place of a device in the tests.
        jobs = [(network, c, kind) for c in (pinned, *chosen)]
        needs = [dict[str, int]()] * len(jobs) if interpreted else list(compiled(jobs))
        if options.compile:
            for candidate, needed in zip((pinned, *chosen), needs):
                reason = needed if isinstance(needed, str) else _over(needed, shared)
                print(f"{candidate}: {reason or needed}")
            continue
        sampler = Sampler(network, length, options.batch, options.steps, device)
        given = zip(chosen, needs[1:])
        trials = search(given, pinned, sampler.measure, shared, deadline=deadline)
        base = next(trial.seconds for trial in trials if trial.plan == pinned)
        for trial in trials:
            took = trial.reason if trial.seconds is None else f"{1e3 * trial.seconds:.3f} ms"
            print(f"{took:>12}  {trial.plan}{'  (pinned)' if trial.plan == pinned else ''}")
        best = trials[0]
        if best.plan != pinned and best.seconds < GAIN * base:
            measured = {
                "device": torch.cuda.get_device_name() if device.type == "cuda" else "interpreter",
                "torch": torch.__version__,
                "triton": triton.__version__,
                "batch": options.batch,
                "steps": options.steps,
                "seconds": best.seconds,
                "pinned_seconds": base,
            }
            winners.append(Tuned(network, best.plan, best.needs.get("shared", 0), measured))
    if options.write and not options.compile:
        plans.write_tuned(plans.TUNED, kind, winners)
        print(f"\n{len(winners)} plans written to {plans.TUNED}; now the budgets:")
        print("python -m fmrec_fast.kernels.budget encoder euler_sampler picard_sweep --write")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fmrec_fast.kernels.tune",
        description=str(__doc__).split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--widths", type=int, nargs="+", default=[128], choices=plans.WIDTHS, help="D")
    add("--lengths", type=int, nargs="+", default=[50], help="L")
    add("--heads", type=int, default=4, help="H")
    add("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    add("--networks", nargs="+", default=list(NETWORKS[:2]), choices=NETWORKS)
    add("--batch", type=int, default=512, help="B")
    add("--steps", type=int, default=4, help="q")
    add("--minutes", type=float, default=float("inf"), help="time no more candidates after these")
    add("--most", type=int, default=None, help="candidates of each network")
    add("--write", action="store_true", help="write the winners")
    add("--compile", choices=[kind for kind, _ in FAMILIES], help="only compile, for this family")
    return parser


if __name__ == "__main__":
    sys.exit(main())
