"""Ranking over the full item vocabulary: the k best items, and a target's rank."""

from __future__ import annotations

from torch import Tensor

from fmrec_fast.backend import choose
from fmrec_fast.ops._checks import check_float, check_integer, check_range, check_shape
from fmrec_fast.reference import item_ranking as reference


def _check(rep: Tensor, item_weight: Tensor, exclude: Tensor | None) -> dict[str, int]:
    sizes: dict[str, int] = {}
    check_shape("rep", rep, "B D", sizes)
    check_shape("item_weight", item_weight, "V D", sizes)
    check_float(rep=rep, item_weight=item_weight)
    if exclude is not None:
        check_shape("exclude", exclude, "B E", sizes)
        check_integer("exclude", exclude)
        check_range("exclude", exclude, 0, sizes["V"], {-1: "no item"})
    return sizes


def item_topk(
    rep: Tensor, item_weight: Tensor, k: int, *, exclude: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The k items with the largest inner product, best first, ties towards the lower id.

    Equivalent PyTorch::

        scores = rep @ item_weight.T
        scores[row, exclude[row]] = -inf
        scores.sort(dim=1, descending=True, stable=True), first k

    Args:
        rep: [B, D] float32.
        item_weight: [V, D].
        k: 1 .. V.
        exclude: int64 [B, E], ids that may not appear; -1 fills up short rows. Where fewer than
            k items are left, the excess scores are -inf.

    Returns:
        (scores [B, k], ids int64 [B, k]).

    Raises:
        TypeError, ValueError: dtypes, shapes, k, or (on CPU) an id out of range.
    """
    sizes = _check(rep, item_weight, exclude)
    if not 1 <= k <= sizes["V"]:
        raise ValueError(f"k must be in 1 .. V = {sizes['V']}, got {k}")
    choose("item_ranking", rep)
    return reference.item_topk(rep.float(), item_weight.float(), k, exclude=exclude)


def target_rank(
    rep: Tensor, item_weight: Tensor, target: Tensor, *, exclude: Tensor | None = None
) -> Tensor:
    """The target's place (1 is best) among all items by inner product.

    Equivalent PyTorch::

        1 + (scores > scores[target]).sum() + ((scores == scores[target]) & (id < target)).sum()

    over the items that are not excluded. Scores that are NaN count against the target.

    Args:
        rep: [B, D]; item_weight: [V, D]; target: int64 [B]; exclude: as in `item_topk`.

    Returns:
        int64 [B].

    Raises:
        TypeError, ValueError: dtypes, shapes, or (on CPU) an id out of range.
    """
    sizes = _check(rep, item_weight, exclude)
    check_shape("target", target, "B", sizes)
    check_integer("target", target)
    check_range("target", target, 0, sizes["V"])
    choose("item_ranking", rep)
    return reference.target_rank(rep.float(), item_weight.float(), target, exclude=exclude)
