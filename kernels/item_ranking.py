"""Top-k items, the items streaming by; no [B, V] scores in memory.

    score[b, v] = scale[v] * sum over d of rep[b, d] * weight[v, d] + bias[v]

rep [B, D] float32, weight [V, D] of any type, scale and bias [V] float32 or missing; all
contiguous. Products and sums are float32 in IEEE arithmetic, in the same order for every item, so
that equal items tie. The definition's order and keys (`reference.item_ranking`) decide.

One program goes through a slice of the items for ROWS rows, in tiles of ITEMS. It appends what
beats the k-th best so far to a list of its own per row, in ascending order of ids, and cuts the
list back to k when it could overflow: a tile of random scores adds a handful. The slices' lists
are merged by `torch.topk` of distinct 64-bit keys. Exclusions come sorted; a cursor per row says
which is the next. There is no atomic, no wait for the device, and every result is the same each
time. The target's rank, from the same scores, is `target_rank`'s.
"""

import os
from functools import cache

import torch
import triton
import triton.language as tl

from fmrec_fast.reference.item_ranking import (
    NO_ITEM,
    NO_KEY,
    candidate_keys,
    from_keys,
    without_repeats,
)

# The pinned configuration, from registers and shared memory; not tuned by measurement.
CONSTANTS = {"ROWS": 32, "ITEMS": 64, "DEPTH": 16}
THREADS = 256
LISTED = {"ITEMS": 32, "DEPTH": 32}
# What FMREC_FAST_AUTOTUNE=1 tries: (constants, threads).
SEARCH = [
    ({"ROWS": r, "ITEMS": n, "DEPTH": d}, t)
    for r, n, t in ((32, 64, 128), (64, 64, 128), (64, 64, 256), (64, 128, 256))
    for d in (16, 32, 64)
]
# A product and its sum round once, as in the matrix product, whatever Triton's default.
OPTIONS = {"enable_fp_fusion": True}
WARP = 64 if torch.version.hip else 32
# Slices are multiples of the widest tile, and lists have room for some of them beyond k.
WIDEST = 128
# Memory for the lists of all programs, and programs of a multiprocessor; the interpreter counts
# as one.
LIST_BYTES, PROGRAMS = 24 << 20, 4

# Places of a list that are looked at together; wider ones spill. The interpreter has no registers.
_WIDE: tl.constexpr = tl.constexpr(128 if triton.knobs.runtime.interpret else 16)
_NO_ITEM: tl.constexpr = tl.constexpr(NO_ITEM)
_NO_KEY: tl.constexpr = tl.constexpr(NO_KEY)
_AFTER_ALL: tl.constexpr = tl.constexpr(2**31 - 1)
_BEST = ["rows", "items", "stretch", "k", "capacity", "width", "slices"]


