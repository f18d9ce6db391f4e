"""Checkpoints: safetensors for tensors, JSON for the rest, written atomically.

A run directory holds::

    last.json, best.json         which checkpoint is which (replaced in one rename)
    checkpoints/<name>/
        tensors.safetensors      model/*, optimizer/*, rng/*, ...
        state.json               configuration, item ids, position in the run, and the tree in
                                 which the tensors hang

Several ranks write another form (`distributed.checkpoints`), which `load` reads as well. Nothing is
unpickled in either.

A checkpoint is written under a temporary name, flushed to disk, renamed, and only then named by
`last.json`: a run killed at any moment leaves a whole checkpoint behind.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmrec_fast.models import CONFIGS, FMRecommender, build_recommender
from fmrec_fast.ops._checks import is_sharded

FORMAT = "fmrec_fast checkpoint"
VERSION = 1
SHARDED = 2  # the version of what several ranks wrote
TENSORS, STATE, SHARDS = "tensors.safetensors", "state.json", "shards"
UNREADABLE = (OSError, KeyError, ValueError, RuntimeError, AssertionError, SafetensorError)
# Where a run in stages keeps each: its run directories, first to last.
STAGE_DIRECTORIES = ("stage1", "stage2")
# What an export for inference keeps of a state, and leaves out of its model.
INFERENCE = ("kind", "config", "model", "item_ids", "epoch", "global_step")
DECODER = ".xstart_model.decoder."
_TENSOR_KEY, _DICT_KEY = "$tensor", "$dict"


class CheckpointError(ValueError):
    """A checkpoint that is missing, truncated, or not ours."""


def _split(tree: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """`tree` with every tensor moved to `tensors` and replaced by its key."""
    if isinstance(tree, Tensor):
        while path in tensors:  # {0: ..., "0": ...} and {"a/b": ...} beside {"a": {"b": ...}}
            path += "'"
        tensors[path] = tree.detach()
        return {_TENSOR_KEY: path}
    if isinstance(tree, dict):
        # JSON keys are strings, an optimizer's are parameter numbers: both are kept as pairs.
        return {
            _DICT_KEY: [
                [key, _split(value, f"{path}/{key}", tensors)] for key, value in tree.items()
            ]
        }
    if isinstance(tree, list | tuple):
        return [_split(value, f"{path}/{i}", tensors) for i, value in enumerate(tree)]
    return tree


def _join(tree: Any, tensors: dict[str, Tensor] | None) -> Any:
    """Undo `_split`; without tensors, None is in their place."""
    if isinstance(tree, dict):
        if _TENSOR_KEY in tree:
            return None if tensors is None else tensors[tree[_TENSOR_KEY]]
        if _DICT_KEY not in tree:
            raise ValueError(f"expected {_DICT_KEY!r} or {_TENSOR_KEY!r}, got {list(tree)}")
        return {key: _join(value, tensors) for key, value in tree[_DICT_KEY]}
    if isinstance(tree, list):
        return [_join(value, tensors) for value in tree]
    return tree


def split(state: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Any]:
    """What `STATE` holds of `state`; its tensors go to `tensors`, by path."""
    return {"format": FORMAT, "version": VERSION, "state": _split(state, "", tensors)}


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a file in one step: it holds the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _flush(path.parent)


def save(run: str | Path, name: str, role: str, state: dict[str, Any]) -> Path:
    """Write `state` (a tree of plain values and tensors) and make it the run's `role`.

    Args:
        run: directory of the run, created where needed.
        name: name of this checkpoint, e.g. 'last-00000120'; numbered where it is taken.
        role: 'last' or 'best'; the role's earlier checkpoint is removed afterwards.
    """
    run = Path(run)
    temporary = run / "checkpoints" / f".{name}.new"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    tree = split(state, tensors)
    tensors = {path: tensor.contiguous().cpu() for path, tensor in tensors.items()}
    save_file(tensors, temporary / TENSORS)
    return publish(run, temporary, name, role, tree)


def publish(run: Path, temporary: Path, name: str, role: str, tree: dict[str, Any]) -> Path:
    """Make the tensors in the directory `temporary` a checkpoint of this name and the run's `role`,
    with `tree` beside them."""
    target, again = run / "checkpoints" / name, 0
    while target.exists():  # it may be the run's only good one, so it stays until this one is
        again += 1
        target = target.with_name(f"{name}.{again}")
    if "files" in tree:
        tree["version"] = SHARDED
    (temporary / STATE).write_text(json.dumps(tree))
    for part in sorted(temporary.rglob("*")):
        _flush(part)
    _flush(temporary)
    os.replace(temporary, target)
    _flush(target.parent)
    write_text(run / f"{role}.json", json.dumps({"checkpoint": target.name}))
    for old in target.parent.iterdir():
        if old.name.lstrip(".").startswith(f"{role}-") and old != target:
            shutil.rmtree(old, ignore_errors=True)
    return target


def locate(run: str | Path, role: str = "best") -> Path:
    """The directory of a run's 'best' (or, where there is none, 'last') checkpoint; of a run in
    stages, that of its latest stage.

    Raises:
        CheckpointError: not a run directory, or it has no such checkpoint.
    """
    run = Path(run)
    if not run.is_dir():
        raise CheckpointError(f"{run} is not a directory; expected that of a training run")
    for stage in reversed(STAGE_DIRECTORIES):
        if (run / stage / "last.json").is_file():
            return locate(run / stage, role)
    candidates = (role, "last") if role == "best" else (role,)
    for candidate in candidates:
        if (run / f"{candidate}.json").is_file():
            return _pointed(run, candidate)
    missing = " and no ".join(f"{candidate}.json" for candidate in candidates)
    raise CheckpointError(f"{run} holds no {missing}; expected the directory of a training run")


def _pointed(run: Path, role: str) -> Path:
    """What a run's pointer names."""
    pointer = run / f"{role}.json"
    found = _read_json(pointer)
    if not isinstance(found, dict) or not isinstance(found.get("checkpoint"), str):
        raise CheckpointError(f"{pointer}: expected a 'checkpoint' name, got {found!r}")
    return run / "checkpoints" / found["checkpoint"]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing from the checkpoint") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is truncated or not JSON: {error}") from None


