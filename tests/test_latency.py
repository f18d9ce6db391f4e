"""The latencies that ``fmrec-fast bench latency`` prints."""

from __future__ import annotations

import json

import pytest
import torch

from fmrec_fast import extension, latency
from fmrec_fast.cli import main

if not extension.available():
    pytest.skip(str(extension.reason()), allow_module_level=True)

SMALL = {"item_num": 61, "hidden_size": 16, "max_len": 9, "num_blocks": 1}


def test_percentiles_are_by_nearest_rank():
    values = list(range(1, 101))
    assert [latency.percentile(values, share) for share in (0.5, 0.9, 0.99, 1)] == [50, 90, 99, 100]
    assert [latency.percentile([3, 4], share) for share in (0.5, 0.9, 0.0)] == [3, 4, 3]


def test_histories_are_valid_and_the_same_every_time():
    model = latency.random_model(**SMALL)
    given = latency.histories(model, 200)
    assert given == latency.histories(model, 200)
    assert {len(row) for row in given} <= set(range(4, 10))
    assert all(1 <= item < 61 for row in given for item in row)


def test_every_case_is_measured():
    threads, seen = torch.get_num_threads(), []
    found = latency.measure(
        latency.random_model(**SMALL),
        users=(1, 3),
        threads=(1, 2),
        steps=2,
        padding="tied",
        precision="bf16",
        seconds=1e-3,
        report=seen.append,
    )
    assert seen == found
    assert torch.get_num_threads() == threads
    cases = [(one.threads, one.users, one.cold) for one in found]
    assert cases == [(t, u, c) for t in (1, 2) for u in (1, 3) for c in (False, True)]
    for one in found:
        assert 0 < one.p50_ms <= one.p90_ms <= one.p99_ms
        assert one.calls >= latency.LEAST_CALLS
        assert one.users_per_s == pytest.approx(1e3 * one.users / one.p50_ms)
        assert len(latency.line(one)) == len(latency.HEADER)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"users": (0,)}, r"users must be positive numbers, got \[0\]"),
        ({"threads": ()}, r"threads must be positive numbers, got \[\]"),
        ({"seconds": 0}, "seconds must be positive, got 0"),
        ({"precision": "fp8"}, "precision must be one of .*got 'fp8'"),
    ],
)
def test_bad_requests_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        latency.measure(latency.random_model(**SMALL), **change)


def test_the_command(tmp_path, capsys):
    path = tmp_path / "deep" / "latency.json"
    options = "--item_num 61 --hidden_size 16 --max_len 9 --num_blocks 1 --seconds 0.001 --steps 2"
    more = ["--users", "[1,2]", "--threads", "[1]", "--json", str(path)]
    assert main(["bench", "latency", *options.split(), *more]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == latency.HEADER
    assert len(lines) == 5
    facts = json.loads(path.read_text())
    assert facts["steps"] == 2
    assert facts["item_num"] == 61
    assert [one["users"] for one in facts["latencies"]] == [1, 1, 2, 2]
    with pytest.raises(SystemExit):
        main(["bench", "throughput"])
