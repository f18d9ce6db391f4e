"""Several ranks train as one does: losses, parameters, evaluation, checkpoints; and a killed rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import ranks
import torch

from fmrec_fast import checkpoint
from fmrec_fast.checkpoint import CheckpointError
from fmrec_fast.distributed import World
from fmrec_fast.distributed.world import described, own_device
from fmrec_fast.training import Trainer

MODELS = ("fmrec", "stage1", "stage2")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of one, two and four ranks; the jobs themselves check what needs several ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    ranks.all_models(World(), folder)
    ranks.launch(4, ranks.begin, folder)
    ranks.launch(2, ranks.two_ranks, folder)
    return folder


def last(run: Path) -> dict:
    return checkpoint.load(checkpoint.locate(run, "last"))


def assert_close(a: dict, b: dict) -> None:
    """The same tensors to float32 rounding over the run."""
    assert list(a) == list(b)
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=2e-6, msg=lambda m: name + m)


def assert_same_run(run: Path, other: Path) -> None:
    steps = [json.loads((path / "steps.json").read_text()) for path in (run, other)]
    assert len(steps[0]) == len(steps[1]) == 12
    for one, two in zip(*steps, strict=True):
        assert one.keys() == two.keys()
        assert list(one.values()) == pytest.approx(list(two.values()), rel=2e-6)
    states = [last(path) for path in (run, other)]
    assert_close(*(state["model"] for state in states))
    for i, held in states[0]["optimizer"]["state"].items():
        assert_close(held, states[1]["optimizer"]["state"][i])
    assert states[0]["optimizer"]["param_groups"] == states[1]["optimizer"]["param_groups"]
    for name in ("best", "progress"):
        assert checkpoint.locate(run, "best").name == checkpoint.locate(other, "best").name, name
    a, b = (json.loads((path / "result.json").read_text()) for path in (run, other))
    assert a == b


@pytest.mark.parametrize("model", MODELS)
def test_two_ranks_give_the_losses_and_parameters_of_one(runs, model):
    """With a last batch of one sample, so that one rank has none; dropout, drawn cells and, in
    Fave, clipped gradients and drop path."""
    assert_same_run(runs / "on-1" / model, runs / "on-2" / model)
    state = last(runs / "on-2" / model)
    assert state["global_step"] == 12 and len(state["progress"]["history"]) == 3


def test_four_ranks_begin_and_two_go_on(runs):
    states = [last(runs / name) for name in ("on-1/fmrec", "handed-on")]
    assert_close(*(state["model"] for state in states))
    histories = [
        [{k: r[k] for k in r if k != "steps_per_second"} for r in state["progress"]["history"]]
        for state in states
    ]
    for one, two in zip(*histories, strict=True):
        assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=2e-6)
        assert one == two  # metrics of the validation too
