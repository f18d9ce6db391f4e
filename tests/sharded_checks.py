"""What `test_sharded_items` does on several ranks; imported by their processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import traceback

import pytest
import ranks as runs
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from fmrec_fast import FMRecConfig, recommend
from fmrec_fast.backend import dispatch_log, use_backend
from fmrec_fast.checkpoint import CheckpointError
from fmrec_fast.config import FaveConfig
from fmrec_fast.data import Dataset, synthetic_dataset
from fmrec_fast.distributed import exchange, items
from fmrec_fast.models import build_recommender
from fmrec_fast.models.tables import look_up
from fmrec_fast.ops import history_loss, item_cross_entropy, item_topk, target_rank
from fmrec_fast.testing import assert_close_to_truth, make_sequences

SHARES = {1: [(5,), (0,)], 2: [(3, 1), (0, 4)], 4: [(3, 0, 4, 1), (2, 2, 2, 2)]}
ITEMS = (3, 23, 67)


class Ranks:
    """The ranks of one group, as a check sees them."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self.rank, self.size = mesh.get_local_rank(), mesh.size()

    def table(self, whole: torch.Tensor) -> torch.nn.Parameter:
        first, last = items.chunk(len(whole), self.rank, self.size)
        own = whole.detach()[first:last].clone()
        return torch.nn.Parameter(items.as_table(own, self.mesh, whole.shape))

    def rows(self, sizes) -> slice:
        first = sum(sizes[: self.rank])
        return slice(first, first + sizes[self.rank])

    def summed(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x

    def cases(self):
        for sizes in SHARES[self.size]:
            for total in ITEMS:
                yield sizes, total


def judge(name, found, plain, truth):
    """Sharded, plain PyTorch in the same dtype, and float64."""
    assert_close_to_truth(found, plain, truth, name=name)


def own_gradient(table: torch.nn.Parameter, ranks: Ranks, whole: torch.Tensor) -> tuple:
    """(own gradient, the same rows of a whole one)."""
    assert isinstance(table.grad, DTensor), type(table.grad)
    first, last = items.chunk(len(whole), ranks.rank, ranks.size)
    return table.grad.to_local(), whole[first:last]


ENTROPIES = [
    {},
    {"reduction": "sum", "ignore_index": 1, "logit_scale": 0.7},
    {"bias": True, "label_smoothing": 0.1, "z_loss": 1e-2},
    {"bias": True, "weight": "whole", "label_smoothing": 0.2, "ignore_index": 2},
    {"weight": "sharded", "reduction": "none", "z_loss": 1e-3, "logit_scale": -1.3},
]


def entropy(ranks, sizes, total, options, backend, dtype, width=6):
    generator = torch.Generator().manual_seed(total)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    batch = sum(sizes)
    rep, table, bias = normal(batch, width), normal(total, width), normal(total)
    weight = torch.rand(total, generator=generator, dtype=torch.float64) + 0.5
    target = torch.randint(0, total, (batch,), generator=generator)
    of_row = normal(batch)  # gradient of each row's loss
    options = dict(options)
    has_bias, weighted = options.pop("bias", False), options.pop("weight", None)
    found = []
    for kind, to in (("sharded", dtype), ("plain", dtype), ("plain", torch.float64)):
        mine = ranks.rows(sizes) if kind == "sharded" else slice(None)
        make = ranks.table if kind == "sharded" else torch.nn.Parameter
        x = rep.to(to)[mine].clone().requires_grad_()
        w = make(table.to(to))
        given = dict(options)
        if has_bias:
            given["bias"] = make(bias.to(to))
        if weighted:
            given["weight"] = weight.to(to)
            if weighted == "sharded" and kind == "sharded":
                given["weight"] = ranks.table(weight.to(to)).detach()
        with use_backend(backend if kind == "sharded" else "reference"), dispatch_log() as log:
            loss, lse = item_cross_entropy(x, w, target[mine], return_lse=True, **given)
        if kind == "sharded":
            assert [entry.backend.value for entry in log] == [backend], log
        total_loss = (loss * of_row.to(to)[mine]).sum() if loss.ndim else loss
        (total_loss * 3 + (lse * of_row.to(to)[mine]).sum()).backward()
        found.append((total_loss, x, w, lse, given.get("bias")))
    (loss, x, w, lse, b), plain, truth = found
    mine = ranks.rows(sizes)
    judge("loss", ranks.summed(loss), plain[0].detach(), truth[0].detach())
    judge("lse", lse, plain[3][mine], truth[3][mine])
    judge("d_rep", x.grad, plain[1].grad[mine], truth[1].grad[mine])
    for name, part, at in (("d_weight", w, 2), ("d_bias", b, 4)):
        if part is not None:
            own, same = own_gradient(part, ranks, plain[at].grad)
            judge(name, own, same, own_gradient(part, ranks, truth[at].grad)[1])


def check_cross_entropy(ranks):
    for sizes, total in ranks.cases():
        with exchange.batch_shares(sizes):
            for options in ENTROPIES:
                entropy(ranks, sizes, total, options, "reference", torch.float32)
                entropy(ranks, sizes, total, options, "cpp", torch.float32)
    sizes = SHARES[ranks.size][0]  # the ranks tell each other
    entropy(ranks, sizes, 23, ENTROPIES[2], "reference", torch.float64)
    if ranks.size == 2:  # interpreted
        entropy(ranks, sizes, 23, ENTROPIES[2], "triton", torch.float32)


def check_cross_entropy_masks(ranks):
    """A bias of minus infinity on all items of one rank, and far-away targets of the last chunk's
    padding: the kernels' tiles are wider than a chunk."""
    sizes = SHARES[ranks.size][0]
    rep, table = torch.randn(sum(sizes), 4), torch.randn(9, 4)
    bias = torch.zeros(9)
    bias[: items.chunk(9, 0, ranks.size)[1] - (ranks.size == 1)] = -torch.inf
    target = torch.full((sum(sizes),), 8)
    mine = ranks.rows(sizes)
    for backend in ("reference", "cpp"):
        with use_backend(backend):
            whole = item_cross_entropy(rep, table, target, bias=bias, reduction="none")
            found = item_cross_entropy(
                rep[mine],
                ranks.table(table),
                target[mine],
                bias=ranks.table(bias),
                reduction="none",
            )
        torch.testing.assert_close(found.detach(), whole[mine], rtol=1e-5, atol=1e-6)


def check_ranking(ranks):
    for sizes, total in ranks.cases():
        generator = torch.Generator().manual_seed(total)
        batch = sum(sizes)
        # Small integers: many ties, on several ranks.
        table = torch.randint(-2, 3, (total, 3), generator=generator).float()
        rep = torch.randint(-2, 3, (batch, 3), generator=generator).float()
        ranking(ranks, sizes, rep, table, generator, "cpp")
        ranking(ranks, sizes, rep, table, generator, "reference")
    sizes = SHARES[ranks.size][0]
    rep, table = (torch.randn(n, 37, generator=generator) for n in (sum(sizes), 23))
    table[5], table[21] = table[0], float("nan")
    for backend in ("reference", "cpp", "triton"):
        if backend != "triton" or ranks.size == 2:  # interpreted
            ranking(ranks, sizes, rep, table, generator, backend)


def ranking(ranks, sizes, rep, table, generator, backend):
    batch, total, mine = len(rep), len(table), ranks.rows(sizes)
    target = torch.randint(0, total, (batch,), generator=generator)
    exclude = torch.randint(-1, total, (batch, 2), generator=generator)
    shared = torch.randint(-1, total, (6,), generator=generator)
    lists = torch.randint(-1, total, (batch, 5), generator=generator)
    bias = torch.randn(total, generator=generator)
    # Ranks pad their exclusions to widths of their own.
    wider = torch.cat((exclude[mine], exclude.new_full((sizes[ranks.rank], ranks.rank), -1)), 1)
    sharded, its_bias = ranks.table(table), ranks.table(bias)
    for exclusions, own in ((None, None), (exclude, wider)):
        for k in (min(4, total), total):
            with use_backend(backend):
                whole = item_topk(rep, table, k, bias=bias, exclude=exclusions)
            same(
                whole,
                lambda k=k, own=own: item_topk(rep[mine], sharded, k, bias=its_bias, exclude=own),
                mine,
                backend,
            )
        for candidates in (shared, lists):
            given = candidates if candidates is shared else candidates[mine]
            with use_backend(backend):
                whole = item_topk(rep, table, 3, exclude=exclusions, candidates=candidates)
            same(
                whole,
                lambda own=own, given=given: item_topk(
                    rep[mine], sharded, 3, exclude=own, candidates=given
                ),
                mine,
                backend,
            )
        for b, its in ((None, None), (bias, its_bias)):
            with use_backend(backend):
                whole = (target_rank(rep, table, target, bias=b, exclude=exclusions),)
            same(
                whole,
                lambda own=own, its=its: (
                    target_rank(rep[mine], sharded, target[mine], bias=its, exclude=own),
                ),
                mine,
                backend,
            )


def same(whole, run, mine, backend):
    """Equal to the bit."""
    with use_backend(backend):
        found = run()
    for part, of_whole in zip(found, whole, strict=True):
        expected = of_whole[mine]
        assert part.shape == expected.shape, (part.shape, expected.shape)
        equal = (part == expected) | (part.isnan() & expected.isnan())
        assert equal.all(), (backend, part, expected)


def check_look_up(ranks):
    for sizes, total in ranks.cases():
        generator = torch.Generator().manual_seed(total)
        whole = torch.nn.Parameter(torch.randn(total, 3, generator=generator))
        table = ranks.table(whole)
        ids = torch.randint(0, total, (sum(sizes), 4), generator=generator)
        other = torch.randint(0, total, (sum(sizes),), generator=generator)
        mine = ranks.rows(sizes)
        first, second = look_up(table, ids[mine], other[mine])
        assert torch.equal(first, whole[ids[mine]]) and torch.equal(second, whole[other[mine]])
        factors = torch.randn(sum(sizes), 4, 3, generator=generator)
        ((first * factors[mine]).sum() + second.square().sum()).backward()
        truth = whole.detach().double().requires_grad_()
        for table_, f in ((whole, factors), (truth, factors.double())):
            a, b = (torch.nn.functional.embedding(i, table_) for i in (ids, other))
            ((a * f).sum() + b.square().sum()).backward()
        own, plain = own_gradient(table, ranks, whole.grad)
        judge("d_table", own, plain, own_gradient(table, ranks, truth.grad)[1])


def check_look_up_sends_once(ranks):
    """However often an id is asked for, one row comes."""
    table = ranks.table(torch.arange(24.0).view(12, 2))
    sent, real = [], dist.all_to_all_single

    def count(output, given, *rest, **options):
        sent.append(len(given))
        return real(output, given, *rest, **options)

    dist.all_to_all_single = count
    try:
        (rows,) = look_up(table, torch.full((50,), 11))
        rows.sum().backward()
    finally:
        dist.all_to_all_single = real
    assert torch.equal(rows.detach(), torch.tensor([22.0, 23.0]).expand(50, 2))
    if ranks.size > 1:
        _, ids, given, gradients = sent
        assert (ids, gradients) == (1, 1), sent
        assert given == (ranks.size if ranks.rank == ranks.size - 1 else 0), sent
    first, last = items.chunk(12, ranks.rank, ranks.size)
    expected = torch.zeros(12, 2)
    expected[11] = 50.0 * ranks.size
    assert torch.equal(table.grad.to_local(), expected[first:last])


def check_history_loss(ranks):
    for sizes, total in ranks.cases():
        generator = torch.Generator().manual_seed(total)
        batch, mine = sum(sizes), ranks.rows(sizes)
        sequence = make_sequences(
            batch, 7, total, total, histories=("padding", "short", "long", "full")
        ).sequence
        hidden, weight, bias = (
            torch.randn(shape, generator=generator) for shape in ((batch, 5), (total, 5), (total,))
        )
        seed = torch.tensor(7)
        given = torch.stack(
            [torch.randint(0, max(n, 1), (9 if batch else 0,)) for n in (batch, total)], 1
        )
        dist.broadcast(given, group_src=0, group=ranks.group)
        for cells in (None, given):
            for ratio in (1.0, 2.5):
                found = []
                for kind, to, backend in (
                    ("sharded", torch.float32, "cpp"),
                    ("sharded", torch.float32, "reference"),
                    ("plain", torch.float32, "reference"),
                    ("plain", torch.float64, "reference"),
                ):
                    at = mine if kind == "sharded" else slice(None)
                    make = ranks.table if kind == "sharded" else torch.nn.Parameter
                    x = hidden.to(to)[at].clone().requires_grad_()
                    w, b = make(weight.to(to)), make(bias.to(to))
                    own = cells
                    if cells is not None and kind == "sharded":
                        own = cells[(cells[:, 0] >= mine.start) & (cells[:, 0] < mine.stop)]
                        own = own - torch.tensor([mine.start, 0])
                    with use_backend(backend):
                        loss = history_loss(
                            x, w, b, sequence[at], mask_ratio=ratio, seed=seed, cells=own
                        )
                    (3 * loss).backward()
                    found.append((loss, x, w, b))
                plain, truth = found[2:]
                for loss, x, w, b in found[:2]:
                    judge("loss", ranks.summed(loss), plain[0].detach(), truth[0].detach())
                    judge("d_hidden", x.grad, plain[1].grad[mine], truth[1].grad[mine])
                    for name, part, i in (("d_weight", w, 2), ("d_bias", b, 3)):
                        own, same_rows = own_gradient(part, ranks, plain[i].grad)
                        judge(name, own, same_rows, own_gradient(part, ranks, truth[i].grad)[1])
    # Without a seed the ranks agree on one.
    torch.manual_seed(ranks.rank)
    sizes = SHARES[ranks.size][0]
    mine, sequence = ranks.rows(sizes), make_sequences(sum(sizes), 7, 67, 0).sequence
    w, b = ranks.table(torch.zeros(67, 5)), ranks.table(torch.arange(67.0))
    loss = history_loss(torch.zeros(sizes[ranks.rank], 5), w, b, sequence[mine])
    same_seed = torch.full((), float(ranks.summed(loss)))
    assert float(same_seed) > 0


def settings(total, kind=FMRecConfig, **changes):
    return kind(
        item_num=total,
        hidden_size=16,
        max_len=6,
        num_blocks=3,
        decoder_dims=(8, 12),
        batch_size=8,
        **changes,
    )


def check_initialisation(ranks):
    for total in ITEMS:
        for kind in (FMRecConfig, FaveConfig):
            config = settings(total, kind)
            torch.manual_seed(5)
            whole = build_recommender(config)
            after = torch.rand(())
            for drawn in (1, 200, 1 << 22):
                kept, items.DRAWN = items.DRAWN, drawn
                try:
                    torch.manual_seed(5)
                    model = items.build_sharded(config, ranks.mesh)
                finally:
                    items.DRAWN = kept
                assert torch.equal(torch.rand(()), after)  # the generator is where it would be
                assert_same_values(model, whole, ranks)
            cut = items.shard_items(whole.__class__.from_config(config), ranks.mesh)
            assert items.is_sharded(cut) and not items.is_sharded(whole)
    # Rows that end within a block of 16 normals.
    fill = torch.nn.init.normal_
    for shape in ((5, 3), (17, 1), (100, 7), (33, 16), (1000,)):
        torch.manual_seed(0)
        whole = torch.empty(shape)
        fill(whole)
        for first, last in ((0, shape[0]), (1, 4), (3, 3)):
            for drawn in (1, 40, 1 << 22):
                torch.manual_seed(0)
                own = items.draw_rows(shape, first, last, fill, drawn)
                assert torch.equal(own, whole[first:last]), (shape, first, last, drawn)


def assert_same_values(model, whole, ranks):
    state = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        expected = state[name].detach()
        if isinstance(parameter, DTensor):
            first, last = items.chunk(len(expected), ranks.rank, ranks.size)
            assert parameter.shape == expected.shape
            assert torch.equal(parameter.to_local(), expected[first:last]), name
            assert torch.equal(parameter.full_tensor(), expected), name
        else:
            assert torch.equal(parameter, expected), name


def check_recommending(ranks):
    """Through the sampler, with ranks that have no user or many; a piece of a batch is no more
    collectives."""
    config = settings(67, sample_N=2)
    torch.manual_seed(1)
    whole = build_recommender(config).eval()
    torch.manual_seed(1)
    model = items.build_sharded(config, ranks.mesh).eval()
    for sizes in (SHARES[ranks.size][0], (70,) + (0,) * (ranks.size - 1)):
        histories = [[1 + (7 * i + j) % 66 for j in range(1 + i % 9)] for i in range(sum(sizes))]
        mine, rows = ranks.rows(sizes), torch.arange(sum(sizes))
        options = {"exclude_seen": True, "seed": 2, "method": "euler"}
        expected = recommend(whole, histories, 5, rows=rows, **options)
        found = recommend(model, histories[mine], 5, rows=rows[mine], **options)
        assert torch.equal(found.ids, expected.ids[mine])
        torch.testing.assert_close(found.scores, expected.scores[mine], rtol=1e-5, atol=1e-5)


def check_refusals(ranks):
    sharded, whole = ranks.table(torch.randn(23, 4)), torch.randn(23, 4)
    rep, target = torch.randn(2, 4), torch.tensor([1, 2])
    bias = torch.zeros(23)

    def refused(words, call, *arguments, **options):
        try:
            call(*arguments, **options)
        except ValueError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"{words!r} was not refused")

    refused("bias must be sharded", item_cross_entropy, rep, sharded, target, bias=bias)
    refused("bias must be sharded", item_topk, rep, sharded, 2, bias=bias)
    refused("weight must be sharded", history_loss, rep, whole, ranks.table(bias), target[:, None])
    refused(
        "sparse_grad", history_loss, rep, sharded, ranks.table(bias), target[:, None],
        sparse_grad=True,
    )  # fmt: skip
    refused("k must be in", item_topk, rep, sharded, 24)
    refused("target must be in", target_rank, rep, sharded, torch.tensor([1, 23]))
    refused("ids must be in", look_up, sharded, torch.tensor([-1]))
    with exchange.batch_shares((9,) * ranks.size):
        refused("batch_shares must be", item_cross_entropy, rep, sharded, target)
    model = items.build_sharded(settings(23), ranks.mesh)
    refused("whole item tables", items.shard_items, model, ranks.mesh)
    refused("graph = True", recommend, model, [[1]], 2, graph=True)
    refused("whole layer", model.fm.xstart_model.decoder, torch.randn(2, 16))
    with items.whole_items(model) as inside:
        assert not items.is_sharded(inside)
        assert inside.fm.xstart_model.decoder(torch.randn(2, 16)).shape == (2, 23)
    assert items.is_sharded(model)


