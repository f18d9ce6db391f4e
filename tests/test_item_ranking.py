"""item_ranking: every backend against brute force; ties, exclusions, consistency."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fmrec_fast.backend import Backend
from fmrec_fast.ops import item_topk, prepare_items, target_rank
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
    if place.backend is Backend.TRITON and data.draw(st.integers(0, 29)):
        return  # the interpreter takes its time: a few of the examples
    batch, items = data.draw(st.integers(0, 5)), data.draw(st.integers(1, 40))
    width, seed = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 2**20))
    k = data.draw(st.integers(1, items))
    exclude = draw_exclusions(batch, items, data.draw(st.integers(0, items + 2)), seed)
    check(place, *integers(batch, width, items, seed), k, exclude)


@pytest.mark.parametrize("shape", [(5, 96, 261), (1, 36, 517), (0, 36, 61), (3, 128, 61)])
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


@pytest.mark.parametrize("shape", [(5, 96, 261), (1, 36, 517), (3, 128, 61)])
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


@pytest.mark.parametrize("seed, excluded, k", [(0, 0, 61), (1, 50, 61), (2, 7, 20), (3, 61, 1)])
def test_rank_agrees_with_topk(place, seed, excluded, k):
    """With doubled items, which tie, and a bias."""
    rep, weight = floats(3, 24, 61, seed)
    weight[30:] = weight[:31].clone()
    rep, weight, bias = place.put(rep, weight, floats(1, 61, 1, seed)[0][0].round())
    exclude = draw_exclusions(3, 61, excluded, seed)
    if exclude is not None:
        (exclude,) = place.put(exclude)
    with place.forced("item_ranking"):
        ids = item_topk(rep, weight, k, bias=bias, exclude=exclude)[1]
        there = ids >= 0
        ranks = target_rank(
            rep.repeat_interleave(k, 0),
            weight,
            ids.clamp(min=0).flatten(),
            bias=bias,
            exclude=None if exclude is None else exclude.repeat_interleave(k, 0),
        ).view(3, k)
    places = torch.arange(1, k + 1, device=ranks.device).expand(3, k)
    assert torch.equal(ranks[there], places[there])
    left_out = 0 if exclude is None else min(len(set(exclude[0].tolist()) - {-1}), 61)
    assert int(there[0].sum()) == min(k, 61 - left_out)


@pytest.mark.parametrize("width", [128, 33])
@pytest.mark.parametrize("batch", [1, 5])
def test_equal_items_tie_wherever_they_lie(place, batch, width):
    """A score's bits depend neither on the tile or lane of the item nor on the batch."""
    rep, few = floats(batch, width, 10, 5)
    which = torch.randint(0, 10, (397,), generator=torch.Generator().manual_seed(2))
    weight = few[which]
    with place.forced("item_ranking"):
        values, ids = (t.cpu() for t in item_topk(*place.put(rep, weight), 397))
    for row in range(batch):
        kinds = which[ids[row]]
        assert len(values[row].unique()) == 10
        # Equal items in one run, ids ascending.
        assert int((kinds[1:] != kinds[:-1]).sum()) == 9
        for kind in range(10):
            mine = ids[row][kinds == kind]
            assert torch.equal(mine, mine.sort().values)
    target = torch.full((batch,), 301)
    with place.forced("item_ranking"):
        ranks = target_rank(*place.put(rep, weight, target)).cpu()
    expected = [ids[row].tolist().index(301) + 1 for row in range(batch)]
    assert ranks.tolist() == expected


# The definition's products are PyTorch's, and so is their rounding.
@pytest.mark.op("item_ranking", backends=(Backend.CPP, Backend.TRITON))
def test_results_do_not_depend_on_the_batch(place):
    rep, weight = place.put(*floats(7, 96, 200, 8))
    target = torch.arange(7, device=rep.device)
    with place.forced("item_ranking"):
        whole = (*item_topk(rep, weight, 5), target_rank(rep, weight, target))
        alone = (
            *item_topk(rep[3:4], weight, 5),
            target_rank(rep[3:4], weight, target[3:4]),
        )
    for a, b in zip(whole, alone):
        assert torch.equal(a[3:4], b)


