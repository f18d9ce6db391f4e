"""The C++ extension ``fmrec_fast._C``: whether it was built, and how to load it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

NAME = "fmrec_fast._C"


def available() -> bool:
    """Whether the extension was built. A build that is there but broken raises in `load`."""
    return importlib.util.find_spec(NAME) is not None


def reason() -> str | None:
    """Why the extension is missing; None where it is there."""
    if available():
        return None
    return (
        f"{NAME} is missing: built with FMREC_FAST_SKIP_CPP=1 or not compiled; "
        "`pip install -e .` in the repository compiles it"
    )


def load() -> ModuleType:
    """The extension module.

    Raises:
        ImportError: the extension was not built, or does not load.
    """
    loaded = sys.modules.get(NAME)
    if loaded is not None:  # a call that takes a millisecond asks several times
        return loaded
    # First, because the extension's OpenMP symbols resolve to the runtime that torch loads.
    importlib.import_module("torch")
    why = reason()
    if why is not None:
        raise ImportError(why, name=NAME)
    return importlib.import_module(NAME)