CHECKS = {
    name.removeprefix("check_"): value
    for name, value in list(globals().items())
    if name.startswith("check_")
}


STEPS = {"fmrec": 12, "early": 16, "sgd": 4, "stage1": 12, "stage2": 12}  # of each run


def settings_of(folder):
    """Runs by name, of one process too; the one that stops early is none of four ranks."""
    start = str(folder / "whole" / "stage1")
    return {
        "fmrec": runs.FMREC,
        "early": runs.EARLY,
        "sgd": runs.FMREC.replace(optimizer="SGD", momentum=0.9, epochs=1),
        "stage1": runs.FIRST,
        "stage2": runs.SECOND.replace(ckpt_path=start),
    }


def train_sharded(world, folder):
    for name, config in settings_of(folder).items():
        if world.size == 2 or name != "early":
            run = folder / f"on-{world.size}" / name
            trainer = runs.train(world, run, config, checkpoint_steps=5, shard_items=True)
            holds_its_share(world, trainer)


def holds_its_share(world, trainer):
    """Parameters and moments of the item side, in numbers."""
    assert items.is_sharded(trainer.model)
    trained = [p for p in trainer.model.parameters() if p.requires_grad and isinstance(p, DTensor)]
    row = sum(p[0].numel() for p in trained)
    first, last = items.chunk(trainer.config.item_num, world.rank, world.size)
    assert sum(p.to_local().numel() for p in trained) == (last - first) * row
    moments = {"SGD": 1, "Adam": 2}[trainer.config.optimizer]
    held = [
        value.to_local().numel()
        for state in trainer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, DTensor)
    ]
    assert sum(held) == moments * (last - first) * row


