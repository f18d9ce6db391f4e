"""Definition of `dropout`: masks from the counter-based stream."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrec_fast import noise


def threshold(p: float) -> int:
    """Words below it are dropped: p of the 2^32 words."""
    return min(round(p * 2**32), 2**32 - 1)


def dropout_mask(
    shape: torch.Size,
    p: float,
    *,
    seed: Tensor,
    rows: Tensor,
    site: int,
    position_offset: int = 0,
    position_stride: int = 1,
) -> Tensor:
    """bool [B, P, C], True where kept: Philox word (channel % 4) at counter
    (channel // 4, position, site, row) is at least p * 2^32."""
    _, length, channels = shape
    positions = position_offset + position_stride * torch.arange(length, device=rows.device)
    sites = torch.full((1,), site, dtype=torch.int64, device=rows.device)
    words = torch.stack(noise.words(seed, rows, sites, positions, channels), dim=-1)
    return words[0].flatten(-2)[..., :channels] >= threshold(p)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """`x` itself, or its tanh-GELU ('gelu')."""
    if activation is None:
        return x
    if activation != "gelu":
        raise ValueError(f"activation must be None or 'gelu', got {activation!r}")
    return F.gelu(x, approximate="tanh")


def dropout(
    x: Tensor,
    p: float,
    *,
    seed: Tensor,
    rows: Tensor,
    site: int,
    residual: Tensor | None = None,
    activation: str | None = None,
    position_offset: int = 0,
    position_stride: int = 1,
    row_scale: Tensor | None = None,
) -> Tensor:
    """residual + row_scale * where(kept, activation(x) / (1 - p), 0); x [B, P, C]."""
    x = activate(x, activation)
    kept = dropout_mask(
        x.shape,
        p,
        seed=seed,
        rows=rows,
        site=site,
        position_offset=position_offset,
        position_stride=position_stride,
    )
    dropped = torch.where(kept, x * (1 / (1 - p)), torch.zeros((), dtype=x.dtype, device=x.device))
    return add_scaled(residual, dropped, row_scale)


def add_scaled(residual: Tensor | None, x: Tensor, row_scale: Tensor | None) -> Tensor:
    """residual + row_scale * x, a factor a row; what is None is left out."""
    if row_scale is None:
        return x if residual is None else residual + x
    factors = row_scale[:, None, None]
    return x * factors if residual is None else torch.addcmul(residual, x, factors)
