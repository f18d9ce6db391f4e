"""fmrec_fast._C against the definitions in PyTorch, for every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrec_fast import extension, noise, use_backend

if not extension.available():
    pytest.skip(str(extension.reason()), allow_module_level=True)

C = extension.load()
SEEDS = [0, -1, 0x1234567890ABCDEF, -(2**63)]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + 1))


def row_numbers(batch: int) -> torch.Tensor:
    # Beyond 32 bits and negative: the stream takes the low word.
    return torch.arange(batch) * 1_000_000_007 - 3


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.tobytes() == b.tobytes()


# --- the noise stream -----------------------------------------------------------------------

SHAPES = [
    (0, 5, 8),
    (1, 1, 1),
    (1, 1, 3),
    (5, 1, 32),
    (5, 50, 3),
    (1, 51, 32),
    (2, 51, 130),
    (5, 50, 96),
    (2, 0, 4),
    (2, 3, 2100),
    (3, 9, 128),  # whole positions of whole vectors, a few at a time and more
    (2, 5, 512),
    (9, 51, 99),  # enough work for two threads
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_lambda_is_the_stream(isa, shape, seed):
    rows = row_numbers(shape[0])
    out = np.full(shape, np.nan, np.float32)
    C.noise_lambda(rows.numpy(), seed, 7, 1.0, out, 2)
    expected = noise.lam(torch.tensor(seed), rows, 7, shape[1], shape[2], 1.0).numpy()
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)


def test_lambda_over_many_numbers(isa):
    # Enough draws to meet the tails of the logarithm and every quadrant.
    rows = torch.arange(100)
    out = np.empty((100, 50, 128), np.float32)
    C.noise_lambda(rows.numpy(), 3, 2**32 + 5, 1.0, out, 2)
    expected = noise.lam(torch.tensor(3), rows, 5, 50, 128, 1.0).numpy()
    np.testing.assert_allclose(out, expected, rtol=0, atol=2e-6)
    assert abs(out.mean() - 1) < 5e-3
    assert abs(out.std() - 1) < 5e-3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_noise_fusion_forward_and_backward(isa, shape):
    batch, length, channels = shape
    rows, seed, delta = row_numbers(batch), torch.tensor(-99), 0.3
    e, shift, grad = random(*shape), random(batch, channels), random(*shape)
    lam = noise.lam(seed, rows, 11, length, channels, delta)
    results = []
    for threads in (1, 2):
        out = np.full(shape, np.nan, np.float32)
        d_shift = np.full((batch, channels), np.nan, np.float32)
        args = (rows.numpy(), seed.numpy(), 11, delta)
        C.noise_fusion_forward(e.numpy(), shift.numpy(), *args, out, threads)
        C.noise_fusion_backward(grad.numpy(), *args, d_shift, threads)
        results.append((out, d_shift))
    expected = (e + lam * shift[:, None]).numpy()
    np.testing.assert_allclose(out, expected, rtol=1e-6, atol=4e-6)
    expected = (lam.double() * grad).sum(1).numpy()
    np.testing.assert_allclose(d_shift, expected, rtol=1e-5, atol=2e-5)
    for one, two in zip(*results):
        assert same(one, two)


def test_noise_fusion_in_place(isa):
    e, shift, rows = random(3, 5, 18).numpy(), random(3, 18).numpy(), row_numbers(3).numpy()
    out = np.empty_like(e)
    C.noise_fusion_forward(e, shift, rows, 1, 2, 0.5, out, 1)
    C.noise_fusion_forward(e, shift, rows, 1, 2, 0.5, e, 1)
    assert same(e, out)


DRAWS = {
    "start": lambda seed, rows: [noise.start(seed, rows, channels) for channels in CHANNELS],
    "uniforms": lambda seed, rows: [noise.uniforms(seed, rows)],
    "time_normals": lambda seed, rows: [noise.time_normals(seed, rows)],
    "interval": lambda seed, rows: noise.interval(seed, rows),
    "anchor": lambda seed, rows: [part for d in CHANNELS for part in noise.anchor(seed, rows, d)],
    "path": lambda seed, rows: [noise.path(seed, rows, site) for site in (0, 3, 2**32 - 1)],
    "wide_words": lambda seed, rows: [noise.wide_words(seed, 157 * len(rows))],
    "step_seed": lambda seed, rows: [noise.step_seed(seed, step) for step in (0, 29, 2**31)],
}
CHANNELS = (0, 1, 3, 32, 130, 2100)


@pytest.mark.parametrize("batch", [0, 1, 5, 131])
@pytest.mark.parametrize("name", DRAWS)
def test_small_draws_are_the_stream(isa, monkeypatch, name, batch):
    seeds, rows = [torch.tensor(seed) for seed in SEEDS], row_numbers(2 * batch)[::2]
    with use_backend("reference"):
        expected = [draw for seed in seeds for draw in DRAWS[name](seed, rows)]
    monkeypatch.setattr(noise, "philox_4x32", None)  # the definition cannot run
    got = [draw for seed in seeds for draw in DRAWS[name](seed, rows)]
    exact = name not in ("start", "time_normals")
    for one, wanted in zip(got, expected, strict=True):
        tolerance = 0.0 if exact else 1e-6
        torch.testing.assert_close(one, wanted, atol=tolerance, rtol=0)


def test_small_draws_do_not_depend_on_the_threads(isa):
    rows = row_numbers(301).numpy()
    results = []
    for threads in (1, 2, 3):
        floats = [np.full((301, 66), np.nan, np.float32) for _ in range(2)]
        C.stream_normals(rows, -7, 2**32 + 3, floats[0], threads)
        C.stream_uniforms(rows, -7, 2**32 + 3, floats[1], threads)
        drawn = np.empty(20_001, np.int64)
        C.stream_words(-7, 5, drawn, threads)
        results.append((*floats, drawn))
    for other in results[1:]:
        assert all(same(a, b) for a, b in zip(results[0], other))
    later = np.empty(100, np.int64)
    C.stream_words(-7, 5 + 700, later, 1)
    assert same(later, results[0][2][700:800])


# --- dropout --------------------------------------------------------------------------------


def dropout_definition(x, residual, rows, seed, site, offset, stride, p):
    positions = offset + stride * torch.arange(x.shape[1])
    words = noise.words(torch.tensor(seed), rows, torch.tensor([site]), positions, x.shape[2])
    word = torch.stack(words, -1)[0].flatten(-2)[..., : x.shape[2]]
    threshold = min(round(p * 4294967296), 2**32 - 1)
    scale = torch.tensor(1 / (1 - p), dtype=torch.float32)
    kept = torch.where(word >= threshold, x * scale, torch.zeros(()))
    return kept if residual is None else residual + kept


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 1 - 2**-40])
def test_dropout_is_the_definition(isa, shape, p):
    x, residual, rows = random(*shape), random(*shape) * 3, row_numbers(shape[0])
    for added in (None, residual):
        for site, offset, stride in ((0, 0, 1), (2**32 + 9, 49, 51), (3, -2, -7), (1, 2**32, 0)):
            expected = dropout_definition(x, added, rows, -5, site, offset, stride, p).numpy()
            for threads in (1, 2):
                out = np.full(shape, np.nan, np.float32)
                added_array = None if added is None else added.numpy()
                args = (added_array, rows.numpy(), -5, site, offset, stride, p, out, threads)
                C.dropout(x.numpy(), *args)
                np.testing.assert_allclose(out, expected, rtol=1e-6, atol=1e-6)


def test_dropout_in_place(isa):
    rows = row_numbers(7).numpy()
    x, residual = random(7, 50, 130).numpy(), random(7, 50, 130).numpy()
    out = np.empty_like(x)
    C.dropout(x, residual, rows, 4, 0, 0, 1, 0.2, out, 2)
    for target in ("x", "residual"):
        a, b = x.copy(), residual.copy()
        C.dropout(a, b, rows, 4, 0, 0, 1, 0.2, a if target == "x" else b, 2)
        assert same(a if target == "x" else b, out)


def test_nan_and_infinity_pass_through(isa):
    shape = (2, 9, 50)
    rows = row_numbers(2)
    x = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(300).reshape(shape)
    out = np.zeros(shape, np.float32)
    C.dropout(x.numpy(), None, rows.numpy(), 4, 0, 0, 1, 0.5, out, 1)
    expected = dropout_definition(x, None, rows, 4, 0, 0, 1, 0.5).numpy()
    np.testing.assert_array_equal(out, expected)
    assert (out == 0).any()  # selected away, not multiplied by 0
    shift = torch.ones(2, 50)
    C.noise_fusion_forward(x.numpy(), shift.numpy(), rows.numpy(), 4, 0, 0.1, out, 1)
    np.testing.assert_array_equal(out, x.numpy())
    d_shift = np.zeros((2, 50), np.float32)
    C.noise_fusion_backward(x.numpy(), rows.numpy(), 4, 0, 0.1, d_shift, 1)
    assert np.isnan(d_shift).all()


# --- history loss ---------------------------------------------------------------------------


def history_case(batch, features, items, cells, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "hidden": rng.standard_normal((batch, features), dtype=np.float32),
        "weight": rng.standard_normal((items, features), dtype=np.float32),
        "bias": rng.standard_normal(items, dtype=np.float32),
        "rows": rng.integers(0, max(batch, 1), cells),
        # Skewed, so that columns share cells and some are empty.
        "cols": (items * rng.random(cells) ** 3).astype(np.int64),
        "label": rng.standard_normal(cells, dtype=np.float32),
        "use": rng.random(cells) < 0.8,
    }


HISTORY_SHAPES = [(1, 1, 1, 1), (5, 32, 7, 0), (5, 63, 7, 90), (9, 130, 40, 33), (40, 256, 90, 999)]


@pytest.mark.parametrize("shape", HISTORY_SHAPES, ids=str)
@pytest.mark.parametrize("flag", [np.bool_, np.uint8])
def test_history_loss(isa, shape, flag):
    case = history_case(*shape)
    tensors = {name: torch.from_numpy(array) for name, array in case.items()}
    hidden, weight, bias = (
        tensors[n].double().requires_grad_() for n in ("hidden", "weight", "bias")
    )
    rows, cols = tensors["rows"], tensors["cols"]
    logits = (hidden[rows] * weight[cols]).sum(1) + bias[cols]
    expected = torch.where(tensors["use"], logits - tensors["label"], 0.0)
    g = random(shape[3])
    gradients = torch.autograd.grad(expected, (hidden, weight, bias), g.double())

    results = []
    use = case["use"].astype(flag)
    cells = (case["rows"], case["cols"])
    for threads in (1, 2):
        residual = np.full(shape[3], np.nan, np.float32)
        C.history_loss_forward(
            *(case["hidden"], case["weight"], case["bias"]),
            *(*cells, case["label"], use, residual, threads),
        )
        d_hidden = np.full_like(case["hidden"], np.nan)
        # Whole vectors are written past the caches where they are aligned, as the first are.
        memory = torch.full((case["weight"].size + 1,), torch.nan)[threads - 1 :]
        d_weight = memory[: case["weight"].size].view(weight.shape).numpy()
        d_bias = np.full_like(case["bias"], np.nan)
        C.history_loss_backward(
            *(case["hidden"], case["weight"], *cells, g.numpy(), use),
            *(d_hidden, d_weight, d_bias, threads),
        )
        results.append((residual, d_hidden, d_weight, d_bias))
    np.testing.assert_allclose(residual, expected.detach().numpy(), rtol=1e-5, atol=1e-4)
    for got, wanted in zip((d_hidden, d_weight, d_bias), gradients):
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-4, atol=1e-4)
    for one, two in zip(*results):
        assert same(one, two)


def test_history_loss_partial_gradients(isa):
    case = history_case(6, 64, 12, 50)
    args = (case["hidden"], case["weight"], case["rows"], case["cols"], case["label"], case["use"])
    full = [np.full_like(case[name], np.nan) for name in ("hidden", "weight", "bias")]
    C.history_loss_backward(*args, *full, 2)
    for wanted in range(3):
        alone = [None, None, None]
        alone[wanted] = np.full_like(full[wanted], np.nan)
        C.history_loss_backward(*args, *alone, 2)
        assert same(alone[wanted], full[wanted])


def test_history_loss_ignores_what_is_not_used(isa):
    case = history_case(6, 64, 12, 50)
    case["label"][~case["use"]] = np.nan
    residual = np.empty(50, np.float32)
    names = ("hidden", "weight", "bias", "rows", "cols", "label", "use")
    C.history_loss_forward(*(case[name] for name in names), residual, 1)
    assert (residual[~case["use"]] == 0).all()
    assert np.isfinite(residual).all()


@pytest.mark.parametrize("name, value", [("rows", 6), ("rows", -1), ("cols", 12), ("cols", -9)])
def test_history_loss_refuses_cells_out_of_range(name, value):
    case = history_case(6, 64, 12, 50)
    case[name][17] = value
    end = 6 if name == "rows" else 12
    message = rf"{name}\[17\] must satisfy 0 <= {name[:3]} < {end}, got {value}"
    with pytest.raises(ValueError, match=message):
        C.history_loss_forward(
            *(case["hidden"], case["weight"], case["bias"], case["rows"], case["cols"]),
            *(case["label"], case["use"], np.empty(50, np.float32), 1),
        )
    with pytest.raises(ValueError, match=message):
        C.history_loss_backward(
            *(case["hidden"], case["weight"], case["rows"], case["cols"], case["label"]),
            *(case["use"], None, None, None, 1),
        )


# --- the boundary ---------------------------------------------------------------------------


def dropout_arguments() -> dict:
    return {
        "x": np.ones((2, 3, 5), np.float32),
        "residual": None,
        "rows": np.arange(2),
        "seed": 1,
        "site": 0,
        "position_offset": 0,
        "position_stride": 1,
        "p": 0.1,
        "out": np.empty((2, 3, 5), np.float32),
        "num_threads": 1,
    }


def read_only() -> np.ndarray:
    array = np.empty((2, 3, 5), np.float32)
    array.flags.writeable = False
    return array


BAD = [
    ("x", np.ones((2, 3, 5)), TypeError, "x must be of dtype float32, got float64"),
    ("x", np.ones((2, 3, 5), ">f4"), TypeError, "x must be of dtype float32, got >f4"),
    ("x", [[[1.0]]], TypeError, "x must be a numpy array of float32, got list"),
    ("x", torch.ones(2, 3, 5), TypeError, "x must be a numpy array of float32, got Tensor"),
    ("x", np.ones((2, 15), np.float32), ValueError, r"x must have 3 dimensions, .* \(2, 15\)"),
    ("x", np.ones((2, 3, 10), np.float32)[..., ::2], ValueError, "x must be C-contiguous, .*40"),
    ("x", np.ones((5, 3, 2), np.float32).T, ValueError, "x must be C-contiguous"),
    ("x", np.ones((2, 3, 4), np.float32), ValueError, r"out must have shape \[B, P, C\] = \(2, 3"),
    ("residual", np.ones((2, 3, 4), np.float32), ValueError, r"residual .* got \(2, 3, 4\)"),
    ("rows", np.arange(3), ValueError, r"rows must have shape \[B\] = \(2,\), got \(3,\)"),
    ("rows", np.arange(2, dtype=np.int32), TypeError, "rows must be of dtype int64, got int32"),
    ("seed", 2**63, ValueError, "-2\\*\\*63 <= seed < 2\\*\\*63, got 9223372036854775808"),
    ("seed", 1.5, TypeError, "seed must be an int or a 0-dimensional int64 array, got 1.5"),
    ("seed", True, TypeError, "seed must be an int .* got True"),
    ("seed", np.zeros(1, np.int64), TypeError, r"0-dimensional int64 array, got int64 .*\(1,\)"),
    ("seed", np.array(1.0), TypeError, "got float64"),
    ("site", None, TypeError, "site must be an int .* got None"),
    ("p", 1.0, ValueError, "p must satisfy 0 <= p < 1, got 1.0"),
    ("p", -0.1, ValueError, "got -0.1"),
    ("p", float("nan"), ValueError, "got nan"),
    ("out", read_only(), ValueError, "out must be writeable"),
    ("num_threads", 0, ValueError, "num_threads must be at least 1, got 0"),
]


@pytest.mark.parametrize("name, value, error, message", BAD)
def test_bad_arguments_are_refused(name, value, error, message):
    arguments = dropout_arguments()
    arguments[name] = value
    with pytest.raises(error, match=message):
        C.dropout(**arguments)


def test_overlap_is_refused():
    memory = np.zeros(60, np.float32)
    arguments = dropout_arguments()
    arguments["x"] = memory[:30].reshape(2, 3, 5)
    arguments["out"] = memory[15:45].reshape(2, 3, 5)
    with pytest.raises(ValueError, match="out must not overlap x"):
        C.dropout(**arguments)


def test_misaligned_is_refused():
    raw = np.zeros(2 * 3 * 5 * 4 + 1, np.uint8)
    arguments = dropout_arguments()
    arguments["x"] = raw[1:].view(np.float32).reshape(2, 3, 5)
    with pytest.raises(ValueError, match="x must be aligned to its elements of 4 bytes"):
        C.dropout(**arguments)


small = st.integers(0, 3)
arrays = st.builds(
    lambda shape, dtype, order, step: (
        np.zeros((*shape, 4), dtype, order)[..., ::step].squeeze(-1)
        if step == 4
        else np.zeros((*shape, 4), dtype, order)
    ),
    st.lists(small, min_size=0, max_size=3).map(tuple),
    st.sampled_from([np.float32, np.float32, np.float64, np.int64, np.bool_, np.float16]),
    st.sampled_from("CF"),
    st.sampled_from([1, 4]),
)


@settings(max_examples=150, deadline=None)
@given(st.tuples(*[arrays] * 9), st.integers(-1, 3))
def test_arbitrary_arrays_are_served_or_refused(a, threads):
    calls = [
        lambda: C.noise_fusion_forward(a[0], a[1], a[2], a[3], 1, 0.1, a[4], threads),
        lambda: C.noise_fusion_backward(a[0], a[1], 5, 1, 0.1, a[2], threads),
        lambda: C.noise_lambda(a[0], 5, 1, 0.1, a[1], threads),
        lambda: C.dropout(a[0], a[1], a[2], 5, 1, 0, 1, 0.1, a[3], threads),
        lambda: C.dropout(a[0], None, np.arange(a[0].shape[0] if a[0].ndim else 1),
                          5, 1, 0, 1, 0.1, a[0], threads),
        lambda: C.history_loss_forward(*a[:8], threads),
        lambda: C.history_loss_backward(*a[:9], threads),
    ]  # fmt: skip
    for call in calls:
        try:
            call()
        except (TypeError, ValueError) as error:
            assert str(error)


# --- threads and instruction sets -----------------------------------------------------------


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_openmp_runtime_and_one_thread_pool():
    # Torch's pool has its second thread before the kernels run, and they add none.
    code = """
