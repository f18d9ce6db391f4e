"""The published names: change the import line of a published trainer to this module."""

from __future__ import annotations

from typing import Any

from fmrec_fast.models.fmrec import FMRec, FMRecommender

Att_FM_model = FMRecommender


def create_model_FM(args: Any) -> FMRec:
    """The core, from the published argparse namespace."""
    return FMRec(args)


__all__ = ["Att_FM_model", "FMRec", "create_model_FM"]
