"""Flow-matching trajectories and time schedules (plain PyTorch, not hot).

Times run from t = 0 (noise) to t = 1 (data).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmrec_fast.config import SCHEDULES, TRAJECTORIES


def time_schedule(
    u: Tensor | None,
    method: str,
    *,
    eps: float,
    s_modsamp: float = 1.0,
    normal: Tensor | None = None,
) -> Tensor:
    """Training times from uniform draws `u` [B] (eq. 9 and its alternatives), in [eps, 1].

    Args:
        u: uniform draws; unused by 'logit_normal'.
        method: 'uniform', 'logit_normal', 'mode' or 'cosmap'.
        eps: smallest time.
        s_modsamp: scale of the mode schedule.
        normal: draws of Normal(m_logNorm, s_logNorm), for 'logit_normal'.

    Raises:
        ValueError: unknown schedule, or 'logit_normal' without `normal`.
    """
    if method not in SCHEDULES:
        raise ValueError(f"sampling_method must be one of {SCHEDULES}, got {method!r}")
    if method == "logit_normal":
        if normal is None:
            raise ValueError("the schedule 'logit_normal' needs normal draws, got None")
        t = torch.sigmoid(normal)
    elif u is None:
        raise ValueError(f"the schedule {method!r} needs uniform draws, got None")
    elif method == "uniform":
        t = u
    elif method == "mode":
        t = 1 - u - s_modsamp * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
    else:
        t = 1 - 1 / (torch.tan(math.pi * u / 2) + 1)
    return t * (1 - eps) + eps


def interpolate(x_data: Tensor, z0: Tensor, t: Tensor, trajectory: str = "straight") -> Tensor:
    """x_t on the way from noise to data; `t` broadcasts against `x_data`.

    'straight' (eq. 8): ``t x + (1 - t) z0``; 'cosine': ``sin(pi t/2) x + cos(pi t/2) z0``.
    """
    if trajectory == "straight":
        return t * x_data + (1 - t) * z0
    if trajectory == "cosine":
        angle = math.pi / 2 * t
        return torch.sin(angle) * x_data + torch.cos(angle) * z0
    raise ValueError(f"trajectory must be one of {TRAJECTORIES}, got {trajectory!r}")


def velocity(x_data: Tensor, z0: Tensor, t: Tensor, trajectory: str = "straight") -> Tensor:
    """dx_t/dt of `interpolate`."""
    if trajectory == "straight":
        return x_data - z0
    if trajectory == "cosine":
        angle = math.pi / 2 * t
        return math.pi / 2 * (torch.cos(angle) * x_data - torch.sin(angle) * z0)
    raise ValueError(f"trajectory must be one of {TRAJECTORIES}, got {trajectory!r}")


def data_from_velocity(v: Tensor, x_t: Tensor, t: Tensor, trajectory: str = "straight") -> Tensor:
    """The data end of the trajectory that passes `x_t` at time `t` with velocity `v`."""
    if trajectory == "straight":
        return x_t + (1 - t) * v
    if trajectory == "cosine":
        angle = math.pi / 2 * t
        return torch.sin(angle) * x_t + 2 / math.pi * torch.cos(angle) * v
    raise ValueError(f"trajectory must be one of {TRAJECTORIES}, got {trajectory!r}")


def step_times(steps: int, eps: float, device: torch.device | str = "cpu") -> Tensor:
    """t_i = (i / q)(1 - eps) + eps of the sampler's q steps: float32 [q]."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return torch.arange(steps, device=device) / steps * (1 - eps) + eps
