"""Noise fusion: E = e + lam * (z + tau) (FMRec eq. 14)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmrec_fast import extension, noise
from fmrec_fast.backend import Backend, choose
from fmrec_fast.forward_mode import NO_RULE, is_dual, join, split
from fmrec_fast.ops._checks import check_float, check_shape, request_rows
from fmrec_fast.reference import noise_fusion as reference


def noise_fusion(
    e: Tensor,
    z: Tensor,
    tau: Tensor,
    *,
    delta: float,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
    step: int = 0,
    lam: Tensor | None = None,
) -> Tensor:
    """Fuse a noisy target into every position of a history (eq. 14).

    Equivalent PyTorch::

        lam = fmrec_fast.noise.lam(seed, rows, step, L, D, delta)   # unless given
        e + lam * (z + tau)[:, None, :]

    Args:
        e: item embeddings [B, L, D].
        z: the noisy target x_t [B, D].
        tau: time embedding [B, D], or [D] for all rows.
        delta: mean and standard deviation of lam ~ Normal(delta, delta^2).
        seed: int64 scalar tensor that keys the stream; None draws one from torch's generator.
        rows: int64 [B], the stream's names of the rows; None is 0 .. B-1.
        step: the stream's step word.
        lam: explicit lam [B, L, D] instead of the stream's.

    Returns:
        [B, L, D]. Differentiable in `e`, `z` and `tau`, in forward mode too; the backward pass
        regenerates lam.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not agree.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("e", e, "B L D", sizes)
    check_shape("z", z, "B D", sizes)
    check_shape("tau", tau, "D" if tau.ndim == 1 else "B D", sizes)
    check_float(e=e, z=z, tau=tau, lam=lam)
    shift = z + tau
    if lam is not None:
        check_shape("lam", lam, "B L D", sizes)
        return reference.noise_fusion(e, shift, lam)
    rows = request_rows(rows, e.shape[0], e.device)
    seed = noise.as_seed(seed, e.device)
    e_parts, shift_parts = split(e), split(shift)
    if e_parts[1] is not None or shift_parts[1] is not None:
        # Linear in e and shift: the tangent is the fusion of the tangents.
        given: dict[str, Any] = {"delta": delta, "seed": seed, "rows": rows, "step": step}
        zero = torch.zeros((), dtype=e.dtype, device=e.device)
        d_e = zero.expand_as(e) if e_parts[1] is None else e_parts[1]
        d_shift = zero.expand_as(shift) if shift_parts[1] is None else shift_parts[1]
        none = zero.expand_as(shift)
        return join(
            noise_fusion(e_parts[0], shift_parts[0], none, **given),
            noise_fusion(d_e, d_shift, none, **given),
        )
    backend = choose("noise_fusion", e, declined=NO_RULE if is_dual(e, shift) else "")
    if backend is Backend.REFERENCE:
        drawn = _reference_lam(e, rows, seed, step, delta)
        return reference.noise_fusion(e, shift, drawn)
    return _NoiseFusion.apply(e, shift, rows, seed, step, delta, backend)


def _reference_lam(e: Tensor, rows: Tensor, seed: Tensor, step: int, delta: float) -> Tensor:
    return noise.lam(seed, rows, step, e.shape[1], e.shape[2], delta).to(e.dtype)


def _forward(
    e: Tensor, shift: Tensor, rows: Tensor, seed: Tensor, step: int, delta: float, backend: Backend
) -> Tensor:
    e, shift = e.contiguous(), shift.contiguous()
    out = torch.empty_like(e)
    if backend is Backend.CPP:
        extension.load().noise_fusion_forward(
            e.detach().numpy(),
            shift.detach().numpy(),
            rows.numpy(),
            int(seed),
            step,
            delta,
            out.numpy(),
            torch.get_num_threads(),
        )
    else:
        from fmrec_fast.kernels import noise_fusion as kernels

        kernels.noise_fusion_forward(e, shift, rows, seed, step, delta, out)
    return out


def _backward(
    grad: Tensor, rows: Tensor, seed: Tensor, step: int, delta: float, backend: Backend
) -> Tensor:
    grad = grad.contiguous()
    d_shift = grad.new_empty(grad.shape[0], grad.shape[2])
    if backend is Backend.CPP:
        extension.load().noise_fusion_backward(
            grad.numpy(),
            rows.numpy(),
            int(seed),
            step,
            delta,
            d_shift.numpy(),
            torch.get_num_threads(),
        )
    else:
        from fmrec_fast.kernels import noise_fusion as kernels

        kernels.noise_fusion_backward(grad, rows, seed, step, delta, d_shift)
    return d_shift


class _NoiseFusion(torch.autograd.Function):
    """The kernels' noise fusion; nothing of size B L D is kept for the backward pass."""

    @staticmethod
    def forward(ctx, e, shift, rows, seed, step, delta, backend):
        ctx.save_for_backward(rows, seed)
        ctx.constants = (step, delta, backend)
        return _forward(e, shift, rows, seed, step, delta, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        rows, seed = ctx.saved_tensors
        d_shift = _backward(grad, rows, seed, *ctx.constants) if ctx.needs_input_grad[1] else None
        return grad, d_shift, None, None, None, None, None
