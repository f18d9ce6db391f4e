"""`item_topk` and `target_rank` with the items over ranks: each ranks its own items for the rows of
all, and the rows' owners merge. Scores are the same bits wherever an item lies, and ties go to the
lower id, so the results are those of the whole table to the bit."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fmrec_fast.distributed.exchange import exchange_sizes, gather, shares, to_owners
from fmrec_fast.distributed.items import Rows, own_rows, rows_of
from fmrec_fast.ops import item_ranking as op
from fmrec_fast.ops._checks import check_range
from fmrec_fast.reference.item_ranking import NO_KEY, as_keys, as_order, from_keys


def _own(item_weight: Tensor, bias: Tensor | None) -> tuple[Rows, Tensor, Tensor | None]:
    rows = rows_of("item_weight", item_weight)
    if bias is not None:
        rows_of("bias", bias)
        bias = own_rows(bias)
    return rows, own_rows(item_weight), bias


def _lists(name: str, ids: Tensor | None, sizes: tuple[int, ...], rows: Rows) -> Tensor | None:
    """The ids [B, n] of all ranks' rows as rows of the own part. A list may be longer on one rank
    than on another; the host waits for the longest."""
    if ids is None:
        return None
    check_range(name, ids, 0, rows.total, {-1: "no item"})
    most = max(exchange_sizes(ids.shape[1], rows.group, ids.device))
    ids = torch.cat((ids, ids.new_full((len(ids), most - ids.shape[1]), -1)), 1)
    return rows.local(gather(ids, sizes, rows.group))


@torch.no_grad()
def item_topk(
    rep: Tensor,
    item_weight: Tensor,
    k: int,
    bias: Tensor | None,
    exclude: Tensor | None,
    candidates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The public op for a DTensor `item_weight`, its arguments checked."""
    rows, weight, bias = _own(item_weight, bias)
    sizes = shares(len(rep), rows.group, rep.device)
    rep = gather(rep, sizes, rows.group)
    exclude = _lists("exclude", exclude, sizes, rows)
    if candidates is not None and candidates.ndim == 2:
        candidates = _lists("candidates", candidates, sizes, rows)
    elif candidates is not None:
        check_range("candidates", candidates, 0, rows.total, {-1: "no item"})
        candidates = rows.local(candidates)
    keys = torch.full((len(rep), k), NO_KEY, device=rep.device)
    if len(weight):
        most = min(k, len(weight) if candidates is None else candidates.shape[-1])
        scores, ids = op._item_topk(rep, weight, most, None, bias, exclude, candidates)
        found = as_keys(as_order(scores), ids + rows.first)
        keys[:, :most] = found.masked_fill(ids < 0, NO_KEY)
    merged = to_owners(keys, sizes, rows.group)  # [ranks, b, k]
    return from_keys(merged.transpose(0, 1).flatten(1).topk(k).values)


@torch.no_grad()
def target_rank(
    rep: Tensor,
    item_weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    exclude: Tensor | None,
) -> Tensor:
    """The public op for a DTensor `item_weight`, its arguments checked."""
    rows, weight, bias = _own(item_weight, bias)
    check_range("target", target, 0, rows.total)
    sizes = shares(len(rep), rows.group, rep.device)
    rep, target = (gather(part, sizes, rows.group) for part in (rep, target))
    exclude = _lists("exclude", exclude, sizes, rows)
    of_target = torch.zeros(len(rep), device=rep.device)
    if len(weight):
        place = rows.local(target)
        own = op._target_scores(rep, weight, place.clamp(min=0), bias)
        of_target = torch.where(place >= 0, own, 0)
    dist.all_reduce(of_target, group=rows.group)  # one rank's score and zeros
    ahead = torch.zeros_like(target)
    if len(weight):
        ahead = op._target_rank(rep, weight, target - rows.first, bias, exclude, of_target) - 1
    return 1 + to_owners(ahead, sizes, rows.group).sum(0)
