"""Vectors for an approximate index: the score of an item is its inner product with the query."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from fmrec_fast.bulk import BulkRecommender, external_ids
from fmrec_fast.data.users import Histories

ITEMS, ITEM_IDS = "items.npy", "items.parquet"
QUERIES, USER_IDS = "queries.npy", "queries.parquet"


def export(
    recommender: BulkRecommender,
    item_ids: list,
    out: str | Path,
    users: Iterable[Histories] | None = None,
) -> str:
    """Write the vectors of all items, and the sampled queries of users, into a new directory.

    ``items.npy`` is float32 [V-1, D] and ``queries.npy`` float32 [U, D]; row r's external id is row
    r of ``items.parquet`` (column item) and ``queries.parquet`` (column user). The queries are
    written as they are sampled. The directory appears when all is there.

    Returns:
        What was written, in words.

    Raises:
        ValueError: `out` is a file, or holds something.
    """
    out = Path(out)
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ValueError(f"--out {out} exists already; expected a new or empty directory")
    temporary = out.with_name(f".{out.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        table = recommender.model.item_embeddings.weight.detach()[1:].float().cpu().numpy()
        np.save(temporary / ITEMS, table)
        pa.parquet.write_table(pa.table({"item": external_ids(item_ids)}), temporary / ITEM_IDS)
        written = f"{len(table)} item vectors"
        if users is not None:
            count = _write_queries(recommender, users, table.shape[1], temporary)
            written += f" and {count} query vectors"
        if out.exists():
            out.rmdir()
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"{written} of {table.shape[1]} channels"


def _write_queries(
    recommender: BulkRecommender, users: Iterable[Histories], channels: int, directory: Path
) -> int:
    count, ids = 0, None
    with open(directory / QUERIES, "wb") as file:
        _write_header(file, 0, channels)
        for part in users:
            file.write(recommender.vectors(part).tobytes())
            count += len(part.users)
            table = pa.table({"user": part.users})
            if ids is None:
                ids = pa.parquet.ParquetWriter(directory / USER_IDS, table.schema)
            ids.write_table(table)
        file.seek(0)
        # numpy leaves room in the header for a first dimension that grows.
        _write_header(file, count, channels)
    if ids is not None:
        ids.close()
    return count


def _write_header(file, rows: int, channels: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, channels)}
    np.lib.format.write_array_header_1_0(file, header)
