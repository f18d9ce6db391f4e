"""rms_norm: our backends against PyTorch's own, with its derivative along a direction or not."""

from __future__ import annotations

import pytest
import torch
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
from fmrec_fast import forward_mode
from fmrec_fast.ops import rms_norm


@pytest.mark.parametrize("tangent", [False, True], ids=["value", "value-and-tangent"])
def test_rms_norm(suite, race, tangent):
    """Forward and backward."""
    sizes, device = suite.sizes, suite.device
    shape = (sizes.batch, sizes.length, sizes.width)
    x, dx, grad, d_grad = (normal(*shape, device=device, seed=s) for s in range(4))
    weight = normal(sizes.width, device=device, seed=4)
    leaves = {"x": x, "weight": weight} | ({"dx": dx} if tangent else {})
    for leaf in leaves.values():
        leaf.requires_grad_()

    def run(function):
        if not tangent:
            return gradients_of(function(x, weight), leaves, grad)
        out, d_out = forward_mode.jvp(lambda x: function(x, weight), (x,), (dx,))
        found = torch.autograd.grad((out, d_out), list(leaves.values()), (grad, d_grad))
        results = {"out": out.detach(), "d_out": d_out.detach()}
        return results | {f"d_{name}": g for name, g in zip(leaves, found, strict=True)}

    def ours():
        return run(rms_norm)

    backends, left_out = runnable_backends("rms_norm", device)
    variants = {b.value: on_backend("rms_norm", b, ours) for b in backends}
    if not tangent:
        variants["torch"] = lambda: run(lambda x, w: F.rms_norm(x, (sizes.width,), w, 1e-8))
    results = {name: variant() for name, variant in variants.items()}
    equality = assert_agreement(results, "reference", 1e-5)
    numbers = x.numel()
    race(
        "rms_norm",
        f"RMS norm{' and its tangent' if tangent else ''}, forward and backward",
        variants,
        ours=automatic_backend("rms_norm", ours).value,
        sizes={"B": sizes.batch, "L": sizes.length, "D": sizes.width},
        equality=equality,
        # Read x, write y; read x and the gradient, write another; twice with a tangent.
        work=Work(bytes=4 * numbers * (10 if tangent else 5)),
        left_out=left_out,
    )
