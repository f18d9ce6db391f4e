"""The modules with a row for each item: what a catalogue's size is felt in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrec_fast.ops._checks import is_sharded

# A table of a shape, filled by a function that draws in place from torch's default generator.
Maker = Callable[[tuple[int, ...], Callable[[Tensor], object]], nn.Parameter]


def _plain(shape: tuple[int, ...], fill: Callable[[Tensor], object]) -> nn.Parameter:
    table = nn.Parameter(torch.empty(shape))
    fill(table)
    return table


_maker: ContextVar[Maker] = ContextVar("fmrec_fast_tables", default=_plain)


@contextmanager
def made_by(maker: Maker) -> Iterator[None]:
    """Inside, `maker` makes the tables of new models, e.g. over ranks."""
    token = _maker.set(maker)
    try:
        yield
    finally:
        _maker.reset(token)


class ItemEmbedding(nn.Embedding):
    """``nn.Embedding`` whose table may lie over ranks; then `forward` is a collective."""

    def __init__(self, items: int, width: int) -> None:
        weight = _maker.get()((items, width), nn.init.normal_)
        super().__init__(items, width, _weight=weight)

    def forward(self, ids: Tensor) -> Tensor:
        return look_up(self.weight, ids)[0]


class ItemLinear(nn.Linear):
    """``nn.Linear`` whose outputs, one for each item, may lie over ranks."""

    def __init__(self, width: int, items: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = width, items
        make, bound = _maker.get(), 1 / math.sqrt(width)
        # As nn.Linear initialises.
        self.weight = make((items, width), lambda t: nn.init.kaiming_uniform_(t, math.sqrt(5)))
        self.bias = make((items,), lambda t: nn.init.uniform_(t, -bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and is_sharded(self.weight):
            raise ValueError(
                "the outputs of all items need the whole layer, got one that is sharded over "
                "ranks; use distributed.items.whole_items"
            )
        return super().forward(x)


class _LookUp(torch.autograd.Function):
    """Lookups in one table, with one dense gradient: of a large table each takes much memory,
    and as long to fill with zeros and to add up."""

    @staticmethod
    def forward(ctx, table, *ids):
        ctx.save_for_backward(*ids)
        ctx.rows = len(table)
        return tuple(F.embedding(part, table) for part in ids)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *gradients):
        ids = torch.cat([part.flatten() for part in ctx.saved_tensors])
        grad = torch.cat([part.flatten(0, -2) for part in gradients])
        dense = torch.ops.aten.embedding_dense_backward(grad, ids, ctx.rows, -1, False)
        return dense, *(None for _ in ctx.saved_tensors)


def look_up(table: Tensor, *ids: Tensor) -> tuple[Tensor, ...]:
    """``tuple(F.embedding(part, table) for part in ids)``.

    Of a table that is sharded over ranks a collective: see `distributed.item_lookup`.
    """
    if not torch.compiler.is_compiling() and is_sharded(table):
        from fmrec_fast.distributed.item_lookup import look_up_sharded

        return look_up_sharded(table, *ids)
    if len(ids) == 1:
        return (F.embedding(ids[0], table),)
    return _LookUp.apply(table, *ids)
