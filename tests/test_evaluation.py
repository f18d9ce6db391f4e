"""Metrics against their definition, and who is ranked against what."""

import math

import numpy as np
import pytest
import torch

from fmrec_fast import sample
from fmrec_fast.data import Dataset, EvaluationSamples, synthetic_dataset
from fmrec_fast.evaluation import evaluate, metrics_from_ranks, model_ranks, popularity_ranks

SETTINGS = {"item_num": 41, "hidden_size": 16, "max_len": 6, "num_blocks": 2, "last": 1}


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return synthetic_dataset(60, 40, 4, 8, seed=1)


@pytest.fixture
def model(small_model):
    # With the usual lam of 0.001 an untrained model ranks alike whatever the noise.
    return small_model(sample_N=2, lambda_uncertainty=0.5, **SETTINGS)


def brute_force(ranks: list[int], ks: tuple[int, ...]) -> dict[str, float]:
    """A list of places 1 .. 5000 of which exactly the target's has relevance 1."""
    found = {}
    for k in ks:
        hits, gains, reciprocals = [], [], []
        for rank in ranks:
            relevance = [int(place == rank) for place in range(1, k + 1)]
            hits.append(sum(relevance))
            gains.append(sum(r / math.log2(i + 2) for i, r in enumerate(relevance)))
            reciprocals.append(sum(r / (i + 1) for i, r in enumerate(relevance)))
        for name, values in (("HR", hits), ("NDCG", gains), ("MRR", reciprocals)):
            found[f"{name}@{k}"] = 100 * sum(values) / len(values)
    return found


def test_closed_forms():
    found = metrics_from_ranks(torch.tensor([1]), (1, 5))
    assert found == dict.fromkeys(("HR@1", "HR@5", "NDCG@1", "NDCG@5", "MRR@1", "MRR@5"), 100.0)
    found = metrics_from_ranks(torch.tensor([3]), (2, 3))
    assert found == pytest.approx(
        {"HR@2": 0, "HR@3": 100, "NDCG@2": 0, "NDCG@3": 50, "MRR@2": 0, "MRR@3": 100 / 3}
    )
    # Every place 1..n once: HR@K = K/n, MRR@K = H_K / n.
    found = metrics_from_ranks(torch.arange(1, 11), (4,))
    assert found["HR@4"] == pytest.approx(40)
    assert found["MRR@4"] == pytest.approx(100 * (1 + 1 / 2 + 1 / 3 + 1 / 4) / 10)


def test_metrics_against_their_definition():
    rng = np.random.default_rng(0)
    ranks = rng.integers(1, 60, 333)
    ks = (1, 2, 5, 10, 20, 59, 1000)  # the last: more than there are items
    found = metrics_from_ranks(torch.from_numpy(ranks), ks)
    assert found == pytest.approx(brute_force(ranks.tolist(), ks))
    assert found["HR@1000"] == 100.0
    assert found["MRR@1000"] == found["MRR@59"]


def test_published_averaging_weighs_a_short_last_batch_as_a_full_one():
    # 512 users of whom 128 hit, and a last batch of 4 users of whom 3 hit.
    ranks = torch.full((516,), 100)
    ranks[:128] = 1
    ranks[512:515] = 2
    by_user = metrics_from_ranks(ranks, (5,))
    published = metrics_from_ranks(ranks, (5,), averaging="published")
    assert by_user["HR@5"] == pytest.approx(100 * 131 / 516)
    assert published["HR@5"] == pytest.approx(100 * (128 / 512 + 3 / 4) / 2)
    assert published["MRR@5"] == pytest.approx(100 * (128 / 512 + 3 / 2 / 4) / 2)
    assert published["NDCG@5"] == pytest.approx(100 * (128 / 512 + 3 / math.log2(3) / 4) / 2)
    # Without a short batch there is no difference.
    whole = ranks[4:].repeat(2)
    assert metrics_from_ranks(whole, (5,)) == pytest.approx(
        metrics_from_ranks(whole, (5,), averaging="published")
    )


@pytest.mark.parametrize(
    ("ranks", "ks", "options", "message"),
    [
        ([], (5,), {}, "no user to evaluate"),
        ([1], (), {}, r"ks must be positive, got \[\]"),
        ([1], (5, 0), {}, r"ks must be positive, got \[5, 0\]"),
        ([1], (5,), {"averaging": "median"}, "averaging must be one of .* got 'median'"),
    ],
)
def test_metrics_refuse(ranks, ks, options, message):
    with pytest.raises(ValueError, match=message):
        metrics_from_ranks(torch.tensor(ranks, dtype=torch.int64), ks, **options)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_model_ranks_against_sorted_scores(model, dataset, split, exclude_seen):
    samples = EvaluationSamples(dataset, split, model.config.max_len)
    found = model_ranks(model, samples, seed=3, exclude_seen=exclude_seen)
    assert found.shape == (60,) and found.dtype == torch.int64
    held_out = 2 if split == "val" else 1
    for row in range(dataset.num_users):
        history = dataset.history(row).tolist()
        known, target = history[:-held_out], history[-held_out]
        sequence = torch.tensor([([0] * 6 + known)[-6:]])
        rep = sample(model, sequence, seed=3, rows=torch.tensor([row]))
        scores = model.fm_rep_pre(rep)[0].tolist()
        left = [i for i in range(41) if i == target or not exclude_seen or i not in known]
        # Another batch gives the last bits of a score another rounding, so near ties may swap.
        ahead = sum(scores[i] > scores[target] + 1e-4 for i in left)
        level = sum(abs(scores[i] - scores[target]) <= 1e-4 for i in left)
        assert ahead + 1 <= found[row] <= ahead + level
    assert len(found.unique()) > 5, "or the test shows little"


