"""Recommending for many users in one process, and exporting vectors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch

from fmrec_fast import checkpoint, recommend
from fmrec_fast.bulk import BulkRecommender, external_ids, user_rows
from fmrec_fast.cli import main
from fmrec_fast.data.users import Histories, HistoryEncoder, locate
from fmrec_fast.ops import item_topk
from fmrec_fast.tables import TableFile

NAMES = [f"i{at:02}" for at in range(60)]
HISTORIES = [[3], [5, 9, 5, 60], list(range(1, 40)), [7, 8], list(range(1, 13)), [60] * 20]
USERS = ["amy", "bob", "cy", "dee", "eve", "fay"]


@pytest.fixture
def model(small_model):
    return small_model(sample_N=2).eval()


@pytest.fixture
def run(model, tmp_path) -> Path:
    state = {"config": model.config.to_dict(), "kind": "fmrec", "source": None}
    state |= {"model": model.state_dict(), "item_ids": NAMES}
    checkpoint.save(tmp_path / "run", "last-0", "last", state)
    return tmp_path / "run"


def external(histories=HISTORIES) -> list[list[str]]:
    return [[NAMES[i - 1] for i in history] for history in histories]


def write(path: Path, users, histories, **options) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    pa.parquet.write_table(pa.table({"user": users, "history": histories}), path, **options)
    return path


def encoded(histories=HISTORIES, users=USERS) -> Histories:
    offsets = np.cumsum([0, *map(len, histories)])
    return Histories(pa.array(users), np.concatenate(histories), offsets)


def test_user_rows_are_pinned():
    """A change would change everybody's recommendations."""
    number, text, name = user_rows([12, "12", "amy"]).tolist()
    assert (number, text, name) == (
        -2075941137024451989,
        -2075941137024451989,
        -6111287233081807082,
    )


@pytest.mark.parametrize("padding", ["published", "tied"])
@pytest.mark.parametrize("exclude_seen", [False, True])
@pytest.mark.parametrize("k", [1, 7, 60])
def test_the_rows_are_those_of_recommend(model, padding, exclude_seen, k):
    options = {"exclude_seen": exclude_seen, "padding": padding, "seed": 4, "steps": 3}
    options["precision"] = "bf16" if k == 7 else "float32"
    found = BulkRecommender(model, NAMES, k, **options)(encoded())
    rows = torch.from_numpy(user_rows(USERS))
    best = recommend(model, HISTORIES, k, rows=rows, method="euler", **options)
    expected = [
        (user, rank + 1, NAMES[item - 1], score)
        for user, ids, scores in zip(USERS, best.ids.tolist(), best.scores.tolist())
        for rank, (item, score) in enumerate(zip(ids, scores))
        if score > -np.inf
    ]
    assert list(zip(*(column.to_pylist() for column in found.columns))) == expected


def test_batches_and_their_order_do_not_matter(model, monkeypatch):
    recommender = BulkRecommender(model, NAMES, 5, seed=4)
    expected = recommender(encoded()).to_pylist()
    order = [4, 2, 0, 5, 1, 3]
    monkeypatch.setattr("fmrec_fast.bulk.ROWS", 2)
    shuffled = encoded([HISTORIES[i] for i in order], [USERS[i] for i in order])
    found = recommender(shuffled).to_pylist()
    assert sorted(found, key=lambda row: (row["user"], row["rank"])) == expected


def test_a_backend_without_the_one_call(model):
    from fmrec_fast import use_backend

    expected = BulkRecommender(model, NAMES, 5, seed=4)(encoded())
    with use_backend("reference"):
        found = BulkRecommender(model, NAMES, 5, seed=4, exclude_seen=False)(encoded())
    assert found.select(["user", "rank", "item"]).equals(expected.select(["user", "rank", "item"]))


def test_nan_scores_are_an_error(model):
    with torch.no_grad():
        model.item_embeddings.weight[5] = torch.nan
    with pytest.raises(ValueError, match="scores of user 'amy' are NaN"):
        BulkRecommender(model, NAMES, 5)(encoded())


def test_no_users(model):
    empty = Histories(pa.array([], pa.string()), np.zeros(0, np.int64), np.zeros(1, np.int64))
    recommender = BulkRecommender(model, NAMES, 5)
    assert recommender(empty).num_rows == 0
    assert recommender.vectors(empty).shape == (0, 32)


def test_mixed_ids_are_text():
    assert external_ids([1, "a"]).to_pylist() == ["1", "a"]
    assert external_ids([2, 1]).type == pa.int64()


