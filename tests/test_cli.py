"""The command line, as its users meet it: files in, files and messages out."""

import csv
import json
import pickle
import random
import re
from pathlib import Path

import pyarrow.csv
import pyarrow.parquet
import pytest
import torch

import fmrec_fast
from fmrec_fast import FMRecConfig, checkpoint, cli, demo, recommend
from fmrec_fast.bulk import user_rows
from fmrec_fast.cli import main
from fmrec_fast.data import Dataset, read_dataset, synthetic_dataset
from fmrec_fast.evaluation import evaluate

SETTINGS = {
    "hidden_size": 16,
    "max_len": 6,
    "num_blocks": 2,
    "last": 1,
    "decoder_dims": [24, 40],
    "sample_N": 2,
    "batch_size": 128,
    "epochs": 2,
    "eval_interval": 1,
    "lambda_uncertainty": 0.2,
}
FLAGS = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_csv(path: Path, rows: list[tuple]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("user", "item", "timestamp"), *rows])
    return path


def rows_of(dataset: Dataset) -> list[tuple]:
    return [
        (f"u{user:03}", f"item-{item}", 100 + at)
        for user in range(dataset.num_users)
        for at, item in enumerate(dataset.history(user).tolist())
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """60 users, 30 items, ids that are not numbers."""
    dataset = synthetic_dataset(60, 30, 3, 8, seed=1)
    return write_csv(tmp_path_factory.mktemp("data") / "data.csv", rows_of(dataset))


@pytest.fixture(scope="module")
def run(data) -> Path:
    """A trained run; read only."""
    out = data.parent / "run"
    assert main(["train", str(data), "--out", str(out), *FLAGS]) == 0
    return out


@pytest.fixture
def model(run):
    return checkpoint.build_model(checkpoint.load(checkpoint.locate(run)))


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with this status; gives its message."""

    def call(*argv: str, status: int = 1) -> str:
        capsys.readouterr()
        try:
            found = main([str(part) for part in argv])
        except SystemExit as stop:
            found = stop.code
        captured = capsys.readouterr()
        assert found == status, captured.err
        assert "Traceback" not in captured.err
        assert status == 2 or "fmrec-fast: " in captured.err
        return captured.err

    return call


def table(out: str) -> dict[str, list[float]]:
    """The printed metrics, by name."""
    found = re.findall(r"^((?:HR|NDCG|MRR)@\d+) +([\d. ]+)$", out, re.MULTILINE)
    return {name: [float(value) for value in values.split()] for name, values in found}


def rows(path: Path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    reader = pyarrow.csv.read_csv if path.suffix == ".csv" else pyarrow.parquet.read_table
    return reader(path).to_pylist()


# ------------------------------------------------------------------------------------- training


def test_train_leaves_a_run(run, data):
    names = {path.name for path in run.iterdir()}
    assert {"last.json", "best.json", "checkpoints", "metrics.jsonl", "result.json"} <= names
    state = checkpoint.load(checkpoint.locate(run))
    assert state["config"] == FMRecConfig(item_num=31, **SETTINGS).to_dict()
    assert state["source"] == {"path": str(data)}
    assert state["item_ids"] == sorted(f"item-{i}" for i in range(1, 31))


def test_train_writes_tensorboard_events(run):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for name in ("total", "flow", "cross_entropy", "reconstruction"):
        assert [(e.step, e.value) for e in events.Scalars(f"loss/{name}")] == [
            (row["epoch"], pytest.approx(row["loss"][name])) for row in history
        ]
    (found,) = events.Scalars("validation/NDCG@10")
    assert found.step == 1
    assert found.value == pytest.approx(history[1]["validation"]["NDCG@10"])


def test_train_prints_the_test_metrics(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", str(data), "--out", str(out), *FLAGS, "--epochs", "1"]) == 0
    printed = capsys.readouterr()
    assert "test, 60 users:" in printed.out
    result = json.loads((out / "result.json").read_text())
    assert table(printed.out) == {
        k: [pytest.approx(v, abs=1e-4)] for k, v in result["test"].items()
    }
    assert "60 users, 30 items" in printed.err, "what was read"
    assert re.search(r"epoch 0: loss \d", printed.err)


def test_progress_counts_samples_also_after_resuming(data, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total, initial=0, desc="", **_):
            self.total, self.initial, self.desc, self.done = total, initial, desc, initial
            bars.append(self)

        def update(self, count):
            self.done += count

        def set_postfix(self, *_, **__): ...

        def close(self): ...

    monkeypatch.setattr("tqdm.tqdm", Bar)
    dataset = read_dataset(data)
    samples = sum(max(n - 3, 0) for n in (dataset.offsets[1:] - dataset.offsets[:-1]).tolist())
    assert samples % 128, "a short last batch"
    command = [
        "train",
        str(data),
        "--out",
        str(tmp_path / "run"),
        *FLAGS,
        "--checkpoint_steps",
        "1",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(Bar, "update", lambda self, n: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(command) == 130
    assert [(bar.initial, bar.total) for bar in bars] == [(0, samples)]

    def interrupt(self, *_, **__):
        if self.done >= 128:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Bar, "set_postfix", interrupt)
        assert main([*command, "--resume"]) == 130
    del bars[:]
    assert main([*command, "--resume"]) == 0
    assert [(bar.desc, bar.initial, bar.total) for bar in bars] == [
        ("epoch 0", 128, samples),
        ("epoch 1", 0, samples),
        ("validation", 0, 60),
        ("test", 0, 60),
    ]
    assert all(bar.done == bar.total for bar in bars)


def test_resume_and_refusal(run, data, fails, capsys, tmp_path):
    before = set(run.rglob("*"))
    message = fails("train", data, "--out", run, *FLAGS)
    assert "already holds a run; continue it with --resume" in message
    message = fails("train", data, "--out", run, *FLAGS, "--resume", "--lr", "0.5")
    assert "other settings: lr: 0.001 -> 0.5" in message
    assert before == set(run.rglob("*")), "a refused command leaves nothing behind"
    assert main(["train", str(data), "--out", str(run), *FLAGS, "--resume"]) == 0
    result = json.loads((run / "result.json").read_text())
    assert table(capsys.readouterr().out)["HR@5"] == [
        pytest.approx(result["test"]["HR@5"], abs=1e-4)
    ]
    dataset = synthetic_dataset(60, 25, 3, 8, seed=1)
    other = write_csv(tmp_path / "other.csv", rows_of(dataset))
    message = fails("train", other, "--out", run, *FLAGS, "--resume")
    assert "other items (30, now 25: 0 new, 5 gone, such as 'item-" in message


def test_yaml_and_the_precedence_of_flags(data, tmp_path, capsys):
    text = "".join(f"{name}: {value}\n" for name, value in SETTINGS.items())
    config = tmp_path / "config.yaml"
    config.write_text(text + "lr: 0.25\ngamma: 0.5\n")
    run = tmp_path / "run"
    command = ["train", str(data), "--out", str(run), "--config", str(config)]
    assert main([*command, "--lr", "0.125", "--epochs", "1", "--max_steps", "1"]) == 0
    found = checkpoint.load(checkpoint.locate(run))["config"]
    expected = SETTINGS | {"lr": 0.125, "gamma": 0.5, "epochs": 1, "item_num": 31}
    assert found == FMRecConfig(**expected).to_dict()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("hidden_sise: 32\n", "hidden_sise"),
        ("item_num: 32\n", "item_num"),
        ("hidden_size: wide\n", "hidden_size"),
        ("lr: [\n", "config"),
    ],
)
def test_yaml_mistakes_are_named(data, tmp_path, fails, text, named):
    (tmp_path / "config.yaml").write_text(text)
    config = ("--config", tmp_path / "config.yaml")
    message = fails("train", data, "--out", tmp_path / "run", *config, status=2)
    assert named in message.split("error:")[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "status", "named"),
    [
        (["--lrr", "3"], 2, "--lrr"),
        (["--lr", "fast"], 2, '"lr"'),
        (["--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["--lr", "-1"], 1, "lr must be positive, got -1.0"),
        (["--early_stopping_metric", "NDCG@7"], 1, "early_stopping_metric must be 'any' or one of"),
        (["--user_column", "who"], 1, "no column 'who'"),
        (["--min_user", "99"], 1, "no user is left with min_user=99"),
        (["--device", "gpu"], 1, "--device gpu: "),
        (["--format", "xml"], 1, "format='xml'"),
    ],
)
def test_mistakes_in_flags_are_named(data, tmp_path, fails, flags, status, named):
    message = fails("train", data, "--out", tmp_path / "run", *flags, status=status)
    assert named in message.splitlines()[-1] or named in message.split("error:")[-1]
    assert not (tmp_path / "run").exists()


def test_other_mistakes(data, tmp_path, fails, monkeypatch):
    assert "required" in fails("train", data, status=2).split("error:")[1]
    assert "provided" in fails(status=2)
    assert "nowhere.csv: no such file" in fails("train", "nowhere.csv", "--out", tmp_path / "run")
    pairs = write_csv(tmp_path / "pairs.csv", [("a", "x", 1), ("a", "y", 2)])
    assert "no training sample" in fails("train", pairs, "--out", tmp_path / "run")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = fails("train", data, "--out", tmp_path / "run", "--device", "cuda")
    assert "--device cuda: torch" in message and "sees no CUDA device" in message
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = fails("train", data, "--out", tmp_path / "run", "--device", "cuda:2")
    assert "--device cuda:2: there are 2 CUDA devices" in message


def test_without_the_extra(monkeypatch, fails):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *a: None if name == "jsonargparse" else found(name, *a),
    )
    assert "pip install 'fmrec_fast[cli]'" in fails("env")


# ----------------------------------------------------------------------------------- evaluating


def test_evaluate_its_own_data(run, data, model, capsys, tmp_path):
    out = tmp_path / "new" / "metrics.json"
    command = ["evaluate", str(run), "--ks", "[3,50]", "--seeds", "2", "--json", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    expected = evaluate(model, read_dataset(data), ks=(3, 50), seeds=range(2))
    assert found["mean"] == expected.mean and found["spread"] == expected.spread
    assert found["per_seed"] == expected.per_seed and found["users"] == 60
    assert found["steps"] == 2 and found["split"] == "test" and found["averaging"] == "user"
    assert {"model", "+-", "popularity"} <= set(printed.split())
    for name, values in table(printed).items():
        assert values == pytest.approx(
            [found["mean"][name], found["spread"][name], found["popularity"][name]], abs=1e-4
        )
    assert len(table(printed)) == 6


def test_evaluate_options_reach_the_evaluation(run, data, model, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    flags = ["--split", "val", "--exclude_seen", "--averaging", "published", "--steps", "1"]
    assert main(["evaluate", str(run), *flags, "--json", str(out)]) == 0
    expected = evaluate(
        model, read_dataset(data), "val", exclude_seen=True, averaging="published", steps=1
    )
    assert json.loads(out.read_text())["mean"] == expected.mean
    state = checkpoint.load(checkpoint.locate(run, "last"))
    assert main(["evaluate", str(run), "--checkpoint", "last", "--json", str(out)]) == 0
    last = evaluate(checkpoint.build_model(state), read_dataset(data))
    assert json.loads(out.read_text())["mean"] == last.mean


def test_tied_padding_is_passed_on(run, data, model, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    assert main(["evaluate", str(run), "--padding", "tied", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["padding"] == "tied"
    assert found["mean"] == evaluate(model, read_dataset(data), padding="tied").mean
    capsys.readouterr()
    expected = recommend(model, [[7, 2]], 3, seed=0, padding="tied")
    names = read_dataset(data).item_ids
    flags = ["--history", f"{names[6]},{names[1]}", "-k", "3", "--padding", "tied"]
    assert main(["recommend", str(run), *flags]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[2] for line in lines] == [names[i - 1] for i in expected.ids[0].tolist()]
    assert [float(line[3]) for line in lines] == pytest.approx(
        expected.scores[0].tolist(), abs=2e-6
    )


def test_precision_is_passed_on(run, data, model, tmp_path, capsys):
    out = tmp_path / "metrics.json"
    assert main(["evaluate", str(run), "--precision", "bf16", "--json", str(out)]) == 0
    found = json.loads(out.read_text())
    assert found["precision"] == "bf16"
    assert found["mean"] == evaluate(model, read_dataset(data), precision="bf16").mean
    capsys.readouterr()
    expected = recommend(model, [[7, 2]], 3, seed=0, precision="bf16")
    names = read_dataset(data).item_ids
    flags = ["--history", f"{names[6]},{names[1]}", "-k", "3", "--precision", "bf16"]
    assert main(["recommend", str(run), *flags]) == 0
    scores = [float(line.split("\t")[3]) for line in capsys.readouterr().out.splitlines()]
    assert scores == pytest.approx(expected.scores[0].tolist(), abs=2e-6)


def test_evaluate_the_same_items_in_another_order(run, data, tmp_path, capsys):
    """Numbered differently, read from another format: the same users, so the same metrics."""
    assert main(["evaluate", str(run)]) == 0
    expected = capsys.readouterr().out
    dataset = read_dataset(data)
    numbers = list(range(1, 31))
    random.Random(0).shuffle(numbers)
    smap = dict(zip(dataset.item_ids, numbers, strict=True))
    renumbered = [
        [smap[dataset.item_ids[item - 1]] for item in dataset.history(user).tolist()]
        for user in range(dataset.num_users)
    ]
    content = {
        "train": {user: history[:-2] for user, history in enumerate(renumbered)},
        "val": {user: history[-2:-1] for user, history in enumerate(renumbered)},
        "test": {user: history[-1:] for user, history in enumerate(renumbered)},
        "smap": smap,
    }
    with open(tmp_path / "dataset.pkl", "wb") as file:
        pickle.dump(content, file)
    assert main(["evaluate", str(run), str(tmp_path / "dataset.pkl")]) == 0
    assert capsys.readouterr().out == expected


def test_evaluate_other_users(run, data, model, tmp_path, capsys):
    """A file with some of the items only."""
    history = [5, 9, 9, 2, 14, 3]
    path = write_csv(tmp_path / "some.csv", [("z", f"item-{i}", t) for t, i in enumerate(history)])
    assert main(["evaluate", str(run), str(path), "--ks", "[30]"]) == 0
    index = read_dataset(data).item_index
    known = [index[f"item-{i}"] for i in history]
    one = Dataset.from_histories([known], item_ids=read_dataset(data).item_ids)
    expected = evaluate(model, one, ks=(30,))
    assert table(capsys.readouterr().out)["MRR@30"][0] == pytest.approx(
        expected.mean["MRR@30"], abs=1e-4
    )


def test_evaluate_refuses(run, data, tmp_path, fails):
    path = write_csv(tmp_path / "new.csv", [("z", f"item-{i}", i) for i in (1, 2, 777, 3)])
    message = fails("evaluate", run, path)
    assert "unknown item id 'item-777' (1 of 4 ids are unknown)" in message
    assert "--seeds must be at least 1, got 0" in fails("evaluate", run, "--seeds", "0")
    assert "ks must be positive, got [0]" in fails("evaluate", run, "--ks", "[0]")
    assert "steps must be an integer of at least 1" in fails("evaluate", run, "--steps", "0")
    assert "nowhere is not a directory" in fails("evaluate", tmp_path / "nowhere")
    assert "holds no best.json" in fails("evaluate", tmp_path)
    assert "train" in fails("evaluate", run, "--split", "train", status=2)


def test_a_dataset_that_changed_since_is_noticed(data, run, tmp_path, fails):
    copy = tmp_path / "data.csv"
    copy.write_bytes(data.read_bytes())
    out = tmp_path / "run"
    assert main(["train", str(copy), "--out", str(out), *FLAGS, "--max_steps", "1"]) == 0
    with open(copy, "a") as file:
        file.write("u000,item-new,999\n")
    for command in (("evaluate", out), ("recommend", out, "--all")):
        message = fails(*command)
        assert "no longer holds the items that the run was trained on (30 then, 31 now)" in message
    copy.unlink()
    assert "data.csv: no such file" in fails("evaluate", out)


def test_damaged_checkpoints_are_reported(run, tmp_path, fails):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    tensors = checkpoint.locate(tmp_path / "run") / checkpoint.TENSORS
    tensors.write_bytes(tensors.read_bytes()[:-100])
    for command in ("evaluate", ["recommend", "--all"]):
        name, *flags = [command] if isinstance(command, str) else command
        message = fails(name, tmp_path / "run", *flags)
        assert f"{tensors} is truncated or foreign" in message
        assert len(message.strip().splitlines()) == 1
    (tmp_path / "run" / "best.json").write_text("{}")
    assert "best.json: expected a 'checkpoint' name" in fails("evaluate", tmp_path / "run")


# --------------------------------------------------------------------------------- recommending


@pytest.mark.parametrize("suffix", [".parquet", ".csv", ".jsonl", None])
def test_recommend_for_all_users(run, data, model, tmp_path, capsys, suffix):
    flags = ["--all", "-k", "4", "--seed", "3"]
    if suffix is None:
        assert main(["recommend", str(run), *flags]) == 0
        lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        found = [
            {"user": user, "rank": int(rank), "item": item, "score": float(score)}
            for user, rank, item, score in lines
        ]
    else:
        out = tmp_path / "new" / f"best{suffix}"
        assert main(["recommend", str(run), *flags, "--out", str(out)]) == 0
        assert "240 rows for 60 users" in capsys.readouterr().err
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        found = rows(out)
    dataset = read_dataset(data)
    histories = [dataset.history(row).tolist() for row in range(60)]
    rows_of_users = torch.from_numpy(user_rows(dataset.user_ids))
    expected = recommend(model, histories, 4, seed=3, rows=rows_of_users)
    assert [row["user"] for row in found] == [f"u{u:03}" for u in range(60) for _ in range(4)]
    assert [row["rank"] for row in found] == [1, 2, 3, 4] * 60
    items = [dataset.item_ids[i - 1] for i in expected.ids.flatten().tolist()]
    assert [row["item"] for row in found] == items
    scores = expected.scores.flatten().tolist()
    assert [row["score"] for row in found] == pytest.approx(scores, abs=1e-5)


def test_recommend_leaves_out_seen_items(run, data, tmp_path):
    dataset = read_dataset(data)
    seen = {
        f"u{user:03}": {dataset.item_ids[i - 1] for i in dataset.history(user).tolist()}
        for user in range(60)
    }
    found = {}
    for flags in ((), ("--exclude_seen",)):
        out = tmp_path / f"best{len(flags)}.jsonl"
        command = ["recommend", str(run), "--all", "-k", "30", *flags, "--out", str(out)]
        assert main(command) == 0
        for row in rows(out):
            found.setdefault((row["user"], bool(flags)), []).append(row["item"])
    for user, known in seen.items():
        assert len(found[user, False]) == 30
        # Fewer than k are left, so there are fewer rows; their order stays.
        assert found[user, True] == [item for item in found[user, False] if item not in known]


def test_recommend_for_a_history(run, data, model, capsys):
    dataset = read_dataset(data)
    given = ["item-7", "item-30", "item-7", "item-2"]
    expected = recommend(model, [dataset.encode_items(given).tolist()], 3, seed=1, steps=1)
    flags = ["-k", "3", "--seed", "1", "--steps", "1"]
    assert main(["recommend", str(run), "--history", "item-7, item-30,item-7,item-2", *flags]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [["history", str(rank)] for rank in (1, 2, 3)]
    assert [line[2] for line in lines] == [
        dataset.item_ids[i - 1] for i in expected.ids[0].tolist()
    ]


def test_recommend_for_users_of_a_file(run, data, model, tmp_path, capsys):
    """Also users with a single interaction, and ones that training never saw; file order counts."""
    histories = {"amy": ["item-4"], "u001": ["item-9", "item-1"], "zoe": ["item-30"] * 9}
    lines = [(user, item) for user, items in histories.items() for item in items]
    random.Random(1).shuffle(lines)
    path = tmp_path / "users.csv"
    path.write_text("who,what\n" + "".join(f"{user},{item}\n" for user, item in lines))
    out = tmp_path / "best.parquet"
    columns = ["--user_column", "who", "--item_column", "what"]
    command = ["recommend", str(run), "--users", str(path), *columns, "-k", "2", "--out", str(out)]
    assert main(command) == 0
    dataset = read_dataset(data)
    in_file = {user: [item for who, item in lines if who == user] for user in histories}
    encoded = [dataset.encode_items(items).tolist() for items in in_file.values()]
    expected = recommend(model, encoded, 2, seed=0, rows=torch.from_numpy(user_rows(in_file)))
    found = rows(out)
    assert [row["user"] for row in found] == ["amy", "amy", "u001", "u001", "zoe", "zoe"]
    items = [dataset.item_ids[i - 1] for i in expected.ids.flatten().tolist()]
    assert [row["item"] for row in found] == items


def test_integer_ids_come_back_as_integers(tmp_path):
    dataset = synthetic_dataset(30, 12, 3, 8, seed=2)
    lines = [(1000 + u, 70 + i) for u in range(30) for i in dataset.history(u).tolist()]
    path = tmp_path / "data.csv"
    path.write_text("user,item\n" + "".join(f"{user},{item}\n" for user, item in lines))
    run = tmp_path / "run"
    assert main(["train", str(path), "--out", str(run), *FLAGS, "--max_steps", "1"]) == 0
    out = tmp_path / "best.parquet"
    assert main(["recommend", str(run), "--history", "71,75", "-k", "12", "--out", str(out)]) == 0
    assert sorted(row["item"] for row in rows(out)) == sorted({item for _, item in lines})
    assert main(["recommend", str(run), "--all", "-k", "1", "--out", str(out)]) == 0
    assert [row["user"] for row in rows(out)] == list(range(1000, 1030))


def test_recommend_refuses(run, data, tmp_path, fails):
    message = fails("recommend", run, "--history", "item-1,item-99")
    assert "unknown item id 'item-99' (1 of 2 ids are unknown)" in message
    assert "k must be in 1 .. 30 (number of items), got 31" in fails(
        "recommend", run, "--all", "-k", "31"
    )
    assert "got 0" in fails("recommend", run, "--history", "item-1", "-k", "0")
    assert "--history must list item ids" in fails("recommend", run, "--history", " , ")
    message = fails("recommend", run, "--all", "--out", tmp_path / "best.txt")
    assert "--out must end in one of" in message and "best.txt" in message
    assert list(tmp_path.iterdir()) == []
    assert "required" in fails("recommend", run, status=2)
    assert "not allowed with" in fails("recommend", run, "--all", "--history", "1", status=2)
    path = write_csv(tmp_path / "users.csv", [("z", "item-1", 1), ("z", "item-404", 2)])
    assert "unknown item id 'item-404'" in fails("recommend", run, "--users", path)


def test_a_backend_that_cannot_run_is_reported(run, fails, monkeypatch):
    monkeypatch.setenv("FMREC_FAST_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    message = fails("recommend", run, "--history", "item-1", "--device", "cpu")
    assert "backend 'triton' was asked for" in message and "tensors are on cpu" in message


# ---------------------------------------------------------------------------------- env and demo


def test_env(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"fmrec_fast: {fmrec_fast.__version__}" in text and "noise_fusion" in text
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["ops"]) == set(fmrec_fast.backend.OPS)


def test_version_and_help(capsys):
    for flag, text in (("--version", fmrec_fast.__version__), ("--help", "recommend")):
        with pytest.raises(SystemExit) as stop:
            main([flag])
        assert stop.value.code == 0
        assert text in capsys.readouterr().out
    for command in cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in FMRecConfig.__dataclass_fields__:
        assert (f"--{name} " in text) == (name != "item_num")
    assert "Euler steps of the sampler" in text, "the settings are described"


@pytest.fixture
def small_demo(monkeypatch):
    values = {"num_users": 40, "num_items": 20, "num_clusters": 2, "mean_length": 8, "seed": 0}
    monkeypatch.setattr(demo, "DATA", values)
    monkeypatch.setattr(demo, "CONFIG", FMRecConfig(**SETTINGS))


def test_demo(small_demo, tmp_path, capsys):
    out = tmp_path / "demo"
    for _ in range(2):  # it replaces its own earlier run
        assert main(["demo", "--out", str(out), "--epochs", "2"]) == 0
        text = capsys.readouterr().out
        for part in (
            "1. data",
            "2. train 2 epochs",
            "3. test on 40 users",
            "4. recommend",
            "5. speed",
        ):
            assert part in text
        numbers = r"( +\d+\.\d{3}){2} +\d+\.\d$"
        assert re.search(r"sample 40 users, \d steps" + numbers, text, re.MULTILINE), text
        assert re.search(r"train on \d+ samples" + numbers, text, re.MULTILINE), text
        assert {"model", "popularity"} <= set(text.split())
    assert json.loads((out / "result.json").read_text())["epochs"] == 2
    # What it names as the next step works, with the same metrics.
    seed = FMRecConfig().random_seed
    model = checkpoint.build_model(checkpoint.load(checkpoint.locate(out)))
    dataset = demo.dataset()
    result = json.loads((out / "result.json").read_text())["test"]
    assert evaluate(model, dataset, seeds=(seed,)).mean == result
    assert main(["evaluate", str(out)]) == 0


def test_demo_replaces_no_other_directory(small_demo, tmp_path, fails):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert "is not a run directory; name another" in fails("demo", "--out", tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_train_on_the_synthetic_data(small_demo, tmp_path, capsys):
    out = tmp_path / "run"
    flags = [*FLAGS, "--max_steps", "1"]
    assert main(["train", "synthetic", "--out", str(out), *flags]) == 0
    capsys.readouterr()
    assert main(["recommend", str(out), "--history", "1,2", "-k", "1"]) == 0
    assert capsys.readouterr().out.startswith("history\t1\t")


def test_weights_for_inference_recommend_and_evaluate_alike(run, data, tmp_path, capsys, fails):
    out = tmp_path / "weights"
    assert main(["export", str(run), str(out), "--inference"]) == 0
    shown = capsys.readouterr().out
    best = checkpoint.locate(out)
    assert shown.startswith(str(best)) and shown.strip().endswith("MB)")
    state = checkpoint.load(best)
    whole = checkpoint.load(checkpoint.locate(run))
    assert whole["model"].keys() - state["model"].keys() == {
        name for name in whole["model"] if "decoder" in name
    }
    assert str(data) not in (best / checkpoint.STATE).read_text()
    results = []
    for folder in (run, out):
        flags = ["--history", "item-3,item-7", "-k", "5", "--seed", "1", "--device", "cpu"]
        assert main(["recommend", str(folder), *flags]) == 0
        results.append(capsys.readouterr().out)
        assert main(["evaluate", str(folder), str(data), "--device", "cpu"]) == 0
        results.append(capsys.readouterr().out.replace(str(folder), ""))
    assert results[:2] == results[2:]
    assert "name one" in fails("evaluate", out)
    assert "exists" in fails("export", run, out, "--inference")
