"""noise_fusion: every backend against its definition, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fmrec_fast import noise
from fmrec_fast.backend import Backend, use_backend
from fmrec_fast.ops import euler_noise_fusion, noise_fusion
from fmrec_fast.randomness import PublishedSource
from fmrec_fast.testing import assert_close_to_truth

pytestmark = pytest.mark.op("noise_fusion")
SEED = torch.tensor(123456789012345)
DELTA = 0.5  # large, so that an error in lam is not drowned by e
SHAPES = [(0, 5, 8), (1, 1, 1), (1, 1, 36), (5, 50, 96), (2, 51, 3), (5, 1, 130), (1, 50, 128)]


def exact_lam(rows: Tensor, step: int, length: int, channels: int, delta: float) -> Tensor:
    """lam of the stream in float64 from the definition's float32 uniforms."""
    words = noise.words(SEED, rows, torch.tensor([step]), torch.arange(length), channels)
    u = [noise.to_uniform(word[0]).double() for word in words]
    parts = []
    for u1, u2 in (u[:2], u[2:]):
        radius = torch.sqrt(-2 * torch.log(u1.clamp_min(noise.SMALLEST_UNIFORM)))
        parts += [radius * torch.cos(2 * math.pi * u2), radius * torch.sin(2 * math.pi * u2)]
    return delta + delta * torch.stack(parts, -1).flatten(-2)[..., :channels]


