"""The sampler's weights on a CPU: found in the model and packed once, for as long as they stay.

The C++ kernels read the transformer's weights packed. Nothing that PyTorch keeps tells whether a
weight was written to: ``tensor._version`` does not see ``parameter.data``, a numpy view or another
process. So what was packed is kept with a fingerprint of all bytes that it was made from, and the
fingerprint is read again at every call, which is several times as fast as packing.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from fmrec_fast import extension, flow
from fmrec_fast.forward_mode import is_wrapped
from fmrec_fast.ops.encoder import pack, variant_declined
from fmrec_fast.reference.encoder import BlockWeights

if TYPE_CHECKING:
    from fmrec_fast.models.fmrec import FMRec
    from fmrec_fast.models.recommender import FMRecommender

# Kinds kept at a time: for rotary embedding weights are packed for a length, and time embeddings
# belong to a number of steps.
MOST_PACKED, MOST_TAUS = 3, 64
T = TypeVar("T")


class Weights:
    """The parameters that sampling reads of a core or of a joint model, as they were found in its
    modules."""

    def __init__(self, root: FMRec | FMRecommender) -> None:
        core = self.core = _core_of(root)
        network = core.xstart_model
        self.blocks: list[BlockWeights] = network.att.weights()
        self.norm = (network.norm_fm_rep.weight, network.norm_fm_rep.bias)
        # Of the joint model, read where they lie.
        self.joint: tuple[Tensor, ...] = ()
        if root is not core:
            outer: Any = root
            norm = outer.LayerNorm
            self.joint = (outer.item_embeddings.weight, norm.weight, norm.bias)
        self._made_from = [tensor for block in self.blocks for tensor in block.tensors()]
        self._made_from += [p for layer in network.time_layers() for p in layer.parameters()]
        self.tensors = [*self._made_from, *self.norm, *self.joint]
        # The dictionaries on the way to them, with what they hold.
        self._ways: list[tuple[dict[str, Any], list[Any]]] = []
        used = {id(tensor) for tensor in self.tensors}
        found = _ways(root, used, self._ways)
        # Not where a weight is computed when it is read (a parametrization), or is no plain memory.
        self.can_stay = (
            found == used and all(map(_is_plain, self.tensors)) and extension.available()
        )
        self._places = self._where()
        # Both share what is made of the core's.
        self._of_core = weights_of(core) if self.joint else self
        self._lock = threading.Lock()
        self._watch: Any = None
        self._state: State | None = None
        self._arrays: list[Any] | None = None

    def _where(self) -> list[Any]:
        read = self.tensors
        return [
            *[t.data_ptr() for t in read],
            *[t.shape for t in read],
            *[t.is_contiguous() for t in read],
        ]

    def are_those_of(self, root: FMRec | FMRecommender) -> bool:
        """Whether the modules still hold these tensors, and those their memory. What is in the
        memory is not looked at."""
        return (
            self.can_stay
            and self._ways[0][0] is root._modules
            and extension.load().same_values(self._ways)
            and self._where() == self._places
        )

    def state(self) -> State:
        """What was made of the weights' present values, which are read for it; where they cannot
        stay, of those that they have when it is made.

        Values that differ in any bit are taken for the same with a chance below 2^-61, whatever
        they are: the hash is keyed by random numbers of the process (`csrc/fingerprint.h`).
        """
        if self._of_core is not self:
            return self._of_core.state()
        if not self.can_stay:
            return State(self, None)
        if self._watch is None:
            # The arrays share the tensors' memory and keep it: no other storage comes to lie there.
            self._watch = extension.load().Watch([_array(t) for t in self._made_from])
        mark = self._watch.read()
        state = self._state
        if state is None or state.mark != mark:
            state = self._state = State(self, mark)
        return state

    def arrays(self) -> list[Any]:
        """The final norm's, and those of the joint model: their memory, where they can stay."""
        found = self._arrays
        if found is None:
            found = [_array(tensor) for tensor in (*self.norm, *self.joint)]
            self._arrays = found if self.can_stay else None
        return found

    def unchanged(self, mark: bytes | None) -> bool:
        """Whether the values are still those that were read as `mark`."""
        return mark is None or self._watch.read() == mark


