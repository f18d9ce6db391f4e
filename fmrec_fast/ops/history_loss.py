"""The reconstruction loss, computed only at the cells it uses."""

from __future__ import annotations

import torch
from torch import Tensor

from fmrec_fast import extension, noise
from fmrec_fast.backend import Backend, Rng, choose, current_rng
from fmrec_fast.ops._checks import check_float, check_integer, check_range, check_shape
from fmrec_fast.reference import history_loss as reference
from fmrec_fast.reference.history_loss import Cells


def history_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    sequence: Tensor,
    *,
    mask_ratio: float = 1.0,
    cells: Tensor | None = None,
    seed: Tensor | None = None,
) -> Tensor:
    """Squared error of the decoded history at its items and at drawn other cells (eq. 17).

    Equivalent PyTorch, for r [B, V] the multi-hot matrix of the ids in `sequence`::

        decoded = hidden @ weight.T + bias
        ((decoded - r)[used] ** 2).sum() / (B * V)

    where `used` are the ones of r and n0 = min(zeros, int(ones * mask_ratio)) draws, uniform with
    replacement over all zero cells of the whole matrix, duplicates counted once. Nothing else of
    `decoded` is computed, and nothing of size B V is held.

    Args:
        hidden: input of the decoder's last layer [B, Hd].
        weight: of that layer [V, Hd]; bias: [V].
        sequence: int64 [B, L], ids 0 .. V-1; padding (0) is no item of the history, so its
            cell is a zero.
        mask_ratio: drawn zeros per one.
        cells: given (row, column) cells instead of the draw, int64 [N, 2].
        seed: int64 scalar tensor keying the draw; None draws one, or under
            ``use_rng('published')`` takes the cells from ``torch.randint`` instead.

    Returns:
        Scalar; differentiable in `hidden`, `weight` and `bias`.

    Raises:
        TypeError, ValueError: dtypes, shapes, a negative ratio, or (on CPU) an id out of range.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("hidden", hidden, "B H", sizes)
    check_shape("weight", weight, "V H", sizes)
    check_shape("bias", bias, "V", sizes)
    check_shape("sequence", sequence, "B L", sizes)
    check_float(hidden=hidden, weight=weight, bias=bias)
    check_integer("sequence", sequence)
    check_range("sequence", sequence, 0, sizes["V"])
    if not mask_ratio >= 0:
        raise ValueError(f"mask_ratio must be at least 0, got {mask_ratio}")
    if cells is not None:
        check_shape("cells", cells, "N 2", sizes | {"2": 2})
        check_integer("cells", cells)
        check_range("rows of cells", cells[:, 0], 0, sizes["B"])
        check_range("columns of cells", cells[:, 1], 0, sizes["V"])
    if sequence.numel() == 0:
        return (hidden.sum() + weight.sum() + bias.sum()) * 0.0
    published = seed is None and current_rng() is Rng.PUBLISHED
    used = reference.history_cells(
        sequence,
        sizes["V"],
        mask_ratio=mask_ratio,
        negatives=cells,
        seed=None if published else noise.as_seed(seed, sequence.device),
        published=published,
    )
    if sequence.device.type == "cpu":  # looking at `use` waits for nothing here
        used = Cells(*(part[used.use] for part in used))
    backend = choose("history_loss", hidden, weight, bias)
    if backend is Backend.CPP:
        return _HistoryLoss.apply(hidden, weight, bias, used)
    return reference.history_loss(hidden, weight, bias, used, sizes["V"])


class _HistoryLoss(torch.autograd.Function):
    """The C++ kernel: one dot product per cell, gradients accumulated row by row."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, cells):
        hidden, weight, bias = hidden.contiguous(), weight.contiguous(), bias.contiguous()
        residual = torch.empty_like(cells.label)
        extension.load().history_loss_forward(
            hidden.numpy(),
            weight.numpy(),
            bias.numpy(),
            cells.rows.numpy(),
            cells.columns.numpy(),
            cells.label.numpy(),
            cells.use.numpy(),
            residual.numpy(),
            torch.get_num_threads(),
        )
        ctx.save_for_backward(hidden, weight, residual)
        ctx.cells = cells
        ctx.scale = 1.0 / (hidden.shape[0] * weight.shape[0])
        return residual.square().sum() * ctx.scale

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        hidden, weight, residual = ctx.saved_tensors
        wants_hidden, wants_weight, wants_bias, _ = ctx.needs_input_grad
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = torch.zeros_like(weight) if wants_weight else None
        d_bias = weight.new_zeros(weight.shape[0]) if wants_bias else None
        extension.load().history_loss_backward(
            hidden.numpy(),
            weight.numpy(),
            ctx.cells.rows.numpy(),
            ctx.cells.columns.numpy(),
            (residual * (2 * ctx.scale * grad)).numpy(),
            ctx.cells.use.numpy(),
            *(None if d is None else d.numpy() for d in (d_hidden, d_weight, d_bias)),
            torch.get_num_threads(),
        )
        return d_hidden, d_weight, d_bias, None
