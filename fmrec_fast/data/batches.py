"""Batches of left-padded histories, cut out of the flat item array by index arithmetic.

A sample is two positions in `Dataset.items`: where its user's history starts, and where its
input ends. A batch is one gather of [B, max_len] positions; there is no object per sample, and
nothing is built before it is asked for. Of a mapped dataset not even these positions are stored.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .dataset import HELD_OUT, Dataset, flat_int64
from .mapped import MappedDataset
from .permutation import ROUNDS, KeyedPermutation

Device = torch.device | str
# The most samples of a mapped dataset whose order is drawn and stored, as in memory: 128 MB.
STORED_ORDER = 1 << 24


class _Spans:
    """Where the samples of a mapped dataset are, found when they are asked for.

    A user of n items has `count(n)` samples. In memory is only how many there are before every
    `USERS`-th user: 8 bytes for 256 users, whose offsets the rest of the way goes along.
    """

    USERS = 256

    def __init__(self, dataset: Dataset, count: Callable[[np.ndarray], np.ndarray]) -> None:
        self.offsets, self.count = dataset.offsets, count
        sums = [np.zeros(1, np.int64)]
        for part in dataset.offset_parts():  # of a multiple of USERS, but for the last
            counts = count(np.diff(part)).astype(np.int64)
            sums.append(np.add.reduceat(counts, np.arange(0, len(counts), self.USERS)))
        self.before = np.cumsum(np.concatenate(sums))

    def __len__(self) -> int:
        return int(self.before[-1])

    def find(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The user row of each sample, and which of the user's samples it is: int64 [B] each."""
        block = np.searchsorted(self.before, samples, side="right") - 1
        rows = block[:, None] * self.USERS + np.arange(self.USERS + 1)
        offsets = self.offsets[np.minimum(rows, len(self.offsets) - 1)]  # [B, USERS + 1]
        upto = np.cumsum(self.count(np.diff(offsets, axis=1)), axis=1)  # [B, USERS]
        place = samples - self.before[block]
        user = (upto <= place[:, None]).sum(axis=1)
        before = np.take_along_axis(upto, np.maximum(user - 1, 0)[:, None], axis=1)[:, 0]
        return block * self.USERS + user, place - np.where(user > 0, before, 0)


