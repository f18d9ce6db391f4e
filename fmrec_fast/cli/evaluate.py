"""``fmrec-fast evaluate`` and ``steps``."""

from __future__ import annotations

import importlib.util
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from fmrec_fast import checkpoint
from fmrec_fast import steps as step_study
from fmrec_fast.cli.common import (
    UserError,
    load_model,
    print_metrics,
    read,
    reading,
    run_dataset,
    show,
    users_bar,
    with_items,
)
from fmrec_fast.data import EvaluationSamples
from fmrec_fast.distributed.world import ALONE, World
from fmrec_fast.evaluation import evaluate, metrics_from_ranks, popularity_ranks

PLOTS = (".png", ".pdf", ".svg")


def evaluate_run(options: Any, world: World = ALONE) -> None:
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    model, state = load_model(options, world.device)
    if options.data is None:
        dataset = run_dataset(state)
    else:
        dataset = with_items(read(reading(options, options.data)), state["item_ids"])
    if world.is_main:
        show(dataset)
    samples = EvaluationSamples(dataset, options.split, model.config.max_len)
    total = len(samples) * options.seeds
    with users_bar(total, options.split) if world.is_main else nullcontext() as progress:
        found = evaluate(
            model,
            dataset,
            options.split,
            ks=options.ks,
            steps=options.steps,
            seeds=range(options.seeds),
            exclude_seen=options.exclude_seen,
            averaging=options.averaging,
            progress=progress,
            padding=options.padding,
            precision=options.precision,
            world=world,
        )
    if not world.is_main:
        return
    baseline = metrics_from_ranks(
        popularity_ranks(dataset, samples, exclude_seen=options.exclude_seen),
        options.ks,
        averaging=options.averaging,
    )
    columns = {"model": found.mean}
    if options.seeds > 1:
        columns["+-"] = found.spread
    print_metrics(columns | {"popularity": baseline})
    if options.json:
        facts = {
            "run": str(options.run),
            "split": options.split,
            "users": found.users,
            "averaging": options.averaging,
            "exclude_seen": options.exclude_seen,
            "steps": options.steps or model.fm.steps,
            "padding": options.padding,
            "precision": options.precision,
            "mean": found.mean,
            "spread": found.spread,
            "per_seed": found.per_seed,
            "popularity": baseline,
        }
        path = Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, json.dumps(facts, indent=1) + "\n")


def compare_steps(options: Any) -> None:
    step_study.check_steps(options.steps)
    if options.users is not None and options.users < 1:
        raise UserError(f"--users must be at least 1, got {options.users}")
    if options.plot is not None and Path(options.plot).suffix not in PLOTS:
        raise UserError(f"--plot must end in one of {PLOTS}, got {options.plot!r}")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'fmrec_fast[bench]'")
    model, state = load_model(options)
    if options.data is None:
        dataset = run_dataset(state)
    else:
        dataset = with_items(read(reading(options, options.data)), state["item_ids"])
    show(dataset)
    device = model.item_embeddings.weight.device
    samples = EvaluationSamples(dataset, options.split, model.config.max_len, device)
    count = min(len(samples), options.users or len(samples))
    with users_bar(count * (len(options.steps) + 1), "steps") as progress:
        found = step_study.study(
            model,
            samples,
            steps=options.steps,
            ks=options.ks or model.config.metric_ks,
            users=options.users,
            seed=options.seed,
            progress=progress,
        )
    print(step_study.table(found))
    if options.out is not None:
        path = Path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "run": str(options.run),
            "split": options.split,
            "seed": options.seed,
            "device": str(device),
            "threads": torch.get_num_threads(),
            **found.to_dict(),
        }
        checkpoint.write_text(path, json.dumps(facts, indent=1) + "\n")
    if options.plot is not None:
        step_study.draw(found, Path(options.plot))
