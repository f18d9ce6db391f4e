"""Where a forward pass takes its random numbers from: the stream, or the published draws."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from fmrec_fast import noise
from fmrec_fast.backend import Rng, current_rng
from fmrec_fast.ops import StreamDropout, TorchDropout
from fmrec_fast.ops._checks import request_rows
from fmrec_fast.reference.encoder import Drop


class RandomSource(ABC):
    """The random numbers of one forward pass over B rows.

    `seed` and `rows` key the stream (None: published draws); `prunes` tells whether what is not
    needed may be left out, which it may not where the order of draws counts.
    """

    seed: Tensor | None
    rows: Tensor
    prunes: bool

    @abstractmethod
    def start(self, width: int) -> Tensor:
        """z0 ~ N(0, I): [B, D]."""

    @abstractmethod
    def uniforms(self) -> Tensor:
        """u ~ U[0, 1): [B]."""

    @abstractmethod
    def normals(self) -> Tensor:
        """One standard normal per row: [B]."""

    @abstractmethod
    def lam(self, shape: torch.Size, delta: float) -> Tensor | None:
        """lam [B, L, D] if it is drawn ahead, None if noise fusion generates it."""

    @abstractmethod
    def at_step(self, step: int) -> RandomSource:
        """The source of one sampler step, whose lam and dropouts are its own."""

    @abstractmethod
    def dropout(self) -> Drop:
        """The dropouts."""

    @abstractmethod
    def interval(self) -> tuple[Tensor, Tensor]:
        """Two uniforms per row for the end of Fave's interval: where, and whether at 1."""

    @abstractmethod
    def anchor(self, width: int, ratio: float) -> tuple[Tensor, Tensor]:
        """For Fave's anchor: u ~ U[0, 1) of its position [B], and the Bernoulli(ratio) mask over
        its channels, bool [B, D]."""

    @abstractmethod
    def path(self, site: int) -> Tensor:
        """u ~ U[0, 1) for one use of drop path: [B]."""


class StreamSource(RandomSource):
    """Everything is a function of (seed, row, position, ...)."""

    prunes = True

    def __init__(self, seed: Tensor, rows: Tensor) -> None:
        self.seed: Tensor = seed
        self.rows = rows

    def start(self, width: int) -> Tensor:
        return noise.start(self.seed, self.rows, width)

    def uniforms(self) -> Tensor:
        return noise.uniforms(self.seed, self.rows)

    def normals(self) -> Tensor:
        return noise.time_normals(self.seed, self.rows)

    def lam(self, shape: torch.Size, delta: float) -> None:
        return None

    def at_step(self, step: int) -> StreamSource:
        return StreamSource(noise.step_seed(self.seed, step), self.rows)

    def dropout(self) -> Drop:
        return StreamDropout(self.seed, self.rows)

    def interval(self) -> tuple[Tensor, Tensor]:
        return noise.interval(self.seed, self.rows)

    def anchor(self, width: int, ratio: float) -> tuple[Tensor, Tensor]:
        u, keep = noise.anchor(self.seed, self.rows, width)
        return u, keep < ratio

    def path(self, site: int) -> Tensor:
        return noise.path(self.seed, self.rows, site)


class PublishedSource(RandomSource):
    """Torch's default generator, in the order of the published program; lam on the host."""

    prunes = False
    seed = None

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def start(self, width: int) -> Tensor:
        return torch.randn(len(self.rows), width, device=self.rows.device)

    def uniforms(self) -> Tensor:
        return torch.rand(len(self.rows), device=self.rows.device)

    def normals(self) -> Tensor:
        return torch.randn(len(self.rows), device=self.rows.device)

    def lam(self, shape: torch.Size, delta: float) -> Tensor:
        full = torch.full(shape, delta)
        return torch.normal(mean=full, std=full).to(self.rows.device)

    def at_step(self, step: int) -> PublishedSource:
        return self

    def dropout(self) -> Drop:
        return TorchDropout()

    def interval(self) -> tuple[Tensor, Tensor]:
        return self.uniforms(), self.uniforms()

    def anchor(self, width: int, ratio: float) -> tuple[Tensor, Tensor]:
        chance = torch.full((len(self.rows), width), ratio, device=self.rows.device)
        return self.uniforms(), torch.bernoulli(chance).bool()

    def path(self, site: int) -> Tensor:
        return self.uniforms()


def random_source(
    batch: int,
    device: torch.device,
    *,
    seed: int | Tensor | None = None,
    rows: Tensor | None = None,
) -> RandomSource:
    """The source in force: the stream if a seed is given or `current_rng()` says so.

    Raises:
        TypeError, ValueError: bad `seed` or `rows`.
    """
    rows = request_rows(rows, batch, device)
    if seed is None and current_rng() is Rng.PUBLISHED:
        return PublishedSource(rows)
    return StreamSource(noise.as_seed(seed, device), rows)
