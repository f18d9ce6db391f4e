"""encoder: every backend against the published stack, forward and backward; its options."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from fmrec_fast import extension
from fmrec_fast.backend import Backend
from fmrec_fast.kernels.plans import WIDTHS
from fmrec_fast.models.blocks import TransformerStack
from fmrec_fast.ops import StreamDropout, encoder
from fmrec_fast.reference import encoder as definition
from fmrec_fast.reference.published import PublishedAttention, PublishedStack
from fmrec_fast.testing import assert_close_to_truth, error_to_truth, make_sequences

pytestmark = pytest.mark.op("encoder")
encoder_op = importlib.import_module("fmrec_fast.ops.encoder")
HEADS = 4
KERNELS = {Backend.CPP, Backend.TRITON}
EVERY = ("padding", "short", "long", "full")
SHAPES = [(1, 1, 36), (5, 50, 96), (2, 51, 36), (5, 7, 32), (1, 1, 32), (1, 50, 32), (1, 51, 64)]


class CausalAttention(PublishedAttention):
    """Written out: a position sees itself and the real ones before it."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            layer(x).view(batch, length, self.heads, self.width) for layer in self.linear_layers
        )
        mixed = torch.zeros_like(v)
        for b in range(batch):
            for i in range(length):
                seen = [j for j in range(i) if mask[b, j] > 0] + [i]
                scores = torch.einsum("hw,jhw->hj", q[b, i], k[b, seen]) / self.width**0.5
                mixed[b, i] = torch.einsum("hj,jhw->hw", scores.softmax(-1), v[b, seen])
        return self.w_layer(mixed.flatten(2))


def make_stack(width: int, num_blocks: int = 3, attention: str = "published") -> TransformerStack:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        stack = TransformerStack(width, num_blocks, HEADS, attention)
        for parameter in stack.parameters():
            if parameter.ndim == 1:  # the initial ones and zeros would hide a swap
                torch.nn.init.normal_(parameter, 0.3, 0.5)
    return stack


def peer_of(stack: TransformerStack, tap: int | None = None) -> PublishedStack:
    blocks = stack.transformer_blocks
    width = blocks[0].feed_forward.w_1.in_features
    last = 0 if tap is None else len(blocks) - 1 - tap
    args = SimpleNamespace(hidden_size=width, num_blocks=len(blocks), last=last, dropout=0.0)
    peer = PublishedStack(args)
    if stack.attention == "causal":
        for block in peer.transformer_blocks:
            block.attention.__class__ = CausalAttention
    peer.load_state_dict(stack.state_dict())
    return peer


def declining(width: int, attention: str = "published") -> set[Backend]:
    """The backends whose kernels do not take such a network."""
    if attention != "published":
        return KERNELS
    return set() if width in WIDTHS else {Backend.TRITON}


def inputs(batch: int, length: int, width: int, histories=EVERY) -> tuple[Tensor, Tensor, Tensor]:
    sequence = make_sequences(batch, length, 50, 1, histories=histories).sequence
    g = torch.Generator().manual_seed(batch + length)
    x = torch.randn(batch, length, width, generator=g)
    return x, (sequence > 0).float(), torch.randn(2, batch, width, generator=g)


def gradients(outputs, leaves, upstream):
    grads = torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves)]


def peer_results(stack, x, mask, upstream, tap, dtype):
    peer = peer_of(stack, tap).to(dtype)
    x = x.detach().to(dtype).requires_grad_()
    out, tapped = peer(x, mask.to(dtype))
    outputs = (out[:, -1], tapped[:, -1])
    named = dict(peer.named_parameters())
    grads = gradients(outputs, [x, *named.values()], list(upstream.to(dtype)))
    return [*outputs, *grads], ["out", "tapped", "dx", *named]


