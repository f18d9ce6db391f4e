"""Reading interactions from files: the published pickles, RecBole's atomic text, CSV, Parquet.

Tables go through Arrow, and ids become integers by their dictionaries, so no Python object is
made per row.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .columns import as_ints, check_id_column, check_text_ids, choose_columns, is_text, timestamps
from .dataset import MIN_HISTORY, Dataset, ReadReport, count_repeats, offsets_of
from .mapped import METADATA, is_mapped, open_mapped
from .published import read_published
from .sources import Parquet, Source, Text, format_of

if TYPE_CHECKING:
    import pyarrow as pa


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
    format = format_of(path, format)
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty")

    if format == "pkl":
        return read_pickle(path, wanted, min_user, min_item)
    source = Parquet(path) if format == "parquet" else Text(path, format)
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


def _encode(source: Source, role: str, column: pa.ChunkedArray) -> _Ids:
    import pyarrow as pa

    column = check_id_column(source, role, column)
    encoded = column.dictionary_encode().combine_chunks()
    codes, distinct = encoded.indices.to_numpy(), encoded.dictionary
    if is_text(distinct.type):
        check_text_ids(source, role, codes, distinct.to_pylist(), 0)
        values = as_ints(distinct) if isinstance(source, Text) else None
        ids = distinct.to_pylist() if values is None else values.tolist()
    else:
        ids = distinct.to_pylist()
        if not pa.types.is_integer(distinct.type):
            ids = [str(value) for value in ids]
    order = sorted(range(len(ids)), key=ids.__getitem__)
    rank = np.empty(len(ids), dtype=np.int32)
    rank[order] = np.arange(len(ids), dtype=np.int32)
    return _Ids(rank[codes], [ids[at] for at in order])


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
