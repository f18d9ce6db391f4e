"""Which networks the persistent kernels take, and how each is laid out on a multiprocessor.

The layouts follow from what the compiler makes of them (docs/performance.md), not from timings: the
first of a list is preferred, those after it need less shared memory. What is not in the table was
not compiled, does not fit into shared memory, or spends more than an eighth of the instructions of
its inner loops on spilled registers; it is declined.

Plans that were timed on a device (`python -m fmrec_fast.kernels.tune --write`) lie in `tuned.json`
and come before the layouts, on the family of devices and for the networks that they were timed for.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

WIDTHS = (32, 64, 128, 256)
LONGEST = 256
WIDEST_HEAD = 64
# Of `kernels/attention.py`, a program of which has all keys of one head on chip: (most positions,
# widest head). Longer ones spill, or do not fit, in the backward pass.
ATTENTION = ((64, 64), (128, 32))
THREADS = 256
# Elements of the weights of queries, keys and values that one product takes: those of the layouts'
# measurements, D = 128 and heads of 32.
LARGEST_STACK = 4 * 32 * 128


class Plan(NamedTuple):
    """How one program is cut; the constants are those of `kernels/transformer.py`.

    T rows for a sequence; CHUNK and LAST_CHUNK of the feed-forward's inner channels at a time, in
    all blocks but the last and in the last; STACKED: queries, keys and values in one product;
    STAGES of loads in flight in the loops. A program has so many `threads`.
    """

    T: int
    CHUNK: int
    LAST_CHUNK: int
    STACKED: bool
    STAGES: int
    threads: int = THREADS


class TilePlan(NamedTuple):
    """How one program is cut whose rows come in tiles; the constants of `kernels/tiles.py`.

    T rows to a tile; CHUNK channels at a time, of the feed-forward and of the projections;
    LAST_CHUNK in the last block; STAGES of loads in flight in the loops. A multiprocessor has so
    many `programs`, which take the sequences in turn.
    """

    T: int
    CHUNK: int
    LAST_CHUNK: int
    STAGES: int
    threads: int = THREADS
    programs: int = 1


def constants(chosen: Plan | TilePlan) -> dict[str, int]:
    """What the kernels take of a plan."""
    return {name: value for name, value in chosen._asdict().items() if name.isupper()}


class Layout(NamedTuple):
    """A plan but for T and LAST_CHUNK, and the shared memory that it needs at most, in bytes."""

    chunk: int
    stacked: bool
    stages: int
    shared: int


# (widest D, most positions) -> {family of devices -> {precision -> layouts, the best first}}.
LAYOUTS: dict[tuple[int, int], dict[str, dict[str, list[Layout]]]] = {
    (128, 64): {
        "cuda:80": {
            "float32": [Layout(32, True, 1, 131072)],
            "tf32": [Layout(64, True, 1, 98304)],
            "bf16": [Layout(128, True, 2, 98816)],
        },
        "cuda:90": {
            "float32": [Layout(32, True, 1, 197632)],
            "tf32": [Layout(64, True, 2, 230912), Layout(128, True, 1, 164864)],
            "bf16": [Layout(128, True, 2, 165376), Layout(64, True, 2, 132608)],
        },
        "cuda:100": {
            "float32": [Layout(32, True, 1, 132104)],
            "tf32": [Layout(128, True, 1, 164872)],
            "bf16": [Layout(128, True, 2, 165408)],
        },
        "hip:gfx942": {
            "float32": [Layout(32, True, 1, 65536)],
            "tf32": [Layout(32, True, 1, 65536)],
            "bf16": [Layout(64, True, 1, 32768)],
        },
    },
    (128, 128): {
        "cuda:90": {
            "tf32": [Layout(64, False, 1, 164864)],
            "bf16": [Layout(64, True, 2, 181760), Layout(128, True, 1, 99328)],
        },
    },
    (256, 64): {
        "cuda:90": {"bf16": [Layout(64, False, 1, 99328)]},
    },
}


class TileLayout(NamedTuple):
    """A `TilePlan` but for LAST_CHUNK, and the shared memory that it needs at most, in bytes."""

    tile: int
    chunk: int
    stages: int
    shared: int


# widest D -> {family of devices -> {precision -> layouts, the best first}}.
# Tied padding takes the shortest tile: a short history is one, and its rows are what is saved.
TILES: dict[int, dict[str, dict[str, list[TileLayout]]]] = {
    128: {
        "cuda:80": {
            "float32": [TileLayout(64, 64, 1, 98304), TileLayout(32, 64, 1, 65536)],
            "tf32": [TileLayout(64, 64, 1, 98304), TileLayout(32, 64, 1, 81920)],
            "bf16": [TileLayout(64, 64, 1, 49152), TileLayout(32, 64, 1, 40960)],
        },
        "cuda:90": {
            "float32": [TileLayout(64, 64, 1, 164864), TileLayout(32, 64, 1, 132096)],
            "tf32": [TileLayout(64, 64, 1, 99328), TileLayout(32, 64, 1, 82944)],
            "bf16": [TileLayout(64, 64, 1, 50176), TileLayout(32, 64, 2, 79104)],
        },
        "cuda:100": {
            "float32": [TileLayout(32, 64, 1, 99336)],
            "tf32": [TileLayout(32, 64, 1, 82952)],
            "bf16": [TileLayout(32, 64, 1, 41992)],
        },
        "hip:gfx942": {
            "float32": [TileLayout(32, 32, 1, 16384)],
            "tf32": [TileLayout(32, 32, 1, 16384)],
            "bf16": [TileLayout(32, 32, 1, 16384)],
        },
    },
    256: {
        "cuda:80": {
            "float32": [TileLayout(32, 32, 1, 98304)],
            "tf32": [TileLayout(32, 32, 1, 98304)],
            "bf16": [TileLayout(32, 32, 1, 49152)],
        },
        "cuda:90": {
            "float32": [TileLayout(32, 32, 1, 132096)],
            "tf32": [TileLayout(32, 64, 1, 164864)],
            "bf16": [TileLayout(32, 64, 1, 82944)],
        },
        "cuda:100": {
            "float32": [TileLayout(32, 32, 1, 107528)],
            "tf32": [TileLayout(32, 32, 1, 99328)],
            "bf16": [TileLayout(32, 32, 1, 50176)],
        },
        "hip:gfx942": {
            "float32": [TileLayout(32, 32, 1, 32768)],
            "tf32": [TileLayout(32, 32, 1, 32768)],
            "bf16": [TileLayout(32, 32, 1, 32768)],
        },
    },
}


def family(device: torch.device) -> tuple[str, int]:
    """The device's row of `LAYOUTS` and the bytes of shared memory that a program may have.

    A CPU, where Triton interprets, counts as the largest.
    """
    if device.type != "cuda":
        return "cuda:90", 232448
    if torch.version.hip:
        return "hip:gfx942", 65536
    properties = torch.cuda.get_device_properties(device)
    shared = int(properties.shared_memory_per_block_optin)
    # Only 9.x has wgmma and only 10.x tcgen05; all others multiply as 8.0 does.
    return {9: "cuda:90", 10: "cuda:100"}.get(properties.major, "cuda:80"), shared


class Network(NamedTuple):
    """What a plan is tuned for: `rows` is `tile_rows` of L; a rotary network is Fave's."""

    width: int
    rows: int
    num_heads: int
    precision: str
    tied: bool
    rotary: bool


