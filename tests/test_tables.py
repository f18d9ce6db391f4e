"""Lookups in a table, and their one dense gradient."""

from __future__ import annotations

import pytest
import torch

from fmrec_fast import extension, use_backend
from fmrec_fast.models.tables import look_up
from fmrec_fast.testing import assert_close_to_truth

needs_extension = pytest.mark.skipif(
    not extension.available(), reason=str(extension.reason()) or "there is the extension"
)
# (rows, width, shapes of the ids)
SHAPES = [
    (1, 1, [(1,)]),
    (7, 5, [(0, 3), (4,)]),
    (7, 0, [(2, 3), (4,)]),
    (40, 63, [(5, 51), (5,)]),
    (300, 128, [(64, 50), (64,), (3, 2, 1)]),
    (9, 200, [(5, 1), (0,), (700,)]),
]


def lookups(rows: int, width: int, shapes: list[tuple[int, ...]]):
    """(table, ids, gradients); four in five ids are 0, as padding is."""
    draw = torch.Generator().manual_seed(rows + width)
    table = torch.randn(rows, width, generator=draw)
    ids = [
        torch.randint(rows, shape, generator=draw) * (torch.rand(shape, generator=draw) < 0.2)
        for shape in shapes
    ]
    return table, ids, [torch.randn(*shape, width, generator=draw) for shape in shapes]


def gradient(table, ids, gradients):
    """That of `look_up`, whose values are checked."""
    table = table.clone().requires_grad_()
    found = look_up(table, *ids)
    assert all(torch.equal(got, table[part]) for got, part in zip(found, ids))
    return torch.autograd.grad(found, table, gradients)[0]


def definition(table, ids, gradients):
    total = torch.zeros_like(table)
    for part, grad in zip(ids, gradients):
        total.index_add_(0, part.flatten(), grad.flatten(0, -2))
    return total


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_the_gradient_is_the_sum_over_lookups(isa, case, monkeypatch):
    table, ids, gradients = lookups(*case)
    truth = definition(table.double(), ids, [g.double() for g in gradients])
    plain = definition(table, ids, gradients)
    with use_backend("reference"):
        other = gradient(table, ids, gradients)
    got = gradient(table, ids, gradients)
    if table.numel():
        assert_close_to_truth(other, plain, truth, name="PyTorch's")
        assert_close_to_truth(got, plain, truth, name="the kernel's")
    if len(ids) > 1:  # else PyTorch's own lookup
        monkeypatch.setattr(extension.load(), "table_gradient", None)
        with pytest.raises(TypeError):
            gradient(table, ids, gradients)


def native(threads, rows, width, ids, gradients):
    out = torch.full((rows, width), torch.nan)
    extension.load().table_gradient(
        [part.flatten().numpy() for part in ids],
        [grad.flatten(0, -2).numpy() for grad in gradients],
        out.numpy(),
        threads,
    )
    return out


@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_the_gradient_is_the_same_for_any_number_of_threads(isa, case):
    table, ids, gradients = lookups(*case)
    one = native(1, *table.shape, ids, gradients)
    for threads in (2, 3, 8):
        assert torch.equal(native(threads, *table.shape, ids, gradients), one)


@needs_extension
def test_a_long_sum_keeps_its_digits():
    # One row of 300,000 lookups: summed one after the other it would lose three digits.
    grad = torch.rand(300_000, 3, generator=torch.Generator().manual_seed(0))
    out = native(2, 2, 3, [torch.ones(len(grad), dtype=torch.int64)], [grad])
    truth = grad.double().sum(0)
    assert ((out[1] - truth).abs() / truth).max() < 1e-5
    assert (out[0] == 0).all()


@needs_extension
def test_what_no_kernel_reads_goes_to_pytorch(monkeypatch):
    table, ids, gradients = lookups(40, 8, [(5, 7), (5,)])
    expected = definition(table.double(), ids, [g.double() for g in gradients])
    monkeypatch.setattr(extension.load(), "table_gradient", None)
    got = gradient(table.double(), ids, [g.double() for g in gradients])
    torch.testing.assert_close(got, expected)
    short = gradient(table, [part.int() for part in ids], gradients)
    torch.testing.assert_close(short.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_need_not_be_contiguous():
    table, ids, gradients = lookups(40, 8, [(6, 7), (6,)])
    expected = gradient(table, ids, gradients)
    spread = [g.transpose(0, -1).contiguous().transpose(0, -1) for g in gradients]
    turned = [part.t().contiguous().t() for part in ids]
    assert torch.equal(gradient(table, turned, spread), expected)


@needs_extension
@pytest.mark.parametrize("value", [-1, 7])
def test_ids_out_of_range_are_refused(value):
    out = torch.zeros(7, 4).numpy()
    ids = [torch.tensor([0, 3]).numpy(), torch.tensor([6, value]).numpy()]
    with pytest.raises(ValueError, match=rf"0 <= id < 7, got {value}"):
        extension.load().table_gradient(ids, [torch.zeros(2, 4).numpy()] * 2, out, 2)


@needs_extension
def test_lists_and_shapes_must_agree():
    ids, rows = torch.tensor([0, 3]).numpy(), torch.zeros(2, 4).numpy()
    out = torch.zeros(7, 4).numpy()
    table_gradient = extension.load().table_gradient
    with pytest.raises(ValueError, match="as many, got 1 and 2"):
        table_gradient([ids], [rows, rows], out, 1)
    with pytest.raises(ValueError, match="gradients"):
        table_gradient([ids], [torch.zeros(3, 4).numpy()], out, 1)
    with pytest.raises(ValueError, match="gradients"):
        table_gradient([ids], [out[:2]], out, 1)
