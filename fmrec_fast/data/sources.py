"""Files of interactions as columns: delimited text, Parquet, Arrow, and folders of them.

Text is read by Arrow's parser, which reports no line numbers when it reads in parallel: when
something is wrong, `Text.line` reads the file again, slowly, to say where.
"""

from __future__ import annotations

import csv
import reprlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from .mapped import is_mapped

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
# How much of a file is held at a time where it is read in parts: bytes of text, rows of a table.
BLOCK, ROWS = 1 << 23, 1 << 18
# What only `convert` reads, beside FORMATS: a file may be larger than memory, or many.
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")


def format_of(path: Path, format: str | None) -> str:
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


class Text:
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


class Parquet:
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


class Arrow:
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


class Folder:
    """Files of one kind and the same columns, one after another in the order of their names."""

    untyped = False

    def __init__(
        self, path: Path, files: list[Path], open_one: Callable[[Path], Parquet | Arrow]
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
Stream = Text | Parquet | Arrow | Folder


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


def open_source(path: Path, format: str | None) -> Stream | None:
    """What to convert, in parts; None is a published pickle.

    Raises ValueError for an unknown kind of file, or a folder that has none or several kinds.
    """
    if path.is_dir():
        return _open_folder(path, format)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")
    if format == "arrow" or (format is None and path.suffix.lower() in ARROW_SUFFIXES):
        return Arrow(path)
    format = format_of(path, format)
    if format == "pkl":
        return None
    return Parquet(path) if format == "parquet" else Text(path, format)


def _open_folder(path: Path, format: str | None) -> Folder:
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
    return Folder(path, files, Parquet if kind == "parquet" else Arrow)
