"""Packed weights are kept for as long as no bit of the weights changes, whoever writes it."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrize

from fmrec_fast import (
    FaveConfig,
    FaveRecommender,
    extension,
    packing,
    recommend,
    sample,
    use_backend,
    use_rng,
)
from fmrec_fast.backend import Backend, dispatch_log

if not extension.available():
    pytest.skip(str(extension.reason()), allow_module_level=True)

C = extension.load()
SEQUENCES = torch.tensor([[0, 0, 0, 5], [1, 2, 3, 4], [0, 9, 9, 9], [0, 0, 0, 0], [60, 1, 60, 1]])


@pytest.fixture(params=["fmrec", "fave"])
def model(request, small_model):
    if request.param == "fmrec":
        return small_model(lambda_uncertainty=0.2, max_len=4).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = FaveConfig(
            item_num=61, hidden_size=32, max_len=4, num_blocks=3, last=2, lambda_uncertainty=0.2
        )
        model = FaveRecommender.from_config(config)
    model.switch_to_finetune()
    return model.eval()


@pytest.fixture
def packs(monkeypatch):
    """How often weights were packed."""
    calls, pack = [], packing.pack
    monkeypatch.setattr(packing, "pack", lambda *given: calls.append(1) or pack(*given))
    return calls


def run(model):
    return sample(model, SEQUENCES, seed=3, steps=2)


def fresh(model):
    """What a model that was never called gives."""
    return run(copy.deepcopy(model))


def weights(model):
    return packing.weights_of(model.fm)


def parameter(model):
    return model.fm.xstart_model.att.transformer_blocks[1].feed_forward.w_1.weight


# --- what is noticed ------------------------------------------------------------------------------


def test_packed_once_while_nothing_changes(model, packs):
    expected = run(model)
    for _ in range(3):
        assert torch.equal(run(model), expected)
    recommend(model, [[1, 2]], k=3)
    e, mask = model.embed(SEQUENCES)
    model.fm.integrate(e, mask, torch.zeros(5, 32), seed=1, steps=2)
    assert len(packs) == 1


def test_every_bit_is_noticed(model, packs):
    """One bit at the start, in the middle and at the end of each tensor, through numpy."""
    run(model)
    tensors = weights(model)._made_from
    assert len(tensors) >= 3 * 14 + 4
    tensors = [t for t in tensors if t.requires_grad]  # other angles than the other blocks': below
    rng = np.random.default_rng(0)
    for tensor in tensors:
        bits = tensor.detach().numpy().view(np.uint32).reshape(-1)
        for at in (0, len(bits) // 2, len(bits) - 1):
            before = len(packs)
            bits[at] ^= np.uint32(1) << np.uint32(rng.integers(0, 23))
            run(model)
            assert len(packs) == before + 1
    assert torch.equal(run(model), fresh(model))


def swap(one, other):
    kept = one.clone()
    one.copy_(other)
    other.copy_(kept)


def optimizer_step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def numpy_view(model):
    array = parameter(model).detach().numpy()
    np.multiply(array, 2, out=array)


def transposed(model):
    layer = model.fm.xstart_model.att.transformer_blocks[1].attention.w_layer
    layer.weight.data = layer.weight.data.t()


def other_module(model):
    attention = model.fm.xstart_model.att.transformer_blocks[0].attention
    attention.w_layer = torch.nn.Linear(32, 32)


def other_parameter(model):
    layer = model.fm.xstart_model.att.transformer_blocks[0].attention.w_layer
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


def swapped_weights(model):
    layers = model.fm.xstart_model.att.transformer_blocks[1].attention.linear_layers
    swap(layers[0].weight.data, layers[2].weight.data)


def swapped_blocks(model):
    blocks = model.fm.xstart_model.att.transformer_blocks
    blocks[0], blocks[1] = blocks[1], blocks[0]


def rows_of_a_lane(model):
    """Two numbers whose distance is a multiple of any vector's length."""
    flat = parameter(model).data.view(-1)
    swap(flat[7:8], flat[7 + 512 : 8 + 512])


def neighbours(model):
    flat = parameter(model).data.view(-1)
    swap(flat[6:7], flat[7:8])


def pieces(model):
    """Pieces of the size that a digest is of."""
    flat = parameter(model).data.view(-1)
    swap(flat[:512], flat[512:1024])


def time_embedding(model):
    for layer in model.fm.xstart_model.time_layers():
        layer[2].bias.data.add_(1)


CHANGES = (
    optimizer_step,
    numpy_view,
    transposed,
    other_module,
    other_parameter,
    swapped_weights,
    swapped_blocks,
    rows_of_a_lane,
    neighbours,
    pieces,
    time_embedding,
    lambda model: setattr(parameter(model), "data", parameter(model).data * 2),
    lambda model: parameter(model).data.mul_(2),
    lambda model: model.fm.xstart_model.norm_fm_rep.weight.data.mul_(2),
    lambda model: model.item_embeddings.weight.data[:, :3].mul_(2),
    lambda model: model.LayerNorm.bias.data.add_(1),
    lambda model: del_block(model),
    lambda model: (model.double(), parameter(model).data.mul_(2), model.float()),
)


