"""Sampling, end to end: the published program, tuned, compiled, and `fmrec_fast.sample`."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.harness import ROUNDS_FOR_P99, Work, assert_agreement, count_flops
from benchmarks.memory import extra_bytes, measure
from benchmarks.samplers import Samplers
from fmrec_fast import dispatch_log, extension, noise, use_backend
from fmrec_fast.backend import Backend
from fmrec_fast.config import PRECISIONS
from fmrec_fast.picard import evaluation_flops, prefers_parallel

# Above this batch the agreement is asserted over fewer steps (every step is the same program),
# and rounds are few. Above HUGE a CPU runs the peers with --large, once.
LARGE, HUGE = 64, 512
STEPS_CHECKED = 3
SEED = 11
# On a CPU, per batch: times as fast as the published program, as torch.compile.
AIMS = {1: (20.0, 4.0), 32: (10.0, 4.0), 512: (8.0, 2.7)}
# Of the largest value; a reduced precision is held to what its mantissa allows.
TOLERANCES = {"float32": 1e-5, "tf32": 5e-3, "bf16": 5e-2}
PEERS = ("published", "tuned", "compiled")


def variants_of(suite, samplers, batch):
    """(functions by name, why the others are left out)."""
    cpu = suite.device.type == "cpu"
    variants = {name: getattr(samplers, name) for name in (*PEERS, "ours", "parallel", "auto")}
    left_out = {}
    if suite.compile_obstacle is not None:
        left_out["compiled"] = suite.compile_obstacle
    if cpu and batch > HUGE and not suite.large:
        slow = f"takes minutes at B = {batch} on a CPU (--large does it); see B = {HUGE}"
        left_out |= dict.fromkeys(PEERS, slow)
    if cpu and batch > LARGE:
        same = "the threads are busy step by step; 'auto' takes that"
        left_out["auto"] = same
        if batch > HUGE:
            left_out["parallel"] = same
    if cpu:
        left_out |= dict.fromkeys(("graph", "graph_parallel"), "CUDA graphs need a CUDA device")
    else:
        for name in ("ours", "parallel", "auto"):
            variants[name] = partial(variants[name], graph=False)
        variants["graph"] = partial(samplers.ours, graph=True)
        variants["graph_parallel"] = partial(samplers.parallel, graph=True, sweeps=1)
    for precision in PRECISIONS[1:]:
        names = (precision,) if cpu else (precision, f"parallel_{precision}")
        if cpu and extension.available() and not extension.load().isa().startswith("amx"):
            left_out[precision] = "without AMX the C++ kernels multiply in float32"
            continue
        options = {"precision": precision, "graph": not cpu}
        with dispatch_log() as log:
            samplers.ours(1, rows=1, **options)
        entries = [entry for entry in log if entry.op == "euler_sampler"]
        if any(entry.backend is not Backend.REFERENCE for entry in entries):
            variants[precision] = partial(samplers.ours, **options)
            if not cpu:
                sweep = partial(samplers.parallel, sweeps=1, **options)
                variants[f"parallel_{precision}"] = sweep
        else:
            reason = "; ".join({entry.reason for entry in log if entry.reason})
            left_out |= dict.fromkeys(names, reason)
    return {n: run for n, run in variants.items() if n not in left_out}, left_out


def agreement(suite, samplers, variants, batch):
    """All variants on the same start and noise: ours draws them from its seed, as when timed; the
    peers are handed them, computed by the stream's definition."""
    sizes, device = suite.sizes, suite.device
    checked = sizes.steps if batch <= LARGE else min(STEPS_CHECKED, sizes.steps)
    rows = min(batch, HUGE)
    seed, names = noise.as_seed(SEED, device), torch.arange(rows, device=device)
    delta = samplers.model.config.lambda_uncertainty
    shape = (sizes.length, sizes.width)
    given = {
        "z0": noise.start(seed, names, sizes.width),
        "lam": torch.stack([noise.lam(seed, names, i, *shape, delta) for i in range(checked)]),
    }
    right = samplers.published(checked, rows, **given)
    found = {"baseline": "published", "tolerance": TOLERANCES["float32"], "steps_checked": checked}
    errors = {}
    for name, run in variants.items():
        x = run(checked, rows, **(given if name in PEERS else {"seed": SEED}))
        results = {"published": {"x": right}, name: {"x": x}}
        tolerance = TOLERANCES.get(name.removeprefix("parallel_"), TOLERANCES["float32"])
        if name != "published":
            one = assert_agreement(results, "published", tolerance)
            errors |= one["largest_relative_error"]
    return found | {"largest_relative_error": errors}


