"""``fmrec-fast train``."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from fmrec_fast import checkpoint, training
from fmrec_fast.cli.common import UserError, print_metrics, progress_bar, read, reading, show
from fmrec_fast.cli.parser import Choice
from fmrec_fast.config import STAGES, FaveConfig, FMRecConfig
from fmrec_fast.distributed.world import World
from fmrec_fast.models import CONFIGS


class Console(training.Listener):
    """Progress bars, and TensorBoard curves when its extra is installed."""

    def __init__(self, run: Path) -> None:
        self._events = run / "tensorboard"
        self._bar: Any = None
        self._writer: Any = None

    def _open(self, what: str, unit: str, total: int, done: int = 0) -> None:
        self._close()
        self._bar = progress_bar(what, unit, total, done)

    def epoch_started(self, epoch: int, samples: int, done: int) -> None:
        self._open(f"epoch {epoch}", "samples", samples, done)

    def step_done(self, losses: dict[str, float] | None, samples: int) -> None:
        if losses is not None:
            self._bar.set_postfix({"loss": f"{losses['total']:.4f}"}, refresh=False)
        self._bar.update(samples)

    def evaluation_started(self, split: str, users: int) -> None:
        self._open({"val": "validation"}.get(split, split), "users", users)

    def evaluated(self, users: int) -> None:
        self._bar.update(users)

    def epoch_done(self, record: dict[str, Any]) -> None:
        self._close()
        epoch, found = record["epoch"], record.get("validation", {})
        shown = "  ".join(f"{name} {value:.3f}" for name, value in found.items() if "@10" in name)
        print(f"epoch {epoch}: loss {record['loss']['total']:.4f}  {shown}", file=sys.stderr)
        self._write_events(epoch, record["loss"], found)

    def _write_events(self, epoch: int, loss: dict[str, float], found: dict[str, float]) -> None:
        # Opened with the first epoch, so that a refused run leaves no file behind.
        if self._writer is None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._events)
        if self._writer is not None:
            for name, value in loss.items():
                self._writer.add_scalar(f"loss/{name}", value, epoch)
            for name, value in found.items():
                self._writer.add_scalar(f"validation/{name}", value, epoch)
            self._writer.flush()

    def finished(self) -> None:
        self._close()
        if self._writer is not None:
            self._writer.close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _config(options: Any, choice: Choice, stage: str | None) -> FMRecConfig:
    if options.model != choice.model:  # from a file of settings, which are those of the model
        raise UserError(f"--model {options.model} must be given on the command line")
    kind = CONFIGS[choice.model]
    values = {name: options[name] for name in kind.__dataclass_fields__ if name in options}
    if stage is not None:
        values["stage_mode"] = stage
    return kind(**values)


def train_run(options: Any, choice: Choice, stage: str | None, world: World) -> None:
    config, source = _config(options, choice, stage), reading(options, options.data)
    run = Path(options.out)
    if isinstance(config, FaveConfig):
        first, second = (run / name for name in checkpoint.STAGE_DIRECTORIES)
        run = first if stage == STAGES[0] else second
        if run is second and config.ckpt_path is None:
            config = config.replace(ckpt_path=str(first))
        if world.is_main:
            print(f"stage {STAGES.index(config.stage_mode) + 1} into {run}", file=sys.stderr)
    dataset = read(source)
    if world.is_main:
        show(dataset)
    console = Console(run)
    trainer = training.Trainer(
        dataset,
        config,
        run,
        device=world.device,
        checkpoint_seconds=options.checkpoint_seconds,
        checkpoint_steps=options.checkpoint_steps,
        graph=options.graph,
        max_steps=options.max_steps,
        source=source,
        listener=console,
        world=world,
        shard_items=options.shard_items,
    )
    try:
        result = trainer.fit(resume=options.resume)
    finally:
        console.finished()
    if not world.is_main:
        return
    print(f"test, {result.users} users:")
    print_metrics({"model": result.mean})
