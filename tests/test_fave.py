"""Fave: the golden vectors, the published program, the derivative of stage 2, what it draws."""

from __future__ import annotations

import argparse
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad

import fmrec_fast
from fmrec_fast import (
    Fave,
    FaveConfig,
    FaveDraws,
    FaveRecommender,
    FMRecommender,
    dispatch_log,
    extension,
    recommend,
    sample,
    scores,
    training_losses,
    use_backend,
    use_rng,
)
from fmrec_fast.backend import Backend
from fmrec_fast.compat import Att_Fave_model, create_model_Fave
from fmrec_fast.kernels.plans import WIDTHS
from fmrec_fast.models.fave import FaveStack
from fmrec_fast.ops import encoder
from fmrec_fast.randomness import random_source
from fmrec_fast.reference import encoder as definition
from fmrec_fast.reference.published_fave import PublishedFaveRecommender, PublishedFaveStack
from fmrec_fast.testing import assert_close_to_truth, make_sequences

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
EVERY = ("padding", "short", "long", "full")
STAGES = ("pretrain", "finetune")


@pytest.fixture(params=["reference", "auto"])
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def vectors(golden_arrays):
    arrays = golden_arrays("fave_tiny")
    args = {k.split("/")[1]: v.tolist() for k, v in arrays.items() if k.startswith("args/")}
    tensors = {k: torch.from_numpy(v) for k, v in arrays.items() if not k.startswith("args/")}
    state = {k.split("/", 1)[1]: v for k, v in tensors.items() if k.startswith("state/")}
    return SimpleNamespace(
        args=argparse.Namespace(**args, Loss_Alpha=0.5),
        state=state,
        **{"seq": tensors["in/seq"], "tag": tensors["in/tag"], "all": tensors},
    )


def golden_draws(vectors, stage) -> FaveDraws:
    given = vectors.all
    common = {"noise": given[f"{stage}/lambda"], "cells": given[f"{stage}/negatives"]}
    if stage == "stage1":
        return FaveDraws(z0=given["stage1/z0"], t=given["stage1/t"], **common)
    return FaveDraws(
        t=given["stage2/t"],
        r=given["stage2/r"],
        anchor=given["stage2/anchor_index"],
        keep=given["stage2/anchor_keep"],
        **common,
    )


def golden_model(vectors, stage, kind=FaveRecommender):
    model = kind.from_config(vectors.args)
    model.load_state_dict(vectors.state, strict=True)
    if stage == "stage2":
        model.switch_to_finetune()
    return model


def fave_args(small_args, **changes):
    added = {
        "drop_path_rate": 0.3,
        "gamma_init": 0.5,
        "train_mask_ratio": 0.5,
        "infer_mask_ratio": 0.6,
        "loss_aux_weight": 0.5,
        "loss_straight_weight": 0.1,
        "loss_pretrain_weight": 0.3,
        "mask_end": 0.5,
        "Loss_Alpha": 0.5,
    }
    return small_args(**{**added, **changes})


