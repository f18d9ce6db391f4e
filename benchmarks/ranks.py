"""A training step on one rank and on several, measured and predicted.

    python -m benchmarks.ranks --large --save

runs torchrun with 2 and 4 ranks in turn, prints what was measured beside what the plan's formula
(`scale_plan.Sizes.predicted_seconds`) says, and puts a record and docs/scale.md's table in place.
Several minutes; the machine should have nothing else to do. One number of ranks alone:

    torchrun --nproc-per-node 2 -m benchmarks.ranks [--large]

Every rank has one thread. All variants take turns on the same batches, and while rank 0 computes
the whole batch alone, the others wait. What the formula reads is measured in the same turns, with
all ranks at work and no exchange between them, so that they share cores and memory as in a step.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import scale_records
from benchmarks.exchanged import Exchanged
from benchmarks.scale_plan import DOCUMENT, MB, Rates, Sizes
from fmrec_fast import FMRecConfig, backend
from fmrec_fast.data import synthetic_dataset
from fmrec_fast.distributed import World, joined
from fmrec_fast.training import Trainer

SIZES = {
    "small": Sizes(2001, width=64, inner=64, last=256, length=20),
    "published": Sizes(12102, last=2048),
}
RANKS = (2, 4)
# Steps before any counts; in the third one DistributedDataParallel arranges its buckets.
WARM_UP = 3
KINDS = {"replicas": "data parallel", "sharded": "`--shard-items`"}
NAME = "ranks"
MARKS = "<!-- ranks -->\n", "<!-- /ranks -->"


def trainer(sizes: Sizes, world: World, folder: str, spread: bool = False) -> Trainer:
    config = FMRecConfig(
        item_num=sizes.items,
        hidden_size=sizes.width,
        max_len=sizes.length,
        decoder_dims=(sizes.inner, sizes.last),
        num_blocks=sizes.blocks,
        last=min(FMRecConfig.last, sizes.blocks - 1),
        batch_size=sizes.batch,
    )
    data = synthetic_dataset(2000, sizes.items - 1, 20, 12, seed=0)
    return Trainer(data, config, f"{folder}/run", world=world, shard_items=spread)


def timed(step: Callable[[], object]) -> tuple[float, float]:
    """Seconds from all ranks' start to all ranks' end, and this rank's seconds of CPU."""
    dist.barrier()
    began, used = time.perf_counter(), time.process_time()
    step()
    used = time.process_time() - used
    dist.barrier()
    return time.perf_counter() - began, used


