"""Reading, splitting and batching interaction histories."""

from .batches import EvaluationSamples, LatestHistories, TrainingSamples, pad_histories
from .convert import convert
from .dataset import Dataset, ReadReport
from .mapped import MappedDataset, verify
from .readers import read_dataset
from .synthetic import synthetic_dataset

__all__ = [
    "Dataset",
    "EvaluationSamples",
    "LatestHistories",
    "MappedDataset",
    "ReadReport",
    "TrainingSamples",
    "convert",
    "pad_histories",
    "read_dataset",
    "synthetic_dataset",
    "verify",
]