def check(place, stack, x, mask, upstream, tap):
    truth, names = peer_results(stack, x, mask, upstream, tap, torch.float64)
    same, _ = peer_results(stack, x, mask, upstream, tap, torch.float32)
    ours = {name: p.detach().to(place.device) for name, p in stack.named_parameters()}
    local = make_stack(x.shape[2], len(stack.transformer_blocks), stack.attention)
    local.load_state_dict(ours)
    local.to(place.device)
    leaf = x.detach().to(place.device).requires_grad_()
    mask, upstream = place.put(mask, upstream)
    truths = dict(zip(names, truth))
    declines = declining(x.shape[2], stack.attention)
    with torch.no_grad(), place.forced("encoder", declines=declines):
        inferred = dict(zip(["out", "tapped"], local(leaf, mask, tap=tap)))
    for name, a in zip(inferred, same):
        assert_close_to_truth(inferred[name].cpu(), a, truths[name], name=name)
    with place.forced("encoder", declines=KERNELS):  # which have no backward pass
        outputs = local(leaf, mask, tap=tap)
        parameters = dict(local.named_parameters())
        grads = gradients(outputs, [leaf, *parameters.values()], list(upstream))
    got = dict(zip(["out", "tapped", "dx", *parameters], [*outputs, *grads]))
    assert set(got) == set(names)
    for name, a in zip(names, same):
        scale = None
        for part in ("linear_layers.0", "linear_layers.1"):
            if part in name:
                # Queries and keys get the softmax's gradient: small differences of terms as large
                # as the values' gradient. For the keys' bias it is 0, a shift changes nothing.
                beside = truths[name.replace(part, "linear_layers.2")]
                scale = float(torch.maximum(beside.abs().max(), truths[name].abs().max()))
        assert_close_to_truth(got[name].cpu(), a, truths[name], scale=scale, name=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_published_attention_against_the_published_stack(place, shape):
    """Zeroed padded queries and no mask equal the published scores of -1e9."""
    check(place, make_stack(shape[2]), *inputs(*shape), tap=0)


@pytest.mark.parametrize("tap", [1, 2])
def test_taps(place, tap):
    check(place, make_stack(32), *inputs(5, 7, 32), tap=tap)


def test_no_padding(place):
    check(place, make_stack(32), *inputs(3, 9, 32, ["full"]), tap=1)


def test_one_block(place):
    check(place, make_stack(32, 1), *inputs(4, 9, 32), tap=0)


@pytest.mark.parametrize("width", [32, 36])
@pytest.mark.parametrize("attention", ["published", "causal"])
def test_empty_batch(place, attention, width):
    stack = make_stack(width, attention=attention).to(place.device)
    x, mask = torch.zeros(0, 5, width, device=place.device), torch.zeros(0, 5, device=place.device)
    with torch.no_grad(), place.forced("encoder", declines=declining(width, attention)):
        assert [t.shape for t in stack(x, mask, tap=0)] == [(0, width), (0, width)]
    x.requires_grad_()
    with place.forced("encoder", declines=KERNELS):
        outputs = stack(x, mask, tap=0)
        grads = gradients(outputs, [x, *stack.parameters()], [torch.zeros_like(t) for t in outputs])
    assert [t.shape for t in outputs] == [(0, width), (0, width)]
    assert grads[0].shape == (0, 5, width)
    assert all((grad == 0).all() for grad in grads)


def run_both(place, stack, x, mask, heads, precision, declines):
    """(the place's last outputs and taps, the definition's, those of float64)."""
    weights = stack.weights()
    options = {"num_heads": heads, "tap": 0}
    with torch.no_grad():
        same = definition.encoder(x, mask, weights, precision=precision, **options)
        double = [type(w)(*(t.double() for t in w.tensors())) for w in weights]
        truth = definition.encoder(x.double(), mask.double(), double, **options)
        local = [type(w)(*place.put(*w.tensors())) for w in weights]
        with place.forced("encoder", declines=declines):
            got = encoder(*place.put(x, mask), local, precision=precision, **options)
    return [t.cpu() for t in got], same, truth


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("shape", [(4, 7, 32), (1, 51, 64), (2, 5, 36)])
def test_precisions(place, shape, precision):
    """As far from float64 as the definition in that precision, and that precision does matter (in
    C++, which may be closer: tests/test_native_sampler.py)."""
    width = shape[2]
    x, mask, _ = inputs(*shape)
    results = run_both(place, make_stack(width), x, mask, HEADS, precision, declining(width))
    for name, got, same, truth in zip(("out", "tapped"), *results):
        assert_close_to_truth(got, same, truth, name=name)
        wrong = error_to_truth(got, truth)
        closer = place.backend is Backend.CPP
        assert (0 if closer else {"tf32": 1e-5, "bf16": 1e-4}[precision]) < wrong < 0.05


@pytest.mark.parametrize("width, heads, blocks", [(32, 1, 2), (32, 32, 2), (64, 1, 1), (128, 4, 2)])
def test_heads_and_widths(place, width, heads, blocks):
    x, mask, _ = inputs(2, 5, width)
    stack = make_stack(width, blocks)
    results = run_both(place, stack, x, mask, heads, "float32", ())
    for name, got, same, truth in zip(("out", "tapped"), *results):
        assert_close_to_truth(got, same, truth, name=name)


def test_definition_of_the_precisions():
    """Against numbers rounded by hand; the gradient passes unrounded."""
    x = torch.tensor([1 + 2**-10, 1 + 2**-11, 1 + 2**-12, -1 - 2**-11, 1 + 2**-8, 3e38])
    x.requires_grad_()
    tf32 = [1 + 2**-10, 1 + 2**-10, 1.0, -1 - 2**-10, 1 + 2**-8]
    bf16 = [1.0, 1.0, 1.0, -1.0, 1.0]
    for precision, expected in (("float32", x[:5].tolist()), ("tf32", tf32), ("bf16", bf16)):
        got = definition.rounded(x, precision)
        assert got[:5].tolist() == expected
        assert torch.autograd.grad(got.sum(), x)[0].tolist() == [1.0] * 6
    assert definition.rounded(x, "float32") is x


@pytest.mark.parametrize("shape", [(1, 1, 36), (4, 9, 36)])
def test_causal_attention_against_loops(place, shape):
    check(place, make_stack(shape[2], attention="causal"), *inputs(*shape), tap=1)


def test_non_contiguous_inputs(place):
    x, mask, upstream = inputs(4, 9, 32)
    x = x.transpose(0, 2).contiguous().transpose(0, 2)
    mask = mask.T.contiguous().T
    upstream = upstream.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(t.is_contiguous() for t in (x, mask, upstream))
    check(place, make_stack(32), x, mask, upstream, tap=0)


@pytest.mark.parametrize("attention", ["published", "causal"])
@pytest.mark.parametrize("tap", [0, 2])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5, 9, 32), (2, 1, 36), (0, 3, 32)])
def test_pruning_is_the_same_function(shape, p, tap, attention):
    """In float64, so that nothing but another mask or another formula could tell them apart."""
    x, mask, upstream = (t.double() for t in inputs(*shape))
    stack = make_stack(shape[2], attention=attention).double()
    results = []
    for prune in (True, False):
        leaf = x.clone().requires_grad_()
        drop = StreamDropout(torch.tensor(5), torch.arange(len(x)) + 3)
        outputs = stack(leaf, mask, tap=tap, drop=drop, p=p, prune=prune)
        leaves = [leaf, *stack.parameters()]
        results.append([*outputs, *gradients(outputs, leaves, list(upstream))])
    for pruned, whole in zip(*results):
        torch.testing.assert_close(pruned, whole, atol=1e-11, rtol=1e-9)


@pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))
@pytest.mark.parametrize("tap", [0, 1, 2])
def test_a_tapped_position_comes_from_the_op_that_reads_it(tap, monkeypatch):
    """In training; its gradient is to the bit that of a slice."""
    x, mask, upstream = inputs(5, 17, 64)
    stack, results = make_stack(64), []
    for sliced in (False, True):
        if sliced:
            op = encoder_op.self_attention_and_last
            monkeypatch.setattr(
                encoder_op,
                "self_attention_and_last",
                lambda x, *rest, op=op, **options: (op(x, *rest, **options)[0], x[:, -1]),
            )
        leaf = x.clone().requires_grad_()
        drop = StreamDropout(torch.tensor(5), torch.arange(5))
        out, tapped = stack(leaf, mask, tap=tap, drop=drop, p=0.2)
        assert (tapped.grad_fn.name() == "_SelfAttentionBackward") == (not sliced and tap < 2)
        leaves = [leaf, *stack.parameters()]
        both = torch.autograd.grad((out, tapped), leaves, list(upstream), retain_graph=True)
        results.append([out, tapped, *both, *gradients(tapped, leaves, upstream[1])])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_dropout_changes_the_result():
    x, mask, _ = inputs(5, 9, 32)
    stack = make_stack(32)
    outputs = [
        stack(x, mask, drop=StreamDropout(torch.tensor(seed), torch.arange(5)), p=0.3)[0]
        for seed in (5, 5, 6)
    ]
    assert torch.equal(outputs[0], outputs[1])
    assert (outputs[0] != outputs[2]).any(1).all()


