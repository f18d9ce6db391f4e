"""A directory of Parquet shards, which is whole or plainly not.

A shard is written by whoever computed it, whole or not at all, under a name that its users decide:
work that is repeated writes the same file again, and what is there need not be repeated. The plan
of what the shards are made from lies beside them, so that another run goes on only with the same.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet

from fmrec_fast.data.users import filesystem_of

SUCCESS = "_SUCCESS"
PLAN = "_PLAN"
BEGUN = "_begun"
# A local directory on its way has this behind its name.
UNFINISHED = ".unfinished"
# Where a shard's `Counts` are, in the metadata of its schema.
COUNTS = b"fmrec_fast"
TEMPORARY = "temporary"
# Workers that may die at one thing.
DEATHS = 3


class WorkError(RuntimeError):
    """Workers fail, and not for what is wrong with the arguments or with what they read."""


@dataclass(frozen=True)
class Counts:
    """Of a shard: rows, `users` with a recommendation, and what was left out."""

    rows: int = 0
    users: int = 0
    unknown_items: int = 0
    users_left_out: int = 0


@dataclass(frozen=True)
class Result:
    """The sums of `Counts`, and the names of the shards."""

    users: int
    rows: int
    shards: list[str]
    unknown_items: int
    users_left_out: int


@dataclass(frozen=True)
class Shards:
    """Shards in the directory `path`; `deaths` workers may die at one thing."""

    filesystem: pyarrow.fs.FileSystem
    path: str
    deaths: int

    def finished(self, name: str) -> Counts | None:
        """The counts of a shard that is there and whole, else None."""
        try:
            schema = pyarrow.parquet.read_schema(self._of(name), filesystem=self.filesystem)
        except (OSError, pa.ArrowInvalid):
            return None
        text = (schema.metadata or {}).get(COUNTS)
        return None if text is None else Counts(**json.loads(text))

    def write(self, name: str, tables: list[pa.Table], counts: Counts) -> None:
        """Raises ValueError where the tables' columns differ in type."""
        try:
            table = pa.concat_tables(tables)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise ValueError(f"{name}: columns of several types: {error}") from error
        # In a group what was computed at once, as where tables are appended to a file.
        group = max((part.num_rows for part in tables), default=0)
        table = table.replace_schema_metadata({COUNTS: json.dumps(asdict(counts))})
        buffer = pa.BufferOutputStream()
        pyarrow.parquet.write_table(table, buffer, row_group_size=max(group, 1))
        self._put(self._of(name), buffer.getvalue())

    def begin(self, name: str) -> Attempt:
        """Work at `name`, a shard or anything else.

        Raises:
            WorkError: `deaths` attempts at it have not come to their end.
        """
        folder = f"{self.path}/{BEGUN}/{name}"
        selector = pyarrow.fs.FileSelector(folder, allow_not_found=True)
        found = self.filesystem.get_file_info(selector)
        if len(found) >= self.deaths:
            place = self._get(max(one.path for one in found)).decode()
            raise WorkError(
                f"{len(found)} workers died, one after the other, at {place}: for want of memory "
                f"(a smaller --batch needs less), or something there kills them"
            )
        return Attempt(self, folder)

    def names(self) -> list[str]:
        """Of the files with the ending of a shard."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True)
        found = (one.base_name for one in self.filesystem.get_file_info(selector) if one.is_file)
        return sorted(name[: -len(".parquet")] for name in found if name.endswith(".parquet"))

    def _of(self, name: str) -> str:
        return f"{self.path}/{name}.parquet"

    def _put(self, path: str, data: Any) -> None:
        if not isinstance(self.filesystem, pyarrow.fs.LocalFileSystem):
            # There from the moment that the stream is closed, on an object store.
            with self.filesystem.open_output_stream(path) as file:
                file.write(data)
            return
        # Beside the attempts, which go with the end of the run.
        temporary = Path(self.path) / BEGUN / TEMPORARY / uuid.uuid4().hex
        for folder in (temporary.parent, Path(path).parent):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(data)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _get(self, path: str) -> bytes:
        with self.filesystem.open_input_stream(path) as file:
            return file.read()


class Attempt:
    """Says in a file where the work at something is; its worker may not live to."""

    def __init__(self, shards: Shards, folder: str) -> None:
        self._shards, self._folder = shards, folder
        self._path = f"{folder}/{uuid.uuid4().hex}"

    def at(self, place: str) -> None:
        self._shards._put(self._path, place.encode())

    def end(self) -> None:
        """It is done, and how often it was tried before is of no interest any more."""
        _delete(self._shards.filesystem, self._folder)


def _delete(filesystem: pyarrow.fs.FileSystem, folder: str) -> None:
    if filesystem.get_file_info(folder).type == pyarrow.fs.FileType.Directory:
        filesystem.delete_dir(folder)


class Output:
    """The directory `out`, a path or a URI, on its way.

    On a local file system it is made under another name, and gets its own in one rename at the end;
    on an object store, which has no rename, the shards appear one by one. In either case the file
    ``_SUCCESS``, written last, lists them.

    Args:
        out: not there yet, or empty.
        resume: go on with what an earlier run left, where there is any.

    Raises:
        ValueError: there is something already.
    """

    def __init__(self, out: str, resume: bool = False) -> None:
        filesystem, path = filesystem_of(out)
        self.out, self._final, self._resume = out, path, resume
        self.is_local = isinstance(filesystem, pyarrow.fs.LocalFileSystem)
        if filesystem.get_file_info(path).type == pyarrow.fs.FileType.File:
            raise ValueError(f"--out {out} is a file; expected a new directory")
        names = _names(filesystem, path)
        if SUCCESS in names:
            raise ValueError(f"--out {out} holds recommendations already; expected a new directory")
        if names and (self.is_local or PLAN not in names):
            raise ValueError(
                f"--out {out} is not empty ({len(names)} entries, such as {names[0]!r}, no "
                f"{SUCCESS}); expected a new directory"
            )
        unfinished = path + UNFINISHED if self.is_local else path
        self.shards = Shards(filesystem, unfinished, DEATHS)
        names = _names(filesystem, self.shards.path)
        self._begun = PLAN in names
        if names and not self._begun:
            raise ValueError(
                f"{self.shards.path}, where --out {out} is to be made, is not empty "
                f"({len(names)} entries, such as {names[0]!r}); expected none of this name"
            )
        if self._begun and not resume:
            raise ValueError(
                f"{self.shards.path} is of a run that did not finish "
                f"({len(self.shards.names())} shards): go on with --resume, or remove it"
            )

    def planned(self) -> dict[str, Any] | None:
        """The plan of the run that is to go on, if there is one."""
        if not self._begun:
            return None
        return json.loads(self.shards._get(f"{self.shards.path}/{PLAN}"))

    @contextmanager
    def begin(self, plan: dict[str, Any]) -> Iterator[Shards]:
        """Write `plan`, or go on by it; of a run that fails, the finished shards stay.

        Raises:
            ValueError: what is there was made by another plan.
        """
        before = self.planned()
        for key, value in (before or {}).items():
            if plan.get(key) != value:
                raise ValueError(
                    f"--resume: {self.shards.path} was begun with {key} = {value!r}, got "
                    f"{plan.get(key)!r}; expected the same run, users and options, or another --out"
                )
        # Attempts that ended with the run before this one do not count.
        _delete(self.shards.filesystem, f"{self.shards.path}/{BEGUN}")
        if before is None:
            self.shards.filesystem.create_dir(self.shards.path)
            text = json.dumps(plan, indent=1) + "\n"
            self.shards._put(f"{self.shards.path}/{PLAN}", text.encode())
        try:
            yield self.shards
        except BaseException:
            if not self.shards.names():
                self.remove()
            raise

    def publish(self, counts: dict[str, Counts]) -> Result:
        """Say that these are the shards, all of them, and give the directory its name.

        Raises:
            RuntimeError: one of them is not there.
        """
        names = self.shards.names()
        if names != sorted(counts):
            missing = sorted(counts.keys() - set(names))
            raise RuntimeError(
                f"{self.shards.path} has {len(names)} shards of {len(counts)}"
                + (f"; missing are {missing[:3]}" if missing else "")
                + "; expected a directory that all workers share, and no other run"
            )
        total = {
            key: sum(getattr(each, key) for each in counts.values()) for key in asdict(Counts())
        }
        result = Result(shards=[f"{name}.parquet" for name in names], **total)
        text = json.dumps(asdict(result), indent=1) + "\n"
        self.shards._put(f"{self.shards.path}/{SUCCESS}", text.encode())
        _delete(self.shards.filesystem, f"{self.shards.path}/{BEGUN}")
        if self.is_local:
            os.replace(self.shards.path, self._final)
        return result

    def remove(self) -> None:
        """What there is of an unfinished run."""
        if self.is_local:
            shutil.rmtree(self.shards.path, ignore_errors=True)
            return
        self.shards.filesystem.delete_dir_contents(self.shards.path, missing_dir_ok=True)


def _names(filesystem: pyarrow.fs.FileSystem, path: str) -> list[str]:
    found = filesystem.get_file_info(pyarrow.fs.FileSelector(path, allow_not_found=True))
    return sorted(one.base_name for one in found)
