"""All q steps of the sampler as one unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrec_fast import extension, flow
from fmrec_fast import noise as stream
from fmrec_fast.backend import Backend, choose
from fmrec_fast.ops._checks import check_float, check_shape, request_rows
from fmrec_fast.ops.encoder import encoder, needs_gradient, pack, variant_declined
from fmrec_fast.ops.noise_fusion import noise_fusion
from fmrec_fast.reference import euler_sampler as reference
from fmrec_fast.reference.encoder import FMREC, NORM_EPS, BlockWeights, Variant

# Rows that the definition takes together on a CPU: more, and the activations leave the caches.
CPU_ROWS = 32


@dataclass(frozen=True)
class SamplerWeights:
    """What a sampler step reads of the network; the decoder is not among it."""

    blocks: list[BlockWeights]
    norm_weight: Tensor
    norm_bias: Tensor
    num_heads: int
    attention: str
    delta: float
    variant: Variant = FMREC


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
        seed, rows: key the stream's lam (a seed of None is drawn); `noise` gives lam explicitly
            [q, B, L, D]; `lam_of_step` is called once a step for it (the published host draws).
        trajectory, target: 'straight' and 'data' as published.
        return_trajectory: all q + 1 points instead of the last.

    Returns:
        [B, D], or [q + 1, B, D]. Not differentiable: call under ``torch.no_grad()``.

    Raises:
        TypeError, ValueError: dtypes or shapes do not agree.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("e", e, "B L D", sizes)
    check_shape("mask", mask, "B L", sizes)
    check_shape("z0", z0, "B D", sizes)
    check_shape("taus", taus, "q D", sizes)
    check_float(e=e, mask=mask, z0=z0, taus=taus, noise=noise)
    if noise is not None:
        check_shape("noise", noise, "q B L D", sizes)
    elif lam_of_step is None:
        seed = stream.as_seed(seed, e.device)
        rows = request_rows(rows, e.shape[0], e.device)
    tensors = [e, z0, taus, weights.norm_weight, weights.norm_bias]
    tensors += [tensor for block in weights.blocks for tensor in block.tensors()]
    if noise is not None:
        tensors.append(noise)
    declined = ""
    if (weights.attention, trajectory, target) != ("published", "straight", "data"):
        declined = (
            "its kernel has 'published' attention, 'straight' trajectory and target 'data' only, "
            f"got {weights.attention!r}, {trajectory!r} and {target!r}"
        )
    elif noise is None and lam_of_step is not None:
        declined = "its kernel does not draw lam as published"
    elif sizes["q"] == 0:
        declined = "there is no step to take"
    elif needs_gradient(*tensors):
        declined = "its kernel has no backward pass, and a gradient is needed"
    declined = declined or variant_declined(weights.blocks)
    if choose("euler_sampler", *tensors, declined=declined) is Backend.CPP:
        return _euler_sampler_cpp(e, mask, z0, taus, weights, seed, rows, noise, return_trajectory)

    pieces = [slice(None)]
    if e.device.type == "cpu" and lam_of_step is None:  # whose draws are for the whole batch
        pieces = [slice(i, i + CPU_ROWS) for i in range(0, len(e), CPU_ROWS)] or pieces
    parts = [
        _composed(
            e[piece],
            mask[piece],
            z0[piece],
            taus,
            weights,
            times,
            seed,
            None if rows is None else rows[piece],
            None if noise is None else noise[:, piece],
            lam_of_step,
            trajectory,
            target,
            return_trajectory,
        )
        for piece in pieces
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _composed(
    e: Tensor,
    mask: Tensor,
    z0: Tensor,
    taus: Tensor,
    weights: SamplerWeights,
    times: Tensor,
    seed: Tensor | None,
    rows: Tensor | None,
    noise: Tensor | None,
    lam_of_step: Callable[[], Tensor] | None,
    trajectory: str,
    target: str,
    return_trajectory: bool,
) -> Tensor:
    """The definition over the ops noise_fusion and encoder."""

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
            variant=weights.variant,
        )
        return F.layer_norm(last, last.shape[-1:], weights.norm_weight, weights.norm_bias, NORM_EPS)

    def velocity_of(pred: Tensor, x: Tensor, i: int) -> Tensor:
        if target == "velocity":
            return pred
        return flow.velocity(pred, z0, times[i], trajectory)

    return reference.euler_sampler(
        z0, step_network, velocity_of, taus.shape[0], return_trajectory=return_trajectory
    )


def _euler_sampler_cpp(
    e: Tensor,
    mask: Tensor,
    z0: Tensor,
    taus: Tensor,
    weights: SamplerWeights,
    seed: Tensor | None,
    rows: Tensor | None,
    noise: Tensor | None,
    return_trajectory: bool,
) -> Tensor:
    def array(tensor: Tensor) -> Any:
        return tensor.detach().contiguous().numpy()

    points = (taus.shape[0] + 1,) if return_trajectory else ()
    out = z0.new_empty((*points, *z0.shape))
    extension.load().euler_sampler(
        pack(weights.blocks, weights.num_heads, e.shape[1]),
        array(weights.norm_weight),
        array(weights.norm_bias),
        array(e),
        array(mask),
        array(z0),
        array(taus),
        None if noise is None else array(noise),
        None if rows is None else array(rows),
        None if seed is None else int(seed),
        weights.delta,
        out.numpy(),
        torch.get_num_threads(),
    )
    return out
