"""Definition of `encoder`: the transformer stack, last position out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrec_fast.forward_mode import is_dual
from fmrec_fast.reference.attention import mix
from fmrec_fast.reference.dropout import activate, add_scaled
from fmrec_fast.reference.linear import linear as linear_definition
from fmrec_fast.reference.linear import rounded
from fmrec_fast.reference.rms_norm import rms_norm as rms_norm_definition
from fmrec_fast.reference.rotary import rotate

NORM_EPS = 1e-12
SITES_PER_BLOCK = 5
EMBEDDING_SITE = 0
CROSS_SITE = 1 << 16  # Fave's cross-attention: two sites a block from here on


class Variant(NamedTuple):
    """What kind of block the stack is made of; the parts that differ between the models.

    Args:
        norm: 'layer' (eps 1e-12, weight and bias) or 'rms' (eps 1e-8, weight only).
        rotary: queries and keys are rotated by their position.
        block_dropout: a dropout after the block.
    """

    norm: str
    rotary: bool
    block_dropout: bool


FMREC = Variant("layer", rotary=False, block_dropout=True)
FAVE = Variant("rms", rotary=True, block_dropout=False)


class BlockWeights(NamedTuple):
    """Parameters of one pre-norm transformer block; Linear weights are [out, in].

    An RMS norm has no bias; `inv_freq` [D / H / 2] holds the angles per position of the rotary
    embedding, None where there is none.
    """

    norm1_weight: Tensor
    norm1_bias: Tensor | None
    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    norm2_weight: Tensor
    norm2_bias: Tensor | None
    w1_weight: Tensor
    w1_bias: Tensor
    w2_weight: Tensor
    w2_bias: Tensor
    inv_freq: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        """The parameters that there are."""
        return [tensor for tensor in self if tensor is not None]


class CrossWeights(NamedTuple):
    """Parameters of Fave's cross-attention step; the gate's weights have no bias."""

    norm_weight: Tensor
    query_weight: Tensor
    query_bias: Tensor
    key_weight: Tensor
    key_bias: Tensor
    value_weight: Tensor
    value_bias: Tensor
    output_weight: Tensor
    output_bias: Tensor
    inv_freq: Tensor
    se_relu: Tensor
    se_weight1: Tensor
    se_weight2: Tensor
    gamma: Tensor


# Drop path: (block, branch) -> factor of each row [B], or None where nothing is dropped. The
# branches are 0 attention, 1 cross-attention, 2 feed-forward.
Paths = Callable[[int, int], "Tensor | None"]

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
Norm = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


class Drop(Protocol):
    """Dropout at one of the stack's sites (see `dropout_sites`).

    `row_scale` is asked, after the mask is drawn, for what each row [B] is multiplied by before the
    residual is added; None is 1.
    """

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
        row_scale: Callable[[], Tensor | None] | None = None,
    ) -> Tensor: ...


class Attend(Protocol):
    """`attention` of all positions, dropout included, in the place of its definition."""

    def __call__(
        self,
        qkv: Tensor,
        query_scale: Tensor,
        *,
        num_heads: int,
        p: float,
        site: int,
        inv_freq: Tensor | None,
    ) -> Tensor: ...


class SelfAttend(Protocol):
    """A block's first half, its dropouts included, in the definition's place; None where it does
    not cover `x`."""

    def __call__(
        self,
        x: Tensor,
        w: BlockWeights,
        query_scale: Tensor,
        *,
        num_heads: int,
        p: float,
        site: int,
        last_only: bool,
    ) -> Tensor | None: ...


class Feed(Protocol):
    """A block's second half, its dropouts included, in the definition's place; None where it does
    not cover `x`."""

    def __call__(
        self, x: Tensor, w: BlockWeights, *, p: float, site: int, position_offset: int
    ) -> Tensor | None: ...


def no_drop(
    x: Tensor,
    p: float,
    site: int,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    row_scale: Callable[[], Tensor | None] | None = None,
    **_: int,
) -> Tensor:
    """The `Drop` of evaluation."""
    return add_scaled(residual, activate(x, activation), row_scale() if row_scale else None)


def no_paths(block: int, branch: int) -> None:
    """The `Paths` of evaluation."""
    return None


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


def scale_of_queries(mask: Tensor, head_width: int) -> Tensor:
    """What multiplies the queries [B, L]: 0 at padded ones, whose attention so becomes uniform."""
    return mask * head_width**-0.5


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
        attend: computes the published attention of all positions in the definition's place.
        precision: see `encoder`; `linear` rounds its own operands.
    """
    length, width = keys_from.shape[1:]
    lq = queries_from.shape[1]
    query_scale = scale_of_queries(query_mask, width // num_heads)

    def drop_probabilities(probabilities: Tensor) -> Tensor:
        # A position of the mask's stream is head * L + query; the last Lq of each head.
        stride = length if lq == 1 else 1
        return drop(probabilities, p, site, position_offset=length - lq, position_stride=stride)

    dropped = None if drop is no_drop or p == 0 else drop_probabilities
    # One product for all projections of the same input.
    names = ("query", "key", "value") if lq == length else ("key", "value")
    weight = torch.cat([getattr(w, f"{name}_weight") for name in names])
    projection_bias = torch.cat([getattr(w, f"{name}_bias") for name in names])
    projected = linear(keys_from, weight, projection_bias)
    if attend is not None and lq == length and bias is None:
        mixed = attend(
            projected, query_scale, num_heads=num_heads, p=p, site=site, inv_freq=w.inv_freq
        )
    else:
        parts = list(projected.split(width, dim=-1))
        q = parts[0] if lq == length else linear(queries_from, w.query_weight, w.query_bias)
        if w.inv_freq is not None:
            q = rotate(q, w.inv_freq, num_heads, first=length - lq)
            parts[-2] = rotate(parts[-2], w.inv_freq, num_heads)
        mixed = mix(
            q,
            parts[-2],
            parts[-1],
            query_scale,
            num_heads=num_heads,
            bias=bias,
            drop=dropped,
            operand=None if precision == "float32" else partial(rounded, precision=precision),
        )
    return linear(mixed, w.output_weight, w.output_bias)


def cross_attention(
    queries_from: Tensor,
    context: Tensor,
    w: CrossWeights,
    *,
    num_heads: int,
    drop: Drop,
    p: float,
    site: int,
    linear: Linear,
) -> Tensor:
    """Attention of the last Lq positions over `context` [B, L, D], rotary on both, no mask."""
    length, width = context.shape[1:]
    lq = queries_from.shape[1]
    q = linear(queries_from, w.query_weight, w.query_bias)
    k = linear(context, w.key_weight, w.key_bias)
    v = linear(context, w.value_weight, w.value_bias)

    def drop_probabilities(probabilities: Tensor) -> Tensor:
        stride = length if lq == 1 else 1
        return drop(probabilities, p, site, position_offset=length - lq, position_stride=stride)

    mixed = mix(
        rotate(q, w.inv_freq, num_heads, first=length - lq),
        rotate(k, w.inv_freq, num_heads),
        v,
        q.new_full(q.shape[:2], (width // num_heads) ** -0.5),
        num_heads=num_heads,
        drop=None if drop is no_drop or p == 0 else drop_probabilities,
    )
    return linear(mixed, w.output_weight, w.output_bias)


def cross_step(
    x: Tensor,
    context: Tensor,
    w: CrossWeights,
    *,
    num_heads: int,
    drop: Drop,
    p: float,
    index: int,
    path: Tensor | None,
    linear: Linear,
) -> Tensor:
    """Fave's cross-attention step: ``x + path * gamma * (fused - x)``, where `fused` mixes x and
    the attention over `context` by a gate that the last position opens."""
    site, start = CROSS_SITE + 2 * index, context.shape[1] - x.shape[1]
    cross = cross_attention(
        norm(x, w.norm_weight, None),
        context,
        w,
        num_heads=num_heads,
        drop=drop,
        p=p,
        site=site,
        linear=linear,
    )
    cross = drop(cross, p, site + 1, position_offset=start)
    s = F.relu(F.linear((x + cross)[:, -1:], w.se_relu))
    gates = torch.stack((F.linear(s, w.se_weight1), F.linear(s, w.se_weight2))).softmax(0)
    fused = x * gates[0] + cross * gates[1]
    return x + scale_rows(w.gamma * (fused - x), path)


def scale_rows(x: Tensor, factor: Tensor | None) -> Tensor:
    """`x` [B, ...] with each row times its factor [B]; None is 1."""
    return x if factor is None else x * factor[:, None, None]


def norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The norm in front of a sublayer: the layer norm, or without a bias the RMS norm."""
    if bias is None:
        return rms_norm_definition(x, weight)
    return layer_norm(x, weight, bias)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = NORM_EPS) -> Tensor:
    """``F.layer_norm`` over the last dimension."""
    if not is_dual(x):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    # Of PyTorch's own forward-mode derivative the gradient is wrong.
    centred = x - x.mean(-1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias


def add_branch(
    x: Tensor,
    branch: Tensor,
    drop: Drop,
    p: float,
    site: int,
    start: int,
    paths: Paths,
    index: int,
    number: int,
) -> Tensor:
    """``x + path * drop(branch)``; the path's factor is drawn last, as published."""
    path = None if paths is no_paths else partial(paths, index, number)
    return drop(branch, p, site, residual=x, position_offset=start, row_scale=path)


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
    variant: Variant = FMREC,
    paths: Paths = no_paths,
    cross: CrossWeights | None = None,
    context: Tensor | None = None,
    linear: Linear = linear_definition,
    norm: Norm = norm,
    attend: Attend | None = None,
    self_attend: SelfAttend | None = None,
    feed: Feed | None = None,
    precision: str = "float32",
) -> Tensor:
    """One block (paper, section 4.2): [B, L, D] -> [B, L, D], or [B, 1, D] with `last_only`.

    ``x = x + drop(attn(norm1 x)); x = x + drop(ffn(norm2 x)); x = drop(x)``; the branches times
    `paths`, `cross_step` between them, and the last dropout, as the variant has them.
    """
    length = x.shape[1]
    sites = dropout_sites(index)
    start = length - 1 if last_only else 0
    whole = paths is no_paths and variant == FMREC  # what the ops of half a block are made for
    halfway = None
    if self_attend is not None and whole and bias is None:
        scale = scale_of_queries(mask, x.shape[2] // num_heads)
        halfway = self_attend(
            x, w, scale, num_heads=num_heads, p=p, site=sites[0], last_only=last_only
        )
    if halfway is None:
        normed = norm(x, w.norm1_weight, w.norm1_bias)
        attended = attention(
            normed[:, start:],
            normed,
            w,
            mask[:, start:],
            num_heads=num_heads,
            bias=None if bias is None else bias[:, :, start:],
            drop=drop,
            p=p,
            site=sites[0],
            linear=linear,
            attend=attend,
            precision=precision,
        )
        halfway = add_branch(x[:, start:], attended, drop, p, sites[1], start, paths, index, 0)
    x = halfway
    if cross is not None and context is not None:
        x = cross_step(
            x,
            context,
            cross,
            num_heads=num_heads,
            drop=drop,
            p=p,
            index=index,
            path=paths(index, 1),
            linear=linear,
        )
    if feed is not None and whole:
        fed = feed(x, w, p=p, site=sites[2], position_offset=start)
        if fed is not None:
            return fed
    normed = norm(x, w.norm2_weight, w.norm2_bias)
    inner = linear(normed, w.w1_weight, w.w1_bias)
    inner = drop(inner, p, sites[2], activation="gelu", position_offset=start)
    outer = linear(inner, w.w2_weight, w.w2_bias)
    x = add_branch(x, outer, drop, p, sites[3], start, paths, index, 2)
    return drop(x, p, sites[4], position_offset=start) if variant.block_dropout else x


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
    variant: Variant = FMREC,
    paths: Paths = no_paths,
    cross: Sequence[CrossWeights] | None = None,
    context: Tensor | None = None,
    linear: Linear = linear_definition,
    norm: Norm = norm,
    attend: Attend | None = None,
    self_attend: SelfAttend | None = None,
    feed: Feed | None = None,
    precision: str = "float32",
    first_key_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """All blocks; only the last position leaves.

    Args:
        x: [B, L, D]; mask: [B, L], 1 at real positions.
        tap: index of the block whose output at the last position is returned too, or None.
        drop, p: dropout; its sites are numbered by `dropout_sites`.
        prune: compute the last block at the last position only (the same function).
        variant: the kind of block; paths: its drop path.
        cross, context: Fave's cross-attention steps over `context` [B, L, D].
        linear, norm: compute the linear layers and the norms.
        attend: see `attention`; self_attend, feed: see `SelfAttend` and `Feed`.
        precision: both operands of every product are `rounded` to it and multiplied in float32;
            with one that is not 'float32', what computes parts by other means is not used.
        first_key_bias: [B], see `first_key_bias_of`; published attention only.

    Returns:
        ([B, D] output of the last block, [B, D] output of block `tap` or None).
    """
    tapped = None
    bias = attention_bias(mask, attention)
    if precision != "float32":
        attend, self_attend, feed = None, None, None
        linear = partial(_rounded_linear, precision=precision)
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
            variant=variant,
            paths=paths,
            cross=None if cross is None else cross[index],
            context=context,
            linear=linear,
            norm=norm,
            attend=attend,
            self_attend=self_attend,
            feed=feed,
            precision=precision,
        )
        if index == tap:
            tapped = x[:, -1]
    return x[:, -1], tapped
