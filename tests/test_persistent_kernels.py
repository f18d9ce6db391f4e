"""What the encoder's and the samplers' Triton kernels share: plans, packed weights, one step."""

from __future__ import annotations

import importlib
import importlib.util
import re

import pytest
import torch
import torch.nn.functional as F

from fmrec_fast import FMRecommender, flow, noise, use_backend
from fmrec_fast.backend import Backend, availability, dispatch_log
from fmrec_fast.config import PRECISIONS
from fmrec_fast.kernels import plans
from fmrec_fast.kernels.plans import LAYOUTS, TILES, TilePlan, family, plan
from fmrec_fast.models.blocks import TransformerStack
from fmrec_fast.ops import encoder, euler_sampler, picard_sweep
from fmrec_fast.reference import encoder as definition
from fmrec_fast.reference.encoder import NORM_EPS
from fmrec_fast.testing import assert_close_to_truth, make_sequences

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
REASON = availability(Backend.TRITON, DEVICE)
needs_triton = pytest.mark.skipif(REASON is not None, reason=str(REASON))
H100 = ("cuda:90", 232448)


@pytest.fixture(autouse=True)
def layouts_alone(monkeypatch, tmp_path):
    """What is tested here are the layouts, whatever was tuned."""
    monkeypatch.setattr(plans, "TUNED", tmp_path / "tuned.json")


# --- plans ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_papers_sizes_have_a_plan_everywhere(kind, precision):
    shared = {"cuda:80": 166912, "hip:gfx942": 65536}.get(kind, 232448)
    for width in (32, 64, 128):
        for length in (1, 16, 17, 50, 64):
            found = plan(length, width, 4, precision, kind, shared)
            assert not isinstance(found, str), found
            assert found.T >= max(length, 16) and found.T < 2 * max(length, 16)
            assert 4 * width % found.CHUNK == 0 and 4 * width % found.LAST_CHUNK == 0


@pytest.mark.parametrize("kind", ["cuda:80", "cuda:90", "cuda:100", "hip:gfx942"])
def test_what_does_not_fit_as_a_whole_comes_in_tiles(kind):
    shared = {"cuda:80": 166912, "hip:gfx942": 65536}.get(kind, 232448)
    for precision in PRECISIONS:
        for width, length, heads, tied in (
            (128, 200, 4, False), (128, 200, 2, True), (256, 129, 4, False), (32, 50, 4, True),
            (64, 256, 64, True),
        ):  # fmt: skip
            found = plan(length, width, heads, precision, kind, shared, tied)
            assert isinstance(found, TilePlan), found
            assert 4 * width % found.CHUNK == 0 and width % min(found.CHUNK, width) == 0
            if tied:
                assert found.T == min(layout.tile for layout in TILES[128][kind][precision])


@pytest.mark.parametrize(
    "size, reason",
    [
        ((50, 96, 4, "bf16", *H100), r"D in \(32, 64, 128, 256\), got 96"),
        ((50, 128, 1, "bf16", *H100), "heads of at most 64 channels, got 128"),
        ((257, 128, 4, "bf16", *H100), r"L in 1 \.\. 256, got 257"),
        ((0, 128, 4, "bf16", *H100), "got 0"),
        ((50, 128, 5, "bf16", *H100), "heads must divide D = 128, got 5"),
        ((200, 256, 4, "float32", "cuda:80", 40000), "D = 256, L = 200, 4 heads in float32 on"),
        ((50, 128, 4, "bf16", "cuda:90", 40000), "with 40000 bytes of shared memory"),
        ((200, 128, 4, "bf16", *H100, False, True), "no rotary embedding in tiles"),
    ],
)
def test_what_has_no_plan_says_why(size, reason):
    found = plan(*size)
    assert isinstance(found, str)
    assert re.search(reason, found), found


def test_less_shared_memory_takes_the_next_layout():
    first, second = LAYOUTS[128, 64]["cuda:90"]["bf16"][:2]
    assert first.shared > second.shared
    assert plan(50, 128, 4, "bf16", "cuda:90", first.shared).CHUNK == first.chunk
    assert plan(50, 128, 4, "bf16", "cuda:90", first.shared - 1).CHUNK == second.chunk


def test_wide_heads_take_a_layout_of_three_products():
    assert plan(50, 128, 4, "bf16", *H100).STACKED
    assert not plan(50, 128, 2, "bf16", *H100).STACKED


def test_the_interpreter_counts_as_the_largest():
    assert family(torch.device("cpu")) == H100


@needs_triton
@pytest.mark.parametrize("length, width, heads", [(257, 32, 4), (5, 96, 4), (5, 128, 1)])
def test_a_call_without_a_plan_runs_the_definition_and_says_why(length, width, heads):
    stack = TransformerStack(width, 1, heads, "published").to(DEVICE)
    x, mask = torch.ones(1, length, width, device=DEVICE), torch.ones(1, length, device=DEVICE)
    with torch.no_grad(), use_backend("triton"), dispatch_log() as log:
        encoder(x, mask, stack.weights(), num_heads=heads)
    (entry,) = (entry for entry in log if entry.op == "encoder")
    assert entry.backend is Backend.REFERENCE and entry.reason.startswith("its kernel ")


