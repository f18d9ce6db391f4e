"""Item tables over ranks: each rank holds a chunk of the rows, as a DTensor ``Shard(0)``.

Sharded are the item embeddings and the decoder's last layer, all that grows with the number of
items V. Rank r of R holds the rows that ``torch.chunk`` would give it: ceil(V / R) each, the last
ones fewer or none.

The ops take such a table as they take a plain one, but are collective: every rank calls them, in
the same order, with the rows of the global batch that it has (`exchange.batch_shares`), which may
be none. What an op gives of the loss is this rank's share of it, so that the sum over the ranks is
what one process would get; backward gives the gradients of that sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from fmrec_fast.config import FMRecConfig
from fmrec_fast.models import FMRecommender, build_recommender, tables

# Floats of a table that are drawn at a time, of which each rank keeps its own.
DRAWN = 1 << 22


class Rows(NamedTuple):
    """Where a rank's part of a table lies: rows first .. last - 1 of `total`."""

    first: int
    last: int
    total: int
    group: dist.ProcessGroup

    def local(self, ids: Tensor) -> Tensor:
        """Ids of items as rows of the own part; -1, which is none, at those of other ranks."""
        inside = (ids >= self.first) & (ids < self.last)
        return torch.where(inside, ids - self.first, -1)


def chunk(total: int, rank: int, ranks: int) -> tuple[int, int]:
    """First and last + 1 of a rank's rows, as ``torch.chunk`` and DTensor cut them."""
    size = -(-total // ranks)
    return min(rank * size, total), min((rank + 1) * size, total)


def rows_of(name: str, table: Tensor) -> Rows:
    """The own part of a sharded table.

    Raises:
        ValueError: not a DTensor of one dimension of ranks, cut by rows.
    """
    if not isinstance(table, DTensor):
        raise ValueError(f"{name} must be sharded as the item table is, got a plain tensor")
    mesh, placements = table.device_mesh, tuple(table.placements)
    if mesh.ndim != 1 or placements != (Shard(0),):
        raise ValueError(
            f"{name} must be Shard(0) over one dimension of ranks, got {placements} over "
            f"{mesh.ndim}"
        )
    first, last = chunk(table.shape[0], mesh.get_local_rank(), mesh.size())
    return Rows(first, last, table.shape[0], mesh.get_group())


def own_rows(table: Tensor) -> Tensor:
    """The own part as a plain tensor, differentiable."""
    if not isinstance(table, DTensor):
        raise TypeError(f"table must be a DTensor, got {type(table).__name__}")
    own = table.to_local(grad_placements=[Shard(0)])
    if own.requires_grad:
        own.register_hook(partial(_laid_out, own.stride()))
    return own


def _laid_out(stride: tuple[int, ...], grad: Tensor) -> Tensor:
    """A gradient with these strides. One with others, such as a number that was expanded to no row,
    autograd would copy into a new table, for which torch 2.11 exchanges rows: on that rank alone.
    """
    return (
        grad
        if grad.stride() == stride
        else torch.empty_like(grad, memory_format=torch.contiguous_format).copy_(grad)
    )


def as_table(own: Tensor, mesh: DeviceMesh, shape: torch.Size) -> DTensor:
    """The table [V, ...] of which this rank has the rows `own`."""
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
    )


