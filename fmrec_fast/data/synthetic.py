"""Synthetic histories whose next item can be learnt, for tests, benchmarks and first steps."""

from __future__ import annotations

import numpy as np

from .dataset import Dataset, offsets_of

MIN_LENGTH = 5
# How likely each of an item's successors is: unequal, so that their order can be learnt too.
SUCCESSOR_SHARES = (0.6, 0.25, 0.15)


def synthetic_dataset(
    num_users: int = 2000,
    num_items: int = 500,
    num_clusters: int = 20,
    mean_length: float = 20,
    seed: int = 0,
    *,
    drift: float = 0.1,
    noise: float = 0.1,
    skew: float = 0.8,
) -> Dataset:
    """Users who wander among clusters of items; a function of its arguments.

    The items form a ring of `num_clusters` clusters, each with a popularity falling as
    rank^-skew. A user starts in a cluster. At each step, with probability `noise` they take any
    item by popularity (and go back to where they were), with probability `drift` they move to a
    neighbouring cluster and take one of its items by popularity, and otherwise they take one of
    three successors that their current item has within its cluster. Lengths are 5 and more,
    geometric, with mean `mean_length`. Item ids are 1..num_items, all of them in `item_ids`.

    Raises ValueError for counts below 1, more clusters than items, a mean length below 5, or
    probabilities that are not within 0..1 in total.
    """
    for name, count in (("num_users", num_users), ("num_items", num_items)):
        if count < 1:
            raise ValueError(f"{name}={count}; expected 1 or more")
    if not 1 <= num_clusters <= num_items:
        raise ValueError(f"num_clusters={num_clusters}; expected 1..num_items={num_items}")
    if not mean_length >= MIN_LENGTH:
        raise ValueError(f"mean_length={mean_length}; expected {MIN_LENGTH} or more")
    if not (drift >= 0 and noise >= 0 and drift + noise <= 1):
        raise ValueError(f"drift={drift}, noise={noise}; expected both >= 0, their sum <= 1")
    if not skew >= 0:
        raise ValueError(f"skew={skew}; expected 0 or more")

    rng = np.random.default_rng(seed)
    catalogue = _Catalogue(rng, num_items, num_clusters, skew)
    lengths = MIN_LENGTH + rng.geometric(1 / (mean_length - MIN_LENGTH + 1), num_users) - 1
    offsets = offsets_of(lengths)
    items = np.empty(offsets[-1], dtype=np.int32)

    # Longest first, so that the users still active at a step are the first ones.
    order = np.argsort(-lengths, kind="stable")
    write_at = offsets[order]
    active = np.searchsorted(-lengths[order], -np.arange(lengths.max()), side="left")
    current = catalogue.draw(rng, rng.integers(num_clusters, size=num_users))
    for step, count in enumerate(active.tolist()):
        if step:
            current = current[:count]
            luck = rng.random(count, dtype=np.float32)
            wander = np.flatnonzero(luck < noise)
            move = np.flatnonzero((luck >= noise) & (luck < noise + drift))
            following = catalogue.follow(rng, current)
            turn = rng.integers(0, 2, size=len(move)) * 2 - 1
            cluster = (catalogue.cluster[current[move]] + turn) % num_clusters
            following[move] = catalogue.draw(rng, cluster)
            following[wander] = current[wander]
            current = following
            shown = current.copy()
            shown[wander] = catalogue.draw_any(rng, len(wander))
        else:
            shown = current
        items[write_at[:count] + step] = catalogue.ids[shown]
    return Dataset(
        items,
        offsets,
        item_ids=list(range(1, num_items + 1)),
        user_ids=list(range(1, num_users + 1)),
        name="synthetic",
    )


class _Catalogue:
    """Items numbered cluster by cluster, the most popular of each first; `ids` shuffles them."""

    def __init__(
        self, rng: np.random.Generator, num_items: int, num_clusters: int, skew: float
    ) -> None:
        self.first = np.arange(num_clusters + 1) * num_items // num_clusters
        sizes = np.diff(self.first)
        self.cluster = np.repeat(np.arange(num_clusters, dtype=np.int32), sizes)
        rank = np.arange(num_items) - self.first[self.cluster] + 1
        weights = rank**-skew
        self.cumulative = np.concatenate([[0.0], np.cumsum(weights)])
        self.ids = rng.permutation(num_items).astype(np.int32) + 1

        shares = len(SUCCESSOR_SHARES)
        drawn = self.draw(rng, np.repeat(self.cluster, shares)).reshape(num_items, shares)
        # An item that would follow itself passes the turn on to the next of its cluster.
        own = np.arange(num_items)[:, None]
        start, size = self.first[self.cluster][:, None], sizes[self.cluster][:, None]
        drawn = np.where(drawn == own, start + (own - start + 1) % size, drawn)
        self.successors = drawn.astype(np.int32)
        self.thresholds = np.cumsum(SUCCESSOR_SHARES[:-1])

    def draw(self, rng: np.random.Generator, cluster: np.ndarray) -> np.ndarray:
        """One item of each of these clusters, by popularity: int32 [n]"""
        low = self.cumulative[self.first[cluster]]
        high = self.cumulative[self.first[cluster + 1]]
        at = np.searchsorted(
            self.cumulative, low + rng.random(len(cluster)) * (high - low), "right"
        )
        # Rounding may put a draw just past the end of its cluster.
        return np.clip(at - 1, self.first[cluster], self.first[cluster + 1] - 1).astype(np.int32)

    def draw_any(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Items of any cluster, by popularity: int32 [count]"""
        at = np.searchsorted(self.cumulative, rng.random(count) * self.cumulative[-1], "right")
        return np.clip(at - 1, 0, len(self.ids) - 1).astype(np.int32)

    def follow(self, rng: np.random.Generator, current: np.ndarray) -> np.ndarray:
        """A successor of each of these items: int32 [n]"""
        luck = rng.random(len(current), dtype=np.float32)
        choice = (luck >= self.thresholds[0]).astype(np.int32) + (luck >= self.thresholds[1])
        return self.successors[current, choice]
