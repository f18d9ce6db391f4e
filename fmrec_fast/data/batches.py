"""Batches of left-padded histories, cut out of the flat item array by index arithmetic.

A sample is two positions in `Dataset.items`: where its user's history starts, and where its
input ends. A batch is one gather of [B, max_len] positions; there is no object per sample, and
nothing is built before it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .dataset import HELD_OUT, Dataset, flat_int64

Device = torch.device | str


class _Windows:
    """Inputs `items[start:end]` of S samples on one device.

    An index is int64 [B] on any device; one on the CPU is checked against 0..S-1 (checking one
    on an accelerator would make the host wait for it).
    """

    def __init__(
        self, dataset: Dataset, start: np.ndarray, end: np.ndarray, max_len: int, device: Device
    ) -> None:
        self.dataset = dataset
        self.max_len = _positive("max_len", max_len)
        self.device = torch.device(device)
        self.items = _to_tensor(dataset.items, self.device)
        # Half the memory, and datasets with more interactions than int32 counts still work.
        position = np.int32 if dataset.num_interactions < 2**31 else np.int64
        self.start = _to_tensor(start.astype(position), self.device)
        self.end = _to_tensor(end.astype(position), self.device)
        self._back = torch.arange(-self.max_len, 0, device=self.device)

    def __len__(self) -> int:
        return len(self.end)

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
        return index.to(self.device, non_blocking=True)

    def _gather(self, index: Tensor, back: Tensor, padding: int) -> Tensor:
        """items[end + back] int64 [B, len(back)], `padding` before the start of the history."""
        position = self.end[index].long()[:, None] + back
        inside = position >= self.start[index][:, None]
        return torch.where(inside, self.items[position.clamp_(min=0)].long(), padding)


class TrainingSamples(_Windows):
    """Every prefix of `train` with at least 2 items: its last item from the up to L before it.

    Samples are ordered by user row, then by the prefix's length. Holds the items (int32) and two
    positions a sample (int32), on `device`.
    """

    def __init__(self, dataset: Dataset, max_len: int, device: Device = "cpu") -> None:
        first = dataset.offsets[:-1]
        counts = np.maximum(np.diff(dataset.offsets) - HELD_OUT["train"] - 1, 0)
        start = np.repeat(first, counts)
        within = np.arange(len(start)) - np.repeat(np.cumsum(counts) - counts, counts)
        super().__init__(dataset, start, start + within + 1, max_len, device)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """index int64 [B] -> sequence int64 [B, max_len] left-padded with 0, target int64 [B, 1].

        Raises TypeError if the index is not an int64 tensor, ValueError if it is not [B] or, on
        the CPU, out of 0..len-1.
        """
        index = self._index(index)
        target = self.items[self.end[index].long()].long()
        return self._gather(index, self._back, 0), target[:, None]

    def epoch_order(self, seed: int, epoch: int) -> Tensor:
        """The permutation int64 [len] of one epoch, on `device`: a function of (seed, epoch).

        It is drawn on the CPU, so that every device trains in the same order. Raises ValueError
        for a negative seed or epoch.
        """
        for name, value in (("seed", seed), ("epoch", epoch)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise TypeError(f"{name}={value!r}; expected an integer")
            if value < 0:
                raise ValueError(f"{name}={value}; expected 0 or more")
        words = np.random.SeedSequence(int(seed), spawn_key=(int(epoch),))
        generator = torch.Generator().manual_seed(int(words.generate_state(1, np.uint64)[0]))
        return torch.randperm(len(self), generator=generator).to(self.device)


class _UserWindows(_Windows):
    """One sample a user; `users` int64 [S] are the user rows of the samples."""

    def __init__(
        self, dataset: Dataset, users: np.ndarray, held_out: int, max_len: int, device: Device
    ) -> None:
        start, end = dataset.offsets[users], dataset.offsets[users + 1] - held_out
        super().__init__(dataset, start, end, max_len, device)
        self.users = _to_tensor(users, self.device)
        self._lengths = torch.from_numpy(end - start)

    def seen(self, index: Tensor) -> Tensor:
        """The ids of the whole inputs, not only their last max_len: int64 [B, E], padded with -1.

        E is the longest of these inputs. An item that occurs twice is there twice. An index on
        the CPU costs no wait for the device; one on the device costs one.
        """
        index_on_device = self._index(index)
        lengths = self._lengths[index.cpu()]
        longest = int(lengths.max()) if len(lengths) else 0
        back = torch.arange(-longest, 0, device=self.device)
        return self._gather(index_on_device, back, -1)


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
        users = np.flatnonzero(np.diff(dataset.offsets) > held_out)
        super().__init__(dataset, users, held_out, max_len, device)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """index int64 [B] -> sequence int64 [B, max_len] left-padded with 0, target int64 [B].

        Raises as TrainingSamples.batch.
        """
        index = self._index(index)
        target = self.items[self.end[index].long()].long()
        return self._gather(index, self._back, 0), target


class LatestHistories(_UserWindows):
    """The whole history of every user, to recommend what comes after it."""

    def __init__(self, dataset: Dataset, max_len: int, device: Device = "cpu") -> None:
        super().__init__(dataset, np.arange(dataset.num_users), 0, max_len, device)

    def batch(self, index: Tensor) -> Tensor:
        """index int64 [B] -> sequence int64 [B, max_len] left-padded with 0.

        Raises as TrainingSamples.batch.
        """
        return self._gather(self._index(index), self._back, 0)


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
