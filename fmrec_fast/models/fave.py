"""Fave (SIGIR 2026): average velocities on FMRec's core, so that one network call recommends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmrec_fast import flow, forward_mode
from fmrec_fast.config import STAGES, FaveConfig
from fmrec_fast.models.blocks import FeedForward, MultiHeadedAttention, TransformerStack, sinusoid
from fmrec_fast.models.fmrec import FMRec, TrainingDraws
from fmrec_fast.models.network import XStartModel
from fmrec_fast.models.recommender import FMRecommender, StartingPoint
from fmrec_fast.models.tables import look_up
from fmrec_fast.ops import history_loss
from fmrec_fast.randomness import RandomSource, random_source
from fmrec_fast.reference.encoder import (
    FAVE,
    BlockWeights,
    CrossWeights,
    Drop,
    Paths,
    no_drop,
    no_paths,
)
from fmrec_fast.reference.rms_norm import RMS_EPS, rms_norm
from fmrec_fast.reference.rotary import inverse_frequencies

PRETRAIN, FINETUNE = STAGES
BRANCHES = 3  # of a block: attention, cross-attention, feed-forward


@dataclass(frozen=True)
class FaveDraws(TrainingDraws):
    """Explicit random numbers of one step; what is None is drawn.

    Stage 1 reads `z0` and `t` of `TrainingDraws`; stage 2 reads `t`, `r` [B], `anchor` (positions,
    int64 [B]) and `keep` (the mask over the anchor [B, D]). `paths` [blocks, 3, B] are drop path's
    factors of attention, cross-attention and feed-forward.
    """

    r: Tensor | None = None
    anchor: Tensor | None = None
    keep: Tensor | None = None
    paths: Tensor | None = None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + 1e-8) * weight."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = RMS_EPS

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight)


class RotaryEmbedding(nn.Module):
    """The angles per position, as published checkpoints hold them."""

    inv_freq: Tensor

    def __init__(self, head_width: int) -> None:
        super().__init__()
        self.register_buffer("inv_freq", inverse_frequencies(head_width))


class RotaryAttention(MultiHeadedAttention):
    """The projections, and the angles that queries and keys are rotated by."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__(hidden_size)
        self.rope = RotaryEmbedding(hidden_size // num_heads)

    def projections(self) -> dict[str, Tensor]:
        """What `BlockWeights` and `CrossWeights` hold of it."""
        layers: list[Any] = [*self.linear_layers, self.w_layer]
        parts: dict[str, Tensor] = {"inv_freq": self.rope.inv_freq}
        for name, layer in zip(("query", "key", "value", "output"), layers, strict=True):
            parts |= {f"{name}_weight": layer.weight, f"{name}_bias": layer.bias}
        return parts


class FaveBlock(nn.Module):
    """One pre-norm block with RMS norms and rotary embedding; its cross-attention step is run only
    where the network's state asks for it."""

    def __init__(self, hidden_size: int, num_heads: int, gamma_init: float) -> None:
        super().__init__()
        gate = max(hidden_size // 4, 8)
        self.gamma = nn.Parameter(torch.full((hidden_size,), float(gamma_init)))
        self.norm1 = RMSNorm(hidden_size)
        self.attention = RotaryAttention(hidden_size, num_heads)
        self.norm2 = RMSNorm(hidden_size)
        self.cross_attention = RotaryAttention(hidden_size, num_heads)
        self.norm3 = RMSNorm(hidden_size)
        self.feed_forward = FeedForward(hidden_size)
        self.se_relu = nn.Linear(hidden_size, gate, bias=False)
        self.se_weight1 = nn.Linear(gate, hidden_size, bias=False)
        self.se_weight2 = nn.Linear(gate, hidden_size, bias=False)

    def weights(self) -> BlockWeights:
        """The parameters, in the order that the ops read."""
        ffn = self.feed_forward
        return BlockWeights(
            norm1_weight=self.norm1.weight,
            norm1_bias=None,
            norm2_weight=self.norm3.weight,
            norm2_bias=None,
            w1_weight=ffn.w_1.weight,
            w1_bias=ffn.w_1.bias,
            w2_weight=ffn.w_2.weight,
            w2_bias=ffn.w_2.bias,
            **self.attention.projections(),
        )

    def cross_weights(self) -> CrossWeights:
        """The parameters of the cross-attention step."""
        return CrossWeights(
            norm_weight=self.norm2.weight,
            se_relu=self.se_relu.weight,
            se_weight1=self.se_weight1.weight,
            se_weight2=self.se_weight2.weight,
            gamma=self.gamma,
            **self.cross_attention.projections(),
        )


class FaveStack(TransformerStack):
    """All blocks; `forward` is the op `encoder` in its variant `FAVE`."""

    variant = FAVE

    def __init__(self, config: FaveConfig) -> None:
        nn.Module.__init__(self)
        self.transformer_blocks = nn.ModuleList(
            FaveBlock(config.hidden_size, config.num_heads, config.gamma_init)
            for _ in range(config.num_blocks)
        )
        self.num_heads, self.attention = config.num_heads, config.attention
        self.precision = config.precision

    def cross_weights(self) -> list[CrossWeights]:
        """The parameters of the cross-attention steps."""
        blocks: list[FaveBlock] = list(self.transformer_blocks)  # type: ignore[arg-type]
        return [block.cross_weights() for block in blocks]


class FaveNetwork(XStartModel):
    """The network that predicts from a noisy embedding at time t of an interval up to r."""

    att: FaveStack
    t_time_embed: nn.Sequential
    r_time_embed: nn.Sequential

    def make_time_embedding(self, width: int) -> None:
        def embedding() -> nn.Sequential:
            layers = (nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))
            return nn.Sequential(*layers)

        self.t_time_embed, self.r_time_embed = embedding(), embedding()

    def time_layers(self) -> tuple[nn.Module, ...]:
        return self.t_time_embed, self.r_time_embed

    def make_stack(self, config: Any) -> TransformerStack:
        rates = torch.linspace(0, config.drop_path_rate, config.num_blocks)
        self.path_rates: list[float] = rates.tolist()
        self.horizon = 1 / config.eps - 1  # r = 1, scaled
        return FaveStack(config)

    def embed_time(self, t: Tensor, r: Tensor | None = None) -> Tensor:
        """Condition on scaled times (999 t): [B] -> [B, D]. None is an interval up to r = 1."""
        r = torch.full_like(t, self.horizon) if r is None else r
        width = self.hidden_size
        return self.t_time_embed(sinusoid(t, width)) + self.r_time_embed(sinusoid(r - t, width))

    def paths(self, source: RandomSource, given: Tensor | None) -> Paths:
        """Drop path in force: the factors given or drawn, floor(keep + u) / keep."""
        if given is not None:
            return lambda block, branch: given[block, branch]
        if not self.training or max(self.path_rates) == 0:
            return no_paths

        def draw(block: int, branch: int) -> Tensor | None:
            keep = 1 - self.path_rates[block]
            if keep == 1:
                return None
            return torch.floor(keep + source.path(BRANCHES * block + branch)) / keep

        return draw

    def predict(
        self,
        item_rep: Tensor,
        x_t: Tensor,
        t: Tensor,
        mask_seq: Tensor,
        source: RandomSource,
        noise: Tensor | None = None,
        *,
        r: Tensor | None = None,
        state: str = PRETRAIN,
        paths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The prediction and what the decoder reads, both [B, D]; arguments as `forward`."""
        options: dict[str, Any] = {"paths": self.paths(source, paths)}
        if state != PRETRAIN:
            options |= {"cross": self.att.cross_weights(), "context": item_rep}
        tau = self.embed_time(t, r)
        return self.predict_with(item_rep, x_t, tau, mask_seq, source, noise, **options)

    def forward(  # type: ignore[override]
        self,
        item_rep: Tensor,
        x_t: Tensor,
        t: Tensor,
        r: Tensor,
        mask_seq: Tensor,
        state: str = PRETRAIN,
        *,
        noise: Tensor | None = None,
        paths: Tensor | None = None,
        seed: int | Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict from a noisy embedding, and decode the history.

        Args:
            item_rep: embedded history [B, L, D].
            x_t: noisy target [B, D].
            t, r: scaled times [B].
            mask_seq: [B, L], 1 at real positions.
            state: 'pretrain', or another one to run the blocks' cross-attention steps, which
                neither training nor inference as published does.
            noise: explicit lam [B, L, D]; None draws it.
            paths: explicit drop path [blocks, 3, B].
            seed, rows: key the stream; None draws a seed and names the rows 0 .. B-1.

        Returns:
            (x0 [B, D], decoded [B, V]).
        """
        source = random_source(len(item_rep), item_rep.device, seed=seed, rows=rows)
        x0, tapped = self.predict(
            item_rep, x_t, t, mask_seq, source, noise, r=r, state=state, paths=paths
        )
        return x0, self.decoder(tapped)


class Fave(FMRec):
    """The core, drop-in for the published class of this name.

    Args:
        args: the published argparse namespace, a mapping, or `FaveConfig`.

    `stage` ('pretrain' or 'finetune') decides how many steps inference takes where nobody says:
    ``sample_N``, or one.
    """

    config_class = FaveConfig
    network_class = FaveNetwork
    config: FaveConfig
    xstart_model: FaveNetwork

    def __init__(self, args: Any) -> None:
        super().__init__(args)
        self.set_stage(self.config.stage_mode)

    def set_stage(self, stage: str) -> None:
        """Go over to a stage.

        Raises:
            ValueError: no such stage.
        """
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
        self.stage = stage
        # x + u / q instead of x + (u - z0) / q: the prediction is the velocity.
        displaced = stage == FINETUNE and self.config.onestep == "displacement"
        self.target = "velocity" if displaced else "data"

    @property
    def steps(self) -> int:
        """Euler steps of inference."""
        return 1 if self.stage == FINETUNE else self.sample_N

    def sampler_settings(self) -> tuple:
        return (*super().sampler_settings(), self.stage)

    def training_prediction(
        self,
        item_rep: Tensor,
        x_t: Tensor,
        t: Tensor,
        mask_seq: Tensor,
        source: RandomSource,
        draws: TrainingDraws,
    ) -> tuple[Tensor, Tensor]:
        # As published, r is 1 and not 999 here.
        paths = draws.paths if isinstance(draws, FaveDraws) else None
        r = torch.ones_like(t)
        return self.xstart_model.predict(
            item_rep, x_t, t, mask_seq, source, draws.noise, r=r, paths=paths
        )

    def euler_sampler(
        self, item_rep: Tensor, mask_seq: Tensor, z0: Tensor, stage: str = PRETRAIN
    ) -> tuple[Tensor, int]:
        """(x [B, D], number of network evaluations): ``sample_N`` steps in 'pretrain', else 1."""
        steps = self.sample_N if stage == PRETRAIN else 1
        return self.integrate(item_rep, mask_seq, z0, steps=steps), steps

    def anchor(
        self,
        item_rep: Tensor,
        mask_seq: Tensor,
        source: RandomSource,
        ratio: float,
        draws: FaveDraws,
    ) -> Tensor:
        """The start of stage 2: the embedding at one position, channels kept with chance `ratio`:
        [B, D]."""
        index, keep = draws.anchor, draws.keep
        if index is None or keep is None:
            u, drawn = source.anchor(item_rep.shape[2], ratio)
            index = self._position(u, mask_seq) if index is None else index
            keep = drawn if keep is None else keep
        at = index[:, None, None].expand(-1, 1, item_rep.shape[2])
        return item_rep.gather(1, at)[:, 0] * keep.to(item_rep.dtype)

    def _position(self, u: Tensor, mask_seq: Tensor) -> Tensor:
        """floor(u * number of real items), from the left edge or from the first of them."""
        count = mask_seq.sum(1)
        index = torch.minimum(u * count, count - 1).clamp(min=0)
        if self.config.anchor == "history":
            length = mask_seq.shape[1]
            index = (index + (length - count)).clamp(max=length - 1)
        return index.long()

    def average_velocity(
        self,
        item_rep: Tensor,
        item_tag: Tensor,
        mask_seq: Tensor,
        source: RandomSource,
        draws: FaveDraws,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One evaluation of stage 2: (u, du/dt, v, x1), all [B, D].

        u is the prediction between the anchor and the target, du/dt its derivative along the
        straight way there: the forward-mode derivative of f(z, t, r) along (v, 1, 0).
        """
        config, scale = self.config, self.time_scale
        t = source.uniforms() if draws.t is None else draws.t
        r = draws.r
        if r is None:
            where, at_end = source.interval()
            r = torch.where(at_end < config.mask_end, torch.ones_like(t), t + (1 - t) * where)
        z_a = self.anchor(item_rep, mask_seq, source, config.train_mask_ratio, draws)
        v = item_tag - z_a
        z_t = flow.interpolate(item_tag, z_a, t[:, None])

        def f(z: Tensor, t: Tensor) -> Tensor:
            prediction, _ = self.xstart_model.predict(
                item_rep,
                z,
                scale * t,
                mask_seq,
                source,
                draws.noise,
                r=scale * r,
                paths=draws.paths,
            )
            return prediction

        u, dudt = forward_mode.jvp(f, (z_t, t), (v, torch.ones_like(t)))
        return u, dudt, v, z_t + (1 - t)[:, None] * u


@dataclass(frozen=True)
class StageLosses:
    """One training evaluation: the parts of a stage's objective, and what it predicts.

    `flow` is the mean squared error of the prediction (stage 1) or of the velocity (stage 2);
    `straight` the mean of (du/dt)^2, in stage 2 only.
    """

    prediction: Tensor
    flow: Tensor
    reconstruction: Tensor
    straight: Tensor | None = None


class FaveRecommender(FMRecommender):
    """The joint model: item embeddings around the core (published name: ``Att_Fave_model``).

    Args:
        fave: the core.
        args: the published argparse namespace, a mapping, or `FaveConfig`.
    """

    CORE = "fave"
    config_class = FaveConfig
    core_class = Fave
    config: FaveConfig
    fave: Fave

    def __init__(self, fave: Fave, args: Any) -> None:
        super().__init__(fave, args)
        self.stage = PRETRAIN
        if self.config.stage_mode == FINETUNE:
            self.switch_to_finetune()

    @property
    def fm(self) -> Fave:  # type: ignore[override]
        """The core, where the sampler looks for it whichever model it is."""
        return self.fave

    @property
    def stage(self) -> str:
        """'pretrain' or 'finetune'."""
        return self.fave.stage

    @stage.setter
    def stage(self, stage: str) -> None:
        self.fave.set_stage(stage)

    def switch_to_finetune(self) -> None:
        """Go over to stage 2: item and position embeddings are frozen."""
        self.stage = FINETUNE
        self.item_embeddings.weight.requires_grad_(False)
        self.position_embeddings.weight.requires_grad_(False)

    def start(
        self, item_rep: Tensor, mask_seq: Tensor, source: RandomSource, draws: TrainingDraws
    ) -> Tensor:
        """Where inference starts from [B, D]: noise in stage 1, the anchor in stage 2."""
        if draws.z0 is not None:
            return draws.z0
        if self.stage == PRETRAIN:
            return source.start(self.emb_dim)
        given = draws if isinstance(draws, FaveDraws) else FaveDraws()
        ratio = self.config.infer_mask_ratio
        return self.fave.anchor(item_rep, mask_seq, source, ratio, given)

    def starts_from(self) -> StartingPoint:
        if self.stage == PRETRAIN:
            return super().starts_from()
        history = self.config.anchor == "history"
        name = "anchor in history" if history else "anchor"
        return StartingPoint(name, self.config.infer_mask_ratio)

    def stage_losses(
        self,
        sequence: Tensor,
        tag: Tensor | None,
        *,
        draws: TrainingDraws | None = None,
        seed: Tensor | int | None = None,
        rows: Tensor | None = None,
    ) -> StageLosses:
        """One training evaluation of the stage in force; arguments as `forward`."""
        self.check_sequence(sequence)
        tag = self.check_tag(tag, len(sequence))
        source = random_source(len(sequence), sequence.device, seed=seed, rows=rows)
        if draws is None or not isinstance(draws, FaveDraws):
            draws = FaveDraws(**vars(draws or TrainingDraws()))
        drop: Drop = source.dropout() if self.training else no_drop
        history, item_tag = look_up(self.item_embeddings.weight, sequence, tag[:, 0])
        e, mask = self._prepare(history, sequence, drop)
        straight = None
        if self.stage == PRETRAIN:
            prediction, decoded_from, *_ = self.fave.flow_step(e, item_tag, mask, source, draws)
            loss_flow = self.loss_FM_mse(prediction, item_tag)
        else:
            u, dudt, v, prediction = self.fave.average_velocity(e, item_tag, mask, source, draws)
            decoded_from = prediction
            loss_flow = self.loss_FM_mse(u, v)
            straight = dudt.square().mean()
        network = self.fave.xstart_model
        weight, bias = network.decoder_output()
        reconstruction = history_loss(
            network.decoder_hidden(decoded_from),
            weight,
            bias,
            sequence,
            mask_ratio=self.loss_recon_mask_ratio,
            cells=draws.cells,
            seed=source.seed,
        )
        return StageLosses(prediction, loss_flow, reconstruction, straight)

    def weigh(self, losses: StageLosses) -> Tensor:
        """The stage's loss without the cross-entropy, as the published model returns it."""
        config = self.config
        if losses.straight is None:
            return losses.flow + config.loss_pretrain_weight * losses.reconstruction
        return (
            losses.flow
            + config.loss_aux_weight * losses.reconstruction
            + config.loss_straight_weight * losses.straight
        )

    def forward(
        self,
        sequence: Tensor,
        tag: Tensor | None,
        forward_mse_time: int = 0,
        train_flag: bool = True,
        *,
        draws: TrainingDraws | None = None,
        seed: Tensor | int | None = None,
        rows: Tensor | None = None,
    ) -> tuple:
        """One step of training or of inference, as published.

        Args:
            sequence: int64 [B, L], left-padded with 0.
            tag: targets int64 [B, 1], 1 .. V-1; not read in inference.
            forward_mse_time: has no effect (published interface).
            train_flag: training or inference.
            draws: explicit random numbers, `FaveDraws`.
            seed, rows: key the noise stream; None draws a seed and names the rows 0 .. B-1.

        Returns:
            stage 1: (loss_fm + loss_pretrain_weight * loss_recon, x0 [B, D], stage, None, None,
            None); stage 2: (loss, x1 [B, D], None, None, None, None); the caller adds
            ``Loss_Alpha * loss_fave_tat(x, tag)``; inference: (None, x1 [B, D], None, None, None,
            z0 [B, D]).

        Raises:
            TypeError, ValueError: dtypes or shapes are off, or (on CPU) an id is out of range.
        """
        if train_flag:
            losses = self.stage_losses(sequence, tag, draws=draws, seed=seed, rows=rows)
            stage = self.stage if self.stage == PRETRAIN else None
            return self.weigh(losses), losses.prediction, stage, None, None, None
        return super().forward(sequence, tag, train_flag=False, draws=draws, seed=seed, rows=rows)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As ``nn.Module.load_state_dict``; a prefix ``module.`` of all names is dropped."""
        return super().load_state_dict(without_module_prefix(state_dict), strict, assign)

    def fave_rep_pre(self, rep: Tensor) -> Tensor:
        """Scores of all items: [B, D] -> [B, V]."""
        return self.fm_rep_pre(rep)

    def loss_fave_tat(self, rep: Tensor, tag: Tensor) -> Tensor:
        """Cross-entropy of the scores against `tag` [B, 1] or [B]."""
        return self.loss_fm_ce(rep, tag)


def without_module_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """`state` without the prefix ``module.`` that data-parallel training leaves on every name."""
    prefix = "module."
    if not state or not all(name.startswith(prefix) for name in state):
        return state
    return {name[len(prefix) :]: value for name, value in state.items()}


__all__: Sequence[str] = ("Fave", "FaveDraws", "FaveRecommender", "StageLosses")
