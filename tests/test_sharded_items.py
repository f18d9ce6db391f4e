"""Item tables over ranks: every op on them, and whole runs, equal those of one process."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import ranks
import sharded_checks
import torch

from fmrec_fast import checkpoint
from fmrec_fast.distributed import World

# FMRec's softmax does not change with the keys' bias, whose gradient is rounding alone. Adam makes
# steps of lr of it, in either direction.
OF_NO_EFFECT = re.compile(r"fm\..*\.attention\.linear_layers\.1\.bias$")
RUNS = [(name, size) for size in (2, 4) for name in sharded_checks.STEPS]
RUNS.remove(("early", 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What one, two and four ranks did; a check that failed is told by its own test."""
    at = tmp_path_factory.mktemp("sharded")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, config in sharded_checks.settings_of(at).items():
            ranks.train(World(), at / "whole" / name, config)
        try:
            ranks.launch(4, sharded_checks.four_ranks, at)
            ranks.launch(2, sharded_checks.two_ranks, at)
        except Exception as error:
            (at / "error").write_text(str(error))
    finally:
        torch.set_num_threads(threads)
    return at


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", sharded_checks.CHECKS)
def test_on_ranks(folder, name, size):
    """The checks of `sharded_checks`, on the first `size` of four ranks."""
    for rank in range(size):
        path = folder / f"{rank}-of-4.json"
        outcome = json.loads(path.read_text()).get(f"{name}-{size}", "not reached")
        assert outcome == "passed", f"rank {rank}: {outcome}"


def no_error(folder: Path) -> None:
    if (folder / "error").exists():
        pytest.fail((folder / "error").read_text())


def assert_same_training(run: Path, other: Path) -> None:
    a, b = (checkpoint.load(checkpoint.locate(path, "last")) for path in (run, other))
    for name, expected in a["model"].items():
        bound = {"rtol": 1e-5, "atol": 2e-6}
        if OF_NO_EFFECT.match(name):
            bound = {"rtol": 0.0, "atol": 2 * ranks.FMREC.lr * a["progress"]["global_step"]}
        torch.testing.assert_close(b["model"][name], expected, **bound)
    for number, held in a["optimizer"]["state"].items():
        for name, expected in held.items():
            found = b["optimizer"]["state"][number][name]
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-6)
    for one, two in zip(*(s["progress"]["history"] for s in (a, b)), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=2e-6)
        assert one.get("validation") == two.get("validation")
    for name in ("best", "evaluations", "without_improvement", "stopped"):
        assert a["progress"][name] == b["progress"][name], name
    results = [json.loads((path / "result.json").read_text()) for path in (run, other)]
    assert results[0] == results[1]


@pytest.mark.parametrize(("model", "size"), RUNS)
def test_runs_are_those_of_one_process(folder, model, size):
    """Losses after every step, parameters, moments, evaluation, early stopping and the result;
    with a last batch of one sample, so that most ranks have none."""
    no_error(folder)
    one, several = (folder / at / model for at in ("whole", f"on-{size}"))
    steps = [json.loads((path / "steps.json").read_text()) for path in (one, several)]
    assert len(steps[0]) == len(steps[1]) == sharded_checks.STEPS[model]
    for a, b in zip(*steps, strict=True):
        assert list(a.values()) == pytest.approx(list(b.values()), rel=2e-6)
    assert_same_training(one, several)


def test_a_run_goes_on_on_other_ranks_sharded_or_not(folder, tmp_path):
    no_error(folder)
    assert_same_training(folder / "whole" / "fmrec", folder / "handed-on")
    # What two ranks wrote sharded goes on in one process, from the single-file form too.
    exported = tmp_path / "exported"
    checkpoint.export(folder / "on-2" / "fmrec", exported)
    longer = ranks.FMREC.replace(epochs=4)
    trainers = [
        ranks.train(World(), run, longer, resume=True)
        for run in (folder / "whole" / "fmrec", exported)
    ]
    assert [trainer.progress.epoch for trainer in trainers] == [4, 4]
    assert_same_training(folder / "whole" / "fmrec", exported)


def test_one_rank_holds_all_items(tmp_path):
    trainer = ranks.train(World(), tmp_path / "run", ranks.FMREC, shard_items=True, max_steps=1)
    assert not trainer.shard_items


def test_benchmark_gives_the_losses_of_one_process(folder):
    from benchmarks import scale_plan, sharded

    no_error(folder)
    sizes = scale_plan.Sizes(**sharded_checks.SMALL)
    alone = sharded.measure(World(), sizes, steps=4)["losses"]
    for rank in range(4):
        several = json.loads((folder / f"benchmark-{rank}.json").read_text())
        assert several == pytest.approx(alone, rel=2e-6)


