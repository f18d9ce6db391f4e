"""The counter-based noise stream: its definition, in PyTorch integer arithmetic.

Every random number of the package is a pure function of *what it is for*, never of where it
happens to lie in memory: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011) is keyed by a 64-bit seed and counts in the words

    (channel // 4, position, step, row)

so one seed gives one row the same noise in any batch, on any backend, padded or not. The four
outputs of a call become four standard normals (two Box-Muller pairs) for channels 4c..4c+3.

The Triton and C++ kernels generate the same numbers in registers; this module is what they are
held against. Uses that need numbers of their own (the sampler's start, dropout masks, ...) take
a seed derived by `derive_seed`, so that no two uses share a counter.

The few numbers a row that no kernel generates for itself (`start`, `uniforms`, ...) come from the
C++ extension where `native` says that it may draw them, words and uniforms to the bit as defined.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum
from types import ModuleType

import torch
from torch import Tensor

from fmrec_fast import extension
from fmrec_fast.backend import Backend, candidate
from fmrec_fast.forward_mode import is_wrapped

MASK32 = 0xFFFFFFFF
PHILOX_M0, PHILOX_M1 = 0xD2511F53, 0xCD9E8D57
PHILOX_W0, PHILOX_W1 = 0x9E3779B9, 0xBB67AE85
# The scale that maps 0..2^31-1 into [0, 1) in float32 (Triton's uint_to_uniform_float).
UNIFORM_SCALE = 4.6566127342e-10
SMALLEST_UNIFORM = 1.0e-7
SEED_STRIDE = 0x9E3779B97F4A7C15


class Use(IntEnum):
    """What a derived seed is for; the number is part of the stream's definition."""

    LAMBDA = 0
    START = 1
    TIME = 2
    DROPOUT = 3
    CELLS = 4
    STEP = 5
    INTERVAL = 6
    ANCHOR = 7
    PATH = 8


def derive_seed(seed: Tensor, use: Use) -> Tensor:
    """The seed of one use: ``seed + use * 0x9E3779B97F4A7C15`` modulo 2^64."""
    return seed + _signed(int(use) * SEED_STRIDE % 2**64)


def derived_word(seed: int, use: Use) -> int:
    """`derive_seed` of a seed that is known on the host, as a signed word too."""
    return _signed((seed + int(use) * SEED_STRIDE) % 2**64)


def step_seed(seed: Tensor, step: int) -> Tensor:
    """The seed of one sampler step that has draws besides lam: two words of Philox at counter
    (step, 0, 0, 0), so that neighbouring seeds share no step."""
    kernels = native(seed)
    if kernels is not None:
        return _native_words(kernels, seed, Use.STEP, 1, step)[0]
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    low, high, _, _ = philox_4x32((zero + step, zero, zero, zero), derive_seed(seed, Use.STEP))
    return (high << 32) | low


def native(seed: Tensor, *names: Tensor) -> ModuleType | None:
    """The extension where it draws what `seed` and the int64 tensors `names` key; else None, and
    the definition does: for another device or backend, while compiling, for wrapped tensors."""
    if torch.compiler.is_compiling():
        return None
    for tensor in (seed, *names):
        plain = type(tensor) is Tensor and not is_wrapped(tensor)
        if not plain or tensor.device.type != "cpu" or tensor.dtype != torch.int64:
            return None
    if candidate(seed.device) is not Backend.CPP or not extension.available():
        return None
    return extension.load()


def _native_words(
    kernels: ModuleType, seed: Tensor, use: Use, count: int, first: int = 0
) -> Tensor:
    """Words 0 (low) and 1 (high) at counters (first + j, 0, 0, 0): int64 [count]."""
    out = torch.empty(count, dtype=torch.int64)
    threads = torch.get_num_threads()
    kernels.stream_words(derived_word(int(seed), use), first, out.numpy(), threads)
    return out


def _native_rows(
    kernel: Callable[..., None], seed: Tensor, use: Use, rows: Tensor, channels: int, step: int = 0
) -> Tensor:
    """Of position 0: float32 [B, channels]."""
    out = torch.empty(len(rows), channels, dtype=torch.float32)
    word, names = derived_word(int(seed), use), rows.contiguous().numpy()
    kernel(names, word, step, out.numpy(), torch.get_num_threads())
    return out


