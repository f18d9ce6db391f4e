"""The published Fave program, operation for operation: test oracle and benchmark peer.

Written from its specification, without any of this package's ops, on the parts of
`reference.published` that the two programs share: lam is drawn on the host and copied over, every
position of every block is computed, the decoder runs at every call, and the derivative of stage 2
is taken by ``torch.func.jvp`` through the whole network. State dicts interchange with
`fmrec_fast.FaveRecommender`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrec_fast.reference.published import (
    PublishedFeedForward,
    PublishedNorm,
    PublishedRecommender,
)


class PublishedRMSNorm(nn.Module):
    """x / root of the mean square, times a weight."""

    def __init__(self, hidden_size: int, eps: float = 1e-8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class PublishedRotary(nn.Module):
    """Half-split rotation by the position."""

    inv_freq: Tensor

    def __init__(self, width: int, base: float = 10000.0) -> None:
        super().__init__()
        self.register_buffer("inv_freq", 1.0 / base ** (torch.arange(0, width, 2).float() / width))

    def forward(self, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[2], device=x.device).type_as(self.inv_freq)
        angle = torch.einsum("i,j->ij", positions, self.inv_freq)
        angle = torch.cat((angle, angle), dim=-1)[None, None]
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
        return x * angle.cos() + turned * angle.sin()


class PublishedRotaryAttention(nn.Module):
    """Rotation, then the mask over query rows, if one is given."""

    def __init__(self, heads: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.width = heads, hidden_size // heads
        self.linear_layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.w_layer = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        self.rope = PublishedRotary(self.width)
        nn.init.xavier_normal_(self.w_layer.weight)

    def forward(self, queries: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        batch = queries.shape[0]
        q, k, v = (
            layer(x).view(batch, -1, self.heads, self.width).transpose(1, 2)
            for layer, x in zip(self.linear_layers, (queries, context, context))
        )
        scores = torch.matmul(self.rope(q), self.rope(k).transpose(-2, -1)) / math.sqrt(self.width)
        if mask is not None:
            rows = mask.unsqueeze(1).repeat(1, queries.shape[1], 1).unsqueeze(1).transpose(-2, -1)
            scores = scores.masked_fill(rows == 0, -1e9)
        # Softmax written out: PyTorch's own cannot be differentiated forwards, then backwards.
        powers = torch.exp(scores - scores.amax(-1, keepdim=True))
        probabilities = self.dropout(powers / powers.sum(-1, keepdim=True))
        mixed = torch.matmul(probabilities, v).transpose(1, 2).contiguous()
        return self.w_layer(mixed.view(batch, -1, self.heads * self.width))


class PublishedDropPath(nn.Module):
    """Drops whole samples of a branch."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        if factor is None:
            if self.rate == 0 or not self.training:
                return x
            keep = 1 - self.rate
            factor = torch.floor(keep + torch.rand(x.shape[0], device=x.device)) / keep
        return x * factor[:, None, None]


