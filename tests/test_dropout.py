"""dropout: every backend against its definition, forward and backward; its masks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

from fmrec_fast import dispatch_log, extension, forward_mode, noise, use_backend
from fmrec_fast.backend import Backend
from fmrec_fast.ops import StreamDropout, TorchDropout, dropout
from fmrec_fast.reference import dropout as reference
from fmrec_fast.testing import assert_close_to_truth

pytestmark = pytest.mark.op("dropout")
SEED = torch.tensor(-987654321987654321)


SHAPES = [(0, 5, 8), (1, 1, 1), (5, 1, 36), (2, 51, 96), (3, 50, 130), (2, 0, 4), (1, 3, 2)]


def written_out(shape, p, rows, site, offset=0, stride=1) -> Tensor:
    """The mask by its sentence: word c % 4 at counter (c // 4, position, site, row) >= p 2^32."""
    batch, length, channels = shape
    c = torch.arange(channels)
    position = offset + stride * torch.arange(length)
    words = noise.philox_4x32(
        (c // 4, position[:, None], torch.tensor(site), rows[:, None, None] & noise.MASK32), SEED
    )
    word = torch.stack(words).gather(0, (c % 4).expand(1, batch, length, channels))[0]
    return word >= round(p * 2**32)


def check(place, x, residual, upstream, *, p=0.3, rows=None, **options):
    rows = torch.arange(len(x)) if rows is None else rows
    kept = written_out(
        x.shape,
        p,
        rows,
        options.get("site", 0),
        options.get("position_offset", 0),
        options.get("position_stride", 1),
    )

    def plain(x, residual, upstream):
        x = x.detach().requires_grad_()
        out = torch.where(kept, x / (1 - p), 0)
        out = out if residual is None else out + residual
        return out, *torch.autograd.grad(out, x, upstream)

    truth = plain(x.double(), None if residual is None else residual.double(), upstream.double())
    same = plain(x, residual, upstream)
    leaves = [t.to(place.device).requires_grad_() for t in (x, residual) if t is not None]
    seed, names, gradient = place.put(SEED, rows, upstream)
    with place.forced("dropout"):
        out = dropout(
            leaves[0],
            p,
            seed=seed,
            rows=names,
            residual=None if residual is None else leaves[1],
            **options,
        )
        gradients = torch.autograd.grad(out, leaves, gradient)
    for name, *three in zip(("out", "dx"), (out, gradients[0]), same, truth):
        assert_close_to_truth(three[0].cpu(), *three[1:], name=name)
    if residual is not None:
        assert torch.equal(gradients[1].cpu(), upstream)


def draw(shape, count=3):
    g = torch.Generator().manual_seed(sum(shape))
    return [torch.randn(shape, generator=g) for _ in range(count)]


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_definition(place, shape, with_residual):
    x, residual, upstream = draw(shape)
    rows = torch.arange(shape[0]) * 1_000_000_007 - 3
    check(place, x, residual if with_residual else None, upstream, rows=rows, site=17)


@pytest.mark.parametrize("p", [1e-12, 1e-9, 0.1, 0.5, 0.999, 1 - 1e-7])
def test_probabilities(place, p):
    check(place, *draw((2, 9, 33)), p=p, site=1)


def test_positions(place):
    check(place, *draw((3, 4, 50)), position_offset=49, position_stride=50)


def test_non_contiguous_inputs(place):
    x, residual, upstream = (t.transpose(1, 2) for t in draw((3, 4, 50)))
    rows = torch.arange(6)[::2]
    assert not any(t.is_contiguous() for t in (x, residual, upstream, rows))
    check(place, x, residual, upstream, rows=rows)


def kept(shape, p=0.3, **options) -> Tensor:
    return dropout(torch.ones(shape), p, seed=SEED, **options) > 0


# The masks of every backend are those of the sentence (above): their statistics are looked at on
# one of them, for these samples are large.


@pytest.mark.parametrize("p", [0.1, 0.3, 0.75])
def test_keep_rate(p):
    mask = kept((20, 50, 100), p)
    for words in (mask, *(mask[..., i::4] for i in range(4))):
        dropped = int((~words).sum())
        assert stats.binomtest(dropped, words.numel(), p).pvalue > 0.001


def test_unbiased():
    x = torch.rand(1, 4, 10, generator=torch.Generator().manual_seed(0)) + 0.5
    mean = dropout(x.expand(10_000, 4, 10), 0.3, seed=SEED).double().mean(0)
    deviation = x[0].double() * (0.3 / 0.7 / 10_000) ** 0.5
    assert ((mean - x[0]).abs() < 4 * deviation).all()


@pytest.mark.parametrize("part", [slice(2, 5), slice(49, 50), slice(3, None, 7)])
def test_a_part_of_the_positions_has_the_whole_ones_masks(place, part):
    x, residual, _ = place.put(*draw((3, 50, 36)))
    (seed,) = place.put(SEED)
    start, _, stride = part.indices(50)
    with place.forced("dropout"):
        whole = dropout(x, 0.4, seed=seed, site=5, residual=residual)
        got = dropout(
            x[:, part],
            0.4,
            seed=seed,
            site=5,
            residual=residual[:, part],
            position_offset=start,
            position_stride=stride,
        )
    assert torch.equal(got, whole[:, part])


def test_a_row_keeps_its_mask_in_any_batch(place):
    order = torch.tensor([4, 0, 5], device=place.device)
    (seed,) = place.put(SEED)
    x = torch.ones(6, 5, 36, device=place.device)
    with place.forced("dropout"):
        whole = dropout(x, 0.3, seed=seed)
        part = dropout(x[order], 0.3, seed=seed, rows=order)
    assert torch.equal(part, whole[order])


def test_masks_of_sites_rows_and_positions_are_unrelated():
    here, there = (kept((20, 30, 100), site=site).double() for site in (3, 4))
    pairs = [
        (here, there),
        (here[1:], here[:-1]),
        (here[:, 1:], here[:, :-1]),
        (here[..., 1:], here[..., :-1]),
    ]
    for a, b in pairs:
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1]
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_stream_dropout_is_dropout_with_the_derived_seed():
    x, residual, _ = draw((3, 5, 8))
    rows = torch.tensor([4, 1, 9])
    got = StreamDropout(SEED, rows)(x, 0.4, 7, residual=residual, position_offset=2)
    seed = noise.derive_seed(SEED, noise.Use.DROPOUT)
    assert torch.equal(
        got, dropout(x, 0.4, seed=seed, rows=rows, site=7, residual=residual, position_offset=2)
    )


def test_torch_dropout_draws_as_published():
    x, residual, _ = draw((3, 5, 8))
    torch.manual_seed(8)
    got = TorchDropout()(x, 0.4, 7, residual=residual, position_offset=2)
    torch.manual_seed(8)
    assert torch.equal(got, residual + F.dropout(x, 0.4))


def test_nothing_is_dropped_at_p_0():
    x, residual, _ = draw((3, 5, 8))
    assert dropout(x, 0, seed=SEED) is x
    assert torch.equal(dropout(x, 0, seed=SEED, residual=residual), x + residual)


@pytest.mark.parametrize("p", [-0.1, 1, 1.5, float("nan")])
def test_a_bad_probability_is_named(p):
    with pytest.raises(ValueError, match=rf"p must be in \[0, 1\), got {p}"):
        dropout(torch.zeros(1, 2, 3), p, seed=SEED)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 3)}, ValueError, r"x must be .*got \(2, 3\)"),
        ({"residual": torch.zeros(2, 3, 5)}, ValueError, r"residual .*got \(2, 3, 5\)"),
        ({"residual": torch.zeros(2, 3, 4).double()}, TypeError, "residual is torch.float64"),
        ({"x": torch.zeros(2, 3, 4).long()}, TypeError, "torch.int64"),
        ({"rows": torch.zeros(1).long()}, ValueError, r"rows must be .*got \(1,\)"),
    ],
)
def test_bad_inputs_are_named(change, error, message):
    arguments = {"x": torch.zeros(2, 3, 4), "p": 0.1, "seed": SEED}
    with pytest.raises(error, match=message):
        dropout(**{**arguments, **change})


