"""item_cross_entropy: our backends against PyTorch and the kernels of others, each at its best
setting, in time and in memory; all must first agree with float64."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    Work,
    assert_agreement,
    automatic_backend,
    gradients_of,
    on_backend,
    runnable_backends,
)
from benchmarks.inputs import FULL, normal
from benchmarks.memory import extra_bytes
from fmrec_fast.ops import item_cross_entropy

OP = "item_cross_entropy"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """V: the suite's, 1e5, and with ``--large`` 1e4 and 1e6; in a quick run only the suite's."""
    if "items" in metafunc.fixturenames:
        quick, large = (metafunc.config.getoption(name) for name in ("quick", "large"))
        items = [None] if quick else [None, 100_000]
        metafunc.parametrize("items", items + [10_000, 1_000_000] * (large and not quick))


def inputs(batch: int, items: int, width: int, device: torch.device) -> tuple[Tensor, ...]:
    """Scores of standard deviation 1: the entropy is nearly that of all items."""
    rep = normal(batch, width, device=device)
    weight = normal(items, width, device=device, seed=1) / width**0.5
    target = torch.randint(items, (batch,), generator=torch.Generator().manual_seed(2))
    return rep, weight, target.to(device)


def naive(rep: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(rep @ weight.T, target)


def peers(device: torch.device, compile_obstacle: str | None) -> tuple[dict, dict[str, str]]:
    """By name, a peer's settings to choose from; and why each of the others is left out."""
    found: dict[str, dict[str, Loss]] = {"torch": {"": naive}}
    left_out = {}
    if compile_obstacle is None:
        found["compiled"] = {"": torch.compile(naive)}
    else:
        left_out["compiled"] = compile_obstacle
    if hasattr(F, "linear_cross_entropy"):
        settings: dict[str, Loss] = {"no options": F.linear_cross_entropy}
        for chunk in (None, 64, 256):
            options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=chunk)
            name = "auto" if chunk is None else f"batch_chunk_size={chunk}"
            settings[name] = lambda r, w, t, o=options: F.linear_cross_entropy(r, w, t, options=o)
        found["linear_cross_entropy"] = settings
    else:
        left_out["linear_cross_entropy"] = "this torch has no F.linear_cross_entropy"
    if importlib.util.find_spec("liger_kernel") is None:
        left_out["liger"] = "the package liger-kernel is not installed"
    elif device.type != "cuda":
        left_out["liger"] = f"its kernels are Triton's, tensors are on {device.type}"
    else:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        fused = LigerFusedLinearCrossEntropyLoss()
        found["liger"] = {"": lambda r, w, t: fused(w, r, t)}
    if importlib.util.find_spec("cut_cross_entropy") is None:
        left_out["cut_cross_entropy"] = "the package cut-cross-entropy is not installed"
    elif device.type != "cuda" and compile_obstacle is not None:
        left_out["cut_cross_entropy"] = f"without CUDA it compiles: {compile_obstacle}"
    else:
        from cut_cross_entropy import linear_cross_entropy

        kinds = ("torch_compile", "cce_exact") if device.type == "cuda" else ("torch_compile",)
        found["cut_cross_entropy"] = {
            kind: lambda r, w, t, kind=kind: linear_cross_entropy(r, w, t, impl=kind)
            for kind in kinds
        }
    return found, left_out