class State:
    """What was made of the weights when their fingerprint was `mark`. Threads may share it."""

    def __init__(self, weights: Weights, mark: bytes | None) -> None:
        self.mark = mark
        self.weights = weights
        self._packed: OrderedDict[Any, Any] = OrderedDict()
        self._taus: OrderedDict[Any, Any] = OrderedDict()
        self._declined: str | None = None

    def _keep(self, kept: OrderedDict[Any, T], key: Any, most: int, make: Callable[[], T]) -> T:
        found = kept.get(key)
        if found is None:
            found = make()
            # Not what another thread wrote to while it was read.
            if self.weights.unchanged(self.mark):
                with self.weights._lock:
                    kept[key] = found
                    while len(kept) > most:
                        kept.popitem(last=False)
        return found

    def packed(self, num_heads: int, length: int | None, precision: str) -> Any:
        """The blocks as the C++ kernels read them, for histories of `length` positions and products
        of this `precision`."""
        blocks = self.weights.blocks
        rotary = blocks[0].inv_freq is not None
        key = (extension.load().isa(), num_heads, length if rotary else None, precision)
        return self._keep(
            self._packed, key, MOST_PACKED, lambda: pack(blocks, num_heads, length, precision)
        )

    def taus(self, core: FMRec, steps: int) -> Any:
        """The array of `time_embeddings`."""
        key = (steps, core.eps, core.time_scale)
        return self._keep(self._taus, key, MOST_TAUS, lambda: time_embeddings(core, steps))

    def declined(self) -> str:
        """As `variant_declined`."""
        if self._declined is None:
            blocks = self.weights.blocks
            self._declined = variant_declined(blocks, blocks[0].norm1_weight.device)
        return self._declined


class Keeper:
    """Holds a model's `Weights` from call to call. A copy or a pickle of it is empty."""

    def __init__(self) -> None:
        self.weights: Weights | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Keeper:
        return Keeper()

    def __reduce__(self) -> tuple:
        return Keeper, ()


def weights_of(root: FMRec | FMRecommender) -> Weights:
    """The weights of a core or a joint model, kept where they can be: then they are found once."""
    weights = kept_weights(root)
    if weights is None:
        weights = Weights(root)
        keeper = root.__dict__.setdefault("_keeper", Keeper())
        keeper.weights = weights if weights.can_stay else None
    return weights


def kept_weights(root: FMRec | FMRecommender) -> Weights | None:
    """`weights_of` where they are kept already and the modules still hold them."""
    keeper: Keeper | None = root.__dict__.get("_keeper")
    weights = None if keeper is None else keeper.weights
    return weights if weights is not None and weights.are_those_of(root) else None


@torch.no_grad()
def time_embeddings(core: FMRec, steps: int) -> Any:
    """Time embeddings [q, D] of the steps, as an array."""
    times = flow.step_times(steps, core.eps)
    return core.xstart_model.embed_time(times * core.time_scale).contiguous().numpy()


def _core_of(root: Any) -> FMRec:
    return root.fm if hasattr(root, "item_embeddings") else root


def _array(tensor: Tensor) -> Any:
    return tensor.detach().contiguous().numpy()


def _ways(
    module: nn.Module, used: set[int], ways: list[tuple[dict[str, Any], list[Any]]]
) -> set[int]:
    """Enters the dictionaries of `module` and below that lead to `used` tensors, the module's own
    first; returns those found."""
    place, found = len(ways), set()
    for child in module._modules.values():
        if child is not None:
            found |= _ways(child, used, ways)
    own: list[dict[str, Any]] = [module._modules] if found else []
    for tensors in (module._parameters, module._buffers):
        here = {id(tensor) for tensor in tensors.values()} & used
        own += [tensors] if here else []
        found |= here
    ways[place:place] = [(held, [*held.values()]) for held in own]
    return found


def _is_plain(tensor: Tensor) -> bool:
    """Whether it is memory of this process, as the kernels read it."""
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and not is_wrapped(tensor)
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.dtype is torch.float32
        and tensor.is_contiguous()
    )
