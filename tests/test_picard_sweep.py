"""picard_sweep: the network at every point of a trajectory, against the published network."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from fmrec_fast import FaveRecommender, extension, flow, noise, use_backend
from fmrec_fast.backend import Backend, dispatch_log
from fmrec_fast.kernels.plans import WIDTHS
from fmrec_fast.ops import euler_sampler, picard_sweep
from fmrec_fast.ops.encoder import pack
from fmrec_fast.reference.published import PublishedRecommender
from fmrec_fast.reference.published_fave import PublishedFaveRecommender
from fmrec_fast.testing import assert_close_to_truth, error_to_truth, make_sequences

pytestmark = pytest.mark.op("picard_sweep")
EVERY = ("short", "padding", "full")
DELTA = 0.5
SEED = torch.tensor(-987654321)


def setup(small_model, batch=3, steps=2, length=12, width=32, **changes):
    """(model, (e, mask, x, taus), lam)."""
    changes = {"num_blocks": 2, "last": 1} | changes
    model = small_model(
        max_len=length, hidden_size=width, lambda_uncertainty=DELTA, **changes
    ).eval()
    sequence = make_sequences(batch, length, 61, 1, histories=EVERY).sequence
    with torch.no_grad():
        e, mask = model.embed(sequence)
        times = flow.step_times(steps, model.fm.eps)
        taus = model.fm.xstart_model.embed_time(times * model.fm.time_scale)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(batch, steps, width, generator=g)
    lam = DELTA + DELTA * torch.randn(steps, batch, length, width, generator=g)
    return model, (e, mask, x, taus), lam


def run(place, model, tensors, *, declines=False, **options):
    model = model.to(place.device)
    declines = {Backend.CPP, Backend.TRITON} if declines else set()
    if tensors[0].shape[2] not in WIDTHS:
        declines.add(Backend.TRITON)
    options = {k: v.to(place.device) if isinstance(v, torch.Tensor) else v
               for k, v in options.items()}  # fmt: skip
    with torch.no_grad(), place.forced("picard_sweep", declines=declines):
        weights = model.fm.sampler_weights()
        return picard_sweep(*place.put(*tensors), weights, **options).cpu()


def published(model, tensors, lam, dtype):
    """The published network, point by point."""
    peer = PublishedRecommender.from_config(model.fm.config)
    peer.load_state_dict(model.cpu().state_dict())
    network = peer.eval().to(dtype).fm.xstart_model
    e, mask, x, taus = (t.to(dtype) for t in tensors)
    out = torch.empty_like(x)
    with torch.no_grad():
        for i, (tau, lam_of_step) in enumerate(zip(taus, lam.to(dtype))):
            encoded, _ = network.att(e + lam_of_step * (x[:, i] + tau)[:, None], mask)
            out[:, i] = network.norm_fm_rep(encoded)[:, -1]
    return out


@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 1, "steps": 1, "length": 1, "width": 36},
        {"batch": 1, "steps": 7, "length": 50, "width": 32},
        {"batch": 5, "steps": 2, "length": 12, "width": 64},
        {"batch": 2, "steps": 3, "length": 51, "width": 96},
        {"batch": 35, "steps": 2, "length": 3, "width": 8},  # more than the definition's piece
    ],
    ids=str,
)
def test_against_the_published_network(place, small_model, shape):
    model, tensors, lam = setup(small_model, **shape)
    truth = published(model, tensors, lam, torch.float64)
    same = published(model, tensors, lam, torch.float32)
    assert_close_to_truth(run(place, model, tensors, noise=lam), same, truth)


@pytest.mark.parametrize(
    "shape",
    [
        {"batch": 1, "steps": 1, "length": 1, "width": 32},
        {"batch": 3, "steps": 2, "length": 12, "width": 32},
        {"batch": 2, "steps": 3, "length": 51, "width": 24},
        {"batch": 5, "steps": 2, "length": 3, "width": 8},
    ],
    ids=str,
)
@pytest.mark.parametrize("drawn", [False, True])
def test_faves_blocks(place, small_args, shape, drawn):
    """RMS norms, and queries and keys that are rotated: against the published network."""
    batch, steps, length, width = shape.values()
    settings = {"max_len": length, "hidden_size": width, "lambda_uncertainty": DELTA}
    settings |= {"num_blocks": 2, "last": 1, "drop_path_rate": 0.0, "gamma_init": 0.1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        peer = PublishedFaveRecommender.from_config(small_args(**settings)).eval()
        for name, parameter in peer.named_parameters():
            if "norm" in name.lower():  # ones and zeros would hide a swap
                torch.nn.init.normal_(parameter, 0.5, 0.3)
    model = FaveRecommender.from_config(small_args(**settings)).eval()
    model.load_state_dict(peer.state_dict())
    sequence = make_sequences(batch, length, 61, 1, histories=EVERY).sequence
    with torch.no_grad():
        e, mask = model.embed(sequence)
        times = flow.step_times(steps, model.fm.eps) * model.fm.time_scale
        taus = model.fm.xstart_model.embed_time(times)
    g = torch.Generator().manual_seed(2)
    x = torch.randn(batch, steps, width, generator=g)
    lam = DELTA + DELTA * torch.randn(steps, batch, length, width, generator=g)
    options = {"noise": lam}
    if drawn:
        rows = torch.arange(batch) * 2**33 + 5
        lam = [noise.lam(SEED, rows, i, length, width, DELTA) for i in range(steps)]
        lam, options = torch.stack(lam), {"seed": SEED, "rows": rows}
    found = []
    for dtype in (torch.float32, torch.float64):
        network, out = peer.to(dtype).fave.xstart_model, torch.empty_like(x, dtype=dtype)
        with torch.no_grad():
            for i in range(steps):
                shift = (x[:, i] + taus[i]).to(dtype)[:, None]
                fused = e.to(dtype) + lam[i].to(dtype) * shift
                encoded, _ = network.att(fused, fused, mask.to(dtype), "pretrain", None)
                out[:, i] = network.norm_fm_rep(encoded)[:, -1]
        found.append(out)
    assert_close_to_truth(run(place, model, (e, mask, x, taus), **options), *found)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions(place, small_model, precision):
    model, tensors, lam = setup(small_model, batch=3, steps=2, length=7)
    truth = published(model, tensors, lam, torch.float64)
    with use_backend("reference"), torch.no_grad():
        weights = model.fm.sampler_weights()
        same = picard_sweep(*tensors, weights, noise=lam, precision=precision)
    got = run(place, model, tensors, noise=lam, precision=precision)
    assert_close_to_truth(got, same, truth, name=precision)
    if place.backend is not Backend.CPP:  # which may be closer
        assert error_to_truth(got, truth) > 1e-5


def test_the_streams_lam_is_keyed_by_step_and_row(place, small_model):
    model, tensors, lam = setup(small_model)
    rows = torch.tensor([9, 2**33, 0])
    shape = tensors[0].shape[1:]
    lam = torch.stack([noise.lam(SEED, rows, i, *shape, DELTA) for i in range(len(lam))])
    expected = run(place, model, tensors, noise=lam)
    got = run(place, model, tensors, seed=SEED, rows=rows)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_at_the_samplers_trajectory_it_gives_the_samplers_moves(place, small_model):
    """The fixed point that Picard iteration looks for."""
    model, (e, mask, x, taus), _ = setup(small_model)
    rows = torch.arange(3)
    with torch.no_grad():
        points = euler_sampler(
            e, mask, x[:, 0], taus, model.fm.sampler_weights(), times=torch.zeros(len(taus)),
            seed=SEED, rows=rows, return_trajectory=True,
        )  # fmt: skip
    moves = (points[1:] - points[:-1]) * len(taus)
    there = points[:-1].transpose(0, 1)
    got = run(place, model, (e, mask, there, taus), seed=SEED, rows=rows)
    expected = moves.transpose(0, 1) + x[:, :1]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_point_depends_on_itself_alone(place, small_model):
    """Neither on the other steps' guesses nor on the batch."""
    model, tensors, _ = setup(small_model, batch=2, steps=3, length=5)
    e, mask, x, taus = tensors
    rows = torch.tensor([4, 2])
    whole = run(place, model, tensors, seed=SEED, rows=rows)
    changed = x.clone()
    changed[:, 1] += 1
    other = run(place, model, (e, mask, changed, taus), seed=SEED, rows=rows)
    assert ((other - whole).abs().amax(dim=(0, 2)) > 1e-2).tolist() == [False, True, False]
    some = run(place, model, (e[1:], mask[1:], x[1:], taus), seed=SEED, rows=rows[1:])
    torch.testing.assert_close(some, whole[1:], atol=1e-5, rtol=1e-5)


