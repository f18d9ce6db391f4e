"""Recommendations on a CPU in one C++ call, from ids to the best items.

`recommend` takes this path by itself where it can. A `Server` keeps the weights packed between
calls, which matters when a call takes a millisecond.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmrec_fast import extension, flow, noise
from fmrec_fast.backend import Backend, BackendError, availability, choose, current_backend
from fmrec_fast.models.fmrec import FMRecommender
from fmrec_fast.ops._checks import is_sharded
from fmrec_fast.ops.encoder import check_precision, pack, variant_declined
from fmrec_fast.picard import TOLERANCE, prefers_parallel
from fmrec_fast.request import Recommendations, Request, read_request

ROWS = 512  # taken together, so that a batch of any size needs little memory


METHODS = ("euler", "parallel", "auto")


def obstacle(
    model: FMRecommender,
    method: str = "auto",
    padding: str = "published",
) -> str:
    """Why recommendations do not come from one C++ call here; empty if they do."""
    if method not in METHODS:
        return f"the call has methods {METHODS}, got {method!r}"
    if current_backend() not in (Backend.AUTO, Backend.CPP):
        return f"the backend in force is {current_backend().value!r}"
    weight, core = model.item_embeddings.weight, model.fm
    if is_sharded(weight):
        return "its items are over ranks"
    missing = availability(Backend.CPP, weight.device)
    if missing:
        return missing
    if weight.dtype != torch.float32:
        return f"the call takes float32, got {weight.dtype}"
    options = (core.xstart_model.att.attention, core.trajectory)
    if options != ("published", "straight"):
        return f"the call covers the published options only, got {options}"
    if core.xstart_model.att.variant.rotary:
        missing = variant_declined(core.xstart_model.att.weights(), weight.device)
    return missing or unable(model, method, padding)


def unable(model: FMRecommender, method: str, padding: str) -> str:
    """Why the call has not this method and padding for such a model; empty if it has."""
    if method == "parallel" and model.fm.target != "data":
        return f"all steps at once are for target 'data', got {model.fm.target!r}"
    if padding == "tied" and model.fm.xstart_model.att.variant.rotary:
        return "the call has no rotary embedding with padding 'tied'"
    return ""


class PackedModel:
    """The weights that a recommendation reads, as the C++ call takes them.

    The transformer's are copied and packed, for products of a precision; the others are read where
    they lie.
    """

    def __init__(self, model: FMRecommender, precision: str = "float32") -> None:
        check_precision(precision)
        reason = obstacle(model)
        weights = model.fm.sampler_weights()
        others = (
            weights.norm_weight,
            weights.norm_bias,
            model.item_embeddings.weight,
            model.LayerNorm.weight,
            model.LayerNorm.bias,
        )
        for tensor in (
            *others,
            *(tensor for block in weights.blocks for tensor in block.tensors()),
        ):
            if tensor.dtype != torch.float32:
                reason = reason or f"the call takes float32, got {tensor.dtype}"
        if reason:
            raise BackendError(f"the model cannot be served in one call: {reason}")
        self.model = model
        self.packed = pack(weights.blocks, weights.num_heads, model.config.max_len, precision)
        self.delta = weights.delta
        self.others = [tensor.detach().contiguous().numpy() for tensor in others]
        self._taus: dict[tuple[int, float], Any] = {}

    @torch.no_grad()
    def taus(self, steps: int) -> Any:
        """Time embeddings [q, D] of the steps."""
        core = self.model.fm
        key = (steps, core.eps)
        if key not in self._taus:
            times = flow.step_times(steps, core.eps)
            embedded = core.xstart_model.embed_time(times * core.time_scale)
            self._taus[key] = embedded.contiguous().numpy()
        return self._taus[key]

    def recommend(self, request: Request, seed: Tensor, method: str) -> Recommendations:
        """The best items for checked `request`s."""
        taus, start = self.taus(request.steps), self.model.starts_from()
        use = noise.Use.START if start.name == "noise" else noise.Use.ANCHOR
        batch, velocity = len(request.sequences), self.model.fm.target == "velocity"
        if method == "auto" and velocity:
            method = "euler"
        elif method == "auto":
            wins = prefers_parallel(batch, request.steps, self.delta, request.sequences.device)
            method = "parallel" if wins else "euler"
        parallel = method == "parallel" and request.steps > 1
        scores = torch.empty(batch, request.k)
        ids = torch.empty(batch, request.k, dtype=torch.int64)
        # What runs inside, for the log.
        choose("picard_sweep" if parallel else "euler_sampler", scores)
        choose("item_ranking", scores)
        for first in range(0, batch, ROWS):
            part = slice(first, first + ROWS)
            extension.load().recommend(
                self.packed,
                *self.others,
                request.sequences[part].numpy(),
                taus,
                request.rows[part].numpy(),
                int(seed),
                int(noise.derive_seed(seed, use)),
                self.delta,
                request.exclude(part).numpy(),
                scores[part].numpy(),
                ids[part].numpy(),
                torch.get_num_threads(),
                request.padding == "tied",
                TOLERANCE if parallel else 0.0,
                start.name,
                start.keep,
                velocity,
            )
        return Recommendations(ids, scores)


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
        reason = unable(self.model, method, padding)
        if reason:
            raise BackendError(f"the model cannot be served in one call: {reason}")
        if self._read_state() != self._state:
            self.refresh()
        return self._packed.recommend(request, noise.as_seed(seed, "cpu"), method)
