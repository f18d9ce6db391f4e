"""Interaction histories in memory: two flat arrays, one external id per user and per item.

The split is leave-one-out. Of a history i_1 .. i_n, i_n is the test target, i_(n-1) the
validation target, and i_1 .. i_(n-2) is `train`; so a history of two items has a test sample
only, and a shorter one has none: reading drops it, unless it is read to recommend for.
"""

from __future__ import annotations

import re
import reprlib
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

from .ids import Ids

MIN_HISTORY = 2
ID_TYPES = {int, str}
INT_TYPES = (int, np.integer)
# An int as Python prints it. No id is longer, and int() refuses very long ones.
INTEGER = re.compile(r"0|-?[1-9][0-9]{0,99}")
# How many of a history's last items lie after the end of each part.
HELD_OUT = {"train": 2, "val": 1, "test": 0}
# How many values are looked at in one go where all of a dataset are, whose arrays may be mapped.
PART = 1 << 20


@dataclass(frozen=True)
class ReadReport:
    """What reading kept and what it dropped, and why.

    Users: `users_read = users_kept + users_empty + users_too_short + users_filtered`.
    A user is `empty` with no interaction, `too_short` with fewer than 2 as read, and `filtered`
    if `min_user`/`min_item` left too little. `items_dropped` counts items of the file that no
    kept interaction has.

    Facts about the interactions as read, none of which drops anything: `tied_timestamps` share
    user and timestamp with another one before them in the file (file order decides),
    `out_of_order` are earlier than the row before them of the same user (sorted), and
    `repeated_items` are of an item that the user had before.
    """

    rows_read: int
    rows_kept: int
    users_read: int
    users_kept: int
    items_read: int
    items_kept: int
    users_empty: int = 0
    users_too_short: int = 0
    users_filtered: int = 0
    tied_timestamps: int = 0
    out_of_order: int = 0
    repeated_items: int = 0
    source: str = ""
    columns: tuple[str, ...] = ()

    @property
    def items_dropped(self) -> int:
        return self.items_read - self.items_kept

    @property
    def rows_dropped(self) -> int:
        return self.rows_read - self.rows_kept

    def __str__(self) -> str:
        text = (
            f"{self.source + ': ' if self.source else ''}{self.rows_read:,} interactions read"
            f"{' (columns ' + ', '.join(self.columns) + ')' if self.columns else ''}, "
            f"{self.rows_kept:,} kept: {self.users_kept:,} users, {self.items_kept:,} items"
        )
        dropped = [
            (self.users_empty, "users without interactions"),
            (self.users_too_short, f"users with fewer than {MIN_HISTORY} interactions"),
            (self.users_filtered, "users by the min_user/min_item filter"),
            (self.items_dropped, "items no kept user has"),
        ]
        noted = [
            (self.tied_timestamps, "ties of user and timestamp (kept in file order)"),
            (self.out_of_order, "rows out of time order (sorted)"),
            (self.repeated_items, "repeats of an item by its user (kept)"),
        ]
        for verb, facts in (("dropped", dropped), ("noted", noted)):
            shown = ", ".join(f"{count:,} {what}" for count, what in facts if count)
            text += f"; {verb} {shown}" if shown else ""
        return text


