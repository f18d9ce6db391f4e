"""Noise fusion: E = e + lam * (z + tau) (FMRec eq. 14), alone or behind an Euler update."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmrec_fast import extension, memory, noise
from fmrec_fast.backend import Backend, candidate, choose, log_run
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
    drawn, shift = _Lam.of(e, delta, seed, rows, step, lam, sizes), z + tau
    (e_value, d_e), (shift_value, d_shift) = split(e), split(shift)
    if d_e is not None or d_shift is not None:
        # Linear in e and shift: the tangent is the fusion of the tangents, with the same lam.
        d_e = torch.zeros_like(e_value) if d_e is None else d_e
        d_shift = torch.zeros_like(shift_value) if d_shift is None else d_shift
        return join(
            _fuse(e_value, shift_value, drawn, _choose(e_value, drawn)),
            _fuse(d_e, d_shift, drawn, _choose(d_e, drawn)),
        )
    return _fuse(e, shift, drawn, _choose(e, drawn, NO_RULE if is_dual(e, shift) else ""))


def euler_noise_fusion(
    e: Tensor,
    z: Tensor,
    pred: Tensor,
    z0: Tensor,
    tau: Tensor,
    *,
    steps: int,
    delta: float,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
    step: int = 0,
    lam: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """An Euler update (eq. 23) and the noise fusion of the step after it (eq. 14) in one pass.

    Equivalent PyTorch::

        z = z + (pred - z0) / steps
        z, noise_fusion(e, z, tau, delta=..., seed=..., rows=..., step=step, lam=lam)

    Args:
        z: the trajectory's point before the update [B, D].
        pred: the network's prediction at `z` [B, D]; z0: the start [B, D].
        steps: q.
        e, tau, delta, seed, rows, step, lam: those of `noise_fusion`, of the step after.

    Returns:
        (z [B, D], E [B, L, D]). Differentiable in all floating-point tensors; the Triton kernel
        does both in one pass only where no gradient is needed.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices do not agree, or `steps` is below 1.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("e", e, "B L D", sizes)
    for name, tensor in (("z", z), ("pred", pred), ("z0", z0)):
        check_shape(name, tensor, "B D", sizes)
    check_shape("tau", tau, "D" if tau.ndim == 1 else "B D", sizes)
    check_float(e=e, z=z, pred=pred, z0=z0, tau=tau, lam=lam)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    drawn = _Lam.of(e, delta, seed, rows, step, lam, sizes)
    tensors = (e, z, pred, z0, tau)
    backend = _choose(e, drawn)
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (*tensors, drawn.key))
    apart = gradient or torch.compiler.is_compiling()
    if backend is not Backend.TRITON or apart or e.numel() == 0:
        z = reference.euler_update(z, pred - z0, steps)
        return z, _fuse(e, z + tau, drawn, backend)
    from fmrec_fast.kernels import noise_fusion as kernels

    e, z, pred, z0, tau = (t.contiguous() for t in tensors)
    z_next, out = torch.empty_like(z), torch.empty_like(e)
    kernels.euler_noise_fusion(e, z, pred, z0, tau, drawn.kernel(), steps, z_next, out)
    return z_next, out


@dataclass(frozen=True)
class _Lam:
    """lam of one step: `key` is lam itself where it is given, else the stream's seed."""

    key: Tensor
    rows: Tensor | None
    step: int
    delta: float

    @classmethod
    def of(
        cls,
        e: Tensor,
        delta: float,
        seed: Tensor | None,
        rows: Tensor | None,
        step: int,
        lam: Tensor | None,
        sizes: dict[str, int],
    ) -> _Lam:
        if lam is not None:
            check_shape("lam", lam, "B L D", sizes)
            return cls(lam, None, step, delta)
        rows = request_rows(rows, e.shape[0], e.device)
        return cls(noise.as_seed(seed, e.device), rows, step, delta)

    def values(self, e: Tensor) -> Tensor:
        """lam [B, L, D], as the definition reads it."""
        if self.rows is None:
            return self.key
        length, channels = e.shape[1:]
        return noise.lam(self.key, self.rows, self.step, length, channels, self.delta).to(e.dtype)

    def kernel(self) -> Any:
        """The same for the Triton kernels."""
        from fmrec_fast.kernels.noise_fusion import Lam

        if self.rows is None:
            return Lam(self.delta, self.step, None, None, self.key.contiguous())
        return Lam(self.delta, self.step, self.rows, self.key)


