"""FMRec (IJCAI 2025): the flow-matching core."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fmrec_fast import flow, packing, picard
from fmrec_fast.config import FMRecConfig
from fmrec_fast.models.network import XStartModel
from fmrec_fast.ops import euler_sampler, picard_sweep
from fmrec_fast.ops.euler_sampler import SamplerWeights
from fmrec_fast.ops.linear import check_precision
from fmrec_fast.randomness import PublishedSource, RandomSource, random_source
from fmrec_fast.reference import euler_sampler as reference_sampler
from fmrec_fast.reference.history_loss import Cells

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
