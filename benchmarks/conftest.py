"""Options, the session's record, and the fixture that every benchmark runs its race with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import (
    Limits,
    Record,
    RoundRobin,
    Work,
    allocator_setting,
    compile_obstacle,
    machine_facts,
    measure_limits,
    read_results,
    write_results,
)
from benchmarks.inputs import FULL, QUICK, Sizes, histories
from benchmarks.table import markdown
from fmrec_fast.backend import OPS

RESULTS = Path(__file__).parent / "results"
ALL_OPS = {*OPS, "training_step", "recommend", "fave"}
# What a CPU is measured by, beside test_cpu.py: ``-k cpu`` chooses these files' cases too.
OF_A_CPU = ("test_euler_sampler.py", "test_training_step.py")

# Beside it the published FMRec is timed at all of its steps, so few.
FAVE_BATCHES = (1, 32, 512)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fmrec_fast benchmarks")
    group.addoption("--quick", action="store_true", help="small sizes, three rounds")
    group.addoption("--compiled", action="store_true", help="torch.compile in a quick run too")
    group.addoption("--large", action="store_true", help="cases of minutes: 1e6 items, B = 4096")
    group.addoption("--save", action="store_true", help=f"write the record to {RESULTS}")
    group.addoption("--results", metavar="DIR", type=Path, help="folder of the record")
    group.addoption("--device", default=None, help="cpu or cuda; default: cuda where there is one")


class Suite:
    """What the benchmarks of one session share."""

    def __init__(self, config: pytest.Config) -> None:
        self.quick: bool = config.getoption("quick")
        self.large: bool = config.getoption("large")
        cuda = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(config.getoption("device") or cuda)
        self.sizes: Sizes = QUICK if self.quick else FULL
        local = RESULTS if config.getoption("save") else RESULTS / "local"
        self.folder: Path = config.getoption("results") or local
        self.compile_obstacle = compile_obstacle(self.device)
        if self.quick and not config.getoption("compiled"):
            self.compile_obstacle = "compiling takes longer than a quick run (--compiled does it)"
        self.compile_mode = "reduce-overhead" if self.device.type == "cuda" else "default"
        self.records: list[Record] = []
        self.aims: list[str] = []
        self.path: Path | None = None
        self._limits: Limits | None = None
        self._facts: dict[str, Any] | None = None

    def prepare(self) -> None:
        """Look at the machine once, before anything is timed."""
        if self._limits is None:
            self._facts = machine_facts(self.device)
            self._limits = measure_limits(self.device, self.quick)

    def settings(self) -> dict[str, Any]:
        """What was run, for the record."""
        real = (histories(512, self.sizes, torch.device("cpu")) > 0).sum(1).float().mean()
        return {
            "quick": self.quick,
            "sizes": self.sizes.to_dict(),
            "histories": "left-padded, lengths log-normal as in Amazon Beauty "
            f"(test histories: mean {real:.1f} real items of {self.sizes.length})",
            "timing": "round robin over the variants; medians and quartiles over the rounds",
            "flops": "torch.utils.flop_counter: matrix products only. Ours is counted on the "
            "reference backend (C++ and Triton kernels are invisible to it), compiled as tuned",
        }

    def aim(
        self,
        what: str,
        value: float,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Note a figure that the summary shows beside what was aimed at (for the full sizes)."""
        text = f"{what}: {value:.3g}"
        if not self.quick and at_least is not None:
            text += f" (at least {at_least:g}: {'met' if value >= at_least else 'missed'})"
        if not self.quick and at_most is not None:
            text += f" (at most {at_most:g}: {'met' if value <= at_most else 'missed'})"
        self.aims.append(text)

    def write(self) -> None:
        """Write the record, if anything was timed."""
        if not self.records or self._limits is None or self._facts is None:
            return
        what = "quick" if self.quick else "full"
        timed = {record.op for record in self.records}
        if timed != ALL_OPS:
            # Runs of an op or two lie beside each other; one of more replaces the day's last.
            what += "-" + ("-".join(sorted(timed)) if len(timed) <= 2 else "partial")
        what += f"-{allocator_setting()['setting']}"
        self.path = write_results(
            self.folder, what, self._facts, self.settings(), self._limits, self.records
        )


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.name in OF_A_CPU:
        item.extra_keyword_matches.add("cpu")


SUITE = pytest.StashKey[Suite]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """FMRec's training first, as it runs in a process of its own: after other benchmarks' large
    tensors glibc no longer unmaps them, and the published step takes 3 s instead of 3.8."""
    items.sort(key=lambda item: item.path.name != "test_training_step.py")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[SUITE] = Suite(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    sizes = metafunc.config.stash[SUITE].sizes
    if "sampling_batch" in metafunc.fixturenames:
        metafunc.parametrize("sampling_batch", sizes.sampling_batches, ids=lambda b: f"B{b}")
    if "fave_batch" in metafunc.fixturenames:
        batches = sizes.sampling_batches
        few = [batch for batch in batches if batch in FAVE_BATCHES] or batches
        metafunc.parametrize("fave_batch", few, ids=lambda b: f"B{b}")
    if "ranking_case" in metafunc.fixturenames:
        cases = sizes.ranking_cases
        ids = [f"B{batch}-V{items}-k{k}" for batch, items, k in cases]
        metafunc.parametrize("ranking_case", cases, ids=ids)


@pytest.fixture(scope="session")
def suite(pytestconfig: pytest.Config) -> Suite:
    """Sizes, device and record of this session."""
    found = pytestconfig.stash[SUITE]
    found.prepare()
    return found


@pytest.fixture
def race(benchmark: Any, suite: Suite) -> Callable[..., Record]:
    """Time variants in a round robin and enter them into the record.

    pytest-benchmark's own figures are those of our variant; `extra_info` holds all medians.
    """

    def run(
        op: str,
        case: str,
        variants: Mapping[str, Callable[[], Any]],
        *,
        ours: str,
        sizes: dict[str, Any],
        equality: dict[str, Any],
        work: Work | None = None,
        flops: Mapping[str, int] | None = None,
        items: int | None = None,
        note: str = "",
        left_out: dict[str, str] | None = None,
        memory: dict[str, int] | None = None,
        budget: float = 4.0,
        least: int = 5,
        most: int = 200,
        round_s: float | None = None,
    ) -> Record:
        for name in variants:
            if name != equality["baseline"] and name not in equality["largest_relative_error"]:
                raise RuntimeError(f"{name!r} was not compared with {equality['baseline']!r}")
        if suite.quick:
            least, most, round_s = 3, 3, None
        robin = RoundRobin(variants, ours, suite.device)
        timings = robin.run(benchmark, budget=budget, least=least, most=most, round_s=round_s)
        for timing in timings:
            timing.flops = (flops or {}).get(timing.name)
        record = Record(
            op,
            case,
            sizes,
            ours,
            equality,
            timings,
            work,
            items,
            note,
            left_out or {},
            memory or {},
        )
        suite.records.append(record)
        benchmark.group = op
        benchmark.extra_info["equality"] = equality
        benchmark.extra_info["median_s"] = {
            timing.name: timing.summary()["median_s"] for timing in timings
        }
        return record

    return run


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[SUITE].write()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    path, aims = config.stash[SUITE].path, config.stash[SUITE].aims
    if aims:
        terminalreporter.section("what was aimed at")
        for text in aims:
            terminalreporter.write_line(text)
    if path is None:
        return
    terminalreporter.section("fmrec_fast benchmarks")
    terminalreporter.write_line(markdown(read_results(path)))
    terminalreporter.write_line(f"written to {path}")
