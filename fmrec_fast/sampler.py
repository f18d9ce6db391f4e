"""Sampling: from histories to the embedding of the next item."""

from __future__ import annotations

import torch
from torch import Tensor

from fmrec_fast.models.fmrec import FMRecommender
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
    graph: bool | None = None,
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
        steps: q; None is the model's ``fm.sample_N``. Not for 'rk45'.
        method: 'euler' (eq. 23) or 'rk45' (adaptive; draws its lam afresh at every evaluation,
            so that its effort grows with ``lambda_uncertainty``).
        seed: keys the noise stream; None draws one from torch's generator.
        rows: int64 [B], names of the rows in the stream; None is 0 .. B-1.
        z0: explicit start [B, D].
        noise: explicit lam [q, B, L, D].
        graph: issue all launches as one (`graphs.GraphedSampler`; the model's graphs are kept
            beside it). None does so on CUDA from the second call of a batch size on, where the
            other arguments allow it and ``FMREC_FAST_GRAPH`` is not 0; True at once, and on a CPU
            too, where it saves nothing. A compiled program is none, whatever is said here.

    Returns:
        float32 [B, D].

    Raises:
        TypeError, ValueError: dtypes, shapes, steps or method are off, (on CPU) an id is out of
            range, or `graph` is True for what cannot be one.
    """
    model.check_sequence(sequences)
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be an integer of at least 1 or None, got {steps!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    batch, device, width = sequences.shape[0], sequences.device, model.emb_dim
    q = model.fm.sample_N if steps is None else steps
    if z0 is not None:
        check_shape("z0", z0, "B D", {"B": batch, "D": width})
    if method == "rk45" and (noise is not None or steps is not None):
        given = "noise" if steps is None else f"steps = {steps}"
        raise ValueError(f"method 'rk45' draws lam and chooses its steps itself, got {given}")
    if noise is not None:
        sizes = {"q": q, "B": batch, "L": sequences.shape[1], "D": width}
        check_shape("noise", noise, "q B L D", sizes)
    if graph is not False and not torch.compiler.is_compiling():
        from fmrec_fast import graphs  # which imports this module

        if graph or graphs.by_default(device, method, seed, noise):
            reason = graphs.obstacle(method, seed, noise)
            if reason:
                raise ValueError(f"graph = True: {reason}")
            sampler = graphs.shared_sampler(model, steps=steps, method=method)
            return sampler.call(sequences, seed=seed, rows=rows, z0=z0, at_once=bool(graph))
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        source = random_source(batch, device, seed=seed, rows=rows)
        if z0 is None:
            z0 = source.start(width)
        # The published draws come in the order of the whole batch, so it is not cut.
        # A compiled program is for any batch, and for one piece.
        whole = device.type != "cpu" or not source.prunes or torch.compiler.is_compiling()
        out = torch.empty(batch, width, device=device)
        starts = [0] if whole else range(0, batch, CPU_ROWS)
        for first in starts:
            part = slice(first, None if whole else first + CPU_ROWS)
            e, mask = model.embed(sequences[part])
            if method == "rk45":
                out[part] = model.fm.rk45_sampler(
                    e, mask, z0[part], seed=source.seed, rows=source.rows[part]
                )[0]
            else:
                out[part] = model.fm.integrate(
                    e,
                    mask,
                    z0[part],
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