def del_block(model):
    del model.fm.xstart_model.att.transformer_blocks[0]


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(model, change):
    before = run(model)
    users = [[1, 2, 3], [60]]
    best = recommend(model, users, k=5, seed=3, steps=2)
    change(model)
    after = run(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(model))
    again = recommend(model, users, k=5, seed=3, steps=2)
    assert not torch.equal(again.scores, best.scores)
    expected = recommend(copy.deepcopy(model), users, k=5, seed=3, steps=2)
    assert torch.equal(again.scores, expected.scores)


def test_a_change_that_is_taken_back(model):
    before = run(model)
    kept = parameter(model).detach().clone()
    parameter(model).data.mul_(2)
    assert not torch.equal(run(model), before)
    parameter(model).data.copy_(kept)
    assert torch.equal(run(model), before)


def test_settings_are_read_at_each_call(model):
    before = run(model)
    rotary = model.fm.xstart_model.att.variant.rotary  # whose angles are for a width
    for name, value in (("lambda_uncertainty", 0.5), ("num_heads", 4 if rotary else 2)):
        owner = model.fm.xstart_model if name == "lambda_uncertainty" else model.fm.xstart_model.att
        setattr(owner, name, value)
        after = run(model)
        assert not torch.equal(after, before) or (rotary and name == "num_heads")
        assert torch.equal(after, fresh(model))
        before = after
    model.fm.eps = 0.05
    assert torch.equal(run(model), fresh(model))


@pytest.mark.parametrize("model", ["fave"], indirect=True)
def test_other_angles_are_noticed(model):
    blocks = model.fm.xstart_model.att.transformer_blocks
    before = run(model)
    for block in blocks:
        block.attention.rope.inv_freq.data.mul_(3)
    after = run(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh(model))
    blocks[0].attention.rope.inv_freq.data.mul_(3)
    with dispatch_log() as log:
        after = run(model)
    assert [entry.op for entry in log if entry.backend is Backend.CPP] != ["euler_sampler"]
    assert torch.equal(after, fresh(model))


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_computed_weight_is_read_at_each_call(model):
    layer = model.fm.xstart_model.att.transformer_blocks[1].attention.w_layer
    layer.requires_grad_(False)
    before = run(model)
    parametrize.register_parametrization(layer, "weight", Doubled())
    doubled = run(model)
    assert not weights(model).can_stay
    assert not torch.equal(doubled, before)
    layer.parametrizations.weight.original.data.mul_(0.5)
    assert torch.equal(run(model), before)


