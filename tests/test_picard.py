"""Picard iteration: the sequential sampler's result from all steps at once, and its residual."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from fmrec_fast import (
    FMRecConfig,
    FMRecommender,
    dispatch_log,
    extension,
    packing,
    picard,
    recommend,
    sample,
    training_losses,
    use_backend,
    use_rng,
)
from fmrec_fast.picard import TOLERANCE, evaluation_flops, iterate, prefers_parallel
from fmrec_fast.recommend import rank_items
from fmrec_fast.steps import overlap
from fmrec_fast.testing import make_sequences

EVERY = ("padding", "short", "long", "full")
BACKENDS = ["reference", "auto"]


def relative(got, expected):
    """Per row, in the norm over channels."""
    return (got - expected).norm(dim=1) / expected.norm(dim=1)


@pytest.fixture(scope="module")
def trained():
    """A model after some steps of training on histories that go through the items in order."""
    config = FMRecConfig(
        item_num=61, hidden_size=32, max_len=12, num_blocks=3, last=2, decoder_dims=(24, 40)
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FMRecommender.from_config(config)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(60):
            first = torch.randint(1, 48, (64, 1))
            items = first + torch.arange(13)
            sequence = items[:, :12] * (torch.arange(12) >= torch.randint(0, 12, (64, 1)))
            losses = training_losses(model, sequence, items[:, 12:])
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
    assert float(losses.cross_entropy.detach()) < 0.6 * math.log(60)  # it did learn
    return model.eval()


@pytest.fixture
def sequences():
    return make_sequences(9, 12, 61, 1, histories=EVERY).sequence


@pytest.fixture
def uncertain(small_model):
    """lam is so large that the steps depend on one another."""
    return lambda **changes: small_model(
        **{"lambda_uncertainty": 0.5, "sample_N": 8, **changes}
    ).eval()


def evaluations(log):
    """Sweeps and single evaluations in a dispatch log."""
    return sum(entry.op == "picard_sweep" for entry in log)


# --- the result -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_on_a_trained_model_one_sweep_is_the_sequential_result(trained, sequences, backend):
    with use_backend(backend), dispatch_log() as log:
        got, residual = sample(trained, sequences, method="parallel", seed=3, return_residual=True)
    assert evaluations(log) == 2  # the guess, and one sweep
    with use_backend(backend):
        expected = sample(trained, sequences, seed=3)
    assert relative(got, expected).max() <= 1e-5
    assert residual.shape == (9,)
    assert residual.max() <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delta", [0.1, 0.5, 2.0])
def test_the_guard_goes_on_where_one_sweep_does_not_converge(uncertain, sequences, backend, delta):
    model = uncertain(lambda_uncertainty=delta)
    expected = sample(model, sequences, seed=3)
    with use_backend(backend), dispatch_log() as log:
        got, residual = sample(model, sequences, method="parallel", seed=3, return_residual=True)
    assert 2 < evaluations(log) <= 8  # q - 1 sweeps at most, and the guess
    assert residual.max() <= TOLERANCE
    assert relative(got, expected).max() <= 2e-5
    one = sample(model, sequences, method="parallel", seed=3, sweeps=1)
    assert relative(one, expected).max() > 1e-4  # the guard was needed


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_enough_sweeps_are_exact_whatever_the_network(uncertain, sequences, steps):
    model = uncertain(lambda_uncertainty=3.0)
    expected = sample(model, sequences, seed=3, steps=steps)
    got, residual = sample(
        model, sequences, steps=steps, method="parallel", seed=3, sweeps=99, return_residual=True
    )
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)
    assert not residual.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions(trained, sequences, precision, backend):
    """Either method to its own rounding; both near the float32 result, and not on it (a kernel may
    be)."""
    exact = sample(trained, sequences, seed=3)
    with use_backend(backend):
        results = [
            sample(trained, sequences, seed=3, method=method, precision=precision)
            for method in ("euler", "parallel")
        ]
    limit = {"tf32": 2e-3, "bf16": 2e-2}[precision]
    least = 1e-6 if backend == "reference" else -1
    for got in results:
        assert least < relative(got, exact).max() <= limit
    # Rounding of the operands is not smooth in the state, so the methods agree to it only.
    assert relative(*results).max() <= limit / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_lists_in_low_precision(trained, precision, backend):
    """Of a trained model: at least 99% of the top 20 are those of float32, with near scores."""
    many = make_sequences(64, 12, 61, 2, histories=EVERY[1:]).sequence
    found = {}
    for name in ("float32", precision):
        with use_backend(backend):
            rep = sample(trained, many, seed=3, precision=name)
            found[name] = rank_items(trained, rep, 20, torch.empty(64, 0, dtype=torch.int64))
    right, got = found["float32"], found[precision]
    assert overlap(got.ids, right.ids) >= 99.0
    limit = {"tf32": 1e-3, "bf16": 1e-2}[precision]
    assert (got.scores - right.scores).abs().max() < limit * right.scores.abs().max()


def test_the_trajectory_is_the_sequential_one(uncertain, sequences):
    model = uncertain()
    e, mask = model.embed(sequences)
    z0 = torch.randn(9, 32, generator=torch.Generator().manual_seed(4))
    expected = model.fm.integrate(e, mask, z0, seed=3, return_trajectory=True)
    got = model.fm.integrate(
        e, mask, z0, seed=3, return_trajectory=True, method="parallel", sweeps=99
    )
    assert got.shape == (9, 9, 32)
    assert torch.equal(got[0], z0)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("trajectory", ["straight", "cosine"])
@pytest.mark.parametrize("target", ["data", "velocity"])
@pytest.mark.parametrize("attention", ["published", "causal"])
def test_every_variant_of_the_model(uncertain, sequences, trajectory, target, attention):
    model = uncertain(
        trajectory=trajectory, target=target, attention=attention, lambda_uncertainty=0.05
    )
    expected = sample(model, sequences, seed=3)
    got = sample(model, sequences, seed=3, method="parallel")
    assert relative(got, expected).max() <= 2e-5


def test_start_noise_rows_and_published_draws(uncertain, sequences):
    model = uncertain(lambda_uncertainty=0.05)
    g = torch.Generator().manual_seed(4)
    given = {
        "z0": torch.randn(9, 32, generator=g),
        "noise": 0.05 + 0.05 * torch.randn(8, 9, 12, 32, generator=g),
    }
    for options in (given, {"seed": 5, "rows": torch.arange(9) * 7, "z0": given["z0"]}):
        expected = sample(model, sequences, **options)
        got = sample(model, sequences, method="parallel", **options)
        assert relative(got, expected).max() <= 2e-5
    results = []
    with use_rng("published"):
        for method in ("euler", "parallel"):
            torch.manual_seed(3)
            results.append(sample(model, sequences, method=method))
    assert relative(results[1], results[0]).max() <= 2e-5


def test_a_row_does_not_depend_on_which_others_converge(uncertain, sequences):
    """Rows that have converged stop, so each has the sweeps that it would have alone."""
    model = uncertain(lambda_uncertainty=0.1)
    whole, residual = sample(model, sequences, method="parallel", seed=3, return_residual=True)
    for i in range(9):
        rows = torch.tensor([i])
        alone, own = sample(
            model, sequences[i : i + 1], method="parallel", seed=3, rows=rows, return_residual=True
        )
        torch.testing.assert_close(alone[0], whole[i], atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(own[0], residual[i], atol=1e-7, rtol=1e-2)


def test_a_batch_of_more_than_a_piece_and_an_empty_one(trained):
    sequence = make_sequences(515, 12, 61, 1, histories=EVERY).sequence
    got, residual = sample(
        trained, sequence, method="parallel", seed=3, steps=4, return_residual=True
    )
    expected = sample(trained, sequence, seed=3, steps=4)
    assert relative(got, expected).max() <= 1e-5
    assert residual.shape == (515,) and residual[512:].min() > 0
    for method in ("parallel", "auto"):
        got, residual = sample(trained, sequence[:0], method=method, return_residual=True)
        assert got.shape == (0, 32) and residual.shape == (0,)


# --- the residual, and when it stops --------------------------------------------------------


def test_the_residual_is_about_the_error(uncertain, sequences):
    """Never much smaller, and not so large that converged rows go on for nothing."""
    ratios = []
    for delta in (0.02, 0.1, 0.5):
        model = uncertain(lambda_uncertainty=delta, sample_N=20)
        expected = sample(model, sequences, seed=3)
        for sweeps in (1, 2):
            got, residual = sample(
                model, sequences, seed=3, method="parallel", sweeps=sweeps, return_residual=True
            )
            error = relative(got, expected)
            seen = error > 2e-5  # well above round-off
            ratios += (residual[seen] / error[seen]).tolist()
    assert len(ratios) > 20
    assert min(ratios) > 0.3
    assert max(ratios) < 10


def solve(f, z0, steps, **options):
    """x' = f(x, i) by `iterate`; records the rows of every evaluation."""
    seen = []

    def predict(x, active):
        seen.append((x.shape[1], None if active is None else active.tolist()))
        return torch.stack([f(x[:, i], i) for i in range(x.shape[1])], 1)

    solution = iterate(predict, lambda v, active: v, z0, steps, **options)
    return solution, seen


