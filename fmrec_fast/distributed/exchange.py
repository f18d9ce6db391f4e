"""What ranks exchange for a sharded item table: rows of a batch, and sums over ranks.

Every function here is a collective: all ranks of the group call it, in the same order. Nothing
waits for a device but where it says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from torch import Tensor

# Named so since torch 2.13, which warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_shares: ContextVar[tuple[int, ...] | None] = ContextVar("fmrec_fast_batch_shares", default=None)


@contextmanager
def batch_shares(sizes: Sequence[int]) -> Iterator[None]:
    """Inside, `sizes[rank]` is the number of rows that each rank has of the global batch.

    The ops on a sharded table need them. Without this block the ranks tell each other at every
    call, for which the host waits for the device.
    """
    token = _shares.set(tuple(int(size) for size in sizes))
    try:
        yield
    finally:
        _shares.reset(token)


def shares(rows: int, group: dist.ProcessGroup, device: torch.device) -> tuple[int, ...]:
    """How many rows each rank has; this one has `rows`.

    Raises:
        ValueError: `batch_shares` says otherwise.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    given = _shares.get()
    if given is None:
        return exchange_sizes(rows, group, device)
    if len(given) != ranks or given[rank] != rows:
        raise ValueError(
            f"batch_shares must be {ranks} sizes with {rows} at rank {rank}, got {given}"
        )
    return given


def exchange_sizes(size: int, group: dist.ProcessGroup, device: torch.device) -> tuple[int, ...]:
    """`size` of every rank. The host waits for it."""
    ranks = dist.get_world_size(group)
    if ranks == 1:
        return (size,)
    own = torch.tensor([size], dtype=torch.int64, device=device)
    found = own.new_empty(ranks)
    _all_gather(found, own, group=group)
    return tuple(found.tolist())


def gather(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, in the ranks' order: [sizes[rank], ...] -> [sum(sizes), ...]."""
    most = max(sizes)
    if len(sizes) == 1 or most == 0:
        return x
    x = x.detach().contiguous()
    if len(x) < most:
        x = torch.cat((x, x.new_zeros(most - len(x), *x.shape[1:])))
    found = x.new_empty(len(sizes) * most, *x.shape[1:])
    _all_gather(found, x, group=group)
    if min(sizes) == most:
        return found
    return torch.cat([part[:size] for part, size in zip(found.split(most), sizes, strict=True)])


def to_owners(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Each rank's values for the rows of all: [sum(sizes), ...] -> [ranks, sizes[rank], ...], what
    the ranks have for the own rows."""
    ranks, own = len(sizes), sizes[dist.get_rank(group)]
    if ranks == 1:
        return x[None]
    found = exchange(x, sizes, [own] * ranks, group)
    return found.view(ranks, own, *x.shape[1:])


def exchange(
    x: Tensor, sent: Sequence[int], received: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """`sent[r]` rows of x to rank r, one after the other, and `received[r]` rows from it."""
    if len(sent) == 1:
        return x
    found = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(found, x.detach().contiguous(), list(received), list(sent), group=group)
    return found


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, sizes, group):
        ctx.constants = (sizes, group)
        found = gather(x, sizes, group)
        return x.view_as(x) if found is x else found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        # Added up in the ranks' order, so that the sum is the same each time.
        return to_owners(grad, *ctx.constants).sum(0), None, None


def gather_rows(x: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """`gather`, differentiable: the gradient of a row is the sum of all ranks' gradients of it."""
    return _Gather.apply(x, tuple(sizes), group)
