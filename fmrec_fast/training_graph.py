"""A training step issued as one CUDA graph, and its losses read without waiting for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from fmrec_fast.capture import Capture, Pool


class GraphedStep:
    """`step` on batches of one size from one CUDA graph; every other batch, and the first, eagerly.

    Equivalent PyTorch::

        step(fetched)

    The first batch is run eagerly, since it makes the optimizer's state; before the second the
    step is captured. Seeds are drawn inside, so every replay has its own noise, dropout and
    cells: those that the eager step would have had. On a CPU a replay calls `step` on the same
    static buffer.

    Args:
        step: one training step on what `TrainingSamples.fetch` gave; may not wait for the device.
        batch_size: of the graph.
        changes: lists the tensors that a step changes; asked once there is an optimizer's state.
        device: where the step runs.
    """

    def __init__(
        self,
        step: Callable[[Tensor], None],
        batch_size: int,
        changes: Callable[[], Iterable[Tensor]],
        device: torch.device,
    ) -> None:
        self.step, self.changes, self.device = step, changes, device
        self.batch_size = batch_size
        self.fetched = torch.empty(0)
        self.capture: Capture | None = None
        self._warm = False

    def reset(self) -> None:
        """Forget the graph, because a tensor that it reads or writes has been replaced."""
        self.capture, self._warm = None, False

    def __call__(self, fetched: Tensor) -> None:
        if len(fetched) != self.batch_size or not self._warm:
            self._warm = True
            self.step(fetched)
            return
        if self.capture is None:
            self.fetched = fetched.clone()
            # One run is enough of a warm-up: kernels were compiled in the eager step.
            self.capture = Capture(
                self._on_buffer, Pool(self.device), warmups=1, changes=list(self.changes())
            )
        self.fetched.copy_(fetched)
        self.capture.replay()

    def _on_buffer(self) -> tuple[Tensor, ...]:
        self.step(self.fetched)
        return ()


@contextmanager
def rate_as_tensor(optimizer: torch.optim.Optimizer, rate: Tensor) -> Iterator[None]:
    """Let the optimizer read its learning rate from `rate`, which a graph finds changed; outside
    of the block it is the plain number that schedules and checkpoints know."""
    plain = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = rate
    try:
        yield
    finally:
        for group, number in zip(optimizer.param_groups, plain, strict=True):
            group["lr"] = number


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor of the optimizer's state."""
    states = (value for state in optimizer.state.values() for value in state.values())
    return [value for value in states if isinstance(value, Tensor)]


class Glance:
    """A small tensor of a device as it was a little while ago, without waiting for it.

    On a CPU, as it is now.
    """

    def __init__(self, source: Tensor) -> None:
        self.source = source
        self._at = 0
        self._arrived: torch.cuda.Event | None = None
        if source.device.type == "cuda":
            self._landing = torch.empty_like(source, device="cpu", pin_memory=True)

    def __call__(self, now: int) -> tuple[int, Tensor] | None:
        """(moment, value then), `now` being the name of this moment; None: nothing arrived yet."""
        if self.source.device.type == "cpu":
            return now, self.source
        if self.source.device.type != "cuda":
            return None
        found = None
        if self._arrived is not None:
            if not self._arrived.query():
                return None
            found = self._at, self._landing.clone()
        self._at = now
        with torch.cuda.device(self.source.device):
            self._landing.copy_(self.source, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        return found
