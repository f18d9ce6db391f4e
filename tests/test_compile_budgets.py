"""Every Triton kernel, compiled without a GPU, stays within `kernels/budgets.json`."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from fmrec_fast.config import PRECISIONS
from fmrec_fast.kernels.plans import LAYOUTS, TILES, TUNED, read_tuned

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

NEEDS = {"registers": 30, "stack": 0, "shared": 512, "instructions": 279, "accesses": {}}


@pytest.fixture(scope="module")
def report() -> dict:
    """What the kernels need, measured where Triton compiles: these tests may be interpreting."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fmrec_fast.kernels.budget", "--json"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.stdout, run.stderr
    return {**json.loads(run.stdout), "returncode": run.returncode}


@pytest.fixture
def of_budgets(report) -> dict:
    """The report where it is of the Triton version that budgets and plans are for."""
    if report["triton"] != report["budgets_for"]:
        pytest.skip(f"budgets are for Triton {report['budgets_for']}, not {report['triton']}")
    return report


def test_kernels_stay_within_their_budgets(of_budgets):
    report = of_budgets
    assert report["measured"]
    assert report["problems"] == []
    assert report["returncode"] == 0


# A whole network to a program: these spill, by their budgets (docs/performance.md).
PERSISTENT = ("encoder.", "euler_sampler.", "picard_sweep.")


def test_no_kernel_spills(of_budgets):
    measured = of_budgets["measured"].items()
    assert [k for k, needs in measured if needs["stack"] and not k.startswith(PERSISTENT)] == []


def tuned_shared(target: str, precision: str) -> int:
    """The most shared memory of the plans that were tuned there."""
    found = read_tuned(TUNED).get(target, [])
    return max((one.shared for one in found if one.network.precision == precision), default=0)


# Bytes of shared memory that a program of a device may have.
SHARED = {"cuda:80": 166912, "cuda:90": 232448, "cuda:100": 232448, "hip:gfx942": 65536}


@pytest.mark.parametrize("target", SHARED)
def test_kernels_fit_the_shared_memory_of_a_device(report, target):
    """Whatever the version of Triton."""
    needs = {k: v["shared"] for k, v in report["measured"].items() if k.endswith(f" {target}")}
    assert needs
    assert {k: shared for k, shared in needs.items() if shared > SHARED[target]} == {}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", SHARED)
def test_persistent_kernels_need_no_more_shared_memory_than_planned(of_budgets, target, precision):
    report, most = of_budgets, SHARED[target]
    allowed = max(
        layout.shared for layout in LAYOUTS[128, 64][target][precision] if layout.shared <= most
    )
    allowed = max(allowed, tuned_shared(target, precision))
    for op in ("encoder", "euler_sampler", "picard_sweep"):
        needs = report["measured"][f"{op}.{op}_kernel {precision} {target}"]
        assert needs["shared"] <= allowed, op


@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("target", SHARED)
def test_tiles_need_no_more_shared_memory_than_planned(of_budgets, target, precision, width):
    report = of_budgets
    key = f"euler_sampler.euler_sampler_tiled_kernel[{width}] {precision} {target}"
    allowed = min(TILES[width][target][precision]).shared
    assert report["measured"][key]["shared"] <= max(allowed, tuned_shared(target, precision))


@pytest.mark.parametrize("target", SHARED)
def test_noise_fusion_moves_e_in_16_byte_accesses(report, target):
    forward = report["measured"][f"noise_fusion.forward_kernel float32 {target}"]
    accesses = dict(forward["accesses"])
    # The row and the seed, which AMD reads into scalar registers.
    accesses.pop("load 8 bytes", None)
    assert accesses == {"load 16 bytes": 2, "store 16 bytes": 1}  # e, shift; out
    assert forward["shared"] == 0  # the interleaved normals need no exchange between threads
    backward = report["measured"][f"noise_fusion.backward_kernel float32 {target}"]
    assert backward["accesses"]["load 16 bytes"] == 1


def test_check_accepts_what_just_fits():
    from fmrec_fast.kernels import budget

    measured = {"op.kernel float32 cuda:90": NEEDS}
    budgets = budget.budget_for(measured)
    assert budgets == {"op.kernel float32 cuda:90": {"registers": 32, "stack": 0, "shared": 512}}
    assert budget.check(measured, budgets) == []


@pytest.mark.parametrize("resource, value", [("registers", 33), ("stack", 8), ("shared", 513)])
def test_check_reports_an_exceeded_budget(resource, value):
    from fmrec_fast.kernels import budget

    budgets = budget.budget_for({"op.kernel float32 cuda:90": NEEDS})
    problems = budget.check({"op.kernel float32 cuda:90": NEEDS | {resource: value}}, budgets)
    assert len(problems) == 1
    assert f"{resource} {value}, budget" in problems[0]


def test_check_reports_missing_and_stale_entries():
    from fmrec_fast.kernels import budget

    budgets = budget.budget_for({"op.old_kernel float32 cuda:90": NEEDS})
    assert budget.check({"op.new_kernel float32 cuda:90": NEEDS}, budgets) == [
        "op.new_kernel float32 cuda:90: not in budgets.json",
        "op.old_kernel float32 cuda:90: in budgets.json, but no such case",
    ]


def test_every_kernel_file_has_budgets():
    from fmrec_fast.kernels import budget

    stems = {key.split(".")[0] for key in budget.read_budgets()[1]}
    assert stems == set(budget.kernel_modules())


def test_some_modules_are_measured_and_checked_alone(monkeypatch, capsys, tmp_path):
    from fmrec_fast.kernels import budget

    keys = ("encoder.a float32 cuda:90", "dropout.b float32 cuda:90")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(budget, "BUDGETS", tmp_path / "budgets.json")
    budget.write_budgets("0.0", budget.budget_for(dict.fromkeys(keys, NEEDS)))
    more = NEEDS | {"stack": 8}
    monkeypatch.setattr(budget, "compile_all", lambda stems: ({keys[1]: more}, []))
    assert budget.main(["dropout"]) == 1
    assert f"{keys[1]}: stack 8, budget 0" in capsys.readouterr().err
    for arguments in (["none"], ["dropout", "--write"]):  # the latter: of another version
        with pytest.raises(SystemExit):
            budget.main(arguments)
    monkeypatch.setattr("triton.__version__", "0.0")
    assert budget.main(["dropout", "--write"]) == 0
    assert [budget.read_budgets()[1][key]["stack"] for key in keys] == [0, 8]
