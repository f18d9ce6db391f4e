"""torch.compile and torch.export: registered ops, programs without a graph break, equal results."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fmrec_fast import (
    Backend,
    FaveRecommender,
    TrainingDraws,
    backend,
    dispatch_log,
    extension,
    sample,
    use_backend,
    use_rng,
)
from fmrec_fast.backend import availability
from fmrec_fast.ops import (
    attention,
    dropout,
    dropout_layer_norm,
    encoder,
    feed_forward,
    linear,
    noise_fusion,
    self_attention,
)
from fmrec_fast.ops.encoder import unflatten, variant_of
from fmrec_fast.randomness import random_source
from fmrec_fast.reference.encoder import FAVE, FMREC
from fmrec_fast.reference.rotary import angles, inverse_frequencies
from fmrec_fast.testing import make_sequences

CPP = pytest.mark.skipif(availability("cpp") is not None, reason=str(availability("cpp")))
TRITON = pytest.mark.skipif(availability("triton") is not None, reason=str(availability("triton")))
EVERY = ("padding", "short", "long", "full")


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def compiled(function: Callable) -> Callable:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


SEED = torch.tensor(2**62 + 5)
ROWS = torch.tensor([7, 0, 2**31])
MASK = torch.ones(3, 5).tril(1)


def block_weights(blocks: int) -> list[Tensor]:
    d = 16
    shapes = [(d,), (d,), *[(d, d), (d,)] * 4, (d,), (d,), (4 * d, d), (4 * d,), (d, 4 * d), (d,)]
    return [0.3 * randn(*s, seed=i) for i, s in enumerate(shapes * blocks)]


def fave_weights(blocks: int) -> list[Tensor]:
    """Without biases of norms, and with angles."""
    parts = []
    for block in unflatten(block_weights(blocks)):
        changed = {"norm1_bias": None, "norm2_bias": None, "inv_freq": inverse_frequencies(4)}
        parts += block._replace(**changed).tensors()
    return parts


def feed_weights(grad: bool = False) -> list[Tensor]:
    shapes = [(16,), (16,), (32, 16), (32,), (16, 32), (16,)]
    return [randn(*shape, seed=i + 1, grad=grad) for i, shape in enumerate(shapes)]


def attention_weights(grad: bool = False) -> list[Tensor]:
    shapes = [(16,), (16,), *[(16, 16), (16,)] * 4]
    return [randn(*shape, seed=i + 1, grad=grad) for i, shape in enumerate(shapes)]


# --- the registered ops, each with every kind of argument ---------------------------------------

ops = torch.ops.fmrec_fast
REGISTERED = [
    pytest.param(
        lambda: (ops.noise_fusion, (*FUSION, 3, 0.2, "cpp")), id="noise_fusion-cpp", marks=CPP
    ),
    pytest.param(
        lambda: (ops.noise_fusion, (*FUSION, 3, 0.2, "triton")),
        id="noise_fusion-triton",
        marks=TRITON,
    ),
    pytest.param(
        lambda: (
            ops.dropout,
            (WIDE, randn(3, 5, 16, grad=True), ROWS, SEED, 2, 1, 1, 0.3, True, "cpp"),
        ),
        id="dropout-gelu-residual",
        marks=CPP,
    ),
    pytest.param(
        lambda: (ops.dropout, (WIDE, None, ROWS, SEED, 2, 0, 5, 0.3, False, "cpp")),
        id="dropout",
        marks=CPP,
    ),
    *(
        pytest.param(
            lambda p=p: (
                ops.dropout_layer_norm,
                (WIDE, randn(16, grad=True), randn(16, grad=True), ROWS, SEED, 2, 1, 3, p),
            ),
            id=f"dropout_layer_norm-{p}",
            marks=CPP,
        )
        for p in (0.0, 0.3)
    ),
    pytest.param(
        lambda: (
            ops.linear,
            (WIDE, randn(32, 16, seed=1, grad=True), randn(32, grad=True), "float32"),
        ),
        id="linear",
        marks=CPP,
    ),
    *(
        pytest.param(
            lambda p=p: (
                ops.feed_forward,
                (
                    randn(3, 5, 16, grad=True),
                    *feed_weights(grad=True),
                    ROWS,
                    SEED,
                    2,
                    1,
                    3,
                    p,
                    "float32",
                ),
            ),
            id=f"feed_forward-{p}",
            marks=CPP,
        )
        for p in (0.0, 0.3)
    ),
    *(
        pytest.param(
            lambda p=p, last_only=last_only: (
                ops.self_attention,
                (
                    *(randn(3, 5, 16, grad=True), MASK, *attention_weights(grad=True)),
                    *(ROWS, SEED, 2, p, 1, last_only, "float32"),
                ),
            ),
            id=f"self_attention-{p}-{'last' if last_only else 'all'}",
            marks=CPP,
        )
        for p in (0.0, 0.3)
        for last_only in (False, True)
    ),
    pytest.param(
        lambda: (
            ops.attention,
            (randn(3, 5, 48, grad=True), MASK, ROWS, SEED, ANGLES, 1, 0.2, 4, "cpp"),
        ),
        id="attention-dropout-rotary",
        marks=CPP,
    ),
    *(
        pytest.param(
            lambda p=p, last_only=last_only: (
                ops.self_attention,
                (
                    *(randn(3, 5, 16, grad=True), MASK, *attention_weights(grad=True)),
                    *(ROWS, SEED, 2, p, 1, last_only, "float32"),
                ),
            ),
            id=f"self_attention-{p}-{'last' if last_only else 'all'}",
            marks=CPP,
        )
        for p in (0.0, 0.3)
        for last_only in (False, True)
    ),
    pytest.param(
        lambda: (
            ops.attention,
            (randn(3, 5, 48, grad=True), MASK, ROWS, None, None, 1, 0.0, 4, "cpp"),
        ),
        id="attention",
        marks=CPP,
    ),
    pytest.param(
        lambda: (
            ops.encoder,
            (randn(3, 5, 16), MASK, block_weights(2), 4, 1, randn(3), "float32", "cpp"),
        ),
        id="encoder-tap",
        marks=CPP,
    ),
    pytest.param(
        lambda: (
            ops.encoder,
            (randn(3, 5, 16), MASK, block_weights(1), 4, None, None, "float32", "cpp"),
        ),
        id="encoder",
        marks=CPP,
    ),
    pytest.param(
        lambda: (
            ops.encoder,
            (randn(3, 5, 16), MASK, fave_weights(2), 4, 0, None, "float32", "cpp"),
        ),
        id="encoder-fave",
        marks=CPP,
    ),
    pytest.param(
        lambda: (
            ops.euler_sampler,
            (*FAVE_SAMPLER, SEED, ROWS, None, False, "published", "float32", "cpp"),
        ),
        id="euler_sampler-fave",
        marks=CPP,
    ),
    pytest.param(
        lambda: (
            ops.picard_sweep,
            (
                *FAVE_SAMPLER[:2],
                randn(3, 2, 16),
                *FAVE_SAMPLER[3:],
                SEED,
                ROWS,
                None,
                "float32",
                "published",
                "cpp",
            ),
        ),
        id="picard_sweep-fave",
        marks=CPP,
    ),
    pytest.param(
        lambda: (
            ops.euler_sampler,
            (*SAMPLER, SEED, ROWS, None, False, "published", "float32", "cpp"),
        ),
        id="euler_sampler",
        marks=CPP,
    ),
    pytest.param(
        lambda: (
            ops.euler_sampler,
            (*SAMPLER, None, None, randn(2, 3, 5, 16), True, "published", "float32", "cpp"),
        ),
        id="euler_sampler-noise-trajectory",
        marks=CPP,
    ),
    pytest.param(
        lambda: (
            ops.picard_sweep,
            (
                *SAMPLER[:2],
                randn(3, 2, 16),
                *SAMPLER[3:],
                SEED,
                ROWS,
                None,
                "float32",
                "tied",
                "cpp",
            ),
        ),
        id="picard_sweep",
        marks=CPP,
    ),
]
WIDE = randn(3, 5, 16, grad=True)
FUSION = (randn(3, 5, 16, grad=True), randn(3, 16, seed=1, grad=True), SEED, ROWS)
SAMPLER = (
    randn(3, 5, 16),
    MASK,
    randn(3, 16),
    randn(2, 16),
    block_weights(1),
    randn(16),
    randn(16),
    4,
    0.3,
)
FAVE_SAMPLER = (*SAMPLER[:4], fave_weights(1), *SAMPLER[5:])
ANGLES = torch.cat(angles(inverse_frequencies(4), 5), dim=-1)


@pytest.mark.parametrize("case", REGISTERED)
def test_opcheck(case):
    """Schema, fake implementation, autograd registration, and AOT tracing with dynamic shapes."""
    op, arguments = case()
    torch.library.opcheck(op.default, arguments)


def test_every_kernel_that_has_to_be_is_registered():
    names = {"noise_fusion", "dropout", "linear", "feed_forward", "attention", "encoder"}
    names |= {"euler_sampler", "picard_sweep", "self_attention", "dropout_layer_norm"}
    for name in names:
        assert hasattr(ops, name), name
    assert names <= set(backend.OPS)


# --- each op's public function, compiled, forward and backward ----------------------------------


def fuse(e: Tensor, z: Tensor, tau: Tensor) -> Tensor:
    return noise_fusion(e, z, tau, delta=0.3, seed=SEED, rows=ROWS, step=2)


def drop(x: Tensor, residual: Tensor) -> Tensor:
    options = {"seed": SEED, "rows": ROWS, "site": 3, "position_offset": 1}
    return dropout(x, 0.4, residual=residual, activation="gelu", **options)


def drop_and_norm(*tensors: Tensor) -> Tensor:
    return dropout_layer_norm(*tensors, 0.4, seed=SEED, rows=ROWS, site=3, position_offset=1)


def attend(qkv: Tensor) -> Tensor:
    return attention(qkv, MASK, num_heads=4, p=0.2, seed=SEED, rows=ROWS, site=1)


def feed(*tensors: Tensor) -> Tensor:
    return feed_forward(*tensors, 0.3, seed=SEED, rows=ROWS, site=3, position_offset=1)


def self_attend(*tensors: Tensor, last_only: bool = False) -> Tensor:
    x, *weights = tensors
    options = {"num_heads": 1, "seed": SEED, "rows": ROWS, "site": 3, "last_only": last_only}
    return self_attention(x, LONG_MASK, *weights, 0.3, **options)


LONG_MASK = (torch.arange(30) >= torch.tensor([[0], [7], [29]])).float()
TILES = extension.available() and extension.load().isa().startswith("amx")
CALLS = {
    "feed_forward": (feed, (randn(3, 30, 16), *feed_weights())),
    "self_attention": (self_attend, (randn(3, 30, 16), *attention_weights())),
    "self_attention of the last": (
        partial(self_attend, last_only=True),
        (randn(3, 30, 16), *attention_weights()),
    ),
    "noise_fusion": (fuse, (randn(3, 5, 16), randn(3, 16, seed=1), randn(16, seed=2))),
    "dropout": (drop, (randn(3, 5, 16), randn(3, 5, 16, seed=1))),
    "dropout_layer_norm": (
        drop_and_norm,
        (randn(3, 5, 16), randn(16, seed=1), randn(16, seed=2)),
    ),
    "linear": (linear, (randn(70, 16), randn(32, 16, seed=1), randn(32, seed=2))),
    "linear in bf16": (
        partial(linear, precision="bf16"),
        (randn(70, 16), randn(32, 16, seed=1), randn(32, seed=2)),
    ),
    "attention": (attend, (randn(3, 5, 48),)),
}


RUNS = [pytest.param(op, "cpp", marks=CPP) for op in CALLS if "bf16" not in op or TILES]
RUNS += [("noise_fusion", "reference"), pytest.param("noise_fusion", "triton", marks=TRITON)]


@pytest.mark.parametrize("op, chosen", RUNS)
def test_compiled_ops_are_eager_ones_forward_and_backward(op, chosen):
    function, arguments = CALLS[op]
    results = []
    with use_backend(chosen):
        for run in (function, compiled(function)):
            leaves = [tensor.clone().requires_grad_() for tensor in arguments]
            with dispatch_log() as log:
                out = run(*leaves)
                gradients = torch.autograd.grad(out.square().sum(), leaves)
            results.append((out, *gradients))
    for a, b in zip(*results):
        torch.testing.assert_close(b, a)
    # A kernel says so when it runs; the definition has become part of the program.
    assert [entry.backend for entry in log] == ([] if chosen == "reference" else [Backend(chosen)])


@CPP
@pytest.mark.parametrize("variant", [FMREC, FAVE])
@pytest.mark.parametrize("tap", [None, 0])
def test_a_compiled_encoder_is_one_op(tap, variant):
    parameters = block_weights(2) if variant is FMREC else fave_weights(2)

    @torch.no_grad()
    def encode(x: Tensor, parameters: list[Tensor]) -> tuple:
        blocks = unflatten(parameters)
        assert variant_of(blocks) is variant and len(blocks) == 2
        return encoder(x, MASK, blocks, num_heads=4, tap=tap, variant=variant)

    x = randn(3, 5, 16)
    with use_backend("cpp"), dispatch_log() as log:
        got = compiled(encode)(x, parameters)
    with use_backend("cpp"):
        expected = encode(x, parameters)
    assert [(entry.op, entry.backend) for entry in log] == [("encoder", Backend.CPP)]
    assert (got[1] is None) == (tap is None)
    for a, b in zip(got, expected):
        assert a is b is None or torch.equal(a, b)


# --- whole programs -----------------------------------------------------------------------------


@pytest.fixture
def model(small_model) -> nn.Module:
    return small_model(lambda_uncertainty=0.2, sample_N=2, num_blocks=1, last=0)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return make_sequences(5, 12, 61, 1, histories=EVERY)


class Sampler(nn.Module):
    """What is exported: everything random is an argument."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sequences: Tensor, seed: Tensor, z0: Tensor) -> Tensor:
        return sample(self.model, sequences, seed=seed, z0=z0)


