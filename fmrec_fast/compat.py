"""The published names: change the import line of a published trainer to this module."""

from __future__ import annotations

from typing import Any

from fmrec_fast.models.fave import Fave, FaveRecommender
from fmrec_fast.models.fmrec import FMRec
from fmrec_fast.models.recommender import FMRecommender

Att_FM_model = FMRecommender
Att_Fave_model = FaveRecommender


def create_model_FM(args: Any) -> FMRec:
    """FMRec's core, from the published argparse namespace."""
    return FMRec(args)


def create_model_Fave(args: Any) -> Fave:
    """Fave's core, from the published argparse namespace."""
    return Fave(args)


__all__ = [
    "Att_FM_model",
    "Att_Fave_model",
    "FMRec",
    "Fave",
    "create_model_FM",
    "create_model_Fave",
]
