"""dropout_layer_norm: every backend against the definition, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fmrec_fast import FMRecommender, dispatch_log, extension, use_backend, use_rng
from fmrec_fast.backend import Backend
from fmrec_fast.ops import dropout, dropout_layer_norm
from fmrec_fast.testing import assert_close_to_truth, make_sequences

pytestmark = pytest.mark.op("dropout_layer_norm")
SEED = torch.tensor(-987654321987654321)
# (B, P, D): rows beside the kernel's chunk of 32, widths beside a word of masks, one position of
# each row, a row longer than a chunk.
SHAPES = [(0, 5, 16), (5, 0, 16), (1, 1, 16), (5, 51, 32), (70, 1, 48), (2, 150, 128), (3, 50, 208)]
NAMES = ("out", "x", "weight", "bias")
needs_cpp = pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))


def tensors(batch, positions, width, seed=0):
    """x, weight, bias, and the gradient of the result."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, positions, width), (width,), (width,), (batch, positions, width))
    x, weight, bias, grad = (torch.randn(shape, generator=g) for shape in shapes)
    return [3 * x + 1, weight, bias, grad]


def run(function, given, **options):
    *leaves, grad = given
    leaves = [t.detach().clone().requires_grad_() for t in leaves]
    out = function(*leaves, **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def written_out(x, weight, bias, *, p, kept):
    """The sentence of the docstring, with the mask given."""
    dropped = torch.where(kept, x / (1 - p), 0)
    return F.layer_norm(dropped, x.shape[-1:], weight, bias, 1e-12)


def mask(shape, p, **options):
    """By the op `dropout` of ones."""
    with use_backend("reference"):
        return dropout(torch.ones(shape), p, **options) > 0


def check(forced, given, p, put=lambda *t: t, **options):
    kept = mask(given[0].shape, p, **options)
    with forced:
        on = dict(zip(("seed", "rows"), put(options["seed"], options["rows"]), strict=True))
        got = run(lambda *t: dropout_layer_norm(*t, p, **{**options, **on}), put(*given))
    same = run(written_out, given, p=p, kept=kept)
    truth = run(written_out, [t.double() for t in given], p=p, kept=kept)
    for name, mine, plain, right in zip(NAMES, got, same, truth, strict=True):
        assert_close_to_truth(mine.cpu(), plain, right, name=name)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_definition(place, shape, p):
    rows = torch.arange(shape[0]) * 1_000_000_007 - 3
    options = {"seed": SEED, "rows": rows, "site": 9, "position_offset": 7, "position_stride": 3}
    check(place.forced("dropout_layer_norm"), tensors(*shape), p, put=place.put, **options)


def test_non_contiguous_inputs(place):
    given = [t.mT.contiguous().mT if t.ndim > 1 else t for t in tensors(3, 40, 32)]
    given[1] = given[1].repeat_interleave(2)[::2]
    assert not given[0].is_contiguous() and not given[1].is_contiguous()
    rows = torch.arange(6)[::2]
    check(place.forced("dropout_layer_norm"), given, 0.3, place.put, seed=SEED, rows=rows, site=1)


def test_what_the_kernel_declines(place):
    forced = place.forced("dropout_layer_norm", declines=True)
    check(forced, tensors(4, 7, 50), 0.3, place.put, seed=SEED, rows=torch.arange(4), site=1)


@needs_cpp
def test_instruction_sets_and_threads(isa):
    given, threads, results = tensors(23, 50, 80), torch.get_num_threads(), []
    options = {"seed": SEED, "rows": torch.arange(23), "site": 4}
    kept = mask(given[0].shape, 0.2, **options)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("cpp"), dispatch_log() as log:
                results.append(run(lambda *t: dropout_layer_norm(*t, 0.2, **options), given))
            assert {entry.backend for entry in log} == {Backend.CPP}
    finally:
        torch.set_num_threads(threads)
    same = run(written_out, given, p=0.2, kept=kept)
    truth = run(written_out, [t.double() for t in given], p=0.2, kept=kept)
    for name, one, two, three, plain, right in zip(NAMES, *results, same, truth, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three), f"{name} depends on the threads"
        assert_close_to_truth(one, plain, right, name=name)


@needs_cpp
def test_a_row_does_not_depend_on_the_batch():
    given, order = tensors(9, 50, 32), torch.tensor([4, 0, 8, 3])
    with use_backend("cpp"):
        whole = dropout_layer_norm(*given[:-1], 0.3, seed=SEED)
        part = dropout_layer_norm(given[0][order], *given[1:-1], 0.3, seed=SEED, rows=order)
        last = dropout_layer_norm(
            given[0][:, -8:], *given[1:-1], 0.3, seed=SEED, position_offset=42
        )
    assert torch.equal(part, whole[order])
    assert torch.equal(last, whole[:, -8:])


@needs_cpp
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_in_its_row_and_drops(isa, strange):
    given = tensors(4, 50, 32)
    kept = mask(given[0].shape, 0.5, seed=SEED)
    places = [tuple(where[0].tolist()) for where in (kept.nonzero(), (~kept).nonzero())]
    function = lambda *t: dropout_layer_norm(*t, 0.5, seed=SEED)  # noqa: E731
    with use_backend("cpp"):
        plain = run(function, given)
        given[0][places[1]] = strange
        for mine, right in zip(run(function, given), plain, strict=True):
            assert torch.equal(mine, right)
        given[0][places[0]] = strange
        out, d_x, *_ = run(function, given)
    row = places[0][:2]
    assert out[row].isnan().all() and d_x[row][kept[row]].isnan().all()
    assert (d_x[row][~kept[row]] == 0).all()
    for mine, right in zip((out, d_x), plain[:2], strict=True):
        mine[row] = right[row]
        assert torch.equal(mine, right)


@needs_cpp
def test_what_is_kept():
    given = [t.requires_grad_() for t in tensors(8, 50, 128)[:-1]]
    with use_backend("cpp"):
        out = dropout_layer_norm(*given, 0.1, seed=SEED)
    mine = {t.data_ptr() for t in given}
    kept = [t for t in out.grad_fn.saved_tensors if t.data_ptr() not in mine]
    assert [(t.dtype, t.nbytes) for t in kept] == [(torch.int64, 8 * 50 * 128 / 8)]


@needs_cpp
def test_the_embedded_history_in_training():
    """By the op where the stream draws on a CPU; the definition, and other draws, by its parts."""
    config = {"item_num": 40, "max_len": 7, "hidden_size": 32, "emb_dropout": 0.4}
    model = FMRecommender.from_config(config).train()
    sequence, tag = make_sequences(5, 7, 40, 1)
    results = []
    for backend, rng in (("cpp", "stream"), ("reference", "stream"), ("cpp", "published")):
        model.zero_grad()
        with use_backend(backend), use_rng(rng), dispatch_log() as log:
            _, x0, _, _, loss, _ = model(sequence, tag, seed=3 if rng == "stream" else None)
        ran = [entry.backend for entry in log if entry.op == "dropout_layer_norm"]
        assert ran == [Backend.CPP] * ((backend, rng) == ("cpp", "stream"))
        (loss + x0.sum()).backward()
        norm = model.LayerNorm
        table = model.item_embeddings.weight.grad
        results.append([x0.detach(), norm.weight.grad, norm.bias.grad, table.clone()])
    for mine, right in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(mine, right, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 16)}, ValueError, r"x must be .*got \(2, 16\)"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight must be .*got \(8,\)"),
        ({"bias": torch.zeros(16).double()}, TypeError, "bias is torch.float64"),
        ({"rows": torch.zeros(1).long()}, ValueError, r"rows must be .*got \(1,\)"),
        ({"p": 1.0}, ValueError, r"p must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_inputs_are_named(change, error, message):
    arguments = dict(zip(NAMES[1:], tensors(2, 3, 16), strict=False)) | {"p": 0.1, "seed": SEED}
    with pytest.raises(error, match=message):
        dropout_layer_norm(**{**arguments, **change})
