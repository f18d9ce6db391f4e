"""The graphed sampler: every promise of its documentation, by replays on CUDA, by calls on CPU."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fmrec_fast import (
    FaveConfig,
    FaveRecommender,
    FMRecommender,
    GraphedSampler,
    dispatch_log,
    graphs,
    recommend,
    sample,
    use_backend,
    use_rng,
)
from fmrec_fast.recommend import rank_items
from fmrec_fast.testing import make_sequences

EVERY = ("padding", "short", "long", "full")
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture
def model(small_model, device) -> FMRecommender:
    """lambda_uncertainty is large, so that the noise shows in the result."""
    return small_model(lambda_uncertainty=0.2, sample_N=2).eval().to(device)


@pytest.fixture
def sequences(device) -> Tensor:
    return make_sequences(20, 12, 61, 1, histories=EVERY, device=device).sequence


def eager(model: FMRecommender, sequences: Tensor, **options) -> Tensor:
    return sample(model, sequences, graph=False, **options)


# --- buckets ----------------------------------------------------------------------------------


def test_buckets():
    first = [1, 2, 4, *range(8, 129, 8)]
    assert graphs.buckets(512) == [*first, *range(144, 257, 16), *range(288, 513, 32)]
    assert graphs.buckets(50) == [1, 2, 4, 8, 16, 24, 32, 40, 48, 50]
    assert graphs.buckets(1) == [1]
    for batch in range(1, 3000):
        size = graphs.bucket(batch, 5000)
        assert batch <= size <= max(2 * batch, 2), batch
        assert size - batch <= max(7, batch / 8), batch


def test_a_bucket_is_captured_once(model, sequences):
    sampler = GraphedSampler(model, max_batch=16)
    for batch in (1, 2, 3, 4, 5, 8, 7, 9, 16, 11):
        sampler(sequences[:batch], seed=1)
    assert sampler.captured == [(1, 12), (2, 12), (4, 12), (8, 12), (16, 12)]
    assert sampler.captures == 5
    sampler(sequences[:4, 3:], seed=1)
    assert sampler.captured[-1] == (4, 9) and sampler.captures == 6


@pytest.mark.parametrize("batch", [0, 1, 3, 5, 8, 20])
def test_it_is_sample(model, sequences, batch):
    """Larger batches than max_batch are cut; with a seed given and with one drawn."""
    part = sequences[:batch]
    sampler = GraphedSampler(model, max_batch=8)
    for steps in (None, 3):
        sampler = GraphedSampler(model, max_batch=8, steps=steps)
        expected = eager(model, part, seed=5, steps=steps)
        got = sampler(part, seed=5)
        assert got.shape == (batch, 32) and got.dtype == torch.float32
        torch.testing.assert_close(got, expected, **CLOSE)
        torch.manual_seed(9)
        expected = eager(model, part, steps=steps)
        torch.manual_seed(9)
        torch.testing.assert_close(sampler(part), expected, **CLOSE)
    assert max((size for size, _ in sampler.captured), default=0) <= 8


@pytest.mark.parametrize(
    "options",
    [
        {"method": "parallel", "sweeps": 2},
        {"method": "auto"},
        {"method": "auto", "sweeps": 1},
        {"padding": "tied"},
        {"padding": "tied", "method": "parallel", "sweeps": 1},
    ],
    ids=str,
)
def test_the_options_are_those_of_sample(model, sequences, options):
    sampler = GraphedSampler(model, steps=4, **options)
    for batch in (1, 5):
        expected = eager(model, sequences[:batch], seed=5, steps=4, **options)
        got = sampler(sequences[:batch], seed=5)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
        got = sample(model, sequences[:batch], seed=5, steps=4, **options, graph=True)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert graphs.shared_sampler(model, steps=4, **options).captures == 2


def test_rows_and_starts_are_static_inputs(model, sequences):
    sampler = GraphedSampler(model)
    rows = torch.tensor([7, 2**33, 7, 1, 0], device=sequences.device)
    z0 = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).to(sequences.device)
    same = sequences[2:3].repeat(5, 1)
    for options in ({"rows": rows}, {"z0": z0}, {"rows": rows.flip(0), "z0": z0.flip(0)}, {}):
        got = sampler(same, seed=torch.tensor(5), **options)
        torch.testing.assert_close(got, eager(model, same, seed=5, **options), **CLOSE)
    assert len(sampler.captured) == 2  # without and with z0


# --- noise ------------------------------------------------------------------------------------


def test_each_replay_draws_anew_and_manual_seed_reproduces_a_run(model, sequences):
    sampler = GraphedSampler(model)
    runs = []
    for _ in range(2):  # the first run captures, the second does not
        torch.manual_seed(4)
        runs.append([sampler(sequences[:3]) for _ in range(3)])
    for a, b in zip(*runs):
        assert torch.equal(a, b)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert ((runs[0][a] - runs[0][b]).abs().amax(1) > 1e-3).all()
    torch.manual_seed(5)
    assert not torch.allclose(sampler(sequences[:3]), runs[0][0], atol=1e-3)
    assert sampler.captures == 1


def test_padding_a_batch_changes_no_row(model, sequences):
    """5 rows in a bucket of 8: alike in buckets of 5, 8 and 16, and beside other rows."""
    whole = GraphedSampler(model)(sequences[:16], seed=5)
    for size in (5, 8, 16):
        sampler = GraphedSampler(model, max_batch=size)
        for batch in (5, 1, 3):
            got = sampler(sequences[:batch], seed=5)
            torch.testing.assert_close(got, whole[:batch], **CLOSE)
    # Under a drawn seed too: the bucket draws one number, however many rows it has.
    torch.manual_seed(1)
    five = GraphedSampler(model)(sequences[:5])
    torch.manual_seed(1)
    torch.testing.assert_close(GraphedSampler(model)(sequences[:8])[:5], five, **CLOSE)


def test_what_earlier_batches_left_does_not_show(model, sequences):
    """A bucket is filled with a full batch, then with a smaller one, in every kind of input."""
    sampler = GraphedSampler(model, k=5)
    exclude = torch.arange(1, 57, device=sequences.device).reshape(8, 7)
    rows = torch.arange(100, 108, device=sequences.device)
    sampler(sequences[:8], seed=1, rows=rows, exclude=exclude)
    fresh = GraphedSampler(model, k=5)
    for options in ({"seed": 2, "exclude": exclude[:5, :2]}, {"seed": 2, "rows": rows[:5]}):
        got, expected = sampler(sequences[:5], **options), fresh(sequences[:5], **options)
        assert torch.equal(got.ids, expected.ids) and torch.equal(got.scores, expected.scores)


# --- the ranking ------------------------------------------------------------------------------


def test_the_ranking_is_inside_and_the_scores_of_all_items_are_not_kept(model, sequences):
    """Batches of 1, 5 and 20 (cut), without and with exclusions of several widths."""
    sampler = GraphedSampler(model, max_batch=16, k=7)
    for batch in (1, 5, 20):
        rep = eager(model, sequences[:batch], seed=3)
        for width in (0, 1, 9):
            exclude = torch.arange(1, 1 + width, device=rep.device).repeat(batch, 1)
            got = sampler(sequences[:batch], seed=3, exclude=exclude if width else None)
            expected = rank_items(model, rep, 7, exclude)
            assert torch.equal(got.ids, expected.ids)
            torch.testing.assert_close(got.scores, expected.scores, **CLOSE)
    kept = [graph.capture.outputs for graph in sampler._graphs.values()]
    assert len(kept) == 12  # batches of 1, 8, 16 and 4; widths of 0, 8 and 16
    assert {tensor.shape[1:] for outputs in kept for tensor in outputs} == {(7,)}


@pytest.mark.parametrize("graph", [True, None])
def test_recommend(model, graph):
    histories = [[5, 3, 9], [60], list(range(1, 31))]
    arguments = {"exclude_seen": True, "exclude": [[1], [], [40]], "seed": 2}
    expected = recommend(model, histories, 9, **arguments, graph=False)
    for _ in range(2):
        got = recommend(model, histories, 9, **arguments, graph=graph)
        assert torch.equal(got.ids, expected.ids)
        torch.testing.assert_close(got.scores, expected.scores, **CLOSE)
    shared = graphs.shared_sampler(model, method="auto", k=9)
    assert shared.captures == (1 if graph or model.item_embeddings.weight.is_cuda else 0)


# --- what a graph depends on ------------------------------------------------------------------


def change_in_place(model: FMRecommender) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def change_behind_autograd(model: FMRecommender) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def step_of_an_optimizer(model: FMRecommender) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def load(model: FMRecommender, **options) -> None:
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, **options)


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_behind_autograd, step_of_an_optimizer, load],
    ids=lambda change: change.__name__,
)
def test_changes_in_place_show_in_the_next_replay(model, sequences, change):
    sampler = GraphedSampler(model)
    before = sampler(sequences[:3], seed=1)
    change(model)
    after = sampler(sequences[:3], seed=1)
    torch.testing.assert_close(after, eager(model, sequences[:3], seed=1), **CLOSE)
    assert not torch.allclose(before, after, atol=1e-3) and sampler.captures == 1


def assign_state(model: FMRecommender) -> None:
    load(model, assign=True)


def assign_data(model: FMRecommender) -> None:
    weight = model.fm.xstart_model.norm_fm_rep.weight
    weight.data = weight.data * 1.1


def replace_a_module(model: FMRecommender) -> None:
    model.fm.xstart_model.time_embed[0] = torch.nn.Linear(
        32, 128, device=model.item_embeddings.weight.device
    )


@pytest.mark.parametrize(
    "change", [assign_state, assign_data, replace_a_module], ids=lambda change: change.__name__
)
def test_moved_parameters_are_captured_anew(model, sequences, change):
    sampler = GraphedSampler(model)
    before = sampler(sequences[:3], seed=1)
    sampler(sequences[:1], seed=1)
    change(model)
    after = sampler(sequences[:3], seed=1)
    torch.testing.assert_close(after, eager(model, sequences[:3], seed=1), **CLOSE)
    assert not torch.allclose(before, after, atol=1e-3)
    assert sampler.captures == 3 and sampler.captured == [(4, 12)]  # the old ones are gone


@pytest.mark.gpu
def test_a_model_moved_to_another_device_and_back(small_model):
    model = small_model(lambda_uncertainty=0.2).eval().cuda()
    sequences = make_sequences(3, 12, 61, 1).sequence.cuda()
    sampler = GraphedSampler(model)
    expected = sampler(sequences, seed=1)
    model.cpu()
    torch.testing.assert_close(sampler(sequences.cpu(), seed=1), expected.cpu(), **CLOSE)
    hold = torch.empty(2**20, device="cuda")  # where the parameters may have been
    model.cuda()
    torch.testing.assert_close(sampler(sequences, seed=1), expected, **CLOSE)
    assert sampler.captures == 3 and hold.is_cuda


@pytest.mark.parametrize(
    "owner, name, value",
    [
        ("fm", "sample_N", 4),
        ("fm", "eps", 0.3),
        ("fm", "trajectory", "cosine"),
        ("fm", "target", "velocity"),
        ("fm.xstart_model", "lambda_uncertainty", 0.5),
        ("fm.xstart_model.att", "attention", "causal"),
        ("fm.xstart_model.att", "num_heads", 8),
    ],
)
def test_settings_are_read_at_every_call(model, sequences, owner, name, value):
    sampler = GraphedSampler(model)
    before = sampler(sequences[:3], seed=1)
    module = model.get_submodule(owner)
    old = getattr(module, name)
    setattr(module, name, value)
    changed = sampler(sequences[:3], seed=1)
    torch.testing.assert_close(changed, eager(model, sequences[:3], seed=1), **CLOSE)
    assert (changed - before).abs().max() > 1e-5 and sampler.captures == 2
    setattr(module, name, old)
    assert torch.equal(sampler(sequences[:3], seed=1), before) and sampler.captures == 2


def test_every_setting_that_the_sampler_reads_is_in_its_key(model, sequences):
    """What `integrate` and what it calls read of the core: attributes that are not parameters."""
    read = set()

    class Spy:
        def __init__(self, module):
            object.__setattr__(self, "module", module)

        def __getattr__(self, name):
            value = getattr(self.module, name)
            if isinstance(value, (int, float, str)):
                read.add(name)
            return Spy(value) if isinstance(value, torch.nn.Module) else value

        def __call__(self, *arguments):
            return self.module(*arguments)

    fm = Spy(model.fm)
    e, mask = model.embed(sequences[:2])
    type(model.fm).integrate_with_residual(fm, e, mask, e[:, 0], seed=1)
    values = {name: getattr(model.fm, name, None) for name in read}
    known = {"steps", "eps", "trajectory", "target", "time_scale", "training", "hidden_size"}
    assert set(values) <= known | {"lambda_uncertainty"}, values


def test_backends_have_graphs_of_their_own(model, sequences):
    sampler = GraphedSampler(model)
    for backend in ("reference", "auto", "reference"):
        with use_backend(backend), dispatch_log() as log:
            sampler(sequences[:3], seed=1)
        with use_backend(backend), dispatch_log() as expected:
            eager(model, sequences[:3].new_zeros(4, 12), seed=1)
        assert log == expected
    assert sampler.captures == 2


def test_the_least_recently_used_graph_goes(model, sequences):
    sampler = GraphedSampler(model, max_graphs=2)
    for batch in (1, 2, 1, 4):
        sampler(sequences[:batch], seed=1)
    assert sampler.captured == [(1, 12), (4, 12)] and sampler.captures == 3
    sampler(sequences[:2], seed=1)
    assert sampler.captured == [(4, 12), (2, 12)] and sampler.captures == 4
    sampler.clear()
    assert sampler.captured == []
    torch.testing.assert_close(
        sampler(sequences[:2], seed=1), eager(model, sequences[:2], seed=1), **CLOSE
    )


def test_warmup(model, sequences):
    """Captures every bucket, for seeds given and drawn, and leaves no trace in the generators."""
    torch.manual_seed(3)
    expected = torch.rand(2, device=sequences.device)
    torch.manual_seed(3)
    sampler = GraphedSampler(model, max_batch=9)
    sampler.warmup()
    assert torch.equal(torch.rand(2, device=sequences.device), expected)
    assert sorted(set(sampler.captured)) == [(1, 12), (2, 12), (4, 12), (8, 12), (9, 12)]
    assert sampler.captures == 10
    for batch in range(1, 10):
        sampler(sequences[:batch], seed=1)
        sampler(sequences[:batch])
    assert sampler.captures == 10
    ranker = GraphedSampler(model, max_batch=9, k=3)
    ranker.warmup([3, 9], length=5, exclude_width=6)
    exclude = torch.ones(3, 6, dtype=torch.int64, device=sequences.device)
    ranker(sequences[:3, :5], seed=1, exclude=exclude)
    assert ranker.captures == 4
    with pytest.raises(ValueError, match=r"batches must be in 1 .. 9, got 10"):
        sampler.warmup([1, 10])
    with pytest.raises(ValueError, match="5 buckets are more than max_graphs = 3"):
        GraphedSampler(model, max_batch=9, max_graphs=3).warmup()


# --- who holds what ---------------------------------------------------------------------------


def test_outputs_are_copies(model, sequences):
    sampler = GraphedSampler(model, k=3)
    first = sampler(sequences[:4], seed=1)
    kept = [tensor.clone() for tensor in first]
    second = sampler(sequences[4:8], seed=2)
    for tensor, copied, other in zip(first, kept, second):
        assert torch.equal(tensor, copied) and tensor.data_ptr() != other.data_ptr()
    first.scores.zero_()
    again = sampler(sequences[4:8], seed=2)
    assert torch.equal(again.scores, second.scores)


def test_threads_take_turns(model, sequences):
    """Eight threads, one sampler, several buckets: everybody gets what it asked for."""
    sampler = GraphedSampler(model, max_batch=8)
    wanted = {
        (n, seed): eager(model, sequences[:n], seed=seed) for n in (1, 3, 8) for seed in (1, 2)
    }
    errors: list = []

    def work(n: int, seed: int) -> None:
        try:
            for _ in range(5):
                torch.testing.assert_close(
                    sampler(sequences[:n], seed=seed), wanted[n, seed], **CLOSE
                )
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=key) for key in wanted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert sampler.captures == 3


@pytest.mark.gpu
def test_calls_from_several_streams_do_not_overlap(small_model):
    model = small_model(lambda_uncertainty=0.2).eval().cuda()
    sequences = make_sequences(8, 12, 61, 1).sequence.cuda()
    sampler = GraphedSampler(model)
    wanted = [sampler(sequences, seed=seed) for seed in range(6)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in wanted]
    got = []
    for seed, stream in enumerate(streams):
        with torch.cuda.stream(stream):
            got.append(sampler(sequences, seed=seed))
    torch.cuda.synchronize()
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, **CLOSE)


def test_copies_and_pickles_of_the_model_leave_the_graphs_behind(model, sequences):
    expected = sample(model, sequences[:3], seed=1, graph=True)
    shared = graphs.shared_sampler(model)
    assert shared.captures == 1
    before = len(pickle.dumps(model.state_dict()))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(sample(other, sequences[:3], seed=1, graph=True), expected)
        assert graphs.shared_sampler(other) is not shared
        assert graphs.shared_sampler(other).captures == 1
        change_in_place(other)
        sample(other, sequences[:3], seed=1, graph=True)
    assert shared.captures == 1 and len(pickle.dumps(model.state_dict())) == before
    torch.testing.assert_close(sample(model, sequences[:3], seed=1, graph=True), expected)


def test_copies_and_pickles_of_a_sampler_have_its_settings_and_no_graphs(model, sequences):
    sampler = GraphedSampler(model, max_batch=4, steps=3, k=5, max_graphs=7)
    expected = sampler(sequences[:6], seed=1)
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert other._options == sampler._options and other.captured == []
        assert other.model is not model
        assert torch.equal(other(sequences[:6], seed=1).ids, expected.ids)


def test_shared_samplers_do_not_keep_a_model_alive(small_model):
    model = small_model().eval()
    sample(model, torch.ones(1, 12, dtype=torch.int64), graph=True)
    sampler, gone = graphs.shared_sampler(model), weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(ReferenceError, match="no longer exists"):
        sampler(torch.ones(1, 12, dtype=torch.int64))


def test_one_that_was_made_by_hand_keeps_its_model(small_model):
    sampler = GraphedSampler(small_model().eval())
    gc.collect()
    assert sampler(torch.ones(1, 12, dtype=torch.int64)).shape == (1, 32)


def test_few_shared_samplers_are_kept(model):
    samplers = [graphs.shared_sampler(model, steps=steps) for steps in range(1, 12)]
    assert graphs.shared_sampler(model, steps=11) is samplers[-1]
    assert graphs.shared_sampler(model, steps=1) is not samplers[0]
    assert len(graphs._shared[model]) == graphs.MAX_SHARED


# --- through sample ---------------------------------------------------------------------------


def test_sample_with_graph(model, sequences):
    expected = eager(model, sequences[:5], seed=5, steps=3)
    got = sample(model, sequences[:5], seed=5, steps=3, graph=True)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert graphs.shared_sampler(model, steps=3).captured == [(8, 12)]


def test_on_a_cpu_the_default_is_no_graph(small_model):
    model = small_model().eval()
    for _ in range(3):
        sample(model, torch.ones(1, 12, dtype=torch.int64))
    assert graphs.shared_sampler(model).captures == 0


@pytest.mark.gpu
def test_on_cuda_the_default_is_a_graph_once_a_batch_size_comes_back(small_model, monkeypatch):
    model = small_model().eval().cuda()
    sequences = make_sequences(3, 12, 61, 1).sequence.cuda()
    shared = graphs.shared_sampler(model)
    for captures in (0, 1, 1):
        torch.testing.assert_close(
            sample(model, sequences, seed=1), eager(model, sequences, seed=1), **CLOSE
        )
        assert shared.captures == captures
    monkeypatch.setenv("FMREC_FAST_GRAPH", "0")
    with dispatch_log() as log:
        sample(model, sequences[:1], seed=1)
        sample(model, sequences[:1], seed=1)
    assert shared.captures == 1 and log


@pytest.mark.gpu
def test_within_another_capture_the_sampler_is_part_of_it(small_model):
    model = small_model().eval().cuda()
    sequences = make_sequences(3, 12, 61, 1).sequence.cuda()
    expected = eager(model, sequences, seed=1)
    graph = torch.cuda.CUDAGraph()
    seed = torch.tensor(1, device="cuda")
    eager(model, sequences, seed=seed)
    with torch.cuda.graph(graph):
        out = sample(model, sequences, seed=seed)
    graph.replay()
    torch.testing.assert_close(out, expected, **CLOSE)


def test_a_first_call_without_haste_is_no_capture(model, sequences):
    sampler = GraphedSampler(model)
    expected = eager(model, sequences[:3], seed=1)
    for captures in (0, 1, 1):
        got = sampler.call(sequences[:3], seed=1, rows=None, at_once=False)
        torch.testing.assert_close(got, expected, **CLOSE)
        assert sampler.captures == captures


def test_training_flags_and_inference_mode(model, sequences):
    sampler = GraphedSampler(model)
    expected = eager(model, sequences[:3], seed=1)
    model.train()
    with torch.inference_mode():
        torch.testing.assert_close(sampler(sequences[:3], seed=1), expected, **CLOSE)
    assert model.training and model.embed_dropout.training
    got = sampler(sequences[:3], seed=1)  # may fill what was made in inference mode
    torch.testing.assert_close(got, expected, **CLOSE)
    assert not got.requires_grad and not got.is_inference()


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_batch": 0}, ValueError, "max_batch must be .*got 0"),
        ({"steps": 0}, ValueError, "steps must be .*got 0"),
        ({"steps": 2.0}, ValueError, "steps must be .*got 2.0"),
        ({"max_graphs": True}, ValueError, "max_graphs must be .*got True"),
        ({"k": 61}, ValueError, r"k must be in 1 .. 60 .*got 61"),
        ({"method": "rk45"}, ValueError, "in a graph, got 'rk45'"),
        ({"method": "parallel"}, ValueError, "looks at the residual on the host"),
        ({"sweeps": 2}, ValueError, "sweeps are for method 'parallel', got 2"),
        ({"method": "parallel", "sweeps": 0}, ValueError, "sweeps must be at least 1, got 0"),
        ({"padding": "none"}, ValueError, "padding must be one of .*got 'none'"),
        ({"precision": "fp8"}, ValueError, "precision must be one of .*got 'fp8'"),
        ({"step": 3}, TypeError, "step"),
    ],
)
def test_bad_settings_are_named(small_model, options, error, message):
    with pytest.raises(error, match=message):
        GraphedSampler(small_model(), **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"sequences": torch.tensor([[61]])}, ValueError, "got 61"),
        ({"sequences": torch.tensor([[1.0]])}, TypeError, "torch.float32"),
        ({"rows": torch.arange(3)}, ValueError, r"rows must be .*got \(3,\)"),
        ({"rows": torch.ones(2)}, TypeError, "rows must be int64"),
        ({"z0": torch.zeros(2, 31)}, ValueError, r"z0 must be .*got \(2, 31\)"),
        ({"z0": torch.zeros(2, 32).double()}, TypeError, "z0 must be float32, got torch.float64"),
        ({"seed": -1}, ValueError, "got -1"),
        ({"exclude": torch.ones(2, 1).long()}, ValueError, "k is None"),
    ],
)
def test_bad_inputs_are_named(small_model, options, error, message):
    sampler = GraphedSampler(small_model().eval())
    arguments = {"sequences": torch.ones(2, 12, dtype=torch.int64), **options}
    with pytest.raises(error, match=message):
        sampler(**arguments)


def test_bad_exclusions_are_named(small_model):
    sampler = GraphedSampler(small_model().eval(), k=3)
    sequences = torch.ones(2, 12, dtype=torch.int64)
    with pytest.raises(ValueError, match="got 61"):
        sampler(sequences, exclude=torch.full((2, 1), 61))
    with pytest.raises(ValueError, match=r"exclude must be .*got \(3, 1\)"):
        sampler(sequences, exclude=torch.ones(3, 1).long())


def test_what_cannot_be_a_graph_says_so(model, sequences):
    with pytest.raises(ValueError, match=r"graph = True: method must be .*got 'rk45'"):
        sample(model, sequences[:2], method="rk45", graph=True)
    with pytest.raises(ValueError, match="graph = True: explicit noise"):
        noise = torch.zeros(2, 2, 12, 32, device=sequences.device)
        sample(model, sequences[:2], noise=noise, graph=True)
    for options in ({"tol": 1e-3}, {"return_residual": True}):
        with pytest.raises(ValueError, match="graph = True: tol and the residual"):
            sample(model, sequences[:2], method="parallel", **options, graph=True)
    with use_rng("published"), pytest.raises(ValueError, match="graph = True: the published"):
        sample(model, sequences[:2], graph=True)


# --- nothing in the region waits for the host --------------------------------------------------


class NoHostCalls(TorchFunctionMode):
    """Refuses what makes tensors of host data, and what looks at tensors on the host."""

    refused = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.equal, torch.allclose)
    methods = frozenset(
        "item tolist numpy cpu cuda __bool__ __int__ __float__ __index__ nonzero".split()
    )

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.refused or getattr(func, "__name__", "") in self.methods:
            raise AssertionError(f"{func} waits for the host or copies from it")
        return func(*args, **(kwargs or {}))


class NoHostOps(TorchDispatchMode):
    """Refuses ops that mix devices (copies, tensors made of Python numbers) or read values back;
    counts the others, views aside: each is at least one launch."""

    refused = frozenset(
        "_local_scalar_dense item is_nonzero nonzero masked_select unique equal".split()
    )
    views = frozenset(
        "view _unsafe_view expand select slice transpose t permute unsqueeze squeeze detach "
        "alias as_strided split chunk unbind empty empty_like new_empty lift_fresh".split()
    )

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.refused:
            raise AssertionError(f"{func} waits for the host")
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs or {}, out))
        devices = {leaf.device for leaf in leaves if isinstance(leaf, Tensor)}
        if len(devices) > 1:
            raise AssertionError(f"{func} copies between {devices}")
        if name not in self.views:
            self.launches[name] += 1
        return out


@pytest.mark.parametrize(
    "attention, target, trajectory, drawn, method, sweeps, padding",
    [
        ("published", "data", "straight", True, "euler", None, "published"),
        ("causal", "velocity", "cosine", False, "euler", None, "published"),
        ("published", "data", "straight", False, "euler", None, "tied"),
        ("published", "data", "cosine", True, "parallel", 2, "published"),
        ("published", "data", "straight", False, "parallel", 1, "tied"),
    ],
)
def test_the_region_neither_copies_from_the_host_nor_waits_for_it(
    small_args, attention, target, trajectory, drawn, method, sweeps, padding
):
    """On tensors without memory: every op of the definitions is seen, none is run."""
    args = small_args(attention=attention, target=target, trajectory=trajectory, num_heads=4)
    options = graphs._Options(8, 3, method, sweeps, "float32", padding, 5, 1)
    with use_backend("reference"):
        with torch.device("meta"):
            model = FMRecommender.from_config(args).eval()
        long = {"dtype": torch.int64, "device": "meta"}
        inputs = graphs._Inputs(
            torch.zeros(8, 12, **long),
            torch.arange(8, device="meta"),
            None if drawn else torch.zeros((), **long),
            None if drawn else torch.zeros(8, 32, device="meta"),
            torch.zeros(8, 2, **long),
        )
        with NoHostOps() as seen, NoHostCalls():
            ids, scores = graphs._region(lambda: model, inputs, options)
    assert ids.shape == scores.shape == (8, 5)
    assert seen.launches.total() > 100


def small_fave() -> FaveRecommender:
    return FaveRecommender.from_config(
        FaveConfig(item_num=61, hidden_size=32, max_len=12, num_blocks=3, sample_N=2)
    ).eval()


@pytest.mark.parametrize("finetuned", [False, True])
@pytest.mark.parametrize("drawn", [False, True])
def test_the_region_of_fave_neither_copies_from_the_host_nor_waits_for_it(finetuned, drawn):
    options = graphs._Options(8, None, "euler", None, "float32", "published", 5, 1)
    with use_backend("reference"):
        model = small_fave().to("meta")
        if finetuned:
            model.switch_to_finetune()
            model.eval()
        long = {"dtype": torch.int64, "device": "meta"}
        inputs = graphs._Inputs(
            torch.zeros(8, 12, **long),
            torch.arange(8, device="meta"),
            None if drawn else torch.zeros((), **long),
            None,
            torch.zeros(8, 2, **long),
        )
        with NoHostOps() as seen, NoHostCalls():
            ids, scores = graphs._region(lambda: model, inputs, options)
    assert ids.shape == scores.shape == (8, 5)
    assert seen.launches.total() > 100


def test_fave_follows_its_stage(device, sequences):
    model = small_fave().to(device)
    recommender = GraphedSampler(model, max_batch=32, k=5)
    for finetuned in (False, True):
        if finetuned:
            model.switch_to_finetune()
            model.eval()
        nothing = torch.empty(len(sequences), 0, dtype=torch.int64, device=device)
        expected = rank_items(model, eager(model, sequences, seed=3), 5, nothing)
        best = recommender(sequences, seed=3)
        assert torch.equal(best.ids, expected.ids)
        torch.testing.assert_close(best.scores, expected.scores)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x + torch.tensor(1.0, device="meta"),
        lambda x: x * torch.ones(()),
        lambda x: x[x > 0],
        lambda x: x if (x > 0).any() else -x,
        lambda x: x * x.sum().item(),
        lambda x: x.to("cpu"),
    ],
)
def test_the_check_above_finds_what_it_is_for(wrong):
    x = torch.zeros(3, device="meta")
    with pytest.raises((AssertionError, NotImplementedError)), NoHostOps(), NoHostCalls():
        wrong(x)


def test_around_a_replay_there_are_a_handful_of_launches(small_args, monkeypatch):
    """Copies in, copies out: the numbers that docs/performance.md gives."""
    with torch.device("meta"):  # no memory, and no look at it
        model = FMRecommender.from_config(small_args()).eval()
        exclude = torch.ones(5, 3, dtype=torch.int64)
    for batch, k, options, launches in (
        (8, None, {}, 3),  # histories, names of the rows; embeddings out
        (5, None, {}, 4),  # empties the rows behind the batch
        (5, 10, {"seed": 1, "exclude": exclude}, 9),  # seed, exclusions; ids and scores out
    ):
        sampler = GraphedSampler(model, k=k)
        sequences = torch.ones(batch, 12, dtype=torch.int64, device="meta")
        with use_backend("reference"):
            sampler(sequences, **options)
        (graph,) = sampler._graphs.values()
        monkeypatch.setattr(graph.capture, "replay", lambda graph=graph: graph.capture.outputs)
        with use_backend("reference"), NoHostOps() as seen:
            sampler(sequences, **options)
        assert seen.launches.total() == launches, seen.launches


@pytest.mark.gpu
def test_a_call_never_synchronises(small_model):
    model = small_model().eval().cuda()
    sequences = make_sequences(3, 12, 61, 1).sequence.cuda()
    seed = torch.tensor(1, device="cuda")
    sampler = GraphedSampler(model, k=5)
    sampler(sequences, seed=seed)
    sampler(sequences)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            sampler(sequences, seed=seed)
            sampler(sequences, seed=3)
            sampler(sequences)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_graphs_share_their_memory(small_model):
    """The scores of 8 x 500,000 items are 16 MB and more, as integers; every bucket needs them."""
    model = small_model(item_num=500_000).eval().cuda()
    sequences = make_sequences(8, 12, 61, 1).sequence.cuda()
    sampler = GraphedSampler(model, max_batch=8, k=5)
    sampler(sequences, seed=1)
    reserved = torch.cuda.memory_reserved()
    for batch in (4, 2, 1):
        sampler(sequences[:batch], seed=1)
    assert sampler.captures == 4
    assert torch.cuda.memory_reserved() - reserved < 2**23


def test_only_on_cuda_there_is_a_cuda_graph(model, sequences):
    sampler = GraphedSampler(model)
    sampler(sequences[:2], seed=1)
    (graph,) = sampler._graphs.values()
    assert (graph.capture.graph is not None) == sequences.is_cuda
