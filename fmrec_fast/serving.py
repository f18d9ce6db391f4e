"""Recommendations on a CPU in one C++ call, from ids to the best items.

`recommend` and `sample` take this path by themselves where they can. A `Server` does not read the
weights again to see whether they have changed, which matters when a call takes a millisecond.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmrec_fast import extension, noise, packing
from fmrec_fast.backend import Backend, BackendError, availability, current_backend, log_run
from fmrec_fast.models.recommender import FMRecommender
from fmrec_fast.ops._checks import check_padding, is_sharded, request_rows
from fmrec_fast.ops.linear import check_precision
from fmrec_fast.packing import State, Weights
from fmrec_fast.picard import TOLERANCE, prefers_parallel
from fmrec_fast.request import Recommendations, Request, read_request
from fmrec_fast.sampler import check_steps

ROWS = 512  # taken together, so that a batch of any size needs little memory


METHODS = ("euler", "parallel", "auto")


def obstacle(
    model: FMRecommender,
    method: str = "auto",
    padding: str = "published",
) -> str:
    """Why recommendations do not come from one C++ call here; empty if they do."""
    found = _find(model, method, padding)
    return found if isinstance(found, str) else ""


def packed_model(
    model: FMRecommender,
    method: str = "auto",
    precision: str = "float32",
    padding: str = "published",
    length: int | None = None,
) -> PackedModel | None:
    """The model for one call with its weights as they are now; None where it has no such call."""
    found = _find(model, method, padding)
    return None if isinstance(found, str) else PackedModel(model, precision, found, length)


def _find(model: FMRecommender, method: str, padding: str) -> tuple[Weights, State] | str:
    """The weights and what is made of them, or why there is no such call."""
    if method not in METHODS:
        return f"the call has methods {METHODS}, got {method!r}"
    backend = current_backend()
    if backend not in (Backend.AUTO, Backend.CPP):
        return f"the backend in force is {backend.value!r}"
    weights = packing.kept_weights(model)  # which are on the CPU, and those of an extension
    if weights is None:
        table = model.item_embeddings.weight
        if is_sharded(table):
            return "its items are over ranks"
        missing = availability(Backend.CPP, table.device)
        if missing:
            return missing
        weights = packing.weights_of(model)
    core, stack = weights.core, weights.core.xstart_model.att
    if not weights.can_stay:
        for tensor in weights.tensors:
            if tensor.dtype != torch.float32:
                return f"the call takes float32, got {tensor.dtype}"
    if (stack.attention, core.trajectory) != ("published", "straight"):
        options = (stack.attention, core.trajectory)
        return f"the call covers the published options only, got {options}"
    reason = unable(model, method, padding)
    if reason:
        return reason
    state = weights.state()
    return state.declined() or (weights, state)


def unable(model: FMRecommender, method: str, padding: str) -> str:
    """Why the call has not this method and padding for such a model; empty if it has."""
    if method == "parallel" and model.fm.target != "data":
        return f"all steps at once are for target 'data', got {model.fm.target!r}"
    if padding == "tied" and model.fm.xstart_model.att.variant.rotary:
        return "the call has no rotary embedding with padding 'tied'"
    return ""


class PackedModel:
    """The weights that a recommendation reads, as the C++ call takes them.

    The transformer's are a packed copy, for products of a precision; the others are read where they
    lie.

    Args:
        found: weights and what is made of them; None looks them up.
        length: of the histories; None is the model's ``max_len``.

    Raises:
        BackendError: the model cannot be served in one call; the message says why.
    """

    def __init__(
        self,
        model: FMRecommender,
        precision: str = "float32",
        found: tuple[Weights, State] | None = None,
        length: int | None = None,
    ) -> None:
        check_precision(precision)
        if found is None:
            looked_up = _find(model, "auto", "published")
            if isinstance(looked_up, str):
                raise BackendError(f"the model cannot be served in one call: {looked_up}")
            found = looked_up
        self.model, (weights, self._state) = model, found
        network = weights.core.xstart_model
        self.delta = network.lambda_uncertainty
        self.others = weights.arrays()
        length = model.config.max_len if length is None else length
        self.packed = self._state.packed(network.att.num_heads, length, precision)

    def recommend(self, request: Request, seed: Tensor, method: str) -> Recommendations:
        """The best items for checked `request`s."""
        batch = len(request.sequences)
        scores = torch.empty(batch, request.k)
        ids = torch.empty(batch, request.k, dtype=torch.int64)

        def places(part: slice) -> tuple[Any, ...]:
            return request.exclude(part).numpy(), scores[part].numpy(), ids[part].numpy()

        self._run("recommend", places, request.sequences, request.rows, request.steps, seed,
                  request.padding, method)  # fmt: skip
        log_run("item_ranking", "cpp")
        return Recommendations(ids, scores)

    def sample(
        self,
        sequences: Tensor,
        rows: Tensor | None,
        steps: int,
        seed: Tensor,
        padding: str = "published",
        method: str = "euler",
    ) -> Tensor:
        """The sampled embeddings [B, D] for histories [B, L], all checked; L is `length`."""
        out = torch.empty(len(sequences), self.model.emb_dim)
        self._run("sample", lambda part: (out[part].numpy(),), sequences, rows, steps, seed,
                  padding, method)  # fmt: skip
        return out

    def _run(
        self,
        name: str,
        places: Callable[[slice], tuple[Any, ...]],
        sequences: Tensor,
        rows: Tensor | None,
        steps: int,
        seed: Tensor,
        padding: str,
        method: str,
    ) -> None:
        """The extension's `name`, into the `places` of some rows after the others."""
        core, start = self.model.fm, self.model.starts_from()
        taus, batch = self._state.taus(core, steps), len(sequences)
        velocity = core.target == "velocity"
        if method == "auto" and velocity:
            method = "euler"
        elif method == "auto":
            wins = prefers_parallel(batch, steps, self.delta, sequences.device)
            method = "parallel" if wins else "euler"
        parallel = method == "parallel" and steps > 1
        # What runs inside.
        log_run("picard_sweep" if parallel else "euler_sampler", "cpp")
        if rows is None and batch > ROWS:
            rows = torch.arange(batch)
        use = noise.Use.START if start.name == "noise" else noise.Use.ANCHOR
        key = int(seed)
        seeds = key, noise.derived_word(key, use)
        call = getattr(extension.load(), name)
        for first in range(0, batch, ROWS):
            part = slice(first, first + ROWS)
            call(
                self.packed,
                *self.others,
                sequences[part].numpy(),
                taus,
                None if rows is None else rows[part].numpy(),
                *seeds,
                self.delta,
                *places(part),
                torch.get_num_threads(),
                padding == "tied",
                TOLERANCE if parallel else 0.0,
                start.name,
                start.keep,
                velocity,
            )


