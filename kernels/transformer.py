"""The network of one sequence on chip: what the encoder's and the sampler's kernels share.

    E = e + lam * (x + tau)                          (eq. 14)
    x = x + attn(norm(x)); x = x + ffn(norm(x))      each block
    pred = norm(the last position of the last block)

One program holds the T >= L rows of one sequence: the residual stream [T, D] stays in registers in
float32, the weights are read from L2 in tiles as the products need them, and nothing else touches
device memory. Rows L .. T-1 are padding of the tile: finite, and hidden as keys. Padded positions
of the *history* are keys like any other; as queries they are zeroed, which is the published
attention.

The last block is needed at one position only, so none of its products has more than one row, and
with q' = Wk^T q and Wv (p X) in place of q (Wk X) and p (Wv X) no key and no value is computed:
16 D^2 multiplications (and 2 H T D for the scores) where keys and values alone would take 2 T D^2.
It runs in float32 on the ordinary units, whatever the precision.

Fave's blocks, told by p_rotary, have RMS norms, and queries and keys that are rotated by their
position: channels j and j + D/H/2 of a head by the angle j. The keys of its last block are
computed, for each is rotated by an angle of its own.

Precisions and packed weights are those of `layers`; p_rotary [blocks, 2, L, D/H/2] holds cosines
and sines, or is None.
"""

import triton
import triton.language as tl

from fmrec_fast.kernels.layers import (
    B_OUTPUT,
    B_QUERY,
    B_VALUE,
    KEY,
    LOG2E,
    MATRICES,
    NORM1,
    OUTPUT,
    VALUE,
    VECTORS,
    column_of,
    feed_forward,
    feed_forward_row,
    fuse_rows,
    norm_columns,
    operand,
    product,
)
from fmrec_fast.kernels.rotary import channels, rotate, rotation


@triton.jit
def project(
    p_w,
    p_b,
    b_h,
    o_w,
    D: tl.constexpr,
    DH: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    INPUT: tl.constexpr,
):
    """One head's queries, keys or values: [W, T]; its channels are o_w."""
    if W == DH:
        b_w, b_bias = tl.load(p_w), tl.load(p_b)  # [W, D], [W]
    else:
        m_w = o_w < DH
        b_w = tl.load(p_w, mask=m_w[:, None], other=0.0)
        b_bias = tl.load(p_b, mask=m_w, other=0.0)
    return product(b_w, b_h, tl.zeros((W, T), tl.float32), INPUT) + b_bias[:, None]


