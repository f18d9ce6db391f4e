"""history_loss: every backend against the dense matrix, and the draw of its cells."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from fmrec_fast import noise
from fmrec_fast.backend import use_rng
from fmrec_fast.ops import history_loss
from fmrec_fast.reference.history_loss import distinct, history_cells, zero_cells
from fmrec_fast.testing import assert_close_to_truth, make_sequences

pytestmark = pytest.mark.op("history_loss")
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