def test_a_linear_equation_in_closed_form():
    """dx/dt = a x, a row each: Euler gives (1 + a/q)^q, and k sweeps the terms up to a^(k+1)."""
    a = torch.tensor([[0.0], [1e-3], [0.1], [-1.0], [3.0]], dtype=torch.float64)
    z0 = torch.ones(5, 2, dtype=torch.float64)
    for q in (2, 10, 30):
        (points, residual), _ = solve(lambda x, i: a * x, z0, q, sweeps=q)
        torch.testing.assert_close(points[:, -1], (1 + a / q) ** q * z0)
        for i in range(q + 1):
            torch.testing.assert_close(points[:, i], (1 + a / q) ** i * z0)
        assert not residual.any()
        for sweeps in range(1, min(q - 1, 8)):
            (points, residual), seen = solve(lambda x, i: a * x, z0, q, sweeps=sweeps)
            terms = [math.comb(q, k) / q**k * a**k for k in range(sweeps + 2)]
            torch.testing.assert_close(points[:, -1], sum(terms) * z0)
            assert seen == [(1, None), *[(q, None)] * sweeps]
            assert residual[0] == 0 and (residual[3:] > 0).all()


def test_rows_stop_one_by_one():
    a = torch.tensor([[0.0], [1e-3], [0.1], [-1.0], [3.0]], dtype=torch.float64)
    z0, q = torch.ones(5, 2, dtype=torch.float64), 20
    active_rows = {}

    def predict(x, active):
        rows = torch.arange(5) if active is None else active
        active_rows[len(active_rows)] = rows.tolist()
        return a[rows][:, None] * x

    solution = iterate(predict, lambda v, active: v, z0, q, tol=1e-6)
    truth = (1 + a / q) ** q * z0
    assert relative(solution.points[:, -1], truth).max() <= 1e-6
    assert solution.residual.max() <= 1e-6
    sizes = [len(rows) for rows in active_rows.values()]
    assert sizes[:2] == [5, 5] and sizes == sorted(sizes, reverse=True)
    assert active_rows[2] == [2, 3, 4]  # rows 0 and 1 converged in the first sweep
    assert active_rows[len(sizes) - 1] == [4]


