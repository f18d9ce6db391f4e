"""Training: the published loop, and runs that end the same however often they are cut short."""

import csv
import json
import math
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fmrec_fast import FMRecConfig, checkpoint, training
from fmrec_fast import backend as backend_module
from fmrec_fast.backend import availability, dispatch_log, use_backend, use_rng
from fmrec_fast.capture import Capture
from fmrec_fast.checkpoint import CheckpointError
from fmrec_fast.data import Dataset, TrainingSamples, synthetic_dataset
from fmrec_fast.evaluation import Evaluation, evaluate
from fmrec_fast.training import DivergedError, Listener, Trainer, build_optimizer

# Dropouts on, a short last batch, validation after every epoch but the first.
SMALL = FMRecConfig(
    hidden_size=32,
    max_len=12,
    num_blocks=2,
    last=1,
    decoder_dims=(24, 40),
    sample_N=3,
    batch_size=64,
    epochs=4,
    eval_interval=1,
)
TINY = SMALL.replace(hidden_size=8, max_len=5, num_heads=2, sample_N=1, batch_size=40, epochs=3)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small matrices gain nothing from threads, and two processes here would fight for cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def small() -> Dataset:
    return synthetic_dataset(200, 80, 8, 8, seed=3)


@pytest.fixture(scope="module")
def tiny() -> Dataset:
    return synthetic_dataset(30, 20, 4, 6, seed=0)  # 112 samples: batches of 40, 40, 32


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """The undisturbed run of TINY, validated after its last two of three epochs."""
    run = tmp_path_factory.mktemp("tiny") / "whole"
    Trainer(tiny, TINY, run).fit()
    return run


def without_timing(tree):
    if isinstance(tree, dict):
        return {k: without_timing(v) for k, v in tree.items() if k != "steps_per_second"}
    if isinstance(tree, list):
        return [without_timing(value) for value in tree]
    return tree


