"""Definition of `history_loss`: the reconstruction loss at the cells it uses."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrec_fast import noise


class Cells(NamedTuple):
    """Cells of the [B, V] matrix; `use` is False at slots that hold none."""

    rows: Tensor  # int64 [M]
    columns: Tensor  # int64 [M]
    label: Tensor  # float32 [M], 1 at ids of the history, 0 at drawn zeros
    use: Tensor  # bool [M]


class WholeBatch(NamedTuple):
    """A batch of which `sequence` holds a part: the cells are drawn over all of its rows."""

    counts: Tensor  # int64 [B], how many distinct items each row has
    first: int  # the part's rows are first .. end - 1
    end: int


def distinct(sequence: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """The distinct items of each row; padding (0) is none.

    Returns:
        (int64 [B, L] ascending, filled up with `num_items`; int64 [B] how many).
    """
    ordered = sequence.sort(1).values
    dropped = ordered == 0
    dropped[:, 1:] |= ordered[:, 1:] == ordered[:, :-1]
    ids = ordered.masked_fill(dropped, num_items).sort(1).values
    return ids, (~dropped).sum(1)


def num_draws(num_ones: Tensor, num_zeros: Tensor, mask_ratio: float) -> Tensor:
    """n0 = min(number of zeros, int(n1 * mask_ratio)): int64 scalar, on the device."""
    return torch.minimum((num_ones.double() * mask_ratio).long(), num_zeros)


def zero_cells(index: Tensor, ids: Tensor, count: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Rows and columns of the `index`-th zero cells in row-major order.

    Within a row whose distinct ids are s_0 < s_1 < ..., the k-th zero column is k plus the number
    of i with s_i - i <= k; one searchsorted over all rows finds it, without the [B, V] matrix.
    """
    batch, length = ids.shape
    ends = torch.cumsum(num_items - count, 0)
    rows = torch.searchsorted(ends, index, right=True).clamp(max=batch - 1)
    k = index - (ends - (num_items - count))[rows]
    i = torch.arange(length, device=ids.device)
    keys = torch.where(i < count[:, None], ids - i, num_items)
    span = num_items + 1
    flat = (keys + span * torch.arange(batch, device=ids.device)[:, None]).flatten()
    return rows, k + torch.searchsorted(flat, rows * span + k, right=True) - rows * length


