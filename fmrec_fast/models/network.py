"""The network that FMRec trains, under its published parameter names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fmrec_fast.config import FMRecConfig
from fmrec_fast.models.blocks import HiddenLinear, LayerNorm, TransformerStack, sinusoid
from fmrec_fast.models.tables import ItemLinear
from fmrec_fast.ops import noise_fusion
from fmrec_fast.randomness import RandomSource, random_source
from fmrec_fast.reference.encoder import dropout_sites, no_drop


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
