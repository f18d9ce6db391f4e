"""Synthetic data: reproducible, of any size, and with a next item that can be learnt."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from fmrec_fast.data import EvaluationSamples, TrainingSamples, synthetic_dataset


def test_a_function_of_its_arguments():
    first, again = synthetic_dataset(300, 50, 5, seed=4), synthetic_dataset(300, 50, 5, seed=4)
    other = synthetic_dataset(300, 50, 5, seed=5)
    assert np.array_equal(first.items, again.items)
    assert np.array_equal(first.offsets, again.offsets)
    assert not np.array_equal(first.items[:1000], other.items[:1000])


@pytest.mark.parametrize(
    ("users", "items", "clusters"), [(1, 1, 1), (1, 7, 7), (50, 3, 2), (400, 101, 10)]
)
def test_sizes(users, items, clusters):
    data = synthetic_dataset(users, items, clusters, mean_length=9)
    assert data.num_users == users
    assert data.item_ids == list(range(1, items + 1))
    assert np.diff(data.offsets).min() >= 5


def test_mean_length_and_popularity_skew():
    data = synthetic_dataset(5000, 200, 10, mean_length=20)
    assert np.diff(data.offsets).mean() == pytest.approx(20, rel=0.05)
    counts = np.sort(data.popularity())[::-1]
    assert counts[:20].sum() > 2 * counts.sum() * 20 / 200
    shortest = synthetic_dataset(100, mean_length=5)
    assert set(np.diff(shortest.offsets).tolist()) == {5}


def hit_rate(scores, target, k=10):
    return (scores.topk(k).indices == target[:, None]).any(1).double().mean().item()


def test_last_item_predicts_the_next_far_better_than_popularity():
    data = synthetic_dataset()
    train = TrainingSamples(data, 1)
    last, following = train.batch(torch.arange(len(train)))
    counts = torch.zeros(data.item_num, data.item_num)
    counts.index_put_((last[:, 0], following[:, 0]), torch.ones(len(train)), accumulate=True)

    test = EvaluationSamples(data, "test", 1)
    sequence, target = test.batch(torch.arange(len(test)))
    markov = hit_rate(counts[sequence[:, 0]], target)
    popular = torch.from_numpy(data.popularity()).expand(len(test), -1)
    popularity = hit_rate(popular, target)
    assert markov > 0.6
    assert markov > 4 * popularity


def test_without_drift_and_noise_users_stay_in_their_cluster():
    data = synthetic_dataset(200, 60, 6, mean_length=30, drift=0.0, noise=0.0)
    follows = {}
    for row in range(data.num_users):
        history = data.history(row).tolist()
        for item, following in pairwise(history):
            follows.setdefault(item, set()).add(following)
    assert max(map(len, follows.values())) <= 3
    assert all(len(set(data.history(row).tolist())) <= 10 for row in range(data.num_users))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_users": 0}, "num_users=0"),
        ({"num_items": 0}, "num_items=0"),
        ({"num_clusters": 501}, "num_clusters=501"),
        ({"num_clusters": 0}, "num_clusters=0"),
        ({"mean_length": 4}, "mean_length=4"),
        ({"mean_length": float("nan")}, "mean_length=nan"),
        ({"drift": 0.6, "noise": 0.6}, r"drift=0\.6, noise=0\.6"),
        ({"noise": -0.1}, r"noise=-0\.1"),
        ({"skew": -1}, "skew=-1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_dataset(**arguments)