def inputs(batch: int, length: int, channels: int, shared_tau: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(batch * 1000 + length * 10 + channels)
    tau_shape = (channels,) if shared_tau else (batch, channels)
    shapes = [(batch, length, channels), (batch, channels), tau_shape, (batch, length, channels)]
    return [torch.randn(shape, generator=g) for shape in shapes]  # e, z, tau, upstream gradient


def plain(e, z, tau, lam, upstream):
    """Result and gradients of eq. 14 as written."""
    e, z, tau = (t.detach().clone().requires_grad_() for t in (e, z, tau))
    out = e + lam * (z + tau)[:, None, :]
    return out, *torch.autograd.grad(out, (e, z, tau), upstream)


def check(place, e, z, tau, upstream, rows, step=3):
    length, channels = e.shape[1:]
    truth = plain(
        *(t.double() for t in (e, z, tau)),
        exact_lam(rows, step, length, channels, DELTA),
        upstream.double(),
    )
    same = plain(e, z, tau, noise.lam(SEED, rows, step, length, channels, DELTA), upstream)
    leaves = [t.detach().to(place.device).requires_grad_() for t in (e, z, tau)]
    seed, names, gradient = place.put(SEED, rows, upstream)
    with place.forced("noise_fusion"):
        out = noise_fusion(*leaves, delta=DELTA, seed=seed, rows=names, step=step)
        got = (out, *torch.autograd.grad(out, leaves, gradient))
    for name, *three in zip(("E", "de", "dz", "dtau"), got, same, truth):
        assert_close_to_truth(three[0].cpu(), *three[1:], name=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_definition(place, shape):
    *tensors, upstream = inputs(*shape)
    check(place, *tensors, upstream, rows=torch.arange(shape[0]) * 3 + 1)


@pytest.mark.parametrize("shape", [(0, 5, 8), (1, 1, 36), (5, 7, 96)])
def test_one_time_for_all_rows(place, shape):
    *tensors, upstream = inputs(*shape, shared_tau=True)
    check(place, *tensors, upstream, rows=torch.arange(shape[0]) * 3 + 1)


def test_no_positions(place):
    *tensors, upstream = inputs(2, 0, 8)
    check(place, *tensors, upstream, rows=torch.arange(2))


def test_rows_beyond_32_bits(place):
    *tensors, upstream = inputs(3, 4, 8)
    check(place, *tensors, upstream, rows=torch.tensor([-1, 2**31, 2**40 + 5]), step=29)


def test_non_contiguous_inputs(place):
    e, z, tau, upstream = inputs(5, 7, 36)
    e = e.transpose(0, 2).contiguous().transpose(0, 2)
    z, tau = torch.stack((z, z), -1)[..., 0], torch.stack((tau, tau), -1)[..., 1]
    upstream = upstream.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(t.is_contiguous() for t in (e, z, tau, upstream))
    check(place, e, z, tau, upstream, rows=torch.arange(5))


def test_non_contiguous_rows(place):
    *tensors, upstream = inputs(5, 7, 36)
    rows = torch.arange(10)[::2]
    assert not rows.is_contiguous()
    check(place, *tensors, upstream, rows=rows)


def test_expanded_gradient(place):
    """The gradient of a sum has no memory of its own."""
    e, z, tau, _ = inputs(2, 5, 12)
    check(place, e, z, tau, torch.ones(()).expand(2, 5, 12), rows=torch.arange(2))


def test_only_some_gradients(place):
    e, z, tau, upstream = place.put(*inputs(2, 5, 12))
    with place.forced("noise_fusion"):
        seed = SEED.to(place.device)
        full = [t.clone().requires_grad_() for t in (e, z, tau)]
        out = noise_fusion(*full, delta=DELTA, seed=seed)
        wanted = torch.autograd.grad(out, full, upstream)
        for i in range(3):
            leaves = [t.clone().requires_grad_(j == i) for j, t in enumerate((e, z, tau))]
            out = noise_fusion(*leaves, delta=DELTA, seed=seed)
            (got,) = torch.autograd.grad(out, leaves[i], upstream)
            assert torch.equal(got, wanted[i])
    assert not out.isnan().any()


def test_a_row_keeps_its_noise_in_any_batch(place):
    e, z, tau, _ = place.put(*inputs(6, 5, 12))
    order = torch.tensor([4, 0, 5], device=place.device)
    with place.forced("noise_fusion"):
        seed = SEED.to(place.device)
        whole = noise_fusion(e, z, tau, delta=DELTA, seed=seed, step=2)
        part = noise_fusion(
            e[order], z[order], tau[order], delta=DELTA, seed=seed, step=2, rows=order
        )
    assert torch.equal(part, whole[order])


def test_seed_is_drawn_from_torchs_generator(place):
    e, z, tau, _ = place.put(*inputs(2, 5, 12))
    results = []
    with place.forced("noise_fusion"):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(noise_fusion(e, z, tau, delta=DELTA))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


GIVEN = {Backend.CPP}  # whose kernel always draws lam


@pytest.mark.parametrize("shape", SHAPES)
def test_explicit_lam(place, shape):
    e, z, tau, upstream = inputs(*shape)
    lam = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    if shape[1] > 1:
        lam = lam.transpose(0, 1).contiguous().transpose(0, 1)
    truth = plain(*(t.double() for t in (e, z, tau, lam, upstream)))
    same = plain(e, z, tau, lam, upstream)
    leaves = [t.clone().to(place.device).requires_grad_() for t in (e, z, tau)]
    lam, gradient = place.put(lam, upstream)
    with place.forced("noise_fusion", declines=GIVEN):
        out = noise_fusion(*leaves, delta=DELTA, lam=lam)
        got = (out, *torch.autograd.grad(out, leaves, gradient))
    for name, *three in zip(("E", "de", "dz", "dtau"), got, same, truth):
        assert_close_to_truth(three[0].cpu(), *three[1:], name=name)


def test_gradient_of_lam(place):
    e, z, tau, upstream = place.put(*inputs(2, 5, 12))
    lam = torch.full_like(e, 0.25).requires_grad_()
    with place.forced("noise_fusion", declines={Backend.CPP, Backend.TRITON}):
        out = noise_fusion(e, z, tau, delta=DELTA, lam=lam)
    (got,) = torch.autograd.grad(out, lam, upstream)
    torch.testing.assert_close(got, upstream * (z + tau)[:, None])


# --- behind an Euler update -----------------------------------------------------------------


def update(e, z, pred, z0, tau, lam, steps):
    """Eq. 23 and eq. 14 as written."""
    z = z + (pred - z0) / steps
    return z, e + lam * (z + tau)[:, None, :]


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (2, 0, 8), (2, 3, 1028)])
def test_update_and_fusion(place, shape, given):
    batch, length, channels = shape
    shared = batch % 2 == 1  # one time for all rows
    e, z, tau, _ = inputs(*shape, shared_tau=shared)
    g = torch.Generator().manual_seed(9)
    pred, z0 = torch.randn(2, batch, channels, generator=g)
    z = torch.stack((z, z), -1)[..., 0]
    rows, step = torch.arange(batch) * 3 + 1, 3
    drawn = noise.lam(SEED, rows, step, length, channels, DELTA)
    exact = exact_lam(rows, step, length, channels, DELTA)
    if given:
        drawn = torch.randn(shape, generator=g)
        exact = drawn.double()
    truth = update(*(t.double() for t in (e, z, pred, z0, tau)), exact, 7)
    same = update(e, z, pred, z0, tau, drawn, 7)
    tensors = place.put(e, z, pred, z0, tau)
    seed, names, drawn = place.put(SEED, rows, drawn)
    options = {"lam": drawn} if given else {"seed": seed, "rows": names, "step": step}
    with place.forced("noise_fusion", declines=GIVEN if given else False):
        got = euler_noise_fusion(*tensors, steps=7, delta=DELTA, **options)
    for name, *three in zip(("z", "E"), got, same, truth):
        assert_close_to_truth(three[0].cpu(), *three[1:], name=name)


