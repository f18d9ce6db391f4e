"""Noise fusion and its gradient (FMRec eq. 14); lam is drawn in registers, never stored.

    out[b, l, d]  = e[b, l, d] + lam[b, l, d] * shift[b, d]
    d_shift[b, d] = sum over l of lam[b, l, d] * grad[b, l, d]
    lam[b, l, d]  = delta + delta * n(seed, rows[b], step, l, d)

e, out, grad [B, L, D], shift, d_shift [B, D], all contiguous float32, bfloat16 or float16;
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


@triton.jit(do_not_specialize=["batch", "length", "step", "delta"])
def forward_kernel(
    p_e,
    p_shift,
    p_rows,
    p_seed,
    p_out,
    batch,
    length,
    step,
    delta,
    D: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program: GROUPS groups of one row b. Grid (tiles, y, z), b = z * |y| + y."""
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
    row = tl.load(p_rows + b).to(tl.uint32)
    k0, k1 = load_seed(p_seed)
    b_normal = four_normals(k0, k1, b_group % G, b_group // G, step.to(tl.uint32), row)
    b_lam = tl.fma(tl.reshape(b_normal, (4 * GROUPS,)), delta, delta)
    b_out = tl.fma(b_lam, b_shift.to(tl.float32), b_e.to(tl.float32))
    tl.store(p_out + start + o_e, b_out, mask=m_e)


@triton.jit(do_not_specialize=["batch", "length", "step", "delta"])
def backward_kernel(
    p_grad,
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
    row = tl.load(p_rows + b).to(tl.uint32)
    k0, k1 = load_seed(p_seed)
    p_grad += b * length * D
    b_sum = tl.zeros((POSITIONS, 4 * GROUPS), tl.float32)
    for first_position in range(0, length, POSITIONS):
        o_position = first_position + tl.arange(0, POSITIONS)  # [POSITIONS]
        m_grad = (o_position < length)[:, None] & m_channel[None, :]
        o_grad = o_position[:, None] * D + o_channel[None, :]
        b_grad = tl.load(p_grad + o_grad, mask=m_grad, other=0.0)  # [POSITIONS, 4 GROUPS]
        b_position = tl.broadcast_to(o_position.to(tl.uint32)[:, None], (POSITIONS, GROUPS))
        b_normal = four_normals(k0, k1, b_group, b_position, step.to(tl.uint32), row)
        b_lam = tl.fma(tl.reshape(b_normal, (POSITIONS, 4 * GROUPS)), delta, delta)
        b_sum = tl.fma(b_lam, b_grad.to(tl.float32), b_sum)
    tl.store(p_d_shift + b * D + o_channel, tl.sum(b_sum, axis=0), mask=m_channel)


def noise_fusion_forward(
    e: torch.Tensor,
    shift: torch.Tensor,
    rows: torch.Tensor,
    seed: torch.Tensor,
    step: int,
    delta: float,
    out: torch.Tensor,
) -> None:
    """out = e + lam * shift[:, None, :]; shapes and dtypes as above."""
    batch, length, channels = _sizes(e)
    if e.numel() == 0:
        return
    groups = length * triton.cdiv(channels, 4)
    _launch(
        _forward(),
        lambda meta: _grid(triton.cdiv(groups, meta["GROUPS"]), batch),
        (e, shift, rows.contiguous(), seed, out, batch, length, _word(step), float(delta)),
        channels,
    )


def noise_fusion_backward(
    grad: torch.Tensor,
    rows: torch.Tensor,
    seed: torch.Tensor,
    step: int,
    delta: float,
    d_shift: torch.Tensor,
) -> None:
    """d_shift = (lam * grad).sum(1); shapes and dtypes as above."""
    batch, length, channels = _sizes(grad)
    if d_shift.numel() == 0:
        return
    groups = triton.cdiv(channels, 4)
    _launch(
        _backward(),
        lambda meta: _grid(triton.cdiv(groups, meta["GROUPS"]), batch),
        (grad, rows.contiguous(), seed, d_shift, batch, length, _word(step), float(delta)),
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


def _compile_case(kernel, inputs: str, output: str, constants: dict, threads: int) -> dict:
    """What `budget` compiles: {dtype} stands for the element type."""
    pointers = dict.fromkeys([*inputs.split(), output], "*{dtype}")
    pointers |= {"p_rows": "*i64", "p_seed": "*i64"}
    scalars = {"batch": "i32", "length": "i32", "step": "i32", "delta": "fp32"}
    return {
        "kernel": kernel,
        "signature": pointers | scalars,
        "constants": {"D": 128, **constants},
        "threads": threads,
        "options": OPTIONS,
    }


COMPILE_CASES = [
    _compile_case(forward_kernel, "p_e p_shift", "p_out", FORWARD, FORWARD_THREADS),
    _compile_case(backward_kernel, "p_grad", "p_d_shift", BACKWARD, BACKWARD_THREADS),
]
