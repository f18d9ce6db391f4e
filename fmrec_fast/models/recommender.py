"""The joint model: item embeddings around FMRec's core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fmrec_fast import flow
from fmrec_fast.config import FMRecConfig
from fmrec_fast.models.blocks import LayerNorm
from fmrec_fast.models.fmrec import FMRec, TrainingDraws
from fmrec_fast.models.tables import ItemEmbedding, look_up
from fmrec_fast.ops import StreamDropout, dropout_layer_norm, history_loss, item_cross_entropy
from fmrec_fast.ops._checks import check_integer, check_range, check_shape
from fmrec_fast.ops.dropout_layer_norm import joins as dropout_norm_joins
from fmrec_fast.randomness import RandomSource, random_source
from fmrec_fast.reference.encoder import EMBEDDING_SITE, Drop, no_drop

if TYPE_CHECKING:
    from typing_extensions import Self


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