def test_measured_steps_become_a_record_and_a_table(folder, tmp_path, monkeypatch, capsys):
    """`python -m benchmarks.ranks --save`, with what two ranks found in the place of torchrun's."""
    from benchmarks import ranks as steps
    from benchmarks import scale_records

    no_error(folder)
    started = []

    def torchrun(command, check):
        ranks, out = command[command.index("--nproc-per-node") + 1], command[-3]
        started.append(ranks)
        found = json.loads((folder / "steps.json").read_text())
        found["small"]["ranks"] = int(ranks)
        Path(out).write_text(json.dumps(found))

    document = tmp_path / "scale.md"
    document.write_text("before\n{}old\n{}\nafter\n".format(*steps.MARKS))
    monkeypatch.setattr(subprocess, "run", torchrun)
    monkeypatch.setattr(scale_records, "RESULTS", tmp_path)
    monkeypatch.setattr(steps, "DOCUMENT", document)
    monkeypatch.setattr(sys, "argv", ["ranks", "--save"])
    steps.main()
    assert started == ["2", "4"]
    record = scale_records.latest("ranks")
    assert [one["ranks"] for one in record["found"]["small"]] == [2, 4]
    expected = "before\n{}{table}{}\nafter\n".format(*steps.MARKS, table=steps.table(record))
    assert document.read_text() == expected
    printed = [line for line in capsys.readouterr().out.splitlines() if "| small" in line]
    assert len(printed) == 4 and all(line in expected for line in printed)
    document.write_text("no place")
    with pytest.raises(SystemExit, match="has 0 places"):
        steps.write_table(record)


def test_tables_of_the_documentation_are_those_of_the_records():
    from benchmarks import ranks as steps
    from benchmarks import scale_records
    from benchmarks.scale_plan import DOCUMENT

    first, last = steps.MARKS
    text, record = DOCUMENT.read_text(), scale_records.latest("ranks")
    assert f"{first}{steps.table(record)}{last}" in text
    assert "\npython -m benchmarks.ranks --large --save\n" in text
    for size in (1, 4):
        large = scale_records.latest(f"sharded-4000000-on-{size}")
        assert len(large["ranks"]) == size and large["sizes"]["items"] == 4_000_000
        for one in large["ranks"]:
            assert sum(one["tensors"].values()) == 8_256_000_000 / size
            assert one["losses"] == pytest.approx(large["ranks"][0]["losses"], rel=1e-6)


def test_predicted_steps():
    from benchmarks.scale_plan import Rates, Sizes

    sizes, rates = Sizes(1000), Rates(step=1.0, update=0.07, link=1e9, latency=1e-3)
    for spread in (False, True):
        assert sizes.predicted_seconds(rates, 1, spread) == pytest.approx(1.0)
        assert sizes.exchange_seconds(rates, 1, spread) == 0
    # 36 bytes a parameter go by where Adam's are 28: 0.09 s, and 0.91 s of rows.
    sent = sizes.data_parallel_bytes(4) + 0.75 * (8 * 512 + 2 * 8 * 4)
    assert sizes.predicted_seconds(rates, 4, False) == pytest.approx(
        0.91 / 4 + 0.09 + sent / 1e9 + 3e-3
    )
    tables, rest = sizes.table_parameters, sizes.other_parameters
    held = (tables / 4 + rest) / (tables + rest)
    assert sizes.predicted_seconds(rates, 4, True) == pytest.approx(
        0.91 / 4 + 0.09 * held + sizes.sharded_bytes(4, 8) / 1e9 + 14e-3
    )


def test_commands_of_the_documentation(tmp_path):
    """Under torchrun; the benchmark's own command runs above, at this size."""
    text = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    section = text.split("\n## Item tables over ranks\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(compile(block, "docs/scale.md", "exec"), {})
    assert ["benchmarks.sharded" in line for line in lines] == [False, True, True]
    data, rows = ranks.dataset(), ["user,item,timestamp"]
    for user in range(data.num_users):
        rows += [f"{user},{item},{at}" for at, item in enumerate(data.history(user).tolist())]
    (tmp_path / "ratings.csv").write_text("\n".join(rows) + "\n")
    small = "--hidden_size 8 --max_len 5 --num_blocks 2 --num_heads 2 --last 1 --sample_N 2"
    small += " --decoder_dims [24,40] --batch_size 64"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *lines[0].split()[1:], *small.split()],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    state = checkpoint.load(checkpoint.locate(tmp_path / "runs" / "spread", "last"))
    assert state["progress"]["epoch"] == 2
    assert checkpoint.build_model(state).item_num == data.item_num
