"""Recommending for users that one process would take too long for, by Ray Data (extra ``[dist]``).

Ray reads the users' Parquet files, hands batches to workers that hold the model, and writes Parquet
shards. Workers that die are started again by Ray, and their batches computed again, with the same
result: noise is keyed by user. Nothing passes through this process but names of files.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import torch

from fmrec_fast import backend, checkpoint
from fmrec_fast.bulk import BulkRecommender, user_rows
from fmrec_fast.data.users import (
    HistoryEncoder,
    ParquetFiles,
    Piece,
    filesystem_of,
    group_by_user,
    pieces,
    read_histories_piece,
    read_piece,
)

# Users of a batch that a worker is handed at once.
BATCH = 8192
# Rows of a shard, at least: a few megabytes.
SHARD_ROWS = 1_000_000
# Interactions that are grouped by user together.
BUCKET_ROWS = 1_000_000
# Bytes of a block at least: smaller ones cost more than they spread.
LEAST_BLOCK = 1 << 18
SUCCESS = "_SUCCESS"
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


@dataclass(frozen=True)
class Result:
    """`users` with a recommendation, `rows` in `shards`; what was left out under unknown='skip'."""

    users: int
    rows: int
    shards: list[str]
    unknown_items: int
    users_left_out: int


class _Counts:
    """An actor that adds up what the batches left out; a batch that comes again counts once."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[int, int]] = {}

    def add(self, batch: int, unknown: int, without: int) -> None:
        self._found[batch] = (unknown, without)

    def total(self) -> tuple[int, int]:
        found = list(zip(*self._found.values(), strict=True)) or [(0,), (0,)]
        return sum(found[0]), sum(found[1])


class _Worker:
    """A batch of histories to its recommendations; made once per worker process."""

    def __init__(
        self,
        state: Any,
        encoder: dict[str, Any],
        options: dict[str, Any],
        workers: Workers,
        counts: Any,
    ) -> None:
        import ray

        backend.keep_freed_memory()
        torch.set_num_threads(workers.cpus)
        state = ray.get(state)
        device = torch.device("cuda" if workers.gpus else "cpu")
        model = checkpoint.build_model(state, device)
        self._encode = HistoryEncoder(state["item_ids"], **encoder)
        self._recommend = BulkRecommender(model, state["item_ids"], **options)
        self._counts = counts

    def __call__(self, table: pa.Table) -> pa.Table:
        import ray

        users = self._encode(table)
        if users.unknown or users.without:
            # Named by its users: the batch is the same again when it is computed again.
            column = table.column(self._encode.columns[0])
            (batch,) = user_rows([user_rows(column.to_pylist()).tobytes()]).tolist()
            ray.get(self._counts.add.remote(batch, users.unknown, users.without))
        return self._recommend(users)


def require_ray() -> None:
    """Raises ImportError where Ray Data is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise ImportError("--engine ray needs Ray Data: pip install 'fmrec_fast[dist]'")


def _start() -> None:
    """Join the cluster that RAY_ADDRESS names, or start Ray on this machine."""
    import ray

    if not ray.is_initialized():
        dashboard = None if os.environ.get("RAY_ADDRESS") else False
        # What workers raise is raised here; the rest of what they print is in Ray's own logs.
        ray.init(logging_level=logging.WARNING, log_to_driver=False, include_dashboard=dashboard)
    logging.getLogger("ray.data").setLevel(logging.WARNING)


def check_out(out: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system and the path of a directory that is not there yet, or empty.

    Raises:
        ValueError: it holds something already.
    """
    filesystem, path = filesystem_of(out)
    info = filesystem.get_file_info(path)
    if info.type == pyarrow.fs.FileType.File:
        raise ValueError(f"--out {out} is a file; expected a new directory")
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    names = sorted(one.base_name for one in found)
    if SUCCESS in names:
        raise ValueError(f"--out {out} holds recommendations already; expected a new directory")
    if names:
        raise ValueError(
            f"--out {out} is not empty ({len(names)} entries, such as {names[0]!r}, no {SUCCESS}: "
            f"perhaps of a run that did not finish); expected a new directory"
        )
    return filesystem, path


