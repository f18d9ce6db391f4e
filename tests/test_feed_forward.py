"""feed_forward: every backend against the definition, forward and backward."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from fmrec_fast import dispatch_log, extension, use_backend
from fmrec_fast.backend import Backend
from fmrec_fast.ops import dropout, feed_forward
from fmrec_fast.testing import assert_close_to_truth

pytestmark = pytest.mark.op("feed_forward")
SEED = torch.tensor(-987654321987654321)
# (B, P, D, F): rows beside the kernel's chunks of 128 and 256, inner widths beside its panels, one
# position of each row, a row longer than a chunk.
SHAPES = [
    (5, 51, 32, 128),
    (70, 1, 48, 80),
    (2, 150, 16, 144),
    (1, 64, 144, 16),
    (3, 50, 128, 272),
]
NAMES = ("out", "x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2")
needs_cpp = pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))


def tensors(batch, positions, width, inner, seed=0):
    """x, the six parameters, and the gradient of the result."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(width,), (width,), (inner, width), (inner,), (width, inner), (width,)]
    x, grad = (torch.randn(batch, positions, width, generator=g) for _ in range(2))
    return [3 * x, *(0.5 * torch.randn(shape, generator=g) for shape in shapes), grad]


def run(function, given, **options):
    *leaves, grad = given
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def written_out(x, norm_weight, norm_bias, w1, b1, w2, b2, *, p, kept):
    """The sentence of the docstring, with the masks given."""

    def drop(x, mask):
        return torch.where(mask, x / (1 - p), 0)

    normed = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, 1e-12)
    inner = drop(F.gelu(F.linear(normed, w1, b1), approximate="tanh"), kept[0])
    return drop(x + drop(F.linear(inner, w2, b2), kept[1]), kept[2])


def masks(shape, inner, p, **options):
    """The three masks, by the op `dropout` of ones."""
    site = options.pop("site")
    widths = (inner, shape[2], shape[2])
    with use_backend("reference"):
        return [
            dropout(torch.ones(*shape[:2], n), p, site=site + i, **options) > 0
            for i, n in enumerate(widths)
        ]


def check(forced, given, p, put=lambda *t: t, **options):
    kept = masks(given[0].shape, given[3].shape[0], p, **options)
    with forced:
        on = dict(zip(("seed", "rows"), put(options["seed"], options["rows"]), strict=True))
        got = run(lambda *t: feed_forward(*t, p, **{**options, **on}), put(*given))
    same = run(written_out, given, p=p, kept=kept)
    truth = run(written_out, [t.double() for t in given], p=p, kept=kept)
    for name, mine, plain, right in zip(NAMES, got, same, truth, strict=True):
        assert_close_to_truth(mine.cpu(), plain, right, name=name)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_definition(place, shape, p):
    rows = torch.arange(shape[0]) * 1_000_000_007 - 3
    options = {"seed": SEED, "rows": rows, "site": 9, "position_offset": 7, "position_stride": 3}
    check(place.forced("feed_forward"), tensors(*shape), p, put=place.put, **options)


def test_non_contiguous_inputs(place):
    given = [t.mT.contiguous().mT if t.ndim > 1 else t for t in tensors(3, 40, 32, 64)]
    assert not given[0].is_contiguous() and not given[3].is_contiguous()
    rows = torch.arange(6)[::2]
    check(place.forced("feed_forward"), given, 0.3, place.put, seed=SEED, rows=rows, site=1)


@pytest.mark.parametrize(
    "shape", [(0, 5, 16, 16), (5, 0, 16, 16), (1, 5, 16, 32), (70, 1, 12, 48), (70, 1, 16, 20)]
)
def test_what_the_kernel_declines(place, shape):
    """Few rows, and widths that are no multiples of 16: the definition, and the log says why."""
    rows = torch.arange(shape[0])
    forced = place.forced("feed_forward", declines=True)
    check(forced, tensors(*shape), 0.3, place.put, seed=SEED, rows=rows, site=1)


