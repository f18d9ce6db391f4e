"""The reconstruction loss, computed only at the cells it uses."""

from __future__ import annotations

import torch
from torch import Tensor

from fmrec_fast import extension, memory, noise
from fmrec_fast.backend import Backend, Rng, choose, current_rng
from fmrec_fast.ops._checks import (
    check_float,
    check_integer,
    check_range,
    check_shape,
    is_sharded,
)
from fmrec_fast.reference import history_loss as reference
from fmrec_fast.reference.history_loss import Cells


def history_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    sequence: Tensor,
    *,
    mask_ratio: float = 1.0,
    cells: Tensor | Cells | None = None,
    seed: Tensor | None = None,
    sparse_grad: bool = False,
) -> Tensor:
    """Squared error of the decoded history at its items and at drawn other cells (eq. 17).

    Equivalent PyTorch, for r [B, V] the multi-hot matrix of the ids in `sequence`::

        decoded = hidden @ weight.T + bias
        ((decoded - r)[used] ** 2).sum() / (B * V)

    where `used` are the ones of r and n0 = min(zeros, int(ones * mask_ratio)) draws, uniform with
    replacement over all zero cells of the whole matrix, duplicates counted once. Nothing else of
    `decoded` is computed, and nothing of size B V is held. Beyond the CPU nothing waits for the
    device: the B L (1 + mask_ratio) cells that there may be are all visited, those out of use
    are skipped there, so that a CUDA graph can hold the loss and draw anew on every replay.

    Args:
        hidden: input of the decoder's last layer [B, Hd].
        weight: of that layer [V, Hd]; bias: [V].
        sequence: int64 [B, L], ids 0 .. V-1; padding (0) is no item of the history, so its
            cell is a zero.
        mask_ratio: drawn zeros per one.
        cells: given (row, column) cells instead of the draw, int64 [N, 2]; or all cells, ones too,
            as `reference.history_loss.history_cells` makes them.
        seed: int64 scalar tensor keying the draw; None draws one, or under
            ``use_rng('published')`` takes the cells from ``torch.randint`` instead.
        sparse_grad: give the gradients of `weight` and `bias` as sparse COO tensors that hold
            the touched rows only, instead of dense ones, which are zeros for the rest: then nothing
            in forward or backward takes memory of size V. On a CUDA device the host waits once
            in backward, for a sparse tensor's shape is known there.

    Returns:
        Scalar; differentiable in `hidden`, `weight` and `bias`. The kernels add in a fixed order:
        gradients are the same to the bit each time.

    `weight` and `bias` may be DTensors over ranks (`distributed.items`), each of which calls with
    its samples, the same `seed`, and `cells` of these samples. B is then that of all ranks, and
    the result this rank's share of the loss.

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
    if isinstance(cells, Tensor):
        check_shape("cells", cells, "N 2", sizes | {"2": 2})
        check_integer("cells", cells)
        check_range("rows of cells", cells[:, 0], 0, sizes["B"])
        check_range("columns of cells", cells[:, 1], 0, sizes["V"])
    published = seed is None and current_rng() is Rng.PUBLISHED
    compiling = torch.compiler.is_compiling()
    if not compiling and (is_sharded(weight) or is_sharded(bias)):
        from fmrec_fast.distributed.history_loss import history_loss as sharded

        if sparse_grad or published or isinstance(cells, Cells):
            raise ValueError(
                "weight over ranks takes sparse_grad False, draws of the stream and drawn cells "
                f"[N, 2], got sparse_grad = {sparse_grad}, rng {current_rng().value!r} and cells "
                f"{type(cells).__name__}"
            )
        return sharded(
            hidden, weight, bias, sequence, mask_ratio=mask_ratio, cells=cells, seed=seed
        )
    if sequence.numel() == 0:
        return (hidden.sum() + weight.sum() + bias.sum()) * 0.0
    if isinstance(cells, Cells):
        used = cells
    elif cells is None and not published:
        used = draw_cells(sequence, sizes["V"], mask_ratio, noise.as_seed(seed, sequence.device))
    else:
        used = reference.history_cells(
            sequence,
            sizes["V"],
            mask_ratio=mask_ratio,
            negatives=cells,
            seed=None if published else noise.as_seed(seed, sequence.device),
            published=published,
        )
    if compiling:
        if sparse_grad:
            raise ValueError("sparse_grad must be False under torch.compile, got True")
        return torch.ops.fmrec_fast.history_loss(hidden, weight, bias, *used)[0]
    return at_cells(hidden, weight, bias, used, sparse_grad)


def draw_cells(sequence: Tensor, num_items: int, mask_ratio: float, seed: Tensor) -> Cells:
    """`reference.history_cells` drawn by `seed`; in C++ only those in use, in the same order."""
    kernels = noise.native(seed, sequence)
    # 64 bits must hold the numbers of cells and of draws.
    if kernels is None or max(len(sequence) * num_items, sequence.numel() * mask_ratio) >= 2**62:
        return reference.history_cells(sequence, num_items, mask_ratio=mask_ratio, seed=seed)
    word = noise.derived_word(int(seed), noise.Use.CELLS)
    found = kernels.history_cells(sequence.contiguous().numpy(), num_items, mask_ratio, word)
    rows, columns, label = (torch.from_numpy(part) for part in found)
    return Cells(rows, columns, label, torch.ones(len(rows), dtype=torch.bool))


def at_cells(
    hidden: Tensor, weight: Tensor, bias: Tensor, used: Cells, sparse_grad: bool = False
) -> Tensor:
    """The loss at given cells: sum of squared residuals / (B V)."""
    # Looking at `use` waits for nothing here.
    if hidden.device.type == "cpu" and not used.use.all():
        used = Cells(*(part[used.use] for part in used))
    backend = choose("history_loss", hidden, weight, bias)
    if backend is Backend.REFERENCE:
        return reference.history_loss(hidden, weight, bias, used, len(weight), sparse_grad)
    return _HistoryLoss.apply(hidden, weight, bias, used, backend, sparse_grad)


def _forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, cells: Cells, backend: Backend
) -> tuple[Tensor, Tensor]:
    """(loss, residual [M] with 0 out of use); contiguous tensors."""
    residual = torch.empty_like(cells.label)
    if backend is Backend.CPP:
        extension.load().history_loss_forward(
            hidden.detach().numpy(),
            weight.detach().numpy(),
            bias.detach().numpy(),
            cells.rows.numpy(),
            cells.columns.numpy(),
            cells.label.numpy(),
            cells.use.numpy(),
            residual.numpy(),
            torch.get_num_threads(),
        )
    else:
        from fmrec_fast.kernels import history_loss as kernels

        ordered = kernels.column_order(cells.columns, cells.use, len(weight))
        kernels.history_loss_forward(
            hidden, weight, bias, cells.rows, cells.label, ordered, residual
        )
    return residual.square().sum() * _scale(hidden, weight), residual


def _scale(hidden: Tensor, weight: Tensor) -> float:
    return 1.0 / max(hidden.shape[0] * weight.shape[0], 1)


def _backward_cpp(
    hidden: Tensor,
    weight: Tensor,
    cells: Cells,
    g: Tensor,
    d_hidden: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> None:
    if d_hidden is None and d_weight is None and d_bias is None:
        return
    extension.load().history_loss_backward(
        hidden.detach().numpy(),
        weight.detach().numpy(),
        cells.rows.numpy(),
        cells.columns.numpy(),
        g.numpy(),
        cells.use.numpy(),
        *(None if d is None else d.numpy() for d in (d_hidden, d_weight, d_bias)),
        torch.get_num_threads(),
    )


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    residual: Tensor,
    cells: Cells,
    wants: tuple[bool, bool, bool],
    backend: Backend,
    sparse: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias; None where not wanted."""
    items, width = weight.shape
    wants_hidden, wants_weight, wants_bias = wants
    scale = 2 * _scale(hidden, weight)
    touched, slots, held = None, cells.columns, items
    if sparse:
        # Of the cells in use; the others, which no kernel writes for, have the slot beyond.
        key = torch.where(cells.use, cells.columns, items)
        touched, slots = key.unique(return_inverse=True)
        touched = touched[touched < items]
        held = len(touched)
    d_hidden = torch.empty_like(hidden) if wants_hidden else None
    d_weight = d_bias = None
    # The Triton kernel writes the rows with cells only, the C++ kernel all.
    if wants_weight:
        fresh = memory.empty if backend is Backend.CPP else hidden.new_zeros
        d_weight = fresh(held, width)
    if wants_bias:
        d_bias = (torch.empty if backend is Backend.CPP else hidden.new_zeros)(held)
    if backend is Backend.CPP:
        g = residual * (scale * grad)
        if touched is None:
            _backward_cpp(hidden, weight, cells, g, d_hidden, d_weight, d_bias)
        else:
            _backward_cpp(hidden, weight, cells, g, d_hidden, None, None)
            # For the columns' sums the kernel reads of `weight` only how many columns there are.
            none = hidden.new_empty(held, width)
            _backward_cpp(hidden, none, cells._replace(columns=slots), g, None, d_weight, d_bias)
    else:
        from fmrec_fast.kernels import history_loss as kernels

        if d_hidden is not None:
            kernels.history_loss_rows(
                weight, cells.rows, cells.columns, cells.use, residual, grad, scale, d_hidden
            )
        ordered = kernels.column_order(cells.columns, cells.use, items)
        target = ordered[0] if touched is None else slots[ordered[1]].int()
        kernels.history_loss_columns(
            hidden, cells.rows, ordered, target, residual, grad, scale, items, d_weight, d_bias
        )
    if touched is not None:
        d_weight, d_bias = (
            None if d is None else _sparse(touched, d, shape)
            for d, shape in ((d_weight, weight.shape), (d_bias, weight.shape[:1]))
        )
    return d_hidden, d_weight, d_bias


