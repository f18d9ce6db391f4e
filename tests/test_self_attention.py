"""self_attention: every backend against the definition, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fmrec_fast import TrainingDraws, dispatch_log, extension, training_losses, use_backend
from fmrec_fast.backend import Backend
from fmrec_fast.ops import dropout, self_attention
from fmrec_fast.ops.self_attention import self_attention_and_last
from fmrec_fast.testing import assert_close_to_truth, make_sequences

pytestmark = pytest.mark.op("self_attention")
SEED = torch.tensor(-987654321987654321)
# (B, L, D, H): sequences beside the kernel's groups of 160 rows (256 of many; of 32 sequences with
# last_only), a sequence longer than a group, heads beside whole vectors.
SHAPES = [
    (5, 51, 32, 2),
    (70, 2, 48, 3),
    (2, 170, 16, 1),
    (35, 3, 144, 3),
    (4, 50, 128, 4),
    (332, 50, 16, 1),
]
# Heads that the last position's kernel does not take.
NARROW = [(7, 20, 32, 4), (3, 30, 48, 1)]
LAYERS = ("query", "key", "value", "output")
NAMES = ["norm_weight", "norm_bias"]
NAMES += [f"{layer}_{part}" for layer in LAYERS for part in ("weight", "bias")]
needs_cpp = pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))


def tensors(batch, length, width, heads, last_only, seed=0):
    """x, the scales of its queries, the ten parameters, and the gradient of the result."""
    g = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(batch, length, width, generator=g)
    shapes = [(width,), (width,)] + [(width, width), (width,)] * 4
    # Scores of order 1, as those of a network in training: one that is decided is ill-conditioned.
    parameters = [torch.randn(shape, generator=g) * shape[-1] ** -0.5 for shape in shapes]
    parameters[0] += 1
    # Histories without padding, of padding only, and all between them; one with a hole.
    padding = torch.randint(0, length + 1, (batch,), generator=g)
    padding[0], padding[-1] = 0, length
    mask = (torch.arange(length) >= padding[:, None]).float()
    mask[0, length // 2] = 0
    grad = torch.randn(batch, 1 if last_only else length, width, generator=g)
    return [x, mask * (width // heads) ** -0.5, *parameters, grad]


def run(function, given, **options):
    x, query_scale, *parameters, grad = given
    leaves = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    out = function(leaves[0], query_scale, *leaves[1:], **options)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def written_out(x, query_scale, *parameters, num_heads, p, kept, last_only):
    """The sentence of the docstring, with the masks given, for all positions."""
    batch, length, width = x.shape
    norm, layers = parameters[:2], list(zip(parameters[2::2], parameters[3::2], strict=True))

    def drop(x, mask):
        return torch.where(mask, x / (1 - p), 0)

    def heads(x):
        return x.view(batch, length, num_heads, -1).transpose(1, 2)

    normed = F.layer_norm(x, (width,), *norm, 1e-12)
    q, k, v = (heads(F.linear(normed, *layer)) for layer in layers[:3])
    probabilities = torch.softmax((query_scale[:, None, :, None] * q) @ k.mT, dim=-1)
    mixed = (drop(probabilities, kept[0].view(batch, num_heads, length, length)) @ v).transpose(
        1, 2
    )
    out = x + drop(F.linear(mixed.reshape(batch, length, width), *layers[3]), kept[1])
    return out[:, -1:] if last_only else out


def masks(shape, p, *, num_heads, seed, rows, site):
    """The two masks, by the op `dropout` of ones."""
    batch, length, width = shape
    sizes = [(batch, num_heads * length, length), (batch, length, width)]
    with use_backend("reference"):
        return [
            dropout(torch.ones(size), p, seed=seed, rows=rows, site=site + i) > 0
            for i, size in enumerate(sizes)
        ]


def check(forced, given, p, put=lambda *t: t, *, last_only, **options):
    kept = masks(given[0].shape, p, **options)
    with forced:
        on = dict(zip(("seed", "rows"), put(options["seed"], options["rows"]), strict=True))
        options = {**options, **on, "last_only": last_only}
        got = run(lambda *t: self_attention(*t, p, **options), put(*given))
    plain = {"num_heads": options["num_heads"], "p": p, "kept": kept, "last_only": last_only}
    same = run(written_out, given, **plain)
    truth = run(written_out, [t.double() for t in given], **plain)
    for name, mine, other, right in zip(("out", "x", *NAMES), got, same, truth, strict=True):
        if name == "key_bias":  # nothing depends on it: only what rounding leaves
            assert mine.abs().max() <= 1e-4 * same[2 + NAMES.index("query_bias")].abs().max()
        else:
            assert_close_to_truth(mine.cpu(), other, right, name=name)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_definition(place, shape, p, last_only):
    rows = torch.arange(shape[0]) * 1_000_000_007 - 3
    options = {"num_heads": shape[3], "seed": SEED, "rows": rows, "site": 9}
    given = tensors(*shape, last_only)
    check(place.forced("self_attention"), given, p, place.put, last_only=last_only, **options)


@pytest.mark.parametrize("shape", NARROW)
def test_heads_of_any_width(place, shape):
    given = tensors(*shape, last_only=False)
    options = {"num_heads": shape[3], "seed": SEED, "rows": torch.arange(shape[0]), "site": 2}
    check(place.forced("self_attention"), given, 0.3, place.put, last_only=False, **options)


@pytest.mark.parametrize("last_only", [False, True])
def test_non_contiguous_inputs(place, last_only):
    x, scale, *rest = tensors(6, 40, 32, 2, last_only)
    given = [x[::2], scale[::2], *(t.mT.contiguous().mT if t.ndim > 1 else t for t in rest)]
    given[-1] = rest[-1][::2]
    assert not given[0].is_contiguous() and not given[4].is_contiguous()
    options = {"num_heads": 2, "seed": SEED, "rows": torch.arange(6)[::2], "site": 1}
    check(place.forced("self_attention"), given, 0.3, place.put, last_only=last_only, **options)


@pytest.mark.parametrize(
    "shape, last_only",
    [((1, 5, 16, 1), False), ((7, 20, 24, 3), False), ((7, 20, 32, 4), True)],
)
def test_what_the_kernel_declines(place, shape, last_only):
    """Few rows, and widths that are no multiples of 16: the definition, and the log says why."""
    options = {"num_heads": shape[3], "seed": SEED, "rows": torch.arange(shape[0]), "site": 1}
    forced = place.forced("self_attention", declines=True)
    check(forced, tensors(*shape, last_only), 0.3, place.put, last_only=last_only, **options)


def test_the_scales_may_need_gradients(place):
    x, scale, *parameters, grad = tensors(3, 30, 32, 2, last_only=False)
    with place.forced("self_attention", declines=True):
        (moved,) = place.put(scale)
        moved.requires_grad_()
        out = self_attention(*place.put(x), moved, *place.put(*parameters), 0.0, num_heads=2,
                             seed=place.put(SEED)[0])  # fmt: skip
        assert torch.autograd.grad(out, moved, *place.put(grad))[0].abs().sum() > 0


@needs_cpp
@pytest.mark.parametrize("last_only", [False, True])
def test_instruction_sets_and_threads(isa, last_only):
    threads = torch.get_num_threads()
    given = tensors(40, 50, 64, 2, last_only)
    options = {"num_heads": 2, "seed": SEED, "rows": torch.arange(40), "site": 4}
    kept = masks(given[0].shape, 0.2, **options)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            with use_backend("cpp"), dispatch_log() as log:
                results.append(
                    run(lambda *t: self_attention(*t, 0.2, last_only=last_only, **options), given)
                )
            assert {entry.backend for entry in log} == {Backend.CPP}
    finally:
        torch.set_num_threads(threads)
    plain = {"num_heads": 2, "p": 0.2, "kept": kept, "last_only": last_only}
    same = run(written_out, given, **plain)
    truth = run(written_out, [t.double() for t in given], **plain)
    names = ("out", "x", *NAMES)
    for name, one, two, three, other, right in zip(names, *results, same, truth, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three), f"{name} depends on the threads"
        if name != "key_bias":
            assert_close_to_truth(one, other, right, name=name)


@needs_cpp
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_precisions_are_as_close_as_their_definition(isa, last_only, precision):
    """With tiles; elsewhere tf32 is float32, and bf16 left to the definition."""
    given = tensors(12, 50, 64, 2, last_only)
    options = {"num_heads": 2, "seed": SEED, "rows": torch.arange(12), "last_only": last_only}
    results = {}
    for asked, backend in ((precision, "reference"), (precision, "cpp"), ("float32", "cpp")):
        with use_backend(backend), dispatch_log() as log:
            results[asked, backend] = run(
                lambda *t, name=asked: self_attention(*t, 0.2, precision=name, **options), given
            )
        runs = backend == "cpp" and (isa.startswith("amx") or asked != "bf16")
        assert log[0].backend is (Backend.CPP if runs else Backend.REFERENCE)
    kept = masks(given[0].shape, 0.2, num_heads=2, seed=SEED, rows=torch.arange(12), site=0)
    plain = {"num_heads": 2, "p": 0.2, "kept": kept, "last_only": last_only}
    truth = run(written_out, [t.double() for t in given], **plain)
    rounded, mine, exact = results.values()
    for name, a, b, right in zip(("out", "x", *NAMES), mine, rounded, truth, strict=True):
        if name != "key_bias":
            assert_close_to_truth(a, b, right, name=name)
            if precision == "tf32" and (isa != "amx_fp16" or last_only):  # more than 10 bits
                torch.testing.assert_close(a, right.float(), rtol=0, atol=3e-5 * right.abs().max())
    # Of the last position the products are in float32 all the same.
    in_float32 = last_only if isa.startswith("amx") else precision == "tf32"
    assert torch.equal(mine[0], exact[0]) == in_float32


@needs_cpp
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("power", [-70, 70])
def test_gradients_of_any_magnitude(isa, power, last_only):
    """Powers of two pass through to the bit; a sequence's own do not round another's numbers."""
    given = tensors(5, 51, 32, 2, last_only)
    powers = torch.tensor([1.0, 2.0**power, 1.0, 2.0**power, 1.0])[:, None, None]

    def gradients(grad):
        options = {"num_heads": 2, "seed": SEED, "last_only": last_only}
        return run(lambda *t: self_attention(*t, 0.2, **options), [*given[:-1], grad])[1:]

    with use_backend("cpp"):
        plain = gradients(given[-1])
        for mine, other in zip(gradients(given[-1] * 2.0**power), plain, strict=True):
            assert torch.equal(mine, other * 2.0**power)
        assert torch.equal(gradients(given[-1] * powers)[0], plain[0] * powers)


@needs_cpp
def test_a_sequence_does_not_depend_on_the_batch():
    given = tensors(9, 50, 32, 2, last_only=False)
    order = torch.tensor([4, 0, 8, 3])
    options = {"num_heads": 2, "seed": SEED}
    with use_backend("cpp"):
        whole, last = (
            self_attention(*given[:-1], 0.3, rows=torch.arange(9), last_only=last, **options)
            for last in (False, True)
        )
        part = [t[order] for t in given[:2]]
        for out, all_out in ((False, whole), (True, last)):
            mine = self_attention(*part, *given[2:-1], 0.3, rows=order, last_only=out, **options)
            assert torch.equal(mine, all_out[order])
    assert torch.allclose(last, whole[:, -1:], rtol=1e-4, atol=1e-4)


@needs_cpp
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("last_only", [False, True])
def test_what_is_not_finite_stays_in_its_sequence(strange, last_only):
    given = tensors(4, 50, 32, 2, last_only)
    options = {"num_heads": 2, "seed": SEED, "last_only": last_only}
    with use_backend("cpp"):
        plain = self_attention(*given[:-1], 0.3, **options)
        given[0][2, 7, 5] = strange
        out = self_attention(*given[:-1], 0.3, **options)
    assert not out[2].isfinite().all()
    out[2] = plain[2]
    assert torch.equal(out, plain)


@needs_cpp
def test_only_masks_are_kept():
    given = [t.requires_grad_(i != 1) for i, t in enumerate(tensors(8, 50, 32, 2, False)[:-1])]
    with use_backend("cpp"):
        out = self_attention(*given, 0.1, num_heads=2, seed=SEED)
    mine = {t.data_ptr() for t in given} | {SEED.data_ptr()}
    kept = [t for t in out.grad_fn.saved_tensors if t.data_ptr() not in mine]
    assert all(t.dtype == torch.int64 for t in kept)
    # The rows' names; of a row a word of the branch and one of each head.
    assert sum(t.nbytes for t in kept) == 8 * 8 + 8 * 50 * 3 * 8


@needs_cpp
@pytest.mark.parametrize("length", [50, 64, 130])
def test_the_masks_are_kept_as_bits_and_read(isa, length):
    """Of a position the branch's channels, then each head's keys, in words of their own; where
    there are kept masks, neither seed nor site nor rows count in the backward pass."""
    x, scale, *parameters, grad = tensors(3, length, 80, 5, last_only=False)
    native, bits = extension.load(), torch.arange(64)
    rows, words = torch.arange(3) + 7, length // 64 + 1
    kept = torch.empty(3, length, 2 + 5 * words, dtype=torch.int64)
    given = [x.numpy(), scale.numpy(), [t.numpy() for t in parameters]]
    native.self_attention_forward(
        *given, rows.numpy(), 11, 4, 0.3, kept.numpy(), torch.empty_like(x).numpy(), 5, False, 2
    )
    found = (kept[..., None] >> bits & 1).bool()
    of_keys, of_channels = masks(
        x.shape, 0.3, num_heads=5, seed=torch.tensor(11), rows=rows, site=4
    )
    assert torch.equal(found[:, :, :2].flatten(2)[..., :80], of_channels)
    assert not found[:, :, :2].flatten(2)[..., 80:].any()
    by_heads = found[:, :, 2:].reshape(3, length, 5, 64 * words).transpose(1, 2)
    assert torch.equal(by_heads[..., :length], of_keys.view(3, 5, length, length))
    assert not by_heads[..., length:].any()

    results = []
    for names, seed, site in ((rows, 11, 4), (rows + 1, 12, 6)):
        results.append([torch.empty_like(t) for t in (x, *parameters)])
        d_x, *d_parameters = (t.numpy() for t in results[-1])
        native.self_attention_backward(
            grad.numpy(), *given, names.numpy(), seed, site, 0.3, kept.numpy(), d_x, d_parameters,
            5, False, 2,
        )  # fmt: skip
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@needs_cpp
@pytest.mark.parametrize("last_only", [False, True])
def test_the_last_position_with_its_gradient(last_only):
    """To the bit as of a slice, whichever of the two results is used, and as often as asked."""
    given = tensors(5, 20, 32, 2, last_only)
    leaves = [t.requires_grad_(i != 1) for i, t in enumerate(given[:-1])]
    wanted = [leaves[0], *leaves[2:]]
    grad, grad_last = given[-1], torch.randn(32, 5, generator=torch.Generator().manual_seed(1)).T
    options = {"num_heads": 2, "seed": SEED, "last_only": last_only}
    with use_backend("cpp"):
        sliced = self_attention(*leaves, 0.2, **options), leaves[0][:, -1]
        joint = self_attention_and_last(*leaves[:2], tuple(leaves[2:]), 0.2, **options)
    assert torch.equal(sliced[0], joint[0]) and torch.equal(sliced[1], joint[1])
    before = [t.clone() for t in (grad, grad_last)]
    for used in ((0, 1), (0,), (1,), (0, 1)):
        mine, other = (
            torch.autograd.grad(
                [results[i] for i in used],
                wanted,
                [(grad, grad_last)[i] for i in used],
                retain_graph=True,
                allow_unused=True,
            )
            for results in (joint, sliced)
        )
        for one, two in zip(mine, other, strict=True):
            assert (one is None) == (two is None) and (one is None or torch.equal(one, two))
    assert torch.equal(grad, before[0]) and torch.equal(grad_last, before[1])
    with use_backend("reference"):
        assert torch.equal(
            self_attention_and_last(*leaves[:2], tuple(leaves[2:]), 0.2, **options)[1], sliced[1]
        )


# Fewer rows than the kernels' least; of the second half of the last block, whose only position is
# the last; enough for all.
@needs_cpp
@pytest.mark.parametrize("batch, blocks", [(3, (0, 0)), (5, (3, 2)), (70, (3, 3))])
def test_training_steps_are_those_of_the_definition(small_args, batch, blocks):
    """Three steps with dropout: same draws, same losses; the halves of a block are ops of their
    own."""
    from fmrec_fast import FMRecommender

    sequence, target = make_sequences(batch, 20, 61, seed=3, histories=("padding", "short", "full"))
    cells = torch.stack((torch.arange(batch), torch.arange(batch) % 7), dim=1)
    losses = {}
    for backend in ("auto", "reference"):
        torch.manual_seed(0)
        model = FMRecommender.from_config(small_args(max_len=20, num_blocks=3, hidden_size=64))
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        losses[backend] = []
        for step in range(3):
            with use_backend(backend), dispatch_log() as log:
                optimizer.zero_grad()
                loss = training_losses(
                    model, sequence, target, seed=step, draws=TrainingDraws(cells=cells)
                ).total
                loss.backward()
                optimizer.step()
            losses[backend].append(loss.item())
            for op, times in zip(("self_attention", "feed_forward"), blocks, strict=True):
                ran = [entry.backend for entry in log if entry.op == op]
                assert ran == [Backend.CPP] * (times if backend == "auto" else 0)
    assert losses["auto"] == pytest.approx(losses["reference"], rel=2e-6)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": torch.zeros(2, 16)}, ValueError, r"x must be .*got \(2, 16\)"),
        ({"x": torch.zeros(2, 0, 16), "query_scale": torch.zeros(2, 0)}, ValueError, "position"),
        ({"query_scale": torch.zeros(2, 4)}, ValueError, r"query_scale must be .*got \(2, 4\)"),
        ({"key_weight": torch.zeros(16, 8)}, ValueError, r"key_weight must be .*got \(16, 8\)"),
        ({"output_bias": torch.zeros(8)}, ValueError, r"output_bias must be .*got \(8,\)"),
        ({"value_bias": torch.zeros(16).double()}, TypeError, "value_bias is torch.float64"),
        ({"rows": torch.zeros(1).long()}, ValueError, r"rows must be .*got \(1,\)"),
        ({"num_heads": 3}, ValueError, "num_heads must divide D = 16, got 3"),
        ({"precision": "fp8"}, ValueError, "precision must be one of .*got 'fp8'"),
        ({"p": 1.0}, ValueError, r"p must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_inputs_are_named(change, error, message):
    given = tensors(2, 3, 16, 2, last_only=False)
    arguments = dict(zip(("x", "query_scale", *NAMES), given, strict=False))
    arguments |= {"p": 0.1, "num_heads": 2, "seed": SEED}
    with pytest.raises(error, match=message):
        self_attention(**{**arguments, **change})
