"""Definition of `rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor

RMS_EPS = 1e-8


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """x / sqrt(mean(x^2) + 1e-8) * weight over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + RMS_EPS) * weight