def _sparse(index: Tensor, values: Tensor, shape: torch.Size) -> Tensor:
    return torch.sparse_coo_tensor(
        index[None], values, shape, is_coalesced=True, check_invariants=False
    )


class _HistoryLoss(torch.autograd.Function):
    """The kernels: one dot product per cell, gradients summed row by row."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, cells, backend, sparse):
        hidden, weight, bias = hidden.contiguous(), weight.contiguous(), bias.contiguous()
        loss, residual = _forward(hidden, weight, bias, cells, backend)
        ctx.save_for_backward(hidden, weight, residual)
        ctx.constants = (cells, backend, sparse)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cells, backend, sparse = ctx.constants
        hidden, weight, residual = ctx.saved_tensors
        wants = ctx.needs_input_grad[:3]
        gradients = _backward(grad, hidden, weight, residual, cells, wants, backend, sparse)
        return *gradients, None, None, None


# What torch.compile and export see: the same kernels, whose backend is chosen when they run.


@torch.library.custom_op("fmrec_fast::history_loss", mutates_args=())
def _compiled(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    rows: Tensor,
    columns: Tensor,
    label: Tensor,
    use: Tensor,
) -> tuple[Tensor, Tensor]:
    cells = Cells(rows, columns, label, use)
    backend = choose("history_loss", hidden, weight, bias)
    if backend is Backend.REFERENCE:
        residual = reference.residuals(hidden, weight, bias, cells)
        return residual.square().sum() * _scale(hidden, weight), residual
    hidden, weight, bias = hidden.contiguous(), weight.contiguous(), bias.contiguous()
    return _forward(hidden, weight, bias, Cells(*(c.contiguous() for c in cells)), backend)


@_compiled.register_fake
def _(hidden, weight, bias, rows, columns, label, use):
    return hidden.new_empty(()), hidden.new_empty(rows.shape)


@torch.library.custom_op("fmrec_fast::history_loss_backward", mutates_args=())
def _compiled_backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    residual: Tensor,
    rows: Tensor,
    columns: Tensor,
    use: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    cells = Cells(rows, columns, residual, use)
    backend = choose("history_loss", hidden, weight)
    if backend is Backend.REFERENCE:
        return reference.gradients(grad, hidden, weight, residual, cells)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    cells = Cells(*(part.contiguous() for part in cells))
    gradients = _backward(grad, hidden, weight, residual, cells, (True, True, True), backend)
    return gradients  # type: ignore[return-value]


@_compiled_backward.register_fake
def _(grad, hidden, weight, residual, rows, columns, use):
    return torch.empty_like(hidden), torch.empty_like(weight), weight.new_empty(weight.shape[0])


def _save(ctx, inputs, output):
    hidden, weight, _, rows, columns, _, use = inputs
    ctx.save_for_backward(hidden, weight, output[1], rows, columns, use)


def _of_compiled(ctx, grad, _):
    hidden, weight, residual, rows, columns, use = ctx.saved_tensors
    gradients = torch.ops.fmrec_fast.history_loss_backward(
        grad, hidden, weight, residual, rows, columns, use
    )
    return *gradients, None, None, None, None


_compiled.register_autograd(_of_compiled, setup_context=_save)
