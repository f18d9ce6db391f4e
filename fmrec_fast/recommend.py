"""Recommending: ragged histories in, the k best items out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fmrec_fast import noise, serving
from fmrec_fast.models.recommender import FMRecommender
from fmrec_fast.ops import item_topk
from fmrec_fast.ops._checks import is_sharded
from fmrec_fast.request import PADDING, Recommendations, check_k, read_request
from fmrec_fast.sampler import sample

BATCH = 512

__all__ = ["BATCH", "Recommendations", "rank_items", "recommend"]


def rank_items(model: FMRecommender, rep: Tensor, k: int, exclude: Tensor) -> Recommendations:
    """The k best real items for representations [B, D]; padding is never among them."""
    check_k(model, k)
    padding = exclude.new_full((len(rep), 1), PADDING)
    best = item_topk(
        rep, model.item_embeddings.weight, k, exclude=torch.cat((exclude, padding), dim=1)
    )
    return Recommendations(best[1], best[0])


@torch.no_grad()
def recommend(
    model: FMRecommender,
    histories: Sequence[Sequence[int]],
    k: int = 10,
    *,
    exclude_seen: bool = False,
    exclude: Sequence[Sequence[int]] | None = None,
    steps: int | None = None,
    seed: int | Tensor | None = None,
    rows: Tensor | None = None,
    method: str = "auto",
    precision: str = "float32",
    padding: str = "published",
    graph: bool | None = None,
) -> Recommendations:
    """Recommend for any users, known or not, from their histories alone.

    On a CPU with the C++ kernels this is one call, from ids to the best items; the weights stay
    packed from call to call for as long as no bit of them changes, and are read to see that. A
    `Server` does not read them.

    Args:
        model: the joint model.
        histories: per user the item ids 1 .. V-1, oldest first; the most recent ``max_len`` are
            used.
        k: how many items.
        exclude_seen: do not recommend items of the whole given history.
        exclude: per user, further ids not to recommend.
        steps, seed, rows, precision, padding, graph: as in `sample`; the ranking is part of the
            graph.
        method: as in `sample`. The default 'auto' gives the step-by-step result to a relative 1e-5,
            from all steps at once where that is expected to be faster.

    Returns:
        ids [B, k] and scores [B, k], best first. Where exclusions leave fewer than k items, the
        excess scores are -inf.

    Raises:
        ValueError: an empty history, an id out of range, k out of range, or `exclude` of another
            length; the message names the row and the value.
    """
    request = read_request(
        model,
        histories,
        k,
        exclude_seen=exclude_seen,
        exclude=exclude,
        steps=steps,
        rows=rows,
        padding=padding,
    )
    seed = noise.as_seed(seed, model.item_embeddings.weight.device)
    graphed = None
    if graph is not False and not torch.compiler.is_compiling():
        from fmrec_fast import graphs  # which imports this module

        device = request.sequences.device
        sharded = is_sharded(model.item_embeddings.weight)
        if graph and sharded:
            raise ValueError("graph = True: items over ranks have none")
        if graph or (
            graphs.by_default(device) and not graphs.obstacle(method, seed) and not sharded
        ):
            graphed = graphs.shared_sampler(
                model, steps=steps, method=method, precision=precision, padding=padding, k=k
            )
    packed = None if graphed else serving.packed_model(model, method, precision, padding)
    if packed is not None:
        return packed.recommend(request, seed, method)
    parts = []
    for first in range(0, max(len(histories), 1), BATCH):
        part = slice(first, first + BATCH)
        if graphed is not None:
            parts.append(
                graphed.call(
                    request.sequences[part],
                    seed=seed,
                    rows=request.rows[part],
                    exclude=request.exclude(part),
                    at_once=bool(graph),
                )
            )
            continue
        rep = sample(
            model,
            request.sequences[part],
            steps=steps,
            method=method,
            seed=seed,
            rows=request.rows[part],
            precision=precision,
            padding=padding,
            graph=False,
        )
        best = item_topk(rep, model.item_embeddings.weight, k, exclude=request.exclude(part))
        parts.append(Recommendations(best[1], best[0]))
    return Recommendations(*(torch.cat(same) for same in zip(*parts, strict=True)))
