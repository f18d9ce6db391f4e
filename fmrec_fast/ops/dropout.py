"""Dropout whose masks are a function of (seed, row, position, site, channel)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrec_fast import extension, memory, noise, tangents
from fmrec_fast.backend import Backend, candidate, choose, current_backend, log_run
from fmrec_fast.forward_mode import NO_RULE, is_dual, join, split
from fmrec_fast.ops._checks import check_float, check_shape, request_rows
from fmrec_fast.reference import dropout as reference


def dropout(
    x: Tensor,
    p: float,
    *,
    seed: Tensor,
    rows: Tensor | None = None,
    site: int = 0,
    residual: Tensor | None = None,
    activation: str | None = None,
    position_offset: int = 0,
    position_stride: int = 1,
    row_scale: Tensor | None = None,
) -> Tensor:
    """Inverted dropout with masks from the counter-based stream, residual added.

    Equivalent PyTorch::

        kept = fmrec_fast.reference.dropout.dropout_mask(x.shape, p, seed=seed, rows=rows, ...)
        residual + row_scale[:, None, None] * torch.where(kept, f(x) / (1 - p), 0)

    where f is the identity or, with ``activation='gelu'``, ``F.gelu(x, approximate='tanh')``.

    An element is kept with probability 1 - p (to 2^-32), whatever the batch, the backend, or the
    part of the tensor that is computed: position i of `x` has the stream's position
    ``position_offset + position_stride * i``.

    Args:
        x: [B, P, C].
        p: probability of dropping, in [0, 1).
        seed: int64 scalar tensor (already derived for this use).
        rows: int64 [B]; None is 0 .. B-1.
        site: which of the network's dropouts this is.
        residual: [B, P, C], added after dropping.
        activation: None or 'gelu', applied before dropping.
        row_scale: [B], drop path's factors; None is 1. Not differentiable in it.

    Raises:
        TypeError, ValueError: dtypes, shapes or p are off.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B P C", sizes)
    if residual is not None:
        check_shape("residual", residual, "B P C", sizes)
    check_float(x=x, residual=residual, row_scale=row_scale)
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    if row_scale is not None:
        check_shape("row_scale", row_scale, "B", sizes)
        if is_dual(row_scale) or (torch.is_grad_enabled() and row_scale.requires_grad):
            raise ValueError("row_scale must need no derivative, got one that does")
        if torch.compiler.is_compiling() or candidate(x.device) is Backend.TRITON:
            dropped = dropout(
                x,
                p,
                seed=seed,
                rows=rows,
                site=site,
                activation=activation,
                position_offset=position_offset,
                position_stride=position_stride,
            )
            return reference.add_scaled(residual, dropped, row_scale)
    value, tangent = split(x)
    constants = (site, position_offset, position_stride, p)
    if activation == "gelu" and tangent is not None and current_backend() is not Backend.REFERENCE:
        rows = request_rows(rows, x.shape[0], x.device)
        alone = residual is None and row_scale is None
        if alone and choose("dropout", value) is Backend.CPP:
            return join(*_DropoutGelu.apply(value, tangent, rows, seed, constants))
        x, activation = join(*tangents.gelu(value, tangent)), None
    if p == 0 or activation not in (None, "gelu"):
        x = reference.activate(x, activation)
        return reference.add_scaled(residual, x, row_scale)
    rows = request_rows(rows, x.shape[0], x.device)
    value, tangent = split(x)  # an activation may have been applied
    if activation is None and tangent is not None:
        # Linear: the tangent is dropped by the same mask.
        given: dict[str, Any] = {
            "seed": seed,
            "rows": rows,
            "site": site,
            "position_offset": position_offset,
            "position_stride": position_stride,
            "row_scale": row_scale,
        }
        own, own_tangent = (None, None) if residual is None else split(residual)
        return join(
            dropout(value, p, residual=own, **given),
            dropout(tangent, p, residual=own_tangent, **given),
        )
    backend = choose("dropout", x, declined=NO_RULE if is_dual(x, residual) else "")
    if backend is Backend.REFERENCE:
        return reference.dropout(
            x,
            p,
            seed=seed,
            rows=rows,
            site=site,
            residual=residual,
            activation=activation,
            position_offset=position_offset,
            position_stride=position_stride,
            row_scale=row_scale,
        )
    constants = (site, position_offset, position_stride, p)
    gelu = activation == "gelu"
    if torch.compiler.is_compiling():
        return torch.ops.fmrec_fast.dropout(
            x, residual, rows, seed, *constants, gelu, backend.value
        )
    return _Dropout.apply(x, residual, rows, seed, row_scale, constants, gelu, backend)


def _run(
    x: Tensor,
    residual: Tensor | None,
    rows: Tensor,
    seed: Tensor,
    constants: tuple,
    *,
    gelu: bool = False,
    gelu_at: Tensor | None = None,
    row_scale: Tensor | None = None,
    backend: Backend = Backend.CPP,
) -> Tensor:
    x = x.contiguous()
    if backend is Backend.TRITON:
        out = torch.empty_like(x)
        from fmrec_fast.kernels import dropout as kernels

        *place, p = constants
        residual, gelu_at = (None if t is None else t.contiguous() for t in (residual, gelu_at))
        numbers = (*place, reference.threshold(p), 1 / (1 - p))
        kernels.dropout(x, residual, rows, seed, *numbers, out, gelu=gelu, gelu_at=gelu_at)
        return out
    out = memory.empty(*x.shape)
    extension.load().dropout(
        x.detach().numpy(),
        None if residual is None else residual.contiguous().detach().numpy(),
        rows.numpy(),
        int(seed),
        *constants,
        out.numpy(),
        torch.get_num_threads(),
        gelu,
        None if gelu_at is None else gelu_at.contiguous().detach().numpy(),
        row_scale=None if row_scale is None else row_scale.contiguous().numpy(),
    )
    return out


