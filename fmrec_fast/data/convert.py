"""Converting interactions of any size into the folder that `mapped` opens, in bounded memory.

Read once, a block at a time, with the checks of `read_dataset`, into a temporary Parquet file
(whether ids in text are ints is known only at its end); numbered and grouped by user by DuckDB,
which sorts on disk; and then taken a few users at a time. Memory holds a block, what DuckDB is
allowed, a flag per user, three numbers per item, and the longest history.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .columns import (
    are_whole,
    as_ints,
    check_text_ids,
    choose_columns,
    is_text,
    timestamps,
    valid_ids,
)
from .dataset import MIN_HISTORY, Dataset, ReadReport, count_repeats, fingerprint
from .mapped import (
    ITEM_IDS,
    ITEMS,
    OFFSETS,
    USER_IDS,
    MappedDataset,
    open_mapped,
    write_metadata,
)
from .readers import check_least, in_time_order, read_pickle
from .sources import Stream, open_source

if TYPE_CHECKING:
    import pyarrow as pa

# Text of an id that is worth a closer look: with nothing printable of ASCII, or a line break.
DOUBTFUL = r"^[^!-~]*$|[\n\r]"
MEMORY_MB = 600
THREADS = 2
# Rows of a batch of sorted interactions, interactions of a pass over the users, ids of a batch.
ROWS, PART, ID_ROWS = 1 << 19, 1 << 20, 1 << 16


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    user: str | None = None,
    item: str | None = None,
    timestamp: str | None = None,
    min_user: int = MIN_HISTORY,
    min_item: int = 0,
    memory_mb: int = MEMORY_MB,
    threads: int = THREADS,
) -> MappedDataset:
    """Convert a file, or a folder of Parquet or Arrow files, and map the result.

    Equivalent, but for the memory it takes::

        read_dataset(source, ...)

    source: what `read_dataset` reads, an Arrow file, or a folder of Parquet or Arrow files, which
        count as one in the order of their names.
    out: the folder to make. It appears in one rename, when everything is in it.
    memory_mb, threads: what DuckDB may use; the whole process takes some 500 MB more.

    The other arguments, and what is refused, are those of `read_dataset`. Raises also
    FileExistsError if `out` exists, ImportError without duckdb.
    """
    source, out = Path(source), Path(out)
    check_least(min_user, min_item)
    for name, value in (("memory_mb", memory_mb), ("threads", threads)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}={value!r}; expected an integer")
    if memory_mb < 64 or threads < 1:
        raise ValueError(f"memory_mb={memory_mb}, threads={threads}; expected 64 and 1 or more")
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} already exists; name a folder that does not")
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file")
    wanted = {"user": user, "item": item, "timestamp": timestamp}
    opened = open_source(source, format)
    if opened is None:
        dataset = read_pickle(source, wanted, min_user, min_item)
        with _appearing(out) as folder:
            _write_dataset(folder, dataset)
        return open_mapped(out)
    if importlib.util.find_spec("duckdb") is None:
        raise ImportError("converting needs duckdb: pip install 'fmrec_fast[cli,data]'")
    columns = choose_columns(opened, wanted)
    with _appearing(out) as folder, _scratch(folder) as scratch:
        staged = _stage(opened, columns, scratch / "staged.parquet")
        facts = _group(staged, scratch, memory_mb, threads)
        _write(
            folder,
            scratch,
            facts,
            min_user,
            min_item,
            name=source.stem,
            source=str(source),
            columns=tuple(f"{role} {opened.names[at]}" for role, at in columns.items()),
        )
    return open_mapped(out)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that gets its name at the end, or is gone if anything fails."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        if out.exists():
            raise FileExistsError(f"{out} has appeared in the meantime; it was left as it is")
        folder.chmod(0o777 & ~_umask())
        os.rename(folder, out)
        _flush(out.parent)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _scratch(folder: Path) -> Iterator[Path]:
    scratch = folder / "scratch"
    scratch.mkdir()
    yield scratch
    shutil.rmtree(scratch)


@dataclass
class _Staged:
    """The interactions in file order: user, item and, with `times`, time_int or time_float.

    `cast` is by role the SQL expression of an id. `exact`: all times are ints.
    """

    path: Path
    rows: int
    cast: dict[str, str]
    times: bool
    exact: bool


class _Staging:
    """A column of ids on its way into the file: as it is, or as text that may be all ints."""

    def __init__(self, source: Stream, role: str) -> None:
        self.source, self.role = source, role
        self.as_int = ""  # the SQL of an int, while all ids so far may be ints written otherwise

    def __call__(self, column: pa.ChunkedArray, first: int) -> pa.Array:
        import pyarrow as pa
        import pyarrow.compute as pc

        column = valid_ids(self.source, self.role, column, first)
        kind = column.type
        if pa.types.is_integer(kind):
            self.as_int = self.role
            stored = pa.uint64() if pa.types.is_uint64(kind) else pa.int64()
            return column.cast(stored).combine_chunks()
        encoded = column.dictionary_encode().combine_chunks()
        codes, distinct = encoded.indices, encoded.dictionary
        may_be = first == 0 or bool(self.as_int)
        if is_text(kind):
            if pc.any(pc.match_substring_regex(distinct, DOUBTFUL)).as_py():
                check_text_ids(
                    self.source, self.role, codes.to_numpy(), distinct.to_pylist(), first
                )
            may_be = may_be and self.source.untyped and as_ints(distinct) is not None
            self.as_int = f"CAST({self.role} AS BIGINT)" if may_be else ""
            distinct = distinct.cast(pa.string())
        else:
            may_be = may_be and pa.types.is_floating(kind) and are_whole(column)
            self.as_int = f"CAST(CAST({self.role} AS DOUBLE) AS BIGINT)" if may_be else ""
            distinct = pa.array([str(value) for value in distinct.to_pylist()], pa.string())
        return distinct.take(codes)

    def sql(self) -> str:
        return self.as_int or self.role


def _stage(source: Stream, columns: dict[str, int], path: Path) -> _Staged:
    import pyarrow as pa
    from pyarrow import parquet

    ids = {role: _Staging(source, role) for role in ("user", "item")}
    rows, exact, writer = 0, True, None
    try:
        for batch in source.batches(list(columns.values())):
            arrays = dict(zip(columns, batch, strict=True))
            if len(arrays["user"]) == 0:
                continue
            stored = {role: one(arrays[role], rows) for role, one in ids.items()}
            if "timestamp" in columns:
                times = timestamps(source, arrays["timestamp"], rows)
                whole = times.dtype == np.int64
                exact = exact and whole
                nothing = pa.nulls(len(times), pa.float64() if whole else pa.int64())
                stored["time_int"] = pa.array(times) if whole else nothing
                stored["time_float"] = nothing if whole else pa.array(times)
            rows += len(arrays["user"])
            part = pa.record_batch(stored)
            if writer is None:
                writer = parquet.ParquetWriter(
                    path, part.schema, compression="lz4", write_statistics=False
                )
            writer.write_batch(part)
    finally:
        if writer is not None:
            writer.close()
    if rows == 0:
        raise ValueError(f"{source.path}: no interactions; expected rows after the header")
    pa.default_memory_pool().release_unused()  # DuckDB has an allocator of its own
    cast = {role: one.sql() for role, one in ids.items()}
    return _Staged(path, rows, cast, "timestamp" in columns, exact)


def _group(staged: _Staged, scratch: Path, memory_mb: int, threads: int) -> dict[str, int]:
    """Interactions by user and time: the files that `_write` takes, and facts for the report."""
    import duckdb

    spill = scratch / "spill"
    options: dict[str, Any] = {
        "memory_limit": f"{memory_mb}MB",
        "threads": threads,
        "temp_directory": str(spill),
        "preserve_insertion_order": False,  # the order is asked for; kept, it costs memory
    }
    with duckdb.connect(config=options) as connection:
        file = f"read_parquet({_quoted(staged.path)}, file_row_number=true)"
        connection.execute(
            f"CREATE TABLE catalogue AS SELECT id, (row_number() OVER (ORDER BY id) - 1)::INTEGER "
            f"AS code FROM (SELECT DISTINCT {staged.cast['item']} AS id FROM {file})"
        )
        with _IdWriter(scratch / ITEM_IDS) as write:
            for batch in connection.sql("SELECT id FROM catalogue ORDER BY code").to_arrow_reader(
                ROWS
            ):
                write(batch.column(0))
        times = ", time_int" if staged.times else ""
        times += "" if staged.exact else ", time_float"
        batches = connection.sql(
            f"SELECT who, code{times} FROM (SELECT {staged.cast['user']} AS who, "
            f"{staged.cast['item']} AS what, file_row_number AS row_number{times} FROM {file}) "
            f"JOIN catalogue ON what = id ORDER BY who, row_number"
        ).to_arrow_reader(ROWS)
        facts = _users(batches, staged, scratch)
    shutil.rmtree(spill, ignore_errors=True)
    staged.path.unlink()
    return {"rows_read": staged.rows, **facts}


def _quoted(path: Path) -> str:
    """A path in SQL, where it would be a pattern."""
    literal = re.sub(r"[*?[]", lambda at: f"[{at[0]}]", str(path)).replace("'", "''")
    return f"'{literal}'"


def _users(batches: Any, staged: _Staged, scratch: Path) -> dict[str, int]:
    """Write codes, lengths and ids of the users, whose interactions come in file order."""
    import pyarrow as pa

    facts = dict.fromkeys(("repeated_items", "out_of_order", "tied_timestamps"), 0)
    if not staged.times:
        del facts["out_of_order"], facts["tied_timestamps"]
    with (
        open(scratch / "codes", "wb") as codes,
        open(scratch / "lengths", "wb") as lengths,
        _IdWriter(scratch / USER_IDS) as write,
    ):
        rest: pa.Table | None = None
        for batch in batches:
            table = pa.Table.from_batches([batch])
            if rest is not None:
                table = pa.concat_tables([rest, table])
            starts = _starts(table.column("who"))
            last = int(starts[-1])
            if last:
                _take(table.slice(0, last), starts[:-1], staged, facts, codes, lengths, write)
            rest = table.slice(last)
        if rest is not None:
            starts = np.zeros(1, dtype=np.int64)
            _take(rest, starts, staged, facts, codes, lengths, write)
    return facts


def _starts(who: pa.ChunkedArray) -> np.ndarray:
    """Where in a column of grouped ids the groups begin: int64, the first 0."""
    import pyarrow.compute as pc

    other = pc.not_equal(who.slice(1), who.slice(0, len(who) - 1)).to_numpy()
    return np.concatenate([np.zeros(1, np.int64), np.flatnonzero(other) + 1])


def _take(
    table: pa.Table,
    starts: np.ndarray,
    staged: _Staged,
    facts: dict[str, int],
    codes: BinaryIO,
    lengths: BinaryIO,
    write: Callable[[pa.ChunkedArray], None],
) -> None:
    """Some whole users."""
    counts = np.diff(starts, append=table.num_rows)
    user = np.repeat(np.arange(len(counts)), counts)
    item = table.column("code").to_numpy()
    facts["repeated_items"] += count_repeats(user, item)
    if staged.times:
        order, found = in_time_order(user, _times(table, staged.exact))
        item = item if order is None else item[order]
        for name, count in found.items():
            facts[name] += count
    codes.write(np.ascontiguousarray(item, np.int32).data)
    lengths.write(np.ascontiguousarray(counts, np.int64).data)
    write(table.column("who").take(starts))


def _times(table: pa.Table, exact: bool) -> np.ndarray:
    import pyarrow as pa
    import pyarrow.compute as pc

    if exact:
        return table.column("time_int").to_numpy()
    # An int read as a float is the float next to it, as if its text had been read so.
    whole = table.column("time_int").cast(pa.float64(), safe=False)
    return pc.coalesce(table.column("time_float"), whole).to_numpy()


class _IdWriter:
    """Writes ids into an Arrow file, in batches of no more than `ID_ROWS`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: Any = None

    def __enter__(self) -> _IdWriter:
        return self

    def __call__(self, ids: Any) -> None:
        import pyarrow as pa

        table = pa.table({"id": ids})
        if self._writer is None:
            self._writer = pa.ipc.new_file(str(self.path), table.schema)
        self._writer.write_table(table, max_chunksize=ID_ROWS)

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


