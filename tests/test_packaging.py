"""The package as it is installed: what a wheel holds, and that it works from another folder."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"]
SOURCES += ["fmrec_fast", "kernels", "csrc"]

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="needs the repository, not only the tests"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel without the extension, built from a copy: the checkout's build folder is its own."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        path = ROOT / name
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
            shutil.copytree(path, source / name, ignore=ignored)
        elif path.exists():
            shutil.copy(path, source / name)
    target = tmp_path_factory.mktemp("wheel")
    result = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"),
            *("--no-build-isolation", "--no-deps", "--wheel-dir", str(target), str(source)),
        ],
        env={**os.environ, "FMREC_FAST_SKIP_CPP": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = target.glob("*.whl")
    return path


def test_kernels_is_refused_from_the_repository_root(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    with pytest.raises(ImportError, match=r"this package is fmrec_fast\.kernels"):
        importlib.import_module("kernels")


def test_wheel_contents(wheel):
    # No extension, no platform: one wheel for all.
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fmrec_fast/py.typed" in names
    modules = {
        *(f"fmrec_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")),
        *(str(path.relative_to(ROOT)) for path in (ROOT / "fmrec_fast").rglob("*.py")),
    }
    assert modules <= set(names), modules - set(names)
    assert not [name for name in names if "_C" in name or name.endswith((".so", ".cpp", ".h"))]
    # Nothing lands outside the package.
    assert {re.split(r"[/-]", name)[0] for name in names} == {"fmrec_fast"}


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    text = archive.read(metadata).decode()
    assert "License-Expression: Apache-2.0" in text
    for extra in ("cli", "tensorboard", "bench", "dist", "ode", "dev"):
        assert f"Provides-Extra: {extra}" in text
    assert [n for n in archive.namelist() if n.endswith("licenses/LICENSE")]


def test_wheel_works_from_another_folder(wheel, tmp_path):
    installed = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(installed)
    # An editable install of the checkout puts a finder of its own behind PYTHONPATH, which would
    # lend its modules (the extension among them) to the unpacked wheel.
    code = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
import fmrec_fast.kernels
from fmrec_fast import extension
print(fmrec_fast.kernels.__file__)
print(extension.__file__)
print(extension.available())
print(extension.reason())
try:
    extension.load()
except ImportError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    kernels, module, available, reason, error = result.stdout.splitlines()
    assert Path(kernels) == installed / "fmrec_fast" / "kernels" / "__init__.py"
    assert Path(module) == installed / "fmrec_fast" / "extension.py"
    assert available == "False"
    assert "FMREC_FAST_SKIP_CPP=1" in reason
    assert error == reason


def test_skip_variable_is_checked():
    result = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        env={**os.environ, "FMREC_FAST_SKIP_CPP": "yes"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "FMREC_FAST_SKIP_CPP must be 0 or 1, got 'yes'" in result.stderr


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_pin_every_direct_dependency(python):
    """To one version for each Python, which the requirement allows."""
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins: dict[str, str] = {}
    for pin in map(Requirement, (line for line in lines if not line.startswith("#"))):
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert pin.name not in pins
            (specifier,) = pin.specifier
            assert specifier.operator == "=="
            pins[pin.name] = specifier.version
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    requirements = [
        *config["build-system"]["requires"],
        *config["project"]["dependencies"],
        *(r for extra in config["project"]["optional-dependencies"].values() for r in extra),
    ]
    wanted = [Requirement(requirement) for requirement in requirements]
    assert {requirement.name for requirement in wanted} == set(pins)
    for requirement in wanted:
        assert pins[requirement.name] in requirement.specifier, requirement
