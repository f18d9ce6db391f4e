"""The network of one sequence in tiles of T rows: for what does not fit on chip as a whole.

The network of `kernels/transformer.py`, for any number of rows. A program keeps what outlives a
tile in a scratch of its own in device memory, which it uses for one sequence after another and
which its multiprocessor writes and reads again at once, so that it stays in L2:

    p_x [S, D] float32                       the residual stream; S = tiles * T >= length rows
    p_rest, of the operands' type:
        keys [S, D], values [D, S]           of all rows, of one block
        queries [T, D], mixed [T, D]         of one tile

A block makes keys and values of every tile, then takes the tiles again: queries, attention over
the tiles of keys with a running maximum, output projection and feed-forward. Barriers stand
between what some threads write there and others read.

Rows. `first` positions are left out: row r is position first + r, but row 0 is position 0. With
TIED padding, first = n - 1 of the n leading padded positions, which are row 0 together: log(n) is
added to its score as a key. Loops end at the real number of rows, `rows` = length - first.
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
    feed_forward,
    feed_forward_row,
    fuse_rows,
    norm_columns,
    norm_row,
    operand,
    product,
)

# Positions that the search for leading padding looks at together.
SEARCHED = tl.constexpr(64)


@triton.jit
def leading_padding(p_mask, length):
    """How many positions of a sequence's mask are 0 before the first that is not."""
    o_p = tl.arange(0, SEARCHED)
    count = length
    for start in range(0, length, SEARCHED):
        b_mask = tl.load(p_mask + start + o_p, mask=start + o_p < length, other=0.0)
        b_first = tl.where(b_mask != 0.0, start + o_p, length)  # [SEARCHED]
        count = tl.minimum(count, tl.min(b_first, 0))
    return count


@triton.jit
def left_out(p_mask, length, TIED: tl.constexpr):
    """`first`, and what is added to the score of row 0 as a key."""
    first = length * 0
    bias = 0.0
    if TIED:
        padded = tl.maximum(leading_padding(p_mask, length), 1)
        first = padded - 1
        bias = tl.log(padded.to(tl.float32))
    return first, bias


@triton.jit
def position_of(o_row, first):
    """The position of each row."""
    return tl.where(o_row == 0, 0, o_row + first)


@triton.jit
def fuse_tiles(
    p_e,
    p_noise,
    p_x,
    b_shift,
    k0,
    k1,
    row,
    step,
    delta,
    first,
    rows,
    D: tl.constexpr,
    T: tl.constexpr,
):
    """p_x = e + lam * shift of one sequence; rows beyond the last are 0."""
    o_t, o_d = tl.arange(0, T), tl.arange(0, D)
    for start in tl.range(0, rows, T, num_stages=1):
        o_row = start + o_t
        b_x = fuse_rows(
            p_e, p_noise, b_shift, k0, k1, row, step, delta,
            position_of(o_row, first), o_row < rows, D, T,
        )  # fmt: skip
        tl.store(p_x + o_row[:, None] * D + o_d[None, :], b_x)
    tl.debug_barrier()


@triton.jit
def load_tile(p_x, start, D: tl.constexpr, T: tl.constexpr):
    """[D, T] of the residual stream."""
    o_row, o_d = start + tl.arange(0, T), tl.arange(0, D)
    return tl.load(p_x + o_row[None, :] * D + o_d[:, None])


@triton.jit
def project_chunk(
    p_matrices,
    p_vectors,
    b_h,
    o_c,
    WHICH: tl.constexpr,
    D: tl.constexpr,
    C: tl.constexpr,
    T: tl.constexpr,
    INPUT: tl.constexpr,
):
    """Channels o_c of queries (WHICH = 0), keys (1) or values (2): [C, T]."""
    o_d = tl.arange(0, D)
    b_w = tl.load(p_matrices + WHICH * D * D + o_c[:, None] * D + o_d[None, :])  # [C, D]
    b_bias = tl.load(p_vectors + (B_QUERY + WHICH) * D + o_c)  # [C]
    return product(b_w, b_h, tl.zeros((C, T), tl.float32), INPUT) + b_bias[:, None]


