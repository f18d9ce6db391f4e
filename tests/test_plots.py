"""`make plots`: the pictures that the documents show come from the committed records."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("matplotlib")


def test_make_plots_draws_records_and_what_the_texts_show(tmp_path, monkeypatch, capsys):
    from benchmarks import plot

    records, docs = tmp_path / "results", tmp_path / "docs"
    records.mkdir()
    docs.mkdir()
    (record, *_) = sorted(plot.RESULTS.glob("*-item_cross_entropy-default.json"))
    shutil.copy(record, records)
    for name in ("results.md", "ml-100k-metrics.jsonl", "ml-100k-steps.json"):
        shutil.copy(ROOT / "docs" / name, docs)
    monkeypatch.setattr(plot, "RESULTS", records)
    plot.main(["--out", str(docs)])
    shown = capsys.readouterr().out
    drawn = {path.name for path in docs.glob("*.png")}
    assert drawn == {f"{record.stem}-item-cross-entropy.png", "ml-100k.png", "ml-100k-steps.png"}
    assert all(name in shown for name in drawn)
    for path in docs.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_every_picture_of_the_documents_can_be_drawn():
    """It belongs to a record, a run's metrics or a study of steps, and is committed."""
    makefile = (ROOT / "Makefile").read_text()
    assert "\nplots: setup\n\t$(BIN)/python -m benchmarks.plot --out docs\n" in makefile
    docs, results = ROOT / "docs", ROOT / "benchmarks" / "results"
    for text in docs.glob("*.md"):
        for name in re.findall(r"!\[[^]]*\]\(([^)]*)\.png\)", text.read_text()):
            record = results / f"{name.removesuffix('-item-cross-entropy')}.json"
            sources = (record, docs / f"{name}-metrics.jsonl", docs / f"{name}.json")
            assert any(source.exists() for source in sources), name
            assert (docs / f"{name}.png").exists(), name
