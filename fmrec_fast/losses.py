"""The training objective (eq. 21)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fmrec_fast.models.fave import FaveRecommender
from fmrec_fast.models.fmrec import FMRecommender, TrainingDraws


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
) -> Losses:
    """loss = loss_fm + Loss_Alpha * loss_ce + Loss_Beta * loss_recon; of Fave, its stage's.

    Args:
        sequence: int64 [B, L]; target: int64 [B, 1].
        draws, seed, rows: as in `FMRecommender.forward`.
    """
    if isinstance(model, FaveRecommender):
        parts = model.stage_losses(sequence, target, draws=draws, seed=seed, rows=rows)
        ce = model.loss_fave_tat(parts.prediction, target)
        total = model.weigh(parts) + model.config.Loss_Alpha * ce
        return Losses(total, parts.flow, ce, parts.reconstruction, parts.straight)
    recon, x0, _, _, loss_fm, _ = model(sequence, target, draws=draws, seed=seed, rows=rows)
    ce = model.loss_fm_ce(x0, target)
    config = model.config
    total = loss_fm + config.Loss_Alpha * ce + config.Loss_Beta * recon
    return Losses(total, loss_fm, ce, recon)