class _Windows(ABC):
    """Inputs `items[start:end]` of S samples, for one device.

    An index is int64 [B] on any device; one on the CPU is checked against 0..S-1 (checking one
    on an accelerator would make the host wait for it).

    A dataset in memory is put on the device with its samples, int32. A mapped one stays in its
    file: `_find` says where samples are, the CPU gathers them, and only batches go to the device.
    An index of these is best on the CPU.
    """

    def __init__(self, dataset: Dataset, max_len: int, device: Device) -> None:
        self.dataset = dataset
        self.max_len = _positive("max_len", max_len)
        self.device = torch.device(device)
        self.mapped = isinstance(dataset, MappedDataset)

    def _hold(self, start: np.ndarray, end: np.ndarray) -> None:
        """Keep the samples of a dataset in memory."""
        self.items = _to_tensor(self.dataset.items, self.device)
        # Half the memory, and datasets with more interactions than int32 counts still work.
        position = np.int32 if self.dataset.num_interactions < 2**31 else np.int64
        self.start = _to_tensor(start.astype(position), self.device)
        self.end = _to_tensor(end.astype(position), self.device)
        self._back = torch.arange(-self.max_len, 0, device=self.device)

    @abstractmethod
    def _find(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """start and end, int64 [B], of samples of a mapped dataset"""

    @abstractmethod
    def _count(self) -> int:
        """S of a mapped dataset"""

    def __len__(self) -> int:
        return self._count() if self.mapped else len(self.end)

    def _index(self, index: Tensor) -> Tensor:
        if not isinstance(index, Tensor) or index.dtype != torch.int64:
            got = index.dtype if isinstance(index, Tensor) else type(index).__name__
            raise TypeError(f"index is {got}; expected an int64 tensor")
        if index.dim() != 1:
            raise ValueError(f"index has shape {tuple(index.shape)}; expected [B]")
        if index.device.type == "cpu" and len(index):
            low, high = torch.aminmax(index)
            if low < 0 or high >= len(self):
                bad = int(low) if low < 0 else int(high)
                raise ValueError(f"index {bad}; expected 0..{len(self) - 1}")
        return index.to("cpu" if self.mapped else self.device, non_blocking=not self.mapped)

    def fetch(self, index: Tensor) -> Tensor:
        """What `cut` makes a batch of, on the device: the only part that needs the host.

        The index itself, or of a mapped dataset the items, int32 [B, max_len + 1]. Raises TypeError
        if the index is not an int64 tensor, ValueError if it is not [B] or, on the CPU, out of
        0..len-1.
        """
        index = self._index(index)
        return self._gathered(index, 0, following=1) if self.mapped else index

    def _sequence(self, fetched: Tensor) -> Tensor:
        """int64 [B, max_len]"""
        if self.mapped:
            return fetched[:, : self.max_len].long()
        return self._gather(fetched, self._back, 0)

    def _following(self, fetched: Tensor) -> Tensor:
        """The item after each input, int64 [B]"""
        if self.mapped:
            return fetched[:, self.max_len].long()
        return self.items[self.end[fetched].long()].long()

    def _gather(self, index: Tensor, back: Tensor, padding: int) -> Tensor:
        """items[end + back] int64 [B, len(back)], `padding` before the start of the history."""
        position = self.end[index].long()[:, None] + back
        inside = position >= self.start[index][:, None]
        return torch.where(inside, self.items[position.clamp_(min=0)].long(), padding)

    def _gathered(
        self, index: Tensor, padding: int, following: int = 0, width: int | None = None
    ) -> Tensor:
        """The same of a mapped dataset: the last `width` items, int32, and the `following` ones."""
        start, end = (array[:, None] for array in self._find(index.numpy()))
        width = self.max_len if width is None else width
        position = end + np.arange(-width, following)
        found = self.dataset.items[np.maximum(position, start)]  # a copy, which may be written
        found[position < start] = padding
        rows = torch.from_numpy(found)
        if self.device.type == "cuda":
            rows = rows.pin_memory()
        return rows.to(self.device, non_blocking=True)


class TrainingSamples(_Windows):
    """Every prefix of `train` with at least 2 items: its last item from the up to L before it.

    Samples are ordered by user row, then by the prefix's length. Holds the items (int32) and two
    positions a sample (int32), on `device`; of a mapped dataset, 8 bytes for 256 users.
    """

    def __init__(self, dataset: Dataset, max_len: int, device: Device = "cpu") -> None:
        super().__init__(dataset, max_len, device)
        if self.mapped:
            self._spans = _Spans(dataset, _training_samples)
            return
        first = dataset.offsets[:-1]
        counts = _training_samples(np.diff(dataset.offsets))
        start = np.repeat(first, counts)
        within = np.arange(len(start)) - np.repeat(np.cumsum(counts) - counts, counts)
        self._hold(start, start + within + 1)

    def _find(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        user, within = self._spans.find(samples)
        start = self.dataset.offsets[user]
        return start, start + within + 1

    def _count(self) -> int:
        return len(self._spans)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """index int64 [B] -> sequence int64 [B, max_len] left-padded with 0, target int64 [B, 1].

        Raises as `fetch`.
        """
        return self.cut(self.fetch(index))

    def cut(self, fetched: Tensor) -> tuple[Tensor, Tensor]:
        """The batch of what `fetch` gave."""
        return self._sequence(fetched), self._following(fetched)[:, None]

    def epoch_order(self, seed: int, epoch: int) -> Tensor | KeyedPermutation:
        """The permutation of one epoch, a function of (seed, epoch), to be sliced: int64.

        It is drawn on the CPU, so that every device trains in the same order, and lies on `device`
        (of a mapped dataset, on the CPU). Of a mapped dataset with more than `STORED_ORDER` samples
        it is not stored but computed where it is sliced. Raises ValueError for a negative seed or
        epoch.
        """
        for name, value in (("seed", seed), ("epoch", epoch)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name}={value!r}; expected an integer")
            if value < 0:
                raise ValueError(f"{name}={value}; expected 0 or more")
        words = np.random.SeedSequence(int(seed), spawn_key=(int(epoch),))
        if self.mapped and len(self) > STORED_ORDER:
            return KeyedPermutation(len(self), words.generate_state(ROUNDS, np.uint64))
        generator = torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0]))
        order = torch.randperm(len(self), generator=generator)
        return order if self.mapped else order.to(self.device)


def _training_samples(lengths: np.ndarray) -> np.ndarray:
    return np.maximum(lengths - HELD_OUT["train"] - 1, 0)


