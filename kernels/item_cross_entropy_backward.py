"""Gradients of the softmax cross-entropy over all items; the scores are computed anew.

    g[b, v]     = coefficient[b] 2^(x - top[b]) + s[v] smooth[b] - [v = target[b]] at_target[b]
    d_rep[b]    = scale sum_v g weight[v]
    d_weight[v] = scale sum_b g rep[b],  d_bias[v] = sum_b g

x, and what is not said here, as in `item_cross_entropy`; rows [5, B] float32 are top,
coefficient, smooth, at_target, and what is compared with filter_eps.

d_rep gives a program BLOCK_B rows and one of several ranges of the items, whose results are added
in a fixed order; d_weight gives a program BLOCK_V items and all rows. No atomics: the results are
the same to the bit each time, at 10 B V D FLOP with the forward pass instead of 8, for d_rep and
d_weight each compute the scores anew.
"""

import torch
import triton
import triton.language as tl

from fmrec_fast.kernels.item_cross_entropy import (
    LOG2_E,
    compile_case,
    constants_for,
    contiguous,
    launch,
    layout_key,
    ranges_for,
    tuned,
)

# The pinned configurations, as `item_cross_entropy.FORWARD`.
D_WEIGHT = {
    (2, 128): {"BLOCK_OWN": 128, "BLOCK_PASS": 32, "STAGES": 2},
    (2, 256): {"BLOCK_OWN": 64, "BLOCK_PASS": 32, "STAGES": 2},
    (4, 128): {"BLOCK_OWN": 32, "BLOCK_PASS": 64, "STAGES": 1},
}
D_REP = {**D_WEIGHT, (4, 128): {"BLOCK_OWN": 32, "BLOCK_PASS": 32, "STAGES": 2}}
# float16's products are of float32 (FULL): what spills nowhere with that, at any D.
FLOAT16 = {"BLOCK_OWN": 32, "BLOCK_PASS": 32, "STAGES": 1}
# The most memory that d_rep's ranges may take.
PARTIAL_BYTES = 1 << 25


@triton.jit
def load_rows(p_rows, o_b, m_b, batch):
    """The five float32 vectors [BB] of the rows, without effect where there is no row."""
    p_rows += o_b
    b_top = tl.load(p_rows, mask=m_b, other=float("inf"))  # 2^(x - top) is 0 then
    b_coefficient = tl.load(p_rows + batch, mask=m_b, other=0.0)
    b_smooth = tl.load(p_rows + 2 * batch, mask=m_b, other=0.0)
    b_at = tl.load(p_rows + 3 * batch, mask=m_b, other=0.0)
    b_share = tl.load(p_rows + 4 * batch, mask=m_b, other=0.0)
    return b_top, b_coefficient, b_smooth, b_at, b_share


@triton.jit
def operands(b_g, b_other, FULL: tl.constexpr):
    """What d_rep and d_weight multiply: in the inputs' dtype, or in float32 if FULL (float16's
    range is too short for g)."""
    if FULL:
        b_other = b_other.to(tl.float32)
    else:
        b_g = b_g.to(b_other.dtype)
    return b_g, b_other


