"""Definition of `item_ranking`: top-k items and the target's rank."""

from __future__ import annotations

import torch
from torch import Tensor


def _scores(rep: Tensor, item_weight: Tensor) -> Tensor:
    return rep @ item_weight.T


def _excluded(exclude: Tensor, num_items: int) -> Tensor:
    """bool [B, V], True at the ids listed in `exclude` [B, E]; -1 lists nothing."""
    hit = torch.zeros(exclude.shape[0], num_items + 1, dtype=torch.bool, device=exclude.device)
    return hit.scatter_(1, torch.where(exclude < 0, num_items, exclude), True)[:, :num_items]


def _ordered(scores: Tensor) -> Tensor:
    """int64 that compare as (score, lower id first): a total order without ties."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # + 0.0 turns -0.0 into 0.0
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ids = torch.arange(scores.shape[1], device=scores.device)
    return (bits << 32) | (0xFFFFFFFF - ids)


def item_topk(
    rep: Tensor, item_weight: Tensor, k: int, *, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k best of ``rep @ item_weight.T``, ties towards the lower id."""
    scores = _scores(rep, item_weight)
    if exclude is not None:
        scores = scores.masked_fill(_excluded(exclude, scores.shape[1]), -torch.inf)
    ids = torch.topk(_ordered(scores), k, dim=1).indices
    return scores.gather(1, ids), ids


def target_rank(
    rep: Tensor, item_weight: Tensor, target: Tensor, *, exclude: Tensor | None = None
) -> Tensor:
    """1 + number of items before the target, in the order of `item_topk`.

    What does not compare (NaN) counts as before, so that a broken model does not rank well.
    """
    scores = _scores(rep, item_weight)
    of_target = scores.gather(1, target[:, None])
    ids = torch.arange(scores.shape[1], device=scores.device)
    behind = (scores < of_target) | ((scores == of_target) & (ids > target[:, None]))
    before = ~behind & (ids != target[:, None])
    if exclude is not None:
        before &= ~_excluded(exclude, scores.shape[1])
    return before.sum(1) + 1
