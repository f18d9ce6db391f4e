"""From ids to the best items in one C++ call: the same items as step by step on the definitions."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from fmrec_fast import FaveConfig, FaveRecommender, Server, extension, recommend
from fmrec_fast.backend import Backend, BackendError, dispatch_log, use_backend
from fmrec_fast.ops.encoder import pack

if not extension.available():
    pytest.skip(str(extension.reason()), allow_module_level=True)

C = extension.load()
HISTORIES = [[5], [1, 2, 3, 4], list(range(1, 30)), [60] * 12, [7, 7, 8]]


@pytest.fixture
def model(small_model):
    return small_model(lambda_uncertainty=0.2).eval()


def both(model, histories, **options):
    """(in one call, on the definitions)."""
    with use_backend("cpp"), dispatch_log() as log:
        one = recommend(model, histories, **{"method": "euler", **options})
    assert [(entry.op, entry.backend) for entry in log] == [
        ("picard_sweep" if options.get("method") == "parallel" else "euler_sampler", Backend.CPP),
        ("item_ranking", Backend.CPP),
    ]
    with use_backend("reference"):
        return one, recommend(model, histories, **options)


def assert_same(one, other):
    assert torch.equal(one.ids, other.ids)
    torch.testing.assert_close(one.scores, other.scores, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("padding", ["published", "tied"])
@pytest.mark.parametrize(
    "options",
    [
        {"k": 1, "steps": 1},
        {"k": 10},
        {"k": 60, "exclude_seen": True},
        {"k": 5, "exclude": [[1, 2], [], [-1, 3], [0], [9]], "exclude_seen": True},
        {"k": 7, "rows": torch.tensor([5, 2**33, 0, -4, 5])},
    ],
    ids=str,
)
def test_the_same_items_as_on_the_definitions(model, padding, options):
    one, other = both(model, HISTORIES, seed=3, padding=padding, **options)
    assert_same(one, other)
    options = {"method": "euler", **options}
    served = Server(model).recommend(HISTORIES, seed=3, padding=padding, **options)
    assert torch.equal(served.ids, one.ids)
    assert torch.equal(served.scores, one.scores)


@pytest.mark.parametrize("padding", ["published", "tied"])
@pytest.mark.parametrize("delta", [0.001, 0.2])
def test_all_steps_at_once(small_model, padding, delta):
    model = small_model(lambda_uncertainty=delta).eval()
    options = {"k": 9, "seed": 3, "padding": padding, "steps": 7}
    one, other = both(model, HISTORIES, method="parallel", **options)
    assert_same(one, other)
    step_by_step = recommend(model, HISTORIES, method="euler", **options)
    assert torch.equal(one.ids, step_by_step.ids)
    torch.testing.assert_close(one.scores, step_by_step.scores, atol=1e-3, rtol=1e-4)
    served = Server(model).recommend(HISTORIES, method="parallel", **options)
    assert torch.equal(served.scores, one.scores)


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
@pytest.mark.parametrize("method", ["euler", "parallel"])
def test_precisions(model, precision, method):
    options = {"k": 9, "seed": 3, "method": method}
    one, definition = both(model, HISTORIES, precision=precision, **options)
    limit = {"tf32": 2e-3, "bf16": 2e-2}[precision]
    assert (one.scores - definition.scores).abs().max() < limit * definition.scores.abs().max()
    server = Server(model, precision=precision)
    served = server.recommend(HISTORIES, **options)
    assert torch.equal(served.ids, one.ids)
    assert torch.equal(served.scores, one.scores)
    with torch.no_grad():  # packed anew, in the same precision
        model.item_embeddings.weight.mul_(2)
    changed = server.recommend(HISTORIES, **options)
    with use_backend("cpp"):
        again = recommend(model, HISTORIES, precision=precision, **options)
    assert torch.equal(changed.scores, again.scores)
    for call in (lambda: Server(model, "fp8"), lambda: recommend(model, [[1]], precision="fp8")):
        with pytest.raises(ValueError, match=r"precision must be one of .*got 'fp8'"):
            call()


@pytest.fixture
def fave():
    """Makes a small model of Fave in its second stage."""

    def make(**changes):
        sizes = {"item_num": 61, "hidden_size": 32, "max_len": 12, "num_blocks": 3, "last": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = FaveConfig(**sizes, lambda_uncertainty=0.2, sample_N=4, **changes)
            model = FaveRecommender.from_config(config)
            for name, parameter in model.named_parameters():
                if "norm" in name.lower():
                    torch.nn.init.normal_(parameter, 0.5, 0.3)
        model.switch_to_finetune()
        return model.eval()

    return make


@pytest.mark.parametrize("anchor", ["published", "history"])
@pytest.mark.parametrize("onestep", ["published", "displacement"])
def test_fave_in_one_call(fave, anchor, onestep):
    """The anchor, its mask and the step are those of the definitions; so is stage 1."""
    model = fave(anchor=anchor, onestep=onestep, infer_mask_ratio=0.7)
    server, rows = Server(model), torch.tensor([5, 2**33, 0, -4, 5])
    one, other = both(model, HISTORIES, k=9, seed=3, rows=rows)
    assert_same(one, other)
    served = server.recommend(HISTORIES, k=9, seed=3, rows=rows)
    assert torch.equal(served.scores, one.scores)
    model.stage = "pretrain"
    one, other = both(model, HISTORIES, k=9, seed=3, rows=rows)
    assert_same(one, other)
    assert torch.equal(server.recommend(HISTORIES, k=9, seed=3, rows=rows).scores, one.scores)


def test_what_fave_has_no_call_for(fave):
    """`recommend` goes step by step; a `Server` refuses."""
    model = fave(onestep="displacement")
    for options, message in (
        ({"padding": "tied"}, "no rotary embedding with padding 'tied'"),
        ({"method": "parallel", "steps": 2}, "for target 'data', got 'velocity'"),
    ):
        with pytest.raises(BackendError, match=message):
            Server(model).recommend(HISTORIES, k=3, **options)
        assert recommend(model, HISTORIES, k=3, seed=1, **options).ids.shape == (5, 3)
    model.fave.xstart_model.att.transformer_blocks[1].attention.rope.inv_freq.mul_(2)
    with pytest.raises(BackendError, match="rotates all blocks by the same angles"):
        Server(model)
    assert recommend(model, HISTORIES, k=3, seed=1).ids.shape == (5, 3)


def test_a_server_sees_other_angles(fave):
    model = fave()
    server = Server(model)
    before = server.recommend(HISTORIES, k=9, seed=1)
    for block in model.fave.xstart_model.att.transformer_blocks:
        block.attention.rope.inv_freq.mul_(3)
    after = server.recommend(HISTORIES, k=9, seed=1)
    assert not torch.equal(after.scores, before.scores)
    assert torch.equal(after.scores, recommend(model, HISTORIES, k=9, seed=1).scores)


def test_one_step_is_one_step(model):
    one = recommend(model, HISTORIES, k=9, seed=3, steps=1, method="parallel")
    assert torch.equal(
        one.scores, recommend(model, HISTORIES, k=9, seed=3, steps=1, method="euler").scores
    )


@pytest.mark.parametrize("width", [6, 36, 96])
def test_widths(small_model, width):
    model = small_model(hidden_size=width, num_heads=3 if width == 6 else 4).eval()
    assert_same(*both(model, HISTORIES, seed=1, k=5))


def test_a_user_alone_gets_the_same(model):
    rows = torch.arange(5)
    whole = recommend(model, HISTORIES, k=9, seed=1, rows=rows)
    for i, history in enumerate(HISTORIES):
        alone = recommend(model, [history], k=9, seed=1, rows=rows[i : i + 1])
        assert torch.equal(alone.ids[0], whole.ids[i])
        assert torch.equal(alone.scores[0], whole.scores[i])


def test_no_users(model):
    assert recommend(model, [], k=3).ids.shape == (0, 3)
    assert Server(model).recommend([], k=3).scores.shape == (0, 3)


def test_many_users(model):
    histories = [[1 + i % 60, 2] for i in range(600)]  # more than are taken together
    whole = recommend(model, histories, k=3, seed=2, steps=1)
    part = recommend(model, histories[590:], k=3, seed=2, steps=1, rows=torch.arange(590, 600))
    assert torch.equal(part.ids, whole.ids[590:])


def test_a_seed_left_open_is_torchs(model):
    torch.manual_seed(5)
    one = recommend(model, HISTORIES, k=5)
    torch.manual_seed(5)
    assert torch.equal(Server(model).recommend(HISTORIES, k=5).ids, one.ids)


def test_settings_are_read_afresh(model):
    server = Server(model)
    for change in ({"sample_N": 2}, {"eps": 0.05}):
        for name, value in change.items():
            setattr(model.fm, name, value)
        expected = recommend(model, HISTORIES, k=9, seed=1)
        assert torch.equal(server.recommend(HISTORIES, k=9, seed=1).scores, expected.scores)


def test_a_model_in_training_mode_is_served_without_dropout(model):
    expected = recommend(model, HISTORIES, k=9, seed=1)
    model.train()
    assert torch.equal(recommend(model, HISTORIES, k=9, seed=1).ids, expected.ids)
    assert all(module.training for module in model.modules())


def parameter(model):
    return model.fm.xstart_model.att.transformer_blocks[1].feed_forward.w_1.weight


def optimizer_step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def replaced(model):
    layer = model.fm.xstart_model.att.transformer_blocks[0].attention.w_layer
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


SEEN = {
    "load_state_dict": lambda m: m.load_state_dict(
        {k: v + 0.1 if v.ndim == 2 else v for k, v in m.state_dict().items()}
    ),
    "in place": lambda m: parameter(m).detach().mul_(2),
    "data replaced": lambda m: setattr(parameter(m), "data", parameter(m).data * 2),
    "to": lambda m: (m.double(), parameter(m).data.mul_(2), m.float()),
    "optimizer": optimizer_step,
    "another parameter": replaced,
    "time embedding": lambda m: m.fm.xstart_model.time_embed[2].bias.detach().add_(3),
    "item table": lambda m: m.item_embeddings.weight.detach().add_(1),
}


@pytest.mark.parametrize("change", SEEN.values(), ids=SEEN.keys())
def test_changes_that_a_server_sees(model, change):
    server = Server(model)
    before = server.recommend(HISTORIES, k=9, seed=1)
    change(model)
    after = server.recommend(HISTORIES, k=9, seed=1)
    assert not torch.equal(after.scores, before.scores)
    assert torch.equal(after.scores, recommend(model, HISTORIES, k=9, seed=1).scores)


def test_changes_that_a_server_must_be_told(model):
    server = Server(model)
    before = server.recommend(HISTORIES, k=9, seed=1)
    weight = parameter(model).detach().numpy()
    np.multiply(weight, 2, out=weight)
    assert torch.equal(server.recommend(HISTORIES, k=9, seed=1).scores, before.scores)
    server.refresh()
    after = server.recommend(HISTORIES, k=9, seed=1)
    assert torch.equal(after.scores, recommend(model, HISTORIES, k=9, seed=1).scores)
    assert not torch.equal(after.scores, before.scores)


def test_models_that_cannot_be_served(small_model, model):
    for bad, message in (
        (small_model(attention="causal"), "published options only.*'causal'"),
        (small_model(trajectory="cosine"), "published options only.*'cosine'"),
        (small_model().double(), "takes float32, got torch.float64"),
    ):
        with pytest.raises(BackendError, match=message):
            Server(bad)
    with use_backend("reference"), pytest.raises(BackendError, match="in force is 'reference'"):
        Server(model)
    causal = small_model(attention="causal").eval()
    assert recommend(causal, HISTORIES, k=3, seed=1).ids.shape == (5, 3)  # step by step


@pytest.mark.parametrize(
    "change, message",
    [
        ({"histories": [[]]}, "history 0 is empty"),
        ({"histories": [[61]]}, "history 0 has item id 61"),
        ({"k": 61}, r"k must be in 1 \.\. 60"),
        ({"steps": 0}, "steps must be an integer of at least 1 or None, got 0"),
        ({"method": "newton"}, "method must be one of .*got 'newton'"),
        ({"padding": "tight"}, "padding must be one of .*got 'tight'"),
        ({"exclude": []}, "exclude must have one list for each of 1 histories, got 0"),
        ({"exclude": [[61]]}, "got 61 in list 0"),
        ({"exclude": [[-2]]}, "got -2 in list 0"),
        ({"rows": torch.zeros(2, dtype=torch.int64)}, "rows must be"),
    ],
    ids=str,
)
def test_bad_requests_are_named(model, change, message):
    given = {"histories": [[1]], "k": 3, **change}
    for serve in (Server(model).recommend, lambda *a, **o: recommend(model, *a, **o)):
        with pytest.raises(ValueError, match=message):
            serve(given["histories"], **{k: v for k, v in given.items() if k != "histories"})


# --- the boundary ---------------------------------------------------------------------------


def zeros(*shape):
    return np.zeros(shape, np.float32)


def integers(*shape):
    return np.zeros(shape, np.int64)


def arguments(model):
    weights = model.fm.sampler_weights()
    return {
        "packed": pack(weights.blocks, 4),
        **{name: zeros(32) for name in ("norm_weight", "norm_bias")},
        "items": zeros(61, 32),
        **{name: zeros(32) for name in ("embedded_weight", "embedded_bias")},
        "ids": integers(3, 12),
        "taus": zeros(2, 32),
        "rows": integers(3),
        **{"seed": 1, "start_seed": 2, "delta": 0.1, "exclude": None},
        "scores": zeros(3, 5),
        "best": integers(3, 5),
        "num_threads": 1,
    }


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("norm_weight", zeros(31), ValueError, r"norm_weight must have shape \[D\]"),
        ("norm_bias", zeros(31), ValueError, r"norm_bias must have shape \[D\]"),
        ("items", zeros(61, 31), ValueError, r"items must have shape \[V, D\] = \(61, 32\)"),
        ("items", zeros(4, 32), ValueError, "k must be at most V = 4, got 5"),
        ("embedded_weight", zeros(31), ValueError, "embedded_weight must have shape"),
        ("embedded_bias", zeros(31), ValueError, "embedded_bias must have shape"),
        ("ids", integers(3, 0), ValueError, "at least one position"),
        ("ids", zeros(3, 12), TypeError, "ids must be of dtype int64"),
        ("ids", integers(3, 12) + 61, ValueError, r"ids must be in 0 \.\. 60, got 61"),
        ("ids", integers(3, 12) - 1, ValueError, "got -1"),
        ("taus", zeros(0, 32), ValueError, "at least one step"),
        ("taus", zeros(2, 31), ValueError, r"taus must have shape \[q, D\]"),
        ("rows", integers(4), ValueError, r"rows must have shape \[B\]"),
        ("exclude", integers(2, 3), ValueError, r"exclude must have shape \[B, E\]"),
        ("scores", zeros(2, 5), ValueError, r"scores must have shape \[B, k\]"),
        ("best", integers(3, 4), ValueError, r"best must have shape \[B, k\]"),
        ("num_threads", 0, ValueError, "num_threads must be at least 1, got 0"),
        ("start", "item", ValueError, "start must be 'noise', .* got 'item'"),
    ],
)
def test_bad_arguments_are_refused(model, name, value, error, message):
    with pytest.raises(error, match=message):
        C.recommend(**{**arguments(model), name: value})


# --- processes ------------------------------------------------------------------------------


def in_child(work) -> int:
    """The exit status of a forked child that runs `work`; -1 where it hangs."""
    import signal
    import time

    child = os.fork()
    if child == 0:
        status = 1
        try:
            status = 0 if work() else 2
        finally:
            os._exit(status)
    for _ in range(400):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return -1


class Served(torch.utils.data.Dataset):
    """Recommendations made in a worker."""

    def __init__(self, model):
        self.model = model

    def __len__(self):
        return 1

    def __getitem__(self, index):
        return recommend(self.model, HISTORIES * 20, k=9, seed=1).ids


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_neither_hangs_nor_errs(model):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        histories = HISTORIES * 20
        expected = recommend(model, histories, k=9, seed=1)  # the thread pool is there now
        again = in_child(
            lambda: torch.equal(recommend(model, histories, k=9, seed=1).ids, expected.ids)
        )
        assert again == 0
        children = torch.utils.data.DataLoader(Served(model), num_workers=1, batch_size=None)
        assert torch.equal(next(iter(children)), expected.ids)
        # The parent goes on with its threads.
        assert torch.equal(recommend(model, histories, k=9, seed=1).ids, expected.ids)
    finally:
        torch.set_num_threads(threads)
