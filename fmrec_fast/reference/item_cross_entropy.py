"""Definition of `item_cross_entropy`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def item_cross_entropy(
    rep: Tensor,
    item_weight: Tensor,
    target: Tensor,
    *,
    reduction: str = "mean",
    ignore_index: int = -100,
) -> Tensor:
    """Cross-entropy of ``rep @ item_weight.T`` (eq. 20)."""
    if reduction == "mean" and target.numel() == 0:
        return (rep.sum() + item_weight.sum()) * 0.0
    return F.cross_entropy(
        rep @ item_weight.T, target, reduction=reduction, ignore_index=ignore_index
    )
