"""The arguments of every command."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fmrec_fast import __version__, demo, latency
from fmrec_fast import steps as step_study
from fmrec_fast.cli.common import UserError
from fmrec_fast.config import PADDINGS, PRECISIONS, STAGES, FaveConfig
from fmrec_fast.data.convert import MEMORY_MB
from fmrec_fast.models import CONFIGS
from fmrec_fast.presets import PRESETS, preset


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
    train.add_argument(
        "--shard_items",
        "--shard-items",
        action="store_true",
        help="under torchrun: spread items, the decoder's last layer and their optimizer states "
        "over the ranks",
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
        "--batch", type=int, default=8192, help="users that a worker recommends for at once"
    )
    best.add_argument(
        "--resume", action="store_true", help="of ray: keep the shards of a run that did not finish"
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
    single.add_argument(
        "--inference",
        action="store_true",
        help="the best checkpoint alone, without the decoder: weights to publish",
    )
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
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the matrix products' operands; faster where the machine has units for it",
    )
