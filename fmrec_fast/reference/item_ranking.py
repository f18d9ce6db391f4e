"""Definition of `item_ranking`: top-k items and the target's rank, a chunk of items at a time.

Items are compared by 64-bit keys: the score, as an integer in the same order, above the
complement of the id. So all items of a row differ, and ties fall to the lower id.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Scores held at a time: few enough for the caches.
CHUNK = 1 << 20
# Chunks are products of this many items, so that each item falls into a whole tile of the matrix
# product: at a ragged edge equal items could get scores of different rounding.
TILE = 64
NO_ITEM = torch.iinfo(torch.int32).min  # in place of a score: below -inf
NO_KEY = torch.iinfo(torch.int64).min
LAST_ID = 0xFFFFFFFF


def as_order(scores: Tensor) -> Tensor:
    """int32 that compare as the float32 scores do; zeros are equal, NaN is above everything."""
    bits = torch.where(scores.isnan(), torch.nan, scores + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def as_keys(order: Tensor, ids: Tensor) -> Tensor:
    """(order, lower id first) as one int64; NO_KEY where the order is NO_ITEM."""
    return torch.where(order == NO_ITEM, NO_KEY, (order.long() << 32) | (LAST_ID - ids))


def from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Scores and ids; -inf and -1 where there is no item."""
    order = (keys >> 32).int()
    scores = (order ^ ((order >> 31) & 0x7FFFFFFF)).view(torch.float32)
    missing = keys == NO_KEY
    ids = LAST_ID - (keys & LAST_ID)
    return scores.masked_fill(missing, -torch.inf), ids.masked_fill(missing, -1)


def best_keys(order: Tensor, ids: Tensor, k: int) -> Tensor:
    """The keys of a chunk's k best (or all, where they are fewer), not in order.

    `topk` leaves open which of the items that tie with the k-th it gives, so they are chosen by
    their ids. (A `topk` of the keys would do it in one, in four times the time.)
    """
    if order.shape[1] <= k:
        return as_keys(order, ids)
    top = order.topk(k)
    kth = top.values[:, -1:]
    above = torch.where(top.values > kth, top.values, NO_ITEM)
    tied = torch.where(order == kth, ids.int(), torch.iinfo(torch.int32).max)
    tied = tied.topk(k, largest=False).values.long()
    tied_keys = as_keys(kth, tied).masked_fill(tied == torch.iinfo(torch.int32).max, NO_KEY)
    of_above = ids.expand(order.shape).gather(1, top.indices)
    return torch.cat((as_keys(above, of_above), tied_keys), dim=1)