def hand_on(world, folder):
    """One epoch each: sharded on 4, then sharded on 2, then whole on 2."""
    run, epochs = folder / "handed-on", {4: (1,), 2: (2, 3)}[world.size]
    for count in epochs:
        runs.train(
            world,
            run,
            runs.FMREC.replace(epochs=count),
            resume=count > 1,
            shard_items=count < 3,
        )


def refuses_other_runs(world, folder):
    """Sharded tables are not read from a checkpoint of other items, histories or settings; what is
    there stays as it is."""
    run = folder / "on-2" / "fmrec"
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    more = synthetic_dataset(**runs.DATA | {"num_items": 25})
    fewer = runs.dataset().history(0).tolist()[:-1]
    others = [runs.dataset().history(user).tolist() for user in range(1, runs.DATA["num_users"])]
    less = Dataset.from_histories([fewer, *others], item_ids=runs.dataset().item_ids)
    stage2 = runs.SECOND.replace(ckpt_path=str(folder / "whole" / "stage1"))
    wider = runs.FMREC.replace(hidden_size=16)
    then, now = len(runs.dataset().item_ids), len(more.item_ids)
    assert then < now
    count = rf"trained on other items \({then}, now {now}: {now - then} new, 0 gone, such as"
    for words, at, config, data, resume in (
        (rf"on-2/fmrec was {count}", run, runs.FMREC, more, True),
        (rf"whole/stage1 was {count}", folder / "none", stage2, more, False),
        ("other histories of the same items", run, runs.FMREC, less, True),
        ("other settings: hidden_size: 8 -> 16", run, wider, None, True),
        ("is a run of fmrec, not of fave", run, runs.FIRST, None, True),
        ("other settings: optimizer", run, runs.FMREC.replace(optimizer="SGD"), None, True),
        (r"weight has shape \[.*, 8\], expected \[.*, 16\]", folder / "none",
         stage2.replace(hidden_size=16), None, False),
    ):  # fmt: skip
        try:
            runs.train(world, at, config, data=data, resume=resume, shard_items=True)
        except CheckpointError as error:
            assert re.search(words, str(error)), error
        else:
            raise AssertionError(f"{words!r} was not refused")
    dist.barrier()
    assert before == {path: path.read_bytes() for path in before}
    assert not (folder / "none").exists()


