"""Recommending for users that one process would take too long for, by Ray Data (extra ``[dist]``).

Ray hands each worker, which holds the model, the numbers of the rows of one shard at a time; the
worker reads them, recommends, and writes the shard. Workers that die are started again by Ray, and
their shards computed again, with the same result: noise is keyed by user. What passes through this
process, and between workers, is names and counts.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import reprlib
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import torch

from fmrec_fast import backend, checkpoint
from fmrec_fast.bulk import ROWS, BulkRecommender, user_rows
from fmrec_fast.data.users import (
    HistoryEncoder,
    ParquetFiles,
    Piece,
    RowReader,
    group_by_user,
    of_size,
    pieces,
    read_piece,
)
from fmrec_fast.shards import Counts, Output, Result, Shards, WorkError

# Users that a worker recommends for at once.
BATCH = 8192
# Rows of a shard, at most: a few megabytes.
SHARD_ROWS = 1_000_000
# Shards for each worker, at least where there are enough users: the last to end waits for no other
# longer than a shard takes.
SHARDS_EACH = 16
# Users of a shard, at least: fewer cost more than they spread.
LEAST_USERS = 2 * ROWS
# Interactions that are grouped by user together.
BUCKET_ROWS = 1_000_000
# Bytes of a block of grouped histories: a block is one worker's.
BLOCK = 1 << 18
# What a worker needs of a checkpoint.
STATE = ("config", "kind", "model", "item_ids")


@dataclass(frozen=True)
class Workers:
    """`count` workers (default: as many as the cluster has room for), each with `cpus` cores and
    `gpus` GPUs; with a GPU, the model is on it."""

    count: int | None = None
    cpus: int = 1
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.count is not None and self.count < 1:
            raise ValueError(f"workers must be at least 1, got {self.count}")
        if self.cpus < 1:
            raise ValueError(f"the cpus of a worker must be at least 1, got {self.cpus}")
        if self.gpus < 0:
            raise ValueError(f"the gpus of a worker must be at least 0, got {self.gpus}")

    def fit(self, cluster: dict[str, float]) -> int:
        """How many there are in the cluster of such resources.

        Raises:
            ValueError: it has no room for them.
        """
        room = int(cluster.get("CPU", 1) // self.cpus)
        if self.gpus:
            room = min(room, int(cluster.get("GPU", 0) / self.gpus))
        count = self.count or room
        if not 1 <= count <= room:
            raise ValueError(
                f"{self.count or 'some'} workers of {self.cpus} cpus and {self.gpus:g} gpus do not "
                f"fit the cluster, which has {cluster.get('CPU', 0):g} cpus and "
                f"{cluster.get('GPU', 0):g} gpus, room for {room}"
            )
        return count


class _Worker:
    """Writes the shard of a task and gives its counts; made once per worker process.

    A task is one row: the shard's name, and the numbers of its first row and of the one after its
    last (`_ranges`), or the users and their histories (`_grouped`).
    """

    def __init__(
        self,
        state: Any,
        rows: Any,
        encoder: dict[str, Any],
        options: dict[str, Any],
        workers: Workers,
        batch: int,
        shards: Shards,
    ) -> None:
        import ray

        # Ray starts a worker that dies again, and has its shard computed again, without end.
        attempt = shards.begin(f"worker-{ray.get_runtime_context().get_actor_id()}")
        attempt.at("the start of a worker")
        backend.keep_freed_memory()
        torch.set_num_threads(workers.cpus)
        state = ray.get(state)
        device = torch.device("cuda" if workers.gpus else "cpu")
        model = checkpoint.build_model(state, device)
        self._encode = HistoryEncoder(state["item_ids"], **encoder)
        self._recommend = BulkRecommender(model, state["item_ids"], **options)
        self._read = RowReader(*ray.get(rows)) if rows is not None else None
        self._batch, self._shards = batch, shards
        attempt.end()

    def __call__(self, task: pa.Table) -> pa.Table:
        (row,) = task.to_pylist() if self._read else task.select(["shard"]).to_pylist()
        # It may be there already: of an earlier run, or of an earlier life of this worker.
        counts = self._shards.finished(row["shard"])
        if counts is None:
            if self._read is None:
                histories = iter([_histories(task)])
            else:
                histories = self._read(row["first"], row["last"])
            counts = self._write(row["shard"], histories)
        return pa.table({"shard": [row["shard"]], "counts": [json.dumps(asdict(counts))]})

    def _write(self, name: str, histories: Iterator[pa.Table]) -> Counts:
        attempt, parts, unknown, without = self._shards.begin(name), [], 0, 0
        for table in of_size(histories, self._batch):
            users = table.column(self._encode.columns[0])
            place = f"the {len(users)} users {_short(users[0])} to {_short(users[-1])} of {name}"
            attempt.at(place)
            try:
                encoded = self._encode(table)
                parts.append(self._recommend(encoded))
            except (RuntimeError, MemoryError, OSError) as error:
                message = " ".join(f"{type(error).__name__}: {error}".split())
                raise WorkError(f"at {place}: {message}") from error
            unknown, without = unknown + encoded.unknown, without + encoded.without
        rows = sum(part.num_rows for part in parts)
        found = sum(pc.sum(pc.equal(part["rank"], 1)).as_py() or 0 for part in parts)
        counts = Counts(rows, found, unknown, without)
        self._shards.write(name, parts, counts)
        attempt.end()
        return counts


def _short(user: pa.Scalar) -> str:
    return reprlib.repr(user.as_py())


def require_ray() -> None:
    """Raises ImportError where Ray Data is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError("--engine ray needs Ray Data: pip install 'fmrec_fast[dist]'")


