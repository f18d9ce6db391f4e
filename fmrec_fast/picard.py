"""Picard iteration: all steps of the Euler sampler at once (`sample(..., method='parallel')`).

The state reaches the network only through lam * (x + tau), with lam about 1e-3, so the predictions
barely depend on it. Therefore the steps need not wait for one another: guess the trajectory,
evaluate the network at all its points as one batch (`ops.picard_sweep`), rebuild the trajectory by
a prefix sum, and repeat. The noise is that of the sequential sampler, and so is the fixed point.

The guess is the straight way to the first step's prediction, one network evaluation. With it x_0
and x_1 are exact, and every sweep makes at least one more point exact: q - 1 sweeps give the
sequential result whatever the network. On trained models one sweep does, to float32 round-off:
q + 1 evaluations, all but one in parallel. (From the guess x_i = z0, one sweep is off by 6e-4 and
two are needed, 2q evaluations.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

TOLERANCE = 1e-5
# Above this lambda_uncertainty one sweep does not converge, and 'auto' goes step by step.
AUTO_MAX_DELTA = 0.01
# By so much the parallel sampler must be expected to win before 'auto' takes it: a share of the
# time, and on a CPU the seconds that sweeping costs by itself, at a thread's rate in FLOP/s.
AUTO_MARGIN = 0.85
CPU_OVERHEAD = 5e-4
CPU_RATE = 150e9


class Solution(NamedTuple):
    """`points` [B, q + 1, D], the start first; `residual` [B], see `iterate`."""

    points: Tensor
    residual: Tensor


def iterate(
    predict: Callable[[Tensor, Tensor | None], Tensor],
    velocity: Callable[[Tensor, Tensor | None], Tensor],
    z0: Tensor,
    steps: int,
    *,
    sweeps: int | None = None,
    tol: float | None = None,
) -> Solution:
    """Solve x_{i+1} = x_i + velocity_i / q for all i at once.

    The residual estimates the relative error of the result, per row, from how it settles: with
    c_k = |x_q after sweep k - x_q before|, c_0 = |guess - z0|, it is c_k^2 / (c_{k-1} |x_q|), the
    relative change that one more sweep is expected to make. Where the error was above 1e-5 it was
    0.7 to 2.6 times the error (docs/performance.md). It does not see round-off.

    - `tol` alone (the default, 1e-5): rows go on until their residual is at most `tol`; the host
      looks after each sweep.
    - `sweeps` alone: exactly so many (at most q - 1, where the result is exact) for all rows, and
      nothing waits for the device.
    - both: at most `sweeps`, rows that have converged are left as they are; on a GPU nothing waits
      for the device, so all sweeps are launched.

    Args:
        predict: (x [R, S, D], rows) -> predictions [R, S, D] at the first S steps; `rows` int64 [R]
            are the rows that x holds, None all.
        velocity: (predictions [R, q, D], rows) -> velocities [R, q, D].
        z0: start [B, D].

    Raises:
        ValueError: `sweeps` or `tol` are off, or a CUDA graph is captured without `sweeps`.
    """
    check_options(sweeps, tol)
    looks = sweeps is None or z0.device.type != "cuda"
    if sweeps is None and z0.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "a CUDA graph cannot look at the residual while it is captured: give sweeps (1 does on "
            "trained models), and look at the residual that return_residual=True gives"
        )
    if sweeps is None and tol is None:
        tol = TOLERANCE

    def rebuild(start: Tensor, v: Tensor) -> Tensor:
        return torch.cat((start[:, None], start[:, None] + torch.cumsum(v, 1) / steps), dim=1)

    guess = predict(z0[:, None], None).expand(-1, steps, -1)
    points = rebuild(z0, velocity(guess, None))
    residual = z0.new_zeros(len(z0))
    before = (points[:, -1] - z0).norm(dim=1)
    active: Tensor | None = None
    last = steps - 1 if sweeps is None else min(sweeps, steps - 1)
    for sweep in range(1, last + 1):
        here = points if active is None else points[active]
        start = z0 if active is None else z0[active]
        new = rebuild(start, velocity(predict(here[:, :-1], active), active))
        end = new[:, -1]
        change = (end - here[:, -1]).norm(dim=1)
        # No change is convergence, also where the one before was none.
        found = torch.where(change > 0, change.square() / (before * end.norm(dim=1)), change)
        if sweep == steps - 1:
            found = torch.zeros_like(found)
        before = change
        if active is not None:
            points[active], residual[active] = new, found
        elif sweep > 1 and tol is not None:  # on the device: rows that have converged stay
            open_ = residual > tol
            points = torch.where(open_[:, None, None], new, points)
            residual = torch.where(open_, found, residual)
        else:
            points, residual = new, found
        if tol is not None and looks:
            rest = (found > tol).nonzero()[:, 0]
            if len(rest) == 0:
                break
            before = before[rest]
            active = rest if active is None else active[rest]
    return Solution(points, residual)


def check_options(sweeps: int | None, tol: float | None) -> None:
    """`sweeps` is None or at least 1, `tol` None or positive.

    Raises:
        TypeError, ValueError: they are not.
    """
    if sweeps is not None and (isinstance(sweeps, bool) or not isinstance(sweeps, int)):
        raise TypeError(f"sweeps must be an integer or None, got {sweeps!r}")
    if sweeps is not None and sweeps < 1:
        raise ValueError(f"sweeps must be at least 1, got {sweeps}")
    if tol is not None and not 0 < tol < 1:
        raise ValueError(f"tol must satisfy 0 < tol < 1, got {tol!r}")


def evaluation_flops(length: int, width: int, blocks: int) -> int:
    """Floating-point operations of one network evaluation of one history, its matrix products.

    Per block 12 D^2 multiply-adds a position for the linear layers and 2 L D for attention; of the
    last block keys and values at all positions, the rest at the last one only.
    """
    block = length * 12 * width**2 + 2 * length**2 * width
    last = 2 * length * width**2 + 10 * width**2 + 2 * length * width
    return 2 * ((blocks - 1) * block + last)


def prefers_parallel(
    batch: int, steps: int, delta: float, device: torch.device, flops: float = float("inf")
) -> bool:
    """Whether `method='auto'` takes the parallel sampler.

    Both are counted in rounds of network evaluations, one sequence per worker: step by step
    ``q ceil(B / W)``, in parallel ``ceil(B / W) + ceil(q B / W)``. On a CPU a worker is a thread:
    parallel where B < W, and where B is just above a multiple of W, unless the network is so small
    that the sweep's own cost outweighs what it saves. On a GPU a worker is taken to be a
    multiprocessor. The rule follows from the work, not from timings (docs/performance.md).

    Args:
        delta: lambda_uncertainty; where it is large, one sweep would not do.
        flops: `evaluation_flops` of the network.
    """
    if delta > AUTO_MAX_DELTA or batch == 0 or steps < 3:
        return False
    workers = torch.get_num_threads()
    if device.type == "cuda":
        workers = torch.cuda.get_device_properties(device).multi_processor_count
    rounds = -(-batch // workers)
    sequential, parallel = steps * rounds, rounds - (-steps * batch // workers)
    if device.type != "cuda" and (sequential - parallel) * flops / CPU_RATE < CPU_OVERHEAD:
        return False
    return parallel < AUTO_MARGIN * sequential