@triton.jit
def scores_of(
    p_rep, p_weight, p_scale, p_bias, o_row, m_row, o_item, m_item,
    D: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr,
    ITEMS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """[ROWS, ITEMS]; the one place where scores are made."""
    b_score = tl.zeros((ROWS, ITEMS), tl.float32)
    for first in range(0, D, DEPTH):
        o_depth = first + tl.arange(0, DEPTH)
        m_depth = o_depth < D
        b_rep = tl.load(
            p_rep + o_row.to(tl.int64)[:, None] * D + o_depth[None, :],
            mask=m_row[:, None] & m_depth[None, :],
            other=0.0,
        )  # [ROWS, DEPTH]
        b_weight = tl.load(
            p_weight + o_item.to(tl.int64)[:, None] * D + o_depth[None, :],
            mask=m_item[:, None] & m_depth[None, :],
            other=0,
        ).to(tl.float32)  # [ITEMS, DEPTH]
        b_score = tl.dot(b_rep, tl.trans(b_weight), b_score, input_precision="ieee")
    if HAS_SCALE:
        b_score = b_score * tl.load(p_scale + o_item, mask=m_item, other=0.0)[None, :]
    if HAS_BIAS:
        b_score = b_score + tl.load(p_bias + o_item, mask=m_item, other=0.0)[None, :]
    return b_score


@triton.jit
def as_order(b_score):
    """int32 that compare as the scores do; one zero, NaN above everything."""
    b_score = tl.where(b_score == 0.0, 0.0, b_score)
    b_bits = b_score.to(tl.int32, bitcast=True)
    b_bits = tl.where(b_score != b_score, 0x7FC00000, b_bits)
    return b_bits ^ ((b_bits >> 31) & 0x7FFFFFFF)


@triton.jit
def strike(b_order, o_item, end, p_excluded, o_row, m_row, b_cursor, b_next, width):
    """NO_ITEM at the rows' exclusions below `end`; the cursors move past them."""
    while tl.min(b_next, axis=0) < end:
        b_order = tl.where(o_item[None, :] == b_next[:, None], _NO_ITEM, b_order)
        b_passed = b_next < end
        b_cursor += b_passed.to(tl.int32)
        b_next = next_excluded(p_excluded, o_row, m_row, b_cursor, width)
    return b_order, b_cursor, b_next


@triton.jit
def next_excluded(p_excluded, o_row, m_row, b_cursor, width):
    m_next = m_row & (b_cursor < width)
    o_next = o_row.to(tl.int64) * width + b_cursor
    return tl.load(p_excluded + o_next, mask=m_next, other=_AFTER_ALL).to(tl.int32)


@triton.jit
def cut_back(p_order, p_ids, o_list, b_count, k, ROWS: tl.constexpr):
    """Keep each list's k best, in their order; ties at the end go to those that came first.

    Returns the new counts and the k-th best orders (NO_ITEM where there are fewer).
    """
    tl.debug_barrier()
    longest = tl.max(b_count, axis=0)
    # The k-th largest, bit by bit from the highest, as an unsigned number.
    b_kth = tl.zeros((ROWS,), tl.int64)
    for bit in range(0, 32):
        b_try = b_kth + (tl.full((ROWS,), 1, tl.int64) << (31 - bit))
        b_reach = tl.zeros((ROWS,), tl.int32)
        for first in range(0, longest, _WIDE):
            o_at = first + tl.arange(0, _WIDE)
            m_at = o_at[None, :] < b_count[:, None]
            b_order = tl.load(p_order + o_list[:, None] + o_at[None, :], mask=m_at, other=0)
            m_reach = m_at & (b_order.to(tl.int64) + 2147483648 >= b_try[:, None])
            b_reach += tl.sum(m_reach.to(tl.int32), axis=1)
        b_kth = tl.where(b_reach >= k, b_try, b_kth)
    b_worst = (b_kth - 2147483648).to(tl.int32)
    b_above = tl.zeros((ROWS,), tl.int32)
    for first in range(0, longest, _WIDE):
        o_at = first + tl.arange(0, _WIDE)
        m_at = o_at[None, :] < b_count[:, None]
        b_order = tl.load(p_order + o_list[:, None] + o_at[None, :], mask=m_at, other=0)
        b_above += tl.sum((m_at & (b_order > b_worst[:, None])).to(tl.int32), axis=1)
    b_ties = k - b_above  # that may stay
    b_kept = tl.zeros((ROWS,), tl.int32)
    for first in range(0, longest, _WIDE):
        o_at = first + tl.arange(0, _WIDE)
        m_at = o_at[None, :] < b_count[:, None]
        o_from = o_list[:, None] + o_at[None, :]
        b_order = tl.load(p_order + o_from, mask=m_at, other=0)
        b_id = tl.load(p_ids + o_from, mask=m_at, other=0)
        b_tie = (m_at & (b_order == b_worst[:, None])).to(tl.int32)
        m_stays = (b_tie > 0) & (tl.cumsum(b_tie, axis=1) <= b_ties[:, None])
        m_stays = m_stays | (m_at & (b_order > b_worst[:, None]))
        b_ties -= tl.sum(b_tie, axis=1)
        b_stays = m_stays.to(tl.int32)
        o_to = o_list[:, None] + b_kept[:, None] + tl.cumsum(b_stays, axis=1) - 1
        tl.debug_barrier()  # places that others still read
        tl.store(p_order + o_to, b_order, mask=m_stays)
        tl.store(p_ids + o_to, b_id, mask=m_stays)
        b_kept += tl.sum(b_stays, axis=1)
    tl.debug_barrier()
    return b_kept, b_worst


@triton.jit(do_not_specialize=_BEST)
def best_kernel(
    p_rep, p_weight, p_scale, p_bias, p_items, p_excluded, p_cursor, p_order, p_ids, p_keys,
    rows, items, stretch, k, capacity, width, slices,
    D: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ITEMS: tl.constexpr,
    HAS_EXCLUDED: tl.constexpr, ROWS: tl.constexpr, ITEMS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Keys [rows, slices, k] of one slice's best. Grid (slices, row tiles)."""
    piece = tl.program_id(0)
    o_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    o_list = (o_row.to(tl.int64) * slices + piece) * capacity  # [ROWS]
    b_count = tl.zeros((ROWS,), tl.int32)
    b_worst = tl.full((ROWS,), _NO_ITEM, tl.int32)
    if HAS_EXCLUDED:
        b_cursor = tl.load(p_cursor + o_row * slices + piece, mask=m_row, other=0)
        b_next = next_excluded(p_excluded, o_row, m_row, b_cursor, width)
    for begin in range(piece * stretch, tl.minimum((piece + 1) * stretch, items), ITEMS):
        o_place = begin + tl.arange(0, ITEMS)
        m_item = o_place < items
        o_item = o_place
        end = begin + ITEMS
        if HAS_ITEMS:
            o_item = tl.load(p_items + o_place, mask=m_item, other=-1)
            m_item = o_item >= 0
            end = tl.max(o_item, axis=0) + 1
        b_order = as_order(
            scores_of(
                p_rep, p_weight, p_scale, p_bias, o_row, m_row, o_item, m_item,
                D, HAS_SCALE, HAS_BIAS, ROWS, ITEMS, DEPTH,
            )
        )  # fmt: skip
        if HAS_EXCLUDED:
            b_order, b_cursor, b_next = strike(
                b_order, o_item, end, p_excluded, o_row, m_row, b_cursor, b_next, width
            )
        m_better = (b_order > b_worst[:, None]) & m_row[:, None] & m_item[None, :]
        b_better = m_better.to(tl.int32)
        b_more = tl.sum(b_better, axis=1)
        if tl.max(b_more, axis=0) > 0:
            o_to = o_list[:, None] + b_count[:, None] + tl.cumsum(b_better, axis=1) - 1
            tl.store(p_order + o_to, b_order, mask=m_better)
            b_ids = tl.broadcast_to(o_item.to(tl.int32)[None, :], (ROWS, ITEMS))
            tl.store(p_ids + o_to, b_ids, mask=m_better)
            b_count += b_more
            if tl.max(b_count, axis=0) > capacity - ITEMS:
                b_count, b_worst = cut_back(p_order, p_ids, o_list, b_count, k, ROWS)
    if tl.max(b_count, axis=0) > k:
        b_count, b_worst = cut_back(p_order, p_ids, o_list, b_count, k, ROWS)
    tl.debug_barrier()
    o_keys = (o_row.to(tl.int64) * slices + piece) * k
    for first in range(0, k, ITEMS):
        o_at = first + tl.arange(0, ITEMS)
        m_at = o_at[None, :] < b_count[:, None]
        o_from = o_list[:, None] + o_at[None, :]
        b_order = tl.load(p_order + o_from, mask=m_at, other=0).to(tl.int64)
        b_id = tl.load(p_ids + o_from, mask=m_at, other=0).to(tl.int64)
        b_key = tl.where(m_at, (b_order << 32) | (4294967295 - b_id), _NO_KEY)
        m_key = m_row[:, None] & (o_at < k)[None, :]
        tl.store(p_keys + o_keys[:, None] + o_at[None, :], b_key, mask=m_key)


@triton.jit(do_not_specialize=["count"])
def listed_kernel(
    p_rep, p_weight, p_items, p_scores, count,
    D: tl.constexpr, ITEMS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """scores [B, C] of each row's own items [B, C]; 0 where the item is -1. Grid (B, tiles)."""
    row = tl.program_id(0).to(tl.int64)
    o_place = tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    m_place = o_place < count
    o_item = tl.load(p_items + row * count + o_place, mask=m_place, other=-1)
    m_item = o_item >= 0
    b_sum = tl.zeros((ITEMS, DEPTH), tl.float32)
    for first in range(0, D, DEPTH):
        o_depth = first + tl.arange(0, DEPTH)
        m_depth = o_depth < D
        b_rep = tl.load(p_rep + row * D + o_depth, mask=m_depth, other=0.0)
        o_weight = o_item[:, None] * D + o_depth[None, :]
        m_weight = m_item[:, None] & m_depth[None, :]
        b_weight = tl.load(p_weight + o_weight, mask=m_weight, other=0)  # [ITEMS, DEPTH]
        b_sum += b_weight.to(tl.float32) * b_rep[None, :]
    tl.store(p_scores + row * count + o_place, tl.sum(b_sum, axis=1), mask=m_place)


def item_topk(
    rep: torch.Tensor,
    weight: torch.Tensor,
    k: int,
    *,
    scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    exclude: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [B, k], ids [B, k]), as the definition."""
    rows, depth = rep.shape
    rep, weight = rep.contiguous(), weight.contiguous()
    items = None if candidates is None else without_repeats(candidates)
    if rows == 0:
        return rep.new_empty(0, k), rep.new_empty(0, k, dtype=torch.int64)
    if items is not None and items.ndim == 2:
        scores = rep.new_empty(items.shape)
        grid = (rows, triton.cdiv(items.shape[1], LISTED["ITEMS"]))
        with torch.cuda.device_of(rep):
            listed_kernel[grid](
                rep, weight, items, scores, items.shape[1], D=depth, **LISTED, **OPTIONS
            )
        return from_keys(candidate_keys(scores, items, scale, bias, exclude).topk(k).values)
    places = weight.shape[0] if items is None else items.shape[0]
    capacity = triton.cdiv(k, WIDEST) * WIDEST + 2 * WIDEST
    slices, stretch = slices_of(rep, places, rows * 8 * (capacity + k))
    lists = rep.new_empty(2, rows, slices, capacity, dtype=torch.int32)
    keys = rep.new_empty(rows, slices, k, dtype=torch.int64)
    excluded, cursor, width = exclusions_of(exclude, slices, stretch, by_place=items is None)
    none = keys
    launch(
        _best(),
        lambda meta: (slices, triton.cdiv(rows, meta["ROWS"])),
        *(rep, weight, given(scale, none), given(bias, none), given(items, none)),
        *(given(excluded, none), given(cursor, none), lists[0], lists[1], keys),
        *(rows, places, stretch, k, capacity, width, slices),
        D=depth,
        HAS_SCALE=scale is not None,
        HAS_BIAS=bias is not None,
        HAS_ITEMS=items is not None,
        HAS_EXCLUDED=excluded is not None,
    )
    return from_keys(keys.view(rows, slices * k).topk(k).values)


def given(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """What a kernel gets for a pointer that it does not use."""
    return other if tensor is None else tensor.contiguous()


def slices_of(rep: torch.Tensor, places: int, bytes_of_slice: int) -> tuple[int, int]:
    """How many slices, and the places of each: enough programs, within the memory for lists."""
    processors = 1
    if rep.device.type == "cuda":
        processors = torch.cuda.get_device_properties(rep.device).multi_processor_count
    row_tiles = triton.cdiv(rep.shape[0], CONSTANTS["ROWS"])
    wanted = triton.cdiv(PROGRAMS * processors, row_tiles)
    blocks = max(triton.cdiv(places, WIDEST), 1)
    slices = max(1, min(wanted, LIST_BYTES // bytes_of_slice, blocks))
    stretch = triton.cdiv(blocks, slices)
    return triton.cdiv(blocks, stretch), stretch * WIDEST


def exclusions_of(
    exclude: torch.Tensor | None, slices: int, stretch: int, *, by_place: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """The rows' exclusions in order, each slice's first among them, and their number."""
    if exclude is None or exclude.shape[1] == 0:
        return None, None, 0
    ordered = exclude.masked_fill(exclude < 0, 2**31 - 1).sort(dim=1).values
    starts = torch.arange(slices, device=exclude.device) * (stretch if by_place else 0)
    starts = starts.expand(exclude.shape[0], slices).contiguous()
    return ordered, torch.searchsorted(ordered, starts, out_int32=True), exclude.shape[1]


@cache
def _best() -> tuple:
    return tuned(best_kernel)


def tuned(kernel) -> tuple:
    """The kernel, and the pinned constants; under FMREC_FAST_AUTOTUNE=1 a search over configs."""
    if os.environ.get("FMREC_FAST_AUTOTUNE", "0") != "1" or triton.knobs.runtime.interpret:
        return kernel, {**CONSTANTS, "num_warps": THREADS // WARP}
    configs = [triton.Config(c, num_warps=t // WARP) for c, t in SEARCH]
    return triton.autotune(configs, key=["D"])(kernel), {}


def launch(tuned: tuple, grid, *arguments, **flags) -> None:
    kernel, constants = tuned
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **flags, **constants, **OPTIONS)


def compile_case(kernel, pointers: str, scalars: str, constants: dict) -> dict:
    """What `budget` compiles: {dtype} stands for the element type of the table."""
    types = {"p_rep": "*fp32", "p_weight": "*{dtype}", "p_scale": "*fp32", "p_bias": "*fp32"}
    types |= {"p_order": "*i32", "p_ids": "*i32", "p_cursor": "*i32", "p_ahead": "*i32"}
    types |= {"p_scores": "*fp32", "p_own": "*fp32"}
    signature = {name: types.get(name, "*i64") for name in pointers.split()}
    return {
        "kernel": kernel,
        "signature": signature | dict.fromkeys(scalars.split(), "i32"),
        "constants": {"D": 128} | constants,
        "threads": THREADS,
        "options": OPTIONS,
    }


COMPILE_CASES = [
    compile_case(
        best_kernel,
        "p_rep p_weight p_scale p_bias p_items p_excluded p_cursor p_order p_ids p_keys",
        " ".join(_BEST),
        {"HAS_SCALE": False, "HAS_BIAS": True, "HAS_ITEMS": False, "HAS_EXCLUDED": True}
        | CONSTANTS,
    ),
    compile_case(listed_kernel, "p_rep p_weight p_items p_scores", "count", LISTED),
]
