"""The search over plans of the persistent kernels, and the plans that it leaves behind."""

from __future__ import annotations

import importlib.util
import itertools
import json

import pytest
import torch

from fmrec_fast.backend import Backend, availability
from fmrec_fast.kernels import plans
from fmrec_fast.kernels.plans import Network, Plan, TilePlan, Tuned, plan

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)
REASON = availability(Backend.TRITON, "cpu")
interpreted = pytest.mark.skipif(REASON is not None, reason=str(REASON))
H100 = ("cuda:90", 232448)
BF16 = Network(128, 64, 4, "bf16", False, False)


@pytest.fixture(autouse=True)
def tuned(monkeypatch, tmp_path):
    """The file of the tuned plans, which does not exist at first."""
    path = tmp_path / "tuned.json"
    monkeypatch.setattr(plans, "TUNED", path)
    plans.read_tuned.cache_clear()
    yield path
    plans.read_tuned.cache_clear()


def entry(network: Network, chosen: Plan | TilePlan, shared: int = 1000) -> Tuned:
    return Tuned(network, chosen, shared, {"device": "none"})


# --- what the plans are ---------------------------------------------------------------------


def test_without_a_file_the_plans_are_the_pinned_ones():
    for length, tied, rotary in itertools.product((1, 50, 200), (False, True), (False, True)):
        asked = (length, 128, 4, "bf16", *H100, tied, rotary)
        assert plan(*asked) == plans.pinned(*asked)


def test_a_tuned_plan_is_for_its_network_and_family_alone(tuned):
    best = Plan(64, 32, 16, False, 1, threads=128)
    plans.write_tuned(tuned, "cuda:90", [entry(BF16, best)])
    assert plan(50, 128, 4, "bf16", *H100) == plan(33, 128, 4, "bf16", *H100) == best
    others = (
        (32, 128, 4, "bf16", *H100), (65, 128, 4, "bf16", *H100), (50, 64, 4, "bf16", *H100),
        (50, 128, 2, "bf16", *H100), (50, 128, 4, "tf32", *H100), (50, 128, 4, "bf16", *H100, True),
        (50, 128, 4, "bf16", *H100, False, True), (50, 128, 4, "bf16", "cuda:80", 166912),
        (50, 128, 4, "bf16", "cuda:90", 999),
    )  # fmt: skip
    for asked in others:
        assert plan(*asked) == plans.pinned(*asked)


def test_writing_replaces_the_same_network_only(tuned):
    first, second = Plan(64, 32, 16, False, 1), TilePlan(32, 64, 16, 2, programs=4)
    tied = BF16._replace(tied=True)
    plans.write_tuned(tuned, "cuda:90", [entry(BF16, first), entry(tied, second)])
    plans.write_tuned(tuned, "hip:gfx942", [entry(BF16, first)])
    plans.write_tuned(tuned, "cuda:90", [entry(BF16, second)])
    found = plans.read_tuned(tuned)
    assert {e.network: e.plan for e in found["cuda:90"]} == {BF16: second, tied: second}
    assert [e.plan for e in found["hip:gfx942"]] == [first]
    assert plan(50, 128, 4, "bf16", *H100) == second


@pytest.mark.parametrize("text", ["{", "[]", '{"cuda:90": [{}]}', '{"cuda:90": [{"network": 1}]}'])
def test_a_damaged_file_is_named(tuned, text):
    tuned.write_text(text)
    with pytest.raises(ValueError, match=r"tuned\.json is damaged"):
        plan(50, 128, 4, "bf16", *H100)


def test_the_committed_file_can_be_read():
    path = plans.Path(plans.__file__).with_name("tuned.json")
    for entries in plans.read_tuned(path).values():
        for one in entries:
            assert one.shared > 0 and one.measured["seconds"] < one.measured["pinned_seconds"]


# --- the search -----------------------------------------------------------------------------


def test_candidates_fit_their_network():
    from fmrec_fast.kernels.tune import candidates

    for width, tied, rotary in itertools.product(plans.WIDTHS, (False, True), (False, True)):
        network = Network(width, 64, 4, "bf16", tied, rotary)
        found = list(candidates(network))
        assert len(found) == len(set(found)) and bool(found) != (tied and rotary)
        for one in found:
            assert 4 * width % one.CHUNK == 0 and 4 * width % one.LAST_CHUNK == 0
            assert isinstance(one, TilePlan) or (one.T == 64 and not tied)
            assert isinstance(one, Plan) or not rotary


