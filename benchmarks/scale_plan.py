"""What training and recommending take, as formulas of the sizes, and read off for large ones.

    python -m benchmarks.scale_plan            prints the tables
    python -m benchmarks.scale_plan --write    puts them into docs/scale.md

Formulas live here and nowhere else. They give floors: operations and bytes that cannot be left out,
at rates that were measured on a CPU (`CPU`) or are a GPU's data sheet (`GPU`, of which nothing was
measured). A real step also launches, waits and moves activations.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).parent.parent / "docs" / "scale.md"
MARKS = "<!-- plan -->\n", "<!-- /plan -->"
ADAM_BYTES = 28  # a parameter: reads weight, gradient and two moments, writes three of them
GRADIENT_BYTES = 8  # a parameter: zeroed and added to
ITEM_COLLECTIVES = 12  # of a step, for tables over ranks
# And of gradients (at least one), the losses; and with tables on every rank, the rows' counts.
SHARDED_COLLECTIVES, DATA_PARALLEL_COLLECTIVES = ITEM_COLLECTIVES + 2, 3
KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """What one rank has: FLOP/s, bytes/s of memory, bytes/s of its link, bytes of memory; and the
    bytes of a number that the loss's kernel gives a row (float64 in C++, float32 in Triton)."""

    name: str
    flops: float
    bandwidth: float
    link: float
    memory: float
    statistic: int


@dataclass(frozen=True)
class Rates:
    """What was measured of ranks that all compute at once, so that they share a machine's cores and
    memory as in a step: seconds of a step of the whole batch on each and of Adam on all parameters;
    bytes/s of a large all-reduce out of each, and seconds of a small one."""

    step: float
    update: float
    link: float
    latency: float


# Measured here (docs/performance.md): the matrix kernel on 2 cores, 2 x 185 GFLOP/s; fused Adam,
# 28.3 M parameters in 17 ms. The link is an assumption, 10 Gbit/s.
CPU = Machine("2 CPU cores", 370e9, 28.3e6 * ADAM_BYTES / 17e-3, 1.25e9, 64 * GB, 8)
# Data sheet of an H100 (SXM): float32 without tensor cores, HBM3. The link is an assumption, 400
# Gbit/s a GPU.
GPU = Machine("H100", 67e12, 3.35e12, 50e9, 80 * GB, 4)
# Of a rank's memory, what tables and optimizer may take; the rest is activations and buffers.
USABLE = 0.75