@needs_cpp
@pytest.mark.parametrize("power", [-70, 70])
def test_gradients_of_any_magnitude(isa, power):
    """Powers of two pass through to the bit, a row's own too: no row rounds another's numbers."""
    given = tensors(5, 51, 32, 128)
    powers = torch.ones(5, 51, 1)
    powers[1:, 3::7] = 2.0**power

    def gradients(grad):
        return run(lambda *t: feed_forward(*t, 0.2, seed=SEED), [*given[:-1], grad])[1:]

    with use_backend("cpp"):
        plain = gradients(given[-1])
        for mine, other in zip(gradients(given[-1] * 2.0**power), plain, strict=True):
            assert torch.equal(mine, other * 2.0**power)
        assert torch.equal(gradients(given[-1] * powers)[0], plain[0] * powers)


@needs_cpp
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_rows_keep_apart(isa, value):
    given = tensors(5, 51, 32, 128)
    odd = [given[0].clone(), *given[1:-1], given[-1].clone()]
    odd[0][2, 7] = value
    odd[-1][3, 9] = value
    with use_backend("cpp"):
        plain, mine = (
            run(lambda *t: feed_forward(*t, 0.2, seed=SEED), g)[:2] for g in (given, odd)
        )
    for a, b, rows in zip(plain, mine, ([(2, 7)], [(2, 7), (3, 9)]), strict=True):
        rest = torch.ones(5, 51, dtype=torch.bool)
        for row in rows:
            rest[row] = False
        assert torch.equal(a[rest], b[rest])


@needs_cpp
@pytest.mark.parametrize("isa", extension.load().supported_isas() if extension.available() else [])
def test_instruction_sets_and_threads(isa):
    native, threads, before = extension.load(), torch.get_num_threads(), extension.load().isa()
    given = tensors(23, 50, 64, 208)
    options = {"seed": SEED, "rows": torch.arange(23), "site": 4}
    kept = masks(given[0].shape, 208, 0.2, **options)
    results = []
    try:
        native.set_isa(isa)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("cpp"), dispatch_log() as log:
                results.append(run(lambda *t: feed_forward(*t, 0.2, **options), given))
            assert {entry.backend for entry in log} == {Backend.CPP}
    finally:
        native.set_isa(before)
        torch.set_num_threads(threads)
    same = run(written_out, given, p=0.2, kept=kept)
    truth = run(written_out, [t.double() for t in given], p=0.2, kept=kept)
    for name, one, two, three, plain, right in zip(NAMES, *results, same, truth, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three), f"{name} depends on the threads"
        assert_close_to_truth(one, plain, right, name=name)


@needs_cpp
def test_weights_far_above_the_others(isa):
    """Tiles of bytes and of float16s scale rows and columns by their largest number."""
    given = tensors(3, 50, 64, 272)
    given[3][5, 7], given[3][100] = 300.0, 1e-3
    given[5][9, 200], given[5][:, 17] = -200.0, 1e-3
    options = {"seed": SEED, "rows": torch.arange(3), "site": 2}
    check(use_backend("cpp"), given, 0.1, **options)


@needs_cpp
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions_are_as_close_as_their_definition(isa, precision):
    """With tiles; elsewhere tf32 is float32, and bf16 left to the definition."""
    given = tensors(9, 50, 64, 208)
    options = {"seed": SEED, "rows": torch.arange(9), "site": 4}
    results = []
    for backend in ("reference", "cpp"):
        with use_backend(backend), dispatch_log() as log:
            results.append(
                run(lambda *t: feed_forward(*t, 0.2, precision=precision, **options), given)
            )
        runs = backend == "cpp" and (isa.startswith("amx") or precision == "tf32")
        assert log[0].backend is (Backend.CPP if runs else Backend.REFERENCE)
    kept = masks(given[0].shape, 208, 0.2, **options)
    truth = run(written_out, [t.double() for t in given], p=0.2, kept=kept)
    exact = run(lambda *t: feed_forward(*t, 0.2, **options), given)
    for name, a, b, right in zip(NAMES, results[1], results[0], truth, strict=True):
        assert_close_to_truth(a, b, right, name=name)
        if precision == "tf32" and isa != "amx_fp16":  # two bfloat16s hold 16 bits
            torch.testing.assert_close(a, right.float(), rtol=0, atol=3e-5 * right.abs().max())
    assert torch.equal(results[1][0], exact[0]) == (
        precision == "tf32" and not isa.startswith("amx")
    )


