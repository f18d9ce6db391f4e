"""How long recommendations take on this CPU: percentiles for small batches, and throughput."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fmrec_fast.config import FMRecConfig
from fmrec_fast.models.recommender import FMRecommender
from fmrec_fast.serving import Server

USERS = (1, 2, 4, 8, 16, 32, 64)
THREADS = (1, 2)
# More than any cache that belongs to one core.
SWEPT_BYTES = 1 << 26
LEAST_CALLS = 3
# Log-normal lengths, as Amazon Beauty's test histories (mean 7.7 of 50).
MEDIAN_LENGTH, SIGMA, SHORTEST = 2.0, 1.31, 4


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call for `users`; `cold` ones find swept caches and pack the weights.

    Percentiles are those of `calls` calls by nearest rank: of fewer than 100, the 99th is the
    longest.
    """

    users: int
    threads: int
    cold: bool
    calls: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    users_per_s: float


def random_model(item_num: int, hidden_size: int, max_len: int, num_blocks: int) -> FMRecommender:
    """A model with random weights, which take as long as trained ones."""
    config = FMRecConfig(
        item_num=item_num,
        hidden_size=hidden_size,
        max_len=max_len,
        num_blocks=num_blocks,
        last=min(2, num_blocks - 1),
        decoder_dims=(1, 1),  # is not run
    )
    return FMRecommender.from_config(config).eval()


def histories(model: FMRecommender, users: int) -> list[list[int]]:
    """Random histories of the lengths that small online shops see."""
    generator = random.Random(1997)
    lengths = (
        SHORTEST - 1 + max(1, round(MEDIAN_LENGTH * math.exp(SIGMA * generator.gauss(0, 1))))
        for _ in range(users)
    )
    longest = model.config.max_len
    return [
        [generator.randrange(1, model.item_num) for _ in range(min(length, longest))]
        for length in lengths
    ]


def percentile(ordered: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value that at least `share` of all values do not exceed."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _time(call: Callable[[], object], prepare: Callable[[], object], seconds: float) -> list[float]:
    """Seconds of each call, ascending, until `seconds` are over; one before is not counted."""
    prepare()
    call()
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while len(taken) < LEAST_CALLS or time.perf_counter() < end:
        prepare()
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return sorted(taken)


def measure(
    model: FMRecommender,
    *,
    users: Sequence[int] = USERS,
    threads: Sequence[int] = THREADS,
    k: int = 10,
    steps: int | None = None,
    padding: str = "published",
    precision: str = "float32",
    seconds: float = 1.0,
    report: Callable[[Latency], object] | None = None,
) -> list[Latency]:
    """Recommend for each number of users, warm and cold, with each number of threads.

    The process's number of threads is restored. `report` is called with each result as it comes.

    Raises:
        ValueError: a number of users or threads, or the seconds, are not positive, or there is no
            such precision.
        BackendError: the model cannot be served here.
    """
    for name, values in (("users", users), ("threads", threads)):
        if not values or min(values) < 1:
            raise ValueError(f"{name} must be positive numbers, got {list(values)}")
    if not seconds > 0:
        raise ValueError(f"seconds must be positive, got {seconds}")
    swept = torch.zeros(SWEPT_BYTES // 8, dtype=torch.int64)
    before, found = torch.get_num_threads(), []
    server = Server(model, precision)
    try:
        for number in threads:
            torch.set_num_threads(number)
            for count in users:
                given = histories(model, count)

                def warm(given: list[list[int]] = given) -> None:
                    server.recommend(given, k, steps=steps, padding=padding, seed=0)

                def cold(given: list[list[int]] = given) -> None:
                    server.refresh()
                    server.recommend(given, k, steps=steps, padding=padding, seed=0)

                cases: tuple[tuple[bool, Callable[[], object], Callable[[], object]], ...] = (
                    (False, warm, lambda: None),
                    (True, cold, lambda: swept.add_(1)),
                )
                for is_cold, call, prepare in cases:
                    taken = _time(call, prepare, seconds)
                    p50, p90, p99 = (1e3 * percentile(taken, share) for share in (0.5, 0.9, 0.99))
                    rate = 1e3 * count / p50
                    found.append(Latency(count, number, is_cold, len(taken), p50, p90, p99, rate))
                    if report is not None:
                        report(found[-1])
    finally:
        torch.set_num_threads(before)
    return found


HEADER = f"{'threads':>7} {'users':>5} {'':4} {'calls':>5}" + "".join(
    f"{name:>10}" for name in ("p50 ms", "p90 ms", "p99 ms", "users/s")
)


def line(one: Latency) -> str:
    """A row under `HEADER`."""
    kind = "cold" if one.cold else "warm"
    numbers = (one.p50_ms, one.p90_ms, one.p99_ms, one.users_per_s)
    return f"{one.threads:>7} {one.users:>5} {kind} {one.calls:>5}" + "".join(
        f"{number:>10.2f}" for number in numbers
    )


def to_dict(found: Sequence[Latency]) -> list[dict[str, Any]]:
    """Plain values."""
    return [asdict(one) for one in found]
