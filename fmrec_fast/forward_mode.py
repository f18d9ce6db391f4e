"""Forward-mode derivatives through the ops: dual tensors of ``torch.autograd.forward_ad``.

An op with a rule takes its dual inputs apart, computes value and tangent by kernels, and joins
them; one without falls back to its definition, which PyTorch differentiates, and the dispatch log
says so. Values and tangents are ordinary tensors of the reverse-mode graph, so that gradients flow
through both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

NO_RULE = "its kernel has no forward-mode rule"


def split(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """(value, tangent) of a dual tensor; the tangent of another one is None."""
    if torch.compiler.is_compiling() or is_wrapped(x):
        return x, None
    parts = forward_ad.unpack_dual(x)
    return (x, None) if parts.tangent is None else (parts.primal, parts.tangent)


def is_dual(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors carries a tangent (or is inside a transform of torch.func, whose
    wrapped tensors no kernel can read)."""
    if torch.compiler.is_compiling():
        return False
    return any(
        tensor is not None
        and (is_wrapped(tensor) or forward_ad.unpack_dual(tensor).tangent is not None)
        for tensor in tensors
    )


def is_wrapped(x: Tensor) -> bool:
    """Whether `x` is inside a transform of torch.func; not asked while compiling."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_functorch_wrapped_tensor(x)


def join(value: Tensor, tangent: Tensor) -> Tensor:
    """The dual tensor of a value and its tangent."""
    return forward_ad.make_dual(value, tangent)


def jvp(
    function: Callable[..., Tensor], primals: Sequence[Tensor], tangents: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """``function(*primals)`` and its derivative along `tangents`.

    As ``torch.func.jvp``, but the ops may run their kernels. Both results are differentiable in
    reverse mode.
    """
    with forward_ad.dual_level():
        out = function(*(join(p, t) for p, t in zip(primals, tangents, strict=True)))
        value, tangent = split(out)
        # Beyond the level a value must not be a view of a dual tensor.
        return value, torch.zeros_like(value) if tangent is None else tangent
