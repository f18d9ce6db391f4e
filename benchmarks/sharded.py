"""Training steps with the item tables over ranks: memory, time and what is sent, for each rank.

    python -m benchmarks.sharded --items 4000000 --save
    torchrun --nproc-per-node 4 -m benchmarks.sharded --items 4000000 --save

Alone it is one process with whole tables. Histories are random; every rank has one thread. The
losses of the steps are printed too: they do not depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import resource
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.exchanged import Exchanged
from benchmarks.scale_plan import CPU, MB, Sizes
from benchmarks.scale_records import save
from fmrec_fast import FMRecConfig, backend
from fmrec_fast.distributed import World, items, joined
from fmrec_fast.distributed.data_parallel import Replicas, local
from fmrec_fast.losses import training_losses
from fmrec_fast.models import FMRecommender, build_recommender
from fmrec_fast.testing import make_sequences
from fmrec_fast.training import build_optimizer

LOSSES = ("total", "flow", "cross_entropy", "reconstruction")


def settings(sizes: Sizes) -> FMRecConfig:
    """Of a model of these sizes."""
    return FMRecConfig(
        item_num=sizes.items,
        batch_size=sizes.batch,
        max_len=sizes.length,
        hidden_size=sizes.width,
        num_blocks=sizes.blocks,
        last=1,
        decoder_dims=(sizes.inner, sizes.last),
    )


def resident() -> float:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


def highest() -> float:
    """Most bytes that ever were."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def item_bytes(model: FMRecommender, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Of this rank's part of the item side: parameters, gradients, moments."""
    tables = [getattr(module, name) for module, name in items.item_tables(model)]
    moments = [v for t in tables for v in optimizer.state[t].values() if v.numel() > 1]
    return {
        "parameters": sum(local(t).nbytes for t in tables),
        "gradients": sum(local(t.grad).nbytes for t in tables if t.grad is not None),
        "moments": sum(local(v).nbytes for v in moments),
    }


def measure(world: World, sizes: Sizes, steps: int, spread: bool = True) -> dict[str, Any]:
    """Train some steps; what this rank found. Without `spread` every rank has whole tables.

    Bytes are those of the last step, in which they are counted; times and memory are those of the
    steps before, which nothing watches.
    """
    config, before = settings(sizes), resident()
    torch.manual_seed(0)
    if world.alone or not spread:
        model = build_recommender(config)
    else:
        model = items.build_sharded(config, world.mesh())
    model.train()
    optimizer, _ = build_optimizer(model, config)
    replicas = None if world.alone else Replicas(model, LOSSES, world)
    seconds, losses, sent, away, grown, peak = [], [], Exchanged(), 0, 0.0, 0.0
    for step in range(steps):
        if step == steps - 1:
            grown, peak = resident() - before, highest() - before
        whole = make_sequences(sizes.batch, sizes.length, sizes.items, step)
        own = world.share(sizes.batch)
        sequence, target = (part[own.start : own.stop] for part in whole)
        away = foreign_ids(world, sizes, torch.cat((sequence, target), 1))
        world.sum(torch.zeros(()))  # all start together
        with sent if step == steps - 1 else nullcontext():
            began = time.perf_counter()
            optimizer.zero_grad(set_to_none=True)
            if replicas is None:
                found = training_losses(model, sequence, target)
                total, parts = found.total, torch.stack([getattr(found, n) for n in LOSSES])
            else:
                total, parts = replicas.losses(sequence, target, sizes.batch)
            total.backward()
            optimizer.step()
            losses.append(float(world.sum(parts.detach().double())[0]))
            seconds.append(time.perf_counter() - began)
    whole_tables = {id(getattr(*at)) for at in items.item_tables(model)}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in whole_tables]
    for_items = sent.bytes["all-gather"] + sent.bytes["all-to-all"]
    # As many distinct ids as it would take for those of other ranks to be (N - 1)/N of them.
    distinct = away * world.size / max(world.size - 1, 1)
    return {
        "tensors": item_bytes(model, optimizer),
        "others": sum(p.numel() for p in others),
        "grown": grown,
        "peak": peak,
        "seconds": seconds[1:-1],
        "losses": losses,
        "sent": dict(sent.bytes),
        "calls": dict(sent.calls),
        "item side sent": for_items if spread else 0,
        "expected": sizes.item_bytes(world.size, CPU.statistic, distinct) if spread else 0,
    }


def foreign_ids(world: World, sizes: Sizes, ids: Tensor) -> int:
    """How many of the distinct ids are rows of other ranks."""
    first, last = items.chunk(sizes.items, world.rank, world.size)
    distinct = ids.unique()
    return int(((distinct < first) | (distinct >= last)).sum())


def gathered(world: World, found: dict[str, Any]) -> list[dict[str, Any]]:
    """What all ranks found."""
    everyone = [found]
    if not world.alone:
        everyone = [{} for _ in range(world.size)]
        dist.all_gather_object(everyone, found)
    return everyone


def report(world: World, sizes: Sizes, everyone: list[dict[str, Any]]) -> None:
    """Every rank's figures."""
    whole = 16 * sizes.table_parameters
    print(f"{world.size} ranks, {sizes}: item side of all {whole / MB:,.1f} MB")
    for rank, one in enumerate(everyone):
        held = sum(one["tensors"].values())
        print(
            f"  rank {rank}: item side {held / MB:,.1f} MB ({held / whole:.4f} of all: "
            + ", ".join(f"{name} {size / MB:,.1f}" for name, size in one["tensors"].items())
            + f"), resident +{one['grown'] / MB:,.0f} MB, at most +{one['peak'] / MB:,.0f} MB; "
            f"step {1e3 * median(one['seconds']):,.0f} ms; sent for items "
            f"{one['item side sent'] / MB:.3f} MB (formula {one['expected'] / MB:.3f}), "
            f"for the rest {one['sent'].get('all-reduce', 0) / MB:.3f} MB"
        )
    print("  losses", " ".join(f"{loss:.7g}" for loss in everyone[0]["losses"]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=128, help="of all ranks")
    parser.add_argument("--width", type=int, default=64, help="of the embeddings")
    parser.add_argument("--hidden", type=int, default=64, help="in front of the decoder's last")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--save", action="store_true", help="a record beside the others")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error(
            f"--steps must be at least 3 (to warm up, to time, to count), got {options.steps}"
        )
    torch.set_num_threads(1)
    backend.keep_freed_memory()
    sizes = Sizes(
        options.items,
        batch=options.batch,
        width=options.width,
        inner=64,
        last=options.hidden,
        blocks=2,
    )
    with joined() as world:
        everyone = gathered(world, measure(world, sizes, options.steps))
        if world.is_main:
            report(world, sizes, everyone)
            if options.save:
                save(f"sharded-{sizes.items}-on-{world.size}", sizes=sizes, ranks=everyone)


if __name__ == "__main__":
    main()