def true_result(rep: Tensor, weight: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Loss and gradients in float64, a few rows at a time."""
    weight = weight.detach().double()
    d_rep, d_weight = torch.zeros_like(rep, dtype=torch.float64), torch.zeros_like(weight)
    total = torch.zeros((), dtype=torch.float64, device=rep.device)
    rows = max((1 << 26) // len(weight), 1)
    for first in range(0, len(rep), rows):
        part = rep.detach()[first : first + rows].double()
        log_p = F.log_softmax(part @ weight.T, 1)
        wanted = target[first : first + rows, None]
        total -= log_p.gather(1, wanted).sum()
        g = log_p.exp_().scatter_add_(1, wanted, -torch.ones_like(part[:, :1])) / len(rep)
        d_rep[first : first + rows] = g @ weight
        d_weight.addmm_(g.T, part)
    return {"out": total / len(rep), "d_rep": d_rep, "d_weight": d_weight}


def prepare(
    peer: str, setting: str, batch: int, items: int, width: int, backward: bool
) -> Callable[[], object]:
    """For `benchmarks.memory`: one call of a peer, on inputs that are in memory already."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rep, weight, target = (t.clone() for t in inputs(batch, items, width, device))
    rep.requires_grad_(backward), weight.requires_grad_(backward)
    loss: Loss = item_cross_entropy
    if peer != "ours":
        loss = peers(device, None)[0][peer][setting]

    def run(r: Tensor, w: Tensor, t: Tensor) -> object:
        out = loss(r, w, t)
        return gradients_of(out, {"rep": r, "weight": w}) if backward else out

    # Threads, libraries and compilers take their memory before it is measured.
    small = rep.detach()[:8].clone(), weight.detach()[:100].clone(), target[:8] % 100
    run(small[0].requires_grad_(backward), small[1].requires_grad_(backward), small[2])
    return lambda: run(rep, weight, target)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-backward"])
def test_item_cross_entropy(suite, race, items, backward):
    sizes, device, batch = suite.sizes, suite.device, suite.sizes.batch
    items = items or sizes.items
    rep, weight, target = inputs(batch, items, sizes.width, device)
    rep.requires_grad_(backward), weight.requires_grad_(backward)
    leaves = {"rep": rep, "weight": weight}

    def call(loss: Loss) -> Callable[[], dict[str, Tensor]]:
        def run():
            out = loss(rep, weight, target)
            return gradients_of(out, leaves) if backward else {"out": out}

        return run

    backends, left_out = runnable_backends(OP, device)
    found, others = peers(device, suite.compile_obstacle)
    left_out |= others
    truth = true_result(rep, weight, target)
    truth = truth if backward else {"out": truth["out"]}
    variants, chosen, errors = {}, {}, {}
    for name, settings in found.items():
        best = None
        for setting, loss in settings.items():
            run = call(loss)
            run()
            start = time.perf_counter()
            result = run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            errors |= assert_agreement({"float64": truth, name: result}, "float64", 1e-4)[
                "largest_relative_error"
            ]
            del result
            if best is None or seconds < best:
                best, variants[name], chosen[name] = seconds, run, setting
    for backend in backends:
        run = on_backend(OP, backend, call(item_cross_entropy))
        variants[backend.value] = run
        equality = assert_agreement({"float64": truth, backend.value: run()}, "float64", 1e-4)
        errors |= equality["largest_relative_error"]
    del truth
    ours = automatic_backend(OP, call(item_cross_entropy)).value
    passes = 3 if backward else 1
    gradients = 4 * (rep.numel() + weight.numel()) if backward else 0
    memory = {}
    if not suite.quick:
        for name in (*chosen, ours):
            peer = (name, chosen[name]) if name in chosen else ("ours", "")
            total = extra_bytes(
                "benchmarks.test_item_cross_entropy", "prepare", *peer, batch, items, sizes.width,
                backward,
            )  # fmt: skip
            memory[name] = max(total - gradients, 0)
    race(
        OP,
        ("forward + backward" if backward else "forward") + f", V = {items:,}",
        variants,
        ours=ours,
        sizes={"B": batch, "V": items, "D": sizes.width},
        equality={"baseline": "float64", "tolerance": 1e-4, "largest_relative_error": errors},
        work=Work(
            bytes=4 * (2 if backward else 1) * (rep.numel() + weight.numel()),
            flops=passes * 2 * batch * items * sizes.width,
        ),
        left_out=left_out,
        note="; ".join(f"{name}: {setting}" for name, setting in chosen.items() if setting),
        memory=memory,
        budget=4.0 if items <= FULL.items else 12.0,
        least=5 if items <= FULL.items else 2,
    )
