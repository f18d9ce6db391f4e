"""dropout: our backends against F.dropout, with the residual added."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import (
    Disagreement,
    Work,
    assert_agreement,
    automatic_backend,
    gradients_of,
    on_backend,
    runnable_backends,
)
from benchmarks.inputs import normal
from fmrec_fast.ops import dropout

P = 0.1


def values_at_kept(result, x, residual):
    """What F.dropout computes, with its mask taken out of its result: the mask is its own.

    Raises:
        Disagreement: it does not keep 1 - p of the elements.
    """
    kept = result["out"] != residual
    share, sigma = kept.double().mean().item(), (P * (1 - P) / kept.numel()) ** 0.5
    if abs(share - (1 - P)) > 5 * sigma:
        raise Disagreement(f"F.dropout kept {share} of the elements, expected {1 - P}")
    return {"out": result["out"].detach() - torch.where(kept, x / (1 - P), 0).detach()}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def test_dropout(suite, race, backward):
    sizes, device = suite.sizes, suite.device
    shape = (sizes.batch, sizes.length, sizes.width)
    x, residual, grad = (normal(*shape, device=device, seed=s) for s in range(3))
    seed = torch.tensor(7, device=device)
    x.requires_grad_(backward)

    def finish(out):
        return gradients_of(out, {"x": x}, grad) if backward else {"out": out}

    def ours():
        return finish(dropout(x, P, seed=seed, residual=residual))

    def plain():
        return finish(residual + F.dropout(x, P))

    backends, left_out = runnable_backends("dropout", device)
    variants = {"torch": plain} | {b.value: on_backend("dropout", b, ours) for b in backends}
    results = {b.value: variants[b.value]() for b in backends}
    equality = assert_agreement(results, "reference", 1e-6)
    without_mask = {"residual": {"out": residual}, "torch": values_at_kept(plain(), x, residual)}
    alone = assert_agreement(without_mask, "residual", 1e-6)
    equality["largest_relative_error"] |= alone["largest_relative_error"]
    race(
        "dropout",
        "forward + backward" if backward else "forward",
        variants,
        ours=automatic_backend("dropout", ours).value,
        sizes={"B": shape[0], "L": shape[1], "D": shape[2], "p": P},
        equality=equality,
        work=Work(bytes=4 * x.numel() * (5 if backward else 3), flops=2 * x.numel()),
        note="agreement of F.dropout: the kept values, and that 1 - p of them are kept",
        left_out=left_out,
    )
