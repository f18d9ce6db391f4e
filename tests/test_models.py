"""The networks: what they draw, what they refuse, and what their parameters start from."""

from __future__ import annotations

import pytest
import torch

from fmrec_fast import (
    Backend,
    FMRecommender,
    TrainingDraws,
    dispatch_log,
    flow,
    training_losses,
    use_backend,
    use_rng,
)
from fmrec_fast.models.blocks import sinusoid
from fmrec_fast.reference.linear import linear as linear_reference
from fmrec_fast.testing import make_sequences

EVERY = ("padding", "short", "long", "full")


def loss_and_gradients(model, sequence, target, **options):
    model.zero_grad()
    losses = training_losses(model, sequence, target, **options)
    losses.total.backward()
    return losses, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_backends_agree_on_a_training_step(small_model):
    """With one seed: dropout, lam, start, times and cells are the same numbers everywhere."""
    model = small_model(lambda_uncertainty=0.1).train()
    sequence, target = make_sequences(8, 12, 61, 1, histories=EVERY)
    results = []
    for backend in ("reference", "auto"):
        with use_backend(backend), dispatch_log() as log:
            results.append(loss_and_gradients(model, sequence, target, seed=5))
    assert {entry.op for entry in log} >= {"noise_fusion", "dropout", "history_loss", "encoder"}
    torch.testing.assert_close(results[0][0].total, results[1][0].total, atol=1e-5, rtol=1e-5)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, atol=2e-5, rtol=1e-3)


def test_the_total_is_the_weighted_sum(small_model):
    model = small_model(Loss_Alpha=0.7, Loss_Beta=3.0).train()
    losses = training_losses(model, *make_sequences(8, 12, 61, 1), seed=5)
    expected = losses.flow + 0.7 * losses.cross_entropy + 3.0 * losses.reconstruction
    torch.testing.assert_close(losses.total, expected)


@pytest.mark.parametrize("rng", ["stream", "published"])
def test_torch_manual_seed_governs_training(small_model, rng):
    model = small_model().train()
    sequence, target = make_sequences(8, 12, 61, 1)
    totals = []
    with use_rng(rng):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            totals.append(training_losses(model, sequence, target).total)
    assert totals[0] == totals[1] != totals[2]


def test_a_seed_counts_for_more_than_the_published_draws(small_model):
    model = small_model().train()
    sequence, target = make_sequences(8, 12, 61, 1)
    expected = training_losses(model, sequence, target, seed=5).total
    with use_rng("published"):
        assert training_losses(model, sequence, target, seed=5).total == expected
    assert training_losses(model, sequence, target, seed=torch.tensor(5)).total == expected


def test_a_row_draws_the_same_in_any_training_batch(small_model):
    model = small_model(lambda_uncertainty=0.1).train()
    sequence, target = make_sequences(9, 12, 61, 1, histories=EVERY)
    order = torch.tensor([7, 2, 0, 5])
    with torch.no_grad():
        _, x0, _, t, _, z0 = model(sequence, target, seed=5)
        _, part, _, t_part, _, z0_part = model(sequence[order], target[order], seed=5, rows=order)
    assert torch.equal(t_part, t[order]) and torch.equal(z0_part, z0[order])
    torch.testing.assert_close(part, x0[order], atol=1e-5, rtol=1e-5)


def test_dropout_is_off_in_evaluation(small_model):
    sequence, target = make_sequences(8, 12, 61, 1)
    model = small_model()
    still = small_model(dropout=0.0, emb_dropout=0.0).train()
    with torch.no_grad():
        expected = still(sequence, target, seed=5)[1]
        torch.testing.assert_close(model.eval()(sequence, target, seed=5)[1], expected)
        assert not torch.allclose(model.train()(sequence, target, seed=5)[1], expected, atol=0.01)


@pytest.mark.parametrize("name", ["dropout", "emb_dropout"])
def test_each_dropout_has_an_effect(small_model, name):
    rates = {"dropout": 0.0, "emb_dropout": 0.0}
    sequence, target = make_sequences(8, 12, 61, 1)
    with torch.no_grad():
        expected = small_model(**rates).train()(sequence, target, seed=5)[1]
        got = small_model(**{**rates, name: 0.3}).train()(sequence, target, seed=5)[1]
    assert not torch.allclose(got, expected, atol=0.01)


def test_inference_in_training_mode_is_keyed_by_the_seed(small_model):
    model = small_model(lambda_uncertainty=0.1).train()
    sequence, _ = make_sequences(8, 12, 61, 1)
    with torch.no_grad():
        a, b, c = (model(sequence, None, train_flag=False, seed=s)[1] for s in (5, 5, 6))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c, atol=1e-3)