# --- tiles ----------------------------------------------------------------------------------


def in_tiles(monkeypatch, tile: int = 16) -> None:
    """Every network comes in tiles: of so many rows under the interpreter, where each program
    takes several sequences; of the device's own layouts on CUDA."""
    for op in ("encoder", "euler_sampler", "picard_sweep"):  # what they compile is planned here
        importlib.import_module(f"fmrec_fast.kernels.{op}")
    monkeypatch.setattr(plans, "LAYOUTS", {})
    if DEVICE == "cpu":
        layout = plans.TileLayout(tile, 32, 1, 0)
        every = {"cuda:90": {precision: [layout] for precision in PRECISIONS}}
        monkeypatch.setattr(plans, "TILES", {256: every})


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize(
    "batch, length, width, heads, precision",
    [
        (3, 50, 32, 4, "float32"),
        (1, 1, 32, 1, "float32"),
        (1, 33, 64, 64, "float32"),
        (1, 17, 256, 4, "float32"),
        (1, 20, 32, 2, "tf32"),
        (1, 20, 32, 4, "bf16"),
        (0, 20, 32, 4, "float32"),
    ],
)
def test_encoder_in_tiles(monkeypatch, batch, length, width, heads, precision):
    in_tiles(monkeypatch)
    torch.manual_seed(batch + length)
    blocks = TransformerStack(width, 2, heads, "published").to(DEVICE).weights()
    x, mask = torch.randn(batch, length, width), torch.rand(batch, length).round()
    x, mask = x.to(DEVICE), mask.to(DEVICE)
    wide = [type(w)(*(t.double() for t in w.tensors())) for w in blocks]
    options = {"num_heads": heads, "tap": 0}
    truth = definition.encoder(x.double(), mask.double(), wide, **options)
    same = definition.encoder(x, mask, blocks, **options, precision=precision)
    with use_backend("triton"), dispatch_log() as log:
        got = encoder(x, mask, blocks, **options, precision=precision)
    assert [(entry.op, entry.backend) for entry in log] == [("encoder", Backend.TRITON)]
    for name, *three in zip(("out", "tapped"), got, same, truth, strict=True):
        assert_close_to_truth(*three, name=name)


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_samplers_in_tiles_are_those_as_a_whole(monkeypatch, small_model, tied):
    """Real lengths on both sides of a tile's end; the stream of the leading padding's one lam."""
    model = small_model(num_blocks=2, last=1, max_len=40, lambda_uncertainty=0.5).eval().to(DEVICE)
    sequence = torch.randint(1, 61, (4, 40), generator=torch.Generator().manual_seed(1))
    for row, padded in enumerate((40, 0, 25, 24)):
        sequence[row, :padded] = 0
    e, mask = model.embed(sequence.to(DEVICE))
    taus = model.fm.xstart_model.embed_time(torch.tensor([1.0, 500.0], device=DEVICE))
    z0 = torch.randn(4, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    weights = model.fm.sampler_weights()
    seed, rows = torch.tensor(6, device=DEVICE), torch.arange(4, device=DEVICE) * 3
    options = {"seed": seed, "rows": rows, "padding": "tied" if tied else "published"}
    with use_backend("reference"):
        expected = euler_sampler(
            e, mask, z0, taus, weights, times=taus[:, 0], return_trajectory=True, **options
        )
    in_tiles(monkeypatch)
    with use_backend("triton"), dispatch_log() as log:
        got = euler_sampler(
            e, mask, z0, taus, weights, times=taus[:, 0], return_trajectory=True, **options
        )
        at = expected[:-1].transpose(0, 1).contiguous()
        pred = picard_sweep(e, mask, at, taus, weights, **options)
    assert {(entry.op, entry.backend) for entry in log} == {
        ("euler_sampler", Backend.TRITON),
        ("picard_sweep", Backend.TRITON),
    }
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    moved = at + (pred - z0[:, None]) / 2
    torch.testing.assert_close(moved.transpose(0, 1), expected[1:], atol=1e-5, rtol=1e-5)


# --- packed weights -------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed_weights(precision):
    from fmrec_fast.kernels.launch import pack
    from fmrec_fast.kernels.layers import MATRICES, VECTORS

    blocks = TransformerStack(32, 2, 4, "published").weights()
    matrices, vectors = pack(blocks, 32, precision)
    assert matrices.dtype is (torch.bfloat16 if precision == "bf16" else torch.float32)
    matrices = matrices.float().view(2, MATRICES.value, 32 * 32)
    vectors = vectors.view(2, VECTORS.value, 32)
    for i, w in enumerate(blocks):
        expected = definition.rounded(w.w2_weight, precision)
        assert torch.equal(matrices[i, 8:].flatten(), expected.flatten())
        assert torch.equal(matrices[i, 1], definition.rounded(w.key_weight, precision).flatten())
        assert torch.equal(vectors[i, 12], w.w2_bias) and torch.equal(vectors[i, 4], w.value_bias)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_weights_of_another_width_are_refused():
    from fmrec_fast.kernels.launch import pack

    blocks = TransformerStack(32, 1, 4, "published").weights()
    with pytest.raises(ValueError, match=r"must be \(64,\), got \(32,\)"):
        pack(blocks, 64, "float32")


# --- one step of a guessed trajectory -------------------------------------------------------


def network_at(model, e, mask, x, taus, lam, dtype):
    """pred [B, q, D] from the definitions; x [B, q, D], lam [q, B, L, D]."""
    weights = model.fm.sampler_weights()
    blocks = [type(w)(*(t.to(dtype) for t in w.tensors())) for w in weights.blocks]
    norm = weights.norm_weight.to(dtype), weights.norm_bias.to(dtype)
    e, mask, x, taus, lam = (t.to(dtype) for t in (e, mask, x, taus, lam))
    predictions = []
    for i in range(len(taus)):
        fused = e + lam[i] * (x[:, i] + taus[i])[:, None]
        last, _ = definition.encoder(fused, mask, blocks, num_heads=weights.num_heads)
        predictions.append(F.layer_norm(last, last.shape[-1:], *norm, NORM_EPS))
    return torch.stack(predictions, 1)


@needs_triton
@torch.no_grad()
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("batch, steps", [(3, 2), (0, 2)])
def test_a_sweep_is_the_network_at_every_point(small_model, batch, steps, given):
    from fmrec_fast.kernels.picard_sweep import picard_sweep as launch

    model = small_model(num_blocks=2, last=1, lambda_uncertainty=0.5).eval()
    histories = ("padding", "short", "full")
    e, mask = model.embed(make_sequences(batch, 12, 61, 1, histories=histories).sequence)
    times = flow.step_times(steps, model.fm.eps)
    taus = model.fm.xstart_model.embed_time(times * model.fm.time_scale)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(batch, steps, 32, generator=g)
    seed, rows = torch.tensor(5), torch.arange(batch) * 7 + 2
    lam = torch.stack([noise.lam(seed, rows, i, 12, 32, 0.5) for i in range(steps)])
    truth = network_at(model, e, mask, x, taus, lam, torch.float64)
    same = network_at(model, e, mask, x, taus, lam, torch.float32)
    model = model.to(DEVICE)
    out = torch.empty_like(x, device=DEVICE)
    inputs = [t.to(DEVICE).contiguous() for t in (e, mask, x, taus)]
    stream = [None, rows.to(DEVICE), seed.to(DEVICE)]
    launch(
        *inputs,
        model.fm.sampler_weights(),
        *([lam.to(DEVICE), None, None] if given else stream),
        "float32",
        False,
        out,
    )
    assert_close_to_truth(out.cpu(), same, truth, name="pred")


# --- the published program's numbers --------------------------------------------------------


def golden_inputs(golden, name, rows):
    """(model, e, mask, lam [q, B, L, D], trajectory [q + 1, B, D])."""
    vectors = golden(name)
    model = FMRecommender.from_config(vectors.args).eval()
    model.load_state_dict(vectors.state, strict=False)
    model = model.to(DEVICE)
    e, mask = model.embed(vectors.inputs.seq[rows].to(DEVICE))
    lam, points = (vectors.sample[key][:, rows].to(DEVICE) for key in ("lambda", "trajectory"))
    return model, e, mask, lam.contiguous(), points


@needs_triton
@torch.no_grad()
def test_whole_golden_trajectory(golden):
    model, e, mask, lam, expected = golden_inputs(golden, "fmrec_tiny", slice(0, 3))
    with use_backend("triton"), dispatch_log() as log:
        points = model.fm.integrate(e, mask, expected[0], noise=lam, return_trajectory=True)
    assert [(entry.op, entry.backend) for entry in log] == [("euler_sampler", Backend.TRITON)]
    torch.testing.assert_close(points, expected, atol=1e-5, rtol=1e-5)


@needs_triton
@torch.no_grad()
def test_golden_steps_at_the_papers_size(golden):
    """The first, a middle and the last of 30 steps: the interpreter takes its time."""
    from fmrec_fast.kernels.picard_sweep import picard_sweep as launch

    model, e, mask, lam, points = golden_inputs(golden, "fmrec_paper_size", slice(1, 2))
    chosen, steps = torch.tensor([0, 14, 29], device=DEVICE), len(lam)
    times = flow.step_times(steps, model.fm.eps, e.device)
    taus = model.fm.xstart_model.embed_time(times * model.fm.time_scale)[chosen]
    x = points[chosen].transpose(0, 1).contiguous()
    pred = torch.empty_like(x)
    weights = model.fm.sampler_weights()
    lam = lam[chosen].contiguous()
    launch(e, mask, x, taus, weights, lam, None, None, "float32", False, pred)
    moves = (pred[0] - points[0]) / steps
    torch.testing.assert_close(points[chosen, 0] + moves, points[chosen + 1, 0], atol=1e-5, rtol=0)
