"""Definition of `linear`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor, precision: str = "float32") -> Tensor:
    """x weight^T + bias: [..., I] -> [..., O]; the operands of every product, of the gradients'
    too, are `rounded` to the precision."""
    if precision == "float32":
        return F.linear(x, weight, bias)
    return _RoundedLinear.apply(x, weight, bias, precision)


def rounded(x: Tensor, precision: str) -> Tensor:
    """`x` as an operand of a product of this precision, in the dtype of `x`.

    'float32' is `x` itself; 'tf32' keeps 10 bits of mantissa, rounded to nearest, halves away
    from 0; 'bf16' is bfloat16. The gradient passes as if nothing were rounded.
    """
    if precision == "float32":
        return x
    if precision == "bf16":
        near = x.detach().to(torch.bfloat16)
    else:
        bits = x.detach().to(torch.float32).view(torch.int32)
        near = ((bits + 0x1000) & -0x2000).view(torch.float32)
    return x + (near.to(x.dtype) - x).detach()


def _operand(x: Tensor, precision: str) -> Tensor:
    """As `rounded`, but bfloat16 in its own dtype."""
    return x.to(torch.bfloat16) if precision == "bf16" else rounded(x, precision)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b, accumulated and returned in `dtype`."""
    if a.device.type == "cuda" and a.dtype == torch.bfloat16 and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.to(dtype) @ b.to(dtype)


class _RoundedLinear(torch.autograd.Function):
    """Operands rounded, which is also how the input is kept for the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, precision):
        near = _operand(x, precision).flatten(0, -2)
        near_weight = _operand(weight, precision)
        ctx.save_for_backward(near, near_weight)
        ctx.shape, ctx.precision = x.shape, precision
        out = _product(near, near_weight.T, x.dtype) + bias
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        grad = grad.flatten(0, -2)
        near = _operand(grad, ctx.precision)
        d_x = _product(near, weight, grad.dtype).view(ctx.shape) if wants_x else None
        d_weight = _product(near.T, x, grad.dtype) if wants_weight else None
        return d_x, d_weight, grad.sum(0) if wants_bias else None, None
