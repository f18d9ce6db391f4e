"""Definition of `encoder`: the transformer stack, last position out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrec_fast.reference.attention import mix
from fmrec_fast.reference.dropout import activate
from fmrec_fast.reference.linear import linear as linear_definition

NORM_EPS = 1e-12
SITES_PER_BLOCK = 5
EMBEDDING_SITE = 0


class BlockWeights(NamedTuple):
    """Parameters of one pre-norm transformer block; Linear weights are [out, in]."""

    norm1_weight: Tensor
    norm1_bias: Tensor
    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor
    w1_weight: Tensor
    w1_bias: Tensor
    w2_weight: Tensor
    w2_bias: Tensor


Linear = Callable[[Tensor, Tensor, Tensor], Tensor]


class Drop(Protocol):
    """Dropout at one of the stack's sites (see `dropout_sites`)."""

    def __call__(
        self,
        x: Tensor,
        p: float,
        site: int,
        *,
        residual: Tensor | None = None,
        activation: str | None = None,
        position_offset: int = 0,
        position_stride: int = 1,
    ) -> Tensor: ...


class Attend(Protocol):
    """`attention` of all positions, dropout included, in the place of its definition."""

    def __call__(
        self, qkv: Tensor, query_scale: Tensor, *, num_heads: int, p: float, site: int
    ) -> Tensor: ...


def no_drop(
    x: Tensor,
    p: float,
    site: int,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    **_: int,
) -> Tensor:
    """The `Drop` of evaluation."""
    x = activate(x, activation)
    return x if residual is None else residual + x


def rounded(x: Tensor, precision: str) -> Tensor:
    """`x` as an operand of a product of this precision, in the dtype of `x`.

    'float32' is `x` itself; 'tf32' keeps 10 bits of mantissa, rounded to nearest, halves away
    from 0; 'bf16' is bfloat16. The gradient passes as if nothing were rounded.
    """
    if precision == "float32":
        return x
    if precision == "bf16":
        near = x.detach().to(torch.bfloat16)
    else:
        bits = x.detach().to(torch.float32).view(torch.int32)
        near = ((bits + 0x1000) & -0x2000).view(torch.float32)
    return x + (near.to(x.dtype) - x).detach()


def dropout_sites(block: int) -> tuple[int, int, int, int, int]:
    """Site numbers of one block, in order of use: attention probabilities, attention output,
    feed-forward inner, feed-forward output, block output. The last norm's site is the first of
    block `num_blocks`."""
    first = EMBEDDING_SITE + 1 + SITES_PER_BLOCK * block
    return tuple(range(first, first + SITES_PER_BLOCK))  # type: ignore[return-value]


def attention_bias(mask: Tensor, kind: str) -> Tensor | None:
    """What is added to the scores [B, H, L, L]; None for the published attention.

    'causal': a position sees itself and earlier real positions (the paper's text at eq. 15).
    """
    if kind == "published":
        return None
    length = mask.shape[1]
    here = torch.arange(length, device=mask.device)
    earlier = here[None, :] < here[:, None]
    visible = (earlier[None] & (mask > 0)[:, None, :]) | torch.eye(
        length, dtype=torch.bool, device=mask.device
    )
    return torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, -torch.inf)[:, None]


def first_key_bias_of(bias: Tensor, length: int) -> Tensor:
    """What is added to the scores [B, 1, L, L] where the first token stands for exp(bias) equal
    ones: `bias` [B], as a key, to every query."""
    added = F.pad(bias[:, None], (0, length - 1))
    return added[:, None, None, :].expand(-1, 1, length, -1)


