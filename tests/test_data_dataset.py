"""Dataset: what it accepts, how it splits, and how external ids are found."""

import numpy as np
import pytest

from fmrec_fast.data import Dataset, ReadReport


def make(items=(1, 2, 3, 2, 1), offsets=(0, 3, 5), item_ids=None, user_ids=None, **kwargs):
    return Dataset(
        np.array(items, dtype=np.int32),
        np.array(offsets, dtype=np.int64),
        [10, 20, 30] if item_ids is None else item_ids,
        ["a", "b"] if user_ids is None else user_ids,
        **kwargs,
    )


def test_sizes_and_histories():
    data = make(name="tiny")
    assert (data.item_num, data.num_users, data.num_interactions) == (4, 2, 5)
    assert data.history(0).tolist() == [1, 2, 3]
    assert data.history(1).tolist() == [2, 1]
    assert "tiny" in repr(data)
    assert len(repr(data)) < 200
    assert isinstance(data.report, ReadReport)
    assert data.report.rows_kept == 5


@pytest.mark.parametrize("row", [-1, 2])
def test_history_of_no_user(row):
    with pytest.raises(ValueError, match=rf"user row {row}; expected 0\.\.1"):
        make().history(row)


@pytest.mark.parametrize("bad", [0, -3, 4, 2**31 - 1])
def test_item_out_of_range_is_named(bad):
    with pytest.raises(ValueError, match=rf"item id {bad} at position 3 \(user row 1\).*1\.\.3"):
        make(items=(1, 2, 3, bad, 1))


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ((0, 3, 4), r"\[0, 4\]; expected \[0, 5\]"),
        ((1, 3, 5), r"\[1, 5\]; expected \[0, 5\]"),
        ((0, 5, 5), r"give 0 items at user row 1 \(5 to 5\)"),
        ((0, 6, 5), "decrease at user row 1"),
        ((0, 0, 5), "give 0 items at user row 0"),
        ((), r"\[0, 5\]"),
    ],
)
def test_bad_offsets(offsets, message):
    with pytest.raises(ValueError, match=message):
        make(offsets=offsets)


def test_wrong_dtypes_and_shapes():
    items, offsets = np.array([1, 1], np.int32), np.array([0, 2])
    with pytest.raises(TypeError, match="items has dtype int64; expected int32"):
        Dataset(items.astype(np.int64), offsets, [1], [1])
    with pytest.raises(TypeError, match="offsets has dtype int32; expected int64"):
        Dataset(items, offsets.astype(np.int32), [1], [1])
    with pytest.raises(TypeError, match="items is a list"):
        Dataset([1, 1], offsets, [1], [1])
    with pytest.raises(ValueError, match=r"items has shape \(1, 2\)"):
        Dataset(items[None], offsets, [1], [1])


@pytest.mark.parametrize(
    ("ids", "error", "message"),
    [
        ([10, 20, 10], ValueError, "item_ids has 10 more than once"),
        ([10, 20, 1.5], TypeError, "item_ids has 1.5, a float"),
        ([10, 20, True], TypeError, "item_ids has True, a bool"),
        ((10, 20, 30), TypeError, "item_ids is a tuple"),
    ],
)
def test_bad_external_ids(ids, error, message):
    with pytest.raises(error, match=message):
        make(item_ids=ids)


def test_user_ids_must_be_one_a_user():
    with pytest.raises(ValueError, match="user_ids has 1 entries, but offsets describe 2"):
        make(user_ids=["a"])


def test_encode_items():
    data = make(item_ids=[10, "x", "30"])
    assert data.item_index == {10: 1, "x": 2, "30": 3}
    encoded = data.encode_items([10, "10", "x", 30, "30", np.int64(30)])
    assert encoded.dtype == np.int32
    assert encoded.tolist() == [1, 1, 2, 3, 3, 3]
    assert data.encode_items(np.array([10, 30])).tolist() == [1, 3]
    assert data.encode_items([]).dtype == np.int32


def test_encode_items_prefers_the_id_itself():
    data = make(item_ids=["12", 12, -5])
    assert data.encode_items(["12", 12, "-5"]).tolist() == [1, 2, 3]


@pytest.mark.parametrize("unknown", ["y", "010", "+10", " 10", "1_0", 11, "", "9" * 5000, "١٠"])
def test_encode_unknown_items(unknown):
    with pytest.raises(ValueError, match=r"unknown item id .* \(1 of 2 ids"):
        make().encode_items([10, unknown])


@pytest.mark.parametrize("bad", [True, 10.0, None, [10]])
def test_encode_items_of_another_type(bad):
    with pytest.raises(TypeError, match="expected an int or a str"):
        make().encode_items([10, bad])


def test_encode_items_of_one_str():
    with pytest.raises(TypeError, match="expected a sequence"):
        make().encode_items("10")


def test_popularity():
    data = Dataset.from_histories([[1, 2, 2, 3], [3, 1], [2, 1, 1]])
    assert data.popularity().tolist() == [0, 1, 2, 0]
    assert data.popularity("val").tolist() == [0, 2, 3, 1]
    assert data.popularity("test").tolist() == [0, 4, 3, 2]
    with pytest.raises(ValueError, match="split_end='all'"):
        data.popularity("all")


def test_from_histories_drops_and_counts_short_users():
    data = Dataset.from_histories(
        [[1, 2], [], [3], [2, 2, 2], []], user_ids=list("abcde"), item_ids=[7, 8, 9]
    )
    assert data.user_ids == ["a", "d"]
    assert [data.history(row).tolist() for row in range(2)] == [[1, 2], [2, 2, 2]]
    report = data.report
    assert (report.users_read, report.users_kept) == (5, 2)
    assert (report.users_empty, report.users_too_short) == (2, 1)
    assert (report.rows_read, report.rows_kept, report.rows_dropped) == (6, 5, 1)
    assert report.repeated_items == 2
    text = str(report)
    assert "2 users without interactions" in text
    assert "1 users with fewer than 2 interactions" in text
    assert "\n" not in text


def test_from_histories_errors():
    with pytest.raises(ValueError, match=r"item id 3 in history 1; expected 1\.\.2"):
        Dataset.from_histories([[1, 2], [3, 1]], item_ids=[7, 8])
    with pytest.raises(ValueError, match="item id 0 in history 0"):
        Dataset.from_histories([[1, 0]])
    with pytest.raises(ValueError, match=f"item id {2**32 + 1} in history 1"):
        Dataset.from_histories([[], [1, 2**32 + 1]], item_ids=[7])
    with pytest.raises(ValueError, match=f"row 1 has {2**70}"):
        Dataset.from_histories([[], [1, 2**70]])
    with pytest.raises(TypeError, match=r"row 0 has 1\.5, a float"):
        Dataset.from_histories([[1, 1.5]])
    with pytest.raises(ValueError, match="user_ids has 1 entries for 2"):
        Dataset.from_histories([[1, 2], [1, 2]], user_ids=[1])


def test_no_users_at_all():
    data = Dataset.from_histories([[], [1]])
    assert (data.num_users, data.num_interactions) == (0, 0)
    assert data.popularity("test").tolist() == [0, 0]
