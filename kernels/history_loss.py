"""The reconstruction loss at its cells, and its gradients (FMRec eq. 17): a sampled product.

    residual[m] = hidden[r] . weight[c] + bias[c] - label[m]     for each cell m = (r, c) in use
    g[m]        = 2 scale grad residual[m]
    d_hidden[r] = sum of g[m] weight[c] over the cells of row r
    d_weight[c] = sum of g[m] hidden[r] over the cells of column c;  d_bias[c] = sum of g[m]

hidden, d_hidden [B, H], weight, d_weight [V, H], bias, d_bias [V], label, residual [M], all
contiguous float32; rows int64 [M]. The number M of cells is a bound that the shapes give, so that
nothing waits for the device: a cell out of use has the column V in the order below.

The cells are visited through two orders, sorted on the device before the launch: `order` by column
(those out of use last, so that whole programs end at once) and `by_row`. Each sum has one program
and a fixed order: no atomics, and a gradient is the same to the bit each time. Only the columns
that a cell touches are written, so the caller fills d_weight and d_bias with zeros.
"""

import functools
import os

import torch
import triton
import triton.language as tl

# The pinned configurations: 16-byte loads of float32, and tiles of at least 8 rows in flight per
# program; not tuned by measurement.
FORWARD = {"CELLS": 8, "CHANNELS": 256}
BACKWARD_COLUMNS = {"POSITIONS": 8, "CELLS": 8, "CHANNELS": 256}
BACKWARD_ROWS = {"CELLS": 8, "CHANNELS": 256}
THREADS = 128

# What FMREC_FAST_AUTOTUNE=1 tries: (constants, threads).
TILES = [(k, c) for k in (4, 8, 16) for c in (128, 256, 512)]
FORWARD_SEARCH = [({"CELLS": k, "CHANNELS": c}, t) for k, c in TILES for t in (64, 128, 256)]
COLUMNS_SEARCH = [
    ({"POSITIONS": p, "CELLS": k, "CHANNELS": c}, t)
    for p in (4, 8, 16)
    for k, c in TILES
    for t in (64, 128)
]
ROWS_SEARCH = FORWARD_SEARCH

WARP = 64 if torch.version.hip else 32
OPTIONS = {"enable_fp_fusion": False}