def load(
    directory: str | Path,
    into: dict[str, Tensor] | None = None,
    accept: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """The state that was saved, by one rank or several; tensors on the CPU.

    Args:
        directory: of the checkpoint.
        into: tensors to read in place, by their path in the state (as 'model/LayerNorm.bias'), of
            a DTensor the rows of this rank only.
        accept: called with the state before a tensor is read, None in the place of each; raises
            what it has against it.

    Raises:
        CheckpointError: a file is missing, truncated, or of another program or version.
    """
    directory = Path(directory)
    tree = _read_json(directory / STATE)
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        found = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
        raise CheckpointError(f"{directory / STATE}: expected format {FORMAT!r}, got {found!r}")
    version = tree.get("version")
    if version not in (VERSION, SHARDED):
        raise CheckpointError(
            f"{directory / STATE}: expected version {VERSION} or {SHARDED}, got {version!r}"
        )
    for part in ("state", *(("files", "tensors", "ranks") if version == SHARDED else ())):
        if part not in tree:
            raise CheckpointError(f"{directory / STATE} is damaged: it has no {part!r}")
    try:
        if accept is not None:
            accept(_join(tree["state"], None))
    except KeyError as error:
        raise CheckpointError(f"{directory / STATE} lacks {error}") from None
    into = {f"/{path}": tensor for path, tensor in (into or {}).items()}
    if version == SHARDED:
        from fmrec_fast.distributed.checkpoints import read_shards

        tensors = read_shards(directory, tree, into)
    else:
        tensors = _read_file(directory / TENSORS, into)
    try:
        return _join(tree["state"], tensors)
    except KeyError as error:
        raise CheckpointError(f"{directory / TENSORS} lacks the tensor {error}") from None
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{directory / STATE} is damaged: {error}") from None


def _read_file(path: Path, into: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the single file; those in `into` are read in place."""
    try:
        if not into:
            return load_file(path)
        with safe_open(path, "pt") as file:
            return {name: _read(path, file, name, into.get(name)) for name in file.keys()}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing from the checkpoint") from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} is truncated or foreign: {error}") from None


def _read(path: Path, file: Any, name: str, target: Tensor | None) -> Tensor:
    if target is None:
        return file.get_tensor(name)
    part = file.get_slice(name)
    if part.get_shape() != list(target.shape):
        raise CheckpointError(
            f"{path}: {name} has shape {part.get_shape()}, expected {list(target.shape)}"
        )
    own = target
    if is_sharded(target):
        from torch.distributed.tensor import DTensor
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        whole = cast(DTensor, target)
        own = whole.to_local()
        placed = compute_local_shape_and_global_offset(
            whole.shape, whole.device_mesh, whole.placements
        )
        part = part[tuple(slice(at, at + size) for size, at in zip(*placed))]
    else:
        part = file.get_tensor(name)
    with torch.no_grad():
        own.copy_(part)
    return target


def export(run: str | Path, out: str | Path, *, inference: bool = False) -> list[Path]:
    """Copy a run with its checkpoints in the single-file form, whoever wrote them.

    Args:
        run: directory of a run.
        out: directory to make; it is then a run like any other.
        inference: only what recommending reads: the best checkpoint of the latest stage, without
            the decoder, which training alone runs, and without the dataset's path. It cannot be
            trained further.

    Returns:
        The checkpoints written.

    Raises:
        FileExistsError: `out` exists.
        CheckpointError: `run` is no run, or a checkpoint cannot be read.
    """
    run, out = Path(run), Path(out)
    locate(run, "last")
    if out.exists():
        raise FileExistsError(f"{out} exists; name a directory that does not")
    if inference:
        best = locate(run)
        state = {key: value for key, value in load(best).items() if key in INFERENCE}
        weights = {k: w for k, w in state["model"].items() if DECODER not in k}
        return [save(out, best.name, "best", state | {"model": weights, "source": None})]
    written = []
    parts = [part for part in ("", *STAGE_DIRECTORIES) if (run / part / "last.json").is_file()]
    for part in parts:
        for role in ("best", "last"):  # one that is cut short has no last.json
            if (run / part / f"{role}.json").is_file():
                found = locate(run / part, role) if part else _pointed(run, role)
                written.append(save(out / part, found.name, role, load(found)))
        for name in ("metrics.jsonl", "result.json"):
            if (run / part / name).is_file():
                write_text(out / part / name, (run / part / name).read_text())
    return written


def build_model(state: dict[str, Any], device: torch.device | str = "cpu") -> FMRecommender:
    """The joint model of a loaded checkpoint, in evaluation mode.

    Raises:
        CheckpointError: the state has no model, or its tensors do not fit its configuration.
    """
    for key in ("config", "model", "item_ids"):
        if key not in state:
            raise CheckpointError(f"the checkpoint has no {key!r}; it holds {sorted(state)}")
    kind = state.get("kind", "fmrec")  # older checkpoints are of FMRec
    if kind not in CONFIGS:
        raise CheckpointError(f"the checkpoint is of the model {kind!r}, not of {list(CONFIGS)}")
    config, weights = CONFIGS[kind].from_dict(state["config"]), state["model"]
    bare = not any(DECODER in name for name in weights)  # an export for inference
    model = build_recommender(config.replace(decoder_dims=(1, 1)) if bare else config)
    if bare:
        rest = {k: torch.zeros_like(w) for k, w in model.state_dict().items() if DECODER in k}
        weights = rest | weights
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"the tensors do not fit the configuration: {error}") from None
    return model.to(device).eval()


def starting_weights(
    path: str | Path,
    into: dict[str, Tensor] | None = None,
    accept: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Tensor]:
    """The weights that a stage 2 starts from.

    Args:
        path: a run directory (its best checkpoint), a checkpoint's directory, or a file that
            ``torch.save`` wrote of a published model's state dict.
        into, accept: as of `load`; a file says nothing that could be refused.

    Raises:
        CheckpointError: it is none of these.
    """
    path = Path(path)
    if path.is_file():
        if into:
            raise CheckpointError(
                f"{path}: tables over ranks start from a run or a checkpoint's directory, got a "
                "file"
            )
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise CheckpointError(f"{path} is not a state dict of torch.save: {error}") from None
        if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
            raise CheckpointError(f"{path}: expected a state dict, got {type(state).__name__}")
        return state
    directory = path if (path / STATE).is_file() else locate(path)
    state = load(directory, into, accept)
    if "model" not in state:
        raise CheckpointError(f"{directory} has no 'model'; it holds {sorted(state)}")
    return state["model"]


def rng_state() -> dict[str, Tensor]:
    """States of torch's default generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Tensor]) -> None:
    """Undo `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
