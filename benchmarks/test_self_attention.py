"""self_attention: a block's first half in training, against its definition and PyTorch's."""

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
from benchmarks.inputs import TRAIN_LENGTHS, histories, normal
from fmrec_fast.ops import self_attention
from fmrec_fast.ops.self_attention import NAMES

# Channels of a head, as published; the last position's kernel takes multiples of 16.
HEAD = 32
TOLERANCE = 1e-5


def plain(x, query_scale, norm_weight, norm_bias, *layers, last_only):
    """PyTorch's operations, without dropout."""
    batch, length, width = x.shape
    start = length - 1 if last_only else 0

    def heads(x):
        return x.view(batch, -1, width // HEAD, HEAD).transpose(1, 2)

    normed = F.layer_norm(x, (width,), norm_weight, norm_bias, 1e-12)
    q = F.linear(normed[:, start:], *layers[:2]) * query_scale[:, start:, None]
    k, v = (F.linear(normed, *layers[i : i + 2]) for i in (2, 4))
    mixed = F.scaled_dot_product_attention(heads(q), heads(k), heads(v), scale=1.0)
    mixed = mixed.transpose(1, 2).reshape(batch, -1, width)
    return x[:, start:] + F.linear(mixed, *layers[6:])


@pytest.mark.parametrize("last_only", [False, True], ids=["all-positions", "last-position"])
@pytest.mark.parametrize("p", [0.0, 0.1], ids=["without-dropout", "dropout"])
def test_self_attention(suite, race, p, last_only):
    """Forward and backward, on training histories."""
    sizes, device = suite.sizes, suite.device
    batch, length, width = sizes.batch, sizes.length, sizes.width
    shapes = [(batch, length, width), (width,), (width,), *[(width, width), (width,)] * 4]
    given = [normal(*shape, device=device, seed=s) for s, shape in enumerate(shapes)]
    for weight in given[3::2]:
        weight.mul_(width**-0.5)
    mask = (histories(batch, sizes, device, lengths=TRAIN_LENGTHS) > 0).float()
    query_scale, heads = mask * HEAD**-0.5, width // HEAD
    named = {name: t.requires_grad_() for name, t in zip(("x", *NAMES), given, strict=True)}
    # Nothing depends on the key's bias: its gradient is what rounding leaves.
    compared = {name: t for name, t in named.items() if name != "key_bias"}
    grad = normal(batch, 1 if last_only else length, width, device=device, seed=99)
    options = {"num_heads": heads, "last_only": last_only, "seed": torch.tensor(5, device=device)}

    def ours(leaves=named):
        out = self_attention(given[0], query_scale, *given[1:], p, **options)
        return gradients_of(out, leaves, grad)

    def torchs(leaves=named):
        out = plain(given[0], query_scale, *given[1:], last_only=last_only)
        return gradients_of(out, leaves, grad)

    backends, left_out = runnable_backends("self_attention", device)
    runs = {b.value: on_backend("self_attention", b, lambda: ours(compared)) for b in backends}
    variants = {b.value: on_backend("self_attention", b, ours) for b in backends}
    if p == 0:
        runs["torch"], variants["torch"] = lambda: torchs(compared), torchs
    equality = assert_agreement({n: run() for n, run in runs.items()}, "reference", TOLERANCE)
    rows, real = batch * length, int(mask.sum())
    layers = 2 * width**2 * (3 * rows + real)
    scores = 4 * length * real * width + 2 * length * (rows - real) * width
    race(
        "self_attention",
        f"norm, attention and residual of {'the last position' if last_only else 'all positions'}"
        f"{', dropout' if p else ''}, forward and backward",
        variants,
        ours=automatic_backend("self_attention", ours).value,
        sizes={"B": batch, "L": length, "D": width, "H": heads, "p": p, "real": real / batch},
        equality=equality,
        # Read x, write y; read x and the gradient, write another. Of the last position, scores and
        # sums are those of H vectors with all rows.
        work=Work(
            bytes=4 * (3 if last_only else 5) * rows * width,
            flops=3 * (4 * heads * rows * width if last_only else layers + scores),
        ),
        left_out=left_out,
    )
