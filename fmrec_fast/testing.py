"""Seeded inputs and the measure of closeness that tests and benchmarks share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

HISTORIES = ("padding", "short", "long", "full")


class Sequences(NamedTuple):
    """A batch: `sequence` int64 [B, L], left-padded with 0, and `target` int64 [B, 1]."""

    sequence: Tensor
    target: Tensor


def make_sequences(
    batch: int,
    max_len: int,
    item_num: int,
    seed: int,
    *,
    histories: Sequence[str] = ("short", "long", "full"),
    device: torch.device | str = "cpu",
) -> Sequences:
    """Left-padded histories and targets, a function of the arguments alone.

    Row i has the kind ``histories[i % len(histories)]``:

    - 'padding': no item at all;
    - 'short': 1 .. L / 5 items (the mean of Amazon Beauty is 7.7 of 50);
    - 'long': L / 2 .. L items;
    - 'full': L items, no padding.

    Items are uniform over 1 .. V-1 with repetitions.

    Args:
        batch: B, may be 0.
        max_len: L.
        item_num: V, at least 2.
        seed: of the draws.
        histories: kinds that the rows cycle through.

    Raises:
        ValueError: names the size or the kind that is off.
    """
    for name, value, least in (("batch", batch, 0), ("max_len", max_len, 1), ("V", item_num, 2)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    for kind in histories:
        if kind not in HISTORIES:
            raise ValueError(f"histories must be of {HISTORIES}, got {kind!r}")
    if not histories:
        raise ValueError(f"histories must name at least one of {HISTORIES}, got {histories!r}")
    shortest = {"padding": 0, "short": 1, "long": max(max_len // 2, 1), "full": max_len}
    longest = {"padding": 0, "short": max(max_len // 5, 1), "long": max_len, "full": max_len}
    generator = torch.Generator().manual_seed(seed)
    kinds = [histories[i % len(histories)] for i in range(batch)]
    low = torch.tensor([shortest[kind] for kind in kinds], dtype=torch.int64)
    high = torch.tensor([longest[kind] for kind in kinds], dtype=torch.int64)
    length = low + (torch.rand(batch, generator=generator) * (high - low + 1)).long()
    items = torch.randint(1, item_num, (batch, max_len), generator=generator)
    target = torch.randint(1, item_num, (batch, 1), generator=generator)
    padded = torch.arange(max_len) < max_len - length[:, None]
    return Sequences(items.masked_fill(padded, 0).to(device), target.to(device))


def error_to_truth(result: Tensor, truth: Tensor, scale: float | None = None) -> float:
    """max |result - truth| / scale; None is the largest finite |truth| (1 if truth is zero).

    Infinities count as equal to themselves; anything else that is not finite is an infinite error.
    """
    result, truth = result.detach().double(), truth.detach().double().to(result.device)
    if truth.numel() == 0:
        return 0.0
    difference = torch.where(result == truth, 0.0, (result - truth).abs())
    if scale is None:
        scale = float(truth.abs().nan_to_num(nan=0.0, posinf=0.0).max()) or 1.0
    worst = float(difference.nan_to_num(nan=math.inf, posinf=math.inf).max())
    return worst / scale


def assert_close_to_truth(
    candidate: Tensor,
    same_dtype_reference: Tensor,
    truth_float64: Tensor,
    *,
    floor: float = 1e-6,
    scale: float | None = None,
    name: str = "result",
) -> None:
    """error(candidate) <= 2 x error(PyTorch in the same dtype) + floor.

    Errors are those of `error_to_truth`, so `floor` is relative to the largest value; it matters
    where PyTorch happens to be exact. The numbers are printed.

    Args:
        candidate: what is judged.
        same_dtype_reference: plain PyTorch's result in the candidate's dtype.
        truth_float64: plain PyTorch's result in float64.
        floor: what round-off may cost in any case.
        scale: what errors are relative to, where the truth is 0 in exact arithmetic.
        name: what the message calls the result.

    Raises:
        AssertionError: the error is larger, or shapes or dtypes differ.
    """
    shapes = [tuple(t.shape) for t in (candidate, same_dtype_reference, truth_float64)]
    if len(set(shapes)) != 1:
        raise AssertionError(f"{name}: shapes of candidate, reference and truth differ: {shapes}")
    if truth_float64.dtype != torch.float64:
        raise AssertionError(f"{name}: truth must be float64, got {truth_float64.dtype}")
    if candidate.dtype != same_dtype_reference.dtype:
        raise AssertionError(
            f"{name}: candidate is {candidate.dtype}, reference {same_dtype_reference.dtype}"
        )
    of_candidate = error_to_truth(candidate, truth_float64, scale)
    of_reference = error_to_truth(same_dtype_reference, truth_float64, scale)
    limit = 2 * of_reference + floor
    message = (
        f"{name}: error {of_candidate:.3e}, PyTorch in {candidate.dtype} {of_reference:.3e}, "
        f"limit {limit:.3e}"
    )
    print(message)
    if not of_candidate <= limit:
        raise AssertionError(message)