@pytest.fixture
def pair(small_args):
    """The published program and ours with the same weights, in a stage."""

    def make(stage="pretrain", **changes):
        args = fave_args(small_args, **changes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            peer = PublishedFaveRecommender.from_config(args)
            for name, parameter in peer.named_parameters():
                if "norm" in name.lower():
                    torch.nn.init.normal_(parameter, 0.5, 0.3)
        ours = FaveRecommender.from_config(args)
        ours.load_state_dict(peer.state_dict(), strict=True)
        if stage == "finetune":
            peer.switch_to_finetune()
            ours.switch_to_finetune()
        return peer, ours

    return make


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_golden_losses_and_gradients(vectors, backend, stage):
    model = golden_model(vectors, stage)
    draws = golden_draws(vectors, stage)
    losses = training_losses(model, vectors.seq, vectors.tag, draws=draws)
    flow = "loss_fm" if stage == "stage1" else "loss_match"
    names = {"flow": flow, "reconstruction": "loss_recon", "cross_entropy": "loss_ce"}
    names |= {"total": "loss"} | ({"straight": "loss_straight"} if stage == "stage2" else {})
    for name, key in names.items():
        expected = vectors.all[f"{stage}/{key}"]
        torch.testing.assert_close(getattr(losses, name), expected, **CLOSE)
    losses.total.backward()
    prefix = f"{stage}/grad/"
    wanted = {k[len(prefix) :]: v for k, v in vectors.all.items() if k.startswith(prefix)}
    for name, parameter in model.named_parameters():
        if name in wanted:
            torch.testing.assert_close(
                parameter.grad, wanted.pop(name), **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert parameter.grad is None or (parameter.grad == 0).all(), name
    assert not wanted


def test_golden_outputs_of_stage_1(vectors, backend):
    model, given = golden_model(vectors, "stage1"), vectors.all
    loss, x0, stage, *rest = model(vectors.seq, vectors.tag, draws=golden_draws(vectors, "stage1"))
    expected = (
        given["stage1/loss_fm"] + vectors.args.loss_pretrain_weight * given["stage1/loss_recon"]
    )
    torch.testing.assert_close(loss, expected, **CLOSE)
    torch.testing.assert_close(x0, given["stage1/rep"], **CLOSE)
    assert stage == "pretrain" and rest == [None] * 3
    e, mask = model.embed(vectors.seq)
    item_tag = model.item_embeddings(vectors.tag[:, 0])
    x0, decoded, *_ = model.fave(e, item_tag, mask, draws=golden_draws(vectors, "stage1"))
    torch.testing.assert_close(x0, given["stage1/rep"], **CLOSE)
    torch.testing.assert_close(decoded, given["stage1/decoded"], **CLOSE)


def test_golden_average_velocity(vectors, backend):
    model, given = golden_model(vectors, "stage2"), vectors.all
    e, mask = model.embed(vectors.seq)
    item_tag = model.item_embeddings(vectors.tag[:, 0])
    source = random_source(6, e.device, seed=0)
    draws = golden_draws(vectors, "stage2")
    u, dudt, _, x1 = model.fave.average_velocity(e, item_tag, mask, source, draws)
    torch.testing.assert_close(u, given["stage2/u"], **CLOSE)
    torch.testing.assert_close(dudt, given["stage2/dudt"], **CLOSE)
    torch.testing.assert_close(x1, given["stage2/x1"], **CLOSE)
    _, x1, *rest = model(vectors.seq, vectors.tag, draws=draws)
    torch.testing.assert_close(x1, given["stage2/x1"], **CLOSE)
    assert rest == [None] * 4


def test_golden_one_step(vectors, backend):
    model, given = golden_model(vectors, "stage2").eval(), vectors.all
    explicit = {"z0": given["onestep/z0"], "noise": given["onestep/lambda"][None]}
    torch.testing.assert_close(sample(model, vectors.seq, **explicit), given["onestep/x1"], **CLOSE)
    found = scores(model, vectors.seq, **explicit)
    torch.testing.assert_close(found, given["onestep/scores"], **CLOSE)
    with torch.no_grad():
        _, x1, *_, z0 = model(vectors.seq, None, train_flag=False, draws=FaveDraws(**explicit))
        e, mask = model.embed(vectors.seq)
    torch.testing.assert_close(x1, given["onestep/x1"], **CLOSE)
    assert z0 is explicit["z0"]
    assert model.fave.euler_sampler(e, mask, z0, "finetune")[1] == 1
    assert model.fave.euler_sampler(e, mask, z0)[1] == vectors.args.sample_N
    # The anchor and its mask, as stage 2 draws them, give the start.
    draws = FaveDraws(anchor=given["stage2/anchor_index"], keep=given["stage2/anchor_keep"])
    source = random_source(6, e.device, seed=0)
    assert model.start(e, mask, source, draws).shape == z0.shape


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_the_peer_has_the_golden_numbers(vectors, stage):
    peer = golden_model(vectors, stage, PublishedFaveRecommender)
    draws = golden_draws(vectors, stage)
    loss = peer.training_loss(
        vectors.seq,
        vectors.tag,
        z0=draws.z0,
        t=draws.t,
        r=draws.r,
        anchor=draws.anchor,
        keep=draws.keep,
        lam=draws.noise,
        negatives=draws.cells,
    )
    torch.testing.assert_close(loss, vectors.all[f"{stage}/loss"], **CLOSE)
    loss.backward()
    for name, parameter in peer.named_parameters():
        if f"{stage}/grad/{name}" in vectors.all:
            torch.testing.assert_close(parameter.grad, vectors.all[f"{stage}/grad/{name}"], **CLOSE)
    if stage == "stage2":
        given = vectors.all
        with torch.no_grad():
            z0, lam = given["onestep/z0"], given["onestep/lambda"][None]
            _, x1, *_ = peer.eval()(vectors.seq, None, train_flag=False, z0=z0, lam=lam)
        torch.testing.assert_close(peer.fave_rep_pre(x1), given["onestep/scores"], **CLOSE)


def test_state_dicts_interchange_both_ways(pair, small_args):
    peer, ours = pair()
    assert list(ours.state_dict()) == list(peer.state_dict())
    PublishedFaveRecommender.from_config(fave_args(small_args)).load_state_dict(ours.state_dict())
    prefixed = {f"module.{name}": value for name, value in peer.state_dict().items()}
    fresh = FaveRecommender.from_config(fave_args(small_args))
    fresh.load_state_dict(prefixed, strict=True)
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, peer.state_dict()[name])
    with pytest.raises(RuntimeError, match="Missing key"):
        fresh.load_state_dict({"module.LayerNorm.weight": prefixed["module.LayerNorm.weight"]})


def test_published_interface(small_args):
    args = fave_args(small_args)
    model = Att_Fave_model(create_model_Fave(args), args)
    assert isinstance(model.fave, Fave) and isinstance(model, FMRecommender)
    assert model.stage == "pretrain" and model.fave.steps == args.sample_N
    assert model.item_embeddings.weight.requires_grad
    model.switch_to_finetune()
    assert model.stage == "finetune" and model.fave.steps == 1
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"item_embeddings.weight", "position_embeddings.weight"}
    rep, tag = torch.randn(3, 32), torch.tensor([[1], [2], [3]])
    expected = torch.nn.functional.cross_entropy(model.fave_rep_pre(rep), tag[:, 0])
    torch.testing.assert_close(model.loss_fave_tat(rep, tag), expected)
    with pytest.raises(ValueError, match=r"stage must be one of .*'third'"):
        model.stage = "third"
    assert "Fave" in fmrec_fast.__all__


