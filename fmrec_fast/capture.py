"""A function over static tensors, run again and again: from a CUDA graph, or by calling it.

Knows nothing of models: the sampler is captured with it (`graphs`), and a training step may be.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fmrec_fast.backend import Dispatch, dispatch_log, log_again

Outputs = tuple[Tensor, ...]
# The first run compiles and tunes kernels, the second runs as any later one would.
WARMUPS = 2

# CUDA captures one graph at a time in a process.
_capturing = threading.Lock()


class Pool:
    """Memory that captures on one CUDA device share; on a CPU there is nothing to share.

    What one capture leaves free the others use, so that together they take about as much as the
    largest. Their replays must then not overlap, and one overwrites the outputs of another.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        if self.device.type == "cuda":
            self.handle = torch.cuda.graph_pool_handle()
            # Blocks belong to the stream that they were made on, so all captures are on this one.
            self.stream = torch.cuda.Stream(self.device)


class Capture:
    """`function`, its launches recorded once and issued as one by each `replay`.

    Equivalent PyTorch::

        replay = function

    The function takes no arguments. It reads (and may write) tensors that the caller keeps, fills
    with ``copy_`` before a replay, and never replaces. On CUDA what Python reads in it is read
    once, at the capture; it may not look at values on the device nor copy from the host.

    On CUDA it is run `warmups` times on a side stream, then captured; `changes` and the random
    generators are afterwards as they were before, so that a capture leaves no trace. The numbers
    that it draws from the default generator (or from `generators`) are new at every replay: those
    that calling it in the replay's place would have drawn, governed by ``torch.manual_seed``. On a
    CPU nothing is run before the first replay, and every replay calls the function.

    Either way the outputs are the same tensors after every replay, and overwritten by the next one:
    copy what is to stay. `dispatch_log` sees a replay as it sees a call.

    Args:
        function: returns a tuple of tensors, which may be empty.
        pool: where it runs, and the memory it shares with other captures.
        warmups: runs before the capture; at least one, since kernels are compiled in the first.
        changes: tensors that the function changes and the warm-up must not (weights, an
            optimizer's state).
        generators: of the random numbers that the function draws, besides the default one.

    Raises:
        ValueError: no warm-up.
    """

    def __init__(
        self,
        function: Callable[[], Outputs],
        pool: Pool,
        *,
        warmups: int = WARMUPS,
        changes: Sequence[Tensor] = (),
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        if warmups < 1:
            raise ValueError(f"warmups must be at least 1, got {warmups}")
        self.function, self.pool = function, pool
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: Outputs | None = None
        self._log: list[Dispatch] = []
        if pool.device.type == "cuda":
            with _capturing, torch.cuda.device(pool.device):
                self._warm_up_and_capture(warmups, changes, generators)

    def replay(self) -> Outputs:
        """Run once, on the current stream of the pool's device; the outputs."""
        if self.graph is None or self.outputs is None:
            return self._call()
        with torch.cuda.device(self.pool.device):
            self.graph.replay()
        log_again(self._log)
        return self.outputs

    def _call(self) -> Outputs:
        fresh = self.function()
        if self.outputs is None:
            with torch.inference_mode(False):
                self.outputs = tuple(torch.empty_like(tensor) for tensor in fresh)
        with torch.no_grad():
            for kept, tensor in zip(self.outputs, fresh, strict=True):
                kept.copy_(tensor)
        return self.outputs

    def _warm_up_and_capture(
        self, warmups: int, changes: Sequence[Tensor], generators: Sequence[torch.Generator]
    ) -> None:
        current, side = torch.cuda.current_stream(), self.pool.stream
        saved = [tensor.detach().clone() for tensor in changes]
        states = [generator.get_state() for generator in generators]
        with torch.random.fork_rng([torch.cuda.current_device()], device_type="cuda"):
            side.wait_stream(current)
            with torch.cuda.stream(side), dispatch_log():
                for _ in range(warmups):
                    self.function()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            for generator in generators:
                graph.register_generator_state(generator)
            # Other threads may allocate meanwhile; under the mode 'global' that is an error.
            recorder = torch.cuda.graph(
                graph, pool=self.pool.handle, stream=side, capture_error_mode="thread_local"
            )
            with dispatch_log() as log, recorder:
                self.outputs = self.function()
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        with torch.no_grad():
            for tensor, value in zip(changes, saved, strict=True):
                tensor.copy_(value)
        self.graph, self._log = graph, log
