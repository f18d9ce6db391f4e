"""The networks, as nn.Modules with the published state_dict keys."""

from fmrec_fast.models.fave import Fave, FaveDraws, FaveRecommender
from fmrec_fast.models.fmrec import FMRec, FMRecommender, TrainingDraws

__all__ = ["FMRec", "FMRecommender", "Fave", "FaveDraws", "FaveRecommender", "TrainingDraws"]
