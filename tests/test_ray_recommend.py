"""Recommending by Ray Data: the same rows as in one process, also when a worker is killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import threading
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import torch

from fmrec_fast import FMRecConfig, FMRecommender, checkpoint, ray_engine, shards
from fmrec_fast.cli import main

ray = pytest.importorskip("ray", reason="ray is not installed (extra [dist])")
USERS, ITEMS = 300, 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run, and files of histories (several, of several row groups) and of interactions."""
    folder = tmp_path_factory.mktemp("ray")
    torch.manual_seed(0)
    config = FMRecConfig(
        item_num=ITEMS + 1, hidden_size=16, max_len=8, num_blocks=2, last=1, decoder_dims=(8, 8)
    )
    model = FMRecommender.from_config(config.replace(sample_N=2))
    names = [f"item-{i:02}" for i in range(ITEMS)]
    state = {"config": config.replace(sample_N=2).to_dict(), "kind": "fmrec", "source": None}
    state |= {"model": model.state_dict(), "item_ids": names}
    checkpoint.save(folder / "runs/mine", "last-0", "last", state)
    lengths = torch.randint(1, 15, (USERS,)).tolist()
    histories = [[names[i] for i in torch.randint(0, ITEMS, (n,)).tolist()] for n in lengths]
    users = [f"u{at}" for at in range(USERS)]
    (folder / "histories").mkdir()
    for part in range(3):
        rows = slice(100 * part, 100 * part + 100)
        table = pa.table({"user": users[rows], "history": histories[rows]})
        pa.parquet.write_table(table, folder / f"histories/{part}.parquet", row_group_size=40)
    (folder / "users").mkdir()
    # Shuffled over the files, with many ties, which the order of the files decides.
    rows = [(u, i, at // 3) for u, h in zip(users, histories) for at, i in enumerate(h)]
    rows = [rows[at] for at in torch.randperm(len(rows)).tolist()]
    half = len(rows) // 2
    for part, some in enumerate((rows[:half], rows[half:])):
        columns = dict(zip(("user_id", "item_id", "timestamp"), map(list, zip(*some))))
        path = folder / f"users/{part}.parquet"
        pa.parquet.write_table(pa.table(columns), path, row_group_size=500)
    return folder


@pytest.fixture(scope="module")
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def table(path: Path) -> pa.Table:
    found = pyarrow.dataset.dataset(path, format="parquet").to_table()
    return found.sort_by([("user", "ascending"), ("rank", "ascending")]).combine_chunks()


def call(folder: Path, users: str, out: str | Path, *flags: str) -> int:
    command = ["recommend", str(folder / "runs/mine"), "--users", users, "--out", str(out)]
    return main([*command, "-k", "5", "--device", "cpu", "--padding", "tied", *flags])


RAY = ("--engine", "ray", "--batch", "64")


def commands() -> list[list[str]]:
    """Those that docs/scale.md shows of this subject."""
    text = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    section = text.split("## Recommending for very many users\n")[1].split("\n## ")[0]
    found = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return [shlex.split(line) for block in found for line in block.splitlines()]


def test_the_documented_commands(cluster, folder, monkeypatch, capsys):
    """Here `users` are interactions, which Ray groups as one process does."""
    from benchmarks import index_recall

    monkeypatch.chdir(folder)
    ran = []
    for program, *rest in commands():
        if program == "fmrec-fast":
            assert main(rest) == 0, capsys.readouterr().err
            ran.append(rest[0])
        else:
            assert [program, *rest[:2]] == ["python", "-m", "benchmarks.index_recall"]
            index_recall.main(rest[2:])
            ran.append("index_recall")
    assert ran == ["recommend", "recommend", "export-vectors", "index_recall"]
    expected = table(folder / "recs.parquet")
    assert len(set(expected.column("user").to_pylist())) == USERS
    assert table(folder / "recs").equals(expected)
    assert "exact" in capsys.readouterr().out


def processes() -> dict[int, tuple[int, str]]:
    """pid -> (its parent, its title)"""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_text().strip("\0 ")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        found[int(folder.name)] = (parent, title)
    return found


def kill_a_worker(done: threading.Event, killed: list[int]) -> None:
    """SIGKILL for one of our workers in the middle of a batch, which Ray puts in its title."""
    while not killed and not done.is_set():
        time.sleep(0.02)
        running = processes()
        for pid, (parent, title) in running.items():
            ours = running.get(parent, (0, ""))[0] == os.getpid()
            if ours and "(_Worker)).submit" in title:
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                break


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the worker in /proc")
def test_a_killed_worker_loses_nothing(cluster, folder, tmp_path, capsys):
    users, slow = (folder / "histories").as_uri(), ("--steps", "400", "--exclude_seen")
    assert call(folder, users, tmp_path / "local.parquet", *slow) == 0
    done, killed, out = threading.Event(), [], tmp_path / "ray"
    thread = threading.Thread(target=kill_a_worker, args=(done, killed))
    thread.start()
    try:
        assert call(folder, users, out.as_uri(), *slow, *RAY) == 0
    finally:
        done.set()
        thread.join()
    assert killed, "no worker was found at work"
    expected = table(tmp_path / "local.parquet")
    assert expected.num_rows == 5 * USERS
    assert table(out).equals(expected)
    manifest = json.loads((out / "_SUCCESS").read_text())
    assert manifest["users"] == USERS and manifest["rows"] == 5 * USERS
    assert sorted(manifest["shards"]) == sorted(p.name for p in out.glob("*.parquet"))
    assert len(manifest["shards"]) == 5 and manifest["users_left_out"] == 0
    # One after the other they are the rows of one process, in its order.
    rows = pa.concat_tables(pa.parquet.read_table(path) for path in sorted(out.glob("*.parquet")))
    assert rows.equals(pa.parquet.read_table(tmp_path / "local.parquet"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["local.parquet", "ray"]


def killed_at(user: str) -> type:
    """A worker that is killed at a user; a class that Ray pickles whole."""

    class Killed(ray_engine._Worker):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            self._others = self._recommend
            self._recommend = self._look

        def _look(self, users):
            if user in users.users.to_pylist():
                os.kill(os.getpid(), signal.SIGKILL)
            return self._others(users)

    return Killed


def test_what_kills_again_and_again_ends_the_run_which_can_go_on(
    cluster, folder, tmp_path, monkeypatch, capsys
):
    def recommend(*flags: str) -> tuple[int, str]:
        capsys.readouterr()
        users, out = str(folder / "histories"), tmp_path / "ray"
        status = call(folder, users, out, *RAY, "--workers", "1", *flags)
        return status, capsys.readouterr().err

    unfinished = tmp_path / "ray.unfinished"
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "_Worker", killed_at("u130"))
        patch.setattr(shards, "DEATHS", 2)
        status, message = recommend()
    # User 130 is in the third shard of 64 users; the next may be done before that is tried again.
    place = "the 64 users 'u128' to 'u191' of part-000002"
    assert status == 1 and f"2 workers died, one after the other, at {place}" in message
    done = {path: path.stat().st_mtime_ns for path in unfinished.glob("*.parquet")}
    assert len(done) >= 2
    assert f"{len(done)} shards are in {unfinished}: --resume goes on from them" in message
    assert [path.name for path in tmp_path.iterdir()] == ["ray.unfinished"]

    status, message = recommend()
    assert status == 1 and "shards): go on with --resume, or remove" in message
    status, message = recommend("--resume", "--seed", "1")
    assert status == 1 and "was begun with options = " in message and "'seed': 1" in message
    status, message = recommend("--resume", "--batch", "32")
    assert status == 0 and f"1500 rows for {USERS} users in 5 shards" in message
    assert [path.name for path in tmp_path.iterdir()] == ["ray"]
    for path, written in done.items():
        assert (tmp_path / "ray" / path.name).stat().st_mtime_ns == written
    users = str(folder / "histories/*.parquet")
    assert call(folder, users, tmp_path / "local.parquet") == 0
    assert table(tmp_path / "ray").equals(table(tmp_path / "local.parquet"))


def test_what_is_wrong_with_the_data_is_said_here(cluster, folder, tmp_path, capsys):
    histories = [["item-01", "x"], ["x"], ["item-02"]]
    some = pa.table({"user": ["amy", "bob", "cy"], "history": histories})
    pa.parquet.write_table(some, tmp_path / "users.parquet")
    users, out = str(tmp_path / "users.parquet"), tmp_path / "ray"
    assert call(folder, users, out, *RAY) == 1
    message = capsys.readouterr().err
    assert "fmrec-fast: user 'amy': unknown item id 'x' (2 of the 4 ids" in message
    assert [path.name for path in tmp_path.iterdir()] == ["users.parquet"]
    assert call(folder, users, out, "--unknown", "skip", *RAY) == 0
    message = capsys.readouterr().err
    assert "left out 2 unknown items, 1 users without others" in message
    assert "10 rows for 2 users in 1 shards" in message
    assert call(folder, users, tmp_path / "local.parquet", "--unknown", "skip") == 0
    assert "left out 2 unknown items, 1 users without others" in capsys.readouterr().err
    assert table(out).equals(table(tmp_path / "local.parquet"))
    assert call(folder, users, tmp_path / "more", "--workers", "3", *RAY) == 1
    assert "do not fit the cluster, which has 2 cpus" in capsys.readouterr().err
