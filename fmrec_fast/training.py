"""Training: the published loop, resumable at any step."""

from __future__ import annotations

import json
import math
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmrec_fast import checkpoint, memory
from fmrec_fast.backend import Rng, current_rng
from fmrec_fast.config import FaveConfig, FMRecConfig
from fmrec_fast.data.batches import TrainingSamples
from fmrec_fast.data.dataset import Dataset
from fmrec_fast.distributed import items
from fmrec_fast.distributed.checkpoints import Saver
from fmrec_fast.distributed.data_parallel import Replicas, clip_gradients, local, sharded
from fmrec_fast.distributed.world import ALONE, World
from fmrec_fast.evaluation import Evaluation, evaluate
from fmrec_fast.losses import training_losses
from fmrec_fast.models import FMRecommender, build_recommender
from fmrec_fast.training_graph import Glance, GraphedStep, optimizer_tensors, rate_as_tensor

LOSSES = ("total", "flow", "cross_entropy", "reconstruction")


def loss_names(config: FMRecConfig) -> tuple[str, ...]:
    """The parts of `Losses` that a run reports."""
    second = isinstance(config, FaveConfig) and config.stage_mode == "finetune"
    return (*LOSSES, "straight") if second else LOSSES


class DivergedError(ArithmeticError):
    """The loss is no longer finite; the last checkpoint is from before."""


@dataclass
class Progress:
    """Where a run stands; saved with every checkpoint."""

    epoch: int = 0
    step_in_epoch: int = 0
    global_step: int = 0
    evaluations: int = 0
    without_improvement: int = 0
    best: dict[str, float] = field(default_factory=dict)
    stopped: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)


class Listener:
    """What a run reports to; the command line shows progress bars and writes TensorBoard.

    It may not draw from torch's generators: of several ranks only one has it.
    """

    def epoch_started(self, epoch: int, samples: int, done: int) -> None: ...

    def step_done(self, losses: dict[str, float] | None, samples: int) -> None: ...

    def epoch_done(self, record: dict[str, Any]) -> None: ...

    def evaluation_started(self, split: str, users: int) -> None: ...

    def evaluated(self, users: int) -> None: ...

    def finished(self) -> None: ...


def build_optimizer(
    model: torch.nn.Module, config: FMRecConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.StepLR]:
    """The published optimizer of what is not frozen, and its schedule (stepped once an epoch)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # One kernel updates a group, and takes tensors of one kind.
    spread = [parameter for parameter in parameters if sharded(parameter)]
    whole = [parameter for parameter in parameters if not sharded(parameter)]
    groups: list[dict[str, Any]] = [{"params": group} for group in (whole, spread) if group]
    options: dict[str, Any] = {
        "lr": config.learning_rate,
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.optimizer == "SGD":
        options["momentum"] = config.momentum or 0.0
    else:
        options["capturable"] = _on_cuda(parameters)
    if spread and config.optimizer == "SGD":  # torch has no fused one for these
        groups[-1] |= {"fused": False, "foreach": True}
    optimizer = getattr(torch.optim, config.optimizer)(groups, **options)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, config.decay_step, config.gamma)
    return optimizer, scheduler


def _numbers(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[int]:
    """The places in `model` of the optimizer's parameters, both counting what is not frozen."""
    place = {id(p): i for i, p in enumerate(p for p in model.parameters() if p.requires_grad)}
    return [place[id(p)] for group in optimizer.param_groups for p in group["params"]]


