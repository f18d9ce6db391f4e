"""feed_forward: a block's second half in training, against its parts and against PyTorch's."""

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
from fmrec_fast.ops import feed_forward

NAMES = ("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2")


def plain(x, norm_weight, norm_bias, w1, b1, w2, b2):
    """PyTorch's operations, without dropout."""
    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-12)
    return x + F.linear(F.gelu(F.linear(normed, w1, b1), approximate="tanh"), w2, b2)


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["without-dropout", "dropout"])
def test_feed_forward(suite, race, p):
    """Forward and backward."""
    sizes, device = suite.sizes, suite.device
    batch, width, inner = sizes.batch, sizes.width, 4 * sizes.width
    shapes = [(batch, sizes.length, width), (width,), (width,), (inner, width), (inner,)]
    shapes += [(width, inner), (width,)]
    given = [normal(*shape, device=device, seed=s) for s, shape in enumerate(shapes)]
    for tensor in (given[3], given[5]):
        tensor.mul_(tensor.shape[1] ** -0.5)
    named = {name: t.requires_grad_() for name, t in zip(NAMES, given, strict=True)}
    grad = normal(*shapes[0], device=device, seed=9)
    seed = torch.tensor(5, device=device)

    def ours():
        return gradients_of(feed_forward(*given, p, seed=seed), named, grad)

    backends, left_out = runnable_backends("feed_forward", device)
    variants = {b.value: on_backend("feed_forward", b, ours) for b in backends}
    if p == 0:
        variants["torch"] = lambda: gradients_of(plain(*given), named, grad)
    equality = assert_agreement({n: run() for n, run in variants.items()}, "reference", 1e-5)
    rows = batch * sizes.length
    race(
        "feed_forward",
        f"norm, feed-forward and residual{', dropout' if p else ''}, forward and backward",
        variants,
        ours=automatic_backend("feed_forward", ours).value,
        sizes={"rows": rows, "D": width, "F": inner, "p": p},
        equality=equality,
        # Read x, write y; read x and the gradient, write another. The inner layer is made twice.
        work=Work(bytes=4 * 5 * rows * width, flops=2 * 7 * rows * width * inner),
        left_out=left_out,
    )
