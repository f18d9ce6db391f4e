"""Definition of `linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor, precision: str = "float32") -> Tensor:
    """x weight^T + bias: [..., I] -> [..., O]; 'bf16' rounds the operands of every product."""
    if precision == "bf16":
        return _LinearOfBfloat16.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b of bfloat16 matrices, accumulated and returned in `dtype`."""
    if a.device.type == "cuda" and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(dtype) @ b.to(dtype)


class _LinearOfBfloat16(torch.autograd.Function):
    """Operands in bfloat16, which is also how the input is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        near, near_weight = x.to(torch.bfloat16).flatten(0, -2), weight.to(torch.bfloat16)
        ctx.save_for_backward(near, near_weight)
        ctx.shape = x.shape
        out = _product(near, near_weight.T, x.dtype) + bias
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        grad = grad.flatten(0, -2)
        near = grad.to(torch.bfloat16)
        d_x = _product(near, weight, grad.dtype).view(ctx.shape) if wants_x else None
        d_weight = _product(near.T, x, grad.dtype) if wants_weight else None
        return d_x, d_weight, grad.sum(0) if wants_bias else None
