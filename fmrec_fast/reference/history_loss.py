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
    num_ones = count.sum()
    num_zeros = batch * num_items - num_ones
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
        slots = int(min(batch * length * mask_ratio, batch * num_items))
        index = noise.wide_words(seed, slots) % num_zeros.clamp(min=1)
        rows, columns = zero_cells(index, ids, count, num_items)
        use = torch.arange(slots, device=sequence.device) < draws
    zeros = _once(rows, columns, use, batch, num_items)
    return Cells(*(torch.cat(pair) for pair in zip(ones, zeros, strict=True)))


def history_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor, cells: Cells, num_items: int
) -> Tensor:
    """sum over used cells of (hidden[row] . weight[column] + bias[column] - label)^2 / (B V)."""
    decoded = (hidden[cells.rows] * F.embedding(cells.columns, weight)).sum(-1)
    decoded = decoded + F.embedding(cells.columns, bias[:, None])[:, 0]
    squared = torch.where(cells.use, (decoded - cells.label) ** 2, 0.0)
    return squared.sum() / max(hidden.shape[0] * num_items, 1)
