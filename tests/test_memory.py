"""Memory of large results is kept for the next, and given back when asked."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from fmrec_fast import extension, memory

pytestmark = pytest.mark.skipif(not extension.available(), reason=str(extension.reason()))

LARGE = (300, 50, 128)


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    memory.release()
    yield
    memory.release()


@pytest.mark.parametrize("shape", [(0, 3), (3, 5), (1 << 16,), LARGE])
def test_they_are_plain_float_tensors(shape):
    x = memory.empty(*shape)
    assert x.shape == shape and x.dtype == torch.float32 and x.is_contiguous()
    assert x.data_ptr() % 64 == 0 or x.numel() < memory.FEWEST
    x.requires_grad_()
    (x * 2).sum().backward()
    assert x.grad is not None and x.grad.shape == shape


def kept_is_not_built_in() -> bool:
    """Under AddressSanitizer nothing is kept."""
    x = memory.empty(*LARGE)
    del x
    return memory.release() == 0


def test_what_is_freed_serves_the_next_of_about_its_size():
    if kept_is_not_built_in():
        assert memory.release() == 0
        return
    first = memory.empty(*LARGE)
    place = first.data_ptr()
    alive = memory.empty(*LARGE)
    assert alive.data_ptr() != place
    del first
    again = memory.empty(LARGE[0] - 1, *LARGE[1:])
    assert again.data_ptr() == place
    again.fill_(7.0)
    view = again[3:]
    del again
    other = memory.empty(*LARGE)
    assert other.data_ptr() != place, "a view still reads it"
    assert view.eq(7.0).all()
    del view
    assert memory.empty(*LARGE).data_ptr() == place


def test_unwritten_memory_is_nan_where_torch_makes_it_so():
    filled = memory.empty(*LARGE)
    assert filled.isnan().all()  # tests/conftest.py asks for it


def test_release_gives_back_everything_and_no_more_than_a_gibibyte_is_kept():
    nothing = kept_is_not_built_in()
    arrays = [extension.load().floats((30 << 20,)) for _ in range(10)]  # never touched
    del arrays
    given = memory.release()
    assert given == 0 if nothing else 0 < given <= 1 << 30
    assert memory.release() == 0
    huge = extension.load().floats((40 << 20,))  # beyond the largest that is kept
    del huge
    assert memory.release() == 0


def test_an_array_outlives_what_made_it():
    array = np.asarray(memory.empty(*LARGE))
    gc.collect()
    memory.release()
    array[:] = 1.0
    assert array.sum(dtype=np.float64) == array.size
