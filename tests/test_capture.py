"""A captured function: replays, outputs, generators, what a capture leaves behind."""

from __future__ import annotations

import pytest
import torch

from fmrec_fast import dispatch_log, noise
from fmrec_fast.capture import Capture, Pool
from fmrec_fast.ops import noise_fusion

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def pool(request) -> Pool:
    return Pool(request.param)


def test_a_replay_reads_the_static_tensors_as_they_are_then(pool):
    x = torch.zeros(3, device=pool.device)
    capture = Capture(lambda: (x * 2 + 1,), pool)
    for value in (0.0, 5.0, -1.0):
        x.fill_(value)
        assert capture.replay()[0].tolist() == [2 * value + 1] * 3


def test_outputs_are_the_same_tensors_overwritten_by_the_next_replay(pool):
    x = torch.ones(3, device=pool.device)
    capture = Capture(lambda: (x, x.sum()), pool)  # an input handed out is no exception
    first = capture.replay()
    kept = [tensor.clone() for tensor in first]
    x.fill_(2)
    second = capture.replay()
    assert all(a is b for a, b in zip(first, second))
    assert [t.tolist() for t in kept] == [[1, 1, 1], 3]
    assert [t.tolist() for t in first] == [[2, 2, 2], 6]


def test_every_replay_draws_anew_and_manual_seed_governs(pool):
    out = []
    seed = torch.zeros((), dtype=torch.int64, device=pool.device)

    def draw() -> tuple:
        seed.copy_(noise.draw_seed(pool.device))
        return (seed,)

    capture = Capture(draw, pool)
    for _ in range(2):
        torch.manual_seed(3)
        out.append([int(capture.replay()[0]) for _ in range(3)])
    assert out[0] == out[1] and len(set(out[0])) == 3
    torch.manual_seed(3)
    assert [int(draw()[0]) for _ in range(3)] == out[0]  # and they are those of ordinary calls
    torch.manual_seed(4)
    assert int(capture.replay()[0]) not in out[0]


def test_a_capture_leaves_no_trace(pool):
    """Neither in what the function changes nor in the generators, its own ones included."""
    total = torch.zeros((), device=pool.device)
    own = torch.Generator(pool.device).manual_seed(7)

    def step() -> tuple:
        total.add_(1)
        extra = torch.rand((), device=pool.device, generator=own)
        return (torch.rand((), device=pool.device), extra)

    torch.manual_seed(5)
    with dispatch_log() as log:
        capture = Capture(step, pool, warmups=3, changes=[total], generators=[own])
    assert total == 0 and log == []
    got = [tensor.clone() for tensor in capture.replay()]
    assert total == 1
    torch.manual_seed(5)
    own.manual_seed(7)
    assert [float(a) for a in step()] == [float(b) for b in got]


def test_training_steps_are_captured_too(pool):
    """Gradients, and an optimizer whose state the warm-up would change."""
    weight = torch.nn.Parameter(torch.ones(4, device=pool.device))
    x = torch.arange(4.0, device=pool.device)
    weight.grad = torch.zeros_like(weight)

    def step() -> tuple:
        weight.grad.zero_()
        loss = ((weight * x - 1) ** 2).sum()
        loss.backward()
        with torch.no_grad():
            weight.sub_(0.01 * weight.grad)
        return (loss.detach(),)

    capture = Capture(step, pool, changes=[weight])
    got = [float(capture.replay()[0]) for _ in range(3)]
    after = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(1)
    assert got == pytest.approx([float(step()[0]) for _ in range(3)])
    torch.testing.assert_close(after, weight.detach())
    assert got[0] > got[1] > got[2]


def test_the_dispatch_log_sees_a_replay_as_it_sees_a_call(pool):
    e, z, tau = (torch.zeros(2, *shape, 8, device=pool.device) for shape in ((3,), (), ()))

    def fuse() -> tuple:
        return (noise_fusion(e, z, tau, delta=0.1),)

    with dispatch_log() as expected:
        fuse()
    capture = Capture(fuse, pool)
    for _ in range(2):
        with dispatch_log() as log:
            capture.replay()
        assert log == expected and len(log) == 1


def test_outputs_are_no_inference_tensors(pool):
    """Whoever replays first, the next one may write to them."""
    x = torch.zeros(2, device=pool.device)
    capture = Capture(lambda: (x + 1,), pool)
    with torch.inference_mode():
        capture.replay()
    capture.replay()[0].add_(1)
    assert capture.replay()[0].tolist() == [1, 1]


def test_errors_of_the_function_are_its_own(pool):
    def fails() -> tuple:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Capture(fails, pool).replay()
    with pytest.raises(ValueError, match="warmups must be at least 1, got 0"):
        Capture(fails, pool, warmups=0)


@pytest.mark.gpu
def test_captures_of_a_pool_share_its_memory():
    """Ten captures with a temporary of 64 MB each take about that of one."""
    pool, x = Pool("cuda"), torch.zeros(2**24, device="cuda")
    captures = [Capture(lambda: ((x + 1).sum(),), pool)]
    reserved = torch.cuda.memory_reserved()
    captures += [Capture(lambda: ((x + 1).sum(),), pool) for _ in range(9)]
    assert torch.cuda.memory_reserved() - reserved < 2**26
    assert {float(capture.replay()[0]) for capture in captures} == {2.0**24}


@pytest.mark.gpu
def test_replays_run_on_the_current_stream():
    x = torch.zeros(3, device="cuda")
    capture = Capture(lambda: (x + 1,), Pool("cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x.fill_(4)
        got = capture.replay()[0].clone()
    stream.synchronize()
    assert got.tolist() == [5, 5, 5]
