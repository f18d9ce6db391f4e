"""Histories larger than memory: a folder of Arrow files that is mapped, not read.

A folder that `fmrec-fast convert` wrote holds::

    dataset.json     format, version, counts, report, and every file's bytes and CRC-32
    items.arrow      column `item`, int32 [N], in one record batch
    offsets.arrow    column `offset`, int64 [U + 1], in one record batch
    item_ids.arrow   column `id`: the external id of internal item 1, 2, ...
    user_ids.arrow   column `id`: the external id of each user row

Any Arrow implementation reads them. Ids are int64, uint64 or strings; where a catalogue has both
kinds (of a published pickle), strings beside a column `is_int`. Opening reads the metadata and
the first and last offset, nothing else; `verify` reads everything, a part at a time.
"""

from __future__ import annotations

import json
import mmap
import os
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from .dataset import PART, Dataset, ReadReport, fingerprint
from .ids import Ids

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "fmrec_fast dataset"
VERSION = 1
METADATA = "dataset.json"
ITEMS, OFFSETS = "items.arrow", "offsets.arrow"
ITEM_IDS, USER_IDS = "item_ids.arrow", "user_ids.arrow"
FILES = (ITEMS, OFFSETS, ITEM_IDS, USER_IDS)
# How much of a file is read in one go, in bytes.
BYTES = 1 << 24


@dataclass(frozen=True, eq=False, repr=False)
class MappedDataset(Dataset):
    """A Dataset whose arrays are read-only views of mapped files and whose ids are `Ids`.

    Batches are gathered from the map step by step; see `batches`.
    """

    folder: Path = Path()
    checksum: int = 0

    def __post_init__(self) -> None:
        # Everything else was checked in converting.
        ends = int(self.offsets[0]), int(self.offsets[-1])
        if ends != (0, len(self.items)) or len(self.user_ids) != self.num_users:
            raise ValueError(
                f"{self.folder}: offsets run from and to {list(ends)} for {len(self.items)} items, "
                f"and there are {len(self.user_ids)} user ids for {self.num_users} users; the "
                f"folder is damaged"
            )

    @property
    def fingerprint(self) -> int:
        return self.checksum


def is_mapped(path: Path) -> bool:
    """Whether `convert` wrote this folder (it is named by its metadata, written last)."""
    return (path / METADATA).is_file()


def open_mapped(path: Path) -> MappedDataset:
    """Map a folder that `convert` wrote.

    Raises:
        ImportError: without pyarrow.
        ValueError: another format or version, or a file that is missing or not of its size.
    """
    facts = _metadata(path)
    items = _open(path, ITEMS).column("item")
    offsets = _open(path, OFFSETS).column("offset")
    for name, array in (("items", items), ("offsets", offsets)):
        if array.num_chunks != 1:
            _damaged(path, f"{name} are in {array.num_chunks} record batches, expected 1")
    found = MappedDataset(
        items=items.chunk(0).to_numpy(),
        offsets=offsets.chunk(0).to_numpy(),
        item_ids=_ids(path, ITEM_IDS),
        user_ids=_ids(path, USER_IDS),
        name=facts["name"],
        report=_report(facts["report"]),
        folder=path,
        checksum=facts["fingerprint"],
    )
    counts = {
        "interactions": found.num_interactions,
        "users": found.num_users,
        "items": found.item_num - 1,
    }
    if counts != {name: facts[name] for name in counts}:
        _damaged(path, f"it holds {counts}, which {METADATA} does not say")
    return found


def verify(path: str | os.PathLike[str]) -> MappedDataset:
    """Open the folder and read all of it, in bounded memory: checksums, offsets, item numbers.

    Raises ValueError for anything that does not hold.
    """
    path = Path(path)
    for name, one in _metadata(path)["files"].items():
        found = file_checksum(path / name)
        if found != one["crc32"]:
            _damaged(path, f"the CRC-32 of {name} is {found}, expected {one['crc32']}")
    dataset = open_mapped(path)
    for first in range(0, dataset.num_users, PART):
        if np.diff(dataset.offsets[first : first + PART + 1]).min() < 1:
            _damaged(path, f"a user of rows {first} to {first + PART} has no item")
    for first in range(0, dataset.num_interactions, PART):
        part = dataset.items[first : first + PART]
        if not 1 <= part.min() <= part.max() < dataset.item_num:
            _damaged(path, f"an item of {first} to {first + PART} is out of range")
    if fingerprint(dataset.offsets, dataset.items) != dataset.fingerprint:
        _damaged(path, "the histories are not those that were written")
    return dataset


def file_checksum(path: Path) -> int:
    found = 0
    with open(path, "rb") as file:
        while part := file.read(BYTES):
            found = zlib.crc32(part, found)
    return found


def write_metadata(folder: Path, **facts: Any) -> None:
    """Last of all: it makes the folder a dataset."""
    files = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "crc32": file_checksum(folder / name),
        }
        for name in FILES
    }
    text = json.dumps({"format": FORMAT, "version": VERSION, **facts, "files": files}, indent=1)
    with open(folder / METADATA, "w") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def _metadata(path: Path) -> dict[str, Any]:
    try:
        facts = json.loads((path / METADATA).read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path / METADATA} is truncated or not JSON: {error}") from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        found = facts.get("format") if isinstance(facts, dict) else type(facts).__name__
        raise ValueError(f"{path / METADATA}: expected format {FORMAT!r}, got {found!r}")
    if facts.get("version") != VERSION:
        raise ValueError(
            f"{path / METADATA}: expected version {VERSION}, got {facts.get('version')!r}"
        )
    for name in FILES:
        file, expected = path / name, facts["files"][name]["bytes"]
        size = file.stat().st_size if file.is_file() else None
        if size != expected:
            _damaged(path, f"{name} has {size} bytes, expected {expected}")
    return facts


def _damaged(path: Path, problem: str) -> NoReturn:
    raise ValueError(f"{path}: {problem}; the folder is damaged, convert the data again")


def _open(path: Path, name: str) -> pa.Table:
    """A table on the map of the file; nothing of it is copied."""
    try:
        import pyarrow as pa
    except ImportError as error:
        raise ImportError("converted datasets need pyarrow: pip install fmrec_fast[cli]") from error
    with open(path / name, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        _damaged(path, f"{name} is not an Arrow file ({error})")


def _ids(path: Path, name: str) -> Ids:
    table = _open(path, name)
    return Ids(
        table.column("id"), table.column("is_int") if "is_int" in table.column_names else None
    )


def _report(facts: dict[str, Any]) -> ReadReport:
    known = {one.name for one in fields(ReadReport)}
    values = {name: value for name, value in facts.items() if name in known}
    return ReadReport(**values | {"columns": tuple(values.get("columns", ()))})
