"""attention: our backends against plain PyTorch, with dropout on the probabilities."""

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
from fmrec_fast.ops import attention

P = 0.1
HEADS = 4


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def test_attention(suite, race, backward):
    sizes, device, batch = suite.sizes, suite.device, suite.sizes.batch
    length, width = sizes.length, sizes.width
    qkv = normal(batch, length, 3 * width, device=device).requires_grad_(backward)
    grad = normal(batch, length, width, device=device, seed=1)
    mask = (histories(batch, sizes, device, lengths=TRAIN_LENGTHS) > 0).float()
    scale, seed = mask * (width // HEADS) ** -0.5, torch.tensor(7, device=device)

    def finish(out):
        return gradients_of(out, {"qkv": qkv}, grad) if backward else {"out": out}

    def ours(p=P):
        return finish(attention(qkv, scale, num_heads=HEADS, p=p, seed=seed))

    def plain(p=P):
        q, k, v = qkv.view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        scores = (q * scale[:, None, :, None]) @ k.transpose(-1, -2)
        out = F.dropout(scores.softmax(-1), p) @ v
        return finish(out.transpose(1, 2).reshape(batch, length, width))

    backends, left_out = runnable_backends("attention", device)
    variants = {"torch": plain} | {b.value: on_backend("attention", b, ours) for b in backends}
    # F.dropout draws masks of its own: it is compared without them.
    results = {b.value: variants[b.value]() for b in backends}
    equality = assert_agreement(results, "reference", 1e-5)
    alone = assert_agreement({"ours": ours(0.0), "torch": plain(0.0)}, "ours", 1e-5)
    equality["largest_relative_error"] |= alone["largest_relative_error"]
    products = 2 * batch * length * length * width
    race(
        "attention",
        "forward + backward" if backward else "forward",
        variants,
        ours=automatic_backend("attention", ours).value,
        sizes={"B": batch, "L": length, "D": width, "H": HEADS, "p": P},
        equality=equality,
        work=Work(
            bytes=4 * grad.numel() * (12 if backward else 4),
            flops=products * (7 if backward else 2),
        ),
        note="agreement of torch: without dropout, whose masks are its own",
        left_out=left_out,
    )