def test_steps_in_training_mode_do_not_share_draws_across_seeds(small_model):
    """Step i of seed s must not draw what step i - 1 of seed s + 1 draws."""
    model = small_model(lambda_uncertainty=1.0, sample_N=3).train()
    sequence, _ = make_sequences(4, 12, 61, 1)
    e, mask = model.embed(sequence)
    drawn = []
    original = model.fm.xstart_model.predict

    def spy(item_rep, x_t, t, mask_seq, source, noise=None):
        drawn.append(int(source.seed))
        return original(item_rep, x_t, t, mask_seq, source, noise)

    model.fm.xstart_model.predict = spy
    for seed in (5, 6, 7):
        model.fm.integrate(e, mask, torch.zeros(4, 32), seed=seed)
    assert len(set(drawn)) == 9


def test_explicit_draws_leave_nothing_to_chance(small_model):
    model = small_model(dropout=0.0, emb_dropout=0.0).train()
    sequence, target = make_sequences(4, 12, 61, 1)
    g = torch.Generator().manual_seed(1)
    draws = TrainingDraws(
        z0=torch.randn(4, 32, generator=g),
        t=torch.rand(4, generator=g),
        noise=torch.randn(4, 12, 32, generator=g),
        cells=torch.tensor([[0, 0], [3, 7]]),
    )
    totals = [training_losses(model, sequence, target, draws=draws).total for _ in range(2)]
    assert totals[0] == totals[1]


@pytest.mark.parametrize("attention", ["published", "causal"])
@pytest.mark.parametrize("trajectory", ["straight", "cosine"])
@pytest.mark.parametrize("target", ["data", "velocity"])
def test_options(small_model, attention, trajectory, target):
    """The flow loss is the squared error of what is predicted; x0 is the data end in any case."""
    model = small_model(attention=attention, trajectory=trajectory, target=target).eval()
    sequence, tag = make_sequences(5, 12, 61, 1, histories=EVERY)
    _, x0, _, t, loss_fm, z0 = model(sequence, tag, seed=5)
    wanted = model.item_embeddings(tag[:, 0])
    if target == "data":
        torch.testing.assert_close(loss_fm, ((x0 - wanted) ** 2).mean())
    else:
        at = t[:, None]
        x_t = flow.interpolate(wanted, z0, at, trajectory)
        # At t the data end moves by `factor` times the velocity.
        factor = 1 - at if trajectory == "straight" else 2 / torch.pi * torch.cos(torch.pi / 2 * at)
        moved = x0 - flow.data_from_velocity(torch.zeros_like(x_t), x_t, at, trajectory)
        velocity = moved / factor
        expected = ((velocity - flow.velocity(wanted, z0, at, trajectory)) ** 2).mean()
        torch.testing.assert_close(loss_fm, expected, atol=1e-4, rtol=1e-3)
    loss_fm.backward()


def test_an_empty_batch(small_model):
    model = small_model()
    empty, none = torch.zeros(0, 12, dtype=torch.int64), torch.zeros(0, 1, dtype=torch.int64)
    with torch.no_grad():
        _, x0, expanded, t, _, z0 = model.train()(empty, none)
        _, x1, *_ = model.eval()(empty, None, train_flag=False)
    assert x0.shape == x1.shape == expanded.shape == z0.shape == (0, 32) and t.shape == (0,)


# --- q_sample_rf ----------------------------------------------------------------------------


def flow_inputs(*shape):
    g = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=g), torch.randn(shape, generator=g)