@pytest.mark.parametrize(
    ("users", "histories", "message"),
    [
        (["amy", None], [["i01"], ["i02"]], "user id is missing"),
        (["amy", "bob"], [["i01"], []], "user 'bob' has an empty history"),
        (["amy", "bob"], [["i01"], None], "user 'bob' has an empty history"),
        (["amy", "bob"], [["i01"], ["i02", None]], "user 'bob': the item id is missing"),
        (["amy", "bob"], [["i01"], ["i02", "x"]], "user 'bob': unknown item id 'x'"),
        (["amy", "bob"], [[1.0], [2.0, float("nan")]], "user 'bob': the item id is missing"),
        ([[1], [2]], [["i01"], ["i02"]], "the user column has type list"),
    ],
)
def test_bad_histories_are_named(users, histories, message):
    table = pa.table({"user": users, "history": histories})
    with pytest.raises(ValueError, match=message):
        HistoryEncoder(NAMES, "user", "history")(table)


def test_unknown_items_can_be_skipped():
    given = [["i01", "x", "i03"], ["x", "y"], [], ["i05"]]
    table = pa.table({"user": [1, 2, 3, 4], "history": given})
    found = HistoryEncoder(NAMES, "user", "history", "skip")(table)
    assert found.users.to_pylist() == [1, 4]
    assert found.items.tolist() == [2, 4, 6] and found.offsets.tolist() == [0, 2, 3]
    assert (found.unknown, found.without) == (3, 2)


