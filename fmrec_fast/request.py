"""A request for recommendations: its arguments, checked and in the form that the kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fmrec_fast.data.batches import pad_histories
from fmrec_fast.models.recommender import FMRecommender
from fmrec_fast.ops._checks import check_padding, request_rows
from fmrec_fast.sampler import check_steps

PADDING = 0


class Recommendations(NamedTuple):
    """`ids` int64 [B, k] and `scores` float32 [B, k], best first."""

    ids: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Request:
    """`sequences` [B, L] and `rows` [B] int64, on the model's device; `excluded` ids per row, as
    lists or already as `exclude` gives them."""

    sequences: Tensor
    rows: Tensor
    excluded: list[list[int]] | Tensor
    k: int
    steps: int
    padding: str

    def exclude(self, part: slice) -> Tensor:
        """Excluded ids of some rows as int64 [B, E], padding among them, -1 in short rows."""
        if isinstance(self.excluded, Tensor):
            return self.excluded[part]
        lists = [[PADDING, *row] for row in self.excluded[part]]
        width = max((len(row) for row in lists), default=1)
        return torch.tensor(
            [row + [-1] * (width - len(row)) for row in lists],
            dtype=torch.int64,
            device=self.sequences.device,
        ).reshape(len(lists), width)


def check_k(model: FMRecommender, k: int) -> None:
    """`k` must be between 1 and the number of real items.

    Raises:
        ValueError: it is not.
    """
    if not 1 <= k < model.item_num:
        raise ValueError(f"k must be in 1 .. {model.item_num - 1} (number of items), got {k}")


def read_request(
    model: FMRecommender,
    histories: Sequence[Sequence[int]],
    k: int,
    *,
    exclude_seen: bool,
    exclude: Sequence[Sequence[int]] | None,
    steps: int | None,
    rows: Tensor | None,
    padding: str,
) -> Request:
    """The arguments of `recommend`, checked.

    Raises:
        TypeError, ValueError: see `recommend`.
    """
    check_k(model, k)
    check_steps(steps)
    check_padding(padding)
    device = model.item_embeddings.weight.device
    sequences = pad_histories(histories, model.config.max_len, model.item_num, device)
    if exclude is not None and len(exclude) != len(histories):
        raise ValueError(
            f"exclude must have one list for each of {len(histories)} histories, got {len(exclude)}"
        )
    excluded = [
        [*(histories[i] if exclude_seen else ()), *(exclude[i] if exclude is not None else ())]
        for i in range(len(histories))
    ]
    for i, row in enumerate(exclude if exclude is not None else ()):
        for item in row:
            if not -1 <= item < model.item_num:
                raise ValueError(
                    f"exclude must be in 0 .. {model.item_num - 1}, or -1 (no item), "
                    f"got {item} in list {i}"
                )
    return Request(
        sequences=sequences,
        rows=request_rows(rows, len(histories), device),
        excluded=excluded,
        k=k,
        steps=model.fm.steps if steps is None else steps,
        padding=padding,
    )