def test_without_looking_converged_rows_are_left_as_they_are(monkeypatch):
    """The branch of a GPU, where the host must not look: nothing leaves the device."""

    class Elsewhere(torch.Tensor):
        """A tensor that says that it is on a GPU, and forbids to look at it."""

        device = torch.device("cuda")
        forbidden = ("nonzero", "item", "__bool__", "tolist", "numpy", "equal")

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if getattr(function, "__name__", "") in cls.forbidden:
                raise AssertionError(f"the host looked: {function}")
            return super().__torch_function__(function, types, args, kwargs or {})

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    a = torch.tensor([[0.0], [1e-3], [0.1], [-1.0], [3.0]], dtype=torch.float64)
    z0, q = torch.ones(5, 2, dtype=torch.float64), 20
    options = {"sweeps": 5, "tol": 1e-6}
    expected, _ = solve(lambda x, i: a[: len(x)] * x, z0, q, sweeps=1)
    frozen, seen = solve(lambda x, i: a * x, z0.as_subclass(Elsewhere), q, **options)
    assert seen == [(1, None), *[(q, None)] * 5]
    points, residual = (t.as_subclass(torch.Tensor) for t in frozen)
    assert torch.equal(points[:2], expected.points[:2])  # converged after one sweep
    assert relative(points[2:3, -1], ((1 + a / q) ** q * z0)[2:3]).max() <= 1e-6
    assert (residual > 1e-6).tolist() == [False, False, False, True, True]  # honest about the rest
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    solve(lambda x, i: a * x, z0.as_subclass(Elsewhere), q, sweeps=2)
    with pytest.raises(ValueError, match=r"cannot look at the residual .* give sweeps"):
        solve(lambda x, i: a * x, z0.as_subclass(Elsewhere), q)


