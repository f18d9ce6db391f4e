"""Ranking over the full item vocabulary: the k best items, and a target's rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fmrec_fast import extension
from fmrec_fast.backend import Backend, choose
from fmrec_fast.ops._checks import (
    check_float,
    check_integer,
    check_range,
    check_shape,
    is_sharded,
)
from fmrec_fast.reference import item_ranking as reference

INDEX_DTYPES = {"bf16": torch.bfloat16, "int8": torch.int8}
_TABLES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class ItemIndex:
    """A smaller copy of the item table, from `prepare_items`: `weight` [V, D] in bfloat16, or in
    int8 with a `scale` [V]. It does not follow later changes of the table."""

    weight: Tensor
    scale: Tensor | None


@torch.no_grad()
def prepare_items(item_weight: Tensor, dtype: str = "bf16") -> ItemIndex:
    """A table of half ('bf16') or a quarter ('int8') of the bytes, for `item_topk`'s `index`.

    'int8' scales each item by its largest magnitude / 127.

    Raises:
        TypeError, ValueError: not a floating-point [V, D], or an unknown dtype.
    """
    check_shape("item_weight", item_weight, "V D", {})
    check_float(item_weight=item_weight)
    if not torch.compiler.is_compiling() and is_sharded(item_weight):
        raise ValueError("item_weight must be a whole table, got one over ranks")
    if dtype not in INDEX_DTYPES:
        raise ValueError(f"dtype must be one of {tuple(INDEX_DTYPES)}, got {dtype!r}")
    if dtype == "bf16":
        return ItemIndex(item_weight.bfloat16().contiguous(), None)
    largest = item_weight.float().abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    scale = largest / 127
    return ItemIndex((item_weight / scale[:, None]).round().to(torch.int8).contiguous(), scale)


def _check(
    rep: Tensor, item_weight: Tensor, bias: Tensor | None, exclude: Tensor | None
) -> dict[str, int]:
    """What can be checked without looking at values."""
    sizes: dict[str, int] = {}
    check_shape("rep", rep, "B D", sizes)
    check_shape("item_weight", item_weight, "V D", sizes)
    check_float(rep=rep, item_weight=item_weight, bias=bias)
    if bias is not None:
        check_shape("bias", bias, "V", sizes)
    if exclude is not None:
        check_shape("exclude", exclude, "B E", sizes)
        check_integer("exclude", exclude)
    if sizes["V"] >= 2**31:
        raise ValueError(f"item_weight must have less than 2**31 rows, got {sizes['V']}")
    return sizes


def item_topk(
    rep: Tensor,
    item_weight: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
    candidates: Tensor | None = None,
    index: ItemIndex | None = None,
    oversample: int = 4,
) -> tuple[Tensor, Tensor]:
    """The k items with the largest inner product, best first, ties towards the lower id.

    Equivalent PyTorch::

        scores = rep @ item_weight.T + bias
        scores[row, exclude[row]] = -inf
        scores.sort(dim=1, descending=True, stable=True), first k

    but the items stream by: nothing of size B V is held. A score is computed in float32, in the
    same order wherever the item and the row lie, so equal items tie. As in PyTorch's sort, a score
    that is NaN comes first, lower ids before higher ones: what is broken shows.

    Args:
        rep: [B, D].
        item_weight: [V, D] of the same floating-point dtype.
        k: 1 .. V, or 1 .. C with `candidates`.
        bias: [V], added to the scores.
        exclude: int64 [B, E], ids that may not appear; -1 fills up short rows.
        candidates: int64 [C], or [B, C] for each row its own: only these ids may appear. -1 fills
            up short lists; an id that is listed twice counts once.
        index: opt-in, from `prepare_items`: the best ``k * oversample`` by the smaller table are
            ranked by their exact scores. An item that is not among them is missed. Without
            `candidates`.
        oversample: how many times k the index gives.

    Returns:
        (scores float32 [B, k], ids int64 [B, k]), without gradients. Where fewer than k items are
        left, the excess scores are -inf and the excess ids -1.

    Raises:
        TypeError, ValueError: dtypes, shapes, k, or (on CPU) an id out of range.
        BackendError: a named backend cannot run.
    """
    sizes = _check(rep, item_weight, bias, exclude)
    sharded = not torch.compiler.is_compiling() and is_sharded(item_weight)
    most, what = sizes["V"], "V"
    if candidates is not None:
        check_shape("candidates", candidates, "C" if candidates.ndim == 1 else "B C", sizes)
        check_integer("candidates", candidates)
        most, what = sizes["C"], "C"
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= most:
        raise ValueError(f"k must be in 1 .. {what} = {most}, got {k}")
    if sharded:
        from fmrec_fast.distributed import item_ranking

        if index is not None:
            raise ValueError("index is of a whole table, got an item_weight over ranks")
        return item_ranking.item_topk(rep, item_weight, k, bias, exclude, candidates)
    if index is not None:
        if candidates is not None:
            raise ValueError("index takes no candidates: it is there to find them")
        if index.weight.shape != item_weight.shape:
            shapes = tuple(item_weight.shape), tuple(index.weight.shape)
            raise ValueError(f"index must be made of a table {shapes[0]}, got {shapes[1]}")
        if index.weight.device != item_weight.device:
            devices = item_weight.device, index.weight.device
            raise ValueError(f"item_weight is on {devices[0]}, index on {devices[1]}")
        if oversample < 1:
            raise ValueError(f"oversample must be at least 1, got {oversample}")
        shortlist = min(k * oversample, most)
        _, candidates = _run_topk(rep, index.weight, shortlist, index.scale, bias, exclude, None)
    return _run_topk(rep, item_weight, k, None, bias, exclude, candidates)


def target_rank(
    rep: Tensor,
    item_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    exclude: Tensor | None = None,
) -> Tensor:
    """The target's place (1 is best) among all items by inner product.

    Equivalent PyTorch::

        1 + (scores > scores[target]).sum() + ((scores == scores[target]) & (id < target)).sum()

    over the items that are not excluded, for ``scores = rep @ item_weight.T + bias``. Scores that
    are NaN count against the target; if its own is, all others do. HR, NDCG and MRR for every K
    follow from the ranks alone.

    Args:
        rep: [B, D]; item_weight: [V, D]; target: int64 [B]; bias, exclude: as in `item_topk`.

    Returns:
        int64 [B].

    Raises:
        TypeError, ValueError: dtypes, shapes, or (on CPU) an id out of range.
        BackendError: a named backend cannot run.
    """
    sizes = _check(rep, item_weight, bias, exclude)
    check_shape("target", target, "B", sizes)
    check_integer("target", target)
    if torch.compiler.is_compiling():
        return torch.ops.fmrec_fast.target_rank(rep, item_weight, target, bias, exclude)
    if is_sharded(item_weight):
        from fmrec_fast.distributed import item_ranking

        return item_ranking.target_rank(rep, item_weight, target, bias, exclude)
    return _target_rank(rep, item_weight, target, bias, exclude)


def _run_topk(*arguments) -> tuple[Tensor, Tensor]:
    if torch.compiler.is_compiling():
        return torch.ops.fmrec_fast.item_topk(*arguments)
    return _item_topk(*arguments)


def _choose(rep: Tensor, table: Tensor) -> Backend:
    return choose("item_ranking", rep if table.dtype in _TABLES else table)


def _numpy(tensor: Tensor | None):
    if tensor is None:
        return None
    tensor = tensor.detach().contiguous()
    # numpy has no bfloat16; the kernels know it by its two bytes.
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@torch.no_grad()
def _item_topk(
    rep: Tensor,
    table: Tensor,
    k: int,
    scale: Tensor | None,
    bias: Tensor | None,
    exclude: Tensor | None,
    candidates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    for name, ids in (("exclude", exclude), ("candidates", candidates)):
        if ids is not None:
            check_range(name, ids, 0, table.shape[0], {-1: "no item"})
    rep, bias = rep.float(), None if bias is None else bias.float()
    backend = _choose(rep, table)
    if backend is Backend.CPP:
        scores = rep.new_empty(rep.shape[0], k)
        ids = torch.empty(rep.shape[0], k, dtype=torch.int64)
        extension.load().item_topk(
            *(_numpy(tensor) for tensor in (rep, table, scale, bias, exclude, candidates)),
            scores.numpy(),
            ids.numpy(),
            torch.get_num_threads(),
        )
        return scores, ids
    given = {"scale": scale, "bias": bias, "exclude": exclude, "candidates": candidates}
    if backend is Backend.TRITON:
        from fmrec_fast.kernels import item_ranking as kernels

        return kernels.item_topk(rep, table, k, **given)
    return reference.item_topk(rep, table, k, **given)


@torch.no_grad()
def _target_rank(
    rep: Tensor,
    table: Tensor,
    target: Tensor,
    bias: Tensor | None,
    exclude: Tensor | None,
    of_target: Tensor | None = None,
) -> Tensor:
    if of_target is None:
        check_range("target", target, 0, table.shape[0])
    if exclude is not None:
        check_range("exclude", exclude, 0, table.shape[0], {-1: "no item"})
    rep, bias = rep.float(), None if bias is None else bias.float()
    backend = _choose(rep, table)
    if backend is Backend.CPP:
        ranks = torch.empty_like(target)
        extension.load().target_rank(
            *(_numpy(tensor) for tensor in (rep, table, bias, target, exclude)),
            ranks.numpy(),
            torch.get_num_threads(),
            _numpy(of_target),
        )
        return ranks
    given = {"bias": bias, "exclude": exclude, "of_target": of_target}
    if backend is Backend.TRITON:
        from fmrec_fast.kernels import target_rank as kernels

        return kernels.target_rank(rep, table, target, **given)
    return reference.target_rank(rep, table, target, **given)


@torch.no_grad()
def _target_scores(rep: Tensor, table: Tensor, target: Tensor, bias: Tensor | None) -> Tensor:
    """The targets' scores, to the bit those that they are ranked by: float32 [B]."""
    rep, bias = rep.float(), None if bias is None else bias.float()
    backend = _choose(rep, table)
    if backend is Backend.CPP:
        return _item_topk(rep, table, 1, None, bias, None, target[:, None])[0][:, 0]
    if backend is Backend.TRITON:
        from fmrec_fast.kernels import target_rank as kernels

        return kernels.target_scores(rep, table, target, bias=bias)
    return reference.target_scores(rep, table, target, bias=bias)


# What torch.compile and export see; called eagerly, the functions above go straight ahead.
@torch.library.custom_op("fmrec_fast::item_topk", mutates_args=())
def _registered_topk(
    rep: Tensor,
    table: Tensor,
    k: int,
    scale: Tensor | None,
    bias: Tensor | None,
    exclude: Tensor | None,
    candidates: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return _item_topk(rep, table, k, scale, bias, exclude, candidates)


@_registered_topk.register_fake
def _(rep, table, k, scale, bias, exclude, candidates):
    shape = (rep.shape[0], k)
    return rep.new_empty(shape, dtype=torch.float32), rep.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("fmrec_fast::target_rank", mutates_args=())
def _registered_rank(
    rep: Tensor,
    table: Tensor,
    target: Tensor,
    bias: Tensor | None,
    exclude: Tensor | None,
) -> Tensor:
    return _target_rank(rep, table, target, bias, exclude)


@_registered_rank.register_fake
def _(rep, table, target, bias, exclude):
    return torch.empty_like(target)
