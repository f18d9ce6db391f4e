"""item_cross_entropy: every backend against PyTorch, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fmrec_fast.ops import item_cross_entropy
from fmrec_fast.testing import assert_close_to_truth

pytestmark = pytest.mark.op("item_cross_entropy")
SHAPES = [(1, 36, 2), (5, 96, 61), (0, 36, 61), (3, 33, 1009), (7, 128, 4099), (2, 1, 5)]


def inputs(batch: int, width: int, items: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch + width + items)
    rep = torch.randn(batch, width, generator=g)
    return rep, torch.randn(items, width, generator=g), torch.randint(items, (batch,), generator=g)


def plain(rep, weight, target, upstream, reduction, ignore_index):
    rep, weight = (t.detach().clone().requires_grad_() for t in (rep, weight))
    losses = torch.logsumexp(rep @ weight.T, 1) - (rep * weight[target.clamp(min=0)]).sum(1)
    losses = torch.where(target == ignore_index, 0, losses)
    loss = losses if reduction == "none" else losses.sum()
    if reduction == "mean":
        loss = loss / (target != ignore_index).sum().clamp(min=1)
    return loss, *torch.autograd.grad(loss, (rep, weight), upstream)


def check(place, rep, weight, target, reduction="mean", ignore_index=-100):
    g = torch.Generator().manual_seed(7)
    upstream = torch.randn(target.shape if reduction == "none" else (), generator=g)
    truth = plain(rep.double(), weight.double(), target, upstream.double(), reduction, ignore_index)
    same = plain(rep, weight, target, upstream, reduction, ignore_index)
    leaves = [t.detach().to(place.device).requires_grad_() for t in (rep, weight)]
    there, gradient = place.put(target, upstream)
    with place.forced("item_cross_entropy"):
        loss = item_cross_entropy(*leaves, there, reduction=reduction, ignore_index=ignore_index)
        got = (loss, *torch.autograd.grad(loss, leaves, gradient))
    for name, *three in zip(("loss", "drep", "dweight"), got, same, truth):
        assert_close_to_truth(three[0].cpu(), *three[1:], name=name)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_definition(place, shape, reduction):
    check(place, *inputs(*shape), reduction=reduction)


def test_non_contiguous_inputs(place):
    rep, weight, target = inputs(5, 36, 61)
    rep, weight = rep.T.contiguous().T, weight.T.contiguous().T
    target = torch.stack((target, target), 1)[:, 0]
    assert not any(t.is_contiguous() for t in (rep, weight, target))
    check(place, rep, weight, target)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, -1, 3])
def test_ignored_rows(place, reduction, ignore_index):
    rep, weight, target = inputs(5, 36, 61)
    target[1] = target[4] = ignore_index
    check(place, rep, weight, target, reduction, ignore_index)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_all_rows_ignored(place, reduction):
    rep, weight, target = inputs(5, 36, 61)
    check(place, rep, weight, torch.full_like(target, -100), reduction)


def test_all_rows_ignored_has_no_mean(place):
    rep, weight, target = place.put(*inputs(5, 36, 61))
    with place.forced("item_cross_entropy"):
        ignored = torch.full_like(target, -100)
        assert item_cross_entropy(rep, weight, ignored).isnan()
    assert F.cross_entropy(rep @ weight.T, ignored).isnan()  # as PyTorch


def test_an_empty_batch_gives_0(place):
    rep, weight, target = place.put(*inputs(0, 36, 61))
    rep.requires_grad_(), weight.requires_grad_()
    with place.forced("item_cross_entropy"):
        loss = item_cross_entropy(rep, weight, target)
        loss.backward()
    assert loss.shape == () and loss == 0
    assert rep.grad.shape == (0, 36) and (weight.grad == 0).all()


def test_large_scores(place):
    """exp of these scores overflows float32."""
    rep, weight, target = inputs(5, 36, 61)
    check(place, 100 * rep, weight, target)


def test_shift_of_all_items_changes_nothing(place):
    rep, weight, target = inputs(5, 96, 61)
    shift = torch.randn(96, generator=torch.Generator().manual_seed(3))
    rep, weight, target, shift = place.put(rep, weight, target, shift)
    rep.requires_grad_()
    with place.forced("item_cross_entropy"):
        losses = [item_cross_entropy(rep, w, target) for w in (weight, weight + shift)]
        grads = [torch.autograd.grad(loss, rep)[0] for loss in losses]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


def test_permutation_of_items_changes_nothing(place):
    rep, weight, target = place.put(*inputs(5, 96, 1009))
    order = torch.randperm(1009, generator=torch.Generator().manual_seed(1)).to(place.device)
    with place.forced("item_cross_entropy"):
        expected = item_cross_entropy(rep, weight, target, reduction="none")
        got = item_cross_entropy(rep, weight[order], order.argsort()[target], reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"rep": torch.zeros(2)}, ValueError, r"rep must be .*got \(2,\)"),
        ({"item_weight": torch.zeros(7, 5)}, ValueError, r"item_weight .*D = 4.*got \(7, 5\)"),
        ({"item_weight": torch.zeros(7, 4).double()}, TypeError, "item_weight is torch.float64"),
        ({"target": torch.zeros(2, 1).long()}, ValueError, r"target must be .*got \(2, 1\)"),
        ({"target": torch.zeros(2)}, TypeError, "target must be int64, got torch.float32"),
        ({"target": torch.tensor([0, 7])}, ValueError, r"0 \.\. 6.*got 7"),
        ({"target": torch.tensor([-1, 0])}, ValueError, "got -1"),
        ({"reduction": "average"}, ValueError, "reduction must be .*got 'average'"),
    ],
)
def test_bad_inputs_are_named(change, error, message):
    arguments = {
        "rep": torch.zeros(2, 4),
        "item_weight": torch.zeros(7, 4),
        "target": torch.tensor([0, 1]),
    }
    with pytest.raises(error, match=message):
        item_cross_entropy(**{**arguments, **change})
