"""Multi-head self-attention after the projections, with dropout on its probabilities."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fmrec_fast import extension, memory, tangents
from fmrec_fast.backend import (
    Backend,
    candidate,
    choose,
    constant_when_compiled,
    current_backend,
    log_run,
)
from fmrec_fast.forward_mode import NO_RULE, is_dual, is_wrapped, join, split
from fmrec_fast.ops._checks import check_float, check_shape, request_rows
from fmrec_fast.ops.dropout import dropout
from fmrec_fast.reference import attention as reference
from fmrec_fast.reference.dropout import threshold
from fmrec_fast.reference.rotary import angles


def attention(
    qkv: Tensor,
    query_scale: Tensor,
    *,
    num_heads: int,
    p: float = 0.0,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
    site: int = 0,
    inv_freq: Tensor | None = None,
) -> Tensor:
    """Attention of every position over all of its sequence (paper, section 4.2).

    Equivalent PyTorch, for each head's columns q, k, v of the three parts of `qkv`::

        probabilities = torch.softmax((query_scale[..., None] * q) @ k.transpose(-1, -2), dim=-1)
        out = dropout(probabilities, p) @ v

    No key is hidden; a query whose scale is 0 attends uniformly. With `inv_freq` q and k are
    rotated by their position first (`reference.rotary.rotate`).

    Args:
        qkv: [B, L, 3D]: queries, keys, values; heads are consecutive columns of each.
        query_scale: [B, L]: the mask times (D / H) ** -0.5.
        num_heads: H, divides D.
        p: probability of dropping, in [0, 1). The masks are those of `dropout` of the
            probabilities as [B, H * L, L].
        seed: int64 scalar tensor (already derived for this use); not needed at p = 0.
        rows: int64 [B]; None is 0 .. B-1.
        site: which of the network's dropouts this is.
        inv_freq: angles per position of the rotary embedding [D / H / 2], or None.

    Returns:
        [B, L, D], heads side by side. Differentiable, and in forward mode in `qkv`; the kernels
            run only where `query_scale` needs no gradient and has no tangent, the Triton kernel
            only where nothing has one.

    Raises:
        TypeError, ValueError: dtypes, shapes, heads, p or a missing seed.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("qkv", qkv, "B L 3D", sizes)
    check_shape("query_scale", query_scale, "B L", sizes)
    check_float(qkv=qkv, query_scale=query_scale)
    if sizes["L"] == 0:
        raise ValueError(f"qkv must have at least one position, got shape {tuple(qkv.shape)}")
    width, rest = divmod(sizes["3D"], 3)
    if rest:
        raise ValueError(f"qkv must have three equal parts, got {sizes['3D']} channels")
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"num_heads must divide D = {width}, got {num_heads}")
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    if p > 0 and seed is None:
        raise ValueError(f"seed must be given with p = {p}")
    if inv_freq is not None:
        check_shape("inv_freq", inv_freq, "W/2", {"W/2": width // num_heads // 2})
        if width // num_heads % 2:
            raise ValueError(f"a rotated head must have an even width, got {width // num_heads}")
    rows = request_rows(rows, qkv.shape[0], qkv.device)
    value, tangent = split(qkv)
    declined = ""
    on_triton = candidate(qkv.device) is Backend.TRITON
    if is_dual(query_scale) or is_wrapped(qkv) or (tangent is not None and on_triton):
        declined = NO_RULE
    elif torch.is_grad_enabled() and query_scale.requires_grad:
        declined = "its kernel has no gradient of query_scale, and one is needed"
    elif on_triton:
        declined = _triton_declined(qkv.shape[1], width // num_heads)
    by_hand = tangent is not None and not is_dual(query_scale) and current_backend() != "reference"
    backend = choose("attention", qkv, declined=declined)
    if backend is Backend.REFERENCE and not by_hand:
        return reference.attention(
            qkv,
            query_scale,
            num_heads=num_heads,
            p=p,
            seed=seed,
            rows=rows,
            site=site,
            inv_freq=inv_freq,
        )
    table = None if inv_freq is None else angles(inv_freq, qkv.shape[1])
    if backend is Backend.CPP:
        rotary = None if table is None else torch.cat(table, dim=-1)
        if tangent is not None:
            fixed = (query_scale, rows, seed, rotary, (site, p), num_heads)
            return join(*_AttentionTangent.apply(value, tangent, *fixed))
    else:
        rotary = None
        if table is not None:
            value = tangents.rotate(value, *table, num_heads)
            tangent = None if tangent is None else tangents.rotate(tangent, *table, num_heads)
        if tangent is not None:
            drop = None if p == 0 or seed is None else _Masks(p, seed, rows, site)
            return join(*tangents.attention(value, tangent, query_scale, num_heads, drop))
    if torch.compiler.is_compiling():
        return torch.ops.fmrec_fast.attention(
            value, query_scale, rows, seed, rotary, site, p, num_heads, backend.value
        )
    return _Attention.apply(value, query_scale, rows, seed, rotary, (site, p), num_heads, backend)


@constant_when_compiled
def _triton_declined(length: int, head_width: int) -> str:
    from fmrec_fast.kernels.plans import attention_declined

    return attention_declined(length, head_width)


@dataclass(frozen=True)
class _Masks:
    """The dropout of the probabilities of some rows of the batch."""

    p: float
    seed: Tensor
    rows: Tensor
    site: int

    def __call__(self, x: Tensor, part: slice) -> Tensor:
        return dropout(x, self.p, seed=self.seed, rows=self.rows[part], site=self.site)


def _forward(
    qkv: Tensor,
    query_scale: Tensor,
    rows: Tensor,
    seed: Tensor | None,
    rotary: Tensor | None,
    constants: tuple,
    num_heads: int,
    backend: Backend,
) -> Tensor:
    """`qkv` and `query_scale` contiguous."""
    if backend is Backend.TRITON:
        from fmrec_fast.kernels import attention as kernels

        out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
        kernels.forward(qkv, query_scale, rows, *_dropping(seed, *constants), num_heads, out)
        return out
    return _forward_cpp(qkv, None, query_scale, rows, seed, rotary, constants, num_heads)[0]


def _forward_cpp(
    qkv: Tensor, d_qkv: Tensor | None, query_scale: Tensor, rows: Tensor, seed: Tensor | None,
    rotary: Tensor | None, constants: tuple, num_heads: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The result, and its derivative along `d_qkv`."""
    shape = (*qkv.shape[:2], qkv.shape[2] // 3)
    out, d_out = memory.empty(*shape), None if d_qkv is None else memory.empty(*shape)
    extension.load().attention_forward(
        qkv.detach().numpy(),
        query_scale.detach().numpy(),
        rows.numpy(),
        0 if seed is None else int(seed),
        *constants,
        out.numpy(),
        num_heads,
        torch.get_num_threads(),
        None if rotary is None else rotary.numpy(),
        None if d_qkv is None else d_qkv.detach().numpy(),
        None if d_out is None else d_out.numpy(),
    )
    return out, d_out


def _backward(
    grad: Tensor,
    qkv: Tensor,
    query_scale: Tensor,
    rows: Tensor,
    seed: Tensor | None,
    rotary: Tensor | None,
    constants: tuple,
    num_heads: int,
    backend: Backend,
) -> Tensor:
    """`qkv` and `query_scale` contiguous."""
    if backend is Backend.TRITON:
        from fmrec_fast.kernels import attention as kernels

        g_qkv = torch.empty_like(qkv)
        drop = _dropping(seed, *constants)
        kernels.backward(grad.contiguous(), qkv, query_scale, rows, *drop, num_heads, g_qkv)
        return g_qkv
    fixed = (query_scale, rows, seed, rotary, constants, num_heads)
    return _backward_cpp(grad, None, qkv, None, *fixed)[0]


def _backward_cpp(
    grad: Tensor, d_grad: Tensor | None, qkv: Tensor, d_qkv: Tensor | None, query_scale: Tensor,
    rows: Tensor, seed: Tensor | None, rotary: Tensor | None, constants: tuple, num_heads: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Gradients of `qkv` and `d_qkv` from those of the result and its derivative."""
    g_qkv, g_d_qkv = memory.empty(*qkv.shape), None if d_qkv is None else memory.empty(*qkv.shape)
    extension.load().attention_backward(
        grad.contiguous().numpy(),
        qkv.detach().numpy(),
        query_scale.detach().numpy(),
        rows.numpy(),
        0 if seed is None else int(seed),
        *constants,
        g_qkv.numpy(),
        num_heads,
        torch.get_num_threads(),
        None if rotary is None else rotary.numpy(),
        None if d_qkv is None else d_qkv.detach().numpy(),
        None if d_grad is None else d_grad.contiguous().numpy(),
        None if g_d_qkv is None else g_d_qkv.numpy(),
    )
    return g_qkv, g_d_qkv


def _dropping(seed: Tensor | None, site: int, p: float) -> tuple[Tensor | None, int, int, float]:
    """What the Triton kernels take of it; a seed of None stands for p = 0."""
    return (None if p == 0 else seed), site, threshold(p), 1 / (1 - p)


class _Attention(torch.autograd.Function):
    """The kernels; masks and probabilities are computed anew in the backward pass."""

    @staticmethod
    def forward(ctx, qkv, query_scale, rows, seed, rotary, *constants):
        qkv, query_scale = qkv.contiguous(), query_scale.contiguous()
        rows = rows.contiguous()
        ctx.save_for_backward(qkv, query_scale, rows, seed, rotary)
        ctx.constants = constants
        return _forward(qkv, query_scale, rows, seed, rotary, *constants)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _backward(grad, *ctx.saved_tensors, *ctx.constants), *[None] * 7


class _AttentionTangent(torch.autograd.Function):
    """The C++ kernels of attention with its derivative along `d_qkv`."""

    @staticmethod
    def forward(ctx, qkv, d_qkv, query_scale, rows, seed, rotary, *constants):
        given = (qkv.contiguous(), d_qkv.contiguous(), query_scale.contiguous(), rows.contiguous())
        ctx.save_for_backward(*given, seed, rotary)
        ctx.constants = constants
        return _forward_cpp(*given, seed, rotary, *constants)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, d_grad):
        return *_backward_cpp(grad, d_grad, *ctx.saved_tensors, *ctx.constants), *[None] * 6


# --- for torch.compile and torch.export -----------------------------------------------------------


@torch.library.custom_op("fmrec_fast::attention", mutates_args=())
def _registered(
    qkv: Tensor,
    query_scale: Tensor,
    rows: Tensor,
    seed: Tensor | None,
    rotary: Tensor | None,
    site: int,
    p: float,
    num_heads: int,
    backend: str,
) -> Tensor:
    log_run("attention", backend)
    qkv, query_scale, rows = qkv.contiguous(), query_scale.contiguous(), rows.contiguous()
    fixed = (rows, seed, rotary, (site, p), num_heads, Backend(backend))
    return _forward(qkv, query_scale, *fixed)


@torch.library.custom_op("fmrec_fast::attention_backward", mutates_args=())
def _registered_backward(
    grad: Tensor,
    qkv: Tensor,
    query_scale: Tensor,
    rows: Tensor,
    seed: Tensor | None,
    rotary: Tensor | None,
    site: int,
    p: float,
    num_heads: int,
    backend: str,
) -> Tensor:
    qkv, query_scale, rows = qkv.contiguous(), query_scale.contiguous(), rows.contiguous()
    fixed = (rows, seed, rotary, (site, p), num_heads, Backend(backend))
    return _backward(grad, qkv, query_scale, *fixed)


@_registered.register_fake
def _(qkv, query_scale, rows, seed, rotary, site, p, num_heads, backend):
    return qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)


@_registered_backward.register_fake
def _(grad, qkv, query_scale, rows, seed, rotary, site, p, num_heads, backend):
    return qkv.new_empty(qkv.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.constants = inputs[5:]


def _gradients(ctx, grad):
    g_qkv = torch.ops.fmrec_fast.attention_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return g_qkv, *[None] * 8


_registered.register_autograd(_gradients, setup_context=_setup)