NO_REPORT = ReadReport(0, 0, 0, 0, 0, 0)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Chronological item histories of U users over V - 1 items.

    items: int32 [N], internal ids 1..V-1, the users one after another, each in time order.
    offsets: int64 [U + 1]; user row u has `items[offsets[u]:offsets[u + 1]]`, at least 1 of them.
    item_ids: the external id (int or str) of internal item i is `item_ids[i - 1]`. A list; of a
        mapped dataset (see `mapped`) a sequence that stays in its file.
    user_ids: the external id of each user row, likewise.

    Raises TypeError for a wrong type or dtype, ValueError for a value that breaks the above.
    """

    items: np.ndarray
    offsets: np.ndarray
    item_ids: Sequence
    user_ids: Sequence
    name: str = ""
    report: ReadReport = NO_REPORT

    def __post_init__(self) -> None:
        _check_array("items", self.items, np.int32)
        _check_array("offsets", self.offsets, np.int64)
        _check_offsets(self.offsets, len(self.items))
        check_ids("item_ids", self.item_ids)
        check_ids("user_ids", self.user_ids)
        if len(self.user_ids) != self.num_users:
            raise ValueError(
                f"user_ids has {len(self.user_ids)} entries, but offsets describe "
                f"{self.num_users} users"
            )
        if len(self.items) and not 1 <= self.items.min() <= self.items.max() < self.item_num:
            at = int(np.flatnonzero((self.items < 1) | (self.items >= self.item_num))[0])
            row = int(np.searchsorted(self.offsets, at, side="right")) - 1
            raise ValueError(
                f"item id {self.items[at]} at position {at} (user row {row}); expected "
                f"1..{self.item_num - 1}"
            )
        if self.report is NO_REPORT:
            report = ReadReport(
                rows_read=self.num_interactions,
                rows_kept=self.num_interactions,
                users_read=self.num_users,
                users_kept=self.num_users,
                items_read=self.item_num - 1,
                items_kept=self.item_num - 1,
            )
            object.__setattr__(self, "report", report)

    @classmethod
    def from_histories(
        cls,
        histories: Sequence[Sequence[int]],
        *,
        item_ids: list | None = None,
        user_ids: list | None = None,
        name: str = "",
    ) -> Dataset:
        """A dataset of histories of internal ids; those shorter than 2 are dropped and counted.

        `item_ids` defaults to 1..the largest id, `user_ids` to the positions in `histories`.
        Raises ValueError for ids below 1 or beyond `item_ids`, TypeError for non-integers.
        """
        lengths = np.fromiter(map(len, histories), np.int64, len(histories))
        ids = flat_int64(histories, int(lengths.sum()), "histories")
        users = list(range(len(lengths))) if user_ids is None else user_ids
        if len(users) != len(lengths):
            raise ValueError(f"user_ids has {len(users)} entries for {len(lengths)} histories")
        if item_ids is None:
            item_ids = list(range(1, int(ids.max(initial=0)) + 1))
        outside = np.flatnonzero((ids < 1) | (ids > len(item_ids)))
        if len(outside):
            # Before the cast to int32 below, which would wrap it around.
            row = int(np.searchsorted(np.cumsum(lengths), outside[0], side="right"))
            raise ValueError(
                f"item id {ids[outside[0]]} in history {row}; expected 1..{len(item_ids)}"
            )
        kept = lengths >= MIN_HISTORY
        items = ids[np.repeat(kept, lengths)].astype(np.int32)
        offsets = offsets_of(lengths[kept])
        report = ReadReport(
            rows_read=len(ids),
            rows_kept=len(items),
            users_read=len(lengths),
            users_kept=int(kept.sum()),
            items_read=len(item_ids),
            items_kept=len(item_ids),
            users_empty=int((lengths == 0).sum()),
            users_too_short=int(((lengths > 0) & ~kept).sum()),
            repeated_items=count_repeats(np.repeat(np.arange(len(lengths)), lengths), ids),
        )
        kept_users = [users[row] for row in np.flatnonzero(kept).tolist()]
        return cls(items, offsets, item_ids, kept_users, name, report)

    def __repr__(self) -> str:
        return (
            f"Dataset({self.name!r}, {self.num_users:,} users, {self.item_num - 1:,} items, "
            f"{self.num_interactions:,} interactions)"
        )

    @property
    def item_num(self) -> int:
        """V: the number of items and the padding id 0."""
        return len(self.item_ids) + 1

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_interactions(self) -> int:
        return len(self.items)

    def history(self, user_row: int) -> np.ndarray:
        """The internal ids of one user, int32 [n], a view. Raises ValueError out of 0..U-1."""
        if not 0 <= user_row < self.num_users:
            raise ValueError(f"user row {user_row}; expected 0..{self.num_users - 1}")
        return self.items[self.offsets[user_row] : self.offsets[user_row + 1]]

    @cached_property
    def item_index(self) -> dict:
        """external item id -> internal id"""
        return dict(zip(self.item_ids, range(1, self.item_num), strict=True))

    def encode_items(self, external_ids: Iterable) -> np.ndarray:
        """Internal ids, int32 [n], of external ids.

        An id that is not itself known may be written in the other way: '12' for the int 12,
        12 for the str '12'. Raises ValueError naming an unknown id, TypeError for one that is
        neither an int nor a str.
        """
        if isinstance(external_ids, (str, bytes)):
            raise TypeError(f"got the single id {external_ids!r}; expected a sequence of ids")
        if isinstance(external_ids, np.ndarray):
            external_ids = external_ids.tolist()
        external_ids = list(external_ids)
        found = self.look_up_items(external_ids)
        unknown = np.flatnonzero(found == 0)
        if len(unknown):
            raise ValueError(
                f"unknown item id {external_ids[unknown[0]]!r} ({len(unknown)} of {len(found)} ids "
                f"are unknown); expected ids of the dataset, such as {self.item_ids[:3]}"
            )
        return found

    def look_up_items(self, external_ids: list) -> np.ndarray:
        """As `encode_items`, and 0 for an unknown id."""
        for kind in set(map(type, external_ids)):
            # Checked first: a dict finds True and 1.0 where it holds 1.
            if kind is bool or not issubclass(kind, (int, str, np.integer)):
                bad = next(item for item in external_ids if type(item) is kind)
                raise TypeError(
                    f"item id {reprlib.repr(bad)} is a {kind.__name__}; expected an int or a str"
                )
        index = self.item_index
        found = [index.get(item) or self._other_spelling(item) for item in external_ids]
        return np.array(found, dtype=np.int32)

    def _other_spelling(self, item: int | str) -> int:
        if not isinstance(item, str):
            return self.item_index.get(str(item), 0)
        # Only the spelling that an int prints as: '012' is some other id than 12.
        is_int = INTEGER.fullmatch(item) is not None
        return self.item_index.get(int(item), 0) if is_int else 0

    def popularity(self, split_end: str = "train") -> np.ndarray:
        """How often each item occurs up to the end of a part of every history: int64 [V].

        'train' leaves out both targets, 'val' the test target only, 'test' nothing.
        """
        if split_end not in HELD_OUT:
            raise ValueError(f"split_end={split_end!r}; expected one of {sorted(HELD_OUT)}")
        counts = np.zeros(self.item_num, dtype=np.int64)
        part = max(PART, self.item_num)
        for first in range(0, self.num_interactions, part):
            counts += np.bincount(self.items[first : first + part], minlength=self.item_num)
        for offsets in self.offset_parts(part):
            for back in range(1, HELD_OUT[split_end] + 1):
                held_out = offsets[1:][np.diff(offsets) >= back] - back
                counts -= np.bincount(self.items[held_out], minlength=self.item_num)
        return counts

    def offset_parts(self, users: int = PART) -> Iterator[np.ndarray]:
        """The offsets of so many users at a time, with where the last one ends."""
        for first in range(0, self.num_users, users):
            yield self.offsets[first : first + users + 1]

    def evaluated_users(self, split: str) -> int:
        """How many users have a nonempty input before the held-out item of 'val' or 'test'."""
        held_out = HELD_OUT[split] + 1
        return sum(int((np.diff(part) > held_out).sum()) for part in self.offset_parts())

    @property
    def fingerprint(self) -> int:
        """CRC-32 of the histories: that of `items`, continuing that of `offsets`."""
        return fingerprint(self.offsets, self.items)


def _check_array(name: str, array: np.ndarray, dtype: type) -> None:
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} is a {type(array).__name__}; expected a numpy array")
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype}; expected {np.dtype(dtype)}")
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; expected one dimension")


def _check_offsets(offsets: np.ndarray, total: int) -> None:
    if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != total:
        ends = [int(offsets[0]), int(offsets[-1])] if len(offsets) else []
        raise ValueError(f"offsets run from and to {ends}; expected [0, {total}], the item count")
    lengths = np.diff(offsets)
    short = np.flatnonzero(lengths < 1)
    if len(short):
        row = int(short[0])
        what = "decrease" if lengths[row] < 0 else f"give {lengths[row]} items"
        raise ValueError(
            f"offsets {what} at user row {row} ({offsets[row]} to {offsets[row + 1]}); expected "
            f"at least 1 item per user"
        )


def check_ids(name: str, ids: Sequence) -> None:
    """Raise unless `ids` is a list of distinct ints and strs; `Ids` were checked in converting."""
    if isinstance(ids, Ids):
        return
    if not isinstance(ids, list):
        raise TypeError(f"{name} is a {type(ids).__name__}; expected a list of int or str")
    if not set(map(type, ids)) <= ID_TYPES:
        bad = next(value for value in ids if type(value) not in ID_TYPES)
        raise TypeError(
            f"{name} has {reprlib.repr(bad)}, a {type(bad).__name__}; expected int or str"
        )
    if len(set(ids)) != len(ids):
        twice, _ = Counter(ids).most_common(1)[0]
        raise ValueError(f"{name} has {twice!r} more than once; expected distinct ids")


def flat_int64(rows: Iterable[Iterable[int]], total: int, what: str) -> np.ndarray:
    """The integers of all rows in one int64 array [total]; TypeError/ValueError for others."""
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    kinds = set(map(type, chain.from_iterable(rows)))
    wrong = tuple(kind for kind in kinds if kind is bool or not issubclass(kind, INT_TYPES))
    if wrong:
        at, bad = next(
            (at, value) for at, row in enumerate(rows) for value in row if type(value) in wrong
        )
        raise TypeError(
            f"{what}: row {at} has {reprlib.repr(bad)}, a {type(bad).__name__}; expected integers"
        )
    try:
        return np.fromiter(chain.from_iterable(rows), np.int64, total)
    except OverflowError as error:
        at, bad = next(
            (at, value) for at, row in enumerate(rows) for value in row if abs(value) >= 2**63
        )
        raise ValueError(f"{what}: row {at} has {bad}, which is not an int64") from error


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1] where runs of these lengths begin and end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def fingerprint(offsets: np.ndarray, items: np.ndarray) -> int:
    """CRC-32 of both arrays, one after the other."""
    found = 0
    for array in (offsets, items):
        for first in range(0, len(array), PART):
            found = zlib.crc32(np.ascontiguousarray(array[first : first + PART]).data, found)
    return found


def count_repeats(users: np.ndarray, items: np.ndarray) -> int:
    """How many (user, item) pairs, both non-negative integers, occurred before."""
    if len(users) == 0:
        return 0
    pairs = np.sort(users.astype(np.int64) * (int(items.max()) + 1) + items)
    return int((pairs[1:] == pairs[:-1]).sum())