@triton.jit
def d_weight_kernel(
    p_rep,
    p_weight,
    p_bias,
    p_smoothing,
    p_target,
    p_rows,
    p_d_weight,
    p_d_bias,
    batch,
    items,
    factor,
    scale,
    filter_eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    FILTER: tl.constexpr,
):
    """One program: BLOCK_OWN items, all rows. Grid (item tiles,)."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_OWN
    o_v = tl.arange(0, BLOCK_OWN)  # [BV]
    o_d = tl.arange(0, WIDTH)  # [WD]
    m_v = o_v < items - start
    m_weight = m_v[:, None] & (o_d < D)[None, :]
    o_weight = start * D + (o_v[:, None] * D + o_d[None, :])
    b_weight = tl.load(p_weight + o_weight, mask=m_weight, other=0.0)  # [BV, WD]
    b_sum = tl.zeros((BLOCK_OWN, WIDTH), tl.float32)
    b_d_bias = tl.zeros((BLOCK_OWN,), tl.float32)
    if p_bias is not None:
        b_bias = tl.load(p_bias + start + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BV]
        b_bias *= 1.4426950408889634
    if p_smoothing is not None:
        b_s = tl.load(p_smoothing + start + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BV]
    for first in tl.range(0, batch, BLOCK_PASS, num_stages=STAGES):
        o_b = first + tl.arange(0, BLOCK_PASS)  # [BB]
        m_b = o_b < batch
        p_tile = p_rep + o_b.to(tl.int64)[None, :] * D + o_d[:, None]
        b_rep = tl.load(p_tile, mask=m_b[None, :] & (o_d < D)[:, None], other=0.0)  # [WD, BB]
        b_top, b_coefficient, b_smooth, b_at, b_share = load_rows(p_rows, o_b, m_b, batch)
        b_x = tl.dot(b_weight, b_rep, input_precision=PRECISION) * factor  # [BV, BB]
        if p_bias is not None:
            b_x += b_bias[:, None]
        b_e = tl.exp2(b_x - b_top[None, :])
        b_g = b_e * b_coefficient[None, :]
        if p_smoothing is not None:
            b_g += b_s[:, None] * b_smooth[None, :]
        b_at_v = tl.load(p_target + o_b, mask=m_b, other=-1) - start  # [BB]
        m_hit = (b_at_v >= 0) & (b_at_v < BLOCK_OWN)
        needed = tl.max(m_hit.to(tl.int32), 0) > 0
        if needed:
            b_g -= tl.where(o_v[:, None] == b_at_v[None, :], b_at[None, :], 0.0)
        if FILTER:
            needed = needed | (tl.max(b_e * b_share[None, :]) >= filter_eps)
        if not FILTER or needed:
            b_left, b_right = operands(b_g, tl.trans(b_rep), FULL)
            b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)
            b_d_bias += tl.sum(b_g, 1)
    if p_d_weight is not None:
        tl.store(p_d_weight + o_weight, b_sum * scale, mask=m_weight)
    if p_d_bias is not None:
        tl.store(p_d_bias + start + o_v, b_d_bias, mask=m_v)


@triton.jit
def d_rep_kernel(
    p_rep,
    p_weight,
    p_bias,
    p_smoothing,
    p_target,
    p_rows,
    p_partial,
    batch,
    items,
    factor,
    scale,
    filter_eps,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    FULL: tl.constexpr,
    FILTER: tl.constexpr,
):
    """One program: BLOCK_OWN rows, one range of items. Grid (row tiles, ranges)."""
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)  # [BB]
    o_d = tl.arange(0, WIDTH)  # [WD]
    o_v = tl.arange(0, BLOCK_PASS)  # [BV]
    m_b = o_b < batch
    m_rep = m_b[:, None] & (o_d < D)[None, :]
    o_rep = o_b[:, None] * D + o_d[None, :]
    b_rep = tl.load(p_rep + o_rep, mask=m_rep, other=0.0)  # [BB, WD]
    b_target = tl.load(p_target + o_b, mask=m_b, other=-1)  # [BB]
    b_top, b_coefficient, b_smooth, b_at, b_share = load_rows(p_rows, o_b, m_b, batch)
    b_sum = tl.zeros((BLOCK_OWN, WIDTH), tl.float32)
    tiles = tl.cdiv(items, BLOCK_PASS)
    share = tl.cdiv(tiles, tl.num_programs(1))
    begin = tl.program_id(1) * share
    for tile in tl.range(begin, tl.minimum(begin + share, tiles), num_stages=STAGES):
        start = tile * tl.full((), BLOCK_PASS, tl.int64)
        m_v = o_v < items - start
        p_tile = p_weight + start * D + (o_v[None, :] * D + o_d[:, None])
        # Items past the last are rows of zeros: whatever their g, they add nothing.
        b_weight = tl.load(p_tile, mask=m_v[None, :] & (o_d < D)[:, None], other=0.0)  # [WD, BV]
        b_x = tl.dot(b_rep, b_weight, input_precision=PRECISION) * factor  # [BB, BV]
        if p_bias is not None:
            b_bias = tl.load(p_bias + start + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BV]
            b_x += (b_bias * 1.4426950408889634)[None, :]
        if start + BLOCK_PASS > items:
            b_x = tl.where(m_v[None, :], b_x, float("-inf"))
        b_e = tl.exp2(b_x - b_top[:, None])
        b_g = b_e * b_coefficient[:, None]
        if p_smoothing is not None:
            b_s = tl.load(p_smoothing + start + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BV]
            b_g += b_s[None, :] * b_smooth[:, None]
        b_at_v = b_target - start  # [BB]
        m_hit = (b_at_v >= 0) & (b_at_v < BLOCK_PASS)
        needed = tl.max(m_hit.to(tl.int32), 0) > 0
        if needed:
            b_g -= tl.where(o_v[None, :] == b_at_v[:, None], b_at[:, None], 0.0)
        if FILTER:
            needed = needed | (tl.max(b_e * b_share[:, None]) >= filter_eps)
        if not FILTER or needed:
            b_left, b_right = operands(b_g, tl.trans(b_weight), FULL)
            b_sum = tl.dot(b_left, b_right, b_sum, input_precision=PRECISION)
    # [ranges, B, D]
    p_partial += tl.program_id(1).to(tl.int64) * batch * D
    tl.store(p_partial + o_rep, b_sum * scale, mask=m_rep)


def item_cross_entropy_backward(
    rep: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    smoothing: torch.Tensor | None,
    target: torch.Tensor,
    scale: float,
    rows: torch.Tensor,
    filter_eps: float,
    d_rep: torch.Tensor | None,
    d_weight: torch.Tensor | None,
    d_bias: torch.Tensor | None,
) -> None:
    """Fill those of d_rep, d_weight and d_bias that are given; shapes and dtypes as above."""
    batch, width = rep.shape
    rep, weight, bias, smoothing, target = contiguous(rep, weight, bias, smoothing, target)
    items = weight.shape[0]
    inputs = (rep, weight, bias, smoothing, target, rows)
    numbers = (batch, items, scale * LOG2_E, scale, filter_eps)
    constants = constants_for(rep) | {"FULL": rep.dtype != torch.bfloat16, "FILTER": filter_eps > 0}
    if d_weight is not None or d_bias is not None:
        launch(
            tuned(d_weight_kernel, **pinned_for(rep, D_WEIGHT)),
            lambda meta: (triton.cdiv(items, meta["BLOCK_OWN"]),),
            (*inputs, d_weight, d_bias, *numbers),
            constants,
        )
    if d_rep is not None and batch > 0:
        most = max(PARTIAL_BYTES // (4 * batch * width), 1)
        tiles = min(triton.cdiv(items, 64), most)
        ranges = ranges_for(rep, triton.cdiv(batch, 128), tiles)
        partial = rows.new_empty(ranges, batch, width)
        launch(
            tuned(d_rep_kernel, **pinned_for(rep, D_REP)),
            lambda meta: (triton.cdiv(batch, meta["BLOCK_OWN"]), ranges),
            (*inputs, partial, *numbers),
            constants,
        )
        d_rep.copy_(partial.sum(0))


def pinned_for(rep: torch.Tensor, table: dict) -> dict[str, int]:
    key = layout_key(rep)
    return FLOAT16 if rep.dtype == torch.float16 else table[key]


_SIGNATURE = {"p_rows": "*fp32", "scale": "fp32", "filter_eps": "fp32"}
_KERNELS = (
    (d_weight_kernel, D_WEIGHT, {"p_d_weight": "*{dtype}"}, {"p_d_bias": None}),
    (d_rep_kernel, D_REP, {"p_partial": "*fp32"}, {}),
)
COMPILE_CASES = [
    compile_case(
        kernel,
        table,
        _SIGNATURE | signature,
        constants | {"FULL": size == 4, "FILTER": False},
        (size, width, hip),
    )
    for kernel, table, signature, constants in _KERNELS
    for size, width in table
    for hip in (False, True)
]
COMPILE_CASES += [
    case | {"dtypes": ("float16",), "constants": case["constants"] | FLOAT16 | {"FULL": True}}
    for case in COMPILE_CASES
    if case["dtypes"] == ("bfloat16",)
]
