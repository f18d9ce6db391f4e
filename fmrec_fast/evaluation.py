"""Full-ranking evaluation: HR, NDCG and MRR at any K."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmrec_fast import noise
from fmrec_fast.data.batches import EvaluationSamples
from fmrec_fast.data.dataset import Dataset
from fmrec_fast.distributed.exchange import batch_shares
from fmrec_fast.distributed.world import ALONE, World
from fmrec_fast.models.recommender import FMRecommender
from fmrec_fast.ops import target_rank
from fmrec_fast.sampler import sample

AVERAGINGS = ("user", "published")
BATCH = 512  # the published evaluation batch, which 'published' averaging depends on
PERCENT = 100.0


@dataclass(frozen=True)
class Evaluation:
    """Metrics in percent, over one or more sampling seeds.

    `mean[name]` and `spread[name]` (sample standard deviation; 0 for one seed) with names such as
    'HR@10'; `per_seed[name]` one value a seed; `users` how many were evaluated.
    """

    mean: dict[str, float]
    spread: dict[str, float]
    per_seed: dict[str, list[float]]
    users: int


def _indices(samples: EvaluationSamples, batch_size: int, world: World = ALONE):
    share = world.share(len(samples))
    # As many batches on every rank, for what they exchange; the last may be empty.
    for first in range(0, world.largest_share(len(samples)), batch_size):
        yield torch.tensor(share[first : first + batch_size], dtype=torch.int64)


@torch.no_grad()
def model_ranks(
    model: FMRecommender,
    samples: EvaluationSamples,
    *,
    steps: int | None = None,
    seed: int | Tensor | None = None,
    exclude_seen: bool = False,
    batch_size: int = BATCH,
    progress: Callable[[int], None] | None = None,
    padding: str = "published",
    precision: str = "float32",
    world: World = ALONE,
) -> Tensor:
    """The target's rank among all V scores (id 0 included, as published): int64 [S].

    The noise is keyed by the user's row, so batch size and order of users change nothing.

    Args:
        exclude_seen: leave the items of the input history out of the ranking.
        progress: called with the number of users done in each batch.
        padding, precision: as in `sample`.
        world: the ranks, each of which does its share of the users; all get all ranks.
    """
    device = model.item_embeddings.weight.device
    seed = noise.as_seed(seed, device)
    ranks = [torch.empty(0, dtype=torch.int64, device=device)]
    done = 0
    for index in _indices(samples, batch_size, world):
        sequence, target = samples.batch(index)
        rows = samples.user_rows(index)
        exclude = samples.seen(index) if exclude_seen else None
        with batch_shares(_sizes(samples, batch_size, world, len(ranks) - 1)):
            rep = sample(
                model,
                sequence,
                steps=steps,
                seed=seed,
                rows=rows,
                padding=padding,
                precision=precision,
            )
            ranks.append(target_rank(rep, model.item_embeddings.weight, target, exclude=exclude))
        if progress is not None:
            before, done = done, done + len(index)
            progress(_of_all(done, samples, world) - _of_all(before, samples, world))
    return world.gather(torch.cat(ranks), len(samples))


def _sizes(samples: EvaluationSamples, batch_size: int, world: World, batch: int) -> list[int]:
    """How many users each rank has in a batch of `_indices`."""
    first = batch * batch_size
    return [min(max(size - first, 0), batch_size) for size in world.shares(len(samples))]


def _of_all(done: int, samples: EvaluationSamples, world: World) -> int:
    """About how many users all ranks have done, when this one has done so many."""
    return len(samples) * done // max(len(world.share(len(samples))), 1)


@torch.no_grad()
def popularity_ranks(
    dataset: Dataset, samples: EvaluationSamples, *, exclude_seen: bool = False
) -> Tensor:
    """Ranks when every user gets the items by their number of interactions in `train`."""
    counts = torch.as_tensor(dataset.popularity(), dtype=torch.float32, device=samples.device)
    ranks = [torch.empty(0, dtype=torch.int64, device=samples.device)]
    for index in _indices(samples, BATCH):
        _, target = samples.batch(index)
        ones = torch.ones(len(index), 1, device=samples.device)
        exclude = samples.seen(index) if exclude_seen else None
        ranks.append(target_rank(ones, counts[:, None], target, exclude=exclude))
    return torch.cat(ranks)


def metrics_from_ranks(
    ranks: Tensor, ks: Sequence[int], *, averaging: str = "user", batch_size: int = BATCH
) -> dict[str, float]:
    """HR@K, NDCG@K and MRR@K in percent.

    With one relevant item, HR@K = [rank <= K], NDCG@K = [rank <= K] / log2(rank + 1) and
    MRR@K = [rank <= K] / rank.

    Args:
        ranks: int64 [S], 1 is best.
        averaging: 'user', the mean over users; 'published', the unweighted mean of the means of
            batches of `batch_size`, in which users of a short last batch count for more.

    Raises:
        ValueError: no ranks, a K below 1, or an unknown averaging.
    """
    if averaging not in AVERAGINGS:
        raise ValueError(f"averaging must be one of {AVERAGINGS}, got {averaging!r}")
    if not ks or min(ks) < 1:
        raise ValueError(f"ks must be positive, got {list(ks)}")
    if ranks.numel() == 0:
        raise ValueError("there is no user to evaluate: every input history is empty")
    place = ranks.double()
    gains = {
        "HR": torch.ones_like(place),
        "NDCG": 1 / torch.log2(place + 1),
        "MRR": 1 / place,
    }
    metrics = {}
    for name, gain in gains.items():
        for k in ks:
            value = torch.where(ranks <= k, gain, 0.0)
            if averaging == "published":
                value = torch.stack([part.mean() for part in value.split(batch_size)])
            metrics[f"{name}@{k}"] = PERCENT * float(value.mean())
    return metrics


def evaluate(
    model: FMRecommender,
    dataset: Dataset,
    split: str = "test",
    *,
    ks: Sequence[int] = (5, 10, 20),
    steps: int | None = None,
    seeds: Sequence[int] = (0,),
    exclude_seen: bool = False,
    averaging: str = "user",
    progress: Callable[[int], None] | None = None,
    padding: str = "published",
    precision: str = "float32",
    world: World = ALONE,
) -> Evaluation:
    """Evaluate on the validation ('val') or test items, once for each sampling seed.

    `steps`, `padding` and `precision` are those of `sample`; of several ranks in `world` each does
    its share of the users, and all get the result.

    Raises:
        ValueError: unknown split or averaging, no seeds, or nobody to evaluate.
    """
    if not seeds:
        raise ValueError("seeds must name at least one seed, got none")
    device = model.item_embeddings.weight.device
    samples = EvaluationSamples(dataset, split, model.config.max_len, device)
    runs = []
    for seed in seeds:
        ranks = model_ranks(
            model,
            samples,
            steps=steps,
            seed=seed,
            exclude_seen=exclude_seen,
            progress=progress,
            padding=padding,
            precision=precision,
            world=world,
        )
        runs.append(metrics_from_ranks(ranks, ks, averaging=averaging))
    per_seed = {name: [run[name] for run in runs] for name in runs[0]}
    columns = {name: torch.tensor(v, dtype=torch.float64) for name, v in per_seed.items()}
    return Evaluation(
        mean={name: float(column.mean()) for name, column in columns.items()},
        spread={
            name: float(column.std()) if len(column) > 1 else 0.0
            for name, column in columns.items()
        },
        per_seed=per_seed,
        users=len(samples),
    )
