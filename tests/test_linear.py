"""linear: every backend against the definition, forward and backward."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from fmrec_fast import dispatch_log, extension, use_backend
from fmrec_fast.backend import Backend
from fmrec_fast.ops import linear
from fmrec_fast.testing import assert_close_to_truth

pytestmark = pytest.mark.op("linear")
# Rows beside multiples of the kernel's blocks (48 and 96), widths beside its panels of 64.
SHAPES = [
    ((64,), 16, 16),
    ((5, 51), 32, 128),
    ((97,), 128, 80),
    ((3, 50), 144, 48),
    ((2, 7, 40), 16, 208),
    ((1000,), 64, 64),
]
# A weight, and operands of all products, larger than half of the second-level cache; more rows than
# a tall block; weight gradients go over all rows at once (with more rows, by partial sums).
LARGE = (390, 512, 528)
needs_cpp = pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))


def tensors(rows, inner, outer, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((*rows, inner), (outer, inner), (outer,), (*rows, outer))
    return [torch.randn(shape, generator=g) for shape in shapes]


def run(function, x, weight, bias, grad):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize(("rows", "inner", "outer"), SHAPES)
def test_against_the_definition(place, rows, inner, outer):
    given = tensors(rows, inner, outer)
    with place.forced("linear"):
        got = run(linear, *place.put(*given))
    same = run(F.linear, *given)
    truth = run(F.linear, *(t.double() for t in given))
    for mine, plain, right in zip(got, same, truth, strict=True):
        assert_close_to_truth(mine.cpu(), plain, right)


@needs_cpp
@pytest.mark.parametrize("isa", extension.load().supported_isas() if extension.available() else [])
@pytest.mark.parametrize(("rows", "inner", "outer"), [(200, 96, 176), (1000, 96, 176), LARGE])
def test_instruction_sets_and_threads(isa, rows, inner, outer):
    native, threads = extension.load(), torch.get_num_threads()
    given = tensors((rows,), inner, outer)
    truth = run(F.linear, *(t.double() for t in given))
    before = native.isa()
    results = []
    try:
        native.set_isa(isa)
        for count in (1, 2):
            torch.set_num_threads(count)
            with use_backend("cpp"), dispatch_log() as log:
                results.append(run(linear, *given))
            assert {entry.backend for entry in log} == {Backend.CPP}
    finally:
        native.set_isa(before)
        torch.set_num_threads(threads)
    for one, two, right in zip(*results, truth, strict=True):
        assert torch.equal(one, two), "the result depends on the threads"
        assert (one - right).abs().max() <= 2e-6 * right.abs().max()


# An odd number of strips of 16, one more row than a block of 32, a depth of more than one block.
@pytest.mark.parametrize(
    ("rows", "inner", "outer"),
    [(65, 48, 80), (225, 16, 16), (97, 1040, 48), (4000, 128, 176), LARGE],
)
@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
def test_every_instruction_set_is_as_exact_as_pytorch(isa, rows, inner, outer, draw):
    g = torch.Generator().manual_seed(1)
    shapes = ((rows, inner), (outer, inner), (outer,), (rows, outer))
    given = [draw(shape, generator=g) for shape in shapes]
    with use_backend("cpp"):
        got = run(linear, *given)
    truth = run(F.linear, *(t.double() for t in given))
    for mine, plain, right in zip(got, run(F.linear, *given), truth, strict=True):
        assert_close_to_truth(mine, plain, right)


@pytest.mark.parametrize("rows", [97, 400])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_column(isa, strange, rows):
    given = tensors((rows,), 48, 80)
    x, weight, bias, grad = (t.clone() for t in given)
    x[40, 5], grad[70, 9] = strange, strange
    with use_backend("cpp"):
        clean = run(linear, *given)
        out, d_x, d_weight, d_bias = run(linear, x, weight, bias, grad)
    expected = [torch.zeros_like(t, dtype=torch.bool) for t in clean]
    expected[0][40] = expected[1][70] = expected[2][:, 5] = expected[2][9] = True
    expected[3][9] = True
    for mine, plain, lost in zip((out, d_x, d_weight, d_bias), clean, expected, strict=True):
        assert torch.equal(~mine.isfinite(), lost)
        assert torch.equal(mine[~lost], plain[~lost])


@needs_cpp
def test_not_contiguous():
    x, weight, bias, grad = tensors((80, 3), 32, 48)
    strided = (x.transpose(0, 1).contiguous().transpose(0, 1), weight.T.contiguous().T)
    assert not any(t.is_contiguous() for t in strided)
    with use_backend("cpp"):
        got = run(linear, *strided, bias, grad.expand_as(grad))
    for mine, right in zip(got, run(F.linear, x, weight, bias, grad), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-5)


@needs_cpp
@pytest.mark.parametrize("rows", [70, 200])
@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_only_the_gradients_that_are_wanted(frozen, rows):
    x, weight, bias, grad = tensors((rows,), 32, 16)
    leaves = [t.requires_grad_(n not in frozen) for n, t in enumerate((x, weight, bias))]
    wanted = [t for t in leaves if t.requires_grad]
    with use_backend("cpp"):
        got = torch.autograd.grad(linear(*leaves), wanted, grad)
    for mine, right in zip(got, torch.autograd.grad(F.linear(*leaves), wanted, grad), strict=True):
        torch.testing.assert_close(mine, right, atol=1e-5, rtol=1e-5)


@needs_cpp
@pytest.mark.parametrize(
    ("rows", "inner", "outer", "reason"),
    [
        ((100,), 20, 32, "multiples of 16, got 20 and 32"),
        ((100,), 32, 10, "got 32 and 10"),
        ((63,), 32, 32, "at least 64 rows"),
        ((0,), 32, 32, "at least 64 rows"),
    ],
)
def test_declined(rows, inner, outer, reason):
    given = tensors(rows, inner, outer)
    with use_backend("cpp"), dispatch_log() as log:
        got = run(linear, *given)
    assert [entry.backend for entry in log] == [Backend.REFERENCE]
    assert reason in log[0].reason
    for mine, right in zip(got, run(F.linear, *given), strict=True):
        assert torch.equal(mine, right)


def test_bad_arguments():
    x, weight, bias, _ = tensors((70,), 32, 16)
    with pytest.raises(ValueError, match=r"weight must be \[O, I\] .*, got \(16, 48\)"):
        linear(x, torch.ones(16, 48), bias)
    with pytest.raises(ValueError, match=r"bias must be \[O\]"):
        linear(x, weight, torch.ones(17))
    with pytest.raises(TypeError, match=r"weight is torch.float64"):
        linear(x, weight.double(), bias)


@needs_cpp
def test_bad_arrays():
    native = extension.load()
    x, weight, bias, grad = (t.numpy() for t in tensors((70,), 32, 16))
    for change, message in (
        ({"weight": weight[:, :16]}, "contiguous"),
        ({"weight": weight[:15].copy()}, r"bias"),
        ({"x": x.astype("float64")}, "float64"),
        ({"out": grad[:69].copy()}, r"out"),
        ({"num_threads": 0}, "num_threads"),
    ):
        given = {"x": x, "weight": weight, "bias": bias, "out": grad.copy(), "num_threads": 1}
        with pytest.raises((TypeError, ValueError), match=message):
            native.linear_forward(**given | change)
    with pytest.raises(ValueError, match="multiple of 16, got 20"):
        narrow = torch.ones(16, 20).numpy()
        native.linear_forward(torch.ones(70, 20).numpy(), narrow, bias, grad.copy(), 1)


def of_bf16(x, weight, bias, grad, dtype):
    """The result and the gradients by products of bfloat16 operands, in `dtype`."""
    outer, inner = weight.shape
    out_shape, in_shape = (*x.shape[:-1], outer), (*x.shape[:-1], inner)
    x, weight, near = (t.to(torch.bfloat16).to(dtype).flatten(0, -2) for t in (x, weight, grad))
    grad = grad.to(dtype).flatten(0, -2)
    out = (x @ weight.T + bias.to(dtype)).view(out_shape)
    return out, (near @ weight).view(in_shape), near.T @ x, grad.sum(0)


@pytest.mark.parametrize(("rows", "inner", "outer"), [*SHAPES, ((0,), 5, 3), ((7,), 5, 3)])
def test_bf16_rounds_both_operands_of_every_product(place, rows, inner, outer):
    """The result and each gradient are products of bfloat16 operands, exact up to float32."""
    given = tensors(rows, inner, outer)
    small = math.prod(rows) < 64 or inner % 16 or outer % 16
    tiles = place.backend is Backend.CPP and extension.load().isa().startswith("amx")
    with place.forced("linear", declines=bool(small) or not tiles):
        got = run(lambda *leaves: linear(*leaves, precision="bf16"), *place.put(*given))
    same, truth = of_bf16(*given, torch.float32), of_bf16(*given, torch.float64)
    for mine, plain, right in zip(got, same, truth, strict=True):
        assert mine.dtype == torch.float32
        assert_close_to_truth(mine.cpu(), plain, right)


@needs_cpp
@pytest.mark.parametrize(
    ("rows", "inner", "outer"), [(65, 48, 80), (97, 1040, 48), (400, 128, 16), LARGE]
)
def test_bf16_on_every_instruction_set(isa, rows, inner, outer):
    """On tiles in one product of planes, elsewhere by the definition; threads change no bit."""
    given, threads, results = tensors((rows,), inner, outer), torch.get_num_threads(), []
    truth = of_bf16(*given, torch.float64)
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            with use_backend("cpp"), dispatch_log() as log:
                results.append(run(lambda *leaves: linear(*leaves, precision="bf16"), *given))
            assert [entry.backend for entry in log] == [
                Backend.CPP if isa.startswith("amx") else Backend.REFERENCE
            ]
            assert isa.startswith("amx") or "without AMX" in log[0].reason
    finally:
        torch.set_num_threads(threads)
    for one, two, plain, right in zip(*results, of_bf16(*given, torch.float32), truth, strict=True):
        assert not isa.startswith("amx") or torch.equal(one, two)
        assert_close_to_truth(one, plain, right)
    x, weight, bias, grad = (t.numpy() for t in given)
    native = extension.load()
    asked = "fp8" if isa.startswith("amx") else "bf16"
    with pytest.raises(ValueError, match=rf"precision .*got {isa}$|got 'fp8'"):
        native.linear_forward(x, weight, bias, grad.copy(), 1, asked)


def test_bf16_only_the_gradients_that_are_wanted():
    x, weight, bias, grad = tensors((5,), 16, 32)
    full = run(lambda *leaves: linear(*leaves, precision="bf16"), x, weight, bias, grad)[1:]
    for i in range(3):
        some = [t.clone().requires_grad_(i == j) for j, t in enumerate((x, weight, bias))]
        linear(*some, precision="bf16").backward(grad)
        assert torch.equal(some[i].grad, full[i])


def eleven_bits(x):
    """To 10 bits behind the first, halves away from 0."""
    mantissa, exponent = torch.frexp(x.double())
    return torch.ldexp(torch.trunc(mantissa * 2048 + torch.sign(mantissa) * 0.5) / 2048, exponent)


@needs_cpp
@pytest.mark.parametrize(("rows", "inner", "outer"), [(65, 48, 80), (97, 1040, 48), (400, 128, 16)])
def test_tf32_on_every_instruction_set(isa, rows, inner, outer):
    """The definition's products are of rounded operands; tiles are nearer, others in float32."""
    x, weight, bias, grad = given = tensors((rows,), inner, outer)
    near, near_weight, near_grad = (eleven_bits(t) for t in (x, weight, grad))
    asked = near @ near_weight.T + bias, near_grad @ near_weight, near_grad.T @ near, grad.sum(0)
    truth = run(linear, *(t.double() for t in given))
    results = {}
    for name, precision in (("reference", "tf32"), ("cpp", "tf32"), ("cpp", "float32")):
        with use_backend(name), dispatch_log() as log:
            results[name, precision] = run(
                lambda *leaves, precision=precision: linear(*leaves, precision=precision), *given
            )
        assert [entry.backend.value for entry in log] == [name]
    for definition, mine, exact, wanted, right in zip(*results.values(), asked, truth, strict=True):
        scale = right.abs().max().item()
        torch.testing.assert_close(definition, wanted.float(), rtol=0, atol=1e-6 * scale)
        torch.testing.assert_close(mine, right.float(), rtol=0, atol=1e-5 * scale)
        assert torch.equal(mine, exact) == (not isa.startswith("amx") or right.ndim == 1)


def test_unknown_precision():
    x, weight, bias, _ = tensors((5,), 16, 32)
    with pytest.raises(ValueError, match=r"precision must be one of .*'tf32', 'bf16'.*, got 'fp8'"):
        linear(x, weight, bias, precision="fp8")
