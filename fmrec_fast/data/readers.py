"""Reading interactions from files: the published pickles, RecBole's atomic text, CSV, Parquet.

Tables go through Arrow, and ids become integers by their dictionaries, so no Python object is
made per row. Text is read by Arrow's parser, which reports no line numbers when it reads in
parallel: when something is wrong, `_Text.line` reads the file again, slowly, to say where.
"""

from __future__ import annotations

import csv
import os
import reprlib
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import numpy as np

from .dataset import MIN_HISTORY, Dataset, ReadReport, count_repeats, offsets_of
from .mapped import METADATA, is_mapped, open_mapped
from .published import read_published

if TYPE_CHECKING:
    import pyarrow as pa

FORMATS = {
    ".pkl": "pkl",
    ".pickle": "pkl",
    ".inter": "inter",
    ".csv": "csv",
    ".tsv": "tsv",
    ".txt": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
DELIMITERS = {"inter": "\t", "csv": ",", "tsv": "\t"}
# Compared without case, '_', '-' and spaces.
CONVENTIONAL = {
    "user": {
        *("user", "userid", "uid", "reviewerid", "customerid", "accountid"),
        *("memberid", "visitorid"),
    },
    "item": {
        *("item", "itemid", "iid", "movieid", "product", "productid", "asin", "parentasin"),
        *("businessid", "gmapid", "trackid", "songid", "bookid", "newsid", "articleid"),
        *("videoid", "gameid", "sku"),
    },
    "timestamp": {
        *("timestamp", "time", "ts", "date", "datetime", "unixtime", "unixtimestamp"),
        *("unixreviewtime", "eventtime"),
    },
}
INTEGER = r"^(?:0|-?[1-9][0-9]{0,18})$"
# How much of a file is held at a time where it is read in parts: bytes of text, rows of a table.
BLOCK, ROWS = 1 << 23, 1 << 18
NUMBER = r"^[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?$"


def read_dataset(
    path: str | os.PathLike[str],
    *,
    format: str | None = None,
    user: str | None = None,
    item: str | None = None,
    timestamp: str | None = None,
    min_user: int = MIN_HISTORY,
    min_item: int = 0,
) -> Dataset:
    """Read the interactions of a file into a Dataset; `dataset.report` says what was dropped.

    A folder that `convert` wrote is mapped instead, and takes none of the arguments below; see
    `fmrec_fast.data.mapped`.

    format: 'pkl', 'inter', 'csv', 'tsv' or 'parquet'; by default from the file's suffix.
    user, item, timestamp: names of columns; by default the conventional ones. Without a
        timestamp the file's order counts; equal timestamps of a user keep it too.
    min_user, min_item: keep only users and items with at least so many interactions among those
        kept (filtered until nothing changes). Fewer than 2 interactions have no test sample, so
        such users stay only under ``min_user=1`` (to recommend for them).

    Items and users are numbered in the sorted order of their external ids. Ids in text are ints
    if all of a column's ids are written as ints are ('7', not '07'); Parquet's keep their type.
    A 'pkl' is the published `dataset.pkl`, whose item numbers and split are kept as they are,
    and which takes none of the other arguments.

    Raises FileNotFoundError; ImportError without pyarrow; ValueError, with the file and the line
    (the header is line 1; the row for Parquet, the first is 1), for anything malformed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    check_least(min_user, min_item)
    wanted = {"user": user, "item": item, "timestamp": timestamp}
    if is_mapped(path):
        _refuse(path, "converted folder", {"format": format, **wanted}, min_user, min_item)
        return open_mapped(path)
    if not path.is_file():
        raise ValueError(
            f"{path}: expected a file or a folder that `fmrec-fast convert` wrote, not a directory "
            f"without {METADATA}"
        )
    format = _format_of(path, format)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")

    if format == "pkl":
        return read_pickle(path, wanted, min_user, min_item)
    source = _Parquet(path) if format == "parquet" else _Text(path, format)
    return from_table(source, choose_columns(source, wanted), int(min_user), int(min_item))


def check_least(min_user: int, min_item: int) -> None:
    for name, least in (("min_user", min_user), ("min_item", min_item)):
        if isinstance(least, bool) or not isinstance(least, (int, np.integer)):
            raise TypeError(f"{name}={least!r}; expected an integer")
        if least < 0:
            raise ValueError(f"{name}={least}; expected 0 or more")


def read_pickle(path: Path, wanted: dict[str, str | None], min_user: int, min_item: int) -> Dataset:
    _refuse(path, "published pickle", wanted, min_user, min_item)
    return read_published(path)


def _refuse(
    path: Path, what: str, given: dict[str, str | None], min_user: int, min_item: int
) -> None:
    given = {**given, "min_item": min_item or None}  # type: ignore[dict-item]
    refused = [name for name, value in given.items() if value is not None]
    if min_user > MIN_HISTORY:
        refused.append("min_user")
    if refused:
        raise ValueError(
            f"{path}: {', '.join(refused)} given for a {what}; expected none: its split and "
            f"numbering are fixed"
        )


def _format_of(path: Path, format: str | None) -> str:
    known = sorted(set(FORMATS.values()))
    if format is None:
        suffix = path.suffix.lower()
        if suffix not in FORMATS:
            raise ValueError(
                f"{path}: unknown suffix {suffix!r}; expected one of {sorted(FORMATS)}, or "
                f"format= one of {known}"
            )
        return FORMATS[suffix]
    if format not in known:
        raise ValueError(f"format={format!r}; expected one of {known}")
    return format


def _import_pyarrow() -> None:
    try:
        import pyarrow.compute
        import pyarrow.csv
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "reading tables of interactions needs pyarrow: pip install fmrec_fast[cli]"
        ) from error


class _Text:
    """A delimited text file whose first line that is not blank is the header."""

    untyped = True  # text may stand for ints

    def __init__(self, path: Path, format: str) -> None:
        _import_pyarrow()
        self.path = path
        self.delimiter = DELIMITERS[format]
        records = self._records()
        _, self.header = next(records, (0, []))
        if not self.header:
            raise ValueError(f"{path}: only blank lines; expected a header and rows")
        if next(records, None) is None:
            raise ValueError(f"{path}: no interactions; expected rows after the header")
        records.close()
        # RecBole writes each column's type after its name.
        typed = [name.partition(":") for name in self.header]
        self.names = [name for name, _, _ in typed] if format == "inter" else self.header
        self.types = [kind for _, _, kind in typed] if format == "inter" else [""] * len(typed)

    def _records(self, strict: bool = False) -> Generator[tuple[int, list[str]], None, None]:
        """The records that are not blank, each with the number of the line it starts on."""
        with open(self.path, encoding="utf-8-sig", errors="replace", newline="") as file:
            reader = csv.reader(file, delimiter=self.delimiter, strict=strict)
            line = 1
            while True:
                try:
                    record = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    raise ValueError(f"{self.path}, line {line}: {error}") from error
                if record:
                    yield line, record
                line = reader.line_num + 1

    def line(self, row: int) -> str:
        """Where data row `row` (0-based) is."""
        for at, (line, _) in enumerate(self._records()):
            if at == row + 1:
                return f"{self.path}, line {line}"
        raise ValueError(f"{self.path}: row {row} is gone; the file changed while it was read")

    def read(self, columns: list[int]) -> list[pa.ChunkedArray]:
        """These columns as strings."""
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        names = [self.header[column] for column in columns]
        try:
            table = arrow_csv.read_csv(self.path, **self._options(names))
        except pa.ArrowInvalid as error:
            self._explain(error)
        self._check_quotes(table.num_rows)
        return [table.column(name) for name in names]

    def batches(self, columns: list[int]) -> Generator[list[pa.ChunkedArray], None, None]:
        """These columns as strings, a block of the file at a time."""
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        names, rows = [self.header[column] for column in columns], 0
        try:
            with arrow_csv.open_csv(
                self.path,
                read_options=arrow_csv.ReadOptions(block_size=BLOCK),
                **self._options(names),
            ) as reader:
                for batch in reader:
                    rows += batch.num_rows
                    yield [pa.chunked_array([batch.column(name)]) for name in names]
        except pa.ArrowInvalid as error:
            self._explain(error)
        self._check_quotes(rows)

    def _options(self, names: list[str]) -> dict[str, Any]:
        import pyarrow as pa
        from pyarrow import csv as arrow_csv

        return {
            "parse_options": arrow_csv.ParseOptions(
                delimiter=self.delimiter, newlines_in_values=True
            ),
            "convert_options": arrow_csv.ConvertOptions(
                include_columns=names,
                column_types=dict.fromkeys(names, pa.string()),
                strings_can_be_null=False,
            ),
        }

    def _explain(self, error: Exception) -> NoReturn:
        for line, record in self._records():
            if len(record) != len(self.header):
                raise ValueError(
                    f"{self.path}, line {line}: {len(record)} fields "
                    f"({reprlib.repr(self.delimiter.join(record))}); expected {len(self.header)}, "
                    f"as in the header"
                ) from error
        with open(self.path, "rb") as file:
            for line, text in enumerate(file, 1):
                try:
                    text.decode()
                except UnicodeDecodeError as wrong:
                    raise ValueError(
                        f"{self.path}, line {line}: {reprlib.repr(text)} is not UTF-8 ({wrong})"
                    ) from error
        raise ValueError(f"{self.path}: {error}") from error

    def _check_quotes(self, rows: int) -> None:
        # Arrow takes a quote that is never closed as a field that goes on to the next quote or
        # the end of the file, and the rows in between are gone without a word.
        with open(self.path, "rb") as file:
            lines = sum(1 for line in file if line not in (b"\n", b"\r\n"))
        if lines != rows + 1:
            for _ in self._records(strict=True):
                pass


class _Parquet:
    untyped = False

    def __init__(self, path: Path) -> None:
        _import_pyarrow()
        import pyarrow as pa
        from pyarrow import parquet

        self.path = path
        try:
            # Buffered ahead, a file that is read in parts would stay in memory as a whole.
            self.file = parquet.ParquetFile(path, pre_buffer=False)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
        self.header = self.names = list(self.file.schema_arrow.names)
        self.types = [""] * len(self.names)

    def line(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"

    def read(self, columns: list[int]) -> list[pa.ChunkedArray]:
        import pyarrow as pa

        names = [self.header[column] for column in columns]
        try:
            table = self.file.read(columns=names)
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path}: not a readable Parquet file: {error}") from error
        return [table.column(name) for name in names]

    def batches(self, columns: list[int]) -> Generator[list[pa.ChunkedArray], None, None]:
        import pyarrow as pa

        names = [self.header[column] for column in columns]
        try:
            for batch in self.file.iter_batches(ROWS, columns=names):
                yield [pa.chunked_array([batch.column(name)]) for name in names]
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{self.path}: not a readable Parquet file: {error}") from error


class _Arrow:
    """An Arrow IPC file (or Feather, version 2), read through a map."""

    untyped = False

    def __init__(self, path: Path) -> None:
        _import_pyarrow()
        import pyarrow as pa

        self.path = path
        try:
            self.file = pa.ipc.open_file(pa.memory_map(str(path)))
        except (pa.ArrowInvalid, OSError) as error:
            raise ValueError(f"{path}: not a readable Arrow file: {error}") from error
        self.header = self.names = list(self.file.schema.names)
        self.types = [""] * len(self.names)

    def line(self, row: int) -> str:
        return f"{self.path}, row {row + 1}"

    def batches(self, columns: list[int]) -> Generator[list[pa.ChunkedArray], None, None]:
        import pyarrow as pa

        for at in range(self.file.num_record_batches):
            batch = self.file.get_batch(at)
            for first in range(0, batch.num_rows, ROWS):
                part = batch.slice(first, ROWS)
                yield [pa.chunked_array([part.column(column)]) for column in columns]


class _Folder:
    """Files of one kind and the same columns, one after another in the order of their names."""

    untyped = False

    def __init__(
        self, path: Path, files: list[Path], open_one: Callable[[Path], _Parquet | _Arrow]
    ) -> None:
        self.path, self.files, self._open = path, files, open_one
        self.header = self.names = open_one(files[0]).header
        self.types = [""] * len(self.names)
        self._rows: list[int] = []  # of the files that were read

    def line(self, row: int) -> str:
        at = 0
        while at < len(self._rows) and row >= self._rows[at]:
            row -= self._rows[at]
            at += 1
        return self._open(self.files[at]).line(row)

    def batches(self, columns: list[int]) -> Generator[list[pa.ChunkedArray], None, None]:
        names = [self.header[column] for column in columns]
        kinds: list[pa.DataType] | None = None
        for file in self.files:
            part, rows = self._open(file), 0
            missing = [name for name in names if part.header.count(name) != 1]
            if missing:
                raise ValueError(
                    f"{file}: {part.header.count(missing[0])} columns {missing[0]!r}; expected 1, "
                    f"as in {self.files[0]}"
                )
            for batch in part.batches([part.header.index(name) for name in names]):
                here = [_plain(column.type) for column in batch]
                kinds = kinds or here
                if here != kinds:
                    raise ValueError(
                        f"{file}: columns of types {list(map(str, here))}; expected "
                        f"{list(map(str, kinds))}, as in {self.files[0]}"
                    )
                rows += len(batch[0])
                yield batch
            self._rows.append(rows)


def _plain(kind: pa.DataType) -> pa.DataType:
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


# What is read in parts.
Stream = _Text | _Parquet | _Arrow | _Folder


class Source(Protocol):
    """What columns are read from; `line` says where a row is."""

    path: Any
    names: list[str]
    header: list[str]
    types: list[str]

    def line(self, row: int) -> str: ...

    def read(self, columns: list[int]) -> list[pa.ChunkedArray]: ...


class Place(Protocol):
    """The part of a source that messages name."""

    path: Any

    def line(self, row: int) -> str: ...


# What only `convert` reads, beside FORMATS: a file may be larger than memory, or many.
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")


def open_source(path: Path, format: str | None) -> Stream | None:
    """What to convert, in parts; None is a published pickle.

    Raises ValueError for an unknown kind of file, or a folder that has none or several kinds.
    """
    if path.is_dir():
        return _open_folder(path, format)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    if format == "arrow" or (format is None and path.suffix.lower() in ARROW_SUFFIXES):
        return _Arrow(path)
    format = _format_of(path, format)
    if format == "pkl":
        return None
    return _Parquet(path) if format == "parquet" else _Text(path, format)


def _open_folder(path: Path, format: str | None) -> _Folder:
    kinds: dict[str, tuple[str, ...]] = {"parquet": (".parquet", ".pq"), "arrow": ARROW_SUFFIXES}
    if format is not None and format not in kinds:
        raise ValueError(f"format={format!r} for the folder {path}; expected one of {list(kinds)}")
    if is_mapped(path):
        raise ValueError(f"{path} is a converted dataset; expected data to convert")
    found: dict[str, list[Path]] = {}
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
        for kind, suffixes in kinds.items():
            if format in (None, kind) and file.suffix.lower() in suffixes and not hidden:
                found.setdefault(kind, []).append(file)
    if len(found) != 1:
        what = f"files of {sorted(found)}" if found else "no such file"
        raise ValueError(
            f"{path}: {what}; expected a folder of either Parquet or Arrow files "
            f"({', '.join((*kinds['parquet'], *ARROW_SUFFIXES))})"
        )
    [(kind, files)] = found.items()
    return _Folder(path, files, _Parquet if kind == "parquet" else _Arrow)


def is_conventional(role: str, column: str) -> bool:
    return column.lower().translate(str.maketrans("", "", "_- ")) in CONVENTIONAL[role]


def choose_columns(source: Stream | Source, wanted: dict[str, str | None]) -> dict[str, int]:
    """The positions of the columns: 'user', 'item' and, where there is one, 'timestamp'."""
    chosen = {}
    for role, name in wanted.items():
        if name is None:
            found = [at for at, name in enumerate(source.names) if is_conventional(role, name)]
            problem = f"no {role} column" if not found else f"several {role} columns"
        else:
            found = [
                at
                for at, spellings in enumerate(zip(source.names, source.header, strict=True))
                if name in spellings
            ]
            problem = f"no column {name!r}" if not found else f"several columns {name!r}"
        if not found and role == "timestamp" and name is None:
            continue
        if len(found) != 1:
            which = f" ({', '.join(source.names[at] for at in found)})" if found else ""
            hint = f"; give its name as {role}=" if name is None else ""
            raise ValueError(
                f"{source.path}: {problem}{which}{hint}; the file's columns are {source.names}"
            )
        if source.types[found[0]].endswith("_seq"):
            raise ValueError(
                f"{source.path}: the {role} column {source.header[found[0]]!r} holds sequences; "
                f"expected one value per row"
            )
        chosen[role] = found[0]
    roles: dict[int, str] = {}
    for role, at in chosen.items():
        if at in roles:
            raise ValueError(
                f"{source.path}: column {source.names[at]!r} for both {roles[at]} and {role}; "
                f"expected different columns"
            )
        roles[at] = role
    return chosen


@dataclass(frozen=True)
class _Ids:
    """codes int32 [N]: each row's place in `ids`, the distinct external ids, sorted."""

    codes: np.ndarray
    ids: list


def from_table(source: Source, columns: dict[str, int], min_user: int, min_item: int) -> Dataset:
    arrays = dict(zip(columns, source.read(list(columns.values())), strict=True))
    if len(arrays["user"]) == 0:
        raise ValueError(f"{source.path}: no interactions; expected rows after the header")
    users = _encode(source, "user", arrays["user"])
    items = _encode(source, "item", arrays["item"])
    times = timestamps(source, arrays["timestamp"]) if "timestamp" in arrays else None
    return _assemble(
        users,
        items,
        times,
        min_user,
        min_item,
        name=Path(source.path).stem,
        source=str(source.path),
        columns=tuple(f"{role} {source.names[at]}" for role, at in columns.items()),
    )


def valid_ids(source: Place, role: str, column: pa.ChunkedArray, first: int) -> pa.ChunkedArray:
    """The ids of rows `first` and on as text, integers, booleans or floats; none is missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    missing = pc.index(pc.is_null(column, nan_is_null=True), True).as_py()
    if missing >= 0:
        raise ValueError(
            f"{source.line(first + missing)}: the {role} id is missing; expected an id"
        )
    simple = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, is_text)
    if not any(is_kind(kind) for is_kind in simple):
        raise ValueError(
            f"{source.path}: the {role} column has type {kind}; expected integers or text"
        )
    return column


def are_whole(column: pa.ChunkedArray) -> bool:
    """Whether floats are what a table of ints becomes in passing through pandas with a gap."""
    import pyarrow.compute as pc

    whole = pc.all(pc.equal(pc.floor(column), column)).as_py()
    return whole and pc.max(pc.abs(column)).as_py() <= 2**53


def check_id_column(source: Place, role: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A whole column of valid ids, as integers where its floats are whole."""
    import pyarrow as pa

    column = valid_ids(source, role, column, 0)
    if pa.types.is_floating(column.type) and are_whole(column):
        column = column.cast(pa.int64())
    return column


def _encode(source: Source, role: str, column: pa.ChunkedArray) -> _Ids:
    import pyarrow as pa

    column = check_id_column(source, role, column)
    encoded = column.dictionary_encode().combine_chunks()
    codes, distinct = encoded.indices.to_numpy(), encoded.dictionary
    if is_text(distinct.type):
        check_text_ids(source, role, codes, distinct.to_pylist(), 0)
        values = as_ints(distinct) if isinstance(source, _Text) else None
        ids = distinct.to_pylist() if values is None else values.tolist()
    else:
        ids = distinct.to_pylist()
        if not pa.types.is_integer(distinct.type):
            ids = [str(value) for value in ids]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    rank = np.empty(len(ids), dtype=np.int32)
    rank[order] = np.arange(len(ids), dtype=np.int32)
    return _Ids(rank[codes], [ids[at] for at in order])


def is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def check_text_ids(
    source: Place, role: str, codes: np.ndarray, distinct: list[str], first: int
) -> None:
    for code, value in enumerate(distinct):
        if not value.strip():
            problem = f"the {role} id is empty ({value!r}); expected an id"
        elif "\n" in value or "\r" in value:
            problem = f"the {role} id {reprlib.repr(value)} has a line break (an open quote?)"
        else:
            continue
        raise ValueError(f"{source.line(first + int(np.argmax(codes == code)))}: {problem}")


def as_ints(strings: pa.Array | pa.ChunkedArray) -> np.ndarray | None:
    """int64 values of strings that all are ints as Python prints them, else None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pc.all(pc.match_substring_regex(strings, INTEGER)).as_py():
        return None
    try:
        return strings.cast(pa.int64()).to_numpy()
    except pa.ArrowInvalid:
        return None  # 19 digits may be beyond int64


def timestamps(source: Place, column: pa.ChunkedArray, first: int = 0) -> np.ndarray:
    """int64 or float64 [N], finite; `first` is the row of the first of them."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    kind = column.type
    row = pc.index(column.is_null(), True).as_py()
    if row >= 0:
        raise ValueError(f"{source.line(first + row)}: the timestamp is missing; expected a number")
    if pa.types.is_date32(kind):
        return column.cast(pa.int32()).to_numpy().astype(np.int64)
    if pa.types.is_timestamp(kind) or pa.types.is_date64(kind) or pa.types.is_int64(kind):
        return column.cast(pa.int64()).to_numpy()
    if is_text(kind):
        values = as_ints(column)
        if values is not None:
            return values
        row = pc.index(pc.match_substring_regex(column, NUMBER), False).as_py()
        if row >= 0:
            raise ValueError(
                f"{source.line(first + row)}: timestamp {reprlib.repr(column[row].as_py())}; "
                f"expected a number"
            )
    elif not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_decimal(kind)):
        raise ValueError(
            f"{source.path}: the timestamp column has type {kind}; expected numbers or timestamps"
        )
    times = column.cast(pa.float64(), safe=False).to_numpy()
    if not np.isfinite(times).all():
        row = int(np.argmin(np.isfinite(times)))
        raise ValueError(
            f"{source.line(first + row)}: timestamp {column[row].as_py()}; expected a finite number"
        )
    return times