def _choose(e: Tensor, lam: _Lam, declined: str = "") -> Backend:
    if lam.rows is None:
        if candidate(e.device) is Backend.CPP:
            declined = "its kernel draws lam, and lam is given"
        elif lam.key.requires_grad and torch.is_grad_enabled():
            declined = "its kernel has no gradient for lam"
    return choose("noise_fusion", e, declined=declined)


def _fuse(e: Tensor, shift: Tensor, lam: _Lam, backend: Backend) -> Tensor:
    if backend is Backend.REFERENCE:
        return reference.noise_fusion(e, shift, lam.values(e))
    if torch.compiler.is_compiling():
        return torch.ops.fmrec_fast.noise_fusion(
            e, shift, lam.key, lam.rows, lam.step, lam.delta, backend.value
        )
    return _NoiseFusion.apply(e, shift, lam.key, lam, backend)


def _forward(e: Tensor, shift: Tensor, lam: _Lam, backend: Backend) -> Tensor:
    e, shift = e.contiguous(), shift.contiguous()
    out = memory.empty(*e.shape) if backend is Backend.CPP else torch.empty_like(e)
    if backend is Backend.CPP:
        assert lam.rows is not None  # a given lam was declined
        extension.load().noise_fusion_forward(
            e.detach().numpy(),
            shift.detach().numpy(),
            lam.rows.numpy(),
            int(lam.key),
            lam.step,
            lam.delta,
            out.numpy(),
            torch.get_num_threads(),
        )
    else:
        from fmrec_fast.kernels import noise_fusion as kernels

        kernels.noise_fusion_forward(e, shift, lam.kernel(), out)
    return out


def _backward(grad: Tensor, lam: _Lam, backend: Backend) -> Tensor:
    grad = grad.contiguous()
    d_shift = grad.new_empty(grad.shape[0], grad.shape[2])
    if backend is Backend.CPP:
        assert lam.rows is not None
        extension.load().noise_fusion_backward(
            grad.numpy(),
            lam.rows.numpy(),
            int(lam.key),
            lam.step,
            lam.delta,
            d_shift.numpy(),
            torch.get_num_threads(),
        )
    else:
        from fmrec_fast.kernels import noise_fusion as kernels

        kernels.noise_fusion_backward(grad, lam.kernel(), d_shift)
    return d_shift


class _NoiseFusion(torch.autograd.Function):
    """The kernels' noise fusion; nothing of size B L D is kept for the backward pass, but for a
    lam that was given."""

    @staticmethod
    def forward(ctx, e, shift, key, lam, backend):
        ctx.save_for_backward(key, lam.rows)
        ctx.constants = (lam.step, lam.delta, backend)
        return _forward(e, shift, lam, backend)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        key, rows = ctx.saved_tensors
        step, delta, backend = ctx.constants
        if not ctx.needs_input_grad[1]:
            return grad, None, None, None, None
        d_shift = _backward(grad, _Lam(key, rows, step, delta), backend)
        return grad, d_shift, None, None, None


# --- for torch.compile and torch.export -----------------------------------------------------------


@torch.library.custom_op("fmrec_fast::noise_fusion", mutates_args=())
def _registered(
    e: Tensor,
    shift: Tensor,
    key: Tensor,
    rows: Tensor | None,
    step: int,
    delta: float,
    backend: str,
) -> Tensor:
    log_run("noise_fusion", backend)
    return _forward(e, shift, _Lam(key, rows, step, delta), Backend(backend))


@torch.library.custom_op("fmrec_fast::noise_fusion_backward", mutates_args=())
def _registered_backward(
    grad: Tensor, key: Tensor, rows: Tensor | None, step: int, delta: float, backend: str
) -> Tensor:
    return _backward(grad, _Lam(key, rows, step, delta), Backend(backend))


@_registered.register_fake
def _(e, shift, key, rows, step, delta, backend):
    return torch.empty_like(e, memory_format=torch.contiguous_format)


@_registered_backward.register_fake
def _(grad, key, rows, step, delta, backend):
    return grad.new_empty(grad.shape[0], grad.shape[2])


def _setup(ctx, inputs, output):
    _, _, key, rows, *ctx.constants = inputs
    ctx.save_for_backward(key, rows)


def _gradients(ctx, grad):
    d_shift = None
    if ctx.needs_input_grad[1]:
        backward = torch.ops.fmrec_fast.noise_fusion_backward
        d_shift = backward(grad, *ctx.saved_tensors, *ctx.constants)
    return grad, d_shift, None, None, None, None, None


_registered.register_autograd(_gradients, setup_context=_setup)