def optimizer_state(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Any]:
    """The optimizer's state dict, as if all parameters were one group in the model's order: the
    same whether some of them are over ranks or not."""
    state, numbers = optimizer.state_dict(), _numbers(optimizer, model)
    held = {numbers[i]: state["state"][i] for i in state["state"]}
    return {
        "state": {i: held[i] for i in sorted(held)},
        "param_groups": [state["param_groups"][0] | {"params": list(range(len(numbers)))}],
    }


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, state: dict[str, Any]
) -> None:
    """Undo `optimizer_state`."""
    numbers, options = _numbers(optimizer, model), state["param_groups"][0]
    groups, first = [], 0
    for group in optimizer.param_groups:
        last = first + len(group["params"])
        kernels = {key: group[key] for key in ("fused", "foreach") if key in group}
        groups.append(options | kernels | {"params": list(range(first, last))})
        first = last
    held = state["state"]
    held = {i: held[number] for i, number in enumerate(numbers) if number in held}
    optimizer.load_state_dict({"state": held, "param_groups": groups})


def _on_cuda(parameters: list[torch.nn.Parameter]) -> bool:
    return parameters[0].device.type == "cuda"


class Trainer:
    """Trains one model on one dataset, into one run directory.

    Args:
        dataset: histories; its number of items fills ``config.item_num``.
        config: settings.
        run: directory of the run.
        device: where to train; of several ranks, `world` says it.
        graph: issue the steps of whole batches as one CUDA graph (on a CPU: run them through the
            same buffers). None: on CUDA, unless draws are the published ones.
        checkpoint_seconds: a checkpoint is written when so long has passed since the last one,
            at the end of every epoch, and at the end.
        checkpoint_steps: write one every so many steps instead of by the clock.
        max_steps: stop after so many steps in all (a smoke run), then validate and test as usual.
        source: how to read the dataset again; kept with the run.
        listener: told what happens.
        world: the ranks that train together, each of which makes a trainer with the same arguments:
            a step is one of the global batch of ``config.batch_size``, of which each rank computes
            its rows. Losses and parameters are those of one rank to rounding. Rank 0 alone writes
            (but for its part of a checkpoint) and tells the listener.
        shard_items: each rank of `world` holds the rows of some items only, of the item table, the
            decoder's last layer and their optimizer states (`distributed.items`). One rank holds
            them all.

    `fit` may be called on a directory that holds an earlier part of the same run with
    ``resume=True``; it then ends with the same numbers as if it had never been interrupted.
    """

    def __init__(
        self,
        dataset: Dataset,
        config: FMRecConfig,
        run: str | Path,
        *,
        device: torch.device | str = "cpu",
        graph: bool | None = None,
        checkpoint_seconds: float = 60.0,
        checkpoint_steps: int | None = None,
        max_steps: int | None = None,
        source: dict[str, Any] | None = None,
        listener: Listener | None = None,
        world: World = ALONE,
        shard_items: bool = False,
    ) -> None:
        self.dataset, self.run, self.world = dataset, Path(run), world
        self.device = torch.device(device) if world.alone else world.device
        self.config = config.replace(item_num=dataset.item_num)
        self.checkpoint_seconds, self.checkpoint_steps = checkpoint_seconds, checkpoint_steps
        self.max_steps = max_steps
        self.source = source or {}
        self.listener = listener if listener is not None and world.is_main else Listener()
        if config.batch_size < world.size:
            raise ValueError(
                f"batch_size must be at least the number of ranks, {world.size}; got "
                f"{config.batch_size}, so that some would never have a sample"
            )
        self.samples = TrainingSamples(dataset, self.config.max_len, self.device)
        if len(self.samples) == 0:
            raise ValueError(
                f"{dataset.name or 'the dataset'} has no training sample: no user has at least "
                f"2 items before the validation item ({dataset.num_users} users, "
                f"{dataset.num_interactions} interactions)"
            )
        torch.manual_seed(self.config.random_seed)
        self.shard_items = shard_items and not world.alone
        if self.shard_items:
            self.model = items.build_sharded(self.config, world.mesh()).to(self.device)
        else:
            self.model = build_recommender(self.config).to(self.device)
        self.optimizer, self.scheduler = build_optimizer(self.model, self.config)
        self.progress = Progress()
        # Sums over the epoch so far, the first step whose loss was not finite (or -1), and the
        # number of steps; all stay on the device, so that a step waits for nothing.
        self.loss_names = loss_names(self.config)
        parts = len(self.loss_names)
        self.tally = torch.zeros(parts + 2, dtype=torch.float64, device=self.device)
        self.sums, self.bad_step, self.steps = self.tally.split((parts, 1, 1))
        self.bad_step.fill_(-1)
        self._glance = Glance(self.tally)
        # A tensor, so that a captured step finds it changed; on a CPU as exact as the number.
        exact = torch.float32 if self.device.type == "cuda" else torch.float64
        self.rate = torch.zeros((), dtype=exact, device=self.device)
        self.graph = graph
        self._replicas = None
        if not world.alone:
            if graph:
                raise ValueError(
                    f"graph must be None or False on {world.size} ranks, whose steps exchange "
                    f"gradients, got {graph}"
                )
            if current_rng() is Rng.PUBLISHED:
                raise ValueError(
                    "published draws are made in the order of one process; train on one rank, "
                    f"got {world.size}"
                )
            self._replicas = Replicas(self.model, self.loss_names, world)
        self._saver = Saver(self.run, world)
        self._graphed = GraphedStep(
            self._train_step, self.config.batch_size, self._changed_by_a_step, self.device
        )
        self._saved_at = time.monotonic()
        self._rng = checkpoint.rng_state()
        self._histories = dataset.fingerprint

    @property
    def steps_per_epoch(self) -> int:
        """Batches in an epoch; the short last one is kept."""
        return math.ceil(len(self.samples) / self.config.batch_size)

    def fit(self, *, resume: bool = False) -> Evaluation:
        """Train until the epochs, the patience or `max_steps` are used up, then test once.

        Returns:
            The test metrics of the best model by validation (the last one, if no validation ran).

        Raises:
            FileExistsError: the directory holds a run and `resume` is False.
            DivergedError: a loss was NaN or infinite; says at which step.
            CheckpointError: the checkpoint to resume from is damaged or of another configuration.
        """
        started = self.world.decide((self.run / "last.json").exists())
        if started and not resume:
            raise FileExistsError(
                f"{self.run} already holds a run; continue it with --resume (resume=True), "
                f"or name another directory"
            )
        if started:
            self._restore()
        else:
            self._start()
            checkpoint.restore_rng(self._rng)
            self._save()
        self._write_history()
        while not self._over():
            self._train_epoch()
        # The optimizer is done with them; of large tables they take as much as the model.
        self.optimizer.zero_grad(set_to_none=True)
        memory.release()
        self._saver.wait()
        role = "best" if self.progress.evaluations else "last"
        result = self._evaluate(self._trained(role), "test")
        self._write(
            "result.json",
            json.dumps(
                {
                    "tested": role,
                    "epochs": self.progress.epoch,
                    "steps": self.progress.global_step,
                    "users": result.users,
                    "test": result.mean,
                },
                indent=1,
            ),
        )
        self.listener.finished()
        return result

    def _trained(self, role: str) -> FMRecommender:
        """The model of a checkpoint; over ranks it takes the place of the one in training, which
        'last' is anyway."""
        directory = checkpoint.locate(self.run, role)
        if not self.shard_items:
            return checkpoint.build_model(checkpoint.load(directory), self.device)
        if role == "best":
            state = checkpoint.load(directory, items.own_parts(self.model))
            self.model.load_state_dict(state["model"])
        return self.model.eval()

    def _start(self) -> None:
        """Fave's stage 2 starts from stage 1's weights, where `ckpt_path` says where they are."""
        config = self.config
        if not isinstance(config, FaveConfig) or config.ckpt_path is None:
            return
        path = config.ckpt_path
        into = items.own_parts(self.model) if self.shard_items else None

        def accept(state: dict[str, Any]) -> None:
            self._accept_items(path, state)

        try:
            self.model.load_state_dict(checkpoint.starting_weights(path, into, accept))
        except RuntimeError as error:
            raise checkpoint.CheckpointError(
                f"the weights in {path} do not fit the settings: {error}"
            ) from None

    def _over(self) -> bool:
        p = self.progress
        return p.stopped or p.epoch >= self.config.epochs

    def _used_up(self) -> bool:
        return self.max_steps is not None and self.progress.global_step >= self.max_steps

    def _train_epoch(self) -> None:
        p, config = self.progress, self.config
        order = self.samples.epoch_order(config.random_seed, p.epoch)
        total = len(self.samples)
        done = min(p.step_in_epoch * config.batch_size, total)
        self.listener.epoch_started(p.epoch, total, done)
        began, first_step = time.monotonic(), p.step_in_epoch
        self.model.train()
        self.rate.fill_(self.scheduler.get_last_lr()[0])
        self.bad_step.fill_(-1)
        self.steps.fill_(p.global_step)
        step = self._graphed if self._uses_graph() else self._train_step
        while p.step_in_epoch < self.steps_per_epoch:
            first = p.step_in_epoch * config.batch_size
            index = order[first : first + config.batch_size]
            if self.world.alone:
                step(self.samples.fetch(index))
            else:
                share = self.world.share(len(index))
                self._train_step(self.samples.fetch(index[share.start : share.stop]), len(index))
            p.step_in_epoch += 1
            p.global_step += 1
            due = self._report_step(len(index))
            if self._used_up():
                p.stopped = True
                break
            # After the last step, the end of the epoch saves.
            if p.step_in_epoch < self.steps_per_epoch and due:
                self._save()
            self._saver.poll()
        self._check_finite(int(self.bad_step), parameters=True)
        self._end_epoch(time.monotonic() - began, p.step_in_epoch - first_step)

    def _uses_graph(self) -> bool:
        if not self.world.alone:
            return False
        published = current_rng() is Rng.PUBLISHED
        if self.graph is None:
            return self.device.type == "cuda" and not published
        if self.graph and published:
            raise ValueError(
                "graph must be None or False where draws are the published ones (they are made on "
                f"the host at every step), got {self.graph}"
            )
        return self.graph

    def _changed_by_a_step(self) -> list[Tensor]:
        return [*self.model.parameters(), *optimizer_tensors(self.optimizer), self.tally]

    def _train_step(self, fetched: Tensor, batch: int | None = None) -> None:
        """Forward, backward, optimizer and the tally; nothing in it waits for the device.

        Of several ranks: with this one's rows of a batch of `batch`.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total, values = self._losses(fetched, batch)
        total.backward()
        if isinstance(self.config, FaveConfig):
            clip_gradients(self.model.parameters(), self.config.clip_norm)
        with rate_as_tensor(self.optimizer, self.rate):
            self.optimizer.step()
        with torch.no_grad():
            # Of all ranks, so that all see it where one is not finite.
            values = self.world.sum(values)
            self.sums += values
            fresh = (self.bad_step < 0) & ~torch.isfinite(values).all()
            self.bad_step.copy_(torch.where(fresh, self.steps, self.bad_step))
            self.steps += 1

    def _losses(self, fetched: Tensor, batch: int | None) -> tuple[Tensor, Tensor]:
        """(the loss to differentiate, all parts of it); of several ranks, this one's shares."""
        sequence, target = self.samples.cut(fetched)
        if self._replicas is not None and batch is not None:
            return self._replicas.losses(sequence, target, batch)
        losses = training_losses(self.model, sequence, target)
        parts = [getattr(losses, name).detach() for name in self.loss_names]
        return losses.total, torch.stack(parts).double()

    def _report_step(self, samples: int) -> bool:
        """The losses as far as they are known without waiting for the device; whether it is time
        for a checkpoint."""
        means, bad, seen = None, -1, self._glance(self.progress.step_in_epoch)
        if seen is not None:
            steps, tally = seen
            sums, first_bad, _ = tally.split((len(self.loss_names), 1, 1))
            means, bad = self._mean_losses(sums, steps), int(first_bad)
        # Devices run ahead of what is known of them: of several ranks one may know before others.
        # And rank 0's clock decides.
        diverged, due = self.world.any(bad >= 0, self.world.is_main and self._due())
        if diverged:
            self._check_finite(int(self.bad_step))
        self.listener.step_done(means, samples)
        return due

    def _mean_losses(self, sums: Tensor, steps: int) -> dict[str, float]:
        return dict(zip(self.loss_names, (sums / max(steps, 1)).tolist(), strict=True))

    def _check_finite(self, bad: int, *, parameters: bool = False) -> None:
        what = "loss was"
        if bad < 0 and parameters:
            # A finite loss may have had a gradient that is not; the next loss would show it, but
            # a checkpoint must not hold it.
            # Smallest and largest value: `isfinite` takes as much memory as the parameter.
            own = [part for part in map(local, self.model.parameters()) if part.numel()]
            ends = torch.stack([torch.stack(part.detach().aminmax()) for part in own])
            (broken,) = self.world.any(not ends.isfinite().all())
            if broken:
                what, bad = "parameters were", self.progress.global_step - 1
        if bad >= 0:
            self._saver.wait()
            raise DivergedError(
                f"the {what} not finite at step {bad} (epoch {self.progress.epoch}); "
                f"the last good checkpoint is {checkpoint.locate(self.run, 'last')}"
            )

    def _due(self) -> bool:
        if self.checkpoint_steps is not None:
            return self.progress.global_step % self.checkpoint_steps == 0
        return time.monotonic() - self._saved_at >= self.checkpoint_seconds

    def _end_epoch(self, seconds: float, steps: int) -> None:
        p, config = self.progress, self.config
        record: dict[str, Any] = {
            "epoch": p.epoch,
            "steps": p.global_step,
            "lr": self.scheduler.get_last_lr()[0],
            "loss": self._mean_losses(self.sums, p.step_in_epoch),
            "steps_per_second": steps / max(seconds, 1e-9),
        }
        self.scheduler.step()
        if p.epoch != 0 and p.epoch % config.eval_interval == 0:
            record["validation"] = self._validate()
        p.history.append(record)
        p.epoch += 1
        p.step_in_epoch = 0
        self.sums.zero_()
        self._save()
        self._write_history()
        self.listener.epoch_done(record)

    def _validate(self) -> dict[str, float]:
        p, config = self.progress, self.config
        found = self._evaluate(self.model, "val").mean
        p.evaluations += 1
        deciding = (
            list(found) if config.early_stopping_metric == "any" else [config.early_stopping_metric]
        )
        if any(found[name] > p.best.get(name, -math.inf) for name in deciding):
            p.without_improvement = 0
            self._saver.save(f"best-{p.global_step:08d}", "best", self._model_state())
        else:
            p.without_improvement += 1
            p.stopped |= p.without_improvement >= config.patience
        for name, value in found.items():
            p.best[name] = max(value, p.best.get(name, -math.inf))
        return found

    def _evaluate(self, model: FMRecommender, split: str) -> Evaluation:
        self.listener.evaluation_started(split, self.dataset.evaluated_users(split))
        return evaluate(
            model,
            self.dataset,
            split,
            ks=self.config.metric_ks,
            seeds=(self.config.random_seed,),
            progress=self.listener.evaluated,
            world=self.world,
        )

    def _model_state(self) -> dict[str, Any]:
        return {
            "kind": self.config.KIND,
            "config": self.config.to_dict(),
            "item_ids": list(self.dataset.item_ids),
            "source": self.source,
            "model": self.model.state_dict(),
            "epoch": self.progress.epoch,
            "global_step": self.progress.global_step,
        }

    def _save(self) -> None:
        self._check_finite(int(self.bad_step), parameters=True)
        self._check_generators()
        state = self._model_state() | {
            "histories": self._histories,
            "optimizer": optimizer_state(self.optimizer, self.model),
            "scheduler": self.scheduler.state_dict(),
            "rng": checkpoint.rng_state(),
            "progress": vars(self.progress),
            "sums": self.sums.clone(),
        }
        self._saver.save(f"last-{self.progress.global_step:08d}", "last", state)
        self._saved_at = time.monotonic()

    def _check_generators(self) -> None:
        """Every rank draws the seeds of its steps, which must be the same ones."""
        if self.world.alone:
            return
        own = [zlib.crc32(state.numpy().tobytes()) for state in checkpoint.rng_state().values()]
        (differ,) = self.world.any(self.world.decide(own) != own)
        if differ:
            raise RuntimeError(
                f"torch's generators differ between the {self.world.size} ranks: something drew "
                f"random numbers on one of them only before step {self.progress.global_step}"
            )

    def _restore(self) -> None:
        into = None
        if self.shard_items:
            into = items.own_parts(self.model) | items.own_moments(self.model, self.optimizer)
        found = checkpoint.locate(self.run, "last")
        state = checkpoint.load(found, into, self._accept)
        self.model.load_state_dict(state["model"])
        load_optimizer_state(self.optimizer, self.model, state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.progress = p = Progress(**state["progress"])
        # Asked anew: patience may have been raised, or `max_steps`.
        p.stopped = p.without_improvement >= self.config.patience or self._used_up()
        for group in self.optimizer.param_groups:
            if "capturable" in group:  # the checkpoint may be of another device
                group["capturable"] = _on_cuda(group["params"])
        self._graphed.reset()  # loading replaced the optimizer's state
        self.sums.copy_(state["sums"])
        self.bad_step.fill_(-1)
        checkpoint.restore_rng(state["rng"])

    def _accept(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint that is not of this run, by what it says of itself: before a tensor
        is read, whose size might not fit."""
        self._accept_items(str(self.run), state)
        if state.get("kind", "fmrec") != self.config.KIND:
            raise checkpoint.CheckpointError(
                f"{self.run} is a run of {state.get('kind', 'fmrec')}, not of {self.config.KIND}"
            )
        free = {"epochs", "patience", "eval_interval", "ckpt_path"}
        # A setting that came later had its default.
        then, now = type(self.config)().to_dict() | state["config"], self.config.to_dict()
        changed = [f"{k}: {then.get(k)!r} -> {now[k]!r}" for k in now if then.get(k) != now[k]]
        changed = [text for text in changed if text.split(":")[0] not in free]
        if changed:
            raise checkpoint.CheckpointError(
                f"{self.run} was trained with other settings: {'; '.join(changed)}"
            )
        if state.get("histories", self._histories) != self._histories:
            raise checkpoint.CheckpointError(
                f"{self.run} was trained on other histories of the same items"
            )

    def _accept_items(self, name: str, state: dict[str, Any]) -> None:
        then_ids, now_ids = state["item_ids"], self.dataset.item_ids
        if then_ids == now_ids:
            return
        new, gone = set(now_ids) - set(then_ids), set(then_ids) - set(now_ids)
        named = [repr(i) for i in (*now_ids, *then_ids) if i in new or i in gone][:3]
        raise checkpoint.CheckpointError(
            f"{name} was trained on other items ({len(then_ids)}, now {len(now_ids)}: "
            f"{len(new)} new, {len(gone)} gone{', such as ' if named else ', in another order'}"
            f"{', '.join(named)})"
        )

    def _write_history(self) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in self.progress.history)
        self._write("metrics.jsonl", lines)

    def _write(self, name: str, text: str) -> None:
        if self.world.is_main:
            checkpoint.write_text(self.run / name, text)
