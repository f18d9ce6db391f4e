"""`item_cross_entropy` with the items over ranks.

Every rank gathers the representations of all, streams its own items for all rows, and sends each
row's owner four numbers of it (max, sum of exponentials, score and weight of the target), of which
the owner makes the loss. Backward sends each row's max, sum and gradients to all ranks, and the
representations' gradients back to their owners; those of the items stay where they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fmrec_fast.backend import Backend
from fmrec_fast.distributed.exchange import gather, shares, to_owners
from fmrec_fast.distributed.items import Rows, own_rows, rows_of
from fmrec_fast.ops._checks import check_range, is_sharded
from fmrec_fast.ops.item_cross_entropy import _gradients, _statistics, choose_backend
from fmrec_fast.reference import item_cross_entropy as reference
from fmrec_fast.reference.item_cross_entropy import LN_2, Terms


class Call(NamedTuple):
    """What the ranks agree on, and this one's part of it."""

    rows: Rows
    sizes: tuple[int, ...]
    scale: float
    filter_eps: float
    backend: str
    keep: bool


def item_cross_entropy(
    rep: Tensor,
    item_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    logit_scale: float,
    return_lse: bool,
    filter_eps: float | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The public op for a DTensor `item_weight`, its arguments checked."""
    rows = rows_of("item_weight", item_weight)
    check_range("target", target, 0, rows.total, {ignore_index: "ignore_index"})
    own_bias = None
    if bias is not None:
        rows_of("bias", bias)
        own_bias = own_rows(bias)
    own_weight = own_rows(item_weight)
    of_class = None
    if weight is not None:
        whole = not is_sharded(weight)
        of_class = (weight[rows.first : rows.last] if whole else own_rows(weight)).detach()
    sizes = shares(len(rep), rows.group, rep.device)
    targets = gather(target, sizes, rows.group)
    tensors = (rep, own_weight) if own_bias is None else (rep, own_weight, own_bias)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    backend = choose_backend(*tensors)
    call = Call(rows, sizes, float(logit_scale), filter_eps or 0.0, backend.value, keep)
    found = _Terms.apply(
        rep, own_weight, own_bias, rows.local(targets), of_class, call, label_smoothing > 0
    )
    row, of_target = Terms(*found[:3]), found[3]
    divisor = None
    if reduction == "mean":
        divisor = (targets != ignore_index).sum()
        if weight is not None:
            divisor = torch.where(target != ignore_index, of_target, 0).sum()
            dist.all_reduce(divisor, group=rows.group)
    loss = reference.reduce(
        row,
        target,
        rows.total,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        of_target=None if weight is None else of_target,
        divisor=divisor,
    )
    return (loss, row.lse) if return_lse else loss


def _own_statistics(rep, item_weight, bias, target, of_class, smooth, call):
    """Of the own items for the rows of all: [5, B] of max x, sum of 2^(x - max), x and weight of
    the target and sum of smoothing * x, 0 where there is none; and the kept scores."""
    smoothing = None
    if smooth:
        smoothing = torch.ones_like(item_weight[:, 0]) if of_class is None else of_class
    dtype = reference.accumulator(rep.dtype)
    if len(item_weight) == 0:
        found, cache = rep.new_zeros(5, len(rep), dtype=dtype), rep.new_empty(0)
        found[0] = -torch.inf
        return found.double() if call.backend == Backend.CPP.value else found, smoothing, cache
    given = (rep, item_weight, bias, target, smoothing, call.scale)
    if call.backend == Backend.REFERENCE.value:
        found, cache = reference.statistics(*given), rep.new_empty(0)
    else:
        found, cache = _statistics(*given, call.filter_eps, call.backend, call.keep)
    largest, total, gap, dot = found
    own = target >= 0
    of_target = torch.where(own, largest - gap, 0)
    if smoothing is not None:
        dot = dot + smoothing.to(dot.dtype).sum() * largest
    of_weight = torch.zeros_like(of_target)
    if of_class is not None:
        of_weight = torch.where(own, of_class[target.clamp(min=0)].to(dot.dtype), 0)
    return torch.stack((largest, total, of_target, of_weight, dot)), smoothing, cache


class _Terms(torch.autograd.Function):
    """`Terms` of the own rows and the weights of their targets, [B] each."""

    @staticmethod
    def forward(ctx, rep, item_weight, bias, target, of_class, call, smooth):
        everyone = gather(rep, call.sizes, call.rows.group)
        found, smoothing, cache = _own_statistics(
            everyone, item_weight, bias, target, of_class, smooth, call
        )
        sent = found if smooth else found[:4]
        parts = to_owners(sent.T, call.sizes, call.rows.group).unbind(2)  # [ranks, b] each
        largest = parts[0].amax(0)
        total = (parts[1] * (parts[0] - largest).exp2()).sum(0)
        log_total = total.log()
        count = own_count = total.new_zeros(())
        if smoothing is not None:
            own_count = smoothing.to(total.dtype).sum()
            count = own_count.clone()
            dist.all_reduce(count, group=call.rows.group)
        ctx.save_for_backward(
            everyone, item_weight, bias, target, smoothing, cache, largest, total, count, own_count
        )
        ctx.call = call
        dtype = reference.accumulator(rep.dtype)
        of_target = parts[3].sum(0).to(dtype)
        ctx.mark_non_differentiable(of_target)
        nll = (largest - parts[2].sum(0)) * LN_2 + log_total
        lse = largest * LN_2 + log_total
        dot = parts[4].sum(0) if smooth else 0
        rest = count * lse - dot * LN_2
        return nll.to(dtype), lse.to(dtype), rest.to(dtype), of_target

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_nll, d_lse, d_smooth, _):
        call = ctx.call
        (rep, item_weight, bias, target, smoothing, cache, largest, total, count, own_count) = (
            ctx.saved_tensors
        )
        d_nll, d_lse, d_smooth = (d.to(total.dtype) for d in (d_nll, d_lse, d_smooth))
        sent = torch.stack((largest, total, d_nll, d_lse, d_smooth), 1)
        largest, total, d_nll, d_lse, d_smooth = gather(sent, call.sizes, call.rows.group).T
        # The op's own gradient counts the items that it sees.
        d_lse = d_lse + (count - own_count) * d_smooth
        wants = list(ctx.needs_input_grad[:3])
        d_rep: Tensor | None
        d_weight: Tensor | None
        if len(item_weight) == 0:
            d_rep, d_weight = torch.zeros_like(rep), torch.zeros_like(item_weight)
            d_bias = None if bias is None else torch.zeros_like(bias)
        elif call.backend == Backend.REFERENCE.value:
            coefficient = (d_nll + d_lse + own_count * d_smooth) / total
            rows = torch.stack((largest, coefficient, -d_smooth, d_nll))
            given = (rep, item_weight, bias, target, smoothing, call.scale)
            d_rep, d_weight, d_bias = reference.gradients(rows, *given)
        else:
            statistics = torch.stack((largest, total))
            d_rep, d_weight, d_bias = _gradients(
                d_nll,
                d_lse,
                d_smooth if smoothing is not None else None,
                *(rep, item_weight, bias, target, smoothing, statistics, cache),
                *(call.scale, call.filter_eps, call.backend, wants),
            )
        if d_rep is not None and wants[0]:
            d_rep = to_owners(d_rep, call.sizes, call.rows.group).sum(0)
        found = (d_rep, d_weight, None if bias is None else d_bias)
        return *(g if want else None for g, want in zip(found, wants)), None, None, None, None