def _start() -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine."""
    import ray
    import ray.data  # which sets its logger up

    if not ray.is_initialized():
        dashboard = None if os.environ.get("RAY_ADDRESS") else False
        # What workers raise is raised here; the rest of what they print is in Ray's own logs.
        ray.init(logging_level=logging.WARNING, log_to_driver=False, include_dashboard=dashboard)
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            # Accounts of where in Ray something was raised: they go to its logs only.
            handler.setLevel(logging.CRITICAL)


def recommend_with_ray(
    state: dict[str, Any],
    source: ParquetFiles,
    columns: dict[str, str | None],
    out: str,
    *,
    unknown: str = "error",
    workers: Workers | None = None,
    batch: int = BATCH,
    resume: bool = False,
    **options: Any,
) -> Result:
    """Recommend for the users of Parquet files, into Parquet shards.

    Args:
        state: of a checkpoint.
        source: the files.
        columns: names of the columns 'user', 'item' and, of interactions, 'timestamp' or None;
            without this key the files hold histories.
        out: a directory that is not there yet, or empty; a path or a URI; see `Output`.
        unknown: as in `HistoryEncoder`.
        batch: users that a worker recommends for at once.
        resume: keep the shards that a run of the same state, files and options left unfinished;
            `unknown`, `workers` and `batch` may be others.
        options: of `BulkRecommender`.

    Raises:
        ImportError: Ray Data is not installed.
        TypeError, ValueError: as `BulkRecommender` and `HistoryEncoder`; or `out` is not empty.
        WorkError: workers fail, or die again and again at the same users, whom the message names.
    """
    require_ray()
    import ray

    workers = workers or Workers()
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    output = Output(out, resume)
    # Here, not first in a worker: mistakes in the options.
    model = checkpoint.build_model(state)
    recommender = BulkRecommender(model, state["item_ids"], **options)
    steps, k = recommender.steps, recommender.k
    del model, recommender
    _start()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    count = workers.fit(ray.cluster_resources())
    found = pieces(source)
    users: int = (output.planned() or {}).get("users_per_shard") or _users_per_shard(
        found, count, batch, k
    )
    plan = {
        "users_per_shard": users,
        "run": _fingerprint(state),
        "users": _fingerprint_of_files(source),
        "columns": columns,
        "options": {**options, "steps": steps},
    }
    with output.begin(plan) as shards:
        try:
            rows = None
            if "timestamp" in columns:
                context.target_max_block_size = BLOCK
                # Kept in the cluster's memory, or on its disks: a shuffle needs all before it gives
                # any, and the cores that the workers would hold meanwhile.
                tasks = _grouped(source, found, columns, users).materialize()
                names = {"user": "user", "item": "item"}
            else:
                names = {"user": str(columns["user"]), "item": str(columns["item"])}
                ranges = _ranges(found, users)
                if not ranges:
                    return output.publish({})
                tasks = ray.data.from_items(ranges, override_num_blocks=len(ranges))
                reader = (found, source.location.filesystem, tuple(names.values()))
                rows, count = ray.put(reader), min(count, len(ranges))
            kept = ray.put({name: state[name] for name in STATE if name in state})
            done = tasks.map_batches(
                _Worker,
                batch_size=1,
                batch_format="pyarrow",
                fn_constructor_kwargs={
                    "state": kept,
                    "rows": rows,
                    "encoder": {**names, "unknown": unknown},
                    "options": options,
                    "workers": workers,
                    "batch": batch,
                    "shards": shards,
                },
                # One is computed and one is waiting: more would wait where others have none.
                compute=ray.data.ActorPoolStrategy(size=count, max_tasks_in_flight_per_actor=2),
                num_cpus=workers.cpus,
                num_gpus=workers.gpus or None,
            ).take_all()
        except ray.exceptions.RayError as error:
            raise _cause(error, shards, output.is_local) from None
        return output.publish({row["shard"]: Counts(**json.loads(row["counts"])) for row in done})


def _cause(error: Exception, shards: Shards, local: bool) -> Exception:
    """What a worker raised, without Ray's account of where, which comes as text only."""
    kept = len(shards.names())
    where = shards.path if local else f"{shards.path} (unfinished)"
    rest = f"; {kept} shards are in {where}: --resume goes on from them" if kept else ""
    found = re.findall(
        r"^(?:[\w.]+\.)?(ValueError|TypeError|WorkError): (.*)$", str(error), re.MULTILINE
    )
    if found:
        kind, message = found[-1]
        raised = {"ValueError": ValueError, "TypeError": TypeError, "WorkError": WorkError}[kind]
        return raised(message + rest)
    return WorkError(f"{error}{rest}")


