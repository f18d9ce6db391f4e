"""Forward-mode derivatives through the ops, and reverse mode through them: against PyTorch's own
derivatives of the definitions in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fmrec_fast import dispatch_log, forward_mode, ops, tangents, use_backend
from fmrec_fast.backend import Backend, availability
from fmrec_fast.reference import attention as attention_definition
from fmrec_fast.reference.encoder import layer_norm
from fmrec_fast.reference.rms_norm import rms_norm
from fmrec_fast.reference.rotary import angles, inverse_frequencies, rotate
from fmrec_fast.testing import assert_close_to_truth

SEED = torch.tensor(7)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def results(pair, inputs, dtype):
    """(value, tangent) of `pair` and the gradients of a mixture of both."""
    inputs = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = pair(*inputs)
    mixture = sum(
        (out * randn(*out.shape, seed=9 + i).to(dtype)).sum() for i, out in enumerate(outputs)
    )
    gradients = torch.autograd.grad(mixture, inputs, allow_unused=True)
    return [*outputs, *(torch.zeros_like(x) if g is None else g for g, x in zip(gradients, inputs))]


def check(pair, definition, inputs):
    truth = results(definition, inputs, torch.float64)
    same = results(definition, inputs, torch.float32)
    ours = results(pair, inputs, torch.float32)
    for i, (a, b, c) in enumerate(zip(ours, same, truth, strict=True)):
        assert_close_to_truth(a, b, c, name=f"result {i}")
    for a, c in zip(results(pair, inputs, torch.float64), truth, strict=True):
        torch.testing.assert_close(a, c, atol=1e-9, rtol=1e-9)


def along(function):
    """The pair (value, tangent) of a function of one tensor, by PyTorch."""
    return lambda x, dx, *rest: forward_mode.jvp(lambda x: function(x, *rest), (x,), (dx,))


@pytest.fixture(params=[1 << 17, 200])
def chunks(request, monkeypatch):
    """In one piece, and in many with a short last one."""
    monkeypatch.setattr(tangents, "CPU_FLOATS", request.param)


@pytest.mark.parametrize("shape", [(3, 7, 36), (1, 1, 8), (0, 5, 8)])
def test_rms_norm(chunks, shape):
    inputs = [randn(*shape), randn(*shape, seed=1), randn(shape[-1], seed=2)]
    check(lambda x, dx, w: tangents.rms_norm(x, w, dx), along(rms_norm), inputs)
    alone = [inputs[0], inputs[2]]
    check(lambda x, w: tangents.rms_norm(x, w, None)[:1], lambda x, w: (rms_norm(x, w),), alone)


@pytest.mark.parametrize("shape", [(3, 7, 36), (0, 5, 8)])
def test_gelu(chunks, shape):
    inputs = [3 * randn(*shape), randn(*shape, seed=1)]
    check(tangents.gelu, along(lambda x: F.gelu(x, approximate="tanh")), inputs)


@pytest.mark.parametrize("heads, shape", [(2, (3, 7, 24)), (4, (5, 1, 48)), (1, (0, 5, 12))])
def test_attention(chunks, heads, shape):
    batch, length, _ = shape
    scale = 0.4 * (torch.arange(length) >= torch.arange(batch)[:, None]).double()
    masks = (torch.rand(batch, heads * length, length) > 0.3) / 0.7

    def definition(qkv):
        q, k, v = qkv.chunk(3, dim=-1)
        return attention_definition.mix(
            q, k, v, scale.to(qkv.dtype), num_heads=heads, drop=lambda p: p * masks.to(p.dtype)
        )

    def ours(qkv, d_qkv):
        drop = lambda p, part: p * masks[part].to(p.dtype)  # noqa: E731
        return tangents.attention(qkv, d_qkv, scale.to(qkv.dtype), heads, drop)

    check(ours, along(definition), [randn(*shape), randn(*shape, seed=1)])


@pytest.mark.parametrize("heads, shape", [(2, (3, 7, 24)), (1, (0, 5, 12))])
def test_rotation(chunks, heads, shape):
    inv_freq = inverse_frequencies(shape[2] // 3 // heads)

    def definition(qkv):
        q, k, v = qkv.chunk(3, dim=-1)
        rotated = [rotate(x, inv_freq.to(x.dtype), heads) for x in (q, k)]
        return (torch.cat((*rotated, v), dim=-1),)

    def ours(qkv):
        cos, sin = angles(inv_freq.to(qkv.dtype), shape[1])
        return (tangents.rotate(qkv, cos, sin, heads),)

    check(ours, definition, [randn(*shape)])


def test_a_rotation_keeps_lengths_and_depends_on_the_distance_only():
    inv_freq = inverse_frequencies(8).double()
    q, k = randn(1, 1, 16).expand(1, 9, 16), randn(1, 1, 16, seed=1).expand(1, 9, 16)
    a, b = rotate(q, inv_freq, 2), rotate(k, inv_freq, 2)
    torch.testing.assert_close(a.norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close((a[0, 3] * b[0, 1]).sum(), (a[0, 8] * b[0, 6]).sum())
    torch.testing.assert_close(rotate(q[:, :1], inv_freq, 2, first=5)[0, 0], a[0, 5])


def test_layer_norm_has_a_right_gradient_of_its_derivative():
    """PyTorch's own has not: its gradient is compared with finite differences."""
    weight, bias = randn(8), randn(8, seed=1)
    x, dx, up = randn(3, 8, seed=2).requires_grad_(), randn(3, 8, seed=3), randn(3, 8, seed=4)

    def loss(x):
        _, tangent = forward_mode.jvp(lambda x: layer_norm(x, weight, bias), (x,), (dx,))
        return (tangent * up).sum()

    (grad,) = torch.autograd.grad(loss(x), x)
    for i in range(8):
        step = torch.zeros(3, 8, dtype=torch.float64)
        step[1, i] = 1e-6
        with torch.no_grad():
            slope = (loss(x + step) - loss(x - step)) / 2e-6
        torch.testing.assert_close(grad[1, i], slope, atol=1e-7, rtol=1e-6)