def test_non_contiguous_inputs(place, small_model):
    model, tensors, lam = setup(small_model)
    e, mask, x, taus = tensors
    scattered = (
        e.transpose(0, 2).contiguous().transpose(0, 2),
        mask.T.contiguous().T,
        x.transpose(0, 1).contiguous().transpose(0, 1),
        taus.T.contiguous().T,
    )
    lam2 = lam.transpose(0, 3).contiguous().transpose(0, 3)
    assert not any(t.is_contiguous() for t in (*scattered, lam2))
    expected = run(place, model, tensors, noise=lam)
    got = run(place, model, scattered, noise=lam2)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0)])
def test_nothing_to_do(place, small_model, shape):
    model, _, _ = setup(small_model)
    batch, steps = shape
    tensors = (
        torch.zeros(batch, 12, 32), torch.zeros(batch, 12),
        torch.zeros(batch, steps, 32), torch.zeros(steps, 32),
    )  # fmt: skip
    got = run(place, model, tensors, declines=steps == 0, seed=SEED)
    assert got.shape == (batch, steps, 32)


def test_causal_attention_runs_the_definition_and_says_so(place, small_model):
    model, tensors, lam = setup(small_model, attention="causal")
    got = run(place, model, tensors, declines=True, noise=lam)
    with torch.no_grad(), use_backend("reference"):
        e, mask, x, taus = tensors
        one = picard_sweep(e, mask, x[:, 1:2], taus[1:2], model.fm.sampler_weights(),
                           noise=lam[1:2])  # fmt: skip
    torch.testing.assert_close(got[:, 1:2], one, atol=1e-5, rtol=1e-5)


