"""The published FMRec program, operation for operation: test oracle and benchmark peer.

Written from its specification, without any of this package's ops, so that it can contradict
them: lam is drawn on the host at every call and copied over, the decoder runs at every sampling
step, the multi-hot matrix is built row by row, the zero cells are listed one by one. State dicts
interchange with `fmrec_fast.FMRecommender`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PublishedNorm(nn.Module):
    """Layer norm written out."""

    def __init__(self, hidden_size: int, eps: float = 1e-12) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = (x - mean).pow(2).mean(-1, keepdim=True)
        return self.weight * (x - mean) / torch.sqrt(variance + self.eps) + self.bias


class PublishedSublayer(nn.Module):
    """x + drop(sublayer(norm(x)))."""

    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.norm = PublishedNorm(hidden_size)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, sublayer) -> Tensor:
        return x + self.dropout(sublayer(self.norm(x)))


class PublishedAttention(nn.Module):
    """Scores of padded query rows are set to -1e9 throughout."""

    def __init__(self, heads: int, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.width = heads, hidden_size // heads
        self.linear_layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.w_layer = nn.Linear(hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        nn.init.xavier_normal_(self.w_layer.weight)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch = x.shape[0]
        q, k, v = (
            layer(x).view(batch, -1, self.heads, self.width).transpose(1, 2)
            for layer in self.linear_layers
        )
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.width)
        rows = mask.unsqueeze(1).repeat(1, x.shape[1], 1).unsqueeze(1).transpose(-2, -1)
        scores = scores.masked_fill(rows == 0, -1e9)
        probabilities = self.dropout(F.softmax(scores, dim=-1))
        mixed = torch.matmul(probabilities, v).transpose(1, 2).contiguous()
        return self.w_layer(mixed.view(batch, -1, self.heads * self.width))


class PublishedFeedForward(nn.Module):
    """Linear, tanh-GELU, dropout, Linear."""

    def __init__(self, hidden_size: int, dropout: float) -> None:
        super().__init__()
        self.w_1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.w_2 = nn.Linear(4 * hidden_size, hidden_size)
        self.dropout = nn.Dropout(dropout)
        for layer in (self.w_1, self.w_2):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        h = self.w_1(x)
        gelu = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h.pow(3))))
        return self.w_2(self.dropout(gelu))


class PublishedBlock(nn.Module):
    """One transformer block."""

    def __init__(self, hidden_size: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = PublishedAttention(heads, hidden_size, dropout)
        self.feed_forward = PublishedFeedForward(hidden_size, dropout)
        self.input_sublayer = PublishedSublayer(hidden_size, dropout)
        self.output_sublayer = PublishedSublayer(hidden_size, dropout)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.input_sublayer(x, lambda normed: self.attention(normed, mask))
        x = self.output_sublayer(x, self.feed_forward)
        return self.dropout(x)


class PublishedStack(nn.Module):
    """All blocks; keeps every block's output."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(
            PublishedBlock(args.hidden_size, 4, args.dropout) for _ in range(args.num_blocks)
        )
        self.last = args.last

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        outputs = []
        for block in self.transformer_blocks:
            x = block(x, mask)
            outputs.append(x)
        return x, outputs[len(outputs) - self.last - 1]


