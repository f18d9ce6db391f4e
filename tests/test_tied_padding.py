"""padding='tied': one lam for a row's padded positions, which are then computed as one token."""

from __future__ import annotations

import math

import pytest
import torch
from test_euler_sampler import peer_trajectory, run, setup

from fmrec_fast import noise, recommend, sample, use_rng
from fmrec_fast.backend import Backend, dispatch_log, use_backend
from fmrec_fast.data import Dataset
from fmrec_fast.evaluation import Evaluation, evaluate
from fmrec_fast.ops import encoder, euler_sampler, picard_sweep
from fmrec_fast.reference import encoder as encoder_definition
from fmrec_fast.reference.euler_sampler import leading_padding, tie_padding
from fmrec_fast.testing import assert_close_to_truth, make_sequences

pytestmark = pytest.mark.op("euler_sampler")

# All padding, one real item, one padded position, none.
PADDED = (12, 11, 1, 0, 7, 7, 3)


def padded_setup(small_model, padded=PADDED, length=12, **changes):
    """`setup` with rows of so many padded positions."""
    model, _, times, _ = setup(small_model, batch=1, length=length, **changes)
    generator = torch.Generator().manual_seed(5)
    sequence = torch.randint(1, 61, (len(padded), length), generator=generator)
    sequence[torch.arange(length) < torch.tensor(padded)[:, None]] = 0
    with torch.no_grad():
        e, mask = model.embed(sequence)
        taus = model.fm.xstart_model.embed_time(times * model.fm.time_scale)
    z0 = torch.randn(len(padded), e.shape[-1], generator=generator)
    lam = 0.5 + 0.5 * torch.randn(len(times), *e.shape, generator=generator)
    return model, (e, mask, z0, taus), times, lam


def tied(lam, mask):
    """The definition, one row at a time."""
    out = lam.clone()
    for row, real in enumerate(mask):
        count = next((i for i, m in enumerate(real) if m), len(real))
        out[:, row, :count] = lam[:, row, :1]
    return out


def test_the_definition():
    mask = torch.tensor([[0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 1, 1], [0, 0, 0.5, 1, 1]])
    assert leading_padding(mask).tolist() == [2, 5, 0, 2]
    lam = torch.randn(3, 4, 5, 6)
    expected = tied(lam, mask)
    assert torch.equal(torch.stack([tie_padding(step, mask) for step in lam]), expected)


@pytest.mark.parametrize(
    "shape",
    [
        {"length": 1, "width": 36, "padded": (0, 1), "steps": 1},
        {"length": 12, "width": 32, "padded": PADDED, "steps": 2},
        {"length": 51, "width": 96, "padded": (44, 51, 0, 1, 44), "steps": 2},
    ],
)
def test_equals_the_definition_with_the_tied_lam(place, small_model, shape):
    model, tensors, times, lam = padded_setup(small_model, **shape)
    given = tied(lam, tensors[1])
    truth, _ = peer_trajectory(model, tensors, given, torch.float64)
    same, _ = peer_trajectory(model, tensors, given, torch.float32)
    got = run(place, model, tensors, times, noise=lam, padding="tied", return_trajectory=True)
    for i in range(1, len(truth)):
        assert_close_to_truth(got[i], same[i], truth[i], name=f"x_{i}")
    assert torch.equal(run(place, model, tensors, times, noise=lam, padding="tied"), got[-1])
    untied = run(place, model, tensors, times, noise=lam)
    several = leading_padding(tensors[1]) > 1
    assert torch.equal(untied[~several].isfinite(), got[-1][~several].isfinite())
    torch.testing.assert_close(untied[~several], got[-1][~several], atol=1e-5, rtol=1e-5)
    if several.any():
        assert (untied - got[-1])[several].abs().max() > 1e-3


