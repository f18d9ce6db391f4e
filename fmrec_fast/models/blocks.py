"""Parameter holders of the transformer, under the published names.

The arithmetic lives in the ops; these modules initialise the parameters, name them as published
checkpoints do, and hand them over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fmrec_fast.ops.encoder import encoder
from fmrec_fast.ops.linear import has_tiles, linear
from fmrec_fast.reference.encoder import (
    FMREC,
    NORM_EPS,
    BlockWeights,
    CrossWeights,
    Drop,
    Paths,
    layer_norm,
    no_drop,
    no_paths,
)


class HiddenLinear(nn.Linear):
    """``nn.Linear`` of a hidden layer; in training by the op `linear`, where there is a reason."""

    def __init__(self, inner: int, outer: int, precision: str) -> None:
        super().__init__(inner, outer)
        self.precision = precision  # in training

    def forward(self, x: Tensor) -> Tensor:
        # Without tiles PyTorch's product of a batch's rows and a weight as large is the faster one.
        faster = x.device.type == "cpu" and has_tiles()
        if self.training and (faster or self.precision != "float32"):
            return linear(x, self.weight, self.bias, precision=self.precision)
        return super().forward(x)


class LayerNorm(nn.Module):
    """Mean and biased variance over the last dimension, eps inside the root."""

    def __init__(self, hidden_size: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class SublayerConnection(nn.Module):
    """The norm in front of a sublayer."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = LayerNorm(hidden_size)


class MultiHeadedAttention(nn.Module):
    """Query, key, value and output projections."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear_layers = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(3))
        self.w_layer = nn.Linear(hidden_size, hidden_size)
        nn.init.xavier_normal_(self.w_layer.weight)


class FeedForward(nn.Module):
    """Two projections around a tanh-GELU."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.w_1 = nn.Linear(hidden_size, 4 * hidden_size)
        self.w_2 = nn.Linear(4 * hidden_size, hidden_size)
        for layer in (self.w_1, self.w_2):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)


class TransformerBlock(nn.Module):
    """One pre-norm block."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.attention = MultiHeadedAttention(hidden_size)
        self.feed_forward = FeedForward(hidden_size)
        self.input_sublayer = SublayerConnection(hidden_size)
        self.output_sublayer = SublayerConnection(hidden_size)

    def weights(self) -> BlockWeights:
        """The parameters, in the order that the ops read."""
        parts: list[Tensor] = []
        projections: list[nn.Linear] = list(self.attention.linear_layers)  # type: ignore[arg-type]
        layers: tuple[LayerNorm | nn.Linear, ...] = (
            self.input_sublayer.norm,
            *projections,
            self.attention.w_layer,
            self.output_sublayer.norm,
            self.feed_forward.w_1,
            self.feed_forward.w_2,
        )
        for layer in layers:
            parts += (layer.weight, layer.bias)
        return BlockWeights(*parts)


class TransformerStack(nn.Module):
    """All blocks; `forward` is the op `encoder`."""

    variant = FMREC

    def __init__(
        self,
        hidden_size: int,
        num_blocks: int,
        num_heads: int,
        attention: str,
        precision: str = "float32",
    ) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(hidden_size) for _ in range(num_blocks)
        )
        self.num_heads, self.attention = num_heads, attention
        self.precision = precision  # of the linear layers in training

    def weights(self) -> list[BlockWeights]:
        """The parameters of all blocks."""
        blocks: list[TransformerBlock] = list(self.transformer_blocks)  # type: ignore[arg-type]
        return [block.weights() for block in blocks]

    def forward(
        self,
        x: Tensor,
        mask: Tensor,
        *,
        tap: int | None = None,
        drop: Drop = no_drop,
        p: float = 0.0,
        prune: bool = True,
        paths: Paths = no_paths,
        cross: Sequence[CrossWeights] | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        return encoder(
            x,
            mask,
            self.weights(),
            num_heads=self.num_heads,
            attention=self.attention,
            tap=tap,
            drop=drop,
            p=p,
            prune=prune,
            variant=self.variant,
            paths=paths,
            cross=cross,
            context=context,
            linear_precision=self.precision if self.training else "float32",
        )


def sinusoid(t: Tensor, width: int) -> Tensor:
    """concat(cos(t f), sin(t f)), f_j = exp(-ln(10000) j / (D/2)): [B] -> [B, D]."""
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device) / half
    angle = t[:, None].float() * torch.exp(-math.log(10000.0) * exponent)[None]
    return torch.cat((torch.cos(angle), torch.sin(angle)), dim=-1)
