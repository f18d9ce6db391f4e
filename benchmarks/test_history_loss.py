"""history_loss: our backends against the dense loss, as published (row loop) and scattered."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from benchmarks import peers
from benchmarks.harness import (
    Work,
    assert_agreement,
    automatic_backend,
    gradients_of,
    on_backend,
    runnable_backends,
)
from benchmarks.inputs import (
    TRAIN_LENGTHS,
    config_of,
    drawn_zero_cells,
    histories,
    models,
    normal,
)
from benchmarks.memory import extra_bytes
from fmrec_fast.ops import history_loss


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def test_history_loss(suite, race, backward):
    sizes, device, batch = suite.sizes, suite.device, suite.sizes.batch
    inner = sizes.decoder[1]
    hidden = torch.tanh(normal(batch, inner, device=device)).requires_grad_(backward)
    weight = normal(sizes.items, inner, device=device, seed=1) * inner**-0.5
    weight.requires_grad_(backward)
    bias = (normal(sizes.items, device=device, seed=2) * inner**-0.5).requires_grad_(backward)
    sequence = histories(batch, sizes, device, lengths=TRAIN_LENGTHS)
    cells = drawn_zero_cells(sequence, sizes.items)
    _, published_model = models(config_of(sizes), device)
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}

    def finish(loss):
        return gradients_of(loss, leaves) if backward else {"out": loss}

    def ours(cells=None):
        return finish(history_loss(hidden, weight, bias, sequence, cells=cells))

    def published(cells=None):
        decoded = F.linear(hidden, weight, bias)
        return finish(published_model.recon_loss(decoded, sequence, cells))

    def tuned(cells=None):
        wanted = peers.multi_hot(sequence, sizes.items)
        used = peers.used_cells(wanted, 1.0, cells)
        decoded = F.linear(hidden, weight, bias)
        return finish(peers.dense_history_loss(decoded, wanted, used))

    backends, left_out = runnable_backends("history_loss", device)
    given = {"published": lambda: published(cells), "tuned": lambda: tuned(cells)}
    given |= {b.value: on_backend("history_loss", b, lambda: ours(cells)) for b in backends}
    results = {name: run() for name, run in given.items()}
    variants = {"published": published, "tuned": tuned}
    variants |= {b.value: on_backend("history_loss", b, ours) for b in backends}
    ones = int(peers.multi_hot(sequence, sizes.items).sum())
    touched = torch.cat((sequence[sequence > 0], cells[:, 1])).unique().numel()
    race(
        "history_loss",
        "forward + backward" if backward else "forward",
        variants,
        ours=automatic_backend("history_loss", ours).value,
        sizes={"B": batch, "V": sizes.items, "H": inner, "cells": ones + len(cells)},
        equality=assert_agreement(results, "published", 1e-4),
        # The gradient of `weight` is dense: written in full.
        work=Work(
            bytes=4 * (hidden.numel() + touched * inner)
            + (4 * (hidden.numel() + weight.numel()) if backward else 0),
            flops=(3 if backward else 1) * 2 * inner * (ones + len(cells)),
        ),
        note="agreement: given cells; timed: everyone draws",
        left_out=left_out,
    )


# Against V: of a narrower layer, so that a table of a million rows and its gradient fit anywhere.
INNER = 256


def pytest_generate_tests(metafunc):
    """V: the suite's, 1e5, and with ``--large`` 1e4 and 1e6; in a quick run only the suite's."""
    if "items" in metafunc.fixturenames:
        quick, large = (metafunc.config.getoption(name) for name in ("quick", "large"))
        items = [None] if quick else [None, 100_000]
        metafunc.parametrize("items", items + [10_000, 1_000_000] * (large and not quick))


def against_items(batch: int, items: int, length: int, device: torch.device):
    """(hidden, weight, bias, sequence) whose memory and time are looked at for growing V."""
    real = torch.arange(length) >= length - 8  # Beauty's mean training history
    sequence = (
        torch.randint(1, items, (batch, length), generator=torch.Generator().manual_seed(4)) * real
    )
    return (
        torch.tanh(normal(batch, INNER, device=device)).requires_grad_(),
        (normal(items, INNER, device=device, seed=1) * INNER**-0.5).requires_grad_(),
        (normal(items, device=device, seed=2) * INNER**-0.5).requires_grad_(),
        sequence.to(device),
    )


def one_loss(kind: str, hidden, weight, bias, sequence, cells):
    """Loss and gradients of one of the variants, the gradients as they come."""
    if kind == "dense":
        wanted = peers.multi_hot(sequence, len(weight))
        used = peers.used_cells(wanted, 1.0, cells)
        loss = peers.dense_history_loss(F.linear(hidden, weight, bias), wanted, used)
    else:
        sparse = kind == "ours, sparse gradient"
        loss = history_loss(hidden, weight, bias, sequence, cells=cells, sparse_grad=sparse)
    return loss, torch.autograd.grad(loss, (hidden, weight, bias))


def prepare(kind: str, batch: int, items: int, length: int):
    """For `benchmarks.memory`: one call, on inputs that are in memory already."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    given = against_items(batch, items, length, device)
    one_loss(kind, *against_items(4, 100, length, device), None)  # libraries take theirs before
    return lambda: one_loss(kind, *given, None)


def test_history_loss_against_items(suite, race, items):
    """Time and memory for growing V: ours grows with V by the dense gradient's zeros only."""
    sizes, device, batch = suite.sizes, suite.device, suite.sizes.batch
    items = items or sizes.items
    given = against_items(batch, items, sizes.length, device)
    cells = torch.randint(items, (batch * 8,), generator=torch.Generator().manual_seed(5))
    cells = torch.stack((torch.arange(batch).repeat(8), cells), 1)
    cells = cells[(given[3].cpu()[cells[:, 0]] != cells[:, 1:]).all(1)].to(device)
    kinds = ["ours", "ours, sparse gradient"]
    # The dense variant holds [B, V] matrices: of a million items, 2 GB each.
    kinds += ["dense"] if items <= 100_000 else []
    results = {}
    for kind in reversed(kinds):
        loss, gradients = one_loss(kind, *given, cells)
        d_hidden, d_weight, d_bias = (g.to_dense() if g.is_sparse else g for g in gradients)
        results[kind] = {"out": loss, "d_hidden": d_hidden, "d_weight": d_weight, "d_bias": d_bias}
    equality = assert_agreement(results, kinds[-1], 1e-4)
    del results, loss, gradients, d_hidden, d_weight, d_bias
    memory = {}
    if not suite.quick:
        for kind in kinds:
            arguments = ("benchmarks.test_history_loss", "prepare", kind, batch, items)
            memory[kind] = extra_bytes(*arguments, sizes.length)
    used = int((given[3] > 0).sum()) + len(cells)
    race(
        "history_loss",
        f"forward + backward, V = {items:,}",
        {kind: partial(one_loss, kind, *given, None) for kind in kinds},
        ours="ours",
        sizes={"B": batch, "V": items, "H": INNER, "cells": used},
        equality=equality,
        work=Work(flops=6 * INNER * used),
        flops={"ours": 6 * INNER * used, "ours, sparse gradient": 6 * INNER * used}
        | ({"dense": 6 * INNER * batch * items} if "dense" in kinds else {}),
        note="agreement: given cells; timed: everyone draws. FLOPs: of the products, by formula. "
        "Memory: gradients included",
        memory=memory,
        least=3,
    )
