"""item_ranking: every backend against brute force; ties, exclusions, consistency."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmrec_fast.ops import item_topk, target_rank
from fmrec_fast.testing import assert_close_to_truth

pytestmark = pytest.mark.op("item_ranking")


def brute_force(scores: Tensor, exclude: Tensor | None) -> list[list[int]]:
    """The ids of every row, best first, ties towards the lower id; excluded ones left out."""
    rows = scores.tolist()
    banned = [set() for _ in rows] if exclude is None else [set(row) for row in exclude.tolist()]
    return [
        sorted((i for i in range(len(row)) if i not in out), key=lambda i: (-row[i], i))
        for row, out in zip(rows, banned)
    ]


def integers(batch: int, width: int, items: int, seed: int) -> tuple[Tensor, Tensor]:
    """Small integers: many ties, and every order of summation is exact."""
    g = torch.Generator().manual_seed(seed)
    rep = torch.randint(-2, 3, (batch, width), generator=g).float()
    return rep, torch.randint(-2, 3, (items, width), generator=g).float()


def draw_exclusions(batch: int, items: int, count: int, seed: int) -> Tensor | None:
    if count == 0:
        return None
    g = torch.Generator().manual_seed(seed)
    return torch.randint(-1, items, (batch, count), generator=g)


def check(place, rep, weight, k, exclude):
    scores = rep @ weight.T
    expected = brute_force(scores, exclude)
    there = (None,) if exclude is None else place.put(exclude)
    with place.forced("item_ranking"):
        values, ids = (t.cpu() for t in item_topk(*place.put(rep, weight), k, exclude=there[0]))
    assert values.shape == ids.shape == (len(rep), k)
    assert ids.dtype == torch.int64 and values.dtype == torch.float32
    for row, order in enumerate(expected):
        found = min(k, len(order))
        assert ids[row, :found].tolist() == order[:found]
        assert torch.equal(values[row, :found], scores[row][order[:found]])
        assert (values[row, found:] == -torch.inf).all() and (ids[row, found:] == -1).all()
    for target in {0, weight.shape[0] // 2, weight.shape[0] - 1}:
        wanted = []
        for row in range(len(rep)):
            before = (scores[row] > scores[row, target]).tolist()
            ties = (scores[row, :target] == scores[row, target]).tolist()
            better = {i for i, yes in enumerate(before) if yes}
            better |= {i for i, yes in enumerate(ties) if yes}
            better -= set() if exclude is None else set(exclude[row].tolist())
            wanted.append(1 + len(better))
        targets = torch.full((len(rep),), target)
        with place.forced("item_ranking"):
            ranks = target_rank(*place.put(rep, weight, targets), exclude=there[0]).cpu()
        assert ranks.tolist() == wanted


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_against_brute_force(place, data):
    batch, items = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 40))
    width, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 2**20))
    k = data.draw(st.integers(1, items))
    exclude = draw_exclusions(batch, items, data.draw(st.integers(0, items + 2)), seed)
    check(place, *integers(batch, width, items, seed), k, exclude)


@pytest.mark.parametrize("shape", [(5, 96, 1009), (1, 36, 4099), (0, 36, 61), (3, 128, 61)])
@pytest.mark.parametrize("excluded", [0, 30])
def test_awkward_sizes(place, shape, excluded):
    exclude = draw_exclusions(shape[0], shape[2], excluded, 1)
    check(place, *integers(*shape, seed=1), min(20, shape[2]), exclude)


def test_k_of_all_items(place):
    check(place, *integers(4, 8, 61, 3), 61, draw_exclusions(4, 61, 20, 2))


def test_zeros_of_both_signs_are_ties(place):
    rep = torch.tensor([[1.0], [-1.0]])
    check(place, rep, torch.tensor([[-0.0], [0.0], [-0.0], [1.0], [0.0]]), 5, None)


def test_all_scores_equal(place):
    check(place, torch.ones(2, 3), torch.ones(130, 3), 130, None)


def test_all_items_excluded(place):
    check(place, *integers(2, 3, 7, 1), 3, torch.arange(7).repeat(2, 1))


def test_exclusions_of_width_0(place):
    check(place, *integers(2, 3, 7, 1), 3, torch.zeros(2, 0, dtype=torch.int64))


def test_non_contiguous_inputs(place):
    rep, weight = (t.T.contiguous().T for t in integers(5, 36, 61, 1))
    exclude = draw_exclusions(5, 61, 9, 4).T.contiguous().T
    assert not any(t.is_contiguous() for t in (rep, weight, exclude))
    check(place, rep, weight, 10, exclude)


def test_parameters_that_want_gradients(place):
    rep, weight = place.put(*integers(5, 36, 61, 1))
    target = torch.arange(5, device=place.device)
    with place.forced("item_ranking"):
        expected = (*item_topk(rep, weight, 7), target_rank(rep, weight, target))
        weight.requires_grad_()
        got = (*item_topk(rep, weight, 7), target_rank(rep, weight, target))
    for a, b in zip(got, expected):
        assert torch.equal(a, b)


def floats(batch: int, width: int, items: int, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(batch, width, generator=g), torch.randn(items, width, generator=g)


@pytest.mark.parametrize("shape", [(5, 96, 1009), (1, 36, 4099), (3, 128, 61)])
def test_scores_against_float64(place, shape):
    rep, weight = floats(*shape, seed=2)
    with place.forced("item_ranking"):
        values, ids = (t.cpu() for t in item_topk(*place.put(rep, weight), 20))
    assert (values[:, 1:] <= values[:, :-1]).all()
    truth = rep.double() @ weight.double().T
    same = (rep @ weight.T).gather(1, ids)
    assert_close_to_truth(values, same, truth.gather(1, ids), name="scores")
    assert_close_to_truth(
        values, (rep @ weight.T).topk(20).values, truth.topk(20).values, name="best scores"
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**20), excluded=st.integers(0, 50), k=st.integers(1, 61))
def test_rank_agrees_with_topk(place, seed, excluded, k):
    rep, weight = place.put(*floats(4, 24, 61, seed))
    exclude = draw_exclusions(4, 61, excluded, seed)
    if exclude is not None:
        (exclude,) = place.put(exclude)
    with place.forced("item_ranking"):
        values, ids = item_topk(rep, weight, k, exclude=exclude)
        for place_of in range(k):
            there = ids[:, place_of] >= 0
            ranks = target_rank(rep, weight, ids[:, place_of].clamp(min=0), exclude=exclude)
            assert (ranks[there] == place_of + 1).all()


def test_permutation_of_items(place):
    rep, weight = floats(5, 36, 1009, 6)
    order = torch.randperm(1009, generator=torch.Generator().manual_seed(1))
    with place.forced("item_ranking"):
        _, ids = item_topk(*place.put(rep, weight), 30)
        _, shuffled = item_topk(*place.put(rep, weight[order]), 30)
    assert torch.equal(order[shuffled.cpu()], ids.cpu())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rep": torch.zeros(2)}, ValueError, r"rep must be .*got \(2,\)"),
        ({"item_weight": torch.zeros(7, 5)}, ValueError, r"item_weight .*got \(7, 5\)"),
        ({"item_weight": torch.zeros(7, 4).double()}, TypeError, "torch.float64"),
        ({"k": 0}, ValueError, "k must be in .*V = 7, got 0"),
        ({"k": 8}, ValueError, "got 8"),
        ({"exclude": torch.zeros(3, 1).long()}, ValueError, r"exclude .*got \(3, 1\)"),
        ({"exclude": torch.zeros(2, 1)}, TypeError, "exclude must be int64, got torch.float32"),
        ({"exclude": torch.tensor([[1], [7]])}, ValueError, "got 7"),
        ({"exclude": torch.tensor([[1], [-2]])}, ValueError, "got -2"),
    ],
)
def test_bad_inputs_of_topk_are_named(change, error, message):
    arguments = {"rep": torch.zeros(2, 4), "item_weight": torch.zeros(7, 4), "k": 3}
    with pytest.raises(error, match=message):
        item_topk(**{**arguments, **change})


@pytest.mark.parametrize(
    "target, error, message",
    [
        (torch.tensor([0, 7]), ValueError, "got 7"),
        (torch.tensor([-1, 0]), ValueError, "got -1"),
        (torch.tensor([[0], [1]]), ValueError, r"got \(2, 1\)"),
        (torch.zeros(2), TypeError, "target must be int64, got torch.float32"),
    ],
)
def test_bad_targets_are_named(target, error, message):
    with pytest.raises(error, match=message):
        target_rank(torch.zeros(2, 4), torch.zeros(7, 4), target)


def test_nan_counts_against_the_target(place):
    items = torch.tensor([[1.0], [2.0], [torch.nan], [0.5]])
    with place.forced("item_ranking"):
        ranks = target_rank(*place.put(torch.ones(3, 1), items, torch.tensor([1, 2, 3])))
    assert ranks.tolist() == [2, 4, 4]