@dataclass(frozen=True)
class Sizes:
    """V items, width D, decoder (d1, Hd), L positions, K blocks, B samples a step; data."""

    items: int
    width: int = 128
    inner: int = 512
    last: int = 128
    length: int = 50
    blocks: int = 4
    batch: int = 512
    interactions: int = 10**8
    users: int = 2 * 10**6

    @property
    def table_parameters(self) -> int:
        """V (D + Hd + 1): item embeddings, the decoder's last layer and its bias."""
        return self.items * (self.width + self.last + 1)

    @property
    def other_parameters(self) -> int:
        """12 D^2 K + D d1 + d1 Hd, the rest but for norms and biases."""
        d = self.width
        return 12 * d * d * self.blocks + d * self.inner + self.inner * self.last

    @property
    def encoder_flops(self) -> float:
        """A sequence forward: K - 1 whole blocks, and of the last one keys, values and one row."""
        d, positions = self.width, self.length
        whole = positions * (24 * d * d + 4 * positions * d)
        return (self.blocks - 1) * whole + positions * 4 * d * d + 20 * d * d

    @property
    def step_flops(self) -> float:
        """Forward and backward: 3 x encoder, cross-entropy 6 V D, decoder's inner layers."""
        decoder = 6 * (self.width * self.inner + self.inner * self.last)
        scores = 6 * self.items * self.width
        return self.batch * (3 * self.encoder_flops + scores + decoder)

    # Memory, bytes.

    def training_memory(self, ranks: int, sharded: bool) -> float:
        """A rank's parameters, gradients and Adam's moments, and one more gradient of lookups."""
        tables = 16 * self.table_parameters + 4 * self.items * self.width
        return (tables / ranks if sharded else tables) + 16 * self.other_parameters

    @property
    def data_on_disk(self) -> float:
        """A converted folder: 4 bytes an interaction, 8 an offset, 8 an id that is an int."""
        return 4 * self.interactions + 16 * self.users + 8 * self.items

    @property
    def data_in_memory(self) -> float:
        """What a rank allocates to find samples and fetch a batch: 8 bytes for 256 users."""
        return 8 * self.users / 256 + 4 * self.batch * (self.length + 1)

    @property
    def list_of_samples(self) -> float:
        """The same without mapping: items, two int32 and an int64 a sample."""
        return 4 * self.interactions + 16 * self.interactions

    # Communication: bytes out of each rank in a step; as many come in.

    def data_parallel_bytes(self, ranks: int) -> float:
        """A ring all-reduce of all gradients: 2 (N - 1) / N of 4 P."""
        return 2 * (ranks - 1) / ranks * 4 * (self.table_parameters + self.other_parameters)

    def small_bytes(self, ranks: int, losses: int = 4) -> float:
        """Beside gradients, data parallel: of every row how many distinct items it has (8 bytes,
        gathered), and the losses (8 bytes each, summed)."""
        return (ranks - 1) / ranks * (8 * self.batch + 2 * 8 * losses)

    def item_bytes(self, ranks: int, statistic: int, distinct: float | None = None) -> float:
        """For tables over ranks, in `ITEM_COLLECTIVES` collectives.

        Every rank sees of all B rows the representation and its gradient (8 D), the decoder's input
        and its gradient (8 Hd), the history and the target (8 L + 8), and gives 4 statistics of
        each forward, gets 5 backward. Of its own histories and targets it looks up `distinct` ids
        (at most all of them): 8 bytes go to the owner, a row comes back (4 D), its gradient goes.
        Before, each tells every other how many (8 bytes).
        """
        if distinct is None:
            distinct = self.batch / ranks * (self.length + 1)
        row = 8 * (self.width + self.last + self.length + 1) + 9 * statistic
        lookups = distinct * (8 + 8 * self.width)
        return (ranks - 1) / ranks * (self.batch * row + lookups) + 8 * (ranks - 1)

    def sharded_bytes(self, ranks: int, statistic: int) -> float:
        """The same and the all-reduce of all other parameters' gradients."""
        rest = 2 * (ranks - 1) / ranks * 4 * self.other_parameters
        return self.item_bytes(ranks, statistic) + rest

    # Seconds of a step: floors.

    def compute_seconds(self, machine: Machine, ranks: int) -> float:
        return self.step_flops / ranks / machine.flops

    def memory_seconds(self, machine: Machine, ranks: int, sharded: bool) -> float:
        """Gradients and Adam over all parameters that the rank holds."""
        tables = self.table_parameters / (ranks if sharded else 1)
        touched = (ADAM_BYTES + GRADIENT_BYTES) * (tables + self.other_parameters)
        return touched / machine.bandwidth

    def link_seconds(self, machine: Machine, ranks: int, sharded: bool) -> float:
        if sharded:
            return self.sharded_bytes(ranks, machine.statistic) / machine.link
        return self.data_parallel_bytes(ranks) / machine.link

    def exchange_seconds(self, rates: Rates, ranks: int, sharded: bool) -> float:
        """What a step's collectives take by themselves."""
        if ranks == 1:
            return 0.0
        sent = self.data_parallel_bytes(ranks) + self.small_bytes(ranks)
        collectives = DATA_PARALLEL_COLLECTIVES
        if sharded:
            sent = self.sharded_bytes(ranks, CPU.statistic)
            collectives = SHARDED_COLLECTIVES
        return sent / rates.link + collectives * rates.latency

    def predicted_seconds(self, rates: Rates, ranks: int, sharded: bool) -> float:
        """A step of `ranks` ranks, by what was measured on them: the work on a row shrinks with
        their number, that on a parameter only if the parameter is spread; and the exchange, of
        which nothing is hidden. Of one rank it is the step that was measured."""
        held = self.table_parameters / (ranks if sharded else 1) + self.other_parameters
        part = held / (self.table_parameters + self.other_parameters)
        update = rates.update * (ADAM_BYTES + GRADIENT_BYTES) / ADAM_BYTES
        computing = (rates.step - update) / ranks + update * part
        return computing + self.exchange_seconds(rates, ranks, sharded)

    def fewest_ranks(self, machine: Machine) -> int:
        """The smallest power of 2 whose ranks can hold the tables in shards."""
        ranks = 1
        while self.training_memory(ranks, True) > USABLE * machine.memory:
            ranks *= 2
        return ranks

    def user_seconds(self, machine: Machine, steps: int) -> float:
        """Recommending to one user by exact scores: the encoder at each step, and 2 V D."""
        return (steps * self.encoder_flops + 2 * self.items * self.width) / machine.flops


def amount(value: float) -> str:
    """Bytes."""
    if value == 0:
        return "0"
    for unit, name in ((TB, "TB"), (GB, "GB"), (MB, "MB")):
        if value >= unit:
            return f"{_number(value / unit)} {name}"
    return f"{_number(value / KB)} KB"