def test_seen_items_leave_the_ranking(model, dataset):
    samples = EvaluationSamples(dataset, "test", model.config.max_len)
    everything = model_ranks(model, samples, seed=0)
    unseen = model_ranks(model, samples, seed=0, exclude_seen=True)
    assert (unseen <= everything).all() and (unseen < everything).any()


def test_ranks_do_not_depend_on_the_batch_size(model, dataset):
    samples = EvaluationSamples(dataset, "test", model.config.max_len)
    whole = model_ranks(model, samples, seed=5)
    done = []
    parts = model_ranks(model, samples, seed=5, batch_size=7, progress=done.append)
    assert torch.equal(whole, parts)
    assert done == [7] * 8 + [4]
    assert not torch.equal(whole, model_ranks(model, samples, seed=6)), "the seed matters"


def test_ranks_follow_the_user_not_the_place(model, dataset):
    """Users too short to be evaluated do not shift the others' noise."""
    histories = [dataset.history(row).tolist() for row in range(20)]
    full = Dataset.from_histories(histories, item_ids=dataset.item_ids)
    histories[3] = histories[3][:2]  # no input before its validation item
    short = Dataset.from_histories(histories, item_ids=dataset.item_ids)
    a = model_ranks(model, EvaluationSamples(full, "val", 6), seed=1)
    b = model_ranks(model, EvaluationSamples(short, "val", 6), seed=1)
    assert len(a) == 20 and len(b) == 19
    assert torch.equal(torch.cat((a[:3], a[4:])), b)


@pytest.mark.parametrize("split", ["val", "test"])
@pytest.mark.parametrize("exclude_seen", [False, True])
def test_popularity_against_brute_force(dataset, split, exclude_seen):
    counts = [0] * dataset.item_num
    for row in range(dataset.num_users):
        for item in dataset.history(row).tolist()[:-2]:
            counts[item] += 1
    samples = EvaluationSamples(dataset, split, 6)
    expected = []
    held_out = 2 if split == "val" else 1
    for row in range(dataset.num_users):
        history = dataset.history(row).tolist()
        known, target = history[:-held_out], history[-held_out]
        left = {i for i in range(dataset.item_num) if not exclude_seen or i not in known}
        order = sorted(left | {target}, key=lambda i: (-counts[i], i))
        expected.append(order.index(target) + 1)
    assert popularity_ranks(dataset, samples, exclude_seen=exclude_seen).tolist() == expected


def test_evaluate_gives_mean_and_spread_over_seeds(model, dataset):
    samples = EvaluationSamples(dataset, "val", model.config.max_len)
    runs = [metrics_from_ranks(model_ranks(model, samples, seed=s), (5, 50)) for s in (4, 9, 2)]
    done = []
    found = evaluate(model, dataset, "val", ks=(5, 50), seeds=(4, 9, 2), progress=done.append)
    assert found.users == 60 and sum(done) == 180
    for name in runs[0]:
        values = [run[name] for run in runs]
        assert found.per_seed[name] == values
        assert found.mean[name] == pytest.approx(np.mean(values))
        assert found.spread[name] == pytest.approx(np.std(values, ddof=1))
    assert found.spread["NDCG@50"] > 0, "or the seeds made no difference"
    once = evaluate(model, dataset, "val", ks=(5, 50), seeds=(9,))
    assert once.mean == runs[1]
    assert set(once.spread.values()) == {0.0}


def test_evaluate_passes_its_options_on(model, dataset):
    samples = EvaluationSamples(dataset, "test", model.config.max_len)
    plain = evaluate(model, dataset, ks=(3,)).mean
    assert plain == metrics_from_ranks(model_ranks(model, samples, seed=0), (3,))
    fewer = model_ranks(model, samples, seed=0, steps=1, exclude_seen=True)
    found = evaluate(model, dataset, ks=(3,), steps=1, exclude_seen=True, averaging="published")
    assert found.mean == metrics_from_ranks(fewer, (3,), averaging="published")
    assert found.mean != plain


def test_evaluate_leaves_mode_and_generator_alone(model, dataset):
    model.train()
    before = torch.get_rng_state()
    evaluate(model, dataset, "val")
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_evaluate_refuses(model, dataset):
    with pytest.raises(ValueError, match="at least one seed"):
        evaluate(model, dataset, seeds=())
    with pytest.raises(ValueError, match="'val' or 'test'"):
        evaluate(model, dataset, "train")
    pairs = Dataset.from_histories([[1, 2], [3, 4]], item_ids=dataset.item_ids)
    with pytest.raises(ValueError, match="no user to evaluate"):
        evaluate(model, pairs, "val")
    assert evaluate(model, pairs, "test").users == 2
