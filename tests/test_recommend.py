"""Recommending from ragged histories."""

from __future__ import annotations

import importlib

import pytest
import torch

from fmrec_fast import Recommendations, recommend, scores
from fmrec_fast.data.batches import pad_histories

# The package's attribute of this name is the function.
module = importlib.import_module("fmrec_fast.recommend")
HISTORIES = [
    [3],
    [5, 9, 5, 60],
    list(range(1, 40)),
    [7, 8],
    [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
]


@pytest.fixture
def model(small_model):
    return small_model().eval()


def brute_force(model, histories, k, seed, excluded=None):
    """All scores, padding and excluded ids struck out, sorted."""
    table = scores(model, pad_histories(histories, 12, 61), seed=seed)
    table[:, 0] = -torch.inf
    for row, ids in enumerate(excluded or []):
        table[row, list(ids)] = -torch.inf
    values, ids = table.sort(dim=1, descending=True, stable=True)
    return values[:, :k], ids[:, :k]


def check(got, expected):
    assert isinstance(got, Recommendations)
    assert got.ids.dtype == torch.int64 and got.scores.dtype == torch.float32
    torch.testing.assert_close(got.scores, expected[0], atol=1e-5, rtol=1e-5)
    found = expected[0] > -torch.inf
    assert torch.equal(got.ids[found], expected[1][found])


def test_ragged_histories(model):
    """Short ones, longer ones than max_len, repeated items, a single item."""
    check(recommend(model, HISTORIES, 10, seed=5), brute_force(model, HISTORIES, 10, 5))
    tuples = tuple(tuple(history) for history in HISTORIES)
    check(recommend(model, tuples, 10, seed=5), brute_force(model, HISTORIES, 10, 5))


def test_only_the_recent_items_count(model):
    long = [60, 59, 58, *range(1, 13)]
    a, b = (recommend(model, [h], 10, seed=5) for h in (long, long[-12:]))
    assert torch.equal(a.ids, b.ids) and torch.equal(a.scores, b.scores)


def test_unseen_users_need_nothing_but_a_history(model):
    """A user is a row of histories; the name in `rows` only keys the noise."""
    one = recommend(model, [[7, 8]], 5, seed=5, rows=torch.tensor([3]))
    among = recommend(model, HISTORIES, 5, seed=5)
    assert torch.equal(one.ids[0], among.ids[3])
    stranger = recommend(model, [[7, 8]], 5, seed=5, rows=torch.tensor([10**12]))
    assert stranger.ids.shape == (1, 5)


def test_seen_items_can_be_left_out(model):
    got = recommend(model, HISTORIES, 20, seed=5, exclude_seen=True)
    check(got, brute_force(model, HISTORIES, 20, 5, HISTORIES))
    for ids, history in zip(got.ids.tolist(), HISTORIES):
        assert not set(ids) & set(history)  # of the whole history, not only its end


def test_further_exclusions(model):
    exclude = [[1, 2], [], [50, 51, 52], [60], [13]]
    got = recommend(model, HISTORIES, 15, seed=5, exclude=exclude)
    check(got, brute_force(model, HISTORIES, 15, 5, exclude))
    both = [[*a, *b] for a, b in zip(HISTORIES, exclude)]
    got = recommend(model, HISTORIES, 15, seed=5, exclude=exclude, exclude_seen=True)
    check(got, brute_force(model, HISTORIES, 15, 5, both))


def test_padding_is_never_recommended(model):
    with torch.no_grad():
        model.item_embeddings.weight[0] *= 1000  # it would win or lose by far
    got = recommend(model, HISTORIES, 60, seed=5)
    assert (got.ids > 0).all() and torch.isfinite(got.scores).all()
    for row in got.ids.tolist():
        assert sorted(row) == list(range(1, 61))


def test_excess_scores_are_minus_infinity(model):
    everything_but_two = [list(range(1, 59))]
    got = recommend(model, [[3]], 5, seed=5, exclude=everything_but_two)
    assert set(got.ids[0, :2].tolist()) == {59, 60}
    assert torch.isfinite(got.scores[0, :2]).all()
    assert (got.scores[0, 2:] == -torch.inf).all()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_batch_size_does_not_matter(model, monkeypatch, size):
    options = {"seed": 5, "exclude_seen": True, "exclude": [[1], [], [50], [], [20, 21, 22]]}
    expected = recommend(model, HISTORIES, 10, **options)
    monkeypatch.setattr(module, "BATCH", size)
    got = recommend(model, HISTORIES, 10, **options)
    assert torch.equal(got.ids, expected.ids)
    torch.testing.assert_close(got.scores, expected.scores, atol=1e-5, rtol=1e-5)


def test_one_drawn_seed_serves_all_batches(model, monkeypatch):
    torch.manual_seed(8)
    expected = recommend(model, HISTORIES, 10)
    monkeypatch.setattr(module, "BATCH", 2)
    torch.manual_seed(8)
    assert torch.equal(recommend(model, HISTORIES, 10).ids, expected.ids)


def test_steps(model):
    got = recommend(model, HISTORIES, 10, seed=5, steps=2)
    model.fm.sample_N = 2
    check(got, brute_force(model, HISTORIES, 10, 5))


def test_no_users(model):
    for options in ({}, {"exclude": [], "exclude_seen": True}):
        got = recommend(model, [], 10, seed=5, **options)
        assert got.ids.shape == got.scores.shape == (0, 10)


@pytest.mark.parametrize(
    "histories, options, message",
    [
        ([[1], []], {}, "history 1 is empty"),
        ([[1], [-4]], {}, "history 1 .*-4"),
        ([[0]], {}, "history 0 .*item id 0"),
        ([[1], [2, 61]], {}, r"history 1 .*61.*1\.\.60"),
        ([[61] + [1] * 50], {}, "61"),  # in the part that is cut off
        ([[1]], {"k": 0}, r"k must be in 1 \.\. 60.*got 0"),
        ([[1]], {"k": 61}, "got 61"),
        ([], {"k": 61}, "got 61"),
        ([[1], [2]], {"exclude": [[3]]}, "for each of 2 histories, got 1"),
        ([[1]], {"exclude": [[61]]}, "got 61"),
        ([[1]], {"exclude": [[-2]]}, "got -2"),
        ([[1]], {"seed": -7}, "got -7"),
        ([[1]], {"rows": torch.arange(2)}, r"rows must be .*got \(2,\)"),
        ([[1]], {"steps": 0}, "got 0"),
    ],
)
def test_bad_inputs_are_named(model, histories, options, message):
    with pytest.raises(ValueError, match=message):
        recommend(model, histories, **options)
