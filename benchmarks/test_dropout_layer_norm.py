"""dropout_layer_norm: the embedded history's dropout and norm in training, against its parts."""

from __future__ import annotations

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
from fmrec_fast.ops import dropout, dropout_layer_norm

P = 0.1


def test_dropout_layer_norm(suite, race):
    """Forward and backward."""
    sizes, device = suite.sizes, suite.device
    shapes = ((sizes.batch, sizes.length, sizes.width), (sizes.width,), (sizes.width,))
    given = [normal(*shape, device=device, seed=s) for s, shape in enumerate(shapes)]
    named = {n: t.requires_grad_() for n, t in zip(("x", "weight", "bias"), given, strict=True)}
    grad = normal(*shapes[0], device=device, seed=9)
    seed = torch.tensor(5, device=device)

    def ours():
        return gradients_of(dropout_layer_norm(*given, P, seed=seed), named, grad)

    def parts():
        dropped = dropout(given[0], P, seed=seed)
        out = F.layer_norm(dropped, shapes[1], given[1], given[2], 1e-12)
        return gradients_of(out, named, grad)

    backends, left_out = runnable_backends("dropout_layer_norm", device)
    variants = {b.value: on_backend("dropout_layer_norm", b, ours) for b in backends}
    variants["parts"] = parts
    equality = assert_agreement({n: run() for n, run in variants.items()}, "reference", 1e-5)
    race(
        "dropout_layer_norm",
        "forward and backward",
        variants,
        ours=automatic_backend("dropout_layer_norm", ours).value,
        sizes={"B": sizes.batch, "L": sizes.length, "D": sizes.width, "p": P},
        equality=equality,
        # Read x, write the result; read x and the gradient, write another.
        work=Work(bytes=4 * 5 * given[0].numel(), flops=25 * given[0].numel()),
        note="parts: our dropout, then PyTorch's norm",
        left_out=left_out,
    )
