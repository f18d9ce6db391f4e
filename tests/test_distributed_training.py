"""Several ranks train as one does: losses, parameters, evaluation, checkpoints; a killed rank."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist

from fmrec_fast import checkpoint
from fmrec_fast.checkpoint import CheckpointError
from fmrec_fast.cli import main
from fmrec_fast.data import Dataset, synthetic_dataset
from fmrec_fast.distributed import World
from fmrec_fast.distributed.world import described, fresh_store, own_device
from fmrec_fast.training import Trainer

MODELS = {"fmrec": 12, "early": 16, "stage1": 12, "stage2": 12}  # and their steps


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_csv(data: Dataset, path: Path) -> None:
    rows = ["user,item,timestamp"]
    for user in range(data.num_users):
        rows += [f"{user},{item},{at}" for at, item in enumerate(data.history(user).tolist())]
    path.write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Runs of one, two and four ranks; the jobs themselves check what needs several ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    write_csv(ranks.dataset(), folder / "data.csv")
    ranks.all_models(World(), folder)
    ranks.launch(4, ranks.four_ranks, folder)
    ranks.launch(2, ranks.two_ranks, folder)
    return folder


def last(run: Path) -> dict:
    return checkpoint.load(checkpoint.locate(run, "last"))


# FMRec's softmax does not change with the keys' bias, whose gradient is rounding alone. Adam makes
# steps of lr of it, in either direction.
OF_NO_EFFECT = re.compile(r"fm\..*\.attention\.linear_layers\.1\.bias$")


def assert_close(a: dict, b: dict, steps: int) -> None:
    """The same parameters, to float32 rounding over so many steps."""
    assert list(a) == list(b)
    for name in a:
        bound = {"rtol": 1e-5, "atol": 2e-6}
        if OF_NO_EFFECT.match(name):
            bound = {"rtol": 0.0, "atol": 2 * ranks.FMREC.lr * steps}
        torch.testing.assert_close(a[name], b[name], msg=lambda m, n=name: f"{n}: {m}", **bound)


def losses(run: Path) -> torch.Tensor:
    """What rank 0 was told after every step."""
    told = json.loads((run / "steps.json").read_text())
    return torch.tensor([list(means.values()) for means in told], dtype=torch.float64)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_ranks_give_the_losses_and_parameters_of_one(runs, model, size):
    """With a last batch of one sample, so that the other ranks have none; dropout, drawn cells and,
    in Fave, clipped gradients and drop path."""
    one, two = runs / "on-1" / model, runs / f"on-{size}" / model
    assert losses(one).shape[0] == MODELS[model]
    torch.testing.assert_close(losses(one), losses(two), rtol=2e-6, atol=0)
    of_one, of_two = last(one), last(two)
    assert_close(of_one["model"], of_two["model"], MODELS[model])
    assert of_one["progress"]["stopped"] == of_two["progress"]["stopped"] == (model == "early")
    optimizers = [state["optimizer"] for state in (of_one, of_two)]
    assert optimizers[0]["param_groups"] == optimizers[1]["param_groups"]
    assert list(optimizers[0]["state"]) == list(optimizers[1]["state"])
    # Adam's steps hardly change with the gradients' scale; its moments do.
    for number, moments in optimizers[0]["state"].items():
        for name, expected in moments.items():
            found = optimizers[1]["state"][number][name]
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
    assert checkpoint.locate(one).name == checkpoint.locate(two).name
    assert (one / "result.json").read_text() == (two / "result.json").read_text()


def test_four_ranks_begin_and_two_go_on(runs):
    states = [last(runs / name) for name in ("on-1/fmrec", "handed-on")]
    assert_close(*(state["model"] for state in states), 12)
    histories = [
        [{k: r[k] for k in r if k != "steps_per_second"} for r in state["progress"]["history"]]
        for state in states
    ]
    for one, two in zip(*histories, strict=True):
        assert one.pop("loss") == pytest.approx(two.pop("loss"), rel=2e-6)
        assert one == two  # metrics of the validation too


def test_the_command_evaluates_on_two_ranks(runs, tmp_path):
    assert main(ranks.evaluation(runs, tmp_path / "alone.json")) == 0
    assert (runs / "evaluation-0.json").read_text() == (tmp_path / "alone.json").read_text()


# ------------------------------------------------------------------------------------ checkpoints


@pytest.fixture
def copy(runs, tmp_path) -> Path:
    """A copy of a run of two ranks, to be damaged."""
    shutil.copytree(runs / "on-2" / "fmrec", tmp_path / "copy")
    return tmp_path / "copy"


def test_one_rank_goes_on_from_two(runs, copy):
    config = ranks.FMREC.replace(epochs=4)
    again = {}
    for run in (copy, runs / "sequel"):
        if run is not copy:
            shutil.copytree(runs / "on-1" / "fmrec", run)
        Trainer(ranks.dataset(), config, run).fit(resume=True)
        again[run] = last(run)
        assert (checkpoint.locate(run, "last") / checkpoint.TENSORS).exists()
    assert_close(*(state["model"] for state in again.values()), 16)
    assert [state["global_step"] for state in again.values()] == [16, 16]


def test_export_makes_a_run_of_single_files(copy, tmp_path):
    shutil.move(copy, tmp_path / "run" / "stage1")
    shutil.copytree(tmp_path / "run" / "stage1", tmp_path / "run" / "stage2")
    out = tmp_path / "exported"
    written = checkpoint.export(tmp_path / "run", out)
    assert len(written) == 4
    for stage in ("stage1", "stage2"):
        run = tmp_path / "run" / stage
        for role in ("best", "last"):
            found = checkpoint.locate(out / stage, role)
            assert sorted(path.name for path in found.iterdir()) == [
                "state.json",
                "tensors.safetensors",
            ]
            one, two = checkpoint.load(found), checkpoint.load(checkpoint.locate(run, role))
            assert one.keys() == two.keys() and one["progress" if role == "last" else "epoch"]
            for name, tensor in one["model"].items():
                assert torch.equal(tensor, two["model"][name])
        for name in ("metrics.jsonl", "result.json"):
            assert (out / stage / name).read_text() == (run / name).read_text()
    with pytest.raises(FileExistsError, match="exported exists"):
        checkpoint.export(tmp_path / "run", out)
    with pytest.raises(CheckpointError, match=r"no last\.json"):
        checkpoint.export(tmp_path / "run" / "stage1" / "checkpoints", tmp_path / "none")


def test_damage_is_named(copy):
    found = checkpoint.locate(copy, "last")
    shards = sorted((found / checkpoint.SHARDS).iterdir())
    assert len(shards) == 2
    whole = shards[1].read_bytes()

    def refused(text: str) -> None:
        with pytest.raises(CheckpointError, match=text):
            checkpoint.load(found)
        with pytest.raises(CheckpointError, match=text):
            Trainer(ranks.dataset(), ranks.FMREC, copy).fit(resume=True)

    shards[1].unlink()
    refused(rf"expected the 2 files that 2 ranks wrote; missing or truncated: {shards[1].name}")
    shards[1].write_bytes(whole[:-8])
    refused(f"missing or truncated: {shards[1].name}")
    shards[1].write_bytes(bytes(len(whole)))
    refused("shards is damaged: ")
    shards[1].write_bytes(whole)
    (found / checkpoint.SHARDS / "more.safetensors").write_bytes(whole)
    refused("foreign: more.safetensors")
    (found / checkpoint.SHARDS / "more.safetensors").unlink()
    state = json.loads((found / checkpoint.STATE).read_text())
    shards[1].write_bytes(shards[0].read_bytes())  # one rank's part twice, the other's not at all
    swapped = state["files"] | {shards[1].name: shards[0].stat().st_size}
    (found / checkpoint.STATE).write_text(json.dumps(state | {"files": swapped}))
    refused("shards holds .* numbers of .*, expected .*; are all files of this checkpoint")
    shards[1].write_bytes(whole)
    for part in ("files", "tensors", "ranks"):
        less = {name: state[name] for name in state if name != part}
        (found / checkpoint.STATE).write_text(json.dumps(less))
        refused(f"it has no '{part}'")
    more = state | {"tensors": state["tensors"] | {"/model/none": ["float32", [3]]}}
    (found / checkpoint.STATE).write_text(json.dumps(more))
    refused("/model/none")
    larger = dict(state["tensors"])
    larger["/model/LayerNorm.bias"] = ["float32", [16]]
    (found / checkpoint.STATE).write_text(json.dumps(state | {"tensors": larger}))
    refused("LayerNorm.bias")


# ------------------------------------------------------------------------------------ the ranks


def test_shares_are_contiguous_and_even():
    for total in (0, 1, 3, 37, 512):
        for size in (1, 2, 3, 4, 7):
            shares = [World(rank, size).share(total) for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(total))
            assert max(map(len, shares)) == World(0, size).largest_share(total)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_the_environment_is_checked():
    whole = {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert described({"MASTER_ADDR": "a"}) is None
    assert described(whole) == (1, 4, 1)
    for name in whole:
        less = {key: value for key, value in whole.items() if key != name}
        with pytest.raises(ValueError, match=f"but no {name}; start the ranks with torchrun"):
            described(less)
    for name, value in (("RANK", "4"), ("RANK", "-1"), ("WORLD_SIZE", "one"), ("LOCAL_RANK", "2")):
        with pytest.raises(ValueError, match=f"{name}.*got"):
            described(whole | {name: value})


def test_an_attempt_never_meets_the_one_before():
    """Ranks arrive in any order at a store that holds earlier attempts, finished or cut short."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    store.set("attempt", "cut-short")
    names = []
    for order in ((1, 2, 0), (0, 1, 2), (2, 0, 1)):
        with ThreadPoolExecutor(3) as pool:
            found = []
            for rank in order:
                own = dist.TCPStore("127.0.0.1", store.port, wait_for_workers=False)
                found.append(pool.submit(fresh_store, own, rank, 3))
                time.sleep(0.1)
            stores = [future.result(timeout=60) for future in found]
        stores[0].set("who", str(order))
        assert [each.get("who").decode() for each in stores] == [str(order)] * 3
        names.append(store.get("attempt"))
    assert len(set(names)) == 3
    with pytest.raises(TimeoutError, match="rank 1 of 2 heard nothing of rank 0"):
        fresh_store(store, 1, 2, patience=0.1)