def test_gradients_flow_where_they_are_needed(small_model):
    model, (e, mask, x, taus), lam = setup(small_model, steps=4)
    x.requires_grad_()
    with dispatch_log() as log:
        out = picard_sweep(e, mask, x, taus, model.fm.sampler_weights(), noise=lam)
    assert log[0].backend is Backend.REFERENCE
    assert "gradient" in log[0].reason or not extension.available()
    out[:, 1].square().sum().backward()
    assert x.grad[:, 1].abs().min() > 0
    assert not x.grad[:, [0, 2, 3]].any()


def test_a_seed_left_open_is_torchs(place, small_model):
    model, tensors, _ = setup(small_model, batch=1, steps=1, length=5)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(run(place, model, tensors))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-3)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"e": torch.zeros(5, 32)}, ValueError, r"e must be .*got \(5, 32\)"),
        ({"mask": torch.zeros(5, 11)}, ValueError, r"mask must be .*L = 12.*got \(5, 11\)"),
        ({"x": torch.zeros(5, 3, 32)}, ValueError, r"taus must be .*q = 3.*got \(4, 32\)"),
        ({"x": torch.zeros(5, 4, 32).double()}, TypeError, "x is torch.float64"),
        ({"noise": torch.zeros(3, 5, 12, 32)}, ValueError, r"noise .*q = 4.*got \(3, 5, 12, 32\)"),
        ({"noise": None, "rows": torch.arange(4)}, ValueError, r"rows must be .*got \(4,\)"),
        ({"precision": "fp8"}, ValueError, "precision must be one of .*got 'fp8'"),
        ({"padding": "right"}, ValueError, "padding must be one of .*got 'right'"),
        ({"num_heads": 5}, ValueError, "num_heads must divide D = 32, got 5"),
    ],
)
def test_bad_inputs_are_named(small_model, change, error, message):
    model, tensors, lam = setup(small_model, batch=5, steps=4)
    given = dict(zip(("e", "mask", "x", "taus"), tensors))
    given.update(noise=lam, weights=model.fm.sampler_weights())
    given.update(change)
    if "num_heads" in change:
        given["weights"] = dataclasses.replace(given["weights"], num_heads=given.pop("num_heads"))
    with torch.no_grad(), pytest.raises(error, match=message):
        picard_sweep(**given)


