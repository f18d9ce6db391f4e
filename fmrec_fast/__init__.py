"""FMRec, the flow-matching sequential recommender, made fast without changing what it computes."""

from fmrec_fast.backend import Backend, Rng, dispatch_log, use_backend, use_rng
from fmrec_fast.config import FMRecConfig
from fmrec_fast.graphs import GraphedSampler
from fmrec_fast.losses import Losses, training_losses
from fmrec_fast.models import FMRec, FMRecommender, TrainingDraws
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