def test_files_are_found(tmp_path):
    for name in ("a/1.parquet", "a/b/2.parquet", "a/_SUCCESS", "a/.x/3.parquet", "c.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    root = str(tmp_path)

    def found(place: str) -> list[str]:
        return [path.removeprefix(root) for path in locate(place).paths]

    assert found(f"{root}/a") == ["/a/1.parquet", "/a/b/2.parquet"]
    assert found(f"file://{root}/a/*.parquet") == found(f"{root}/a/?.parquet") == ["/a/1.parquet"]
    assert {"/a/1.parquet", "/a/b/2.parquet"} <= set(found(f"{root}/**/*.parquet"))
    assert not locate(f"{root}/c.csv").is_parquet
    with pytest.raises(FileNotFoundError, match="nowhere: no such file"):
        locate(f"{root}/nowhere")
    with pytest.raises(ValueError, match="gopher"):
        locate("gopher://x/y")


def test_histories_on_another_file_system(run, tmp_path, capsys):
    """A pattern, a file: URI, and fsspec's file system in memory give the same rows."""
    import fsspec

    for part in (slice(0, 3), slice(3, 6)):
        write(tmp_path / f"users/{part.start}.parquet", USERS[part], external()[part])
    memory = fsspec.filesystem("memory")
    for path in (tmp_path / "users").iterdir():
        memory.pipe_file(f"/users/{path.name}", path.read_bytes())
    found = []
    places = (f"{tmp_path}/users", f"file://{tmp_path}/users/*.parquet", "memory://users")
    for at, place in enumerate(places):
        out = tmp_path / f"{at}.jsonl"
        assert main(["recommend", str(run), "--users", place, "--out", str(out), "-k", "3"]) == 0
        found.append(out.read_text())
    assert found[0].count("\n") == 18 and len(set(found)) == 1


def test_interactions_in_several_files(run, tmp_path, capsys):
    rows = [(u, i) for u, h in zip(USERS, external()) for i in h]
    (tmp_path / "users").mkdir()
    for part, some in enumerate((rows[:30], rows[30:])):
        table = pa.table({"user": [u for u, _ in some], "item": [i for _, i in some]})
        pa.parquet.write_table(table, tmp_path / f"users/{part}.parquet")
    histories = write(tmp_path / "histories.parquet", USERS, external())
    found = []
    for at, place in enumerate((tmp_path / "users", histories)):
        out = tmp_path / f"{at}.csv"
        assert main(["recommend", str(run), "--users", str(place), "--out", str(out)]) == 0
        found.append(out.read_text())
    assert found[0] == found[1]


def test_mistakes_are_named(run, tmp_path, capsys):
    def fails(*argv) -> str:
        capsys.readouterr()
        assert main([str(part) for part in argv]) == 1
        return capsys.readouterr().err

    users = write(tmp_path / "users.parquet", USERS, external())
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.tex").write_text("")
    ray = ("--engine", "ray")
    assert "takes --users and --out" in fails("recommend", run, "--history", "i01", *ray)
    assert "takes --users and --out" in fails("recommend", run, "--users", users, *ray)
    message = fails("recommend", run, "--users", users, "--out", full, *ray)
    assert "is not empty (1 entries, such as 'thesis.tex'" in message
    (full / "_SUCCESS").write_text("")
    message = fails("recommend", run, "--users", users, "--out", full, *ray)
    assert "holds recommendations already" in message
    message = fails("recommend", run, "--users", users, "--out", users, *ray)
    assert "is a file; expected a new directory" in message
    message = fails("recommend", run, "--users", tmp_path / "*.pq", "--out", tmp_path / "x", *ray)
    assert "no such file" in message
    text = tmp_path / "users.csv"
    text.write_text("user,item\namy,i01\n")
    message = fails("recommend", run, "--users", text, "--out", tmp_path / "x", *ray)
    assert "--engine ray reads Parquet files" in message
    message = fails("recommend", run, "--users", users, "--item_column", "what")
    assert "no column 'what'" in message
    message = fails("recommend", run, "--users", users, "--user_column", "who")
    assert "no column 'who'" in message
    assert "--out must end in one of" in fails("recommend", run, "--users", users, "--out", full)
    message = fails("export-vectors", run, "--out", full)
    assert "exists already; expected a new or empty directory" in message


def test_a_table_that_fails_leaves_no_file(tmp_path):
    for suffix in (".parquet", ".csv", ".jsonl"):
        path = tmp_path / f"x{suffix}"
        with pytest.raises(RuntimeError), TableFile(path) as file:
            file.write(pa.table({"a": [1]}))
            raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_exported_vectors_give_the_recommendations(run, model, tmp_path, capsys):
    users = write(tmp_path / "users.parquet", USERS, external())
    out = tmp_path / "vectors"
    flags = ["--users", str(users), "--out", str(out), "--seed", "4"]
    assert main(["export-vectors", str(run), *flags]) == 0
    assert "60 item vectors and 6 query vectors of 32 channels" in capsys.readouterr().err
    items, queries = np.load(out / "items.npy"), np.load(out / "queries.npy", mmap_mode="r")
    assert items.shape == (60, 32) and queries.shape == (6, 32) and items.dtype == np.float32
    assert pa.parquet.read_table(out / "items.parquet")["item"].to_pylist() == NAMES
    assert pa.parquet.read_table(out / "queries.parquet")["user"].to_pylist() == USERS
    rows = torch.from_numpy(user_rows(USERS))
    expected = recommend(model, HISTORIES, 5, seed=4, rows=rows, method="euler")
    table = torch.from_numpy(items)
    scores, ids = item_topk(torch.from_numpy(np.array(queries)), table, 5)
    assert torch.equal(ids + 1, expected.ids)
    torch.testing.assert_close(scores, expected.scores, atol=1e-6, rtol=1e-6)


def test_other_commands_import_neither_ray_nor_fsspec_backends():
    code = "import sys, fmrec_fast.cli; fmrec_fast.cli.main(['env']); print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_recall_of_an_index_is_reported(run, tmp_path, capsys):
    pytest.importorskip("faiss", reason="faiss is not installed (extra [bench])")
    from benchmarks import index_recall

    users = [f"u{at}" for at in range(40)]
    write(tmp_path / "users.parquet", users, external([[1 + at] for at in range(40)]))
    out = tmp_path / "vectors"
    flags = ["--users", str(tmp_path / "users.parquet"), "--out", str(out)]
    assert main(["export-vectors", str(run), *flags]) == 0
    # Far more items than the run has, so that an index misses some.
    generator = np.random.default_rng(0)
    items = generator.standard_normal((3000, 32)).astype(np.float32)
    queries = np.load(out / "queries.npy")
    rows = index_recall.study(items, queries, 10, [1, 4, 3000])
    assert [row["index"] for row in rows] == ["exact", *["ivf"] * 3, *["hnsw"] * 3]
    ivf, hnsw = (
        [row["recall"] for row in rows if row["index"] == kind] for kind in ("ivf", "hnsw")
    )
    assert 0 < ivf[0] < ivf[1] < ivf[2] == 1.0, "all lists are probed at last"
    assert hnsw[0] <= hnsw[1] <= hnsw[2] and hnsw[2] > 0.9
    capsys.readouterr()
    index_recall.main([str(out), "-k", "5", "--efforts", "4", "--json", str(tmp_path / "j.json")])
    printed = capsys.readouterr().out
    assert "60 items, 40 queries, 32 channels, k = 5" in printed and "hnsw    4  recall" in printed
    assert (tmp_path / "j.json").exists()
