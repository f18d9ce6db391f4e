"""The training objective (eq. 21)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmrec_fast.models.fave import FaveRecommender
from fmrec_fast.models.fmrec import TrainingDraws
from fmrec_fast.models.recommender import FMRecommender
from fmrec_fast.ops._checks import is_sharded


@dataclass(frozen=True)
class Losses:
    """The objective and its parts, scalars on the model's device.

    `straight` is the mean of (du/dt)^2 in Fave's stage 2, else None.
    """

    total: Tensor
    flow: Tensor
    cross_entropy: Tensor
    reconstruction: Tensor
    straight: Tensor | None = None


def training_losses(
    model: FMRecommender,
    sequence: Tensor,
    target: Tensor,
    *,
    draws: TrainingDraws | None = None,
    seed: Tensor | int | None = None,
    rows: Tensor | None = None,
    batch: int | None = None,
) -> Losses:
    """loss = loss_fm + Loss_Alpha * loss_ce + Loss_Beta * loss_recon; of Fave, its stage's.

    Args:
        sequence: int64 [B, L]; target: int64 [B, 1].
        draws, seed, rows: as in `FMRecommender.forward`.
        batch: rows of the global batch that these are a part of, perhaps none: the losses are then
            the part's share, which adds up over the parts to those of the batch. Drawn cells of
            the reconstruction loss must be given, unless its table is over ranks.
    """
    stage = straight = None
    if isinstance(model, FaveRecommender):
        stage = model.stage_losses(sequence, target, draws=draws, seed=seed, rows=rows)
        recon, x0, flow = stage.reconstruction, stage.prediction, stage.flow
        straight = stage.straight
    else:
        recon, x0, _, _, flow, _ = model(sequence, target, draws=draws, seed=seed, rows=rows)
    ce = model.loss_fm_ce(x0, target)
    if batch is not None:
        share = len(sequence) / batch
        flow = _part(flow, share)
        straight = None if straight is None else _part(straight, share)
        # Ops give a table that is over ranks this rank's share already.
        whole = torch.compiler.is_compiling()
        if whole or not is_sharded(model.item_embeddings.weight):
            ce = ce * share
        if whole or not is_sharded(model.fm.xstart_model.decoder_output()[0]):
            recon = recon * share
    config = model.config
    if isinstance(model, FaveRecommender) and stage is not None:
        parts = replace(stage, flow=flow, reconstruction=recon, straight=straight)
        total = model.weigh(parts) + config.Loss_Alpha * ce
    else:
        total = flow + config.Loss_Alpha * ce + config.Loss_Beta * recon
    return Losses(total, flow, ce, recon, straight)


def _part(mean: Tensor, share: float) -> Tensor:
    """Its share of the whole batch's mean; a mean over no row is NaN."""
    return mean * share if share else mean.nan_to_num() * share