def test_weights_under_functional_call(model):
    before = run(model)
    name = next(name for name, p in model.named_parameters() if p is parameter(model))
    changed = {name: parameter(model).detach() * 2}

    class Sampler(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return run(self.model)

    got = torch.func.functional_call(Sampler(), {f"model.{name}": changed[name]}, ())
    assert not torch.equal(got, before)
    assert torch.equal(run(model), before)


# --- where it is kept -----------------------------------------------------------------------------


def test_copies_and_pickles_leave_it_behind(model):
    plain = len(pickle.dumps(model))
    expected = run(model)
    held = weights(model)
    assert held.can_stay and weights(model) is held
    twin = copy.deepcopy(model)
    assert all(m.__dict__["_keeper"].weights is None for m in (twin, twin.fm))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (twin, pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(run(other), expected)
        assert weights(other) is not held
    assert len(pickle.dumps(model)) < plain + 500
    shallow = copy.copy(model.fm)
    parameter(model).data.mul_(2)
    assert packing.weights_of(shallow) is held  # the same tensors
    shallow._modules = dict(shallow._modules)
    assert packing.weights_of(shallow) is not held


def test_it_goes_with_the_model(small_model):
    model = small_model().eval()
    run(model)
    state = weakref.ref(weights(model))
    del model
    gc.collect()
    assert state() is None


def test_few_kinds_are_kept(model):
    for length in range(1, 5):
        for steps in range(1, 40):
            sample(model, SEQUENCES[:, :length], seed=1, steps=steps)
    state = weights(model).state()
    assert 1 <= len(state._packed) <= packing.MOST_PACKED
    assert len(state._taus) == 39 <= packing.MOST_TAUS
    assert torch.equal(run(model), fresh(model))


def test_threads_share_it(model):
    expected, found = fresh(model), []

    def work():
        found.extend(run(model) for _ in range(10))

    for _ in range(3):
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(one, expected) for one in found)
        found.clear()
        parameter(model).data.mul_(1.5)
        expected = fresh(model)


def test_what_changes_while_it_is_packed_is_not_kept(model, monkeypatch):
    pack = packing.pack

    def packed_meanwhile(*given):
        found = pack(*given)
        parameter(model).data.mul_(2)
        return found

    monkeypatch.setattr(packing, "pack", packed_meanwhile)
    run(model)
    monkeypatch.setattr(packing, "pack", pack)
    parameter(model).data.mul_(0.5)  # as it was when it was read
    assert torch.equal(run(model), fresh(model))
    parameter(model).data.mul_(2)
    assert torch.equal(run(model), fresh(model))


# --- sampling in one call -------------------------------------------------------------------------


def test_sample_in_one_call_is_the_definitions(model):
    rows = torch.tensor([5, 2**33, 0, -4, 5])
    for options in ({}, {"steps": 1}, {"rows": rows}, {"seed": 2**64 - 1}):
        given = {"seed": 3, "steps": 2} | options
        with use_backend("cpp"), dispatch_log() as log:
            one = sample(model, SEQUENCES, **given)
        assert [(entry.op, entry.backend) for entry in log] == [("euler_sampler", Backend.CPP)]
        with use_backend("reference"):
            torch.testing.assert_close(one, sample(model, SEQUENCES, **given), atol=1e-5, rtol=1e-4)


def test_a_row_does_not_depend_on_its_batch(model):
    sequences = SEQUENCES.repeat(130, 1)  # more than are taken together
    rows = torch.arange(len(sequences))
    whole = sample(model, sequences, seed=3, steps=1)
    for at in (0, 1, 4, 511, 512, 649):
        alone = sample(model, sequences[at : at + 1], seed=3, steps=1, rows=rows[at : at + 1])
        assert torch.equal(alone[0], whole[at])
    assert sample(model, sequences[:0], seed=3).shape == (0, 32)
    scattered = sequences.t().contiguous().t()
    assert torch.equal(sample(model, scattered, seed=3, steps=1), whole)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"sequences": SEQUENCES + 1},
            ValueError,
            "item id in sequence must be in 0 .. 60, got 61",
        ),
        ({"sequences": -SEQUENCES}, ValueError, "got -"),
        ({"sequences": SEQUENCES.float()}, TypeError, "int64"),
        ({"sequences": SEQUENCES[0]}, ValueError, "sequence must be"),
        ({"sequences": SEQUENCES[:, :0]}, ValueError, "L >= 1"),
        ({"steps": 0}, ValueError, "steps must be"),
        ({"seed": -1}, ValueError, "seed must satisfy"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, ValueError, "rows must be"),
        ({"padding": "tight"}, ValueError, "padding must be one of"),
        ({"precision": "half"}, ValueError, "precision must be one of"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(model, change, error, message):
    with pytest.raises(error, match=message):
        sample(model, **{"sequences": SEQUENCES, "seed": 1, **change})


def test_published_draws_are_made_step_by_step(model):
    with use_rng("published"):
        torch.manual_seed(1)
        one = sample(model, SEQUENCES)
        torch.manual_seed(1)
        assert torch.equal(sample(model, SEQUENCES), one)
    torch.manual_seed(1)
    assert not torch.equal(sample(model, SEQUENCES), one)


# --- the fingerprint ------------------------------------------------------------------------------


def arrays_of(sizes):
    rng = np.random.default_rng(1)
    return [rng.standard_normal(size).astype(np.float32) for size in sizes]


@pytest.mark.parametrize("isa", C.supported_isas())
@pytest.mark.parametrize("sizes", [[1], [3, 0, 17], [511, 512, 513], [20_000], [1] * 300, [70_000]])
def test_any_bit_changes_the_fingerprint(sizes, isa):
    arrays = arrays_of(sizes)
    watch, before = C.Watch(arrays), C.isa()
    assert watch.nbytes == 4 * sum(sizes)
    rng = np.random.default_rng(2)
    C.set_isa(isa)
    try:
        last = watch.read()
        for n in range(100):
            array = arrays[rng.integers(len(arrays))]
            if len(array):
                array.view(np.uint32)[rng.integers(len(array))] ^= np.uint32(1 << (n % 32))
                now = watch.read()
                assert now != last and watch.read() == now
                last = now
    finally:
        C.set_isa(before)


def test_order_counts():
    a, b = arrays_of([512, 512])
    assert C.Watch([a, b]).read() != C.Watch([b, a]).read()
    assert C.Watch([np.concatenate([a, b])]).read() == C.Watch([a, b]).read()  # whole pieces
    assert C.Watch([]).read() == bytes(16)


@pytest.mark.parametrize(
    "bad, error, message",
    [
        ([np.zeros(3)], TypeError, r"arrays\[0\] must be of dtype float32"),
        ([np.zeros(3, np.float32), 1.0], TypeError, r"arrays\[1\] must be a numpy array"),
        ([np.zeros((4, 4), np.float32).T[:2]], ValueError, r"arrays\[0\]"),
    ],
)
def test_what_cannot_be_watched(bad, error, message):
    with pytest.raises(error, match=message):
        C.Watch(bad)


def test_same_values():
    one, two = object(), object()
    held = {"a": one, "b": two}
    assert C.same_values([(held, [one, two])])
    assert not C.same_values([(held, [two, one])])
    assert not C.same_values([(held, [one])])
    assert C.same_values([])
    with pytest.raises((TypeError, RuntimeError)):
        C.same_values([(held, 3)])
