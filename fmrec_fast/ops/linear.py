"""A linear layer on many rows, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fmrec_fast import extension, memory
from fmrec_fast.backend import Backend, choose, constant_when_compiled, log_run
from fmrec_fast.config import PRECISIONS
from fmrec_fast.forward_mode import NO_RULE, is_dual, join, split
from fmrec_fast.ops._checks import check_float, check_shape
from fmrec_fast.reference import linear as reference

# The C++ kernel's widths are multiples of it, and fewer rows than this are not worth packing for.
WIDTH, FEWEST_ROWS = 16, 64


def linear(x: Tensor, weight: Tensor, bias: Tensor, *, precision: str = "float32") -> Tensor:
    """A linear layer.

    Equivalent PyTorch::

        F.linear(x, weight, bias)

    Args:
        x: [..., I].
        weight: [O, I]; bias: [O].
        precision: 'float32', or what the operands of the product, and of those of its gradients,
            are rounded to before they are multiplied and added up in float32: 'bf16', or 'tf32' (10
            bits of mantissa) or closer. Results are float32. The C++ kernel rounds on AMX only, for
            'tf32' to sums of two bfloat16s: a product is off by at most 2^-16 of itself, TF32's by
            2^-10. Elsewhere it multiplies in float32 for 'tf32', and leaves 'bf16' to the
            definition.

    Returns:
        [..., O]. Differentiable in all three, and in forward mode in `x`. On a CPU the results do
        not depend on the number of threads.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not agree.
        BackendError: a named backend cannot run.
    """
    sizes = {"I": x.shape[-1]}
    check_shape("weight", weight, "O I", sizes)
    check_shape("bias", bias, "O", sizes)
    check_float(x=x, weight=weight, bias=bias)
    check_precision(precision)
    declined = ""
    value, tangent = split(x)
    if tangent is not None and not is_dual(weight, bias):
        # The tangent goes through the same product, without the bias.
        return join(
            linear(value, weight, bias, precision=precision),
            linear(tangent, weight, torch.zeros_like(bias), precision=precision),
        )
    if is_dual(x, weight, bias):
        declined = NO_RULE
    elif not multiplies(precision):
        declined = f"without AMX its kernel multiplies in float32 only, got precision {precision!r}"
    elif sizes["I"] % WIDTH or sizes["O"] % WIDTH or 0 in sizes.values():
        declined = (
            f"its kernel takes widths that are multiples of {WIDTH}, got {sizes['I']} and "
            f"{sizes['O']}"
        )
    elif not torch.compiler.is_compiling() and x.numel() < FEWEST_ROWS * sizes["I"]:
        declined = f"its kernel is for at least {FEWEST_ROWS} rows"
    if choose("linear", x, weight, bias, declined=declined) is Backend.CPP:
        if torch.compiler.is_compiling():
            return torch.ops.fmrec_fast.linear(x, weight, bias, precision)
        return _Linear.apply(x, weight, bias, precision)
    return reference.linear(x, weight, bias, precision)


def check_precision(precision: str) -> None:
    """Raises ValueError for what is not one of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {PRECISIONS}, got {precision!r}")


def multiplies(precision: str) -> bool:
    """Whether the C++ kernels multiply in this precision, or closer, here."""
    return precision != "bf16" or has_tiles()


@constant_when_compiled
def has_tiles() -> bool:
    """Whether the C++ kernels multiply on AMX tiles here."""
    return extension.available() and extension.load().isa().startswith("amx")


def _forward(x: Tensor, weight: Tensor, bias: Tensor, precision: str) -> Tensor:
    """`x` and `weight` contiguous."""
    out = memory.empty(*x.shape[:-1], weight.shape[0])
    extension.load().linear_forward(
        x.detach().flatten(0, -2).numpy(),
        weight.detach().numpy(),
        bias.detach().contiguous().numpy(),
        out.flatten(0, -2).numpy(),
        torch.get_num_threads(),
        precision,
    )
    return out


def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    precision: str,
    wants_x: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`x` and `weight` contiguous."""
    d_x = memory.empty(*x.shape) if wants_x else None
    d_weight = memory.empty(*weight.shape) if wants_weight else None
    d_bias = weight.new_empty(weight.shape[0]) if wants_bias else None
    extension.load().linear_backward(
        grad.contiguous().flatten(0, -2).numpy(),
        x.flatten(0, -2).numpy(),
        weight.numpy(),
        None if d_x is None else d_x.flatten(0, -2).numpy(),
        None if d_weight is None else d_weight.numpy(),
        None if d_bias is None else d_bias.numpy(),
        torch.get_num_threads(),
        precision,
    )
    return d_x, d_weight, d_bias


class _Linear(torch.autograd.Function):
    """The C++ kernels."""

    @staticmethod
    def forward(ctx, x, weight, bias, precision):
        x, weight = x.contiguous(), weight.contiguous()
        ctx.save_for_backward(x, weight)
        ctx.precision = precision
        return _forward(x, weight, bias, precision)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return *_backward(grad, x, weight, ctx.precision, *ctx.needs_input_grad[:3]), None


# --- for torch.compile and torch.export -----------------------------------------------------------


@torch.library.custom_op("fmrec_fast::linear", mutates_args=(), device_types="cpu")
def _registered(x: Tensor, weight: Tensor, bias: Tensor, precision: str) -> Tensor:
    log_run("linear", "cpp")
    return _forward(x.contiguous(), weight.contiguous(), bias, precision)


@torch.library.custom_op("fmrec_fast::linear_backward", mutates_args=(), device_types="cpu")
def _registered_backward(
    grad: Tensor, x: Tensor, weight: Tensor, precision: str
) -> tuple[Tensor, Tensor, Tensor]:
    every = True, True, True
    return _backward(grad, x.contiguous(), weight.contiguous(), precision, *every)  # type: ignore


@_registered.register_fake
def _(x, weight, bias, precision):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@_registered_backward.register_fake
def _(grad, x, weight, precision):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(len(weight))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.precision = inputs[3]


def _gradients(ctx, grad):
    return *torch.ops.fmrec_fast.linear_backward(grad, *ctx.saved_tensors, ctx.precision), None


_registered.register_autograd(_gradients, setup_context=_setup)