def test_the_fastest_that_fits_wins():
    from triton.errors import TritonError

    from fmrec_fast.kernels.tune import MOST_STACK, search

    plans_of = [Plan(64, 32, 16, True, stages) for stages in range(1, 8)]
    pinned, slow, fast, broken, wide, spills, wrong = plans_of
    times = {pinned: 3.0, slow: 4.0, fast: 2.0, wide: 0.1, spills: 0.1, broken: 0.1}
    asked = []

    def measure(chosen, rounds):
        asked.append(chosen)
        if chosen == wrong:
            raise ValueError("its result is off by 1.0e+00")
        return times[chosen]

    fine = {"shared": 1000, "stack": 0, "registers": 8}
    given = [
        (slow, fine), (fast, fine), (broken, "does not compile: why"), (pinned, fine),
        (wide, fine | {"shared": 1001}), (spills, fine | {"stack": MOST_STACK + 8}), (wrong, fine),
    ]  # fmt: skip
    trials = search(given, pinned, measure, 1000)
    assert [t.plan for t in trials[:3]] == [fast, pinned, slow]
    assert {t.plan: t.reason for t in trials[3:]} == {
        broken: "does not compile: why",
        wide: "needs 1001 bytes of shared memory, there are 1000",
        spills: f"needs {MOST_STACK + 8} bytes of stack, at most {MOST_STACK} are taken",
        wrong: "its result is off by 1.0e+00",
    }
    assert not {broken, wide, spills} & set(asked)
    # Without time left, the pinned plan alone is timed.
    trials = search(given, pinned, measure, 1000, deadline=0.0)
    assert [t.plan for t in trials if t.seconds is not None] == [pinned]

    def fails(chosen, rounds):
        raise TritonError("no")

    with pytest.raises(TritonError):  # nothing to compare with
        search(given, pinned, fails, 1000)


def test_what_does_not_compile_is_a_sentence(monkeypatch):
    from triton.errors import TritonError

    from fmrec_fast.kernels import budget, tune

    chosen = Plan(64, 32, 32, True, 1)
    needs = {"registers": 1, "stack": 2, "shared": 3, "instructions": 4, "accesses": {}}
    monkeypatch.setattr(budget, "measure", lambda case, precision, target: needs)
    assert tune.needs_of((BF16, chosen, "cuda:90")) == {"registers": 1, "stack": 2, "shared": 3}

    def fails(case, precision, target):
        assert (case["threads"], precision, target) == (256, "bf16", ("cuda", 90, 32))
        raise TritonError("first line\nlast line")

    monkeypatch.setattr(budget, "measure", fails)
    assert tune.needs_of((BF16, chosen, "cuda:90")) == "does not compile: last line"


@interpreted
def test_a_wrong_result_is_refused():
    from fmrec_fast.kernels.tune import Sampler

    sampler = Sampler(Network(32, 16, 4, "float32", False, False), 5, 1, 1, torch.device("cpu"))
    assert sampler.measure(Plan(16, 32, 128, True, 1), 1) > 0
    sampler.right = sampler.right + 1
    with pytest.raises(ValueError, match="its result is off by"):
        sampler.measure(Plan(16, 64, 128, True, 1), 1)


@interpreted
def test_the_command_tunes_writes_and_is_read(tuned, monkeypatch, capsys):
    """Interpreted, on tiny shapes; every candidate runs, and the clock is made up."""
    from fmrec_fast.kernels import tune

    runs = []

    def measured(self, chosen, rounds):
        if chosen not in runs:
            runs.append(chosen)
            assert self(chosen).isfinite().all()
        return 1.0 if chosen == wanted else 2.0

    wanted = TilePlan(16, 32, 128, 1, threads=128, programs=2)
    monkeypatch.setattr(tune.Sampler, "measure", measured)
    monkeypatch.setattr(tune, "BLOCKS", 2)
    monkeypatch.setattr(tune, "CHUNKS", (32,))
    monkeypatch.setattr(tune, "THREADS", (128,))
    monkeypatch.setattr(tune, "STAGES", (1,))
    monkeypatch.setattr(tune, "PROGRAMS", (1, 2))
    flags = "--widths 32 --lengths 5 --precisions float32 --batch 2 --steps 1".split()
    assert tune.main([*flags, "--networks", "published", "fave"]) == 0
    shown = capsys.readouterr().out
    assert "(pinned)" in shown and "1000.000 ms" in shown and not tuned.exists()
    assert tune.main([*flags, "--networks", "published", "--write"]) == 0
    assert "1 plans written" in capsys.readouterr().out
    assert plan(5, 32, 4, "float32", *H100) == plan(16, 32, 4, "float32", *H100) == wanted
    (written,) = json.loads(tuned.read_text())["cuda:90"]
    assert written["measured"]["seconds"] == 1.0 and written["plan"]["programs"] == 2
    assert plan(5, 32, 4, "tf32", *H100) == plans.pinned(5, 32, 4, "tf32", *H100)


@pytest.mark.gpu
def test_the_command_times_a_device(tuned, capsys):
    from fmrec_fast.kernels import tune

    flags = "--widths 32 --lengths 5 --precisions float32 bf16 --batch 4 --steps 1 --most 1".split()
    assert tune.main(flags) == 0
    shown = capsys.readouterr().out
    assert shown.count("(pinned)") == 4 and shown.count(" ms ") >= 4 and not tuned.exists()


def test_without_a_device_it_says_what_can_be_done(monkeypatch, capsys):
    import triton

    from fmrec_fast.kernels import tune

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 1
    assert "--compile KIND" in capsys.readouterr().err
