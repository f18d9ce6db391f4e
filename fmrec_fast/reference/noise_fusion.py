"""Definition of `noise_fusion` and of the Euler update that precedes it."""

from __future__ import annotations

from torch import Tensor


def noise_fusion(e: Tensor, shift: Tensor, lam: Tensor) -> Tensor:
    """E = e + lam * (z + tau) (FMRec eq. 14); `shift` = z + tau.

    Args:
        e: [B, L, D]; shift: [B, D]; lam: [B, L, D].
    """
    return e + lam * shift[:, None, :]


def euler_update(z: Tensor, velocity: Tensor, num_steps: int) -> Tensor:
    """z' = z + velocity / q (eq. 23); as published, velocity = pred - z0. All [B, D]."""
    return z + velocity / num_steps
