"""RMS norm over the last dimension, and its derivative along a direction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmrec_fast import extension, memory, tangents
from fmrec_fast.backend import Backend, choose, current_backend
from fmrec_fast.forward_mode import NO_RULE, is_dual, is_wrapped, join, split
from fmrec_fast.ops._checks import check_float, check_shape
from fmrec_fast.reference import rms_norm as reference

COMPILED = "the compiler fuses its definition with what is around it"


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root mean square norm (Fave's blocks).

    Equivalent PyTorch::

        x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-8) * weight

    Args:
        x: [..., D], D at least 1.
        weight: [D].

    Returns:
        As `x`. Differentiable in both, and in forward mode in `x`. On a CPU the results do not
        depend on the number of threads.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not agree.
        BackendError: a named backend cannot run.
    """
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have at least one channel, got shape {tuple(x.shape)}")
    check_shape("weight", weight, "D", {"D": x.shape[-1]})
    check_float(x=x, weight=weight)
    declined = ""
    if torch.compiler.is_compiling():
        declined = COMPILED
    elif is_wrapped(x) or is_dual(weight):
        declined = NO_RULE
    backend = choose("rms_norm", x, weight, declined=declined)
    if backend is Backend.REFERENCE and (declined or current_backend() is Backend.REFERENCE):
        return reference.rms_norm(x, weight)
    value, tangent = split(x)
    if backend is Backend.REFERENCE:  # in few passes, with the gradients written out
        out, d_out = tangents.rms_norm(value, weight, tangent)
    elif tangent is None:
        out, d_out = _RmsNorm.apply(value, weight), None
    else:
        out, d_out = _RmsNormTangent.apply(value, tangent, weight)
    return out if d_out is None else join(out, d_out)


def _rows(x: Tensor | None) -> Any:
    return None if x is None else x.detach().flatten(0, -2).numpy()


def _forward(x: Tensor, dx: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor | None]:
    """All contiguous."""
    out, d_out = memory.empty(*x.shape), None if dx is None else memory.empty(*x.shape)
    extension.load().rms_norm_forward(
        _rows(x),
        weight.detach().numpy(),
        _rows(out),
        torch.get_num_threads(),
        _rows(dx),
        _rows(d_out),
    )
    return out, d_out


def _backward(
    grad: Tensor, d_grad: Tensor | None, x: Tensor, dx: Tensor | None, weight: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x, dx and the weight; x, dx and the weight contiguous."""
    g_x, g_dx = memory.empty(*x.shape), None if dx is None else memory.empty(*x.shape)
    g_weight = torch.empty_like(weight)
    extension.load().rms_norm_backward(
        _rows(grad.contiguous()),
        _rows(x),
        weight.detach().numpy(),
        _rows(g_x),
        g_weight.numpy(),
        torch.get_num_threads(),
        None if d_grad is None else _rows(d_grad.contiguous()),
        _rows(dx),
        _rows(g_dx),
    )
    return g_x, g_dx, g_weight


class _RmsNorm(torch.autograd.Function):
    """The C++ kernels."""

    @staticmethod
    def forward(ctx, x, weight):
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        return _forward(x, None, weight)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        g_x, _, g_weight = _backward(grad, None, x, None, weight)
        return g_x, g_weight


class _RmsNormTangent(torch.autograd.Function):
    """The C++ kernels, with the derivative along `dx`."""

    @staticmethod
    def forward(ctx, x, dx, weight):
        x, dx, weight = x.contiguous(), dx.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, dx, weight)
        return _forward(x, dx, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, d_grad):
        return _backward(grad, d_grad, *ctx.saved_tensors)
