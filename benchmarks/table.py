"""Markdown tables from benchmark records: ``python -m benchmarks.table FILE...``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import read_results

END_TO_END = ("euler_sampler", "training_step", "fave")
# The batches whose sampling the README shows; the record holds more.
README_BATCHES = (1, 32, 512, 4096)
# Variants of ours that get a row of their own there, and what the row adds to the case's name.
README_WAYS = {
    "auto": "`method='auto'`",
    "tf32": "`precision='tf32'`",
    "bf16": "`precision='bf16'`",
    "ours, Server": "`Server.sample`",
    "ours, Server, top 10": "`Server`, with the top 10",
}
# A row has to gain so much on the one above it.
WORTH_A_ROW = 1.15
RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- speed -->", "<!-- /speed -->"


def seconds(value: float) -> str:
    """Three digits with the unit that fits."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-6:.3g} µs"


def spread(variant: dict[str, Any]) -> str:
    """Median and quartiles."""
    text = seconds(variant["median_s"])
    if variant["q1_s"] is not None:
        text += f" ({seconds(variant['q1_s'])} .. {seconds(variant['q3_s'])})"
    return text


def percent(value: float | None) -> str:
    """A share, or nothing."""
    if value is None:
        return ""
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.2g} %"


def count(value: float | None) -> str:
    """FLOPs with a prefix."""
    if value is None:
        return ""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value:.3g}"


