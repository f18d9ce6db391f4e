"""Readers: every format gives the same histories, and every malformed file says where."""

import builtins
import pickle
import re
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fmrec_fast.data import EvaluationSamples, TrainingSamples, read_dataset

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

DEVELOPMENT_DATA = Path(__file__).parents[2] / "shared" / "data"
# Out of time order, with a tie (u2 at 5: file order decides) and a user of one interaction.
ROWS = [
    ("u2", "b", 5),
    ("u1", "c", 30),
    ("u2", "a", 5),
    ("u1", "a", 10),
    ("u3", "d", 1),
    ("u2", "c", 2),
    ("u1", "b", 20),
]
HISTORIES = {"u1": ["a", "b", "c"], "u2": ["c", "b", "a"]}


def external(data):
    """{external user: [external items]}"""
    return {
        user: [data.item_ids[item - 1] for item in data.history(row)]
        for row, user in enumerate(data.user_ids)
    }


def write_text(path, header, rows, delimiter):
    lines = [header, *rows]
    path.write_text("\n".join(delimiter.join(map(str, line)) for line in lines) + "\n")
    return path


def write(folder, suffix, rows, names=("user_id", "item_id", "timestamp")):
    path = folder / f"data{suffix}"
    if suffix == ".parquet":
        columns = [list(column) for column in zip(*rows, strict=True)]
        parquet.write_table(pa.table(dict(zip(names, columns, strict=True))), path)
        return path
    if suffix == ".inter":
        kinds = ("token", "token", "float")
        names = [f"{name}:{kind}" for name, kind in zip(names, kinds, strict=True)]
    return write_text(path, names, rows, "," if suffix == ".csv" else "\t")


