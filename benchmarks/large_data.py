"""Converting and training on more interactions than memory should hold, with peak memory measured.

    python -m benchmarks.large_data --interactions 100000000 --folder runs/large

makes synthetic interactions in Parquet files (users and times at random, so nothing is sorted),
converts them with `fmrec-fast convert`, and trains a small model on the result, each in a process
of its own that is watched: VmRSS (everything resident, the mapped pages of the data too, which the
system takes back when it needs them) and RssAnon (what the process itself has allocated).
"""

from __future__ import annotations

import argparse
import json
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
FIELDS = ("VmRSS", "RssAnon", "RssFile")
POLL = 0.02


def generate(folder: Path, interactions: int, users: int, items: int, seed: int = 0) -> int:
    """Parquet files of (user, item, timestamp) in no order; returns their bytes.

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
    return sum(file.stat().st_size for file in folder.iterdir())


def watch(command: list[str]) -> dict[str, Any]:
    """Run it: seconds (of the clock, of processors), its last line, and the most MB by field."""
    began, cpu = time.monotonic(), _cpu_of_children()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    status = Path(f"/proc/{process.pid}/status")
    most: dict[str, float] = dict.fromkeys(FIELDS, 0.0)
    while process.poll() is None:
        for name, value in _memory(status).items():
            most[name] = max(most[name], value)
        time.sleep(POLL)
    out, err = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{err}")
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(_cpu_of_children() - cpu, 1),
        **{f"{name}_mb": round(value, 1) for name, value in most.items()},
        "said": out.strip().splitlines()[-1] if out.strip() else "",
    }


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
    """Generate, convert, train in `folder`, and remove it; the record of all three."""
    data, converted, run = folder / "data", folder / "converted", folder / "run"
    began = time.monotonic()
    size = generate(data, interactions, users, items)
    found: dict[str, Any] = {
        "interactions": interactions,
        "users": users,
        "items": items,
        "parquet_bytes": size,
        "generate_seconds": time.monotonic() - began,
    }
    python = [sys.executable, "-m"]
    found["convert"] = watch([*python, "fmrec_fast", "convert", str(data), str(converted)])
    for clock in ("seconds", "cpu_seconds"):
        found["convert"][f"{clock}_per_million"] = found["convert"][clock] * 1e6 / interactions
    found["converted_bytes"] = sum(file.stat().st_size for file in converted.iterdir())
    arguments = ["--train", str(converted), str(run), "--steps", str(steps)]
    found["train"] = watch([*python, "benchmarks.large_data", *arguments])
    found["train"] |= json.loads(found["train"].pop("said"))
    if not keep:
        shutil.rmtree(data), shutil.rmtree(converted), shutil.rmtree(run)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--interactions", type=int, default=100_000_000)
    parser.add_argument("--users", type=int, help="default: a 50th of the interactions")
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--folder", type=Path, help="where; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="leave what was made")
    parser.add_argument("--json", type=Path, help="also write the record to this file")
    parser.add_argument("--train", nargs=2, metavar=("DATA", "RUN"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(*options.train, options.steps)
        return
    with tempfile.TemporaryDirectory() as temporary:
        found = measure(
            options.folder or Path(temporary),
            options.interactions,
            options.users or max(options.interactions // 50, 1),
            options.items,
            options.steps,
            options.keep,
        )
    text = json.dumps(found, indent=1)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