def _width(rows: int, items: int) -> int:
    """Items of a chunk."""
    tiles = max(min(CHUNK // max(rows, 1) // TILE, -(-items // TILE)), 1)
    return tiles * TILE


def _product(rep: Tensor, part: Tensor, scale: Tensor | None, width: int) -> Tensor:
    scores = (rep @ F.pad(part.to(rep.dtype), (0, 0, 0, width - len(part))).T)[:, : len(part)]
    return scores if scale is None else scores * scale


def _excluded(exclude: Tensor, first: int, count: int) -> Tensor:
    """bool [B, count], True at the ids first .. first + count - 1 that `exclude` [B, E] lists."""
    hit = torch.zeros(exclude.shape[0], count + 1, dtype=torch.bool, device=exclude.device)
    place = exclude - first
    inside = (place >= 0) & (place < count)
    return hit.scatter_(1, torch.where(inside, place, count), True)[:, :count]


def _listed(ids: Tensor, exclude: Tensor) -> Tensor:
    """bool, like ids [B, C]: whether the row of `exclude` [B, E] lists it."""
    if exclude.shape[1] == 0:
        return torch.zeros_like(ids, dtype=torch.bool)
    ordered = exclude.sort(dim=1).values
    place = torch.searchsorted(ordered, ids.contiguous()).clamp(max=exclude.shape[1] - 1)
    return ordered.gather(1, place) == ids


def _all_items(rep, item_weight, scale, bias, exclude) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (order [B, n], ids [n])."""
    items = item_weight.shape[0]
    width = _width(rep.shape[0], items)
    for first in range(0, items, width):
        part = slice(first, min(first + width, items))
        scores = _product(rep, item_weight[part], None if scale is None else scale[part], width)
        order = as_order(scores if bias is None else scores + bias[part])
        if exclude is not None:
            hit = _excluded(exclude, first, order.shape[1])
            order = order.masked_fill(hit, NO_ITEM)
        yield order, torch.arange(first, part.stop, device=rep.device)


def without_repeats(candidates: Tensor) -> Tensor:
    """Ascending along the last axis, -1 in place of an id that is there already."""
    candidates = candidates.sort(dim=-1).values
    again = torch.zeros_like(candidates, dtype=torch.bool)
    again[..., 1:] = candidates[..., 1:] == candidates[..., :-1]
    return candidates.masked_fill(again, -1)


def candidate_keys(
    products: Tensor,
    ids: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    exclude: Tensor | None,
) -> Tensor:
    """The keys of candidates [B, n] or [n] with the given inner products [B, n]."""
    return as_keys(_candidate_order(products, ids, scale, bias, exclude), ids)


def _candidate_order(products, ids, scale, bias, exclude) -> Tensor:
    at = ids.clamp(min=0)
    scores = products if scale is None else products * scale[at]
    order = as_order(scores if bias is None else scores + bias[at])
    missing = (ids < 0).expand(order.shape)
    if exclude is not None:
        missing = missing | _listed(ids.expand(order.shape), exclude)
    return order.masked_fill(missing, NO_ITEM)


def _candidates(
    rep, item_weight, scale, bias, exclude, candidates
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of (order [B, n], ids [B, n] or [n])."""
    candidates = without_repeats(candidates)
    shared, count = candidates.ndim == 1, candidates.shape[-1]
    width = _width(rep.shape[0] * (1 if shared else rep.shape[1]), count)
    for first in range(0, count, width):
        ids = candidates[..., first : first + width]
        part = item_weight[ids.clamp(min=0)]
        if shared:
            products = _product(rep, part, None, width)
        else:
            products = (part.to(rep.dtype) * rep[:, None]).sum(-1)
        yield _candidate_order(products, ids, scale, bias, exclude), ids


def item_topk(
    rep: Tensor,
    item_weight: Tensor,
    k: int,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    candidates: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best of ``rep @ (scale[:, None] * item_weight).T + bias``, ties towards the lower id.

    rep and bias are float32, item_weight of any dtype.
    """
    if candidates is None:
        chunks = _all_items(rep, item_weight, scale, bias, exclude)
    else:
        chunks = _candidates(rep, item_weight, scale, bias, exclude, candidates)
    keys = torch.full((rep.shape[0], k), NO_KEY, device=rep.device)
    for order, ids in chunks:
        keys = torch.cat((keys, best_keys(order, ids, k)), dim=1).topk(k).values
    return from_keys(keys)


def target_rank(
    rep: Tensor,
    item_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    of_target: Tensor | None = None,
) -> Tensor:
    """1 + number of items before the target, in the order of `item_topk`.

    What does not compare (NaN) counts as before, so that a broken model does not rank well.
    `of_target` [B] are the targets' scores, where these may be items of another table: then
    `target` is where they would be beside these, below 0 or beyond V.
    """
    rows, items = rep.shape[0], item_weight.shape[0]
    width = _width(rows, items)
    if of_target is None:
        of_target = target_scores(rep, item_weight, target, bias=bias)
    ranks = torch.ones_like(target)
    for first in range(0, items, width):
        part = slice(first, min(first + width, items))
        scores = _scores_of(rep, item_weight, bias, part, width)
        ids = torch.arange(part.start, part.stop, device=rep.device)
        ties_ahead = ids < target[:, None]
        wanted = of_target[:, None]
        ahead = torch.where(ties_ahead, ~(scores < wanted), ~(scores <= wanted))
        ahead &= ids != target[:, None]
        if exclude is not None:
            ahead &= ~_excluded(exclude, first, scores.shape[1])
        ranks += ahead.sum(1)
    return ranks


def target_scores(
    rep: Tensor, item_weight: Tensor, target: Tensor, *, bias: Tensor | None = None
) -> Tensor:
    """The score of each row's target: [B]."""
    rows, items = rep.shape[0], item_weight.shape[0]
    width = _width(rows, items)
    # By products of the same shape as the others, so that equal items get equal scores.
    if items <= width:
        whole = _scores_of(rep, item_weight, bias, slice(0, items), width)
        return whole.gather(1, target[:, None])[:, 0]
    starts = range(0, rows, width)
    own = [
        _scores_of(rep, item_weight, bias, target[row : row + width], width).diagonal(-row)
        for row in starts
    ]
    return torch.cat(own) if own else rep.new_empty(0)


def _scores_of(
    rep: Tensor, item_weight: Tensor, bias: Tensor | None, at: Tensor | slice, width: int
) -> Tensor:
    scores = _product(rep, item_weight[at], None, width)
    return scores if bias is None else scores + bias[at]
