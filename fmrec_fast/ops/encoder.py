"""The transformer stack, last position out."""

from __future__ import annotations

from torch import Tensor

from fmrec_fast.backend import choose
from fmrec_fast.config import ATTENTIONS
from fmrec_fast.ops._checks import check_float, check_shape
from fmrec_fast.reference import encoder as reference
from fmrec_fast.reference.encoder import BlockWeights, Drop, no_drop


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
) -> tuple[Tensor, Tensor | None]:
    """Pre-norm transformer blocks over a fused history (paper, section 4.2).

    Equivalent PyTorch, per block (norms with eps 1e-12, tanh-GELU)::

        x = x + drop(attn(norm1(x))); x = x + drop(ffn(norm2(x))); x = drop(x)

    Only the last position's output leaves, so of the last block only that position is computed
    (`prune`); with dropout from the stream that is the same function to the last mask.

    Args:
        x: [B, L, D].
        mask: [B, L] floating point, 1 at real positions. Under 'published' attention a padded
            query attends uniformly and no key is hidden.
        blocks: parameters, first block first.
        num_heads: H, divides D.
        attention: 'published' or 'causal'.
        tap: index of a block whose output at the last position is returned too.
        drop: dropout, with probability `p`; none by default.

    Returns:
        ([B, D], [B, D] of block `tap` or None). Differentiable.

    Raises:
        TypeError, ValueError: dtypes, shapes, heads, `attention` or `tap` are off.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B L D", sizes)
    check_shape("mask", mask, "B L", sizes)
    check_float(x=x, mask=mask)
    if sizes["L"] == 0:
        raise ValueError(f"x must have at least one position, got shape {tuple(x.shape)}")
    if not blocks:
        raise ValueError("blocks must hold at least one block, got none")
    if num_heads < 1 or sizes["D"] % num_heads:
        raise ValueError(f"num_heads must divide D = {sizes['D']}, got {num_heads}")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {ATTENTIONS}, got {attention!r}")
    if tap is not None and not 0 <= tap < len(blocks):
        raise ValueError(f"tap must be in 0 .. {len(blocks) - 1}, got {tap}")
    choose("encoder", x)
    return reference.encoder(
        x,
        mask,
        blocks,
        num_heads=num_heads,
        attention=attention,
        tap=tap,
        drop=drop,
        p=p,
        prune=prune,
    )
