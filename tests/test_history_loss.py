"""history_loss: every backend against the dense matrix, and the draw of its cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmrec_fast import extension, noise
from fmrec_fast.backend import Backend, use_backend, use_rng
from fmrec_fast.ops import history_loss
from fmrec_fast.ops.history_loss import draw_cells
from fmrec_fast.reference import history_loss as reference
from fmrec_fast.reference.history_loss import WholeBatch, distinct, history_cells, zero_cells
from fmrec_fast.testing import assert_close_to_truth, make_sequences

pytestmark = pytest.mark.op("history_loss")
needs_cpp = pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))
EVERY = ("padding", "short", "long", "full")
SEED = torch.tensor(20240607)
SHAPES = [(1, 1, 7, 5), (5, 50, 61, 36), (2, 51, 1009, 96), (5, 12, 130, 33)]  # B, L, V, hidden


def multi_hot(sequence: Tensor, items: int) -> Tensor:
    r = torch.zeros(len(sequence), items, dtype=torch.float64)
    for row, ids in enumerate(sequence.tolist()):
        r[row, ids] = 1
    r[:, 0] = 0  # padding is no item of the history
    return r


def zeros_of(sequence: Tensor, items: int) -> Tensor:
    """All zero cells in row-major order, one by one: int64 [Z, 2]."""
    return (multi_hot(sequence, items) == 0).nonzero()


def drawn_cells(sequence: Tensor, items: int, mask_ratio: float, seed: Tensor = SEED) -> Tensor:
    """The stream's draw by its sentence: int64 [n0, 2], duplicates and all."""
    zeros, ones = zeros_of(sequence, items), int(multi_hot(sequence, items).sum())
    count = min(len(zeros), int(ones * mask_ratio))
    return zeros[noise.wide_words(seed, count) % len(zeros)]


def inputs(batch, length, items, hidden, histories=EVERY):
    g = torch.Generator().manual_seed(batch + length + items)
    sequence = make_sequences(batch, length, items, 3, histories=histories).sequence
    shapes = [(batch, hidden), (items, hidden), (items,)]
    return *(torch.randn(shape, generator=g) for shape in shapes), sequence