def assert_same(a, b, where="state"):
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), f"{where}: differs by up to {(a - b).abs().max()}"
    elif isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    else:
        assert a == b, where


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit, but for the timings: both checkpoints, metrics.jsonl and result.json."""
    for role in ("last", "best"):
        one, other = (checkpoint.load(checkpoint.locate(run, role)) for run in (a, b))
        assert {"model", "optimizer", "rng"} <= set(one) or role == "best"
        assert_same(without_timing(one), without_timing(other), role)
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (a, b)]
    assert len(lines[0]) > 0
    assert_same(*[[without_timing(json.loads(line)) for line in text] for text in lines])
    assert (a / "result.json").read_bytes() == (b / "result.json").read_bytes()


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Interrupted(Exception):
    pass


class Interrupt(Listener):
    """Raises when `count` calls of any kind have been made."""

    def __init__(self, count: float) -> None:
        self.left = count

    def _call(self, *_) -> None:
        self.left -= 1
        if self.left < 0:
            raise Interrupted

    epoch_started = step_done = evaluation_started = evaluated = epoch_done = finished = _call


# ---------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "options",
    [{"checkpoint_steps": 1}, {"checkpoint_steps": 4}, {"checkpoint_seconds": 1e9}],
    ids=["every-step", "every-4-steps", "every-epoch"],
)
def test_interrupted_in_process_and_resumed(tmp_path, tiny, options):
    calls = []

    class Count(Interrupt):
        def _call(self, *_) -> None:
            calls.append(1)

        epoch_started = step_done = evaluation_started = evaluated = epoch_done = finished = _call

    Trainer(tiny, TINY, tmp_path / "whole", listener=Count(0), **options).fit()
    assert len(calls) > 15
    rng = random.Random(5)
    left, interruptions = 3 * len(calls), 0
    while True:
        # Somebody else draws random numbers between two attempts.
        torch.manual_seed(rng.randrange(2**32))
        after = min(rng.randrange(1, len(calls) // 2), left)
        left -= after
        listener = Interrupt(after if left > 0 else math.inf)
        trainer = Trainer(tiny, TINY, tmp_path / "parts", listener=listener, **options)
        try:
            trainer.fit(resume=True)
            break
        except Interrupted:
            interruptions += 1
    assert interruptions >= 3
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_killed_at_any_file_operation_and_resumed(tmp_path, tiny, monkeypatch):
    """Two epochs with every step saved; a sample of the moments between file operations."""
    config = TINY.replace(epochs=2)

    class Killed(BaseException):
        pass

    count = 0
    fatal = None

    def guard(owner, name):
        call = getattr(owner, name)

        def guarded(*args, **kwargs):
            nonlocal count
            count += 1
            if count == fatal:
                raise Killed
            return call(*args, **kwargs)

        monkeypatch.setattr(owner, name, guarded)

    for owner, name in ((os, "replace"), (os, "fsync"), (os, "mkdir"), (checkpoint, "save_file")):
        guard(owner, name)
    Trainer(tiny, config, tmp_path / "whole", checkpoint_steps=1).fit()
    total = count
    assert total > 60
    for moment in random.Random(1).sample(range(1, total + 1), 12):
        run = tmp_path / f"killed-{moment}"
        count, fatal = 0, moment
        with pytest.raises(Killed):
            Trainer(tiny, config, run, checkpoint_steps=1).fit()
        fatal = None
        Trainer(tiny, config, run, checkpoint_steps=1).fit(resume=True)
        assert_same_run(tmp_path / "whole", run)


def write_csv(dataset: Dataset, path: Path) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("user", "item"))
        for user in range(dataset.num_users):
            writer.writerows((f"u{user:03}", f"item-{i}") for i in dataset.history(user).tolist())


def test_killed_process_and_resumed(tmp_path, small):
    """SIGKILL of the real program at three random moments, many of them while it is writing."""
    write_csv(small, tmp_path / "data.csv")
    flags = ["--checkpoint_steps", "3"]
    for name, value in SMALL.to_dict().items():
        if value != getattr(FMRecConfig(), name) and not isinstance(value, list):
            flags += [f"--{name}", str(value)]
    flags += ["--decoder_dims", "[24,40]"]

    def start(out: str) -> subprocess.Popen:
        command = ["train", "data.csv", "--out", out, "--resume", *flags]
        return subprocess.Popen(
            [sys.executable, "-m", "fmrec_fast", *command],
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def ended(process: subprocess.Popen, within: float) -> bool:
        try:
            process.wait(timeout=within)
        except subprocess.TimeoutExpired:
            return False
        return True

    def pointer() -> str:
        path = tmp_path / "parts" / "last.json"
        return path.read_text() if path.exists() else ""

    whole = start("whole")
    rng = random.Random()  # another moment in each test run: each of them must do
    kills = []
    try:
        for _ in range(3):
            process = start("parts")
            # From the first steps on, until a few checkpoints later, and a little longer.
            for _ in range(rng.randrange(1, 5)):
                before = pointer()
                while pointer() == before and not ended(process, 0.005):
                    continue
            if not ended(process, rng.uniform(0, 0.1)):
                process.kill()
            process.communicate()
            kills.append((process.returncode, pointer()))
        last = start("parts")
        output = last.communicate()[0].decode()
        assert last.returncode == 0, output
        assert whole.wait() == 0, whole.stdout.read().decode()
    finally:
        whole.kill()
        whole.communicate()
    assert [code for code, _ in kills].count(-signal.SIGKILL) >= 2, kills
    assert_same_run(tmp_path / "whole", tmp_path / "parts")
    left_over = [p.name for p in (tmp_path / "parts" / "checkpoints").iterdir()]
    assert len(left_over) == 2, left_over


def test_resume_of_a_finished_run_tests_again_and_changes_nothing(tiny, whole):
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    result = Trainer(tiny, TINY, whole).fit(resume=True)
    assert result.mean == json.loads(before[whole / "result.json"])["test"]
    assert before == {p: p.read_bytes() for p in whole.rglob("*") if p.is_file()}


def test_more_epochs_continue_a_finished_run(tmp_path, tiny, whole):
    Trainer(tiny, TINY.replace(epochs=2), tmp_path / "grown").fit()
    Trainer(tiny, TINY, tmp_path / "grown").fit(resume=True)
    assert_same_run(whole, tmp_path / "grown")


def test_draws_between_building_and_fitting_change_nothing(tmp_path, tiny, whole):
    trainer = Trainer(tiny, TINY, tmp_path / "b")
    torch.manual_seed(12345)
    trainer.fit()
    assert_same_run(whole, tmp_path / "b")
    Trainer(tiny, TINY.replace(random_seed=7, epochs=1), tmp_path / "c").fit()
    assert records(whole)[0]["loss"] != records(tmp_path / "c")[0]["loss"]


def test_an_existing_run_is_not_overwritten(tmp_path, tiny):
    config = TINY.replace(epochs=1)
    Trainer(tiny, config, tmp_path / "run").fit()
    before = (tmp_path / "run" / "result.json").read_bytes()
    with pytest.raises(FileExistsError, match=r"run already holds a run; .*--resume"):
        Trainer(tiny, config, tmp_path / "run").fit()
    assert before == (tmp_path / "run" / "result.json").read_bytes()


def test_resume_refuses_another_run(tmp_path, tiny):
    config = TINY.replace(epochs=1)
    Trainer(tiny, config, tmp_path / "run").fit()
    with pytest.raises(
        CheckpointError, match=r"other settings: dropout: 0\.1 -> 0\.2; lr: 0\.001 -> 0\.01$"
    ):
        Trainer(tiny, config.replace(lr=0.01, dropout=0.2), tmp_path / "run").fit(resume=True)
    histories = [tiny.history(row).tolist() for row in range(tiny.num_users)]
    renamed = Dataset.from_histories(histories, item_ids=[f"i{i}" for i in tiny.item_ids])
    with pytest.raises(
        CheckpointError, match=r"other items \(20, now 20: 20 new, 20 gone, such as 'i1'"
    ):
        Trainer(renamed, config, tmp_path / "run").fit(resume=True)
    more = Dataset.from_histories([*histories, [1, 2, 3, 4]], item_ids=tiny.item_ids)
    with pytest.raises(CheckpointError, match="on other histories of the same items"):
        Trainer(more, config, tmp_path / "run").fit(resume=True)


# ---------------------------------------------------------------------------- steps as a graph


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_steps_through_static_buffers_are_the_same_to_the_bit(tmp_path, tiny, optimizer):
    """All of a graph but its capture: batches of the whole size go through `Capture`, the others
    do not; the learning rate changes on the way."""
    config = TINY.replace(optimizer=optimizer, decay_step=1, epochs=3)
    Trainer(tiny, config, tmp_path / "eager", graph=False).fit()
    trainer = Trainer(tiny, config, tmp_path / "graph", graph=True)
    with dispatch_log() as log:
        trainer.fit()
    assert trainer._graphed.capture is not None
    assert "history_loss" in {entry.op for entry in log}
    assert_same_run(tmp_path / "eager", tmp_path / "graph")
    # The first batch makes the optimizer's state; of nine, three are short.
    replays = []
    fresh = Trainer(tiny, config, tmp_path / "count", graph=True)
    with pytest.MonkeyPatch.context() as patch:
        whole = Capture.replay
        patch.setattr(Capture, "replay", lambda self: replays.append(1) or whole(self))
        fresh.fit()
    assert len(replays) == 5


def test_resumed_between_replays(tmp_path, tiny, whole):
    for after in (3, 5, 9):
        run = tmp_path / f"after-{after}"
        with pytest.raises(Interrupted):
            Trainer(
                tiny, TINY, run, graph=True, checkpoint_steps=1, listener=Interrupt(after)
            ).fit()
        trainer = Trainer(tiny, TINY, run, graph=True)
        trainer.fit(resume=True)
        assert_same_run(whole, run)
        # And the same trainer once more, whose graph knows the replaced state no longer.
        trainer.fit(resume=True)
        assert_same_run(whole, run)


@pytest.mark.parametrize("low, error", [("tf32", 1e-3), ("bf16", 1e-2)])
def test_precision_changes_the_linear_layers_of_training_only(tmp_path, tiny, low, error):
    config = TINY.replace(epochs=1, precision=low)
    trainer = Trainer(tiny, config, tmp_path / "near")
    sequence, target = trainer.samples.batch(torch.arange(40))
    losses = {}
    for precision in ("float32", low):
        trainer.model.fm.xstart_model.att.precision = precision
        for training_mode in (True, False):
            trainer.model.train(training_mode)
            with torch.no_grad():
                found = training.training_losses(trainer.model, sequence, target, seed=3)
            losses[precision, training_mode] = found.total.item()
    assert losses[low, False] == losses["float32", False]
    assert losses[low, True] != losses["float32", True]
    assert losses[low, True] == pytest.approx(losses["float32", True], rel=error)
    trainer.fit()
    kept = checkpoint.load(checkpoint.locate(tmp_path / "near", "last"))
    assert all(value.dtype == torch.float32 for value in kept["model"].values())
    with pytest.raises(CheckpointError, match=f"precision: '{low}' -> 'float32'"):
        Trainer(tiny, TINY.replace(epochs=1), tmp_path / "near").fit(resume=True)


def test_a_graph_cannot_hold_published_draws(tmp_path, tiny):
    with (
        use_rng("published"),
        pytest.raises(ValueError, match=r"graph must be None or False.*True"),
    ):
        Trainer(tiny, TINY, tmp_path / "run", graph=True).fit()


KERNELS_OF_A_STEP = (
    "attention",
    "history_loss",
    "item_cross_entropy",
    "noise_fusion",
    "dropout",
)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_step_waits_for_nothing(tmp_path, tiny, monkeypatch, backend):
    """On the device 'meta' there is nothing to look at: a step that looked would fail. Copies
    from the host, which no graph can hold, are made by two functions only."""
    trainer = Trainer(tiny, TINY, tmp_path / "run", device="cpu")
    trainer.device = torch.device("meta")
    trainer.model.to("meta")
    trainer.samples = TrainingSamples(tiny, TINY.max_len, "meta")
    for name in ("tally", "rate"):
        setattr(trainer, name, getattr(trainer, name).to("meta"))
    trainer.sums, trainer.bad_step, trainer.steps = trainer.tally.split((4, 1, 1))
    # Fused optimizers do not run there; that Adam does not look is what its `capturable` says.
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
    if backend == "triton":
        from fmrec_fast.kernels import (
            attention,
            dropout,
            history_loss,
            item_cross_entropy,
            item_cross_entropy_backward,
            noise_fusion,
        )

        monkeypatch.setattr(backend_module, "availability", lambda *_: None)
        monkeypatch.setattr(dropout, "dropout", lambda *_, **__: None)
        for module in (attention, history_loss, noise_fusion):
            monkeypatch.setattr(module, "_launch", lambda *_, **__: None)
        for module in (item_cross_entropy, item_cross_entropy_backward):
            monkeypatch.setattr(module, "launch", lambda *_, **__: None)

    def no_copy(*args, **kwargs):
        device = kwargs.get("device")
        assert device is None or torch.device(device).type == "cpu", (args, kwargs)
        return original[0](*args, **kwargs)

    original = [torch.tensor]
    monkeypatch.setattr(torch, "tensor", no_copy)
    monkeypatch.setattr(torch, "as_tensor", no_copy)
    index = torch.arange(40, device="meta")
    with use_backend(backend), dispatch_log() as log:
        trainer._train_step(index)
    ran = {entry.op: entry.backend.value for entry in log}
    assert {ran[op] for op in KERNELS_OF_A_STEP} == {backend}
    for probe in (lambda x: x.item(), lambda x: x.nonzero(), lambda x: x[x > 0]):
        with pytest.raises((RuntimeError, NotImplementedError)):
            probe(trainer.tally)


@pytest.mark.skipif(availability("triton") is not None, reason=f"triton: {availability('triton')}")
def test_a_step_of_triton_kernels_is_that_of_the_definitions(tmp_path, tiny):
    trainer = Trainer(tiny, TINY, tmp_path / "run")
    model = trainer.model.train()
    sequence, target = trainer.samples.batch(torch.arange(0, 64, 8))
    found = {}
    for backend in ("reference", "triton"):
        model.zero_grad()
        with use_backend(backend), dispatch_log() as log:
            losses = training.training_losses(model, sequence, target, seed=5)
            losses.total.backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        found[backend] = (vars(losses), gradients)
    ran = {entry.op for entry in log if entry.backend.value == "triton"}
    assert ran >= {"noise_fusion", "dropout", "history_loss"}
    for one, other in zip(*found.values(), strict=True):
        assert list(one) == list(other)
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_captured_steps_are_those_of_eager(tmp_path, tiny, optimizer):
    config = TINY.replace(optimizer=optimizer, decay_step=1)
    torch.cuda.manual_seed(3)
    Trainer(tiny, config, tmp_path / "eager", device="cuda", graph=False).fit()
    torch.cuda.manual_seed(3)
    trainer = Trainer(tiny, config, tmp_path / "graph", device="cuda")
    trainer.fit()
    assert trainer._graphed.capture.graph is not None
    for one, other in zip(records(tmp_path / "eager"), records(tmp_path / "graph"), strict=True):
        assert one["lr"] == other["lr"]
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.gpu
def test_a_captured_run_resumes(tmp_path, tiny):
    Trainer(tiny, TINY, tmp_path / "whole", device="cuda").fit()
    with pytest.raises(Interrupted):
        Trainer(
            tiny, TINY, tmp_path / "run", device="cuda", checkpoint_steps=2, listener=Interrupt(7)
        ).fit()
    Trainer(tiny, TINY, tmp_path / "run", device="cuda").fit(resume=True)
    for one, other in zip(records(tmp_path / "whole"), records(tmp_path / "run"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)


@pytest.mark.gpu
def test_replays_draw_anew_and_nothing_waits(tmp_path, tiny):
    trainer = Trainer(tiny, TINY.replace(lr=1e-30), tmp_path / "run", device="cuda")
    trainer.model.train()
    index = torch.arange(40, device="cuda")
    losses = []
    for step in range(6):
        trainer.sums.zero_()
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            trainer._graphed(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        losses.append(trainer.sums.tolist())
    assert len({tuple(loss) for loss in losses}) == 6


# ---------------------------------------------------------------------------- memory

LARGE = """
import sys
from pathlib import Path
import torch
from fmrec_fast import FMRecConfig
from fmrec_fast.data import Dataset
from fmrec_fast.training import Trainer

