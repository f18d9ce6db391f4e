"""Settings: validation, and where they come from."""

from __future__ import annotations

import argparse
import dataclasses
import re

import pytest
import torch

from fmrec_fast import FMRecConfig, FMRecommender

BAD = [
    ("item_num", -1),
    ("item_num", 10.5),
    ("hidden_size", 0),
    ("hidden_size", 128.0),
    ("hidden_size", 130),  # not divisible by 4 heads
    ("max_len", -3),
    ("max_len", True),
    ("num_blocks", 0),
    ("num_heads", 0),
    ("num_heads", 3),
    ("last", 4),
    ("last", -1),
    ("last", 1.5),
    ("decoder_dims", (512,)),
    ("decoder_dims", (512, 0)),
    ("dropout", 1.0),
    ("dropout", -0.1),
    ("emb_dropout", 1.5),
    ("lambda_uncertainty", -0.001),
    ("lambda_uncertainty", float("nan")),
    ("eps", 0.0),
    ("eps", 1.0),
    ("eps_reverse", -1.0),
    ("sample_N", 0),
    ("sample_N", 2.0),
    ("sampling_method", "modes"),
    ("mask_ratio", -1.0),
    ("attention", "casual"),
    ("trajectory", "cosinus"),
    ("target", "noise"),
    ("Loss_Alpha", -0.2),
    ("Loss_Beta", -0.4),
    ("batch_size", 0),
    ("lr", 0.0),
    ("lr", float("nan")),
    ("optimizer", "AdamW"),
    ("weight_decay", -1.0),
    ("decay_step", 0),
    ("epochs", 0),
    ("eval_interval", 0),
    ("patience", 0),
    ("metric_ks", ()),
    ("metric_ks", (5, 0)),
    ("early_stopping_metric", "NDCG@11"),
]


@pytest.mark.parametrize("name, value", BAD, ids=[f"{name}={value}" for name, value in BAD])
def test_every_error_names_setting_and_value(name, value):
    with pytest.raises(ValueError) as error:
        FMRecConfig(**{name: value})
    message = str(error.value)
    assert name in message
    given = {"num_heads=3": "128"}.get(f"{name}={value}", repr(value))  # 3 does not divide 128
    assert given in message


def test_odd_widths_have_no_time_embedding():
    with pytest.raises(ValueError, match="hidden_size must be even, got 33"):
        FMRecConfig(hidden_size=33, num_heads=3)


def test_defaults_are_the_published_ones():
    config = FMRecConfig()
    assert (config.hidden_size, config.max_len, config.num_blocks, config.last) == (128, 50, 4, 2)
    assert (config.dropout, config.emb_dropout, config.lambda_uncertainty) == (0.1, 0.3, 0.001)
    assert (config.eps, config.sample_N, config.sampling_method) == (0.001, 30, "mode")
    assert (config.m_logNorm, config.s_logNorm, config.s_modsamp) == (1.0, 0.6, 1.0)
    assert (config.mask_ratio, config.Loss_Alpha, config.Loss_Beta) == (1.0, 0.2, 0.4)
    assert (config.batch_size, config.lr, config.optimizer) == (512, 0.001, "Adam")
    assert (config.decay_step, config.gamma, config.epochs) == (100, 0.1, 500)
    assert (config.eval_interval, config.patience, config.random_seed) == (20, 5, 1997)
    assert config.metric_ks == (5, 10, 20) and config.decoder_dims == (512, 2048)
    assert (config.attention, config.trajectory, config.target) == ("published", "straight", "data")


@pytest.mark.parametrize(
    "key, near", [("hiden_size", "hidden_size"), ("loss_alpha", "Loss_Alpha"), ("ep", "eps")]
)
def test_an_unknown_key_gets_a_suggestion(key, near):
    with pytest.raises(ValueError, match=f"unknown configuration key '{key}'.*'{near}'"):
        FMRecConfig.from_dict({key: 1})


def test_an_unknown_key_without_a_neighbour_gets_the_list():
    with pytest.raises(ValueError, match=r"'xyzzy'; known keys: .*hidden_size"):
        FMRecConfig.from_dict({"xyzzy": 1})


