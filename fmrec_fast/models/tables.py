"""The modules with a row for each item: what a catalogue's size is felt in."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrec_fast import extension, memory
from fmrec_fast.backend import Backend, candidate
from fmrec_fast.forward_mode import is_wrapped
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
        ids = [part.flatten() for part in ctx.saved_tensors]
        rows = [part.flatten(0, -2) for part in gradients]
        return _dense_gradient(ctx.rows, ids, rows), *(None for _ in ids)


def _dense_gradient(items: int, ids: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """Zeros [items, D] with each of the gradients [N, D] added to the rows of its ids [N]."""
    native = not torch.compiler.is_compiling() and all(
        type(part) is Tensor
        and not is_wrapped(part)
        and part.device.type == "cpu"
        and part.dtype == dtype
        for parts, dtype in ((ids, torch.int64), (gradients, torch.float32))
        for part in parts
    )
    if native and candidate(gradients[0].device) is Backend.CPP and extension.available():
        # PyTorch's shares the table among threads: one of them gets the padding, most lookups.
        dense = memory.empty(items, gradients[0].shape[-1])
        extension.load().table_gradient(
            [part.detach().contiguous().numpy() for part in ids],
            [part.detach().contiguous().numpy() for part in gradients],
            dense.numpy(),
            torch.get_num_threads(),
        )
        return dense
    return torch.ops.aten.embedding_dense_backward(
        torch.cat(tuple(gradients)), torch.cat(tuple(ids)), items, -1, False
    )


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
