"""`fmrec-fast env`: what is there, and why not where something is not."""

import importlib.metadata
import importlib.util
import json

import pytest
import torch

from fmrec_fast import __version__, environment, extension
from fmrec_fast.backend import MISSING, OPS, Backend, use_backend


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = importlib.util.find_spec

    def find_spec(name, package=None):
        return None if name in names else found(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)


def test_report_is_plain_and_complete():
    facts = environment.report()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["fmrec_fast"] == __version__
    assert facts["versions"]["torch"] == torch.__version__
    assert set(environment.OPTIONAL) == {*facts["versions"], *facts["missing"]} - {"torch"}
    assert set(facts["ops"]) == set(OPS)
    for op, status in facts["ops"].items():
        assert set(status) == {"reference", "cpp", "triton"}
        assert status["reference"] == "yes"
        for backend in (Backend.CPP, Backend.TRITON):
            if (op, backend) in MISSING:
                assert status[backend.value] == MISSING[op, backend]


def test_lines_show_everything():
    facts, text = environment.report(), "\n".join(environment.lines())
    for name in (*facts, *facts["versions"], *facts["missing"], *facts["ops"]):
        assert name in text
    for version in facts["versions"].values():
        assert version in text


def test_a_missing_extension_is_reported_with_the_reason(monkeypatch):
    monkeypatch.setattr(extension, "available", lambda: False)
    facts = environment.report()
    assert "pip install -e ." in facts["extension"]
    assert "FMREC_FAST_SKIP_CPP" in facts["extension"]
    without = [op for op in OPS if (op, Backend.CPP) not in MISSING]
    assert without
    for op in without:
        assert facts["ops"][op]["cpp"] == facts["extension"]
    assert f"extension: {facts['extension']}" in environment.lines()


def test_an_extension_that_does_not_load_is_reported(monkeypatch):
    def broken():
        raise ImportError("undefined symbol: _ZN3c10")

    monkeypatch.setattr(extension, "load", broken)
    assert environment.report()["extension"] == "undefined symbol: _ZN3c10"


def test_an_extension_reports_how_it_was_built():
    if extension.reason() is not None:
        pytest.skip(extension.reason())
    facts = environment.report()["extension"]
    assert facts["isa"] in facts["supported"]
    assert "openmp" in facts and "compiler" in facts


def test_without_triton(monkeypatch):
    hide(monkeypatch, "triton")
    facts = environment.report()
    assert facts["missing"]["triton"] == "not installed (GPU kernels)"
    assert "triton" not in facts["versions"]
    assert facts["ops"]["noise_fusion"]["triton"] == "the package triton is not installed"
    assert any("the package triton is not installed" in line for line in environment.lines())


@pytest.mark.parametrize("module", sorted(environment.OPTIONAL))
def test_missing_packages_name_what_they_are_for(monkeypatch, module):
    hide(monkeypatch, module)
    facts = environment.report()
    assert environment.OPTIONAL[module] in facts["missing"][module]


def test_a_build_under_another_name_is_there(monkeypatch):
    """Such as PyTorch's nightly builds of Triton."""
    found = importlib.metadata.version

    def version(name):
        if name == "triton":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    facts = environment.report()
    assert facts["versions"]["triton"] == "of an unknown version"
    assert "triton" not in facts["missing"]


def test_the_backend_in_force_is_reported(monkeypatch):
    with use_backend("reference"):
        assert environment.report()["backend"] == "reference"
    monkeypatch.setenv("FMREC_FAST_RNG", "published")
    assert environment.report()["rng"] == "published"
    monkeypatch.setenv("FMREC_FAST_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"FMREC_FAST_BACKEND must be one of .* got 'fast'"):
        environment.report()


def test_processor_has_a_name():
    assert environment.processor().strip()
