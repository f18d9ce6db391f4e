"""picard_sweep: all q evaluations of one history at once, against the published network."""

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
    on_backend,
    runnable_backends,
)
from benchmarks.inputs import config_of, histories, models, normal
from fmrec_fast import flow, use_backend
from fmrec_fast.ops import picard_sweep


@pytest.mark.parametrize("batch", [1])
def test_picard_sweep(suite, race, batch):
    sizes, device = suite.sizes, suite.device
    ours_model, published_model = models(config_of(sizes), device)
    ours_model.eval()
    published_model.eval()
    network = published_model.fm.xstart_model
    q, shape = sizes.steps, (sizes.length, sizes.width)
    sequence = histories(batch, sizes, device)
    with torch.no_grad():
        e, mask = ours_model.embed(sequence)
        times = flow.step_times(q, ours_model.fm.eps, device)
        taus = ours_model.fm.xstart_model.embed_time(times * ours_model.fm.time_scale)
    x = normal(batch, q, sizes.width, device=device)
    lam = 0.001 + 0.001 * normal(q, batch, *shape, device=device, seed=1)
    weights = ours_model.fm.sampler_weights()

    def fused(rows):
        """The peers' fused histories [q B, L, D], step by step."""
        shift = x[:rows].transpose(0, 1) + taus[:, None]
        return (e[:rows] + lam[:, :rows] * shift[:, :, None]).flatten(0, 1)

    def finish(last, rows):
        return {"pred": last.reshape(q, rows, -1).transpose(0, 1)}

    @torch.no_grad()
    def ours(rows=batch):
        given = (t[:rows] for t in (e, mask, x))
        return {"pred": picard_sweep(*given, taus, weights, noise=lam[:, :rows])}

    @torch.no_grad()
    def published(rows=batch):
        last = network.att(fused(rows), mask[:rows].repeat(q, 1))[0]
        return finish(network.norm_fm_rep(last)[:, -1], rows)

    @torch.no_grad()
    def tuned(rows=batch):
        last = peers.stack(fused(rows), mask[:rows].repeat(q, 1), network.att)[0]
        return finish(peers.layer_norm(last, network.norm_fm_rep), rows)

    backends, left_out = runnable_backends("picard_sweep", device)
    for backend in list(backends):
        if reason := declined_by("picard_sweep", backend, ours):
            backends.remove(backend)
            left_out[backend.value] = reason
    variants = {"published": published, "tuned": tuned}
    variants |= {b.value: on_backend("picard_sweep", b, ours) for b in backends}
    equality = assert_agreement({n: run() for n, run in variants.items()}, "published", 2e-5)
    with use_backend("reference"):
        flops = {"reference": count_flops(ours, batch)}
    flops |= {b.value: flops["reference"] for b in backends}
    flops |= {name: count_flops(variants[name], batch) for name in ("published", "tuned")}
    parameters = sum(t.numel() for block in weights.blocks for t in block.tensors())
    race(
        "picard_sweep",
        f"B = {batch}, {q} steps at once",
        variants,
        ours=automatic_backend("picard_sweep", ours).value,
        sizes={"B": batch, "L": sizes.length, "D": sizes.width, "q": q, "blocks": sizes.blocks},
        equality=equality,
        work=Work(
            bytes=4 * (parameters + e.numel() + mask.numel() + lam.numel() + 2 * x.numel()),
            flops=flops["reference"],
        ),
        flops=flops,
        left_out=left_out,
    )
