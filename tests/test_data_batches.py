"""Batches against the definition, written as plain Python loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fmrec_fast.data import (
    Dataset,
    EvaluationSamples,
    LatestHistories,
    TrainingSamples,
    pad_histories,
)


def pad(items, max_len):
    last = list(items)[-max_len:]
    return [0] * (max_len - len(last)) + last


def training_by_definition(histories, max_len):
    return [
        (pad(history[: size - 1], max_len), [history[size - 1]])
        for history in histories
        for size in range(2, len(history[:-2]) + 1)
    ]


def evaluation_by_definition(histories, split, max_len):
    """[(user row, sequence, target, whole input)]"""
    cut = 2 if split == "val" else 1
    return [
        (row, pad(history[:-cut], max_len), history[-cut], history[:-cut])
        for row, history in enumerate(histories)
        if len(history) > cut
    ]


def histories_of(lengths, num_items, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, num_items + 1, size=length).tolist() for length in lengths]


def everything(samples):
    return torch.arange(len(samples))


def check_all(histories, max_len):
    data = Dataset.from_histories(histories)
    histories = [history for history in histories if len(history) >= 2]

    samples = TrainingSamples(data, max_len)
    expected = training_by_definition(histories, max_len)
    assert len(samples) == len(expected)
    sequence, target = samples.batch(everything(samples))
    assert sequence.dtype == target.dtype == torch.int64
    assert sequence.shape == (len(expected), max_len)
    assert target.shape == (len(expected), 1)
    assert list(zip(sequence.tolist(), target.tolist(), strict=True)) == expected

    for split in ("val", "test"):
        samples = EvaluationSamples(data, split, max_len)
        expected = evaluation_by_definition(histories, split, max_len)
        assert samples.users.tolist() == [row for row, *_ in expected]
        sequence, target = samples.batch(everything(samples))
        assert sequence.dtype == target.dtype == torch.int64
        assert target.shape == (len(expected),)
        assert sequence.tolist() == [wanted for _, wanted, _, _ in expected]
        assert target.tolist() == [wanted for _, _, wanted, _ in expected]
        check_seen(samples, [whole for *_, whole in expected])

    latest = LatestHistories(data, max_len)
    assert latest.users.tolist() == list(range(len(histories)))
    assert latest.batch(everything(latest)).tolist() == [pad(h, max_len) for h in histories]
    check_seen(latest, histories)


def check_seen(samples, inputs):
    seen = samples.seen(everything(samples))
    assert seen.dtype == torch.int64
    assert seen.shape == (len(inputs), max(map(len, inputs), default=0))
    assert [sorted(set(row) - {-1}) for row in seen.tolist()] == [sorted(set(h)) for h in inputs]


@pytest.mark.parametrize("max_len", [1, 2, 5, 50])
def test_awkward_lengths(max_len):
    lengths = [1, 2, 3, 4, max_len, max_len + 1, max_len + 2, max_len + 3, max_len + 4]
    check_all(histories_of([*lengths, 0, 300, 2], 40), max_len)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.lists(st.integers(1, 9), max_size=12), max_size=8),
    st.integers(1, 7),
)
def test_any_histories(histories, max_len):
    check_all(histories, max_len)


def test_batch_takes_any_order_and_repeats():
    data = Dataset.from_histories(histories_of([9, 30, 5], 20))
    samples = TrainingSamples(data, 6)
    sequence, target = samples.batch(everything(samples))
    index = torch.tensor([7, 0, 7, len(samples) - 1])
    some, some_target = samples.batch(index)
    assert torch.equal(some, sequence[index])
    assert torch.equal(some_target, target[index])
    nothing, no_target = samples.batch(index[:0])
    assert nothing.shape == (0, 6)
    assert no_target.shape == (0, 1)


def test_seen_is_as_wide_as_its_batch_needs():
    data = Dataset.from_histories([[1, 2, 3], [4] * 9 + [5]])
    latest = LatestHistories(data, 2)
    assert latest.seen(torch.tensor([0])).tolist() == [[1, 2, 3]]
    both = latest.seen(torch.tensor([1, 0]))
    assert both.shape == (2, 10)
    assert both[1].tolist() == [-1] * 7 + [1, 2, 3]
    assert latest.seen(torch.tensor([], dtype=torch.int64)).shape == (0, 0)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (torch.tensor([0, 99]), ValueError, r"index 99; expected 0\.\.5"),
        (torch.tensor([-1, 0]), ValueError, "index -1"),
        (torch.tensor([0], dtype=torch.int32), TypeError, "torch.int32"),
        (torch.tensor([[0]]), ValueError, r"shape \(1, 1\)"),
        ([0], TypeError, "list"),
    ],
)
def test_bad_index(index, error, message):
    data = Dataset.from_histories([[1, 2, 3, 4, 5, 6, 7, 8, 9]])
    assert len(TrainingSamples(data, 4)) == 6
    with pytest.raises(error, match=message):
        TrainingSamples(data, 4).batch(index)


@pytest.mark.parametrize(
    ("max_len", "error"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_bad_max_len(max_len, error):
    with pytest.raises(error, match="max_len"):
        TrainingSamples(Dataset.from_histories([[1, 2]]), max_len)
    with pytest.raises(error, match="max_len"):
        pad_histories([[1]], max_len, 3)


def test_bad_split():
    with pytest.raises(ValueError, match="split='train'"):
        EvaluationSamples(Dataset.from_histories([[1, 2]]), "train", 4)


def test_memory_is_a_position_pair_a_sample():
    samples = TrainingSamples(Dataset.from_histories([[1] * 100, [2] * 50]), 50)
    assert samples.items.dtype == samples.start.dtype == samples.end.dtype == torch.int32
    assert len(samples.start) == len(samples.end) == len(samples) == 97 + 47


def test_epoch_order():
    samples = TrainingSamples(Dataset.from_histories([[1] * 100, [2] * 50]), 5)
    order = samples.epoch_order(3, 1)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(len(samples)))
    torch.manual_seed(1)
    assert torch.equal(order, samples.epoch_order(3, 1))
    others = [samples.epoch_order(*key) for key in [(3, 0), (3, 2), (1, 3), (4, 0), (2**40, 1)]]
    assert not any(torch.equal(order, other) for other in others)


def test_epoch_order_leaves_the_global_generator_alone():
    samples = TrainingSamples(Dataset.from_histories([[1] * 100]), 5)
    state = torch.get_rng_state()
    samples.epoch_order(0, 0)
    assert torch.equal(state, torch.get_rng_state())


def test_epoch_order_errors():
    samples = TrainingSamples(Dataset.from_histories([[1] * 10]), 5)
    with pytest.raises(ValueError, match="seed=-1"):
        samples.epoch_order(-1, 0)
    with pytest.raises(ValueError, match="epoch=-2"):
        samples.epoch_order(0, -2)
    with pytest.raises(TypeError, match=r"seed=1\.5"):
        samples.epoch_order(1.5, 0)


@pytest.mark.filterwarnings("error")
def test_read_only_and_strided_arrays():
    items = np.array([1, 2, 3, 4, 5], np.int32)[::-1]
    items.setflags(write=False)
    data = Dataset(items, np.array([0, 5]), [1, 2, 3, 4, 5], [1])
    assert LatestHistories(data, 3).batch(torch.tensor([0])).tolist() == [[3, 2, 1]]


@pytest.mark.parametrize("max_len", [1, 3, 8])
def test_pad_histories(max_len):
    histories = histories_of([1, 2, 3, 4, 7, 8, 9, 40], 12)
    padded = pad_histories(histories, max_len, 13)
    assert padded.dtype == torch.int64
    assert padded.tolist() == [pad(history, max_len) for history in histories]


def test_pad_histories_takes_arrays_and_tensors():
    rows = [np.array([1, 2], np.int32), torch.tensor([3]), (4, np.int64(2)), [1]]
    assert pad_histories(rows, 2, 5).tolist() == [[1, 2], [0, 3], [4, 2], [0, 1]]
    assert pad_histories(np.array([[1, 2], [3, 4]]), 3, 5).tolist() == [[0, 1, 2], [0, 3, 4]]
    assert pad_histories([], 3, 5).shape == (0, 3)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ([], "history 1 is empty"),
        ([1, 0], r"history 1 has item id 0; expected 1\.\.4"),
        ([5, 1, 1, 1, 1], "history 1 has item id 5"),
        ([-2], "history 1 has item id -2"),
        ([2**80], f"row 1 has {2**80}"),
        ([1.0], "row 1 has 1.0, a float"),
        ([True], "row 1 has True, a bool"),
        (["1"], "row 1 has '1', a str"),
        ([None], "row 1 has None"),
        ([[1]], r"row 1 has \[1\], a list"),
        ("12", "history 1 is '12'"),
        (3, "history 1 is 3"),
        (np.array([1.5]), "row 1 has 1.5, a float"),
    ],
)
def test_pad_histories_names_the_bad_value(history, message):
    with pytest.raises(ValueError, match=message):
        pad_histories([[1, 2], history, [0]], 3, 5)


@pytest.mark.gpu
def test_batches_on_cuda_equal_those_on_the_cpu():
    data = Dataset.from_histories(histories_of([2, 3, 9, 70], 20))
    on_cpu, on_cuda = (TrainingSamples(data, 8, device) for device in ("cpu", "cuda"))
    order = on_cuda.epoch_order(0, 0)
    assert order.is_cuda
    for expected, got in zip(on_cpu.batch(order.cpu()), on_cuda.batch(order), strict=True):
        assert got.is_cuda
        assert torch.equal(expected, got.cpu())
    latest = LatestHistories(data, 8, "cuda")
    expected = LatestHistories(data, 8).seen(torch.arange(4))
    assert torch.equal(latest.seen(latest.users).cpu(), expected)