@triton.jit
def block(
    b_x,
    b_scale,
    p_matrices,
    p_vectors,
    p_rotary,
    length,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    STACKED: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INPUT: tl.constexpr,
):
    """One block of all positions: [D, T] -> [D, T]; b_scale [T] multiplies the queries."""
    DH: tl.constexpr = D // H
    # Matrix units take at least 16 channels; a narrower head is filled up with zeros.
    W: tl.constexpr = DH if DH > 16 else 16
    o_d = tl.arange(0, D)
    o_w = channels(tl.arange(0, W), p_rotary, DH, W)
    o_part = tl.arange(0, 4 * W)
    RMS: tl.constexpr = p_rotary is not None
    b_h = norm_columns(b_x, p_vectors + NORM1 * D, D, RMS)
    b_h = operand(b_h, PRECISION, INPUT)  # [D, T]
    m_key = (tl.arange(0, T) < length)[:, None]
    if p_rotary is not None:
        b_cos, b_sin = rotation(p_rotary, tl.arange(0, W // 2), tl.arange(0, T), length, DH)
    b_x += tl.load(p_vectors + B_OUTPUT * D + o_d)[:, None]  # the products add up on top
    for head in tl.range(0, H, num_stages=STAGES):
        if STACKED:
            # Queries, keys and values in one product, whose 4 W rows fill the matrix units.
            o_of = channels(o_part % W, p_rotary, DH, W)
            o_row = (o_part // W) * (D * D) + (head * DH + o_of) * D
            o_bias = B_QUERY * D + (o_part // W) * D + head * DH + o_of
            m_in = (o_part < 3 * W) & (o_of < DH)
            b_w = tl.load(
                p_matrices + o_row[:, None] + o_d[None, :], mask=m_in[:, None], other=0.0
            )  # [4 W, D]
            b_bias = tl.load(p_vectors + o_bias, mask=m_in, other=0.0)  # [4 W]
            b_qkv = product(b_w, b_h, tl.zeros((4 * W, T), tl.float32), INPUT) + b_bias[:, None]
            b_qk, b_v = tl.split(tl.permute(tl.reshape(b_qkv, (2, 2, W, T)), (2, 3, 1, 0)))
            b_q, b_k = tl.split(b_qk)  # [W, T]
            b_v, _ = tl.split(b_v)
        else:
            p_w = p_matrices + (head * DH + o_w)[:, None] * D + o_d[None, :]  # [W, D]
            p_b = p_vectors + B_QUERY * D + head * DH + o_w
            b_q = project(p_w, p_b, b_h, o_w, D, DH, W, T, INPUT)
            b_k = project(p_w + KEY * D * D, p_b + D, b_h, o_w, D, DH, W, T, INPUT)
            b_v = project(p_w + VALUE * D * D, p_b + 2 * D, b_h, o_w, D, DH, W, T, INPUT)
        if p_rotary is not None:
            b_q, b_k = rotate(b_q, b_cos, b_sin, W, T), rotate(b_k, b_cos, b_sin, W, T)
        b_q *= b_scale[None, :]
        o_out = OUTPUT * D * D + o_d[:, None] * D + head * DH + o_w[None, :]  # [D, W]
        if W == DH:
            b_wo = tl.load(p_matrices + o_out)
        else:
            b_wo = tl.load(p_matrices + o_out, mask=(o_w < DH)[None, :], other=0.0)
        b_q, b_k = operand(b_q, PRECISION, INPUT), operand(b_k, PRECISION, INPUT)
        b_s = product(b_k.T, b_q, tl.zeros((T, T), tl.float32), INPUT)  # [keys, queries]
        b_s = tl.where(m_key, b_s, float("-inf"))
        b_s = tl.exp2((b_s - tl.max(b_s, 0)[None, :]) * LOG2E)
        b_total = tl.sum(b_s, 0)
        b_v, b_s = operand(b_v, PRECISION, INPUT), operand(b_s, PRECISION, INPUT)
        b_mixed = product(b_v, b_s, tl.zeros((W, T), tl.float32), INPUT)
        b_mixed = operand(b_mixed / b_total[None, :], PRECISION, INPUT)  # [W, T]
        b_x = product(b_wo, b_mixed, b_x, INPUT)

    return feed_forward(
        b_x, p_matrices, p_vectors, D, T, RMS, CHUNK, STAGES, PRECISION, INPUT
    )  # fmt: skip


@triton.jit
def rotated_scores(
    b_h,
    b_query,
    p_matrices,
    p_vectors,
    p_rotary,
    head,
    length,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    PRECISION: tl.constexpr,
    INPUT: tl.constexpr,
):
    """One head's scores of position L - 1, whose normed row is b_query, before their scale: [T].

    A rotated query times a rotated key is the query turned by their distance times the key.
    """
    DH: tl.constexpr = D // H
    W: tl.constexpr = DH if DH > 16 else 16
    HALF: tl.constexpr = DH // 2
    o_d, o_t = tl.arange(0, D), tl.arange(0, T)
    o_w = channels(tl.arange(0, W), p_rotary, DH, W)
    m_w = o_w < DH
    o_head = head * DH + o_w
    o_partner = head * DH + (o_w + HALF) % DH
    p_w, p_b = p_matrices + o_d[None, :], p_vectors + B_QUERY * D
    b_wq = tl.load(p_w + o_head[:, None] * D, mask=m_w[:, None], other=0.0)  # [W, D]
    b_q = tl.sum(b_wq.to(tl.float32) * b_query[None, :], 1)
    b_q += tl.load(p_b + o_head, mask=m_w, other=0.0)  # [W]
    b_wq = tl.load(p_w + o_partner[:, None] * D, mask=m_w[:, None], other=0.0)
    b_other = tl.sum(b_wq.to(tl.float32) * b_query[None, :], 1)
    b_other += tl.load(p_b + o_partner, mask=m_w, other=0.0)
    b_other = tl.where(o_w < HALF, -b_other, b_other)
    b_cos, b_sin = rotation(p_rotary, o_w % HALF, length - 1 - o_t, length, DH)  # [W, T]
    b_k = project(
        p_w + KEY * D * D + o_head[:, None] * D, p_b + D + o_head, operand(b_h, PRECISION, INPUT),
        o_w, D, DH, W, T, INPUT,
    )  # fmt: skip
    return tl.sum(b_k * (b_q[:, None] * b_cos + b_other[:, None] * b_sin), 0)


@triton.jit
def last_block(
    b_x,
    b_scale,
    p_matrices,
    p_vectors,
    p_rotary,
    length,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    LAST_CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    INPUT: tl.constexpr,
):
    """The last block at position L - 1: [D, T] -> [D]."""
    DH: tl.constexpr = D // H
    o_d = tl.arange(0, D)
    o_h = tl.arange(0, DH)
    m_key = tl.arange(0, T) < length
    RMS: tl.constexpr = p_rotary is not None
    b_h = norm_columns(b_x, p_vectors + NORM1 * D, D, RMS)  # [D, T]
    b_query = column_of(b_h, length - 1, T)  # [D]
    scale = tl.sum(tl.where(tl.arange(0, T) == length - 1, b_scale, 0.0), 0)
    b_out = column_of(b_x, length - 1, T) + tl.load(p_vectors + B_OUTPUT * D + o_d)
    for head in range(H):
        o_head = head * DH + o_h
        p_w = p_matrices + o_head[:, None] * D + o_d[None, :]  # [DH, D]
        if p_rotary is None:
            b_wq = tl.load(p_w).to(tl.float32)
            b_wk = tl.load(p_w + KEY * D * D).to(tl.float32)
        b_wv = tl.load(p_w + VALUE * D * D).to(tl.float32)
        p_wo = p_matrices + OUTPUT * D * D + o_d[:, None] * D + o_head[None, :]  # [D, DH]
        b_wo = tl.load(p_wo).to(tl.float32)
        if p_rotary is not None:
            b_s = scale * rotated_scores(
                b_h, b_query, p_matrices, p_vectors, p_rotary, head, length,
                D, H, T, PRECISION, INPUT,
            )  # fmt: skip
        else:
            b_q = tl.sum(b_wq * b_query[None, :], 1) + tl.load(p_vectors + B_QUERY * D + o_head)
            # The keys' bias adds the same to all scores of a query.
            b_q = tl.sum(b_wk * (b_q * scale)[:, None], 0)  # [D]
            b_s = tl.sum(b_h * b_q[:, None], 0)  # [T]
        b_s = tl.where(m_key, b_s, float("-inf"))
        b_s = tl.exp2((b_s - tl.max(b_s, 0)) * LOG2E)
        b_mixed = tl.sum(b_h * (b_s / tl.sum(b_s, 0))[None, :], 1)  # [D]
        b_v = tl.sum(b_wv * b_mixed[None, :], 1) + tl.load(p_vectors + B_VALUE * D + o_head)
        b_out += tl.sum(b_wo * b_v[None, :], 1)
    return feed_forward_row(b_out, p_matrices, p_vectors, D, RMS, LAST_CHUNK)


@triton.jit
def query_scale(p_mask, b, length, D: tl.constexpr, H: tl.constexpr, T: tl.constexpr):
    """What multiplies the queries of sequence b: mask / sqrt(D / H), [T]."""
    o_t = tl.arange(0, T)
    SCALE: tl.constexpr = (D // H) ** -0.5
    return tl.load(p_mask + b * length + o_t, mask=o_t < length, other=0.0) * SCALE


@triton.jit
def fuse(
    p_e,
    p_noise,
    b_shift,
    k0,
    k1,
    row,
    step,
    delta,
    length,
    D: tl.constexpr,
    T: tl.constexpr,
):
    """All positions of one sequence, [D, T]."""
    o_t = tl.arange(0, T)
    b_x = fuse_rows(p_e, p_noise, b_shift, k0, k1, row, step, delta, o_t, o_t < length, D, T)
    return b_x.T


@triton.jit
def stack(
    b_x,
    b_scale,
    p_matrices,
    p_vectors,
    p_rotary,
    p_tapped,
    tap,
    length,
    num_blocks,
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
    """All blocks: [D, T] -> [D]; block `tap` writes its last position to p_tapped, if there."""
    for index in range(num_blocks - 1):
        b_x = block(
            b_x,
            b_scale,
            p_matrices,
            p_vectors,
            p_rotary,
            length,
            D,
            H,
            T,
            CHUNK,
            STACKED,
            STAGES,
            PRECISION,
            INPUT,
        )
        p_matrices += MATRICES * D * D
        p_vectors += VECTORS * D
        if p_rotary is not None:
            p_rotary += length * (D // H)
        if p_tapped is not None:
            if index == tap:
                tl.store(p_tapped + tl.arange(0, D), column_of(b_x, length - 1, T))
    b_last = last_block(
        b_x, b_scale, p_matrices, p_vectors, p_rotary, length,
        D, H, T, LAST_CHUNK, PRECISION, INPUT,
    )  # fmt: skip
    if p_tapped is not None:
        if tap == num_blocks - 1:
            tl.store(p_tapped + tl.arange(0, D), b_last)
    return b_last
