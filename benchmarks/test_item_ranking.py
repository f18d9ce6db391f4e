"""item_ranking: the k best items and the target's rank, against the [B, V] matrix of scores.

The peers: a matrix product and `torch.topk`, eagerly and compiled, and faiss's exhaustive inner
product search. Peak memory is that of a fresh process for each variant, beyond its inputs.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import textwrap

import pytest
import torch

from benchmarks.harness import (
    Work,
    assert_agreement,
    automatic_backend,
    on_backend,
    runnable_backends,
)
from benchmarks.inputs import normal
from fmrec_fast.ops import item_topk, prepare_items, target_rank

NO_FAISS = "the package faiss-cpu is not installed"


def work(batch, items, width, outputs):
    return Work(bytes=4 * width * (batch + items) + outputs, flops=2 * batch * items * width)


def comparable(rep, weight, result):
    """Scores as given and as they are in float64 at the given ids: near ties may swap."""
    scores, ids = result
    exact = torch.stack(
        [weight[row].double() @ query.double() for row, query in zip(ids, rep, strict=True)]
    )
    return {"scores": scores, "at_ids": exact}


def test_topk(suite, race, ranking_case):
    batch, items, k = ranking_case
    width, device = suite.sizes.width, suite.device
    rep = normal(batch, width, device=device)
    weight = normal(items, width, device=device, seed=1)

    def plain():
        return torch.topk(rep @ weight.T, k, dim=1)

    def ours():
        return item_topk(rep, weight, k)

    backends, left_out = runnable_backends("item_ranking", device)
    variants = {"torch": plain}
    variants |= {b.value: on_backend("item_ranking", b, ours) for b in backends}
    for dtype in ("bf16", "int8"):
        index = prepare_items(weight, dtype)
        variants[f"{dtype} index"] = lambda index=index: item_topk(rep, weight, k, index=index)
    if suite.compile_obstacle:
        left_out["torch.compile"] = suite.compile_obstacle
    else:
        variants["torch.compile"] = torch.compile(plain, mode=suite.compile_mode)
    if device.type != "cpu":
        left_out["faiss"] = "faiss-cpu searches on a CPU"
    elif importlib.util.find_spec("faiss") is None:
        left_out["faiss"] = NO_FAISS
    else:
        import faiss

        flat = faiss.IndexFlatIP(width)
        flat.add(weight.numpy())
        faiss.omp_set_num_threads(torch.get_num_threads())

        def search():
            scores, ids = flat.search(rep.numpy(), k)
            return torch.from_numpy(scores), torch.from_numpy(ids)

        variants["faiss"] = search

    few = slice(0, 16)  # float64 has to be held against some rows only
    truth = (rep[few].double() @ weight.double().T).topk(k)
    results = {"float64": {"scores": truth.values, "at_ids": truth.values}}
    by_index = {}
    for name, run in variants.items():
        scores, ids = (part[few] for part in run())
        results[name] = comparable(rep[few], weight, (scores, ids))
        if name.endswith("index"):  # not exact in what it finds, but in how that scores
            found = (ids[..., None] == truth.indices[:, None]).any(-1).double().mean()
            by_index[name] = (float(found), results.pop(name))
    equality = assert_agreement(results, "float64", 2e-6)
    for name, (_, own) in by_index.items():
        of_scores = {"exact": {"scores": own["at_ids"]}, name: {"scores": own["scores"]}}
        errors = assert_agreement(of_scores, "exact", 2e-6)["largest_relative_error"]
        equality["largest_relative_error"] |= errors
    race(
        "item_ranking",
        f"top {k}, B = {batch}, V = {items}",
        variants,
        ours=automatic_backend("item_ranking", ours).value,
        sizes={"B": batch, "V": items, "D": width, "k": k},
        equality=equality,
        work=work(batch, items, width, batch * k * 12),
        flops={"torch": 2 * batch * items * width},
        note=", ".join(f"recall of {name} {found:.4f}" for name, (found, _) in by_index.items()),
        left_out=left_out,
    )


def test_rank(suite, race, ranking_case):
    batch, items, _ = ranking_case
    width, device = suite.sizes.width, suite.device
    rep = normal(batch, width, device=device)
    weight = normal(items, width, device=device, seed=1)
    generator = torch.Generator().manual_seed(2)
    target = torch.randint(items, (batch,), generator=generator).to(device)

    def plain():
        scores = rep @ weight.T
        return 1 + (scores > scores.gather(1, target[:, None])).sum(1)

    def ours():
        return target_rank(rep, weight, target)

    backends, left_out = runnable_backends("item_ranking", device)
    variants = {"torch": plain}
    variants |= {b.value: on_backend("item_ranking", b, ours) for b in backends}
    few = slice(0, 16)
    scores = rep[few].double() @ weight.double().T
    truth = 1 + (scores > scores.gather(1, target[few, None])).sum(1)
    results = {"float64": {"rank": truth}}
    results |= {name: {"rank": run()[few]} for name, run in variants.items()}
    race(
        "item_ranking",
        f"rank, B = {batch}, V = {items}",
        variants,
        ours=automatic_backend("item_ranking", ours).value,
        sizes={"B": batch, "V": items, "D": width},
        # A rank may move by a place where two scores are equal but for rounding.
        equality=assert_agreement(results, "float64", 1e-4 if items > 10_000 else 1e-2),
        work=work(batch, items, width, batch * 8),
        flops={"torch": 2 * batch * items * width},
        left_out=left_out,
    )


MEMORY = """
    import resource, sys, torch
    from fmrec_fast.ops import item_topk
    batch, items, width, k = map(int, sys.argv[2:])
    torch.set_num_threads(2)
    rep, weight = torch.randn(batch, width), torch.randn(items, width)
    def run(rep, weight, k):
        if sys.argv[1] == "torch":
            return torch.topk(rep @ weight.T, k)
        if sys.argv[1] == "faiss":
            return flat.search(rep.numpy(), k)
        return item_topk(rep, weight, k)
    if sys.argv[1] == "faiss":
        import faiss
        flat = faiss.IndexFlatIP(width)
        flat.add(weight[:200].numpy())
        run(rep[:2], weight[:200], 5)
        flat.add(weight[200:].numpy())
        weight = None
    else:
        run(rep[:2], weight[:200], 5)  # what libraries set up once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run(rep, weight, k)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory(suite, record_property):
    """Peak resident memory beyond the inputs, MB. Ours is bounded whatever V."""
    if suite.device.type != "cpu":
        pytest.skip("resident memory is a CPU's")
    batch, items, k = (64, 50_000, 20) if suite.quick else (512, 1_000_000, 100)
    width = 32 if suite.quick else 128
    variants = ["ours", "torch"]
    if importlib.util.find_spec("faiss") is not None:
        variants.append("faiss")
    peaks = {}
    for name in variants:
        arguments = [name, *map(str, (batch, items, width, k))]
        run = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(MEMORY), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[name] = int(run.stdout) / 1024
        record_property(f"{name}_MiB", peaks[name])
    print({name: f"{peak:.1f} MiB" for name, peak in peaks.items()})
    assert peaks["ours"] < 32
