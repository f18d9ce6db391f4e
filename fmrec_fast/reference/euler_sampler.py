"""Definition of `euler_sampler`: all q steps, from the start to the predicted embedding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def leading_padding(mask: Tensor) -> Tensor:
    """Number of padded positions before the first real one: mask [B, L] -> int64 [B]."""
    return (mask == 0).long().cumprod(1).sum(1)


def tie_padding(x: Tensor, mask: Tensor) -> Tensor:
    """Definition of ``padding='tied'``: lam [B, L, D] with that of position 0 at every leading
    padded position of its row.

    As all of them hold the same embedding, tying the fused history is the same.
    """
    positions = torch.arange(mask.shape[1], device=mask.device)
    padded = positions < leading_padding(mask)[:, None]
    return torch.where(padded[..., None], x[:, :1], x)


def euler_sampler(
    z0: Tensor,
    step_network: Callable[[Tensor, int], Tensor],
    velocity_of: Callable[[Tensor, Tensor, int], Tensor],
    num_steps: int,
    *,
    return_trajectory: bool = False,
) -> Tensor:
    """x_0 = z0; x_{i+1} = x_i + velocity_of(step_network(x_i, i), x_i, i) / q (eq. 23).

    As published the velocity is ``pred - z0`` with the *initial* z0, so x_q is the mean of the q
    predictions.

    Args:
        z0: [B, D].
        step_network: (x_i [B, D], i) -> prediction [B, D]: noise fusion, encoder, final norm.
        velocity_of: (prediction, x_i, i) -> velocity [B, D].

    Returns:
        [B, D], or with `return_trajectory` [q + 1, B, D], the start first.
    """
    x, trajectory = z0, [z0]
    for i in range(num_steps):
        x = x + velocity_of(step_network(x, i), x, i) / num_steps
        trajectory.append(x)
    return torch.stack(trajectory) if return_trajectory else x