def csv_file(folder, text, name="data.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("suffix", [".inter", ".csv", ".tsv", ".txt", ".parquet"])
def test_every_format(tmp_path, suffix):
    data = read_dataset(write(tmp_path, suffix, ROWS))
    assert external(data) == HISTORIES
    assert data.user_ids == ["u1", "u2"]
    assert data.item_ids == ["a", "b", "c"]
    assert data.name == "data"
    report = data.report
    assert (report.rows_read, report.rows_kept) == (7, 6)
    assert (report.users_read, report.users_kept, report.users_too_short) == (3, 2, 1)
    assert (report.items_read, report.items_kept, report.items_dropped) == (4, 3, 1)
    assert (report.tied_timestamps, report.out_of_order, report.repeated_items) == (1, 2, 0)
    for shown in ("7 interactions read", "1 users with fewer than 2", "1 ties", "item item_id"):
        assert shown in str(report)


@pytest.mark.parametrize("suffix", [".inter", ".csv", ".tsv", ".parquet"])
def test_integer_ids_stay_integers_and_sort_as_such(tmp_path, suffix):
    rows = [(10, 100, 1), (9, 20, 1), (10, 20, 2), (9, 3, 2), (9, -1, 3)]
    data = read_dataset(write(tmp_path, suffix, rows))
    assert data.user_ids == [9, 10]
    assert data.item_ids == [-1, 3, 20, 100]
    assert external(data) == {9: [20, 3, -1], 10: [100, 20]}


@pytest.mark.parametrize(
    "ids", [("007", "7"), ("7", "x"), ("9" * 19, "1"), ("NA", "null"), ("1.0", "2"), ("é", "ü")]
)
def test_other_ids_in_text_are_strings(tmp_path, ids):
    data = read_dataset(write(tmp_path, ".csv", [(1, ids[0], 1), (1, ids[1], 2)]))
    assert external(data) == {1: list(ids)}


def test_parquet_types(tmp_path):
    def histories(**columns):
        parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
        return external(read_dataset(tmp_path / "x.parquet"))

    user, item = ["u", "u", "u"], [1, 2, 3]
    moments = np.array([30, 10, 20]).astype("datetime64[ns]")
    time = pa.array([3, 1, 2])
    dates = time.cast(pa.int32()).cast(pa.date32())
    assert histories(user=user, item=item, time=moments) == {"u": [2, 3, 1]}
    assert histories(user=user, item=item, time=dates) == {"u": [2, 3, 1]}
    assert histories(user=user, item=item, time=[3.5, 0.5, 2.5]) == {"u": [2, 3, 1]}
    assert histories(user=user, item=item, time=["3", "1.5", "2"]) == {"u": [2, 3, 1]}
    assert histories(user=user, item=["1", "2", "3"], time=time) == {"u": ["2", "3", "1"]}
    assert histories(user=user, item=[1.0, 2.0, 3.0], time=time) == {"u": [2, 3, 1]}
    assert histories(user=user, item=[1.5, 2.0, 3.0], time=time) == {"u": ["2.0", "3.0", "1.5"]}
    encoded = pa.array(["b", "a", "b"]).dictionary_encode()
    assert histories(user=user, item=encoded, time=time) == {"u": ["a", "b", "b"]}
    large = pa.array([2**63, 1, 2], pa.uint64())
    assert histories(user=user, item=large, time=time) == {"u": [1, 2, 2**63]}


def test_nanosecond_timestamps_keep_their_order(tmp_path):
    base = 1_700_000_000_123_456_700
    rows = [("u", item, base + at) for item, at in (("c", 3), ("a", 1), ("b", 2))]
    for suffix in (".csv", ".parquet"):
        assert external(read_dataset(write(tmp_path, suffix, rows))) == {"u": ["a", "b", "c"]}


def test_float_timestamps(tmp_path):
    times = ["1e3", "-2.5", ".5", "7.", "+3"]
    rows = [("u", item, time) for item, time in zip("abcde", times, strict=True)]
    assert external(read_dataset(write(tmp_path, ".csv", rows))) == {"u": list("bceda")}


def test_without_a_timestamp_the_file_order_counts(tmp_path):
    path = write_text(tmp_path / "x.csv", ("user", "item"), [row[:2] for row in ROWS], ",")
    data = read_dataset(path)
    assert external(data) == {"u1": ["c", "a", "b"], "u2": ["b", "a", "c"]}
    assert data.report.out_of_order == 0


def test_many_ties_and_shuffled_rows_against_python(tmp_path):
    rng = np.random.default_rng(0)
    rows = [tuple(map(int, row)) for row in rng.integers(0, [40, 30, 12], size=(2000, 3))]
    expected = {}
    for user, item, _ in sorted(rows, key=lambda row: (row[0], row[2])):
        expected.setdefault(user, []).append(item)
    data = read_dataset(write(tmp_path, ".csv", rows))
    assert external(data) == expected
    by_user = {user: [time for who, _, time in rows if who == user] for user in expected}
    ties = sum(len(times) - len(set(times)) for times in by_user.values())
    late = sum(b < a for times in by_user.values() for a, b in pairwise(times))
    repeats = len(rows) - len({row[:2] for row in rows})
    report = data.report
    assert (report.tied_timestamps, report.out_of_order) == (ties, late)
    assert report.repeated_items == repeats


# Columns


@pytest.mark.parametrize(
    "names",
    [
        ("user_id", "item_id", "timestamp"),
        ("userId", "movieId", "timestamp"),
        ("reviewerID", "asin", "unixReviewTime"),
        ("uid", "iid", "ts"),
        ("USER", "parent_asin", "Date"),
    ],
)
def test_conventional_column_names(tmp_path, names):
    rows = [(5, *row) for row in ROWS]
    path = write_text(tmp_path / "x.csv", ("rating", *names), rows, ",")
    assert external(read_dataset(path)) == HISTORIES


def test_given_column_names(tmp_path):
    path = write(tmp_path, ".inter", ROWS, ("who", "what", "when"))
    given = {"user": "who", "item": "what:token", "timestamp": "when"}
    assert external(read_dataset(path, **given)) == HISTORIES


@pytest.mark.parametrize(
    ("header", "given", "message"),
    [
        ("who,item,ts", {}, r"no user column; give its name as user=.*'who', 'item', 'ts'"),
        ("user,what,ts", {}, r"no item column; give its name as item="),
        ("user,asin,parent_asin", {}, r"several item columns \(asin, parent_asin\).*item="),
        ("user,item,ts,date", {}, r"several timestamp columns \(ts, date\).*timestamp="),
        ("user,item,ts", {"user": "User"}, r"no column 'User'; the file's columns are \['user'"),
        ("user,item,ts", {"timestamp": "when"}, "no column 'when'"),
        ("user,item,item", {"item": "item"}, r"several columns 'item' \(item, item\)"),
        ("user,item,ts", {"item": "user"}, "column 'user' for both user and item"),
        ("user\titem\tts", {}, "no user column"),
    ],
)
def test_columns_that_cannot_be_chosen(tmp_path, header, given, message):
    row = ",".join("1" * len(header.split(",")))
    with pytest.raises(ValueError, match=message):
        read_dataset(csv_file(tmp_path, f"{header}\n{row}\n"), **given)


def test_recbole_sequence_column(tmp_path):
    path = csv_file(tmp_path, "user_id:token\titem_id:token_seq\n1\t2 3\n", "x.inter")
    with pytest.raises(ValueError, match="'item_id:token_seq' holds sequences"):
        read_dataset(path)


# Malformed files


@pytest.mark.parametrize(
    ("rows", "line", "message"),
    [
        ("u,a,1\nu,b\nu,c,3", 3, "2 fields.*'u,b'.*expected 3"),
        ("u,a,1\nu,b,2,9\nu,c,3", 3, "4 fields"),
        ("u,a,1\n\n\nu,b\n", 5, "2 fields"),
        ("u,a,1\n \nu,b,2\n", 3, "1 fields"),
        ("u,a,1\nu,b,2\nu,c,noon", 4, "timestamp 'noon'; expected a number"),
        ("u,a,1\nu,b,\nu,c,3", 3, "timestamp ''"),
        ("u,a,1\nu,b,nan", 3, "timestamp 'nan'"),
        ("u,a,1\nu,b,NaN", 3, "timestamp 'NaN'"),
        ("u,a,1\nu,b,inf", 3, "timestamp 'inf'"),
        ("u,a,1\nu,b,1e999", 3, "timestamp 1e999; expected a finite"),
        ("u,a,1\nu,b,1_0", 3, "timestamp '1_0'"),
        ("u,a,1\n\nu,b,2020-01-01", 4, "timestamp '2020-01-01'"),
        ('u,"a, b",1\nu,"c ""d""",2\nu,e,x', 4, "timestamp 'x'"),
        (",a,1\nu,b,2", 2, "the user id is empty"),
        ("u,a,1\nu,,2", 3, "the item id is empty"),
        ("u,a,1\nu,  ,2", 3, "the item id is empty"),
        ('u,a,1\nu,"b\nc",2\nu,d,3', 3, "the item id .* has a line break"),
        ('u,a,1\nu,b,2\nu,"c,3\nu,d,4', 4, "unexpected end|fields"),
    ],
)
def test_malformed_rows_are_located(tmp_path, rows, line, message):
    path = csv_file(tmp_path, "user,item,ts\n" + rows)
    with pytest.raises(ValueError, match=message) as caught:
        read_dataset(path)
    assert f"data.csv, line {line}: " in str(caught.value)


def test_location_far_into_a_file(tmp_path):
    # Several of Arrow's blocks, so that it reads them in parallel.
    lines = [f"user{row % 999},item{row % 77},{row}" for row in range(150_000)]
    lines[140_000] = "user1,item1"
    path = csv_file(tmp_path, "\n".join(["user,item,ts", *lines]))
    assert path.stat().st_size > 2 * 2**20
    with pytest.raises(ValueError, match="line 140002: 2 fields"):
        read_dataset(path)
    lines[140_000] = "user1,item1,-"
    csv_file(tmp_path, "\n".join(["user,item,ts", *lines]))
    with pytest.raises(ValueError, match="line 140002: timestamp '-'"):
        read_dataset(path)


@pytest.mark.parametrize("closing", ["", '"', 'x"y\nu,e,5,"fine"'])
def test_an_open_quote_does_not_swallow_rows(tmp_path, closing):
    # Arrow alone reads this as a file of two rows.
    text = f'user,item,ts,title\nu,a,1,x\nu,b,2,"oops\nu,c,3,y\nu,d,4,{closing}'
    path = csv_file(tmp_path, text)
    if closing == '"':
        # That is what a title of two lines looks like; nothing tells them apart.
        assert external(read_dataset(path)) == {"u": ["a", "b"]}
    else:
        with pytest.raises(ValueError, match="line 3: "):
            read_dataset(path)


def test_line_breaks_in_other_columns(tmp_path):
    text = 'user,item,text,ts\nu,a,"one\ntwo",2\r\n\nu,b,"x ""y""\n\nz",1\nu,c,plain,'
    assert external(read_dataset(csv_file(tmp_path, text + "3\n"))) == {"u": ["b", "a", "c"]}
    with pytest.raises(ValueError, match="line 8: timestamp '-'"):
        read_dataset(csv_file(tmp_path, text + "-\n"))


def test_byte_order_mark_blank_lines_and_crlf(tmp_path):
    text = b"\xef\xbb\xbf\r\nuser,item,ts\r\nu,a,2\r\n\r\nu,b,1\r\n\r\n"
    assert external(read_dataset(csv_file(tmp_path, text))) == {"u": ["b", "a"]}


def test_not_utf8(tmp_path):
    with pytest.raises(ValueError, match=r"line 3: .* is not UTF-8"):
        read_dataset(csv_file(tmp_path, b"user,item,ts\nu,a,1\nu,\xff,2\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "data.csv: the file is empty"),
        ("\n\n", "only blank lines"),
        ("user,item,ts", "no interactions"),
        ("user,item,ts\n\n", "no interactions"),
    ],
)
def test_empty_files(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read_dataset(csv_file(tmp_path, text))


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", ["a", None, "b"], "row 2: the user id is missing"),
        ("item", [1.0, 2.0, float("nan")], "row 3: the item id is missing"),
        ("item", ["a", "", "b"], "row 2: the item id is empty"),
        ("item", [[1], [2], [3]], "item column has type list"),
        ("ts", [1, None, 2], "row 2: the timestamp is missing"),
        ("ts", [1.0, 2.0, float("nan")], "row 3: timestamp nan"),
        ("ts", ["1", "2", "x"], "row 3: timestamp 'x'"),
        ("ts", [True, True, False], "timestamp column has type bool"),
    ],
)
def test_malformed_parquet(tmp_path, column, values, message):
    columns = {"user": ["u"] * 3, "item": [1, 2, 3], "ts": [1, 2, 3], column: values}
    parquet.write_table(pa.table(columns), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=message):
        read_dataset(tmp_path / "x.parquet")