def test_q_sample_rf(small_model):
    fm = small_model().fm
    x, z0 = flow_inputs(4, 5, 3)
    t = torch.rand(4, 1, 1, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(fm.q_sample_rf(x, t, z0), t * x + (1 - t) * z0)
    assert torch.equal(fm.q_sample_rf(x, torch.ones(()), z0), x)
    assert torch.equal(fm.q_sample_rf(x, torch.zeros(()), z0), z0)
    fm.trajectory = "cosine"
    torch.testing.assert_close(fm.q_sample_rf(x, torch.tensor(1 / 3), z0), 0.5 * x + 0.75**0.5 * z0)


@pytest.mark.parametrize("shape", [(4,), (4, 5)])
def test_q_sample_rf_keeps_masked_rows(small_model, shape):
    x, z0 = flow_inputs(4, 5, 3)
    mask = torch.arange(torch.Size(shape).numel()).reshape(shape) % 2
    got = small_model().fm.q_sample_rf(x, torch.tensor(0.25), z0, mask)
    for index in torch.cartesian_prod(*map(torch.arange, shape)).reshape(-1, len(shape)).tolist():
        at = tuple(index)
        moved = 0.25 * x[at] + 0.75 * z0[at]
        torch.testing.assert_close(got[at], moved if mask[at] else x[at])


def test_q_sample_rf_refuses_another_mask(small_model):
    x, z0 = flow_inputs(4, 5, 3)
    with pytest.raises(ValueError, match=r"mask must have .*\(4, 5, 3\), got \(5,\)"):
        small_model().fm.q_sample_rf(x, torch.tensor(0.5), z0, torch.ones(5))


# --- parts ----------------------------------------------------------------------------------


def test_sinusoid():
    got = sinusoid(torch.tensor([0.0, 999.0]), 6)
    frequencies = [10000 ** -(j / 3) for j in range(3)]
    angle = 999 * torch.tensor(frequencies, dtype=torch.float64)
    assert torch.equal(got[0], torch.tensor([1.0, 1, 1, 0, 0, 0]))
    expected = torch.cat((torch.cos(angle), torch.sin(angle)))
    torch.testing.assert_close(got[1].double(), expected, atol=1e-4, rtol=0)


def test_the_tap_counts_blocks_from_1(small_model):
    for last in range(3):
        assert small_model(last=last).fm.xstart_model.tap == 3 - last - 1


@pytest.mark.parametrize("precision", ["float32", "tf32", "bf16"])
def test_the_decoders_hidden_layers_in_training(isa, precision):
    """By the op `linear` on tiles, or where their operands are to be rounded."""
    config = {"item_num": 20, "decoder_dims": (48, 80), "precision": precision, "hidden_size": 32}
    torch.manual_seed(0)
    network = FMRecommender.from_config(config).fm.xstart_model
    first, second = network.decoder[0], network.decoder[2]
    tapped = torch.randn(70, 32, generator=torch.Generator().manual_seed(1))

    def definition(precision):
        inner = linear_reference(tapped, first.weight, first.bias, precision).tanh()
        return linear_reference(inner, second.weight, second.bias, precision).tanh()

    with dispatch_log() as log:
        got = network.train().decoder_hidden(tapped)
    ran = [(entry.op, entry.backend) for entry in log]
    if not isa.startswith("amx") and precision == "float32":
        assert ran == []
    else:
        backend = (
            Backend.REFERENCE if not isa.startswith("amx") and precision == "bf16" else Backend.CPP
        )
        assert ran == [("linear", backend)] * 2
    # 'tf32' is met or bettered; operands rounded to bfloat16 may round to a neighbour.
    atol = {"float32": 1e-6, "tf32": 5e-4, "bf16": 2e-3}[precision]
    torch.testing.assert_close(got, definition(precision), atol=atol, rtol=0)
    with dispatch_log() as log:
        got = network.eval().decoder_hidden(tapped)
    assert log == []
    torch.testing.assert_close(got, definition("float32"), atol=1e-6, rtol=0)


def test_initial_parameters():
    torch.manual_seed(0)
    model = FMRecommender.from_config({"item_num": 500, "decoder_dims": (300, 200)})
    block = model.fm.xstart_model.att.transformer_blocks[1]
    for layer in (block.attention.w_layer, block.feed_forward.w_1, block.feed_forward.w_2):
        xavier = (2 / sum(layer.weight.shape)) ** 0.5
        assert layer.weight.std().item() == pytest.approx(xavier, rel=0.03)
        assert layer.weight.abs().max() > 3 * xavier  # normal, not uniform
    assert (block.feed_forward.w_1.bias == 0).all() and (block.feed_forward.w_2.bias == 0).all()
    defaults = [*model.fm.xstart_model.decoder[::2], *block.attention.linear_layers]
    for layer in defaults:
        bound = layer.in_features**-0.5
        assert 0.98 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.abs().max() <= bound and layer.bias.std() > 0.4 * bound
    assert block.attention.w_layer.bias.std() > 0
    assert model.item_embeddings.weight.std().item() == pytest.approx(1, rel=0.02)
    assert model.item_embeddings.weight[0].abs().max() > 0  # padding is an ordinary row
    assert (model.LayerNorm.weight == 1).all() and (model.LayerNorm.bias == 0).all()


@pytest.mark.parametrize(
    "sequence, tag, error, message",
    [
        (torch.ones(4).long(), None, ValueError, r"sequence must be .*got \(4,\)"),
        (torch.ones(2, 0).long(), None, ValueError, r"L >= 1, got shape \(2, 0\)"),
        (torch.ones(2, 3), None, TypeError, "sequence must be int64, got torch.float32"),
        (torch.ones(2, 3).int(), None, TypeError, "got torch.int32"),
        (torch.tensor([[0, 61]]), None, ValueError, r"0 \.\. 60, got 61"),
        (torch.tensor([[0, -1]]), None, ValueError, "got -1"),
        (torch.ones(2, 3).long(), None, TypeError, "targets .*got None"),
        (torch.ones(2, 3).long(), torch.ones(2).long(), ValueError, r"tag must .*got \(2,\)"),
        (torch.ones(2, 3).long(), torch.ones(3, 1).long(), ValueError, r"got \(3, 1\)"),
        (torch.ones(2, 3).long(), torch.ones(2, 1), TypeError, "tag must be int64"),
        (torch.ones(1, 3).long(), torch.tensor([[0]]), ValueError, r"target .*1 \.\. 60, got 0"),
        (torch.ones(1, 3).long(), torch.tensor([[61]]), ValueError, "target .*got 61"),
    ],
)
def test_bad_inputs_are_named(small_model, sequence, tag, error, message):
    with pytest.raises(error, match=message):
        small_model()(sequence, tag)


@pytest.mark.parametrize("options, message", [({"seed": -1}, "got -1"), ({"seed": 1.5}, "1.5")])
def test_bad_seeds_are_named(small_model, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        small_model()(*make_sequences(2, 12, 61, 1), **options)
