"""fmrec-fast steps: what fewer sampling steps cost, as a table, a file and a picture."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from fmrec_fast import FMRecConfig, FMRecommender, checkpoint, cli, sample, use_backend
from fmrec_fast import steps as steps_module
from fmrec_fast.data import Dataset, EvaluationSamples, synthetic_dataset
from fmrec_fast.evaluation import evaluate
from fmrec_fast.steps import draw, flops, overlap, study, table

SETTINGS = {
    "hidden_size": 16,
    "max_len": 6,
    "num_blocks": 2,
    "last": 1,
    "decoder_dims": [24, 40],
    "sample_N": 4,
    "batch_size": 128,
    "epochs": 1,
    "lambda_uncertainty": 0.2,
    "metric_ks": [5, 10],
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset():
    return synthetic_dataset(60, 30, 3, 8, seed=1)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    """A trained run; read only. Its data: 60 users, 30 items."""
    folder = tmp_path_factory.mktemp("steps")
    lines = ["user,item,timestamp"]
    for user in range(dataset.num_users):
        lines += [f"u{user:02},i{item:02},{at}" for at, item in enumerate(dataset.history(user))]
    (folder / "data.csv").write_text("\n".join(lines) + "\n")
    flags = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
    assert cli.main(["train", str(folder / "data.csv"), "--out", str(folder / "run"), *flags]) == 0
    return folder / "run"


@pytest.fixture
def model(run):
    return checkpoint.build_model(checkpoint.load(checkpoint.locate(run)))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(steps_module, "SECONDS", 0.0)


def test_the_study_is_what_evaluation_finds(model, dataset, quick):
    samples = EvaluationSamples(dataset, "test", 6)
    done = []
    found = study(model, samples, steps=[3, 1], ks=[1, 5], seed=4, latencies=[1, 7],
                  progress=done.append)  # fmt: skip
    assert (found.reference, found.users, found.top) == (3, 60, 20)
    assert sum(done) == 3 * 60
    assert [row.steps for row in found.rows] == [1, 3]
    for row in found.rows:
        expected = evaluate(model, dataset, "test", ks=[1, 5], steps=row.steps, seeds=[4]).mean
        assert set(row.metrics) == {"HR@1", "HR@5", "NDCG@1", "NDCG@5"}
        assert row.metrics == pytest.approx({k: expected[k] for k in row.metrics})
        assert set(row.latency_s) == {1, 7} and min(row.latency_s.values()) > 0

    def top(steps, seed):
        sequence, _ = samples.batch(torch.arange(60))
        rep = sample(model, sequence, steps=steps, seed=seed, rows=samples.users)
        with torch.no_grad():
            scores = rep @ model.item_embeddings.weight.T
        return [set((row[1:].topk(20).indices + 1).tolist()) for row in scores]

    def shared(a, b):
        return sum(len(x & y) for x, y in zip(a, b)) / (60 * 20) * 100

    reference = top(3, 4)
    assert found.rows[0].overlap == pytest.approx(shared(top(1, 4), reference))
    assert found.rows[1].overlap == 100
    assert found.noise_floor == pytest.approx(shared(top(3, 5), reference))
    assert found.noise_floor < 100 and found.rows[0].overlap < 100  # lam is large here


def test_users_are_drawn_once_for_all(model, dataset, quick):
    samples = EvaluationSamples(dataset, "test", 6)
    found = [study(model, samples, steps=[2], users=n, latencies=[]) for n in (7, 7, 60, None, 99)]
    assert [s.users for s in found] == [7, 7, 60, 60, 60]
    assert found[0] == found[1] and found[2] == found[3] == found[4]


def test_flops_are_those_that_are_counted(model):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # Whether PyTorch's fused attention on a CPU is visible to the counter depends on the version.
    with use_backend("reference"), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        counts = []
        for steps in (1, 3):
            counter = FlopCounterMode(display=False)
            with counter:
                rep = sample(model, torch.ones(8, 6, dtype=torch.int64), steps=steps)
                model.fm_rep_pre(rep)
            times = 2 * steps * (16 * 64 + 64 * 16)  # the time embeddings, the same for all rows
            counts.append((counter.get_total_flops() - times) / 8)
    assert counts == [flops(model.config, 1), flops(model.config, 3)]
    paper = FMRecConfig(item_num=12102)
    assert flops(paper, 30) / 30 == pytest.approx(66.5e6, rel=0.01)


def test_overlap():
    a = torch.tensor([[1, 2, 3], [4, 5, 6]])
    assert overlap(a, a.flip(1)) == 100
    assert overlap(a, torch.tensor([[7, 1, 8], [6, 5, 4]])) == pytest.approx(100 * 4 / 6)


def test_the_command_prints_writes_and_draws(run, tmp_path, capsys, quick):
    out, plot = tmp_path / "deep" / "steps.json", tmp_path / "deep" / "steps.png"
    argv = ["steps", str(run), str(run.parent / "data.csv"), "--steps", "[1,2,4]", "--users", "20"]
    assert cli.main([*argv, "--out", str(out), "--plot", str(plot), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    facts = json.loads(out.read_text())
    assert facts["reference"] == 4 and facts["users"] == 20 and facts["split"] == "test"
    assert [row["steps"] for row in facts["rows"]] == [1, 2, 4]
    assert facts["rows"][-1]["overlap"] == 100
    metrics = set(facts["rows"][0]["metrics"])
    assert metrics == {"HR@5", "HR@10", "NDCG@5", "NDCG@10"}  # the run's K
    assert set(facts["rows"][0]["latency_s"]) == {"1", "512"}
    for row in facts["rows"]:
        (line,) = (text for text in printed.splitlines() if text.split()[0] == str(row["steps"])
                   and len(text.split()) == 9)  # fmt: skip
        assert line.split()[1:6] == [
            *(f"{value:.3f}" for value in row["metrics"].values()), f"{row['overlap']:.2f}",
        ]  # fmt: skip
    assert "noise floor" in printed
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_runs_own_dataset_is_the_default(run, capsys, quick):
    assert cli.main(["steps", str(run), "--steps", "[1]", "--ks", "[3]", "--split", "val"]) == 0
    assert "HR@3" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--steps", "[]"], r"steps must be different numbers of at least 1, got []"),
        (["--steps", "[3,0]"], "got [3, 0]"),
        (["--steps", "[3,3]"], "got [3, 3]"),
        (["--users", "0"], "--users must be at least 1, got 0"),
        (["--plot", "steps.txt"], "--plot must end in one of"),
        (["--ks", "[0]"], "ks must be positive, got [0]"),
        (["no-such-file.csv"], "no-such-file.csv"),
    ],
)
def test_mistakes_are_named(run, capsys, flags, message, quick):
    assert cli.main(["steps", str(run), *flags]) == 1
    assert message in capsys.readouterr().err


def test_a_plot_needs_matplotlib(run, capsys, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name)
    )
    assert cli.main(["steps", str(run), "--plot", "steps.png"]) == 1
    assert "pip install 'fmrec_fast[bench]'" in capsys.readouterr().err


def test_bad_arguments(model, dataset):
    samples = EvaluationSamples(dataset, "test", 6)
    with pytest.raises(ValueError, match="users must be at least 1, got 0"):
        study(model, samples, users=0)
    nobody = EvaluationSamples(Dataset.from_histories([[1]], item_ids=list(range(30))), "test", 6)
    with pytest.raises(ValueError, match="there is no user to evaluate"):
        study(model, nobody, steps=[1])


def test_table_and_picture_of_a_fresh_model(dataset, tmp_path, quick):
    model = FMRecommender.from_config(FMRecConfig(item_num=31, hidden_size=8, max_len=6)).eval()
    samples = EvaluationSamples(dataset, "test", 6)
    found = study(model, samples, steps=[1], latencies=[3], users=3)
    assert "B=3 ms" in table(found)
    draw(found, tmp_path / "one.svg")
    assert "<svg" in (tmp_path / "one.svg").read_text()