@pytest.mark.parametrize("items, k", [(300, 1), (1500, 1000)])
def test_few_and_many_of_the_best(place, items, k):
    """Scores that rise with the id: every item beats what was there before."""
    weight = torch.arange(items).float()[:, None] // 3
    rep = torch.tensor([[1.0], [-1.0]])
    with place.forced("item_ranking"):
        values, ids = (t.cpu() for t in item_topk(*place.put(rep, weight), k))
    for row in range(2):
        scores = (rep[row] * weight[:, 0]).tolist()
        order = sorted(range(items), key=lambda i: (-scores[i], i))[:k]
        assert ids[row].tolist() == order
        assert values[row].tolist() == [scores[i] for i in order]


@pytest.mark.parametrize("special", [torch.inf, -torch.inf])
def test_infinite_bias(place, special):
    """-inf is a score like others: such items come last, and before what is no item at all."""
    rep, weight = integers(3, 8, 70, 2)
    bias = torch.zeros(70)
    bias[[3, 60]] = special
    exclude = torch.tensor([[3, -1], [60, 3], [-1, -1]])
    with place.forced("item_ranking"):
        put = place.put(rep, weight, bias, exclude)
        values, ids = (t.cpu() for t in item_topk(*put[:2], 70, bias=put[2], exclude=put[3]))
    scores = rep @ weight.T + bias
    for row, order in enumerate(brute_force(scores, exclude)):
        assert ids[row].tolist() == order + [-1] * (70 - len(order))
        assert torch.equal(values[row, : len(order)], scores[row][order])


def test_nan_comes_first(place):
    """As in PyTorch's sort; ids ascending among them, and exclusions go without saying."""
    items = torch.tensor([[1.0], [torch.nan], [2.0], [-torch.nan], [torch.inf], [torch.nan]])
    exclude = torch.tensor([[1, 0], [-1, -1]])
    with place.forced("item_ranking"):
        put = place.put(torch.ones(2, 1), items, exclude)
        values, ids = (t.cpu() for t in item_topk(*put[:2], 6, exclude=put[2]))
    assert ids.tolist() == [[3, 5, 4, 2, -1, -1], [1, 3, 5, 4, 2, 0]]
    assert values[0].isnan().tolist() == [True] * 2 + [False] * 4
    assert values[1, 3:].tolist() == [torch.inf, 2.0, 1.0]


@pytest.mark.parametrize("excluded", [0, 9])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per-row"])
def test_candidates(place, shared, excluded):
    """Listed twice counts once, -1 counts for nothing."""
    rep, weight = integers(4, 12, 150, 7)
    bias = torch.arange(150).float() % 5
    g = torch.Generator().manual_seed(3)
    candidates = torch.randint(-1, 150, (90,) if shared else (4, 90), generator=g)
    exclude = draw_exclusions(4, 150, excluded, 3)
    put = place.put(rep, weight, bias, candidates)
    there = None if exclude is None else place.put(exclude)[0]
    with place.forced("item_ranking"):
        options = {"bias": put[2], "candidates": put[3], "exclude": there}
        values, ids = (t.cpu() for t in item_topk(*put[:2], 80, **options))
    scores = rep @ weight.T + bias
    for row, order in enumerate(brute_force(scores, exclude)):
        allowed = set((candidates if shared else candidates[row]).tolist())
        wanted = [i for i in order if i in allowed][:80]
        assert ids[row].tolist() == wanted + [-1] * (80 - len(wanted))
        assert values[row, : len(wanted)].tolist() == scores[row][wanted].tolist()
        assert (values[row, len(wanted) :] == -torch.inf).all()


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_index_gives_exact_scores_of_a_shortlist(place, dtype):
    rep, weight = floats(5, 48, 300, 4)
    bias = floats(1, 300, 1, 9)[0][0]
    exclude = draw_exclusions(5, 300, 20, 6)
    put = place.put(rep, weight, bias, exclude)
    index = prepare_items(put[1], dtype)
    with place.forced("item_ranking"):
        exact = item_topk(*put[:2], 10, bias=put[2], exclude=put[3])
        got = item_topk(*put[:2], 10, bias=put[2], exclude=put[3], index=index, oversample=6)
    assert torch.equal(got[1], exact[1])  # 60 of 300 hold the ten best here
    torch.testing.assert_close(got[0], exact[0])
    everything = item_topk(*put[:2], 200, index=index, oversample=3)  # 600 of 300
    with place.forced("item_ranking"):
        assert torch.equal(everything[1], item_topk(*put[:2], 200)[1])


