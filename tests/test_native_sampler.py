"""The C++ encoder and sampler against their definitions, for every instruction set."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fmrec_fast import FMRecommender, extension, noise
from fmrec_fast.backend import Backend, Dispatch, dispatch_log, use_backend
from fmrec_fast.models.blocks import TransformerStack
from fmrec_fast.ops import encoder, euler_sampler
from fmrec_fast.ops.encoder import pack
from fmrec_fast.ops.euler_sampler import SamplerWeights
from fmrec_fast.reference import encoder as encoder_definition
from fmrec_fast.reference.encoder import no_drop
from fmrec_fast.reference.euler_sampler import tie_padding
from fmrec_fast.sampler import sample
from fmrec_fast.testing import assert_close_to_truth, error_to_truth, make_sequences

if not extension.available():
    pytest.skip(str(extension.reason()), allow_module_level=True)

C = extension.load()
EVERY = ("padding", "short", "long", "full")
DELTA = 0.5  # large, so that the steps depend on one another
SEED = torch.tensor(-987654321)


@pytest.fixture(params=C.supported_isas())
def isa(request):
    before = C.isa()
    C.set_isa(request.param)
    yield request.param
    C.set_isa(before)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def make_stack(width: int, num_heads: int, num_blocks: int) -> TransformerStack:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width + num_heads)
        stack = TransformerStack(width, num_blocks, num_heads, "published")
        for parameter in stack.parameters():
            if parameter.ndim == 1:  # the initial ones and zeros would hide a swap
                torch.nn.init.normal_(parameter, 0.3, 0.5)
    return stack.requires_grad_(False)


def sampler_weights(stack: TransformerStack) -> SamplerWeights:
    width = stack.transformer_blocks[0].feed_forward.w_1.in_features
    g = torch.Generator().manual_seed(3)
    norm = torch.randn(2, width, generator=g)
    return SamplerWeights(
        stack.weights(), norm[0] + 1, norm[1], stack.num_heads, stack.attention, DELTA
    )


def inputs(batch: int, length: int, width: int, steps: int, histories=EVERY) -> list[Tensor]:
    """e, mask, z0, taus."""
    sequence = make_sequences(batch, length, 50, 1, histories=histories).sequence
    g = torch.Generator().manual_seed(batch + length)
    e, z0, taus = (
        torch.randn(*shape, generator=g)
        for shape in ((batch, length, width), (batch, width), (steps, width))
    )
    return [e, (sequence > 0).float(), z0, taus]


def run(backend: str, tensors: list[Tensor], weights: SamplerWeights, **options) -> Tensor:
    with use_backend(backend), dispatch_log() as log, torch.no_grad():
        out = euler_sampler(*tensors, weights, times=torch.zeros(len(tensors[3])), **options)
    assert log[0] == Dispatch("euler_sampler", Backend(backend)), log
    return out


def assert_same(got: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    if expected.numel():
        error = (got - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"relative error {error:.2e}"


# --- equality with the definitions ----------------------------------------------------------


@pytest.mark.parametrize("name", ["fmrec_tiny", "fmrec_paper_size"])
def test_golden_trajectories(isa, golden, name):
    case = golden(name)
    model = FMRecommender.from_config(case.args).eval()
    # The paper-size file leaves out the decoder, which the sampler does not run.
    missing, unexpected = model.load_state_dict(case.state, strict=False)
    assert not unexpected
    assert all(".decoder." in key for key in missing)
    with torch.no_grad(), dispatch_log() as log:
        e, mask = model.embed(case.inputs.seq)
        points = model.fm.integrate(
            e, mask, case.sample["z0"], noise=case.sample["lambda"], return_trajectory=True
        )
    assert log == [Dispatch("euler_sampler", Backend.CPP)]
    torch.testing.assert_close(points, case.sample["trajectory"], atol=2e-5, rtol=1e-4)


# B, L, D, heads, blocks, q
SHAPES = [
    (0, 7, 32, 4, 2, 2),
    (1, 1, 32, 4, 1, 1),
    (5, 1, 36, 2, 2, 3),
    (1, 50, 128, 4, 4, 3),
    (5, 50, 64, 4, 2, 3),
    (5, 51, 96, 2, 2, 1),
    (5, 50, 36, 4, 3, 3),  # heads of 9 channels
    (3, 51, 36, 1, 1, 3),
    (2, 7, 128, 1, 2, 3),
    (19, 6, 32, 4, 2, 2),  # more than a group
    (2, 130, 48, 2, 2, 2),
    (3, 5, 1, 1, 2, 2),
    (3, 5, 6, 3, 2, 2),  # channels that do not fill the stream's groups of four
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sampler_equals_the_definition(isa, threads, shape):
    batch, length, width, heads, blocks, steps = shape
    tensors, weights = (
        inputs(batch, length, width, steps),
        sampler_weights(make_stack(width, heads, blocks)),
    )
    rows = torch.arange(batch) * 1_000_000_007 - 3
    lam = [noise.lam(SEED, rows, i, length, width, DELTA) for i in range(steps)]
    expected = run("reference", tensors, weights, noise=torch.stack(lam), return_trajectory=True)
    results = []
    for count in (1, 2):
        threads(count)
        points = run("cpp", tensors, weights, seed=SEED, rows=rows, return_trajectory=True)
        last = run("cpp", tensors, weights, seed=SEED, rows=rows)
        assert torch.equal(last, points[-1])
        results.append(points)
    assert torch.equal(*results)
    for i in range(steps + 1):
        assert_same(points[i], expected[i])
    given = run("cpp", tensors, weights, noise=torch.stack(lam), return_trajectory=True)
    assert_same(given, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tied_padding_equals_the_definition(isa, threads, shape):
    batch, length, width, heads, blocks, steps = shape
    tensors = inputs(batch, length, width, steps)
    e, mask = tensors[:2]
    tensors[0] = torch.where(mask[..., None] == 0, e[:, :1], e)
    weights = sampler_weights(make_stack(width, heads, blocks))
    lam = torch.stack([noise.lam(SEED, torch.arange(batch), i, length, width, DELTA)
                       for i in range(steps)])  # fmt: skip
    tied = torch.stack([tie_padding(step, mask) for step in lam])
    expected = run("reference", tensors, weights, noise=tied)
    results = []
    for count in (1, 2):
        threads(count)
        results.append(run("cpp", tensors, weights, seed=SEED, padding="tied"))
    assert torch.equal(*results)
    assert_same(results[0], expected)
    assert_same(run("cpp", tensors, weights, noise=lam, padding="tied"), expected)


# --- precisions -----------------------------------------------------------------------------

LOW = ("tf32", "bf16")


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("shape", [(5, 50, 64, 4, 2, 2), (5, 51, 36, 2, 3, 1)], ids=str)
def test_precisions_against_float64(isa, shape, precision):
    """As near as asked: tf32 by sums of two bfloat16 is much nearer than TF32. Without tiles, the
    bits of float32."""
    batch, length, width, heads, blocks, steps = shape
    tensors = inputs(batch, length, width, steps)
    weights = sampler_weights(make_stack(width, heads, blocks))
    lam = torch.randn(steps, batch, length, width, generator=torch.Generator().manual_seed(1))
    truth = in_double(tensors, weights, lam)
    asked = run("reference", tensors, weights, noise=lam, precision=precision)
    full = run("cpp", tensors, weights, noise=lam)
    got = run("cpp", tensors, weights, noise=lam, precision=precision)
    wrong, limit = error_to_truth(got, truth), error_to_truth(asked, truth)
    if not isa.startswith("amx"):
        assert torch.equal(got, full)
    elif precision == "tf32":
        assert error_to_truth(full, truth) < wrong < 0.1 * limit
    else:
        assert 1e-4 < wrong < 1.5 * limit


def in_double(tensors: list[Tensor], weights: SamplerWeights, lam: Tensor) -> Tensor:
    """The sampler in float64, step by step."""
    e, mask, z0, taus = (t.double() for t in tensors)
    blocks = [type(w)(*(t.double() for t in w.tensors())) for w in weights.blocks]
    norm = weights.norm_weight.double(), weights.norm_bias.double()
    x = z0
    for tau, factor in zip(taus, lam.double()):
        fused = e + factor * (x + tau)[:, None]
        last, _ = encoder_definition.encoder(fused, mask, blocks, num_heads=weights.num_heads)
        x = x + (F.layer_norm(last, last.shape[-1:], *norm, 1e-12) - z0) / len(taus)
    return x


@pytest.mark.parametrize("precision", LOW)
def test_encoder_and_its_tap_in_low_precision(isa, precision):
    weights = make_stack(48, 2, 3).weights()
    x, mask = inputs(5, 21, 48, 1)[:2]
    bias = torch.rand(5, generator=torch.Generator().manual_seed(2))
    options = {"num_heads": 2, "tap": 1, "first_key_bias": bias}
    double = [type(w)(*(t.double() for t in w.tensors())) for w in weights]
    truth = encoder_definition.encoder(
        x.double(), mask.double(), double, **options | {"first_key_bias": bias.double()}
    )
    same = encoder_definition.encoder(x, mask, weights, precision=precision, **options)
    with use_backend("cpp"), dispatch_log() as log:
        got = encoder(x, mask, weights, precision=precision, **options)
    assert log[0] == Dispatch("encoder", Backend.CPP)
    for mine, plain, right in zip(got, same, truth, strict=True):
        assert_close_to_truth(mine, plain, right)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("name", ["fmrec_tiny", "fmrec_paper_size"])
def test_golden_trajectories_in_low_precision(isa, golden, name, precision):
    case = golden(name)
    model = FMRecommender.from_config(case.args).eval()
    model.load_state_dict(case.state, strict=False)
    with torch.no_grad():
        e, mask = model.embed(case.inputs.seq)
    options = {"noise": case.sample["lambda"], "return_trajectory": True, "precision": precision}
    with dispatch_log() as log:
        points = model.fm.integrate(e, mask, case.sample["z0"], **options)
    assert log == [Dispatch("euler_sampler", Backend.CPP)]
    assert_same(points, case.sample["trajectory"], {"tf32": 3e-5, "bf16": 1e-2}[precision])


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("padding", ["published", "tied"])
def test_no_bit_depends_on_the_batch_in_low_precision(isa, threads, precision, padding):
    e, mask, z0, taus = inputs(19, 12, 48, 2)
    if padding == "tied":
        e = tie_padding(e, mask)
    weights = sampler_weights(make_stack(48, 2, 2))
    rows = torch.arange(19)
    options = {"seed": SEED, "precision": precision, "padding": padding}
    whole = run("cpp", [e, mask, z0, taus], weights, rows=rows, **options)
    threads(1)
    for part in (slice(0, 1), slice(3, 11), slice(18, 19)):
        alone = run(
            "cpp", [e[part], mask[part], z0[part], taus], weights, rows=rows[part], **options
        )
        assert torch.equal(alone, whole[part])


def test_planes_are_packed_for_a_precision(isa):
    weights = make_stack(32, 2, 2).weights()
    sizes = [pack(weights, 2, None, precision).nbytes for precision in ("bf16", "tf32", "float32")]
    if isa.startswith("amx"):
        planes = sizes[1] - sizes[0]
        assert planes > 0.4 * sizes[0]
        assert sizes[2] - sizes[1] == planes
    else:
        assert len(set(sizes)) == 1
    with pytest.raises(
        ValueError, match="precision must be 'float32', 'tf32' or 'bf16', got 'fp8'"
    ):
        pack(weights, 2, None, "fp8")


@pytest.mark.parametrize("histories", [["padding"], ["full"], ["short"]])
def test_histories(isa, histories):
    tensors, weights = inputs(3, 20, 32, 2, histories), sampler_weights(make_stack(32, 4, 2))
    expected = run("reference", tensors, weights, seed=SEED)
    assert_same(run("cpp", tensors, weights, seed=SEED), expected)


def test_padding_anywhere_and_any_mask(isa):
    """The definition multiplies the queries by the mask, whatever it holds."""
    tensors, weights = inputs(4, 20, 32, 2), sampler_weights(make_stack(32, 4, 2))
    g = torch.Generator().manual_seed(4)
    tensors[1] = torch.rand(4, 20, generator=g) * (torch.rand(4, 20, generator=g) < 0.5)
    expected = run("reference", tensors, weights, seed=SEED)
    assert_same(run("cpp", tensors, weights, seed=SEED), expected)


def test_a_row_does_not_depend_on_its_batch(isa):
    tensors, weights = inputs(19, 9, 36, 2), sampler_weights(make_stack(36, 4, 2))
    rows = torch.arange(19)
    whole = run("cpp", tensors, weights, seed=SEED, rows=rows)
    for part in (slice(0, 1), slice(3, 14), torch.tensor([18, 2])):
        some = [*(t[part] for t in tensors[:3]), tensors[3]]
        assert torch.equal(run("cpp", some, weights, seed=SEED, rows=rows[part]), whole[part])


def test_large_scores_and_activations(isa):
    """Neither the softmax nor the GELU overflows."""
    stack = make_stack(32, 4, 2)
    for block in stack.transformer_blocks:
        block.attention.linear_layers[0].weight *= 300
        block.feed_forward.w_1.weight *= 300
    tensors, weights = inputs(4, 12, 32, 1), sampler_weights(stack)
    lam = torch.zeros(1, 4, 12, 32)
    expected = run("reference", tensors, weights, noise=lam)
    got = run("cpp", tensors, weights, noise=lam)
    assert got.isfinite().all()
    assert_same(got, expected, 1e-3)  # the softmax of such scores amplifies their rounding


def test_nan_and_infinity_come_through(isa):
    for bad in (torch.nan, torch.inf):
        tensors, weights = inputs(4, 12, 32, 2), sampler_weights(make_stack(32, 4, 2))
        tensors[0][1, 4, 7] = bad
        got = run("cpp", tensors, weights, seed=SEED)
        assert got[1].isnan().all()
        assert got[[0, 2, 3]].isfinite().all()


def test_non_contiguous_inputs(isa):
    tensors, weights = inputs(5, 12, 36, 3), sampler_weights(make_stack(36, 4, 2))
    lam = torch.rand(3, 5, 12, 36, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(10)[::2]
    scattered = [
        tensors[0].transpose(0, 2).contiguous().transpose(0, 2),
        *(t.T.contiguous().T for t in tensors[1:]),
    ]
    lam2 = lam.transpose(0, 3).contiguous().transpose(0, 3)
    stack = make_stack(36, 4, 2)
    for parameter in stack.parameters():
        if parameter.ndim == 2:
            parameter.data = parameter.data.T.contiguous().T
    assert not any(t.is_contiguous() for t in (*scattered, lam2, stack.weights()[0].w1_weight))
    strange = sampler_weights(stack)
    assert torch.equal(
        run("cpp", scattered, strange, noise=lam2), run("cpp", tensors, weights, noise=lam)
    )
    assert torch.equal(
        run("cpp", scattered, strange, seed=SEED, rows=rows),
        run("cpp", tensors, weights, seed=SEED, rows=rows.clone()),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_encoder_equals_the_definition(isa, threads, shape):
    batch, length, width, heads, blocks, _ = shape
    x, mask, _, _ = inputs(batch, length, width, 1)
    stack = make_stack(width, heads, blocks)
    wide = [type(b)(*(t.double() for t in b.tensors())) for b in stack.weights()]
    for tap in {None, 0, blocks - 1}:
        expected = encoder_definition.encoder(
            x.double(), mask.double(), wide, num_heads=heads, tap=tap
        )
        results = []
        for count in (1, 2):
            threads(count)
            with dispatch_log() as log:
                results.append(encoder(x, mask, stack.weights(), num_heads=heads, tap=tap))
            assert log == [Dispatch("encoder", Backend.CPP)]
        for one, two, truth in zip(*results, expected):
            if truth is None:
                assert one is None and two is None
            else:
                assert torch.equal(one, two)
                assert_same(one, truth.float())


# --- which calls the kernels take -----------------------------------------------------------


def reason_of(op: str, call) -> str:
    with dispatch_log() as log:
        call()
    entry = next(entry for entry in log if entry.op == op)
    assert entry.backend is Backend.REFERENCE
    return entry.reason


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_variants_run_the_definition_and_say_so(backend):
    e, mask, z0, taus = inputs(2, 5, 32, 2)
    weights = sampler_weights(make_stack(32, 4, 2))
    lam = torch.zeros_like(e)

    def sampler(e=e, weights=weights, **options):
        return euler_sampler(e, mask, z0, taus, weights, times=torch.rand(2), **options)

    def stack(**options):
        return encoder(e, mask, weights.blocks, num_heads=4, **options)

    causal = SamplerWeights(**{**vars(weights), "attention": "causal"})
    with use_backend(backend):
        for options, word in (
            ({"trajectory": "cosine"}, "'cosine'"),
            ({"target": "velocity", "trajectory": "cosine"}, "'velocity'"),
            ({"weights": causal}, "'causal'"),
            ({"lam_of_step": lambda: lam}, "does not draw lam as published"),
            ({"e": e.clone().requires_grad_()}, "gradient is needed"),
        ):
            assert word in reason_of("euler_sampler", lambda o=options: sampler(**o))
        assert "'causal'" in reason_of("encoder", lambda: stack(attention="causal"))
        drop = lambda x, p, site, **_: no_drop(x, p, site, **_)  # noqa: E731
        assert "no dropout" in reason_of("encoder", lambda: stack(drop=drop, p=0.1))
        leaf = e.clone().requires_grad_()
        assert "gradient is needed" in reason_of(
            "encoder", lambda: encoder(leaf, mask, weights.blocks, num_heads=4)
        )


def test_no_steps():
    tensors, weights = inputs(2, 5, 32, 0), sampler_weights(make_stack(32, 4, 2))
    with torch.no_grad():
        out = euler_sampler(*tensors, weights, times=torch.zeros(0), return_trajectory=True)
    assert torch.equal(out, tensors[2][None])


def test_gradients_still_flow():
    x, mask, _, _ = inputs(3, 5, 32, 1)
    stack = make_stack(32, 4, 2).requires_grad_()
    out, _ = encoder(x, mask, stack.weights(), num_heads=4)
    out.sum().backward()
    assert all(p.grad is not None for p in stack.parameters())


def test_a_seed_left_open_is_torchs():
    tensors, weights = inputs(3, 5, 32, 2), sampler_weights(make_stack(32, 4, 2))
    results = []
    for backend, seed in (("cpp", 1), ("reference", 1), ("cpp", 2)):
        torch.manual_seed(seed)
        with use_backend(backend), torch.no_grad():
            results.append(euler_sampler(*tensors, weights, times=torch.zeros(2)))
    assert_same(results[0], results[1])
    assert not torch.allclose(results[0], results[2], atol=1e-3)


# --- packed weights are never stale ---------------------------------------------------------


def sampled(model: FMRecommender, backend: str = "cpp") -> Tensor:
    sequence = make_sequences(4, 12, 61, 1, histories=EVERY).sequence
    with use_backend(backend):
        return sample(model, sequence, seed=5, steps=2)


def parameter(model: FMRecommender) -> Tensor:
    return model.fm.xstart_model.att.transformer_blocks[1].feed_forward.w_1.weight


def optimizer_step(model):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), lr=0.01).step()


def there_and_back(model):
    model.to(torch.float64)
    with torch.no_grad():
        parameter(model).mul_(2)
    model.to(torch.float32)


def another_parameter(model):
    layer = model.fm.xstart_model.att.transformer_blocks[0].attention.w_layer
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2)


CHANGES = {
    "load_state_dict": lambda m: m.load_state_dict(
        {k: v + 0.1 if v.ndim == 2 else v for k, v in m.state_dict().items()}
    ),
    "in place": lambda m: parameter(m).detach().mul_(2),
    "data": lambda m: parameter(m).data.mul_(2),
    "data replaced": lambda m: setattr(parameter(m), "data", parameter(m).data * 2),
    "numpy": lambda m: np.multiply(
        parameter(m).detach().numpy(), 2, out=parameter(m).detach().numpy()
    ),
    "to": there_and_back,
    "optimizer": optimizer_step,
    "another parameter": another_parameter,
    "final norm": lambda m: m.fm.xstart_model.norm_fm_rep.bias.data.add_(1),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_every_change_of_the_weights_is_seen(small_model, change):
    model = small_model()
    before = sampled(model)
    change(model)
    after = sampled(model)
    assert not torch.allclose(before, after, atol=1e-3)
    assert_same(after, sampled(model, "reference"))


def test_a_model_that_sampled_copies_pickles_and_is_collected(small_model):
    model = small_model()
    expected = sampled(model)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert torch.equal(sampled(copied), expected)
    assert torch.equal(sampled(pickled), expected)
    with torch.no_grad():
        parameter(copied).mul_(2)
    assert not torch.equal(sampled(copied), expected)
    assert torch.equal(sampled(model), expected)
    alive = weakref.ref(parameter(model))
    del model
    gc.collect()
    assert alive() is None


def test_threads_of_python(small_model):
    # In evaluation mode: `sample` switches a training model's dropouts off and on again.
    models = [small_model(seed).eval() for seed in (0, 1)]
    expected = [sampled(model) for model in models]
    wrong = []

    def work(i):
        for _ in range(10):
            if not torch.equal(sampled(models[i % 2]), expected[i % 2]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_pieces_of_a_batch_give_the_same_numbers(small_model):
    model = small_model()
    sequence = make_sequences(70, 12, 61, 1, histories=EVERY).sequence
    whole = sample(model, sequence, seed=5, steps=2)
    rows = torch.arange(70)
    for part in (slice(0, 3), slice(30, 45), slice(69, 70)):
        assert torch.equal(
            sample(model, sequence[part], seed=5, steps=2, rows=rows[part]), whole[part]
        )


# --- the boundary ---------------------------------------------------------------------------


def arguments() -> dict:
    weights = sampler_weights(make_stack(8, 2, 2))
    e, mask, z0, taus = (t.numpy() for t in inputs(3, 5, 8, 2))
    return {
        "packed": pack(weights.blocks, 2, 5),
        "norm_weight": weights.norm_weight.numpy(),
        "norm_bias": weights.norm_bias.numpy(),
        "e": e,
        "mask": mask,
        "z0": z0,
        "taus": taus,
        "noise": None,
        "rows": np.arange(3),
        "seed": 1,
        "delta": 0.1,
        "out": np.empty((3, 8), np.float32),
        "num_threads": 1,
    }


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


BAD = [
    ("packed", None, TypeError, "incompatible function arguments"),
    (
        "norm_weight",
        zeros(7),
        ValueError,
        r"norm_weight must have shape \[D\] = \(8,\), got \(7,\)",
    ),
    ("norm_bias", zeros(9), ValueError, r"norm_bias must have shape .* got \(9,\)"),
    ("e", zeros(3, 5, 12), ValueError, r"e must have shape \[B, L, D\] = \(3, 5, 8\), got"),
    ("e", zeros(3, 0, 8), ValueError, "at least one position"),
    ("e", np.zeros((3, 5, 8)), TypeError, "e must be of dtype float32, got float64"),
    ("mask", zeros(3, 6), ValueError, r"mask must have shape \[B, L\] = \(3, 5\), got \(3, 6\)"),
    ("mask", np.ones((3, 5), bool), TypeError, "mask must be of dtype float32, got bool"),
    ("z0", zeros(2, 8), ValueError, r"z0 must have shape \[B, D\] = \(3, 8\), got \(2, 8\)"),
    ("taus", zeros(2, 7), ValueError, r"taus must have shape \[q, D\] = \(2, 8\), got \(2, 7\)"),
    ("taus", zeros(0, 8), ValueError, "at least one step"),
    ("noise", zeros(3, 3, 5, 8), ValueError, r"noise must have shape .*\(2, 3, 5, 8\)"),
    ("rows", np.arange(4), ValueError, r"rows must have shape \[B\] = \(3,\), got \(4,\)"),
    ("rows", None, TypeError, "rows must be a numpy array of int64, got NoneType"),
    ("seed", None, TypeError, "seed must be an int"),
    ("out", zeros(2, 8), ValueError, r"out must have shape \[B, D\]"),
    ("out", zeros(2, 3, 8), ValueError, r"out must have shape \[q \+ 1, B, D\] = \(3, 3, 8\)"),
    ("out", [1.0], TypeError, "out must be a numpy array"),
    ("num_threads", 0, ValueError, "num_threads must be at least 1, got 0"),
]


@pytest.mark.parametrize("name, value, error, message", BAD)
def test_bad_arguments_are_refused(name, value, error, message):
    with pytest.raises(error, match=message):
        C.euler_sampler(**{**arguments(), name: value})


def test_overlaps_are_refused():
    given = arguments()
    with pytest.raises(ValueError, match="out must not overlap z0"):
        C.euler_sampler(**{**given, "out": given["z0"]})
    memory = zeros(4, 3, 5, 8)
    with pytest.raises(ValueError, match="out must not overlap noise"):
        C.euler_sampler(**{**given, "noise": memory[:2], "out": memory[1, 0, :3]})


def test_bad_weights_are_refused():
    blocks = [tuple(t.numpy() for t in b.tensors()) for b in make_stack(8, 2, 2).weights()]
    for change, heads, error, message in (
        ([], 2, ValueError, "blocks must hold at least one block"),
        ([blocks[0], blocks[1][:15]], 2, ValueError, r"blocks\[1\] must hold 16 arrays, got 15"),
        (blocks, 3, ValueError, "num_heads must divide D = 8, got 3"),
        (blocks, 0, ValueError, "got 0"),
        (
            [blocks[0], (*blocks[1][:12], zeros(32, 9), *blocks[1][13:])],
            2,
            ValueError,
            r"blocks\[1\].w1_weight must have shape \[F, D\] = \(32, 8\), got \(32, 9\)",
        ),
        (
            [(*blocks[0][:3], np.zeros(8), *blocks[0][4:])],
            2,
            TypeError,
            r"blocks\[0\].query_bias must be of dtype float32",
        ),
    ):
        with pytest.raises(error, match=message):
            C.PackedEncoder(change, heads)


def test_encoder_boundary():
    weights = make_stack(8, 2, 2).weights()
    packed, x, mask = pack(weights, 2, 5), zeros(3, 5, 8), zeros(3, 5)
    out, tapped = zeros(3, 8), zeros(3, 8)
    for change, message in (
        ({"x": zeros(3, 5, 9)}, r"x must have shape \[B, L, D\]"),
        ({"x": zeros(3, 0, 8)}, "at least one position"),
        ({"mask": zeros(3, 4)}, "mask must have shape"),
        ({"out": zeros(3, 9)}, "out must have shape"),
        ({"tapped": zeros(2, 8)}, "tapped must have shape"),
        ({"tapped": out, "out": out}, "tapped must not overlap out"),
        ({"tap": 2}, r"tap must be in 0 \.\. 1, got 2"),
        ({"tap": -1}, "got -1"),
        ({"first_key_bias": zeros(4)}, r"first_key_bias must have shape \[B\] = \(3,\), got"),
        ({"num_threads": 0}, "num_threads"),
    ):
        given = {"packed": packed, "x": x, "mask": mask, "tap": 0, "out": out, "tapped": tapped}
        with pytest.raises(ValueError, match=message):
            C.encoder_forward(**{**given, "num_threads": 1, **change})
