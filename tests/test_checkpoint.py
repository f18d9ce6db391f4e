"""Checkpoints: what goes in comes out; damage is named; a write cut short costs nothing."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fmrec_fast import FaveConfig, FMRecConfig, checkpoint
from fmrec_fast.checkpoint import CheckpointError
from fmrec_fast.models import build_recommender

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def assert_same(a, b, where="state"):
    assert type(a) is type(b), f"{where}: {type(a)} and {type(b)}"
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape, where
        assert a.numpy(force=True).tobytes() == b.numpy(force=True).tobytes(), where
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert a == b or (a != a and b != b), f"{where}: {a!r} and {b!r}"


def state(value: float) -> dict:
    return {"model": {"w": torch.full((3, 2), value)}, "value": value}


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with one 'last' checkpoint."""
    checkpoint.save(tmp_path / "run", "last-1", "last", state(1.0))
    return tmp_path / "run"


def test_nested_trees_come_back_as_they_were(tmp_path):
    tree = {
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, 1: {}},
            "param_groups": [{"params": [0, 1], "lr": 0.1 + 0.2, "betas": [0.9, 0.999]}],
        },
        # Keys that would share a path if paths were only joined.
        "clash": {0: torch.tensor(0), "0": torch.tensor(1), "a/b": torch.tensor(2)},
        "a": {"b": torch.tensor(3)},
        "clash/a": {"b": torch.tensor(4)},
        "dtypes": {str(d): torch.arange(6).reshape(2, 3).to(d) for d in DTYPES if d != torch.bool},
        "bool": torch.tensor([True, False]),
        "special": torch.tensor([float("nan"), float("inf"), -0.0]),
        "zero-dim": [torch.tensor(7, dtype=torch.int64), torch.tensor(True)],
        "empty": torch.empty(0, 5),
        "strided": torch.arange(12.0).reshape(3, 4).T[1:],
        "ids": ["é", "7", 7, "with\nbreak"],
        "plain": [None, True, 1, 1e-300, float("inf"), float("nan"), "", [], {}],
    }
    tree["bfloat16"] = tree["dtypes"].pop("torch.bfloat16").float()  # numpy has no bfloat16
    for name in ("last-1", "last-2"):
        target = checkpoint.save(tmp_path, name, "last", tree)
        assert_same(tree, checkpoint.load(target))
    brain = torch.randn(5).to(torch.bfloat16)
    back = checkpoint.load(checkpoint.save(tmp_path, "last-3", "last", {"x": brain}))["x"]
    assert back.dtype == torch.bfloat16 and torch.equal(
        back.view(torch.int16), brain.view(torch.int16)
    )


def test_what_is_loaded_outlives_its_file_and_may_be_written_to(run):
    loaded = checkpoint.load(checkpoint.locate(run, "last"))
    shutil.rmtree(run)
    loaded["model"]["w"] += 1
    assert torch.equal(loaded["model"]["w"], torch.full((3, 2), 2.0))


def test_pointers_and_cleaning(run):
    assert checkpoint.locate(run, "best") == run / "checkpoints" / "last-1", "no best: the last"
    checkpoint.save(run, "best-1", "best", state(10.0))
    checkpoint.save(run, "last-2", "last", state(2.0))
    checkpoint.save(run, "last-3", "last", state(3.0))
    assert checkpoint.load(checkpoint.locate(run))["value"] == 10.0
    assert checkpoint.load(checkpoint.locate(run, "last"))["value"] == 3.0
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["best-1", "last-3"]
    assert sorted(p.name for p in run.iterdir()) == ["best.json", "checkpoints", "last.json"]


def test_the_same_name_again_replaces_the_content(run):
    for value in (2.0, 3.0, 4.0):
        checkpoint.save(run, "last-1", "last", state(value))
        assert checkpoint.load(checkpoint.locate(run, "last"))["value"] == value
        assert len(list((run / "checkpoints").iterdir())) == 1


class Killed(BaseException):
    """Stands for the death of the process: nothing catches it."""


def fail_at(monkeypatch: pytest.MonkeyPatch, n: int | None) -> Callable[[], int]:
    """Make file operation number `n` of `checkpoint` raise before it acts; counts them."""
    count = 0

    def guard(call):
        def guarded(*args, **kwargs):
            nonlocal count
            count += 1
            if count - 1 == n:
                raise Killed(call.__name__)
            return call(*args, **kwargs)

        return guarded

    for owner, name in (
        *((os, name) for name in ("replace", "fsync", "open", "mkdir")),
        (checkpoint, "save_file"),
        (shutil, "rmtree"),
        (Path, "write_text"),
    ):
        monkeypatch.setattr(owner, name, guard(getattr(owner, name)))
    return lambda: count