@triton.jit
def attend_tile(
    p_keys,
    p_values,
    p_queries,
    p_mixed,
    rows,
    span,
    key_bias,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    STAGES: tl.constexpr,
    TIED: tl.constexpr,
    PRECISION: tl.constexpr,
    INPUT: tl.constexpr,
):
    """All heads of one tile of queries over all tiles of keys; `span` is S."""
    DH: tl.constexpr = D // H
    W: tl.constexpr = DH if DH > 16 else 16  # a narrower head is filled up with zeros
    o_t, o_w = tl.arange(0, T), tl.arange(0, W)
    m_w = o_w < DH
    for head in tl.range(0, H, num_stages=1):
        o_head = head * DH + o_w
        o_q = o_t[None, :] * D + o_head[:, None]  # [W, T]
        b_q = tl.load(p_queries + o_q, mask=m_w[:, None], other=0.0)
        b_most = tl.full((T,), float("-inf"), tl.float32)
        b_total = tl.zeros((T,), tl.float32)
        b_mixed = tl.zeros((W, T), tl.float32)
        for start in tl.range(0, rows, T, num_stages=STAGES):
            o_key = start + o_t
            b_k = tl.load(
                p_keys + o_key[:, None] * D + o_head[None, :], mask=m_w[None, :], other=0.0
            )  # [T, W]
            b_v = tl.load(
                p_values + o_head[:, None] * span + o_key[None, :], mask=m_w[:, None], other=0.0
            )  # [W, T]
            b_s = product(b_k, b_q, tl.zeros((T, T), tl.float32), INPUT)  # [keys, queries]
            if TIED:
                b_s += tl.where(o_key == 0, key_bias, 0.0)[:, None]
            b_s = tl.where((o_key < rows)[:, None], b_s, float("-inf"))
            b_more = tl.maximum(b_most, tl.max(b_s, 0))
            b_shrink = tl.exp2((b_most - b_more) * LOG2E)
            b_s = tl.exp2((b_s - b_more[None, :]) * LOG2E)
            b_total = b_total * b_shrink + tl.sum(b_s, 0)
            b_mixed *= b_shrink[None, :]
            b_mixed = product(b_v, operand(b_s, PRECISION, INPUT), b_mixed, INPUT)
            b_most = b_more
        b_mixed = operand(b_mixed / b_total[None, :], PRECISION, INPUT)
        tl.store(p_mixed + o_q, b_mixed.to(p_mixed.dtype.element_ty), mask=m_w[:, None])


