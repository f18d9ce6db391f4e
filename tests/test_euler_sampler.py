"""euler_sampler: all q steps against the published loop, and its definition in closed form."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from fmrec_fast import flow, noise
from fmrec_fast.backend import Backend, dispatch_log, use_backend
from fmrec_fast.kernels.plans import WIDTHS
from fmrec_fast.ops import euler_sampler
from fmrec_fast.reference import euler_sampler as definition
from fmrec_fast.reference.published import PublishedRecommender
from fmrec_fast.testing import assert_close_to_truth, error_to_truth, make_sequences

pytestmark = pytest.mark.op("euler_sampler")
EVERY = ("padding", "short", "long", "full")
DELTA = 0.5  # large, so that the steps depend on one another


def setup(small_model, batch=5, steps=2, length=12, width=32, **changes):
    """(model, the op's tensors, lam): everything that a run of the op reads."""
    changes = {"num_blocks": 2, "last": 1} | changes
    model = small_model(
        max_len=length, hidden_size=width, sample_N=steps, lambda_uncertainty=DELTA, **changes
    ).eval()
    sequence = make_sequences(batch, length, 61, 1, histories=EVERY).sequence
    with torch.no_grad():
        e, mask = model.embed(sequence)
        times = flow.step_times(steps, model.fm.eps)
        taus = model.fm.xstart_model.embed_time(times * model.fm.time_scale)
    g = torch.Generator().manual_seed(2)
    z0 = torch.randn(batch, width, generator=g)
    lam = DELTA + DELTA * torch.randn(steps, batch, length, width, generator=g)
    return model, (e, mask, z0, taus), times, lam


def run(place, model, tensors, times, **options):
    model = model.to(place.device)
    options = {k: v.to(place.device) if isinstance(v, torch.Tensor) else v
               for k, v in options.items()}  # fmt: skip
    published = options.get("trajectory", "straight"), options.get("target", "data")
    declines: set[Backend] = set()
    if published == ("straight", "velocity"):
        declines = {Backend.TRITON}
    elif published != ("straight", "data") or "lam_of_step" in options:
        declines = {Backend.CPP, Backend.TRITON}
    else:
        if tensors[0].shape[2] not in WIDTHS:
            declines.add(Backend.TRITON)
    with torch.no_grad(), place.forced("euler_sampler", declines=declines):
        return euler_sampler(
            *place.put(*tensors), model.fm.sampler_weights(),
            times=times.to(place.device), **options,
        ).cpu()  # fmt: skip


def peer_trajectory(model, tensors, lam, dtype):
    """The published loop, step by step, with the time embeddings given."""
    args = model.fm.config
    peer = PublishedRecommender.from_config(args)
    peer.load_state_dict(model.state_dict())
    network = peer.eval().to(dtype).fm.xstart_model
    e, mask, z0, taus = (t.to(dtype) for t in tensors)
    x, points, predictions = z0, [z0], []
    with torch.no_grad():
        for tau, noise_of_step in zip(taus, lam.to(dtype)):
            fused = e + noise_of_step * (x + tau)[:, None]
            encoded, _ = network.att(fused, mask)
            predictions.append(network.norm_fm_rep(encoded)[:, -1])
            x = x + (predictions[-1] - z0) / len(taus)
            points.append(x)
    return torch.stack(points), torch.stack(predictions)


@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 1, "steps": 1, "length": 1, "width": 36},
        {"batch": 1, "steps": 1, "length": 1, "width": 32},
        {"batch": 1, "steps": 1, "length": 50, "width": 32},
        {"batch": 1, "steps": 1, "length": 51, "width": 64},
        {"batch": 5, "steps": 3, "length": 12, "width": 32},
        {"batch": 2, "steps": 3, "length": 51, "width": 96},
    ],
)
def test_against_the_published_loop(place, small_model, shape):
    model, tensors, times, lam = setup(small_model, **shape)
    truth, _ = peer_trajectory(model, tensors, lam, torch.float64)
    same, _ = peer_trajectory(model, tensors, lam, torch.float32)
    got = run(place, model, tensors, times, noise=lam, return_trajectory=True)
    assert got.shape == truth.shape
    for i in range(1, len(truth)):
        assert_close_to_truth(got[i], same[i], truth[i], name=f"x_{i}")
    assert torch.equal(got[0], tensors[2])
    assert torch.equal(run(place, model, tensors, times, noise=lam), got[-1])


