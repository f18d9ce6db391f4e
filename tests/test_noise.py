"""The counter-based noise stream."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch._subclasses import FakeTensorMode

from fmrec_fast import extension, noise, use_backend

SEED = torch.tensor(-6234567890123456789)


def hexes(words) -> str:
    return " ".join(f"{int(word):08x}" for word in words)


@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000",
         "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
         "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
         "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)  # fmt: skip
def test_known_answers_of_random123(counter, key, expected):
    words = tuple(torch.tensor(int(word, 16)) for word in counter.split())
    low, high = (int(word, 16) for word in key.split())
    seed = noise.as_seed(high << 32 | low, "cpu")
    assert hexes(noise.philox_4x32(words, seed)) == expected


def test_golden_stream(golden_arrays):
    golden = golden_arrays("noise_stream")
    expected = torch.from_numpy(golden["normals"])  # [S, B, P, D]
    steps, rows = torch.from_numpy(golden["steps"]), torch.from_numpy(golden["rows"])
    positions, channels = torch.arange(expected.shape[2]), expected.shape[3]
    seed = torch.tensor(int(golden["seed"]))
    got = noise.normals(seed, rows, steps, positions, channels)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
    delta = 0.001
    for i, step in enumerate(steps.tolist()):
        lam = noise.lam(seed, rows, step, len(positions), channels, delta)
        torch.testing.assert_close(lam, delta + delta * expected[i], atol=1e-9, rtol=1e-6)


def test_uniforms_at_the_extremes():
    words = torch.tensor([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
    uniform = noise.to_uniform(words)
    assert uniform.dtype == torch.float32
    assert uniform[0] == 0 and uniform[4] == 0
    assert uniform[1] > 0
    assert uniform.max() < 1
    assert uniform[2] == uniform[3] == uniform.max()


def test_normals_of_the_extremes_are_finite():
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    pairs = torch.stack(noise.to_normal_pair(u[:, None], u[None]))
    assert torch.isfinite(pairs).all()
    assert pairs.abs().max() < 5.7  # the stream cuts u1 off at 1e-7


def normals(seed=SEED, rows=32, steps=4, positions=16, channels=256):
    return noise.normals(
        seed, torch.arange(rows), torch.arange(steps), torch.arange(positions), channels
    )


def test_noise_depends_on_its_name_alone():
    whole = normals(rows=9, steps=3, positions=7, channels=10)
    rows, steps, positions = torch.tensor([7, 0, 3]), torch.tensor([2, 0]), torch.tensor([6, 1])
    part = noise.normals(SEED, rows, steps, positions, 6)
    assert torch.equal(part, whole[steps][:, rows][:, :, positions][..., :6])


def test_every_counter_word_and_key_word_matters():
    one = {"rows": [5], "steps": [5], "positions": [5]}

    def draw(seed=SEED, **changes):
        parts = {key: torch.tensor(value) for key, value in {**one, **changes}.items()}
        return noise.normals(seed, parts["rows"], parts["steps"], parts["positions"], 8).flatten()

    variants = [
        draw(),
        draw(rows=[6]),
        draw(steps=[6]),
        draw(positions=[6]),
        draw(SEED + 1),
        draw(SEED + 2**32),  # the high key word
    ]
    for i, one_draw in enumerate(variants):
        assert len(one_draw.unique()) == 8
        for other in variants[:i]:
            assert not (one_draw == other).any()


def test_row_names_are_taken_modulo_2_to_32():
    names = torch.tensor([3, 2**32 + 3, -1, 2**32 - 1])
    a, b, c, d = noise.start(SEED, names, 8)
    assert torch.equal(a, b) and torch.equal(c, d) and not torch.equal(a, c)


def test_moments_and_distribution():
    n = normals().double().flatten()
    count = len(n)
    assert abs(n.mean()) < 4 / count**0.5
    assert abs(n.var() - 1) < 4 * (2 / count) ** 0.5
    assert abs((n**3).mean()) < 4 * (15 / count) ** 0.5
    assert abs((n**4).mean() - 3) < 4 * (96 / count) ** 0.5
    assert stats.kstest(n.numpy(), "norm").pvalue > 0.001


@pytest.mark.parametrize("coordinate", range(4))
def test_each_normal_of_a_call_is_standard(coordinate):
    n = normals()[..., coordinate::4].double().flatten()
    assert stats.kstest(n.numpy(), "norm").pvalue > 0.001


def assert_unrelated(a: torch.Tensor, b: torch.Tensor) -> None:
    """Neither the values nor their squares are correlated."""
    a, b = a.double().flatten(), b.double().flatten()
    limit = 4 / len(a) ** 0.5
    for x, y in ((a, b), (a**2, b**2), (a, b**2), (a**2, b)):
        assert abs(torch.corrcoef(torch.stack((x, y)))[0, 1]) < limit


def test_no_correlation_along_any_coordinate():
    n = normals()  # [S, B, P, D]
    groups = n.unflatten(-1, (-1, 4))
    for i in range(4):
        for j in range(i):
            assert_unrelated(groups[..., i], groups[..., j])
    assert_unrelated(groups[..., 1:, :], groups[..., :-1, :])
    assert_unrelated(n[:, :, 1:], n[:, :, :-1])
    assert_unrelated(n[:, 1:], n[:, :-1])
    assert_unrelated(n[1:], n[:-1])


@pytest.mark.parametrize("other", [SEED + 1, SEED + 2**32, -SEED])
def test_no_correlation_between_seeds(other):
    assert_unrelated(normals(), normals(other))


def test_derived_seeds_differ():
    seeds = {int(noise.derive_seed(SEED, use)) for use in noise.Use}
    assert len(seeds) == len(noise.Use)
    assert int(noise.derive_seed(SEED, noise.Use.LAMBDA)) == int(SEED)
    stride = noise.SEED_STRIDE
    for use in noise.Use:
        wanted = (int(SEED) + int(use) * stride) % 2**64
        assert int(noise.derive_seed(SEED, use)) % 2**64 == wanted


def test_no_correlation_between_uses():
    rows = torch.arange(512)
    zero = torch.zeros(1, dtype=torch.int64)
    lam = noise.normals(SEED, rows, zero, zero, 256)[0, :, 0]
    assert_unrelated(noise.start(SEED, rows, 256), lam)


def test_start_is_standard_normal():
    z0 = noise.start(SEED, torch.arange(2000), 50)
    assert z0.shape == (2000, 50)
    assert stats.kstest(z0.flatten().numpy(), "norm").pvalue > 0.001


def test_times_are_uniform_and_normal():
    rows = torch.arange(100_000)
    assert stats.kstest(noise.uniforms(SEED, rows).numpy(), "uniform").pvalue > 0.001
    assert stats.kstest(noise.time_normals(SEED, rows).numpy(), "norm").pvalue > 0.001


def test_wide_words_are_uniform():
    words = noise.wide_words(SEED, 60_000)
    assert words.dtype == torch.int64
    assert words.min() >= 0
    assert stats.kstest(words.double().numpy() / 2**63, "uniform").pvalue > 0.001
    assert stats.chisquare(torch.bincount(words % 7, minlength=7).numpy()).pvalue > 0.001
    assert torch.equal(noise.wide_words(SEED, 10), words[:10])
    assert len(noise.wide_words(SEED, 0)) == 0


def test_lam_has_mean_and_deviation_delta():
    lam = noise.lam(SEED, torch.arange(64), 3, 50, 32, 0.25)
    assert lam.shape == (64, 50, 32)
    assert stats.kstest(lam.flatten().numpy(), "norm", (0.25, 0.25)).pvalue > 0.001


def draws(seed, rows):
    return noise.start(seed, rows, 6), noise.uniforms(seed, rows), noise.wide_words(seed, 7)


def test_the_definition_draws_where_the_extension_cannot():
    rows = torch.arange(3)
    with use_backend("reference"):
        assert noise.native(SEED, rows) is None
        expected = draws(SEED, rows)
    assert (noise.native(SEED, rows) is None) == (not extension.available())
    assert noise.native(SEED, rows.int()) is None
    assert noise.native(SEED.to("meta")) is None
    with FakeTensorMode():
        shapes = [draw.shape for draw in draws(torch.tensor(5), torch.arange(3))]
    assert shapes == [draw.shape for draw in expected]
    batched = torch.vmap(draws, (0, None))(torch.stack((SEED, SEED + 1)), rows)
    compiled = torch.compile(draws, fullgraph=True, backend="eager")(SEED, rows)
    for one, two, wanted in zip(batched, compiled, expected, strict=True):
        assert torch.equal(one[0], wanted) and torch.equal(two, wanted)


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**64, 2**70])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=f"got {seed}"):
        noise.as_seed(seed, "cpu")


@pytest.mark.parametrize("seed", [1.5, True, "7", [3]])
def test_a_seed_of_another_type_is_refused(seed):
    with pytest.raises(TypeError) as error:
        noise.as_seed(seed, "cpu")
    assert f"got {seed!r}" in str(error.value)


@pytest.mark.parametrize(
    "seed, what",
    [
        (torch.tensor(1.0), "torch.float32"),
        (torch.tensor(1, dtype=torch.int32), "torch.int32"),
        (torch.tensor([1, 2]), r"\(2,\)"),
    ],
)
def test_a_seed_tensor_of_another_kind_is_refused(seed, what):
    with pytest.raises(ValueError, match=what):
        noise.as_seed(seed, "cpu")


def test_seeds_are_64_bit_words():
    assert int(noise.as_seed(2**64 - 1, "cpu")) == -1
    assert int(noise.as_seed(2**63, "cpu")) == -(2**63)
    assert int(noise.as_seed(0, "cpu")) == 0
    seed = noise.as_seed(torch.tensor([9]), "cpu")
    assert seed.shape == () and int(seed) == 9


def test_torch_manual_seed_governs_drawn_seeds():
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append([int(noise.as_seed(None, "cpu")) for _ in range(3)])
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 6