def test_every_dropout_has_a_site_of_its_own():
    """In the published order of use: probabilities, attention, inner, feed-forward, block."""
    used = []

    def spy(x, p, site, *, residual=None, **_):
        used.append(site)
        return definition.no_drop(x, p, site, residual=residual)

    x, mask, _ = inputs(2, 5, 32)
    make_stack(32)(x, mask, drop=spy, p=0.3)
    expected = [site for block in range(3) for site in definition.dropout_sites(block)]
    assert used == expected == sorted(set(expected))
    assert definition.EMBEDDING_SITE not in used


def last_output(stack, x, mask):
    with torch.no_grad():
        return stack(x, mask, tap=0)


def test_causal_padding_carries_no_information(place):
    stack = make_stack(36, attention="causal").to(place.device)
    x, mask, _ = place.put(*inputs(6, 9, 36, ["short", "long"]))
    noisy = torch.where(mask[..., None] > 0, x, 3 * x.flip(-1))
    longer = torch.cat((torch.full_like(x[:, :4], 7.0), x), 1)
    wider = torch.cat((torch.zeros_like(mask[:, :4]), mask), 1)
    with place.forced("encoder", declines=KERNELS):
        expected = last_output(stack, x, mask)
        for got in (last_output(stack, noisy, mask), last_output(stack, longer, wider)):
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    stack.attention = "published"  # in which padding does carry information
    with place.forced("encoder", declines=declining(36)):
        assert not torch.allclose(
            last_output(stack, x, mask)[0], last_output(stack, noisy, mask)[0], atol=1e-2
        )


def all_positions(stack, x, mask, attention):
    bias = definition.attention_bias(mask, attention)
    for weights in stack.weights():
        x = definition.block(x, weights, mask, num_heads=HEADS, bias=bias)
    return x


def test_causal_positions_do_not_see_later_ones():
    stack = make_stack(36, attention="causal")
    x, mask, _ = inputs(6, 9, 36, ["long", "full"])
    with torch.no_grad():
        whole = all_positions(stack, x, mask, "causal")
        for length in (5, 7, 9):
            cut, _ = stack(x[:, :length], mask[:, :length])
            torch.testing.assert_close(cut, whole[:, length - 1], atol=1e-5, rtol=1e-5)
        published = all_positions(stack, x, mask, "published")
        stack.attention = "published"
        cut, _ = stack(x[:, :5], mask[:, :5])
        assert not torch.allclose(cut, published[:, 4], atol=1e-2)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 32)}, ValueError, r"x must be .*got \(2, 32\)"),
        ({"x": torch.zeros(2, 0, 32), "mask": torch.zeros(2, 0)}, ValueError, r"\(2, 0, 32\)"),
        ({"mask": torch.zeros(2, 6)}, ValueError, r"mask must be .*L = 5.*got \(2, 6\)"),
        ({"mask": torch.zeros(2, 5).bool()}, TypeError, "mask is torch.bool"),
        ({"blocks": []}, ValueError, "blocks must hold at least one block"),
        ({"num_heads": 5}, ValueError, "num_heads must divide D = 32, got 5"),
        ({"num_heads": 0}, ValueError, "got 0"),
        ({"tap": 3}, ValueError, r"tap must be in 0 \.\. 2, got 3"),
        ({"tap": -1}, ValueError, "got -1"),
        ({"precision": "fp16"}, ValueError, "precision must be .*got 'fp16'"),
        ({"attention": "casual"}, ValueError, "attention must be .*got 'casual'"),
    ],
)
def test_bad_inputs_are_named(change, error, message):
    arguments = {
        "x": torch.zeros(2, 5, 32),
        "mask": torch.ones(2, 5),
        "blocks": make_stack(32).weights(),
        "num_heads": HEADS,
    }
    arguments.update(change)
    with pytest.raises(error, match=message):
        encoder(arguments.pop("x"), arguments.pop("mask"), arguments.pop("blocks"), **arguments)
