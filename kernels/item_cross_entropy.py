"""Softmax cross-entropy over all items, forward; the [B, V] scores live in registers.

    x[b, v]     = log2(e) (scale rep[b] . weight[v] + bias[v])
    top, total  = max_v x, sum_v 2^(x - top);  gap = top - x[b, target[b]]
    dot         = sum_v s[v] (x - top)

rep [B, D], weight [V, D], bias, s [V], all contiguous float32, bfloat16 or float16; target
int64 [B]; statistics [4, B] float32. Sums are float32. The gradients are
`item_cross_entropy_backward`.

A program has BLOCK_B rows and one of several ranges of the items, so that a small batch fills the
device too; the ranges' results are put together in a fixed order, so that they are the same to the
bit each time.
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
THREADS = 256
WARP = 64 if torch.version.hip else 32
# What FMREC_FAST_AUTOTUNE=1 tries: own, pass, stages, threads.
SEARCH = list(itertools.product((32, 64, 128), (32, 64, 128), (1, 2, 3), (128, 256)))
# Programs for each multiprocessor.
WAVES = 2


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
    rep, weight, bias, smoothing, target = contiguous(rep, weight, bias, smoothing, target)
    items = weight.shape[0]
    ranges = ranges_for(rep, triton.cdiv(batch, 128), triton.cdiv(items, 128))
    partial = statistics.new_empty(5, ranges, batch)
    launch(
        tuned(forward_kernel, **FORWARD[layout_key(rep)]),
        lambda meta: (triton.cdiv(batch, meta["BLOCK_OWN"]), ranges),
        (rep, weight, bias, smoothing, target, partial, batch, items, scale * LOG2_E),
        constants_for(rep),
    )
    launch(
        (combine_kernel, {"BLOCK_B": 128}),
        (triton.cdiv(batch, 128),),
        (partial, statistics, batch, ranges),
        {},
    )


def contiguous(*tensors: torch.Tensor | None) -> tuple:
    # numpy, in which the interpreter multiplies, has no bfloat16.
    exact = triton.knobs.runtime.interpret
    cast = {torch.bfloat16: torch.float32} if exact else {}
    return tuple(
        None if t is None else t.detach().to(cast.get(t.dtype, t.dtype)).contiguous()
        for t in tensors
    )


def ranges_for(rep: torch.Tensor, row_tiles: int, most: int) -> int:
    """Into how many ranges the items are cut, so that there are programs for the whole device."""
    multiprocessors = 2
    if rep.is_cuda:
        multiprocessors = torch.cuda.get_device_properties(rep.device).multi_processor_count
    return max(1, min(triton.cdiv(WAVES * multiprocessors, row_tiles), most, 1024))


def widest(element_size: int) -> int:
    """The largest D that the kernels take for elements of so many bytes."""
    return max(width for size, width in FORWARD if size == element_size)


def layout_key(rep: torch.Tensor) -> tuple[int, int]:
    size, width = rep.element_size(), rep.shape[1]
    if width > widest(size):
        raise ValueError(f"{rep.dtype} is taken with D up to {widest(size)}, got {width}")
    return size, min(limit for other, limit in FORWARD if other == size and limit >= width)


def constants_for(rep: torch.Tensor) -> dict:
    width = max(triton.next_power_of_2(rep.shape[1]), 16)
    return {"D": rep.shape[1], "WIDTH": width, "PRECISION": PRECISION[bool(torch.version.hip)]}


@functools.cache
def tuned(kernel, **pinned: int) -> tuple:
    """The kernel and its pinned constants; under FMREC_FAST_AUTOTUNE=1 a search over configs."""
    if os.environ.get("FMREC_FAST_AUTOTUNE", "0") != "1" or triton.knobs.runtime.interpret:
        return kernel, {**pinned, "num_warps": THREADS // WARP}
    configs = [
        triton.Config({"BLOCK_OWN": a, "BLOCK_PASS": b, "STAGES": s}, num_warps=t // WARP)
        for a, b, s, t in SEARCH
    ]
    return triton.autotune(configs, key=["batch", "items", "D"])(kernel), {}


def launch(tuned: tuple, grid, arguments: tuple, constants: dict) -> None:
    kernel, pinned = tuned
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants, **pinned)


def compile_case(kernel, table: dict, signature: dict, constants: dict, at: tuple) -> dict:
    """What `budget` compiles, without bias and smoothing; `at` is (bytes of an element, D, AMD or
    not), for float32 has a precision per vendor."""
    size, width, hip = at
    pointers = {"p_rep": "*{dtype}", "p_weight": "*{dtype}", "p_target": "*i64"}
    scalars = {"batch": "i32", "items": "i32", "factor": "fp32"}
    fixed = {"D": width, "WIDTH": width, "PRECISION": PRECISION[hip]}
    fixed |= {"p_bias": None, "p_smoothing": None}
    return {
        "name": f"{kernel.__name__}_{width}",
        "kernel": kernel,
        "signature": pointers | scalars | signature,
        "constants": fixed | constants | table[size, width],
        "threads": THREADS,
        "options": {},
        "dtypes": ("bfloat16",) if size == 2 else ("float32",),
        "backends": ("hip",) if hip else ("cuda",),
    }


COMPILE_CASES = [
    compile_case(forward_kernel, FORWARD, {"p_partial": "*fp32"}, {}, (*key, hip))
    for key in FORWARD
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