def _assemble(
    users: _Ids,
    items: _Ids,
    times: np.ndarray | None,
    min_user: int,
    min_item: int,
    *,
    name: str,
    source: str,
    columns: tuple[str, ...],
) -> Dataset:
    rows_read = len(users.codes)
    user, item = users.codes, items.codes
    short = int((np.bincount(user) < min(MIN_HISTORY, min_user)).sum())
    facts = {"repeated_items": count_repeats(user, item)}
    # Sorted before it is filtered: a filter keeps the order.
    order = np.argsort(user, kind="stable")
    if times is not None:
        within, found = in_time_order(user[order], times[order])
        order, facts = order if within is None else order[within], facts | found
    user, item = _filter(user[order], item[order], max(min_user, 1), min_item)
    user_counts, item_counts = np.bincount(user), np.bincount(item)
    kept_users, kept_items = np.flatnonzero(user_counts), np.flatnonzero(item_counts)
    internal = np.cumsum(item_counts > 0)  # by code, in the order of the external ids
    report = ReadReport(
        rows_read=rows_read,
        rows_kept=len(user),
        users_read=len(users.ids),
        users_kept=len(kept_users),
        items_read=len(items.ids),
        items_kept=len(kept_items),
        users_too_short=short,
        users_filtered=len(users.ids) - len(kept_users) - short,
        source=source,
        columns=columns,
        **facts,
    )
    if len(user) == 0:
        raise ValueError(
            f"{source}: no user is left with min_user={min_user}, min_item={min_item}; expected "
            f"users with at least {max(min_user, 1)} interactions. {report}"
        )
    return Dataset(
        items=internal[item].astype(np.int32),
        offsets=offsets_of(user_counts[kept_users]),
        item_ids=[items.ids[code] for code in kept_items.tolist()],
        user_ids=[users.ids[code] for code in kept_users.tolist()],
        name=name,
        report=report,
    )


def in_time_order(user: np.ndarray, times: np.ndarray) -> tuple[np.ndarray | None, dict[str, int]]:
    """The order by user and time (None: as it is) of interactions by user in file order, and facts.

    Equal times keep the file's order.
    """
    same_user = user[1:] == user[:-1]
    earlier = int((same_user & (times[1:] < times[:-1])).sum())
    order = np.lexsort((times, user)) if earlier else None
    # Either order has the users ascending, so `same_user` is about both.
    in_order = times if order is None else times[order]
    tied = int((same_user & (in_order[1:] == in_order[:-1])).sum())
    return order, {"out_of_order": earlier, "tied_timestamps": tied}


def _filter(
    user: np.ndarray, item: np.ndarray, min_user: int, min_item: int
) -> tuple[np.ndarray, np.ndarray]:
    while len(user):
        keep = (np.bincount(user) >= min_user)[user] & (np.bincount(item) >= min_item)[item]
        if keep.all():
            break
        user, item = user[keep], item[keep]
    return user, item