SMALL = {"items": 204, "width": 16, "inner": 64, "last": 8, "length": 6, "blocks": 2, "batch": 12}


def small_benchmark(world, folder):
    """benchmarks.sharded at a small size, and what the plan says of it: memory of a rank's tables,
    and every byte that it sends, in so many collectives."""
    from benchmarks import scale_plan, sharded

    sizes = scale_plan.Sizes(**SMALL)
    everyone = sharded.gathered(world, sharded.measure(world, sizes, steps=4))
    if world.is_main:
        sharded.report(world, sizes, everyone)
    for found in everyone:
        held = sum(found["tensors"].values())
        rest = 4 * sizes.items * sizes.width / world.size + 16 * sizes.other_parameters
        assert held + rest == sizes.training_memory(world.size, True), found
        parameters = found["tensors"]["parameters"]
        assert found["tensors"] == {
            "parameters": parameters,
            "gradients": parameters,
            "moments": 2 * parameters,
        }
        # With the gradients of all else; the losses are summed, too.
        others = (world.size - 1) / world.size
        reduced = 2 * others * (4 * found["others"] + 8 * len(sharded.LOSSES))
        assert found["sent"].pop("all-reduce") == pytest.approx(reduced, abs=1)
        calls = found["calls"]
        assert calls["all-gather"] + calls["all-to-all"] == scale_plan.ITEM_COLLECTIVES, calls
        assert sum(calls.values()) == scale_plan.SHARDED_COLLECTIVES, calls
        assert set(found["sent"]) == {"all-gather", "all-to-all"}
    # A row that a rank gives is one that another gets: exact in sum.
    sent = sum(found["item side sent"] for found in everyone)
    assert sent == pytest.approx(sum(found["expected"] for found in everyone), abs=1)
    assert sent < world.size * sizes.item_bytes(world.size, scale_plan.CPU.statistic)
    (folder / f"benchmark-{world.rank}.json").write_text(json.dumps(everyone[0]["losses"]))

    whole = sharded.measure(world, sizes, steps=4, spread=False)
    assert sum(whole["tensors"].values()) == 16 * sizes.table_parameters
    expected = sizes.data_parallel_bytes(world.size) + sizes.small_bytes(world.size)
    # The plan leaves out biases, norms, positions and times: 12% of the published model's P'.
    left_out = 2 * others * 4 * (whole["others"] - sizes.other_parameters)
    assert sum(whole["sent"].values()) == pytest.approx(expected + left_out, abs=1)
    assert sum(whole["calls"].values()) == scale_plan.DATA_PARALLEL_COLLECTIVES, whole["calls"]


