"""Softmax cross-entropy over the full item vocabulary."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from fmrec_fast import extension, memory
from fmrec_fast.backend import Backend, choose, constant_when_compiled
from fmrec_fast.ops._checks import (
    check_float,
    check_integer,
    check_range,
    check_shape,
    is_sharded,
)
from fmrec_fast.reference import item_cross_entropy as reference
from fmrec_fast.reference.item_cross_entropy import LN_2, Terms

REDUCTIONS = ("mean", "sum", "none")
# What the Triton kernels take, and the largest D of it.
WIDEST_TRITON = {torch.float32: 128, torch.bfloat16: 256, torch.float16: 256}
TRITON_DTYPES = tuple(WIDEST_TRITON)

# The C++ kernels keep scores for the backward pass if they are at most this many floats (32 MB):
# then nothing is computed twice. Beyond it they keep 32 bytes a row.
CACHED_SCORES = 1 << 23


@overload
def item_cross_entropy(
    rep: Tensor,
    item_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    logit_scale: float = ...,
    return_lse: Literal[False] = ...,
    filter_eps: float | None = ...,
) -> Tensor: ...


@overload
def item_cross_entropy(
    rep: Tensor,
    item_weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = ...,
    weight: Tensor | None = ...,
    reduction: str = ...,
    ignore_index: int = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    logit_scale: float = ...,
    return_lse: bool,
    filter_eps: float | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


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
    return_lse: bool = False,
    filter_eps: float | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-entropy of the scores of all items against `target` (eq. 20).

    Equivalent PyTorch::

        scores = logit_scale * rep @ item_weight.T + bias
        F.cross_entropy(
            scores, target, weight, reduction=..., ignore_index=..., label_smoothing=...
        )

    plus ``z_loss * logsumexp(scores)**2`` for each row (divided under 'mean' by what the rest is
    divided by), except that a mean over no row (an empty batch, all rows ignored) is 0, not NaN.
    The kernels never hold the [B, V] scores, but for 32 MB of them on a CPU; they sum in float32
    whatever the dtype. Under autocast the inputs are cast to its dtype.

    Args:
        rep: representations [B, D].
        item_weight: item embeddings [V, D].
        target: int64 [B], 0 .. V-1 or `ignore_index`.
        bias: added to the scores [V]; minus infinity takes an item out.
        weight: of the classes [V], a constant; 'mean' divides by the sum of the targets' weights.
        reduction: 'mean' (over rows that are not ignored), 'sum' or 'none'.
        label_smoothing: 0 .. 1, the part of the target that is spread over all items.
        z_loss: at least 0.
        return_lse: also return the log of the sum of the exponentials of the scores [B].
        filter_eps: None is exact. Else the kernels may take the gradient of a block of scores as 0
            where all their probabilities are below this; not with label smoothing.

    Returns:
        Scalar, or [B] under 'none'; float32 for bfloat16 and float16. With `return_lse` a pair.
        Differentiable in `rep`, `item_weight` and `bias`, once. For one number of threads, or on
        one GPU, the results are the same to the bit each time.

    `item_weight` and `bias` may be DTensors over ranks (`distributed.items`), `weight` one or
    whole on every rank. Each rank calls with its rows of the global batch: 'mean' divides by what
    all ranks count, so that the ranks' results add up to the mean over the global batch.

    Raises:
        TypeError, ValueError: dtypes, shapes, an option out of its range, or a target out of range
            on a CPU. On a GPU such a target makes the loss and the gradients NaN, since looking
            would wait for it; under ``FMREC_FAST_CHECK=1`` it raises there too.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("rep", rep, "B D", sizes)
    check_shape("item_weight", item_weight, "V D", sizes)
    check_shape("target", target, "B", sizes)
    for name, vector in (("bias", bias), ("weight", weight)):
        if vector is not None:
            check_shape(name, vector, "V", sizes)
    kind = rep.device.type
    if _knows_autocast(kind) and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        with torch.autocast(kind, enabled=False):
            return item_cross_entropy(
                rep.to(dtype),
                item_weight.to(dtype),
                target,
                bias=None if bias is None else bias.to(dtype),
                weight=None if weight is None else weight.to(dtype),
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                logit_scale=logit_scale,
                return_lse=return_lse,
                filter_eps=filter_eps,
            )
    check_float(rep=rep, item_weight=item_weight, bias=bias, weight=weight)
    check_integer("target", target)
    if target.device != rep.device:
        raise ValueError(f"target is on {target.device}, rep on {rep.device}")
    if sizes["V"] == 0:
        raise ValueError(f"item_weight must have at least one row, got {tuple(item_weight.shape)}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in 0 .. 1, got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, got {z_loss}")
    if not math.isfinite(logit_scale):
        raise ValueError(f"logit_scale must be finite, got {logit_scale}")
    if filter_eps is not None and not 0 <= filter_eps < 1:
        raise ValueError(f"filter_eps must be in 0 .. 1 or None, got {filter_eps}")
    if filter_eps and label_smoothing:
        raise ValueError(
            f"filter_eps = {filter_eps} drops gradients that label_smoothing = {label_smoothing} "
            "gives every item; use one of them"
        )
    compiling = torch.compiler.is_compiling()
    if not compiling:
        if is_sharded(item_weight):
            from fmrec_fast.distributed.item_cross_entropy import item_cross_entropy as sharded

            return sharded(
                rep,
                item_weight,
                target,
                bias=bias,
                weight=weight,
                reduction=reduction,
                ignore_index=ignore_index,
                label_smoothing=label_smoothing,
                z_loss=z_loss,
                logit_scale=logit_scale,
                return_lse=return_lse,
                filter_eps=filter_eps,
            )
        check_range("target", target, 0, sizes["V"], {ignore_index: "ignore_index"})
    weight = None if weight is None else weight.detach()
    tensors = (rep, item_weight) if bias is None else (rep, item_weight, bias)
    backend = choose_backend(*tensors)
    smooth = label_smoothing > 0
    if backend is Backend.REFERENCE:
        row = reference.terms(
            rep,
            item_weight,
            target,
            bias=bias,
            weight=weight,
            logit_scale=logit_scale,
            smooth=smooth,
        )
    else:
        smoothing = None
        if smooth:
            smoothing = torch.ones_like(item_weight[:, 0]) if weight is None else weight
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        arguments = (
            rep,
            item_weight,
            bias,
            target,
            smoothing,
            float(logit_scale),
            float(filter_eps or 0.0),
            backend.value,
            needs_grad,
        )
        if compiling:
            row = Terms(*_registered(*arguments, ignore_index)[:3])
        elif needs_grad:
            row = Terms(*_Terms.apply(*arguments))
        else:
            statistics, _ = _statistics(*arguments)
            row = Terms(*_terms(statistics, item_weight, smoothing))
    loss = reference.reduce(
        row,
        target,
        sizes["V"],
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
    )
    return (loss, row.lse) if return_lse else loss


def choose_backend(rep: Tensor, *others: Tensor) -> Backend:
    """Where the op runs on these tensors; rep [B, D] first."""
    width = rep.shape[1]
    widest = WIDEST_TRITON.get(rep.dtype, 0) if rep.is_cuda else width
    declined = ""
    if not 0 < width <= widest:
        declined = f"its kernels take 1 .. {widest} channels of {rep.dtype}, got D = {width}"
    tensors = (rep, *others)
    return choose("item_cross_entropy", *tensors, declined=declined, dtypes=TRITON_DTYPES)


@constant_when_compiled  # torch 2.11 does not trace it
def _knows_autocast(device: str) -> bool:
    return torch.amp.is_autocast_available(device)


def _statistics(
    rep: Tensor,
    item_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    smoothing: Tensor | None,
    scale: float,
    filter_eps: float,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """The kernels' statistics [4, B] and, where they keep them, their scores; else [0].

    With scores x in base 2: max x, sum of 2^(x - max), max - x of the target (max where it is no
    item), sum of smoothing * (x - max). For items that are split over several tables, the maxima
    and sums of all of them give the common ones.
    """
    batch, items = rep.shape[0], item_weight.shape[0]
    if backend == Backend.TRITON.value:
        from fmrec_fast.kernels import item_cross_entropy as kernels

        statistics = rep.new_empty(4, batch, dtype=torch.float32)
        kernels.item_cross_entropy_forward(
            rep, item_weight, bias, smoothing, target, scale, statistics
        )
        return statistics, statistics.new_empty(0)
    cpp = extension.load()
    statistics = rep.new_empty(4, batch, dtype=torch.float64)
    size = cpp.item_cross_entropy_cache(batch, items) if keep else 0
    cache = memory.empty(size if size <= CACHED_SCORES else 0)
    cpp.item_cross_entropy_forward(
        _array(rep),
        _array(item_weight),
        _array(bias),
        _array(smoothing),
        _array(target),
        scale,
        statistics.numpy(),
        cache.numpy() if len(cache) else None,
        torch.get_num_threads(),
    )
    return statistics, cache


def _array(tensor: Tensor | None):
    return None if tensor is None else tensor.detach().contiguous().numpy()


def _terms(
    statistics: Tensor, item_weight: Tensor, smoothing: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The fields of `Terms`."""
    largest, total, gap, dot = statistics.unbind()
    log_total = total.log()
    dtype = reference.accumulator(item_weight.dtype)
    # Without smoothing nobody reads the third term.
    count = 0 if smoothing is None else smoothing.to(statistics.dtype).sum()
    return (
        (gap * LN_2 + log_total).to(dtype),
        (largest * LN_2 + log_total).to(dtype),
        (count * log_total - dot * LN_2).to(dtype),
    )


