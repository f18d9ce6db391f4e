"""FMRec (IJCAI 2025): the flow-matching core and the joint model around it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrec_fast import flow, packing, picard
from fmrec_fast.config import FMRecConfig
from fmrec_fast.models.blocks import HiddenLinear, LayerNorm, TransformerStack, sinusoid
from fmrec_fast.models.tables import ItemEmbedding, ItemLinear, look_up
from fmrec_fast.ops import (
    StreamDropout,
    dropout_layer_norm,
    euler_sampler,
    history_loss,
    item_cross_entropy,
    noise_fusion,
    picard_sweep,
)
from fmrec_fast.ops._checks import check_integer, check_range, check_shape
from fmrec_fast.ops.dropout_layer_norm import joins as dropout_norm_joins
from fmrec_fast.ops.euler_sampler import SamplerWeights
from fmrec_fast.ops.linear import check_precision
from fmrec_fast.randomness import PublishedSource, RandomSource, random_source
from fmrec_fast.reference import euler_sampler as reference_sampler
from fmrec_fast.reference.encoder import EMBEDDING_SITE, Drop, dropout_sites, no_drop
from fmrec_fast.reference.history_loss import Cells

if TYPE_CHECKING:
    from typing_extensions import Self
INTEGRATORS = ("euler", "parallel", "auto")


@dataclass(frozen=True)
class TrainingDraws:
    """Explicit random numbers of one training step; what is None is drawn.

    `cells` are (row, column) pairs of drawn zero cells [N, 2], or all cells of the loss.
    """

    z0: Tensor | None = None
    t: Tensor | None = None
    noise: Tensor | None = None
    cells: Tensor | Cells | None = None


class XStartModel(nn.Module):
    """The network that predicts the next item's embedding from a noisy one."""

    def __init__(self, config: FMRecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.hidden_size = width
        self.item_num = config.item_num
        self.lambda_uncertainty = config.lambda_uncertainty
        self.tap = config.num_blocks - config.last - 1
        self.linear_item = nn.Linear(width, width)
        self.linear_xt = nn.Linear(width, width)
        self.linear_t = nn.Linear(width, width)
        self.make_time_embedding(width)
        self.fuse_linear = nn.Linear(3 * width, width)
        self.att = self.make_stack(config)
        self.dropout = nn.Dropout(config.dropout)
        self.norm_fm_rep = LayerNorm(width)
        first, second = config.decoder_dims
        self.decoder = nn.Sequential(
            HiddenLinear(width, first, config.precision),
            nn.Tanh(),
            HiddenLinear(first, second, config.precision),
            nn.Tanh(),
            ItemLinear(second, config.item_num),
        )

    def make_time_embedding(self, width: int) -> None:
        """The layers that `embed_time` reads."""
        self.time_embed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        )

    def make_stack(self, config: FMRecConfig) -> TransformerStack:
        """The transformer."""
        return TransformerStack(
            config.hidden_size,
            config.num_blocks,
            config.num_heads,
            config.attention,
            config.precision,
        )

    def time_layers(self) -> tuple[nn.Module, ...]:
        """All that `embed_time` reads."""
        return (self.time_embed,)

    def embed_time(self, t: Tensor) -> Tensor:
        """Time embeddings of scaled times (999 t): [B] -> [B, D]."""
        return self.time_embed(sinusoid(t, self.hidden_size))

    def predict(
        self,
        item_rep: Tensor,
        x_t: Tensor,
        t: Tensor,
        mask_seq: Tensor,
        source: RandomSource,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The prediction and what the decoder reads, both [B, D]; arguments as `forward`."""
        return self.predict_with(item_rep, x_t, self.embed_time(t), mask_seq, source, noise)

    def predict_with(
        self,
        item_rep: Tensor,
        x_t: Tensor,
        tau: Tensor,
        mask_seq: Tensor,
        source: RandomSource,
        noise: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """`predict` under the condition `tau` [B, D]; `options` go to the transformer."""
        length = item_rep.shape[1]
        if noise is None:
            noise = source.lam(item_rep.shape, self.lambda_uncertainty)
        fused = noise_fusion(
            item_rep,
            x_t,
            tau,
            delta=self.lambda_uncertainty,
            seed=source.seed,
            rows=source.rows,
            lam=noise,
        )
        drop = source.dropout() if self.training else no_drop
        # As published, every position of the last block and of the final dropout draws a mask,
        # though only the last position is read.
        prune = source.prunes or not self.training
        last, tapped = self.att(
            fused, mask_seq, tap=self.tap, drop=drop, p=self.dropout.p, prune=prune, **options
        )
        site = dropout_sites(len(self.att.transformer_blocks))[0]
        x = last[:, None] if prune else last[:, None].repeat(1, length, 1)
        x = drop(x, self.dropout.p, site, position_offset=length - x.shape[1])
        return self.norm_fm_rep(x[:, -1]), tapped

    def forward(
        self,
        item_rep: Tensor,
        x_t: Tensor,
        t: Tensor,
        mask_seq: Tensor,
        *,
        noise: Tensor | None = None,
        seed: int | Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Predict the data end of the trajectory, and decode the history.

        Args:
            item_rep: embedded history [B, L, D].
            x_t: noisy target [B, D].
            t: scaled times (999 t) [B].
            mask_seq: [B, L], 1 at real positions.
            noise: explicit lam [B, L, D]; None draws it (eq. 14).
            seed, rows: key the stream; None draws a seed and names the rows 0 .. B-1.

        Returns:
            (x0 [B, D], decoded [B, V]).
        """
        source = random_source(item_rep.shape[0], item_rep.device, seed=seed, rows=rows)
        x0, tapped = self.predict(item_rep, x_t, t, mask_seq, source, noise)
        return x0, self.decoder(tapped)

    def decoder_hidden(self, tapped: Tensor) -> Tensor:
        """Input of the decoder's last layer: [B, D] -> [B, Hd]."""
        return self.decoder[:-1](tapped)

    def decoder_output(self) -> tuple[Tensor, Tensor]:
        """Weight [V, Hd] and bias [V] of the decoder's last layer."""
        layer: nn.Linear = self.decoder[-1]  # type: ignore[assignment]
        return layer.weight, layer.bias


class FMRec(nn.Module):
    """The flow-matching core, drop-in for the published class of this name.

    Args:
        args: the published argparse namespace, a mapping, or `FMRecConfig`.

    Attributes such as `sample_N`, `eps`, `sampling_method` or `s_modsamp` may be changed after
    construction; every call reads them afresh.
    """

    config_class: type[FMRecConfig] = FMRecConfig
    network_class: type[XStartModel] = XStartModel
    config: FMRecConfig
    xstart_model: XStartModel

    def __init__(self, args: Any) -> None:
        super().__init__()
        config = self.config_class.coerce(args)
        if config.item_num < 2:
            raise ValueError(
                f"item_num must be at least 2 (padding and one item), got {config.item_num}"
            )
        self.config = config
        self.hidden_size = config.hidden_size
        self.item_num = config.item_num
        self.max_len = config.max_len
        self.eps = config.eps
        self.eps_reverse = config.eps_reverse
        self.sample_N = config.sample_N
        self.sampling_method = config.sampling_method
        self.m_logNorm = config.m_logNorm
        self.s_logNorm = config.s_logNorm
        self.s_modsamp = config.s_modsamp
        self.trajectory = config.trajectory
        self.target = config.target
        self.xstart_model = self.network_class(config)

    @property
    def time_scale(self) -> float:
        """The factor 1/eps - 1 (999) between t and the time embedding's argument."""
        return 1 / self.eps - 1

    @property
    def steps(self) -> int:
        """Euler steps of inference where nobody says how many."""
        return self.sample_N

    def _times(self, source: RandomSource) -> Tensor:
        """Training times [B] by the schedule in force."""
        normal = u = None
        if self.sampling_method == "logit_normal":
            normal = self.m_logNorm + self.s_logNorm * source.normals()
        else:
            u = source.uniforms()
        return flow.time_schedule(
            u, self.sampling_method, eps=self.eps, s_modsamp=self.s_modsamp, normal=normal
        )

    def flow_step(
        self,
        item_rep: Tensor,
        item_tag: Tensor,
        mask_seq: Tensor,
        source: RandomSource,
        draws: TrainingDraws,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One training evaluation: (prediction, decoder's input, t, z0, x_t)."""
        z0 = source.start(item_tag.shape[1]) if draws.z0 is None else draws.z0
        t = self._times(source) if draws.t is None else draws.t
        x_t = flow.interpolate(item_tag, z0, t[:, None], self.trajectory)
        prediction, tapped = self.training_prediction(
            item_rep, x_t, t * self.time_scale, mask_seq, source, draws
        )
        return prediction, tapped, t, z0, x_t

    def training_prediction(
        self,
        item_rep: Tensor,
        x_t: Tensor,
        t: Tensor,
        mask_seq: Tensor,
        source: RandomSource,
        draws: TrainingDraws,
    ) -> tuple[Tensor, Tensor]:
        """The network in training, at scaled times."""
        return self.xstart_model.predict(item_rep, x_t, t, mask_seq, source, draws.noise)

    def forward(
        self,
        item_rep: Tensor,
        item_tag: Tensor,
        mask_seq: Tensor,
        *,
        draws: TrainingDraws | None = None,
        seed: int | Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """One training evaluation with the decoder run in full, as published.

        Args:
            item_rep: [B, L, D]; item_tag: embedded targets [B, D]; mask_seq: [B, L].

        Returns:
            (x0 [B, D], decoded [B, V], t repeated [B, D], t [B], z0 [B, D]).
        """
        source = random_source(item_tag.shape[0], item_tag.device, seed=seed, rows=rows)
        x0, tapped, t, z0, _ = self.flow_step(
            item_rep, item_tag, mask_seq, source, draws or TrainingDraws()
        )
        decoded = self.xstart_model.decoder(tapped)
        return x0, decoded, t[:, None].repeat(1, self.hidden_size), t, z0

    def q_sample_rf(
        self, x_start: Tensor, t: Tensor, z0: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """x_t = t x + (1 - t) z0 (or the cosine trajectory).

        Args:
            t: broadcastable to `x_start`.
            mask: [B] or [B, L]; rows where it is 0 keep `x_start`.
        """
        x_t = flow.interpolate(x_start, z0, t, self.trajectory)
        if mask is None:
            return x_t
        if mask.shape != x_start.shape[: mask.ndim]:
            raise ValueError(
                f"mask must have the leading dimensions of x_start {tuple(x_start.shape)}, "
                f"got {tuple(mask.shape)}"
            )
        keep = mask.reshape(mask.shape + (1,) * (x_start.ndim - mask.ndim)) == 0
        return torch.where(keep, x_start, x_t)

    def sampler_weights(self) -> SamplerWeights:
        """What `ops.euler_sampler` reads of this model."""
        network = self.xstart_model
        stack, norm = network.att, network.norm_fm_rep
        kept = None
        if norm.weight.device.type == "cpu" and not torch.compiler.is_compiling():
            kept = packing.weights_of(self)
            blocks, last = kept.blocks, kept.norm
        else:
            blocks, last = stack.weights(), (norm.weight, norm.bias)
        return SamplerWeights(
            blocks=blocks,
            norm_weight=last[0],
            norm_bias=last[1],
            num_heads=stack.num_heads,
            attention=stack.attention,
            delta=network.lambda_uncertainty,
            variant=stack.variant,
            kept=kept,
        )

    def sampler_settings(self) -> tuple:
        """All that `integrate` reads at a call besides the parameters."""
        network = self.xstart_model
        stack = network.att
        return (
            self.steps,
            self.eps,
            self.trajectory,
            self.target,
            network.lambda_uncertainty,
            stack.num_heads,
            stack.attention,
            stack.variant,
        )

    def integrate(
        self,
        item_rep: Tensor,
        mask_seq: Tensor,
        z0: Tensor,
        *,
        steps: int | None = None,
        seed: int | Tensor | None = None,
        rows: Tensor | None = None,
        noise: Tensor | None = None,
        return_trajectory: bool = False,
        method: str = "euler",
        sweeps: int | None = None,
        tol: float | None = None,
        precision: str = "float32",
        padding: str = "published",
    ) -> Tensor:
        """q Euler steps (eq. 23) from z0 [B, D]: [B, D], or the q + 1 points [q + 1, B, D].

        A network in training mode samples through its dropouts, as published: step by step
        through the whole network.

        Args:
            method: 'euler', step by step; 'parallel', all steps at once; 'auto': see `sample`.
            sweeps, tol: of 'parallel', see `picard.iterate`.
            precision: of the encoder's matrix products.
            others: see `ops.euler_sampler`.

        Raises:
            TypeError, ValueError: an option is off, or not for this method.
        """
        return self.integrate_with_residual(
            item_rep,
            mask_seq,
            z0,
            steps=steps,
            seed=seed,
            rows=rows,
            noise=noise,
            return_trajectory=return_trajectory,
            method=method,
            sweeps=sweeps,
            tol=tol,
            precision=precision,
            padding=padding,
        )[0]

    @torch.no_grad()
    def integrate_with_residual(
        self,
        item_rep: Tensor,
        mask_seq: Tensor,
        z0: Tensor,
        *,
        steps: int | None = None,
        seed: int | Tensor | None = None,
        rows: Tensor | None = None,
        noise: Tensor | None = None,
        return_trajectory: bool = False,
        method: str = "euler",
        sweeps: int | None = None,
        tol: float | None = None,
        precision: str = "float32",
        padding: str = "published",
    ) -> tuple[Tensor, Tensor]:
        """`integrate`, and the residual [B] of method 'parallel'; step by step it is 0."""
        network = self.xstart_model
        check_precision(precision)
        if method not in INTEGRATORS:
            raise ValueError(f"method must be one of {INTEGRATORS}, got {method!r}")
        if method == "euler" and (sweeps is not None or tol is not None):
            raise ValueError(
                f"method 'euler' has no sweeps; got sweeps = {sweeps!r} and tol = {tol!r}"
            )
        picard.check_options(sweeps, tol)
        times = flow.step_times(self.steps if steps is None else steps, self.eps, z0.device)
        source = random_source(z0.shape[0], z0.device, seed=seed, rows=rows)
        delta = network.lambda_uncertainty
        if method == "auto":
            able = source.prunes and not network.training
            batch, length = item_rep.shape[:2]
            wins = self.prefers_parallel(batch, length, len(times), z0.device)
            method = "parallel" if able and wins else "euler"
        if network.training and method == "parallel":
            raise ValueError(
                "method 'parallel' needs the network in evaluation mode: in training mode it "
                "samples through its dropouts, step by step"
            )
        if network.training and precision != "float32":
            raise ValueError(
                f"precision = {precision!r} needs the network in evaluation mode: in training mode "
                "it samples through its dropouts, in float32"
            )
        if network.training:
            if padding != "published":  # dropout makes padded positions differ
                raise ValueError(f"padding={padding!r} needs a model in evaluation mode")
            x = self._integrate_with_dropout(
                item_rep, mask_seq, z0, times, source, noise, return_trajectory
            )
            return x, z0.new_zeros(z0.shape[0])
        lam_of_step = None
        if noise is None and isinstance(source, PublishedSource):
            lam_of_step = partial(source.lam, item_rep.shape, delta)
        if method == "parallel":
            if lam_of_step is not None:
                noise = torch.stack([lam_of_step() for _ in times])
            solution = self._integrate_in_parallel(
                item_rep, mask_seq, z0, times, source, noise, sweeps, tol, precision, padding
            )
            x = solution.points.transpose(0, 1) if return_trajectory else solution.points[:, -1]
            return x, solution.residual
        x = euler_sampler(
            item_rep,
            mask_seq,
            z0,
            network.embed_time(times * self.time_scale),
            self.sampler_weights(),
            times=times,
            seed=source.seed,
            rows=source.rows,
            noise=noise,
            lam_of_step=lam_of_step,
            trajectory=self.trajectory,
            target=self.target,
            return_trajectory=return_trajectory,
            precision=precision,
            padding=padding,
        )
        return x, z0.new_zeros(z0.shape[0])

    def prefers_parallel(self, batch: int, length: int, steps: int, device: torch.device) -> bool:
        """What `method='auto'` comes to."""
        delta = self.xstart_model.lambda_uncertainty
        work = picard.evaluation_flops(length, self.hidden_size, self.config.num_blocks)
        return picard.prefers_parallel(batch, steps, delta, device, work)

    def _integrate_in_parallel(
        self,
        item_rep: Tensor,
        mask_seq: Tensor,
        z0: Tensor,
        times: Tensor,
        source: RandomSource,
        noise: Tensor | None,
        sweeps: int | None,
        tol: float | None,
        precision: str,
        padding: str,
    ) -> picard.Solution:
        taus = self.xstart_model.embed_time(times * self.time_scale)
        weights = self.sampler_weights()

        def predict(x: Tensor, active: Tensor | None) -> Tensor:
            pick = slice(None) if active is None else active
            return picard_sweep(
                item_rep[pick],
                mask_seq[pick],
                x,
                taus[: x.shape[1]],
                weights,
                seed=source.seed,
                rows=source.rows[pick],
                noise=None if noise is None else noise[: x.shape[1], pick],
                precision=precision,
                padding=padding,
            )

        def velocity(prediction: Tensor, active: Tensor | None) -> Tensor:
            start = z0 if active is None else z0[active]
            return self.velocity(prediction, start[:, None], times[:, None])

        return picard.iterate(predict, velocity, z0, len(times), sweeps=sweeps, tol=tol)

    def _integrate_with_dropout(
        self,
        item_rep: Tensor,
        mask_seq: Tensor,
        z0: Tensor,
        times: Tensor,
        source: RandomSource,
        noise: Tensor | None,
        return_trajectory: bool,
    ) -> Tensor:
        scaled = times * self.time_scale

        def step_network(x: Tensor, i: int) -> Tensor:
            # A step's dropouts and lam are its own: the stream gets a seed derived from the step.
            own = source.at_step(i)
            t = scaled[i].expand(len(x))
            lam = None if noise is None else noise[i]
            return self.xstart_model.predict(item_rep, x, t, mask_seq, own, lam)[0]

        return reference_sampler.euler_sampler(
            z0,
            step_network,
            lambda pred, x, i: self.velocity(pred, z0, times[i]),
            len(times),
            return_trajectory=return_trajectory,
        )

    def velocity(self, prediction: Tensor, z0: Tensor, t: Tensor) -> Tensor:
        """The velocity that a prediction stands for."""
        if self.target == "velocity":
            return prediction
        return flow.velocity(prediction, z0, t, self.trajectory)

    def euler_sampler(self, item_rep: Tensor, mask_seq: Tensor, z0: Tensor) -> tuple[Tensor, int]:
        """(x [B, D], number of network evaluations), as published (eq. 23)."""
        return self.integrate(item_rep, mask_seq, z0), self.sample_N

    def reverse_p_sample_rf(self, item_rep: Tensor, z0: Tensor, mask_seq: Tensor) -> Tensor:
        """x [B, D], as published (eq. 23)."""
        return self.integrate(item_rep, mask_seq, z0)

    @torch.no_grad()
    def rk45_sampler(
        self,
        item_rep: Tensor,
        mask_seq: Tensor,
        z0: Tensor,
        *,
        seed: int | Tensor | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """Adaptive Runge-Kutta 4(5) from eps to 1 (scipy ``solve_ivp``, rtol = atol = 1e-5).

        Every evaluation draws its own lam, as published.

        Returns:
            (x [B, D], number of network evaluations).

        Raises:
            ImportError: scipy is not installed (extra ``[ode]``).
        """
        from scipy.integrate import solve_ivp

        source = random_source(len(z0), z0.device, seed=seed, rows=rows)
        evaluations = itertools.count()

        def derivative(t: float, flat: Any) -> Any:
            x = torch.as_tensor(flat, dtype=z0.dtype, device=z0.device).reshape(z0.shape)
            at = torch.full((len(x),), t, dtype=z0.dtype, device=z0.device)
            prediction, _ = self.xstart_model.predict(
                item_rep, x, at * self.time_scale, mask_seq, source.at_step(next(evaluations))
            )
            return self.velocity(prediction, z0, at[:, None]).cpu().numpy().reshape(-1)

        solution = solve_ivp(
            derivative,
            (self.eps, 1.0),
            z0.detach().cpu().numpy().reshape(-1),
            method="RK45",
            rtol=1e-5,
            atol=1e-5,
        )
        x = torch.as_tensor(solution.y[:, -1], dtype=z0.dtype, device=z0.device)
        return x.reshape(z0.shape), int(solution.nfev)


class StartingPoint(NamedTuple):
    """Where inference starts from, as the C++ call names it: 'noise', 'anchor' or 'anchor in
    history', whose channels are kept with chance `keep`."""

    name: str
    keep: float = 1.0


class FMRecommender(nn.Module):
    """The joint model: item embeddings around the core (published name: ``Att_FM_model``).

    Args:
        fm: the core.
        args: the published argparse namespace, a mapping, or `FMRecConfig`.
    """

    CORE = "fm"  # the core's name in the state dict
    config_class: type[FMRecConfig] = FMRecConfig
    core_class: type[FMRec] = FMRec
    fm: FMRec

    def __init__(self, fm: FMRec, args: Any) -> None:
        super().__init__()
        config = self.config_class.coerce(args)
        self.config = config
        self.item_num = config.item_num
        self.emb_dim = config.hidden_size
        self.loss_recon_mask_ratio = config.mask_ratio
        self.item_embeddings = ItemEmbedding(config.item_num, config.hidden_size)
        self.embed_dropout = nn.Dropout(config.emb_dropout)
        self.position_embeddings = nn.Embedding(config.max_len, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size)
        self.add_module(self.CORE, fm)

    @classmethod
    def from_config(cls, config: Any) -> Self:
        """Build the core and the joint model."""
        return cls(cls.core_class(config), config)

    def check_sequence(self, sequence: Tensor) -> None:
        """`sequence` must be int64 [B, L] with ids 0 .. V-1 (ids are looked at on CPU only).

        Raises:
            TypeError, ValueError: names what was given.
        """
        sizes: dict[str, int] = {}
        check_shape("sequence", sequence, "B L", sizes)
        check_integer("sequence", sequence)
        if sizes["L"] == 0:
            raise ValueError(f"sequence must have L >= 1, got shape {tuple(sequence.shape)}")
        check_range("item id in sequence", sequence, 0, self.item_num)

    def check_tag(self, tag: Tensor | None, batch: int) -> Tensor:
        """`tag` must be int64 [B, 1] with ids 1 .. V-1 (ids are looked at on CPU only).

        Raises:
            TypeError, ValueError: names what was given.
        """
        if tag is None:
            raise TypeError("training needs targets [B, 1], got None")
        check_shape("tag", tag, "B 1", {"B": batch, "1": 1})
        check_integer("tag", tag)
        check_range("target", tag, 1, self.item_num)
        return tag

    def embed(self, sequence: Tensor, drop: Drop = no_drop) -> tuple[Tensor, Tensor]:
        """(embedded history [B, L, D], mask [B, L])."""
        return self._prepare(self.item_embeddings(sequence), sequence, drop)

    def _prepare(self, looked_up: Tensor, sequence: Tensor, drop: Drop) -> tuple[Tensor, Tensor]:
        mask, norm, p = (sequence > 0).to(looked_up.dtype), self.LayerNorm, self.embed_dropout.p
        if isinstance(drop, StreamDropout) and dropout_norm_joins(looked_up):
            e = dropout_layer_norm(
                looked_up,
                norm.weight,
                norm.bias,
                p,
                seed=drop.seed,
                rows=drop.rows,
                site=EMBEDDING_SITE,
            )
            return e, mask
        return norm(drop(looked_up, p, EMBEDDING_SITE)), mask

    def start(
        self, item_rep: Tensor, mask_seq: Tensor, source: RandomSource, draws: TrainingDraws
    ) -> Tensor:
        """Where inference starts from: [B, D]."""
        return source.start(self.emb_dim) if draws.z0 is None else draws.z0

    def starts_from(self) -> StartingPoint:
        """What `start` draws in evaluation."""
        return StartingPoint("noise")

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
            draws: explicit random numbers.
            seed, rows: key the noise stream; None draws a seed and names the rows 0 .. B-1.

        Returns:
            training: (loss_recon, x0 [B, D], t repeated [B, D], t [B], loss_fm, z0 [B, D]);
            inference: (None, x1 [B, D], None, None, None, z0 [B, D]).

        Raises:
            TypeError, ValueError: dtypes or shapes are off, or (on CPU) an id is out of range.
        """
        self.check_sequence(sequence)
        source = random_source(sequence.shape[0], sequence.device, seed=seed, rows=rows)
        draws = draws or TrainingDraws()
        drop = source.dropout() if self.training else no_drop
        if not train_flag:
            e, mask = self.embed(sequence, drop)
            z0 = self.start(e, mask, source, draws)
            x1 = self.fm.integrate(
                e, mask, z0, seed=source.seed, rows=source.rows, noise=draws.noise
            )
            return None, x1, None, None, None, z0
        tag = self.check_tag(tag, sequence.shape[0])
        history, item_tag = look_up(self.item_embeddings.weight, sequence, tag[:, 0])
        e, mask = self._prepare(history, sequence, drop)
        prediction, tapped, t, z0, x_t = self.fm.flow_step(e, item_tag, mask, source, draws)
        if self.fm.target == "velocity":
            at = t[:, None]
            wanted = flow.velocity(item_tag, z0, at, self.fm.trajectory)
            loss_fm = self.loss_FM_mse(prediction, wanted)
            x0 = flow.data_from_velocity(prediction, x_t, at, self.fm.trajectory)
        else:
            loss_fm = self.loss_FM_mse(prediction, item_tag)
            x0 = prediction
        network = self.fm.xstart_model
        weight, bias = network.decoder_output()
        loss_recon = history_loss(
            network.decoder_hidden(tapped),
            weight,
            bias,
            sequence,
            mask_ratio=self.loss_recon_mask_ratio,
            cells=draws.cells,
            seed=source.seed,
        )
        return loss_recon, x0, t[:, None].repeat(1, self.emb_dim), t, loss_fm, z0

    def fm_rep_pre(self, rep: Tensor) -> Tensor:
        """Scores of all items: [B, D] -> [B, V]."""
        return rep @ self.item_embeddings.weight.T

    def loss_fm_ce(self, rep: Tensor, tag: Tensor) -> Tensor:
        """Cross-entropy of the scores against `tag` [B, 1] or [B] (eq. 20)."""
        return item_cross_entropy(rep, self.item_embeddings.weight, tag.reshape(-1))

    def loss_FM_mse(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean squared error (eq. 13)."""
        return F.mse_loss(a, b)

    def routing_rep_pre(self, rep: Tensor) -> Tensor:
        """Negative squared distances to all items, at most 0: [B, D] -> [B, V]."""
        items = self.item_embeddings.weight
        distance = (rep**2).sum(1, keepdim=True) + (items**2).sum(1) - 2 * rep @ items.T
        return -distance.clamp(min=0)

    def reverse(self, item_rep: Tensor, z0: Tensor, mask_seq: Tensor) -> Tensor:
        """The core's sampler on an embedded history."""
        return self.fm.reverse_p_sample_rf(item_rep, z0, mask_seq)
