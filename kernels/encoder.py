"""The transformer stack, last position out, one sequence to a program.

x [B, L, D], mask [B, L], all contiguous float32; out [B, D], and `tapped` [B, D] for the last
position of block `tap`. The network is `kernels/transformer.py`'s, or in tiles
`kernels/tiles.py`'s.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fmrec_fast.kernels.launch import (
    compile_cases,
    pack,
    rotations,
    scratch,
    settings,
    tiled_cases,
)
from fmrec_fast.kernels.plans import TilePlan
from fmrec_fast.kernels.tiles import stack_tiles
from fmrec_fast.kernels.transformer import query_scale, stack
from fmrec_fast.reference.encoder import BlockWeights


@triton.jit(do_not_specialize=["length", "num_blocks", "tap"])
def encoder_kernel(
    p_x,
    p_mask,
    p_matrices,
    p_vectors,
    p_rotary,
    p_out,
    p_tapped,
    length,
    num_blocks,
    tap,
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
    """One program: one sequence. Grid (B,). p_tapped may be None."""
    b = tl.program_id(0).to(tl.int64)
    o_t, o_d = tl.arange(0, T), tl.arange(0, D)
    o_x = b * length * D + o_t[:, None] * D + o_d[None, :]
    b_x = tl.load(p_x + o_x, mask=(o_t < length)[:, None], other=0.0).T  # [D, T]
    b_scale = query_scale(p_mask, b, length, D, H, T)  # [T]
    if p_tapped is not None:
        p_tapped += b * D
    b_last = stack(
        b_x, b_scale, p_matrices, p_vectors, p_rotary, p_tapped, tap, length, num_blocks,
        D, H, T, CHUNK, LAST_CHUNK, STACKED, STAGES, PRECISION, INPUT,
    )  # fmt: skip
    tl.store(p_out + b * D + o_d, b_last)


@triton.jit(do_not_specialize=["batch", "length", "num_blocks", "tap"])
def encoder_tiled_kernel(
    p_x,
    p_mask,
    p_matrices,
    p_vectors,
    p_out,
    p_tapped,
    p_stream,
    p_rest,
    batch,
    length,
    num_blocks,
    tap,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    LAST_CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INPUT: tl.constexpr,
):
    """One program: every |grid|-th sequence, in tiles of T rows. p_tapped may be None."""
    o_t, o_d = tl.arange(0, T), tl.arange(0, D)
    tiles = tl.cdiv(length, T)
    p_stream += tl.program_id(0).to(tl.int64) * tiles * T * D
    p_rest += tl.program_id(0).to(tl.int64) * (2 * tiles + 2) * T * D
    for index in range(tl.program_id(0), batch, tl.num_programs(0)):
        b = tl.cast(index, tl.int64)
        for start in tl.range(0, length, T, num_stages=1):
            o_row = start + o_t
            o_x = o_row[:, None] * D + o_d[None, :]
            b_x = tl.load(p_x + b * length * D + o_x, mask=(o_row < length)[:, None], other=0.0)
            tl.store(p_stream + o_x, b_x)  # [T, D]
        tl.debug_barrier()
        p_tap = None
        if p_tapped is not None:
            p_tap = p_tapped + b * D
        b_last = stack_tiles(
            p_stream, p_rest, p_mask + b * length, p_matrices, p_vectors, p_tap, tap,
            length, 0, tiles, num_blocks, 0.0,
            D, H, T, CHUNK, LAST_CHUNK, STAGES, False, PRECISION, INPUT,
        )  # fmt: skip
        tl.store(p_out + b * D + o_d, b_last)


def encoder(
    x: torch.Tensor,
    mask: torch.Tensor,
    blocks: list[BlockWeights],
    num_heads: int,
    precision: str,
    tap: int | None,
    out: torch.Tensor,
    tapped: torch.Tensor | None,
) -> None:
    """Launch; shapes as above."""
    batch, length = x.shape[:2]
    if batch == 0:
        return
    rotates = blocks[0].inv_freq is not None
    plan, constants = settings(x, num_heads, precision, False, rotates)
    tensors = (x, mask, *pack(blocks, x.shape[2], precision))
    sizes = (length, len(blocks), -1 if tap is None else tap)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if isinstance(plan, TilePlan):
            programs, *memory = scratch(x, plan, batch, precision)
            kernel = encoder_tiled_kernel[(programs,)]
            kernel(*tensors, out, tapped, *memory, batch, *sizes, **constants)
        else:
            rotary = rotations(blocks, *x.shape[1:], num_heads)
            encoder_kernel[(batch,)](*tensors, rotary, out, tapped, *sizes, **constants)


CASE = (
    encoder_kernel,
    "p_x p_mask p_matrices p_vectors p_out p_tapped",
    "length num_blocks tap",
    {},
)
TILED_CASES = tiled_cases(
    encoder_tiled_kernel,
    "p_x p_mask p_matrices p_vectors p_out p_tapped p_stream p_rest",
    "batch length num_blocks tap",
    {},
)
COMPILE_CASES = TILED_CASES + compile_cases(*CASE) + compile_cases(*CASE, fave=True)
