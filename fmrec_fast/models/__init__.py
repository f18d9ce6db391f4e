"""The networks, as nn.Modules with the published state_dict keys."""

from fmrec_fast.config import FaveConfig, FMRecConfig
from fmrec_fast.models.fave import Fave, FaveDraws, FaveRecommender
from fmrec_fast.models.fmrec import FMRec, TrainingDraws
from fmrec_fast.models.recommender import FMRecommender

CONFIGS: dict[str, type[FMRecConfig]] = {
    config.KIND: config for config in (FMRecConfig, FaveConfig)
}
RECOMMENDERS: dict[str, type[FMRecommender]] = {
    "fmrec": FMRecommender,
    "fave": FaveRecommender,
}


def build_recommender(config: FMRecConfig) -> FMRecommender:
    """The joint model that a configuration describes."""
    return RECOMMENDERS[config.KIND].from_config(config)


__all__ = [
    "CONFIGS",
    "FMRec",
    "FMRecommender",
    "Fave",
    "FaveDraws",
    "FaveRecommender",
    "TrainingDraws",
    "build_recommender",
]
