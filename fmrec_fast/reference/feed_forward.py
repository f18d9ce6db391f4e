"""Definition of `feed_forward`: the second half of a transformer block, in training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fmrec_fast.reference.dropout import dropout
from fmrec_fast.reference.linear import linear

NORM_EPS = 1e-12


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    p: float,
    *,
    seed: Tensor,
    rows: Tensor,
    site: int = 0,
    position_offset: int = 0,
    position_stride: int = 1,
    precision: str = "float32",
) -> Tensor:
    """drop(x + drop(drop(gelu(norm(x) W1^T + b1)) W2^T + b2)): [B, P, D]."""

    def drop(x: Tensor, which: int, residual: Tensor | None = None, gelu: bool = False) -> Tensor:
        return dropout(
            x,
            p,
            seed=seed,
            rows=rows,
            site=site + which,
            residual=residual,
            activation="gelu" if gelu else None,
            position_offset=position_offset,
            position_stride=position_stride,
        )

    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, NORM_EPS)
    inner = drop(linear(normed, w1, b1, precision), 0, gelu=True)
    return drop(drop(linear(inner, w2, b2, precision), 1, residual=x), 2)
