"""Noise fusion and its gradient (FMRec eq. 14); lam is drawn in registers, never stored.

    out[b, l, d]  = e[b, l, d] + lam[b, l, d] * shift[b, d]
    d_shift[b, d] = sum over l of lam[b, l, d] * grad[b, l, d]
    lam[b, l, d]  = delta + delta * n(seed, rows[b], step, l, d), unless it is given

With `update`, the Euler update that comes just before (eq. 23) is part of the same pass:

    next[b, d]    = z[b, d] + (pred[b, d] - z0[b, d]) / q,  shift = next + tau

e, out, grad, lam [B, L, D], all else [B, D], all contiguous float32, bfloat16 or float16;
rows int64 [B]; seed int64 scalar on the device; n is the stream of `fmrec_fast.noise`.
Arithmetic and accumulators are float32. The sum over l runs in a fixed order without atomics, so
that a gradient is the same to the bit each time.

The unit of work is a group: the four channels of one Philox call, and in float32 one 128-bit
access. In `forward` a thread has one group. When 4 divides D the groups of a row b lie one after
another in memory, whatever L and D, so a tile is a plain range of groups and no lane is spent on
rounding L or D up.
"""

import functools
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fmrec_fast.kernels.philox import four_normals, load_seed

# The pinned configuration, from the instruction counts; not tuned by measurement.
FORWARD = {"GROUPS": 128}
FORWARD_THREADS = 128
BACKWARD = {"POSITIONS": 8, "GROUPS": 8}
BACKWARD_THREADS = 64

