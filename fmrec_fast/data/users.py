"""Files of the users to recommend for: where they are, and what they hold.

Parquet files hold either *histories*, one row per user (an id, and a list of item ids, oldest
first), or *interactions*, one row per user and item. Ids are integers or text, as in
`read_dataset`.
"""

from __future__ import annotations

import bisect
import posixpath
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import pyarrow.parquet

from .columns import check_id_column, choose_columns, is_conventional, timestamps
from .dataset import MIN_HISTORY, Dataset, offsets_of
from .readers import from_table
from .sources import FORMATS

WILDCARDS = "*?["
UNKNOWN = ("error", "skip")
# Rows of a batch that is read at once.
READ_ROWS = 8192


@dataclass(frozen=True)
class Location:
    """Files on a file system, sorted; `name` is what was asked for."""

    name: str
    filesystem: pyarrow.fs.FileSystem
    paths: list[str]

    @property
    def is_parquet(self) -> bool:
        suffixes = {FORMATS.get(posixpath.splitext(path)[1].lower()) for path in self.paths}
        return suffixes == {"parquet"}


def filesystem_of(location: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a path or URI, and the path on it.

    A URI's scheme is one of pyarrow's (file, s3, gs, hdfs, ...) or of fsspec's.

    Raises:
        ValueError: the scheme is unknown to both.
    """
    if "://" not in location:
        return pyarrow.fs.LocalFileSystem(), str(Path(location).absolute())
    # Wildcards are no part of a URI.
    at = min((location.find(sign) for sign in WILDCARDS if sign in location), default=len(location))
    stem = location[:at].rpartition("/")[0] if at < len(location) else location
    try:
        filesystem, path = pyarrow.fs.FileSystem.from_uri(stem)
    except pa.ArrowInvalid:
        import fsspec

        try:
            other, path = fsspec.core.url_to_fs(stem)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{location}: {error}") from error
        filesystem = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(other))
    return filesystem, path + location[len(stem) :]


def locate(location: str) -> Location:
    """The files of a path, a directory (whatever lies below, but names starting with '_' or '.'),
    a pattern with ``*``, ``?``, ``[...]``, or a URI of one of these.

    Raises:
        FileNotFoundError: there are none.
        ValueError: a URI that no file system knows.
    """
    filesystem, path = filesystem_of(location)
    if any(sign in path for sign in WILDCARDS):
        from fsspec.implementations.arrow import ArrowFSWrapper

        found = ArrowFSWrapper(filesystem).glob(path)
        infos = filesystem.get_file_info(found)
    else:
        infos = [filesystem.get_file_info(path)]
    paths = []
    for info in infos:
        if info.type == pyarrow.fs.FileType.File:
            paths.append(info.path)
        elif info.type == pyarrow.fs.FileType.Directory:
            below = filesystem.get_file_info(pyarrow.fs.FileSelector(info.path, recursive=True))
            for one in below:
                hidden = posixpath.relpath(one.path, info.path).split("/")
                if one.is_file and not any(part.startswith(("_", ".")) for part in hidden):
                    paths.append(one.path)
    if not paths:
        raise FileNotFoundError(f"{location}: no such file")
    return Location(location, filesystem, sorted(paths))


class ParquetFiles:
    """Parquet files of one schema, as `readers` takes a source of columns.

    Raises:
        ValueError: not Parquet, or columns that are not those of the first file.
    """

    def __init__(self, location: Location) -> None:
        self.location = location
        self.path = location.name
        self.schema = self._open(location.paths[0]).schema_arrow
        self.header = self.names = list(self.schema.names)
        self.types = [""] * len(self.names)

    def _open(self, path: str) -> pyarrow.parquet.ParquetFile:
        try:
            return pyarrow.parquet.ParquetFile(path, filesystem=self.location.filesystem)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file: {error}") from error

    def files(self) -> Iterator[tuple[str, pyarrow.parquet.ParquetFile]]:
        for path in self.location.paths:
            file = self._open(path)
            missing = [name for name in self.names if name not in file.schema_arrow.names]
            if missing:
                raise ValueError(
                    f"{path}: no column {missing[0]!r}, which {self.location.paths[0]} has; "
                    f"expected files with the same columns"
                )
            yield path, file

    def num_rows(self) -> int:
        return sum(file.metadata.num_rows for _, file in self.files())

    def line(self, row: int) -> str:
        """Where row `row` (0-based) of the concatenation is."""
        for path, file in self.files():
            if row < file.metadata.num_rows:
                return f"{path}, row {row + 1}"
            row -= file.metadata.num_rows
        raise ValueError(f"{self.path}: row {row} is gone; the files changed while they were read")

    def read(self, columns: list[int]) -> list[pa.ChunkedArray]:
        names = [self.header[column] for column in columns]
        tables = []
        for path, file in self.files():
            try:
                tables.append(file.read(columns=names))
            except (pa.ArrowInvalid, OSError) as error:
                raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
        try:
            table = pa.concat_tables(tables, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"{self.path}: the files' columns differ in type: {error}") from error
        return [table.column(name) for name in names]


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def history_columns(
    source: ParquetFiles, user: str | None = None, item: str | None = None
) -> tuple[str, str] | None:
    """The names of the user column and of the column of lists of items; None if the files hold
    interactions.

    The latter is `item`, or the only column of lists, or the one of them with a conventional name.

    Raises:
        ValueError: no such column, or several.
    """
    lists = [name for name in source.names if _is_list(source.schema.field(name).type)]
    if item is not None:
        if item not in lists:
            return None
    elif lists:
        usual = [name for name in lists if is_conventional("item", name)]
        if len(usual or lists) != 1:
            raise ValueError(
                f"{source.path}: several columns of lists ({', '.join(lists)}); give the name of "
                f"that of items as item="
            )
        (item,) = usual or lists
    else:
        return None
    chosen = choose_columns(source, {"user": user, "item": item})
    return source.names[chosen["user"]], item


def read_interactions(
    source: ParquetFiles,
    user: str | None = None,
    item: str | None = None,
    timestamp: str | None = None,
    min_user: int = MIN_HISTORY,
    min_item: int = 0,
) -> Dataset:
    """`read_dataset` of interactions in several files, in the order of their paths."""
    wanted = {"user": user, "item": item, "timestamp": timestamp}
    return from_table(source, choose_columns(source, wanted), min_user, min_item)


class Histories(NamedTuple):
    """A batch of users: external ids [U]; the internal ids of row u are
    ``items[offsets[u]:offsets[u + 1]]``, at least 1 of them. `unknown` items were left out, and
    `without` users that had no other."""

    users: pa.Array
    items: np.ndarray
    offsets: np.ndarray
    unknown: int = 0
    without: int = 0


class HistoryEncoder:
    """Tables of histories as `Histories` in the numbering of a run's items.

    Args:
        item_ids: the run's external item ids.
        user, item: names of the columns.
        unknown: 'error'; or 'skip': leave out items that the run does not know, and users who are
            then left with none. Both are counted.

    Calling raises:
        ValueError: an id is missing, an item is unknown or a history empty (where `unknown` is
            'error'); the message names the user.
    """

    def __init__(self, item_ids: list, user: str, item: str, unknown: str = "error") -> None:
        if unknown not in UNKNOWN:
            raise ValueError(f"unknown must be one of {UNKNOWN}, got {unknown!r}")
        self.columns = (user, item)
        self.unknown = unknown
        self._catalogue = Dataset.from_histories([], item_ids=item_ids)

    def __call__(self, table: pa.Table) -> Histories:
        source = _Batch()
        users = check_id_column(source, "user", table.column(self.columns[0]))
        users = _one_array(users)
        lists = _one_array(table.column(self.columns[1]))
        lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
        offsets = offsets_of(lengths)
        values = lists.flatten()
        source.explain(users, offsets)
        if len(values) == 0:
            ids = np.zeros(0, np.int64)
        else:
            encoded = _one_array(check_id_column(source, "item", values)).dictionary_encode()
            distinct = self._catalogue.look_up_items(encoded.dictionary.to_pylist())
            ids = distinct.astype(np.int64)[encoded.indices.to_numpy()]
        found = ids > 0
        unknown = len(ids) - int(found.sum())
        if unknown and self.unknown == "error":
            at = int(np.argmin(found))
            raise ValueError(
                f"{source.line(at)}: unknown item id {values[at].as_py()!r} ({unknown} of the "
                f"{len(ids)} ids read with it are unknown); expected ids of the run, such as "
                f"{self._catalogue.item_ids[:3]}"
            )
        if unknown:
            rows = np.repeat(np.arange(len(lengths)), lengths)
            lengths = np.bincount(rows[found], minlength=len(lengths))
            ids, offsets = ids[found], offsets_of(lengths)
        empty = lengths == 0
        without = int(empty.sum())
        if without:
            if self.unknown == "error":
                bad = users[int(np.argmax(empty))].as_py()
                raise ValueError(f"user {bad!r} has an empty history; expected at least 1 item id")
            users, offsets = users.filter(pa.array(~empty)), offsets_of(lengths[~empty])
        return Histories(users, ids, offsets, unknown, without)


class _Batch:
    """Where a row of a batch is, for messages: by its user, once they are known."""

    path = "the users' file"

    def __init__(self) -> None:
        self._users: pa.Array | None = None
        self._offsets = np.zeros(1, np.int64)

    def explain(self, users: pa.Array, offsets: np.ndarray) -> None:
        self._users, self._offsets = users, offsets

    def line(self, row: int) -> str:
        if self._users is None:
            return self.path
        at = int(np.searchsorted(self._offsets, row, side="right")) - 1
        return f"user {reprlib.repr(self._users[at].as_py())}"


def _one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    return column


def read_histories(source: ParquetFiles, columns: tuple[str, str]) -> Iterator[pa.Table]:
    """Tables of the two columns, of about `READ_ROWS` rows; little of the files is held."""
    names = list(columns)
    for path, file in source.files():
        try:
            for batch in file.iter_batches(READ_ROWS, columns=names):
                yield pa.Table.from_batches([batch])
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file: {error}") from error


# --- what no machine can hold is read in pieces, and interactions are grouped by user -------------


class Piece(NamedTuple):
    """A row group: its file and number, the position of its first row, in its file and among all
    rows, and how many rows it has."""

    path: str
    group: int
    in_file: int
    position: int
    rows: int


def pieces(source: ParquetFiles) -> list[Piece]:
    found, position = [], 0
    for path, file in source.files():
        in_file = 0
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            found.append(Piece(path, group, in_file, position, rows))
            in_file += rows
            position += rows
    return found


class _PieceSource:
    def __init__(self, piece: Piece) -> None:
        self.path, self._piece = piece.path, piece

    def line(self, row: int) -> str:
        return f"{self.path}, row {self._piece.in_file + row + 1}"


class RowReader:
    """Columns of rows by their number among all. A row group can only be read from its start, so
    rows in rising order cost least: what was read before is not read again."""

    def __init__(
        self, pieces: list[Piece], filesystem: pyarrow.fs.FileSystem, columns: tuple[str, ...]
    ) -> None:
        self._pieces = [piece for piece in pieces if piece.rows]
        self._filesystem, self._columns = filesystem, list(columns)
        self._open: Piece | None = None
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._held: pa.Table | None = None
        self._at = 0  # of the piece that is open, the first row of what is held

    def __call__(self, first: int, last: int) -> Iterator[pa.Table]:
        """Rows ``first .. last - 1``, in tables of about `READ_ROWS` rows at most.

        Raises:
            ValueError: a file is not readable.
        """
        start = bisect.bisect_right(self._pieces, first, key=lambda piece: piece.position) - 1
        for piece in self._pieces[max(start, 0) :]:
            if piece.position >= last:
                return
            low, high = first - piece.position, last - piece.position
            try:
                yield from self._of(piece, max(low, 0), min(high, piece.rows))
            except (pa.ArrowInvalid, OSError) as error:
                self._open = None
                raise ValueError(f"{piece.path}: not a readable Parquet file: {error}") from error

    def _of(self, piece: Piece, first: int, last: int) -> Iterator[pa.Table]:
        if piece != self._open or first < self._at:
            file = pyarrow.parquet.ParquetFile(piece.path, filesystem=self._filesystem)
            groups = [piece.group]
            self._batches = file.iter_batches(READ_ROWS, row_groups=groups, columns=self._columns)
            self._open, self._held, self._at = piece, None, 0
        while first < last:
            if self._held is None:
                self._held = pa.Table.from_batches([next(self._batches)])
            rows = self._held.num_rows
            low, high = first - self._at, min(last - self._at, rows)
            if low < rows:
                yield self._held.slice(low, high - low)
                first = self._at + high
            if high == rows:
                self._held, self._at = None, self._at + rows


def of_size(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The rows of `tables` again, `rows` at a time; fewer before columns of another type."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        if held and table.schema != held[0].schema:
            yield pa.concat_tables(held)
            held, count = [], 0
        while table.num_rows:
            held.append(table.slice(0, rows - count))
            count += held[-1].num_rows
            table = table.slice(held[-1].num_rows)
            if count == rows:
                yield pa.concat_tables(held)
                held, count = [], 0
    if held:
        yield pa.concat_tables(held)


def read_piece(
    piece: Piece, filesystem: pyarrow.fs.FileSystem, user: str, item: str, time: str | None
) -> pa.Table:
    """Columns user, item, time (where there is one), and position: the row's number among all."""
    names = [user, item, *([time] if time else ())]
    file = pyarrow.parquet.ParquetFile(piece.path, filesystem=filesystem)
    table, source = file.read_row_group(piece.group, columns=names), _PieceSource(piece)
    columns: dict[str, Any] = {
        "user": check_id_column(source, "user", table.column(user)),
        "item": check_id_column(source, "item", table.column(item)),
    }
    if time:
        columns["time"] = timestamps(source, table.column(time))
    columns["position"] = np.arange(piece.position, piece.position + table.num_rows)
    return pa.table(columns)


def group_by_user(table: pa.Table) -> pa.Table:
    """The histories (columns user, item) of all interactions of some users, from `read_piece`:
    in order of time, ties in the order of the files."""
    codes = _one_array(table.column("user")).dictionary_encode()
    users = codes.indices.to_numpy()
    keys = [table.column("position").to_numpy()]
    if "time" in table.column_names:
        keys.append(table.column("time").to_numpy())
    order = np.lexsort((*keys, users))
    lengths = np.bincount(users, minlength=len(codes.dictionary))
    items = _one_array(table.column("item")).take(pa.array(order))
    lists = pa.LargeListArray.from_arrays(pa.array(offsets_of(lengths)), items)
    return pa.table({"user": codes.dictionary, "item": lists})
