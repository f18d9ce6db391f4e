"""What all tests share: NaN in unwritten memory, the golden vectors, where an op can run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

# Before torch loads OpenMP: on shared cores, threads that spin while they wait cost 10 times more.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
if not CUDA:
    # Before anything imports triton: its interpreter runs the kernels on CPU tensors.
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for deterministic algorithms

from fmrec_fast import extension  # noqa: E402
from fmrec_fast.backend import (  # noqa: E402
    MISSING,
    OPS,
    Backend,
    availability,
    dispatch_log,
    use_backend,
)

GOLDEN = Path(__file__).parent / "golden"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--extension-from", metavar="FOLDER", help="fail unless fmrec_fast._C was loaded from here"
    )


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("--extension-from")
    if folder:
        loaded = Path(extension.load().__file__)
        if Path(folder).resolve() not in loaded.parents:
            raise pytest.UsageError(f"fmrec_fast._C must be loaded from {folder}, got {loaded}")
    config.addinivalue_line(
        "markers", "op(name, backends=all): the op whose backends `place` goes through"
    )
    # The deterministic mode is on for its filled memory, not for its verdicts.
    config.addinivalue_line("filterwarnings", "ignore:.*does not have a deterministic impl")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        # Modules that take the device that there is.
        if getattr(getattr(item, "module", None), "DEVICE", "cpu") == "cuda":
            item.add_marker(pytest.mark.gpu)
        if not CUDA and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="torch.cuda.is_available() is False"))


@pytest.fixture(scope="session", autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """`torch.empty` gives NaN (the largest value for integers), so unwritten outputs show."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(False)


class Place(NamedTuple):
    """A backend, and a device that it can run on."""

    backend: Backend
    device: str

    @contextmanager
    def forced(self, op: str, *, declines: bool | Collection[Backend] = False) -> Iterator[None]:
        """Run on this backend, and assert that `op` did.

        With `declines`, a call that the op's kernels of these backends (True is C++) do not cover:
        the definition runs instead, and the log must say why. A backend without such limits still
        has to run it.
        """
        if isinstance(declines, bool):
            declines = {Backend.CPP} if declines else set()
        with use_backend(self.backend), dispatch_log() as log:
            yield
        ran = [entry for entry in log if entry.op == op]
        assert ran, f"{op} did not run, only {log}"
        if self.backend in declines:
            assert all(entry.backend is Backend.REFERENCE and entry.reason for entry in ran), ran
        else:
            assert {entry.backend for entry in ran} == {self.backend}, ran

    def put(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.to(self.device) for tensor in tensors)


BACKENDS = (Backend.REFERENCE, Backend.CPP, Backend.TRITON)


def places(op: str, *, backends: Collection[Backend] = BACKENDS) -> list:
    """Where `op` can run here: its definition, and every backend that is not in `MISSING`."""
    if op not in OPS:
        raise ValueError(f"op must be one of {OPS}, got {op!r}")
    devices = ("cpu", "cuda") if CUDA else ("cpu",)
    found = []
    for backend in backends:
        if (op, backend) in MISSING:
            continue
        reasons = {device: availability(backend, device) for device in devices}
        able = [device for device, reason in reasons.items() if reason is None]
        for device in able:
            marks = [pytest.mark.gpu] if device == "cuda" else []
            name = f"{backend.value}-{device}"
            found.append(pytest.param(Place(backend, device), id=name, marks=marks))
        if not able:
            skip = pytest.mark.skip(reason=f"{backend.value}: {reasons}")
            found.append(pytest.param(Place(backend, "none"), marks=skip, id=backend.value))
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise `place` over `places` of the op that the mark ``op(name)`` names."""
    if "place" in metafunc.fixturenames:
        mark = metafunc.definition.get_closest_marker("op")
        if mark is None:
            raise pytest.UsageError(f"{metafunc.definition.nodeid} needs pytest.mark.op(name)")
        metafunc.parametrize("place", places(*mark.args, **mark.kwargs))


class Golden(NamedTuple):
    """Golden vectors of one model, by the first part of their names."""

    args: argparse.Namespace
    state: dict[str, Tensor]
    inputs: SimpleNamespace
    train: dict[str, Tensor]
    grad: dict[str, Tensor]
    sample: dict[str, Tensor]


def load_arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


@pytest.fixture(scope="session")
def golden_arrays():
    """Loader of a golden file as it is: ``golden_arrays("noise_stream")["normals"]``."""
    return load_arrays


@pytest.fixture(scope="session")
def golden():
    """Loader of a model's golden file: ``golden("fmrec_tiny").state``."""

    def load(name: str) -> Golden:
        groups: dict[str, dict] = {
            k: {} for k in ("args", "state", "in", "train", "grad", "sample")
        }
        for key, array in load_arrays(name).items():
            group, rest = key.split("/", 1)
            groups[group][rest] = array
        args = {key: array.tolist() for key, array in groups.pop("args").items()}
        tensors = {
            group: {key: torch.from_numpy(array) for key, array in arrays.items()}
            for group, arrays in groups.items()
        }
        inputs = SimpleNamespace(**tensors.pop("in"))
        return Golden(
            argparse.Namespace(**args, Loss_Alpha=0.2, Loss_Beta=0.4), inputs=inputs, **tensors
        )

    return load


@pytest.fixture(params=extension.load().supported_isas() if extension.available() else ["none"])
def isa(request) -> Iterator[str]:
    """Every instruction set of this machine, in force."""
    if not extension.available():
        pytest.skip(str(extension.reason()))
    native = extension.load()
    before = native.isa()
    native.set_isa(request.param)
    yield request.param
    native.set_isa(before)


@pytest.fixture
def small_args():
    """The published namespace of a small model, dropouts on; keyword arguments replace."""

    def make(**changes) -> argparse.Namespace:
        values = {
            "item_num": 61,
            "hidden_size": 32,
            "max_len": 12,
            "num_blocks": 3,
            "last": 2,
            "decoder_dims": (24, 40),
            "dropout": 0.1,
            "emb_dropout": 0.3,
            "lambda_uncertainty": 0.001,
            "eps": 0.001,
            "eps_reverse": 0.001,
            "sample_N": 5,
            "m_logNorm": 1.0,
            "s_logNorm": 0.6,
            "s_modsamp": 1.0,
            "sampling_method": "mode",
            "mask_ratio": 1.0,
            "Loss_Alpha": 0.2,
            "Loss_Beta": 0.4,
        }
        return argparse.Namespace(**{**values, **changes})

    return make


@pytest.fixture
def small_model(small_args):
    """A small model with weights of a fixed seed; keyword arguments change its settings."""
    from fmrec_fast import FMRecommender

    def make(seed: int = 0, **changes) -> FMRecommender:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = FMRecommender.from_config(small_args(**changes))
            for name, parameter in model.named_parameters():
                if "norm" in name.lower():  # ones and zeros would hide a swap
                    torch.nn.init.normal_(parameter, 0.5, 0.3)
        return model

    return make
