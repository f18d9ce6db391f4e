"""The command line ``fmrec-fast`` (needs the extra ``[cli]``)."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from fmrec_fast import backend
from fmrec_fast.cli.common import MISTAKES, UserError, choose_device
from fmrec_fast.cli.evaluate import compare_steps, evaluate_run
from fmrec_fast.cli.parser import build_parser, choose_settings
from fmrec_fast.cli.recommend import export_vectors, recommend_users
from fmrec_fast.cli.tools import bench, convert_data, export_run, run_tour, show_environment
from fmrec_fast.cli.train import train_run
from fmrec_fast.distributed.world import described, joined

ON_RANKS = ("train", "evaluate")
COMMANDS: dict[str, Callable[..., None]] = {
    "convert": convert_data,
    "train": train_run,  # once a stage
    "evaluate": evaluate_run,
    "export": export_run,
    "recommend": recommend_users,
    "export-vectors": export_vectors,
    "steps": compare_steps,
    "bench": bench,
    "env": show_environment,
    "demo": run_tour,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        argv = sys.argv[1:] if argv is None else argv
        choice = choose_settings(argv)
        parsed = [build_parser(choice, stage).parse_args(argv) for stage in choice.stages]
        command, options = parsed[0].command, parsed[0][parsed[0].command]
        backend.keep_freed_memory()
        if command in ON_RANKS:
            with joined(choose_device(options)) as world:
                if command == "train":
                    for stage, each in zip(choice.stages, parsed):
                        train_run(each[command], choice, stage, world)
                else:
                    evaluate_run(options, world)
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
