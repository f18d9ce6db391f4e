"""The sampler from CUDA graphs: all launches of a batch recorded once, then issued as one."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fmrec_fast import noise
from fmrec_fast.backend import Rng, current_backend, current_rng
from fmrec_fast.capture import Capture, Outputs, Pool
from fmrec_fast.models.recommender import FMRecommender
from fmrec_fast.ops._checks import check_integer, check_padding, check_range, check_shape
from fmrec_fast.ops.linear import check_precision
from fmrec_fast.picard import check_options
from fmrec_fast.recommend import rank_items
from fmrec_fast.request import Recommendations, check_k
from fmrec_fast.sampler import sample

METHODS = ("euler", "parallel", "auto")
MAX_BATCH = 512
MAX_GRAPHS = 64
# Kinds of samplers that one model's calls of `sample` and `recommend` keep.
MAX_SHARED = 8
LEAST_EXCLUDE = 8


def bucket(batch: int, max_batch: int) -> int:
    """The captured batch that a batch is padded to: 1, 2, 4, 8, then multiples of 8, and from 128
    on eight for each doubling, so that above 8 at most an eighth is added or 7 rows.

    >>> [bucket(n, 1000) for n in (1, 3, 5, 9, 65, 129, 300, 999)]
    [1, 4, 8, 16, 72, 144, 320, 1000]
    """
    if batch <= 8:
        size = 1 << (batch - 1).bit_length()
    else:
        step = max(8, 1 << (batch.bit_length() - 4))
        size = -(-batch // step) * step
    return min(size, max_batch)


def buckets(max_batch: int) -> list[int]:
    """All values of `bucket`, ascending."""
    return sorted({bucket(batch, max_batch) for batch in range(1, max_batch + 1)})


class _Inputs(NamedTuple):
    """The static tensors of one capture; None where the capture draws or has no such input."""

    sequences: Tensor
    rows: Tensor
    seed: Tensor | None
    z0: Tensor | None
    exclude: Tensor


class _Graph(NamedTuple):
    capture: Capture
    inputs: _Inputs


@dataclass(frozen=True)
class _Options:
    """What a sampler is made with; all of it is fixed within a graph."""

    max_batch: int
    steps: int | None
    method: str
    sweeps: int | None
    precision: str
    padding: str
    k: int | None
    max_graphs: int

    def of_sample(self) -> dict[str, Any]:
        """The keywords of `sample`. All that 'auto' could take without `sweeps` waits for the host,
        except going step by step."""
        stepwise = self.method == "auto" and self.sweeps is None
        return {
            "steps": self.steps,
            "method": "euler" if stepwise else self.method,
            "sweeps": self.sweeps,
            "precision": self.precision,
            "padding": self.padding,
        }


class GraphedSampler:
    """`sample`, and with `k` the ranking behind it, as one launch per batch.

    Equivalent PyTorch::

        rep = sample(model, sequences, steps=..., seed=seed, rows=rows, z0=z0, graph=False)
        rank_items(model, rep, k, exclude)   # with k

    A call copies its arguments into static tensors, replays the graph of the next larger bucket
    (1, 2, 4, 8, multiples of 8, from 128 on eight per doubling) and returns copies of the results.
    A batch beyond `max_batch` is cut. On a CPU the same code runs without a graph.

    - Draws: without `seed` one is drawn on the device inside the graph, anew at every replay;
      ``torch.manual_seed`` before a run of calls gives the same results again, and the same as
      `sample`. A row's noise is keyed by its name, not by its place in the padded batch.
    - Weights: a graph reads the parameters where they lie, so that changes in place (a step of an
      optimizer, ``load_state_dict``) show in the next replay. Where a parameter has moved (``.to``,
      an assignment) all graphs are dropped and captured anew as they are needed. Settings that the
      model reads at every call (`sample_N`, `lambda_uncertainty`, ...), the backend in force and
      torch's precision settings each have graphs of their own. Other changes to modules, hooks for
      instance, need `clear`.
    - Memory: all graphs share one pool, about as large as the largest needs. Of a batch's results a
      graph keeps [B, D], with `k` only [B, k]; scores of all items are held by none, and during a
      replay only where `item_topk` runs its definition. The least recently used graph goes when
      there are more than `max_graphs`.
    - Threads: calls take turns (one lock per sampler) and may come from any stream. The model's
      weights must not be written meanwhile.
    - Copies: ``copy.deepcopy`` and pickle take the model and the settings along, not the graphs.

    Args:
        model: the joint model.
        max_batch: largest batch in one graph.
        steps, method, sweeps, precision, padding: as in `sample`. What waits for the host has no
            graph: not 'rk45', and 'parallel' only with `sweeps`; without them 'auto' goes step by
            step.
        k: rank the items too, k of them; None returns the embeddings.
        max_graphs: graphs that are kept.

    Raises:
        TypeError, ValueError: names the argument that is off.
    """

    def __init__(
        self,
        model: FMRecommender,
        *,
        max_batch: int = MAX_BATCH,
        steps: int | None = None,
        method: str = "euler",
        sweeps: int | None = None,
        precision: str = "float32",
        padding: str = "published",
        k: int | None = None,
        max_graphs: int = MAX_GRAPHS,
    ) -> None:
        self._options = _Options(
            max_batch, steps, method, sweeps, precision, padding, k, max_graphs
        )
        for name in ("max_batch", "steps", "k", "max_graphs"):
            value = getattr(self._options, name)
            if value is None and name in ("steps", "k"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        reason = _method_obstacle(method, sweeps)
        if reason:
            raise ValueError(reason)
        check_options(sweeps, None)
        check_padding(padding)
        check_precision(precision)
        if k is not None:
            check_k(model, k)
        self._model: Callable[[], FMRecommender | None] = lambda: model
        self._lock = threading.RLock()
        # None: called once, without a graph.
        self._graphs: OrderedDict[tuple, _Graph | None] = OrderedDict()
        self._addresses: tuple = ()
        self._pool: Pool | None = None
        self._finished: torch.cuda.Event | None = None
        self.captures = 0

    @property
    def model(self) -> FMRecommender:
        """The model.

        Raises:
            ReferenceError: it is gone, and this is a sampler that `sample` keeps for it.
        """
        model = self._model()
        if model is None:
            raise ReferenceError("the model of this sampler no longer exists")
        return model

    @property
    def captured(self) -> list[tuple[int, int]]:
        """(batch, length) of the graphs that are kept, the most recently used last."""
        return [key[:2] for key, graph in self._graphs.items() if graph is not None]

    def clear(self) -> None:
        """Drop all graphs."""
        with self._lock:
            if self._finished is not None:
                self._finished.synchronize()  # their memory is free only then
            self._graphs.clear()
            self._pool = self._finished = None

    def warmup(
        self,
        batches: Iterable[int] | None = None,
        *,
        length: int | None = None,
        exclude_width: int = 0,
    ) -> None:
        """Capture ahead of use, without a trace in the random generators.

        Args:
            batches: batch sizes; None is every bucket.
            length: L of the sequences; None is the model's ``max_len``.
            exclude_width: E of `exclude`, for graphs with `k`.

        Raises:
            ValueError: a size is off, or there are more buckets than `max_graphs`.
        """
        options, model = self._options, self.model
        length = model.config.max_len if length is None else length
        sizes = buckets(options.max_batch) if batches is None else list(batches)
        for size in sizes:
            if not 1 <= size <= options.max_batch:
                raise ValueError(f"batches must be in 1 .. {options.max_batch}, got {size}")
        wanted = sorted({bucket(size, options.max_batch) for size in sizes}, reverse=True)
        if len(wanted) > options.max_graphs:
            raise ValueError(
                f"{len(wanted)} buckets are more than max_graphs = {options.max_graphs}"
            )
        width = _exclude_width(exclude_width)
        with self._lock:
            self._keep_valid(model)
            for size in wanted:  # the largest first: the others fit into its memory
                for drawn in (True, False):
                    self._graph(model, self._key(model, size, length, drawn, False, width))

    @torch.no_grad()
    def __call__(
        self,
        sequences: Tensor,
        *,
        seed: int | Tensor | None = None,
        rows: Tensor | None = None,
        z0: Tensor | None = None,
        exclude: Tensor | None = None,
    ) -> Tensor | Recommendations:
        """Sample, or with `k` recommend.

        Args:
            sequences: int64 [B, L], left-padded with 0; on any device.
            seed, rows, z0: as in `sample`.
            exclude: int64 [B, E], ids that may not be recommended; -1 fills up short rows.

        Returns:
            float32 [B, D], or with `k` ids and scores [B, k].

        Raises:
            TypeError, ValueError: dtypes or shapes are off, or (on CPU) an id is out of range.
        """
        return self.call(sequences, seed=seed, rows=rows, z0=z0, exclude=exclude)

    def call(
        self,
        sequences: Tensor,
        *,
        seed: int | Tensor | None,
        rows: Tensor | None,
        z0: Tensor | None = None,
        exclude: Tensor | None = None,
        at_once: bool = True,
    ) -> Any:
        """The call; without `at_once` a bucket is captured only when it comes back, so that what
        happens once is not paid for three times."""
        model, options = self.model, self._options
        batch, width = self._check(sequences, rows, z0, exclude)
        device = model.item_embeddings.weight.device
        if batch > options.max_batch and seed is None:
            seed = noise.draw_seed(device)  # one for all pieces, as `sample` has it
        parts = []
        for first in range(0, max(batch, 1), options.max_batch):
            cut = slice(first, first + options.max_batch)
            parts.append(
                self._piece(
                    model,
                    first,
                    sequences[cut],
                    seed,
                    None if rows is None else rows[cut],
                    None if z0 is None else z0[cut],
                    None if exclude is None else exclude[cut],
                    width,
                    at_once,
                )
            )
        joined = parts[0]
        if len(parts) > 1:
            joined = tuple(torch.cat(same) for same in zip(*parts, strict=True))
        return joined[0] if options.k is None else Recommendations(*joined)

    def _check(
        self,
        sequences: Tensor,
        rows: Tensor | None,
        z0: Tensor | None,
        exclude: Tensor | None,
    ) -> tuple[int, int]:
        """The batch and the static width of `exclude`; what the region cannot check itself."""
        model = self.model
        model.check_sequence(sequences)
        sizes = {"B": len(sequences), "D": model.emb_dim}
        if rows is not None:
            check_shape("rows", rows, "B", sizes)
            check_integer("rows", rows)
        if z0 is not None:
            check_shape("z0", z0, "B D", sizes)
            if z0.dtype != torch.float32:
                raise TypeError(f"z0 must be float32, got {z0.dtype}")
        if exclude is None:
            return sizes["B"], 0
        if self._options.k is None:
            raise ValueError("exclude is for samplers with k, which rank the items; k is None")
        check_shape("exclude", exclude, "B E", sizes)
        check_integer("exclude", exclude)
        check_range("exclude", exclude, 0, model.item_num, {-1: "no item"})
        return sizes["B"], _exclude_width(exclude.shape[1])

    def _piece(
        self,
        model: FMRecommender,
        first: int,
        sequences: Tensor,
        seed: int | Tensor | None,
        rows: Tensor | None,
        z0: Tensor | None,
        exclude: Tensor | None,
        width: int,
        at_once: bool,
    ) -> Outputs:
        """At most `max_batch` rows, whose names are first, first + 1, ... unless `rows` are."""
        batch, length = sequences.shape
        device = model.item_embeddings.weight.device
        cuda = device.type == "cuda"
        graph = None
        with self._lock, torch.cuda.device_of(model.item_embeddings.weight):
            outside = cuda and torch.cuda.is_current_stream_capturing()
            if batch and not outside:
                self._keep_valid(model)
                size = bucket(batch, self._options.max_batch)
                key = self._key(model, size, length, seed is None, z0 is not None, width)
                graph = self._graph(model, key, at_once)
            if graph is None:
                inputs = _Inputs(
                    sequences.to(device),
                    _names(rows, first, batch, device),
                    None if seed is None else noise.as_seed(seed, device),
                    None if z0 is None else z0.to(device),
                    _all_excluded(exclude, batch, 0, device),
                )
                return _region(self._model, inputs, self._options)
            if self._finished is not None:
                torch.cuda.current_stream().wait_event(self._finished)
            _fill(graph.inputs, first, sequences, seed, rows, z0, exclude)
            out = tuple(tensor[:batch].clone() for tensor in graph.capture.replay())
            if cuda:
                self._finished = self._finished or torch.cuda.Event()
                self._finished.record()
            return out

    def _key(
        self,
        model: FMRecommender,
        size: int,
        length: int,
        draws: bool,
        starts: bool,
        width: int,
    ) -> tuple:
        """All that a capture takes as given, besides where the parameters lie."""
        device = model.item_embeddings.weight.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        return (
            size,
            length,
            draws,
            starts,
            width,
            current_backend(),
            current_rng(),
            torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(),
            autocast and torch.get_autocast_dtype(device),
            model.fm.sampler_settings(),
        )

    def _keep_valid(self, model: FMRecommender) -> None:
        """Drop the graphs if a parameter is no longer where they read it."""
        addresses = _addresses(model)
        if addresses != self._addresses:
            self.clear()
            self._addresses = addresses

    def _graph(self, model: FMRecommender, key: tuple, at_once: bool = True) -> _Graph | None:
        """The graph of `key`, from now on the one used last; None if it is not time to capture."""
        at_once = at_once or key in self._graphs
        graph = self._graphs.pop(key, None)
        if graph is None and at_once:
            graph = self._new(model, key)
        self._graphs[key] = graph
        if len(self._graphs) > self._options.max_graphs:
            if self._finished is not None:
                self._finished.synchronize()
            self._graphs.popitem(last=False)
        return graph

    def _new(self, model: FMRecommender, key: tuple) -> _Graph:
        size, length, draws, starts, width = key[:5]
        device = model.item_embeddings.weight.device
        if self._pool is None:
            self._pool = Pool(device)
        # Not inference tensors, which could only be filled in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            inputs = _Inputs(
                torch.zeros(size, length, dtype=torch.int64, device=device),
                torch.arange(size, device=device),
                None if draws else torch.zeros((), dtype=torch.int64, device=device),
                torch.zeros(size, model.emb_dim, device=device) if starts else None,
                _all_excluded(None, size, width, device),
            )
            capture = Capture(partial(_region, self._model, inputs, self._options), self._pool)
        self.captures += 1
        return _Graph(capture, inputs)

    def __reduce__(self) -> tuple:
        return _rebuild, (self.model, asdict(self._options))


def _rebuild(model: FMRecommender, options: dict[str, Any]) -> GraphedSampler:
    return GraphedSampler(model, **options)


@torch.no_grad()
def _region(
    model_of: Callable[[], FMRecommender | None], inputs: _Inputs, options: _Options
) -> Outputs:
    """What is captured."""
    model = model_of()
    if model is None:
        raise ReferenceError("the model of this sampler no longer exists")
    rep = sample(
        model,
        inputs.sequences,
        seed=inputs.seed,
        rows=inputs.rows,
        z0=inputs.z0,
        graph=False,
        **options.of_sample(),
    )
    if options.k is None:
        return (rep,)
    return tuple(rank_items(model, rep, options.k, inputs.exclude))


def _fill(
    inputs: _Inputs,
    first: int,
    sequences: Tensor,
    seed: int | Tensor | None,
    rows: Tensor | None,
    z0: Tensor | None,
    exclude: Tensor | None,
) -> None:
    """Write one batch into the static tensors; the rows behind it are padding."""
    batch = len(sequences)
    inputs.sequences[:batch].copy_(sequences)
    if batch < len(inputs.sequences):
        inputs.sequences[batch:].zero_()
    if rows is None:
        torch.arange(first, first + len(inputs.rows), out=inputs.rows)
    else:
        inputs.rows[:batch].copy_(rows)
    if inputs.seed is not None:
        inputs.seed.copy_(noise.as_seed(seed, inputs.seed.device))
    if inputs.z0 is not None and z0 is not None:
        inputs.z0[:batch].copy_(z0)
    if exclude is not None:
        inputs.exclude[:batch, : exclude.shape[1]].copy_(exclude)
        inputs.exclude[:batch, exclude.shape[1] :].fill_(-1)


def _names(rows: Tensor | None, first: int, batch: int, device: torch.device) -> Tensor:
    return torch.arange(first, first + batch, device=device) if rows is None else rows.to(device)


def _all_excluded(exclude: Tensor | None, batch: int, width: int, device: torch.device) -> Tensor:
    if exclude is not None:
        return exclude.to(device)
    return torch.full((batch, width), -1, dtype=torch.int64, device=device)


def _exclude_width(width: int) -> int:
    """The static width that `width` is padded to: 0, 8, 16, 32, ..."""
    return 0 if width == 0 else max(LEAST_EXCLUDE, 1 << (width - 1).bit_length())


def _addresses(model: nn.Module) -> tuple:
    """Where the parameters and buffers lie, and as what; walked by hand, since it is done at every
    call and ``model.parameters()`` takes several times as long."""
    found: list = []
    modules: list[nn.Module] = [model]
    while modules:
        module = modules.pop()
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    found += (tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.device)
        modules += [child for child in module._modules.values() if child is not None]
    return tuple(found)


# --- the samplers behind `sample` and `recommend` -------------------------------------------------

_shared: weakref.WeakKeyDictionary[FMRecommender, OrderedDict[_Options, GraphedSampler]]
_shared = weakref.WeakKeyDictionary()
_shared_lock = threading.Lock()


def shared_sampler(
    model: FMRecommender,
    *,
    steps: int | None = None,
    method: str = "euler",
    sweeps: int | None = None,
    precision: str = "float32",
    padding: str = "published",
    k: int | None = None,
) -> GraphedSampler:
    """The sampler that calls of `sample` and `recommend` with these options share.

    Kept beside the model, not in it, and only as long as the model lives: copies and pickles of
    the model know nothing of it.
    """
    options = _Options(MAX_BATCH, steps, method, sweeps, precision, padding, k, MAX_GRAPHS)
    with _shared_lock:
        samplers = _shared.setdefault(model, OrderedDict())
        sampler = samplers.pop(options, None)
        if sampler is None:
            sampler = GraphedSampler(model, **asdict(options))
            sampler._model = weakref.ref(model)
        samplers[options] = sampler
        if len(samplers) > MAX_SHARED:
            samplers.popitem(last=False)
        return sampler


def by_default(device: torch.device) -> bool:
    """Whether `sample` takes a graph where it is not told: on CUDA, unless ``FMREC_FAST_GRAPH=0``
    or the call is captured already."""
    return (
        device.type == "cuda"
        and os.environ.get("FMREC_FAST_GRAPH", "1") != "0"
        and not torch.cuda.is_current_stream_capturing()
    )


def obstacle(
    method: str,
    seed: object,
    *,
    noise: Tensor | None = None,
    sweeps: int | None = None,
    tol: float | None = None,
    return_residual: bool = False,
) -> str:
    """Why a call of `sample` cannot be a graph; empty where it can."""
    if tol is not None or return_residual:
        return "tol and the residual have none; a number of sweeps has"
    if noise is not None:
        return "explicit noise has none, which would hold a copy of all of it"
    if seed is None and current_rng() is Rng.PUBLISHED:
        return "the published draws are made on the host, which a graph cannot"
    return _method_obstacle(method, sweeps)


def _method_obstacle(method: str, sweeps: int | None) -> str:
    if method not in METHODS:
        return f"method must be one of {METHODS} in a graph, got {method!r}"
    if method == "parallel" and sweeps is None:
        return "method 'parallel' looks at the residual on the host, unless sweeps are given"
    if method == "euler" and sweeps is not None:
        return f"sweeps are for method 'parallel', got {sweeps} with 'euler'"
    return ""
