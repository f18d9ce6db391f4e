"""Draw benchmark records: ``python -m benchmarks.plot [FILES] --out docs/`` (extra ``[bench]``).

Without FILES (``make plots``): all committed records, and of training runs and studies of the
number of steps what the texts in the folder show."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import curves
from benchmarks.harness import read_results
from benchmarks.table import END_TO_END, seconds
from fmrec_fast import steps

RESULTS = Path(__file__).parent / "results"
COLOURS = {
    "published": "#9a9a9a",
    "tuned": "#d9a441",
    "compiled": "#7aa6c2",
    "ours": "#c0392b",
}
FORMAT = "png"


def draw(results: dict[str, Any], path: Path) -> bool:
    """Bars of seconds per variant for each end-to-end case, log scale; a peer's bar says how many
    times as long as ours it took. Returns whether there was anything to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter

    records = [record for record in results["records"] if record["op"] in END_TO_END]
    if not records:
        return False
    names = [n for n in COLOURS if any(n in record["variants"] for record in records)]
    figure, axes = plt.subplots(figsize=(2 + 2.2 * len(records), 4.4), layout="constrained")
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        for group, record in enumerate(records):
            variant = record["variants"].get(name)
            if variant is None:
                continue
            x, median = group + (place - (len(names) - 1) / 2) * width, variant["median_s"]
            error = None
            if variant["q1_s"] is not None:
                error = [[median - variant["q1_s"]], [variant["q3_s"] - median]]
            label = None if group else name
            axes.bar(x, median, width, color=COLOURS[name], label=label, yerr=error, capsize=2)
            ours = name == record["ours"]
            text = seconds(median) if ours else f"{variant['times_ours']:.1f}×"
            axes.annotate(
                text,
                (x, variant["q3_s"] or median),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
    axes.set_xticks(range(len(records)), [record["case"].replace(", ", "\n") for record in records])
    axes.margins(y=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("median time (bars: quartiles)")
    axes.legend(frameon=False, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1.0))
    machine = results["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    quick = ", quick sizes" if results["settings"]["quick"] else ""
    figure.supxlabel(
        f"{where}, {machine['threads']} threads, torch {machine['versions']['torch']}, "
        f"allocator: {machine['allocator']['setting']}, {results['date'][:10]}{quick}",
        fontsize=7,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def draw_growth(results: dict[str, Any], op: str, path: Path) -> bool:
    """Time and extra memory of forward + backward against V, both on log scales, a line for each
    variant of `op`. Returns whether there were at least two V to draw."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    records = [
        record
        for record in results["records"]
        if record["op"] == op and record["case"].startswith("forward + backward")
    ]
    records.sort(key=lambda record: record["sizes"]["V"])
    if len(records) < 2:
        return False
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    panels = (("median_s", 1.0, "median seconds"), ("extra_bytes", 1e6, "MB beyond gradients"))
    names = list(dict.fromkeys(name for record in records for name in record["variants"]))
    for axis, (key, unit, label) in zip(axes, panels):
        for name in names:
            points = [
                (record["sizes"]["V"], max(record["variants"][name][key] / unit, 0.1 * unit / 1e6))
                for record in records
                if record["variants"].get(name, {}).get(key) is not None
            ]
            ours = name == records[0]["ours"]
            style = {"color": COLOURS["ours"], "linewidth": 2.5} if ours else {}
            if points:
                axis.plot(*zip(*points), marker="o", label=name, **style)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("items V")
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=7)
    sizes, machine = records[0]["sizes"], results["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"
    figure.suptitle(
        f"{op}, forward + backward, B = {sizes['B']}, D = {sizes['D']}; {where}, "
        f"torch {machine['versions']['torch']}, {results['date'][:10]}",
        fontsize=8,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return True


def draw_shown(folder: Path) -> list[Path]:
    """Draw NAME.png from NAME-metrics.jsonl or a study of steps NAME.json, for the pictures that
    the folder's texts show and that have one."""
    texts = "\n".join(text.read_text() for text in sorted(folder.glob("*.md")))
    drawn = []
    for name in sorted(set(re.findall(rf"!\[[^]]*\]\(([^)]*)\.{FORMAT}\)", texts))):
        path, metrics, study = (folder / f"{name}{end}" for end in
                                (f".{FORMAT}", "-metrics.jsonl", ".json"))  # fmt: skip
        if metrics.exists():
            curves.draw(metrics, path)
        elif study.exists():
            facts = json.loads(study.read_text())
            rows = [steps.Row(**row) for row in facts["rows"]]
            facts = {key: facts[key] for key in ("reference", "noise_floor", "users", "top")}
            steps.draw(steps.Study(rows=rows, **facts), path)
        else:
            continue
        drawn.append(path)
    return drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """One picture per record, under the record's name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help=f"records; default: all in {RESULTS}"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    chosen = parser.parse_args(arguments)
    files = chosen.files or sorted(RESULTS.glob("*.json"))
    if not files:
        parser.error(f"no records in {RESULTS}; name some, or run: python -m benchmarks --save")
    for file in files:
        path = chosen.out / f"{file.stem}.{FORMAT}"
        drawn = draw(read_results(file), path)
        print(f"{path}" if drawn else f"{file}: no end-to-end case in it, nothing drawn")
        growth = path.with_stem(f"{path.stem}-item-cross-entropy")
        if draw_growth(read_results(file), "item_cross_entropy", growth):
            print(growth)
    if not chosen.files:
        print(*draw_shown(chosen.out), sep="\n")


if __name__ == "__main__":
    main()
