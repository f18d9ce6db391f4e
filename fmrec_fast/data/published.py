"""The published `dataset.pkl`, read without running anything that the file may hold."""

from __future__ import annotations

import pickle
import reprlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from .dataset import Dataset, ReadReport, check_ids, count_repeats, flat_int64, offsets_of


class _Refused(ValueError):
    """A pickle that asks for a global."""


class _ContainersOnly(pickle.Unpickler):
    """Unpickles builtin containers, numbers and strings; it never looks a name up.

    Whatever a pickle can run, it must first get by name, so nothing of the file is ever called.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file)
        self.path = path

    def find_class(self, module: str, name: str) -> Any:
        raise _Refused(
            f"{self.path}: the pickle asks for {module}.{name}; expected builtin dicts, lists, "
            f"ints and strings only, and nothing of it was run"
        )


def read_published(path: Path) -> Dataset:
    """Read a `dataset.pkl`: a dict of train, val, test {user: [items]}, smap, and perhaps umap.

    smap {raw item: id} gives the external item ids, umap {raw user: user} the external user ids.
    Users come in the sorted order of their keys. Raises ValueError for anything else.
    """
    content = _unpickle(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a {type(content).__name__}; expected a dict")
    for key in ("train", "val", "test", "smap"):
        if not isinstance(content.get(key), dict):
            raise ValueError(
                f"{path}: {key!r} is {reprlib.repr(content.get(key))}; expected a dict (the file "
                f"has the keys {reprlib.repr(list(content))})"
            )
    train, val, test = content["train"], content["val"], content["test"]
    item_ids = _inverted(path, "smap", content["smap"])
    keys = _sorted_users(path, train, val, test)
    if not keys:
        raise ValueError(f"{path}: no users; expected at least one")
    for part, split in (("train", train), ("val", val), ("test", test)):
        for user in keys:
            ids = split[user]
            if not isinstance(ids, (list, tuple)) or (part != "train" and len(ids) != 1):
                expected = "a list of items" if part == "train" else "a list of exactly 1 item"
                raise ValueError(
                    f"{path}: {part} of user {user!r} is {reprlib.repr(ids)}; expected {expected}"
                )
            if not set(map(type, ids)) <= {int}:
                bad = next(value for value in ids if type(value) is not int)
                raise ValueError(
                    f"{path}: {part} of user {user!r} has the item {reprlib.repr(bad)}; expected "
                    f"an int"
                )
    lengths = np.array([len(train[user]) + 2 for user in keys], dtype=np.int64)
    histories = [[*train[user], *val[user], *test[user]] for user in keys]
    ids = flat_int64(histories, int(lengths.sum()), f"{path}: items by user")
    offsets = offsets_of(lengths)
    outside = np.flatnonzero((ids < 1) | (ids > len(item_ids)))
    if len(outside):
        row = int(np.searchsorted(offsets, outside[0], side="right")) - 1
        raise ValueError(
            f"{path}: item {ids[outside[0]]} of user {keys[row]!r}; expected 1..{len(item_ids)}, "
            f"the ids of smap"
        )
    report = ReadReport(
        rows_read=len(ids),
        rows_kept=len(ids),
        users_read=len(keys),
        users_kept=len(keys),
        items_read=len(item_ids),
        items_kept=len(item_ids),
        repeated_items=count_repeats(np.repeat(np.arange(len(keys)), lengths), ids),
        source=str(path),
    )
    user_ids = keys if content.get("umap") is None else _raw_users(path, content["umap"], keys)
    return Dataset(ids.astype(np.int32), offsets, item_ids, user_ids, path.stem, report)


def _unpickle(path: Path) -> Any:
    with open(path, "rb") as file:
        try:
            return _ContainersOnly(file, path).load()
        except _Refused:
            raise
        # Everything that the unpickler raises for bytes that are no pickle.
        except (
            pickle.UnpicklingError,
            AttributeError,
            EOFError,
            LookupError,
            MemoryError,
            OverflowError,
            TypeError,
            ValueError,
        ) as error:
            raise ValueError(
                f"{path}: not a readable pickle ({type(error).__name__}: {error}); the file may "
                f"be truncated"
            ) from error


def _inverted(path: Path, name: str, mapping: dict) -> list:
    """The keys of {key: 1..n}, in the order of their numbers."""
    numbers = list(mapping.values())
    if not set(map(type, numbers)) <= {int}:
        raw, bad = next((raw, value) for raw, value in mapping.items() if type(value) is not int)
        raise ValueError(f"{path}: {name}[{raw!r}] is {reprlib.repr(bad)}; expected an int")
    keys = [key for key, _ in sorted(mapping.items(), key=lambda pair: pair[1])]
    if sorted(numbers) != list(range(1, len(numbers) + 1)):
        at = next(at for at, number in enumerate(sorted(numbers)) if number != at + 1)
        raise ValueError(
            f"{path}: the ids of {name} are not exactly 1..{len(numbers)}: found "
            f"{sorted(numbers)[at]} ({keys[at]!r}) where {at + 1} was expected"
        )
    return _checked_ids(path, name, keys)


def _sorted_users(path: Path, train: dict, val: dict, test: dict) -> list:
    for part, split in (("val", val), ("test", test)):
        for here, there, where in ((train, split, "train"), (split, train, part)):
            if here.keys() - there.keys():
                user = next(user for user in here if user not in there)
                raise ValueError(
                    f"{path}: user {user!r} is in {where} but not in "
                    f"{part if where == 'train' else 'train'}; expected each user in train, val "
                    f"and test"
                )
    keys = _checked_ids(path, "train", list(train))
    if len(set(map(type, keys))) > 1:
        raise ValueError(f"{path}: some users are ints and some strings; expected one type")
    return sorted(keys)


def _raw_users(path: Path, umap: Any, keys: list) -> list:
    if not isinstance(umap, dict):
        raise ValueError(f"{path}: 'umap' is {reprlib.repr(umap)}; expected a dict or no umap")
    raw_of: dict = {}
    for raw, user in umap.items():
        if not isinstance(user, (int, str)):
            raise ValueError(f"{path}: umap[{raw!r}] is {reprlib.repr(user)}; expected a user")
        if user in raw_of:
            raise ValueError(f"{path}: umap maps both {raw_of[user]!r} and {raw!r} to {user!r}")
        raw_of[user] = raw
    missing = [user for user in keys if user not in raw_of]
    if missing:
        raise ValueError(f"{path}: user {missing[0]!r} is not in umap; expected every user")
    return _checked_ids(path, "umap", [raw_of[user] for user in keys])


def _checked_ids(path: Path, name: str, ids: list) -> list:
    try:
        check_ids(f"{path}: {name}", ids)
    except TypeError as error:
        raise ValueError(str(error)) from error
    return ids