def _signed(word: int) -> int:
    """A 64-bit word as the int64 with the same bits."""
    return word - (word >> 63 << 64)


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A fresh 64-bit seed, int64 scalar tensor on `device`, from torch's default generator.

    `torch.manual_seed` governs it, and nothing waits for the device.
    """
    return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)


def as_seed(seed: int | Tensor | None, device: torch.device | str) -> Tensor:
    """`seed` as the int64 scalar tensor the kernels read; None draws one.

    Raises:
        TypeError: neither an int nor an integer tensor.
        ValueError: an int outside 0 <= seed < 2^64, or a tensor with more than one element.
    """
    if seed is None:
        return draw_seed(device)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise ValueError(
                f"seed must be one int64, got {seed.dtype} of shape {tuple(seed.shape)}"
            )
        return seed.reshape(()).to(device)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an int, an int64 tensor or None, got {seed!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must satisfy 0 <= seed < 2**64, got {seed}")
    # Filled in on the device: a tensor of a Python number would be copied there, and waited for.
    return torch.full((), _signed(seed), dtype=torch.int64, device=device)


def philox_4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor, rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: four 32-bit words per counter.

    Args:
        counter: four int64 tensors holding 32-bit words, broadcastable to one shape.
        seed: int64 scalar; its low word is the first key word.
        rounds: 10 in the stream.

    Returns:
        Four int64 tensors of the broadcast shape, values 0 .. 2^32 - 1.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    device, wide = seed.device, (-1,) + (1,) * c0.ndim
    # Both halves of a round at once: a call on few counters costs its number of operations.
    even, odd = torch.stack((c0, c2)), torch.stack((c1, c3))
    # Made on the device: a tensor of Python numbers would be copied there, and waited for.
    which = torch.arange(2, device=device)
    factors = (PHILOX_M0 + which * (PHILOX_M1 - PHILOX_M0)).view(wide)
    steps = PHILOX_W0 + which * (PHILOX_W1 - PHILOX_W0)
    first = torch.stack((seed, seed >> 32)) & MASK32
    keys = (first + steps * torch.arange(rounds, device=device)[:, None]) & MASK32
    for key in keys.view(rounds, *wide).unbind():
        # The products wrap modulo 2^64; masking makes the arithmetic shift a logical one.
        product = even * factors
        high, low = (product >> 32) & MASK32, product & MASK32
        even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
    return even[0], odd[0], even[1], odd[1]


def to_uniform(word: Tensor) -> Tensor:
    """32-bit words to float32 in [0, 1), as Triton's ``tl.uint_to_uniform_float``."""
    signed = torch.where(word > 0x7FFFFFFF, word - (1 << 32), word)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * UNIFORM_SCALE


