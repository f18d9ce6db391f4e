"""Sampling: from histories to the embedding of the next item."""

from __future__ import annotations

import torch
from torch import Tensor

from fmrec_fast.models.fmrec import FMRecommender, TrainingDraws
from fmrec_fast.ops._checks import check_shape
from fmrec_fast.randomness import random_source

METHODS = ("euler", "rk45")
# Rows embedded together on a CPU; a batch of any size then needs little memory.
CPU_ROWS = 512


@torch.no_grad()
def sample(
    model: FMRecommender,
    sequences: Tensor,
    *,
    steps: int | None = None,
    method: str = "euler",
    seed: int | Tensor | None = None,
    rows: Tensor | None = None,
    z0: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """Sample the next item's embedding for each history (eq. 23).

    With one `seed` a row's result depends on its history and its name in `rows` alone, not on the
    batch it is in, the backend, or how the batch is cut into pieces. Dropout is off. (Not so for
    'rk45', whose step sizes depend on all rows that it integrates together.)

    A model in training mode is switched to evaluation mode meanwhile, so threads should share one
    that is in evaluation mode already.

    Args:
        model: the joint model.
        sequences: int64 [B, L], left-padded with 0.
        steps: q; None is the model's ``fm.sample_N``, and 1 in Fave's stage 2. Not for 'rk45'.
        method: 'euler' (eq. 23) or 'rk45' (adaptive; draws its lam afresh at every evaluation,
            so that its effort grows with ``lambda_uncertainty``).
        seed: keys the noise stream; None draws one from torch's generator.
        rows: int64 [B], names of the rows in the stream; None is 0 .. B-1.
        z0: explicit start [B, D].
        noise: explicit lam [q, B, L, D].

    Returns:
        float32 [B, D].

    Raises:
        TypeError, ValueError: dtypes, shapes, steps or method are off, or (on CPU) an id is out
            of range.
    """
    model.check_sequence(sequences)
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be an integer of at least 1 or None, got {steps!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    batch, device, width = sequences.shape[0], sequences.device, model.emb_dim
    q = model.fm.steps if steps is None else steps
    if z0 is not None:
        check_shape("z0", z0, "B D", {"B": batch, "D": width})
    if method == "rk45" and (noise is not None or steps is not None):
        given = "noise" if steps is None else f"steps = {steps}"
        raise ValueError(f"method 'rk45' draws lam and chooses its steps itself, got {given}")
    if noise is not None:
        sizes = {"q": q, "B": batch, "L": sequences.shape[1], "D": width}
        check_shape("noise", noise, "q B L D", sizes)
    # A model in evaluation mode is left alone: going through its modules would take longer than
    # a step of a small batch.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        source = random_source(batch, device, seed=seed, rows=rows)
        # The published draws come in the order of the whole batch, so it is not cut.
        piece = CPU_ROWS if device.type == "cpu" and source.prunes else max(batch, 1)
        out = torch.empty(batch, width, device=device)
        for first in range(0, batch, piece):
            part = slice(first, first + piece)
            e, mask = model.embed(sequences[part])
            own = random_source(len(e), device, seed=source.seed, rows=source.rows[part])
            draws = TrainingDraws(z0=None if z0 is None else z0[part])
            start = model.start(e, mask, own, draws)
            if method == "rk45":
                out[part] = model.fm.rk45_sampler(
                    e, mask, start, seed=source.seed, rows=source.rows[part]
                )[0]
            else:
                out[part] = model.fm.integrate(
                    e,
                    mask,
                    start,
                    steps=q,
                    seed=source.seed,
                    rows=source.rows[part],
                    noise=None if noise is None else noise[:, part],
                )
        return out
    finally:
        for module in training:
            module.training = True


@torch.no_grad()
def scores(model: FMRecommender, sequences: Tensor, **options) -> Tensor:
    """Scores of all V items, [B, V]: ``model.fm_rep_pre(sample(model, sequences, ...))``.

    Takes the keyword arguments of `sample`. To rank, prefer `ops.item_topk` and
    `ops.target_rank`, which need not hold the matrix.
    """
    return model.fm_rep_pre(sample(model, sequences, **options))
