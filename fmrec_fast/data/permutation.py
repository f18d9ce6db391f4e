"""A permutation of 0..n-1 that is computed where it is looked at, instead of stored."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# An even number: the two halves, one of which may be a bit longer, are then where they began.
ROUNDS = 8


class KeyedPermutation:
    """A bijection of 0..n-1, a function of its keys.

    ``KeyedPermutation(n, keys)[a:b]`` is what ``permutation[a:b]`` of a stored int64 tensor is.

    A Feistel network over the smallest range of 2^bits that holds n; a value outside 0..n-1 goes
    through it again until it is inside (which ends, since the network is a bijection, and takes
    fewer than two goes on average).
    """

    def __init__(self, length: int, keys: np.ndarray) -> None:
        if not 1 <= length <= 2**62:
            raise ValueError(f"length={length}; expected 1..2**62")
        if keys.dtype != np.uint64 or keys.shape != (ROUNDS,):
            raise ValueError(f"keys are {keys.dtype} {keys.shape}; expected uint64 ({ROUNDS},)")
        self.length, self.keys = length, keys
        bits = max((length - 1).bit_length(), 2)
        self.halves = bits - bits // 2, bits // 2

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, at: slice) -> Tensor:
        """int64 tensor on the CPU."""
        if not isinstance(at, slice):
            raise TypeError(f"got {at!r}; expected a slice")
        chosen = range(self.length)[at]
        position = np.arange(chosen.start, chosen.stop, chosen.step, dtype=np.int64)
        return torch.from_numpy(self.of(position.astype(np.uint64)).astype(np.int64))

    def of(self, position: np.ndarray) -> np.ndarray:
        """Where each position of uint64 [n] goes."""
        value = self._network(position)
        outside = np.flatnonzero(value >= self.length)
        while len(outside):
            value[outside] = self._network(value[outside])
            outside = outside[value[outside] >= self.length]
        return value

    def _network(self, value: np.ndarray) -> np.ndarray:
        high, low = self.halves
        left, right = value >> np.uint64(low), value & _mask(low)
        for key in self.keys:
            left, right = right, left ^ (_mixed(right ^ key) & _mask(high))
            high, low = low, high
        return (left << np.uint64(low)) | right


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


def _mixed(value: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64; products are modulo 2^64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))