@pytest.mark.parametrize("stage", STAGES)
def test_same_seed_same_numbers_as_published(pair, backend, stage):
    """All dropouts and drop path on: the draws come in the published order."""
    peer, ours = pair(stage)
    sequence, target = make_sequences(8, 12, 61, 1, histories=EVERY)
    torch.manual_seed(11)
    expected = peer.train().training_loss(sequence, target)
    expected.backward()
    torch.manual_seed(11)
    with use_rng("published"):
        losses = training_losses(ours.train(), sequence, target)
    losses.total.backward()
    torch.testing.assert_close(losses.total, expected, **CLOSE)
    wanted = dict(peer.named_parameters())
    for name, parameter in ours.named_parameters():
        if wanted[name].grad is None:
            assert parameter.grad is None or (parameter.grad == 0).all(), name
        else:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=2e-5, rtol=1e-3)
    peer.eval(), ours.eval()
    torch.manual_seed(3)
    with torch.no_grad():
        _, x1, *_ = peer(sequence, None, train_flag=False)
    torch.manual_seed(3)
    with use_rng("published"):
        torch.testing.assert_close(sample(ours, sequence), x1, **CLOSE)


@pytest.mark.parametrize("attention", ["published", "causal"])
def test_cross_attention_state(pair, backend, attention):
    """Run only when asked; with gradients of all its parameters."""
    peer, ours = pair(attention=attention)
    generator = torch.Generator().manual_seed(1)
    item_rep = torch.randn(5, 12, 32, generator=generator)
    x = torch.randn(5, 32, generator=generator)
    t = torch.rand(5, generator=generator) * 999
    r, mask = torch.full((5,), 999.0), (make_sequences(5, 12, 61, 1).sequence > 0).float()
    lam = torch.randn(5, 12, 32, generator=generator) * 0.1
    network, theirs = ours.fave.xstart_model, peer.fave.xstart_model
    ours.eval(), peer.eval()
    plain, _ = network(item_rep, x, t, r, mask, noise=lam)
    outputs = network(item_rep, x, t, r, mask, "finetune", noise=lam)
    assert not torch.allclose(plain, outputs[0], atol=1e-3)
    if attention == "causal":  # the published program has no such attention
        return
    expected = theirs(item_rep, x, t, r, mask, "finetune", lam)
    torch.testing.assert_close(outputs, expected, **CLOSE)
    sum(o.square().sum() for o in outputs).backward()
    sum(o.square().sum() for o in expected).backward()
    wanted = dict(theirs.named_parameters())
    crossed = 0
    for name, parameter in network.named_parameters():
        if wanted[name].grad is not None:
            torch.testing.assert_close(parameter.grad, wanted[name].grad, atol=1e-3, rtol=1e-3)
            crossed += "cross_attention" in name or "gamma" in name or "se_" in name
    assert crossed == 3 * 12
    torch.testing.assert_close(
        network(item_rep, x, t, r, mask, noise=lam),
        theirs(item_rep, x, t, r, mask, lam=lam),
        **CLOSE,
    )


