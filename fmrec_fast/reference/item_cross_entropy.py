"""Definition of `item_cross_entropy`."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

LN_2 = math.log(2)
# Below every score, but so that its difference to minus infinity is no NaN.
LOWEST = -3.0e38


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
    scores = _scores(rep, item_weight, bias, logit_scale)
    dtype = scores.dtype
    log_p = F.log_softmax(scores, 1)
    inside = (target >= 0) & (target < item_weight.shape[0])
    nll = -log_p.gather(1, torch.where(inside, target, 0)[:, None])[:, 0]
    lse = torch.logsumexp(scores, 1)
    if not smooth:
        return Terms(nll, lse, None)
    return Terms(nll, lse, -(log_p if weight is None else log_p * weight.to(dtype)).sum(1))


def statistics(
    rep: Tensor,
    item_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    smoothing: Tensor | None,
    logit_scale: float,
) -> Tensor:
    """What the kernels keep of the scores x, in base 2: [4, B] of max x, sum of 2^(x - max),
    max - x of the target (max where it is no item), sum of smoothing * (x - max)."""
    x = _scores(rep, item_weight, bias, logit_scale) / LN_2
    largest = x.amax(1).clamp(min=LOWEST)
    inside = (target >= 0) & (target < len(item_weight))
    of_target = x.gather(1, torch.where(inside, target, 0)[:, None])[:, 0]
    below = x - largest[:, None]
    dot = torch.zeros_like(largest) if smoothing is None else below @ smoothing.to(x.dtype)
    gap = largest - torch.where(inside, of_target, 0)
    return torch.stack((largest, below.exp2().sum(1), gap, dot))


def gradients(
    rows: Tensor,
    rep: Tensor,
    item_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    smoothing: Tensor | None,
    logit_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of rep, item_weight and bias, from the gradient of each score,
    ``coefficient * 2^(x - max) + smooth * smoothing - nll * [is target]``, for rows [4, B] of
    max x, coefficient, smooth and nll."""
    largest, coefficient, smooth, nll = rows[:, :, None]
    x = _scores(rep, item_weight, bias, logit_scale) / LN_2
    g = coefficient * (x - largest).exp2()
    if smoothing is not None:
        g = g + smooth * smoothing.to(g.dtype)
    inside = (target >= 0) & (target < len(item_weight))
    at = torch.where(inside, target, 0)[:, None]
    g = g.scatter_add(1, at, -nll * inside[:, None])
    d_rep = logit_scale * (g @ item_weight.to(g.dtype))
    d_weight = logit_scale * (g.T @ rep.to(g.dtype))
    return d_rep.to(rep.dtype), d_weight.to(rep.dtype), g.sum(0).to(rep.dtype)


def _scores(rep: Tensor, item_weight: Tensor, bias: Tensor | None, logit_scale: float) -> Tensor:
    dtype = accumulator(rep.dtype)
    scores = logit_scale * (rep.to(dtype) @ item_weight.to(dtype).T)
    return scores if bias is None else scores + bias.to(dtype)


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
    of_target: Tensor | None = None,
    divisor: Tensor | None = None,
) -> Tensor:
    """The loss [B] or scalar: ignored rows are 0, a row without a valid target is NaN.

    `of_target` [B] are the weights of the targets where `weight` is not at hand, and `divisor` is
    the mean's where these are not all rows.
    """
    valid = target != ignore_index
    inside = (target >= 0) & (target < items)
    losses = row.nll
    counts = valid
    if weight is not None:
        of_target = weight[torch.where(inside, target, 0)]
    if of_target is not None:
        of_target = of_target.to(losses.dtype)
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
    count = counts.sum() if divisor is None else divisor
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