def test_each_rank_has_a_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert own_device(torch.device("cpu"), 5) == torch.device("cpu")
    assert own_device(torch.device("cuda"), 1) == torch.device("cuda:1")
    with pytest.raises(ValueError, match="2 CUDA devices, fewer than ranks"):
        own_device(torch.device("cuda"), 2)
    with pytest.raises(ValueError, match="expected 'cuda', got 'cuda:1'"):
        own_device(torch.device("cuda:1"), 0)


def test_commands_of_one_process_refuse_ranks(monkeypatch, capsys):
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert main(["env"]) == 1
    assert "(rank 1): the environment has RANK=1, WORLD_SIZE=2" in capsys.readouterr().err
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert main(["env"]) == 1
    assert "env runs in one process, got 2 ranks" in capsys.readouterr().err


# ------------------------------------------------------------------- the commands of docs/scale.md

SECTIONS = ("Training on several ranks", "Checkpoints")
SMALL = "--hidden_size 8 --max_len 5 --num_blocks 2 --num_heads 2 --last 1 --decoder_dims [24,40]"
SMALL += " --sample_N 2 --batch_size 64 --checkpoint_steps 4"


def commands() -> list[str]:
    text = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    found = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE):
        if section.startswith(SECTIONS):
            for block in re.findall(r"```bash\n(.*?)```", section, re.DOTALL):
                found += block.splitlines()
    return found