def test_unreadable_parquet(tmp_path):
    path = write(tmp_path, ".parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="not a readable Parquet file"):
        read_dataset(path)
    parquet.write_table(pa.table({"user": pa.array([], "int64"), "item": pa.array([])}), path)
    with pytest.raises(ValueError, match="no interactions"):
        read_dataset(path)


def test_files_and_formats(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv: no such file"):
        read_dataset(tmp_path / "nowhere.csv")
    with pytest.raises(
        ValueError, match="expected a file or a folder that `fmrec-fast convert` wrote"
    ):
        read_dataset(tmp_path)
    path = csv_file(tmp_path, "user,item\nu,a\nu,b\n", "data.dat")
    with pytest.raises(ValueError, match=r"unknown suffix '\.dat'; expected one of .*format="):
        read_dataset(path)
    assert external(read_dataset(path, format="csv")) == {"u": ["a", "b"]}
    with pytest.raises(ValueError, match="format='CSV'; expected one of"):
        read_dataset(path, format="CSV")
    assert external(read_dataset(str(path), format="csv")) == {"u": ["a", "b"]}


def test_without_pyarrow(tmp_path, monkeypatch):
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(f"No module named {name!r}")
        return original(name, *args, **kwargs)

    path = write(tmp_path, ".csv", ROWS)
    published = write_pickle(tmp_path, content())
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match=re.escape("pip install fmrec_fast[cli]")):
        read_dataset(path)
    assert read_dataset(published).num_users == 2


# Filters


def core_by_definition(rows, min_user, min_item):
    while True:
        users, items = ([row[at] for row in rows] for at in (0, 1))
        kept = [
            (user, item)
            for user, item in rows
            if users.count(user) >= min_user and items.count(item) >= min_item
        ]
        if kept == rows:
            return rows
        rows = kept


@pytest.mark.parametrize(
    ("min_user", "min_item"), [(2, 0), (0, 0), (3, 3), (5, 4), (1, 6), (2, 6), (8, 0)]
)
def test_core_against_python(tmp_path, min_user, min_item):
    rng = np.random.default_rng(1)
    draws = rng.geometric(0.06, size=(400, 2))
    rows = [tuple(map(int, row)) for row in draws]
    expected = {}
    for user, item in core_by_definition(rows, min_user, min_item):
        expected.setdefault(user, []).append(item)
    path = write_text(tmp_path / "x.csv", ("user", "item"), rows, ",")
    data = read_dataset(path, min_user=min_user, min_item=min_item)
    assert external(data) == expected
    assert data.item_ids == sorted({item for items in expected.values() for item in items})
    report = data.report
    dropped = report.users_too_short + report.users_filtered + report.users_empty
    assert report.users_read == report.users_kept + dropped
    assert report.users_read == len({user for user, _ in rows})
    assert report.rows_kept == sum(map(len, expected.values()))


def test_core_is_iterated(tmp_path):
    # z is too rare, which leaves u3 too short, which makes c too rare, and so on.
    rows = [("u1", "a"), ("u1", "b"), ("u2", "a"), ("u2", "b")]
    rows += [("u2", "c"), ("u3", "c"), ("u3", "z")]
    path = write_text(tmp_path / "x.csv", ("user", "item"), rows, ",")
    data = read_dataset(path, min_item=2)
    assert external(data) == {"u1": ["a", "b"], "u2": ["a", "b"]}
    assert (data.report.users_filtered, data.report.users_too_short) == (1, 0)
    assert "1 users by the min_user/min_item filter" in str(data.report)


def test_nothing_left(tmp_path):
    path = write(tmp_path, ".csv", ROWS)
    with pytest.raises(ValueError, match="no user is left with min_user=9, min_item=0"):
        read_dataset(path, min_user=9)
    with pytest.raises(ValueError, match="min_item=-1"):
        read_dataset(path, min_item=-1)
    with pytest.raises(TypeError, match=r"min_user=2\.5"):
        read_dataset(path, min_user=2.5)


# The published pickle


def content(**changes):
    return {
        "train": {2: [1, 3], 1: [3]},
        "val": {1: [2], 2: [2]},
        "test": {1: [1], 2: [3]},
        "smap": {"x": 1, "z": 3, "y": 2},
        "umap": {"bob": 2, "ann": 1},
        **changes,
    }


def write_pickle(folder, value, protocol=4):
    path = folder / "dataset.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_published_pickle(tmp_path, protocol):
    data = read_dataset(write_pickle(tmp_path, content(), protocol))
    assert data.item_ids == ["x", "y", "z"]
    assert external(data) == {"ann": ["z", "y", "x"], "bob": ["x", "z", "y", "z"]}
    assert data.items.tolist() == [3, 2, 1, 1, 3, 2, 3]
    assert data.report.users_kept == 2


def test_published_pickle_keeps_items_nobody_has_and_may_lack_umap(tmp_path):
    published = content(smap={5: 1, 6: 2, 7: 3, 8: 4})
    del published["umap"]
    data = read_dataset(write_pickle(tmp_path, published))
    assert data.item_num == 5
    assert data.user_ids == [1, 2]
    assert external(data)[1] == [7, 6, 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val": {1: [2], 2: []}}, r"val of user 2 is \[\]; expected a list of exactly 1"),
        ({"test": {1: [2, 3], 2: [1]}}, r"test of user 1 is \[2, 3\]"),
        ({"test": {1: 2, 2: [1]}}, "test of user 1 is 2"),
        ({"train": {1: [1], 2: 3}}, "train of user 2 is 3"),
        ({"val": {1: [2]}}, "user 2 is in train but not in val"),
        ({"test": {1: [1], 2: [1], 3: [1]}}, "user 3 is in test but not in train"),
        ({"train": {1: [3], 2: [1, 4]}}, r"item 4 of user 2; expected 1\.\.3"),
        ({"train": {1: [0], 2: [1]}}, "item 0 of user 1"),
        ({"val": {1: [2], 2: [-1]}}, "item -1 of user 2"),
        ({"train": {1: [3], 2: ["1"]}}, "train of user 2 has the item '1'; expected an int"),
        ({"train": {1: [3], 2: [True]}}, "train of user 2 has the item True"),
        ({"train": {1: [3], 2: [2**90]}}, f"{2**90}"),
        ({"smap": {"x": 1, "y": 2, "z": 4}}, r"not exactly 1\.\.3: found 4 \('z'\) where 3"),
        ({"smap": {"x": 0, "y": 1, "z": 2}}, r"found 0 \('x'\) where 1"),
        ({"smap": {"x": 1, "y": 2, "z": 2}}, r"found 2 \('z'\) where 3"),
        ({"smap": {"x": 1, "y": 2, "z": "3"}}, r"smap\['z'\] is '3'; expected an int"),
        ({"smap": {"x": 1, "y": 2, (1,): 3}}, r"smap has \(1,\), a tuple"),
        ({"smap": None}, "'smap' is None; expected a dict"),
        ({"umap": {"ann": 1}}, "user 2 is not in umap"),
        ({"umap": {"ann": 1, "bob": 2, "eve": 2}}, "both 'bob' and 'eve' to 2"),
        ({"umap": [1]}, r"'umap' is \[1\]"),
        ({"umap": {"ann": [1]}}, r"umap\['ann'\] is \[1\]"),
        ({"train": {}, "val": {}, "test": {}}, "no users"),
        (
            {"train": {1: [1], "2": [1]}, "val": {1: [1], "2": [1]}, "test": {1: [1], "2": [1]}},
            "some users are ints and some strings",
        ),
    ],
)
def test_wrong_contents_of_a_pickle(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_dataset(write_pickle(tmp_path, content(**changes)))
    assert "dataset.pkl" in str(caught.value)


def test_a_pickle_of_something_else(tmp_path):
    with pytest.raises(ValueError, match="a list; expected a dict"):
        read_dataset(write_pickle(tmp_path, [1]))
    with pytest.raises(ValueError, match=r"'train' is None; .* has the keys"):
        read_dataset(write_pickle(tmp_path, {"users": 1}))


@pytest.mark.parametrize("argument", [{"user": "u"}, {"timestamp": "t"}, {"min_item": 2}])
def test_arguments_that_a_pickle_does_not_take(tmp_path, argument):
    with pytest.raises(ValueError, match=f"{next(iter(argument))} given for a published pickle"):
        read_dataset(write_pickle(tmp_path, content()), **argument)


class Malicious:
    def __init__(self, call, *arguments):
        self.reduced = call, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("where", ["alone", "train", "item", "extra"])
def test_a_malicious_pickle_runs_nothing(tmp_path, protocol, where):
    import os

    mark = tmp_path / "ran"
    command = f"touch {mark}"
    value = {
        "alone": lambda bad: bad,
        "train": lambda bad: content(train=bad),
        "item": lambda bad: content(train={1: [bad], 2: [1]}),
        "extra": lambda bad: content(extra=bad),
    }[where](Malicious(os.system, command))
    path = write_pickle(tmp_path, value, protocol)
    # The file would do it, were it loaded plainly: otherwise this test shows nothing.
    pickle.loads(path.read_bytes())
    assert mark.exists()
    mark.unlink()
    with pytest.raises(ValueError, match=r"asks for (posix|nt)\.system; .* nothing of it was run"):
        read_dataset(path)
    assert not mark.exists()


@pytest.mark.parametrize("value", [Malicious(eval, "1/0"), OrderedDict(a=1), np.int64(3), len])
def test_every_global_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match="the pickle asks for "):
        read_dataset(write_pickle(tmp_path, content(extra=value)))


