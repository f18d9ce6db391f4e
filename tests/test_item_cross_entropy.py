"""item_cross_entropy: every backend against PyTorch, forward and backward."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import Place
from torch import Tensor

from fmrec_fast import extension, training_losses
from fmrec_fast.backend import Backend, availability, dispatch_log, use_backend
from fmrec_fast.ops import item_cross_entropy
from fmrec_fast.testing import assert_close_to_truth, error_to_truth, make_sequences

pytestmark = pytest.mark.op("item_cross_entropy")
# B, D, V: no multiple of a tile, channels that are no power of two, more rows than a chunk.
SHAPES = [
    (1, 36, 2),
    (5, 96, 61),
    (0, 36, 61),
    (3, 33, 331),
    (7, 128, 259),
    (2, 1, 5),
    (130, 20, 67),
]
BIAS_SHAPES = [(5, 36, 61), (3, 100, 203)]


def inputs(batch: int, width: int, items: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(batch + width + items)
    rep = torch.randn(batch, width, generator=g)
    return rep, torch.randn(items, width, generator=g), torch.randint(items, (batch,), generator=g)


def registered():
    """The module, which the package hides behind the function of the same name."""
    return sys.modules["fmrec_fast.ops.item_cross_entropy"]


def vector(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def plain(rep, item_weight, target, bias, options):
    """The loss and the lse from F.cross_entropy, in the dtype of its arguments."""
    options = dict(options)
    z_loss, scale = options.pop("z_loss", 0.0), options.pop("logit_scale", 1.0)
    reduction, weight = options.pop("reduction", "mean"), options.pop("weight", None)
    ignored = target == options.get("ignore_index", -100)
    scores = scale * (rep @ item_weight.T)
    if bias is not None:
        scores = scores + bias
    if weight is not None:
        weight = weight.to(rep.dtype)
    lse = torch.logsumexp(scores, 1)
    losses = F.cross_entropy(scores, target, weight, reduction="none", **options)
    losses = losses + torch.where(ignored, 0, z_loss * lse**2)
    if reduction == "mean":
        counts = torch.ones_like(losses) if weight is None else weight[target.clamp(min=0)]
        return losses.sum() / (torch.where(ignored, 0, counts).sum() or 1), lse
    return losses if reduction == "none" else losses.sum(), lse


def with_gradients(function, leaves, upstream):
    """What `function` of the leaves returns and its gradients, of those that are there."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in leaves]
    outputs = function(*leaves)
    present = [t for t in leaves if t is not None]
    grads = torch.autograd.grad(outputs, present, upstream, allow_unused=True)
    return (*outputs, *(torch.zeros_like(t) if g is None else g for t, g in zip(present, grads)))


def check(place, rep, item_weight, target, *, bias=None, **options):
    """Loss, lse and all gradients (for upstream ones of both) against float64."""
    count = target.shape if options.get("reduction") == "none" else ()
    upstream = [vector(max(len(target), 1), 7)[: count.numel() if count else 1].reshape(count)]
    upstream.append(vector(len(target), 8) * 0.1)
    leaves = (rep, item_weight, bias)

    def expected(dtype):
        cast = [None if t is None else t.to(dtype) for t in leaves]
        grads = [u.to(dtype) for u in upstream]
        return with_gradients(lambda r, w, b: plain(r, w, target, b, options), cast, grads)

    def ours(r, w, b):
        moved = {k: place.put(v)[0] if isinstance(v, Tensor) else v for k, v in options.items()}
        return item_cross_entropy(r, w, target.to(place.device), bias=b, return_lse=True, **moved)

    there = [None if t is None else t.to(place.device) for t in leaves]
    with place.forced("item_cross_entropy"):
        got = with_gradients(ours, there, list(place.put(*upstream)))
    names = ("loss", "lse", "d_rep", "d_item_weight", "d_bias")
    for name, *three in zip(names, got, expected(torch.float32), expected(torch.float64)):
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
    check(place, rep, weight, target, reduction=reduction, ignore_index=ignore_index)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_all_rows_ignored_is_0(place, reduction):
    rep, weight, target = inputs(5, 36, 61)
    check(place, rep, weight, torch.full_like(target, -100), reduction=reduction)