def to_normal_pair(u1: Tensor, u2: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller, as Triton's ``tl.pair_uniform_to_normal``."""
    radius = torch.sqrt(-2.0 * torch.log(u1.clamp_min(SMALLEST_UNIFORM)))
    angle = (2.0 * math.pi) * u2
    return radius * torch.cos(angle), radius * torch.sin(angle)


def words(
    seed: Tensor, rows: Tensor, steps: Tensor, positions: Tensor, channels: int
) -> tuple[Tensor, ...]:
    """The stream's raw words: four int64 tensors [S, B, P, ceil(channels / 4)]."""
    counter = (
        torch.arange((channels + 3) // 4, device=rows.device),
        (positions & MASK32)[:, None],
        (steps & MASK32)[:, None, None, None],
        (rows & MASK32)[:, None, None],
    )
    return philox_4x32(counter, seed)


def normals(seed: Tensor, rows: Tensor, steps: Tensor, positions: Tensor, channels: int) -> Tensor:
    """Standard normals of the stream.

    Args:
        seed: int64 scalar tensor.
        rows: int64 [B], request rows (any numbers that name the rows).
        steps: int64 [S].
        positions: int64 [P].
        channels: D.

    Returns:
        float32 [S, B, P, D].
    """
    u = [to_uniform(w) for w in words(seed, rows, steps, positions, channels)]
    n = torch.stack((*to_normal_pair(u[0], u[1]), *to_normal_pair(u[2], u[3])), dim=-1)
    return n.flatten(-2)[..., :channels]


def lam(
    seed: Tensor, rows: Tensor, step: int | Tensor, length: int, channels: int, delta: float
) -> Tensor:
    """lam ~ Normal(delta, delta) of one step (FMRec eq. 14): float32 [B, L, D]."""
    device = rows.device
    if isinstance(step, Tensor):
        steps = step.to(device, torch.int64).reshape(1)
    else:  # filled in on the device: a tensor made of a Python number would be copied there
        steps = torch.full((1,), step, dtype=torch.int64, device=device)
    n = normals(seed, rows, steps, torch.arange(length, device=device), channels)[0]
    return delta + delta * n


def start(seed: Tensor, rows: Tensor, channels: int) -> Tensor:
    """z0 ~ N(0, I), the sampler's start: float32 [B, D]."""
    return _row_normals(seed, Use.START, rows, channels)


def uniforms(seed: Tensor, rows: Tensor) -> Tensor:
    """u ~ U[0, 1), one per row, for the training times: float32 [B]."""
    return _row_uniforms(seed, Use.TIME, rows, 1).flatten()


def time_normals(seed: Tensor, rows: Tensor) -> Tensor:
    """One standard normal per row, for the logit-normal training times: float32 [B]."""
    return _row_normals(seed, Use.TIME, rows, 1).flatten()


def _row_normals(seed: Tensor, use: Use, rows: Tensor, channels: int) -> Tensor:
    """The normals at counters (channel // 4, 0, 0, row): float32 [B, channels]."""
    kernels = native(seed, rows)
    if kernels is not None:
        return _native_rows(kernels.stream_normals, seed, use, rows, channels)
    zero = torch.zeros(1, dtype=torch.int64, device=rows.device)
    return normals(derive_seed(seed, use), rows, zero, zero, channels)[0, :, 0]


def _row_uniforms(seed: Tensor, use: Use, rows: Tensor, channels: int, step: int = 0) -> Tensor:
    """The uniforms at counters (channel // 4, 0, step, row): float32 [B, channels]."""
    kernels = native(seed, rows)
    if kernels is not None:
        return _native_rows(kernels.stream_uniforms, seed, use, rows, channels, step)
    zero = torch.zeros(1, dtype=torch.int64, device=rows.device)
    four = words(derive_seed(seed, use), rows, zero + step, zero, channels)
    return to_uniform(torch.stack(four, dim=-1)[0, :, 0].flatten(1)[:, :channels])


def interval(seed: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Two uniforms per row, for the end of Fave's interval: where it lies, and whether at 1."""
    where, at_end = _row_uniforms(seed, Use.INTERVAL, rows, 2).unbind(1)
    return where, at_end


def anchor(seed: Tensor, rows: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Uniforms for Fave's anchor: one per row for its position [B], and those of the mask over
    its channels [B, D]. The position's is the word after the last group of channels."""
    groups = (channels + 3) // 4
    uniform = _row_uniforms(seed, Use.ANCHOR, rows, 4 * groups + 1)
    return uniform[:, 4 * groups], uniform[:, :channels]


def path(seed: Tensor, rows: Tensor, site: int) -> Tensor:
    """One uniform per row, for one use of drop path: float32 [B]."""
    return _row_uniforms(seed, Use.PATH, rows, 1, site).flatten()


def wide_words(seed: Tensor, count: int) -> Tensor:
    """`count` random integers 0 .. 2^63 - 1 for drawing cells: int64 [count].

    Draw j is words 0 (low) and 1 (high, its top bit dropped) at counter (j, 0, 0, 0).
    """
    kernels = native(seed)
    if kernels is not None:
        return _native_words(kernels, seed, Use.CELLS, count).bitwise_and_(2**63 - 1)
    j = torch.arange(count, device=seed.device)
    zero = torch.zeros((), dtype=torch.int64, device=seed.device)
    low, high, _, _ = philox_4x32((j, zero, zero, zero), derive_seed(seed, Use.CELLS))
    return ((high & 0x7FFFFFFF) << 32) | low