def recommend_with_ray(
    state: dict[str, Any],
    source: ParquetFiles,
    columns: dict[str, str | None],
    out: str,
    *,
    unknown: str = "error",
    workers: Workers | None = None,
    batch: int = BATCH,
    **options: Any,
) -> Result:
    """Recommend for the users of Parquet files, into Parquet shards.

    Args:
        state: of a checkpoint.
        source: the files.
        columns: names of the columns 'user', 'item' and, of interactions, 'timestamp' or None;
            without this key the files hold histories.
        out: a directory that is not there yet, or empty; a path or a URI. On a local file system it
            appears when all is done. Elsewhere the shards do one by one; in either case the file
            ``_SUCCESS``, written last, lists them.
        unknown: as in `HistoryEncoder`.
        batch: users that a worker is handed at once.
        options: of `BulkRecommender`.

    Raises:
        ImportError: Ray Data is not installed.
        TypeError, ValueError: as `BulkRecommender` and `HistoryEncoder`; or `out` is not empty.
    """
    require_ray()
    import ray

    # Ray Data restarts workers and repeats their batches without being told to (max_restarts and
    # max_task_retries are -1).
    workers = workers or Workers()
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    filesystem, path = check_out(out)
    # Here, not first in a worker: mistakes in the options.
    model = checkpoint.build_model(state)
    BulkRecommender(model, state["item_ids"], **options)
    del model
    local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
    target = Path(path)
    shards = str(target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")) if local else path
    _start()
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    # A block is about a batch, or all users of a large row group would be one worker's.
    context.target_max_block_size = max(LEAST_BLOCK, int(batch * source.row_bytes()))
    cluster = ray.cluster_resources()
    room = int(cluster.get("CPU", 1) // workers.cpus)
    if workers.gpus:
        room = min(room, int(cluster.get("GPU", 0) / workers.gpus))
    count = workers.count or room
    if not 1 <= count <= room:
        raise ValueError(
            f"{workers.count or 'some'} workers of {workers.cpus} cpus and {workers.gpus:g} gpus "
            f"do not fit the cluster, which has {cluster.get('CPU', 0):g} cpus and "
            f"{cluster.get('GPU', 0):g} gpus, room for {room}"
        )
    counts: Any = ray.remote(num_cpus=0)(_Counts)
    counts = counts.remote()
    kept = ray.put({name: state[name] for name in STATE if name in state})
    # The cores are the workers'; a few processes that read and write run beside them.
    helpers = ray.data.TaskPoolStrategy(size=max(1, count // 2))
    if "timestamp" in columns:
        # Kept in the cluster's memory, or on its disks: a shuffle needs all before it gives any,
        # and the cores that the workers would hold meanwhile.
        try:
            histories = _grouped(source, columns).materialize()
        except ray.exceptions.RayError as error:
            raise _cause(error) from None
        names = {"user": "user", "item": "item"}
    else:
        names = {"user": str(columns["user"]), "item": str(columns["item"])}
        histories = _pieces(source).map_batches(
            _ReadHistories(source.location.filesystem, tuple(names.values())),
            batch_size=1,
            num_cpus=0,
            compute=helpers,
        )
    found = histories.map_batches(
        _Worker,
        batch_size=batch,
        batch_format="pyarrow",
        fn_constructor_kwargs={
            "state": kept,
            "encoder": {**names, "unknown": unknown},
            "options": options,
            "workers": workers,
            "counts": counts,
        },
        compute=ray.data.ActorPoolStrategy(size=count),
        num_cpus=workers.cpus,
        num_gpus=workers.gpus or None,
    )
    try:
        found.write_parquet(
            shards,
            filesystem=filesystem,
            min_rows_per_file=SHARD_ROWS,
            ray_remote_args={"num_cpus": 0},
            concurrency=helpers.size,
        )
        unknown_items, without = ray.get(counts.total.remote())
        result = _publish(filesystem, shards, unknown_items, without)
        if local:
            os.replace(shards, target)
    except ray.exceptions.RayError as error:
        raise _cause(error) from None
    finally:
        if local:
            shutil.rmtree(shards, ignore_errors=True)
    return result


def _cause(error: Exception) -> Exception:
    """What was raised of the data, without Ray's account of where: it comes as text only."""
    found = re.findall(r"^(ValueError|TypeError): (.*)$", str(error), re.MULTILINE)
    if not found:
        return RuntimeError(str(error))
    kind, message = found[-1]
    return {"ValueError": ValueError, "TypeError": TypeError}[kind](message)


def _publish(
    filesystem: pyarrow.fs.FileSystem, path: str, unknown_items: int, users_left_out: int
) -> Result:
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    names = sorted(one.path for one in found if one.is_file)
    users = rows = 0
    if names:
        written = pyarrow.dataset.dataset(names, format="parquet", filesystem=filesystem)
        rows = written.count_rows()
        users = written.count_rows(filter=pyarrow.dataset.field("rank") == 1)
    shards = [name.rpartition("/")[2] for name in names]
    result = Result(users, rows, shards, unknown_items, users_left_out)
    filesystem.create_dir(path)
    with filesystem.open_output_stream(f"{path}/{SUCCESS}") as file:
        file.write((json.dumps(asdict(result), indent=1) + "\n").encode())
    return result


def _pieces(source: ParquetFiles) -> Any:
    """One row per row group of the files; `Piece`s."""
    import ray

    found = [one._asdict() for one in pieces(source)]
    return ray.data.from_items(found, override_num_blocks=max(1, len(found)))


def _pieces_of(batch: dict[str, Any]) -> Iterator[Piece]:
    for fields in zip(*(batch[name].tolist() for name in Piece._fields), strict=True):
        yield Piece(*fields)


@dataclass(frozen=True)
class _ReadHistories:
    filesystem: pyarrow.fs.FileSystem
    columns: tuple[str, ...]

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        for piece in _pieces_of(batch):
            yield from read_histories_piece(piece, self.filesystem, self.columns)


@dataclass(frozen=True)
class _ReadInteractions:
    """Interactions with the bucket of their user."""

    filesystem: pyarrow.fs.FileSystem
    columns: tuple[str, str, str | None]
    buckets: int

    def __call__(self, batch: dict[str, Any]) -> Iterator[pa.Table]:
        for piece in _pieces_of(batch):
            table = read_piece(piece, self.filesystem, *self.columns)
            users = table.column("user").combine_chunks().dictionary_encode()
            bucket = user_rows(users.dictionary.to_pylist()) % self.buckets
            yield table.append_column("bucket", pa.array(bucket[users.indices.to_numpy()]))


def _grouped(source: ParquetFiles, columns: dict[str, str | None]) -> Any:
    """Interactions as histories: users fall into buckets by their hash, a bucket is one group."""
    buckets = max(1, -(-source.num_rows() // BUCKET_ROWS))
    names = (str(columns["user"]), str(columns["item"]), columns["timestamp"])
    return (
        _pieces(source)
        .map_batches(_ReadInteractions(source.location.filesystem, names, buckets), batch_size=1)
        .groupby("bucket", num_partitions=min(buckets, 200))
        .map_groups(group_by_user, batch_format="pyarrow")
    )