OPTIONS = {
    "bias": {"bias": True},
    "weight": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "scale": {"logit_scale": 0.3},
    "negative-scale": {"logit_scale": -2.0},
    "all": {"bias": True, "weight": True, "label_smoothing": 0.2, "z_loss": 1e-3, "logit_scale": 2},
}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(place, name, reduction):
    rep, item_weight, target = inputs(9, 36, 203)
    options = dict(OPTIONS[name], reduction=reduction)
    target[2] = -100
    bias = vector(203, 3) if options.pop("bias", False) else None
    if options.pop("weight", False):
        options["weight"] = vector(203, 4).abs()
    check(place, rep, item_weight, target, bias=bias, **options)


def test_items_taken_out_by_the_bias(place):
    """A bias of minus infinity for the first 100 items, a whole tile of some kernels."""
    rep, item_weight, target = inputs(5, 36, 203)
    bias = torch.zeros(203)
    bias[:100] = -torch.inf
    target = 100 + target % 103
    check(place, rep, item_weight, target, bias=bias)


@pytest.mark.parametrize("shape", BIAS_SHAPES)
@pytest.mark.parametrize("frozen", ["rep", "item_weight", "both but the bias"])
def test_frozen_inputs_get_no_gradient(place, frozen, shape):
    rep, item_weight, target = place.put(*inputs(*shape))
    (bias,) = place.put(vector(shape[2], 3))

    def gradients(**requires):
        leaves = {"rep": rep, "item_weight": item_weight, "bias": bias}
        leaves = {k: v.clone().requires_grad_(requires.get(k, False)) for k, v in leaves.items()}
        with place.forced("item_cross_entropy"):
            item_cross_entropy(
                leaves["rep"], leaves["item_weight"], target, bias=leaves["bias"]
            ).backward()
        return {k: v.grad for k, v in leaves.items()}

    everything = gradients(rep=True, item_weight=True, bias=True)
    wanted = {"rep": frozen == "item_weight", "item_weight": frozen == "rep"}
    wanted["bias"] = frozen == "both but the bias"
    for name, gradient in gradients(**wanted).items():
        if wanted[name]:
            torch.testing.assert_close(gradient, everything[name], rtol=1e-6, atol=1e-7)
        else:
            assert gradient is None


def test_the_graph_can_be_kept(place):
    rep, item_weight, target = place.put(*inputs(5, 36, 203))
    leaves = rep.requires_grad_(), item_weight.requires_grad_()
    with place.forced("item_cross_entropy"):
        loss = item_cross_entropy(*leaves, target)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        second = torch.autograd.grad(loss, leaves, torch.full_like(loss, 2.0))
    for one, two in zip(first, second):
        torch.testing.assert_close(two, 2 * one, rtol=1e-6, atol=1e-7)


def test_without_gradients(place):
    rep, item_weight, target = place.put(*inputs(5, 36, 203))
    with place.forced("item_cross_entropy"):
        expected = item_cross_entropy(rep.clone().requires_grad_(), item_weight, target)
        with torch.no_grad():
            got = item_cross_entropy(rep.clone().requires_grad_(), item_weight, target)
    assert not got.requires_grad
    torch.testing.assert_close(got, expected.detach())