def test_non_contiguous_inputs(place, small_model):
    model, tensors, times, lam = setup(small_model)
    e, mask, z0, taus = tensors
    scattered = (
        e.transpose(0, 2).contiguous().transpose(0, 2),
        *(t.T.contiguous().T for t in (mask, z0, taus)),
    )
    lam = lam.transpose(0, 3).contiguous().transpose(0, 3)
    assert not any(t.is_contiguous() for t in (*scattered, lam))
    expected = run(place, model, tensors, times, noise=lam.contiguous())
    got = run(place, model, scattered, times, noise=lam)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_the_result_is_the_mean_of_the_predictions(place, small_model):
    model, tensors, times, lam = setup(small_model)
    got = run(place, model, tensors, times, noise=lam, return_trajectory=True)
    steps = len(times)
    predictions = (got[1:] - got[:-1]) * steps + tensors[2]
    _, expected = peer_trajectory(model, tensors, lam, torch.float32)
    torch.testing.assert_close(predictions, expected, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(got[-1], expected.mean(0), atol=1e-5, rtol=1e-5)
    assert (expected[0] - expected[-1]).abs().max() > 0.01  # they do differ


def test_the_streams_lam_is_keyed_by_step_and_row(place, small_model):
    model, tensors, times, _ = setup(small_model)
    seed, rows = torch.tensor(77), torch.tensor([9, 3, 4, 2**33, 0])
    e = tensors[0]
    lam = torch.stack([noise.lam(seed, rows, i, *e.shape[1:], DELTA) for i in range(len(times))])
    expected = run(place, model, tensors, times, noise=lam)
    got = run(place, model, tensors, times, seed=seed, rows=rows)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions(place, small_model, precision):
    model, tensors, times, lam = setup(small_model, batch=3, steps=2, length=7)
    truth, _ = peer_trajectory(model, tensors, lam, torch.float64)
    with use_backend("reference"), torch.no_grad():
        same = euler_sampler(
            *tensors, model.fm.sampler_weights(), times=times, noise=lam, precision=precision
        )
    got = run(place, model, tensors, times, noise=lam, precision=precision)
    assert_close_to_truth(got, same, truth[-1], name=precision)
    if place.backend is not Backend.CPP:  # which may be closer
        assert error_to_truth(got, truth[-1]) > 1e-5


def test_steps_composed_of_the_ops(place, small_model):
    """Where no kernel has the whole sampler, its steps run on the ops' own kernels."""
    model, tensors, times, lam = setup(small_model, batch=2, steps=3, width=36)
    truth, _ = peer_trajectory(model, tensors, lam, torch.float64)
    same, _ = peer_trajectory(model, tensors, lam, torch.float32)
    model, tensors, given = model.to(place.device), place.put(*tensors), lam.to(place.device)
    weights, times = model.fm.sampler_weights(), times.to(place.device)
    draws = iter(given)
    with torch.no_grad(), use_backend(place.backend), dispatch_log() as log:
        got = euler_sampler(
            *tensors, weights, times=times, noise=given, return_trajectory=True
        ).cpu()
        asked = euler_sampler(*tensors, weights, times=times, lam_of_step=lambda: next(draws))
    assert_close_to_truth(got, same, truth)
    torch.testing.assert_close(asked.cpu(), got[-1], atol=1e-6, rtol=1e-6)
    fusions = [entry.backend for entry in log if entry.op == "noise_fusion"]
    if place.backend is Backend.TRITON:
        assert fusions == [Backend.TRITON] * 6


def test_lam_is_asked_for_once_a_step_in_order(place, small_model):
    model, tensors, times, lam = setup(small_model)
    given = iter(lam.to(place.device))
    got = run(place, model, tensors, times, lam_of_step=lambda: next(given))
    assert next(given, None) is None
    expected = run(place, model, tensors, times, noise=lam)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_empty_batch(place, small_model):
    model, _, times, _ = setup(small_model)
    tensors = (torch.zeros(0, 12, 32), torch.zeros(0, 12), torch.zeros(0, 32), torch.zeros(2, 32))
    got = run(place, model, tensors, times, seed=torch.tensor(1), return_trajectory=True)
    assert got.shape == (3, 0, 32)


@pytest.mark.parametrize("trajectory", ["straight", "cosine"])
@pytest.mark.parametrize("target", ["data", "velocity"])
def test_options(place, small_model, trajectory, target):
    """One step at a time: the prediction of each step, recomputed, explains its move."""
    model, tensors, times, lam = setup(small_model)
    options = {"noise": lam, "trajectory": trajectory, "target": target}
    points = run(place, model, tensors, times, return_trajectory=True, **options)
    e, mask, z0, taus = tensors
    peer = PublishedRecommender.from_config(model.fm.config)
    peer.load_state_dict(model.cpu().state_dict())
    network = peer.eval().fm.xstart_model
    for i, t in enumerate(times):
        with torch.no_grad():
            encoded, _ = network.att(e + lam[i] * (points[i] + taus[i])[:, None], mask)
            move = network.norm_fm_rep(encoded)[:, -1]
        if target == "data" and trajectory == "straight":
            move = move - z0
        elif target == "data":
            angle = math.pi / 2 * t
            move = math.pi / 2 * (torch.cos(angle) * move - torch.sin(angle) * z0)
        expected = points[i] + move / len(times)
        torch.testing.assert_close(points[i + 1], expected, atol=2e-5, rtol=1e-4)


# --- the definition in closed form ----------------------------------------------------------


def test_definition_of_a_linear_equation():
    """dx/dt = -x: Euler's result is (1 - 1/q)^q z0, of first order in 1/q towards z0 / e."""
    z0 = torch.tensor([[1.0, -2.0]], dtype=torch.float64)

    def solve(q):
        return definition.euler_sampler(z0, lambda x, i: -x, lambda pred, x, i: pred, q)

    for q in (1, 2, 7, 100):
        torch.testing.assert_close(solve(q), (1 - 1 / q) ** q * z0)
    errors = [(solve(q) - z0 / math.e).abs().max() for q in (100, 200, 400)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.02)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.02)