@triton.jit
def block_tiles(
    p_x,
    p_rest,
    p_mask,
    p_matrices,
    p_vectors,
    first,
    rows,
    tiles,
    key_bias,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    TIED: tl.constexpr,
    PRECISION: tl.constexpr,
    INPUT: tl.constexpr,
):
    """One block of all rows, in place in p_x."""
    C: tl.constexpr = CHUNK if CHUNK < D else D
    SCALE: tl.constexpr = (D // H) ** -0.5
    o_t, o_d = tl.arange(0, T), tl.arange(0, D)
    span = tiles * T
    p_keys = p_rest
    p_values = p_keys + span * D
    p_queries = p_values + span * D
    p_mixed = p_queries + T * D
    for start in tl.range(0, rows, T, num_stages=1):
        o_row = start + o_t
        b_h = norm_columns(load_tile(p_x, start, D, T), p_vectors + NORM1 * D, D, False)
        b_h = operand(b_h, PRECISION, INPUT)  # [D, T]
        for channel in tl.range(0, D, C, num_stages=STAGES):
            o_c = channel + tl.arange(0, C)
            b_k = project_chunk(p_matrices, p_vectors, b_h, o_c, 1, D, C, T, INPUT)
            b_k = operand(b_k, PRECISION, INPUT).to(p_rest.dtype.element_ty)
            tl.store(p_keys + o_row[None, :] * D + o_c[:, None], b_k)
        for channel in tl.range(0, D, C, num_stages=STAGES):
            o_c = channel + tl.arange(0, C)
            b_v = project_chunk(p_matrices, p_vectors, b_h, o_c, 2, D, C, T, INPUT)
            b_v = operand(b_v, PRECISION, INPUT).to(p_rest.dtype.element_ty)
            tl.store(p_values + o_c[:, None] * span + o_row[None, :], b_v)
    tl.debug_barrier()
    for start in tl.range(0, rows, T, num_stages=1):
        o_row = start + o_t
        b_h = norm_columns(load_tile(p_x, start, D, T), p_vectors + NORM1 * D, D, False)
        b_h = operand(b_h, PRECISION, INPUT)  # [D, T]
        b_scale = tl.load(p_mask + position_of(o_row, first), mask=o_row < rows, other=0.0)
        b_scale *= SCALE
        for channel in tl.range(0, D, C, num_stages=STAGES):
            o_c = channel + tl.arange(0, C)
            b_q = project_chunk(p_matrices, p_vectors, b_h, o_c, 0, D, C, T, INPUT)
            b_q = operand(b_q * b_scale[None, :], PRECISION, INPUT).to(p_rest.dtype.element_ty)
            tl.store(p_queries + o_t[None, :] * D + o_c[:, None], b_q)
        tl.debug_barrier()
        attend_tile(
            p_keys, p_values, p_queries, p_mixed, rows, span, key_bias,
            D, H, T, STAGES, TIED, PRECISION, INPUT,
        )  # fmt: skip
        tl.debug_barrier()
        b_x = load_tile(p_x, start, D, T)
        b_x += tl.load(p_vectors + B_OUTPUT * D + o_d)[:, None]
        for channel in tl.range(0, D, C, num_stages=STAGES):
            o_c = channel + tl.arange(0, C)
            b_w = tl.load(p_matrices + OUTPUT * D * D + o_d[:, None] * D + o_c[None, :])  # [D, C]
            b_mixed = tl.load(p_mixed + o_t[None, :] * D + o_c[:, None])  # [C, T]
            b_x = product(b_w, b_mixed, b_x, INPUT)
        b_x = feed_forward(
            b_x, p_matrices, p_vectors, D, T, False, CHUNK, STAGES, PRECISION, INPUT
        )  # fmt: skip
        tl.store(p_x + o_row[None, :] * D + o_d[:, None], b_x)
    tl.debug_barrier()


@triton.jit
def last_block_tiles(
    p_x,
    scale,
    p_matrices,
    p_vectors,
    rows,
    key_bias,
    D: tl.constexpr,
    H: tl.constexpr,
    T: tl.constexpr,
    LAST_CHUNK: tl.constexpr,
    TIED: tl.constexpr,
):
    """The last block at the last row: [D]; `scale` multiplies its query."""
    DH: tl.constexpr = D // H
    PART: tl.constexpr = DH if DH < LAST_CHUNK else LAST_CHUNK
    o_d, o_t, o_part = tl.arange(0, D), tl.arange(0, T), tl.arange(0, PART)
    b_out = tl.load(p_x + (rows - 1) * D + o_d)  # [D]
    b_weight = tl.load(p_vectors + NORM1 * D + o_d)
    b_query = norm_row(b_out, b_weight, tl.load(p_vectors + NORM1 * D + D + o_d), D)
    b_out += tl.load(p_vectors + B_OUTPUT * D + o_d)
    for head in tl.range(0, H, num_stages=1):
        b_seen = tl.zeros((D,), tl.float32)  # Wk^T q: what the scores are products with
        for part in tl.range(0, DH, PART, num_stages=1):
            o_head = head * DH + part + o_part
            p_w = p_matrices + o_head[:, None] * D + o_d[None, :]  # [PART, D]
            b_q = tl.sum(tl.load(p_w).to(tl.float32) * b_query[None, :], 1)
            b_q = (b_q + tl.load(p_vectors + B_QUERY * D + o_head)) * scale
            b_seen += tl.sum(tl.load(p_w + KEY * D * D).to(tl.float32) * b_q[:, None], 0)
        most, total = float("-inf"), 0.0
        b_mixed = tl.zeros((D,), tl.float32)
        for start in tl.range(0, rows, T, num_stages=1):
            b_h = norm_columns(
                load_tile(p_x, start, D, T), p_vectors + NORM1 * D, D, False
            )  # [D, T]
            b_s = tl.sum(b_h * b_seen[:, None], 0)  # [T]
            if TIED:
                b_s += tl.where(start + o_t == 0, key_bias, 0.0)
            b_s = tl.where(start + o_t < rows, b_s, float("-inf"))
            more = tl.maximum(most, tl.max(b_s, 0))
            shrink = tl.exp2((most - more) * LOG2E)
            b_s = tl.exp2((b_s - more) * LOG2E)
            total = total * shrink + tl.sum(b_s, 0)
            b_mixed = b_mixed * shrink + tl.sum(b_h * b_s[None, :], 1)
            most = more
        b_mixed /= total
        for part in tl.range(0, DH, PART, num_stages=1):
            o_head = head * DH + part + o_part
            p_w = p_matrices + VALUE * D * D + o_head[:, None] * D + o_d[None, :]  # [PART, D]
            b_v = tl.sum(tl.load(p_w).to(tl.float32) * b_mixed[None, :], 1)
            b_v += tl.load(p_vectors + B_VALUE * D + o_head)
            p_wo = p_matrices + OUTPUT * D * D + o_d[:, None] * D + o_head[None, :]  # [D, PART]
            b_out += tl.sum(tl.load(p_wo).to(tl.float32) * b_v[None, :], 1)
    return feed_forward_row(b_out, p_matrices, p_vectors, D, False, LAST_CHUNK)


@triton.jit
def stack_tiles(
    p_x,
    p_rest,
    p_mask,
    p_matrices,
    p_vectors,
    p_tapped,
    tap,
    length,
    first,
    tiles,
    num_blocks,
    key_bias,
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
    """All blocks over what lies in p_x: [D]; block `tap` writes its last row to p_tapped."""
    o_d = tl.arange(0, D)
    SCALE: tl.constexpr = (D // H) ** -0.5
    rows = length - first
    for index in range(num_blocks - 1):
        block_tiles(
            p_x, p_rest, p_mask, p_matrices, p_vectors, first, rows, tiles, key_bias,
            D, H, T, CHUNK, STAGES, TIED, PRECISION, INPUT,
        )  # fmt: skip
        p_matrices += MATRICES * D * D
        p_vectors += VECTORS * D
        if p_tapped is not None:
            if index == tap:
                tl.store(p_tapped + o_d, tl.load(p_x + (rows - 1) * D + o_d))
    scale = tl.load(p_mask + length - 1) * SCALE
    b_last = last_block_tiles(
        p_x, scale, p_matrices, p_vectors, rows, key_bias, D, H, T, LAST_CHUNK, TIED
    )
    if p_tapped is not None:
        if tap == num_blocks - 1:
            tl.store(p_tapped + o_d, b_last)
    tl.debug_barrier()  # before p_x is written again
    return b_last
