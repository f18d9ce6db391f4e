"""Definition of `item_cross_entropy`."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Terms(NamedTuple):
    """What a row's loss is made of, each [B]."""

    nll: Tensor  # lse - score of the target
    lse: Tensor  # log of the sum of exp(score)
    smooth: Tensor | None  # sum over v of weight[v] (lse - score of v), weight 1 unless given


def terms(
    rep: Tensor,
    item_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    logit_scale: float = 1.0,
    smooth: bool = True,
) -> Terms:
    """The terms of the scores ``logit_scale * rep @ item_weight.T + bias``.

    bfloat16 and float16 are multiplied and summed in float32. A target that is no item has the
    nll of item 0, which `reduce` does not use. Without `smooth` that term is None.
    """
    dtype = accumulator(rep.dtype)
    scores = logit_scale * (rep.to(dtype) @ item_weight.to(dtype).T)
    if bias is not None:
        scores = scores + bias.to(dtype)
    log_p = F.log_softmax(scores, 1)
    inside = (target >= 0) & (target < item_weight.shape[0])
    nll = -log_p.gather(1, torch.where(inside, target, 0)[:, None])[:, 0]
    lse = torch.logsumexp(scores, 1)
    if not smooth:
        return Terms(nll, lse, None)
    return Terms(nll, lse, -(log_p if weight is None else log_p * weight.to(dtype)).sum(1))


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which scores of inputs of `dtype` are summed, and of the loss."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def reduce(
    row: Terms,
    target: Tensor,
    items: int,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """The loss [B] or scalar: ignored rows are 0, a row without a valid target is NaN."""
    valid = target != ignore_index
    inside = (target >= 0) & (target < items)
    losses = row.nll
    counts = valid
    if weight is not None:
        of_target = weight.to(losses.dtype)[torch.where(inside, target, 0)]
        losses = losses * of_target
        counts = torch.where(valid, of_target, 0)
    if label_smoothing and row.smooth is not None:
        losses = (1 - label_smoothing) * losses + label_smoothing / items * row.smooth
    if z_loss:
        losses = losses + z_loss * row.lse.square()
    # Multiplied, so that the gradients become NaN too.
    losses = losses * torch.where(valid & ~inside, torch.nan, 1.0).to(losses.dtype)
    losses = torch.where(valid, losses, 0)
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    count = counts.sum()
    return losses.sum() / torch.where(count == 0, 1, count)


def item_cross_entropy(
    rep: Tensor,
    item_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
) -> Tensor:
    """Cross-entropy of ``logit_scale * rep @ item_weight.T + bias`` (eq. 20)."""
    return reduce(
        terms(
            rep,
            item_weight,
            target,
            bias=bias,
            weight=weight,
            logit_scale=logit_scale,
            smooth=label_smoothing > 0,
        ),
        target,
        item_weight.shape[0],
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