items, run = int(sys.argv[1]), sys.argv[2]
torch.set_num_threads(1)
dataset = Dataset.from_histories([range(1, items // 2), range(items // 2, items)])
config = FMRecConfig(
    hidden_size=32, decoder_dims=(64, 32), max_len=9, num_blocks=2, last=1, sample_N=1, batch_size=8
)
Trainer(dataset, config, run, max_steps=3, checkpoint_seconds=1e9).fit()
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_what_an_item_costs_in_memory(tmp_path):
    """Weights, gradients and two moments of both tables; one more gradient of the embeddings, from
    the lookups; the scores, which the loss keeps while they are few; and of data, which names each
    item by a Python object, 200 bytes. Not a table more."""
    peaks = []
    for items in (50_000, 200_000):
        command = [sys.executable, "-c", LARGE, str(items), str(tmp_path / str(items))]
        # Freed blocks go back at once: the peak is that of what is in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        peaks.append(1024 * int(done.stdout.split()[-1]))
    per_item = (peaks[1] - peaks[0]) / 150_000
    tables, embeddings, scores = 4 * 4 * (32 + 32), 4 * 32, 4 * 8
    print(f"{per_item:.0f} bytes per item, {tables} of them for the tables")
    assert tables < per_item < tables + embeddings + scores + 200


# ---------------------------------------------------------------------------- the published loop


def test_the_loss_falls_and_beats_chance(tmp_path, small):
    config = SMALL.replace(epochs=6, lr=0.003)
    result = Trainer(small, config, tmp_path / "run").fit()
    losses = [record["loss"]["total"] for record in records(tmp_path / "run")]
    assert losses[-1] < 0.8 * losses[0]
    assert all(after < before for before, after in pairwise(losses))
    for record in records(tmp_path / "run"):
        loss = record["loss"]
        parts = loss["flow"] + 0.2 * loss["cross_entropy"] + 0.4 * loss["reconstruction"]
        assert loss["total"] == pytest.approx(parts, rel=1e-5)
    assert result.mean["HR@10"] > 2 * 100 * 10 / 80
    saved = json.loads((tmp_path / "run" / "result.json").read_text())
    assert saved["test"] == result.mean and saved["users"] == result.users == 200


def test_every_epoch_goes_once_through_all_samples(tmp_path, tiny, monkeypatch):
    seen = []
    losses = training.training_losses

    def watched(model, sequence, target):
        assert model.training
        seen.append(torch.cat((sequence, target), dim=1))
        return losses(model, sequence, target)

    monkeypatch.setattr(training, "training_losses", watched)
    Trainer(tiny, TINY, tmp_path / "run").fit()
    samples = TrainingSamples(tiny, TINY.max_len)
    everything = torch.cat(samples.batch(torch.arange(len(samples))), dim=1).tolist()
    sizes = [len(batch) for batch in seen]
    full, rest = divmod(len(samples), 40)
    assert rest > 0, "or the short batch is not tested"
    assert sizes == ([40] * full + [rest]) * 3
    epochs = [torch.cat(seen[i : i + full + 1]).tolist() for i in range(0, len(seen), full + 1)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(everything)
        assert epoch != everything
    assert epochs[0] != epochs[1] != epochs[2]


def script(monkeypatch, validations: list[dict[str, float]]) -> list:
    """Let validation find these metrics in turn; returns the models that were evaluated."""
    calls = []

    def scripted(model, dataset, split="test", *, ks, seeds, progress=None, world=None):
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        calls.append((split, weights))
        turn = sum(split == "val" for split, _ in calls) - 1
        mean = validations[turn] if split == "val" else {"NDCG@10": 0.0}
        return Evaluation(mean=mean, spread={}, per_seed={}, users=1)

    monkeypatch.setattr(training, "evaluate", scripted)
    return calls


def ndcg(*values: float) -> list[dict[str, float]]:
    return [{"HR@10": 50.0 + 9 * i, "NDCG@10": value} for i, value in enumerate(values)]


def flat(*values: float) -> list[dict[str, float]]:
    return [{"HR@10": 50.0, "NDCG@10": value, "MRR@10": 5.0} for value in values]


@pytest.mark.parametrize(
    ("metric", "interval", "patience", "found", "epochs", "best"),
    [
        # Two in a row without improvement stop it; the rise of HR counts for nothing.
        ("NDCG@10", 1, 2, ndcg(3, 2, 4, 4, 3.9), 6, 3),
        # An improvement sets the count back.
        ("NDCG@10", 1, 2, ndcg(3, 2, 4, 2, 5, 1, 1), 8, 5),
        ("NDCG@10", 1, 1, ndcg(3, 3), 3, 1),
        ("NDCG@10", 2, 1, ndcg(3, 4, 1), 7, 4),
        # Any metric may improve: HR does at four validations.
        ("any", 1, 1, [*ndcg(3, 2, 1, 1), *ndcg(1)], 6, 4),
        # Against the best of each metric so far, not against those of the best model.
        ("any", 1, 2, flat(5, 4, 5, 9), 4, 1),
        ("any", 1, 2, flat(5, 4, 6, 1, 6), 6, 3),
        # The epochs run out.
        ("NDCG@10", 3, 5, ndcg(3), 6, 3),
    ],
)
def test_early_stopping(
    tmp_path, tiny, monkeypatch, metric, interval, patience, found, epochs, best
):
    calls = script(monkeypatch, found)
    config = TINY.replace(
        epochs=6 if interval == 3 else 9,
        eval_interval=interval,
        patience=patience,
        early_stopping_metric=metric,
    )
    run = tmp_path / "run"
    # A validation more than scripted would raise an IndexError.
    Trainer(tiny, config, run).fit()
    rows = records(run)
    assert len(rows) == epochs
    validated = [row["epoch"] for row in rows if "validation" in row]
    assert validated == [e for e in range(epochs) if e != 0 and e % interval == 0]
    assert [row["validation"] for row in rows if "validation" in row] == found[: len(validated)]
    assert [split for split, _ in calls] == ["val"] * len(validated) + ["test"]
    kept = checkpoint.load(checkpoint.locate(run, "best"))
    assert kept["epoch"] == best
    # The model of the best validation is the one that was tested.
    at_best = calls[validated.index(best)][1]
    assert_same(at_best, dict(kept["model"]))
    assert_same(at_best, calls[-1][1])
    result = json.loads((run / "result.json").read_text())
    assert result["tested"] == "best" and result["epochs"] == epochs


def test_without_validation_the_last_model_is_tested(tmp_path, tiny, monkeypatch):
    calls = script(monkeypatch, [])
    Trainer(tiny, TINY.replace(eval_interval=20), tmp_path / "run").fit()
    assert [split for split, _ in calls] == ["test"]
    last = checkpoint.load(checkpoint.locate(tmp_path / "run", "last"))
    assert_same(dict(last["model"]), calls[0][1])
    assert json.loads((tmp_path / "run" / "result.json").read_text())["tested"] == "last"


def test_more_patience_continues_a_stopped_run(tmp_path, tiny, monkeypatch):
    config = TINY.replace(epochs=6, patience=1)
    script(monkeypatch, ndcg(3, 2))
    Trainer(tiny, config, tmp_path / "run").fit()
    assert len(records(tmp_path / "run")) == 3
    script(monkeypatch, ndcg(9, 9, 9)[::-1])
    Trainer(tiny, config.replace(patience=9), tmp_path / "run").fit(resume=True)
    assert len(records(tmp_path / "run")) == 6


def test_validation_is_that_of_evaluate(tmp_path, tiny):
    config = TINY.replace(epochs=2)
    trainer = Trainer(tiny, config, tmp_path / "run")
    result = trainer.fit()
    kept = checkpoint.build_model(checkpoint.load(checkpoint.locate(tmp_path / "run", "best")))
    seeds = (config.random_seed,)
    assert (
        records(tmp_path / "run")[1]["validation"] == evaluate(kept, tiny, "val", seeds=seeds).mean
    )
    assert result == evaluate(kept, tiny, "test", seeds=seeds)


def test_the_learning_rate_falls_in_steps(tmp_path, tiny):
    config = TINY.replace(epochs=5, decay_step=2, gamma=0.1, lr=0.01, eval_interval=9)
    Trainer(tiny, config, tmp_path / "run").fit()
    rates = [row["lr"] for row in records(tmp_path / "run")]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])


def test_optimizers_against_their_formulas():
    def run(config: FMRecConfig) -> list[float]:
        layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(layer.weight, 2.0)
        optimizer, _ = build_optimizer(layer, config)
        path = []
        for gradient in (1.0, -3.0, 0.5):
            layer.weight.grad = torch.full_like(layer.weight, gradient)
            optimizer.step()
            path.append(layer.weight.item())
        return path

    def by_hand(momentum: float, decay: float) -> list[float]:
        weight, velocity, path = 2.0, 0.0, []
        for gradient in (1.0, -3.0, 0.5):
            velocity = momentum * velocity + gradient + decay * weight
            weight -= 0.1 * velocity
            path.append(weight)
        return path

    sgd = FMRecConfig(optimizer="SGD", lr=0.1)
    assert run(sgd) == pytest.approx(by_hand(0.0, 0.0))
    assert run(sgd.replace(momentum=0.9)) == pytest.approx(by_hand(0.9, 0.0))
    assert run(sgd.replace(momentum=0.5, weight_decay=0.3)) == pytest.approx(by_hand(0.5, 0.3))
    weight, m, v, adam = 2.0, 0.0, 0.0, []
    for step, gradient in enumerate((1.0, -3.0, 0.5), 1):
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        weight -= 0.1 * (m / (1 - 0.9**step)) / (math.sqrt(v / (1 - 0.999**step)) + 1e-8)
        adam.append(weight)
    assert run(FMRecConfig(lr=0.1)) == pytest.approx(adam, rel=1e-5)


@pytest.mark.parametrize("momentum", [None, 0.9])
def test_sgd_runs_and_resumes(tmp_path, tiny, momentum):
    config = TINY.replace(optimizer="SGD", momentum=momentum, lr=0.05, epochs=2)
    Trainer(tiny, config, tmp_path / "whole").fit()
    with pytest.raises(Interrupted):
        Trainer(tiny, config, tmp_path / "run", checkpoint_steps=1, listener=Interrupt(5)).fit()
    Trainer(tiny, config, tmp_path / "run").fit(resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_max_steps(tmp_path, tiny, steps):
    Trainer(tiny, TINY, tmp_path / "run", max_steps=steps).fit()
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == steps
    assert checkpoint.load(checkpoint.locate(tmp_path / "run"))["global_step"] == steps
    Trainer(tiny, TINY, tmp_path / "run", max_steps=steps).fit(resume=True)
    assert checkpoint.load(checkpoint.locate(tmp_path / "run"))["global_step"] == steps
    Trainer(tiny, TINY, tmp_path / "run", max_steps=steps + 2).fit(resume=True)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["steps"] == steps + 2


def spoil(monkeypatch, at: int, how: str) -> None:
    """Let the loss, or only its gradient, not be finite from step `at` on."""
    losses, step = training.training_losses, -1

    def spoilt(model, sequence, target):
        nonlocal step
        step += 1
        found = losses(model, sequence, target)
        if step != at:
            return found
        if how == "gradient":
            found.total.register_hook(lambda gradient: gradient * math.inf)
            return found
        return replace(found, total=found.total * float(how))

    monkeypatch.setattr(training, "training_losses", spoilt)


@pytest.mark.parametrize(
    ("how", "every", "at"),
    [
        *(("nan", 1, 0), ("nan", 1, 4), ("inf", 100, 4), ("nan", 100, 5)),
        *(("gradient", 1, 0), ("gradient", 1, 4), ("gradient", 100, 4), ("gradient", 100, 5)),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path, tiny, whole, monkeypatch, how, every, at
):
    # Three steps make an epoch: a validation follows step 5.
    with monkeypatch.context() as patch:
        spoil(patch, at, how)
        with pytest.raises(DivergedError) as caught:
            Trainer(tiny, TINY, tmp_path / "run", checkpoint_steps=every).fit()
    last = checkpoint.locate(tmp_path / "run", "last")
    # Without a checkpoint in between, a gradient shows in the loss of the step after.
    late = how == "gradient" and every == 100 and at != 5
    assert f"not finite at step {at + late} (epoch {(at + late) // 3})" in str(caught.value)
    assert str(last) in str(caught.value)
    state = checkpoint.load(last)
    assert state["global_step"] == (at if every == 1 else at // 3 * 3)
    for name, value in state["model"].items():
        assert value.isfinite().all(), name
    assert not (tmp_path / "run" / "best.json").exists()
    # Nothing is spoilt on disk: resumed, it ends as if it had never happened.
    if at == 4:
        Trainer(tiny, TINY, tmp_path / "run").fit(resume=True)
        assert_same_run(whole, tmp_path / "run")


def test_the_same_trainer_may_resume_after_an_error(tmp_path, tiny, whole, monkeypatch):
    trainer = Trainer(tiny, TINY, tmp_path / "run", checkpoint_steps=1)
    with monkeypatch.context() as patch:
        spoil(patch, 4, "nan")
        with pytest.raises(DivergedError):
            trainer.fit()
    trainer.fit(resume=True)
    assert_same_run(whole, tmp_path / "run")


def test_nothing_to_train_on(tmp_path):
    pairs = Dataset.from_histories([[1, 2], [2, 3, 1]], name="pairs")
    with pytest.raises(
        ValueError, match=r"pairs has no training sample.*\(2 users, 5 interactions"
    ):
        Trainer(pairs, TINY, tmp_path / "run")


def test_listener_hears_of_every_sample(tmp_path, tiny):
    heard: list[tuple] = []

    class Log(Listener):
        def epoch_started(self, epoch, samples, done):
            heard.append(("epoch", epoch, samples, done))

        def step_done(self, losses, samples):
            assert math.isfinite(losses["total"])
            heard.append(("step", samples))

        def evaluation_started(self, split, users):
            heard.append((split, users))

        def evaluated(self, users):
            heard.append(("users", users))

        def epoch_done(self, record):
            heard.append(("done", record["epoch"]))

        def finished(self):
            heard.append(("finished",))

    total = len(TrainingSamples(tiny, TINY.max_len))
    with pytest.raises(Interrupted):
        Trainer(tiny, TINY, tmp_path / "run", checkpoint_steps=1, listener=Interrupt(3)).fit()
    Trainer(tiny, TINY.replace(epochs=2), tmp_path / "run", listener=Log()).fit(resume=True)
    rest = total - 80
    assert heard == [
        # Two steps were saved; the third of three follows.
        *(("epoch", 0, total, 80), ("step", rest), ("done", 0)),
        *(("epoch", 1, total, 0), ("step", 40), ("step", 40), ("step", rest)),
        *(("val", 30), ("users", 30), ("done", 1)),
        *(("test", 30), ("users", 30), ("finished",)),
    ]


def test_evaluated_users_are_those_with_an_input(tmp_path):
    histories = [[1, 2, 3, 4, 5], [1, 2], [2, 3, 1], [4, 5]]
    dataset = Dataset.from_histories(histories)
    counted = {}

    class Count(Listener):
        def evaluation_started(self, split, users):
            counted[split] = users

    result = Trainer(dataset, TINY.replace(epochs=2), tmp_path / "run", listener=Count()).fit()
    assert counted == {"val": 2, "test": 4}
    assert result.users == 4


def test_item_num_comes_from_the_data(tmp_path, tiny):
    trainer = Trainer(tiny, TINY.replace(item_num=3), tmp_path / "run")
    assert trainer.model.item_num == tiny.item_num == 21
    assert trainer.steps_per_epoch == 3
