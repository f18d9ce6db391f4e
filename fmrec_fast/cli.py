"""The command line ``fmrec-fast`` (needs the extra ``[cli]``)."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fmrec_fast import __version__, backend, checkpoint, demo, environment, latency, training
from fmrec_fast import steps as step_study
from fmrec_fast.config import PADDINGS, STAGES, FaveConfig, FMRecConfig
from fmrec_fast.data import (
    Dataset,
    EvaluationSamples,
    convert,
    read_dataset,
    verify,
)
from fmrec_fast.data.convert import MEMORY_MB
from fmrec_fast.distributed.world import ALONE, World, described, joined
from fmrec_fast.evaluation import evaluate, metrics_from_ranks, popularity_ranks
from fmrec_fast.models import CONFIGS, FMRecommender
from fmrec_fast.presets import PRESETS, preset
from fmrec_fast.recommend import Recommendations, recommend

PLOTS = (".png", ".pdf", ".svg")


class UserError(Exception):
    """A mistake in what was asked for; printed without a traceback."""


# ValueError and its like carry the value and what was expected; OSError names the file.
MISTAKES = (
    *(UserError, ValueError, TypeError, ArithmeticError, OSError, ImportError),
    backend.BackendError,
)


@dataclass(frozen=True)
class Choice:
    """What decides which settings `train` has, and their defaults.

    `stages` are the stages to run, one after the other; FMRec has one, None.
    """

    model: str = "fmrec"
    preset: str | None = None
    stages: tuple[str | None, ...] = (None,)


STAGES_OF = {"1": STAGES[:1], "2": STAGES[1:], "both": STAGES}


def choose_settings(argv: Sequence[str]) -> Choice:
    """What the arguments say about the model, its preset and its stages.

    Raises:
        UserError: a stage or a preset is asked of a model that has none.
    """
    import argparse

    if "train" not in argv:
        return Choice()
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    known.add_argument("--model", default="fmrec")
    known.add_argument("--preset")
    known.add_argument("--stage")
    found, _ = known.parse_known_args(argv)
    if found.model != FaveConfig.KIND:
        for name in ("preset", "stage"):
            value = getattr(found, name)
            if value is not None:
                raise UserError(f"--{name} {value} is for --model fave, got {found.model!r}")
        return Choice()
    return Choice(found.model, found.preset, STAGES_OF.get(found.stage or "both", STAGES))


def build_parser(choice: Choice | None = None, stage: str | None = None):
    """The parser of all commands; `train` with the settings of the chosen model and stage.

    Raises:
        UserError: the extra ``[cli]`` is not installed.
    """
    if importlib.util.find_spec("jsonargparse") is None:
        raise UserError("the command line needs more packages: pip install 'fmrec_fast[cli]'")
    from jsonargparse import ArgumentParser

    choice = choice or Choice()
    parser = ArgumentParser(
        prog="fmrec-fast",
        version=__version__,
        description="Train, evaluate and run FMRec and Fave, flow-matching recommenders.",
    )
    commands = parser.add_subcommands(dest="command", required=True)

    train = ArgumentParser(description="Train on a dataset into a run directory.")
    train.add_argument("data", help=f"dataset file, converted folder, or '{demo.SYNTHETIC}'")
    train.add_argument("--out", required=True, help="run directory")
    train.add_argument("--resume", action="store_true", help="continue the run in --out, if any")
    train.add_argument(
        "--model", choices=tuple(CONFIGS), default="fmrec", help="decides the settings below"
    )
    train.add_argument(
        "--stage", choices=tuple(STAGES_OF), default="both", help="of Fave's training"
    )
    train.add_argument(
        "--preset", type=str | None, default=None, help=f"Fave's published settings: {PRESETS}"
    )
    _add_reading(train)
    _add_device(train)
    train.add_argument(
        "--checkpoint_seconds", type=float, default=60.0, help="time between checkpoints"
    )
    train.add_argument(
        "--checkpoint_steps", type=int | None, default=None, help="instead, steps between them"
    )
    train.add_argument(
        "--graph",
        type=bool | None,
        default=None,
        help="steps of whole batches as one CUDA graph; default: on cuda",
    )
    train.add_argument("--max_steps", type=int | None, default=None, help="stop after so many")
    train.add_argument(
        "--config", action="config", help="YAML file of the settings below; flags after it win"
    )
    train.add_class_arguments(CONFIGS[choice.model], None, skip={"item_num", "stage_mode"})
    if choice.preset is not None:
        train.set_defaults(preset(choice.preset, stage or STAGES[0]))
    commands.add_subcommand("train", train, help="train a model")

    turned = ArgumentParser(
        description="Convert interactions of any size into a folder that is mapped, not read: give "
        "it to the other commands as their dataset."
    )
    turned.add_argument("data", help="dataset file, or folder of Parquet or Arrow files")
    turned.add_argument("out", help="folder to make")
    _add_reading(turned, "pkl, inter, csv, tsv, parquet or arrow")
    turned.add_argument(
        "--memory_mb", type=int, default=MEMORY_MB, help="of the sort; some 500 MB come on top"
    )
    turned.add_argument("--verify", action="store_true", help="read all of the result again")
    commands.add_subcommand("convert", turned, help="convert data larger than memory")

    test = ArgumentParser(description="Evaluate a run: HR, NDCG, MRR over the full ranking.")
    test.add_argument("run", help="run directory")
    test.add_argument("data", nargs="?", default=None, help="dataset; default: the run's own")
    _add_reading(test)
    _add_device(test)
    _add_checkpoint(test)
    test.add_argument("--split", choices=("val", "test"), default="test")
    test.add_argument(
        "--ks", type=list[int], default=[5, 10, 20], help="K of the metrics, as in [1,10]"
    )
    test.add_argument("--seeds", type=int, default=1, help="number of sampling seeds, from 0")
    test.add_argument(
        "--exclude_seen", action="store_true", help="leave seen items out of the ranking"
    )
    test.add_argument(
        "--averaging",
        choices=("user", "published"),
        default="user",
        help="mean over users, or of the means of batches of 512 as published",
    )
    test.add_argument("--json", default=None, help="also write the metrics to this file")
    commands.add_subcommand("evaluate", test, help="evaluate a run")

    best = ArgumentParser(description="Recommend items for histories, with external ids.")
    best.add_argument("run", help="run directory")
    whom = best.add_mutually_exclusive_group(required=True)
    whom.add_argument("--history", default=None, help="item ids, oldest first: 12,45,7")
    whom.add_argument(
        "--users",
        default=None,
        help="file of interactions of any users; or Parquet files, as a path, directory, pattern "
        "or URI, of interactions or of histories (a user id and a list of item ids a row)",
    )
    whom.add_argument("--all", action="store_true", help="all users of the run's dataset")
    _add_reading(best)
    _add_device(best)
    _add_checkpoint(best)
    best.add_argument("-k", type=int, default=10, help="items per user")
    best.add_argument("--exclude_seen", action="store_true", help="leave out seen items")
    best.add_argument("--seed", type=int, default=0, help="sampling seed")
    best.add_argument(
        "--out",
        default=None,
        help="file .parquet, .csv or .jsonl (default: print); of --engine ray a directory or URI",
    )
    _add_unknown(best)
    best.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="'ray': Ray Data, from Parquet files into Parquet shards (extra [dist])",
    )
    best.add_argument(
        "--workers", type=int | None, default=None, help="of ray; default: as many as there is room"
    )
    best.add_argument("--worker_cpus", type=int, default=1, help="cores of each worker")
    best.add_argument("--worker_gpus", type=float, default=0.0, help="GPUs of each worker")
    best.add_argument(
        "--batch", type=int, default=8192, help="users that a worker is handed at once"
    )
    commands.add_subcommand("recommend", best, help="recommend from a run")

    vectors = ArgumentParser(
        description="Write item vectors, and query vectors of users, whose inner products are the "
        "scores: for an approximate index over a large catalogue."
    )
    vectors.add_argument("run", help="run directory")
    vectors.add_argument("--out", required=True, help="directory, new or empty")
    vectors.add_argument("--users", default=None, help="as of recommend; default: items only")
    _add_reading(vectors)
    _add_device(vectors)
    _add_checkpoint(vectors)
    vectors.add_argument("--seed", type=int, default=0, help="sampling seed")
    _add_unknown(vectors)
    commands.add_subcommand("export-vectors", vectors, help="vectors for an approximate index")

    fewer = ArgumentParser(
        description="Compare numbers of sampling steps: metrics, overlap of the top items with the "
        "largest number's, FLOPs, latency."
    )
    fewer.add_argument("run", help="run directory")
    fewer.add_argument("data", nargs="?", default=None, help="dataset; default: the run's own")
    _add_reading(fewer)
    _add_device(fewer)
    fewer.add_argument("--checkpoint", choices=("best", "last"), default="best")
    fewer.add_argument("--split", choices=("val", "test"), default="test")
    fewer.add_argument(
        "--steps", type=list[int], default=list(step_study.STEPS), help="as in [1,2,30]"
    )
    fewer.add_argument(
        "--ks", type=list[int] | None, default=None, help="K of the metrics; default: the run's"
    )
    fewer.add_argument("--users", type=int | None, default=None, help="so many, drawn; default all")
    fewer.add_argument("--seed", type=int, default=step_study.SEED, help="sampling seed")
    fewer.add_argument("--out", default=None, help="also write the table to this file, as JSON")
    fewer.add_argument(
        "--plot", default=None, help="also draw it (extra [bench]): .png, .pdf, .svg"
    )
    commands.add_subcommand("steps", fewer, help="what fewer sampling steps cost")

    bench = ArgumentParser(
        description="Time recommendations on this CPU: p50, p90 and p99 of a call, and throughput, "
        "warm and cold (caches swept, weights packed)."
    )
    bench.add_argument("what", choices=("latency",), help="what is timed")
    bench.add_argument("run", nargs="?", default=None, help="run directory; default: random model")
    _add_checkpoint(bench)
    bench.add_argument("--item_num", type=int, default=12102, help="V of the random model")
    bench.add_argument("--hidden_size", type=int, default=128, help="of the random model")
    bench.add_argument("--max_len", type=int, default=50, help="of the random model")
    bench.add_argument("--num_blocks", type=int, default=4, help="of the random model")
    bench.add_argument("--users", type=list[int], default=list(latency.USERS), help="as in [1,8]")
    bench.add_argument(
        "--threads", type=list[int], default=list(latency.THREADS), help="as in [1,2]"
    )
    bench.add_argument("-k", type=int, default=10, help="items per user")
    bench.add_argument("--seconds", type=float, default=1.0, help="about, for each line")
    bench.add_argument("--json", default=None, help="also write the figures to this file")
    commands.add_subcommand("bench", bench, help="time recommendations")

    single = ArgumentParser(
        description="Copy a run with its checkpoints as single files, whichever ranks wrote them."
    )
    single.add_argument("run", help="run directory")
    single.add_argument("out", help="directory to make: a run like any other")
    commands.add_subcommand("export", single, help="copy a run's checkpoints as single files")

    env = ArgumentParser(description="Report versions and backends, and what is missing and why.")
    env.add_argument("--json", action="store_true", help="as JSON")
    commands.add_subcommand("env", env, help="report the installation")

    tour = ArgumentParser(
        description="Train on synthetic data, compare with popularity, recommend, time."
    )
    tour.add_argument("--out", default="runs/demo", help="run directory (replaced)")
    tour.add_argument("--model", choices=tuple(CONFIGS), default="fmrec")
    tour.add_argument("--epochs", type=int, default=demo.CONFIG.epochs)
    commands.add_subcommand("demo", tour, help="the whole tour on synthetic data")
    return parser


def _add_reading(parser: Any, formats: str = "pkl, inter, csv, tsv or parquet") -> None:
    parser.add_argument(
        "--format", type=str | None, default=None, help=f"{formats}; default: by the suffix"
    )
    for role in ("user", "item", "time"):
        parser.add_argument(
            f"--{role}_column", type=str | None, default=None, help="default: by the usual names"
        )
    for role in ("user", "item"):
        parser.add_argument(
            f"--min_{role}",
            type=int | None,
            default=None,
            help=f"keep a {role} only with so many interactions (k-core)",
        )


def _add_device(parser: Any) -> None:
    parser.add_argument(
        "--device", type=str | None, default=None, help="cpu, cuda, ...; default: cuda if there"
    )


def _add_unknown(parser: Any) -> None:
    parser.add_argument(
        "--unknown",
        choices=("error", "skip"),
        default="error",
        help="items of --users that the run does not know; 'skip' leaves them out, and users who "
        "have no other, and counts them",
    )


def _add_checkpoint(parser: Any) -> None:
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--steps", type=int | None, default=None, help="Euler steps")
    parser.add_argument(
        "--padding",
        choices=PADDINGS,
        default="published",
        help="'tied': one noise draw for all padded positions of a row, several times faster",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        choice = choose_settings(argv)
        parsed = [build_parser(choice, stage).parse_args(argv) for stage in choice.stages]
        command, options = parsed[0].command, parsed[0][parsed[0].command]
        backend.keep_freed_memory()
        if command in ON_RANKS:
            with joined(_device(options)) as world:
                if command == "train":
                    for stage, each in zip(choice.stages, parsed):
                        _train(each[command], choice, stage, world)
                else:
                    _evaluate(options, world)
        else:
            _alone(command)
            COMMANDS[command](options)
    except MISTAKES as error:
        print(f"fmrec-fast{_of_rank()}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fmrec-fast: interrupted", file=sys.stderr)
        return 130
    return 0


def _of_rank() -> str:
    rank = os.environ.get("RANK", "0")
    return "" if rank == "0" else f" (rank {rank})"


def _alone(command: str) -> None:
    place = described()
    if place is not None and place[1] > 1:
        raise UserError(
            f"{command} runs in one process, got {place[1]} ranks; those that run on several are "
            f"{', '.join(ON_RANKS)}"
        )


def _device(options: Any) -> torch.device:
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device {name}: {error}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: torch {torch.__version__} sees no CUDA device")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} CUDA devices")
    return device


def _reading(options: Any, path: str) -> dict[str, Any]:
    """The arguments of `read_dataset`, as kept with a run."""
    if path == demo.SYNTHETIC:
        return {"path": demo.SYNTHETIC}
    chosen = {
        "format": options.format,
        "user": options.user_column,
        "item": options.item_column,
        "timestamp": options.time_column,
        "min_user": options.min_user,
        "min_item": options.min_item,
    }
    return {"path": str(Path(path).resolve())} | {k: v for k, v in chosen.items() if v}


def _convert(options: Any) -> None:
    chosen = _reading(options, options.data)
    dataset = convert(chosen.pop("path"), options.out, memory_mb=options.memory_mb, **chosen)
    if options.verify:
        verify(options.out)
    _show(dataset)


def _read(source: dict[str, Any]) -> Dataset:
    if source["path"] == demo.SYNTHETIC:
        return demo.dataset()
    return read_dataset(**source)


def _show(dataset: Dataset) -> None:
    print(f"{dataset!r}\n{dataset.report}", file=sys.stderr)


def _progress_bar(what: str, unit: str, total: int, done: int = 0) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 20.0,  # a log keeps every line
    )


class _Console(training.Listener):
    """Progress bars, and TensorBoard curves when its extra is installed."""

    def __init__(self, run: Path) -> None:
        self._events = run / "tensorboard"
        self._bar: Any = None
        self._writer: Any = None

    def _open(self, what: str, unit: str, total: int, done: int = 0) -> None:
        self._close()
        self._bar = _progress_bar(what, unit, total, done)

    def epoch_started(self, epoch: int, samples: int, done: int) -> None:
        self._open(f"epoch {epoch}", "samples", samples, done)

    def step_done(self, losses: dict[str, float] | None, samples: int) -> None:
        if losses is not None:
            self._bar.set_postfix({"loss": f"{losses['total']:.4f}"}, refresh=False)
        self._bar.update(samples)

    def evaluation_started(self, split: str, users: int) -> None:
        self._open({"val": "validation"}.get(split, split), "users", users)

    def evaluated(self, users: int) -> None:
        self._bar.update(users)

    def epoch_done(self, record: dict[str, Any]) -> None:
        self._close()
        epoch, found = record["epoch"], record.get("validation", {})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in found.items() if "@10" in name)
        print(f"epoch {epoch}: loss {record['loss']['total']:.4f}  {shown}", file=sys.stderr)
        self._write_events(epoch, record["loss"], found)

    def _write_events(self, epoch: int, loss: dict[str, float], found: dict[str, float]) -> None:
        # Opened with the first epoch, so that a refused run leaves no file behind.
        if self._writer is None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._events)
        if self._writer is not None:
            for name, value in loss.items():
                self._writer.add_scalar(f"loss/{name}", value, epoch)
            for name, value in found.items():
                self._writer.add_scalar(f"validation/{name}", value, epoch)
            self._writer.flush()

    def finished(self) -> None:
        self._close()
        if self._writer is not None:
            self._writer.close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _config(options: Any, choice: Choice, stage: str | None) -> FMRecConfig:
    if options.model != choice.model:  # from a file of settings, which are those of the model
        raise UserError(f"--model {options.model} must be given on the command line")
    kind = CONFIGS[choice.model]
    values = {name: options[name] for name in kind.__dataclass_fields__ if name in options}
    if stage is not None:
        values["stage_mode"] = stage
    return kind(**values)


def _train(options: Any, choice: Choice, stage: str | None, world: World) -> None:
    config, source = _config(options, choice, stage), _reading(options, options.data)
    run = Path(options.out)
    if isinstance(config, FaveConfig):
        first, second = (run / name for name in checkpoint.STAGE_DIRECTORIES)
        run = first if stage == STAGES[0] else second
        if run is second and config.ckpt_path is None:
            config = config.replace(ckpt_path=str(first))
        if world.is_main:
            print(f"stage {STAGES.index(config.stage_mode) + 1} into {run}", file=sys.stderr)
    dataset = _read(source)
    if world.is_main:
        _show(dataset)
    console = _Console(run)
    trainer = training.Trainer(
        dataset,
        config,
        run,
        device=world.device,
        checkpoint_seconds=options.checkpoint_seconds,
        checkpoint_steps=options.checkpoint_steps,
        graph=options.graph,
        max_steps=options.max_steps,
        source=source,
        listener=console,
        world=world,
    )
    try:
        result = trainer.fit(resume=options.resume)
    finally:
        console.finished()
    if not world.is_main:
        return
    print(f"test, {result.users} users:")
    _print_metrics({"model": result.mean})


def _load(options: Any, device: torch.device | None = None) -> tuple[FMRecommender, dict[str, Any]]:
    state = checkpoint.load(checkpoint.locate(options.run, options.checkpoint))
    return checkpoint.build_model(state, device or _device(options)), state


def _run_dataset(state: dict[str, Any]) -> Dataset:
    source = state["source"]
    if not source:
        raise UserError("the run does not say where its dataset is; name one")
    dataset = _read(source)
    if dataset.item_ids != state["item_ids"]:
        raise UserError(
            f"{source['path']} no longer holds the items that the run was trained on "
            f"({len(state['item_ids'])} then, {len(dataset.item_ids)} now)"
        )
    return dataset


def with_items(dataset: Dataset, item_ids: list) -> Dataset:
    """`dataset` in the numbering of a run's items.

    Raises:
        ValueError: an item is unknown to the run.
    """
    if dataset.item_ids == item_ids:
        return dataset
    catalogue = Dataset.from_histories([], item_ids=item_ids)
    numbers = catalogue.encode_items(dataset.item_ids)
    return Dataset(
        items=numbers[dataset.items - 1],
        offsets=dataset.offsets,
        item_ids=item_ids,
        user_ids=dataset.user_ids,
        name=dataset.name,
        report=dataset.report,
    )


@contextmanager
def _bar(total: int, what: str):
    with _progress_bar(what, "users", total) as bar:
        yield bar.update


def _evaluate(options: Any, world: World = ALONE) -> None:
    if options.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {options.seeds}")
    model, state = _load(options, world.device)
    if options.data is None:
        dataset = _run_dataset(state)
    else:
        dataset = with_items(_read(_reading(options, options.data)), state["item_ids"])
    if world.is_main:
        _show(dataset)
    samples = EvaluationSamples(dataset, options.split, model.config.max_len)
    total = len(samples) * options.seeds
    with _bar(total, options.split) if world.is_main else nullcontext() as progress:
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
    _print_metrics(columns | {"popularity": baseline})
    if options.json:
        facts = {
            "run": str(options.run),
            "split": options.split,
            "users": found.users,
            "averaging": options.averaging,
            "exclude_seen": options.exclude_seen,
            "steps": options.steps or model.fm.steps,
            "padding": options.padding,
            "mean": found.mean,
            "spread": found.spread,
            "per_seed": found.per_seed,
            "popularity": baseline,
        }
        path = Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, json.dumps(facts, indent=1) + "\n")


def _steps(options: Any) -> None:
    step_study.check_steps(options.steps)
    if options.users is not None and options.users < 1:
        raise UserError(f"--users must be at least 1, got {options.users}")
    if options.plot is not None and Path(options.plot).suffix not in PLOTS:
        raise UserError(f"--plot must end in one of {PLOTS}, got {options.plot!r}")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'fmrec_fast[bench]'")
    model, state = _load(options)
    if options.data is None:
        dataset = _run_dataset(state)
    else:
        dataset = with_items(_read(_reading(options, options.data)), state["item_ids"])
    _show(dataset)
    device = model.item_embeddings.weight.device
    samples = EvaluationSamples(dataset, options.split, model.config.max_len, device)
    count = min(len(samples), options.users or len(samples))
    with _bar(count * (len(options.steps) + 1), "steps") as progress:
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


def _print_metrics(columns: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(columns.values())))
    print(f"{'percent':10}" + "".join(f"{title:>12}" for title in columns))
    for name in names:
        print(f"{name:10}" + "".join(f"{column[name]:12.4f}" for column in columns.values()))


def _recommend(options: Any) -> None:
    if options.engine == "ray":
        _recommend_with_ray(options)
        return
    from fmrec_fast.bulk import BulkRecommender
    from fmrec_fast.tables import SUFFIXES, TableFile

    if options.out is not None and Path(options.out).suffix not in SUFFIXES:
        raise UserError(f"--out must end in one of {SUFFIXES}, got {options.out!r}")
    model, state = _load(options)
    item_ids = state["item_ids"]
    if options.history is not None:
        catalogue = Dataset.from_histories([], item_ids=item_ids)
        given = [part.strip() for part in options.history.split(",") if part.strip()]
        if not given:
            raise UserError(f"--history must list item ids, got {options.history!r}")
        best = recommend(
            model,
            [catalogue.encode_items(given).tolist()],
            options.k,
            exclude_seen=options.exclude_seen,
            steps=options.steps,
            seed=options.seed,
            padding=options.padding,
        )
        _write(options.out, ["history"], best, item_ids)
        return
    recommender = BulkRecommender(model, item_ids, **_bulk_options(options))
    users = _Users(options, state)
    with TableFile(None if options.out is None else Path(options.out)) as file:
        for part in users.batches():
            file.write(recommender(part))
    if options.out is not None:
        print(f"{file.rows} rows for {users.count} users in {options.out}", file=sys.stderr)


def _bulk_options(options: Any) -> dict[str, Any]:
    names = ("k", "exclude_seen", "steps", "seed", "padding")
    return {name: options[name] for name in names if name in options}


class _Users:
    """The users of --users or --all, in batches, with a progress bar; then how many there were."""

    def __init__(self, options: Any, state: dict[str, Any]) -> None:
        self.options, self.item_ids = options, state["item_ids"]
        self.count = 0
        self._dataset: Dataset | None = None
        if options.users is None:
            self._dataset = _run_dataset(state)
        else:
            source, columns = _parquet_source(options)
            if columns is None:
                self._dataset = self._interactions(source)
            else:
                from fmrec_fast.data.users import HistoryEncoder

                self._source = source
                self._columns = columns["user"], columns["item"]
                self._encode = HistoryEncoder(self.item_ids, *self._columns, options.unknown)
        if self._dataset is not None:
            _show(self._dataset)

    def _interactions(self, source: Any) -> Dataset:
        options = self.options
        if options.unknown != "error":
            raise UserError(
                f"--unknown {options.unknown} is for Parquet files of histories and for --engine "
                f"ray, and {options.users} holds interactions"
            )
        chosen = {"min_user": 1} | _reading(options, options.users)
        if source is None:
            dataset = _read(chosen)
        else:
            from fmrec_fast.data.users import read_interactions

            del chosen["path"]
            chosen.pop("format", None)
            dataset = read_interactions(source, **chosen)
        return with_items(dataset, self.item_ids)

    def batches(self) -> Any:
        from fmrec_fast.bulk import batches
        from fmrec_fast.data.users import read_histories

        if self._dataset is not None:
            total, parts = self._dataset.num_users, batches(self._dataset)
        else:
            total = self._source.num_rows()
            parts = map(self._encode, read_histories(self._source, self._columns))
        unknown = without = 0
        with _bar(total, "recommend") as progress:
            for part in parts:
                yield part
                self.count += len(part.users)
                unknown, without = unknown + part.unknown, without + part.without
                progress(len(part.users) + part.without)
        _report_skipped(unknown, without)


def _report_skipped(unknown: int, without: int) -> None:
    if unknown or without:
        print(f"left out {unknown} unknown items, {without} users without others", file=sys.stderr)


def _parquet_source(options: Any) -> tuple[Any, dict[str, str] | None]:
    """Parquet files of --users, None for a file of another format; and the columns of histories,
    None where it holds interactions."""
    from fmrec_fast.data.users import ParquetFiles, history_columns, locate

    location = locate(options.users)
    parquet = location.is_parquet if options.format is None else options.format == "parquet"
    if not parquet:
        if len(location.paths) > 1 or "://" in options.users:
            raise UserError(
                f"--users {options.users}: expected Parquet files, or one file of another format; "
                f"got {location.paths[0]} among {len(location.paths)}"
            )
        return None, None
    source = ParquetFiles(location)
    found = history_columns(source, options.user_column, options.item_column)
    return source, None if found is None else dict(zip(("user", "item"), found, strict=True))


def _recommend_with_ray(options: Any) -> None:
    from fmrec_fast import ray_engine

    if options.users is None or options.out is None:
        raise UserError("--engine ray takes --users and --out")
    ray_engine.require_ray()
    ray_engine.check_out(options.out)
    state = checkpoint.load(checkpoint.locate(options.run, options.checkpoint))
    source, columns = _parquet_source(options)
    if source is None:
        raise UserError(f"--engine ray reads Parquet files, got {options.users}")
    chosen: dict[str, str | None] | None = None if columns is None else dict(columns)
    if chosen is None:
        chosen = _interaction_columns(options, source)
    result = ray_engine.recommend_with_ray(
        state,
        source,
        chosen,
        options.out,
        unknown=options.unknown,
        workers=ray_engine.Workers(options.workers, options.worker_cpus, options.worker_gpus),
        batch=options.batch,
        **_bulk_options(options),
    )
    _report_skipped(result.unknown_items, result.users_left_out)
    print(
        f"{result.rows} rows for {result.users} users in {len(result.shards)} shards in "
        f"{options.out}",
        file=sys.stderr,
    )


def _interaction_columns(options: Any, source: Any) -> dict[str, str | None]:
    from fmrec_fast.data.readers import choose_columns

    for name in ("min_user", "min_item"):
        if options[name] is not None:
            raise UserError(f"--{name} is not for --engine ray, got {options[name]}")
    wanted = {"user": options.user_column, "item": options.item_column}
    found = choose_columns(source, wanted | {"timestamp": options.time_column})
    names: dict[str, str | None] = {role: source.names[at] for role, at in found.items()}
    return {"timestamp": None} | names


def _write(out: str | None, users: Sequence, best: Recommendations, item_ids: list) -> None:
    """One row per user and rank: user, rank, item, score."""
    import pyarrow as pa

    from fmrec_fast.bulk import external_ids, ranked_table
    from fmrec_fast.tables import TableFile

    path = None if out is None else Path(out)
    table = ranked_table(
        pa.array(users), best.scores.cpu().numpy(), best.ids.cpu().numpy(), external_ids(item_ids)
    )
    with TableFile(path) as file:
        file.write(table)
    if path is not None:
        print(f"{file.rows} rows for {len(users)} users in {path}", file=sys.stderr)


def _export_vectors(options: Any) -> None:
    from fmrec_fast.bulk import BulkRecommender
    from fmrec_fast.vectors import export

    model, state = _load(options)
    recommender = BulkRecommender(
        model, state["item_ids"], 1, **{k: v for k, v in _bulk_options(options).items() if k != "k"}
    )
    users = None if options.users is None else _Users(options, state)
    found = export(
        recommender, state["item_ids"], options.out, None if users is None else users.batches()
    )
    print(f"{found} in {options.out}", file=sys.stderr)


def _env(options: Any) -> None:
    if options.json:
        print(json.dumps(environment.report(), indent=1))
    else:
        print("\n".join(environment.lines()))


def _bench(options: Any) -> None:
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
            "latencies": latency.to_dict(found),
        }
        path = Path(options.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        checkpoint.write_text(path, json.dumps(facts, indent=1) + "\n")


def _export(options: Any) -> None:
    for path in checkpoint.export(options.run, options.out):
        print(path)


def _demo(options: Any) -> None:
    run = Path(options.out)
    runs = [run, *(run / stage for stage in checkpoint.STAGE_DIRECTORIES)]
    if run.exists() and not any((part / "last.json").exists() for part in runs):
        raise UserError(f"--out {run} exists and is not a run directory; name another")
    demo.run_demo(run, options.epochs, _Console(run), _print_metrics, model=options.model)


ON_RANKS = ("train", "evaluate")
COMMANDS: dict[str, Callable[..., None]] = {
    "convert": _convert,
    "train": _train,  # once a stage
    "evaluate": _evaluate,
    "export": _export,
    "recommend": _recommend,
    "export-vectors": _export_vectors,
    "steps": _steps,
    "bench": _bench,
    "env": _env,
    "demo": _demo,
}
