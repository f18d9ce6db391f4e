"""Softmax cross-entropy over all items; the [B, V] scores live in registers, tile by tile.

    x[b, v]     = log2(e) (scale rep[b] . weight[v] + bias[v])
    top, total  = max_v x, sum_v 2^(x - top);  gap = top - x[b, target[b]]
    dot         = sum_v s[v] (x - top)
    g[b, v]     = coefficient[b] 2^(x - top[b]) + s[v] smooth[b] - [v = target[b]] at_target[b]
    d_rep[b]    = scale sum_v g weight[v]
    d_weight[v] = scale sum_b g rep[b],  d_bias[v] = sum_b g

rep, d_rep [B, D], weight, d_weight [V, D], bias, d_bias, s [V], all contiguous float32, bfloat16
or float16; target int64 [B]; statistics [4, B] and rows [5, B] float32. Sums are float32.

Forward and d_rep give a program BLOCK_B rows and one of several ranges of the items, so that a
small batch fills the device too; the ranges' results are put together in a fixed order. d_weight
gives a program BLOCK_V items and all rows. No atomics: the results are the same to the bit each
time, at 10 B V D FLOP instead of 8, for d_rep and d_weight each compute the scores anew.
"""

import functools
import itertools
import os

import torch
import triton
import triton.language as tl

# Below every score, but so that its difference to minus infinity is no NaN.
LOWEST = tl.constexpr(-3.0e38)
LOG2_E = 1.4426950408889634
# Of float32 products, on NVIDIA and on AMD: both to float32's round-off.
PRECISION = ("tf32x3", "ieee")

# The pinned configurations by bytes of an element and widest D: chosen so that nothing spills on
# any target of `budget`, not tuned by measurement. OWN is the side that a program keeps.
FORWARD = {
    (2, 128): {"BLOCK_OWN": 128, "BLOCK_PASS": 64, "STAGES": 2},
    (2, 256): {"BLOCK_OWN": 64, "BLOCK_PASS": 64, "STAGES": 2},
    (4, 128): {"BLOCK_OWN": 32, "BLOCK_PASS": 64, "STAGES": 2},
}
D_WEIGHT = {
    (2, 128): {"BLOCK_OWN": 128, "BLOCK_PASS": 32, "STAGES": 2},
    (2, 256): {"BLOCK_OWN": 64, "BLOCK_PASS": 32, "STAGES": 2},
    (4, 128): {"BLOCK_OWN": 32, "BLOCK_PASS": 64, "STAGES": 1},
}
D_REP = {**D_WEIGHT, (4, 128): {"BLOCK_OWN": 32, "BLOCK_PASS": 32, "STAGES": 2}}
THREADS = 256
WARP = 64 if torch.version.hip else 32
# What FMREC_FAST_AUTOTUNE=1 tries: own, pass, stages, threads.
SEARCH = itertools.product((32, 64, 128), (32, 64, 128), (1, 2, 3), (128, 256))
# Programs for each multiprocessor, and the most memory that d_rep's ranges may take.
WAVES = 2
PARTIAL_BYTES = 1 << 25


