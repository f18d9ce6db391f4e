"""Rotary position embedding in its half-split form, part of the definition of `attention`."""

from __future__ import annotations

import torch
from torch import Tensor

ROTARY_BASE = 10000.0


def inverse_frequencies(head_width: int) -> Tensor:
    """Angles per position: 10000^(-2 j / W), j = 0 .. W / 2 - 1, float32."""
    return 1.0 / ROTARY_BASE ** (torch.arange(0, head_width, 2).float() / head_width)


def angles(inv_freq: Tensor, length: int, first: int = 0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions first .. first + length - 1: [L, W / 2] each."""
    positions = torch.arange(first, first + length, device=inv_freq.device, dtype=inv_freq.dtype)
    angle = positions[:, None] * inv_freq
    return angle.cos(), angle.sin()


def rotate(x: Tensor, inv_freq: Tensor, num_heads: int, *, first: int = 0) -> Tensor:
    """Rotate the pairs (j, j + W / 2) of every head's W channels by the angle of the position.

    Args:
        x: [B, L, D], heads side by side; inv_freq: [W / 2].
        first: position of the first row.
    """
    cos, sin = (part[:, None] for part in angles(inv_freq.to(x.dtype), x.shape[1], first))
    low, high = x.unflatten(-1, (num_heads, 2, -1)).unbind(-2)  # [B, L, H, W / 2]
    rotated = torch.stack((low * cos - high * sin, high * cos + low * sin), dim=-2)
    return rotated.flatten(-3)
