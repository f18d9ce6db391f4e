"""attention: every backend against its definition, forward and backward; its masks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fmrec_fast import dispatch_log, extension, forward_mode, use_backend
from fmrec_fast.backend import Backend
from fmrec_fast.kernels.plans import attention_declined
from fmrec_fast.models.blocks import TransformerStack
from fmrec_fast.ops import StreamDropout, TorchDropout, attention
from fmrec_fast.reference import attention as definition
from fmrec_fast.reference import dropout as masks
from fmrec_fast.reference.rotary import inverse_frequencies
from fmrec_fast.testing import assert_close_to_truth, make_sequences

pytestmark = pytest.mark.op("attention")
SEED = torch.tensor(-987654321987654321)
SHAPES = [
    (0, 5, 32, 4),
    (1, 1, 36, 1),
    (5, 1, 32, 4),
    (1, 3, 6, 2),
    (5, 50, 32, 1),
    (5, 50, 128, 4),
    (4, 51, 36, 4),
    (5, 51, 96, 2),
    (6, 7, 96, 4),
    (2, 64, 40, 2),
    (2, 100, 18, 1),
    (9, 130, 36, 2),
]
needs_cpp = pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))


def draw(batch: int, length: int, width: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, query_scale (with a history of padding alone, and a gap in one), upstream."""
    g = torch.Generator().manual_seed(batch + length + width + heads)
    qkv = torch.randn(batch, length, 3 * width, generator=g)
    kinds = ["short", "padding", "long", "full"]
    sequence = make_sequences(batch, length, 50, 1, histories=kinds).sequence
    sequence[3:4, length // 2] = 0
    scale = (sequence > 0).float() * (width // heads) ** -0.5
    return qkv, scale, torch.randn(batch, length, width, generator=g)


def written_out(qkv: Tensor, scale: Tensor, heads: int, p: float, rows: Tensor, site: int):
    batch, length, width = qkv.shape[0], qkv.shape[1], qkv.shape[2] // 3
    q, k, v = qkv.view(batch, length, 3, heads, width // heads).unbind(2)
    scores = torch.einsum("blhw,bmhw->bhlm", q * scale[:, :, None, None], k)
    probabilities = scores.softmax(-1)
    shape = torch.Size((batch, heads * length, length))
    kept = masks.dropout_mask(shape, p, seed=SEED, rows=rows, site=site)
    probabilities = torch.where(kept.view_as(probabilities), probabilities / (1 - p), 0)
    return torch.einsum("bhlm,bmhw->blhw", probabilities, v).reshape(batch, length, width)


def results(function, qkv, upstream):
    leaf = qkv.detach().requires_grad_()
    out = function(leaf)
    return [out.detach(), *torch.autograd.grad(out, leaf, upstream)]


def check(place, qkv, scale, upstream, heads, p, site=17):
    rows = torch.arange(len(qkv)) * 1_000_000_007 - 3
    truth, same = (
        results(
            lambda x, t=dtype: written_out(x, scale.to(t), heads, p, rows, site),
            qkv.to(dtype),
            upstream.to(dtype),
        )
        for dtype in (torch.float64, torch.float32)
    )
    length, width = upstream.shape[1:]
    qkv, scale, upstream, rows, seed = place.put(qkv, scale, upstream, rows, SEED)
    options = {"seed": seed, "rows": rows, "site": site} if p else {}
    declines = {Backend.TRITON} if attention_declined(length, width // heads) else set()
    with place.forced("attention", declines=declines):
        got = results(lambda x: attention(x, scale, num_heads=heads, p=p, **options), qkv, upstream)
    for name, *three in zip(("out", "d_qkv"), got, same, truth, strict=True):
        assert_close_to_truth(three[0].cpu(), *three[1:], name=name)
    if got[1].numel() and qkv.shape[1] > 1:  # over one key they are 0
        # Queries and keys apart: their gradients may be smaller than those of the values.
        size = truth[1].abs().max().item()
        parts = zip(*(t.cpu().chunk(3, -1) for t in (got[1], same[1], truth[1])), strict=True)
        for name, (mine, plain, right) in zip(("dq", "dk", "dv"), parts, strict=True):
            scale_of = max(right.abs().max().item(), size / 10)
            assert_close_to_truth(mine, plain, right, scale=scale_of, name=name)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_definition(place, shape, p):
    check(place, *draw(*shape), shape[3], p)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_non_contiguous_inputs(place, p):
    qkv, scale, upstream = draw(4, 9, 32, 2)
    qkv = qkv.transpose(0, 2).contiguous().transpose(0, 2)
    scale = scale.T.contiguous().T
    upstream = upstream.transpose(1, 2).contiguous().transpose(1, 2)
    assert not any(t.is_contiguous() for t in (qkv, scale, upstream))
    check(place, qkv, scale, upstream, 2, p)


@pytest.mark.parametrize("factor", [1e-6, 30.0])
def test_flat_and_sharp_probabilities(place, factor):
    qkv, scale, upstream = draw(5, 13, 32, 2)
    check(place, qkv, scale * factor, upstream, 2, 0.1)


@pytest.mark.parametrize(
    "length, width, taken",
    [(64, 64, True), (128, 32, True), (65, 33, False), (129, 8, False), (5, 65, False)],
)
def test_sizes_of_the_triton_kernel(length, width, taken):
    assert (attention_declined(length, width) == "") == taken


def by_cpp(qkv, scale, upstream, heads, p, rows=None):
    with use_backend("cpp"):
        return results(
            lambda x: attention(x, scale, num_heads=heads, p=p, seed=SEED, rows=rows),
            qkv,
            upstream,
        )


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_instruction_set(isa, shape, p):
    qkv, scale, upstream = draw(*shape)
    rows = torch.arange(shape[0])
    truth, same = (
        results(
            lambda x, t=dtype: written_out(x, scale.to(t), shape[3], p, rows, 0),
            qkv.to(dtype),
            upstream.to(dtype),
        )
        for dtype in (torch.float64, torch.float32)
    )
    for three in zip(by_cpp(qkv, scale, upstream, shape[3], p), same, truth, strict=True):
        assert_close_to_truth(*three)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(0, 5, 32, 4), (1, 1, 36, 1), (4, 12, 96, 2), (3, 17, 36, 3)])
def test_rotated_queries_and_keys(place, shape, p):
    """The C++ kernel turns them, the Triton kernel gets them turned."""
    qkv, scale, upstream = draw(*shape)
    inv_freq, rows = inverse_frequencies(shape[2] // shape[3]), torch.arange(shape[0])

    def by(function, dtype, seed=SEED, rows=rows, scale=scale, inv_freq=inv_freq):
        options = {"p": p, "seed": seed, "rows": rows, "site": 3, "inv_freq": inv_freq.to(dtype)}
        return lambda x: function(x, scale.to(dtype), num_heads=shape[3], **options)

    plain = definition.attention
    truth, same = (
        results(by(plain, dtype), qkv.to(dtype), upstream.to(dtype))
        for dtype in (torch.float64, torch.float32)
    )
    moved = place.put(SEED, rows, scale, inv_freq)
    with place.forced("attention"):
        got = results(by(attention, torch.float32, *moved), *place.put(qkv, upstream))
    for name, *three in zip(("out", "d_qkv"), got, same, truth, strict=True):
        assert_close_to_truth(three[0].cpu(), *three[1:], name=name)


def tangents_of(function, jvp, tensors, dtype):
    """Value, derivative along the second tensor, and the gradients of a mixture of both."""
    qkv, d_qkv, *upstream = (t.to(dtype) for t in tensors)
    leaves = [qkv.requires_grad_(), d_qkv.requires_grad_()]
    pair = jvp(function, (leaves[0],), (leaves[1],))
    return [*(t.detach() for t in pair), *torch.autograd.grad(pair, leaves, upstream)]


TANGENT_SHAPES = [
    (0, 5, 32, 4),
    (1, 1, 36, 1),
    (5, 1, 32, 4),
    (5, 50, 128, 4),
    (4, 51, 36, 3),
    (6, 7, 96, 4),
    (2, 64, 40, 2),
    (5, 130, 36, 2),
]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("shape", TANGENT_SHAPES, ids=str)
def test_tangents_on_every_instruction_set(isa, shape, rotated, p):
    """Against torch.func.jvp of the definition in float64; a row is all padding, one has a gap."""
    qkv, scale, upstream = draw(*shape)
    g = torch.Generator().manual_seed(1)
    tensors = qkv, torch.randn(qkv.shape, generator=g), upstream, upstream.flip(1)
    inv_freq = inverse_frequencies(shape[2] // shape[3]) if rotated else None
    rows = torch.arange(shape[0]) * 1_000_000_007 - 3

    def by(function, dtype):
        turned = None if inv_freq is None else inv_freq.to(dtype)
        options = {"p": p, "seed": SEED, "rows": rows, "site": 3, "inv_freq": turned}
        return lambda x: function(x, scale.to(dtype), num_heads=shape[3], **options)

    truth, same = (
        tangents_of(by(definition.attention, dtype), torch.func.jvp, tensors, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    with use_backend("cpp"), dispatch_log() as log:
        got = tangents_of(by(attention, torch.float32), forward_mode.jvp, tensors, torch.float32)
    assert [(entry.op, entry.backend) for entry in log] == [("attention", Backend.CPP)]
    for name, *three in zip(("out", "d_out", "g_qkv", "g_d_qkv"), got, same, truth, strict=True):
        if name.startswith("g_") and shape[1] > 1 and shape[0]:
            parts = [t.chunk(3, -1) for t in three]
            size = three[2].abs().max().item() / 10
            for part, mine, plain, right in zip("qkv", *parts, strict=True):
                largest = max(right.abs().max().item(), size)
                assert_close_to_truth(mine, plain, right, scale=largest, name=name + part)
        else:
            assert_close_to_truth(*three, name=name)


def test_tangents_on_threads_and_parts_of_a_batch_are_the_same_to_the_bit(isa):
    qkv, scale, upstream = draw(13, 20, 96, 4)
    tensors, threads = (qkv, qkv.flip(0), upstream, upstream.flip(1)), torch.get_num_threads()
    inv_freq = inverse_frequencies(24)

    def run(which=slice(None)):
        rows = torch.arange(13)[which]
        options = {"p": 0.1, "seed": SEED, "rows": rows, "inv_freq": inv_freq}
        function = lambda x: attention(x, scale[which], num_heads=4, **options)  # noqa: E731
        parts = [t[which] for t in tensors]
        with use_backend("cpp"):
            return tangents_of(function, forward_mode.jvp, parts, torch.float32)

    try:
        torch.set_num_threads(1)
        one = run()
        torch.set_num_threads(2)
        two = run()
    finally:
        torch.set_num_threads(threads)
    order = torch.tensor([7, 0, 12])
    for a, b, c in zip(one, two, run(order), strict=True):
        assert torch.equal(a, b) and torch.equal(a[order], c)


def test_a_tangent_of_the_scale_runs_the_definition():
    qkv, scale, _ = draw(3, 5, 32, 2)
    with dispatch_log() as log:
        forward_mode.jvp(lambda s: attention(qkv, s, num_heads=2), (scale,), (scale,))
    assert log[0].backend is Backend.REFERENCE
    if extension.available():
        assert log[0].reason == forward_mode.NO_RULE


def test_threads_and_batches_change_no_bit(isa):
    qkv, scale, upstream = draw(13, 50, 96, 4)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = by_cpp(qkv, scale, upstream, 4, 0.1)
        torch.set_num_threads(2)
        two = by_cpp(qkv, scale, upstream, 4, 0.1)
    finally:
        torch.set_num_threads(threads)
    order = torch.tensor([7, 0, 12])
    few = by_cpp(qkv[order], scale[order], upstream[order], 4, 0.1, rows=order)
    for a, b, c in zip(one, two, few, strict=True):
        assert torch.equal(a, b) and torch.equal(a[order], c)


@pytest.mark.parametrize("p", [0.1, 0.499, 0.5, 0.95])
@pytest.mark.parametrize("length, width", [(63, 32), (64, 36), (65, 48), (128, 80)])
def test_padding_at_any_rate(isa, length, width, p):
    """Its queries sum what drops or what stays, whichever is less. Each sequence by itself: of
    padding only, of one item, of padding but for a gap, of one position of padding."""
    qkv, _, upstream = draw(4, length, width, 1)
    rows, scale = torch.arange(4), torch.zeros(4, length)
    scale[1, -1], scale[2, length // 3], scale[3, 1:] = width**-0.5, width**-0.5, width**-0.5
    truth, same = (
        results(
            lambda x, t=dtype: written_out(x, scale.to(t), 1, p, rows, 0),
            qkv.to(dtype),
            upstream.to(dtype),
        )
        for dtype in (torch.float64, torch.float32)
    )
    mine = by_cpp(qkv, scale, upstream, 1, p)
    for sequence in range(4):
        for name, *three in zip(("out", "d_qkv"), mine, same, truth, strict=True):
            assert_close_to_truth(*(t[sequence] for t in three), name=f"{name} of {sequence}")
    assert not mine[1][0, :, : 2 * width].any()


@pytest.mark.parametrize("p", [0.2, 0.8])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_show_where_they_drop_too(isa, strange, p):
    """As 0 times NaN does in the definition: in all queries, of the padding and others."""
    qkv, scale, upstream = draw(4, 9, 32, 1)
    scale[3, :5] = 0
    qkv[3, 6, 64 + 3] = strange
    upstream[3, 2, 5] = strange  # of a query of the padding
    rows = torch.arange(4)
    out, d_qkv = by_cpp(qkv, scale, upstream, 1, p)
    right, d_right = results(lambda x: written_out(x, scale, 1, p, rows, 0), qkv, upstream)
    assert torch.equal(out.isfinite(), right.isfinite())
    assert torch.equal(d_qkv[:3].isfinite(), d_right[:3].isfinite())
    assert torch.equal(d_qkv[..., 64:].isfinite(), d_right[..., 64:].isfinite())
    assert not out[3, :, 3].isfinite().any() and not d_qkv[3, :, 64 + 5].isfinite().any()


def test_nan_and_infinity_show(isa):
    for value in (float("nan"), float("inf")):
        for part in range(3):
            qkv, scale, upstream = draw(4, 9, 32, 1)
            qkv[3, 8, 32 * part + 3] = value
            out, d_qkv = by_cpp(qkv, scale, upstream, 1, 0.0)
            assert not out[3].isfinite().all() and not d_qkv[3].isfinite().all()
            assert out[:3].isfinite().all() and d_qkv[:3].isfinite().all()


@pytest.mark.parametrize("attention", ["published", "causal"])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_where_the_encoder_uses_it(attention, p):
    """With the stream's dropout or none, in all blocks but the last, which has one query."""
    torch.manual_seed(0)
    stack = TransformerStack(32, 3, 4, attention)
    x, mask = torch.randn(2, 5, 32), torch.ones(2, 5)
    stream, published = StreamDropout(SEED, torch.arange(2)), TorchDropout()
    for drop, prune in ((stream, True), (stream, False), (published, False)):
        with dispatch_log() as log:
            stack(x, mask, drop=drop, p=p, prune=prune)
        expected = (3 - prune) * (attention == "published" and (drop is stream or p == 0))
        assert sum(entry.op == "attention" for entry in log) == expected


def test_the_encoder_has_the_same_masks_as_its_definition():
    torch.manual_seed(0)
    stack = TransformerStack(36, 3, 4, "published")
    x, upstream = torch.randn(5, 9, 36), torch.randn(5, 36)
    mask = (make_sequences(5, 9, 50, 1, histories=("padding", "long")).sequence > 0).float()
    found = []
    for dtype in (torch.float32, torch.float64):
        drop = StreamDropout(SEED, torch.arange(5))
        leaf = x.to(dtype).requires_grad_()
        out, _ = stack.to(dtype)(leaf, mask.to(dtype), drop=drop, p=0.3)
        found.append([out, *torch.autograd.grad(out, leaf, upstream.to(dtype))])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-5, rtol=2e-5)


def test_a_gradient_of_the_scale_runs_the_definition():
    qkv, scale, _ = draw(4, 5, 32, 2)
    scale.requires_grad_()
    with dispatch_log() as log:
        attention(qkv, scale, num_heads=2).sum().backward()
    assert scale.grad is not None
    if extension.available():
        assert "no gradient of query_scale" in log[0].reason


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"qkv": torch.zeros(2, 96)}, ValueError, r"qkv must be .*got \(2, 96\)"),
        ({"qkv": torch.zeros(2, 0, 96), "query_scale": torch.zeros(2, 0)}, ValueError, "2, 0, 96"),
        ({"qkv": torch.zeros(2, 5, 97)}, ValueError, "three equal parts, got 97"),
        ({"qkv": torch.zeros(2, 5, 96).long()}, TypeError, "torch.int64"),
        ({"query_scale": torch.zeros(2, 6)}, ValueError, r"query_scale .*got \(2, 6\)"),
        ({"query_scale": torch.zeros(2, 5).double()}, TypeError, "query_scale is torch.float64"),
        ({"num_heads": 5}, ValueError, "num_heads must divide D = 32, got 5"),
        ({"num_heads": 0}, ValueError, "got 0"),
        ({"p": 1.0}, ValueError, r"p must be in \[0, 1\), got 1.0"),
        ({"p": float("nan")}, ValueError, "got nan"),
        ({"seed": None}, ValueError, "seed must be given with p = 0.1"),
        ({"rows": torch.zeros(1).long()}, ValueError, r"rows must be .*got \(1,\)"),
    ],
)
def test_bad_inputs_are_named(change, error, message):
    arguments = {
        "qkv": torch.zeros(2, 5, 96),
        "query_scale": torch.ones(2, 5),
        "num_heads": 4,
        "p": 0.1,
        "seed": SEED,
    }
    with pytest.raises(error, match=message):
        attention(**{**arguments, **change})


def boundary(**changes) -> dict:
    memory = torch.zeros(2, 3, 24).numpy()
    arguments = {
        "qkv": memory,
        "query_scale": torch.zeros(2, 3).numpy(),
        "rows": torch.arange(2).numpy(),
        "seed": 1,
        "site": 0,
        "p": 0.1,
        "num_heads": 2,
        "num_threads": 1,
    }
    return {**arguments, **changes}


@needs_cpp
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"qkv": torch.zeros(2, 3, 25).numpy()}, ValueError, r"\[B, L, 3 D\], got \(2, 3, 25\)"),
        ({"qkv": torch.zeros(2, 3, 24).double().numpy()}, TypeError, "qkv .*float64"),
        ({"qkv": torch.zeros(2, 3, 48).numpy()[..., ::2]}, ValueError, "qkv must be C-contig"),
        ({"query_scale": torch.zeros(2, 4).numpy()}, ValueError, r"query_scale .*\(2, 4\)"),
        ({"rows": torch.arange(3).numpy()}, ValueError, r"rows must have shape .*\(3,\)"),
        ({"p": 1.0}, ValueError, "p must satisfy 0 <= p < 1, got 1.0"),
        ({"num_heads": 3}, ValueError, "num_heads must divide D = 8, got 3"),
        ({"num_heads": 0}, ValueError, "got 0"),
        ({"num_threads": 0}, ValueError, "num_threads must be at least 1, got 0"),
        ({"seed": 1.5}, TypeError, "seed must be an int"),
        ({"out": torch.zeros(2, 3, 9).numpy()}, ValueError, r"\(2, 3, 9\)"),
    ],
)
def test_the_boundary_refuses(changes, error, message):
    module = extension.load()
    arguments = boundary(**changes)
    small, large = torch.zeros(2, 3, 8).numpy(), torch.zeros(2, 3, 24).numpy()
    out = arguments.pop("out", None)
    with pytest.raises(error, match=message):
        module.attention_forward(out=small if out is None else out, **arguments)
    with pytest.raises(error, match=message):
        module.attention_backward(grad=small, g_qkv=large if out is None else out, **arguments)