import os, re
import numpy as np, torch
torch.set_num_threads(2)
torch.ones(1 << 22).exp_()
threads = len(os.listdir("/proc/self/task"))
from fmrec_fast import extension
C = extension.load()
x = np.ones((64, 50, 512), np.float32)
C.dropout(x, None, np.arange(64), 1, 0, 0, 1, 0.1, x, 2)
maps = open("/proc/self/maps").read()
print(len(set(re.findall(r"/\\S*lib[gi]?omp[^/\\s]*", maps))),
      len(os.listdir("/proc/self/task")) - threads)
"""
    result = run_python(code, OMP_NUM_THREADS="2")
    assert result.stdout.split() == ["1", "0"], result.stdout + result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF sections")
def test_no_openmp_runtime_is_linked():
    with open(C.__file__, "rb") as file:
        content = file.read()
    assert b"libgomp.so" not in content
    assert b"libiomp" not in content


def test_gil_is_released():
    rows, out = np.arange(256), np.empty((256, 50, 512), np.float32)
    span = []

    def work():
        span.append(time.perf_counter())
        C.noise_lambda(rows, 1, 0, 1.0, out, 1)
        span.append(time.perf_counter())

    before = C.isa()
    C.set_isa("scalar")  # the longest call
    try:
        worker = threading.Thread(target=work)
        ticks = []
        worker.start()
        while worker.is_alive():
            ticks.append(time.perf_counter())
        worker.join()
    finally:
        C.set_isa(before)
    begin, end = span
    margin = (end - begin) / 10
    # With the GIL held, this thread could not have run in the middle of the call.
    assert any(begin + margin < tick < end - margin for tick in ticks)


def test_isa_names():
    supported = C.supported_isas()
    assert supported[0] == "scalar"
    assert C.isa() in supported
    with pytest.raises(
        ValueError, match="isa must be one of scalar, avx2, avx512, amx, amx_fp16; got 'sse9'"
    ):
        C.set_isa("sse9")
    info = C.build_info()
    assert set(supported) <= set(info["isas"])
    assert info["openmp"] == C.openmp()


def test_float16_tiles_are_chosen_by_name_where_the_cpu_does_not_say_that_it_has_them():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    code = "from fmrec_fast import extension; C = extension.load(); "
    code += "print(C.isa(), C.supported_isas())"
    by_default = run_python(code, FMREC_FAST_ISA="").stdout
    asked = run_python(code, FMREC_FAST_ISA="amx_fp16")
    assert by_default.startswith("amx_fp16 ") == (
        " amx_fp16" in flags and "amx_fp16" in C.build_info()["isas"]
    )
    if "'amx_fp16'" in by_default:  # a process has run the instruction
        assert asked.stdout.startswith("amx_fp16 "), asked.stderr
    else:
        assert "FMREC_FAST_ISA is 'amx_fp16', which this CPU or build does not" in asked.stderr


def test_isa_from_the_environment():
    code = "from fmrec_fast import extension; print(extension.load().isa())"
    result = run_python(code, FMREC_FAST_ISA="scalar")
    assert result.stdout.strip() == "scalar", result.stderr
    result = run_python(code, FMREC_FAST_ISA="avx1024")
    assert result.returncode == 1
    assert (
        "FMREC_FAST_ISA must be one of scalar, avx2, avx512, amx, amx_fp16; got 'avx1024'"
        in result.stderr
    )


def test_extension_module():
    assert extension.reason() is None
    assert extension.load() is C