@needs_cpp
def test_a_row_does_not_depend_on_the_batch():
    given = tensors(9, 50, 32, 64)
    order = torch.tensor([4, 0, 8, 3])
    with use_backend("cpp"):
        whole = feed_forward(*given[:-1], 0.3, seed=SEED, rows=torch.arange(9))
        part = feed_forward(given[0][order], *given[1:-1], 0.3, seed=SEED, rows=order)
        last = feed_forward(
            given[0][:, -8:], *given[1:-1], 0.3, seed=SEED, rows=torch.arange(9), position_offset=42
        )
    assert torch.equal(part, whole[order])
    assert torch.equal(last, whole[:, -8:])


@needs_cpp
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row(strange):
    given = tensors(4, 50, 32, 64)
    with use_backend("cpp"):
        plain = feed_forward(*given[:-1], 0.3, seed=SEED)
        given[0][2, 7, 5] = strange
        out = feed_forward(*given[:-1], 0.3, seed=SEED)
    assert not out[2, 7].isfinite().all()
    out[2, 7] = plain[2, 7]
    assert torch.equal(out, plain)


@needs_cpp
def test_nothing_as_wide_as_the_inner_layer_is_kept():
    given = [t.requires_grad_() for t in tensors(8, 50, 32, 512)[:-1]]
    with use_backend("cpp"):
        out = feed_forward(*given, 0.1, seed=SEED)
    mine = {t.data_ptr() for t in given}
    kept = [t for t in out.grad_fn.saved_tensors if t.data_ptr() not in mine]
    assert [t.dtype for t in kept] == [torch.int64]
    assert sum(t.nbytes for t in kept) == 8 * 50 * (512 + 2 * 32) / 8


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 16)}, ValueError, r"x must be .*got \(2, 16\)"),
        ({"w1": torch.zeros(32, 8)}, ValueError, r"w1 must be .*got \(32, 8\)"),
        ({"w2": torch.zeros(16, 33)}, ValueError, r"w2 must be .*got \(16, 33\)"),
        ({"b1": torch.zeros(32).double()}, TypeError, "b1 is torch.float64"),
        ({"rows": torch.zeros(1).long()}, ValueError, r"rows must be .*got \(1,\)"),
        ({"precision": "fp8"}, ValueError, "precision must be one of .*got 'fp8'"),
        ({"p": 1.0}, ValueError, r"p must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_inputs_are_named(change, error, message):
    names = ("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2")
    arguments = dict(zip(names, tensors(2, 3, 16, 32), strict=False)) | {"p": 0.1, "seed": SEED}
    with pytest.raises(error, match=message):
        feed_forward(**{**arguments, **change})


@needs_cpp
def test_the_bindings_want_the_masks_of_a_dropout():
    x, weight, bias, w1, b1, w2, b2 = (t.numpy() for t in tensors(2, 3, 16, 32)[:7])
    native, rows, place = extension.load(), torch.arange(2).numpy(), (5, 0, 0, 1)
    leaves = [torch.empty(a.shape).numpy() for a in (x, weight, bias, w1, b1, w2, b2)]
    for p in (0.0, 0.5):
        refused = pytest.raises(ValueError, match=r"kept must be given .* got None")
        with refused if p else nullcontext():
            out = torch.empty(x.shape).numpy()
            native.feed_forward_forward(
                x, weight, bias, w1, b1, w2, b2, rows, *place, p, None, out, 1
            )
        with refused if p else nullcontext():
            native.feed_forward_backward(x, x, weight, bias, w1, b1, w2, p, None, *leaves, 1)