@triton.jit(do_not_specialize=["cells", "items"])
def forward_kernel(
    p_hidden,
    p_weight,
    p_bias,
    p_rows,
    p_label,
    p_order,
    p_columns,
    p_residual,
    cells,
    items,
    H: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program: CELLS cells in column order, which share what they read of `weight`."""
    o_cell = tl.program_id(0) * CELLS + tl.arange(0, CELLS)  # [CELLS]
    m_cell = o_cell < cells
    b_column = tl.load(p_columns + o_cell, mask=m_cell, other=items).to(tl.int64)  # [CELLS]
    b_cell = tl.load(p_order + o_cell, mask=m_cell, other=0)  # [CELLS]
    m_used = b_column < items
    if tl.min(b_column) < items:
        b_row = tl.load(p_rows + b_cell, mask=m_used, other=0)  # [CELLS]
        b_sum = tl.zeros((CELLS, CHANNELS), tl.float32)
        for first in range(0, H, CHANNELS):
            o_channel = first + tl.arange(0, CHANNELS)  # [CHANNELS]
            m_tile = m_used[:, None] & (o_channel < H)[None, :]
            o_hidden = b_row[:, None] * H + o_channel[None, :]
            o_weight = b_column[:, None] * H + o_channel[None, :]
            b_hidden = tl.load(p_hidden + o_hidden, mask=m_tile, other=0.0)  # [CELLS, CHANNELS]
            b_weight = tl.load(p_weight + o_weight, mask=m_tile, other=0.0)  # [CELLS, CHANNELS]
            b_sum = tl.fma(b_hidden, b_weight, b_sum)
        b_bias = tl.load(p_bias + b_column, mask=m_used, other=0.0)  # [CELLS]
        b_label = tl.load(p_label + b_cell, mask=m_used, other=0.0)  # [CELLS]
        b_residual = tl.where(m_used, tl.sum(b_sum, axis=1) + b_bias - b_label, 0.0)
        tl.store(p_residual + b_cell, b_residual, mask=m_cell)
    else:
        tl.store(p_residual + b_cell, tl.zeros((CELLS,), tl.float32), mask=m_cell)


@triton.jit(do_not_specialize=["cells", "items", "scale"])
def columns_kernel(
    p_hidden,
    p_rows,
    p_order,
    p_columns,
    p_target,
    p_residual,
    p_grad,
    p_d_weight,
    p_d_bias,
    cells,
    items,
    scale,
    H: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    POSITIONS: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program: the columns whose first cell is among POSITIONS cells; CHANNELS channels.

    Column c's sums go to row p_target[its first cell] of d_weight and d_bias.
    """
    start = tl.program_id(0) * POSITIONS
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)  # [CHANNELS]
    m_channel = o_channel < H
    factor = tl.load(p_grad) * scale
    before = tl.load(p_columns + start - 1, mask=start > 0, other=-1)
    for at in range(start, start + POSITIONS):
        column = tl.load(p_columns + at, mask=at < cells, other=items)
        if (column != before) & (column < items):
            b_sum = tl.zeros((CHANNELS,), tl.float32)
            total = tl.sum(tl.zeros((CELLS,), tl.float32))
            first = at
            inside = 1
            while inside == 1:
                o_cell = first + tl.arange(0, CELLS)  # [CELLS]
                b_column = tl.load(p_columns + o_cell, mask=o_cell < cells, other=items)
                m_cell = b_column == column
                b_cell = tl.load(p_order + o_cell, mask=m_cell, other=0)  # [CELLS]
                b_g = tl.load(p_residual + b_cell, mask=m_cell, other=0.0) * factor  # [CELLS]
                if WEIGHT:
                    b_row = tl.load(p_rows + b_cell, mask=m_cell, other=0)  # [CELLS]
                    o_hidden = b_row[:, None] * H + o_channel[None, :]
                    m_hidden = m_cell[:, None] & m_channel[None, :]
                    # [CELLS, CHANNELS]
                    b_hidden = tl.load(p_hidden + o_hidden, mask=m_hidden, other=0.0)
                    b_sum += tl.sum(b_g[:, None] * b_hidden, axis=0)
                total += tl.sum(b_g)
                # Sorted: a tile that holds another column holds the last cell of this one.
                inside = tl.min(m_cell.to(tl.int32))
                first += CELLS
            target = tl.load(p_target + at).to(tl.int64)
            if WEIGHT:
                tl.store(p_d_weight + target * H + o_channel, b_sum, mask=m_channel)
            if BIAS:
                tl.store(p_d_bias + target, total, mask=tl.program_id(1) == 0)
        before = column


@triton.jit(do_not_specialize=["scale"])
def rows_kernel(
    p_weight,
    p_columns,
    p_by_row,
    p_starts,
    p_residual,
    p_grad,
    p_d_hidden,
    scale,
    H: tl.constexpr,
    CELLS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """One program: CHANNELS channels of d_hidden[b]; `p_columns` in the cells' own order."""
    b = tl.program_id(0).to(tl.int64)
    o_channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)  # [CHANNELS]
    m_channel = o_channel < H
    factor = tl.load(p_grad) * scale
    start, end = tl.load(p_starts + b), tl.load(p_starts + b + 1)
    b_sum = tl.zeros((CHANNELS,), tl.float32)
    for first in range(start, end, CELLS):
        o_cell = first + tl.arange(0, CELLS)  # [CELLS]
        m_cell = o_cell < end
        b_cell = tl.load(p_by_row + o_cell, mask=m_cell, other=0)  # [CELLS]
        b_g = tl.load(p_residual + b_cell, mask=m_cell, other=0.0) * factor  # [CELLS]
        b_column = tl.load(p_columns + b_cell, mask=m_cell, other=0)  # [CELLS]
        o_weight = b_column[:, None] * H + o_channel[None, :]
        m_weight = m_cell[:, None] & m_channel[None, :]
        b_weight = tl.load(p_weight + o_weight, mask=m_weight, other=0.0)  # [CELLS, CHANNELS]
        b_sum += tl.sum(b_g[:, None] * b_weight, axis=0)
    tl.store(p_d_hidden + b * H + o_channel, b_sum, mask=m_channel)


