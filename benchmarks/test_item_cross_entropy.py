"""item_cross_entropy: our backends against F.cross_entropy of the [B, V] matrix, and torch's
F.linear_cross_entropy where this torch has it."""

from __future__ import annotations

import pytest
import torch.nn.functional as F

from benchmarks.harness import (
    Work,
    assert_agreement,
    automatic_backend,
    gradients_of,
    on_backend,
    runnable_backends,
)
from benchmarks.inputs import normal, targets
from fmrec_fast.ops import item_cross_entropy


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def test_item_cross_entropy(suite, race, backward):
    sizes, device, batch = suite.sizes, suite.device, suite.sizes.batch
    rep = normal(batch, sizes.width, device=device).requires_grad_(backward)
    weight = normal(sizes.items, sizes.width, device=device, seed=1).requires_grad_(backward)
    target = targets(batch, sizes, device)[:, 0]
    leaves = {"rep": rep, "weight": weight}

    def finish(loss):
        return gradients_of(loss, leaves) if backward else {"out": loss}

    def ours():
        return finish(item_cross_entropy(rep, weight, target))

    backends, left_out = runnable_backends("item_cross_entropy", device)
    variants = {"torch": lambda: finish(F.cross_entropy(rep @ weight.T, target))}
    if hasattr(F, "linear_cross_entropy"):
        variants["linear_cross_entropy"] = lambda: finish(
            F.linear_cross_entropy(rep, weight, target)
        )
    else:
        left_out["linear_cross_entropy"] = "this torch has no F.linear_cross_entropy"
    variants |= {b.value: on_backend("item_cross_entropy", b, ours) for b in backends}
    results = {name: run() for name, run in variants.items()}
    passes = 3 if backward else 1
    race(
        "item_cross_entropy",
        "forward + backward" if backward else "forward",
        variants,
        ours=automatic_backend("item_cross_entropy", ours).value,
        sizes={"B": batch, "V": sizes.items, "D": sizes.width},
        equality=assert_agreement(results, "reference", 2e-5),
        work=Work(
            bytes=4 * (2 if backward else 1) * (rep.numel() + weight.numel()),
            flops=passes * 2 * batch * sizes.items * sizes.width,
        ),
        left_out=left_out,
    )
