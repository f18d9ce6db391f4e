"""What this installation can do here, and why not where it cannot (``fmrec-fast env``)."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from typing import Any

import torch

from fmrec_fast import __version__, extension
from fmrec_fast.backend import (
    MISSING,
    OPS,
    Backend,
    availability,
    current_backend,
    current_rng,
    triton_interpreted,
)

OPTIONAL = {
    "triton": "GPU kernels",
    "jsonargparse": "command line, extra [cli]",
    "pyarrow": "reading CSV, TSV, .inter and Parquet, extra [cli]",
    "yaml": "configuration files, extra [cli]",
    "tqdm": "progress bars, extra [cli]",
    "tensorboard": "training curves, extra [tensorboard]",
    "scipy": "rk45_sampler, extra [ode]",
    "matplotlib": "benchmark plots, extra [bench]",
}
DISTRIBUTIONS = {"yaml": "PyYAML"}


def processor() -> str:
    """The CPU's model name."""
    try:
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except FileNotFoundError:
        pass
    return platform.processor() or platform.machine()


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(DISTRIBUTIONS.get(module, module))
    except importlib.metadata.PackageNotFoundError:  # some builds go by another name
        return "of an unknown version"


def report() -> dict[str, Any]:
    """Facts about the installation, as plain values."""
    versions: dict[str, str] = {"torch": str(torch.__version__)}
    missing: dict[str, str] = {}
    for module, purpose in OPTIONAL.items():
        if importlib.util.find_spec(module) is None:
            missing[module] = f"not installed ({purpose})"
        else:
            versions[module] = _version(module)
    facts: dict[str, Any] = {
        "fmrec_fast": __version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "versions": versions,
        "missing": missing,
        "gpus": [
            torch.cuda.get_device_name(i)
            for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
        ],
        "backend": str(current_backend().value),
        "rng": str(current_rng().value),
        "triton interpreter": triton_interpreted(),
    }
    why = extension.reason()
    try:
        if why is not None:
            raise ImportError(why)
        native = extension.load()
    except ImportError as error:  # not built, or built for another torch or machine
        facts["extension"] = str(error)
    else:
        facts["extension"] = {
            "isa": native.isa(),
            "supported": native.supported_isas(),
            **native.build_info(),
        }
    facts["ops"] = {op: _backends_of(op) for op in OPS}
    return facts


def _backends_of(op: str) -> dict[str, str]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    status = {"reference": "yes"}
    for backend in (Backend.CPP, Backend.TRITON):
        on = "cpu" if backend is Backend.CPP else device
        status[backend.value] = MISSING.get((op, backend)) or availability(backend, on) or "yes"
    return status


def lines() -> list[str]:
    """`report` for people."""
    facts = report()
    out = []
    for name, value in facts.items():
        if isinstance(value, dict):
            out.append(f"{name}:")
            width = max((len(key) for key in value), default=0)
            for key, inner in value.items():
                if isinstance(inner, dict):
                    inner = "; ".join(f"{k}: {v}" for k, v in inner.items())
                out.append(f"  {key:{width}}  {inner}")
            if not value:
                out[-1] += " none"
        else:
            out.append(f"{name}: {value if value != [] else 'none'}")
    return out
