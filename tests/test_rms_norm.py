"""rms_norm: every backend against its definition, with and without tangents."""

from __future__ import annotations

import pytest
import torch

from fmrec_fast import dispatch_log, extension, forward_mode, use_backend
from fmrec_fast.backend import Backend
from fmrec_fast.ops import rms_norm
from fmrec_fast.reference import rms_norm as reference
from fmrec_fast.testing import assert_close_to_truth

pytestmark = pytest.mark.op("rms_norm")
SHAPES = [(0, 5, 8), (1, 1, 1), (3, 7, 36), (5, 50, 128), (2, 51, 33), (700, 130)]
needs_cpp = pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))


def draw(*shape):
    """x with a row of zeros and one so small that eps counts, dx, weight, two upstreams."""
    g = torch.Generator().manual_seed(len(shape) + shape[-1])
    x, dx, *upstream = (torch.randn(shape, generator=g) for _ in range(4))
    rows = x.view(-1, shape[-1])
    rows[-1:] = 0
    rows[1:2] *= 1e-4
    return x, dx, torch.randn(shape[-1], generator=g), *upstream


def alone(function, tensors, dtype):
    """Result, and gradients of x and the weight."""
    x, _, weight, upstream, _ = (t.to(dtype) for t in tensors)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def with_tangent(function, jvp, tensors, dtype):
    """Result, derivative along dx, and gradients of x, dx and the weight."""
    x, dx, weight, *upstream = (t.to(dtype) for t in tensors)
    leaves = [x.requires_grad_(), dx.requires_grad_(), weight.requires_grad_()]
    pair = jvp(lambda x: function(x, weight), (x,), (dx,))
    return [*(t.detach() for t in pair), *torch.autograd.grad(pair, leaves, upstream)]


