"""Training curves of a run: ``python -m benchmarks.curves RUN --out FILE.png``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

METRIC = "HR@10"


def draw(metrics: Path, out: Path, metric: str = METRIC) -> None:
    """Losses and one validation metric against the epoch, from a run's metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    epochs = [record["epoch"] for record in records]
    for name in records[0]["loss"]:
        left.plot(epochs, [record["loss"][name] for record in records], marker=".", label=name)
    left.set(xlabel="epoch", ylabel="mean training loss", yscale="log")
    left.legend(fontsize="small")
    validated = [record for record in records if "validation" in record]
    right.plot(
        [record["epoch"] for record in validated],
        [record["validation"][metric] for record in validated],
        marker=".",
    )
    right.set(xlabel="epoch", ylabel=f"validation {metric} (%)")
    figure.savefig(out, dpi=120)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the curves of one run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, required=True, help="PNG")
    parser.add_argument("--metric", default=METRIC)
    chosen = parser.parse_args(arguments)
    draw(chosen.run / "metrics.jsonl", chosen.out, chosen.metric)


if __name__ == "__main__":
    main()
