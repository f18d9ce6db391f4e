"""Converting and training on more interactions than memory should hold, with peak memory measured.

    python -m benchmarks.large_data --interactions 100000000

makes synthetic interactions in Parquet files (users and times at random, so nothing is sorted),
converts them with `fmrec-fast convert`, and trains a small model on the result, each in a process
of its own that is watched: VmHWM and VmRSS (everything resident, the mapped pages of the data too,
which the system takes back when it needs them; as the system and as this program saw it), and
RssAnon (what the process itself has allocated). It fails where a process was above `LIMIT_MB`,
removes what it made, and writes the record to benchmarks/results/scale/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FILE_ROWS = 1 << 21
FIELDS = ("VmHWM", "VmRSS", "RssAnon", "RssFile")
POLL = 0.02
PARTS = ("generate", "convert", "train")
LIMIT_MB = 2048
# Bytes of disk an interaction takes at most, temporary files included: 83 were measured.
DISK = 100
RESULTS = Path(__file__).parent / "results" / "scale"


def generate(folder: Path, interactions: int, users: int, items: int, seed: int = 0) -> None:
    """Parquet files of (user, item, timestamp) in no order.

    User ids are spread over 64 bits, item ids are strings of falling popularity; every user is as
    likely as any other.
    """
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True)
    names = pa.array([f"item-{number}" for number in range(items)])
    for part, first in enumerate(range(0, interactions, FILE_ROWS)):
        rng = np.random.default_rng([seed, part])
        rows = min(FILE_ROWS, interactions - first)
        user = rng.integers(users, size=rows, dtype=np.int64) * 4_294_967_311
        item = (items * rng.random(rows) ** 2).astype(np.int32)
        table = pa.table(
            {
                "user_id": user,
                "item_id": pa.DictionaryArray.from_arrays(item, names),
                "timestamp": rng.integers(10**9, size=rows),
            }
        )
        parquet.write_table(table, folder / f"part-{part:05}.parquet", row_group_size=1 << 18)


def watch(command: list[str], folder: Path) -> dict[str, Any]:
    """Run it: seconds (of the clock, of processors), its last line, the most MB by field, and the
    most bytes in `folder`."""
    began, cpu = time.monotonic(), _cpu_of_children()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    most: dict[str, float] = dict.fromkeys(FIELDS, 0.0)
    looks, disk = 0, 0
    while process.poll() is None:
        for name, value in _memory(status).items():
            most[name] = max(most[name], value)
        if looks % 25 == 0:
            disk = max(disk, bytes_in(folder))
        looks += 1
        time.sleep(POLL)
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{err}")
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(_cpu_of_children() - cpu, 1),
        **{f"{name}_mb": round(value, 1) for name, value in most.items()},
        "disk_bytes": max(disk, bytes_in(folder)),
        "said": out.strip().splitlines()[-1] if out.strip() else "",
    }


def bytes_in(folder: Path) -> int:
    """Of the files below; one that goes away meanwhile does not count."""
    found = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                found += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:
                continue
    return found


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _memory(status: Path) -> dict[str, float]:
    """MB (2^20 bytes) by field; of a process that has just ended, nothing."""
    try:
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: int(lines[name].split()[0]) / 1024 for name in FIELDS if name in lines}


def train(data: str, run: str, steps: int) -> None:
    """Train a small model on the mapped data; prints, in JSON, memory over the steps.

    The test at the end is of the first users only: to rank for all of them takes days here.
    """
    import torch

    from fmrec_fast import FMRecConfig
    from fmrec_fast.data import Dataset, EvaluationSamples, read_dataset
    from fmrec_fast.evaluation import Evaluation, evaluate
    from fmrec_fast.models import FMRecommender
    from fmrec_fast.training import Listener, Trainer

    class OnSomeUsers(Trainer):
        def _evaluate(self, model: FMRecommender, split: str) -> Evaluation:
            whole, users = self.dataset, min(self.dataset.num_users, 200)
            part = Dataset(
                np.array(whole.items[: whole.offsets[users]]),
                np.array(whole.offsets[: users + 1]),
                whole.item_ids,
                whole.user_ids[:users],
            )
            return evaluate(model, part, split, ks=(10,), seeds=(0,))

    class Watch(Listener):
        def __init__(self) -> None:
            self.memory: list[dict[str, float]] = []
            self.steps = 0

        def step_done(self, losses: dict[str, float] | None, samples: int) -> None:
            self.steps += 1
            if self.steps % max(steps // 10, 1) == 0:
                self.memory.append(_memory(Path("/proc/self/status")))

    torch.set_num_threads(2)
    dataset, listener = read_dataset(data), Watch()
    opened = _memory(Path("/proc/self/status"))
    config = FMRecConfig(
        hidden_size=16,
        max_len=20,
        num_blocks=1,
        last=0,
        decoder_dims=(16, 16),
        batch_size=128,
        epochs=1,
    )
    trainer = OnSomeUsers(
        dataset, config, run, max_steps=steps, listener=listener, checkpoint_seconds=1e9
    )
    made = _memory(Path("/proc/self/status"))
    began = time.monotonic()
    trainer.fit()
    seconds = time.monotonic() - began
    # What else goes over the whole data: popularity, and the held-out items of any user.
    popular = int(dataset.popularity().argmax())
    samples = EvaluationSamples(dataset, "test", config.max_len)
    samples.batch(torch.linspace(0, len(samples) - 1, 512).long())
    print(
        json.dumps(
            {
                "samples": len(trainer.samples),
                "opened": opened,
                "made": made,
                "by_steps": listener.memory,
                "steps_per_second": round(steps / seconds, 1),
                "popular": popular,
            }
        )
    )


def measure(
    folder: Path, interactions: int, users: int, items: int, steps: int, keep: bool = False
) -> dict[str, Any]:
    """Generate, convert, train in `folder`, and remove what that left; the record of all three.

    Raises:
        ValueError: `folder` holds something, or its disk has no room.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"--folder {folder} is not empty; expected a new or empty one")
    free, needed = shutil.disk_usage(folder).free, DISK * interactions
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} GB for "
            f"{interactions:,} interactions"
        )
    data, converted, run = folder / "data", folder / "converted", folder / "run"
    found: dict[str, Any] = {"interactions": interactions, "users": users, "items": items}
    python = [sys.executable, "-m"]
    ours = [*python, "benchmarks.large_data", "--users", str(users), "--items", str(items)]
    sizes = ["--interactions", str(interactions), "--steps", str(steps)]
    try:
        found["generate"] = watch([*ours, *sizes, "--generate", str(data)], folder)
        found["parquet_bytes"] = bytes_in(data)
        convert = [*python, "fmrec_fast", "convert", str(data), str(converted)]
        found["convert"] = watch(convert, folder)
        for clock in ("seconds", "cpu_seconds"):
            found["convert"][f"{clock}_per_million"] = found["convert"][clock] * 1e6 / interactions
        found["converted_bytes"] = bytes_in(converted)
        found["train"] = watch([*ours, *sizes, "--train", str(converted), str(run)], folder)
        found["train"] |= json.loads(found["train"].pop("said"))
    finally:
        if not keep:
            for made in (data, converted, run):
                shutil.rmtree(made, ignore_errors=True)
    return found