@CPP
def test_the_compiled_sampler_is_one_op_and_draws_as_the_eager_one(model, batch):
    """A model in training mode, whose flags are restored; torch.manual_seed governs."""
    model.train()
    run = compiled(lambda sequences: sample(model, sequences))
    results = []
    for call in (run, run, lambda sequences: sample(model, sequences)):
        torch.manual_seed(3)
        with use_backend("cpp"), dispatch_log() as log:
            results.append(call(batch.sequence))
        assert [(entry.op, entry.backend) for entry in log] == [("euler_sampler", Backend.CPP)]
    assert torch.equal(results[0], results[1])
    # Eagerly the embedding is part of the call, in C++; compiled it is PyTorch's.
    torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=1e-6)
    assert not torch.equal(run(batch.sequence), results[0])
    assert model.training and model.embed_dropout.training


@pytest.fixture
def fave(small_args) -> nn.Module:
    torch.manual_seed(0)
    model = FaveRecommender.from_config(
        small_args(lambda_uncertainty=0.2, num_blocks=2, last=0, infer_mask_ratio=0.6)
    )
    model.switch_to_finetune()
    return model.eval()


@CPP
def test_compiled_inference_of_fave_is_one_op_and_draws_as_the_eager_one(fave, batch):
    run = compiled(lambda sequences: sample(fave, sequences))
    results = []
    for call in (run, lambda sequences: sample(fave, sequences)):
        torch.manual_seed(3)
        with use_backend("cpp"), dispatch_log() as log:
            results.append(call(batch.sequence))
        assert [(entry.op, entry.backend) for entry in log] == [("euler_sampler", Backend.CPP)]
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)  # the eager call embeds in C++