class _UserWindows(_Windows):
    """One sample for each user with more than `least` items, up to its last `held_out` items."""

    def __init__(
        self, dataset: Dataset, least: int, held_out: int, max_len: int, device: Device
    ) -> None:
        super().__init__(dataset, max_len, device)
        self._held_out = held_out
        if self.mapped:
            self._spans = _Spans(dataset, lambda lengths: lengths > least)
            return
        users = np.flatnonzero(np.diff(dataset.offsets) > least)
        start, end = dataset.offsets[users], dataset.offsets[users + 1] - held_out
        self._hold(start, end)
        self._users = _to_tensor(users, self.device)
        self._lengths = torch.from_numpy(end - start)

    def _find(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        user, _ = self._spans.find(samples)
        return self.dataset.offsets[user], self.dataset.offsets[user + 1] - self._held_out

    def _count(self) -> int:
        return len(self._spans)

    @property
    def users(self) -> Tensor:
        """The user rows of all samples, int64 [S]."""
        return self.user_rows(torch.arange(len(self))) if self.mapped else self._users

    def user_rows(self, index: Tensor) -> Tensor:
        """The user rows of these samples, int64 [B], on `device`. Raises as `fetch`."""
        index = self._index(index)
        if not self.mapped:
            return self._users[index]
        return torch.from_numpy(self._spans.find(index.numpy())[0]).to(self.device)

    def seen(self, index: Tensor) -> Tensor:
        """The ids of the whole inputs, not only their last max_len: int64 [B, E], padded with -1.

        E is the longest of these inputs. An item that occurs twice is there twice. An index on
        the CPU costs no wait for the device; one on the device costs one.
        """
        there = self._index(index)
        if self.mapped:
            start, end = self._find(there.numpy())
            return self._gathered(there, -1, width=int((end - start).max(initial=0))).long()
        lengths = self._lengths[index.cpu()]
        longest = int(lengths.max()) if len(lengths) else 0
        return self._gather(there, torch.arange(-longest, 0, device=self.device), -1)


class EvaluationSamples(_UserWindows):
    """The held-out item of each user that has a nonempty input before it.

    split 'val': input `train`, target the last item but one; split 'test': input `train` and the
    validation item, target the last item. Raises ValueError for another split.
    """

    def __init__(self, dataset: Dataset, split: str, max_len: int, device: Device = "cpu") -> None:
        if split not in ("val", "test"):
            raise ValueError(f"split={split!r}; expected 'val' or 'test'")
        self.split = split
        held_out = HELD_OUT[split] + 1
        super().__init__(dataset, held_out, held_out, max_len, device)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """index int64 [B] -> sequence int64 [B, max_len] left-padded with 0, target int64 [B].

        Raises as `fetch`.
        """
        fetched = self.fetch(index)
        return self._sequence(fetched), self._following(fetched)


class LatestHistories(_UserWindows):
    """The whole history of every user, to recommend what comes after it."""

    def __init__(self, dataset: Dataset, max_len: int, device: Device = "cpu") -> None:
        super().__init__(dataset, 0, 0, max_len, device)

    def batch(self, index: Tensor) -> Tensor:
        """index int64 [B] -> sequence int64 [B, max_len] left-padded with 0.

        Raises as `fetch`.
        """
        return self._sequence(self.fetch(index))

    def fetch(self, index: Tensor) -> Tensor:
        """As of other samples, but nothing follows these."""
        index = self._index(index)
        return self._gathered(index, 0) if self.mapped else index


def pad_histories(
    histories: Sequence[Sequence[int]], max_len: int, item_num: int, device: Device = "cpu"
) -> Tensor:
    """Ragged histories of internal ids -> their last max_len items, int64 [B, max_len].

    Left-padded with 0; no histories give [0, max_len]. Raises ValueError, naming the row and the
    value, for an empty history, an id out of 1..item_num-1, or one that is not an integer; the
    whole history is checked.
    """
    max_len, item_num = _positive("max_len", max_len), _positive("item_num", item_num)
    for row, history in enumerate(histories):
        _check_history(row, history)
    lengths = np.fromiter(map(len, histories), np.int64, len(histories))
    try:
        ids = flat_int64(histories, int(lengths.sum()), "histories")
    except TypeError as error:
        raise ValueError(str(error)) from error
    rows = np.repeat(np.arange(len(lengths)), lengths)
    outside = np.flatnonzero((ids < 1) | (ids >= item_num))
    if len(outside):
        at = outside[0]
        raise ValueError(f"history {rows[at]} has item id {ids[at]}; expected 1..{item_num - 1}")
    # An item's column counts from the right: a history's last item is in the last column.
    columns = np.arange(len(ids)) - np.repeat(np.cumsum(lengths), lengths) + max_len
    inside = columns >= 0
    padded = np.zeros((len(lengths), max_len), dtype=np.int64)
    padded[rows[inside], columns[inside]] = ids[inside]
    return torch.from_numpy(padded).to(device)


def _check_history(row: int, history: object) -> None:
    if isinstance(history, (str, bytes)) or not hasattr(history, "__len__"):
        raise ValueError(f"history {row} is {history!r}; expected a sequence of item ids")
    if len(history) == 0:
        raise ValueError(f"history {row} is empty; expected at least 1 item id")


def _positive(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}={value!r}; expected an integer")
    if value < 1:
        raise ValueError(f"{name}={value}; expected 1 or more")
    return int(value)


def _to_tensor(array: np.ndarray, device: torch.device) -> Tensor:
    # torch takes neither read-only arrays (without a warning) nor negative strides.
    return torch.from_numpy(np.require(array, requirements=["C", "W"])).to(device)