@triton.jit
def forward_kernel(
    p_rep,
    p_weight,
    p_bias,
    p_smoothing,
    p_target,
    p_partial,
    batch,
    items,
    factor,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_OWN: tl.constexpr,
    BLOCK_PASS: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_OWN rows, one range of items. Grid (row tiles, ranges)."""
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_OWN + tl.arange(0, BLOCK_OWN)  # [BB]
    o_d = tl.arange(0, WIDTH)  # [WD]
    o_v = tl.arange(0, BLOCK_PASS)  # [BV]
    m_b = o_b < batch
    m_rep = m_b[:, None] & (o_d < D)[None, :]
    b_rep = tl.load(p_rep + o_b[:, None] * D + o_d[None, :], mask=m_rep, other=0.0)  # [BB, WD]
    b_target = tl.load(p_target + o_b, mask=m_b, other=-1)  # [BB]
    b_top = tl.full((BLOCK_OWN,), LOWEST, tl.float32)
    b_total = tl.zeros((BLOCK_OWN,), tl.float32)
    b_at = tl.zeros((BLOCK_OWN,), tl.float32)
    b_dot = tl.zeros((BLOCK_OWN,), tl.float32)
    before = 0.0
    tiles = tl.cdiv(items, BLOCK_PASS)
    share = tl.cdiv(tiles, tl.num_programs(1))
    first = tl.program_id(1) * share
    for tile in tl.range(first, tl.minimum(first + share, tiles), num_stages=STAGES):
        start = tile * tl.full((), BLOCK_PASS, tl.int64)
        m_v = o_v < items - start
        p_tile = p_weight + start * D + (o_v[None, :] * D + o_d[:, None])
        b_weight = tl.load(p_tile, mask=m_v[None, :] & (o_d < D)[:, None], other=0.0)  # [WD, BV]
        b_x = tl.dot(b_rep, b_weight, input_precision=PRECISION) * factor  # [BB, BV]
        if p_bias is not None:
            b_bias = tl.load(p_bias + start + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BV]
            b_x += (b_bias * 1.4426950408889634)[None, :]
        if start + BLOCK_PASS > items:
            b_x = tl.where(m_v[None, :], b_x, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_x, 1))
        b_fall = b_top - b_new
        b_total = b_total * tl.exp2(b_fall) + tl.sum(tl.exp2(b_x - b_new[:, None]), 1)
        if p_smoothing is not None:
            b_s = tl.load(p_smoothing + start + o_v, mask=m_v, other=0.0).to(tl.float32)  # [BV]
            b_term = tl.where(m_v[None, :], b_s[None, :] * (b_x - b_new[:, None]), 0.0)
            b_dot += before * b_fall + tl.sum(b_term, 1)
            before += tl.sum(b_s, 0)
        b_at_v = b_target - start  # [BB]
        m_hit = (b_at_v >= 0) & (b_at_v < BLOCK_PASS)
        if tl.max(m_hit.to(tl.int32), 0) > 0:  # few tiles have a target: the rest skip it
            b_at += tl.sum(tl.where(o_v[None, :] == b_at_v[:, None], b_x, 0.0), 1)
        b_top = b_new
    # [5, ranges, B]
    p_partial += tl.program_id(1).to(tl.int64) * batch + o_b
    plane = tl.num_programs(1).to(tl.int64) * batch
    tl.store(p_partial, b_top, mask=m_b)
    tl.store(p_partial + plane, b_total, mask=m_b)
    tl.store(p_partial + 2 * plane, b_at, mask=m_b)
    tl.store(p_partial + 3 * plane, b_dot, mask=m_b)
    tl.store(p_partial + 4 * plane, tl.zeros_like(b_dot) + before, mask=m_b)


@triton.jit
def combine_kernel(p_partial, p_statistics, batch, ranges, BLOCK_B: tl.constexpr):
    """One program: BLOCK_B rows of the statistics from those of all ranges, in order."""
    o_b = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)  # [BB]
    m_b = o_b < batch
    one = tl.full((), 1, tl.int64)
    plane = one * ranges * batch
    b_top = tl.full((BLOCK_B,), LOWEST, tl.float32)
    b_total = tl.zeros((BLOCK_B,), tl.float32)
    b_at = tl.zeros((BLOCK_B,), tl.float32)
    b_dot = tl.zeros((BLOCK_B,), tl.float32)
    b_before = tl.zeros((BLOCK_B,), tl.float32)
    for r in range(0, ranges):
        p = p_partial + one * r * batch + o_b
        b_other = tl.load(p, mask=m_b, other=0.0)  # [BB], as are the next four
        b_new = tl.maximum(b_top, b_other)
        b_total *= tl.exp2(b_top - b_new)
        b_total += tl.load(p + plane, mask=m_b, other=0.0) * tl.exp2(b_other - b_new)
        b_at += tl.load(p + 2 * plane, mask=m_b, other=0.0)
        b_count = tl.load(p + 4 * plane, mask=m_b, other=0.0)
        b_dot += b_before * (b_top - b_new) + tl.load(p + 3 * plane, mask=m_b, other=0.0)
        b_dot += b_count * (b_other - b_new)
        b_before += b_count
        b_top = b_new
    tl.store(p_statistics + o_b, b_top, mask=m_b)
    tl.store(p_statistics + batch + o_b, b_total, mask=m_b)
    tl.store(p_statistics + 2 * batch + o_b, b_top - b_at, mask=m_b)
    tl.store(p_statistics + 3 * batch + o_b, b_dot, mask=m_b)


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
        return b_g, b_other.to(tl.float32)
    return b_g.to(b_other.dtype), b_other


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


def item_cross_entropy_forward(
    rep: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    smoothing: torch.Tensor | None,
    target: torch.Tensor,
    scale: float,
    statistics: torch.Tensor,
) -> None:
    """Fill statistics [4, B]: top, total, gap, dot; shapes and dtypes as above."""
    batch = rep.shape[0]
    if batch == 0:
        return
    rep, weight, bias, smoothing, target = _contiguous(rep, weight, bias, smoothing, target)
    items = weight.shape[0]
    ranges = _ranges(rep, triton.cdiv(batch, 128), triton.cdiv(items, 128))
    partial = statistics.new_empty(5, ranges, batch)
    _launch(
        _tuned(forward_kernel, _key(rep)),
        lambda meta: (triton.cdiv(batch, meta["BLOCK_OWN"]), ranges),
        (rep, weight, bias, smoothing, target, partial, batch, items, scale * LOG2_E),
        _constants(rep),
    )
    _launch(
        (combine_kernel, {"BLOCK_B": 128}),
        (triton.cdiv(batch, 128),),
        (partial, statistics, batch, ranges),
        {},
    )


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
    rep, weight, bias, smoothing, target = _contiguous(rep, weight, bias, smoothing, target)
    items = weight.shape[0]
    inputs = (rep, weight, bias, smoothing, target, rows)
    numbers = (batch, items, scale * LOG2_E, scale, filter_eps)
    constants = _constants(rep) | {"FULL": rep.dtype != torch.bfloat16, "FILTER": filter_eps > 0}
    if d_weight is not None or d_bias is not None:
        _launch(
            _tuned(d_weight_kernel, _key(rep)),
            lambda meta: (triton.cdiv(items, meta["BLOCK_OWN"]),),
            (*inputs, d_weight, d_bias, *numbers),
            constants,
        )
    if d_rep is not None and batch > 0:
        most = max(PARTIAL_BYTES // (4 * batch * width), 1)
        tiles = min(triton.cdiv(items, 64), most)
        ranges = _ranges(rep, triton.cdiv(batch, 128), tiles)
        partial = rows.new_empty(ranges, batch, width)
        _launch(
            _tuned(d_rep_kernel, _key(rep)),
            lambda meta: (triton.cdiv(batch, meta["BLOCK_OWN"]), ranges),
            (*inputs, partial, *numbers),
            constants,
        )
        d_rep.copy_(partial.sum(0))


def _contiguous(*tensors: torch.Tensor | None) -> tuple:
    # numpy, in which the interpreter multiplies, has no bfloat16.
    exact = triton.knobs.runtime.interpret
    cast = {torch.bfloat16: torch.float32} if exact else {}
    return tuple(
        None if t is None else t.detach().to(cast.get(t.dtype, t.dtype)).contiguous()
        for t in tensors
    )


def _ranges(rep: torch.Tensor, row_tiles: int, most: int) -> int:
    """Into how many ranges the items are cut, so that there are programs for the whole device."""
    multiprocessors = 2
    if rep.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(rep.device).multi_processor_count
    return max(1, min(triton.cdiv(WAVES * multiprocessors, row_tiles), most, 1024))


def widest(element_size: int) -> int:
    """The largest D that the kernels take for elements of so many bytes."""
    return max(width for size, width in FORWARD if size == element_size)


def _key(rep: torch.Tensor) -> tuple[int, int]:
    size, width = rep.element_size(), rep.shape[1]
    if width > widest(size):
        raise ValueError(f"{rep.dtype} is taken with D up to {widest(size)}, got {width}")
    return size, min(limit for other, limit in FORWARD if other == size and limit >= width)


def _constants(rep: torch.Tensor) -> dict:
    width = max(triton.next_power_of_2(rep.shape[1]), 16)
    return {"D": rep.shape[1], "WIDTH": width, "PRECISION": PRECISION[bool(torch.version.hip)]}


@functools.cache
def _tuned(kernel, key: tuple[int, int]) -> tuple:
    """The kernel and its pinned constants; under FMREC_FAST_AUTOTUNE=1 a search over configs."""
    if os.environ.get("FMREC_FAST_AUTOTUNE", "0") != "1" or triton.knobs.runtime.interpret:
        return kernel, {**_pinned(kernel)[key], "num_warps": THREADS // WARP}
    configs = [
        triton.Config({"BLOCK_OWN": a, "BLOCK_PASS": b, "STAGES": s}, num_warps=t // WARP)
        for a, b, s, t in SEARCH
    ]
    return triton.autotune(configs, key=["batch", "items", "D"])(kernel), {}


def _pinned(kernel) -> dict:
    return {forward_kernel: FORWARD, d_weight_kernel: D_WEIGHT, d_rep_kernel: D_REP}[kernel]


def _launch(tuned: tuple, grid, arguments: tuple, constants: dict) -> None:
    kernel, pinned = tuned
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **pinned)


def _compile_case(kernel, size: int, width: int, hip: bool) -> dict:
    """What `budget` compiles, without bias and smoothing; float32 has a precision per vendor."""
    signature = {"p_rep": "*{dtype}", "p_weight": "*{dtype}", "p_target": "*i64"}
    signature |= {"batch": "i32", "items": "i32", "factor": "fp32"}
    constants = {"D": width, "WIDTH": width, "PRECISION": PRECISION[hip]}
    constants |= {"p_bias": None, "p_smoothing": None}
    if kernel is d_weight_kernel:
        signature["p_d_weight"] = "*{dtype}"
        constants["p_d_bias"] = None
    else:
        signature["p_partial"] = "*fp32"
    constants |= _pinned(kernel)[size, width]
    if kernel is not forward_kernel:
        signature |= {"p_rows": "*fp32", "scale": "fp32", "filter_eps": "fp32"}
        constants |= {"FULL": size == 4, "FILTER": False}
    return {
        "name": f"{kernel.__name__}_{width}",
        "kernel": kernel,
        "signature": signature,
        "constants": constants,
        "threads": THREADS,
        "options": {},
        "dtypes": ("bfloat16",) if size == 2 else ("float32",),
        "backends": ("hip",) if hip else ("cuda",),
    }


COMPILE_CASES = [
    _compile_case(kernel, size, width, hip)
    for kernel in (forward_kernel, d_weight_kernel, d_rep_kernel)
    for size, width in FORWARD
    for hip in (False, True)
]
COMPILE_CASES.append(
    {
        "kernel": combine_kernel,
        "signature": dict.fromkeys(("p_partial", "p_statistics"), "*fp32")
        | dict.fromkeys(("batch", "ranges"), "i32"),
        "constants": {"BLOCK_B": 128},
        "threads": 128,
        "options": {},
        "dtypes": ("float32",),
    }
)
