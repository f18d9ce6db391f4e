"""Fave's training: two stages, either alone, resumed in either; presets; the command line."""

from __future__ import annotations

import json
from dataclasses import fields

import pytest
import torch

from fmrec_fast import (
    FaveConfig,
    FaveRecommender,
    FMRecConfig,
    FMRecommender,
    checkpoint,
    demo,
    dispatch_log,
    training,
)
from fmrec_fast.backend import Backend
from fmrec_fast.checkpoint import CheckpointError
from fmrec_fast.cli import main
from fmrec_fast.data import synthetic_dataset
from fmrec_fast.presets import PRESETS, preset
from fmrec_fast.training import Trainer, build_optimizer

TINY = FaveConfig(
    hidden_size=8,
    max_len=5,
    num_blocks=2,
    num_heads=2,
    last=1,
    decoder_dims=(24, 40),
    sample_N=2,
    batch_size=40,
    epochs=3,
    dropout=0.1,
    emb_dropout=0.3,
)
SETTINGS = ("hidden_size", "max_len", "num_blocks", "num_heads", "last", "sample_N", "batch_size")
FLAGS = [part for name in SETTINGS for part in (f"--{name}", str(getattr(TINY, name)))]
FLAGS += ["--decoder_dims", "[24, 40]"]
FROZEN = ("item_embeddings.weight", "position_embeddings.weight")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny():
    return synthetic_dataset(30, 20, 4, 6, seed=0)  # 112 samples: batches of 40, 40, 32


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory):
    """The undisturbed stage 1."""
    run = tmp_path_factory.mktemp("fave") / "stage1"
    Trainer(tiny, TINY, run).fit()
    return run


def second_config(first, **changes):
    return TINY.replace(stage_mode="finetune", ckpt_path=str(first), **changes)


@pytest.fixture(scope="module")
def second(tiny, first):
    """The undisturbed stage 2."""
    run = first.with_name("stage2")
    Trainer(tiny, second_config(first), run).fit()
    return run


def state_of(run, role="last"):
    return checkpoint.load(checkpoint.locate(run, role))


def losses_of(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(r["epoch"], r["loss"], r.get("validation")) for r in map(json.loads, lines)]


def test_stage_2_starts_from_the_best_of_stage_1(first, second):
    best = state_of(first, "best")["model"]
    ended = state_of(second)["model"]
    for name in FROZEN:
        assert torch.equal(best[name], ended[name])
    moved = [name for name in best if not torch.equal(best[name], ended[name])]
    assert "fave.xstart_model.r_time_embed.0.weight" in moved and "LayerNorm.weight" in moved
    assert not any("cross_attention" in name or "gamma" in name for name in moved)
    assert [set(losses) for _, losses, _ in losses_of(second)] == [
        {"total", "flow", "cross_entropy", "reconstruction", "straight"}
    ] * 3
    # Validated from epoch 1 on, counted from 0.
    for run in (first, second):
        assert [validation is not None for _, _, validation in losses_of(run)] == [
            False,
            True,
            True,
        ]


def test_stage_2_is_a_model_of_one_step(second):
    model = checkpoint.build_model(state_of(second, "best"))
    assert isinstance(model, FaveRecommender) and model.fm.steps == 1
    assert state_of(second)["kind"] == "fave"


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_cut_short_ends_the_same(tiny, first, second, tmp_path, stage):
    config = TINY if stage == 1 else second_config(first)
    cut = Trainer(tiny, config, tmp_path / "run", checkpoint_steps=1)

    class Interrupted(Exception):
        pass

    class Stop(training.Listener):
        def step_done(self, losses, samples):
            if cut.progress.global_step == 5:
                raise Interrupted

    cut.listener = Stop()
    with pytest.raises(Interrupted):
        cut.fit()
    Trainer(tiny, config, tmp_path / "run").fit(resume=True)
    whole = state_of(first if stage == 1 else second)["model"]
    resumed = state_of(tmp_path / "run")["model"]
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
    assert losses_of(tmp_path / "run") == losses_of(first if stage == 1 else second)