def _write(
    folder: Path,
    scratch: Path,
    facts: dict[str, int],
    min_user: int,
    min_item: int,
    *,
    name: str,
    source: str,
    columns: tuple[str, ...],
) -> None:
    """Filter, number, and write the four files and the metadata."""
    lengths = np.memmap(scratch / "lengths", np.int64, "r")
    items_read = _count_ids(scratch / ITEM_IDS)
    short = sum(int((part < min(MIN_HISTORY, min_user)).sum()) for part in _parts(lengths))
    users, counts = _filter(scratch, lengths, items_read, max(min_user, 1), min_item)
    kept = int(users.sum())
    report = ReadReport(
        users_read=len(lengths),
        rows_kept=int(counts.sum()),
        users_kept=kept,
        items_read=items_read,
        items_kept=int((counts > 0).sum()),
        users_too_short=short,
        users_filtered=len(lengths) - kept - short,
        source=source,
        columns=columns,
        **facts,
    )
    if kept == 0:
        raise ValueError(
            f"{source}: no user is left with min_user={min_user}, min_item={min_item}; expected "
            f"users with at least {max(min_user, 1)} interactions. {report}"
        )
    internal = np.cumsum(counts > 0, dtype=np.int32)
    internal[counts == 0] = 0
    # From raw files to Arrow's, each of whose columns is one buffer, by their maps.
    with open(scratch / "items", "wb") as item_file, open(scratch / "offsets", "wb") as ends_file:
        end = 0
        ends_file.write(np.zeros(1, np.int64).data)
        for rows, length, codes in _users_of(scratch, lengths):
            numbers = internal[codes]
            numbers[~np.repeat(users[rows], length)] = 0
            held = np.add.reduceat(numbers > 0, np.cumsum(length) - length, dtype=np.int64)
            ends = end + np.cumsum(held[users[rows]])
            ends_file.write(ends.data)
            item_file.write(numbers[numbers > 0].data)
            end = int(ends[-1]) if len(ends) else end
    (scratch / "codes").unlink()
    items = np.memmap(scratch / "items", np.int32, "r")
    offsets = np.memmap(scratch / "offsets", np.int64, "r")
    _write_column(folder / ITEMS, "item", items)
    _write_column(folder / OFFSETS, "offset", offsets)
    _write_ids(folder / ITEM_IDS, scratch / ITEM_IDS, counts > 0)
    _write_ids(folder / USER_IDS, scratch / USER_IDS, users)
    found = fingerprint(offsets, items)
    del items, offsets
    _describe(folder, name, report, found)