class PublishedNetwork(nn.Module):
    """`xstart_model`."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        width = args.hidden_size
        first, second = getattr(args, "decoder_dims", (512, 2048))
        self.hidden_size, self.delta = width, args.lambda_uncertainty
        self.linear_item = nn.Linear(width, width)
        self.linear_xt = nn.Linear(width, width)
        self.linear_t = nn.Linear(width, width)
        self.time_embed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, width)
        )
        self.fuse_linear = nn.Linear(3 * width, width)
        self.att = PublishedStack(args)
        self.dropout = nn.Dropout(args.dropout)
        self.norm_fm_rep = PublishedNorm(width)
        self.decoder = nn.Sequential(
            nn.Linear(width, first),
            nn.Tanh(),
            nn.Linear(first, second),
            nn.Tanh(),
            nn.Linear(second, args.item_num),
        )

    def forward(
        self, item_rep: Tensor, x_t: Tensor, t: Tensor, mask_seq: Tensor, lam: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        half = self.hidden_size // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / half)
        angle = t[:, None].float() * frequencies.to(t.device)[None]
        emb_t = self.time_embed(torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1))
        if lam is None:
            full = torch.full(item_rep.shape, self.delta)
            lam = torch.normal(mean=full, std=full).to(item_rep.device)
        x = item_rep + lam * (x_t + emb_t).unsqueeze(1)
        x, encoded = self.att(x, mask_seq)
        x0 = self.norm_fm_rep(self.dropout(x))[:, -1, :]
        return x0, self.decoder(encoded[:, -1, :])


class PublishedFMRec(nn.Module):
    """The core."""

    def __init__(self, args: Any) -> None:
        super().__init__()
        self.args, self.eps, self.sample_N = args, args.eps, args.sample_N
        self.xstart_model = PublishedNetwork(args)

    def forward(
        self,
        item_rep: Tensor,
        item_tag: Tensor,
        mask_seq: Tensor,
        z0: Tensor | None = None,
        t: Tensor | None = None,
        lam: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if z0 is None:
            z0 = torch.randn_like(item_tag)
        if t is None:
            if self.args.sampling_method != "mode":
                raise ValueError(f"the peer draws 'mode' only, got {self.args.sampling_method!r}")
            u = torch.rand(item_tag.shape[0], device=item_tag.device)
            t = 1 - u - self.args.s_modsamp * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
            t = t * (1 - self.eps) + self.eps
        x_t = t[:, None] * item_tag + (1 - t[:, None]) * z0
        scaled = t * (1 / self.eps - 1)
        x0, decoded = self.xstart_model(item_rep, x_t, scaled, mask_seq, lam)
        return x0, decoded, t[:, None].repeat(1, item_tag.shape[1]), t, z0

    @torch.no_grad()
    def euler_sampler(
        self, item_rep: Tensor, mask_seq: Tensor, z0: Tensor, lam: Tensor | None = None
    ) -> tuple[Tensor, int]:
        x = z0.clone()
        for i in range(self.sample_N):
            t = torch.ones(z0.shape[0], device=z0.device) * (
                i / self.sample_N * (1 - self.eps) + self.eps
            )
            given = None if lam is None else lam[i]
            pred, _ = self.xstart_model(item_rep, x, t * (1 / self.eps - 1), mask_seq, given)
            x = x + (pred - z0) / self.sample_N
        return x, self.sample_N


class PublishedRecommender(nn.Module):
    """The joint model."""

    def __init__(self, fm: PublishedFMRec, args: Any) -> None:
        super().__init__()
        self.args = args
        self.item_embeddings = nn.Embedding(args.item_num, args.hidden_size)
        self.embed_dropout = nn.Dropout(args.emb_dropout)
        self.position_embeddings = nn.Embedding(args.max_len, args.hidden_size)
        self.LayerNorm = PublishedNorm(args.hidden_size)
        self.fm = fm

    @classmethod
    def from_config(cls, args: Any) -> PublishedRecommender:
        return cls(PublishedFMRec(args), args)

    def recon_loss(
        self, decoded: Tensor, sequence: Tensor, negatives: Tensor | None = None
    ) -> Tensor:
        wanted = torch.zeros_like(decoded)
        for row in range(sequence.shape[0]):
            wanted[row, sequence[row]] = 1
        wanted[:, 0] = 0
        used = wanted.clone()
        if negatives is None:
            zeros = (wanted == 0).nonzero()
            count = min(len(zeros), int(int(wanted.sum()) * self.args.mask_ratio))
            negatives = zeros[torch.randint(0, len(zeros), (count,))]
        used[negatives[:, 0], negatives[:, 1]] = 1
        return (((decoded - wanted) ** 2) * used).sum() / decoded.numel()

    def forward(
        self,
        sequence: Tensor,
        tag: Tensor | None,
        train_flag: bool = True,
        *,
        z0: Tensor | None = None,
        t: Tensor | None = None,
        lam: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> tuple:
        e = self.LayerNorm(self.embed_dropout(self.item_embeddings(sequence)))
        mask = (sequence > 0).float()
        if train_flag and tag is not None:
            item_tag = self.item_embeddings(tag.squeeze(-1))
            x0, decoded, expanded, t, z0 = self.fm(e, item_tag, mask, z0, t, lam)
            loss_fm = ((x0 - item_tag) ** 2).mean()
            return self.recon_loss(decoded, sequence, negatives), x0, expanded, t, loss_fm, z0
        if z0 is None:
            z0 = torch.randn(e.shape[0], e.shape[2], device=e.device)
        x1, _ = self.fm.euler_sampler(e, mask, z0, lam)
        return None, x1, None, None, None, z0

    def fm_rep_pre(self, rep: Tensor) -> Tensor:
        return torch.matmul(rep, self.item_embeddings.weight.t())

    def loss_fm_ce(self, rep: Tensor, tag: Tensor) -> Tensor:
        return F.cross_entropy(self.fm_rep_pre(rep), tag.squeeze(-1))

    def training_loss(self, sequence: Tensor, tag: Tensor, **draws: Tensor) -> Tensor:
        """loss_fm + alpha * loss_ce + beta * loss_recon."""
        recon, x0, _, _, loss_fm, _ = self(sequence, tag, **draws)
        return (
            loss_fm
            + self.args.Loss_Alpha * self.loss_fm_ce(x0, tag)
            + (self.args.Loss_Beta * recon)
        )
