"""Recommending: ragged histories in, the k best items out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fmrec_fast import noise
from fmrec_fast.data.batches import pad_histories
from fmrec_fast.models.fmrec import FMRecommender
from fmrec_fast.ops import item_topk
from fmrec_fast.ops._checks import request_rows
from fmrec_fast.sampler import sample

PADDING = 0
BATCH = 512


class Recommendations(NamedTuple):
    """`ids` int64 [B, k] and `scores` float32 [B, k], best first."""

    ids: Tensor
    scores: Tensor


def pad_lists(lists: Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
    """Ragged ids as int64 [B, E], short rows filled up with -1."""
    width = max((len(row) for row in lists), default=0)
    return torch.tensor(
        [list(row) + [-1] * (width - len(row)) for row in lists], dtype=torch.int64, device=device
    ).reshape(len(lists), width)


def check_k(model: FMRecommender, k: int) -> None:
    """`k` must be between 1 and the number of real items.

    Raises:
        ValueError: it is not.
    """
    if not 1 <= k < model.item_num:
        raise ValueError(f"k must be in 1 .. {model.item_num - 1} (number of items), got {k}")


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
    graph: bool | None = None,
) -> Recommendations:
    """Recommend for any users, known or not, from their histories alone.

    Args:
        model: the joint model.
        histories: per user the item ids 1 .. V-1, oldest first; the most recent ``max_len`` are
            used.
        k: how many items.
        exclude_seen: do not recommend items of the whole given history.
        exclude: per user, further ids not to recommend.
        steps, seed, rows, graph: as in `sample`; the ranking is part of the graph.

    Returns:
        ids [B, k] and scores [B, k], best first. Where exclusions leave fewer than k items, the
        excess scores are -inf.

    Raises:
        ValueError: an empty history, an id out of range, k out of range, or `exclude` of another
            length; the message names the row and the value.
    """
    check_k(model, k)
    device = model.item_embeddings.weight.device
    sequences = pad_histories(histories, model.config.max_len, model.item_num, device)
    if exclude is not None and len(exclude) != len(histories):
        raise ValueError(
            f"exclude must have one list for each of {len(histories)} histories, got {len(exclude)}"
        )
    lists = [
        [*(histories[i] if exclude_seen else ()), *(exclude[i] if exclude is not None else ())]
        for i in range(len(histories))
    ]
    rows = request_rows(rows, len(histories), device)
    seed = noise.as_seed(seed, device)
    graphed = None
    if graph is not False:
        from fmrec_fast import graphs  # which imports this module

        if graph or graphs.by_default(device, "euler", seed, None):
            graphed = graphs.shared_sampler(model, steps=steps, k=k)
    parts = []
    for first in range(0, max(len(histories), 1), BATCH):
        part = slice(first, first + BATCH)
        excluded = pad_lists(lists[part], device)
        if graphed is not None:
            parts.append(
                graphed.call(
                    sequences[part],
                    seed=seed,
                    rows=rows[part],
                    exclude=excluded,
                    at_once=bool(graph),
                )
            )
        else:
            rep = sample(
                model, sequences[part], steps=steps, seed=seed, rows=rows[part], graph=False
            )
            parts.append(rank_items(model, rep, k, excluded))
    return Recommendations(*(torch.cat(same) for same in zip(*parts, strict=True)))