def _describe(folder: Path, name: str, report: ReadReport, found: int) -> None:
    for file in (ITEMS, OFFSETS, ITEM_IDS, USER_IDS):
        _flush(folder / file)
    write_metadata(
        folder,
        name=name,
        interactions=report.rows_kept,
        users=report.users_kept,
        items=report.items_kept,
        fingerprint=found,
        report=asdict(report),
    )
    _flush(folder)


def _write_dataset(folder: Path, dataset: Dataset) -> None:
    """A dataset in memory, as a published pickle is read."""
    import pyarrow as pa

    _write_column(folder / ITEMS, "item", dataset.items)
    _write_column(folder / OFFSETS, "offset", dataset.offsets)
    for file, ids in ((ITEM_IDS, dataset.item_ids), (USER_IDS, dataset.user_ids)):
        columns = {"id": ids}
        if not set(map(type, ids)) <= {str} and not _fit_int64(ids):
            columns = {"id": list(map(str, ids)), "is_int": [type(one) is int for one in ids]}
        table = pa.table(columns)
        with pa.ipc.new_file(str(folder / file), table.schema) as writer:
            writer.write_table(table, max_chunksize=ID_ROWS)
    _describe(folder, dataset.name, dataset.report, dataset.fingerprint)


def _fit_int64(ids: Any) -> bool:
    return set(map(type, ids)) <= {int} and -(2**63) <= min(ids) and max(ids) < 2**63


