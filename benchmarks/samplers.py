"""The samplers that are compared, over one batch of histories."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.inputs import FULL, Sizes, config_of, histories, models
from benchmarks.peers import Tuned
from fmrec_fast import sample


class Samplers:
    """Functions (steps, rows=all, **given) -> [rows, D] over the same weights and histories.

    Args:
        compile_mode: of `compiled`; None where nothing is compiled.
    """

    def __init__(
        self, sizes: Sizes, device: torch.device, batch: int, compile_mode: str | None = None
    ) -> None:
        self.model, self._published = models(config_of(sizes), device)
        self.model.eval()
        self._published.eval()
        self._tuned = Tuned(self._published)
        self._compiled = Tuned(self._published, compile_mode) if compile_mode else None
        self.sequence = histories(batch, sizes, device)

    def published(self, steps: int, rows: int | None = None, **given: Tensor) -> Tensor:
        """The published program; draws its noise on the host."""
        self._published.fm.sample_N = steps
        with torch.no_grad():
            return self._published(self.sequence[:rows], None, train_flag=False, **given)[1]

    def tuned(self, steps: int, rows: int | None = None, **given: Tensor) -> Tensor:
        """A good PyTorch user's version of it."""
        return self._tuned.sample(self.sequence[:rows], steps, **given)

    def compiled(self, steps: int, rows: int | None = None, **given: Tensor) -> Tensor:
        """The same under torch.compile; another number of rows compiles anew."""
        if self._compiled is None:
            raise RuntimeError("compiled was not asked for")
        return self._compiled.sample(self.sequence[:rows], steps, **given)

    def ours(self, steps: int, rows: int | None = None, **options: Any) -> Tensor:
        """`fmrec_fast.sample`, step by step unless `options` say otherwise."""
        return sample(self.model, self.sequence[:rows], steps=steps, **options)

    def parallel(self, steps: int, rows: int | None = None, **options: Any) -> Tensor:
        """All steps at once."""
        return self.ours(steps, rows, method="parallel", **options)

    def auto(self, steps: int, rows: int | None = None, **options: Any) -> Tensor:
        """Whichever of the two is expected to be faster."""
        return self.ours(steps, rows, method="auto", **options)


def prepare(name: str, batch: int) -> Callable[[], Any]:
    """The sampler `name` at full size, ready for one call, for `memory.extra_bytes`."""
    run = getattr(Samplers(FULL, torch.device("cpu"), batch), name)
    few = 2
    run(few, 1)  # what is allocated once stays out of the count
    # Memory does not grow with the steps, except for 'parallel', which takes all at once.
    return partial(run, FULL.steps if name == "parallel" else few)