def duration(seconds: float) -> str:
    if seconds == 0:
        return "0"
    for unit, name in ((86400, "days"), (3600, "h"), (1.0, "s"), (1e-3, "ms")):
        if seconds >= unit:
            return f"{_number(seconds / unit)} {name}"
    return f"{_number(seconds * 1e6)} us"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}" if value >= 0.01 else f"{value:.1e}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def training_table(machine: Machine, items: Sequence[int]) -> str:
    """A column for each V, on the fewest ranks that hold it."""
    columns = [["", "formula"]]
    rows = [
        ("tables, gradients, Adam, in all", "16 V (D + Hd + 1) + 4 V D"),
        ("ranks that hold them", f"{USABLE:.0%} of {amount(machine.memory)} each, a power of 2"),
        ("a rank's share", "the same / N, and 16 P'"),
        ("sent in a step, `--shard-items`", "`item_bytes` + 2 (N-1)/N 4 P'"),
        ("sent in a step, data parallel", "2 (N-1)/N 4 P"),
        ("arithmetic", "B (3 E + 6 V D + ...) / N / FLOP/s"),
        ("gradients and Adam", "36 P / N / bytes/s"),
        ("link, `--shard-items`", "sent / link"),
        ("link, data parallel", "sent / link"),
        ("step, `--shard-items`: the sum", ""),
    ]
    columns = [[what, formula] for what, formula in rows]
    for count in items:
        sizes = Sizes(items=count)
        ranks = sizes.fewest_ranks(machine)
        compute = sizes.compute_seconds(machine, ranks)
        memory = sizes.memory_seconds(machine, ranks, True)
        link = sizes.link_seconds(machine, ranks, True)
        cells = [
            amount(sizes.training_memory(1, True)),
            str(ranks),
            amount(sizes.training_memory(ranks, True)),
            amount(sizes.sharded_bytes(ranks, machine.statistic)),
            amount(sizes.data_parallel_bytes(ranks)),
            duration(compute),
            duration(memory),
            duration(link),
            duration(sizes.link_seconds(machine, ranks, False)),
            duration(compute + memory + link),
        ]
        for row, cell in zip(columns, cells, strict=True):
            row.append(cell)
    header = [f"a rank: {machine.name}", "", *(f"V = {power(count)}" for count in items)]
    return _table([header, *columns])


def data_table(cases: Sequence[tuple[int, int]]) -> str:
    rows = [["", "formula", *(f"{power(i)} interactions, {power(u)} users" for i, u in cases)]]
    sizes = [Sizes(items=10**7, interactions=i, users=u) for i, u in cases]
    for what, formula, values in (
        (
            "converted folder (int user ids, V = 1e7)",
            "4 I + 16 U + 8 V",
            [one.data_on_disk for one in sizes],
        ),
        (
            "allocated by a rank that trains",
            "8 U / 256 + 4 B (L + 1)",
            [one.data_in_memory for one in sizes],
        ),
        ("the same, not mapped", "20 I", [one.list_of_samples for one in sizes]),
    ):
        rows.append([what, formula, *map(amount, values)])
    return _table(rows)


def recommending_table(users: int, items: Sequence[int]) -> str:
    rows = [[f"{power(users)} users, exact scores", *(f"V = {power(count)}" for count in items)]]
    for machine in (CPU, GPU):
        for steps in (30, 1):
            cells = [duration(users * Sizes(items=v).user_seconds(machine, steps)) for v in items]
            rows.append([f"{machine.name}, {steps} step{'s' * (steps > 1)}", *cells])
    return _table(rows)


def power(value: int) -> str:
    exponent = math.floor(math.log10(value))
    return f"{value / 10**exponent:g}e{exponent}"


def plan() -> str:
    """What docs/scale.md has between its marks."""
    items = (10**7, 10**8, 10**9)
    return "\n".join(
        (
            training_table(CPU, items),
            training_table(GPU, items),
            data_table(((10**8, 2 * 10**6), (10**10, 2 * 10**8), (5 * 10**10, 10**9))),
            recommending_table(10**9, items),
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}")
    options = parser.parse_args()
    if not options.write:
        print(plan())
        return
    first, last = map(re.escape, MARKS)
    text, found = re.subn(
        f"({first}).*?({last})", lambda at: at[1] + plan() + at[2], DOCUMENT.read_text(), flags=re.S
    )
    if found != 1:
        raise SystemExit(f"{DOCUMENT} has {found} places between {MARKS}; expected 1")
    DOCUMENT.write_text(text)


if __name__ == "__main__":
    main()
