"""All q steps of the Euler sampler (FMRec eq. 23), one sequence to a program.

    x = z0
    x = x + (network(e + lam_i * (x + tau_i)) - z0) / q      for i = 0 .. q-1

e [B, L, D], mask [B, L], z0 [B, D], taus [q, D], all contiguous float32; lam_i from the stream
(rows int64 [B], seed int64 scalar on the device) or given [q, B, L, D]; out [B, D], or all points
[q + 1, B, D]. The network is `kernels/transformer.py`'s, or in tiles `kernels/tiles.py`'s; the
trajectory stays in registers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from fmrec_fast.kernels.launch import compile_cases, launch_network, tiled_cases
from fmrec_fast.kernels.layers import norm_row
from fmrec_fast.kernels.philox import load_seed
from fmrec_fast.kernels.tiles import fuse_tiles, left_out, stack_tiles
from fmrec_fast.kernels.transformer import fuse, query_scale, stack

if TYPE_CHECKING:
    from fmrec_fast.ops.euler_sampler import SamplerWeights


@triton.jit(do_not_specialize=["batch", "length", "steps", "num_blocks", "delta"])
def euler_sampler_kernel(
    p_e,
    p_mask,
    p_z0,
    p_taus,
    p_matrices,
    p_vectors,
    p_rotary,
    p_norm,
    p_noise,
    p_rows,
    p_seed,
    p_out,
    batch,
    length,
    steps,
    num_blocks,
    delta,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    LAST_CHUNK: tl.constexpr,
    STACKED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INPUT: tl.constexpr,
    TRAJECTORY: tl.constexpr,
):
    """One program: all steps of one sequence. Grid (B,)."""
    b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, D)
    p_e += b * length * D
    b_scale = query_scale(p_mask, b, length, D, H, T)  # [T]
    b_z0 = tl.load(p_z0 + b * D + o_d)  # [D]
    b_weight, b_bias = tl.load(p_norm + o_d), tl.load(p_norm + D + o_d)  # [D]
    k0, k1, row = 0, 0, 0
    if p_noise is not None:
        p_noise += b * length * D
    else:
        k0, k1 = load_seed(p_seed)
        row = tl.load(p_rows + b).to(tl.uint32)
    b_point = b_z0
    if TRAJECTORY:
        tl.store(p_out + b * D + o_d, b_z0)
    for step in range(steps):
        b_shift = b_point + tl.load(p_taus + step * D + o_d)
        b_x = fuse(p_e, p_noise, b_shift, k0, k1, row, step, delta, length, D, T)
        b_last = stack(
            b_x, b_scale, p_matrices, p_vectors, p_rotary, None, 0, length, num_blocks,
            D, H, T, CHUNK, LAST_CHUNK, STACKED, STAGES, PRECISION, INPUT,
        )  # fmt: skip
        b_point += (norm_row(b_last, b_weight, b_bias, D) - b_z0) / steps
        if p_noise is not None:
            p_noise += batch.to(tl.int64) * length * D
        if TRAJECTORY:
            p_out += batch.to(tl.int64) * D
            tl.store(p_out + b * D + o_d, b_point)
    if not TRAJECTORY:
        tl.store(p_out + b * D + o_d, b_point)


@triton.jit(do_not_specialize=["batch", "length", "steps", "num_blocks", "delta"])
def euler_sampler_tiled_kernel(
    p_e,
    p_mask,
    p_z0,
    p_taus,
    p_matrices,
    p_vectors,
    p_norm,
    p_noise,
    p_rows,
    p_seed,
    p_out,
    p_stream,
    p_rest,
    batch,
    length,
    steps,
    num_blocks,
    delta,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    LAST_CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    TIED: tl.constexpr,
    PRECISION: tl.constexpr,
    INPUT: tl.constexpr,
    TRAJECTORY: tl.constexpr,
):
    """One program: all steps of every |grid|-th sequence, in tiles of T rows."""
    o_d = tl.arange(0, D)
    tiles = tl.cdiv(length, T)
    p_stream += tl.program_id(0).to(tl.int64) * tiles * T * D
    p_rest += tl.program_id(0).to(tl.int64) * (2 * tiles + 2) * T * D
    b_weight, b_bias = tl.load(p_norm + o_d), tl.load(p_norm + D + o_d)  # [D]
    k0, k1 = 0, 0
    if p_noise is None:
        k0, k1 = load_seed(p_seed)
    for index in range(tl.program_id(0), batch, tl.num_programs(0)):
        b = tl.cast(index, tl.int64)
        row = 0
        first, key_bias = left_out(p_mask + b * length, length, TIED)
        b_z0 = tl.load(p_z0 + b * D + o_d)  # [D]
        if p_noise is None:
            row = tl.load(p_rows + b).to(tl.uint32)
        b_point = b_z0
        if TRAJECTORY:
            tl.store(p_out + b * D + o_d, b_z0)
        for step in range(steps):
            b_shift = b_point + tl.load(p_taus + step * D + o_d)
            p_lam = None
            if p_noise is not None:
                p_lam = p_noise + (step * batch.to(tl.int64) + b) * length * D
            fuse_tiles(
                p_e + b * length * D, p_lam, p_stream, b_shift, k0, k1, row, step, delta,
                first, length - first, D, T,
            )  # fmt: skip
            b_last = stack_tiles(
                p_stream, p_rest, p_mask + b * length, p_matrices, p_vectors, None, 0,
                length, first, tiles, num_blocks, key_bias,
                D, H, T, CHUNK, LAST_CHUNK, STAGES, TIED, PRECISION, INPUT,
            )  # fmt: skip
            b_point += (norm_row(b_last, b_weight, b_bias, D) - b_z0) / steps
            if TRAJECTORY:
                tl.store(p_out + ((step + 1) * batch.to(tl.int64) + b) * D + o_d, b_point)
        if not TRAJECTORY:
            tl.store(p_out + b * D + o_d, b_point)


def euler_sampler(
    e: torch.Tensor,
    mask: torch.Tensor,
    z0: torch.Tensor,
    taus: torch.Tensor,
    weights: SamplerWeights,
    noise: torch.Tensor | None,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    precision: str,
    tied: bool,
    out: torch.Tensor,
) -> None:
    """Launch; `out` with one dimension more than z0 takes all points. Shapes as above."""
    launch_network(
        (euler_sampler_kernel, euler_sampler_tiled_kernel),
        e.shape[0],
        *(e, mask, z0, taus, weights, noise, rows, seed, precision, tied, out),
        TRAJECTORY=out.ndim > z0.ndim,
    )


CASE = (
    euler_sampler_kernel,
    "p_e p_mask p_z0 p_taus p_matrices p_vectors p_norm p_rows p_seed p_out",
    "batch length steps num_blocks delta",
    {"p_noise": None, "TRAJECTORY": False},
)
TILED = (
    euler_sampler_tiled_kernel,
    "p_e p_mask p_z0 p_taus p_matrices p_vectors p_norm p_rows p_seed p_out p_stream p_rest",
    "batch length steps num_blocks delta",
    {"p_noise": None, "TRAJECTORY": False, "TIED": True},
)
TILED_CASES = tiled_cases(*TILED, widest=True)
COMPILE_CASES = TILED_CASES + compile_cases(*CASE) + compile_cases(*CASE, fave=True)
