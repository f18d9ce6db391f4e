"""All q steps of the sampler as one unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fmrec_fast import flow
from fmrec_fast.backend import choose
from fmrec_fast.ops._checks import check_float, check_shape
from fmrec_fast.ops.encoder import encoder
from fmrec_fast.ops.noise_fusion import noise_fusion
from fmrec_fast.reference import euler_sampler as reference
from fmrec_fast.reference.encoder import NORM_EPS, BlockWeights


@dataclass(frozen=True)
class SamplerWeights:
    """What a sampler step reads of the network; the decoder is not among it."""

    blocks: list[BlockWeights]
    norm_weight: Tensor
    norm_bias: Tensor
    num_heads: int
    attention: str
    delta: float


def euler_sampler(
    e: Tensor,
    mask: Tensor,
    z0: Tensor,
    taus: Tensor,
    weights: SamplerWeights,
    *,
    times: Tensor,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
    noise: Tensor | None = None,
    lam_of_step: Callable[[], Tensor] | None = None,
    trajectory: str = "straight",
    target: str = "data",
    return_trajectory: bool = False,
) -> Tensor:
    """The Euler sampler of eq. 23, from noise to the embedding of the next item.

    Equivalent PyTorch::

        x = z0
        for i in range(q):
            E = noise_fusion(e, x, taus[i], delta=..., seed=seed, rows=rows, step=i)
            pred = layer_norm(encoder(E, mask, ...)[0])
            x = x + (pred - z0) / q          # the initial z0, each time

    Args:
        e: item embeddings [B, L, D]; mask: [B, L]; z0: [B, D].
        taus: time embeddings of the q steps [q, D].
        times: the q times in [0, 1], read only by the options that are not published.
        seed, rows: key the stream's lam; `noise` gives lam explicitly [q, B, L, D];
            `lam_of_step` is called once a step for it (the published host draws).
        trajectory, target: 'straight' and 'data' as published.
        return_trajectory: all q + 1 points instead of the last.

    Returns:
        [B, D], or [q + 1, B, D]. Not differentiable: call under ``torch.no_grad()``.

    Raises:
        TypeError, ValueError: dtypes or shapes do not agree.
    """
    sizes: dict[str, int] = {}
    check_shape("e", e, "B L D", sizes)
    check_shape("mask", mask, "B L", sizes)
    check_shape("z0", z0, "B D", sizes)
    check_shape("taus", taus, "q D", sizes)
    check_float(e=e, mask=mask, z0=z0, taus=taus, noise=noise)
    if noise is not None:
        check_shape("noise", noise, "q B L D", sizes)
    choose("euler_sampler", e)

    def step_network(x: Tensor, i: int) -> Tensor:
        lam = noise[i] if noise is not None else lam_of_step() if lam_of_step else None
        fused = noise_fusion(
            e, x, taus[i], delta=weights.delta, seed=seed, rows=rows, step=i, lam=lam
        )
        last, _ = encoder(
            fused,
            mask,
            weights.blocks,
            num_heads=weights.num_heads,
            attention=weights.attention,
        )
        return F.layer_norm(last, last.shape[-1:], weights.norm_weight, weights.norm_bias, NORM_EPS)

    def velocity_of(pred: Tensor, x: Tensor, i: int) -> Tensor:
        if target == "velocity":
            return pred
        return flow.velocity(pred, z0, times[i], trajectory)

    return reference.euler_sampler(
        z0, step_network, velocity_of, taus.shape[0], return_trajectory=return_trajectory
    )