def test_nan_stops_and_shows():
    z0 = torch.tensor([[torch.nan, 1.0], [1.0, 1.0]])
    (points, residual), seen = solve(lambda x, i: 0.001 * x, z0, 9)
    assert len(seen) == 2
    assert points[0, -1].isnan().any() and points[1].isfinite().all()
    assert residual.isnan().tolist() == [True, False]


# --- the choice -----------------------------------------------------------------------------


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def any_network(monkeypatch):
    """'auto' as if the network were worth it: that of the tests is tiny."""
    monkeypatch.setattr(picard, "CPU_OVERHEAD", 0.0)


def test_a_tiny_network_is_not_worth_a_sweep(trained, sequences, threads):
    threads(2)
    paper, tiny = evaluation_flops(50, 128, 4), evaluation_flops(12, 32, 3)
    assert paper == pytest.approx(66.5e6, rel=0.01)
    cpu = torch.device("cpu")
    assert prefers_parallel(1, 30, 0.001, cpu, paper)
    assert not prefers_parallel(1, 30, 0.001, cpu, tiny)
    with dispatch_log() as log:
        sample(trained, sequences[:1], method="auto", steps=30)
    assert "picard_sweep" not in {entry.op for entry in log}


@pytest.mark.usefixtures("any_network")
def test_auto_is_parallel_where_rows_leave_threads_idle(trained, sequences, threads):
    cpu = torch.device("cpu")
    threads(1)
    assert not any(prefers_parallel(b, 30, 0.001, cpu) for b in (0, 1, 2, 512))
    threads(2)
    chosen = [b for b in range(20) if prefers_parallel(b, 30, 0.001, cpu)]
    assert chosen == [1, 3]
    assert not prefers_parallel(1, 30, 0.1, cpu)  # one sweep would not do
    assert not prefers_parallel(1, 2, 0.001, cpu)
    for batch, parallel in ((1, True), (2, False), (9, False)):
        with dispatch_log() as log:
            got, residual = sample(
                trained, sequences[:batch], method="auto", seed=3, steps=30, return_residual=True
            )
        ran = {entry.op for entry in log}
        assert ("picard_sweep" in ran) == parallel, (batch, ran)
        assert ("euler_sampler" in ran) != parallel
        assert bool(residual.any()) == parallel
        expected = sample(trained, sequences[:batch], seed=3, steps=30)
        assert relative(got, expected).max() <= 1e-5


