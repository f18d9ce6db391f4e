"""Embedding lookups in a table over ranks: ids go to their owners, rows come back.

An id that a rank asks for more than once is sent once, and so is the sum of its rows' gradients.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fmrec_fast.distributed.exchange import exchange
from fmrec_fast.distributed.items import Rows, own_rows, rows_of
from fmrec_fast.ops._checks import check_integer, check_range


class Plan(NamedTuple):
    """Who needs which rows."""

    asked: list[int]  # of each rank, how many rows this one asks for
    given: list[int]  # how many each rank asks of this one
    inverse: Tensor  # of each id, its place among the distinct ones
    wanted: Tensor  # the rows that others want, as rows of the own part
    rows: Rows


def make_plan(ids: Tensor, rows: Rows) -> Plan:
    """Exchange the ids [N]. The host waits for the device here, once to know how many distinct
    ids there are and once for the numbers of all ranks; nothing else of a lookup waits."""
    ranks = dist.get_world_size(rows.group)
    distinct, inverse = ids.unique(return_inverse=True)  # ascending, so by owner
    size = -(-rows.total // ranks)
    edges = torch.arange(1, ranks, device=ids.device) * size
    zero, end = edges.new_zeros(1), edges.new_full((1,), len(distinct))
    bounds = torch.cat((zero, torch.searchsorted(distinct, edges), end))
    asked = bounds.diff()
    given = exchange(asked, [1] * ranks, [1] * ranks, rows.group)
    sent, received = torch.stack((asked, given)).tolist()
    wanted = exchange(distinct, sent, received, rows.group) - rows.first
    return Plan(sent, received, inverse, wanted, rows)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own, plan):
        ctx.plan, ctx.like = plan, own.new_empty(0)
        found = exchange(own[plan.wanted], plan.given, plan.asked, plan.rows.group)
        return found[plan.inverse]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        plan = ctx.plan
        sums = torch.ops.aten.embedding_dense_backward
        of_distinct = sums(grad, plan.inverse, sum(plan.asked), -1, False)
        received = exchange(of_distinct, plan.asked, plan.given, plan.rows.group)
        count = plan.rows.last - plan.rows.first
        return sums(received, plan.wanted, count, -1, False), None


def look_up_sharded(table: Tensor, *ids: Tensor) -> tuple[Tensor, ...]:
    """``tuple(F.embedding(part, table) for part in ids)`` with one exchange; a collective.

    Args:
        table: DTensor [V, D], Shard(0).
        ids: this rank's own, int64 of any shapes, 0 .. V-1.

    Raises:
        TypeError, ValueError: dtypes, a table cut otherwise, or (on a CPU) an id out of range.
    """
    rows = rows_of("table", table)
    for part in ids:
        check_integer("ids", part)
        check_range("ids", part, 0, rows.total)
    flat = torch.cat([part.flatten() for part in ids])
    found = _LookUp.apply(own_rows(table), make_plan(flat, rows))
    parts = found.split([part.numel() for part in ids])
    return tuple(
        piece.view(*part.shape, table.shape[1]) for piece, part in zip(parts, ids, strict=True)
    )
