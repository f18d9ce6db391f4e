"""Argument checks shared by the ops; every message names the value and what was expected."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import torch
from torch import Tensor

from fmrec_fast.config import PADDINGS


def check_shape(name: str, tensor: Tensor, expected: str, sizes: dict[str, int]) -> None:
    """`tensor` must have the shape `expected`, e.g. "B L D"; unseen letters enter `sizes`.

    Raises:
        TypeError: not a tensor.
        ValueError: another shape.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor [{expected}], got {type(tensor).__name__}")
    letters = expected.split()
    shape = tuple(tensor.shape)
    fits = len(shape) == len(letters) and all(
        sizes.setdefault(letter, size) == size for letter, size in zip(letters, shape, strict=True)
    )
    if not fits:
        known = ", ".join(f"{k} = {v}" for k, v in sizes.items() if k in letters)
        raise ValueError(f"{name} must be [{', '.join(letters)}] ({known}), got {shape}")


def check_integer(name: str, tensor: Tensor) -> None:
    """`tensor` must be int64.

    Raises:
        TypeError: another dtype.
    """
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {tensor.dtype}")


def check_float(**tensors: Tensor | None) -> None:
    """All tensors must have one floating-point dtype and one device.

    Raises:
        TypeError: not floating point, or differing dtypes.
        ValueError: differing devices.
    """
    present = {name: t for name, t in tensors.items() if t is not None}
    first_name, first = next(iter(present.items()))
    if not first.is_floating_point():
        raise TypeError(f"{first_name} must be floating point, got {first.dtype}")
    for name, tensor in present.items():
        if tensor.dtype != first.dtype:
            raise TypeError(f"{name} is {tensor.dtype}, {first_name} is {first.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, {first_name} on {first.device}")


def is_sharded(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor, whose module is not imported for the question."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_padding(padding: str) -> None:
    """`padding` must be one of `PADDINGS`.

    Raises:
        ValueError: it is not.
    """
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {PADDINGS}, got {padding!r}")


def checking() -> bool:
    """Whether ids are looked at on every device, which waits for it: ``FMREC_FAST_CHECK=1``."""
    return os.environ.get("FMREC_FAST_CHECK", "0") == "1"


def check_range(
    name: str, ids: Tensor, low: int, high: int, allowed: Mapping[int, str] | None = None
) -> None:
    """On the CPU, every id must satisfy low <= id < high or be one of `allowed`.

    On another device nothing is checked, since looking would wait for it, unless
    ``FMREC_FAST_CHECK=1`` asks for it; a compiled program does not look either.

    Raises:
        ValueError: names the first offending id.
    """
    if ids.numel() == 0 or torch.compiler.is_compiling():
        return
    if ids.device.type != "cpu" and not checking():
        return
    smallest, largest = (int(x) for x in torch.aminmax(ids))
    if low <= smallest and largest < high:
        return
    bad = (ids < low) | (ids >= high)
    for value in allowed or {}:
        bad &= ids != value
    if bad.any():
        offending = int(ids[bad][0])
        extra = "".join(f", or {v} ({why})" for v, why in (allowed or {}).items())
        raise ValueError(f"{name} must be in {low} .. {high - 1}{extra}, got {offending}")


def request_rows(rows: Tensor | None, batch: int, device: torch.device) -> Tensor:
    """`rows`, or 0 .. B-1: the names of the rows in the noise stream.

    Raises:
        TypeError, ValueError: not int64 [B].
    """
    if rows is None:
        return torch.arange(batch, device=device)
    check_shape("rows", rows, "B", {"B": batch})
    check_integer("rows", rows)
    return rows.to(device).contiguous()  # the kernels read rows as they lie
