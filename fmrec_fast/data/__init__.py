"""Reading, splitting and batching interaction histories."""

from .batches import EvaluationSamples, LatestHistories, TrainingSamples, pad_histories
from .dataset import Dataset, ReadReport
from .readers import read_dataset
from .synthetic import synthetic_dataset

__all__ = [
    "Dataset",
    "EvaluationSamples",
    "LatestHistories",
    "ReadReport",
    "TrainingSamples",
    "pad_histories",
    "read_dataset",
    "synthetic_dataset",
]
