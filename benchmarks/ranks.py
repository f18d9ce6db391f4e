"""A training step on one rank and on several, in turns, and what the exchange alone takes:

    torchrun --nproc-per-node 2 -m benchmarks.ranks [--large]

Every rank has one thread. While rank 0 computes the whole batch alone, the others wait.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.distributed as dist

from fmrec_fast import FMRecConfig, backend
from fmrec_fast.data import synthetic_dataset
from fmrec_fast.distributed import World, joined
from fmrec_fast.training import Trainer

SIZES = {
    "small": {"item_num": 2001, "hidden_size": 64, "max_len": 20, "decoder_dims": (64, 256)},
    "published": {"item_num": 12102, "hidden_size": 128, "max_len": 50},
}
BATCH = 512


def trainer(size: str, world: World, folder: str) -> Trainer:
    config = FMRecConfig(**SIZES[size], batch_size=BATCH)
    data = synthetic_dataset(2000, config.item_num - 1, 20, 12, seed=0)
    return Trainer(data, config, f"{folder}/{size}", world=world)


def timed(world: World, step: Callable[[], object]) -> float:
    """Seconds from all ranks' start to all ranks' end."""
    dist.barrier()
    began = time.perf_counter()
    step()
    dist.barrier()
    return time.perf_counter() - began


def measure(size: str, world: World, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        whole, shared = trainer(size, World(), folder), trainer(size, world, folder)
    share = world.share(BATCH)
    index, own = torch.arange(BATCH), torch.arange(share.start, share.stop)
    parameters = [p for p in shared.model.parameters() if p.requires_grad]
    gradients = torch.zeros(sum(p.numel() for p in parameters))
    variants = {
        "one rank": lambda: (
            whole._train_step(whole.samples.fetch(index)) if world.is_main else None
        ),
        f"{world.size} ranks": lambda: shared._train_step(shared.samples.fetch(own), BATCH),
        "all-reduce of P floats": lambda: dist.all_reduce(gradients),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, step in variants.items():
            torch.manual_seed(number)  # alone, rank 0 draws what the others do not
            seconds = timed(world, step)
            if number:  # the first warms up
                times[name].append(seconds)
    if world.is_main:
        loss = [float(each.sums[0]) for each in (whole, shared)]
        if not math.isclose(*loss, rel_tol=1e-5):
            raise SystemExit(f"{size}: the losses disagree: {loss}")
        print(f"{size}: P = {len(gradients):,}")
        for name, taken in times.items():
            print(f"  {name:24} {1e3 * median(taken):8.1f} ms  (least {1e3 * min(taken):.1f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", action="store_true", help="also at the published size")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    backend.keep_freed_memory()
    with joined() as world:
        if world.alone:
            parser.error("start it with torchrun --nproc-per-node 2 or more")
        for size in list(SIZES)[: 1 + options.large]:
            measure(size, world, options.rounds)


if __name__ == "__main__":
    main()
