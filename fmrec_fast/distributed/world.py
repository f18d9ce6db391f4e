"""The ranks of a run, as torchrun describes them, and the few things they tell one another."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")
# What torchrun sets for every process that it starts.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """One rank's place among the ranks of a run. The default is a run of one process, in which
    nothing is exchanged.

    All methods but `share` and `is_main` are to be called by every rank, in the same order.

    Args:
        rank, size: this rank of how many.
        device: where this rank trains; tensors of other ranks are on devices of the same type.
        checkpoints: a process group of its own for what is written in the background, so that it
            never meets the collectives of a training step.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    checkpoints: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.size == 1

    def share(self, total: int, rank: int | None = None) -> range:
        """This rank's (or another's) part of 0 .. total-1: contiguous, in the order of the ranks,
        of sizes that differ by at most 1; empty for some ranks if there are more of them."""
        rank = self.rank if rank is None else rank
        return range(total * rank // self.size, total * (rank + 1) // self.size)

    def largest_share(self, total: int) -> int:
        """Of all ranks."""
        return -(-total // self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place, the same to the bit on each."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Of each, whether it holds on any rank; one exchange."""
        if self.alone:
            return flags
        return tuple(self.sum(torch.tensor(flags, dtype=torch.int64)).bool().tolist())

    def gather(self, own: Tensor, total: int) -> Tensor:
        """Each rank's rows `own` [len(share(total)), ...], put together: [total, ...]."""
        if self.alone:
            return own
        # Collectives take equal parts: a share that is one row short is filled up.
        equal = own.new_zeros(self.largest_share(total), *own.shape[1:])
        equal[: len(own)] = own
        parts = [torch.empty_like(equal) for _ in range(self.size)]
        dist.all_gather(parts, equal)
        return torch.cat([part[: len(self.share(total, rank))] for rank, part in enumerate(parts)])

    def mesh(self) -> DeviceMesh:
        """All ranks in one row, for what is spread over them."""
        return init_device_mesh(self.device.type, (self.size,))

    def shares(self, total: int) -> list[int]:
        """The sizes of all ranks' `share`."""
        return [len(self.share(total, rank)) for rank in range(self.size)]

    def decide(self, value: T) -> T:
        """What rank 0 says, whatever the others were given."""
        if self.alone:
            return value
        said = [value]
        dist.broadcast_object_list(said, src=0, device=torch.device("cpu"))
        return said[0]


ALONE = World()


def described(environment: Mapping[str, str] | None = None) -> tuple[int, int, int] | None:
    """(rank, size, local rank) from torchrun's variables; None where there are none.

    Raises:
        ValueError: some are missing, or are not what they should be.
    """
    environment = os.environ if environment is None else environment
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return None
    missing = [name for name in VARIABLES if name not in environment]
    if missing:
        given = [f"{name}={environment[name]}" for name in VARIABLES if name in environment]
        raise ValueError(
            f"the environment has {', '.join(given)} but no {', '.join(missing)}; start the ranks "
            "with torchrun, or remove these variables to train in one process"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = environment[name]
        if not text.isdecimal():
            raise ValueError(f"{name} must be a number, got {text!r}")
        numbers[name] = int(text)
    rank, size, local = numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]
    if not (0 <= local <= rank < size):
        raise ValueError(
            f"expected LOCAL_RANK <= RANK < WORLD_SIZE, got {local}, {rank} and {size}"
        )
    return rank, size, local


def own_device(device: torch.device, local_rank: int) -> torch.device:
    """The device of one of several ranks on a machine: the CPU, or the CUDA device of its number.

    Raises:
        ValueError: a device number was asked for, or there are fewer devices than ranks.
    """
    if device.type != "cuda":
        return device
    if str(device) != device.type:
        raise ValueError(f"every rank has a device of its own: expected 'cuda', got '{device}'")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"this machine has {count} CUDA devices, fewer than ranks (this is number {local_rank}"
            ", from 0); start at most one rank for each device"
        )
    return torch.device("cuda", local_rank)


def fresh_store(store: dist.Store, rank: int, size: int, patience: float = 600.0) -> dist.Store:
    """The part of `store` that this attempt of a run alone uses.

    torchrun's store outlives a restart (torch 2.13), and in it the addresses of ranks that are
    gone. Rank 0 names the attempt; the others answer, each with a number of its own, and take the
    name once rank 0 has repeated that number: an earlier attempt's rank 0 never does.

    Raises:
        TimeoutError: rank 0 was not heard of for `patience` seconds.
    """
    own, ended = uuid.uuid4().hex, time.monotonic() + patience
    if rank == 0:
        store.set("attempt", own)
        answers = [store.get(f"{own}/{other}").decode() for other in range(1, size)]
        store.set(f"{own}/all", " ".join(answers))
        return dist.PrefixStore(own, store)
    while time.monotonic() < ended:
        named = store.get("attempt").decode()
        store.set(f"{named}/{rank}", own)
        try:
            store.wait([f"{named}/all"], timedelta(seconds=1))
        except dist.DistStoreError:
            continue
        if own in store.get(f"{named}/all").decode().split():
            return dist.PrefixStore(named, store)
        time.sleep(0.05)
    raise TimeoutError(f"rank {rank} of {size} heard nothing of rank 0 for {patience:.0f} seconds")


@contextmanager
def joined(device: torch.device | str = "cpu") -> Iterator[World]:
    """The `World` that torchrun's environment describes, its process groups up within the block;
    without torchrun, or with one rank, a single process and no groups.

    gloo carries what is on a CPU, NCCL what is on CUDA devices.

    Raises:
        ValueError: the environment is incomplete, or there are too few devices.
    """
    device, place = torch.device(device), described()
    if place is None or place[1] == 1:
        yield World(device=device)
        return
    rank, size, local = place
    device = own_device(device, local)
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    store, _, _ = next(dist.rendezvous("env://"))
    store = fresh_store(store, rank, size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield World(rank, size, device, dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()