def test_gradients_through_an_update(place):
    e, z, tau, upstream = inputs(2, 5, 12)
    pred, z0 = z.flip(0), z.flip(1)
    seed = SEED.to(place.device)
    leaves = [t.clone().to(place.device).requires_grad_() for t in (e, z, pred, z0, tau)]
    with place.forced("noise_fusion"):
        z_next, out = euler_noise_fusion(*leaves, steps=3, delta=DELTA, seed=seed)
    upstream = upstream.to(place.device)
    got = torch.autograd.grad((z_next, out), leaves, (upstream[:, 0], upstream))
    lam = noise.lam(seed, torch.arange(2, device=place.device), 0, 5, 12, DELTA)
    expected = update(*leaves, lam, 3)
    expected = torch.autograd.grad(expected, leaves, (upstream[:, 0], upstream))
    for a, b in zip(got, expected):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"pred": torch.zeros(3, 8)}, ValueError, r"pred must be .*B = 2.*got \(3, 8\)"),
        ({"z0": torch.zeros(2, 7)}, ValueError, r"z0 must be .*got \(2, 7\)"),
        ({"tau": torch.zeros(7)}, ValueError, r"tau must be .*got \(7,\)"),
        ({"pred": torch.zeros(2, 8).double()}, TypeError, "pred is torch.float64"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
    ],
)
def test_bad_inputs_of_an_update_are_named(change, error, message):
    arguments = {name: torch.zeros(2, 8) for name in ("z", "pred", "z0", "tau")}
    arguments |= {"e": torch.zeros(2, 5, 8), "steps": 3, "delta": 0.1}
    with pytest.raises(error, match=message):
        euler_noise_fusion(**{**arguments, **change})


def test_published_draws_are_torch_normal():
    torch.manual_seed(4)
    got = PublishedSource(torch.arange(2)).lam(torch.Size((2, 3, 4)), 0.25)
    torch.manual_seed(4)
    full = torch.full((2, 3, 4), 0.25)
    assert torch.equal(got, torch.normal(full, full))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"e": torch.zeros(2, 8)}, ValueError, r"e must be .*got \(2, 8\)"),
        ({"z": torch.zeros(3, 8)}, ValueError, r"z must be .*B = 2.*got \(3, 8\)"),
        ({"tau": torch.zeros(2, 9)}, ValueError, r"tau must be .*D = 8.*got \(2, 9\)"),
        ({"tau": torch.zeros(7)}, ValueError, r"tau must be .*got \(7,\)"),
        ({"z": torch.zeros(2, 8).double()}, TypeError, "z is torch.float64, e is torch.float32"),
        ({"e": torch.zeros(2, 5, 8).long()}, TypeError, "e must be floating point.*int64"),
        ({"lam": torch.zeros(2, 4, 8)}, ValueError, r"lam must be .*got \(2, 4, 8\)"),
        ({"lam": torch.zeros(2, 5, 8).double()}, TypeError, "lam is torch.float64"),
        ({"rows": torch.zeros(3).long()}, ValueError, r"rows must be .*got \(3,\)"),
        ({"rows": torch.zeros(2)}, TypeError, "rows must be int64, got torch.float32"),
        ({"e": [[[0.0]]]}, TypeError, "e must be a tensor.*got list"),
        ({"seed": -1}, ValueError, "got -1"),
    ],
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_bad_inputs_are_named(change, error, message, backend):
    arguments = {
        "e": torch.zeros(2, 5, 8),
        "z": torch.zeros(2, 8),
        "tau": torch.zeros(2, 8),
        "delta": 0.1,
    }
    with use_backend(backend), pytest.raises(error, match=message):
        noise_fusion(**{**arguments, **change})