def table(found: dict[str, Any]) -> str:
    """In Markdown."""
    lines = [
        f"{found['interactions']:,} interactions of {found['users']:,} users and "
        f"{found['items']:,} items, {found['parquet_bytes'] / 1e9:.2f} GB of Parquet, "
        f"{found['converted_bytes'] / 1e9:.2f} GB converted",
        "",
        "| | peak resident | of it allocated | seconds | of processors | disk, all files |",
        "|---|---|---|---|---|---|",
    ]
    for part in PARTS:
        one = found[part]
        cells = [part, *(f"{one[f'{field}_mb']:,.0f} MB" for field in ("VmHWM", "RssAnon"))]
        cells += [f"{one[clock]:,.0f}" for clock in ("seconds", "cpu_seconds")]
        lines.append(f"| {' | '.join(cells)} | {one['disk_bytes'] / 1e9:.2f} GB |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interactions", type=int, default=100_000_000)
    parser.add_argument("--users", type=int, help="default: a 50th of the interactions")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=2000, help="of training")
    parser.add_argument("--folder", type=Path, help="where; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave what was made")
    parser.add_argument("--out", type=Path, help="JSON; default: in results/")
    parser.add_argument("--generate", type=Path, metavar="DATA", help=argparse.SUPPRESS)
    parser.add_argument("--train", nargs=2, metavar=("DATA", "RUN"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    users = options.users or max(options.interactions // 50, 1)
    if options.train:
        train(*options.train, options.steps)
        return
    if options.generate:
        generate(options.generate, options.interactions, users, options.items)
        return
    if options.keep and options.folder is None:
        parser.error("--keep needs --folder")

    from fmrec_fast import environment

    facts: dict[str, Any] = {
        "what": "convert and train on data larger than memory",
        "date": datetime.date.today().isoformat(),
        "cpu": environment.processor(),
        "cores": os.cpu_count(),
        "limit_mb": LIMIT_MB,
    }
    with tempfile.TemporaryDirectory() as temporary:
        facts |= measure(
            options.folder or Path(temporary),
            options.interactions,
            users,
            options.items,
            options.steps,
            options.keep,
        )
    out = options.out or RESULTS / f"{facts['date']}-large-data-{options.interactions}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(facts), out, sep="\n")
    above = [part for part in PARTS if facts[part]["VmHWM_mb"] > LIMIT_MB]
    if above:
        raise SystemExit(f"{', '.join(above)}: above {LIMIT_MB} MB resident")


if __name__ == "__main__":
    main()
