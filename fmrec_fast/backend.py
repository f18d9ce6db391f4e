"""Which backend runs an op, what ran, and where random numbers come from.

A backend that an op does not have is declared in `MISSING` with the reason; whether one that it
has can run here is asked of the machine (`availability`), never inferred by a failed import.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from fmrec_fast import extension


class Backend(str, Enum):
    """How an op is computed; 'auto' picks the fastest one for the tensors' device."""

    AUTO = "auto"
    REFERENCE = "reference"
    TRITON = "triton"
    CPP = "cpp"

    __str__ = str.__str__


class Rng(str, Enum):
    """Where random numbers come from: the package's stream, or the published draws."""

    STREAM = "stream"
    PUBLISHED = "published"

    __str__ = str.__str__


# By value, for torch.compile: on Python 3.10 it cannot trace the call of an enumeration.
_BACKENDS = {backend.value: backend for backend in Backend}
_RNGS = {rng.value: rng for rng in Rng}


OPS = (
    "noise_fusion",
    "dropout",
    "dropout_layer_norm",
    "linear",
    "attention",
    "rms_norm",
    "self_attention",
    "feed_forward",
    "encoder",
    "euler_sampler",
    "picard_sweep",
    "item_cross_entropy",
    "history_loss",
    "item_ranking",
)

MISSING: dict[tuple[str, Backend], str] = {
    ("self_attention", Backend.TRITON): "its layers are cuBLAS's there, so a block runs its parts",
    ("feed_forward", Backend.TRITON): "its layers are cuBLAS's there, so a block runs its parts",
    ("dropout_layer_norm", Backend.TRITON): "a GPU runs its parts: the dropout has a kernel there, "
    "and the norm is PyTorch's",
    ("linear", Backend.TRITON): "cuBLAS, which PyTorch calls, is the kernel there",
    ("rms_norm", Backend.TRITON): "training alone calls it (encoder and samplers norm in their "
    "own kernels), and a GPU's share of it has not been measured",
}


@dataclass(frozen=True)
class Dispatch:
    """One entry of the dispatch log: `op` ran on `backend`, and why not on the one asked for."""

    op: str
    backend: Backend
    reason: str = ""


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run."""


_backend: ContextVar[Backend | None] = ContextVar("fmrec_fast_backend", default=None)
_rng: ContextVar[Rng | None] = ContextVar("fmrec_fast_rng", default=None)
_log: ContextVar[list[Dispatch] | None] = ContextVar("fmrec_fast_log", default=None)


def _parse(kind: type[Enum], value: object, source: str):
    try:
        return kind(value)
    except ValueError:
        allowed = [str(member.value) for member in kind]
        raise ValueError(f"{source} must be one of {allowed}, got {value!r}") from None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def availability(backend: Backend | str, device: torch.device | str = "cpu") -> str | None:
    """None if `backend` can run on `device` in this process, else the reason why it cannot."""
    backend = _parse(Backend, backend, "backend")
    kind = torch.device(device).type
    if backend is Backend.TRITON:
        if importlib.util.find_spec("triton") is None:
            return "the package triton is not installed"
        if kind != "cuda" and not triton_interpreted():
            return f"tensors are on {kind}, and TRITON_INTERPRET=1 was not set at start"
    if backend is Backend.CPP:
        if not extension.available():
            return extension.reason()
        if kind != "cpu":
            return f"tensors are on {kind}, the extension works on cpu"
    return None


def current_backend() -> Backend:
    """The backend in force: `use_backend`, else ``FMREC_FAST_BACKEND``, else 'auto'."""
    chosen = _backend.get()
    if chosen is None:
        source = "FMREC_FAST_BACKEND"
        named = os.environ.get(source)
        chosen = Backend.AUTO if named is None else _parse(Backend, named, source)
    return chosen


def current_rng() -> Rng:
    """The source of random numbers: `use_rng`, else ``FMREC_FAST_RNG``, else 'stream'."""
    if torch.compiler.is_compiling():
        return _RNGS[_rng_while_compiling()]
    return _rng_in_force()


def constant_when_compiled(function: Callable) -> Callable:
    """What `torch.compiler.assume_constant_result` does, which imports the compiler to do it."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@constant_when_compiled
def _rng_while_compiling() -> str:
    return _rng_in_force().value


def _rng_in_force() -> Rng:
    chosen = _rng.get()
    if chosen is None:
        source = "FMREC_FAST_RNG"
        named = os.environ.get(source)
        chosen = Rng.STREAM if named is None else _parse(Rng, named, source)
    return chosen


@contextmanager
def use_backend(backend: Backend | str) -> Iterator[None]:
    """Run ops on `backend`: 'reference', 'triton', 'cpp' or 'auto'.

    A backend named here must run wherever an op has it: if it cannot (not installed, tensors on
    another device, a dtype it does not take), the op raises `BackendError`. An op that is declared
    not to have it (`MISSING`), or not for such a call (an option, a gradient), runs its definition,
    and the dispatch log says so.

    Raises:
        ValueError: no such backend.
        BackendError: the backend is not installed.
    """
    chosen: Backend = _parse(Backend, backend, "backend")
    if chosen is Backend.TRITON and importlib.util.find_spec("triton") is None:
        raise BackendError(f"backend 'triton' was asked for, but {availability(backend)}")
    if chosen is Backend.CPP and not extension.available():
        raise BackendError(f"backend 'cpp' was asked for, but {availability(backend)}")
    token = _backend.set(chosen)
    try:
        yield
    finally:
        _backend.reset(token)


