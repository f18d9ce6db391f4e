"""Softmax cross-entropy over the full item vocabulary."""

from __future__ import annotations

from torch import Tensor

from fmrec_fast.backend import choose
from fmrec_fast.ops._checks import check_float, check_integer, check_range, check_shape
from fmrec_fast.reference import item_cross_entropy as reference

REDUCTIONS = ("mean", "sum", "none")


def item_cross_entropy(
    rep: Tensor,
    item_weight: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of the scores ``rep @ item_weight.T`` against `target` (eq. 20).

    Equivalent PyTorch::

        F.cross_entropy(rep @ item_weight.T, target, reduction=..., ignore_index=...)

    except that an empty batch gives 0 under 'mean', not NaN.

    Args:
        rep: representations [B, D].
        item_weight: item embeddings [V, D].
        target: int64 [B], 0 .. V-1 or `ignore_index`.
        reduction: 'mean' (over rows that are not ignored), 'sum' or 'none'.

    Returns:
        Scalar, or [B] under 'none'. Differentiable in `rep` and `item_weight`.

    Raises:
        TypeError, ValueError: dtypes, shapes, reduction, or (on CPU) a target out of range.
    """
    sizes: dict[str, int] = {}
    check_shape("rep", rep, "B D", sizes)
    check_shape("item_weight", item_weight, "V D", sizes)
    check_shape("target", target, "B", sizes)
    check_float(rep=rep, item_weight=item_weight)
    check_integer("target", target)
    check_range("target", target, 0, sizes["V"], {ignore_index: "ignore_index"})
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    choose("item_cross_entropy", rep)
    return reference.item_cross_entropy(
        rep, item_weight, target, reduction=reduction, ignore_index=ignore_index
    )
