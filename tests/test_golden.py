"""The published program's numbers, from explicit random draws: tests/golden/fmrec_*.npz."""

from __future__ import annotations

import pytest
import torch

from fmrec_fast import FMRecommender, TrainingDraws, sample, scores, training_losses, use_backend
from fmrec_fast.reference.published import PublishedRecommender

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


@pytest.fixture(params=["reference", "auto"], autouse=True)
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def tiny(golden):
    vectors = golden("fmrec_tiny")
    model = FMRecommender.from_config(vectors.args)
    model.load_state_dict(vectors.state, strict=True)
    train = vectors.train
    draws = TrainingDraws(train["z0"], train["t"], train["lambda"], train["negatives"])
    return model, vectors, draws


@pytest.fixture(params=["fmrec_tiny", "fmrec_paper_size"])
def sampling(request, golden):
    vectors = golden(request.param)
    model = FMRecommender.from_config(vectors.args).eval()
    missing, unexpected = model.load_state_dict(vectors.state, strict=False)
    assert not unexpected
    if request.param == "fmrec_tiny":
        assert not missing
    else:  # sampling does not read the decoder, so its weights are not stored
        decoder = {
            f"fm.xstart_model.decoder.{i}.{p}" for i in (0, 2, 4) for p in ("weight", "bias")
        }
        assert set(missing) == decoder
    return model, vectors


def test_training_outputs(tiny):
    model, vectors, draws = tiny
    recon, x0, repeated, t, loss_fm, z0 = model(vectors.inputs.seq, vectors.inputs.tag, draws=draws)
    torch.testing.assert_close(x0, vectors.train["rep"], **CLOSE)
    torch.testing.assert_close(recon, vectors.train["loss_recon"], **CLOSE)
    torch.testing.assert_close(loss_fm, vectors.train["loss_fm"], **CLOSE)
    assert torch.equal(t, vectors.train["t"]) and torch.equal(z0, vectors.train["z0"])
    assert torch.equal(repeated, t[:, None].expand(6, 32))


def test_decoded_history(tiny):
    model, vectors, draws = tiny
    e, mask = model.embed(vectors.inputs.seq)
    item_tag = model.item_embeddings(vectors.inputs.tag[:, 0])
    x0, decoded, _, _, _ = model.fm(e, item_tag, mask, draws=draws)
    torch.testing.assert_close(x0, vectors.train["rep"], **CLOSE)
    torch.testing.assert_close(decoded, vectors.train["decoded"], **CLOSE)


def test_losses(tiny):
    model, vectors, draws = tiny
    losses = training_losses(model, vectors.inputs.seq, vectors.inputs.tag, draws=draws)
    torch.testing.assert_close(losses.total, vectors.train["loss"], **CLOSE)
    torch.testing.assert_close(losses.flow, vectors.train["loss_fm"], **CLOSE)
    torch.testing.assert_close(losses.cross_entropy, vectors.train["loss_ce"], **CLOSE)
    torch.testing.assert_close(losses.reconstruction, vectors.train["loss_recon"], **CLOSE)


def test_gradients_of_every_parameter(tiny):
    model, vectors, draws = tiny
    training_losses(model, vectors.inputs.seq, vectors.inputs.tag, draws=draws).total.backward()
    parameters = dict(model.named_parameters())
    assert set(vectors.grad) <= set(parameters)
    for name, parameter in parameters.items():
        if name in vectors.grad:
            torch.testing.assert_close(
                parameter.grad, vectors.grad[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
            )
        else:
            assert parameter.grad is None or (parameter.grad == 0).all(), name
    assert len(vectors.grad) > 70


def test_whole_trajectory(sampling):
    model, vectors = sampling
    given = vectors.sample
    with torch.no_grad():
        e, mask = model.embed(vectors.inputs.seq)
    points = model.fm.integrate(e, mask, given["z0"], noise=given["lambda"], return_trajectory=True)
    torch.testing.assert_close(points, given["trajectory"], **CLOSE)


def test_scores(sampling):
    model, vectors = sampling
    given = vectors.sample
    explicit = {"z0": given["z0"], "noise": given["lambda"]}
    sequence = vectors.inputs.seq
    rep = sample(model, sequence, **explicit)
    torch.testing.assert_close(rep, given["trajectory"][-1], **CLOSE)
    torch.testing.assert_close(scores(model, sequence, **explicit), given["scores"], **CLOSE)
    with torch.no_grad():
        _, x1, _, _, _, z0 = model(
            sequence, None, train_flag=False, draws=TrainingDraws(**explicit)
        )
        torch.testing.assert_close(model.fm_rep_pre(x1), given["scores"], **CLOSE)
    assert torch.equal(z0, given["z0"])


def test_the_peer_has_the_same_numbers(tiny):
    """`reference.published`, which other tests lean on, is held to the same vectors."""
    _, vectors, draws = tiny
    peer = PublishedRecommender.from_config(vectors.args)
    peer.load_state_dict(vectors.state, strict=True)
    loss = peer.training_loss(
        vectors.inputs.seq,
        vectors.inputs.tag,
        z0=draws.z0,
        t=draws.t,
        lam=draws.noise,
        negatives=draws.cells,
    )
    torch.testing.assert_close(loss, vectors.train["loss"], **CLOSE)
    loss.backward()
    for name, parameter in peer.named_parameters():
        if name in vectors.grad:
            torch.testing.assert_close(parameter.grad, vectors.grad[name], **CLOSE)
    given = vectors.sample
    with torch.no_grad():
        _, x1, *_ = peer.eval()(
            vectors.inputs.seq, None, train_flag=False, z0=given["z0"], lam=given["lambda"]
        )
        torch.testing.assert_close(peer.fm_rep_pre(x1), given["scores"], **CLOSE)