def column_order(
    columns: torch.Tensor, use: torch.Tensor, items: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sorted columns int32 [M], V where out of use; the cells in that order int64 [M])."""
    return torch.where(use, columns, items).int().sort(stable=True)


def history_loss_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    rows: torch.Tensor,
    label: torch.Tensor,
    ordered: tuple[torch.Tensor, torch.Tensor],
    residual: torch.Tensor,
) -> None:
    """The residual of every cell, 0 where it is out of use; `ordered` from `column_order`."""
    (columns, order), cells = ordered, len(rows)
    if cells == 0:
        return
    arguments = (hidden, weight, bias, rows, label, order, columns, residual, cells, len(weight))
    tuned = _tuned(forward_kernel, "FORWARD", ("cells", "H"))
    _launch(tuned, lambda meta: (triton.cdiv(cells, meta["CELLS"]),), arguments, hidden)


def history_loss_columns(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    ordered: tuple[torch.Tensor, torch.Tensor],
    target: torch.Tensor,
    residual: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
    items: int,
    d_weight: torch.Tensor | None,
    d_bias: torch.Tensor | None,
) -> None:
    """The sums of the touched columns into row `target` [M] (by the first cell of the order)."""
    (columns, order), cells = ordered, len(rows)
    if cells == 0 or (d_weight is None and d_bias is None):
        return
    wants = {"WEIGHT": d_weight is not None, "BIAS": d_bias is not None}
    width = hidden.shape[1] if d_weight is not None else 1
    out = [residual if d is None else d for d in (d_weight, d_bias)]  # one that is not written
    arguments = (hidden, rows, order, columns, target, residual, grad, *out, cells, items, scale)
    _launch(
        _tuned(columns_kernel, "BACKWARD_COLUMNS", ("cells", "H"), "COLUMNS_SEARCH"),
        lambda m: (triton.cdiv(cells, m["POSITIONS"]), triton.cdiv(width, m["CHANNELS"])),
        arguments,
        hidden,
        **wants,
    )


def history_loss_rows(
    weight: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    use: torch.Tensor,
    residual: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
    d_hidden: torch.Tensor,
) -> None:
    """All of d_hidden; rows without a cell get 0."""
    batch = len(d_hidden)
    if d_hidden.numel() == 0:
        return
    key, by_row = torch.where(use, rows, batch).int().sort(stable=True)
    numbers = torch.arange(batch + 1, dtype=torch.int32, device=key.device)
    starts = torch.searchsorted(key, numbers, out_int32=True)
    width = d_hidden.shape[1]
    _launch(
        _tuned(rows_kernel, "BACKWARD_ROWS", ("H",), "ROWS_SEARCH"),
        lambda meta: (batch, triton.cdiv(width, meta["CHANNELS"])),
        (weight, columns, by_row, starts, residual, grad, d_hidden, scale),
        weight,
    )


@functools.cache
def _tuned(kernel, pinned: str, key: tuple[str, ...], search: str = "FORWARD_SEARCH") -> tuple:
    """The kernel, and the pinned constants; under FMREC_FAST_AUTOTUNE=1 a search over configs."""
    if os.environ.get("FMREC_FAST_AUTOTUNE", "0") != "1" or triton.knobs.runtime.interpret:
        return kernel, {**globals()[pinned], "num_warps": THREADS // WARP}
    configs = [triton.Config(c, num_warps=max(t // WARP, 1)) for c, t in globals()[search]]
    return triton.autotune(configs, key=list(key))(kernel), {}


def _launch(tuned: tuple, grid, arguments: tuple, width_of: torch.Tensor, **flags: bool) -> None:
    kernel, constants = tuned
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(width_of):
        kernel[grid](*arguments, H=width_of.shape[1], **flags, **constants, **OPTIONS)


def _compile_case(kernel, floats: str, integers: dict, scalars: dict, constants: dict) -> dict:
    """What `budget` compiles, for the published decoder."""
    signature = dict.fromkeys(floats.split(), "*fp32") | integers | scalars
    return {
        "kernel": kernel,
        "signature": signature,
        "constants": {"H": 2048, **constants},
        "threads": THREADS,
        "options": OPTIONS,
        "dtypes": ["float32"],
    }


_ORDER = {"p_rows": "*i64", "p_order": "*i64", "p_columns": "*i32"}
_COUNTS = {"cells": "i32", "items": "i32"}
COMPILE_CASES = [
    _compile_case(
        forward_kernel,
        "p_hidden p_weight p_bias p_label p_residual",
        _ORDER,
        _COUNTS,
        FORWARD,
    ),
    _compile_case(
        columns_kernel,
        "p_hidden p_residual p_grad p_d_weight p_d_bias",
        _ORDER | {"p_target": "*i32"},
        _COUNTS | {"scale": "fp32"},
        {"WEIGHT": True, "BIAS": True, **BACKWARD_COLUMNS},
    ),
    _compile_case(
        rows_kernel,
        "p_weight p_residual p_grad p_d_hidden",
        {"p_columns": "*i64", "p_by_row": "*i64", "p_starts": "*i32"},
        {"scale": "fp32"},
        BACKWARD_ROWS,
    ),
]
