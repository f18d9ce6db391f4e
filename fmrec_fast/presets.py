"""Published settings of Fave, for each dataset and stage."""

from __future__ import annotations

from typing import Any

# What the published configurations share, where it differs from the defaults.
_COMMON = {"emb_dropout": 0.3, "patience": 10, "Loss_Alpha": 0.2}

# name -> (stage 1, what stage 2 changes of it)
_STAGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ml-100k": ({}, {}),
    "beauty": (
        {
            "Loss_Alpha": 0.1,
            "s_modsamp": 0.7,
            "gamma_init": 1e-5,
            "loss_pretrain_weight": 0.4,
        },
        {
            "dropout": 0.3,
            "weight_decay": 0.01,
            "mask_ratio": 2.0,
            "Loss_Alpha": 0.2,
            "train_mask_ratio": 0.1,
            "infer_mask_ratio": 0.2,
            "mask_end": 0.1,
            "loss_straight_weight": 0.6,
            "finetune_lr_scale": 0.01,
        },
    ),
    "steam": (
        {
            "Loss_Alpha": 0.4,
            "loss_aux_weight": 0.2,
            "loss_straight_weight": 0.6,
            "train_mask_ratio": 0.4,
            "infer_mask_ratio": 0.4,
            "mask_end": 0.3,
        },
        {
            "emb_dropout": 0.0,
            "Loss_Alpha": 0.3,
            "weight_decay": 0.01,
            "finetune_lr_scale": 1e-5,
        },
    ),
}
PRESETS = tuple(_STAGES)


def preset(name: str, stage_mode: str) -> dict[str, Any]:
    """The settings of a dataset's stage that differ from `FaveConfig`'s defaults.

    Args:
        name: one of `PRESETS`.
        stage_mode: 'pretrain' or 'finetune'.

    Raises:
        ValueError: no such preset.
    """
    if name not in _STAGES:
        raise ValueError(f"preset must be one of {PRESETS}, got {name!r}")
    first, second = _STAGES[name]
    return _COMMON | first | (second if stage_mode == "finetune" else {})
