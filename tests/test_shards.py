"""Directories of Parquet shards, and rows by their number, without Ray."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet
import pytest

from fmrec_fast import ray_engine
from fmrec_fast.data.users import (
    Histories,
    HistoryEncoder,
    ParquetFiles,
    Piece,
    RowReader,
    locate,
    of_size,
    pieces,
)
from fmrec_fast.shards import Counts, Output, Shards, WorkError


@pytest.fixture
def memory():
    """A file system that has no rename, as an object store; at memory://."""
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    found = fsspec.filesystem("memory")
    found.store.clear()
    yield pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(found))
    found.store.clear()


PLAN = {"run": "abc", "users_per_shard": 2}
ROWS = pa.table({"user": ["a", "a", "b"], "rank": pa.array([1, 2, 1], pa.int32())})


def write(shards: Shards, name: str) -> Counts:
    counts = Counts(rows=3, users=2, unknown_items=1)
    shards.write(name, [ROWS.slice(0, 2), ROWS.slice(2)], counts)
    return counts


def test_a_directory_appears_when_it_is_whole(tmp_path):
    output = Output(str(tmp_path / "out"))
    with output.begin(PLAN) as shards:
        assert shards.finished("part-0") is None
        first = write(shards, "part-0")
        assert shards.finished("part-0") == first and shards.names() == ["part-0"]
        second = write(shards, "part-1")
        assert not (tmp_path / "out").exists()
    result = output.publish({"part-1": second, "part-0": first})
    assert (result.rows, result.users, result.unknown_items) == (6, 4, 2)
    assert result.shards == ["part-0.parquet", "part-1.parquet"]
    names = ["_PLAN", "_SUCCESS", "part-0.parquet", "part-1.parquet"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    assert json.loads((tmp_path / "out/_SUCCESS").read_text())["rows"] == 6
    assert pa.parquet.read_table(tmp_path / "out/part-0.parquet").equals(ROWS)
    assert pa.parquet.ParquetFile(tmp_path / "out/part-0.parquet").num_row_groups == 2
    for resume in (False, True):
        with pytest.raises(ValueError, match="holds recommendations already"):
            Output(str(tmp_path / "out"), resume)


@pytest.mark.parametrize("store", ["local", "memory"])
def test_a_run_that_fails_can_go_on(store, tmp_path, memory):
    out = str(tmp_path / "out") if store == "local" else "memory://out"
    with pytest.raises(KeyError), Output(out).begin(PLAN) as shards:
        first = write(shards, "part-0")
        shards.begin("part-1").at("somewhere")
        raise KeyError
    with pytest.raises(ValueError, match=r"did not finish \(1 shards\): go on with --resume"):
        Output(out)
    with (
        pytest.raises(ValueError, match="begun with run = 'abc', got 'xyz'"),
        Output(out, resume=True).begin(PLAN | {"run": "xyz"}),
    ):
        pass
    output = Output(out, resume=True)
    assert output.planned() == PLAN
    with output.begin(PLAN) as shards:
        assert shards.finished("part-0") == first
        attempt = shards.begin("part-1")
        attempt.at("here")
        second = write(shards, "part-1")
        attempt.end()
    with pytest.raises(RuntimeError, match=r"2 shards of 3; missing are \['part-2'\]"):
        output.publish({"part-0": first, "part-1": second, "part-2": second})
    assert output.publish({"part-0": first, "part-1": second}).users == 4
    with pytest.raises(ValueError, match="holds recommendations already"):
        Output(out)


@pytest.mark.parametrize("store", ["local", "memory"])
def test_a_run_that_fails_before_its_first_shard_leaves_nothing(store, tmp_path, memory):
    out = str(tmp_path / "out") if store == "local" else "memory://out"
    with pytest.raises(KeyError), Output(out).begin(PLAN) as shards:
        shards.begin("part-0").at("somewhere")
        raise KeyError
    assert list(tmp_path.iterdir()) == []
    assert Output(out).planned() is None


def test_directories_of_others_are_left_alone(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    (tmp_path / "new.unfinished").mkdir()
    (tmp_path / "new.unfinished/thesis.tex").write_text("")
    for name, message in (
        ("file", "is a file; expected a new directory"),
        ("full", "is not empty .1 entries, such as 'thesis.tex'"),
        ("new", "new.unfinished, where --out .* is not empty"),
    ):
        for resume in (False, True):
            with pytest.raises(ValueError, match=message):
                Output(str(tmp_path / name), resume)


def test_attempts_are_bounded(tmp_path):
    shards = Shards(pyarrow.fs.LocalFileSystem(), str(tmp_path), 2)
    for place in ("the first users", "the second"):
        attempt = shards.begin("part-0")
        attempt.at("the start")
        attempt.at(place)
    with pytest.raises(WorkError, match=r"2 workers died, one after the other, at the (first|sec)"):
        shards.begin("part-0")
    shards.begin("part-1").at("elsewhere")
    # Who comes to the end did not die, and whoever else was at it does not matter.
    attempt.end()
    attempt.end()
    shards.begin("part-0")


def test_a_damaged_shard_is_not_finished(tmp_path):
    shards = Shards(pyarrow.fs.LocalFileSystem(), str(tmp_path), 2)
    write(shards, "part-0")
    path = tmp_path / "part-0.parquet"
    path.write_bytes(path.read_bytes()[:-10])
    assert shards.finished("part-0") is None
    pa.parquet.write_table(ROWS, path)
    assert shards.finished("part-0") is None
    with pytest.raises(ValueError, match="part-0: columns of several types"):
        shards.write("part-0", [ROWS, pa.table({"user": [1], "rank": [1]})], Counts())


@pytest.fixture
def files(tmp_path):
    """Three files, of row groups of 1 to 9000 rows, one of them empty."""
    at = 0
    for name, rows, group in (("a", 25, 10), ("b", 0, 10), ("c", 20_000, 9000)):
        values = pa.table({"at": np.arange(at, at + rows), "other": ["x"] * rows})
        pa.parquet.write_table(values, tmp_path / f"{name}.parquet", row_group_size=group)
        at += rows
    return ParquetFiles(locate(str(tmp_path)))


def test_rows_by_their_number(files, monkeypatch):
    opened = []
    original = pa.parquet.ParquetFile.iter_batches

    def iter_batches(self, *args, **kwargs):
        opened.append(kwargs["row_groups"])
        return original(self, *args, **kwargs)

    found = pieces(files)
    assert [piece.rows for piece in found if piece.rows] == [10, 10, 5, 9000, 9000, 2000]
    assert found[-1] == Piece(files.location.paths[2], 2, 18_000, 18_025, 2000)
    monkeypatch.setattr(pa.parquet.ParquetFile, "iter_batches", iter_batches)
    reader = RowReader(found, files.location.filesystem, ("at",))

    def read(first: int, last: int) -> list[int]:
        tables = list(reader(first, last))
        assert all(table.column_names == ["at"] for table in tables)
        return [value for table in tables for value in table["at"].to_pylist()]

    spans = [
        (0, 3),
        (3, 3),
        (3, 12),
        (12, 12),
        (20, 40),
        (40, 9000),
        (9100, 9101),
        (17_000, 20_025),
    ]
    for first, last in spans:
        assert read(first, last) == list(range(first, last)), (first, last)
    # In rising order no group was opened twice; back, one is.
    assert len(opened) == 6
    for first, last in ((19_000, 19_001), (24, 26), (0, 20_025), (5, 6), (6, 7), (6, 7)):
        assert read(first, last) == list(range(first, last)), (first, last)
    # A reader that is left in the middle.
    next(reader(100, 5000))
    assert read(200, 300) == list(range(200, 300))


def test_rows_of_a_damaged_file(files):
    found = pieces(files)
    path = files.location.paths[2]
    with open(path, "r+b") as file:
        file.seek(30)
        file.write(b"\xff" * 400)
    reader = RowReader(found, files.location.filesystem, ("at",))
    assert sum(table.num_rows for table in reader(0, 25)) == 25
    for _ in range(2):
        with pytest.raises(ValueError, match=r"c\.parquet: not a readable Parquet file"):
            list(reader(0, 26))


def test_tables_of_a_size():
    numbers = pa.table({"at": range(23)})
    cut = [numbers.slice(0, 5), numbers.slice(5, 0), numbers.slice(5, 14), numbers.slice(19)]
    found = list(of_size(cut, 6))
    assert [table.num_rows for table in found] == [6, 6, 6, 5]
    assert pa.concat_tables(found).equals(numbers)
    assert list(of_size([], 6)) == []
    texts = pa.table({"at": ["a", "b"]})
    assert [table.num_rows for table in of_size([numbers, texts, texts], 10)] == [10, 10, 3, 4]


def test_shards_of_rows():
    found = [Piece("x", at, 0, 7 * at, 7) for at in range(3)]
    ranges = [(one["first"], one["last"]) for one in ray_engine._ranges(found, 8)]
    assert ranges == [(0, 8), (8, 16), (16, 21)]
    assert ray_engine._ranges([], 8) == []
    # Rows, workers, batch, k: about 16 shards a worker, of 512 users or more, of a million rows.
    for rows, workers, batch, k, users in (
        (1_000_000, 2, 8192, 10, 31_744),
        (130_000, 2, 8192, 10, 4096),
        (20_000, 2, 8192, 10, 1024),
        (300, 2, 64, 10, 64),
        (10**9, 10, 8192, 10, 100_000),
        (10**9, 10, 8192, 2_000_000, 1),
    ):
        found = [Piece("x", 0, 0, 0, rows)]
        assert ray_engine._users_per_shard(found, workers, batch, k) == users


def test_tasks_of_a_bucket_do_not_depend_on_the_order_of_its_rows():
    rng = np.random.default_rng(0)
    users = pa.array([f"u{at}" for at in rng.integers(9, size=60)])
    columns = {"user": users, "item": rng.integers(30, size=60), "time": rng.integers(5, size=60)}
    table = pa.table(columns | {"position": range(60), "bucket": [3] * 60})
    tasks = ray_engine._tasks_of_bucket(table, 4)
    assert tasks["shard"].to_pylist() == [
        "part-000003-0000",
        "part-000003-0001",
        "part-000003-0002",
    ]
    shuffled = table.take(pa.array(rng.permutation(60)))
    assert ray_engine._tasks_of_bucket(shuffled, 4).equals(tasks)
    found = pa.concat_tables(ray_engine._histories(tasks.slice(at, 1)) for at in range(3))
    assert found["user"].to_pylist() == sorted(set(users.to_pylist()))
    expected: dict[str, list[int]] = {}
    for row in sorted(table.to_pylist(), key=lambda row: (row["time"], row["position"])):
        expected.setdefault(row["user"], []).append(row["item"])
    assert dict(zip(found["user"].to_pylist(), found["item"].to_pylist())) == expected


@pytest.mark.parametrize("kind", [RuntimeError, OSError, MemoryError])
def test_a_worker_says_at_which_users_it_failed(kind, tmp_path):
    def recommend(histories: Histories) -> pa.Table:
        if "u5" in histories.users.to_pylist():
            raise kind("a kernel\nfailed")
        return ROWS

    worker = object.__new__(ray_engine._Worker)
    worker._encode = HistoryEncoder([7, 8], "user", "item", "skip")
    worker._recommend, worker._batch = recommend, 2
    worker._shards = Shards(pyarrow.fs.LocalFileSystem(), str(tmp_path), 2)
    users = pa.table({"user": [f"u{at}" for at in range(7)], "item": [[7], [8, 1], *[[7]] * 5]})
    with pytest.raises(WorkError) as raised:
        worker._write("part-0", iter([users]))
    place = "the 2 users 'u4' to 'u5' of part-0"
    assert str(raised.value) == f"at {place}: {kind.__name__}: a kernel failed"
    assert worker._shards.names() == []
    counts = worker._write("part-0", iter([users.slice(0, 3)]))
    assert counts == Counts(rows=6, users=4, unknown_items=1) == worker._shards.finished("part-0")


def test_benchmark_compares_rows_and_separates_the_start(tmp_path):
    from benchmarks import ray_recommend

    assert ray_recommend.write_users(tmp_path / "users.parquet", 30, 40, 50) > 60
    count = ray_recommend.K * 30
    rows = {
        "user": [f"user-{at // ray_recommend.K}" for at in range(count)],
        "rank": pa.array([at % ray_recommend.K + 1 for at in range(count)], pa.int32()),
        "item": list(range(count)),
        "score": pa.array(np.linspace(1, 2, count), pa.float32()),
    }
    table = pa.table(rows)

    def put(other: pa.Table) -> None:
        pa.parquet.write_table(table, tmp_path / "local.parquet")
        (tmp_path / "ray").mkdir(exist_ok=True)
        pa.parquet.write_table(other.slice(0, 70), tmp_path / "ray/1.parquet")
        pa.parquet.write_table(other.slice(70), tmp_path / "ray/0.parquet")

    put(table)
    ray_recommend.compare(tmp_path, 30)
    assert [path.name for path in tmp_path.iterdir()] == ["users.parquet"]
    swapped = table.set_column(2, "item", pa.array([1, 0, *range(2, count)]))
    for wrong in (swapped, table.slice(1), pa.concat_tables([table, table.slice(0, 1)])):
        put(wrong)
        with pytest.raises(ValueError, match="the engines disagree"):
            ray_recommend.compare(tmp_path, 30)
    found = ray_recommend.summary({100: [3.0], 1000: [21.0, 4.0, 12.0]})
    assert found == pytest.approx(
        {"users_per_s": 1000 / 12, "running_users_per_s": 100, "start_s": 2}
    )
    case = {"name": "x", "users": 1000, "local": found, "ray": found}
    assert "| 83 users/s | 83 users/s | 1.00 | 100 users/s |" in ray_recommend.table([case])