def float64_derivative(model, e, item_tag, mask, draws, source):
    """du/dt by central differences in float64."""
    core, h = model.double().fave, 1e-5
    e, item_tag, mask = e.double(), item_tag.double(), mask.double()
    t, r = draws.t.double(), draws.r.double()
    z_a = core.anchor(e, mask, source, 0.5, draws)
    v = item_tag - z_a

    def f(shift):
        z = t[:, None] * item_tag + (1 - t)[:, None] * z_a + shift * v
        at = core.time_scale * (t + shift)
        noise = draws.noise.double()
        paths = None if draws.paths is None else draws.paths.double()
        network = core.xstart_model
        return network.predict(e, z, at, mask, source, noise, r=core.time_scale * r, paths=paths)[0]

    return (f(h) - f(-h)) / (2 * h)


def test_the_derivative_is_that_of_finite_differences(pair, backend, monkeypatch):
    """Under dropout and drop path, whose draws do not move with t."""
    _, ours = pair("finetune", lambda_uncertainty=0.1)
    monkeypatch.setattr("fmrec_fast.models.fave.sinusoid", float64_sinusoid)
    sequence, target = make_sequences(5, 12, 61, 1, histories=EVERY)
    generator = torch.Generator().manual_seed(1)
    t = torch.rand(5, generator=generator) * 0.2
    draws = FaveDraws(
        t=t,
        r=t + 0.1,
        anchor=torch.tensor([11, 3, 10, 0, 5]),
        keep=torch.rand(5, 32, generator=generator) < 0.5,
        noise=torch.randn(5, 12, 32, generator=generator) * 0.3,
        paths=(torch.rand(3, 3, 5, generator=generator) < 0.7) / 0.7,
    )
    ours.train()
    with torch.no_grad():
        e, mask = ours.embed(sequence)
        item_tag = ours.item_embeddings(target[:, 0])
        source = random_source(5, e.device, seed=9)
        with dispatch_log() as log:
            _, dudt, _, _ = ours.fave.average_velocity(e, item_tag, mask, source, draws)
    assert {entry.op for entry in log} >= {"encoder", "linear", "attention", "dropout"}
    if backend == "auto":
        for entry in log:
            assert entry.backend is Backend.CPP or entry.reason, entry
    with torch.no_grad(), use_backend("reference"):
        truth = float64_derivative(ours, e, item_tag, mask, draws, source)
    torch.testing.assert_close(dudt.double(), truth, atol=2e-4, rtol=2e-4)


def float64_sinusoid(t, width):
    half = width // 2
    exponent = torch.arange(half, dtype=t.dtype) / half
    angle = t[:, None] * torch.exp(-torch.log(torch.tensor(10000.0, dtype=t.dtype)) * exponent)
    return torch.cat((torch.cos(angle), torch.sin(angle)), dim=-1)


@pytest.mark.parametrize("stage", STAGES)
def test_backends_agree_on_a_training_step(pair, stage):
    _, model = pair(stage, lambda_uncertainty=0.1)
    sequence, target = make_sequences(8, 12, 61, 1, histories=EVERY)
    results = []
    for backend in ("reference", "auto"):
        model.zero_grad()
        with use_backend(backend):
            losses = training_losses(model.train(), sequence, target, seed=5)
            losses.total.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((losses, grads))
    torch.testing.assert_close(results[0][0].total, results[1][0].total, atol=1e-5, rtol=1e-5)
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, atol=2e-5, rtol=1e-3)


