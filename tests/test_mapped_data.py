"""Histories larger than memory: converting, mapping, and everything that reads a dataset."""

import csv
import importlib
import json
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from fmrec_fast import FMRecConfig, cli
from fmrec_fast.data import (
    Dataset,
    EvaluationSamples,
    LatestHistories,
    MappedDataset,
    TrainingSamples,
    batches,
    convert,
    mapped,
    read_dataset,
    sources,
    synthetic_dataset,
    verify,
)
from fmrec_fast.data import dataset as dataset_module
from fmrec_fast.data.ids import Ids
from fmrec_fast.data.permutation import ROUNDS, KeyedPermutation
from fmrec_fast.training import Listener, Trainer

conversion = importlib.import_module("fmrec_fast.data.convert")  # the name is the function's
TINY = FMRecConfig(
    hidden_size=8, max_len=6, num_blocks=1, last=0, num_heads=2, decoder_dims=(8, 8), batch_size=32,
    sample_N=2, epochs=2, eval_interval=1,
)  # fmt: skip


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Everything that goes on a part at a time takes many parts, even of little data."""
    monkeypatch.setattr(sources, "ROWS", 7)
    monkeypatch.setattr(sources, "BLOCK", 256)
    monkeypatch.setattr(conversion, "PART", 8)
    monkeypatch.setattr(conversion, "ROWS", 2048)
    monkeypatch.setattr(conversion, "ID_ROWS", 3)
    monkeypatch.setattr(dataset_module, "PART", 8)
    monkeypatch.setattr(batches._Spans, "USERS", 4)


def rows_of(count=400, seed=0, users=40, items=30, times=30):
    rng = np.random.default_rng(seed)
    return list(
        zip(
            rng.integers(-3, users - 3, count).tolist(),
            rng.integers(items, size=count).tolist(),
            rng.integers(times, size=count).tolist(),
        )
    )


def write_text(path, rows, header=("user", "item", "timestamp")):
    delimiter = "," if path.suffix == ".csv" else "\t"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerows([header[: len(rows[0])], *rows])
    return path


@pytest.fixture
def table(tmp_path):
    return write_text(tmp_path / "data.csv", rows_of())


def assert_same(got, expected):
    assert isinstance(got, MappedDataset)
    assert got.items.dtype == np.int32 and got.offsets.dtype == np.int64
    assert np.array_equal(got.items, expected.items)
    assert np.array_equal(got.offsets, expected.offsets)
    assert list(got.item_ids) == list(expected.item_ids)
    assert list(got.user_ids) == list(expected.user_ids)
    assert list(map(type, got.item_ids)) == list(map(type, expected.item_ids))
    assert got.report == expected.report
    assert got.name == expected.name and got.fingerprint == expected.fingerprint


# Ids that look like ints but for one, ints of either sign, text that quotes and delimiters are in.
IDS = st.one_of(
    st.integers(-9, 9),
    st.sampled_from(["7", "07", "-0", "é", 'a"b', "a,b", "a\tb", "Z", "a", "9" * 20, "𝛼", "~"]),
)
TIMES = st.one_of(st.integers(-5, 5), st.sampled_from([0.5, 1e-3, -2.5, 2**60, 2**60 + 1]))


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rows=st.lists(st.tuples(IDS, IDS, TIMES), min_size=1, max_size=60),
    mixed=st.tuples(*3 * [st.booleans()]),
    timed=st.booleans(),
    suffix=st.sampled_from([".csv", ".tsv", ".inter", ".parquet"]),
    least=st.tuples(st.integers(0, 4), st.integers(0, 3)),
)
def test_equals_reading(tmp_path_factory, rows, mixed, timed, suffix, least):
    folder = tmp_path_factory.mktemp("equal")
    plain = [[v if many else (hash(v) % 7) for v, many in zip(row, mixed)] for row in rows]
    path = folder / f"data{suffix}"
    if suffix == ".parquet":
        columns = {
            name: [str(row[at]) for row in plain] if many else [row[at] for row in plain]
            for at, (name, many) in enumerate(zip(("user", "item"), mixed))
        }
        if timed:
            columns["timestamp"] = pa.array([float(row[2]) for row in plain])
        parquet.write_table(pa.table(columns), path, row_group_size=5)
    else:
        write_text(path, [row if timed else row[:2] for row in plain])
    chosen = {"min_user": least[0], "min_item": least[1]}
    try:
        expected = read_dataset(path, **chosen)
    except ValueError as error:
        with pytest.raises(ValueError) as refused:
            convert(path, folder / "out", **chosen)
        assert str(refused.value) == str(error)
        assert not list(folder.glob("*out*"))
        return
    assert_same(convert(path, folder / "out", **chosen), expected)
    assert_same(verify(folder / "out"), expected)


@pytest.mark.parametrize("name", ["it's [a]", "*?.parquet", "a b/ü"])
def test_awkward_names_of_folders(table, tmp_path, name):
    assert_same(convert(table, tmp_path / name), read_dataset(table))


def test_users_that_cross_batches_of_the_sort(tmp_path):
    rows = rows_of(9000, users=5, items=2000, times=10**6)
    path = write_text(tmp_path / "data.csv", rows)
    assert_same(convert(path, tmp_path / "out", min_item=3), read_dataset(path, min_item=3))


@pytest.mark.parametrize(
    "kind",
    [pa.int32(), pa.uint64(), pa.float64(), pa.bool_(), pa.dictionary(pa.int8(), pa.string())],
    ids=str,
)
def test_types_of_ids(tmp_path, kind):
    values = [str(i % 3) for i in range(30)] if pa.types.is_dictionary(kind) else None
    if values is None:
        top = 2**63 if kind == pa.uint64() else 0
        values = [i % 2 == 0 if kind == pa.bool_() else top + i % 3 for i in range(30)]
    column = pa.array(values).cast(pa.string()).dictionary_encode().cast(kind) if (
        pa.types.is_dictionary(kind)
    ) else pa.array(values, kind)  # fmt: skip
    path = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"user": column, "item": column}), path)
    assert_same(convert(path, tmp_path / "out"), read_dataset(path))


def test_floats_that_are_not_whole_in_a_late_block(tmp_path):
    path = tmp_path / "data.parquet"
    values = [float(i % 3) for i in range(20)] + [0.5, 0.5]
    parquet.write_table(pa.table({"user": values, "item": values}), path)
    assert_same(convert(path, tmp_path / "out"), read_dataset(path))
    assert "0.5" in verify(tmp_path / "out").item_ids


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".feather"])
def test_folder_of_files_counts_as_one_file(tmp_path, suffix):
    rows = rows_of(90)
    whole = pa.table(dict(zip(("user", "item", "timestamp"), map(list, zip(*rows)))))
    folder = tmp_path / "parts" / "year=2024"
    folder.mkdir(parents=True)
    for at in range(3):
        part, path = whole.slice(30 * at, 30), folder / f"{at}{suffix}"
        if suffix == ".parquet":
            # Columns are found by their names.
            parquet.write_table(part.select(["item", "timestamp", "user"]), path)
        elif suffix == ".feather":
            feather.write_feather(part, path)
        else:
            with pa.ipc.new_file(str(path), part.schema) as writer:
                writer.write_table(part, max_chunksize=11)
    parquet.write_table(whole, tmp_path / "parts.parquet")
    expected = read_dataset(tmp_path / "parts.parquet")
    got = convert(tmp_path / "parts", tmp_path / "out")
    assert np.array_equal(got.items, expected.items) and got.user_ids == expected.user_ids
    one = convert(folder / f"0{suffix}", tmp_path / "one")
    assert one.report.rows_read == 30
    with pytest.raises(ValueError, match="expected a file or a folder that `fmrec-fast convert`"):
        read_dataset(tmp_path / "parts")


def test_folders_that_are_refused(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    with pytest.raises(ValueError, match="no such file; expected a folder of either Parquet or"):
        convert(folder, tmp_path / "out")
    parquet.write_table(pa.table({"user": [1, 1], "item": [1, 2]}), folder / "a.parquet")
    parquet.write_table(pa.table({"user": [1, 1], "item": ["1", "2"]}), folder / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet: columns of types \['int64', 'string'\]"):
        convert(folder, tmp_path / "out")
    parquet.write_table(pa.table({"user": [1, 1], "thing": [1, 2]}), folder / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet: 0 columns 'item'; expected 1, as in .*a\."):
        convert(folder, tmp_path / "out")
    parquet.write_table(pa.table({"user": [1, None], "item": [1, 2]}), folder / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet, row 2: the user id is missing"):
        convert(folder, tmp_path / "out")
    feather.write_feather(pa.table({"user": [1, 1], "item": [1, 2]}), folder / "b.feather")
    with pytest.raises(ValueError, match=r"files of \['arrow', 'parquet'\]"):
        convert(folder, tmp_path / "out")
    assert convert(folder, tmp_path / "out", format="arrow").num_users == 1
    with pytest.raises(ValueError, match="format='csv' for the folder"):
        convert(folder, tmp_path / "other", format="csv")
    with pytest.raises(ValueError, match="is a converted dataset"):
        convert(tmp_path / "out", tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "parts"]


def test_published_pickle(tmp_path):
    content = {
        "train": {1: [1, 2], 2: [3]}, "val": {1: [2], 2: [1]}, "test": {1: [3], 2: [2]},
        "smap": {"x": 1, 5: 2, "7": 3}, "umap": {10**30: 1, "u": 2},
    }  # fmt: skip
    path = tmp_path / "dataset.pkl"
    path.write_bytes(pickle.dumps(content))
    got = convert(path, tmp_path / "out")
    assert_same(got, read_dataset(path))
    assert got.user_ids[:] == [10**30, "u"] and got.item_ids[1] == 5
    assert got.encode_items(["7", 5, "x"]).tolist() == [3, 2, 1]
    with pytest.raises(ValueError, match="min_item given for a published pickle"):
        convert(path, tmp_path / "other", min_item=2)


@pytest.mark.parametrize(
    "bad",
    [",5,1", '"  ",5,1', "1,5,later", "1,5", "1,5,1,9", '1,"5,1', "1,5,inf", "1,\xff,1", "1,5,"],
)
def test_malformed_rows_are_named_as_in_reading(tmp_path, bad):
    lines = ["user,item,timestamp", *(",".join(map(str, row)) for row in rows_of(80)), bad]
    lines += ["2,3,4"]
    path = tmp_path / "data.csv"
    path.write_bytes("\n".join(lines).encode("latin-1"))
    with pytest.raises(ValueError) as expected:
        read_dataset(path)
    assert "line 8" in str(expected.value)
    with pytest.raises(ValueError) as got:
        convert(path, tmp_path / "out")
    assert str(got.value) == str(expected.value)
    assert [file.name for file in tmp_path.iterdir()] == ["data.csv"]


@pytest.mark.parametrize("at", ["_stage", "_group", "_users", "_filter", "_write_ids", "_flush"])
@pytest.mark.parametrize("killed", [False, True])
def test_interrupted_conversion_leaves_no_dataset(table, tmp_path, monkeypatch, at, killed):
    def stop(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(conversion, at, stop)
        if killed:  # nothing cleans up
            patched.setattr(conversion.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            convert(table, tmp_path / "out")
    left = [path for path in tmp_path.iterdir() if path != table]
    assert tmp_path / "out" not in left and bool(left) == killed
    for path in left:
        with pytest.raises(ValueError, match="expected a file or a folder"):
            read_dataset(path)
    assert_same(convert(table, tmp_path / "out"), read_dataset(table))


def test_refusals(table, tmp_path):
    out = tmp_path / "out"
    convert(table, out)
    before = (out / "dataset.json").read_bytes()
    with pytest.raises(FileExistsError, match="out already exists"):
        convert(table, out)
    assert (out / "dataset.json").read_bytes() == before
    with pytest.raises(FileNotFoundError, match="nothing: no such file"):
        convert(tmp_path / "nothing", tmp_path / "other")
    with pytest.raises(ValueError, match="memory_mb=1, threads=2"):
        convert(table, tmp_path / "other", memory_mb=1)
    with pytest.raises(TypeError, match=r"threads=1\.5"):
        convert(table, tmp_path / "other", threads=1.5)
    for chosen in ({"format": "csv"}, {"user": "user"}, {"min_item": 1}, {"min_user": 3}):
        with pytest.raises(ValueError, match=f"{next(iter(chosen))} given for a converted folder"):
            read_dataset(out, **chosen)
    assert read_dataset(out, min_user=1).num_users == read_dataset(out).num_users


def test_damage_is_found(table, tmp_path):
    out = tmp_path / "out"
    convert(table, out)

    def damaged(name, change):
        folder = tmp_path / "damaged"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(out, folder)
        (folder / name).write_bytes(change((folder / name).read_bytes()))
        return folder

    def flipped(content):
        at = len(content) // 2
        return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]

    for name in mapped.FILES:
        with pytest.raises(ValueError, match=rf"{name} has \d+ bytes, expected \d+; the folder is"):
            read_dataset(damaged(name, lambda content: content[:-8]))
        middle = damaged(name, flipped)
        with pytest.raises(ValueError, match="the folder is damaged"):
            verify(middle)
    (damaged("items.arrow", lambda content: content) / "items.arrow").unlink()
    with pytest.raises(ValueError, match=r"items\.arrow has None bytes"):
        read_dataset(tmp_path / "damaged")
    for change, message in [
        (lambda c: c[:40], "truncated or not JSON"),
        (lambda c: c.replace(b"fmrec_fast dataset", b"another"), "expected format"),
        (lambda c: c.replace(b'"version": 1', b'"version": 2'), "expected version 1, got 2"),
        (lambda c: c.replace(b'"users": 4', b'"users": 5'), "which dataset.json does not say"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_dataset(damaged("dataset.json", change))


def test_ids_are_a_sequence_that_equals_a_list():
    values = [3, 1, 2, 7]
    ids = Ids(pa.chunked_array([values[:1], values[1:]]))
    assert len(ids) == 4 and list(ids) == ids[:] == values and ids == values and values == ids
    assert ids != [3, 1, 2] and ids != [3, 1, 2, 8] and ids != tuple(values)
    assert (ids[0], ids[-1], ids[1:3], ids[::-2], ids[3:1]) == (3, 7, [1, 2], [7, 1], [])
    assert ids == Ids(pa.chunked_array([values])) and 7 in ids and ids.index(2) == 2
    with pytest.raises(IndexError):
        ids[4]
    with pytest.raises(TypeError):
        hash(ids)
    assert repr(ids) == "Ids(3, 1, 2, ...; 4 in all)"


@pytest.fixture
def pair(table, tmp_path):
    """The same histories in memory and mapped; some have one item only."""
    return read_dataset(table, min_user=1), convert(table, tmp_path / "out", min_user=1)


@pytest.mark.filterwarnings("error")
def test_batches_are_those_of_a_dataset_in_memory(pair):
    in_memory, on_disk = pair
    assert not on_disk.items.flags.writeable and not on_disk.offsets.flags.writeable
    samples = [TrainingSamples(data, 6) for data in pair]
    chosen = torch.randperm(len(samples[0]), generator=torch.Generator().manual_seed(0))
    assert len(samples[0]) == len(samples[1])
    for index in (chosen, chosen[:1], chosen[:0]):
        for expected, got in zip(samples[0].batch(index), samples[1].batch(index), strict=True):
            assert got.dtype == torch.int64 and torch.equal(expected, got)
    assert torch.equal(*(one.epoch_order(3, 1) for one in samples))
    users = [
        [kind(data) for data in pair]
        for kind in (
            lambda data: EvaluationSamples(data, "val", 6),
            lambda data: EvaluationSamples(data, "test", 6),
            lambda data: LatestHistories(data, 6),
        )
    ]
    for expected, got in users:
        index = torch.arange(len(expected)).flip(0)
        assert len(got) == len(expected)
        for one, other in zip(expected.batch(index), got.batch(index), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(expected.seen(index), got.seen(index))
        assert torch.equal(expected.users, got.users)
        assert torch.equal(expected.user_rows(index), got.user_rows(index))
    for split in ("train", "val", "test"):
        assert np.array_equal(in_memory.popularity(split), on_disk.popularity(split))
    with pytest.raises(ValueError, match=f"index {len(chosen)}; expected 0"):
        samples[1].batch(torch.tensor([len(chosen)]))


def test_memory_of_samples_does_not_grow_with_them(pair):
    samples = TrainingSamples(pair[1], 6)
    assert samples._spans.before.nbytes == 8 * (-(-pair[1].num_users // 4) + 1)
    assert not hasattr(samples, "start") and not hasattr(samples, "items")


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_keyed_permutation_is_one(length, key):
    keys = np.random.SeedSequence(key).generate_state(ROUNDS, np.uint64)
    order = KeyedPermutation(length, keys)
    whole = order[:]
    assert len(order) == length and whole.dtype == torch.int64
    assert torch.equal(whole.sort().values, torch.arange(length))
    first, last = sorted((key % (length + 1), key // 7 % (length + 1)))
    assert torch.equal(order[first:last], whole[first:last])
    assert torch.equal(order[first:last:3], whole[first:last:3])


def test_keyed_permutation_looks_random():
    keys = [np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64) for seed in (0, 1)]
    length = 10**8
    one, other = (KeyedPermutation(length, key)[5 : 5 + 2**16].double() for key in keys)
    assert len(one.unique()) == 2**16 and (one == other).sum() < 5
    for values in (one, other, one - other):
        neighbours = torch.corrcoef(torch.stack((values[1:], values[:-1])))[0, 1]
        assert abs(neighbours) < 5 / 2**8  # five standard deviations
    share = torch.histc(one, 16, 0, length) / 2**16
    assert (share - 1 / 16).abs().max() < 5 * (1 / 16 / 2**16) ** 0.5
    with pytest.raises(ValueError, match=r"length=0; expected 1\.\."):
        KeyedPermutation(0, keys[0])


class Interrupted(Exception):
    pass


class Interrupt(Listener):
    """Stops a run in the middle of an epoch, as a kill would."""

    def __init__(self, after: int) -> None:
        self.left = after

    def step_done(self, losses, samples) -> None:
        self.left -= 1
        if self.left == 0:
            raise Interrupted


def trained(dataset, run, **options):
    trainer = Trainer(dataset, TINY, run, **options)
    return trainer, trainer.fit(resume=True)


def interrupted(dataset, run):
    with pytest.raises(Interrupted):
        trained(dataset, run, checkpoint_steps=2, listener=Interrupt(5))


def test_training_gives_the_same_numbers_as_in_memory(pair, tmp_path):
    expected, result = trained(pair[0], tmp_path / "memory")
    runs = {"mapped": {}, "graph": {"graph": True}, "resumed": {}, "crossed": {}}
    interrupted(pair[1], tmp_path / "resumed")
    interrupted(pair[0], tmp_path / "crossed")  # a run may go on from either form of the data
    for name, options in runs.items():
        got, found = trained(pair[1], tmp_path / name, **options)
        assert found == result, name
        for key, value in expected.model.state_dict().items():
            assert torch.equal(value, got.model.state_dict()[key]), (name, key)


def test_order_that_is_not_stored_trains_resumes_and_covers_all(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "STORED_ORDER", 0)
    samples = TrainingSamples(pair[1], 6)
    order = samples.epoch_order(3, 1)
    assert isinstance(order, KeyedPermutation) and sorted(order[:].tolist()) == [*range(len(order))]
    assert order[:].tolist() == samples.epoch_order(3, 1)[:].tolist()
    assert order[:].tolist() != samples.epoch_order(3, 2)[:].tolist()
    assert isinstance(TrainingSamples(pair[0], 6).epoch_order(3, 1), torch.Tensor)
    interrupted(pair[1], tmp_path / "parts")
    _, parts = trained(pair[1], tmp_path / "parts")
    _, whole = trained(pair[1], tmp_path / "whole")
    assert parts == whole


def section(title):
    text = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE).group(1)


def test_commands_of_the_document_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = synthetic_dataset(num_users=60, num_items=100, num_clusters=5, mean_length=8)
    rows = [
        (user, item, at)
        for user in range(data.num_users)
        for at, item in enumerate(data.history(user).tolist())
    ]
    (tmp_path / "interactions").mkdir()
    for at in range(2):
        columns = zip(("user", "item", "timestamp"), map(list, zip(*rows[at::2])))
        parquet.write_table(pa.table(dict(columns)), tmp_path / "interactions" / f"{at}.parquet")
    commands = [
        shlex.split(line.split("#")[0])
        for block in re.findall(r"```bash\n(.*?)```", section("Histories larger than memory"), re.S)
        for line in block.splitlines()
    ]
    ours = [line[1:] for line in commands if line[0] == "fmrec-fast"]
    assert len(ours) >= 3
    for line in ours:
        assert cli.main(line) == 0, capsys.readouterr().err
    others = [line for line in commands if line[0] != "fmrec-fast"]
    assert [line[:3] for line in others] == [["python", "-m", "benchmarks.large_data"]]
    capsys.readouterr()
    assert cli.main(["convert", "interactions", "mapped"]) == 1
    assert "mapped already exists" in capsys.readouterr().err


def test_large_data_script(tmp_path, capsys, monkeypatch):
    from benchmarks import large_data

    out, folder = tmp_path / "record.json", tmp_path / "made"
    sizes = ["--interactions", "100000", "--users", "1500", "--items", "500", "--steps", "20"]
    large_data.main([*sizes, "--folder", str(folder), "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["train"]["samples"] > 90_000 and len(found["train"]["by_steps"]) == 10
    for part in ("generate", "convert", "train"):
        assert 10 < found[part]["RssAnon_mb"] < found[part]["VmHWM_mb"] < large_data.LIMIT_MB
    assert found["parquet_bytes"] < found["convert"]["disk_bytes"] < large_data.DISK * 100_000
    assert list(folder.iterdir()) == []
    assert "| convert | " in capsys.readouterr().out
    monkeypatch.setattr(large_data, "DISK", 1e12)
    with pytest.raises(ValueError, match=r"GB free, expected 100000000\.0 GB for 100,000"):
        large_data.main([*sizes, "--folder", str(folder)])
    (folder / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        large_data.main([*sizes, "--folder", str(folder)])


def test_plan_is_the_one_made_from_the_formulas():
    from benchmarks import scale_plan

    first, last = scale_plan.MARKS
    assert f"{first}{scale_plan.plan()}{last}" in section("Plan")


def test_formulas_of_the_plan_are_those_of_the_model():
    from benchmarks.scale_plan import Sizes
    from fmrec_fast.models import build_recommender

    config = FMRecConfig(item_num=5000, decoder_dims=(512, 256))
    sizes = Sizes(items=5000, last=256)
    model = build_recommender(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    counted = sizes.table_parameters + sizes.other_parameters
    # Time embeddings, positions, norms and biases are left out.
    assert counted < parameters < 1.12 * counted
    assert sizes.encoder_flops == pytest.approx(66e6, rel=0.02)  # docs/performance.md
    assert sizes.data_parallel_bytes(2) == pytest.approx(4 * counted)
    rest = 16 * sizes.other_parameters
    whole, half = (sizes.training_memory(ranks, True) - rest for ranks in (1, 2))
    assert whole == 2 * half and sizes.training_memory(2, False) == whole + rest
    assert sizes.sharded_bytes(1, 8) == sizes.data_parallel_bytes(1) == 0
    assert 0 < sizes.sharded_bytes(4, 8) < sizes.data_parallel_bytes(4)


def test_mapped_dataset_of_wrong_ends_is_refused(pair):
    on_disk = pair[1]
    with pytest.raises(ValueError, match="the folder is damaged"):
        MappedDataset(on_disk.items[:-1], on_disk.offsets, on_disk.item_ids, on_disk.user_ids)
    in_memory = Dataset(pair[0].items, pair[0].offsets, on_disk.item_ids, on_disk.user_ids)
    assert in_memory.fingerprint == on_disk.fingerprint