def attention(
    queries_from: Tensor,
    keys_from: Tensor,
    w: BlockWeights,
    query_mask: Tensor,
    *,
    num_heads: int,
    bias: Tensor | None,
    drop: Drop,
    p: float,
    site: int,
    linear: Linear,
    attend: Attend | None = None,
    precision: str = "float32",
) -> Tensor:
    """Multi-head attention of the last Lq positions over all L.

    As published, a padded query's scores are all equal, so its attention is uniform over all L
    keys and no key is hidden: zeroing the padded queries is the same function.

    Args:
        queries_from: [B, Lq, D], the last Lq rows of the normed input.
        keys_from: [B, L, D].
        query_mask: [B, Lq], 1 at real positions.
        bias: None or [B, 1, Lq, L].
        attend: computes the whole published attention in the definition's place.
        precision: see `encoder`; `linear` rounds its own operands.
    """
    length, width = keys_from.shape[1:]
    lq = queries_from.shape[1]
    query_scale = query_mask * (width // num_heads) ** -0.5
    # One product for all projections of the same input.
    names = ("query", "key", "value") if lq == length else ("key", "value")
    weight = torch.cat([getattr(w, f"{name}_weight") for name in names])
    projection_bias = torch.cat([getattr(w, f"{name}_bias") for name in names])
    projected = linear(keys_from, weight, projection_bias)
    if attend is not None and lq == length and bias is None:
        mixed = attend(projected, query_scale, num_heads=num_heads, p=p, site=site)
    else:
        parts = projected.split(width, dim=-1)
        q = parts[0] if lq == length else linear(queries_from, w.query_weight, w.query_bias)

        def drop_probabilities(probabilities: Tensor) -> Tensor:
            # A position of the mask's stream is head * L + query; the last Lq of each head.
            stride = length if lq == 1 else 1
            return drop(probabilities, p, site, position_offset=length - lq, position_stride=stride)

        mixed = mix(
            q,
            parts[-2],
            parts[-1],
            query_scale,
            num_heads=num_heads,
            bias=bias,
            drop=None if drop is no_drop or p == 0 else drop_probabilities,
            operand=None if precision == "float32" else partial(rounded, precision=precision),
        )
    return linear(mixed, w.output_weight, w.output_bias)


def block(
    x: Tensor,
    w: BlockWeights,
    mask: Tensor,
    *,
    num_heads: int,
    bias: Tensor | None = None,
    drop: Drop = no_drop,
    p: float = 0.0,
    index: int = 0,
    last_only: bool = False,
    linear: Linear = linear_definition,
    attend: Attend | None = None,
    precision: str = "float32",
) -> Tensor:
    """One block (paper, section 4.2): [B, L, D] -> [B, L, D], or [B, 1, D] with `last_only`.

    ``x = x + drop(attn(norm1 x)); x = x + drop(ffn(norm2 x)); x = drop(x)``
    """
    length, width = x.shape[1:]
    sites = dropout_sites(index)
    normed = F.layer_norm(x, (width,), w.norm1_weight, w.norm1_bias, NORM_EPS)
    start = length - 1 if last_only else 0
    if bias is not None:
        bias = bias[:, :, start:]
    attended = attention(
        normed[:, start:],
        normed,
        w,
        mask[:, start:],
        num_heads=num_heads,
        bias=bias,
        drop=drop,
        p=p,
        site=sites[0],
        linear=linear,
        attend=attend,
        precision=precision,
    )
    x = drop(attended, p, sites[1], residual=x[:, start:], position_offset=start)
    normed = F.layer_norm(x, (width,), w.norm2_weight, w.norm2_bias, NORM_EPS)
    inner = linear(normed, w.w1_weight, w.w1_bias)
    inner = drop(inner, p, sites[2], activation="gelu", position_offset=start)
    x = drop(linear(inner, w.w2_weight, w.w2_bias), p, sites[3], residual=x, position_offset=start)
    return drop(x, p, sites[4], position_offset=start)


def _rounded_linear(x: Tensor, weight: Tensor, bias: Tensor, precision: str) -> Tensor:
    return linear_definition(rounded(x, precision), rounded(weight, precision), bias)


def encoder(
    x: Tensor,
    mask: Tensor,
    blocks: list[BlockWeights],
    *,
    num_heads: int,
    attention: str = "published",
    tap: int | None = None,
    drop: Drop = no_drop,
    p: float = 0.0,
    prune: bool = True,
    linear: Linear = linear_definition,
    attend: Attend | None = None,
    precision: str = "float32",
    first_key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """All blocks; only the last position leaves.

    Args:
        x: [B, L, D]; mask: [B, L], 1 at real positions.
        tap: index of the block whose output at the last position is returned too, or None.
        drop, p: dropout; its sites are numbered by `dropout_sites`.
        prune: compute the last block at the last position only (the same function).
        linear: computes the linear layers.
        attend: see `attention`.
        precision: both operands of every product are `rounded` to it and multiplied in float32;
            with one that is not 'float32', `linear` and `attend` are not used.
        first_key_bias: [B], see `first_key_bias_of`; published attention only.

    Returns:
        ([B, D] output of the last block, [B, D] output of block `tap` or None).
    """
    tapped = None
    bias = attention_bias(mask, attention)
    if precision != "float32":
        attend, linear = None, partial(_rounded_linear, precision=precision)
    if first_key_bias is not None:
        bias = first_key_bias_of(first_key_bias, x.shape[1])
    for index, weights in enumerate(blocks):
        x = block(
            x,
            weights,
            mask,
            num_heads=num_heads,
            bias=bias,
            drop=drop,
            p=p,
            index=index,
            last_only=prune and index == len(blocks) - 1,
            linear=linear,
            attend=attend,
            precision=precision,
        )
        if index == tap:
            tapped = x[:, -1]
    return x[:, -1], tapped
