"""linear: the feed-forward's and the decoder's layers at training sizes, forward and backward."""

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
from benchmarks.inputs import normal
from fmrec_fast.ops import linear
from fmrec_fast.ops.linear import FEWEST_ROWS


@pytest.mark.parametrize("layer", ["D-4D", "4D-D", "decoder"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def test_linear(suite, race, backward, layer):
    sizes, device = suite.sizes, suite.device
    rows, inner, outer = {
        "D-4D": (sizes.batch * sizes.length, sizes.width, 4 * sizes.width),
        "4D-D": (sizes.batch * sizes.length, 4 * sizes.width, sizes.width),
        # The kernel takes no fewer rows, though the quick sizes have.
        "decoder": (max(sizes.batch, FEWEST_ROWS), *sizes.decoder),
    }[layer]
    x = normal(rows, inner, device=device).requires_grad_(backward)
    weight = normal(outer, inner, device=device, seed=1).requires_grad_(backward)
    bias = normal(outer, device=device, seed=2).requires_grad_(backward)
    grad = normal(rows, outer, device=device, seed=3)
    named = {"x": x, "weight": weight, "bias": bias}

    def finish(function):
        out = function(x, weight, bias)
        return gradients_of(out, named, grad) if backward else {"out": out}

    backends, left_out = runnable_backends("linear", device)
    variants = {"torch": lambda: finish(F.linear)}
    variants |= {b.value: on_backend("linear", b, lambda: finish(linear)) for b in backends}
    equality = assert_agreement({n: run() for n, run in variants.items()}, "torch", 1e-5)
    products, moved = (3, 3) if backward else (1, 1)
    race(
        "linear",
        f"{rows} rows, {inner} -> {outer}, {'forward + backward' if backward else 'forward'}",
        variants,
        ours=automatic_backend("linear", lambda: finish(linear)).value,
        sizes={"rows": rows, "I": inner, "O": outer},
        equality=equality,
        work=Work(
            bytes=4 * moved * (rows * (inner + outer) + weight.numel()),
            flops=2 * products * rows * inner * outer,
        ),
        left_out=left_out,
    )