class PublishedFaveBlock(nn.Module):
    """Self-attention, cross-attention where the state asks for it, feed-forward."""

    def __init__(self, args: Any, rate: float) -> None:
        super().__init__()
        width, gate = args.hidden_size, max(args.hidden_size // 4, 8)
        self.gamma = nn.Parameter(torch.full((width,), float(args.gamma_init)))
        self.norm1 = PublishedRMSNorm(width)
        self.attention = PublishedRotaryAttention(4, width, args.dropout)
        self.norm2 = PublishedRMSNorm(width)
        self.cross_attention = PublishedRotaryAttention(4, width, args.dropout)
        self.norm3 = PublishedRMSNorm(width)
        self.feed_forward = PublishedFeedForward(width, args.dropout)
        self.se_relu = nn.Linear(width, gate, bias=False)
        self.se_weight1 = nn.Linear(gate, width, bias=False)
        self.se_weight2 = nn.Linear(gate, width, bias=False)
        self.dropout = nn.Dropout(args.dropout)
        self.drop_path = PublishedDropPath(rate)

    def forward(
        self, x: Tensor, c: Tensor, mask: Tensor, state: str, paths: Tensor | None
    ) -> Tensor:
        given = (None, None, None) if paths is None else paths
        normed = self.norm1(x)
        x = x + self.drop_path(self.dropout(self.attention(normed, normed, mask)), given[0])
        if state != "pretrain":
            cross = self.dropout(self.cross_attention(self.norm2(x), c, None))
            s = F.relu(self.se_relu((x + cross)[:, -1:]))
            gates = torch.softmax(torch.stack((self.se_weight1(s), self.se_weight2(s))), dim=0)
            fused = x * gates[0] + cross * gates[1]
            x = x + self.drop_path(self.gamma * (fused - x), given[1])
        return x + self.drop_path(self.dropout(self.feed_forward(self.norm3(x))), given[2])


class PublishedFaveStack(nn.Module):
    """All blocks; keeps every block's output."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        rates = torch.linspace(0, args.drop_path_rate, args.num_blocks).tolist()
        self.transformer_blocks = nn.ModuleList(PublishedFaveBlock(args, rate) for rate in rates)
        self.last = args.last

    def forward(
        self, x: Tensor, c: Tensor, mask: Tensor, state: str, paths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        outputs = []
        for index, block in enumerate(self.transformer_blocks):
            x = block(x, c, mask, state, None if paths is None else paths[index])
            outputs.append(x)
        return x, outputs[len(outputs) - self.last - 1]


def time_embedding(width: int) -> nn.Sequential:
    """Linear, SiLU, Linear."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width))


class PublishedFaveNetwork(nn.Module):
    """`xstart_model`."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        width = args.hidden_size
        first, second = getattr(args, "decoder_dims", (512, 2048))
        self.hidden_size, self.delta = width, args.lambda_uncertainty
        self.linear_item = nn.Linear(width, width)
        self.linear_xt = nn.Linear(width, width)
        self.linear_t = nn.Linear(width, width)
        self.t_time_embed = time_embedding(width)
        self.r_time_embed = time_embedding(width)
        self.fuse_linear = nn.Linear(3 * width, width)
        self.att = PublishedFaveStack(args)
        self.dropout = nn.Dropout(args.dropout)
        self.norm_fm_rep = PublishedNorm(width)
        self.decoder = nn.Sequential(
            nn.Linear(width, first),
            nn.Tanh(),
            nn.Linear(first, second),
            nn.Tanh(),
            nn.Linear(second, args.item_num),
        )

    def sinusoid(self, t: Tensor) -> Tensor:
        half = self.hidden_size // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angle = t[:, None].float() * frequencies.to(t.device)[None]
        return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)

    def forward(
        self,
        item_rep: Tensor,
        x_t: Tensor,
        t: Tensor,
        r: Tensor,
        mask_seq: Tensor,
        state: str = "pretrain",
        lam: Tensor | None = None,
        paths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        condition = self.t_time_embed(self.sinusoid(t)) + self.r_time_embed(self.sinusoid(r - t))
        if lam is None:
            full = torch.full(item_rep.shape, self.delta)
            lam = torch.normal(mean=full, std=full).to(item_rep.device)
        x = item_rep + lam * (x_t + condition).unsqueeze(1)
        x, encoded = self.att(x, item_rep, mask_seq, state, paths)
        x0 = self.norm_fm_rep(self.dropout(x))[:, -1, :]
        return x0, self.decoder(encoded[:, -1, :])


class PublishedFave(nn.Module):
    """The core."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.args, self.eps, self.sample_N = args, args.eps, args.sample_N
        self.xstart_model = PublishedFaveNetwork(args)

    def forward(
        self,
        item_rep: Tensor,
        item_tag: Tensor,
        mask_seq: Tensor,
        z0: Tensor | None = None,
        t: Tensor | None = None,
        lam: Tensor | None = None,
        paths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if z0 is None:
            z0 = torch.randn_like(item_tag)
        if t is None:
            u = torch.rand(item_tag.shape[0], device=item_tag.device)
            t = 1 - u - self.args.s_modsamp * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
            t = t * (1 - self.eps) + self.eps
        x_t = t[:, None] * item_tag + (1 - t[:, None]) * z0
        scaled = t * (1 / self.eps - 1)
        x0, decoded = self.xstart_model(
            item_rep, x_t, scaled, torch.ones_like(t), mask_seq, "pretrain", lam, paths
        )
        return x0, decoded, t[:, None].repeat(1, item_tag.shape[1]), t, z0

    @torch.no_grad()
    def euler_sampler(
        self,
        item_rep: Tensor,
        mask_seq: Tensor,
        z0: Tensor,
        stage: str = "pretrain",
        lam: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        steps, scale = self.sample_N if stage == "pretrain" else 1, 1 / self.eps - 1
        x, ones = z0.clone(), torch.ones(z0.shape[0], device=z0.device)
        for i in range(steps):
            t = ones * (i / steps * (1 - self.eps) + self.eps)
            given = None if lam is None else lam[i]
            pred, _ = self.xstart_model(
                item_rep, x, t * scale, ones * scale, mask_seq, "pretrain", given
            )
            x = x + (pred - z0) / steps
        return x, steps


class PublishedFaveRecommender(nn.Module):
    """The joint model."""

    recon_loss: Any = PublishedRecommender.recon_loss

    def __init__(self, fave: PublishedFave, args: Any) -> None:
        super().__init__()
        self.args, self.stage = args, "pretrain"
        self.item_embeddings = nn.Embedding(args.item_num, args.hidden_size)
        self.embed_dropout = nn.Dropout(args.emb_dropout)
        self.position_embeddings = nn.Embedding(args.max_len, args.hidden_size)
        self.LayerNorm = PublishedNorm(args.hidden_size)
        self.fave = fave

    @classmethod
    def from_config(cls, args: Any) -> PublishedFaveRecommender:
        return cls(PublishedFave(args), args)

    def switch_to_finetune(self) -> None:
        self.stage = "finetune"
        self.item_embeddings.weight.requires_grad_(False)
        self.position_embeddings.weight.requires_grad_(False)

    def anchored(
        self,
        item_rep: Tensor,
        mask: Tensor,
        ratio: float,
        anchor: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        rows = torch.arange(len(mask), device=mask.device)
        if anchor is None:
            count = mask.sum(1)
            anchor = torch.floor(torch.rand(len(mask), device=mask.device) * count).long()
            anchor = torch.minimum(anchor, (count - 1).clamp(min=0).long())
        if keep is None:
            keep = torch.bernoulli(torch.full_like(item_rep[:, 0], ratio))
        return keep * item_rep[rows, anchor]

    def forward(
        self,
        sequence: Tensor,
        tag: Tensor | None,
        train_flag: bool = True,
        *,
        z0: Tensor | None = None,
        t: Tensor | None = None,
        r: Tensor | None = None,
        anchor: Tensor | None = None,
        keep: Tensor | None = None,
        lam: Tensor | None = None,
        negatives: Tensor | None = None,
        paths: Tensor | None = None,
    ) -> tuple:
        args = self.args
        e = self.LayerNorm(self.embed_dropout(self.item_embeddings(sequence)))
        mask = (sequence > 0).float()
        if not train_flag or tag is None:
            if z0 is None and self.stage == "pretrain":
                z0 = torch.randn(e.shape[0], e.shape[2], device=e.device)
            if z0 is None:
                z0 = self.anchored(e, mask, args.infer_mask_ratio, anchor, keep)
            x1, _ = self.fave.euler_sampler(e, mask, z0, self.stage, lam)
            return None, x1, None, None, None, z0
        item_tag = self.item_embeddings(tag.squeeze(-1))
        if self.stage == "pretrain":
            x0, decoded, _, _, _ = self.fave(e, item_tag, mask, z0, t, lam, paths)
            loss = ((x0 - item_tag) ** 2).mean()
            loss = loss + args.loss_pretrain_weight * self.recon_loss(decoded, sequence, negatives)
            return loss, x0, self.stage, None, None, None
        if t is None:
            t = torch.rand(len(e), device=e.device)
        if r is None:
            r = t + (1 - t) * torch.rand(len(e), device=e.device)
            r = torch.where(torch.rand(len(e), device=e.device) < args.mask_end, 1.0, r)
        z_a = self.anchored(e, mask, args.train_mask_ratio, anchor, keep)
        z_t = t[:, None] * item_tag + (1 - t[:, None]) * z_a
        v, scale = item_tag - z_a, 1 / self.fave.eps - 1
        network = self.fave.xstart_model

        def f(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return network(e, z, scale * t, scale * r, mask, "pretrain", lam, paths)[0]

        along = (v, torch.ones_like(t), torch.zeros_like(r))
        derivative: Any = torch.func.jvp(f, (z_t, t, r), along)
        u, dudt = derivative
        x1 = z_t + (1 - t[:, None]) * u
        recon = self.recon_loss(network.decoder(x1), sequence, negatives)
        loss = ((u - v) ** 2).mean() + args.loss_aux_weight * recon
        return loss + args.loss_straight_weight * (dudt**2).mean(), x1, None, None, None, None

    def fave_rep_pre(self, rep: Tensor) -> Tensor:
        return torch.matmul(rep, self.item_embeddings.weight.t())

    def loss_fave_tat(self, rep: Tensor, tag: Tensor) -> Tensor:
        return F.cross_entropy(self.fave_rep_pre(rep), tag.squeeze(-1))

    def training_loss(self, sequence: Tensor, tag: Tensor, **draws: Tensor) -> Tensor:
        """The stage's loss + alpha * loss_ce."""
        loss, rep, *_ = self(sequence, tag, **draws)
        return loss + self.args.Loss_Alpha * self.loss_fave_tat(rep, tag)