def test_definition_with_a_constant_prediction_arrives_there():
    z0, end = torch.tensor([[1.0, -2.0]]).double(), torch.tensor([[0.5, 3.0]]).double()
    for q in (1, 3, 30):
        points = definition.euler_sampler(
            z0, lambda x, i: end, lambda pred, x, i: pred - z0, q, return_trajectory=True
        )
        assert points.shape == (q + 1, 1, 2)
        torch.testing.assert_close(points[-1], end)
        torch.testing.assert_close(points[q // 3], z0 + (end - z0) * (q // 3) / q)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"e": torch.zeros(5, 32)}, ValueError, r"e must be .*got \(5, 32\)"),
        ({"mask": torch.zeros(5, 11)}, ValueError, r"mask must be .*L = 12.*got \(5, 11\)"),
        ({"z0": torch.zeros(4, 32)}, ValueError, r"z0 must be .*B = 5.*got \(4, 32\)"),
        ({"z0": torch.zeros(5, 32).double()}, TypeError, "z0 is torch.float64"),
        ({"taus": torch.zeros(2, 31)}, ValueError, r"taus must be .*got \(2, 31\)"),
        ({"noise": torch.zeros(4, 5, 12, 32)}, ValueError, r"noise .*q = 2.*got \(4, 5, 12, 32\)"),
        ({"noise": torch.zeros(2, 5, 12, 32).half()}, TypeError, "noise is torch.float16"),
        ({"precision": "half"}, ValueError, "precision must be .*got 'half'"),
        ({"trajectory": "round"}, ValueError, "trajectory must be .*got 'round'"),
        ({"num_heads": 5}, ValueError, "num_heads must divide D = 32, got 5"),
    ],
)
def test_bad_inputs_are_named(small_model, change, error, message):
    model, tensors, times, lam = setup(small_model)
    arguments = dict(zip(("e", "mask", "z0", "taus"), tensors))
    arguments.update(noise=lam, weights=model.fm.sampler_weights(), times=times)
    arguments.update(change)
    if "num_heads" in change:
        heads = arguments.pop("num_heads")
        arguments["weights"] = dataclasses.replace(arguments["weights"], num_heads=heads)
    with torch.no_grad(), pytest.raises(error, match=message):
        euler_sampler(**arguments)