@pytest.mark.parametrize("name", ["last-2", "last-1"], ids=["new-name", "same-name"])
@pytest.mark.parametrize("role", ["last", "best"])
def test_killed_between_any_two_file_operations(tmp_path, monkeypatch, name, role):
    name = name.replace("last", role)

    def start(at: str) -> Path:
        checkpoint.save(tmp_path / at, f"{role}-1", role, state(1.0))
        return tmp_path / at

    with monkeypatch.context() as patch:
        run = start("whole")
        operations = fail_at(patch, None)
        checkpoint.save(run, name, role, state(2.0))
    total = operations()
    assert total > 10
    seen = set()
    for n in range(total):
        run = start(f"killed-{n}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            fail_at(patch, n)
            checkpoint.save(run, name, role, state(2.0))
        found = checkpoint.load(checkpoint.locate(run, role))
        assert found["value"] in (1.0, 2.0)
        assert_same(state(found["value"]), found)
        seen.add(found["value"])
        # The next write succeeds, and clears away what was left lying.
        checkpoint.save(run, name, role, state(3.0))
        assert checkpoint.load(checkpoint.locate(run, role))["value"] == 3.0
        assert len(list((run / "checkpoints").iterdir())) == 1, n
        assert {p.name for p in run.iterdir()} == {"checkpoints", f"{role}.json"}, n
    assert seen == {1.0, 2.0}, "kills both before and after the switch"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
@pytest.mark.parametrize("part", [checkpoint.TENSORS, checkpoint.STATE])
def test_truncated_files_are_named(run, part, share):
    path = checkpoint.locate(run, "last") / part
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(CheckpointError, match=f"{part} is truncated"):
        checkpoint.load(path.parent)


@pytest.mark.parametrize("part", [checkpoint.TENSORS, checkpoint.STATE])
def test_missing_files_are_named(run, part):
    (checkpoint.locate(run, "last") / part).unlink()
    with pytest.raises(CheckpointError, match=f"{part} is missing"):
        checkpoint.load(checkpoint.locate(run, "last"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1}', "expected format 'fmrec_fast checkpoint', got None"),
        ("[1, 2]", "expected format .* got 'list'"),
        ('{"format": "fmrec_fast checkpoint", "version": 99}', "expected version 1 or 2, got 99"),
        ('{"format": "fmrec_fast checkpoint", "version": 1}', "has no 'state'"),
        ('{"format": "fmrec_fast checkpoint", "version": 1, "state": {"a": 1}}', "is damaged"),
        (
            '{"format": "fmrec_fast checkpoint", "version": 1, "state": {"$dict": [1]}}',
            "is damaged",
        ),
        ("\x00\x01 not JSON", "truncated or not JSON"),
    ],
)
def test_a_foreign_state_is_refused(run, text, message):
    path = checkpoint.locate(run, "last") / checkpoint.STATE
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path.parent)
    assert str(path) in str(caught.value)


def test_foreign_bytes_and_missing_tensors_are_refused(run):
    path = checkpoint.locate(run, "last") / checkpoint.TENSORS
    save_file({"other": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"tensors.safetensors lacks the tensor '/model/w'"):
        checkpoint.load(path.parent)
    path.write_bytes(b"PK\x03\x04" + bytes(500))
    with pytest.raises(CheckpointError, match=r"tensors.safetensors is truncated or foreign"):
        checkpoint.load(path.parent)


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"checkpoint": 3}'])
def test_a_damaged_pointer_is_named(run, text):
    (run / "last.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"last\.json"):
        checkpoint.locate(run, "last")


def test_no_run_directory(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere is not a directory"):
        checkpoint.locate(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"holds no best\.json and no last\.json"):
        checkpoint.locate(tmp_path)
    (tmp_path / "last.json").write_text(json.dumps({"checkpoint": "last-7"}))
    with pytest.raises(CheckpointError, match=r"last-7/state\.json is missing"):
        checkpoint.load(checkpoint.locate(tmp_path))


def test_build_model_refuses_what_does_not_fit(small_model):
    model = small_model()
    whole = {
        "config": model.config.to_dict(),
        "item_ids": list(range(1, 61)),
        "model": model.state_dict(),
    }
    built = checkpoint.build_model(whole)
    assert not built.training
    assert_same(dict(model.state_dict()), dict(built.state_dict()))
    for key in whole:
        with pytest.raises(CheckpointError, match=f"no '{key}'"):
            checkpoint.build_model({k: v for k, v in whole.items() if k != key})
    wider = whole | {"config": whole["config"] | {"hidden_size": 64}}
    with pytest.raises(CheckpointError, match="do not fit the configuration"):
        checkpoint.build_model(wider)


def test_rng_state_round_trip():
    before = checkpoint.rng_state()
    first = torch.rand(3)
    checkpoint.restore_rng(before)
    assert torch.equal(first, torch.rand(3))


@pytest.mark.parametrize("config", [FMRecConfig(item_num=12_102), FaveConfig(item_num=12_102)])
def test_weights_for_inference_of_beauty_are_under_16_mb(config):
    # The decoder, which is left out, is made small; nothing else depends on it.
    weights = build_recommender(config.replace(decoder_dims=(1, 1))).state_dict()
    assert any(checkpoint.DECODER in name for name in weights)
    kept = [w for name, w in weights.items() if checkpoint.DECODER not in name]
    assert sum(w.numel() * w.element_size() for w in kept) < 15.9e6
