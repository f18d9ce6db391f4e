"""history_loss: our backends against the dense loss, as published (row loop) and scattered."""

from __future__ import annotations

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