class Server:
    """A model whose weights are packed once, for recommendations with little delay.

    Changes of the weights are seen where PyTorch counts them: an optimizer's step,
    ``load_state_dict``, operations in place, a parameter that is replaced, ``model.to``. They are
    not seen when written through ``parameter.data``, a numpy view, or another process's mapping of
    shared memory: call `refresh` after those.

    Args:
        model: in evaluation mode or not, dropout is off.
        precision: as in `sample`.

    Raises:
        ValueError: no such precision.
        BackendError: the model cannot be served by the C++ kernels here; the message says why.
    """

    def __init__(self, model: FMRecommender, precision: str = "float32") -> None:
        self.model, self.precision = model, precision
        self.refresh()

    def refresh(self) -> None:
        """Pack the weights as they are now."""
        self._packed = PackedModel(self.model, self.precision)
        self._places = [
            (tensors, name)
            for module in self.model.modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        self._state = self._read_state()

    def _read_state(self) -> list[tuple[int, int, int]]:
        """What shows that a parameter or a buffer was written to or replaced."""
        found = []
        for tensors, name in self._places:
            tensor = tensors[name]
            if tensor is None:
                raise ValueError(f"parameter {name!r} was removed from the model")
            version = 0 if tensor.is_inference() else tensor._version
            found.append((id(tensor), tensor.data_ptr(), version))
        return found

    def recommend(
        self,
        histories: Sequence[Sequence[int]],
        k: int = 10,
        *,
        exclude_seen: bool = False,
        exclude: Sequence[Sequence[int]] | None = None,
        steps: int | None = None,
        seed: int | Tensor | None = None,
        rows: Tensor | None = None,
        padding: str = "published",
        method: str = "auto",
    ) -> Recommendations:
        """As `fmrec_fast.recommend`, and the same items."""
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        request = read_request(
            self.model,
            histories,
            k,
            exclude_seen=exclude_seen,
            exclude=exclude,
            steps=steps,
            rows=rows,
            padding=padding,
        )
        packed = self._ready(method, padding)
        return packed.recommend(request, noise.as_seed(seed, "cpu"), method)

    def sample(
        self,
        sequences: Tensor,
        *,
        steps: int | None = None,
        seed: int | Tensor | None = None,
        rows: Tensor | None = None,
        padding: str = "published",
        method: str = "auto",
    ) -> Tensor:
        """As `fmrec_fast.sample`, for histories [B, L]; with rotary embedding L is ``max_len``."""
        self.model.check_sequence(sequences)
        check_steps(steps)
        check_padding(padding)
        if method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {method!r}")
        if rows is not None:
            rows = request_rows(rows, len(sequences), sequences.device)
        packed = self._ready(method, padding)
        q = self.model.fm.steps if steps is None else steps
        word = noise.as_seed(seed, "cpu")
        return packed.sample(sequences.contiguous(), rows, q, word, padding, method)

    def _ready(self, method: str, padding: str) -> PackedModel:
        reason = unable(self.model, method, padding)
        if reason:
            raise BackendError(f"the model cannot be served in one call: {reason}")
        if self._read_state() != self._state:
            self.refresh()
        return self._packed
