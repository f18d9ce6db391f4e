"""encoder: our backends against the published stack and the tuned one, without dropout."""

from __future__ import annotations

import pytest
import torch

from benchmarks import peers
from benchmarks.harness import (
    Work,
    assert_agreement,
    automatic_backend,
    count_flops,
    declined_by,
    gradients_of,
    on_backend,
    runnable_backends,
)
from benchmarks.inputs import config_of, histories, models, normal
from fmrec_fast import use_backend


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def test_encoder(suite, race, backward):
    sizes, device, batch = suite.sizes, suite.device, suite.sizes.small_batch
    ours_model, published_model = models(config_of(sizes, dropout=0.0), device)
    x = normal(batch, sizes.length, sizes.width, device=device).requires_grad_(backward)
    grad = normal(batch, sizes.width, device=device, seed=1)
    mask = (histories(batch, sizes, device) > 0).float()
    ours_stack = ours_model.fm.xstart_model.att
    stack = published_model.fm.xstart_model.att
    torch.set_grad_enabled(backward)

    def finish(out, module, rows):
        if not backward:
            return {"out": out}
        return gradients_of(out, {"x": x, **dict(module.named_parameters())}, grad[:rows])

    def ours(rows=batch):
        return finish(ours_stack(x[:rows], mask[:rows])[0], ours_stack, rows)

    def published(rows=batch):
        return finish(stack(x[:rows], mask[:rows])[0][:, -1], stack, rows)

    def tuned(rows=batch):
        return finish(peers.stack(x[:rows], mask[:rows], stack)[0], stack, rows)

    backends, left_out = runnable_backends("encoder", device)
    try:
        for backend in list(backends):
            if reason := declined_by("encoder", backend, ours):
                backends.remove(backend)
                left_out[backend.value] = reason
        variants = {"published": published, "tuned": tuned}
        variants |= {b.value: on_backend("encoder", b, ours) for b in backends}
        results = {name: run() for name, run in variants.items()}
        equality = assert_agreement(results, "published", 1e-4 if backward else 2e-5)
        with use_backend("reference"):
            flops = {"reference": count_flops(ours, batch)}
        flops |= {b.value: flops["reference"] for b in backends}
        flops |= {name: count_flops(variants[name], batch) for name in ("published", "tuned")}
        weights = sum(p.numel() for p in stack.parameters())
        race(
            "encoder",
            "forward + backward" if backward else "forward",
            variants,
            ours=automatic_backend("encoder", ours).value,
            sizes={"B": batch, "L": sizes.length, "D": sizes.width, "blocks": sizes.blocks},
            equality=equality,
            work=Work(
                bytes=4 * (2 if backward else 1) * (weights + x.numel() + grad.numel()),
                flops=flops["reference"],
            ),
            flops=flops,
            left_out=left_out,
        )
    finally:
        torch.set_grad_enabled(True)