def test_functions_of_torch_func_run_the_definitions(pair):
    """Inside a transform of torch.func no kernel can read the tensors; the log says so."""
    _, ours = pair()
    network = ours.eval().fave.xstart_model
    item_rep, z, v = torch.randn(5, 12, 32), torch.randn(5, 32), torch.randn(5, 32)
    t, r, mask = torch.rand(5), torch.ones(5), torch.ones(5, 12)
    lam = torch.randn(5, 12, 32) * 0.1

    def f(z):
        return network(item_rep, z, t, r, mask, noise=lam)[0]

    with dispatch_log() as log, torch.no_grad():
        _, theirs = torch.func.jvp(f, (z,), (v,))
    declined = [entry for entry in log if entry.op in ("encoder", "linear", "attention")]
    assert declined and all(
        entry.backend is Backend.REFERENCE and entry.reason for entry in declined
    )
    with forward_ad.dual_level(), torch.no_grad():
        ours_dual = forward_ad.unpack_dual(f(forward_ad.make_dual(z, v))).tangent
        torch.testing.assert_close(ours_dual, theirs, **CLOSE)


def test_a_row_draws_the_same_in_any_batch(pair):
    _, model = pair("finetune", lambda_uncertainty=0.1)
    sequence, target = make_sequences(9, 12, 61, 1, histories=EVERY)
    order = torch.tensor([7, 2, 0, 5])
    with torch.no_grad():
        whole = model(sequence, target, seed=5)[1]
        part = model(sequence[order], target[order], seed=5, rows=order)[1]
    torch.testing.assert_close(part, whole[order], atol=1e-5, rtol=1e-5)
    whole = sample(model, sequence, seed=5)
    part = sample(model, sequence[order], seed=5, rows=order)
    torch.testing.assert_close(part, whole[order], atol=1e-5, rtol=1e-5)


def test_draws_have_their_distributions(pair):
    """Over many rows: r at 1 with chance mask_end, else uniform above t; keep; drop path."""
    _, model = pair("finetune")
    source = random_source(4000, torch.device("cpu"), seed=3)
    where, at_end = source.interval()
    assert abs(where.mean() - 0.5) < 0.03 and abs((at_end < 0.75).float().mean() - 0.75) < 0.03
    u, keep = source.anchor(32, 0.6)
    assert u.shape == (4000,) and abs(u.mean() - 0.5) < 0.03
    assert keep.shape == (4000, 32) and abs(keep.float().mean() - 0.6) < 0.01
    paths = model.train().fave.xstart_model.paths(source, None)
    assert paths(0, 0) is None  # the first block has none
    factor = paths(2, 0)
    values, counts = factor.unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.7]))
    assert abs(counts[0] / 4000 - 0.3) < 0.03
    assert not torch.equal(factor, paths(2, 2)) and not torch.equal(factor, paths(1, 0))


@pytest.mark.parametrize("anchor", ["published", "history"])
def test_anchor(pair, anchor):
    """Published: counted from the left edge. History: from the first real item."""
    _, model = pair("finetune", anchor=anchor)
    count = 200
    mask = (torch.arange(12) >= torch.tensor([12, 9, 0])[:, None]).float().repeat(count, 1)
    positions = torch.arange(12.0)[None, :, None].expand(3 * count, 12, 32) + 1
    source = random_source(3 * count, mask.device, seed=1)
    got = model.fave.anchor(positions, mask, source, 1.0, FaveDraws())[:, 0].view(count, 3) - 1
    empty, short, full = (set(column.tolist()) for column in got.T)
    assert full == set(range(12))
    if anchor == "published":
        assert empty == {0} and short == {0, 1, 2}
    else:
        assert empty == {11} and short == {9, 10, 11}


def test_one_step_by_displacement(pair, backend):
    _, published = pair("finetune")
    _, displaced = pair("finetune", onestep="displacement")
    sequence = make_sequences(5, 12, 61, 1).sequence
    z0 = torch.randn(5, 32)
    with torch.no_grad():
        u = sample(published, sequence, z0=z0, seed=1)
        torch.testing.assert_close(sample(displaced, sequence, z0=z0, seed=1), z0 + u, **CLOSE)
    displaced.stage = "pretrain"
    published.stage = "pretrain"
    expected = sample(published, sequence, z0=z0, seed=1)
    torch.testing.assert_close(sample(displaced, sequence, z0=z0, seed=1), expected)


