"""Records of what docs/scale.md reports, each with the machine that it was measured on."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch

from fmrec_fast.environment import processor

RESULTS = Path(__file__).parent / "results" / "scale"


def facts(name: str) -> dict[str, Any]:
    """Of this machine, now."""
    return {
        "what": name,
        "date": datetime.date.today().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }


def save(name: str, **found: Any) -> Path:
    """Write a record; returns where it is."""
    record = facts(name)
    for key, value in found.items():
        record[key] = asdict(value) if is_dataclass(value) else value
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{record['date']}-{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def latest(name: str) -> dict[str, Any]:
    """The newest record of this name.

    Raises:
        FileNotFoundError: there is none.
    """
    found = sorted(RESULTS.glob(f"????-??-??-{name}.json"))
    if not found:
        raise FileNotFoundError(f"{RESULTS} has no record '{name}'")
    return json.loads(found[-1].read_text())