def size(value: float | None) -> str:
    """Bytes with a prefix, or nothing."""
    if value is None:
        return ""
    for scale, unit in ((1e9, "GB"), (1e6, "MB")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table whose columns line up in plain text too."""
    cells = [list(header), *(list(row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        return "| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |"

    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(cells[0]), rule, *(line(row) for row in cells[1:])])


def heading(results: dict[str, Any]) -> str:
    """Machine, versions and settings in a few lines."""
    machine, limits = results["machine"], results["limits"]
    versions = machine["versions"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return (
        f"{where}, {machine['threads']} threads; Python {versions['python']}, "
        f"torch {versions['torch']}, fmrec_fast {versions['fmrec_fast']} "
        f"({machine['revision'] or 'no revision'}); allocator: {machine['allocator']['setting']}; "
        f"{results['date'][:10]}{'; quick sizes' if results['settings']['quick'] else ''}.\n"
        f"Histories: {results['settings']['histories']}.\n"
        f"Measured limits: copy {limits['copy_bytes_per_s'] / 1e9:.3g} GB/s, float32 product "
        f"{limits['matmul_flops_per_s'] / 1e9:.4g} GFLOP/s."
    )


def end_to_end(results: dict[str, Any]) -> str:
    """Sampling and training: a row per case and variant, and how many times ours it takes."""
    rows = []
    for record in results["records"]:
        if record["op"] not in END_TO_END:
            continue
        for name, variant in record["variants"].items():
            rows.append(
                (
                    record["case"],
                    name,
                    spread(variant),
                    str(variant["rounds"]),
                    "" if variant["p99_s"] is None else seconds(variant["p99_s"]),
                    f"{variant['times_ours']:.2f}x",
                    count(variant["flops"]),
                    count(variant.get("flops_per_recommendation")),
                    percent(variant.get("fraction_of_matmul_rate")),
                    percent(variant.get("fraction_of_limit")),
                    size(variant.get("extra_bytes")),
                )
            )
    header = (
        *("case", "variant", "median (quartiles)", "rounds", "p99", "times ours", "FLOPs"),
        *("FLOPs each", "of matmul rate", "of the limit", "peak memory"),
    )
    return grid(header, rows) if rows else ""


def ops(results: dict[str, Any]) -> str:
    """The single ops: a row per case and variant, and the fraction of the machine's limit."""
    rows = []
    for record in results["records"]:
        if record["op"] in END_TO_END:
            continue
        for name, variant in record["variants"].items():
            mark = " (ours)" if name == record["ours"] else ""
            rows.append(
                (
                    record["op"],
                    record["case"],
                    name + mark,
                    spread(variant),
                    str(variant["rounds"]),
                    f"{variant['times_ours']:.2f}x",
                    percent(variant.get("fraction_of_limit")),
                )
            )
    header = (
        *("op", "case", "variant", "median (quartiles)", "rounds", "times ours"),
        "of the limit",
    )
    return grid(header, rows) if rows else ""


def newest(files: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every end-to-end case of these files with the file of its newest measurement, in order."""
    found = {}
    for results in sorted(files, key=lambda results: results["date"]):
        for record in results["records"]:
            if record["op"] in END_TO_END:
                found[record["op"], record["case"]] = (record, results)
    pairs = list(found.values())
    return sorted(pairs, key=lambda p: _place(p[0]))


def _place(record: dict[str, Any]) -> tuple[int, bool, int, str]:
    """Sampling before training, small batches first."""
    training = "training" in record["case"]
    where = END_TO_END.index(record["op"])
    return where, training, record["sizes"].get("B", 0), record["case"]


def _readme_rows(record: dict[str, Any]) -> list[list[str]]:
    """Our default way, and below it the ones that are faster."""
    found = {name: variant["median_s"] for name, variant in record["variants"].items()}
    peers = [seconds(found[n]) if n in found else "" for n in ("published", "tuned", "compiled")]
    rows, best = [], float("inf")
    for name in ("ours", *README_WAYS):
        if name not in found or found[name] * WORTH_A_ROW > best:
            continue
        case = record["case"] + (f", {README_WAYS[name]}" if name in README_WAYS else "")
        best = min(best, found[name])
        ratios = [
            f"{found[peer] / found[name]:.1f}x" if peer in found else ""
            for peer in ("published", "compiled")
        ]
        rows.append([case, *peers, seconds(found[name]), *ratios])
        peers = [""] * len(peers)
    return rows


def _machine(results: dict[str, Any]) -> tuple[str, str]:
    """(device, allocator setting): what figures of one table have in common."""
    machine = results["machine"]
    setting = machine["allocator"]["setting"]
    if machine["gpu"]:
        return machine["gpu"], setting
    # The first records do not name the instruction set; every machine they are of had AMX.
    isa = machine["versions"].get("isa") or "amx"
    tiles = "AMX" if isa.startswith("amx") else f"{isa.upper()}, no AMX"
    return f"{machine['cpu']} ({tiles}), {machine['threads']} threads", setting


def readme_table(folder: Path = RESULTS) -> str:
    """The README's tables: the newest full measurement of each case, by device and allocator
    setting."""
    by_machine: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*-full-*.json")):
        results = read_results(path)
        by_machine.setdefault(_machine(results), []).append(results)
    parts = []
    for (device, setting), files in sorted(by_machine.items()):
        rows, used = [], []
        for record, results in newest(files):
            if record["op"] == "euler_sampler" and record["sizes"]["B"] not in README_BATCHES:
                continue
            rows += _readme_rows(record)
            used.append(results)
        if not rows:
            continue
        header = ("", "published", "tuned eager", "torch.compile", "fmrec_fast")
        table = grid([*header, "vs published", "vs torch.compile"], rows)
        days = sorted({results["date"][:10] for results in used})
        parts.append(
            f"Median seconds, {device}, torch {used[-1]['machine']['versions']['torch']}, "
            f"V = {used[-1]['settings']['sizes']['items']:,}, allocator settings {setting} "
            f"({' to '.join(sorted({days[0], days[-1]}))}):\n\n{table}"
        )
    return "\n\n".join(parts)


def write_readme(path: Path) -> None:
    """Put the table between the README's markers."""
    text = path.read_text()
    before, rest = text.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    path.write_text(f"{before}{BEGIN}\n{readme_table()}\n{END}{after}")


def left_out(results: dict[str, Any]) -> str:
    """What was not timed, and why."""
    lines = {
        f"- {record['op']}: {name} left out: {reason}"
        for record in results["records"]
        for name, reason in record["left_out"].items()
    }
    return "\n".join(sorted(lines))


def markdown(results: dict[str, Any]) -> str:
    """The whole record."""
    parts = (heading(results), end_to_end(results), ops(results), left_out(results))
    return "\n\n".join(part for part in parts if part)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables of the files named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("files", nargs="*", metavar="FILE", help="records (JSON)")
    parser.add_argument(
        "--readme", type=Path, metavar="README", help="write its table, from the committed records"
    )
    parser.add_argument(
        "--only", choices=("end-to-end", "ops"), help="one of the tables, with its heading"
    )
    chosen = parser.parse_args(arguments)
    if chosen.readme is not None:
        write_readme(chosen.readme)
    elif not chosen.files:
        parser.error("name a FILE, or --readme README")
    for path in chosen.files:
        results = read_results(path)
        if chosen.only is None:
            print(markdown(results), end="\n\n")
        else:
            body = end_to_end(results) if chosen.only == "end-to-end" else ops(results)
            print(heading(results), body, sep="\n\n", end="\n\n")


if __name__ == "__main__":
    main()