def test_stage_2_optimises_the_unfrozen_only_and_slower(tiny, first, tmp_path):
    trainer = Trainer(tiny, second_config(first, finetune_lr_scale=0.25, lr=0.01), tmp_path / "run")
    (group,) = trainer.optimizer.param_groups
    assert group["lr"] == pytest.approx(0.0025)
    trained = {id(p) for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert (id(parameter) in trained) == (name not in FROZEN)
    optimizer, _ = build_optimizer(FaveRecommender.from_config(TINY.replace(item_num=9)), TINY)
    assert optimizer.param_groups[0]["lr"] == TINY.lr


def test_gradients_are_clipped_to_norm_1(tiny, tmp_path, monkeypatch):
    trainer = Trainer(tiny, TINY.replace(optimizer="SGD", lr=1.0), tmp_path / "run")
    norms = []

    def step():
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    monkeypatch.setattr(trainer.optimizer, "step", step)
    trainer._train_step(torch.arange(40))
    assert norms[0] == pytest.approx(1.0, rel=1e-4)
    trainer.config = trainer.config.replace(clip_norm=0.125)
    trainer._train_step(torch.arange(40))
    assert norms[1] == pytest.approx(0.125, rel=1e-4)


def test_stage_2_from_a_published_checkpoint(tiny, first, tmp_path):
    """A file of torch.save, its names with the prefix of data-parallel training."""
    weights = state_of(first, "best")["model"]
    path = tmp_path / "published.pth"
    torch.save({f"module.{name}": value for name, value in weights.items()}, path)
    trainer = Trainer(tiny, second_config(path), tmp_path / "run")
    trainer._start()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def test_weights_that_do_not_fit_are_refused(tiny, first, tmp_path):
    def fit(**changes):
        Trainer(tiny, second_config(**{"first": first} | changes), tmp_path / "run").fit()

    with pytest.raises(CheckpointError, match="do not fit the settings"):
        fit(hidden_size=12)
    (tmp_path / "broken.pth").write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match=r"broken.pth is not a state dict"):
        fit(first=tmp_path / "broken.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="expected a state dict, got list"):
        fit(first=tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="is not a directory"):
        fit(first=tmp_path / "nowhere")


def test_older_checkpoints_are_of_fmrec(tiny, tmp_path):
    config = FMRecConfig(
        **{f.name: getattr(TINY, f.name) for f in fields(FMRecConfig) if f.name != "epochs"},
        epochs=1,
    )
    Trainer(tiny, config, tmp_path / "run", max_steps=1).fit()
    state = state_of(tmp_path / "run")
    assert state.pop("kind") == "fmrec"
    assert type(checkpoint.build_model(state)) is FMRecommender
    with pytest.raises(CheckpointError, match="is of the model 'bert'"):
        checkpoint.build_model(state | {"kind": "bert"})
    with pytest.raises(CheckpointError, match="a run of fmrec, not of fave"):
        Trainer(tiny, TINY, tmp_path / "run").fit(resume=True)


def test_presets():
    for name in PRESETS:
        for stage in ("pretrain", "finetune"):
            config = FaveConfig(**preset(name, stage), stage_mode=stage)
            assert config.patience == 10
    beauty = FaveConfig(**preset("beauty", "finetune"), stage_mode="finetune")
    assert (beauty.dropout, beauty.mask_ratio, beauty.loss_straight_weight) == (0.3, 2.0, 0.6)
    assert beauty.learning_rate == pytest.approx(1e-5) and beauty.gamma_init == 1e-5
    assert FaveConfig(**preset("beauty", "pretrain")).learning_rate == 1e-3
    assert preset("steam", "finetune")["emb_dropout"] == 0.0
    with pytest.raises(ValueError, match=r"preset must be one of .*'yelp'"):
        preset("yelp", "pretrain")


@pytest.fixture
def small_demo(monkeypatch):
    values = {"num_users": 40, "num_items": 20, "num_clusters": 2, "mean_length": 8, "seed": 0}
    monkeypatch.setattr(demo, "DATA", values)
    monkeypatch.setattr(demo, "FAVE_CONFIG", TINY.replace(num_heads=4))


def train(*flags):
    return main(["train", "synthetic", "--model", "fave", *FLAGS, *map(str, flags)])


def test_the_command_line_runs_both_stages(small_demo, tmp_path, capsys):
    out = tmp_path / "run"
    assert train("--out", out, "--preset", "beauty", "--max_steps", 2, "--mask_end", 0.5) == 0
    text = capsys.readouterr()
    assert "stage 1 into" in text.err and "stage 2 into" in text.err
    assert text.out.count("test, 40 users") == 2
    one, two = (state_of(out / stage)["config"] for stage in ("stage1", "stage2"))
    assert (one["dropout"], two["dropout"]) == (0.1, 0.3), "each stage has its own preset"
    assert one["mask_end"] == two["mask_end"] == 0.5, "a flag counts for more"
    assert (one["stage_mode"], two["stage_mode"]) == ("pretrain", "finetune")
    assert two["ckpt_path"] == str(out / "stage1")
    assert main(["evaluate", str(out), "--ks", "[5]", "--json", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["steps"] == 1
    capsys.readouterr()
    with dispatch_log() as log:
        assert main(["recommend", str(out), "--history", "1,2", "-k", "3"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    (entry,) = (entry for entry in log if entry.op == "euler_sampler")
    assert entry.backend in (Backend.CPP, Backend.TRITON) or entry.reason
    assert main(["evaluate", str(out / "stage1"), "--json", str(tmp_path / "e.json")]) == 0
    assert json.loads((tmp_path / "e.json").read_text())["steps"] == TINY.sample_N
    # It is a run already; a longer one goes on in both stages.
    assert train("--out", out, "--preset", "beauty", "--mask_end", 0.5) == 1
    assert "already holds a run" in capsys.readouterr().err
    more = ("--preset", "beauty", "--mask_end", 0.5, "--max_steps", 3, "--resume")
    assert train("--out", out, *more) == 0
    assert state_of(out / "stage1")["global_step"] == state_of(out / "stage2")["global_step"] == 3


def test_either_stage_alone(small_demo, tmp_path, capsys):
    assert train("--out", tmp_path / "a", "--stage", 1, "--max_steps", 1) == 0
    assert not (tmp_path / "a" / "stage2").exists()
    assert main(["recommend", str(tmp_path / "a"), "--history", "1", "-k", "1"]) == 0
    from_a = ("--stage", 2, "--ckpt_path", tmp_path / "a", "--max_steps", 1)
    assert train("--out", tmp_path / "b", *from_a) == 0
    assert not (tmp_path / "b" / "stage1").exists()
    capsys.readouterr()
    assert train("--out", tmp_path / "c", "--stage", 2, "--max_steps", 1) == 1
    assert "stage1 is not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--preset", "beauty"], "--preset beauty is for --model fave, got 'fmrec'"),
        (["--stage", "2"], "--stage 2 is for --model fave, got 'fmrec'"),
        (["--model", "fave", "--preset", "yelp"], "preset must be one of"),
    ],
)
def test_mistakes_are_named(small_demo, tmp_path, capsys, flags, message):
    assert main(["train", "synthetic", "--out", str(tmp_path / "run"), *flags]) == 1
    assert message in capsys.readouterr().err


def test_settings_of_fave_are_described(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--model", "fave", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name in FaveConfig.__dataclass_fields__:
        assert (f"--{name} " in text) == (name not in ("item_num", "stage_mode")), name
    assert "chance that r is 1" in text and "width of embeddings" in text


def test_the_model_is_chosen_on_the_command_line(small_demo, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text("model: fave\n")
    flags = ["--out", str(tmp_path / "run"), "--config", str(tmp_path / "settings.yaml")]
    assert main(["train", "synthetic", *flags]) == 1
    assert "--model fave must be given on the command line" in capsys.readouterr().err


def test_demo_of_fave(small_demo, tmp_path, capsys):
    out = tmp_path / "demo"
    for _ in range(2):  # it replaces its own earlier run
        assert main(["demo", "--model", "fave", "--out", str(out), "--epochs", "1"]) == 0
    text = capsys.readouterr().out
    for part in (
        "2. train 1 epochs",
        "3. test on 40 users",
        "sample 40 users, 1 steps",
        "train on",
    ):
        assert part in text
    assert state_of(out)["config"]["stage_mode"] == "finetune"