def test_a_weight_that_an_embedding_shares(place):
    """One parameter: the gradients of both uses add up."""
    rep, item_weight, target = inputs(5, 36, 203)
    history = torch.tensor([3, 3, 7, 200, 0])

    def loss_of(op, weight, ids, wanted):
        return op(rep.to(weight) + F.embedding(ids, weight), weight, wanted)

    truth = item_weight.double().requires_grad_()
    loss_of(lambda r, w, t: F.cross_entropy(r @ w.T, t), truth, history, target).backward()
    same = item_weight.clone().requires_grad_()
    loss_of(lambda r, w, t: F.cross_entropy(r @ w.T, t), same, history, target).backward()
    (got,) = place.put(item_weight.clone())
    got.requires_grad_()
    with place.forced("item_cross_entropy"):
        loss_of(item_cross_entropy, got, *place.put(history, target)).backward()
    assert_close_to_truth(got.grad.cpu(), same.grad, truth.grad, name="d_weight")


@pytest.mark.parametrize("where", ["rep", "item_weight"])
def test_nan_is_not_lost(place, where):
    rep, item_weight, target = inputs(5, 36, 203)
    (rep if where == "rep" else item_weight)[3, 2] = torch.nan
    target[target == 3] = 4
    rep, item_weight, target = place.put(rep, item_weight, target)
    with place.forced("item_cross_entropy"):
        losses = item_cross_entropy(rep, item_weight, target, reduction="none")
        got = losses.isnan().tolist()
    assert got == ([False] * 3 + [True] + [False] if where == "rep" else [True] * 5)


def test_large_common_offset(place):
    """The same large score added to every item, as float32 rounds it, changes no gradient."""
    rep, item_weight, target = inputs(5, 36, 203)
    check(place, rep, item_weight, target, bias=torch.full((203,), 1000.0))


def test_filtered_gradients_stay_within_the_filter(place):
    """Items far below the rest: their blocks are dropped; what is left is exact."""
    rep, item_weight, target = inputs(5, 36, 403)
    bias = torch.zeros(403)
    bias[100:] = -60.0
    target %= 100
    rep, item_weight, target, bias = place.put(rep, item_weight, target, bias)
    found = {}
    for eps in (None, 1e-6):
        leaves = rep.clone().requires_grad_(), item_weight.clone().requires_grad_()
        with place.forced("item_cross_entropy"):
            loss = item_cross_entropy(*leaves, target, bias=bias, filter_eps=eps)
            found[eps] = torch.autograd.grad(loss, leaves)
    assert (found[None][1][200:] != 0).any()
    if place.backend is not Backend.REFERENCE:  # which is exact with a filter too
        assert (found[1e-6][1][200:350] == 0).all()
    for exact, filtered in zip(found[None], found[1e-6]):
        torch.testing.assert_close(filtered, exact, rtol=1e-5, atol=1e-6)


def test_the_same_bits_each_time(place):
    rep, item_weight, target = place.put(*inputs(70, 20, 131))
    results = []
    for _ in range(2):
        leaves = rep.clone().requires_grad_(), item_weight.clone().requires_grad_()
        with place.forced("item_cross_entropy"):
            loss = item_cross_entropy(*leaves, target)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for one, two in zip(*results):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_summed_in_float32(dtype):
    """Against the same rounded inputs in float64; float32 loss, gradients in the inputs' dtype."""
    rep, item_weight, target = inputs(33, 36, 203)
    rep, item_weight = rep.to(dtype), item_weight.to(dtype)
    truth = with_gradients(
        lambda r, w: plain(r, w, target, None, {})[:1], (rep.double(), item_weight.double()), None
    )
    backends = ["reference"]
    if availability("triton") is None:
        backends.append("triton")
    for backend in backends:
        with use_backend(backend), dispatch_log() as log:
            got = with_gradients(
                lambda r, w: (item_cross_entropy(r, w, target),), (rep, item_weight), None
            )
        assert {entry.backend.value for entry in log} == {backend}
        assert [t.dtype for t in got] == [torch.float32, dtype, dtype]
        assert error_to_truth(got[0], truth[0]) < 1e-5
        for one, right in zip(got[1:], truth[1:]):
            # Its own rounding and that of the probabilities: nothing of the order of sqrt(V).
            assert error_to_truth(one, right) < 2 * torch.finfo(dtype).eps


@pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))
@pytest.mark.parametrize("isa", extension.load().supported_isas() if extension.available() else [])
@pytest.mark.parametrize("shape", [(150, 33, 517), (1, 20, 5)])
def test_every_instruction_set_and_thread_count(isa, shape):
    """Scores kept for the backward pass or computed anew: the same bits either way."""
    module, before = extension.load(), (extension.load().isa(), torch.get_num_threads())
    rep, item_weight, target = inputs(*shape)
    place = Place(Backend.CPP, "cpu")
    options = {"bias": vector(shape[2], 3), "label_smoothing": 0.1}
    found = []
    try:
        module.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            check(place, rep, item_weight, target, **options)
        for limit in (registered().CACHED_SCORES, 0):
            with pytest.MonkeyPatch.context() as patch, use_backend("cpp"):
                patch.setattr(registered(), "CACHED_SCORES", limit)
                found.append(
                    with_gradients(
                        lambda r, w: (item_cross_entropy(r, w, target),), (rep, item_weight), None
                    )
                )
    finally:
        module.set_isa(before[0])
        torch.set_num_threads(before[1])
    for kept, anew in zip(*found):
        assert torch.equal(kept, anew)


def test_double_runs_the_definition_and_says_so():
    rep, item_weight, target = inputs(5, 36, 61)
    with dispatch_log() as log:
        item_cross_entropy(rep.double(), item_weight.double(), target)
    assert [(e.op, e.backend.value) for e in log] == [("item_cross_entropy", "reference")]
    assert extension.reason() or "got torch.float64" in log[0].reason


def test_autocast_casts_both(place):
    rep, item_weight, target = place.put(*inputs(5, 36, 61))
    leaves = rep.requires_grad_(), item_weight.requires_grad_()
    with torch.autocast(place.device, torch.bfloat16), use_backend("reference"):
        loss = item_cross_entropy(rep.bfloat16(), item_weight, target)
        again = item_cross_entropy(rep, item_weight, target)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.equal(loss, again)
    assert [t.grad.dtype for t in leaves] == [torch.float32] * 2


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
        ({"item_weight": torch.zeros(0, 4)}, ValueError, r"at least one row, got \(0, 4\)"),
        ({"bias": torch.zeros(6)}, ValueError, r"bias must be .*V = 7.*got \(6,\)"),
        ({"weight": torch.zeros(7, 1)}, ValueError, r"weight must be .*got \(7, 1\)"),
        ({"bias": torch.zeros(7).double()}, TypeError, "bias is torch.float64"),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in 0 .. 1, got 1.5"),
        ({"z_loss": -1.0}, ValueError, "z_loss must be finite and at least 0, got -1.0"),
        ({"logit_scale": float("inf")}, ValueError, "logit_scale must be finite, got inf"),
        ({"filter_eps": 1.0}, ValueError, "filter_eps must be in 0 .. 1 or None, got 1.0"),
        ({"filter_eps": 0.1, "label_smoothing": 0.1}, ValueError, "filter_eps = 0.1 drops"),
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


@pytest.mark.skipif(availability("triton") is not None, reason=str(availability("triton")))
def test_the_op_knows_how_wide_the_kernels_go():
    from fmrec_fast.kernels import item_cross_entropy as kernels

    for dtype, widest in registered().WIDEST_TRITON.items():
        assert kernels.widest(dtype.itemsize) == widest
        with pytest.raises(ValueError, match=f"D up to {widest}, got {widest + 1}"):
            kernels.layout_key(torch.empty(1, widest + 1, dtype=dtype))


def test_the_training_step_uses_it(small_model):
    """The losses of the definition, from the same seed."""
    data = make_sequences(5, 12, 61, seed=1)
    found = {}
    for backend in ("auto", "reference"):
        torch.manual_seed(2)
        model = small_model()
        with use_backend(backend), dispatch_log() as log:
            losses = training_losses(model, *data)
        ran = {entry.backend for entry in log if entry.op == "item_cross_entropy"}
        fast = Backend.CPP if extension.available() and backend == "auto" else Backend.REFERENCE
        assert ran == {fast}
        losses.total.backward()
        found[backend] = losses, model.item_embeddings.weight.grad
    for name in ("total", "cross_entropy"):
        got, expected = (getattr(found[key][0], name) for key in found)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*(found[key][1] for key in found), rtol=1e-4, atol=1e-5)