@contextmanager
def use_rng(rng: Rng | str) -> Iterator[None]:
    """Draw from the package's counter-based stream ('stream') or as published ('published').

    Under 'published' every draw is made on the host by torch's default generator, in the order
    of the published program, and nothing that draws is pruned away: the same
    ``torch.manual_seed`` gives the published program's losses and scores on CPU.
    """
    token = _rng.set(_parse(Rng, rng, "rng"))
    try:
        yield
    finally:
        _rng.reset(token)


@contextmanager
def dispatch_log() -> Iterator[list[Dispatch]]:
    """Collect which backend each op ran on: ``with dispatch_log() as log: ...``."""
    log: list[Dispatch] = []
    token = _log.set(log)
    try:
        yield log
    finally:
        _log.reset(token)


def log_again(entries: list[Dispatch]) -> None:
    """Enter what ran before into the dispatch log: a replayed graph runs it without choosing."""
    log = _log.get()
    if log is not None:
        log.extend(entries)


def log_run(op: str, backend: str) -> None:
    """Enter that `op` runs on `backend`, as was chosen before: when a program was compiled, say."""
    log = _log.get()
    if log is not None:
        log.append(Dispatch(op, Backend(backend)))


def candidate(device: torch.device) -> Backend:
    """The backend in force, where 'auto' stands for the fastest one for `device`."""
    if torch.compiler.is_compiling():
        return _BACKENDS[_candidate_while_compiling(device.type)]
    return _candidate(device.type)


@constant_when_compiled
def _candidate_while_compiling(device: str) -> str:
    return _candidate(device).value


def _candidate(device: str) -> Backend:
    wanted = current_backend()
    if wanted is Backend.AUTO:
        return Backend.TRITON if device == "cuda" else Backend.CPP
    return wanted


def choose(
    op: str,
    *tensors: Tensor,
    declined: str = "",
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> Backend:
    """The backend for `op` on these tensors, entered into the dispatch log.

    Args:
        declined: why the kernel of the `candidate` backend does not cover this call, if it does
            not: the definition then runs, also where a backend was named, and the log says why.
        dtypes: what the op's Triton kernels take; the C++ ones take float32.

    Raises:
        BackendError: a backend was named that the op has and that cannot run here.
    """
    if torch.compiler.is_compiling():
        given = tuple(tensor.dtype for tensor in tensors)
        kind = tensors[0].device.type
        return _BACKENDS[_choose_while_compiling(op, kind, given, declined, dtypes)]
    return _choose(op, tensors, declined, dtypes)


@constant_when_compiled
def _choose_while_compiling(
    op: str,
    device: str,
    given: tuple[torch.dtype, ...],
    declined: str,
    dtypes: tuple[torch.dtype, ...],
) -> str:
    """The choice at compile time, which the compiled program keeps; it logs when it runs."""
    with dispatch_log():
        tensors = tuple(torch.empty(0, dtype=dtype, device=device) for dtype in given)
        return _choose(op, tensors, declined, dtypes).value


def _choose(
    op: str, tensors: tuple[Tensor, ...], declined: str, dtypes: tuple[torch.dtype, ...]
) -> Backend:
    device, reason = tensors[0].device, ""
    chosen = _candidate(device.type)
    if chosen is not Backend.REFERENCE:
        reason = MISSING.get((op, chosen)) or declined
        if not reason:
            reason = _obstacle(chosen, device, tensors, {Backend.TRITON: dtypes}) or ""
            if reason and current_backend() is not Backend.AUTO:
                raise BackendError(f"backend {chosen.value!r} was asked for {op}, but {reason}")
        if reason:
            chosen = Backend.REFERENCE
    log = _log.get()
    if log is not None:
        log.append(Dispatch(op, chosen, reason))
    return chosen


def _obstacle(
    backend: Backend,
    device: torch.device,
    tensors: tuple[Tensor, ...],
    taken: dict[Backend, tuple[torch.dtype, ...]],
) -> str | None:
    reason = availability(backend, device)
    if reason:
        return reason
    dtypes = taken.get(backend, (torch.float32,))
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.dtype not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"its kernels take {names}, got {tensor.dtype}"
    return None


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks for reuse instead of giving them back to the system.

    With the default settings every large float32 result is mapped and faulted in afresh, which on
    a CPU costs more than the arithmetic. Changes the whole process, so only the command line calls
    it. Returns whether the allocator took it.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_threshold, limit = -1, -3, 1 << 30
    return bool(mallopt(mmap_threshold, limit)) and bool(mallopt(trim_threshold, limit))
