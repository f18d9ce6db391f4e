"""Trajectories and time schedules against closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fmrec_fast import flow, use_rng

EPS = 0.001
U = torch.tensor([0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64)
TRAJECTORIES = ["straight", "cosine"]


def rescaled(t: torch.Tensor) -> torch.Tensor:
    return t * (1 - EPS) + EPS


def test_uniform():
    torch.testing.assert_close(flow.time_schedule(U, "uniform", eps=EPS), rescaled(U))


@pytest.mark.parametrize("scale", [0.5, 1.0, 1.29])
def test_mode(scale):
    expected = torch.tensor(
        [1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u) for u in U.tolist()]
    ).double()
    got = flow.time_schedule(U, "mode", eps=EPS, s_modsamp=scale)
    torch.testing.assert_close(got, rescaled(expected), atol=1e-6, rtol=0)
    # u runs from data to noise, and the middle stays in the middle.
    assert got[0] == 1 and got[-1] == pytest.approx(EPS)
    assert got[3] == pytest.approx(rescaled(torch.tensor(0.5)).item())


def test_mode_of_scale_0_is_uniform_reversed():
    got = flow.time_schedule(U, "mode", eps=EPS, s_modsamp=0.0)
    torch.testing.assert_close(got, rescaled(1 - U))


def test_cosmap():
    expected = [1 - 1 / (math.tan(math.pi * u / 2) + 1) for u in U.tolist()]
    got = flow.time_schedule(U, "cosmap", eps=EPS)
    torch.testing.assert_close(got, rescaled(torch.tensor(expected).double()), atol=1e-6, rtol=0)
    # float32's pi/2 lies beyond the pole of the tangent.
    single = flow.time_schedule(torch.tensor([0.0, 1 - 2**-24, 1.0]), "cosmap", eps=EPS)
    assert (single >= 0).all() and (single <= 1 + 1e-6).all()


def test_logit_normal():
    normal = torch.tensor([-2.0, 0.0, 3.0])
    got = flow.time_schedule(U, "logit_normal", eps=EPS, normal=normal)
    torch.testing.assert_close(got, rescaled(1 / (1 + torch.exp(-normal))))
    with pytest.raises(ValueError, match="'logit_normal' needs normal draws, got None"):
        flow.time_schedule(U, "logit_normal", eps=EPS)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"sampling_method must be one of \(.*got 'modal'"):
        flow.time_schedule(U, "modal", eps=EPS)


CDFS = {
    "uniform": lambda t: t,
    # t = 1 - 1 / (tan(pi u / 2) + 1)
    "cosmap": lambda t: 2 / math.pi * torch.atan(t / (1 - t)),
    "logit_normal": lambda t: torch.special.ndtr((torch.logit(t) - 0.3) / 0.7),
}


def drawn_times(model, batch: int, **options) -> torch.Tensor:
    e, mask = torch.zeros(batch, 1, 32), torch.ones(batch, 1)
    return model.eval().fm(e, e[:, 0], mask, **options)[3]


@pytest.mark.parametrize("rng", ["stream", "published"])
@pytest.mark.parametrize("method", CDFS)
def test_drawn_times_follow_the_schedule(small_model, method, rng):
    model = small_model(max_len=1, sampling_method=method, m_logNorm=0.3, s_logNorm=0.7)
    torch.manual_seed(1)
    with torch.no_grad(), use_rng(rng):
        t = drawn_times(model, 20_000)
    assert t.shape == (20_000,) and t.min() >= EPS and t.max() <= 1
    t = ((t.double() - EPS) / (1 - EPS)).clamp(1e-9, 1 - 1e-9)
    assert stats.kstest(CDFS[method](t).numpy(), "uniform").pvalue > 0.001


def test_training_reads_the_schedule_afresh(small_model):
    """`sampling_method` may be changed after construction."""
    model = small_model()
    times = {}
    for method in ("uniform", "mode", "cosmap", "logit_normal"):
        model.fm.sampling_method = method
        times[method] = drawn_times(model, 5, seed=5)
    assert len({tuple(t.tolist()) for t in times.values()}) == 4
    model.fm.sampling_method = "modal"
    with pytest.raises(ValueError, match="got 'modal'"):
        model(torch.ones(2, 12, dtype=torch.int64), torch.ones(2, 1, dtype=torch.int64))


def ends():
    g = torch.Generator().manual_seed(0)
    return (torch.randn(7, 3, generator=g, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_trajectories_run_from_noise_to_data(trajectory):
    data, z0 = ends()
    zero, one = torch.zeros(7, 1).double(), torch.ones(7, 1).double()
    torch.testing.assert_close(flow.interpolate(data, z0, zero, trajectory), z0)
    torch.testing.assert_close(flow.interpolate(data, z0, one, trajectory), data)


def test_trajectories_half_way():
    data, z0 = ends()
    half = torch.tensor(0.5).double()
    torch.testing.assert_close(flow.interpolate(data, z0, half), (data + z0) / 2)
    torch.testing.assert_close(flow.interpolate(data, z0, half, "cosine"), (data + z0) / 2**0.5)


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_velocity_is_the_derivative(trajectory):
    data, z0 = ends()
    t = U[:, None].clone().requires_grad_()
    for column in range(3):
        x_t = flow.interpolate(data, z0, t, trajectory)[:, column]
        (slope,) = torch.autograd.grad(x_t.sum(), t)
        velocity = flow.velocity(data, z0, t, trajectory)
        torch.testing.assert_close(velocity[:, column], slope[:, 0])


@pytest.mark.parametrize("trajectory", TRAJECTORIES)
def test_data_from_velocity(trajectory):
    data, z0 = ends()
    t = U[:, None]
    x_t = flow.interpolate(data, z0, t, trajectory)
    velocity = flow.velocity(data, z0, t, trajectory)
    torch.testing.assert_close(flow.data_from_velocity(velocity, x_t, t, trajectory), data)


@pytest.mark.parametrize("function", [flow.interpolate, flow.velocity, flow.data_from_velocity])
def test_an_unknown_trajectory_is_named(function):
    data, z0 = ends()
    with pytest.raises(ValueError, match=r"trajectory must be one of .*got 'round'"):
        function(data, z0, U[:, None], "round")


def test_step_times():
    torch.testing.assert_close(
        flow.step_times(4, 0.1), torch.tensor([0.1, 0.1 + 0.225, 0.1 + 0.45, 0.1 + 0.675])
    )
    assert flow.step_times(1, EPS).tolist() == pytest.approx([EPS])
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        flow.step_times(0, EPS)
