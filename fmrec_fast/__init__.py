"""FMRec and Fave, flow-matching recommenders, made fast without changing what they compute."""

from fmrec_fast.backend import Backend, Rng, dispatch_log, use_backend, use_rng
from fmrec_fast.config import FaveConfig, FMRecConfig
from fmrec_fast.graphs import GraphedSampler
from fmrec_fast.losses import Losses, training_losses
from fmrec_fast.models import (
    Fave,
    FaveDraws,
    FaveRecommender,
    FMRec,
    FMRecommender,
    TrainingDraws,
)
from fmrec_fast.recommend import Recommendations, recommend
from fmrec_fast.sampler import sample, scores
from fmrec_fast.serving import Server

__version__ = "0.1.0"

__all__ = [
    "Backend",
    "FMRec",
    "FMRecConfig",
    "FMRecommender",
    "GraphedSampler",
    "Fave",
    "FaveConfig",
    "FaveDraws",
    "FaveRecommender",
    "Losses",
    "Recommendations",
    "Rng",
    "Server",
    "TrainingDraws",
    "__version__",
    "dispatch_log",
    "recommend",
    "sample",
    "scores",
    "training_losses",
    "use_backend",
    "use_rng",
]
