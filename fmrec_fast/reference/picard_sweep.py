"""Definition of `picard_sweep`: the network at all points of a guessed trajectory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def picard_sweep(
    x: Tensor,
    fuse: Callable[[Tensor, int], Tensor],
    encode: Callable[[Tensor], Tensor],
    *,
    steps_at_once: int = 1,
) -> Tensor:
    """pred[:, i] = encode(fuse(x[:, i], i)): what the Euler steps evaluate one after the other.

    Args:
        x: guessed trajectory [B, q, D], x_i at i.
        fuse: (x_i [B, D], i) -> fused history [B, L, D], with the noise of step i.
        encode: [S B, L, D] of S consecutive steps -> [S B, D]: encoder and final norm.
        steps_at_once: S.

    Returns:
        [B, q, D].
    """
    parts = [x.new_empty(0, len(x), x.shape[2])]
    for first in range(0, x.shape[1], steps_at_once):
        steps = range(first, min(first + steps_at_once, x.shape[1]))
        fused = torch.cat([fuse(x[:, i], i) for i in steps])
        parts.append(encode(fused).reshape(len(steps), len(x), x.shape[2]))
    return torch.cat(parts).transpose(0, 1)
