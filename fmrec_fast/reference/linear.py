"""Definition of `linear`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x weight^T + bias: [..., I] -> [..., O]."""
    return F.linear(x, weight, bias)
