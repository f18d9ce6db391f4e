"""What a good PyTorch user makes of the published program: the peers (b) and (c).

Eager: lam is drawn on the device, sampling skips the decoder, the multi-hot matrix is scattered,
attention, norms and GELU are PyTorch's fused functions, Adam is fused (the caller's). Compiled:
the same under `torch.compile`. The published reformulations stay: every position of every block,
every decoder output in training, q steps one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fmrec_fast.reference.published import (
    PublishedBlock,
    PublishedNorm,
    PublishedRecommender,
    PublishedStack,
)


def layer_norm(x: Tensor, norm: PublishedNorm) -> Tensor:
    """The published norm as one call."""
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def block(x: Tensor, mask: Tensor, layers: PublishedBlock) -> Tensor:
    """One transformer block; zeroed queries attend uniformly, as the published mask has it."""
    attention, ffn = layers.attention, layers.feed_forward
    p = layers.dropout.p if layers.training else 0.0
    batch, length, width = x.shape
    normed = layer_norm(x, layers.input_sublayer.norm)
    q, k, v = (layer(normed) for layer in attention.linear_layers)
    q, k, v = (
        part.view(batch, length, attention.heads, attention.width).transpose(1, 2)
        for part in (q * mask[..., None], k, v)
    )
    mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
    mixed = attention.w_layer(mixed.transpose(1, 2).reshape(batch, length, width))
    x = x + layers.input_sublayer.dropout(mixed)
    inner = F.gelu(ffn.w_1(layer_norm(x, layers.output_sublayer.norm)), approximate="tanh")
    x = x + layers.output_sublayer.dropout(ffn.w_2(ffn.dropout(inner)))
    return layers.dropout(x)


def stack(x: Tensor, mask: Tensor, layers: PublishedStack) -> tuple[Tensor, Tensor]:
    """(last position after all blocks [B, D], last position of the decoder's block [B, D])."""
    tap = len(layers.transformer_blocks) - layers.last - 1
    for index, one in enumerate(layers.transformer_blocks):
        x = block(x, mask, one)
        if index == tap:
            tapped = x[:, -1]
    return x[:, -1], tapped


def multi_hot(sequence: Tensor, num_items: int) -> Tensor:
    """float32 [B, V], 1 at the items of each history; padding is none."""
    wanted = torch.zeros(sequence.shape[0], num_items, device=sequence.device)
    wanted.scatter_(1, sequence, 1.0)
    wanted[:, 0] = 0
    return wanted


def used_cells(wanted: Tensor, mask_ratio: float, negatives: Tensor | None = None) -> Tensor:
    """float32 [B, V], 1 at the ones and at the drawn (or given [N, 2]) zeros."""
    if negatives is None:
        zeros = (wanted.flatten() == 0).nonzero()[:, 0]
        count = min(len(zeros), int(int(wanted.sum()) * mask_ratio))
        flat = zeros[torch.randint(0, len(zeros), (count,), device=wanted.device)]
    else:
        flat = negatives[:, 0] * wanted.shape[1] + negatives[:, 1]
    used = wanted.clone()
    used.view(-1)[flat] = 1
    return used


def dense_history_loss(decoded: Tensor, wanted: Tensor, used: Tensor) -> Tensor:
    """The reconstruction loss over the whole [B, V] matrix."""
    return (((decoded - wanted) ** 2) * used).sum() / decoded.numel()


class Tuned(nn.Module):
    """The tuned program on a published model's parameters.

    Args:
        model: its parameters are shared, not copied.
        compile_mode: None is eager; else the mode of `torch.compile`.
    """

    def __init__(self, model: PublishedRecommender, compile_mode: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.graphs = compile_mode == "reduce-overhead"
        self._step: Callable[..., Tensor] = self.step
        self._losses: Callable[..., Tensor] = self.losses
        if compile_mode is not None:
            # Graphs of earlier cases would count against the limit of recompilations.
            torch.compiler.reset()
            self._step = torch.compile(self.step, mode=compile_mode, dynamic=False)
            self._losses = torch.compile(self.losses, mode=compile_mode, dynamic=False)

    def embed(self, sequence: Tensor) -> tuple[Tensor, Tensor]:
        """(embedded history, mask)."""
        e = self.model.embed_dropout(self.model.item_embeddings(sequence))
        return layer_norm(e, self.model.LayerNorm), (sequence > 0).float()

    def network(
        self, e: Tensor, x_t: Tensor, t: Tensor, mask: Tensor, lam: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(prediction [B, D], what the decoder reads [B, D]); `t` scaled, [B]."""
        network = self.model.fm.xstart_model
        half = e.shape[-1] // 2
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        angle = t[:, None] * frequencies
        emb_t = network.time_embed(torch.cat((torch.cos(angle), torch.sin(angle)), dim=-1))
        if lam is None:
            lam = network.delta + network.delta * torch.randn_like(e)
        last, tapped = stack(e + lam * (x_t + emb_t)[:, None], mask, network.att)
        return layer_norm(network.dropout(last), network.norm_fm_rep), tapped

    def step(
        self,
        e: Tensor,
        mask: Tensor,
        x: Tensor,
        z0: Tensor,
        t: Tensor,
        dt: Tensor,
        lam: Tensor | None,
    ) -> Tensor:
        """One Euler step; `dt` is a tensor so that the number of steps is not compiled in."""
        return x + (self.network(e, x, t, mask, lam)[0] - z0) * dt

    @torch.no_grad()
    def sample(
        self,
        sequence: Tensor,
        steps: int,
        *,
        z0: Tensor | None = None,
        lam: Tensor | None = None,
    ) -> Tensor:
        """The sampler of eq. 23: [B, D]."""
        e, mask = self.embed(sequence)
        if z0 is None:
            z0 = torch.randn_like(e[:, 0])
        eps = self.model.fm.eps
        times = torch.arange(steps, device=e.device) / steps * (1 - eps) + eps
        scaled = (times * (1 / eps - 1))[:, None].expand(steps, len(e)).contiguous()
        x, dt = z0, torch.full((), 1 / steps, device=e.device)
        for i in range(steps):
            if self.graphs:
                torch.compiler.cudagraph_mark_step_begin()
            given = None if lam is None else lam[i]
            x = self._step(e, mask, x, z0, scaled[i], dt, given)
            if self.graphs:  # a replayed graph writes to the same memory again
                x = x.clone()
        return x

    def losses(
        self,
        sequence: Tensor,
        tag: Tensor,
        wanted: Tensor,
        used: Tensor,
        z0: Tensor | None,
        t: Tensor | None,
        lam: Tensor | None,
    ) -> Tensor:
        """The objective, given the cells of the reconstruction loss."""
        model, core = self.model, self.model.fm
        e, mask = self.embed(sequence)
        item_tag = model.item_embeddings(tag[:, 0])
        if z0 is None:
            z0 = torch.randn_like(item_tag)
        if t is None:
            u = torch.rand(len(tag), device=tag.device)
            t = 1 - u - model.args.s_modsamp * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
            t = t * (1 - core.eps) + core.eps
        x_t = t[:, None] * item_tag + (1 - t[:, None]) * z0
        x0, tapped = self.network(e, x_t, t * (1 / core.eps - 1), mask, lam)
        loss_ce = F.cross_entropy(x0 @ model.item_embeddings.weight.T, tag[:, 0])
        loss_recon = dense_history_loss(core.xstart_model.decoder(tapped), wanted, used)
        args = model.args
        loss_fm = F.mse_loss(x0, item_tag)
        return loss_fm + args.Loss_Alpha * loss_ce + args.Loss_Beta * loss_recon

    def training_loss(
        self,
        sequence: Tensor,
        tag: Tensor,
        *,
        z0: Tensor | None = None,
        t: Tensor | None = None,
        lam: Tensor | None = None,
        negatives: Tensor | None = None,
    ) -> Tensor:
        """The objective; what is None is drawn. The cells are drawn outside the compiled part:
        their number depends on the data."""
        wanted = multi_hot(sequence, self.model.args.item_num)
        used = used_cells(wanted, self.model.args.mask_ratio, negatives)
        if self.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        return self._losses(sequence, tag, wanted, used, z0, t, lam)
