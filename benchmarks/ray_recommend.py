"""Throughput of recommending for many users: the loop of one process, and Ray on the same cores.

    python -m benchmarks.ray_recommend --users 1000000

Both read the same Parquet file of histories (lengths as Amazon Beauty's) and write Parquet; their
rows are compared before anything is reported. Ray's time includes the start of its workers, not
that of Ray itself. The figures go to benchmarks/results/scale/.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet
import torch

from fmrec_fast import backend, checkpoint, environment
from fmrec_fast.bulk import BulkRecommender
from fmrec_fast.data.users import HistoryEncoder, ParquetFiles, locate, read_histories
from fmrec_fast.latency import MEDIAN_LENGTH, SHORTEST, SIGMA, random_model
from fmrec_fast.ray_engine import Workers, recommend_with_ray
from fmrec_fast.tables import TableFile

RESULTS = Path(__file__).parent / "results" / "scale"
FIRST_ITEM = 100_000
PART = 100_000


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


def run_local(state, source: ParquetFiles, out: Path, options: dict) -> float:
    begin = time.perf_counter()
    model = checkpoint.build_model(state)
    encode = HistoryEncoder(state["item_ids"], "user", "history")
    recommender = BulkRecommender(model, state["item_ids"], **options)
    with TableFile(out) as file:
        for part in read_histories(source, ("user", "history")):
            file.write(recommender(encode(part)))
    return time.perf_counter() - begin


def run_ray(state, source: ParquetFiles, out: Path, options: dict, workers: Workers) -> float:
    begin = time.perf_counter()
    columns: dict[str, str | None] = {"user": "user", "item": "history"}
    recommend_with_ray(state, source, columns, str(out), workers=workers, **options)
    return time.perf_counter() - begin


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=1, help="of both, in turns")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--num_blocks", type=int, default=4)
    parser.add_argument("--item_num", type=int, default=12102)
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=None, help="JSON; default: in results/")
    given = parser.parse_args()

    import ray

    backend.keep_freed_memory()
    torch.set_num_threads(given.cores)
    ray.init(num_cpus=given.cores, include_dashboard=False, log_to_driver=False)
    options = {"k": 10, "steps": given.steps, "padding": "tied"}
    model = random_model(given.item_num, given.hidden_size, 50, given.num_blocks)
    state = {"config": model.config.to_dict(), "kind": "fmrec", "model": model.state_dict()}
    state["item_ids"] = list(range(FIRST_ITEM, FIRST_ITEM + given.item_num - 1))
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    cpu: dict[str, list[float]] = {"local": [], "ray": []}
    watch = CpuSeconds()
    watch.start()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        path = Path(folder) / "users.parquet"
        interactions = write_users(path, given.users, given.item_num, 50)
        source = ParquetFiles(locate(str(path)))
        for _ in range(given.rounds):
            one, other = Path(folder) / "local.parquet", Path(folder) / "ray"
            before = watch.total()
            seconds["local"].append(run_local(state, source, one, options))
            between = watch.total()
            print(f"local {seconds['local'][-1]:.1f} s", file=sys.stderr, flush=True)
            seconds["ray"].append(run_ray(state, source, other, options, Workers()))
            cpu["local"].append(between - before)
            cpu["ray"].append(watch.total() - between)
            print(f"ray {seconds['ray'][-1]:.1f} s", file=sys.stderr, flush=True)
            found = checksum(one), checksum(other)
            if found[0] != found[1] or found[0][0] != 10 * given.users:
                raise SystemExit(f"the engines disagree: {found}")
            shutil.rmtree(other)
    watch.stop()
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    facts = {
        "what": "recommend for many users",
        "date": datetime.date.today().isoformat(),
        "cpu": environment.processor(),
        "cores": given.cores,
        "torch": torch.__version__,
        "ray": ray.__version__,
        **{name: getattr(given, name) for name in ("users", "item_num", "hidden_size")},
        "num_blocks": given.num_blocks,
        **options,
        "interactions": interactions,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "users_per_s": {name: given.users / value for name, value in medians.items()},
        "ray_over_local": medians["ray"] / medians["local"],
        "equal": True,
    }
    out = given.out or RESULTS / f"{facts['date']}-ray-recommend-{given.users}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(
        json.dumps(cpu),
        json.dumps(facts["users_per_s"]),
        f"ray/local {facts['ray_over_local']:.3f}",
        out,
    )


if __name__ == "__main__":
    main()
