"""Which networks the persistent kernels take, and how each is laid out on a multiprocessor."""

from __future__ import annotations

from typing import NamedTuple

import torch

WIDTHS = (32, 64, 128, 256)
LONGEST = 256
WIDEST_HEAD = 64


class Plan(NamedTuple):
    """How one program is cut: tile sizes (see `kernels/transformer.py`) and threads."""

    T: int
    CHUNK: int
    LAST_CHUNK: int
    STACKED: bool
    STAGES: int
    warps: int


def plan(
    length: int, width: int, num_heads: int, precision: str, device: torch.device
) -> Plan | str:
    """The plan for sequences of `length` positions, or why there is none."""
    if width not in WIDTHS:
        return f"its kernel takes D in {WIDTHS}, got {width}"
    if width // num_heads > WIDEST_HEAD:
        return f"its kernel takes heads of at most {WIDEST_HEAD} channels, got {width // num_heads}"
    if length > LONGEST:
        return f"its kernel takes L up to {LONGEST}, got {length}"
    tile = max(16, 1 << (length - 1).bit_length())
    return Plan(tile, min(128, 4 * width), 4096 // width, True, 2, 8)
