"""Tables written piece by piece: Parquet, CSV or JSON lines, whole or not at all."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

SUFFIXES = (".parquet", ".csv", ".jsonl")


class TableFile:
    """A file that tables of one schema are appended to; it is there once the `with` block ends.

    Args:
        path: ends in one of `SUFFIXES`; None prints the rows, with tabs between the fields.
    """

    def __init__(self, path: Path | None) -> None:
        if path is not None and path.suffix not in SUFFIXES:
            raise ValueError(f"path must end in one of {SUFFIXES}, got {str(path)!r}")
        self.path, self.rows = path, 0
        self._writer: Any = None
        self._text: IO[str] | None = None

    def __enter__(self) -> TableFile:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = self.path.with_name(f".{self.path.name}")
        return self

    def write(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        if self.path is None:
            for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
                print("\t".join(f"{v:.6f}" if isinstance(v, float) else str(v) for v in row))
        elif self.path.suffix == ".jsonl":
            self._text = self._text or open(self._temporary, "w")
            self._text.writelines(json.dumps(row) + "\n" for row in table.to_pylist())
        else:
            if self._writer is None:
                kinds = {".parquet": pa.parquet.ParquetWriter, ".csv": pa.csv.CSVWriter}
                self._writer = kinds[self.path.suffix](self._temporary, table.schema)
            self._writer.write_table(table)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._writer, self._text):
            if file is not None:
                file.close()
        if self.path is None:
            sys.stdout.flush()
        elif kind is not None:
            self._temporary.unlink(missing_ok=True)
        elif self._writer is not None or self._text is not None:
            self._temporary.replace(self.path)