def compare(names, *found):
    """Row by row: the gradients of the small row are as large as it is small."""
    for name, *three in zip(names.split(), *found, strict=True):
        if name == "g_weight":
            assert_close_to_truth(*three, name=name)
            continue
        rows = [t.reshape(-1, t.shape[-1]) for t in three]
        if rows[0].shape[0] == 0:
            continue
        for part in (slice(0, 1), slice(1, 2), slice(2, -1), slice(-1, None)):
            parts = [t[part] for t in rows]
            if parts[0].numel():
                assert_close_to_truth(*parts, name=f"{name}, rows {part}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_definition(place, shape):
    tensors = draw(*shape)
    truth, same = (
        alone(reference.rms_norm, tensors, dtype) for dtype in (torch.float64, torch.float32)
    )
    with place.forced("rms_norm"):
        got = [t.cpu() for t in alone(rms_norm, place.put(*tensors), torch.float32)]
    compare("out g_x g_weight", got, same, truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tangents_on_every_instruction_set(isa, shape):
    """Against torch.func.jvp of the definition in float64."""
    tensors = draw(*shape)
    truth, same = (
        with_tangent(reference.rms_norm, torch.func.jvp, tensors, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    with use_backend("cpp"), dispatch_log() as log:
        got = with_tangent(rms_norm, forward_mode.jvp, tensors, torch.float32)
        plain = alone(rms_norm, tensors, torch.float32)
    assert [(entry.op, entry.backend) for entry in log] == [("rms_norm", Backend.CPP)] * 2
    compare("out d_out g_x g_dx g_weight", got, same, truth)
    assert torch.equal(plain[0], got[0])


def test_threads_change_no_bit(isa):
    tensors, threads = draw(700, 130), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(with_tangent(rms_norm, forward_mode.jvp, tensors, torch.float32))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_non_contiguous_inputs(place):
    x, dx, weight, *upstream = draw(4, 9, 12)
    scattered = [t.transpose(0, 2).contiguous().transpose(0, 2) for t in (x, dx, *upstream)]
    wide = torch.stack((weight, weight), 1)[:, 0]
    assert not wide.is_contiguous() and not any(t.is_contiguous() for t in scattered)
    tensors = (scattered[0], scattered[1], wide, *scattered[2:])
    truth, same = (
        with_tangent(reference.rms_norm, torch.func.jvp, tensors, dtype)
        for dtype in (torch.float64, torch.float32)
    )
    with place.forced("rms_norm"):
        placed = place.put(*tensors)
        got = [t.cpu() for t in with_tangent(rms_norm, forward_mode.jvp, placed, torch.float32)]
    compare("out d_out g_x g_dx g_weight", got, same, truth)


@needs_cpp
def test_where_the_definition_runs():
    x, dx, weight, *_ = draw(3, 12)
    with dispatch_log() as log:
        torch.func.jvp(lambda x: rms_norm(x, weight), (x,), (dx,))
        forward_mode.jvp(lambda w: rms_norm(x, w), (weight,), (weight,))
        rms_norm(x.double(), weight.double())
    assert [entry.backend for entry in log] == [Backend.REFERENCE] * 3
    assert [entry.reason for entry in log[:2]] == [forward_mode.NO_RULE] * 2
    assert "float64" in log[2].reason
    compiled = torch.compile(rms_norm, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight), reference.rms_norm(x, weight))


@needs_cpp
def test_nan_and_infinity_show(isa):
    for value in (float("nan"), float("inf")):
        x, dx, weight, *_ = draw(4, 20)
        x[2, 7] = value
        with use_backend("cpp"):
            out, d_out = forward_mode.jvp(lambda x, w=weight: rms_norm(x, w), (x,), (dx,))
        for result in (out, d_out):
            assert not result[2].isfinite().all() and result[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize(
    "x, weight, error, message",
    [
        (torch.zeros(2, 0), torch.zeros(0), ValueError, r"one channel, got shape \(2, 0\)"),
        (torch.zeros(()), torch.zeros(1), ValueError, r"one channel, got shape \(\)"),
        (torch.zeros(2, 3), torch.zeros(4), ValueError, r"weight must .*got \(4,\)"),
        (torch.zeros(2, 3).long(), torch.zeros(3), TypeError, "torch.int64"),
        (torch.zeros(2, 3), torch.zeros(3).double(), TypeError, "torch.float64"),
    ],
)
def test_bad_inputs_are_named(x, weight, error, message):
    with pytest.raises(error, match=message):
        rms_norm(x, weight)


@needs_cpp
@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"out": torch.zeros(3, 3).numpy()}, ValueError, r"out .*\[M, D\] .*\(3, 3\)"),
        ({"weight": torch.zeros(4).numpy()}, ValueError, r"weight .*\(4,\)"),
        ({"num_threads": 0}, ValueError, "got 0"),
        ({"dx": torch.zeros(2, 3).numpy()}, ValueError, "dx and d_out must be given together"),
        ({"x": torch.zeros(2, 6).numpy()[:, ::2]}, ValueError, "x must be C-contiguous"),
    ],
)
def test_the_boundary_refuses(changes, error, message):
    given = {"x": torch.zeros(2, 3).numpy(), "weight": torch.zeros(3).numpy(), "num_threads": 1}
    with pytest.raises(error, match=message):
        extension.load().rms_norm_forward(**(given | {"out": torch.zeros(2, 3).numpy()} | changes))


@needs_cpp
def test_overlap_is_refused():
    module, (x, weight) = extension.load(), (torch.zeros(2, 3).numpy(), torch.zeros(3).numpy())
    other = [torch.zeros(2, 3).numpy() for _ in range(4)]
    with pytest.raises(ValueError, match="out must not overlap x"):
        module.rms_norm_forward(x, weight, x, 1)
    with pytest.raises(ValueError, match="d_out must not overlap out"):
        module.rms_norm_forward(x, weight, other[0], 1, other[1], other[0])
    with pytest.raises(ValueError, match="g_dx must not overlap g_x"):
        module.rms_norm_backward(
            other[0], x, weight, other[1], torch.zeros(3).numpy(), 1, other[2], other[3], other[1]
        )