def test_auto_counts_multiprocessors_on_a_gpu(monkeypatch):
    class Properties:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    cuda = torch.device("cuda")
    chosen = [b for b in range(1, 600) if prefers_parallel(b, 30, 0.001, cuda)]
    assert chosen[:106] == [*range(1, 106), 133]  # q B / 132 rounds of sequences against q
    assert 512 not in chosen


@pytest.mark.usefixtures("any_network")
def test_auto_goes_step_by_step_under_published_draws(trained, sequences, threads):
    threads(2)
    with use_rng("published"), dispatch_log() as log:
        sample(trained, sequences[:1], method="auto")
    assert "picard_sweep" not in {entry.op for entry in log}


@pytest.mark.usefixtures("any_network")
def test_recommend_takes_the_choice_and_gives_the_same_items(trained, threads):
    threads(2)
    histories = [[12, 13, 14]]
    with dispatch_log() as log:
        got = recommend(trained, histories, 5, seed=1)
    assert "picard_sweep" in {entry.op for entry in log}
    expected = recommend(trained, histories, 5, seed=1, method="euler")
    assert torch.equal(got.ids, expected.ids)
    torch.testing.assert_close(got.scores, expected.scores, atol=1e-4, rtol=1e-4)


def test_training_mode_of_the_core(trained, sequences):
    model = FMRecommender.from_config(trained.config)
    e, mask = model.embed(sequences)
    z0 = torch.zeros(9, 32)
    assert model.training
    with pytest.raises(ValueError, match="evaluation mode"):
        model.fm.integrate(e, mask, z0, method="parallel")
    got = model.fm.integrate(e, mask, z0, method="auto", seed=1)
    assert torch.equal(got, model.fm.integrate(e, mask, z0, seed=1))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"sweeps": 0}, ValueError, "sweeps must be at least 1, got 0"),
        ({"sweeps": 1.0}, TypeError, "sweeps must be an integer or None, got 1.0"),
        ({"sweeps": True}, TypeError, "got True"),
        ({"tol": 0.0}, ValueError, "tol must satisfy 0 < tol < 1, got 0.0"),
        ({"tol": float("nan")}, ValueError, "got nan"),
        ({"method": "euler", "sweeps": 2}, ValueError, "sweeps = 2 .*with 'euler'"),
        ({"method": "rk45", "tol": 1e-3}, ValueError, "tol = 0.001 with 'rk45'"),
        ({"method": "euler", "return_residual": True}, ValueError, "'euler' has no residual"),
        ({"method": "rk45", "return_residual": True}, ValueError, "'rk45' has no residual"),
        ({"method": "rk45", "precision": "bf16"}, ValueError, "precision = 'bf16'"),
        ({"precision": "fp8"}, ValueError, "precision must be one of .*got 'fp8'"),
        ({"method": "picard"}, ValueError, "method must be one of .*got 'picard'"),
    ],
)
def test_bad_options_are_named(trained, sequences, options, error, message):
    with pytest.raises(error, match=message):
        sample(trained, sequences, **{"method": "parallel", **options})
    assert not trained.training
    if set(options) == {"method", "sweeps"}:
        e, mask = trained.embed(sequences)
        with pytest.raises(error, match="'euler' has no sweeps"):
            trained.fm.integrate(e, mask, torch.zeros(9, 32), **options)


def test_weights_are_packed_once(trained, sequences, monkeypatch):
    if not extension.available():
        pytest.skip(str(extension.reason()))
    calls, pack = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda *given: calls.append(given) or pack(*given))
    model = copy.deepcopy(trained)
    for _ in range(2):
        sample(model, sequences, method="parallel", seed=1)
    assert len(calls) == 1
