"""What the commands share: mistakes, datasets, models, progress bars, tables."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fmrec_fast import backend, checkpoint, demo
from fmrec_fast.data import Dataset, read_dataset
from fmrec_fast.models import FMRecommender


class UserError(Exception):
    """A mistake in what was asked for; printed without a traceback."""


# ValueError and its like carry the value and what was expected; OSError names the file.
MISTAKES = (
    *(UserError, ValueError, TypeError, ArithmeticError, OSError, ImportError),
    backend.BackendError,
)


def choose_device(options: Any) -> torch.device:
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


def reading(options: Any, path: str) -> dict[str, Any]:
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


def read(source: dict[str, Any]) -> Dataset:
    if source["path"] == demo.SYNTHETIC:
        return demo.dataset()
    return read_dataset(**source)


def show(dataset: Dataset) -> None:
    print(f"{dataset!r}\n{dataset.report}", file=sys.stderr)


def run_dataset(state: dict[str, Any]) -> Dataset:
    source = state["source"]
    if not source:
        raise UserError("the run does not say where its dataset is; name one")
    dataset = read(source)
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


def load_model(
    options: Any, device: torch.device | None = None
) -> tuple[FMRecommender, dict[str, Any]]:
    state = checkpoint.load(checkpoint.locate(options.run, options.checkpoint))
    return checkpoint.build_model(state, device or choose_device(options)), state


def progress_bar(what: str, unit: str, total: int, done: int = 0) -> Any:
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


@contextmanager
def users_bar(total: int, what: str):
    with progress_bar(what, "users", total) as bar:
        yield bar.update


def print_metrics(columns: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(columns.values())))
    print(f"{'percent':10}" + "".join(f"{title:>12}" for title in columns))
    for name in names:
        print(f"{name:10}" + "".join(f"{column[name]:12.4f}" for column in columns.values()))
