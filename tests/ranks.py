"""What the ranks of `test_distributed_training` do; imported by their processes."""

from __future__ import annotations

import json
import socket
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from fmrec_fast import FaveConfig, FMRecConfig, checkpoint, cli
from fmrec_fast.data import Dataset, EvaluationSamples, synthetic_dataset
from fmrec_fast.distributed import World
from fmrec_fast.distributed.checkpoints import Saver
from fmrec_fast.distributed.data_parallel import clip_gradients
from fmrec_fast.evaluation import model_ranks
from fmrec_fast.training import DivergedError, Listener, Trainer

# 112 samples: batches of 37, 37, 37 and 1, of which some ranks have no row.
DATA = {"num_users": 30, "num_items": 20, "num_clusters": 4, "mean_length": 6, "seed": 0}
SIZES: dict[str, Any] = {
    "hidden_size": 8,
    "max_len": 5,
    "num_blocks": 2,
    "num_heads": 2,
    "last": 1,
    "decoder_dims": (24, 40),
    "sample_N": 2,
    "batch_size": 37,
    "epochs": 3,
    "eval_interval": 1,
}
FMREC = FMRecConfig(**SIZES)
# Stops after its fourth epoch, the first whose validation improves nothing.
EARLY = FMREC.replace(epochs=9, patience=1)
# Clipping is felt: the norm of the gradients is above it.
FIRST = FaveConfig(**SIZES, emb_dropout=0.3, clip_norm=0.5)
SECOND = FIRST.replace(stage_mode="finetune", weight_decay=0.01)


def dataset():
    return synthetic_dataset(**DATA)


class Steps(Listener):
    """The running means of the losses after every step."""

    def __init__(self) -> None:
        self.means: list[dict[str, float]] = []

    def step_done(self, losses, samples) -> None:
        self.means.append(losses)


class Draws(Steps):
    """What a listener must not do."""

    def step_done(self, losses, samples) -> None:
        torch.rand(1)


def train(world: World, run: Path, config: FMRecConfig, **options: Any) -> Trainer:
    """One run; what rank 0's listener was told goes to `steps.json`."""
    steps = options.pop("listener", None) or Steps()
    resume, data = options.pop("resume", False), options.pop("data", None) or dataset()
    trainer = Trainer(data, config, run, world=world, listener=steps, **options)
    trainer.fit(resume=resume)
    assert world.is_main or not steps.means, "only rank 0 reports"
    if world.is_main:
        (run / "steps.json").write_text(json.dumps(steps.means))
    return trainer


def launch(ranks: int, job: Callable[[World, Path], None], folder: Path) -> None:
    """`job` on so many ranks, joined by gloo; raises what one of them raised."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Imported once for all ranks; the fork server does not know this module's folder.
    mp.get_context("forkserver").set_forkserver_preload(["fmrec_fast.cli", "torch.testing"])
    mp.start_processes(_rank, (ranks, port, job, folder), nprocs=ranks, start_method="forkserver")


def _rank(rank: int, ranks: int, port: int, job: Callable, folder: Path) -> None:
    torch.set_num_threads(1)
    where = f"tcp://127.0.0.1:{port}"
    # Ranks that disagree about what comes next fail, instead of waiting for half an hour.
    patience = timedelta(seconds=120)
    place = {"init_method": where, "rank": rank, "world_size": ranks}
    dist.init_process_group("gloo", timeout=patience, **place)
    try:
        checkpoints = dist.new_group(backend="gloo", timeout=patience)
        job(World(rank, ranks, torch.device("cpu"), checkpoints), folder)
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------- the jobs


def all_models(world: World, folder: Path) -> None:
    """FMRec, also where it stops early, and both stages of Fave, from beginning to end."""
    at = folder / f"on-{world.size}"
    train(world, at / "fmrec", FMREC, checkpoint_steps=2)
    train(world, at / "early", EARLY)
    train(world, at / "stage1", FIRST)
    train(world, at / "stage2", SECOND.replace(ckpt_path=str(folder / "on-1" / "stage1")))


def four_ranks(world: World, folder: Path) -> None:
    """Every model, and the first epochs of a run that two ranks go on with."""
    all_models(world, folder)
    train(world, folder / "handed-on", FMREC.replace(epochs=2), checkpoint_seconds=0.0)


def two_ranks(world: World, folder: Path) -> None:
    """Whatever else needs two ranks."""
    all_models(world, folder)
    _goes_on(world, folder)
    _same_evaluation(world, folder)
    _diverges_everywhere(world, folder)
    _refuses(world, folder)
    _clips(world)
    _evaluates(world, folder)
    _checkpoints_of_sharded_tensors(world, folder)


def _goes_on(world: World, folder: Path) -> None:
    train(world, folder / "handed-on", FMREC, resume=True)


def _same_evaluation(world: World, folder: Path) -> None:
    model = checkpoint.build_model(checkpoint.load(checkpoint.locate(folder / "on-1" / "fmrec")))
    samples = EvaluationSamples(dataset(), "test", FMREC.max_len)
    seen: list[int] = []
    options: dict[str, Any] = {"seed": 3, "batch_size": 4}
    shared = model_ranks(model, samples, world=world, progress=seen.append, **options)
    assert torch.equal(shared, model_ranks(model, samples, **options))
    assert sum(seen) == len(samples) > 0
    # One user: the other rank has none.
    one = Dataset.from_histories([[1, 2, 3, 4]], item_ids=dataset().item_ids)
    samples = EvaluationSamples(one, "test", FMREC.max_len)
    assert torch.equal(
        model_ranks(model, samples, world=world, **options), model_ranks(model, samples, **options)
    )


def _diverges_everywhere(world: World, folder: Path) -> None:
    """One rank's loss is not finite: all stop at this step, and name a whole checkpoint."""
    trainer = Trainer(dataset(), FMREC, folder / "diverged", world=world, checkpoint_steps=2)
    losses = trainer._replicas.losses
    calls = []

    def poisoned(*arguments):
        total, parts = losses(*arguments)
        calls.append(1)
        return total, parts * (float("nan") if world.rank == 1 and len(calls) == 4 else 1.0)

    trainer._replicas.losses = poisoned
    try:
        trainer.fit()
    except DivergedError as error:
        named = Path(str(error).rsplit(" ", 1)[1])
        assert "loss was not finite at step 3 (epoch 0)" in str(error), error
        assert named.name == "last-00000002" and checkpoint.load(named)["global_step"] == 2
    else:
        raise AssertionError(f"rank {world.rank} went on")