def _run_pair(
    x: Tensor,
    dx: Tensor,
    rows: Tensor,
    seed: Tensor,
    constants: tuple,
    *,
    gelu_at: Tensor | None = None,
    d_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Dropped GELU at `x` and its derivative along `dx`, by the C++ kernel; with `gelu_at` the
    gradients of that point and of `dx`, from those of both results."""
    out, d_out = memory.empty(*x.shape), memory.empty(*x.shape)
    extension.load().dropout(
        x.detach().contiguous().numpy(),
        None,
        rows.numpy(),
        int(seed),
        *constants,
        out.numpy(),
        torch.get_num_threads(),
        gelu_at is None,
        None if gelu_at is None else gelu_at.detach().contiguous().numpy(),
        dx.detach().contiguous().numpy(),
        None if d_grad is None else d_grad.contiguous().numpy(),
        d_out.numpy(),
    )
    return out, d_out


class _Dropout(torch.autograd.Function):
    """The kernels; masks are regenerated in the backward pass, not stored."""

    @staticmethod
    def forward(ctx, x, residual, rows, seed, row_scale, constants, gelu, backend):
        ctx.save_for_backward(rows, seed, x if gelu else None, row_scale)
        ctx.constants, ctx.backend = constants, backend
        options = {"gelu": gelu, "row_scale": row_scale, "backend": backend}
        return _run(x, residual, rows, seed, constants, **options)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, seed, gelu_at, row_scale = ctx.saved_tensors
        dx = None
        if ctx.needs_input_grad[0]:
            options = {"gelu_at": gelu_at, "row_scale": row_scale, "backend": ctx.backend}
            dx = _run(grad, None, rows, seed, ctx.constants, **options)
        return dx, grad if ctx.needs_input_grad[1] else None, *[None] * 6


class _DropoutGelu(torch.autograd.Function):
    """Dropped GELU with its tangent, all by the C++ kernel: value and tangent are
    ``mask gelu(x)`` and ``mask gelu'(x) dx``."""

    @staticmethod
    def forward(ctx, x, dx, rows, seed, constants):
        ctx.save_for_backward(x, dx, rows, seed)
        ctx.constants = constants
        return _run_pair(x, dx, rows, seed, constants)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_tangent):
        x, dx, rows, seed = ctx.saved_tensors
        given = {"gelu_at": x, "d_grad": grad_tangent}
        gradients = _run_pair(grad, dx, rows, seed, ctx.constants, **given)
        return *gradients, None, None, None


class StreamDropout:
    """All dropouts of one forward pass, from one seed (a `reference.encoder.Drop`)."""

    def __init__(self, seed: Tensor, rows: Tensor) -> None:
        self.seed, self.rows = noise.derive_seed(seed, noise.Use.DROPOUT), rows

    def __call__(
        self,
        x: Tensor,
        p: float,
        site: int,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        position_offset: int = 0,
        position_stride: int = 1,
        row_scale: Callable[[], Tensor | None] | None = None,
    ) -> Tensor:
        return dropout(
            x,
            p,
            seed=self.seed,
            rows=self.rows,
            site=site,
            residual=residual,
            activation=activation,
            position_offset=position_offset,
            position_stride=position_stride,
            row_scale=None if row_scale is None else row_scale(),
        )


class TorchDropout:
    """``F.dropout`` from torch's default generator, in the order of calls (as published)."""

    def __call__(
        self,
        x: Tensor,
        p: float,
        site: int,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        row_scale: Callable[[], Tensor | None] | None = None,
        **_: int,
    ) -> Tensor:
        dropped = F.dropout(reference.activate(x, activation), p)
        return reference.add_scaled(residual, dropped, row_scale() if row_scale else None)


# --- for torch.compile and torch.export -----------------------------------------------------------


@torch.library.custom_op("fmrec_fast::dropout", mutates_args=())
def _registered(
    x: Tensor,
    residual: Tensor | None,
    rows: Tensor,
    seed: Tensor,
    site: int,
    position_offset: int,
    position_stride: int,
    p: float,
    gelu: bool,
    backend: str,
) -> Tensor:
    log_run("dropout", backend)
    constants = (site, position_offset, position_stride, p)
    rows = rows.contiguous()
    return _run(x, residual, rows, seed, constants, gelu=gelu, backend=Backend(backend))


@torch.library.custom_op("fmrec_fast::dropout_backward", mutates_args=())
def _registered_backward(
    grad: Tensor,
    gelu_at: Tensor | None,
    rows: Tensor,
    seed: Tensor,
    site: int,
    position_offset: int,
    position_stride: int,
    p: float,
    backend: str,
) -> Tensor:
    constants = (site, position_offset, position_stride, p)
    rows = rows.contiguous()
    return _run(grad, None, rows, seed, constants, gelu_at=gelu_at, backend=Backend(backend))


@_registered.register_fake
def _(x, residual, rows, seed, site, position_offset, position_stride, p, gelu, backend):
    return x.new_empty(x.shape)


@_registered_backward.register_fake
def _(grad, gelu_at, rows, seed, site, position_offset, position_stride, p, backend):
    return grad.new_empty(grad.shape)


def _setup(ctx, inputs, output):
    x, _, rows, seed, *constants, gelu, backend = inputs
    ctx.constants = (*constants, backend)
    ctx.save_for_backward(x if gelu else None, rows, seed)


def _gradients(ctx, grad):
    d_x = None
    if ctx.needs_input_grad[0]:
        d_x = torch.ops.fmrec_fast.dropout_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return (d_x, grad if ctx.needs_input_grad[1] else None, *[None] * 8)


_registered.register_autograd(_gradients, setup_context=_setup)