def measure(sizes: Sizes, world: World, rounds: int) -> dict[str, Any]:
    """Medians of all variants, and what the formula makes of some of them."""
    with tempfile.TemporaryDirectory() as folder:
        whole = trainer(sizes, World(), folder)
        replicas = trainer(sizes, world, folder)
        sharded = trainer(sizes, world, folder, spread=True)
    share = world.share(sizes.batch)
    index, own = torch.arange(sizes.batch), torch.arange(share.start, share.stop)
    count = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    gradients, number = torch.zeros(count), torch.zeros(1)

    def step_of(each: Trainer) -> Callable[[], None]:
        if each is whole:
            return lambda: each._train_step(each.samples.fetch(index))
        return lambda: each._train_step(each.samples.fetch(own), sizes.batch)

    variants: dict[str, Callable[[], object]] = {
        "one rank": lambda: world.is_main and step_of(whole)(),
        "replicas": step_of(replicas),
        "sharded": step_of(sharded),
        "each rank the whole batch": step_of(whole),
        "Adam of P": whole.optimizer.step,
        "all-reduce of P": lambda: dist.all_reduce(gradients),
        "all-reduce of 1": lambda: dist.all_reduce(number),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    sent: dict[str, float] = {}
    losses: dict[str, float] = {}
    torch.manual_seed(0)
    step_of(whole)()  # Adam has a state, and gradients to go on with
    for turn in range(WARM_UP + 1 + rounds):
        for name, run in variants.items():
            torch.manual_seed(turn)  # alone, rank 0 draws what the others do not
            if turn == WARM_UP and name in KINDS:
                with Exchanged() as exchanged:
                    run()
                sent[name] = exchanged.total
                continue
            seconds, used = timed(run)
            if turn > WARM_UP:
                times[name].append(seconds)
                cpu[name].append(used)
            if turn == 0 and name in KINDS:
                losses[name] = float({"replicas": replicas, "sharded": sharded}[name].sums[0])
    if not math.isclose(losses["replicas"], losses["sharded"], rel_tol=1e-5):
        raise SystemExit(f"{sizes}: the losses disagree: {losses}")
    ids = torch.cat([part.flatten() for part in sharded.samples.cut(sharded.samples.fetch(own))])
    rest = sizes.sharded_bytes(world.size, 8) - sizes.item_bytes(world.size, 8)
    medians = {name: median(taken) for name, taken in times.items()}
    busy = torch.tensor([median(used) for used in cpu.values()], dtype=torch.float64)
    dist.all_reduce(busy)
    link = 2 * (world.size - 1) / world.size * 4 * count / medians["all-reduce of P"]
    rates = Rates(
        medians["each rank the whole batch"], medians["Adam of P"], link, medians["all-reduce of 1"]
    )
    return {
        "sizes": asdict(sizes),
        "ranks": world.size,
        "parameters": count,
        "seconds": times,
        "medians": medians,
        "cpu of all ranks": dict(zip(cpu, busy.tolist(), strict=True)),
        "rates": asdict(rates),
        "sent": sent,
        "predicted sent": {
            "replicas": sizes.data_parallel_bytes(world.size) + sizes.small_bytes(world.size),
            "sharded": sizes.item_bytes(world.size, 8, len(ids.unique())) + rest,
        },
        "predicted": {
            kind: sizes.predicted_seconds(rates, world.size, kind == "sharded") for kind in KINDS
        },
        "predicted exchange": {
            kind: sizes.exchange_seconds(rates, world.size, kind == "sharded") for kind in KINDS
        },
    }


def table(record: dict[str, Any]) -> str:
    """Of a record, as Markdown."""
    lines = [
        f"{record['cpu']}, {record['cores']} cores, load {record['load']:.1f} afterwards, torch "
        f"{record['torch']}, {record['date']}; a thread a rank, gloo; medians of the rounds.",
        "",
        "| B = 512 | ranks | | a step | predicted | of it exchange | one rank "
        "| CPU of all ranks, of one | sent | predicted |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]

    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:,.0f} ms"

    for name, of_ranks in record["found"].items():
        for one in of_ranks:
            for kind, shown in KINDS.items():
                taken, said = one["medians"][kind], one["predicted"][kind]
                busy = one["cpu of all ranks"]
                cells = [
                    f"{name}, P = {one['parameters'] / 1e6:.1f} million",
                    str(one["ranks"]),
                    shown,
                    ms(taken),
                    f"{ms(said)} ({said / taken:.2f})",
                    ms(one["predicted exchange"][kind]),
                    ms(one["medians"]["one rank"]),
                    f"{ms(busy[kind])}, {ms(busy['one rank'])}",
                    f"{one['sent'][kind] / MB:,.2f} MB",
                    f"{one['predicted sent'][kind] / MB:,.2f} MB",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run_all(large: bool, rounds: int) -> dict[str, list[Any]]:
    """torchrun with each number of ranks, one after the other."""
    found: dict[str, list[Any]] = {}
    for ranks in RANKS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "found.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
            command += [str(ranks), "-m", "benchmarks.ranks", "--json", str(out)]
            command += ["--rounds", str(rounds), *(["--large"] if large else [])]
            subprocess.run(command, check=True)
            for name, one in json.loads(out.read_text()).items():
                found.setdefault(name, []).append(one)
    return found


def write_table(record: dict[str, Any]) -> None:
    first, last = map(re.escape, MARKS)
    text, places = re.subn(
        f"({first}).*?({last})",
        lambda at: at[1] + table(record) + at[2],
        DOCUMENT.read_text(),
        flags=re.S,
    )
    if places != 1:
        raise SystemExit(f"{DOCUMENT} has {places} places between {MARKS}; expected 1")
    DOCUMENT.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="also at the published size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="a record, and docs/scale.md's table")
    parser.add_argument("--json", type=Path, help="under torchrun: where to write what was found")
    options = parser.parse_args()
    torch.set_num_threads(1)
    backend.keep_freed_memory()
    with joined() as world:
        if not world.alone:
            found = {
                name: measure(SIZES[name], world, options.rounds)
                for name in list(SIZES)[: 1 + options.large]
            }
            if world.is_main and options.json is not None:
                options.json.write_text(json.dumps(found))
            elif world.is_main:
                print(json.dumps(found, indent=1))
            return
    found = run_all(options.large, options.rounds)
    print(table(scale_records.facts(NAME) | {"found": found}))
    if options.save:
        scale_records.save(NAME, found=found)
        write_table(scale_records.latest(NAME))


if __name__ == "__main__":
    main()
