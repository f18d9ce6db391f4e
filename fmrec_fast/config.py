"""Settings of the models and of their training, under the published argument names."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

SCHEDULES = ("uniform", "logit_normal", "mode", "cosmap")
ATTENTIONS = ("published", "causal")
# What padded positions draw: each its own lam, or one for all of a row (an inference option).
PADDINGS = ("published", "tied")
TRAJECTORIES = ("straight", "cosine")
TARGETS = ("data", "velocity")
OPTIMIZERS = ("Adam", "SGD")
# Of the encoder's matrix products in sampling, and of its linear layers' in training; weights,
# accumulation and all else stay float32.
PRECISIONS = ("float32", "tf32", "bf16")
_NUMBERS = (
    "dropout emb_dropout lambda_uncertainty eps eps_reverse m_logNorm s_logNorm s_modsamp "
    "mask_ratio Loss_Alpha Loss_Beta lr weight_decay gamma"
).split()


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


@dataclass(frozen=True)
class FMRecConfig:
    """Everything that FMRec and its training read; the defaults are the published ones.

    Args:
        item_num: V, number of items + 1 (id 0 is padding). 0: not known yet, taken from the data.
        hidden_size: D, width of embeddings and transformer.
        max_len: L, the most recent items of a history that are used.
        num_blocks: transformer blocks.
        num_heads: H, attention heads; divides `hidden_size`.
        last: the decoder reads block number ``num_blocks - last``, counted from 1.
        decoder_dims: widths of the decoder's two inner layers.
        dropout: dropout inside the transformer.
        emb_dropout: dropout of the item embeddings.
        lambda_uncertainty: delta, mean and standard deviation of lam (eq. 14).
        eps: smallest time in training, and of the sampler's first step.
        eps_reverse: kept for the published interface; it has no effect of its own.
        sample_N: q, Euler steps of the sampler (eq. 23).
        sampling_method: time schedule of training: 'uniform', 'logit_normal', 'mode', 'cosmap'.
        m_logNorm: mean of the logit-normal schedule.
        s_logNorm: standard deviation of the logit-normal schedule.
        s_modsamp: scale of the mode schedule (eq. 9).
        mask_ratio: drawn zero cells per one of the reconstruction loss.
        attention: 'published' (padded queries see everything alike, no key mask) or 'causal'.
        trajectory: 'straight' or 'cosine'.
        target: what the network predicts: 'data' or 'velocity' (eq. 11).
        Loss_Alpha: weight of the cross-entropy (eq. 21).
        Loss_Beta: weight of the reconstruction loss (eq. 21).
        batch_size: samples per training step.
        lr: learning rate.
        optimizer: 'Adam' or 'SGD'.
        weight_decay: of the optimizer.
        momentum: of SGD; None is 0.
        decay_step: epochs between two reductions of the learning rate.
        gamma: factor of each reduction.
        epochs: at most so many passes over the training samples.
        eval_interval: epochs between two validations.
        patience: validations without improvement after which training stops.
        metric_ks: the K of HR@K, NDCG@K and MRR@K.
        early_stopping_metric: the validation metric that decides, or 'any' (as published).
        precision: of the linear layers of the encoder, and of the hidden ones of the decoder, in
            training: 'float32', 'tf32' or 'bf16'.
        random_seed: governs initialisation, order of samples, and every draw.
    """

    KIND = "fmrec"  # names the model, in checkpoints and on the command line; no setting

    item_num: int = 0
    hidden_size: int = 128
    max_len: int = 50
    num_blocks: int = 4
    num_heads: int = 4
    last: int = 2
    decoder_dims: tuple[int, int] = (512, 2048)
    dropout: float = 0.1
    emb_dropout: float = 0.3
    lambda_uncertainty: float = 0.001
    eps: float = 0.001
    eps_reverse: float = 0.001
    sample_N: int = 30
    sampling_method: str = "mode"
    m_logNorm: float = 1.0
    s_logNorm: float = 0.6
    s_modsamp: float = 1.0
    mask_ratio: float = 1.0
    attention: str = "published"
    trajectory: str = "straight"
    target: str = "data"
    Loss_Alpha: float = 0.2
    Loss_Beta: float = 0.4
    batch_size: int = 512
    lr: float = 0.001
    optimizer: str = "Adam"
    weight_decay: float = 0.0
    momentum: float | None = None
    decay_step: int = 100
    gamma: float = 0.1
    epochs: int = 500
    eval_interval: int = 20
    patience: int = 5
    metric_ks: tuple[int, ...] = (5, 10, 20)
    early_stopping_metric: str = "NDCG@10"
    precision: str = "float32"
    random_seed: int = 1997

    def __post_init__(self) -> None:
        for name in ("decoder_dims", "metric_ks"):
            values = getattr(self, name)
            whole = isinstance(values, (tuple, list)) and all(type(x) is int for x in values)
            _require(whole, name, values, "a list of integers")
            object.__setattr__(self, name, tuple(values))
        for name in _NUMBERS:
            value = getattr(self, name)
            number = type(value) in (int, float) and math.isfinite(value)
            _require(number, name, value, "a finite number")
        _require(
            self.momentum is None or 0 <= self.momentum < 1,
            "momentum",
            self.momentum,
            "None or in [0, 1)",
        )
        ok = type(self.random_seed) is int and 0 <= self.random_seed < 2**63
        _require(ok, "random_seed", self.random_seed, "an integer in 0 .. 2**63 - 1")
        ok = type(self.item_num) is int and self.item_num >= 0
        _require(ok, "item_num", self.item_num, "an integer of at least 0")
        for name in (
            "hidden_size max_len num_blocks num_heads sample_N batch_size decay_step "
            "epochs eval_interval patience"
        ).split():
            value = getattr(self, name)
            ok = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            _require(ok, name, value, "an integer of at least 1")
        _require(
            self.hidden_size % self.num_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"divisible by num_heads = {self.num_heads}",
        )
        _require(self.hidden_size % 2 == 0, "hidden_size", self.hidden_size, "even")
        _require(
            type(self.last) is int and 0 <= self.last < self.num_blocks,
            "last",
            self.last,
            f"an integer of at least 0 and less than num_blocks = {self.num_blocks}",
        )
        _require(
            len(self.decoder_dims) == 2 and min(self.decoder_dims) >= 1,
            "decoder_dims",
            self.decoder_dims,
            "two positive widths",
        )
        for name in ("dropout", "emb_dropout"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        for name in ("lambda_uncertainty", "mask_ratio", "weight_decay", "Loss_Alpha", "Loss_Beta"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in ("eps", "eps_reverse"):
            _require(0 < getattr(self, name) < 1, name, getattr(self, name), "in (0, 1)")
        _require(self.lr > 0, "lr", self.lr, "positive")
        _require(
            bool(self.metric_ks) and min(self.metric_ks) >= 1,
            "metric_ks",
            self.metric_ks,
            "at least one positive K",
        )
        for name, allowed in (
            ("sampling_method", SCHEDULES),
            ("attention", ATTENTIONS),
            ("trajectory", TRAJECTORIES),
            ("target", TARGETS),
            ("optimizer", OPTIMIZERS),
            ("precision", PRECISIONS),
        ):
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {allowed}")
        metrics = [f"{m}@{k}" for m in ("HR", "NDCG", "MRR") for k in self.metric_ks]
        _require(
            self.early_stopping_metric in (*metrics, "any"),
            "early_stopping_metric",
            self.early_stopping_metric,
            f"'any' or one of {metrics}",
        )

    @property
    def learning_rate(self) -> float:
        """What the optimizer starts with."""
        return self.lr

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Settings from a mapping; a key that does not exist raises `ValueError`."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {known}"
                raise ValueError(f"unknown configuration key {key!r}{hint}")
        return cls(**values)

    @classmethod
    def from_namespace(cls, args: argparse.Namespace | Any) -> Self:
        """Settings from a published argparse namespace.

        A published namespace also names files, devices and switches that have no effect on the
        model; attributes that are not settings of ours are left alone.
        """
        names = [f.name for f in fields(cls) if hasattr(args, f.name)]
        if not names:
            raise TypeError(f"expected an argparse namespace or {cls.__name__}, got {args!r}")
        values = {name: getattr(args, name) for name in names}
        # A published namespace has no such argument: it stops as the published program does.
        values.setdefault("early_stopping_metric", "any")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Self:
        """Settings from a YAML file of ``name: value`` lines (needs the extra ``[cli]``)."""
        import yaml

        values = yaml.safe_load(Path(path).read_text())
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected 'name: value' lines, got {values!r}")
        return cls.from_dict(values)

    @classmethod
    def coerce(cls, args: Any) -> Self:
        """`args` itself if it is a config; from a mapping or a namespace otherwise."""
        if isinstance(args, cls):
            return args
        if isinstance(args, Mapping):
            return cls.from_dict(args)
        return cls.from_namespace(args)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON and YAML hold them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    def replace(self, **changes: Any) -> Self:
        """A copy with some settings changed."""
        return replace(self, **changes)


STAGES = ("pretrain", "finetune")
ANCHORS = ("published", "history")
ONE_STEPS = ("published", "displacement")


@dataclass(frozen=True)
class FaveConfig(FMRecConfig):
    """Everything that Fave and its training read: `FMRecConfig`'s settings, of which some have
    other defaults, and those of Fave.

    Args:
        emb_dropout: dropout of the item embeddings.
        Loss_Alpha: weight of the cross-entropy.
        Loss_Beta: has no effect; the reconstruction loss has a weight for each stage.
        epochs: at most so many passes over the training samples, in each stage.
        eval_interval: epochs between two validations.
        metric_ks: the K of HR@K, NDCG@K and MRR@K.
        drop_path_rate: drop path of the last block; the first has none, those between in steps.
        gamma_init: start of the cross-attention's gamma.
        train_mask_ratio: chance that a channel of the anchor is kept in training (stage 2).
        infer_mask_ratio: the same in inference.
        loss_aux_weight: weight of the reconstruction loss in stage 2.
        loss_straight_weight: weight of the mean of (du/dt)^2 in stage 2.
        loss_pretrain_weight: weight of the reconstruction loss in stage 1.
        mask_end: chance that r is 1.
        stage_mode: 'pretrain' (stage 1) or 'finetune' (stage 2).
        ckpt_path: what stage 2 starts from: a run directory or a published checkpoint.
        finetune_lr_scale: stage 2 has this times the learning rate.
        clip_norm: gradients are clipped to this norm.
        anchor: position of stage 2's anchor: 'published' (counted from the left edge, mostly
            padding for short histories) or 'history' (an item of the history).
        onestep: stage 2's step from z0: 'published' (to u) or 'displacement' (to z0 + u).
    """

    KIND = "fave"

    emb_dropout: float = 0.0
    Loss_Alpha: float = 0.5
    epochs: int = 200
    eval_interval: int = 1
    metric_ks: tuple[int, ...] = (10, 20)
    drop_path_rate: float = 0.2
    gamma_init: float = 0.01
    train_mask_ratio: float = 0.5
    infer_mask_ratio: float = 0.6
    loss_aux_weight: float = 0.5
    loss_straight_weight: float = 0.1
    loss_pretrain_weight: float = 0.3
    mask_end: float = 0.75
    stage_mode: str = "pretrain"
    ckpt_path: str | None = None
    finetune_lr_scale: float = 0.1
    clip_norm: float = 1.0
    anchor: str = "published"
    onestep: str = "published"

    def __post_init__(self) -> None:
        super().__post_init__()
        weights = "loss_aux_weight loss_straight_weight loss_pretrain_weight".split()
        shares = "drop_path_rate train_mask_ratio infer_mask_ratio mask_end".split()
        for name in (*weights, *shares, "gamma_init", "finetune_lr_scale", "clip_norm"):
            value = getattr(self, name)
            number = type(value) in (int, float) and math.isfinite(value)
            _require(number, name, value, "a finite number")
        for name in weights:
            _require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        for name in shares:
            _require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "in [0, 1]")
        _require(self.drop_path_rate < 1, "drop_path_rate", self.drop_path_rate, "less than 1")
        for name in ("finetune_lr_scale", "clip_norm"):
            _require(getattr(self, name) > 0, name, getattr(self, name), "positive")
        for name, allowed in (
            ("stage_mode", STAGES),
            ("anchor", ANCHORS),
            ("onestep", ONE_STEPS),
            ("trajectory", TRAJECTORIES[:1]),
            ("target", TARGETS[:1]),
        ):
            _require(getattr(self, name) in allowed, name, getattr(self, name), f"one of {allowed}")
        path = self.ckpt_path
        _require(path is None or isinstance(path, str), "ckpt_path", path, "a path or None")
        width = self.hidden_size // self.num_heads
        _require(width % 2 == 0, "hidden_size / num_heads", width, "even (rotary embedding)")

    @property
    def learning_rate(self) -> float:
        """What the optimizer starts with: less in stage 2."""
        return self.lr * (self.finetune_lr_scale if self.stage_mode == "finetune" else 1.0)
