"""The sizes that are timed, and seeded data of these sizes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fmrec_fast import FMRecConfig, FMRecommender
from fmrec_fast.reference.published import PublishedRecommender

# Log-normal fits to the history lengths of Amazon Beauty, truncated at 50:
# test histories (mean 7.7, median 5, 90% up to 13), training prefixes (8.4, 4, 22).
TEST_LENGTHS = {"shift": 3, "median": 2.0, "sigma": 1.31}
TRAIN_LENGTHS = {"shift": 0, "median": 4.0, "sigma": 1.21}
POPULARITY_EXPONENT = 0.8


@dataclass(frozen=True)
class Sizes:
    """Symbols as in the paper: L positions, D channels, V items, q steps."""

    length: int
    width: int
    items: int
    steps: int
    blocks: int
    decoder: tuple[int, int]
    sampling_batches: tuple[int, ...]
    batch: int
    small_batch: int
    # (B, V, k) of item_ranking
    ranking_cases: tuple[tuple[int, int, int], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


FULL = Sizes(
    length=50,
    width=128,
    items=12102,
    steps=30,
    blocks=4,
    decoder=(512, 2048),
    sampling_batches=(1, 8, 32, 64, 512, 4096),
    batch=512,
    small_batch=32,
    ranking_cases=(
        *((512, 12_102, 20), (512, 100_000, 100)),
        *((512, 1_000_000, 100), (1, 1_000_000, 100)),
    ),
)
QUICK = Sizes(
    length=20,
    width=32,
    items=500,
    steps=4,
    blocks=2,
    decoder=(64, 128),
    sampling_batches=(8,),
    batch=8,
    small_batch=8,
    ranking_cases=((8, 500, 20), (64, 12_102, 20)),
)


def config_of(sizes: Sizes, **changes: Any) -> FMRecConfig:
    """Published settings at these sizes."""
    return FMRecConfig(
        item_num=sizes.items,
        hidden_size=sizes.width,
        max_len=sizes.length,
        num_blocks=sizes.blocks,
        last=min(2, sizes.blocks - 1),
        decoder_dims=sizes.decoder,
        sample_N=sizes.steps,
    ).replace(**changes)


def histories(
    batch: int, sizes: Sizes, device: torch.device, *, lengths: dict[str, float] = TEST_LENGTHS
) -> Tensor:
    """Left-padded histories of Beauty-like lengths, items by popularity: int64 [B, L].

    Lengths are drawn for L = 50 and scaled to other L.
    """
    generator = torch.Generator().manual_seed(1997)
    drawn = torch.randn(batch, generator=generator) * lengths["sigma"] + math.log(lengths["median"])
    count = lengths["shift"] + drawn.exp().round().clamp(min=1)
    count = (count.clamp(max=50) * sizes.length / 50).ceil().long()
    popularity = torch.arange(1, sizes.items).float() ** -POPULARITY_EXPONENT
    shuffled = torch.randperm(sizes.items - 1, generator=generator) + 1
    ids = shuffled[
        torch.multinomial(
            popularity, batch * sizes.length, replacement=True, generator=generator
        ).view(batch, sizes.length)
    ]
    real = torch.arange(sizes.length) >= sizes.length - count[:, None]
    return (ids * real).to(device)


def targets(batch: int, sizes: Sizes, device: torch.device) -> Tensor:
    """int64 [B, 1], 1 .. V-1."""
    generator = torch.Generator().manual_seed(1998)
    return torch.randint(1, sizes.items, (batch, 1), generator=generator).to(device)


def normal(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    """Seeded standard normals."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def models(config: FMRecConfig, device: torch.device) -> tuple[FMRecommender, PublishedRecommender]:
    """Ours and the published program with the same weights (random: speed does not depend on
    them)."""
    torch.manual_seed(1997)
    published = PublishedRecommender.from_config(config).to(device)
    ours = FMRecommender.from_config(config).to(device)
    ours.load_state_dict(published.state_dict())
    return ours, published


def drawn_zero_cells(sequence: Tensor, num_items: int) -> Tensor:
    """As many zero cells of the multi-hot matrix as it has ones, with replacement: [N, 2]."""
    generator = torch.Generator().manual_seed(1999)
    wanted = torch.zeros(sequence.shape[0], num_items)
    wanted.scatter_(1, sequence.cpu(), 1.0)[:, 0] = 0
    zeros = (wanted == 0).nonzero()
    chosen = torch.randint(0, len(zeros), (int(wanted.sum()),), generator=generator)
    return zeros[chosen].to(sequence.device)
