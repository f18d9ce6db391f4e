"""Training steps with the item tables over ranks: memory, time and what is sent, for each rank.

    python -m benchmarks.sharded --items 4000000
    torchrun --nproc-per-node 4 -m benchmarks.sharded --items 4000000

Alone it is one process with whole tables. Histories are random; every rank has one thread. The
losses of the steps are printed too: they do not depend on the number of ranks.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from fmrec_fast import FMRecConfig, backend
from fmrec_fast.distributed import World, items, joined
from fmrec_fast.distributed.data_parallel import Replicas, local
from fmrec_fast.losses import training_losses
from fmrec_fast.models import FMRecommender, build_recommender
from fmrec_fast.testing import make_sequences
from fmrec_fast.training import build_optimizer

LOSSES = ("total", "flow", "cross_entropy", "reconstruction")
MB = 1e6


class Sizes(NamedTuple):
    """V, the global batch, L, D and the width of the decoder's last layer."""

    items: int
    batch: int = 128
    length: int = 50
    width: int = 64
    hidden: int = 64

    def config(self) -> FMRecConfig:
        return FMRecConfig(
            item_num=self.items,
            batch_size=self.batch,
            max_len=self.length,
            hidden_size=self.width,
            num_blocks=2,
            last=1,
            decoder_dims=(64, self.hidden),
        )

    def item_floats(self) -> int:
        """Parameters of the item side."""
        return self.items * (self.width + self.hidden + 1)


def resident() -> float:
    """Bytes of this process that are in memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return float(pages * resource.getpagesize())


def highest() -> float:
    """Most bytes that ever were."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


class Sent:
    """Bytes that a rank sends in the package's collectives, by kind; a ring for all but all-to-all.

    The dense layers' gradients are the 'all-reduce'; all else belongs to the item tables.
    """

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self._real = {
            name: getattr(dist, name)
            for name in ("all_gather_into_tensor", "all_to_all_single", "all_reduce")
        }

    def __enter__(self) -> Sent:
        dist.all_gather_into_tensor = self._gather
        dist.all_to_all_single = self._exchange
        dist.all_reduce = self._reduce
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._real.items():
            setattr(dist, name, function)

    def _gather(self, found, own, *rest, **options):
        self.bytes["all-gather"] += own.nbytes * (found.numel() // max(own.numel(), 1) - 1)
        return self._real["all_gather_into_tensor"](found, own, *rest, **options)

    def _exchange(self, found, x, received, sent, **options):
        group = options["group"]
        rank = dist.get_rank(group)
        others = sum(sent) - sent[rank]
        self.bytes["all-to-all"] += x.nbytes * others // max(len(x), 1)
        return self._real["all_to_all_single"](found, x, received, sent, **options)

    def _reduce(self, x, *rest, **options):
        ranks = dist.get_world_size()
        self.bytes["all-reduce"] += 2 * (ranks - 1) * x.nbytes // ranks
        return self._real["all_reduce"](x, *rest, **options)


def expected_bytes(sizes: Sizes, ranks: int, distinct: float) -> float:
    """What a rank sends for the item tables in a step, by docs/scale.md: with equal shares of the
    batch and `distinct` ids in each rank's histories and targets; 8 bytes a statistic, as on CPUs.
    """
    share = sizes.batch / ranks
    row = 8 * (sizes.width + sizes.hidden + sizes.length + 1) + 9 * 8
    return (ranks - 1) * (share * row + distinct / ranks * 8 * (sizes.width + 1))


def item_bytes(model: FMRecommender, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Of this rank's part of the item side: parameters, gradients, moments."""
    tables = [getattr(module, name) for module, name in items.item_tables(model)]
    moments = [v for t in tables for v in optimizer.state[t].values() if v.numel() > 1]
    return {
        "parameters": sum(local(t).nbytes for t in tables),
        "gradients": sum(local(t.grad).nbytes for t in tables if t.grad is not None),
        "moments": sum(local(v).nbytes for v in moments),
    }


def measure(world: World, sizes: Sizes, steps: int) -> dict[str, Any]:
    """Train some steps; what this rank found."""
    config, before = sizes.config(), resident()
    torch.manual_seed(0)
    if world.alone:
        model = build_recommender(config)
    else:
        model = items.build_sharded(config, world.mesh())
    model.train()
    optimizer, _ = build_optimizer(model, config)
    replicas = None if world.alone else Replicas(model, LOSSES, world)
    seconds, losses, counts, distinct = [], [], [], []
    for step in range(steps):
        whole = make_sequences(sizes.batch, sizes.length, sizes.items, step)
        own = world.share(sizes.batch)
        sequence, target = (part[own.start : own.stop] for part in whole)
        distinct.append(len(torch.cat((sequence, target), 1).unique()))
        with Sent() as sent:
            world.sum(torch.zeros(()))  # all start together
            sent.bytes.clear()
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
        counts.append(sent.bytes)
    last = counts[-1]
    return {
        "tensors": item_bytes(model, optimizer),
        "grown": resident() - before,
        "peak": highest() - before,
        "seconds": seconds[1:] or seconds,
        "losses": losses,
        "sent": dict(last),
        "item side sent": last["all-gather"] + last["all-to-all"],
        "expected": expected_bytes(sizes, world.size, distinct[-1]) if not world.alone else 0.0,
    }


def report(world: World, sizes: Sizes, found: dict[str, Any]) -> None:
    """Every rank's figures, by rank 0."""
    everyone: list[dict[str, Any]] = [found]
    if not world.alone:
        everyone = [{} for _ in range(world.size)]
        dist.all_gather_object(everyone, found)
    if not world.is_main:
        return
    whole = 4 * 4 * sizes.item_floats()
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
    options = parser.parse_args()
    torch.set_num_threads(1)
    backend.keep_freed_memory()
    sizes = Sizes(options.items, options.batch, width=options.width, hidden=options.hidden)
    with joined() as world:
        report(world, sizes, measure(world, sizes, options.steps))


if __name__ == "__main__":
    main()