def _gradients(
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_smooth: Tensor | None,
    rep: Tensor,
    item_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    smoothing: Tensor | None,
    statistics: Tensor,
    cache: Tensor,
    scale: float,
    filter_eps: float,
    backend: str,
    wants: list[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the terms in rep, item_weight and bias, each if it is wanted."""
    share = 1 / statistics[1]
    coefficient = statistics.new_zeros(rep.shape[0])
    if d_nll is not None:
        coefficient = coefficient + d_nll
    if d_lse is not None:
        coefficient = coefficient + d_lse
    if d_smooth is not None and smoothing is not None:
        coefficient = coefficient + smoothing.to(share.dtype).sum() * d_smooth
    nothing = torch.zeros_like(share)
    rows = torch.stack(
        (
            statistics[0],
            coefficient * share,
            nothing if d_smooth is None else -d_smooth.to(share.dtype),
            nothing if d_nll is None else d_nll.to(share.dtype),
            share,
        )
    ).float()
    outputs = [
        torch.empty_like(t, memory_format=torch.contiguous_format)
        if t is not None and want
        else None
        for t, want in zip((rep, item_weight, bias), wants)
    ]
    d_rep, d_weight, d_bias = outputs
    if backend == Backend.TRITON.value:
        from fmrec_fast.kernels import item_cross_entropy_backward as kernels

        kernels.item_cross_entropy_backward(
            rep,
            item_weight,
            bias,
            smoothing,
            target,
            scale,
            rows,
            filter_eps,
            d_rep,
            d_weight,
            d_bias,
        )
    else:
        extension.load().item_cross_entropy_backward(
            _array(rep),
            _array(item_weight),
            _array(bias),
            _array(smoothing),
            _array(target),
            scale,
            rows.numpy(),
            filter_eps,
            cache.numpy() if len(cache) else None,
            *(_array(output) for output in outputs),
            torch.get_num_threads(),
        )
    return d_rep, d_weight, d_bias


class _Terms(torch.autograd.Function):
    """The kernels' `Terms`."""

    @staticmethod
    def forward(ctx, rep, item_weight, bias, target, smoothing, scale, filter_eps, backend, keep):
        statistics, cache = _statistics(
            rep, item_weight, bias, target, smoothing, scale, filter_eps, backend, keep
        )
        ctx.save_for_backward(rep, item_weight, bias, target, smoothing, statistics, cache)
        ctx.constants = (scale, filter_eps, backend)
        ctx.set_materialize_grads(False)
        return _terms(statistics, item_weight, smoothing)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_nll, d_lse, d_smooth):
        wants = list(ctx.needs_input_grad[:3])
        given = (d_nll, d_lse, d_smooth, *ctx.saved_tensors, *ctx.constants, wants)
        found = _gradients(*given)
        return *found, None, None, None, None, None, None


@torch.library.custom_op("fmrec_fast::item_cross_entropy", mutates_args=())
def _registered(
    rep: Tensor,
    item_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    smoothing: Tensor | None,
    scale: float,
    filter_eps: float,
    backend: str,
    keep: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What torch.compile and torch.export see: the three terms, the statistics and the cache."""
    allowed = {ignore_index: "ignore_index"}
    check_range("target", target, 0, item_weight.shape[0], allowed)
    statistics, cache = _statistics(
        rep, item_weight, bias, target, smoothing, scale, filter_eps, backend, keep
    )
    nll, lse, smooth = _terms(statistics, item_weight, smoothing)
    return nll, lse, smooth, statistics, cache


@_registered.register_fake
def _(rep, item_weight, bias, target, smoothing, scale, filter_eps, backend, keep, ignore_index):
    batch = rep.shape[0]
    row = [rep.new_empty(batch, dtype=reference.accumulator(rep.dtype)) for _ in range(3)]
    triton = backend == Backend.TRITON.value
    statistics = rep.new_empty(4, batch, dtype=torch.float32 if triton else torch.float64)
    size = 0
    if not triton and keep:
        size = extension.load().item_cross_entropy_cache(batch, item_weight.shape[0])
    cached = statistics.new_empty(size if size <= CACHED_SCORES else 0, dtype=torch.float32)
    return *row, statistics, cached


@torch.library.custom_op("fmrec_fast::item_cross_entropy_backward", mutates_args=())
def _registered_backward(
    d_nll: Tensor | None,
    d_lse: Tensor | None,
    d_smooth: Tensor | None,
    rep: Tensor,
    item_weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    smoothing: Tensor | None,
    statistics: Tensor,
    cache: Tensor,
    scale: float,
    filter_eps: float,
    backend: str,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients; [0] for one that is not wanted."""
    found = _gradients(
        d_nll,
        d_lse,
        d_smooth,
        rep,
        item_weight,
        bias,
        target,
        smoothing,
        statistics,
        cache,
        scale,
        filter_eps,
        backend,
        wants,
    )
    nll, lse, smooth = (rep.new_empty(0) if gradient is None else gradient for gradient in found)
    return nll, lse, smooth


@_registered_backward.register_fake
def _(d_nll, d_lse, d_smooth, rep, item_weight, bias, *others):
    wants = others[-1]
    shapes = (rep.shape, item_weight.shape, item_weight.shape[:1])
    present = (True, True, bias is not None)
    return tuple(
        rep.new_empty(shape if want and there else (0,))
        for shape, want, there in zip(shapes, wants, present)
    )


def _save(ctx, inputs, output) -> None:
    rep, item_weight, bias, target, smoothing, scale, filter_eps, backend, _, _ = inputs
    ctx.save_for_backward(rep, item_weight, bias, target, smoothing, *output[3:])
    ctx.constants = (scale, filter_eps, backend)
    ctx.set_materialize_grads(False)


def _registered_gradients(ctx, d_nll, d_lse, d_smooth, *_):
    wants = list(ctx.needs_input_grad[:3])
    found = _registered_backward(d_nll, d_lse, d_smooth, *ctx.saved_tensors, *ctx.constants, wants)
    gradients = [g if want else None for g, want in zip(found, wants)]
    return *gradients, None, None, None, None, None, None, None


_registered.register_autograd(_registered_gradients, setup_context=_save)