# --- the C++ kernel -------------------------------------------------------------------------

needs_cpp = pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))


@pytest.fixture(params=extension.load().supported_isas() if extension.available() else [None])
def isa(request):
    native = extension.load()
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@needs_cpp
@pytest.mark.parametrize("shape", [(5, 3, 51, 36), (1, 30, 9, 32), (19, 2, 6, 32), (3, 2, 5, 6)])
def test_every_instruction_set_and_number_of_threads(isa, small_model, shape):
    batch, steps, length, width = shape
    heads = 2 if width == 6 else 4
    model, tensors, _ = setup(
        small_model, batch=batch, steps=steps, length=length, width=width, num_heads=heads
    )
    rows, results, before = torch.arange(batch) * 1_000_000_007 - 3, [], torch.get_num_threads()
    weights = model.fm.sampler_weights()
    with torch.no_grad():
        with use_backend("reference"):
            expected = picard_sweep(*tensors, weights, seed=SEED, rows=rows)
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                with use_backend("cpp"):
                    results.append(picard_sweep(*tensors, weights, seed=SEED, rows=rows))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0], expected, atol=1e-5, rtol=1e-5)


@needs_cpp
def test_the_boundary_names_what_is_off(small_model):
    model, tensors, lam = setup(small_model, batch=5, steps=4)
    weights = model.fm.sampler_weights()
    e, mask, x, taus = (t.numpy() for t in tensors)
    given = {
        "packed": pack(weights.blocks, weights.num_heads),
        "norm_weight": weights.norm_weight.detach().numpy(),
        "norm_bias": weights.norm_bias.detach().numpy(),
        "e": e, "mask": mask, "x": x, "taus": taus, "noise": lam.numpy(), "rows": None,
        "seed": None, "delta": 0.5, "out": np.empty_like(x), "num_threads": 1,
    }  # fmt: skip
    call = extension.load().picard_sweep
    for change, error, message in (
        ({"x": x[:, :3]}, ValueError, "x must be C-contiguous"),
        ({"x": x[:3]}, ValueError, r"x must have shape \[B, q, D\] = \(5, 4, 32\), got \(3,"),
        ({"x": x.astype(np.float64)}, TypeError, "x must be of dtype float32"),
        ({"out": np.empty((5, 4, 31), np.float32)}, ValueError, r"out must have shape"),
        ({"taus": taus[:0], "x": x[:, :0].copy()}, ValueError, "at least one step"),
        ({"noise": None}, TypeError, "rows must be a numpy array"),
        ({"num_threads": 0}, ValueError, "num_threads"),
    ):
        with pytest.raises(error, match=message):
            call(**{**given, **change})
    call(**given)
    call(**{**given, "out": x})  # in place
    assert np.array_equal(x, given["out"])
    with pytest.raises(ValueError, match="out must not overlap x"):
        memory = np.zeros((6, 4, 32), np.float32)
        call(**{**given, "x": memory[:5], "out": memory[1:]})
