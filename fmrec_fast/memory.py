"""Memory that large results of the CPU kernels live in.

glibc's allocator maps a large tensor's memory afresh and unmaps it when the tensor goes: a training
step then spends a tenth of its time, or more, on pages that are faulted in and cleared. The
extension keeps what is freed, at most 1 GiB, for the next array of about its size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fmrec_fast import extension

# Numbers that are worth it; torch's allocator reuses smaller pieces by itself.
FEWEST = 1 << 16


def empty(*shape: int) -> Tensor:
    """``torch.empty(shape)``, float32 on the CPU; the extension must be there."""
    if math.prod(shape) < FEWEST:
        return torch.empty(shape)
    out = torch.from_numpy(extension.load().floats(shape))
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    return out.fill_(torch.nan) if filled and torch.are_deterministic_algorithms_enabled() else out


def release() -> int:
    """Hands the memory that is kept to the system; returns its bytes."""
    return extension.load().release_memory() if extension.available() else 0