@pytest.mark.parametrize("shape", [(0, 3, 8), (1, 1, 5), (5, 7, 33), (2, 50, 96)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_gelu_before_dropping(place, shape, with_residual):
    generator = torch.Generator().manual_seed(5)
    x, residual, grad = (4 * torch.randn(shape, generator=generator) for _ in range(3))
    seed = torch.tensor(77)

    def run(x, residual, grad, function):
        x, residual = x.requires_grad_(), residual.requires_grad_()
        added = {"residual": residual} if with_residual else {}
        out = function(x, added)
        inputs = [x, residual] if with_residual else [x]
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    def of_definition(x, added):
        kept = reference.dropout_mask(x.shape, 0.3, seed=seed, rows=torch.arange(shape[0]), site=3)
        dropped = torch.where(kept, F.gelu(x, approximate="tanh") / (1 - 0.3), 0)
        return dropped + added.get("residual", 0)

    with place.forced("dropout"):
        got = run(
            *place.put(x.clone(), residual.clone(), grad),
            lambda x, added: dropout(
                x, 0.3, seed=seed.to(x.device), site=3, activation="gelu", **added
            ),
        )
    plain = run(x.clone(), residual.clone(), grad, of_definition)
    truth = run(x.double(), residual.double(), grad.double(), of_definition)
    for mine, same, right in zip(got, plain, truth, strict=True):
        assert_close_to_truth(mine.cpu(), same, right)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(0, 3, 8), (1, 1, 1), (5, 7, 33), (2, 3, 4), (2, 50, 96)])