def draw_rows(
    shape: tuple[int, ...],
    first: int,
    last: int,
    fill: Callable[[Tensor], object],
    drawn: int = DRAWN,
) -> Tensor:
    """Rows first .. last - 1 of ``fill(torch.empty(shape))``, without holding the whole.

    `fill` draws in place from torch's default generator, which ends up where it would have. Torch
    draws normals on a CPU in blocks of 16, the last one anew where it is not whole; so a piece is
    a multiple of 16 rows, and the last one not shorter.
    """
    own = torch.empty(last - first, *shape[1:])
    width = max(math.prod(shape[1:]), 1)
    piece = max(drawn // width // 16, 1) * 16
    begin = 0
    while begin < shape[0]:
        end = begin + piece
        if shape[0] - end < 16:
            end = shape[0]
        part = torch.empty(end - begin, *shape[1:])
        fill(part)
        low, high = max(begin, first), min(end, last)
        if low < high:
            own[low - first : high - first] = part[low - begin : high - begin]
        begin = end
    return own


def build_sharded(config: FMRecConfig, mesh: DeviceMesh) -> FMRecommender:
    """`build_recommender` with its item tables over the ranks of `mesh`; a collective.

    The values are those of the plain model for the same ``torch.manual_seed``, on every rank; no
    rank ever holds more of a table than its own rows and `DRAWN` floats. Every rank draws the whole
    tables, as one process would.
    """
    _check_mesh(mesh)

    def make(shape: tuple[int, ...], fill: Callable[[Tensor], object]) -> nn.Parameter:
        first, last = chunk(shape[0], mesh.get_local_rank(), mesh.size())
        own = draw_rows(shape, first, last, fill).to(mesh.device_type)
        return nn.Parameter(as_table(own, mesh, torch.Size(shape)))

    with tables.made_by(make):
        model = build_recommender(config)
    return model


def shard_items(model: FMRecommender, mesh: DeviceMesh) -> FMRecommender:
    """Cut the item tables of a whole model, the same on every rank, in place; returns it.

    The parameters are new ones: make the optimizer afterwards (`training.build_optimizer` knows
    of them). For tables that a rank cannot hold as a whole there is `build_sharded`.

    Raises:
        ValueError: the model is sharded already, or the mesh has more than one dimension.
    """
    _check_mesh(mesh)
    if is_sharded(model):
        raise ValueError("model must have whole item tables, got sharded ones")
    for module, name in item_tables(model):
        whole: nn.Parameter = getattr(module, name)
        first, last = chunk(len(whole), mesh.get_local_rank(), mesh.size())
        own = whole.detach()[first:last].clone().to(mesh.device_type)
        table = nn.Parameter(as_table(own, mesh, whole.shape), whole.requires_grad)
        setattr(module, name, table)
    return model


def item_tables(model: FMRecommender) -> Iterator[tuple[nn.Module, str]]:
    """The modules and the names of the parameters that have a row for each item."""
    yield model.item_embeddings, "weight"
    last: nn.Module = model.fm.xstart_model.decoder[-1]
    yield last, "weight"
    yield last, "bias"


def is_sharded(model: FMRecommender) -> bool:
    """Whether the item tables lie over ranks."""
    return isinstance(model.item_embeddings.weight, DTensor)


def own_parts(model: FMRecommender) -> dict[str, Tensor]:
    """The tables by their paths in a checkpoint, for it to be read into them."""
    return {
        f"model/{name}": tensor
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, DTensor)
    }


def own_moments(model: FMRecommender, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Zeros for what the optimizer keeps of the tables, by their paths in a checkpoint."""
    adam = isinstance(optimizer, torch.optim.Adam)
    names = ["exp_avg", "exp_avg_sq"] if adam else ["momentum_buffer"]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {
        f"optimizer/state/{number}/{name}": torch.zeros_like(parameter.detach())
        for number, parameter in enumerate(trained)
        if isinstance(parameter, DTensor)
        for name in names
    }


def _check_mesh(mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        raise ValueError(f"mesh must have one dimension, got {mesh.ndim}: {mesh}")


@contextmanager
def whole_items(model: FMRecommender) -> Iterator[FMRecommender]:
    """Inside, the model has its whole tables on every rank; a collective.

    For what needs them in one piece, such as packing for the C++ sampler. Changes made inside are
    lost.
    """
    kept = [(module, name, getattr(module, name)) for module, name in item_tables(model)]
    try:
        for module, name, table in kept:
            whole = table.detach().full_tensor()
            setattr(module, name, nn.Parameter(whole, table.requires_grad))
        yield model
    finally:
        for module, name, table in kept:
            setattr(module, name, table)
