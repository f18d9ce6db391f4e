"""The whole tour on synthetic data: train, compare with popularity, recommend, time."""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fmrec_fast import checkpoint
from fmrec_fast.config import FaveConfig, FMRecConfig
from fmrec_fast.data import Dataset, EvaluationSamples, TrainingSamples, synthetic_dataset
from fmrec_fast.evaluation import metrics_from_ranks, popularity_ranks
from fmrec_fast.losses import training_losses
from fmrec_fast.models import FaveRecommender, FMRecommender
from fmrec_fast.recommend import recommend
from fmrec_fast.reference.published import PublishedRecommender
from fmrec_fast.reference.published_fave import PublishedFaveRecommender
from fmrec_fast.sampler import sample
from fmrec_fast.training import Listener, Trainer, build_optimizer

SYNTHETIC = "synthetic"  # the name under which the command line knows the data
DATA = {"num_users": 2000, "num_items": 500, "num_clusters": 20, "mean_length": 20, "seed": 0}
# Small enough to learn something within a minute or two on two cores.
CONFIG = FMRecConfig(
    hidden_size=64,
    max_len=20,
    decoder_dims=(128, 256),
    batch_size=256,
    epochs=4,
    eval_interval=1,
)
FAVE_CONFIG = FaveConfig(
    hidden_size=64,
    max_len=20,
    decoder_dims=(128, 256),
    batch_size=256,
    epochs=4,
)
ROUNDS = 5
USERS = 128


def dataset() -> Dataset:
    """The synthetic dataset."""
    return synthetic_dataset(**DATA)


def configuration(model: str) -> FMRecConfig:
    """The demo's settings of a model."""
    return {"fmrec": CONFIG, "fave": FAVE_CONFIG}[model]


def run_demo(
    out: Path,
    epochs: int,
    listener: Listener,
    print_metrics: Callable[[dict[str, dict[str, float]]], None],
    *,
    model: str = "fmrec",
) -> None:
    """Train into `out` (a run directory, replaced) and print what came of it."""
    shutil.rmtree(out, ignore_errors=True)
    data, config = dataset(), configuration(model).replace(epochs=epochs)
    print(f"1. data: {data!r}\n2. train {epochs} epochs into {out}", flush=True)
    source = {"path": SYNTHETIC}
    if isinstance(config, FaveConfig):  # in two stages, the second from the first
        first, second = (out / stage for stage in checkpoint.STAGE_DIRECTORIES)
        Trainer(data, config, first, source=source, listener=listener).fit()
        config = config.replace(stage_mode="finetune", ckpt_path=str(first))
        result = Trainer(data, config, second, source=source, listener=listener).fit()
    else:
        result = Trainer(data, config, out, source=source, listener=listener).fit()

    samples = EvaluationSamples(data, "test", config.max_len)
    popularity = metrics_from_ranks(popularity_ranks(data, samples), config.metric_ks)
    print(f"3. test on {result.users} users, all {data.item_num - 1} items ranked")
    print_metrics({"model": result.mean, "popularity": popularity})

    recommender = checkpoint.build_model(checkpoint.load(checkpoint.locate(out)))
    print("4. recommend, for three users and for a made-up history")
    histories = [data.history(row).tolist() for row in range(3)] + [[1, 2, 3]]
    best = recommend(recommender, histories, 5, exclude_seen=True, seed=0)
    for history, ids in zip(histories, best.ids.tolist(), strict=True):
        print(f"   ... {history[-5:]} -> {ids}")

    print(f"5. speed, seconds (median of {ROUNDS}, in turns)")
    print(f"{'':32}{'published':>10}{'fmrec_fast':>12}{'ratio':>8}")
    for name, (theirs, ours) in compare_speed(recommender, data).items():
        print(f"   {name:29}{theirs:10.3f}{ours:12.3f}{theirs / ours:8.1f}")
    print(f"next: fmrec-fast evaluate {out}")


def compare_speed(model: FMRecommender, data: Dataset) -> dict[str, tuple[float, float]]:
    """Median seconds of (published program, this package) for sampling and a training step."""
    published: Any
    if isinstance(model, FaveRecommender):
        published = PublishedFaveRecommender.from_config(model.config)
        if model.stage == "finetune":
            published.switch_to_finetune()
    else:
        published = PublishedRecommender.from_config(model.config)
    published.load_state_dict(model.state_dict(), strict=True)
    published.eval()
    evaluation = EvaluationSamples(data, "test", model.config.max_len)
    users, _ = evaluation.batch(torch.arange(min(USERS, len(evaluation))))
    training = TrainingSamples(data, model.config.max_len)
    batch = training.batch(torch.arange(min(model.config.batch_size, len(training))))

    @torch.no_grad()
    def published_sampling() -> None:
        published(users, None, train_flag=False)

    result = {
        f"sample {len(users)} users, {model.fm.steps} steps": _alternate(
            published_sampling, lambda: sample(model, users)
        )
    }
    published.train()
    model.train()
    peer_adam = torch.optim.Adam(published.parameters(), lr=model.config.lr)
    adam, _ = build_optimizer(model, model.config)

    def published_step() -> None:
        peer_adam.zero_grad()
        published.training_loss(*batch).backward()
        peer_adam.step()

    def step() -> None:
        adam.zero_grad()
        training_losses(model, *batch).total.backward()
        adam.step()

    result[f"train on {len(batch[0])} samples"] = _alternate(published_step, step)
    return result


def _alternate(*calls: Callable[[], object]) -> tuple[float, float]:
    seconds: list[list[float]] = [[] for _ in calls]
    for round_ in range(ROUNDS + 1):
        for call, record in zip(calls, seconds, strict=True):
            began = time.perf_counter()
            call()
            if round_ > 0:  # the first is the warm-up
                record.append(time.perf_counter() - began)
    theirs, ours = (statistics.median(record) for record in seconds)
    return theirs, ours
