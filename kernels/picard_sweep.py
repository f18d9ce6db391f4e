"""The network at all q points of a guessed trajectory, one (sequence, step) to a program.

    pred[b, i] = network(e[b] + lam[i, b] * (x[b, i] + tau_i))

e [B, L, D], mask [B, L], x [B, q, D], taus [q, D], all contiguous float32; lam from the stream
with step word i (rows int64 [B], seed int64 scalar on the device) or given [q, B, L, D];
pred [B, q, D]. The network is `kernels/transformer.py`'s, or in tiles `kernels/tiles.py`'s: an
evaluation here is the one that `kernels/euler_sampler.py` makes at the same point, so that both
samplers agree.
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
def picard_sweep_kernel(
    p_e,
    p_mask,
    p_x,
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
):
    """One program: one step of one sequence. Grid (B q,), the steps of a sequence side by side."""
    index = tl.program_id(0).to(tl.int64)
    b, step = index // steps, (index % steps).to(tl.int32)
    o_d = tl.arange(0, D)
    k0, k1, row = 0, 0, 0
    if p_noise is not None:
        p_noise += (step * batch.to(tl.int64) + b) * length * D
    else:
        k0, k1 = load_seed(p_seed)
        row = tl.load(p_rows + b).to(tl.uint32)
    b_shift = tl.load(p_x + index * D + o_d) + tl.load(p_taus + step * D + o_d)  # [D]
    b_x = fuse(p_e + b * length * D, p_noise, b_shift, k0, k1, row, step, delta, length, D, T)
    b_scale = query_scale(p_mask, b, length, D, H, T)  # [T]
    b_last = stack(
        b_x, b_scale, p_matrices, p_vectors, p_rotary, None, 0, length, num_blocks,
        D, H, T, CHUNK, LAST_CHUNK, STACKED, STAGES, PRECISION, INPUT,
    )  # fmt: skip
    b_weight, b_bias = tl.load(p_norm + o_d), tl.load(p_norm + D + o_d)  # [D]
    tl.store(p_out + index * D + o_d, norm_row(b_last, b_weight, b_bias, D))


@triton.jit(do_not_specialize=["batch", "length", "steps", "num_blocks", "delta"])
def picard_sweep_tiled_kernel(
    p_e,
    p_mask,
    p_x,
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
):
    """One program: every |grid|-th step of a sequence, in tiles of T rows."""
    o_d = tl.arange(0, D)
    tiles = tl.cdiv(length, T)
    p_stream += tl.program_id(0).to(tl.int64) * tiles * T * D
    p_rest += tl.program_id(0).to(tl.int64) * (2 * tiles + 2) * T * D
    b_weight, b_bias = tl.load(p_norm + o_d), tl.load(p_norm + D + o_d)  # [D]
    k0, k1 = 0, 0
    if p_noise is None:
        k0, k1 = load_seed(p_seed)
    for index in range(tl.program_id(0), batch * steps, tl.num_programs(0)):
        b, step = tl.cast(index // steps, tl.int64), index % steps
        row = 0
        first, key_bias = left_out(p_mask + b * length, length, TIED)
        p_lam = None
        if p_noise is None:
            row = tl.load(p_rows + b).to(tl.uint32)
        else:
            p_lam = p_noise + (step * batch.to(tl.int64) + b) * length * D
        o_x = tl.cast(index, tl.int64) * D + o_d
        b_shift = tl.load(p_x + o_x) + tl.load(p_taus + step * D + o_d)  # [D]
        fuse_tiles(
            p_e + b * length * D, p_lam, p_stream, b_shift, k0, k1, row, step, delta,
            first, length - first, D, T,
        )  # fmt: skip
        b_last = stack_tiles(
            p_stream, p_rest, p_mask + b * length, p_matrices, p_vectors, None, 0,
            length, first, tiles, num_blocks, key_bias,
            D, H, T, CHUNK, LAST_CHUNK, STAGES, TIED, PRECISION, INPUT,
        )  # fmt: skip
        tl.store(p_out + o_x, norm_row(b_last, b_weight, b_bias, D))


def picard_sweep(
    e: torch.Tensor,
    mask: torch.Tensor,
    x: torch.Tensor,
    taus: torch.Tensor,
    weights: SamplerWeights,
    noise: torch.Tensor | None,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    precision: str,
    tied: bool,
    out: torch.Tensor,
) -> None:
    """Launch; shapes as above."""
    launch_network(
        (picard_sweep_kernel, picard_sweep_tiled_kernel),
        e.shape[0] * taus.shape[0],
        *(e, mask, x, taus, weights, noise, rows, seed, precision, tied, out),
    )


CASE = (
    picard_sweep_kernel,
    "p_e p_mask p_x p_taus p_matrices p_vectors p_norm p_rows p_seed p_out",
    "batch length steps num_blocks delta",
    {"p_noise": None},
)
COMPILE_CASES = compile_cases(*CASE) + compile_cases(*CASE, fave=True)
TILED_CASES = tiled_cases(
    picard_sweep_tiled_kernel,
    "p_e p_mask p_x p_taus p_matrices p_vectors p_norm p_rows p_seed p_out p_stream p_rest",
    "batch length steps num_blocks delta",
    {"p_noise": None, "TIED": True},
)
COMPILE_CASES += TILED_CASES