class Tuned(NamedTuple):
    """A plan of `tuned.json`; `shared` bytes are what it needs, `measured` says what it won."""

    network: Network
    plan: Plan | TilePlan
    shared: int
    measured: dict[str, Any]


TUNED = Path(__file__).with_name("tuned.json")
# Under `only`: the plan that every launch takes.
_only: list[Plan | TilePlan] = []


def tile_rows(length: int) -> int:
    """T of a tile that holds all of a sequence."""
    return max(16, 1 << (length - 1).bit_length())


@functools.cache
def read_tuned(path: Path) -> dict[str, list[Tuned]]:
    """The tuned plans by family of devices; none where there is no file.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.exists():
        return {}
    try:
        return {
            kind: [
                Tuned(
                    Network(**entry["network"]),
                    (Plan if "STACKED" in entry["plan"] else TilePlan)(**entry["plan"]),
                    int(entry["shared"]),
                    entry["measured"],
                )
                for entry in entries
            ]
            for kind, entries in json.loads(path.read_text()).items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from None


def write_tuned(path: Path, kind: str, found: list[Tuned]) -> None:
    """Put `found` in the place of what the file has for the same networks on `kind`."""
    every = dict(read_tuned(path))
    replaced = {entry.network for entry in found}
    kept = [entry for entry in every.get(kind, []) if entry.network not in replaced]
    every[kind] = sorted(kept + found, key=lambda entry: entry.network)
    plain = {
        name: [
            entry._asdict() | {"network": entry.network._asdict(), "plan": entry.plan._asdict()}
            for entry in entries
        ]
        for name, entries in sorted(every.items())
    }
    path.write_text(json.dumps(plain, indent=1) + "\n")
    read_tuned.cache_clear()


@contextmanager
def only(chosen: Plan | TilePlan) -> Iterator[None]:
    """Every launch takes this plan: for the tuner, which runs in a process of its own."""
    _only.append(chosen)
    try:
        yield
    finally:
        _only.pop()


def plan(
    length: int,
    width: int,
    num_heads: int,
    precision: str,
    kind: str,
    shared: int,
    tied: bool = False,
    rotary: bool = False,
) -> Plan | TilePlan | str:
    """The plan for sequences of `length` positions on a `family` of devices, or why none fits.

    A tuned plan where there is one. Tiles take what does not fit as a whole, and tied padding,
    which leaves rows out; they do not rotate.
    """
    if width not in WIDTHS:
        return f"its kernel takes D in {WIDTHS}, got {width}"
    if num_heads < 1 or width % num_heads:
        return f"the heads must divide D = {width}, got {num_heads}"
    if width // num_heads > WIDEST_HEAD:
        return f"its kernel takes heads of at most {WIDEST_HEAD} channels, got {width // num_heads}"
    if not 1 <= length <= LONGEST:
        return f"its kernel takes L in 1 .. {LONGEST}, got {length}"
    if _only:
        return _only[-1]
    network = Network(width, tile_rows(length), num_heads, precision, tied, rotary)
    for entry in read_tuned(TUNED).get(kind, ()):
        if entry.network == network and entry.shared <= shared:
            return entry.plan
    return pinned(length, width, num_heads, precision, kind, shared, tied, rotary)


def pinned(
    length: int,
    width: int,
    num_heads: int,
    precision: str,
    kind: str,
    shared: int,
    tied: bool = False,
    rotary: bool = False,
) -> Plan | TilePlan | str:
    """The plan of the layouts, as `plan`."""
    whole = None if tied else _whole(length, width, num_heads, precision, kind, shared)
    if whole is not None:
        return whole
    if rotary:
        return f"its kernel has no rotary embedding in tiles, which L = {length} needs on {kind}"
    for widest, kinds in TILES.items():
        if width <= widest:
            layouts = kinds.get(kind, {}).get(precision, [])
            for layout in sorted(layouts) if tied else layouts:
                if layout.shared <= shared:
                    chunk = min(layout.chunk, 4 * width)
                    return TilePlan(layout.tile, chunk, 4096 // width, layout.stages)
    return (
        f"its kernel has no layout for D = {width}, L = {length}, {num_heads} heads in {precision} "
        f"on {kind} with {shared} bytes of shared memory"
    )


def _whole(
    length: int, width: int, num_heads: int, precision: str, kind: str, shared: int
) -> Plan | None:
    """The plan with all of a sequence on chip, if there is one."""
    for (widest, longest), kinds in LAYOUTS.items():
        if width > widest or length > longest:
            continue
        for layout in kinds.get(kind, {}).get(precision, []):
            if layout.stacked and 4 * width * (width // num_heads) > LARGEST_STACK:
                continue
            if layout.shared <= shared:
                chunk = min(layout.chunk, 4 * width)
                last = 4096 // width
                return Plan(tile_rows(length), chunk, last, layout.stacked, layout.stages)
    return None


def attention_declined(length: int, head_width: int) -> str:
    """Why `kernels/attention.py` does not take such sequences; empty where it does."""
    if any(length <= longest and head_width <= widest for longest, widest in ATTENTION):
        return ""
    return f"its kernel takes (L, D / H) up to one of {ATTENTION}, got {(length, head_width)}"