def test_a_namespace_may_hold_foreign_attributes(small_args):
    args = small_args(log_file="log/", num_gpu=1, hidden_act="gelu", dataset="beauty")
    config = FMRecConfig.from_namespace(args)
    assert (config.item_num, config.hidden_size, config.decoder_dims) == (61, 32, (24, 40))
    assert config.early_stopping_metric == "any"  # as the published program
    assert not hasattr(config, "dataset")


def test_something_else_than_a_namespace_is_refused():
    for wrong in (argparse.Namespace(colour="red"), 5, "config.yaml"):
        with pytest.raises(TypeError, match=re.escape(repr(wrong))):
            FMRecConfig.coerce(wrong)


def test_coerce(small_args):
    config = FMRecConfig.from_namespace(small_args())
    assert FMRecConfig.coerce(config) is config
    assert FMRecConfig.coerce(config.to_dict()) == config
    assert FMRecConfig.coerce(small_args()) == config
    with pytest.raises(ValueError, match="sample_n"):
        FMRecConfig.coerce({"sample_n": 5})


def test_yaml_round_trip(tmp_path):
    import yaml

    config = FMRecConfig(
        item_num=61, decoder_dims=(3, 4), metric_ks=(1, 10), attention="causal", momentum=0.9
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.to_dict()))
    assert FMRecConfig.from_yaml(path) == config
    assert FMRecConfig.from_yaml(str(path)) == config
    path.write_text("")
    assert FMRecConfig.from_yaml(path) == FMRecConfig()
    path.write_text("- 1\n- 2\n")
    with pytest.raises(ValueError, match=r"expected 'name: value' lines, got \[1, 2\]"):
        FMRecConfig.from_yaml(path)
    path.write_text("hiden_size: 64\n")
    with pytest.raises(ValueError, match="did you mean 'hidden_size'"):
        FMRecConfig.from_yaml(path)


def test_frozen_and_replaced():
    config = FMRecConfig(item_num=61)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.lr = 1.0
    assert config.replace(lr=0.5) == FMRecConfig(item_num=61, lr=0.5)
    with pytest.raises(ValueError, match="got -1"):
        config.replace(lr=-1)


@pytest.mark.parametrize("item_num", [0, 1])
def test_a_model_needs_an_item(item_num):
    with pytest.raises(ValueError, match=f"item_num must be at least 2.*got {item_num}"):
        FMRecommender.from_config(FMRecConfig(item_num=item_num))


def test_every_setting_reaches_the_model():
    config = FMRecConfig(
        item_num=61, hidden_size=24, max_len=7, num_blocks=3, num_heads=2, last=0,
        decoder_dims=(5, 6), dropout=0.25, emb_dropout=0.5, lambda_uncertainty=0.125, eps=0.01,
        eps_reverse=0.02, sample_N=3, sampling_method="cosmap", m_logNorm=2.0, s_logNorm=3.0,
        s_modsamp=4.0, mask_ratio=5.0, attention="causal", trajectory="cosine", target="velocity",
    )  # fmt: skip
    model = FMRecommender.from_config(config)
    fm, network = model.fm, model.fm.xstart_model
    assert model.item_embeddings.weight.shape == (61, 24)
    assert model.position_embeddings.weight.shape == (7, 24)
    assert len(network.att.transformer_blocks) == 3
    assert (network.att.num_heads, network.att.attention, network.tap) == (2, "causal", 2)
    assert [tuple(layer.weight.shape) for layer in network.decoder[::2]] == [
        (5, 24), (6, 5), (61, 6),
    ]  # fmt: skip
    assert (network.dropout.p, model.embed_dropout.p) == (0.25, 0.5)
    assert (network.lambda_uncertainty, model.loss_recon_mask_ratio) == (0.125, 5.0)
    assert (fm.eps, fm.eps_reverse, fm.sample_N, fm.sampling_method) == (0.01, 0.02, 3, "cosmap")
    assert (fm.m_logNorm, fm.s_logNorm, fm.s_modsamp) == (2.0, 3.0, 4.0)
    assert (fm.trajectory, fm.target) == ("cosine", "velocity")
    assert fm.time_scale == pytest.approx(99)
    assert torch.isfinite(network.decoder[0].weight).all()