def dense(hidden, weight, bias, sequence, cells, upstream):
    leaves = [t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    r = multi_hot(sequence, len(bias)).to(hidden.dtype)
    used = r.clone()
    used[cells[:, 0], cells[:, 1]] = 1
    decoded = leaves[0] @ leaves[1].T + leaves[2]
    loss = ((decoded - r) ** 2 * used).sum() / decoded.numel()
    return loss, *torch.autograd.grad(loss, leaves, upstream)


def check(place, hidden, weight, bias, sequence, used, **options):
    upstream = torch.tensor(-1.7)
    tensors = (hidden, weight, bias)
    truth = dense(*(t.double() for t in tensors), sequence, used, upstream.double())
    same = dense(*tensors, sequence, used, upstream)
    leaves = [t.detach().to(place.device).requires_grad_() for t in tensors]
    there, gradient = place.put(sequence, upstream)
    with place.forced("history_loss"):
        loss = history_loss(*leaves, there, **options)
        got = (loss, *torch.autograd.grad(loss, leaves, gradient))
    for name, *three in zip(("loss", "dhidden", "dweight", "dbias"), got, same, truth):
        assert_close_to_truth(three[0].cpu(), *three[1:], name=name)


@pytest.mark.parametrize("mask_ratio", [0.0, 1.0, 2.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_drawn_cells_against_the_dense_matrix(place, shape, mask_ratio):
    tensors = inputs(*shape)
    cells = drawn_cells(tensors[3], shape[2], mask_ratio)
    check(place, *tensors, cells, mask_ratio=mask_ratio, seed=SEED.to(place.device))


@pytest.mark.parametrize("shape", SHAPES)
def test_given_cells_against_the_dense_matrix(place, shape):
    """Given cells may lie on ones, on padding's column and may repeat."""
    tensors = inputs(*shape)
    g = torch.Generator().manual_seed(5)
    cells = torch.stack([torch.randint(shape[i], (40,), generator=g) for i in (0, 2)], 1)
    cells = torch.cat((cells, cells[:7], torch.zeros(1, 2, dtype=torch.int64)))
    check(place, *tensors, cells, cells=cells.to(place.device))


def test_no_given_cells(place):
    tensors = inputs(5, 12, 61, 36)
    none = torch.zeros(0, 2, dtype=torch.int64)
    check(place, *tensors, none, cells=none.to(place.device))


def test_all_cells_are_used_when_the_ratio_saturates(place):
    """Draws are with replacement, so even n0 = number of zeros leaves some out."""
    tensors = inputs(3, 5, 7, 4, ["long", "full"])
    cells = drawn_cells(tensors[3], 7, 1000.0)
    assert len(cells) == len(zeros_of(tensors[3], 7))
    check(place, *tensors, cells, mask_ratio=1000.0, seed=SEED.to(place.device))


def test_all_padding(place):
    tensors = inputs(4, 12, 61, 36, ["padding"])
    check(place, *tensors, torch.zeros(0, 2, dtype=torch.int64), seed=SEED.to(place.device))


def test_non_contiguous_inputs(place):
    hidden, weight, bias, sequence = inputs(5, 12, 61, 36)
    hidden, weight, sequence = (t.T.contiguous().T for t in (hidden, weight, sequence))
    bias = torch.stack((bias, bias), 1)[:, 0]
    cells = drawn_cells(sequence, 61, 1.0).T.contiguous().T
    assert not any(t.is_contiguous() for t in (hidden, weight, bias, sequence, cells))
    check(place, hidden, weight, bias, sequence, cells, cells=cells.to(place.device))


def test_only_some_gradients(place):
    *tensors, sequence = place.put(*inputs(5, 12, 61, 36))
    seed = SEED.to(place.device)
    with place.forced("history_loss"):
        full = [t.clone().requires_grad_() for t in tensors]
        wanted = torch.autograd.grad(history_loss(*full, sequence, seed=seed), full)
        for i in range(3):
            some = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
            (got,) = torch.autograd.grad(history_loss(*some, sequence, seed=seed), some[i])
            torch.testing.assert_close(got, wanted[i])


# --- what the CPU leaves out: cells out of use ------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, (3, 5, 7, 4), (0, 5, 61, 36)])
def test_cells_out_of_use_are_passed_over(place, shape):
    """The cells as a device holds them, where nobody looks which are in use; the operator that
    torch.compile sees."""
    hidden, weight, bias, sequence = inputs(*shape)
    cells = drawn_cells(sequence, shape[2], 1.0)
    upstream = torch.tensor(-1.7)
    held = history_cells(sequence, shape[2], seed=SEED)
    assert not shape[0] or not held.use.all(), "or nothing is passed over"
    truth = dense(*(t.double() for t in (hidden, weight, bias)), sequence, cells, upstream.double())
    same = dense(hidden, weight, bias, sequence, cells, upstream)
    if shape[0] == 0:
        truth, same = ([torch.nan_to_num(t) for t in part] for part in (truth, same))
    leaves = [t.to(place.device).requires_grad_() for t in (hidden, weight, bias)]
    with place.forced("history_loss"):
        loss, residual = torch.ops.fmrec_fast.history_loss(*leaves, *place.put(*held))
        got = (loss, *torch.autograd.grad(loss, leaves, upstream.to(place.device)))
    assert (residual.cpu()[~held.use] == 0).all()
    for name, *three in zip(("loss", "dhidden", "dweight", "dbias"), got, same, truth):
        assert_close_to_truth(three[0].cpu(), *three[1:], name=name)


def test_gradients_are_the_same_to_the_bit(place):
    hidden, weight, bias, sequence = place.put(*inputs(5, 50, 61, 36))
    seed = SEED.to(place.device)
    runs = []
    for _ in range(2):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        with place.forced("history_loss"):
            loss = history_loss(*leaves, sequence, seed=seed)
            runs.append((loss, *torch.autograd.grad(loss, leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("histories", [EVERY, ["padding"]], ids=["cells", "no-cell"])
def test_sparse_gradients(place, histories):
    """The touched rows, each once, and what the dense gradient holds there."""
    tensors = inputs(5, 12, 1009, 36, histories)
    *there, sequence = place.put(*tensors)
    seed = SEED.to(place.device)
    found = {}
    with place.forced("history_loss"):
        for sparse in (False, True):
            leaves = [t.clone().requires_grad_() for t in there]
            loss = history_loss(*leaves, sequence, seed=seed, sparse_grad=sparse)
            loss.backward()
            found[sparse] = (loss.detach(), *(leaf.grad for leaf in leaves))
    assert torch.equal(found[True][0], found[False][0])
    torch.testing.assert_close(found[True][1], found[False][1])
    columns = drawn_cells(tensors[3], 1009, 1.0)[:, 1]
    columns = torch.cat((columns, tensors[3][tensors[3] > 0])).unique()
    for sparse, plain in zip(found[True][2:], found[False][2:]):
        assert sparse.is_sparse and sparse.shape == plain.shape
        torch.testing.assert_close(sparse.to_dense(), plain)
        assert torch.equal(sparse.coalesce().indices()[0].cpu(), columns)
        if place.backend is not Backend.REFERENCE:
            assert sparse._values().shape[0] == len(columns)


def test_only_some_sparse_gradients(place):
    *tensors, sequence = place.put(*inputs(5, 12, 61, 36))
    seed = SEED.to(place.device)
    with place.forced("history_loss"):
        full = [t.clone().requires_grad_() for t in tensors]
        history_loss(*full, sequence, seed=seed, sparse_grad=True).backward()
        for i in range(3):
            some = [t.clone().requires_grad_(i == j) for j, t in enumerate(tensors)]
            history_loss(*some, sequence, seed=seed, sparse_grad=True).backward()
            torch.testing.assert_close(some[i].grad.to_dense(), full[i].grad.to_dense())


def test_cost_is_that_of_the_cells():
    """At the published size: FLOPs a fiftieth of the dense product's, and no memory of size V."""
    batch, length, items = 512, 50, 12102
    sequence = make_sequences(batch, length, items, 1).sequence
    cells = history_cells(sequence, items, seed=SEED)
    assert len(cells.use) == 2 * batch * length
    assert 50 * int(cells.use.sum()) < batch * items, "dot products of length Hd, each three times"
    with torch.device("meta"):
        leaves = [torch.empty(s, requires_grad=True) for s in ((batch, 8), (10**9, 8), (10**9,))]
    largest = Largest()
    with use_backend("reference"), largest:
        loss = history_loss(*leaves, sequence.to("meta"), seed=SEED.to("meta"), sparse_grad=True)
        loss.backward()
    assert largest.elements == 2 * batch * length * 8
    assert leaves[1].grad.shape == (10**9, 8)


class Largest(TorchDispatchMode):
    """The most elements of any dense result; looking at one's values is an error on 'meta'."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor) and not result.is_sparse:
                self.elements = max(self.elements, result.numel())
        return results


# --- torch.compile ---------------------------------------------------------------------------


def test_the_registered_operators(place):
    hidden, weight, bias, sequence = inputs(5, 12, 61, 36)
    leaves = [t.to(place.device).requires_grad_() for t in (hidden, weight, bias)]
    cells = place.put(*history_cells(sequence, 61, seed=SEED))
    with use_backend(place.backend):
        torch.library.opcheck(torch.ops.fmrec_fast.history_loss.default, (*leaves, *cells))
        plain = [leaf.detach() for leaf in leaves]
        _, residual = torch.ops.fmrec_fast.history_loss(*plain, *cells)
        grad = torch.tensor(0.5, device=place.device)
        arguments = (grad, *plain[:2], residual, cells[0], cells[1], cells[3])
        torch.library.opcheck(torch.ops.fmrec_fast.history_loss_backward.default, arguments)


def test_compiled_without_a_break(place):
    tensors = inputs(5, 12, 61, 36)
    *there, sequence, seed = place.put(*tensors, SEED)
    leaves = [[t.clone().requires_grad_() for t in there] for _ in range(2)]
    compiled = torch.compile(history_loss, fullgraph=True, backend="aot_eager")
    with use_backend(place.backend):
        losses = [
            run(*own, sequence, seed=seed) for run, own in zip((history_loss, compiled), leaves)
        ]
    gradients = [torch.autograd.grad(loss, own) for loss, own in zip(losses, leaves)]
    for a, b in zip((losses[0], *gradients[0]), (losses[1], *gradients[1])):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [(0, 12), (3, 0)])
def test_nothing_to_decode_gives_0(shape):
    hidden, weight, bias, _ = inputs(shape[0], 5, 61, 36)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    loss = history_loss(*leaves, torch.zeros(shape, dtype=torch.int64))
    loss.backward()
    assert loss.shape == () and loss == 0
    assert all((leaf.grad == 0).all() for leaf in leaves)


# --- the cells ------------------------------------------------------------------------------


def used_cells(sequence: Tensor, items: int, **options) -> tuple[list, list]:
    """(ones, zeros) that are used, in the order they stand."""
    cells = history_cells(sequence, items, **options)
    ones, zeros = [], []
    for row, column, label, use in zip(*(part.tolist() for part in cells)):
        if use:
            (ones if label == 1 else zeros).append((row, column))
    return ones, zeros


SEQUENCES = [
    make_sequences(4, 6, 9, 1, histories=EVERY).sequence,
    make_sequences(3, 20, 5, 2, histories=["full"]).sequence,  # every item but padding is there
    torch.tensor([[0, 0, 8], [3, 0, 3], [8, 7, 6]]),  # padding in the middle
    torch.tensor([[0, 0]]),
    torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]]),
    torch.tensor([[0], [1], [8]]),
]


@pytest.mark.parametrize("sequence", SEQUENCES, ids=range(len(SEQUENCES)))
def test_zero_cells_are_listed_exhaustively(sequence):
    expected = zeros_of(sequence, 9)
    ids, count = distinct(sequence, 9)
    found = torch.stack(zero_cells(torch.arange(len(expected)), ids, count, 9), 1)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.5, 1.0, 2.5, 1e6])
@pytest.mark.parametrize("sequence", SEQUENCES, ids=range(len(SEQUENCES)))
def test_cells_are_the_ones_and_the_draw_without_duplicates(sequence, mask_ratio):
    if mask_ratio == 1e6:  # n0 is the number of zeros long before
        mask_ratio = 500.0
    ones, zeros = used_cells(sequence, 9, mask_ratio=mask_ratio, seed=SEED)
    wanted = [tuple(cell) for cell in drawn_cells(sequence, 9, mask_ratio).tolist()]
    assert ones == [tuple(cell) for cell in multi_hot(sequence, 9).nonzero().tolist()]
    assert len(zeros) == len(set(zeros))
    assert set(zeros) == set(wanted)
    assert not set(zeros) & set(ones)


@pytest.mark.parametrize("mask_ratio", [0.0, 1.0, 2.5, 500.0])
@pytest.mark.parametrize("sequence", SEQUENCES, ids=range(len(SEQUENCES)))
def test_published_cells_are_torch_randint_into_the_list(sequence, mask_ratio):
    listed = zeros_of(sequence, 9)
    count = min(len(listed), int(int(multi_hot(sequence, 9).sum()) * mask_ratio))
    torch.manual_seed(3)
    wanted = listed[torch.randint(0, len(listed), (count,))]
    after = torch.rand(())
    torch.manual_seed(3)
    _, zeros = used_cells(sequence, 9, mask_ratio=mask_ratio, published=True)
    assert set(zeros) == {tuple(cell) for cell in wanted.tolist()}
    assert torch.rand(()) == after  # and torch's generator stands where it would


def test_published_rng_draws_the_published_cells(place):
    tensors = inputs(5, 12, 61, 36)
    torch.manual_seed(3)
    listed = zeros_of(tensors[3], 61)
    count = int(multi_hot(tensors[3], 61).sum())
    cells = listed[torch.randint(0, len(listed), (count,))]
    torch.manual_seed(3)
    with use_rng("published"):
        check(place, *tensors, cells)


def test_every_zero_cell_is_equally_likely():
    sequence = torch.tensor([[0, 2, 5, 2], [0, 0, 0, 0], [6, 1, 3, 4]])
    listed = [tuple(cell) for cell in zeros_of(sequence, 7).tolist()]
    hits = dict.fromkeys(listed, 0)
    for seed in range(3000):  # one draw each: n0 = int(6 ones / 6)
        _, zeros = used_cells(sequence, 7, mask_ratio=1 / 6, seed=torch.tensor(seed))
        assert len(zeros) == 1
        hits[zeros[0]] += 1
    assert stats.chisquare(list(hits.values())).pvalue > 0.001


def test_number_of_distinct_cells():
    """n0 draws with replacement from Z leave Z (1 - (1 - 1/Z)^n0) distinct ones on average."""
    sequence = torch.tensor([[0, 2, 5, 2], [0, 0, 0, 0], [6, 1, 3, 4]])
    counts = [
        len(used_cells(sequence, 7, mask_ratio=2.0, seed=torch.tensor(seed))[1])
        for seed in range(600)
    ]
    z, n0 = 15, 12
    miss = (1 - 1 / z) ** n0
    variance = z * miss + z * (z - 1) * (1 - 2 / z) ** n0 - (z * miss) ** 2
    mean = sum(counts) / len(counts)
    assert abs(mean - z * (1 - miss)) < 4 * math.sqrt(variance / len(counts))
    assert max(counts) <= n0


def test_seeds():
    tensors = inputs(5, 12, 61, 36)
    same = [history_loss(*tensors, seed=torch.tensor(5)) for _ in range(2)]
    assert same[0] == same[1]
    assert history_loss(*tensors, seed=torch.tensor(6)) != same[0]
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(history_loss(*tensors))
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"hidden": torch.zeros(2)}, ValueError, r"hidden must be .*got \(2,\)"),
        ({"weight": torch.zeros(7, 5)}, ValueError, r"weight must be .*H = 4.*got \(7, 5\)"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias must be .*V = 7.*got \(6,\)"),
        ({"bias": torch.zeros(7).double()}, TypeError, "bias is torch.float64"),
        ({"sequence": torch.zeros(3, 5).long()}, ValueError, r"sequence .*B = 2.*got \(3, 5\)"),
        ({"sequence": torch.zeros(2, 5)}, TypeError, "sequence must be int64, got torch.float32"),
        ({"sequence": torch.tensor([[1], [7]])}, ValueError, "sequence .*got 7"),
        ({"sequence": torch.tensor([[1], [-1]])}, ValueError, "sequence .*got -1"),
        ({"mask_ratio": -0.5}, ValueError, "mask_ratio must be at least 0, got -0.5"),
        ({"mask_ratio": float("nan")}, ValueError, "got nan"),
        ({"cells": torch.zeros(3, 3).long()}, ValueError, r"cells .*got \(3, 3\)"),
        ({"cells": torch.zeros(3, 2)}, TypeError, "cells must be int64, got torch.float32"),
        ({"cells": torch.tensor([[2, 0]])}, ValueError, "rows of cells .*got 2"),
        ({"cells": torch.tensor([[0, 7]])}, ValueError, "columns of cells .*got 7"),
        ({"cells": torch.tensor([[0, -1]])}, ValueError, "columns of cells .*got -1"),
        ({"seed": -3}, ValueError, "got -3"),
    ],
)
def test_bad_inputs_are_named(change, error, message):
    arguments = {
        "hidden": torch.zeros(2, 4),
        "weight": torch.zeros(7, 4),
        "bias": torch.zeros(7),
        "sequence": torch.tensor([[0, 1], [2, 3]]),
    }
    with pytest.raises(error, match=message):
        history_loss(**{**arguments, **change})


@pytest.mark.parametrize("ratio", [0.0, 0.5, 7.0])
def test_parts_of_a_batch_have_its_cells_together(ratio):
    """Each part draws over the whole matrix, of which it knows the counts of the other rows."""
    items, seed = 30, torch.tensor(77)
    sequence = make_sequences(11, 6, items, 1).sequence
    counts = distinct(sequence, items)[1]

    def used(cells, first=0):
        rows, columns, label = (part[cells.use] for part in cells[:3])
        return torch.stack((rows + first, columns, label.long()), 1).tolist()

    together = []
    for first, end in ((0, 4), (4, 9), (9, 11)):
        whole = WholeBatch(counts, first, end)
        part = history_cells(sequence[first:end], items, mask_ratio=ratio, seed=seed, whole=whole)
        together += used(part, first)
    assert sorted(together) == sorted(
        used(history_cells(sequence, items, mask_ratio=ratio, seed=seed))
    )


@needs_cpp
@pytest.mark.parametrize("mask_ratio", [0.0, 0.5, 1.0, 3.0, 500.0])
@pytest.mark.parametrize("items", [2, 9, 1009])
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (1, 50), (5, 1), (5, 51), (67, 12)], ids=str)
def test_native_cells_are_the_used_ones_of_the_definition(monkeypatch, shape, items, mask_ratio):
    g = torch.Generator().manual_seed(shape[0] + items)
    ids = torch.randint(0, items, shape, generator=g)
    for seed, sequence in ((SEED, ids), (SEED + 1, ids * (ids % 3 == 0)), (-SEED, 0 * ids)):
        sequence = sequence.T.contiguous().T
        held = history_cells(sequence, items, mask_ratio=mask_ratio, seed=seed)
        with monkeypatch.context() as patch:
            patch.setattr(reference, "history_cells", None)  # the definition cannot run
            cells = draw_cells(sequence, items, mask_ratio, seed)
        assert cells.use.all() and len(cells.use) == int(held.use.sum())
        for name in ("rows", "columns", "label"):
            expected = getattr(held, name)[held.use]
            torch.testing.assert_close(getattr(cells, name), expected, rtol=0, atol=0)


@needs_cpp
@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"sequence": np.zeros((2, 3), np.int32)}, TypeError, "sequence .* int64, got int32"),
        ({"sequence": np.zeros(6, np.int64)}, ValueError, r"2 dimensions, got shape \(6,\)"),
        ({"sequence": np.array([[0, 1], [7, 2]])}, ValueError, r"e\[1, 0\] .* id < 7, got 7"),
        ({"sequence": np.array([[0, -1], [3, 2]])}, ValueError, r"sequence\[0, 1\] .* got -1"),
        ({"num_items": 0}, ValueError, "num_items must be at least 1 .* got 0"),
        ({"num_items": 2**62}, ValueError, "num_items .* got 4611686018427387904"),
        ({"num_items": 7.0}, TypeError, "num_items must be an int .* got 7.0"),
        ({"mask_ratio": -0.5}, ValueError, "mask_ratio must be at least 0 .* got -0.5"),
        ({"mask_ratio": math.inf}, ValueError, "mask_ratio .* got inf"),
        ({"mask_ratio": 1e19}, ValueError, "mask_ratio .* got 1e[+]19"),
        ({"seed": 2**63}, ValueError, "seed .* got 9223372036854775808"),
    ],
)
def test_native_cells_refuse_bad_arguments(change, error, message):
    arguments = {"sequence": np.array([[0, 1], [6, 3]]), "num_items": 7, "mask_ratio": 1.0}
    with pytest.raises(error, match=message):
        extension.load().history_cells(**{**arguments, "seed": 3, **change})


def test_cells_that_64_bits_do_not_count_are_the_definitions():
    sequence = torch.tensor([[0, 2], [1, 1]])
    drawn = draw_cells(sequence, 3, math.inf, SEED)
    held = history_cells(sequence, 3, mask_ratio=math.inf, seed=SEED)
    assert all(torch.equal(a, b) for a, b in zip(drawn, held))


def test_all_cells_may_be_given():
    sequence = make_sequences(5, 6, 30, 2).sequence
    hidden, weight, bias = torch.randn(5, 4), torch.randn(30, 4), torch.randn(30)
    seed = torch.tensor(3)
    given = history_cells(sequence, 30, seed=seed)
    for name in ("reference", "auto"):
        with use_backend(name):
            drawn = history_loss(hidden, weight, bias, sequence, seed=seed)
            assert torch.equal(history_loss(hidden, weight, bias, sequence, cells=given), drawn)
