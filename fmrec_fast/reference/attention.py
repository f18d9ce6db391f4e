"""Definition of `attention`: multi-head attention after the projections."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrec_fast.forward_mode import is_dual
from fmrec_fast.reference.dropout import dropout
from fmrec_fast.reference.rotary import rotate


def mix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_scale: Tensor,
    *,
    num_heads: int,
    bias: Tensor | None = None,
    drop: Callable[[Tensor], Tensor] | None = None,
    operand: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Attention of the last Lq positions over all L, heads side by side: [B, Lq, D].

    Args:
        q: [B, Lq, D]; k, v: [B, L, D].
        query_scale: [B, Lq], multiplies the queries.
        bias: None or [B, 1, Lq, L], added to the scores.
        drop: dropout of the probabilities as [B, H * Lq, L], or None.
        operand: rounds the operands of both products, or None.
    """
    batch, lq, width = q.shape
    length = k.shape[1]

    def heads(x: Tensor) -> Tensor:  # [B, H, L, D/H]
        return x.view(*x.shape[:2], num_heads, width // num_heads).transpose(1, 2)

    q, k, v = heads(q * query_scale[..., None]), heads(k), heads(v)
    if operand is not None:
        q, k, v = operand(q), operand(k), operand(v)
    if drop is None and operand is None and not is_dual(q, k, v):  # which is not differentiable so
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
    else:
        scores = q @ k.transpose(-1, -2)
        probabilities = softmax(scores if bias is None else scores + bias)
        if drop is not None:
            probabilities = drop(probabilities.view(batch, num_heads * lq, length))
        if operand is not None:
            probabilities = operand(probabilities)
        mixed = probabilities.view(batch, num_heads, lq, length) @ v
    return mixed.transpose(1, 2).reshape(batch, lq, width)


def softmax(scores: Tensor) -> Tensor:
    """``torch.softmax(scores, dim=-1)``."""
    if not is_dual(scores):
        return torch.softmax(scores, dim=-1)
    # PyTorch's own forward-mode rule writes over what its reverse mode needs.
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    return powers / powers.sum(-1, keepdim=True)


def attention(
    qkv: Tensor,
    query_scale: Tensor,
    *,
    num_heads: int,
    p: float = 0.0,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
    site: int = 0,
    inv_freq: Tensor | None = None,
) -> Tensor:
    """`mix` of all positions with dropout from the stream; qkv [B, L, 3D], out [B, L, D].

    A position of the mask's stream is head * L + query, its channel the key. With `inv_freq`
    queries and keys are rotated first.
    """
    q, k, v = qkv.chunk(3, dim=-1)
    if inv_freq is not None:
        q, k = (rotate(x, inv_freq, num_heads) for x in (q, k))
    if p == 0:
        return mix(q, k, v, query_scale, num_heads=num_heads)
    if seed is None or rows is None:
        raise ValueError(f"seed and rows must be given with p = {p}")

    def drop(probabilities: Tensor) -> Tensor:
        return dropout(probabilities, p, seed=seed, rows=rows, site=site)

    return mix(q, k, v, query_scale, num_heads=num_heads, drop=drop)