def killed_once(line: str, folder: Path) -> str:
    """Run a command under torchrun, kill a rank by SIGKILL after its first checkpoints; what it
    printed."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *shlex.split(line)[1:]]
    quick = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    with subprocess.Popen(
        launcher,
        cwd=folder,
        env=os.environ | quick,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        pointer, ended = folder / "runs/wide/last.json", time.monotonic() + 120
        while process.poll() is None and time.monotonic() < ended:
            if pointer.exists() and "00000000" not in pointer.read_text():
                break
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [p for p in children if "fmrec_fast" in Path(f"/proc/{p}/cmdline").read_text()]
        assert len(workers) == 2, process.communicate()[0]
        os.kill(int(workers[1]), signal.SIGKILL)
        try:
            output, _ = process.communicate(timeout=300)
        finally:
            process.terminate()
    assert process.returncode == 0, output
    return output


def test_commands_of_the_documentation_with_a_rank_killed(tmp_path, monkeypatch, capsys):
    data = synthetic_dataset(num_users=120, num_items=100, num_clusters=5, mean_length=12)
    write_csv(data, tmp_path / "ratings.csv")
    monkeypatch.chdir(tmp_path)
    lines = commands()
    assert [line.split()[0] for line in lines].count("torchrun") == 1 and len(lines) == 4
    for line in lines:
        if line.startswith("torchrun"):
            output = killed_once(f"{line} {SMALL}", tmp_path)
            assert "exitcode  : -9" in output or "exitcode: -9" in output, output
            alone = shlex.split(line)[shlex.split(line).index("train") :] + SMALL.split()
            alone[alone.index("runs/wide")] = "runs/alone"
            assert main(alone) == 0
        else:
            assert main(shlex.split(line)[1:]) == 0, capsys.readouterr().err
    states = [last(Path("runs") / name) for name in ("alone", "wide", "single")]
    assert_close(states[0]["model"], states[1]["model"], states[0]["global_step"])
    for name, tensor in states[1]["model"].items():
        assert torch.equal(tensor, states[2]["model"][name])
    records = [[r["loss"] for r in state["progress"]["history"]] for state in states[:2]]
    for one, two in zip(*records, strict=True):
        assert one == pytest.approx(two, rel=2e-6)