@needs_cpp
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"rotary": torch.zeros(3, 8).numpy()}, ValueError, r"rotary .*\(3, 4\), got \(3, 8\)"),
        ({"num_heads": 8, "rotary": torch.zeros(3, 1).numpy()}, ValueError, "even width, got 1"),
        ({"d_out": None}, ValueError, "d_qkv and d_out must be given together"),
        ({"d_qkv": torch.zeros(2, 3, 27).numpy()}, ValueError, r"d_qkv .*\(2, 3, 27\)"),
        ({"d_out": torch.zeros(2, 3, 9).numpy()}, ValueError, r"d_out .*\(2, 3, 9\)"),
    ],
)
def test_the_boundary_refuses_of_tangents(changes, error, message):
    module = extension.load()
    small, large = (lambda: torch.zeros(2, 3, 8).numpy()), torch.zeros(2, 3, 24).numpy()
    arguments = boundary() | {"out": small(), "d_qkv": large, "d_out": small()} | changes
    with pytest.raises(error, match=message):
        module.attention_forward(**arguments)


@needs_cpp
def test_overlap_is_refused():
    module, arguments = extension.load(), boundary()
    small = torch.zeros(2, 3, 8).numpy()
    with pytest.raises(ValueError, match="out must not overlap qkv"):
        view = arguments["qkv"].reshape(-1)[:48].reshape(2, 3, 8)
        module.attention_forward(out=view, **arguments)
    with pytest.raises(ValueError, match="g_qkv must not overlap qkv"):
        module.attention_backward(grad=small, g_qkv=arguments["qkv"], **arguments)
    tangent = {"d_qkv": torch.zeros(2, 3, 24).numpy()}
    with pytest.raises(ValueError, match="d_out must not overlap out"):
        module.attention_forward(out=small, d_out=small, **tangent, **arguments)
    large, tangent = torch.zeros(2, 3, 24).numpy(), tangent | {"d_grad": small}
    with pytest.raises(ValueError, match="g_d_qkv must not overlap g_qkv"):
        module.attention_backward(grad=small, g_qkv=large, g_d_qkv=large, **tangent, **arguments)
