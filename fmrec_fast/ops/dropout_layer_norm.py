"""Dropout and the layer norm after it, in one pass each way."""

from __future__ import annotations

import torch
from torch import Tensor

from fmrec_fast import extension, memory
from fmrec_fast.backend import Backend, candidate, choose, log_run
from fmrec_fast.forward_mode import NO_RULE, is_dual, is_wrapped
from fmrec_fast.ops._checks import check_float, check_shape, request_rows
from fmrec_fast.reference import dropout_layer_norm as reference

WIDTH = 16  # the C++ kernel's widths are multiples of it


def dropout_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    *,
    seed: Tensor,
    rows: Tensor | None = None,
    site: int = 0,
    position_offset: int = 0,
    position_stride: int = 1,
) -> Tensor:
    """Dropout with masks from the counter-based stream, and the layer norm of what is left.

    Equivalent PyTorch, the drop as `dropout` has it::

        F.layer_norm(drop(x), (D,), weight, bias, 1e-12)

    For the backward pass `x` and the masks, a bit an element, are kept.

    Args:
        x: [B, P, D].
        weight, bias: [D].
        p: probability of dropping, in [0, 1).
        seed, rows, site, position_offset, position_stride: as in `dropout`.

    Returns:
        [B, P, D]. Differentiable in all that is floating point. On a CPU the results do not depend
        on the number of threads.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or p are off.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B P D", sizes)
    check_shape("weight", weight, "D", sizes)
    check_shape("bias", bias, "D", sizes)
    check_float(x=x, weight=weight, bias=bias)
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    rows = request_rows(rows, x.shape[0], x.device)
    declined = ""
    if is_dual(x, weight, bias):
        declined = NO_RULE
    elif not _covers(sizes["D"]):
        declined = f"its kernel takes widths that are multiples of {WIDTH}, got {sizes['D']}"
    constants = (site, position_offset, position_stride, p)
    if choose("dropout_layer_norm", x, weight, bias, declined=declined) is Backend.CPP:
        if torch.compiler.is_compiling():
            given = (x, weight, bias, rows, seed, *constants)
            return torch.ops.fmrec_fast.dropout_layer_norm(*given)[0]
        return _DropoutLayerNorm.apply(x, weight, bias, rows, seed, constants)
    return reference.dropout_layer_norm(
        x,
        weight,
        bias,
        p,
        seed=seed,
        rows=rows,
        site=site,
        position_offset=position_offset,
        position_stride=position_stride,
    )


def _covers(width: int) -> bool:
    return width > 0 and width % WIDTH == 0


def joins(x: Tensor) -> bool:
    """Whether dropout and norm of `x` [B, P, D] are to call the op: where its kernel would run."""
    if candidate(x.device) is not Backend.CPP or not _covers(x.shape[-1]):
        return False
    return torch.compiler.is_compiling() or not (is_wrapped(x) or is_dual(x))


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, rows: Tensor, seed: Tensor, constants: tuple
) -> tuple[Tensor, Tensor]:
    """The result and the masks [B, P, 64-bit words], none without dropout. `x` and the parameters
    are contiguous."""
    *place, p = constants
    out = memory.empty(*x.shape)
    words = -(-x.shape[2] // 64) if p > 0 else 0
    kept = torch.empty(*x.shape[:2], words, dtype=torch.int64)
    extension.load().dropout_layer_norm_forward(
        x.detach().numpy(),
        weight.detach().numpy(),
        bias.detach().numpy(),
        rows.numpy(),
        int(seed),
        *place,
        p,
        kept.numpy() if words else None,
        out.numpy(),
        torch.get_num_threads(),
    )
    return out, kept


def _backward(
    grad: Tensor, x: Tensor, weight: Tensor, kept: Tensor, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `x`, the weight and the bias. `x`, weight and masks contiguous."""
    d_x, d_weight, d_bias = (
        memory.empty(*x.shape),
        torch.empty_like(weight),
        torch.empty_like(weight),
    )
    extension.load().dropout_layer_norm_backward(
        grad.contiguous().numpy(),
        x.numpy(),
        weight.numpy(),
        p,
        kept.numpy() if kept.shape[2] else None,
        d_x.numpy(),
        d_weight.numpy(),
        d_bias.numpy(),
        torch.get_num_threads(),
    )
    return d_x, d_weight, d_bias


class _DropoutLayerNorm(torch.autograd.Function):
    """The C++ kernels; the masks are kept, a bit an element, what was dropped is not."""

    @staticmethod
    def forward(ctx, x, weight, bias, rows, seed, constants):
        x, weight = x.contiguous(), weight.contiguous()
        out, kept = _forward(x, weight, bias.contiguous(), rows, seed, constants)
        ctx.save_for_backward(x, weight, kept)
        ctx.p = constants[-1]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, kept = ctx.saved_tensors
        return *_backward(grad, x, weight, kept, ctx.p), None, None, None


# --- for torch.compile and torch.export -----------------------------------------------------------


@torch.library.custom_op("fmrec_fast::dropout_layer_norm", mutates_args=(), device_types="cpu")
def _registered(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor,
    seed: Tensor,
    site: int,
    position_offset: int,
    position_stride: int,
    p: float,
) -> tuple[Tensor, Tensor]:
    log_run("dropout_layer_norm", "cpp")
    x, weight, bias, rows = (t.contiguous() for t in (x, weight, bias, rows))
    return _forward(x, weight, bias, rows, seed, (site, position_offset, position_stride, p))


@torch.library.custom_op(
    "fmrec_fast::dropout_layer_norm_backward", mutates_args=(), device_types="cpu"
)
def _registered_backward(
    grad: Tensor, x: Tensor, weight: Tensor, kept: Tensor, p: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(grad, x.contiguous(), weight.contiguous(), kept.contiguous(), p)


@_registered.register_fake
def _(x, weight, bias, rows, seed, site, position_offset, position_stride, p):
    words = -(-x.shape[2] // 64) if p > 0 else 0
    return x.new_empty(x.shape), x.new_empty(*x.shape[:2], words, dtype=torch.int64)


@_registered_backward.register_fake
def _(grad, x, weight, kept, p):
    return x.new_empty(x.shape), *(weight.new_empty(weight.shape) for _ in range(2))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2], output[1])
    ctx.p = inputs[-1]


def _gradients(ctx, grad, _):
    gradients = torch.ops.fmrec_fast.dropout_layer_norm_backward(grad, *ctx.saved_tensors, ctx.p)
    return *gradients, *[None] * 6


_registered.register_autograd(_gradients, setup_context=_setup)