def small_steps(world, folder):
    """benchmarks.ranks at a small size."""
    from benchmarks import ranks, scale_plan

    sizes = scale_plan.Sizes(**SMALL)
    found = ranks.measure(sizes, world, rounds=1)
    for kind in ranks.KINDS:
        assert 0 < found["predicted exchange"][kind] < found["predicted"][kind], found
        assert 0 < found["medians"][kind] and found["sent"][kind] > 0, found
    left_out = found["parameters"] - sizes.table_parameters - sizes.other_parameters
    others = 8 * (world.size - 1) / world.size * left_out
    predicted = found["predicted sent"]["replicas"] + others
    assert found["sent"]["replicas"] == pytest.approx(predicted, abs=1)
    if world.is_main:
        (folder / "steps.json").write_text(json.dumps({"small": found}))


def run_checks(world, folder, meshes):
    outcomes = {}
    path = folder / f"{world.rank}-of-{world.size}.json"
    for name, check in CHECKS.items():
        for mesh in meshes:
            if world.rank >= mesh.size():
                continue
            torch.manual_seed(0)
            try:
                with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                    check(Ranks(mesh))
                outcomes[f"{name}-{mesh.size()}"] = "passed"
            except Exception:
                outcomes[f"{name}-{mesh.size()}"] = traceback.format_exc()
                path.write_text(json.dumps(outcomes))
                raise  # the others would wait for this rank
    path.write_text(json.dumps(outcomes))


def four_ranks(world, folder):
    run_checks(world, folder, [DeviceMesh("cpu", list(range(n))) for n in (1, 2, 4)])
    train_sharded(world, folder)
    hand_on(world, folder)
    small_benchmark(world, folder)


def two_ranks(world, folder):
    train_sharded(world, folder)
    hand_on(world, folder)
    small_benchmark(world, folder)
    small_steps(world, folder)
    refuses_other_runs(world, folder)
