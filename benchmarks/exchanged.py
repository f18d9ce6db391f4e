"""What a rank sends: every collective of torch.distributed, whoever calls it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Exchanged(TorchDispatchMode):
    """Inside, counts calls and the bytes that this rank sends to others, by kind.

    An all-reduce and a broadcast are counted as rings are: 2 (N-1)/N and (N-1)/N of the tensor.
    A collective that is not known here raises, so that none is missed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> float:
        """Bytes of all kinds."""
        return float(sum(self.bytes.values()))

    def __torch_dispatch__(self, function, types, arguments=(), options=None) -> Any:
        if function.namespace in ("c10d", "_c10d_functional"):
            self._count(function._opname, arguments)
        return function(*arguments, **(options or {}))

    def _count(self, name: str, arguments: tuple[Any, ...]) -> None:
        ranks, rank = dist.get_world_size(), dist.get_rank()
        sent: float
        if name == "_allgather_base_":
            kind, sent = "all-gather", arguments[1].nbytes * (ranks - 1)
        elif name == "allgather_":
            kind, sent = "all-gather", sum(map(_size, arguments[1])) * (ranks - 1)
        elif name == "alltoall_base_":
            x, parts = arguments[1], arguments[4]
            others = sum(parts) - parts[rank]
            kind, sent = "all-to-all", others * x.nbytes / max(len(x), 1)
        elif name == "allreduce_":
            kind, sent = "all-reduce", 2 * (ranks - 1) / ranks * sum(map(_size, arguments[0]))
        elif name == "broadcast_":
            kind, sent = "broadcast", (ranks - 1) / ranks * sum(map(_size, arguments[0]))
        elif name == "barrier":
            kind, sent = "barrier", 0.0
        else:
            raise NotImplementedError(f"the collective {name} is not counted")
        self.bytes[kind] += sent
        self.calls[kind] += 1


def _size(tensor: Tensor) -> int:
    return tensor.nbytes
