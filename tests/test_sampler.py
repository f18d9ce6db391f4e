"""Sampling: what a row's result depends on, and every solver against a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fmrec_fast import noise as stream
from fmrec_fast import sample, scores, use_backend, use_rng
from fmrec_fast.testing import make_sequences

EVERY = ("padding", "short", "long", "full")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture
def model(small_model):
    """delta is large, so that the noise shows in the result."""
    return small_model(lambda_uncertainty=0.2).eval()


@pytest.fixture
def sequences() -> Tensor:
    return make_sequences(70, 12, 61, 1, histories=EVERY).sequence  # more than two CPU pieces


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_one_seed_gives_the_same_rows_in_any_batch(model, sequences, backend):
    whole = sample(model, sequences, seed=5)
    assert whole.shape == (70, 32) and whole.dtype == torch.float32
    rows = torch.arange(70)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(1))
    with use_backend(backend):
        for cut in (1, 7, 33, 64):
            parts = [
                sample(model, sequences[part], seed=5, rows=rows[part])
                for part in (slice(0, cut), slice(cut, 70))
            ]
            torch.testing.assert_close(torch.cat(parts), whole, **CLOSE)
        got = sample(model, sequences[order], seed=5, rows=order)
        torch.testing.assert_close(got, whole[order], **CLOSE)
        alone = sample(model, sequences[41:42], seed=5, rows=torch.tensor([41]))
        torch.testing.assert_close(alone, whole[41:42], **CLOSE)


def test_equal_histories_of_different_rows_differ(model, sequences):
    twice = sequences[2:3].repeat(2, 1)
    a, b = sample(model, twice, seed=5)
    assert (a - b).abs().max() > 1e-3
    a, b = sample(model, twice, seed=5, rows=torch.tensor([4, 4]))
    torch.testing.assert_close(a, b, **CLOSE)


def test_seeds_differ(model, sequences):
    a, b = (sample(model, sequences, seed=seed) for seed in (5, 6))
    assert ((a - b).abs().amax(1) > 1e-3).all()


def test_seeds_may_be_tensors(model, sequences):
    seed = torch.tensor(5)
    assert torch.equal(sample(model, sequences, seed=seed), sample(model, sequences, seed=5))
    assert seed == 5


@pytest.mark.parametrize("rng", ["stream", "published"])
def test_torch_manual_seed_governs(model, sequences, rng):
    results = []
    with use_rng(rng):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            results.append(sample(model, sequences[:9]))
    assert torch.equal(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-3)


def test_a_seed_counts_for_more_than_the_published_draws(model, sequences):
    expected = sample(model, sequences, seed=5)
    with use_rng("published"):
        torch.testing.assert_close(sample(model, sequences, seed=5), expected, **CLOSE)


def test_the_published_draws_cover_the_whole_batch(model, sequences):
    """70 rows: z0 first, then lam of every step for all rows, none of it cut into pieces."""
    with use_rng("published"):
        torch.manual_seed(3)
        got = sample(model, sequences)
    torch.manual_seed(3)
    z0 = torch.randn(70, 32)
    full = torch.full((70, 12, 32), 0.2)
    lam = torch.stack([torch.normal(full, full) for _ in range(5)])
    torch.testing.assert_close(sample(model, sequences, z0=z0, noise=lam), got, **CLOSE)


def test_explicit_start_and_noise_leave_nothing_to_chance(model, sequences):
    rows = torch.arange(70)
    seed = torch.tensor(5)
    z0 = stream.start(seed, rows, 32)
    lam = torch.stack([stream.lam(seed, rows, i, 12, 32, 0.2) for i in range(5)])
    expected = sample(model, sequences, seed=5)
    torch.testing.assert_close(sample(model, sequences, z0=z0, noise=lam), expected, **CLOSE)
    torch.testing.assert_close(sample(model, sequences, z0=z0, seed=5), expected, **CLOSE)
    torch.testing.assert_close(sample(model, sequences, noise=lam, seed=5), expected, **CLOSE)


def test_the_result_is_the_mean_of_the_predictions(model, sequences):
    e, mask = model.embed(sequences[:6])
    z0 = torch.randn(6, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        points = model.fm.integrate(e, mask, z0, steps=7, seed=5, return_trajectory=True)
        predictions = []
        for i, x in enumerate(points[:-1]):
            t = torch.full((6,), (i / 7 * (1 - 0.001) + 0.001) * 999)
            lam = stream.lam(torch.tensor(5), torch.arange(6), i, 12, 32, 0.2)
            predictions.append(model.fm.xstart_model(e, x, t, mask, noise=lam)[0])
    torch.testing.assert_close(points[-1], torch.stack(predictions).mean(0), **CLOSE)


def test_steps(model, sequences):
    """`steps` overrides `fm.sample_N`, which is read afresh and not changed."""
    five = sample(model, sequences[:5], seed=5)
    nine = sample(model, sequences[:5], seed=5, steps=9)
    assert model.fm.sample_N == 5
    assert torch.equal(sample(model, sequences[:5], seed=5, steps=5), five)
    model.fm.sample_N = 9
    assert torch.equal(sample(model, sequences[:5], seed=5), nine)
    assert not torch.allclose(five, nine, atol=1e-3)


def test_training_flags_are_restored(model, sequences):
    model.train()
    model.embed_dropout.eval()  # somebody's choice
    before = {name: module.training for name, module in model.named_modules()}
    expected = sample(model, sequences[:5], seed=5)  # dropout is off all the same
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(TypeError):
        sample(model, sequences[:5], z0=torch.zeros(5, 32).double(), seed=5)
    assert {name: module.training for name, module in model.named_modules()} == before
    model.eval()
    assert torch.equal(sample(model, sequences[:5], seed=5), expected)
    assert not model.training


def test_no_graph_is_built(model, sequences):
    assert not sample(model, sequences[:5], seed=5).requires_grad
    assert not scores(model, sequences[:5], seed=5).requires_grad


def test_scores(model, sequences):
    rep = sample(model, sequences[:5], seed=5, steps=3)
    with torch.no_grad():
        expected = rep @ model.item_embeddings.weight.T
    assert torch.equal(scores(model, sequences[:5], seed=5, steps=3), expected)


@pytest.mark.parametrize("rng", ["stream", "published"])
@pytest.mark.parametrize("method", ["euler", "rk45"])
def test_an_empty_batch(model, rng, method):
    with use_rng(rng):
        got = sample(model, torch.zeros(0, 12, dtype=torch.int64), method=method)
    assert got.shape == (0, 32)


def test_sequences_of_other_lengths(model):
    for length in (1, 5, 20):
        sequence = make_sequences(4, length, 61, 1, histories=EVERY).sequence
        assert torch.isfinite(sample(model, sequence, seed=5)).all()


# --- solvers against closed forms -----------------------------------------------------------


@pytest.fixture
def constant(small_model):
    """A model whose prediction is the same at any time and place, and what it predicts."""

    def make(**options):
        model = small_model(lambda_uncertainty=0.0, **options).eval()
        with torch.no_grad():
            for block in model.fm.xstart_model.att.transformer_blocks:
                for layer in (block.attention.w_layer, block.feed_forward.w_2):
                    layer.weight.zero_()
                    layer.bias.zero_()
            sequence = make_sequences(4, 12, 61, 1, histories=EVERY).sequence
            e, _ = model.embed(sequence)
            return model, sequence, model.fm.xstart_model.norm_fm_rep(e[:, -1])

    return make


Z0 = torch.randn(4, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("steps", [1, 3, 30])
def test_euler_with_a_constant_prediction(constant, steps):
    model, sequence, end = constant()
    got = sample(model, sequence, z0=Z0, steps=steps)
    torch.testing.assert_close(got, end, **CLOSE)


@pytest.mark.parametrize("trajectory", ["straight", "cosine"])
def test_euler_with_a_constant_velocity(constant, trajectory):
    model, sequence, velocity = constant(target="velocity", trajectory=trajectory)
    got = sample(model, sequence, z0=Z0, steps=7)
    torch.testing.assert_close(got, Z0 + velocity, **CLOSE)


def test_euler_on_the_cosine_trajectory_is_of_first_order(constant):
    model, sequence, end = constant(trajectory="cosine", eps=1e-6)
    errors = [
        float((sample(model, sequence, z0=Z0, steps=steps) - end).abs().max())
        for steps in (25, 50, 100)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("trajectory", ["straight", "cosine"])
@pytest.mark.parametrize("target", ["data", "velocity"])
def test_rk45_in_closed_form(constant, trajectory, target):
    """rk45 runs from eps to 1."""
    eps = 0.05
    model, sequence, end = constant(trajectory=trajectory, target=target, eps=eps)
    got = sample(model, sequence, z0=Z0, method="rk45")
    if target == "velocity" or trajectory == "straight":
        expected = Z0 + (1 - eps) * (end if target == "velocity" else end - Z0)
    else:
        angle = math.pi / 2 * eps
        expected = Z0 + (1 - math.sin(angle)) * end - math.cos(angle) * Z0
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_rk45_is_close_to_many_euler_steps(small_model, sequences):
    model = small_model(lambda_uncertainty=1e-8).eval()
    z0 = torch.randn(70, 32, generator=torch.Generator().manual_seed(0))
    euler = sample(model, sequences[:5], z0=z0[:5], steps=200)
    rk45 = sample(model, sequences[:5], z0=z0[:5], method="rk45")
    # From eps on, rk45 has less of the way to go.
    expected = z0[:5] + (euler - z0[:5]) * (1 - model.fm.eps)
    torch.testing.assert_close(rk45, expected, atol=1e-4, rtol=1e-4)
    e, mask = model.embed(sequences[:5])
    with torch.no_grad():
        x, nfe = model.fm.rk45_sampler(e, mask, z0[:5])
    torch.testing.assert_close(x, rk45, atol=1e-4, rtol=1e-4)
    assert nfe >= 6


def test_rk45_is_keyed_by_the_seed(small_model, sequences):
    model = small_model(lambda_uncertainty=0.001).eval()
    a, b = (sample(model, sequences[:5], method="rk45", seed=5) for _ in range(2))
    assert torch.equal(a, b)


def test_rk45_takes_no_explicit_noise(model, sequences):
    """Its number of evaluations is not known beforehand; ignoring `noise` would mislead."""
    with pytest.raises(ValueError, match="noise"):
        sample(model, sequences[:2], method="rk45", noise=torch.zeros(5, 2, 12, 32))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"steps": 0}, ValueError, "steps must be .*got 0"),
        ({"steps": True}, ValueError, "got True"),
        ({"steps": 2.0}, ValueError, "got 2.0"),
        ({"method": "heun"}, ValueError, "method must be one of .*got 'heun'"),
        ({"seed": -1}, ValueError, "got -1"),
        ({"seed": 1.5}, TypeError, "got 1.5"),
        ({"rows": torch.arange(3)}, ValueError, r"rows must be .*got \(3,\)"),
        ({"rows": torch.ones(2)}, TypeError, "rows must be int64"),
        ({"z0": torch.zeros(2, 31)}, ValueError, r"z0 must be .*got \(2, 31\)"),
        ({"noise": torch.zeros(4, 2, 12, 32)}, ValueError, r"noise .*q = 5.*got \(4, 2, 12, 32\)"),
        ({"noise": torch.zeros(5, 2, 11, 32)}, ValueError, r"got \(5, 2, 11, 32\)"),
        ({"sequences": torch.tensor([[61]])}, ValueError, "got 61"),
        ({"sequences": torch.tensor([[1.0]])}, TypeError, "torch.float32"),
    ],
)
def test_bad_inputs_are_named(model, sequences, options, error, message):
    arguments = {"sequences": sequences[:2], **options}
    with pytest.raises(error, match=message):
        sample(model, **arguments)
