"""All q steps of the Euler sampler (FMRec eq. 23) of one sequence in one program.

    x = z0; q times: x = x + (norm(stack(e + lam * (x + tau_i))[L - 1]) - z0) / q

"""

import torch
import triton
import triton.language as tl

from fmrec_fast.kernels.philox import load_seed
from fmrec_fast.kernels.transformer import fuse, norm_row, query_scale, stack


@triton.jit(do_not_specialize=["batch", "length", "steps", "num_blocks", "delta"])
def euler_sampler_kernel(
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
    PRECISION: tl.constexpr,
    INPUT: tl.constexpr,
    GIVEN: tl.constexpr,
    TRAJECTORY: tl.constexpr,
):
    """One program: all steps of one sequence. Grid (B,)."""
    b = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, D)
    p_e += b * length * D
    b_scale = query_scale(p_mask, b, length, D, H, T)  # [T]
    b_z0 = tl.load(p_z0 + b * D + o_d)  # [D]
    b_weight, b_bias = tl.load(p_norm + o_d), tl.load(p_norm + D + o_d)  # [D]
    if GIVEN:
        k0, k1, row = 0, 0, 0
        p_noise += b * length * D
    else:
        k0, k1 = load_seed(p_seed)
        row = tl.load(p_rows + b).to(tl.uint32)
    b_point = b_z0
    if TRAJECTORY:
        tl.store(p_out + b * D + o_d, b_z0)
    for step in range(steps):
        b_shift = b_point + tl.load(p_taus + step * D + o_d)
        b_x = fuse(p_e, p_noise, b_shift, k0, k1, row, step, delta, length, D, T, GIVEN)
        b_last = stack(
            b_x, b_scale, p_matrices, p_vectors, p_out, 0, length, num_blocks,
            D, H, T, CHUNK, LAST_CHUNK, STAGES, PRECISION, INPUT, False,
        )  # fmt: skip
        b_point += (norm_row(b_last, b_weight, b_bias, D) - b_z0) / steps
        if GIVEN:
            p_noise += batch.to(tl.int64) * length * D
        if TRAJECTORY:
            p_out += batch.to(tl.int64) * D
            tl.store(p_out + b * D + o_d, b_point)
    if not TRAJECTORY:
        tl.store(p_out + b * D + o_d, b_point)