@CPP
def test_angles_that_differ_between_blocks_are_seen_when_the_compiled_program_runs():
    """It does not look at them when it is compiled; its op then runs the definition."""
    parameters = fave_weights(2)
    parameters[-1] = 2 * parameters[-1]

    @torch.no_grad()
    def encode(x: Tensor, parameters: list[Tensor]) -> Tensor:
        return encoder(x, MASK, unflatten(parameters), num_heads=4, variant=FAVE)[0]

    x = randn(3, 5, 16)
    with dispatch_log() as log:
        got = compiled(encode)(x, parameters)
    assert [entry.backend for entry in log if entry.op == "encoder"] == [Backend.REFERENCE]
    with use_backend("reference"):
        torch.testing.assert_close(got, encode(x, parameters))


@pytest.mark.parametrize(
    "chosen, strict",
    [
        ("reference", False),
        pytest.param("cpp", False, marks=CPP),
        pytest.param("cpp", True, marks=CPP),
    ],
)
def test_the_exported_sampler_takes_any_batch(model, batch, chosen, strict):
    module = Sampler(model.eval())
    model.fm.sample_N = 1
    rows = torch.export.Dim("rows", min=2)
    shapes = {"sequences": {0: rows}, "seed": None, "z0": {0: rows}}
    with use_backend(chosen):
        program = torch.export.export(
            module, (*batch[:1], SEED, randn(5, 32)), dynamic_shapes=shapes, strict=strict
        )
        parts = [part for part in program.graph_module.modules() if isinstance(part, GraphModule)]
        code = "".join(str(part.graph) for part in parts)
        assert ("fmrec_fast.euler_sampler" in code) == (chosen == "cpp")
        for size in (5, 2, 40):
            sequences = make_sequences(size, 12, 61, 2, histories=EVERY).sequence
            arguments = (sequences, torch.tensor(size), randn(size, 32, seed=size))
            torch.testing.assert_close(program.module()(*arguments), module(*arguments))


