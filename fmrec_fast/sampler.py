"""Sampling: from histories to the embedding of the next item."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from fmrec_fast.backend import Rng, current_rng
from fmrec_fast.config import PADDINGS
from fmrec_fast.forward_mode import is_wrapped
from fmrec_fast.models.fmrec import INTEGRATORS, TrainingDraws
from fmrec_fast.models.recommender import FMRecommender
from fmrec_fast.noise import as_seed
from fmrec_fast.ops._checks import check_padding, check_shape, is_sharded, request_rows
from fmrec_fast.randomness import random_source

METHODS = (*INTEGRATORS, "rk45")
# Rows embedded together on a CPU; a batch of any size then needs little memory.
CPU_ROWS = 512


def check_steps(steps: int | None) -> None:
    """`steps` must be a number of Euler steps, or None.

    Raises:
        ValueError: it is not.
    """
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be an integer of at least 1 or None, got {steps!r}")


@overload
def sample(
    model: FMRecommender,
    sequences: Tensor,
    *,
    steps: int | None = ...,
    method: str = ...,
    seed: int | Tensor | None = ...,
    rows: Tensor | None = ...,
    z0: Tensor | None = ...,
    noise: Tensor | None = ...,
    sweeps: int | None = ...,
    tol: float | None = ...,
    return_residual: Literal[False] = ...,
    precision: str = ...,
    padding: str = ...,
    graph: bool | None = ...,
) -> Tensor: ...


@overload
def sample(
    model: FMRecommender,
    sequences: Tensor,
    *,
    steps: int | None = ...,
    method: str = ...,
    seed: int | Tensor | None = ...,
    rows: Tensor | None = ...,
    z0: Tensor | None = ...,
    noise: Tensor | None = ...,
    sweeps: int | None = ...,
    tol: float | None = ...,
    return_residual: Literal[True],
    precision: str = ...,
    padding: str = ...,
    graph: bool | None = ...,
) -> tuple[Tensor, Tensor]: ...


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
    sweeps: int | None = None,
    tol: float | None = None,
    return_residual: bool = False,
    precision: str = "float32",
    padding: str = "published",
    graph: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sample the next item's embedding for each history (eq. 23).

    With one `seed` a row's result depends on its history and its name in `rows` alone, not on the
    batch it is in, the backend, how the batch is cut into pieces, or whether the method is 'euler',
    'parallel' or 'auto' (to a relative 1e-5). Dropout is off. (Not so for 'rk45', whose step sizes
    depend on all rows that it integrates together.)

    A model in training mode is switched to evaluation mode meanwhile, so threads should share one
    that is in evaluation mode already.

    Args:
        model: the joint model.
        sequences: int64 [B, L], left-padded with 0.
        steps: q; None is the model's ``fm.sample_N``, and 1 in Fave's stage 2. Not for 'rk45'.
        method: 'euler' (eq. 23), step by step; 'parallel', the same result from all steps
            evaluated at once (`fmrec_fast.picard`: q + 1 network evaluations on a trained model,
            more where lambda_uncertainty is large), faster where few rows leave the machine idle;
            'auto', of these two the one that is expected to be faster for this batch, device and
            number of threads (`picard.prefers_parallel`; on a GPU an unmeasured estimate); 'rk45'
            (adaptive; draws its lam afresh at every evaluation, so that its effort grows with
            ``lambda_uncertainty``).
        seed: keys the noise stream; None draws one from torch's generator.
        rows: int64 [B], names of the rows in the stream; None is 0 .. B-1.
        z0: explicit start [B, D].
        noise: explicit lam [q, B, L, D].
        sweeps, tol: of 'parallel' ('auto' hands them on). By default sweeps go on for every row
            until its residual is at most `tol` = 1e-5; the host looks once after each sweep. With
            `sweeps` the host does not look on a GPU, and it is on the caller to look at the
            residual. See `picard.iterate`.
        return_residual: also return the estimated relative error [B] of 'parallel', which is 0
            where 'auto' went step by step.
        precision: of the encoder's matrix products: 'float32', 'tf32' or 'bf16', see
            `ops.encoder`. Norms, softmax and trajectory stay in float32.
        padding: 'published'; or 'tied', where a row's padded positions share one lam and are
            computed as one token: the same distribution at every position, and several times
            faster on short histories. Not for 'rk45'.
        graph: issue all launches as one (`graphs.GraphedSampler`; the model's graphs are kept
            beside it). None does so on CUDA from the second call of a batch size on, where the
            other arguments allow it and ``FMREC_FAST_GRAPH`` is not 0; True at once, and on a CPU
            too, where it saves nothing. A compiled program is none, whatever is said here.

    Returns:
        float32 [B, D], or ([B, D], residual [B]).

    Raises:
        TypeError, ValueError: dtypes, shapes, steps or method are off, an option is not for the
            method, (on CPU) an id is out of range, or `graph` is True for what cannot be one.
    """
    if (
        not (graph or return_residual)
        and all(given is None for given in (z0, noise, sweeps, tol))
        and not torch.compiler.is_compiling()
    ):
        found = _in_one_call(model, sequences, steps, seed, rows, method, precision, padding)
        if found is not None:
            return found
    model.check_sequence(sequences)
    check_steps(steps)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    check_padding(padding)
    if method == "rk45" and padding != "published":
        raise ValueError(f"method 'rk45' has padding 'published' only, got {padding!r}")
    batch, device, width = sequences.shape[0], sequences.device, model.emb_dim
    q = model.fm.steps if steps is None else steps
    if z0 is not None:
        check_shape("z0", z0, "B D", {"B": batch, "D": width})
    if method == "rk45" and (noise is not None or steps is not None):
        given = "noise" if steps is None else f"steps = {steps}"
        raise ValueError(f"method 'rk45' draws lam and chooses its steps itself, got {given}")
    if method == "rk45" and (return_residual or precision != "float32"):
        given = "return_residual" if return_residual else f"precision = {precision!r}"
        raise ValueError(f"method 'rk45' has no residual and runs in float32, got {given}")
    if method in ("euler", "rk45") and (sweeps is not None or tol is not None):
        raise ValueError(
            f"sweeps and tol are for method 'parallel', got sweeps = {sweeps!r} and tol = {tol!r} "
            f"with {method!r}"
        )
    if method == "euler" and return_residual:
        raise ValueError("method 'euler' has no residual, got return_residual = True")
    if noise is not None:
        sizes = {"q": q, "B": batch, "L": sequences.shape[1], "D": width}
        check_shape("noise", noise, "q B L D", sizes)
    if graph is not False and not torch.compiler.is_compiling():
        from fmrec_fast import graphs  # which imports this module

        if graph or graphs.by_default(device):
            reason = graphs.obstacle(
                method, seed, noise=noise, sweeps=sweeps, tol=tol, return_residual=return_residual
            )
            if is_sharded(model.item_embeddings.weight):
                reason = "items over ranks have none, since ranks exchange numbers of ids"
            if reason and graph:
                raise ValueError(f"graph = True: {reason}")
            if not reason:
                sampler = graphs.shared_sampler(
                    model,
                    steps=steps,
                    method=method,
                    sweeps=sweeps,
                    precision=precision,
                    padding=padding,
                )
                return sampler.call(sequences, seed=seed, rows=rows, z0=z0, at_once=bool(graph))
    training = _training_modules(model)
    for module in training:
        module.training = False
    try:
        source = random_source(batch, device, seed=seed, rows=rows)
        # The published draws come in the order of the whole batch, so it is not cut.
        # A compiled program is for any batch, and for one piece.
        whole = device.type != "cpu" or not source.prunes or torch.compiler.is_compiling()
        # Lookups in a table over ranks are collectives: once a call, however many rows there are.
        whole = whole or is_sharded(model.item_embeddings.weight)
        out = torch.empty(batch, width, device=device)
        residual = torch.zeros(batch, device=device)
        starts = [0] if whole else range(0, batch, CPU_ROWS)
        for first in starts:
            part = slice(first, None if whole else first + CPU_ROWS)
            e, mask = model.embed(sequences[part])
            own = random_source(e.shape[0], device, seed=source.seed, rows=source.rows[part])
            draws = TrainingDraws(z0=None if z0 is None else z0[part])
            start = model.start(e, mask, own, draws)
            if method == "rk45":
                out[part] = model.fm.rk45_sampler(
                    e, mask, start, seed=source.seed, rows=source.rows[part]
                )[0]
            else:
                out[part], residual[part] = model.fm.integrate_with_residual(
                    e,
                    mask,
                    start,
                    steps=q,
                    seed=source.seed,
                    rows=source.rows[part],
                    noise=None if noise is None else noise[:, part],
                    method=method,
                    sweeps=sweeps,
                    tol=tol,
                    precision=precision,
                    padding=padding,
                )
        return (out, residual) if return_residual else out
    finally:
        for module in training:
            module.training = True