# What FMREC_FAST_AUTOTUNE=1 tries: (constants, threads).
FORWARD_SEARCH = [({"GROUPS": g}, g // k) for g in (64, 128, 256, 512) for k in (1, 2)]
BACKWARD_SEARCH = [
    ({"POSITIONS": p, "GROUPS": g}, p * g // k)
    for p in (4, 8, 16, 32)
    for g in (8, 16, 32)
    for k in (1, 2)
    if 64 <= p * g // k <= 256
]

WARP = 64 if torch.version.hip else 32
# No launch multiplies and adds in one rounding unless the kernel says tl.fma: then compiled and
# interpreted results agree, and Triton's changing default does not matter.
OPTIONS = {"enable_fp_fusion": False}
MAX_GRID_Y = 65535


@triton.jit(do_not_specialize=["batch", "length", "step", "delta", "steps"])
def forward_kernel(
    p_e,
    p_shift,
    p_pred,
    p_z0,
    p_tau,
    p_lam,
    p_rows,
    p_seed,
    p_next,
    p_out,
    batch,
    length,
    step,
    delta,
    steps,
    tau_stride,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program: GROUPS groups of one row b. Grid (tiles, y, z), b = z * |y| + y.

    p_shift is shift, or z where p_pred is given and the update comes first; p_lam may be None.
    """
    b = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if b >= batch:
        return
    # Groups per position; the last may reach beyond D.
    G: tl.constexpr = (D + 3) // 4
    first = tl.program_id(0) * GROUPS
    b_group = (first + tl.arange(0, GROUPS)).to(tl.uint32)  # [GROUPS]
    o_slot = (first * 4 + tl.arange(0, 4 * GROUPS)).to(tl.uint32)  # [4 GROUPS]
    o_channel = o_slot % (4 * G)
    m_e = o_slot < length.to(tl.uint32) * (4 * G)
    if D % 4 == 0:
        o_e = o_slot
    else:
        o_e = o_slot // (4 * G) * D + o_channel
        m_e = m_e & (o_channel < D)
    start = b * length * D
    b_e = tl.load(p_e + start + o_e, mask=m_e, other=0.0)  # [4 GROUPS]
    b_shift = tl.load(p_shift + b * D + o_channel, mask=m_e, other=0.0)  # [4 GROUPS]
    b_shift = b_shift.to(tl.float32)
    if p_pred is not None:
        # Every tile of a row computes the update, since it needs it; one writes each channel.
        b_pred = tl.load(p_pred + b * D + o_channel, mask=m_e, other=0.0)  # [4 GROUPS]
        b_z0 = tl.load(p_z0 + b * D + o_channel, mask=m_e, other=0.0)
        b_tau = tl.load(p_tau + b * tau_stride + o_channel, mask=m_e, other=0.0)
        b_shift += (b_pred.to(tl.float32) - b_z0.to(tl.float32)) / steps
        tl.store(p_next + b * D + o_channel, b_shift, mask=m_e & (o_slot < 4 * G))
        b_shift += b_tau.to(tl.float32)
    if p_lam is not None:
        b_lam = tl.load(p_lam + start + o_e, mask=m_e, other=0.0).to(tl.float32)  # [4 GROUPS]
    else:
        row = tl.load(p_rows + b).to(tl.uint32)
        k0, k1 = load_seed(p_seed)
        b_normal = four_normals(k0, k1, b_group % G, b_group // G, step.to(tl.uint32), row)
        b_lam = tl.fma(tl.reshape(b_normal, (4 * GROUPS,)), delta, delta)
    b_out = tl.fma(b_lam, b_shift, b_e.to(tl.float32))
    tl.store(p_out + start + o_e, b_out, mask=m_e)


@triton.jit(do_not_specialize=["batch", "length", "step", "delta"])
def backward_kernel(
    p_grad,
    p_lam,
    p_rows,
    p_seed,
    p_d_shift,
    batch,
    length,
    step,
    delta,
    D: tl.constexpr,
    POSITIONS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program: 4 GROUPS channels of one row b, all positions. Grid (channel tiles, y, z)."""
    b = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if b >= batch:
        return
    first = tl.program_id(0) * GROUPS
    o_channel = first * 4 + tl.arange(0, 4 * GROUPS)  # [4 GROUPS]
    m_channel = o_channel < D
    b_group = (first + tl.arange(0, GROUPS)).to(tl.uint32)[None, :]
    b_group = tl.broadcast_to(b_group, (POSITIONS, GROUPS))
    if p_lam is None:
        row = tl.load(p_rows + b).to(tl.uint32)
        k0, k1 = load_seed(p_seed)
    else:
        p_lam += b * length * D
    p_grad += b * length * D
    b_sum = tl.zeros((POSITIONS, 4 * GROUPS), tl.float32)
    for first_position in range(0, length, POSITIONS):
        o_position = first_position + tl.arange(0, POSITIONS)  # [POSITIONS]
        m_grad = (o_position < length)[:, None] & m_channel[None, :]
        o_grad = o_position[:, None] * D + o_channel[None, :]
        b_grad = tl.load(p_grad + o_grad, mask=m_grad, other=0.0)  # [POSITIONS, 4 GROUPS]
        if p_lam is not None:
            b_lam = tl.load(p_lam + o_grad, mask=m_grad, other=0.0).to(tl.float32)
        else:
            b_position = tl.broadcast_to(o_position.to(tl.uint32)[:, None], (POSITIONS, GROUPS))
            b_normal = four_normals(k0, k1, b_group, b_position, step.to(tl.uint32), row)
            b_lam = tl.fma(tl.reshape(b_normal, (POSITIONS, 4 * GROUPS)), delta, delta)
        b_sum = tl.fma(b_lam, b_grad.to(tl.float32), b_sum)
    tl.store(p_d_shift + b * D + o_channel, tl.sum(b_sum, axis=0), mask=m_channel)


class Lam(NamedTuple):
    """lam of one step: `given` [B, L, D], or what keys the stream."""

    delta: float
    step: int
    rows: torch.Tensor | None
    seed: torch.Tensor | None
    given: torch.Tensor | None = None


def noise_fusion_forward(e: torch.Tensor, shift: torch.Tensor, lam: Lam, out: torch.Tensor) -> None:
    """out = e + lam * shift[:, None, :]; shapes and dtypes as above."""
    _fuse(e, shift, None, None, None, lam, 1, None, out)


def euler_noise_fusion(
    e: torch.Tensor,
    z: torch.Tensor,
    pred: torch.Tensor,
    z0: torch.Tensor,
    tau: torch.Tensor,
    lam: Lam,
    steps: int,
    z_next: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """z_next = z + (pred - z0) / steps; out = e + lam * (z_next + tau)[:, None, :].

    tau [B, D] or [D]; e must have elements, for nothing else would write z_next.
    """
    _fuse(e, z, pred, z0, tau, lam, steps, z_next, out)


def _fuse(e, shift, pred, z0, tau, lam: Lam, steps: int, z_next, out) -> None:
    batch, length, channels = _sizes(e)
    if e.numel() == 0:
        return
    groups = length * triton.cdiv(channels, 4)
    stride = 0 if tau is None or tau.ndim == 1 else channels
    tensors = (e, shift, pred, z0, tau, lam.given, lam.rows, lam.seed, z_next, out)
    sizes = (batch, length, _word(lam.step), float(lam.delta), steps, stride)
    _launch(
        _forward(),
        lambda meta: _grid(triton.cdiv(groups, meta["GROUPS"]), batch),
        (*tensors, *sizes),
        channels,
    )


def noise_fusion_backward(grad: torch.Tensor, lam: Lam, d_shift: torch.Tensor) -> None:
    """d_shift = (lam * grad).sum(1); shapes and dtypes as above."""
    batch, length, channels = _sizes(grad)
    if d_shift.numel() == 0:
        return
    groups = triton.cdiv(channels, 4)
    sizes = (batch, length, _word(lam.step), float(lam.delta))
    _launch(
        _backward(),
        lambda meta: _grid(triton.cdiv(groups, meta["GROUPS"]), batch),
        (grad, lam.given, lam.rows, lam.seed, d_shift, *sizes),
        channels,
    )


def _sizes(e: torch.Tensor) -> tuple[int, int, int]:
    """B, L, D. Offsets within a row are 32-bit, those of rows 64-bit."""
    batch, length, channels = e.shape
    if length * (channels + 3) >= 2**31:
        raise ValueError(f"one row must have less than 2**31 elements, got {length} x {channels}")
    return batch, length, channels


def _word(step: int) -> int:
    """The low 32 bits of `step` as the int32 with the same bits: one type for every step."""
    return (step + 2**31) % 2**32 - 2**31


def _grid(tiles: int, batch: int) -> tuple[int, int, int]:
    """(tiles, y, z) with y * z >= batch; y and z each have 16 bits."""
    z = triton.cdiv(batch, MAX_GRID_Y)
    return tiles, triton.cdiv(batch, z), z


@functools.cache
def _forward() -> tuple:
    return _tuned(forward_kernel, FORWARD, FORWARD_THREADS, FORWARD_SEARCH)


@functools.cache
def _backward() -> tuple:
    return _tuned(backward_kernel, BACKWARD, BACKWARD_THREADS, BACKWARD_SEARCH)


def _tuned(kernel, constants: dict[str, int], threads: int, search: list) -> tuple:
    """The kernel, and the pinned constants; under FMREC_FAST_AUTOTUNE=1 a search over configs."""
    if os.environ.get("FMREC_FAST_AUTOTUNE", "0") != "1" or triton.knobs.runtime.interpret:
        return kernel, {**constants, "num_warps": threads // WARP}
    configs = [triton.Config(c, num_warps=max(t // WARP, 1)) for c, t in search]
    return triton.autotune(configs, key=["length", "D"])(kernel), {}


def _launch(tuned: tuple, grid, arguments: tuple, channels: int) -> None:
    kernel, constants = tuned
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, D=channels, **constants, **OPTIONS)


def _compile_case(name: str, kernel, tensors: str, scalars: dict, constants: dict, threads: int):
    """What `budget` compiles: {dtype} stands for the element type; other pointers are None."""
    pointers = {p: "*i64" if p in ("p_rows", "p_seed") else "*{dtype}" for p in tensors.split()}
    absent = [p for p in kernel.arg_names if p.startswith("p_") and p not in pointers]
    return {
        "name": name,
        "kernel": kernel,
        "signature": pointers | scalars,
        "constants": {"D": 128, **constants, **dict.fromkeys(absent)},
        "threads": threads,
        "options": OPTIONS,
    }


_SCALARS = {"batch": "i32", "length": "i32", "step": "i32", "delta": "fp32"}
_FORWARD_CASE = (_SCALARS | {"steps": "i32", "tau_stride": "i32"}, FORWARD, FORWARD_THREADS)
_BACKWARD_CASE = (_SCALARS, BACKWARD, BACKWARD_THREADS)
_UPDATE = "p_e p_shift p_pred p_z0 p_tau p_next p_out"
COMPILE_CASES = [
    _compile_case(
        "forward_kernel", forward_kernel, "p_e p_shift p_rows p_seed p_out", *_FORWARD_CASE
    ),
    _compile_case("forward_kernel(lam)", forward_kernel, "p_e p_shift p_lam p_out", *_FORWARD_CASE),
    _compile_case("update_kernel", forward_kernel, f"{_UPDATE} p_rows p_seed", *_FORWARD_CASE),
    _compile_case("update_kernel(lam)", forward_kernel, f"{_UPDATE} p_lam", *_FORWARD_CASE),
    _compile_case(
        "backward_kernel", backward_kernel, "p_grad p_rows p_seed p_d_shift", *_BACKWARD_CASE
    ),
    _compile_case(
        "backward_kernel(lam)", backward_kernel, "p_grad p_lam p_d_shift", *_BACKWARD_CASE
    ),
]
