"""Recall of FAISS's approximate indexes against the exact ranking, over exported vectors.

    fmrec-fast export-vectors RUN --users USERS --out vectors
    python -m benchmarks.index_recall vectors

Prints a line per index: recall@k (the share of `item_topk`'s k best items that it finds), queries
a second on one thread, and seconds to build. The exact ranking is the first line.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch

from fmrec_fast.ops import item_topk
from fmrec_fast.vectors import ITEMS, QUERIES


def build(kind: str, items: np.ndarray, effort: int) -> Any:
    """An index for inner products; `effort` are lists probed of 'ivf', or candidates of 'hnsw'."""
    channels = items.shape[1]
    if kind == "ivf":
        # No more lists than k-means has points for (39 a list).
        lists = max(1, min(4 * math.isqrt(len(items)), len(items) // 39))
        coarse = faiss.IndexFlatIP(channels)
        index = faiss.IndexIVFFlat(coarse, channels, lists, faiss.METRIC_INNER_PRODUCT)
        index.train(items)
        index.nprobe = effort
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(channels, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 200
        index.hnsw.efSearch = effort
    else:
        raise ValueError(f"kind must be 'ivf' or 'hnsw', got {kind!r}")
    index.add(items)
    return index


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Mean share of the exact ids [Q, k] among those found [Q, k]."""
    return float((found[:, :, None] == exact[:, None, :]).any(1).mean())


def study(items: np.ndarray, queries: np.ndarray, k: int, efforts: list[int]) -> list[dict]:
    table, wanted = torch.from_numpy(items), torch.from_numpy(queries)
    begin = time.perf_counter()
    exact = item_topk(wanted, table, k)[1].numpy()
    seconds = time.perf_counter() - begin
    rows = [{"index": "exact", "effort": 0, "recall": 1.0, "per_s": len(queries) / seconds}]
    for kind in ("ivf", "hnsw"):
        for effort in efforts:
            begin = time.perf_counter()
            index = build(kind, items, effort)
            built = time.perf_counter() - begin
            begin = time.perf_counter()
            found = index.search(queries, k)[1]
            seconds = time.perf_counter() - begin
            row = {"index": kind, "effort": effort, "recall": recall(found, exact)}
            rows.append(row | {"per_s": len(queries) / seconds, "build_s": built})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Recall of approximate indexes.")
    parser.add_argument("vectors", type=Path, help="directory of fmrec-fast export-vectors")
    parser.add_argument("-k", type=int, default=10)
    parser.add_argument("--efforts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--queries", type=int, default=10_000, help="at most, the first")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    given = parser.parse_args(argv)
    faiss.omp_set_num_threads(1)
    torch.set_num_threads(1)
    items = np.load(given.vectors / ITEMS)
    queries = np.array(np.load(given.vectors / QUERIES, mmap_mode="r")[: given.queries])
    rows = study(items, queries, given.k, given.efforts)
    print(f"{len(items)} items, {len(queries)} queries, {items.shape[1]} channels, k = {given.k}")
    for row in rows:
        print(
            f"{row['index']:>6} {row['effort']:4}  recall {row['recall']:.4f}  "
            f"{row['per_s']:10.0f} queries/s  built in {row.get('build_s', 0):.1f} s"
        )
    if given.json is not None:
        facts = {"items": len(items), "queries": len(queries), "k": given.k, "rows": rows}
        given.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