OPS = {
    "linear": lambda x, w: ops.linear(x, w, w[:, 0]),
    "noise_fusion": lambda x, w: ops.noise_fusion(x, x[:, 0], w[0, :32], delta=0.5, seed=SEED),
    "dropout": lambda x, w: ops.dropout(x, 0.4, seed=SEED, residual=2 * x),
    "dropout of GELU": lambda x, w: ops.dropout(x, 0.4, seed=SEED, activation="gelu"),
    "GELU": lambda x, w: ops.dropout(x, 0.0, seed=SEED, activation="gelu"),
    "rms_norm": lambda x, w: ops.rms_norm(x, w[0, :32]),
    # Scores of order one, as a model's: a softmax of large ones magnifies the rounding before it.
    "attention": lambda x, w: ops.attention(
        ops.linear(x, w * 32**-0.5, w[:, 0]),
        torch.full(x.shape[:2], 0.4).to(x.dtype),
        num_heads=2,
        p=0.3,
        seed=SEED,
        inv_freq=inverse_frequencies(16).to(x.dtype),
    ),
}


@pytest.mark.parametrize("name", OPS)
def test_ops(name):
    """Kernels where there are rules: value, tangent and gradients of both."""
    if availability(Backend.CPP) is not None:
        pytest.skip(f"no extension: {availability(Backend.CPP)}")
    inputs = [randn(5, 14, 32), randn(5, 14, 32, seed=1), randn(96, 32, seed=2)]
    with use_backend("reference"):
        truth = results(along(OPS[name]), inputs, torch.float64)
        same = results(along(OPS[name]), inputs, torch.float32)
    with dispatch_log() as log:
        ours = results(along(OPS[name]), inputs, torch.float32)
    for i, (a, b, c) in enumerate(zip(ours, same, truth, strict=True)):
        assert_close_to_truth(a, b, c, name=f"{name}, result {i}")
    op = "dropout" if "GELU" in name else name
    assert {entry.backend for entry in log if entry.op == op} == {Backend.CPP}, log


def test_a_value_without_a_tangent():
    x = torch.ones(3)
    value, tangent = forward_mode.jvp(lambda z: x * 2, (x,), (x,))
    assert torch.equal(value, 2 * x) and torch.equal(tangent, torch.zeros(3))
    assert forward_mode.split(x) == (x, None) and not forward_mode.is_dual(x, None)