@pytest.mark.parametrize(
    "code",
    [
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"\x80\x02cos\nsystem\nS'true'\n\x85\x81.",  # NEWOBJ
    ],
)
def test_every_opcode_that_names_a_global_is_refused(tmp_path, code):
    path = tmp_path / "x.pkl"
    path.write_bytes(code)
    with pytest.raises(ValueError, match=r"asks for os\.system"):
        read_dataset(path)


def test_persistent_ids_and_extension_codes_are_refused(tmp_path):
    path = tmp_path / "x.pkl"
    for code in (b"Pabc\n.", b"\x80\x04K\x01Q.", b"\x80\x02\x82\x01.", b"\x80\x02}}b."):
        path.write_bytes(code)
        with pytest.raises(ValueError, match=r"x\.pkl"):
            read_dataset(path)


def test_every_truncation_is_reported(tmp_path):
    path = write_pickle(tmp_path, content())
    whole = path.read_bytes()
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"dataset\.pkl: not a readable pickle"):
            read_dataset(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="the file is empty"):
        read_dataset(path)


def test_damaged_pickles_raise_value_errors_only(tmp_path):
    path = write_pickle(tmp_path, content(), 2)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    refused, read = [], 0
    for _ in range(500):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            read_dataset(path)
            read += 1
        except ValueError as error:
            refused.append(str(error))
    assert read > 0
    assert refused
    assert all("dataset.pkl" in message for message in refused)