@CPP
def test_a_compiled_training_evaluation_is_the_eager_one(model, batch):
    """From the ids to the losses that need no item vocabulary, and back to every gradient."""
    model.train()

    def loss(sequence: Tensor, target: Tensor, seed: Tensor) -> Tensor:
        source = random_source(sequence.shape[0], sequence.device, seed=seed)
        e, mask = model.embed(sequence, source.dropout())
        wanted = model.item_embeddings(target[:, 0])
        got, tapped, *_ = model.fm.flow_step(e, wanted, mask, source, TrainingDraws())
        return model.loss_FM_mse(got, wanted) + tapped.square().mean()

    results = []
    with use_backend("cpp"):
        for run in (loss, compiled(loss)):
            model.zero_grad()
            total = run(*batch, SEED)
            total.backward()
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            results.append((total.detach(), *(gradient.clone() for gradient in gradients)))
    assert len(results[0]) == len(results[1]) > 20
    for a, b in zip(*results):
        torch.testing.assert_close(b, a, atol=1e-5, rtol=1e-4)


def test_the_generator_in_force_is_that_of_the_compilation(model, batch):
    model.eval()
    z0 = randn(5, 32)
    with use_rng("published"):
        run = compiled(lambda: model.fm.integrate(*model.embed(batch.sequence), z0, steps=1))
        torch.manual_seed(2)
        got = run()
        torch.manual_seed(2)
        expected = sample(model, batch.sequence, z0=z0, steps=1)
    torch.testing.assert_close(got, expected)


def test_the_mark_of_a_constant_is_that_of_the_compiler():
    """Its decorator is not used, because it imports the compiler, which takes seconds."""

    @torch.compiler.assume_constant_result
    def marked() -> int:
        return 1

    assert vars(marked) == vars(backend._rng_while_compiling)
