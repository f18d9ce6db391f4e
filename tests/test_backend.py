"""Choice of backend and of random numbers, the dispatch log, and the table of missing kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmrec_fast import backend as backends
from fmrec_fast import dispatch_log, extension, noise, use_backend, use_rng
from fmrec_fast.backend import (
    MISSING,
    OPS,
    Backend,
    BackendError,
    Dispatch,
    Rng,
    availability,
    current_backend,
    current_rng,
)
from fmrec_fast.models.blocks import TransformerBlock
from fmrec_fast.ops import (
    attention,
    dropout,
    dropout_layer_norm,
    encoder,
    euler_sampler,
    feed_forward,
    history_loss,
    item_cross_entropy,
    item_topk,
    linear,
    noise_fusion,
    picard_sweep,
    rms_norm,
    self_attention,
)
from fmrec_fast.ops.euler_sampler import SamplerWeights

ROOT = Path(__file__).parent.parent
needs_cpp = pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch):
    monkeypatch.delenv("FMREC_FAST_BACKEND", raising=False)
    monkeypatch.delenv("FMREC_FAST_RNG", raising=False)


def fuse(dtype=torch.float32):
    e = torch.ones(2, 3, 4, dtype=dtype)
    return noise_fusion(e, e[:, 0], e[:, 0], delta=0.5, seed=torch.tensor(1))


def what_ran(run=fuse) -> list[Dispatch]:
    with dispatch_log() as log:
        run()
    return log


def test_unwritten_memory_is_nan_in_these_tests():
    assert torch.empty(3).isnan().all()
    assert torch.ones(3).new_empty(2, 2).isnan().all()
    assert (torch.empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


# --- the table ------------------------------------------------------------------------------


def test_the_table_of_missing_kernels_is_what_the_folders_hold():
    for op in OPS:
        for backend, path in (
            (Backend.TRITON, ROOT / "kernels" / f"{op}.py"),
            (Backend.CPP, ROOT / "csrc" / f"{op}.cpp"),
        ):
            missing = (op, backend) in MISSING
            assert missing != path.exists(), f"{op}, {backend}: MISSING and {path} disagree"
    assert all(op in OPS and backend in Backend for op, backend in MISSING)
    assert all(reason for reason in MISSING.values())


def test_every_op_has_its_rooms():
    for op in OPS:
        for folder, name in (
            ("fmrec_fast/ops", f"{op}.py"),
            ("fmrec_fast/reference", f"{op}.py"),
            ("tests", f"test_{op}.py"),
        ):
            assert (ROOT / folder / name).exists(), f"{folder}/{name} is missing"


# --- choosing -------------------------------------------------------------------------------


def test_auto_takes_the_kernel_of_the_tensors_device():
    (entry,) = what_ran()
    expected = Backend.CPP if extension.available() else Backend.REFERENCE
    assert (entry.op, entry.backend) == ("noise_fusion", expected)
    assert entry.reason == (extension.reason() or "")


def test_auto_falls_back_with_the_reason():
    (entry,) = what_ran(lambda: fuse(torch.float64))
    assert entry.backend is Backend.REFERENCE
    assert extension.reason() in (entry.reason, None)
    if extension.available():
        assert "float32, got torch.float64" in entry.reason


@pytest.mark.skipif(availability("triton") is not None, reason=str(availability("triton")))
def test_an_op_without_the_kernel_runs_its_definition_and_says_so():
    missing = ("linear", Backend.TRITON)
    x = torch.ones(2, 4)
    with use_backend("triton"):
        (entry,) = what_ran(lambda: linear(x, x, x[:, 0]))
    assert entry == Dispatch("linear", Backend.REFERENCE, MISSING[missing])


@pytest.mark.parametrize("backend", ["reference", Backend.REFERENCE])
def test_reference_by_name(backend):
    with use_backend(backend):
        assert what_ran() == [Dispatch("noise_fusion", Backend.REFERENCE)]


@needs_cpp
def test_cpp_by_name():
    with use_backend("cpp"):
        assert what_ran() == [Dispatch("noise_fusion", Backend.CPP)]


@needs_cpp
@pytest.mark.parametrize("op", [op for op in OPS if (op, Backend.CPP) not in MISSING])
def test_cpp_by_name_refuses_what_it_cannot_take(op):
    double = torch.ones(2, 4, dtype=torch.float64)
    block = TransformerBlock(4).double().requires_grad_(False).weights()
    weights = SamplerWeights([block], double[0], double[0], 1, "published", 0.1)
    calls = {
        "noise_fusion": lambda: fuse(torch.float64),
        "linear": lambda: linear(double.repeat(64, 4), double.repeat(8, 4), double.repeat(1, 4)[0]),
        "feed_forward": lambda: feed_forward(
            *(torch.ones(s, dtype=torch.float64) for s in ((64, 1, 16), 16, 16, (16, 16), 16)),
            *(torch.ones(s, dtype=torch.float64) for s in ((16, 16), 16)),
            0.5,
            seed=torch.tensor(1),
        ),
        "self_attention": lambda: self_attention(
            torch.ones(64, 1, 16, dtype=torch.float64),
            torch.ones(64, 1, dtype=torch.float64),
            *(torch.ones(16, dtype=torch.float64) for _ in range(2)),
            *(torch.ones(s, dtype=torch.float64) for s in ((16, 16), 16) * 4),
            0.5,
            num_heads=1,
            seed=torch.tensor(1),
        ),
        "dropout": lambda: dropout(double[:, None], 0.5, seed=torch.tensor(1)),
        "dropout_layer_norm": lambda: dropout_layer_norm(
            *(torch.ones(s, dtype=torch.float64) for s in ((2, 1, 16), 16, 16)),
            0.5,
            seed=torch.tensor(1),
        ),
        "item_cross_entropy": lambda: item_cross_entropy(double, double, torch.tensor([0, 1])),
        "history_loss": lambda: history_loss(double, double, double[:, 0], torch.tensor([[1]] * 2)),
        "item_ranking": lambda: item_topk(double, double, 1),
        "attention": lambda: attention(
            torch.cat([double[:, None]] * 3, -1), double[:, :1], num_heads=1
        ),
        "rms_norm": lambda: rms_norm(double, double[0]),
        "encoder": lambda: encoder(double[:, None], double[:, :1], [block], num_heads=1),
        "euler_sampler": lambda: euler_sampler(
            double[:, None], double[:, :1], double, double, weights, times=double[:, 0]
        ),
        "picard_sweep": lambda: picard_sweep(
            double[:, None], double[:, :1], double[:, None], double[:1], weights
        ),
    }
    message = f"'cpp' was asked for {op}, but its kernels take float32, got torch.float64"
    with use_backend("cpp"), pytest.raises(BackendError, match=message):
        calls[op]()


def test_triton_by_name_refuses_cpu_tensors_without_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = "'triton' was asked for noise_fusion, but .*(cpu.*TRITON_INTERPRET|not installed)"
    with pytest.raises(BackendError, match=message), use_backend("triton"):
        fuse()


def test_a_backend_that_is_not_installed_cannot_be_asked_for(monkeypatch):
    monkeypatch.setattr(extension, "available", lambda: False)
    monkeypatch.setattr(extension, "reason", lambda: "it was left out")
    with pytest.raises(BackendError, match="'cpp' was asked for, but it was left out"):
        with use_backend("cpp"):
            pass
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match=r"'triton' was asked for, but .* not installed"):
        with use_backend("triton"):
            pass
    assert current_backend() is Backend.AUTO
    (entry,) = what_ran()
    assert entry == Dispatch("noise_fusion", Backend.REFERENCE, "it was left out")


def test_availability(monkeypatch):
    assert availability("reference", "cuda") is None
    assert availability("auto") is None
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "TRITON_INTERPRET" in availability("triton", "cpu")
    if extension.available():
        assert availability("cpp") is None
        assert "works on cpu" in availability("cpp", "cuda")
    with pytest.raises(ValueError, match="got 'cuda'"):
        availability("cuda")


@pytest.mark.gpu
def test_auto_takes_triton_on_a_gpu():
    e = torch.ones(2, 3, 4, device="cuda")
    (entry,) = what_ran(lambda: noise_fusion(e, e[:, 0], e[:, 0], delta=0.5))
    assert entry == Dispatch("noise_fusion", Backend.TRITON)


# --- names, nesting, environment ------------------------------------------------------------


@pytest.mark.parametrize(
    "use, current, default, one, two",
    [
        (use_backend, current_backend, Backend.AUTO, Backend.REFERENCE, Backend.AUTO),
        (use_rng, current_rng, Rng.STREAM, Rng.PUBLISHED, Rng.STREAM),
    ],
)
def test_nesting_and_restoration(use, current, default, one, two):
    assert current() is default
    with use(one):
        assert current() is one
        with use(two.value):
            assert current() is two
        assert current() is one
        with pytest.raises(KeyError), use(two):
            raise KeyError
        assert current() is one
    assert current() is default


@pytest.mark.parametrize("use, name", [(use_backend, "backend"), (use_rng, "rng")])
@pytest.mark.parametrize("value", ["cuda", "", None, 3])
def test_an_unknown_name_is_refused_with_the_names_there_are(use, name, value):
    with pytest.raises(ValueError) as error, use(value):
        pass
    message = str(error.value)
    assert message.startswith(f"{name} must be one of [") and message.endswith(f"got {value!r}")


@pytest.mark.parametrize(
    "variable, value, current, use, other",
    [
        ("FMREC_FAST_BACKEND", "reference", current_backend, use_backend, "auto"),
        ("FMREC_FAST_RNG", "published", current_rng, use_rng, "stream"),
    ],
)
def test_environment_variables(monkeypatch, variable, value, current, use, other):
    monkeypatch.setenv(variable, value)
    assert current() == value
    with use(other):  # what the program says counts for more
        assert current() == other
    assert current() == value
    monkeypatch.setenv(variable, "fast")
    with pytest.raises(ValueError, match=f"{variable} must be one of .*got 'fast'"):
        current()


def test_the_environment_governs_ops(monkeypatch):
    monkeypatch.setenv("FMREC_FAST_BACKEND", "reference")
    assert what_ran() == [Dispatch("noise_fusion", Backend.REFERENCE)]
    monkeypatch.setenv("FMREC_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match="FMREC_FAST_BACKEND"):
        fuse()


def test_logs_do_not_leak():
    with dispatch_log() as outer:
        fuse()
        with dispatch_log() as inner:
            fuse()
        fuse()
    fuse()
    assert len(outer) == 2 and len(inner) == 1


def test_names_print_as_they_are_written():
    assert str(Backend.CPP) == "cpp" and f"{Rng.PUBLISHED}" == "published"
    assert Backend("triton") is Backend.TRITON


@needs_cpp
def test_one_seed_gives_the_same_noise_on_every_backend():
    results = []
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            results.append(fuse())
    torch.testing.assert_close(results[0], results[1], atol=1e-6, rtol=1e-6)
    rows = torch.arange(2)
    lam = noise.lam(torch.tensor(1), rows, 0, 3, 4, 0.5)
    torch.testing.assert_close(results[0], 1 + 2 * lam)


def test_whatever_runs_on_a_gpu_has_the_mark(monkeypatch):
    """`pytest -m gpu` is all of it: every backend's tests there, not only those that need one."""
    from tests import conftest

    monkeypatch.setattr(conftest, "CUDA", True)
    monkeypatch.setattr(conftest, "availability", lambda backend, device: None)
    for op in OPS:
        marked = {place.id: [mark.name for mark in place.marks] for place in conftest.places(op)}
        assert all((marks == ["gpu"]) == name.endswith("cuda") for name, marks in marked.items())
        assert "reference-cuda" in marked