def _in_one_call(
    model: FMRecommender,
    sequences: Tensor,
    steps: int | None,
    seed: int | Tensor | None,
    rows: Tensor | None,
    method: str,
    precision: str,
    padding: str,
) -> Tensor | None:
    """`sample` step by step in one C++ call; None where there is none, and where an argument is
    off, which the other way names."""
    from fmrec_fast import serving  # which imports this module

    # Not a subclass, nor inside a transform: memory that the kernels can read.
    if type(sequences) is not Tensor or is_wrapped(sequences) or sequences.device.type != "cpu":
        return None
    if sequences.dtype != torch.int64 or sequences.ndim != 2 or sequences.shape[1] == 0:
        return None
    if method not in ("euler", "auto") or padding not in PADDINGS:
        return None
    if seed is None and current_rng() is Rng.PUBLISHED:
        return None
    check_steps(steps)
    q = model.fm.steps if steps is None else steps
    batch, length = sequences.shape
    if method == "auto" and model.fm.prefers_parallel(batch, length, q, sequences.device):
        return None
    packed = serving.packed_model(model, "euler", precision, padding, length)
    if packed is None:
        return None
    if rows is not None:
        rows = request_rows(rows, batch, sequences.device)
    word = as_seed(seed, sequences.device)
    try:
        return packed.sample(sequences.contiguous(), rows, q, word, padding)
    except ValueError:
        model.check_sequence(sequences)  # names an id that is out of range
        raise


def _training_modules(model: FMRecommender) -> list[torch.nn.Module]:
    """Those in training mode. ``model.modules()`` takes a tenth of a millisecond, which is much
    of one user's recommendation."""
    found: list[torch.nn.Module] = []
    waiting: list[torch.nn.Module] = [model]
    while waiting:
        module = waiting.pop()
        if module.training:
            found.append(module)
        waiting.extend(child for child in module._modules.values() if child is not None)
    return found


@torch.no_grad()
def scores(model: FMRecommender, sequences: Tensor, **options) -> Tensor:
    """Scores of all V items, [B, V]: ``model.fm_rep_pre(sample(model, sequences, ...))``.

    Takes the keyword arguments of `sample`. To rank, prefer `ops.item_topk` and
    `ops.target_rank`, which need not hold the matrix.
    """
    return model.fm_rep_pre(sample(model, sequences, **options))
