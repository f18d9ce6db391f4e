"""The smaller commands: ``convert``, ``export``, ``env``, ``bench``, ``demo``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fmrec_fast import checkpoint, demo, environment, latency
from fmrec_fast.cli.common import UserError, print_metrics, reading, show
from fmrec_fast.cli.train import Console
from fmrec_fast.data import convert, verify


def convert_data(options: Any) -> None:
    chosen = reading(options, options.data)
    dataset = convert(chosen.pop("path"), options.out, memory_mb=options.memory_mb, **chosen)
    if options.verify:
        verify(options.out)
    show(dataset)


def export_run(options: Any) -> None:
    for path in checkpoint.export(options.run, options.out, inference=options.inference):
        print(f"{path} ({(path / checkpoint.TENSORS).stat().st_size / 1e6:.1f} MB)")


def show_environment(options: Any) -> None:
    if options.json:
        print(json.dumps(environment.report(), indent=1))
    else:
        print("\n".join(environment.lines()))


def bench(options: Any) -> None:
    if options.run is not None:
        state = checkpoint.load(checkpoint.locate(options.run, options.checkpoint))
        model = checkpoint.build_model(state, torch.device("cpu"))
    else:
        model = latency.random_model(
            options.item_num, options.hidden_size, options.max_len, options.num_blocks
        )
    print(latency.HEADER)
    found = latency.measure(
        model,
        users=options.users,
        threads=options.threads,
        k=options.k,
        steps=options.steps,
        padding=options.padding,
        precision=options.precision,
        seconds=options.seconds,
        report=lambda one: print(latency.line(one), flush=True),
    )
    if options.json:
        facts = {
            "run": None if options.run is None else str(options.run),
            "cpu": environment.processor(),
            "torch": torch.__version__,
            "item_num": model.item_num,
            "hidden_size": model.config.hidden_size,
            "max_len": model.config.max_len,
            "num_blocks": model.config.num_blocks,
            "steps": options.steps or model.fm.steps,
            "padding": options.padding,
            "precision": options.precision,
            "latencies": latency.to_dict(found),
        }
        path = Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, json.dumps(facts, indent=1) + "\n")


def run_tour(options: Any) -> None:
    run = Path(options.out)
    runs = [run, *(run / stage for stage in checkpoint.STAGE_DIRECTORIES)]
    if run.exists() and not any((part / "last.json").exists() for part in runs):
        raise UserError(f"--out {run} exists and is not a run directory; name another")
    demo.run_demo(run, options.epochs, Console(run), print_metrics, model=options.model)