def test_int8_scales_each_item():
    weight = torch.tensor([[1.0, -2.0], [0.0, 0.0], [1e-20, 1e-21]])
    index = prepare_items(weight, "int8")
    assert index.weight.tolist() == [[64, -127], [0, 0], [127, 13]]
    torch.testing.assert_close(index.weight * index.scale[:, None], weight, rtol=0.05, atol=0.01)
    assert prepare_items(weight).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_scored_in_float32(dtype):
    rep, weight = (t.to(dtype) for t in floats(3, 40, 90, 1))
    scores = rep.float() @ weight.float().T
    values, ids = item_topk(rep, weight, 4)
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, scores.topk(4).values)
    assert target_rank(rep, weight, ids[:, 2].contiguous()).tolist() == [3, 3, 3]


@pytest.mark.op("item_ranking", backends=(Backend.CPP,))
def test_many_threads_and_chunks_give_the_same(place):
    """Enough items for several chunks, rows for several blocks, on more threads than cores."""
    rep, weight = integers(300, 4, 5000, 11)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 5):
            torch.set_num_threads(count)
            with place.forced("item_ranking"):
                ranks = target_rank(rep, weight, torch.arange(300))
                results.append((*item_topk(rep, weight, 700), ranks))
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(*results):
        assert torch.equal(a, b)
    order = brute_force((rep @ weight.T)[:3], None)
    assert results[0][1][:3].tolist() == [row[:700] for row in order]


def test_chunks_of_the_definition(monkeypatch):
    from fmrec_fast.reference import item_ranking as definition

    rep, weight = integers(4, 6, 1000, 1)
    exclude = draw_exclusions(4, 1000, 30, 2)
    target = torch.tensor([0, 500, 999, 64])
    whole = definition.item_topk(rep, weight, 70, exclude=exclude)
    ranks = definition.target_rank(rep, weight, target, exclude=exclude)
    monkeypatch.setattr(definition, "CHUNK", 4 * 128)
    for a, b in zip(whole, definition.item_topk(rep, weight, 70, exclude=exclude)):
        assert torch.equal(a, b)
    assert torch.equal(ranks, definition.target_rank(rep, weight, target, exclude=exclude))


def test_registration():
    rep, weight = floats(3, 16, 70, 1)
    exclude, bias = draw_exclusions(3, 70, 4, 1), torch.zeros(70)
    ops, checks = torch.ops.fmrec_fast, ("test_schema", "test_faketensor")
    topk = (rep, weight, 5, None, bias, exclude, None)
    torch.library.opcheck(ops.item_topk.default, topk, test_utils=checks)
    rank = (rep, weight, torch.arange(3), bias, exclude)
    torch.library.opcheck(ops.target_rank.default, rank, test_utils=checks)


def test_compiles_without_a_break():
    rep, weight = floats(3, 16, 70, 1)
    exclude = draw_exclusions(3, 70, 4, 1)

    def step(rep, weight):
        values, ids = item_topk(rep * 2, weight, 5, exclude=exclude)
        return values, target_rank(rep * 2, weight, ids[:, 1].contiguous(), exclude=exclude)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(rep, weight), step(rep, weight)):
        assert torch.equal(a, b)


def test_permutation_of_items(place):
    rep, weight = floats(5, 36, 261, 6)
    order = torch.randperm(261, generator=torch.Generator().manual_seed(1))
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
        ({"bias": torch.zeros(6)}, ValueError, r"bias .*V = 7.*got \(6,\)"),
        ({"bias": torch.zeros(7).double()}, TypeError, "bias is torch.float64"),
        ({"candidates": torch.zeros(3, 4).long()}, ValueError, r"candidates .*got \(3, 4\)"),
        ({"candidates": torch.zeros(4)}, TypeError, "candidates must be int64"),
        ({"candidates": torch.tensor([1, 7, 2])}, ValueError, "candidates must be .*got 7"),
        ({"candidates": torch.tensor([1, 2])}, ValueError, "k must be in 1 .. C = 2, got 3"),
        ({"index": prepare_items(torch.ones(6, 4))}, ValueError, r"\(7, 4\), got \(6, 4\)"),
        (
            {"index": prepare_items(torch.ones(7, 4)), "oversample": 0},
            ValueError,
            "oversample must be at least 1, got 0",
        ),
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
