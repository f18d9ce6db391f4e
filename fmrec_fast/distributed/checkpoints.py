"""Checkpoints of several ranks: torch.distributed.checkpoint into safetensors files.

A checkpoint's directory holds::

    state.json                   as in the single-file form, and what the shards must be
    shards/*.safetensors         one file a rank: its rows of what is over ranks, and its part of
                                 what all ranks hold

Every file is safetensors or JSON: reading a checkpoint runs no code of whoever wrote it. The ranks
write into a directory with a temporary name, in the background, from a copy; when all of them are
done, rank 0 flushes it, gives it its name, and only then makes the run's pointer name it. All ranks
must see the same run directory.
"""

from __future__ import annotations

import math
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor

from fmrec_fast import checkpoint
from fmrec_fast.distributed.world import World


class Saver:
    """Writes a run's checkpoints: those of one rank at once and as a single file, those of
    several in the background. One is written at a time.

    All methods but `poll` are to be called by every rank, in the same order.
    """

    def __init__(self, run: Path, world: World) -> None:
        self.run, self.world = run, world
        self._pending: tuple[Future, Path, str, str, dict[str, Any]] | None = None

    def save(self, name: str, role: str, state: dict[str, Any]) -> None:
        """As `checkpoint.save`; `state` may change as soon as this returns."""
        if self.world.alone:
            checkpoint.save(self.run, name, role, state)
            return
        self.wait()
        temporary = self.run / "checkpoints" / f".{name}.new"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            (temporary / checkpoint.SHARDS).mkdir(parents=True)
        dist.barrier(self.world.checkpoints)
        tensors: dict[str, Tensor] = {}
        tree = checkpoint.split(state, tensors)
        tree["ranks"] = self.world.size
        tree["tensors"] = {
            path: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
            for path, tensor in tensors.items()
        }
        writer = dcp.HuggingFaceStorageWriter(
            str(temporary / checkpoint.SHARDS), save_distributed=True
        )
        written = dcp.async_save(
            tensors, storage_writer=writer, process_group=self.world.checkpoints
        )
        if not isinstance(written, Future):
            written = written.upload_completion
        self._pending = written, temporary, name, role, tree

    def poll(self) -> None:
        """Let a checkpoint count that has been written meanwhile; waits for nothing."""
        if self._pending is not None and self._pending[0].done():
            self._finish()

    def wait(self) -> None:
        """Until what was saved is a checkpoint that every rank can read."""
        if self.world.alone:
            return
        self._finish()
        dist.barrier(self.world.checkpoints)

    def _finish(self) -> None:
        """Rank 0's write ends when all ranks' have."""
        if self._pending is None:
            return
        written, temporary, name, role, tree = self._pending
        self._pending = None
        try:
            written.result()
        except dcp.api.CheckpointException as error:  # which is no Exception
            raise checkpoint.CheckpointError(
                f"{temporary} could not be written: {_cause(error)}"
            ) from None
        if self.world.is_main:
            files = sorted((temporary / checkpoint.SHARDS).iterdir())
            tree["files"] = {file.name: file.stat().st_size for file in files}
            checkpoint.publish(self.run, temporary, name, role, tree)


def read_shards(
    directory: Path, tree: dict[str, Any], into: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a checkpoint of several ranks, by their path; those in `into` are read in
    place, a DTensor its own rows only, the others whole, to the CPU.

    Raises:
        CheckpointError: a file is missing, of another size, or foreign; a tensor does not fit.
    """
    shards = directory / checkpoint.SHARDS
    found = {file.name: file.stat().st_size for file in shards.glob("*")}
    if found != tree["files"]:
        wrong = [name for name, size in tree["files"].items() if found.get(name) != size]
        foreign = sorted(set(found) - set(tree["files"]))
        raise checkpoint.CheckpointError(
            f"{shards}: expected the {len(tree['files'])} files that {tree['ranks']} ranks wrote; "
            + "; ".join(
                f"{what} {', '.join(names)}"
                for what, names in (("missing or truncated:", wrong), ("foreign:", foreign))
                if names
            )
        )
    tensors: dict[str, Tensor] = {}
    for path, (name, shape) in tree["tensors"].items():
        tensor, dtype = into.get(path), getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise checkpoint.CheckpointError(f"{directory}: {path} has the unknown dtype {name!r}")
        if tensor is None:
            tensor = torch.empty(shape, dtype=dtype)
        elif list(tensor.shape) != shape:
            raise checkpoint.CheckpointError(
                f"{directory}: {path} has shape {shape}, expected {list(tensor.shape)}"
            )
        tensors[path] = tensor
    reader = dcp.HuggingFaceStorageReader(str(shards))
    try:
        stored = reader.read_metadata().state_dict_metadata
        for path, (_, shape) in tree["tensors"].items():
            parts = getattr(stored.get(path), "chunks", [])
            held = sum(math.prod(part.sizes) for part in parts)
            if not parts or held != math.prod(shape):
                raise checkpoint.CheckpointError(
                    f"{shards} holds {held} numbers of {path}, expected {math.prod(shape)}; are "
                    "all files of this checkpoint?"
                )
        with warnings.catch_warnings():
            # Every rank reads what it needs by itself, so that none waits for one that failed.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            dcp.load(dict(tensors), storage_reader=reader, no_dist=True)
    except checkpoint.CheckpointError:
        raise
    except (dcp.api.CheckpointException, *checkpoint.UNREADABLE) as error:
        raise checkpoint.CheckpointError(f"{shards} is damaged: {_cause(error)}") from None
    return tensors


def _cause(error: BaseException) -> str:
    if isinstance(error, dcp.api.CheckpointException):
        return "; ".join(str(wrapped[0]) for wrapped in error.failures.values())
    return str(error)
