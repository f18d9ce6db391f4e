"""Definition of `self_attention`: the first half of a transformer block, in training."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fmrec_fast.reference.attention import mix
from fmrec_fast.reference.dropout import dropout
from fmrec_fast.reference.feed_forward import NORM_EPS
from fmrec_fast.reference.linear import linear


def self_attention(
    x: Tensor,
    query_scale: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    p: float,
    *,
    num_heads: int,
    seed: Tensor,
    rows: Tensor,
    site: int = 0,
    last_only: bool = False,
    precision: str = "float32",
) -> Tensor:
    """x + drop(attention(norm(x)) W_o^T + b_o): [B, L, D], or [B, 1, D] with `last_only`."""
    length = x.shape[1]
    start = length - 1 if last_only else 0

    def drop_probabilities(probabilities: Tensor) -> Tensor:
        # A position of the mask's stream is head * L + query.
        return dropout(
            probabilities,
            p,
            seed=seed,
            rows=rows,
            site=site,
            position_offset=start,
            position_stride=length if last_only else 1,
        )

    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, NORM_EPS)
    mixed = mix(
        linear(normed[:, start:], query_weight, query_bias, precision),
        linear(normed, key_weight, key_bias, precision),
        linear(normed, value_weight, value_bias, precision),
        query_scale[:, start:],
        num_heads=num_heads,
        drop=drop_probabilities if p > 0 else None,
    )
    branch = linear(mixed, output_weight, output_bias, precision)
    return dropout(
        branch,
        p,
        seed=seed,
        rows=rows,
        site=site + 1,
        residual=x[:, start:],
        position_offset=start,
    )
