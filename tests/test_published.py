"""Against the published program: same seed, same numbers; its trainer with one import changed."""

from __future__ import annotations

import copy

import pytest
import torch

import fmrec_fast
from fmrec_fast import FMRecommender, sample, scores, training_losses, use_backend, use_rng
from fmrec_fast.compat import Att_FM_model, create_model_FM
from fmrec_fast.reference.published import PublishedFMRec, PublishedRecommender
from fmrec_fast.testing import make_sequences

EVERY = ("padding", "short", "long", "full")
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def pair(args, seed=0):
    """The published program and ours, with the same weights."""
    torch.manual_seed(seed)
    peer = PublishedRecommender.from_config(args)
    ours = FMRecommender.from_config(args)
    ours.load_state_dict(peer.state_dict(), strict=True)
    return peer, ours


@pytest.fixture(params=["reference", "auto"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def test_state_dicts_interchange_both_ways(small_args):
    peer, ours = pair(small_args())
    fresh = PublishedRecommender.from_config(small_args())
    fresh.load_state_dict(ours.state_dict(), strict=True)
    for a, b in zip(fresh.state_dict().items(), peer.state_dict().items()):
        assert a[0] == b[0] and torch.equal(a[1], b[1])
    assert list(ours.state_dict()) == list(peer.state_dict())
    ours.fm.load_state_dict(peer.fm.state_dict(), strict=True)


@pytest.mark.parametrize("mask_ratio", [0.0, 1.0, 2.5])
def test_same_seed_same_loss_and_gradients(small_args, backend, mask_ratio):
    peer, ours = pair(small_args(mask_ratio=mask_ratio))
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
            torch.testing.assert_close(
                parameter.grad, wanted[name].grad, **CLOSE, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_torchs_generator_stands_where_the_published_program_leaves_it(small_args, backend):
    """Whatever is drawn next is the same too, so a whole run stays in step."""
    peer, ours = pair(small_args())
    sequence, target = make_sequences(8, 12, 61, 1, histories=EVERY)
    after = []
    for model in (peer, ours):
        torch.manual_seed(5)
        with use_rng("published"):
            model.train()(sequence, target)
            after.append(torch.rand(()))
            with torch.no_grad():
                model.eval()(sequence, target, train_flag=False)
            after.append(torch.rand(()))
    assert after[:2] == after[2:]


def test_same_seed_same_scores(small_args, backend):
    peer, ours = pair(small_args())
    sequence, target = make_sequences(40, 12, 61, 2, histories=EVERY)
    peer.eval(), ours.eval()
    with torch.no_grad(), use_rng("published"):
        torch.manual_seed(3)
        _, rep, *_ = peer(sequence, target, train_flag=False)
        expected = peer.fm_rep_pre(rep)
        torch.manual_seed(3)
        _, rep, *_ = ours(sequence, target, train_flag=False)
        torch.testing.assert_close(ours.fm_rep_pre(rep), expected, **CLOSE)
        torch.manual_seed(3)
        torch.testing.assert_close(scores(ours, sequence), expected, **CLOSE)


def test_same_seed_same_scores_with_dropout_on(small_args, backend):
    """The published program samples through its dropouts if it is left in training mode."""
    peer, ours = pair(small_args())
    sequence, target = make_sequences(8, 12, 61, 2, histories=EVERY)
    with torch.no_grad(), use_rng("published"):
        torch.manual_seed(3)
        _, expected, *_ = peer.train()(sequence, target, train_flag=False)
        torch.manual_seed(3)
        _, rep, *_ = ours.train()(sequence, target, train_flag=False)
    torch.testing.assert_close(rep, expected, **CLOSE)


def test_the_published_draws_differ_from_the_streams(small_args):
    """Else the tests above would say nothing about the source of randomness."""
    _, ours = pair(small_args(lambda_uncertainty=0.5))
    sequence, _ = make_sequences(4, 12, 61, 2)
    torch.manual_seed(3)
    with use_rng("published"):
        published = sample(ours.eval(), sequence)
    torch.manual_seed(3)
    assert not torch.allclose(sample(ours, sequence), published, atol=1e-3)


def trainer(args, joint_model, create_model):
    """The published trainer in miniature; returns all that it prints."""
    torch.manual_seed(args.random_seed)
    device = torch.device(args.device)
    fm = create_model(args)
    model = joint_model(fm, args)
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.2)
    model = model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, args.decay_step, args.gamma)
    best, best_loss, printed = None, float("inf"), []
    batches = [make_sequences(8, args.max_len, args.item_num, i) for i in range(3)]
    torch.manual_seed(2)
    for _ in range(args.epochs):
        model.train()
        for sequence, target in batches:
            optimizer.zero_grad()
            recon, rep, _, _, loss_fm, _ = model(
                sequence.to(device), target.to(device), train_flag=True
            )
            loss_ce = model.loss_fm_ce(rep, target.to(device))
            loss = loss_fm + args.Loss_Alpha * loss_ce + args.Loss_Beta * recon
            loss.backward()
            optimizer.step()
            printed.append(float(loss.detach()))
        scheduler.step()
        model.eval()
        with torch.no_grad():
            total = 0.0
            for sequence, target in batches:
                _, rep, *_ = model(sequence.to(device), target.to(device), train_flag=False)
                predicted = model.fm_rep_pre(rep)
                total += float(torch.nn.functional.cross_entropy(predicted, target[:, 0]))
        printed.append(total)
        if total < best_loss:
            best, best_loss = copy.deepcopy(model), total
    best = best.to(device)
    best.fm.sample_N = args.test_steps
    best.eval()
    with torch.no_grad():
        _, rep, *_ = best(batches[0][0].to(device), None, train_flag=False)
        printed += best.fm_rep_pre(rep).flatten().tolist()
    return printed, best, optimizer


def test_the_published_trainer_with_one_import_changed(small_args, monkeypatch):
    monkeypatch.setenv("FMREC_FAST_RNG", "published")
    args = small_args(
        device="cpu", lr=0.001, weight_decay=0, decay_step=2, gamma=0.1, epochs=4, random_seed=1997,
        optimizer="Adam", momentum=None, num_gpu=1, log_file="log/", dataset="beauty",
        hidden_act="gelu", lambda_t=0.1, dropout_c=0.1, diffusion_steps=32, split_onebyone=True,
        metric_ks=[5, 10, 20], batch_size=512, eval_interval=20, patience=5, test_steps=9,
    )  # fmt: skip
    expected, _, _ = trainer(args, PublishedRecommender, PublishedFMRec)
    printed, model, optimizer = trainer(args, Att_FM_model, create_model_FM)
    assert len(printed) == len(expected) == 4 * 4 + 8 * 61
    torch.testing.assert_close(
        torch.tensor(printed[:16]), torch.tensor(expected[:16]), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        torch.tensor(printed[16:]), torch.tensor(expected[16:]), atol=1e-3, rtol=1e-3
    )
    assert sum(printed[:3]) > sum(printed[4:7])  # it learns
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)
    assert model.fm.sample_N == 9
    PublishedRecommender.from_config(args).load_state_dict(model.state_dict(), strict=True)