def _refuses(world: World, folder: Path) -> None:
    def refused(error: type[Exception], text: str, run: str, config=FMREC, **options: Any) -> None:
        try:
            train(world, folder / run, config, **options)
        except error as raised:
            assert text in str(raised), raised
        else:
            raise AssertionError(f"not refused: {text}")

    apart = "generators differ between the 2 ranks"
    refused(RuntimeError, apart, "drawn", listener=Draws(), checkpoint_steps=1)
    refused(FileExistsError, "already holds a run", "handed-on")
    refused(ValueError, "number of ranks, 2; got 1", "no", FMREC.replace(batch_size=1))
    refused(ValueError, "graph must be None or False on 2 ranks", "no-graph", graph=True)
    dist.barrier()
    assert not (folder / "no-graph").exists()  # nothing was begun
    other = FMREC.replace(dropout=0.2)
    refused(ValueError, "other settings: dropout: 0.1 -> 0.2", "handed-on", other, resume=True)


def _evaluates(world: World, folder: Path) -> None:
    """The command, as under torchrun."""
    joined = cli.joined
    cli.joined = lambda device: nullcontext(world)
    try:
        out = folder / f"evaluation-{world.rank}.json"
        assert cli.main(evaluation(folder, out)) == 0
        assert out.exists() == world.is_main
    finally:
        cli.joined = joined


def evaluation(folder: Path, out: Path) -> list[str]:
    """Arguments of the command."""
    run, data = str(folder / "on-1" / "fmrec"), str(folder / "data.csv")
    return ["evaluate", run, data, "--seeds", "2", "--json", str(out), "--device", "cpu"]


def _table(world: World, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A table and the same over the ranks."""
    full = torch.arange(rows * 3, dtype=torch.float32).reshape(rows, 3) + 1
    mesh = init_device_mesh("cpu", (world.size,))
    return full, distribute_tensor(full, mesh, [Shard(0)])


def _clips(world: World) -> None:
    full, spread = _table(world)
    for largest in (1e-2, 1e9):
        plain = [torch.nn.Parameter(full.clone()), torch.nn.Parameter(torch.ones(4))]
        mixed = [torch.nn.Parameter(spread.clone()), torch.nn.Parameter(torch.ones(4))]
        unread = torch.nn.Parameter(torch.ones(2))
        for parameter in (*plain, *mixed):
            parameter.grad = parameter.detach().clone() * 2
        wanted = torch.nn.utils.clip_grad_norm_(plain, largest)
        torch.testing.assert_close(clip_gradients([*mixed, unread], largest), wanted)
        torch.testing.assert_close(mixed[0].grad.full_tensor(), plain[0].grad)
        torch.testing.assert_close(mixed[1].grad, plain[1].grad)


def _checkpoints_of_sharded_tensors(world: World, folder: Path) -> None:
    """Written by two ranks; read whole, by rows, and with an optimizer's state."""
    full, spread = _table(world)
    run = folder / "sharded"
    model = torch.nn.Module()
    model.table, model.bias = torch.nn.Parameter(spread.clone()), torch.nn.Parameter(torch.ones(4))
    state = {"model": dict(model.state_dict()), "value": 1, "scalar": torch.tensor(2.5)}
    saver = Saver(run, world)
    saver.save("last-1", "last", state)
    with torch.no_grad():
        model.table.mul_(0)  # what is written is a copy
        state["scalar"].zero_()
    assert not (run / "last.json").exists()  # it does not count before `poll` or `wait`
    dist.barrier()
    saver.wait()
    found = checkpoint.load(checkpoint.locate(run, "last"))
    assert torch.equal(found["model"]["table"], full) and found["scalar"] == 2.5
    assert found["value"] == 1
    if world.is_main:
        checkpoint.save(run / "single", "last-1", "last", found)
    dist.barrier()
    for form in (run, run / "single"):
        into = torch.zeros_like(spread)
        read = checkpoint.load(checkpoint.locate(form, "last"), {"model/table": into})
        assert read["model"]["table"] is into
        assert torch.equal(into.to_local(), spread.to_local())
        try:
            checkpoint.load(checkpoint.locate(form, "last"), {"model/table": torch.zeros(2, 3)})
        except checkpoint.CheckpointError as error:
            assert "shape [5, 3], expected [2, 3]" in str(error)
        else:
            raise AssertionError("a table of another size was read")
