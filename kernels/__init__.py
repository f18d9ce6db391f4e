"""The Triton kernels of fmrec_fast, one op to a module; imported as ``fmrec_fast.kernels``.

The folder lies next to ``csrc/`` at the repository's root and is installed as a subpackage. The
name ``kernels`` is refused, for under it the modules would be loaded a second time.
"""

if __name__ != "fmrec_fast.kernels":
    raise ImportError(
        f"this package is fmrec_fast.kernels, it was imported as {__name__!r}; "
        "use `import fmrec_fast.kernels` (after `pip install -e .`)"
    )
