"""Fewer steps, honestly: what a trained model loses, if anything, with fewer Euler steps."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmrec_fast import noise
from fmrec_fast.config import FMRecConfig
from fmrec_fast.data.batches import EvaluationSamples
from fmrec_fast.evaluation import BATCH, metrics_from_ranks
from fmrec_fast.models.recommender import FMRecommender
from fmrec_fast.ops import target_rank
from fmrec_fast.picard import evaluation_flops
from fmrec_fast.recommend import rank_items
from fmrec_fast.sampler import sample

STEPS = (1, 2, 3, 5, 10, 30)
TOP = 20
SEED = 0
# A latency is the median of so many runs, or of as many as fit into the seconds, at least three.
ROUNDS, SECONDS = 30, 3.0


@dataclass(frozen=True)
class Row:
    """One number of steps.

    `metrics` in percent; `overlap`, percent of the reference's top 20 that it shares, mean over
    users; `flops` per recommendation, see `flops`; `latency_s`, seconds by batch size, from ids to
    the top 20.
    """

    steps: int
    metrics: dict[str, float]
    overlap: float
    flops: int
    latency_s: dict[int, float]


@dataclass(frozen=True)
class Study:
    """All numbers of steps against the largest, `reference`.

    `noise_floor` is the overlap of the reference with itself under another seed: what two runs of
    the same sampler share.
    """

    rows: list[Row]
    reference: int
    noise_floor: float
    users: int
    top: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def flops(config: FMRecConfig, steps: int) -> int:
    """Floating-point operations of one recommendation: the matrix products of the sampler and of
    the scores.

    See `picard.evaluation_flops`. A history of L items: what a kernel saves on padding is not
    subtracted. Norms, noise, the time embeddings (the same for all rows) and top-k are not counted.
    """
    step = evaluation_flops(config.max_len, config.hidden_size, config.num_blocks)
    return steps * step + 2 * config.item_num * config.hidden_size


def study(
    model: FMRecommender,
    samples: EvaluationSamples,
    *,
    steps: Sequence[int] = STEPS,
    ks: Sequence[int] = (5, 10, 20),
    users: int | None = None,
    seed: int = SEED,
    latencies: Sequence[int] = (1, BATCH),
    progress: Callable[[int], None] | None = None,
) -> Study:
    """Evaluate the same users with every number of steps, under the same noise.

    Args:
        steps: numbers of Euler steps; the largest is the reference.
        ks: K of HR and NDCG.
        users: how many users, drawn without replacement; None is all.
        seed: of the sampler; the noise floor takes ``seed + 1``.
        latencies: batch sizes that are timed.
        progress: called with the number of users done in each batch.

    Raises:
        ValueError: `steps` or `users` are off, or there is nobody to evaluate.
    """
    check_steps(steps)
    if users is not None and users < 1:
        raise ValueError(f"users must be at least 1, got {users}")
    everybody = torch.arange(len(samples))
    if users is not None and users < len(samples):
        chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(SEED))
        everybody = chosen[:users].sort().values
    reference, top = max(steps), min(TOP, model.item_num - 1)
    best, other = (
        _recommended(model, samples, everybody, reference, at, top, progress)
        for at in (seed, seed + 1)
    )
    rows = []
    for n in sorted(set(steps)):
        found = best
        if n != reference:
            found = _recommended(model, samples, everybody, n, seed, top, progress)
        metrics = metrics_from_ranks(found[0], ks)
        seconds = {size: _latency(model, samples, everybody, size, n, top) for size in latencies}
        rows.append(
            Row(
                steps=n,
                metrics={k: v for k, v in metrics.items() if not k.startswith("MRR")},
                overlap=overlap(found[1], best[1]),
                flops=flops(model.config, n),
                latency_s=seconds,
            )
        )
    return Study(rows, reference, overlap(other[1], best[1]), len(everybody), top)


def check_steps(steps: Sequence[int]) -> None:
    """`steps` must name positive numbers, none twice.

    Raises:
        ValueError: they do not.
    """
    if not steps or min(steps) < 1 or len(set(steps)) < len(steps):
        raise ValueError(f"steps must be different numbers of at least 1, got {list(steps)}")


def overlap(ids: Tensor, reference: Tensor) -> float:
    """Percent of `reference` [B, k] that is in `ids` [B, k], whatever the order; mean over rows."""
    shared = (ids[:, :, None] == reference[:, None, :]).any(1)
    return 100.0 * float(shared.double().mean())


@torch.no_grad()
def _recommended(
    model: FMRecommender,
    samples: EvaluationSamples,
    users: Tensor,
    steps: int,
    seed: int,
    top: int,
    progress: Callable[[int], None] | None,
) -> tuple[Tensor, Tensor]:
    """(rank of the target [S], the top items [S, top])."""
    device = model.item_embeddings.weight.device
    at = noise.as_seed(seed, device)
    ranks = [torch.empty(0, dtype=torch.int64, device=device)]
    ids = [torch.empty(0, top, dtype=torch.int64, device=device)]
    for index in users.split(BATCH):
        sequence, target = samples.batch(index)
        rows = samples.user_rows(index)
        rep = sample(model, sequence, steps=steps, seed=at, rows=rows)
        ranks.append(target_rank(rep, model.item_embeddings.weight, target))
        ids.append(rank_items(model, rep, top, _nothing(rep)).ids)
        if progress is not None:
            progress(len(index))
    return torch.cat(ranks), torch.cat(ids)


def _nothing(rep: Tensor) -> Tensor:
    """Nothing to exclude."""
    return torch.empty(len(rep), 0, dtype=torch.int64, device=rep.device)


@torch.no_grad()
def _latency(
    model: FMRecommender,
    samples: EvaluationSamples,
    users: Tensor,
    size: int,
    steps: int,
    top: int,
) -> float:
    """Median seconds from ids to the top items, users repeated where there are fewer."""
    sequence, _ = samples.batch(users[torch.arange(size) % len(users)])
    cuda = sequence.device.type == "cuda"

    def run() -> float:
        start = time.perf_counter()
        rep = sample(model, sequence, steps=steps, seed=SEED, method="auto")
        rank_items(model, rep, top, _nothing(rep))
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    run()
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < ROUNDS and sum(seconds) < SECONDS):
        seconds.append(run())
    return statistics.median(seconds)


def table(found: Study) -> str:
    """The study as lines of text."""
    names = list(found.rows[0].metrics)
    sizes = list(found.rows[0].latency_s)
    header = ["steps", *names, "overlap", "MFLOP", *(f"B={size} ms" for size in sizes)]
    lines = ["".join(f"{title:>10}" for title in header)]
    for row in found.rows:
        cells = [str(row.steps), *(f"{row.metrics[name]:.3f}" for name in names)]
        cells += [f"{row.overlap:.2f}", f"{row.flops / 1e6:.1f}"]
        cells += [f"{1e3 * row.latency_s[size]:.2f}" for size in sizes]
        lines.append("".join(f"{cell:>10}" for cell in cells))
    lines.append(
        f"{found.users} users; metrics and overlap in percent. Overlap: of the top {found.top} "
        f"with that of {found.reference} steps;\n{found.reference} steps under another seed share "
        f"{found.noise_floor:.2f} with themselves (the noise floor)."
    )
    return "\n".join(lines)


def draw(found: Study, path: Path) -> None:
    """Metrics and overlap against the number of steps (extra ``[bench]``)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    steps = [row.steps for row in found.rows]
    for name in found.rows[0].metrics:
        left.plot(steps, [row.metrics[name] for row in found.rows], marker=".", label=name)
    left.set(xlabel="steps", ylabel="percent", xscale="log", xticks=steps, xticklabels=steps)
    left.set_ylim(bottom=0)
    left.legend(fontsize="x-small", ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    right.plot(steps, [row.overlap for row in found.rows], marker=".", label="same noise")
    right.axhline(
        found.noise_floor, color="grey", linestyle="--",
        label=f"{found.reference} steps, another seed",
    )  # fmt: skip
    right.set(
        xlabel="steps", ylabel=f"top-{found.top} overlap with {found.reference} steps (%)",
        xscale="log", xticks=steps, xticklabels=steps,
    )  # fmt: skip
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.minorticks_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