def _fingerprint(state: dict[str, Any]) -> str:
    found = hashlib.blake2b(digest_size=16)
    found.update(repr([state["config"], state.get("kind"), state["item_ids"]]).encode())
    for name, tensor in sorted(state["model"].items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def _fingerprint_of_files(source: ParquetFiles) -> str:
    infos = source.location.filesystem.get_file_info(source.location.paths)
    text = repr([(one.path, one.size, one.mtime_ns) for one in infos])
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _users_per_shard(found: list[Piece], workers: int, batch: int, k: int) -> int:
    rows = sum(piece.rows for piece in found)
    spread = -(-rows // (SHARDS_EACH * workers))
    # Whole rounds of the sampler, which takes `ROWS` at a time.
    unit = min(ROWS, batch)
    spread = -(-spread // unit) * unit
    return min(max(spread, min(LEAST_USERS, batch)), max(SHARD_ROWS // k, 1))


def _ranges(found: list[Piece], users: int) -> list[dict[str, Any]]:
    """Tasks: each so many rows, wherever they are."""
    last = sum(piece.rows for piece in found)
    return [
        {"shard": f"part-{at:06}", "first": first, "last": min(first + users, last)}
        for at, first in enumerate(range(0, last, users))
    ]


def _grouped(
    source: ParquetFiles, found: list[Piece], columns: dict[str, str | None], users: int
) -> Any:
    """Tasks with the histories of interactions: users fall into buckets by their hash, a bucket is
    one group, and some shards."""
    import ray

    buckets = max(1, -(-sum(piece.rows for piece in found) // BUCKET_ROWS))
    names = (str(columns["user"]), str(columns["item"]), columns["timestamp"])
    rows = [piece._asdict() for piece in found]
    tasks: Any = _tasks_of_bucket
    return (
        ray.data.from_items(rows, override_num_blocks=max(1, len(rows)))
        .map_batches(_ReadInteractions(source.location.filesystem, names, buckets), batch_size=1)
        .groupby("bucket", num_partitions=min(buckets, 200))
        .map_groups(tasks, batch_format="pyarrow", fn_kwargs={"users": users})
    )


@dataclass(frozen=True)
class _ReadInteractions:
    """Interactions with the bucket of their user."""

    filesystem: pyarrow.fs.FileSystem
    columns: tuple[str, str, str | None]
    buckets: int

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        for fields in zip(*(batch[name].tolist() for name in Piece._fields), strict=True):
            table = read_piece(Piece(*fields), self.filesystem, *self.columns)
            users = table.column("user").combine_chunks().dictionary_encode()
            bucket = user_rows(users.dictionary.to_pylist()) % self.buckets
            yield table.append_column("bucket", pa.array(bucket[users.indices.to_numpy()]))


def _tasks_of_bucket(table: pa.Table, users: int) -> pa.Table:
    """Its interactions as tasks, the same whatever order they come in."""
    bucket = table.column("bucket")[0].as_py()
    found = group_by_user(table).sort_by("user")
    parts = list(of_size([found], users))
    columns = {
        name: _nested([part.column(name).combine_chunks() for part in parts])
        for name in ("user", "item")
    }
    shards = [f"part-{bucket:06}-{at:04}" for at in range(len(parts))]
    return pa.table({"shard": shards, **columns})


def _nested(arrays: list[pa.Array]) -> pa.Array:
    """Arrays as one array of lists."""
    offsets = [0]
    for array in arrays:
        offsets.append(offsets[-1] + len(array))
    return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.concat_arrays(arrays))


def _histories(task: pa.Table) -> pa.Table:
    """The users of a task."""
    return pa.table(
        {name: task.column(name).combine_chunks().flatten() for name in ("user", "item")}
    )