# The development datasets


@pytest.mark.skipif(not DEVELOPMENT_DATA.is_dir(), reason="the development datasets are absent")
@pytest.mark.parametrize(
    ("name", "users", "items", "actions", "training"),
    [
        ("ml-100k", 943, 1682, 100_000, 97_171),
        ("amazon_beauty", 22_363, 12_101, 198_502, 131_413),
    ],
)
def test_development_datasets(name, users, items, actions, training):
    text = read_dataset(DEVELOPMENT_DATA / f"{name}.inter")
    published = read_dataset(DEVELOPMENT_DATA / f"{name}.pkl")
    assert np.array_equal(text.items, published.items)
    assert np.array_equal(text.offsets, published.offsets)
    assert text.item_ids == published.item_ids
    for data in (text, published):
        assert (data.num_users, data.item_num - 1) == (users, items)
        assert data.num_interactions == actions
        assert len(TrainingSamples(data, 50)) == training
        assert len(EvaluationSamples(data, "val", 50)) == users
        assert len(EvaluationSamples(data, "test", 50)) == users
    # The split itself, as the file has it.
    with open(DEVELOPMENT_DATA / f"{name}.pkl", "rb") as file:
        raw = pickle.load(file)
    test = EvaluationSamples(published, "test", 50)
    _, target = test.batch(test.users)
    assert target.tolist() == [raw["test"][user][0] for user in sorted(raw["test"])]