def test_the_published_names(small_args):
    args = small_args()
    fm = create_model_FM(args)
    model = Att_FM_model(fm, args)
    assert isinstance(fm, fmrec_fast.FMRec) and model.fm is fm
    sequence, target = make_sequences(3, 12, 61, 1)
    e, mask = model.eval().embed(sequence)
    z0 = torch.zeros(3, 32)
    with torch.no_grad():
        torch.manual_seed(1)
        x, nfe = fm.euler_sampler(e, mask, z0)
        torch.manual_seed(1)
        assert torch.equal(fm.reverse_p_sample_rf(e, z0, mask), x)
        torch.manual_seed(1)
        assert torch.equal(model.reverse(e, z0, mask), x)
    assert nfe == 5
    # The positional arguments of the published forward.
    assert len(model(sequence, target, 0, True)) == 6
    infer = model(sequence, target, 0, False)
    assert [part is None for part in infer] == [True, False, True, True, True, False]


def test_scores_by_distance(small_args):
    _, ours = pair(small_args())
    rep = torch.randn(4, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        items = ours.item_embeddings.weight
        expected = -(torch.cdist(rep.double(), items.double()) ** 2)
        got = ours.routing_rep_pre(rep)
        itself = ours.routing_rep_pre(items[:5])
    torch.testing.assert_close(got.double(), expected, atol=1e-4, rtol=1e-4)
    assert (itself <= 0).all()
    torch.testing.assert_close(itself.diagonal(), torch.zeros(5), atol=1e-4, rtol=0)