def _once(rows: Tensor, columns: Tensor, use: Tensor, batch: int, num_items: int) -> Cells:
    """Zero cells with duplicates switched off, in row-major order."""
    nowhere = batch * num_items
    flat = torch.where(use, rows * num_items + columns, nowhere).sort().values
    use = flat < nowhere
    use[1:] &= flat[1:] != flat[:-1]
    flat = flat.masked_fill(~use, 0)
    label = torch.zeros(flat.shape, device=flat.device)
    return Cells(flat // num_items, flat % num_items, label, use)


def history_cells(
    sequence: Tensor,
    num_items: int,
    *,
    mask_ratio: float = 1.0,
    negatives: Tensor | None = None,
    seed: Tensor | None = None,
    published: bool = False,
    whole: WholeBatch | None = None,
) -> Cells:
    """The ones of the multi-hot matrix, and the drawn zeros.

    Args:
        sequence: int64 [B, L]; padding (0) is no item of the history, so its cell is a zero.
        num_items: V.
        mask_ratio: drawn zeros per one.
        negatives: given (row, column) cells instead of a draw: int64 [N, 2].
        seed: int64 scalar that the draw is keyed by (`noise.wide_words`).
        published: draw with ``torch.randint`` as the published program does (waits for the
            device, if it is not the CPU).
        whole: give the cells of these rows among those drawn by `seed` over a larger batch.
    """
    batch, length = sequence.shape
    ids, count = distinct(sequence, num_items)
    is_one = torch.arange(length, device=sequence.device) < count[:, None]
    row = torch.arange(batch, device=sequence.device)[:, None].expand(batch, length)
    ones = Cells(
        row.flatten(),
        ids.masked_fill(~is_one, 0).flatten(),
        torch.ones(batch * length, device=sequence.device),
        is_one.flatten(),
    )
    counts, first, end = (count, 0, batch) if whole is None else whole
    num_ones = counts.sum()
    num_zeros = len(counts) * num_items - num_ones
    draws = num_draws(num_ones, num_zeros, mask_ratio)
    if negatives is not None:
        rows, columns = negatives[:, 0], negatives[:, 1]
        use = ~(ids[rows] == columns[:, None]).any(1)  # a given one is among the ones already
    elif published:
        index = torch.randint(0, max(int(num_zeros), 1), (int(draws),)).to(sequence.device)
        rows, columns = zero_cells(index, ids, count, num_items)
        use = torch.ones_like(index, dtype=torch.bool)
    else:
        if seed is None:
            raise ValueError("drawing from the stream needs a seed, got None")
        slots = int(min(len(counts) * length * mask_ratio, len(counts) * num_items))
        index = noise.wide_words(seed, slots) % num_zeros.clamp(min=1)
        use = torch.arange(slots, device=sequence.device) < draws
        if whole is not None:
            index -= first * num_items - counts[:first].sum()
            own = (end - first) * num_items - counts[first:end].sum()
            use &= (index >= 0) & (index < own)
            if sequence.device.type == "cpu":  # looking at `use` waits for nothing here
                index, use = index[use], use[use]
            index = index.clamp(min=0)
        rows, columns = zero_cells(index, ids, count, num_items)
    zeros = _once(rows, columns, use, batch, num_items)
    return Cells(*(torch.cat(pair) for pair in zip(ones, zeros, strict=True)))


class _Gather(torch.autograd.Function):
    """table[columns], with a sparse gradient (`F.embedding` takes no table of one dimension)."""

    @staticmethod
    def forward(ctx, table, columns):
        ctx.save_for_backward(columns)
        ctx.shape = table.shape
        return table[columns]

    @staticmethod
    def backward(ctx, grad):
        (columns,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(columns[None], grad, ctx.shape, check_invariants=False), None


def residuals(hidden: Tensor, weight: Tensor, bias: Tensor, cells: Cells) -> Tensor:
    """hidden[row] . weight[column] + bias[column] - label of each cell, 0 out of use: [M]."""
    rows_of_weight = F.embedding(cells.columns, weight)
    of_bias = F.embedding(cells.columns, bias[:, None])[:, 0]
    return _residuals(hidden, rows_of_weight, of_bias, cells)


def _residuals(hidden: Tensor, of_weight: Tensor, of_bias: Tensor, cells: Cells) -> Tensor:
    decoded = (F.embedding(cells.rows, hidden) * of_weight).sum(-1) + of_bias
    return torch.where(cells.use, decoded - cells.label, 0.0)


def gradients(
    grad: Tensor, hidden: Tensor, weight: Tensor, residual: Tensor, cells: Cells
) -> tuple[Tensor, Tensor, Tensor]:
    """Of hidden, weight and bias, from the residuals; what autograd makes of `history_loss`."""
    g = residual * (2 * grad / max(hidden.shape[0] * weight.shape[0], 1))
    d_hidden = torch.zeros_like(hidden).index_add_(
        0, cells.rows, g[:, None] * weight[cells.columns]
    )
    d_weight = torch.zeros_like(weight).index_add_(
        0, cells.columns, g[:, None] * hidden[cells.rows]
    )
    return d_hidden, d_weight, weight.new_zeros(len(weight)).index_add_(0, cells.columns, g)


def history_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    cells: Cells,
    num_items: int,
    sparse_grad: bool = False,
) -> Tensor:
    """sum over used cells of (hidden[row] . weight[column] + bias[column] - label)^2 / (B V)."""
    if sparse_grad:
        of_weight, of_bias = (_Gather.apply(table, cells.columns) for table in (weight, bias))
        residual = _residuals(hidden, of_weight, of_bias, cells)
    else:
        residual = residuals(hidden, weight, bias, cells)
    return residual.square().sum() / max(hidden.shape[0] * num_items, 1)