def test_euler_sampler(suite, race, sampling_batch):
    sizes, device, batch = suite.sizes, suite.device, sampling_batch
    mode = None if suite.compile_obstacle else suite.compile_mode
    samplers = Samplers(sizes, device, batch, mode)
    variants, left_out = variants_of(suite, samplers, batch)
    equality = agreement(suite, samplers, variants, batch)

    flops = {}
    with use_backend("reference"):
        parallel = {name for name in variants if "parallel" in name}
        delta = samplers.model.config.lambda_uncertainty
        work = evaluation_flops(sizes.length, sizes.width, sizes.blocks)
        if prefers_parallel(batch, sizes.steps, delta, device, work):
            parallel.add("auto")
        for name in set(variants) - {*PEERS}:
            run = samplers.parallel if name in parallel else samplers.ours
            flops[name] = count_flops(
                lambda rows, run=run: run(sizes.steps, min(rows, batch)), batch
            )
    for name in ("published", "tuned"):
        run = getattr(samplers, name)
        flops[name] = count_flops(lambda rows, run=run: run(sizes.steps, rows), batch)
    flops["compiled"] = flops["tuned"]
    peaks = {}
    if device.type == "cuda":
        for name, run in variants.items():
            peaks[name] = measure(partial(run, sizes.steps))
    elif batch == HUGE and not suite.quick:
        for name in ("published", "tuned", "ours", "parallel"):
            peaks[name] = extra_bytes("benchmarks.samplers", "prepare", name, batch)

    for run in variants.values():  # the same warm-up for all: two steps at this batch
        run(2)
    sequence = samplers.sequence
    parameters = sum(
        t.numel() for block in samplers.model.fm.sampler_weights().blocks for t in block.tensors()
    )
    record = race(
        "euler_sampler",
        f"sampling, B = {batch}, {sizes.steps} steps",
        {name: partial(run, sizes.steps) for name, run in variants.items()},
        ours="ours",
        sizes={
            "B": batch,
            "L": sizes.length,
            "D": sizes.width,
            "V": sizes.items,
            "q": sizes.steps,
            "blocks": sizes.blocks,
            "mean_history": (sequence > 0).sum(1).float().mean().item(),
        },
        equality=equality,
        work=Work(
            bytes=8 * sequence.numel()
            + 4 * (parameters + batch * (sizes.length + 1) * sizes.width),
            flops=flops["ours"],
        ),
        flops=flops,
        memory=peaks,
        items=batch,
        note="from ids to the embedding of the next item; scoring is not included. 'ours' is step "
        "by step; its FLOPs, the floor, do not subtract what a kernel saves on padding",
        left_out=left_out,
        budget=50.0 if batch == 1 else 60.0 if batch > LARGE else 25.0,
        least=ROUNDS_FOR_P99 if batch <= 8 else 2 if batch > HUGE else 3 if batch > LARGE else 5,
        round_s=None if batch <= LARGE else float("inf"),
    )
    # What `recommend` runs.
    fastest = "auto" if "auto" in variants else "ours"
    for peer, wanted in zip(("published", "compiled"), AIMS.get(batch, ())):
        if peer in variants and device.type == "cpu":
            suite.aim(
                f"sampling, B = {batch}: {fastest} is so many times as fast as {peer}",
                record.times_as_fast(peer, fastest),
                at_least=wanted,
            )