# --- torch.compile and the registered operators ----------------------------------------------


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=str)
def test_compiles_into_one_graph(place, options):
    rep, item_weight, target = place.put(*inputs(5, 36, 61))

    def step(r, w):
        return item_cross_entropy(r, w, target, **options) * 2

    leaves = rep.requires_grad_(), item_weight.requires_grad_()
    with use_backend(place.backend):
        expected = step(*leaves)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        got = compiled(*leaves)
        grads = torch.autograd.grad(got, leaves), torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(got, expected)
    for one, two in zip(*grads):
        torch.testing.assert_close(one, two)


@pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))
@pytest.mark.parametrize("keep", [False, True])
def test_the_registered_operators(keep):
    rep, item_weight, target = inputs(5, 36, 61)
    leaves = rep.requires_grad_(keep), item_weight.requires_grad_(keep)
    bias = vector(61, 3).requires_grad_(keep)
    arguments = (*leaves, bias, target, None, 1.0, 0.0, "cpp", keep, -100)
    torch.library.opcheck(registered()._registered, arguments)


@pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))
def test_a_compiled_call_checks_its_targets():
    rep, item_weight, _ = inputs(2, 36, 61)
    compiled = torch.compile(item_cross_entropy, fullgraph=True, backend="aot_eager")
    with use_backend("cpp"), pytest.raises(ValueError, match="got 61"):
        compiled(rep, item_weight, torch.tensor([0, 61]))


# --- CUDA ------------------------------------------------------------------------------------


def on_cuda(batch: int = 5, width: int = 36, items: int = 203):
    rep, item_weight, target = (t.cuda() for t in inputs(batch, width, items))
    return rep.requires_grad_(), item_weight.requires_grad_(), target


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_target_out_of_range_poisons_the_loss_on_cuda(backend, monkeypatch):
    rep, item_weight, target = on_cuda()
    target[1] = 203
    with use_backend(backend):
        loss = item_cross_entropy(rep, item_weight, target)
        loss.backward()
        assert loss.isnan() and rep.grad[1].isnan().all() and item_weight.grad.isnan().any()
        monkeypatch.setenv("FMREC_FAST_CHECK", "1")
        with pytest.raises(ValueError, match="got 203"):
            item_cross_entropy(rep, item_weight, target)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph():
    rep, item_weight, target = on_cuda(70, 64, 1009)
    upstream = torch.ones((), device="cuda")

    def step():
        loss = item_cross_entropy(rep, item_weight, target)
        return loss, *torch.autograd.grad(loss, (rep, item_weight), upstream)

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    graph.replay()
    for one, two in zip(got, expected):
        torch.testing.assert_close(one, two)


@pytest.mark.gpu
def test_a_table_of_more_than_two_to_the_31_elements():
    items, width = 2**31 // 64 + 130, 64
    item_weight = torch.zeros(items, width, dtype=torch.bfloat16, device="cuda")
    item_weight[-1] = 1.0
    rep = torch.ones(3, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    item_weight.requires_grad_()
    target = torch.tensor([items - 1, 0, items - 1], device="cuda")
    loss = item_cross_entropy(rep, item_weight, target, reduction="none")
    loss.sum().backward()
    lse = torch.logaddexp(torch.tensor(64.0), torch.tensor(float(items - 1)).log())
    torch.testing.assert_close(loss.cpu(), torch.stack((lse - 64, lse, lse - 64)))
    p = (64 - lse).exp()
    torch.testing.assert_close(item_weight.grad[-1].float().cpu(), (3 * p - 2).expand(width))
