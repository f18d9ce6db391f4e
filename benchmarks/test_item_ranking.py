"""item_ranking: the k best items and the target's rank, against the [B, V] matrix of scores."""

from __future__ import annotations

import pytest
import torch

from benchmarks.harness import (
    Work,
    assert_agreement,
    automatic_backend,
    on_backend,
    runnable_backends,
)
from benchmarks.inputs import normal, targets
from fmrec_fast.ops import item_topk, target_rank

K = 20


@pytest.mark.parametrize("case", ["topk", "rank"])
def test_item_ranking(suite, race, case):
    sizes, device, batch = suite.sizes, suite.device, suite.sizes.batch
    rep = normal(batch, sizes.width, device=device)
    weight = normal(sizes.items, sizes.width, device=device, seed=1)
    target = targets(batch, sizes, device)

    def plain_topk():
        return torch.topk(rep @ weight.T, K, dim=1)

    def plain_rank():
        scores = rep @ weight.T
        return 1 + (scores > scores.gather(1, target)).sum(1)

    if case == "topk":

        def ours():
            return item_topk(rep, weight, K)

        def comparable(result):
            scores, ids = result
            # Near ties may come in another order; the scores at the ids may not.
            return {"scores": scores, "at_ids": (rep[:, None] * weight[ids]).sum(-1)}

        plain = plain_topk
    else:

        def ours():
            return target_rank(rep, weight, target[:, 0])

        def comparable(result):
            return {"rank": result}

        plain = plain_rank

    backends, left_out = runnable_backends("item_ranking", device)
    variants = {"torch": plain}
    variants |= {b.value: on_backend("item_ranking", b, ours) for b in backends}
    results = {name: comparable(run()) for name, run in variants.items()}
    outputs = batch * (K * (4 + 8) if case == "topk" else 8)
    race(
        "item_ranking",
        f"top {K}" if case == "topk" else "rank",
        variants,
        ours=automatic_backend("item_ranking", ours).value,
        sizes={"B": batch, "V": sizes.items, "D": sizes.width},
        # A rank may move by a place where two scores are equal but for rounding.
        equality=assert_agreement(results, "reference", 2e-6 if case == "topk" else 1e-3),
        work=Work(
            bytes=4 * (rep.numel() + weight.numel()) + outputs,
            flops=2 * batch * sizes.items * sizes.width,
        ),
        left_out=left_out,
    )
