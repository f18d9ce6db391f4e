"""noise_fusion: our backends, the published host draw, and a draw on the device."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import (
    Work,
    assert_agreement,
    automatic_backend,
    gradients_of,
    on_backend,
    runnable_backends,
)
from benchmarks.inputs import normal
from fmrec_fast import noise
from fmrec_fast.ops import noise_fusion

DELTA = 0.001


def host_draw(shape, device):
    """lam as the published program draws it."""
    full = torch.full(shape, DELTA)
    return torch.normal(mean=full, std=full).to(device)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def test_noise_fusion(suite, race, backward):
    sizes, device = suite.sizes, suite.device
    shape = (sizes.batch, sizes.length, sizes.width)
    e, grad = normal(*shape, device=device), normal(*shape, device=device, seed=1)
    z, tau = (normal(shape[0], shape[2], device=device, seed=s) for s in (2, 3))
    seed = torch.tensor(7, device=device)
    rows = torch.arange(shape[0], device=device)
    lam = noise.lam(seed, rows, 0, *shape[1:], DELTA)
    for leaf in (e, z, tau):
        leaf.requires_grad_(backward)
    leaves = {"e": e, "z": z, "tau": tau} if backward else {}

    def finish(out):
        return gradients_of(out, leaves, grad) if backward else {"out": out}

    def ours(**options):
        return finish(noise_fusion(e, z, tau, delta=DELTA, rows=rows, **options))

    def plain(lam):
        return finish(e + lam * (z + tau)[:, None])

    backends, left_out = runnable_backends("noise_fusion", device)
    same = {b.value: on_backend("noise_fusion", b, lambda: ours(seed=seed)) for b in backends}
    results = {name: run() for name, run in same.items()} | {
        "published": plain(lam),
        "torch": plain(lam),
    }
    equality = assert_agreement(results, "reference", 2e-6)
    variants = {"published": lambda: plain(host_draw(shape, device))}
    variants["torch"] = lambda: plain(DELTA + DELTA * torch.randn_like(e))
    variants |= {b.value: on_backend("noise_fusion", b, ours) for b in backends}
    race(
        "noise_fusion",
        "forward + backward" if backward else "forward",
        variants,
        ours=automatic_backend("noise_fusion", ours).value,
        sizes={"B": shape[0], "L": shape[1], "D": shape[2]},
        equality=equality,
        work=Work(bytes=4 * e.numel() * (3 if backward else 2), flops=2 * e.numel()),
        note="agreement: the peers given the stream's lam; timed: everyone draws",
        left_out=left_out,
    )
