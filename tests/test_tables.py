"""look_up: the dense gradient of lookups in one table."""

from __future__ import annotations

import pytest
import torch

from fmrec_fast import extension, use_backend
from fmrec_fast.models.tables import look_up
from fmrec_fast.testing import assert_close_to_truth

PLACES = ["reference", *(["cpp"] if extension.available() else [])]


def gradient(ids, grads, items, dtype=torch.float32):
    table = torch.zeros(items, grads[0].shape[-1], dtype=dtype, requires_grad=True)
    rows = look_up(table, *ids)
    return torch.autograd.grad(rows, table, [grad.to(dtype) for grad in grads])[0]


def lookups(items, width, *shapes):
    """Most of them of row 0, as padding is."""
    g = torch.Generator().manual_seed(items)
    ids = [torch.randint(0, items, shape, generator=g) for shape in shapes]
    for part in ids:
        part[torch.rand(part.shape, generator=g) < 0.7] = 0
    return ids, [1 + torch.randn(*shape, width, generator=g) for shape in shapes]


@pytest.mark.parametrize("backend", PLACES)
@pytest.mark.parametrize(
    "items, width, shapes",
    [(50, 128, [(40, 50), (40,)]), (7, 33, [(300,), (2, 9)]), (900, 16, [(0, 4), (5,)])],
)
def test_each_row_gets_what_its_lookups_got(backend, items, width, shapes):
    ids, grads = lookups(items, width, *shapes)
    with use_backend(backend):
        mine = gradient(ids, grads, items)
    with use_backend("reference"):
        plain = gradient(ids, grads, items)
        truth = gradient(ids, grads, items, torch.float64)
    assert_close_to_truth(mine, plain, truth)
    untouched = torch.ones(items, dtype=torch.bool)
    untouched[torch.cat([part.flatten() for part in ids])] = False
    assert (mine[untouched] == 0).all()


@pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))
def test_the_sum_does_not_depend_on_the_threads(isa):
    ids, grads = lookups(200, 64, (70, 50), (70,))
    before, sums = torch.get_num_threads(), []
    with use_backend("cpp"):
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            sums.append(gradient(ids, grads, 200))
    torch.set_num_threads(before)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[0], sums[2])


@pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))
def test_gradients_of_any_layout():
    ids, grads = lookups(20, 24, (30, 5), (30,))
    spread = [ids[0].T.contiguous().T, ids[1]]
    with use_backend("cpp"):
        plain = gradient(ids, grads, 20)
        assert torch.equal(gradient(spread, [grads[0].mT.contiguous().mT, grads[1]], 20), plain)
        one = torch.ones(1, 1, 1).expand(30, 5, 24)
        assert gradient(ids, [one, grads[1]], 20).isfinite().all()