def test_tangents_of_dropped_gelu_on_every_instruction_set(isa, shape, p):
    """Against torch.func.jvp of the definition in float64: value, tangent, gradients of both."""
    g = torch.Generator().manual_seed(6)
    tensors = [2 * torch.randn(shape, generator=g) for _ in range(4)]
    rows = torch.arange(shape[0]) + 2**40

    def run(function, jvp, dtype):
        x, dx, *upstream = (t.to(dtype) for t in tensors)
        leaves = [x.requires_grad_(), dx.requires_grad_()]
        given = {"seed": SEED, "rows": rows, "site": 3, "activation": "gelu"}
        pair = jvp(lambda x: function(x, p, **given), (x,), (dx,))
        return [*(t.detach() for t in pair), *torch.autograd.grad(pair, leaves, upstream)]

    truth, same = (
        run(reference.dropout, torch.func.jvp, dtype) for dtype in (torch.float64, torch.float32)
    )
    with use_backend("cpp"), dispatch_log() as log:
        got = run(dropout, forward_mode.jvp, torch.float32)
    assert {(entry.op, entry.backend) for entry in log} == {("dropout", Backend.CPP)}
    for name, *three in zip(("out", "d_out", "g_x", "g_dx"), got, same, truth, strict=True):
        assert_close_to_truth(*three, name=name)


@pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"d_out": None}, "dx and d_out must be given together"),
        ({"d_grad": True}, "d_grad must be given with dx and gelu_at"),
        ({"gelu_at": True}, "d_grad must be given with dx and gelu_at"),
        ({"gelu": False}, "dx needs gelu or gelu_at, and no residual"),
        ({"residual": True}, "dx needs gelu or gelu_at, and no residual"),
        ({"d_out": torch.zeros(2, 3, 5).numpy()}, r"d_out .*\(2, 3, 5\)"),
    ],
)
def test_the_boundary_refuses_of_tangents(changes, message):
    array = lambda: torch.zeros(2, 3, 4).numpy()  # noqa: E731
    given = {"x": array(), "residual": None, "rows": torch.arange(2).numpy(), "p": 0.1}
    given |= {"seed": 1, "site": 0, "position_offset": 0, "position_stride": 1, "num_threads": 1}
    given |= {"out": array(), "gelu": True, "dx": array(), "d_out": array()}
    changes = {name: array() if value is True else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        extension.load().dropout(**(given | changes))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(0, 3, 8), (1, 1, 5), (4, 7, 33), (2, 5, 32)])
@pytest.mark.parametrize("with_residual", [False, True])
def test_factors_of_rows(place, shape, with_residual, p):
    """Drop path's, one of them 0; with a tangent too."""
    g = torch.Generator().manual_seed(5)
    tensors = [torch.randn(shape, generator=g) for _ in range(5)]
    factors = torch.tensor([1.25, 0.0, -2.0, 1.0])[: shape[0]]

    def run(dtype, tensors, factors, seed, function):
        x, residual, dx, *upstream = (t.to(dtype) for t in tensors)
        added = {"residual": residual.requires_grad_()} if with_residual else {}
        given = {"seed": seed, "site": 3, "row_scale": factors.to(dtype), **added}
        leaves = [x.requires_grad_(), dx.requires_grad_(), *added.values()]
        pair = forward_mode.jvp(lambda x: function(x, p, **given), (x,), (dx,))
        plain = function(x, p, **given)
        found = torch.autograd.grad(pair, leaves, upstream, allow_unused=True)
        (of_plain,) = torch.autograd.grad(plain, x, upstream[0])
        return [t.detach().cpu() for t in (*pair, plain, *found, of_plain)]

    rows = torch.arange(shape[0])
    definition = lambda x, p, **given: reference.dropout(x, p, rows=rows, **given)  # noqa: E731
    truth, same = (
        run(dtype, tensors, factors, SEED, definition) for dtype in (torch.float64, torch.float32)
    )
    if p > 0:
        with place.forced("dropout"):
            got = run(torch.float32, place.put(*tensors), *place.put(factors, SEED), dropout)
    else:
        got = run(torch.float32, tensors, factors, SEED, dropout)
    for three in zip(got, same, truth, strict=True):
        assert_close_to_truth(*three)


def test_factors_that_need_a_gradient_or_have_another_shape_are_refused():
    x, factors = torch.ones(2, 3, 4), torch.ones(2)
    with pytest.raises(ValueError, match=r"row_scale must .*got \(3,\)"):
        dropout(x, 0.1, seed=SEED, row_scale=torch.ones(3))
    with pytest.raises(ValueError, match="row_scale must need no derivative"):
        dropout(x, 0.1, seed=SEED, row_scale=factors.requires_grad_())


def test_gelu_without_dropping_is_gelu():
    x = torch.randn(2, 3, 5)
    out = dropout(x, 0.0, seed=torch.tensor(1), activation="gelu")
    assert torch.equal(out, F.gelu(x, approximate="tanh"))


def test_unknown_activation():
    with pytest.raises(ValueError, match="activation must be None or 'gelu', got 'relu'"):
        dropout(torch.ones(1, 1, 4), 0.5, seed=torch.tensor(1), activation="relu")
