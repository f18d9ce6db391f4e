"""Definition of `dropout_layer_norm`: the embedded history's dropout and norm, in training."""

from __future__ import annotations

from torch import Tensor

from fmrec_fast.reference.dropout import dropout
from fmrec_fast.reference.encoder import layer_norm


def dropout_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    p: float,
    *,
    seed: Tensor,
    rows: Tensor,
    site: int = 0,
    position_offset: int = 0,
    position_stride: int = 1,
) -> Tensor:
    """layer_norm(drop(x)) with eps 1e-12: [B, P, D]."""
    dropped = dropout(
        x,
        p,
        seed=seed,
        rows=rows,
        site=site,
        position_offset=position_offset,
        position_stride=position_stride,
    )
    return layer_norm(dropped, weight, bias)