def test_the_stream_of_a_tied_row(place, small_model):
    model, tensors, times, _ = padded_setup(small_model)
    seed, rows = torch.tensor(77), torch.tensor([9, 3, 4, 2**33, 0, 5, 1])
    e = tensors[0]
    lam = [noise.lam(seed, rows, i, *e.shape[1:], 0.5) for i in range(len(times))]
    expected = run(place, model, tensors, times, noise=torch.stack(lam), padding="tied")
    got = run(place, model, tensors, times, seed=seed, rows=rows, padding="tied")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_batch_and_order_change_nothing(place, small_model):
    # Where Triton interprets, one evaluation of the network takes long.
    triton = place.backend is Backend.TRITON
    padded, steps = ((12, 0, 7), 1) if triton else (PADDED * 9, 2)
    model, tensors, times, _ = padded_setup(small_model, padded=padded, steps=steps)
    seed, rows = torch.tensor(3), torch.arange(len(tensors[0]))
    whole = run(place, model, tensors, times, seed=seed, rows=rows, padding="tied")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    for index in (order, order[:11], torch.tensor([len(rows) // 2]))[triton:]:
        some = (*(t[index] for t in tensors[:3]), tensors[3])
        got = run(place, model, some, times, seed=seed, rows=rows[index], padding="tied")
        if place.backend is Backend.CPP:
            assert torch.equal(got, whole[index])
        else:
            torch.testing.assert_close(got, whole[index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"trajectory": "cosine"}, {"target": "velocity"}])
def test_options(place, small_model, options):
    model, tensors, times, lam = padded_setup(small_model)
    expected = run(place, model, tensors, times, noise=tied(lam, tensors[1]), **options)
    got = run(place, model, tensors, times, noise=lam, padding="tied", **options)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_causal_attention(small_model):
    model, tensors, times, lam = padded_setup(small_model, attention="causal")
    options = {"times": times, "weights": model.fm.sampler_weights()}
    with torch.no_grad():
        expected = euler_sampler(*tensors, noise=tied(lam, tensors[1]), **options)
        got = euler_sampler(*tensors, noise=lam, padding="tied", **options)
    assert torch.equal(got, expected)


def test_published_draws(small_model):
    model = small_model().eval()
    sequence = make_sequences(4, 12, 61, 1, histories=("padding", "short", "full")).sequence
    e, mask = model.embed(sequence)
    with use_rng("published"):
        torch.manual_seed(4)
        z0 = torch.randn(4, 32)
        delta = torch.full(e.shape, 0.001)
        lam = torch.stack([torch.normal(delta, delta) for _ in range(3)])
        torch.manual_seed(4)
        got = sample(model, sequence, steps=3, padding="tied")
    expected = sample(model, sequence, steps=3, z0=z0, noise=tied(lam, mask))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.op("picard_sweep")
def test_all_steps_at_once(place, small_model):
    model, tensors, times, lam = padded_setup(small_model)
    e, mask, _, taus = tensors
    x = torch.randn(len(e), len(times), 32, generator=torch.Generator().manual_seed(3))
    weights = model.to(place.device).fm.sampler_weights()
    seed, rows = torch.tensor(5), torch.arange(len(e))
    drawn = torch.stack([noise.lam(seed, rows, i, *e.shape[1:], 0.5) for i in range(len(taus))])

    def sweep(**options):
        options = {k: v.to(place.device) if isinstance(v, torch.Tensor) else v
                   for k, v in options.items()}  # fmt: skip
        with torch.no_grad(), place.forced("picard_sweep"):
            return picard_sweep(*place.put(e, mask, x, taus), weights, **options).cpu()

    expected = sweep(noise=tied(lam, mask))
    torch.testing.assert_close(sweep(noise=lam, padding="tied"), expected, atol=1e-5, rtol=1e-5)
    got, expected = sweep(seed=seed, padding="tied"), sweep(noise=drawn, padding="tied")
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_sampling_in_parallel(small_model):
    model = small_model().eval()
    sequence = make_sequences(5, 12, 61, 1, histories=("padding", "short", "long")).sequence
    expected = sample(model, sequence, seed=1, padding="tied")
    got = sample(model, sequence, seed=1, padding="tied", method="parallel")
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.op("encoder")
def test_a_token_of_multiplicity(place, small_model):
    """A first token with bias log(n) is n equal tokens."""
    stack = small_model().fm.xstart_model.att.to(place.device)
    generator = torch.Generator().manual_seed(1)
    rest, first = torch.randn(3, 4, 32, generator=generator), torch.randn(3, 1, 32)
    for count in (1, 2, 9):
        x = torch.cat((first.repeat(1, count, 1), rest), dim=1)
        mask = (torch.arange(count + 4) >= count).float().repeat(3, 1)
        wide = [type(b)(*(t.detach().cpu().double() for t in b.tensors())) for b in stack.weights()]
        truth, tapped = encoder_definition.encoder(
            x.double(), mask.double(), wide, num_heads=4, tap=1
        )
        with torch.no_grad(), place.forced("encoder", declines={Backend.TRITON}):
            got = encoder(
                *place.put(x[:, count - 1 :], mask[:, count - 1 :]),
                stack.weights(),
                num_heads=4,
                tap=1,
                first_key_bias=torch.full((3,), math.log(count), device=place.device),
            )
        for mine, right in zip(got, (truth, tapped)):
            torch.testing.assert_close(mine.cpu(), right.float(), atol=2e-5, rtol=1e-4)


def test_sample_recommend_and_evaluate(small_model):
    model = small_model(lambda_uncertainty=0.5).eval()
    sequence = make_sequences(9, 12, 61, 1).sequence
    _, mask = model.embed(sequence)
    seed, rows = torch.tensor(8), torch.arange(9)
    lam = torch.stack([noise.lam(seed, rows, i, 12, 32, 0.5) for i in range(5)])
    with dispatch_log() as log:
        got = sample(model, sequence, seed=8, padding="tied")
    assert {entry.op for entry in log} >= {"euler_sampler"}
    expected = sample(
        model, sequence, z0=noise.start(seed, rows, 32), noise=tied(lam, mask), padding="published"
    )
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)

    lists = [[i for i in row.tolist() if i] for row in sequence]
    best = recommend(model, lists, k=5, seed=8, padding="tied")
    scores = got @ model.item_embeddings.weight[1:].T
    assert torch.equal(best.ids, scores.topk(5).indices + 1)

    dataset = Dataset.from_histories([[*row, 1, 2] for row in lists])
    small = small_model(lambda_uncertainty=0.5, item_num=len(dataset.item_ids) + 1).eval()
    found = evaluate(small, dataset, padding="tied")
    with use_backend("reference"):
        again = evaluate(small, dataset, padding="tied")
    assert isinstance(found, Evaluation)
    assert found.mean == pytest.approx(again.mean)


def test_bad_requests_are_named(small_model):
    model, (e, mask, z0, taus), times, lam = padded_setup(small_model)
    sequence = torch.zeros(2, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"padding must be one of .*got 'tight'"):
        sample(model, sequence, padding="tight")
    with pytest.raises(ValueError, match="method 'rk45' has padding 'published' only, got 'tied'"):
        sample(model, sequence, method="rk45", padding="tied")
    options = {"times": times, "weights": model.fm.sampler_weights(), "noise": lam}
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"padding must be one of .*got 'none'"):
            euler_sampler(e, mask, z0, taus, padding="none", **options)
        e[0, 5, 3] += 1
        with pytest.raises(ValueError, match=r"another at e\[0, 5\] than at e\[0, 0\]"):
            euler_sampler(e, mask, z0, taus, padding="tied", **options)
    with pytest.raises(ValueError, match="padding='tied' needs a model in evaluation mode"):
        model.train().fm.integrate(e, mask, z0, padding="tied")
    blocks = model.fm.sampler_weights().blocks
    for change, error, message in (
        ({"first_key_bias": torch.zeros(6)}, ValueError, r"first_key_bias .*got \(6,\)"),
        ({"first_key_bias": torch.zeros(7).double()}, TypeError, "first_key_bias is torch.float64"),
        (
            {"first_key_bias": torch.zeros(7), "attention": "causal"},
            ValueError,
            "first_key_bias needs 'published' attention, got 'causal'",
        ),
    ):
        with pytest.raises(error, match=message):
            encoder(e, mask, blocks, num_heads=4, **change)
