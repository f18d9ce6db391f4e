"""`history_loss` with the decoder's last layer over ranks: each touches only its own rows."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fmrec_fast import noise
from fmrec_fast.distributed.exchange import exchange_sizes, gather, gather_rows, shares
from fmrec_fast.distributed.items import own_rows, rows_of
from fmrec_fast.ops.history_loss import at_cells
from fmrec_fast.reference.history_loss import Cells, history_cells


def history_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    sequence: Tensor,
    *,
    mask_ratio: float,
    cells: Tensor | None,
    seed: Tensor | None,
) -> Tensor:
    """This rank's share: of the cells of all ranks' samples those in its own columns, over the
    global B and V. Every rank draws the same cells, those of one process with the global batch."""
    rows = rows_of("weight", weight)
    rows_of("bias", bias)
    group, device = rows.group, sequence.device
    sizes = shares(len(sequence), group, device)
    everyone = gather_rows(hidden, sizes, group)
    histories = gather(sequence, sizes, group)
    own_weight, own_bias = own_rows(weight), own_rows(bias)
    if cells is not None:
        first = sum(sizes[: dist.get_rank(group)])
        cells = torch.stack((cells[:, 0] + first, cells[:, 1]), 1)
        cells = gather(cells, exchange_sizes(len(cells), group, device), group)
    if seed is None:
        seed = noise.draw_seed(device)
        dist.broadcast(seed, group_src=0, group=group)
    if histories.numel() == 0 or rows.first == rows.last:
        # Ranks without columns still take part in the gradients' exchange.
        return (everyone.sum() + own_weight.sum() + own_bias.sum()) * 0.0
    used = history_cells(histories, rows.total, mask_ratio=mask_ratio, negatives=cells, seed=seed)
    column = rows.local(used.columns)
    use = used.use & (column >= 0)
    used = Cells(used.rows, column.clamp(min=0), used.label, use)
    # The op divides by the number of its own columns.
    return at_cells(everyone, own_weight, own_bias, used) * (len(own_weight) / rows.total)