def _parts(array: np.ndarray) -> Iterator[np.ndarray]:
    for first in range(0, len(array), PART):
        yield array[first : first + PART]


def _users_of(scratch: Path, lengths: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """Some users at a time: their rows, lengths, and the codes of their items."""
    with open(scratch / "codes", "rb") as file:
        first = 0
        while first < len(lengths):
            ends = np.cumsum(lengths[first : first + PART])
            count = max(int(np.searchsorted(ends, PART, side="right")), 1)
            codes = np.fromfile(file, np.int32, int(ends[count - 1]))
            yield slice(first, first + count), np.array(lengths[first : first + count]), codes
            first += count


def _filter(
    scratch: Path, lengths: np.ndarray, item_count: int, min_user: int, min_item: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which users stay, bool [U], and how many interactions each item has among them, int64 [V].

    Users and items with too few are taken out until nothing changes.
    """
    users = np.ones(len(lengths), dtype=bool)
    items = np.ones(item_count, dtype=bool)
    while True:
        changed = False
        counts = np.zeros(item_count, dtype=np.int64)
        for rows, length, codes in _users_of(scratch, lengths):
            alive = items[codes] & np.repeat(users[rows], length)
            held = np.add.reduceat(alive, np.cumsum(length) - length, dtype=np.int64)
            np.add.at(counts, codes[alive], 1)
            stay = held >= min_user
            changed |= bool((stay != users[rows]).any())
            users[rows] = stay
        stay = items & (counts >= min_item)
        changed |= bool((stay != items).any())
        items = stay
        if not changed:
            return users, counts


def _write_column(path: Path, name: str, array: np.ndarray) -> None:
    import pyarrow as pa

    column = pa.array(array)  # a view
    batch = pa.record_batch({name: column})
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)


def _count_ids(path: Path) -> int:
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        return pa.ipc.open_file(file).read_all().num_rows


def _write_ids(path: Path, source: Path, kept: np.ndarray) -> None:
    import pyarrow as pa

    with pa.memory_map(str(source)) as file, _IdWriter(path) as write:
        first, reader = 0, pa.ipc.open_file(file)
        for at in range(reader.num_record_batches):
            ids = reader.get_batch(at).column("id")
            write(ids.filter(pa.array(kept[first : first + len(ids)])))
            first += len(ids)
