"""The target's rank among all items, the items streaming by; no [B, V] scores in memory.

Scores, slices and exclusions are `item_ranking`'s, so that a rank is the place that the top k give.
One program counts the items of a slice that are ahead of the target of each of ROWS rows; a rank is
the sum of the slices' integers. A score that does not compare (NaN) is ahead.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from fmrec_fast.kernels.item_ranking import (
    CONSTANTS,
    OPTIONS,
    THREADS,
    WARP,
    compile_case,
    exclusions_of,
    given,
    launch,
    next_excluded,
    scores_of,
    slices_of,
    strike,
    tuned,
)
from fmrec_fast.reference.item_ranking import NO_ITEM

# What `strike` leaves at an exclusion.
_NO_ITEM: tl.constexpr = tl.constexpr(NO_ITEM)
_RANK = ["rows", "items", "stretch", "width", "slices"]


@triton.jit(do_not_specialize=["rows"])
def own_kernel(
    p_rep, p_weight, p_bias, p_target, p_own, rows,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, ITEMS: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
    """The targets' own scores [rows], by the products that the others get. Grid (row tiles)."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    # The targets as a tile of items; row i's is on the diagonal. ITEMS >= ROWS.
    o_lane = tl.arange(0, ITEMS)
    o_owner = tl.program_id(0) * ROWS + o_lane
    m_owner = (o_lane < ROWS) & (o_owner < rows)
    o_wanted = tl.load(p_target + o_owner, mask=m_owner, other=0)
    b_score = scores_of(
        p_rep, p_weight, p_bias, p_bias, o_row, m_row, o_wanted, m_owner,
        D, False, HAS_BIAS, ROWS, ITEMS, DEPTH,
    )  # fmt: skip
    m_own = tl.arange(0, ROWS)[:, None] == o_lane[None, :]
    tl.store(p_own + o_row, tl.sum(tl.where(m_own, b_score, 0.0), axis=1), mask=m_row)


@triton.jit(do_not_specialize=_RANK)
def rank_kernel(
    p_rep, p_weight, p_bias, p_target, p_own, p_excluded, p_cursor, p_ahead,
    rows, items, stretch, width, slices,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_EXCLUDED: tl.constexpr, ROWS: tl.constexpr,
    ITEMS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Items of one slice that are ahead of the target: int32 [rows, slices]."""
    piece = tl.program_id(0)
    o_row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    b_own = tl.load(p_own + o_row, mask=m_row, other=0.0)
    b_target = tl.load(p_target + o_row, mask=m_row, other=0)
    b_ahead = tl.zeros((ROWS,), tl.int32)
    if HAS_EXCLUDED:
        b_cursor = tl.load(p_cursor + o_row * slices + piece, mask=m_row, other=0)
        b_next = next_excluded(p_excluded, o_row, m_row, b_cursor, width)
    for begin in range(piece * stretch, tl.minimum((piece + 1) * stretch, items), ITEMS):
        o_item = begin + tl.arange(0, ITEMS)
        m_item = o_item < items
        b_score = scores_of(
            p_rep, p_weight, p_bias, p_bias, o_row, m_row, o_item, m_item,
            D, False, HAS_BIAS, ROWS, ITEMS, DEPTH,
        )  # fmt: skip
        # What does not compare (NaN) is ahead.
        m_first = o_item[None, :] < b_target[:, None]
        b_behind = tl.where(m_first, b_score < b_own[:, None], b_score <= b_own[:, None])
        m_ahead = (b_behind == 0) & (o_item[None, :] != b_target[:, None]) & m_item[None, :]
        b_found = tl.where(m_ahead, 1, _NO_ITEM)
        if HAS_EXCLUDED:
            b_found, b_cursor, b_next = strike(
                b_found, o_item, begin + ITEMS, p_excluded, o_row, m_row, b_cursor,
                b_next, width,
            )  # fmt: skip
        b_ahead += tl.sum((b_found == 1).to(tl.int32), axis=1)
    tl.store(p_ahead + o_row * slices + piece, b_ahead, mask=m_row)


def target_rank(
    rep: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    exclude: torch.Tensor | None = None,
    of_target: torch.Tensor | None = None,
) -> torch.Tensor:
    """int64 [B], as the definition."""
    (rows, depth), items = rep.shape, weight.shape[0]
    if rows == 0:
        return torch.empty_like(target)
    rep, weight, target = rep.contiguous(), weight.contiguous(), target.contiguous()
    if of_target is None:
        of_target = target_scores(rep, weight, target, bias=bias)
    slices, stretch = slices_of(rep, items, rows * 4)
    ahead = rep.new_empty(rows, slices, dtype=torch.int32)
    excluded, cursor, width = exclusions_of(exclude, slices, stretch, by_place=True)
    launch(
        _rank(),
        lambda meta: (slices, triton.cdiv(rows, meta["ROWS"])),
        *(rep, weight, given(bias, ahead), target, of_target.contiguous()),
        *(given(excluded, ahead), given(cursor, ahead)),
        *(ahead, rows, items, stretch, width, slices),
        D=depth,
        HAS_BIAS=bias is not None,
        HAS_EXCLUDED=excluded is not None,
    )
    return ahead.sum(1) + 1


def target_scores(
    rep: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 [B], as the definition."""
    rows, depth = rep.shape
    own = rep.new_empty(rows)
    if rows:
        rep, weight, target = rep.contiguous(), weight.contiguous(), target.contiguous()
        with torch.cuda.device_of(rep):
            own_kernel[(triton.cdiv(rows, CONSTANTS["ROWS"]),)](
                *(rep, weight, given(bias, own), target, own, rows),
                D=depth,
                HAS_BIAS=bias is not None,
                num_warps=THREADS // WARP,
                **CONSTANTS,
                **OPTIONS,
            )
    return own


@cache
def _rank() -> tuple:
    return tuned(rank_kernel)


COMPILE_CASES = [
    compile_case(
        rank_kernel,
        "p_rep p_weight p_bias p_target p_own p_excluded p_cursor p_ahead",
        " ".join(_RANK),
        {"HAS_BIAS": True, "HAS_EXCLUDED": True} | CONSTANTS,
    ),
    compile_case(
        own_kernel,
        "p_rep p_weight p_bias p_target p_own",
        "rows",
        {"HAS_BIAS": True} | CONSTANTS,
    ),
]
