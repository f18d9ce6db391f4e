"""Recommending for many users by whole commands: one process, and Ray on the same cores.

    python -m benchmarks.ray_recommend --users 1000000

For each model of `CASES`: the same Parquet file of histories (lengths as Amazon Beauty's), of all
users and of a tenth of them, goes through ``fmrec-fast recommend`` and through the same with
``--engine ray``, in turns; their rows are compared before anything is reported. Times are those of
whole commands: Python, imports, Ray's own start and end, and its workers'. What does not grow with
the users is reported beside them, from the two sizes: seconds = start + users / rate. The record
goes to benchmarks/results/scale/.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet
import torch

from fmrec_fast import checkpoint, environment
from fmrec_fast.latency import MEDIAN_LENGTH, SHORTEST, SIGMA, random_model

RESULTS = Path(__file__).parent / "results" / "scale"
FIRST_ITEM = 100_000
PART = 100_000
MAX_LEN = 50
K = 10
# A command of the fewer users, for what does not grow with them.
FEWER = 10


class Case(NamedTuple):
    """A model, and the share of the users that it is for."""

    name: str
    hidden_size: int
    num_blocks: int
    steps: int
    share: float


CASES = (
    Case("published size, 1 step", 128, 4, 1, 1.0),
    Case("published size, 30 steps", 128, 4, 30, 0.1),
    Case("small, 1 step", 64, 2, 1, 1.0),
)
ENGINES = ("local", "ray")


def write_users(path: Path, users: int, item_num: int, longest: int) -> int:
    """Histories of random items; returns the number of interactions."""
    generator, total, writer = np.random.default_rng(1997), 0, None
    for first in range(0, users, PART):
        count = min(PART, users - first)
        drawn = np.round(MEDIAN_LENGTH * np.exp(SIGMA * generator.standard_normal(count)))
        lengths = np.clip(SHORTEST - 1 + np.maximum(drawn, 1), 1, longest).astype(np.int32)
        items = FIRST_ITEM + generator.integers(0, item_num - 1, lengths.sum())
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(items))
        table = pa.table({"user": [f"user-{first + i}" for i in range(count)], "history": lists})
        writer = writer or pa.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table, row_group_size=PART)
        total += len(items)
    if writer is not None:
        writer.close()
    return total


def write_run(folder: Path, case: Case, item_num: int) -> None:
    """A run whose weights are random."""
    model = random_model(item_num, case.hidden_size, MAX_LEN, case.num_blocks)
    state: dict[str, Any] = {"config": model.config.to_dict(), "kind": "fmrec", "source": None}
    state["model"] = model.state_dict()
    state["item_ids"] = list(range(FIRST_ITEM, FIRST_ITEM + item_num - 1))
    checkpoint.save(folder, "last-0", "last", state)


def command(engine: str, folder: Path, users: int, steps: int) -> list[str]:
    out = "ray" if engine == "ray" else "local.parquet"
    return [
        *(sys.executable, "-m", "fmrec_fast", "recommend", str(folder / "run")),
        *("--users", str(folder / f"{users}.parquet"), "--out", str(folder / out)),
        *("-k", str(K), "--padding", "tied", "--steps", str(steps), "--device", "cpu"),
        *("--engine", engine),
    ]


class CpuSeconds(threading.Thread):
    """CPU seconds of this process and all below it, by looking twice a second: on cores that
    others use too they say more than the clock."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._ticks: dict[int, int] = {}
        self._ended = threading.Event()

    def look(self) -> None:
        parents, ticks = {}, {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            parents[int(folder.name)] = int(fields[1])
            ticks[int(folder.name)] = int(fields[11]) + int(fields[12])
        for pid in ticks:
            above = pid
            while above not in (0, os.getpid()):
                above = parents.get(above, 0)
            if above:
                self._ticks[pid] = ticks[pid]

    def total(self) -> float:
        self.look()
        return sum(self._ticks.values()) / os.sysconf("SC_CLK_TCK")

    def run(self) -> None:
        while not self._ended.wait(0.5):
            self.look()

    def stop(self) -> None:
        self._ended.set()
        self.join()


def checksum(path: Path) -> tuple[int, int, int]:
    """Of rows in any order: their number, and sums over (user, rank, item) and over the scores."""
    rows = mixed = scores = 0
    for batch in pa.dataset.dataset(path, format="parquet").to_batches():
        user = pc.cast(pc.utf8_slice_codeunits(batch["user"], 5), pa.int64()).to_numpy()
        rank = batch["rank"].to_numpy().astype(np.int64)
        item = batch["item"].to_numpy()
        rows += len(user)
        key = (user.astype(np.uint64) * np.uint64(1_000_003) + rank.astype(np.uint64)) * np.uint64(
            0x9E3779B97F4A7C15
        )
        mixed += int((key * (item.astype(np.uint64) * 2 + 1)).sum())
        scores += int((key * batch["score"].to_numpy().view(np.uint32)).sum())
    return rows, mixed % 2**64, scores % 2**64


def compare(folder: Path, users: int) -> None:
    """Raises ValueError where the two engines' rows differ; then removes them."""
    one, other = folder / "local.parquet", folder / "ray"
    found = checksum(one), checksum(other)
    if found[0] != found[1] or found[0][0] != K * users:
        raise ValueError(f"the engines disagree: {found} of {K * users} rows")
    one.unlink()
    shutil.rmtree(other)


def measure(case: Case, all_users: int, item_num: int, rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds of the commands; `folder` must be empty."""
    users = max(int(all_users * case.share), FEWER)
    sizes = (users // FEWER, users)
    interactions = [write_users(folder / f"{n}.parquet", n, item_num, MAX_LEN) for n in sizes]
    write_run(folder / "run", case, item_num)
    seconds: dict[str, dict[int, list[float]]] = {e: {n: [] for n in sizes} for e in ENGINES}
    cpu: dict[str, dict[int, list[float]]] = {e: {n: [] for n in sizes} for e in ENGINES}
    watch = CpuSeconds()
    watch.start()
    for _ in range(rounds):
        for size in sizes:
            for engine in ENGINES:
                before, begin = watch.total(), time.perf_counter()
                done = subprocess.run(
                    command(engine, folder, size, case.steps), capture_output=True, text=True
                )
                seconds[engine][size].append(time.perf_counter() - begin)
                cpu[engine][size].append(watch.total() - before)
                if done.returncode:
                    raise RuntimeError(f"{engine} failed:\n{done.stderr}")
                print(
                    f"{case.name}, {size:,} users, {engine}: {seconds[engine][size][-1]:.1f} s",
                    file=sys.stderr,
                    flush=True,
                )
            compare(folder, size)
    watch.stop()
    return {
        **case._asdict(),
        "users": users,
        "interactions": interactions[-1],
        "seconds": {e: {str(n): values for n, values in seconds[e].items()} for e in ENGINES},
        "cpu_seconds": {e: {str(n): values for n, values in cpu[e].items()} for e in ENGINES},
        **{e: summary(seconds[e]) for e in ENGINES},
        "equal": True,
    }


def summary(seconds: dict[int, list[float]]) -> dict[str, float]:
    """Of medians: the whole command, and it without what does not grow with the users."""
    (few, many), (short, long) = seconds, (float(np.median(each)) for each in seconds.values())
    rate = (many - few) / (long - short)
    return {"users_per_s": many / long, "running_users_per_s": rate, "start_s": long - many / rate}


def table(cases: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| | users | one process, whole command | Ray, whole command | Ray / one process "
        "| without start: one process | Ray | Ray / one process | start: one process, Ray |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        one, other = case["local"], case["ray"]
        cells = [case["name"], f"{case['users']:,}"]
        for key in ("users_per_s", "running_users_per_s"):
            cells += [f"{each[key]:,.0f} users/s" for each in (one, other)]
            cells.append(f"{other[key] / one[key]:.2f}")
        cells.append(f"{one['start_s']:.1f} s, {other['start_s']:.1f} s")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=1, help="of both, in turns")
    parser.add_argument("--item_num", type=int, default=12102)
    parser.add_argument("--only", help="cases whose name begins so; default: all")
    parser.add_argument("--out", type=Path, default=None, help="JSON; default: in results/")
    given = parser.parse_args()

    import ray

    chosen = [case for case in CASES if case.name.startswith(given.only or "")]
    if not chosen:
        parser.error(f"--only must begin one of {[case.name for case in CASES]}")
    cases = []
    for case in chosen:
        with tempfile.TemporaryDirectory() as folder:
            cases.append(measure(case, given.users, given.item_num, given.rounds, Path(folder)))
    facts = {
        "what": "recommend for many users, whole commands",
        "date": datetime.date.today().isoformat(),
        "cpu": environment.processor(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "item_num": given.item_num,
        "k": K,
        "padding": "tied",
        "cases": cases,
    }
    out = given.out or RESULTS / f"{facts['date']}-ray-recommend-{given.users}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(table(cases), out, sep="\n")


if __name__ == "__main__":
    main()