def test_recommend_takes_the_steps_of_the_stage(pair):
    _, model = pair()
    many = recommend(model, [[1, 2, 3], [4]], 5, seed=1)
    with dispatch_log() as log:
        model.switch_to_finetune()
        one = recommend(model, [[1, 2, 3], [4]], 5, seed=1)
    assert many.ids.shape == one.ids.shape == (2, 5)
    assert not torch.equal(many.scores, one.scores)
    assert [entry.op for entry in log].count("euler_sampler") == 1
    again = recommend(model, [[1, 2, 3], [4]], 5, seed=1, steps=1)
    assert torch.equal(again.scores, one.scores)


def test_an_empty_batch(pair):
    _, model = pair("finetune")
    sequence = torch.zeros(0, 12, dtype=torch.int64)
    assert sample(model, sequence).shape == (0, 32)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stage_mode": "second"}, "stage_mode must be one of .*'second'"),
        ({"anchor": "left"}, "anchor must be one of .*'left'"),
        ({"mask_end": 1.5}, r"mask_end must be in \[0, 1\], got 1.5"),
        ({"drop_path_rate": 1.0}, "drop_path_rate must be less than 1"),
        ({"clip_norm": 0.0}, "clip_norm must be positive"),
        ({"trajectory": "cosine"}, "trajectory must be one of .*'straight'"),
        ({"hidden_size": 12, "num_heads": 4}, "must be even"),
        ({"loss_aux_weight": -1.0}, "loss_aux_weight must be at least 0"),
        ({"ckpt_path": 3}, "ckpt_path must be a path or None"),
    ],
)
def test_settings_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        FaveConfig(**changes)


def test_defaults_that_differ():
    config = FaveConfig()
    assert (config.emb_dropout, config.Loss_Alpha, config.epochs) == (0.0, 0.5, 200)
    assert (config.eval_interval, config.metric_ks, config.patience) == (1, (10, 20), 5)
    assert FaveConfig.from_dict(config.to_dict()) == config


def fave_stack(width, blocks=2):
    """Ours and the published stack with the same weights."""
    args = argparse.Namespace(
        hidden_size=width,
        num_blocks=blocks,
        last=0,
        dropout=0.0,
        drop_path_rate=0.0,
        gamma_init=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        peer = PublishedFaveStack(args).eval()
        for parameter in peer.parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, 0.3, 0.5)
    config = FaveConfig(hidden_size=width, num_blocks=blocks, last=0)
    ours = FaveStack(config)
    ours.load_state_dict(peer.state_dict())
    return ours, peer


def declining(width):
    return set() if width in WIDTHS else {Backend.TRITON}


@pytest.mark.op("encoder")
@pytest.mark.parametrize("shape", [(1, 1, 32), (5, 50, 96), (3, 51, 24), (5, 7, 32)])
def test_the_encoder_in_this_variant(place, shape):
    batch, length, width = shape
    ours, peer = fave_stack(width)
    sequence = make_sequences(batch, length, 50, 1, histories=EVERY).sequence
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mask = (sequence > 0).float()
    same = peer(x, x, mask, "pretrain", None)
    truth = peer.double()(x.double(), x.double(), mask.double(), "pretrain", None)
    x, mask = place.put(x, mask)
    ours.to(place.device)
    with torch.no_grad(), place.forced("encoder", declines=declining(width)):
        out, tapped = ours(x, mask, tap=1)
    for got in (out, tapped):
        assert_close_to_truth(got.cpu(), same[0][:, -1], truth[0][:, -1])


@pytest.mark.op("euler_sampler")
@pytest.mark.parametrize("steps", [1, 2])
def test_the_sampler_in_this_variant(place, pair, steps):
    """A row is the same in any batch, to the last bit."""
    _, model = pair("finetune", lambda_uncertainty=0.1, emb_dropout=0.0)
    model.eval().to(place.device)
    batch = 3 if place.backend is Backend.TRITON else 37  # which may be interpreted
    sequence = make_sequences(batch, 12, 61, 1, histories=EVERY).sequence
    z0 = torch.randn(batch, 32, generator=torch.Generator().manual_seed(1))
    (sequence, z0) = place.put(sequence, z0)
    with place.forced("euler_sampler"):
        whole = sample(model, sequence, z0=z0, seed=1, steps=steps)
    with use_backend("reference"):
        expected = sample(model, sequence, z0=z0, seed=1, steps=steps)
    torch.testing.assert_close(whole, expected, **CLOSE)
    if place.backend is Backend.CPP:
        rows = torch.tensor([3])
        assert torch.equal(
            sample(model, sequence[3:4], z0=z0[3:4], seed=1, rows=rows, steps=steps), whole[3:4]
        )


@pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))
def test_every_instruction_set_has_this_variant(pair):
    _, model = pair("finetune", lambda_uncertainty=0.1)
    sequence = make_sequences(7, 12, 61, 1, histories=EVERY).sequence
    with use_backend("reference"):
        expected = sample(model, sequence, seed=1)
    kernels = extension.load()
    before = kernels.isa()
    try:
        for isa in kernels.supported_isas():
            kernels.set_isa(isa)
            torch.testing.assert_close(sample(model, sequence, seed=1), expected, **CLOSE)
    finally:
        kernels.set_isa(before)


def test_the_kernels_arguments_are_checked(pair):
    _, model = pair()
    blocks = model.fave.xstart_model.att.weights()
    arrays = [
        tuple(None if part is None else part.detach().numpy() for part in block[:-1])
        for block in blocks
    ]
    if not extension.available():
        pytest.skip(str(extension.reason()))
    C = extension.load()
    with pytest.raises(ValueError, match=r"rotary must have shape \[L, D / num_heads\]"):
        C.PackedEncoder(arrays, 4, torch.zeros(12, 7).numpy())
    mixed = [(*arrays[0][:1], arrays[0][0], *arrays[0][2:])]
    with pytest.raises(ValueError, match="all norms must have a bias or none"):
        C.PackedEncoder(mixed, 4, None)
    packed = C.PackedEncoder(arrays, 4, torch.zeros(11, 8).numpy())
    x, mask, out = torch.zeros(2, 12, 32), torch.zeros(2, 12), torch.zeros(2, 32)
    with pytest.raises(ValueError, match="rotary must be for L = 12 positions, got 11"):
        C.encoder_forward(packed, x.numpy(), mask.numpy(), -1, out.numpy(), None, 1)


@pytest.mark.op("encoder")
def test_blocks_that_rotate_differently(place):
    """The Triton kernel has angles for every block; the C++ one declines."""
    ours, _ = fave_stack(32, blocks=3)
    ours.transformer_blocks[1].attention.rope.inv_freq.mul_(2)
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), use_backend("reference"):
        expected, _ = ours(x, torch.ones(2, 7))
    ours.to(place.device)
    x, mask = place.put(x, torch.ones(2, 7))
    with torch.no_grad(), place.forced("encoder", declines={Backend.CPP}):
        out, _ = ours(x, mask)
    torch.testing.assert_close(out.cpu(), expected, **CLOSE)


@pytest.mark.op("encoder")
@pytest.mark.parametrize("heads, precision", [(1, "float32"), (16, "float32"), (4, "bf16")])
def test_heads_and_precisions_of_this_variant(place, heads, precision):
    """Heads narrower and wider than a matrix unit; as close to float64 as the definition."""
    config = FaveConfig(hidden_size=32, num_blocks=2, num_heads=heads, last=0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(heads)
        ours = FaveStack(config)
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[0.0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    weights = ours.weights()
    options = {"num_heads": heads, "variant": definition.FAVE}
    with torch.no_grad():
        same, _ = definition.encoder(x, mask, weights, precision=precision, **options)
        double = [type(w)(*(None if t is None else t.double() for t in w)) for w in ours.weights()]
        truth, _ = definition.encoder(x.double(), mask.double(), double, **options)
        local = [type(w)(*(None if t is None else t.to(place.device) for t in w)) for w in weights]
        with place.forced("encoder"):
            got, _ = encoder(*place.put(x, mask), local, precision=precision, **options)
    assert_close_to_truth(got.cpu(), same, truth)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_angles_of_another_width_are_refused():
    from fmrec_fast.kernels.launch import rotations

    blocks = fave_stack(32)[0].weights()
    assert rotations(blocks, 5, 32, 4).shape == (2, 2, 5, 4)
    with pytest.raises(ValueError, match=r"inv_freq of the blocks must be \[\(8,\), \(8,\)\]"):
        rotations(blocks, 5, 64, 4)
