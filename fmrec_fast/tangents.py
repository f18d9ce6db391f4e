"""Values and tangents together, with gradients written out: the forward-mode rules of what has no
kernel for them.

Each function computes ``f(x)`` and ``f'(x) dx`` at once and differentiates both in reverse by
hand, keeping no more than its inputs. On a CPU it goes through a cache's worth of rows at a time:
PyTorch's own chain would write and read some dozens of tensors of the full size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fmrec_fast.reference.rms_norm import RMS_EPS

CPU_FLOATS = 1 << 16  # of a chunk's temporaries
Drop = Callable[[Tensor, slice], Tensor]  # (x, its rows of the batch) -> x times the mask's factors


def _row_chunks(x: Tensor) -> Iterator[slice]:
    return _chunks(x.shape[0], x.shape[1], x.device)


def _chunks(rows: int, floats_per_row: int, device: torch.device) -> Iterator[slice]:
    size = max(rows, 1)
    if device.type == "cpu":
        size = max(1, CPU_FLOATS // max(floats_per_row, 1))
    return (slice(i, i + size) for i in range(0, rows, size))


def rms_norm(x: Tensor, weight: Tensor, dx: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """``reference.rms_norm`` and its derivative along `dx` (None: without); x, dx [..., D]."""
    flat = x.reshape(-1, x.shape[-1])
    if dx is None:
        return _RmsNorm.apply(flat, weight, None)[0].view(x.shape), None
    y, dy = _RmsNorm.apply(flat, weight, dx.reshape(flat.shape))
    return y.view(x.shape), dy.view(x.shape)


class _RmsNorm(torch.autograd.Function):
    """With n = x s, s = (mean(x^2) + eps)^(-1/2): y = n w, dy = s (dx - n mean(n dx)) w."""

    @staticmethod
    def forward(ctx, x, weight, dx):
        ctx.save_for_backward(x, weight, dx)
        y = torch.empty_like(x)
        dy = None if dx is None else torch.empty_like(x)
        for part in _row_chunks(x):
            s = torch.rsqrt(x[part].square().mean(-1, keepdim=True) + RMS_EPS)
            n = x[part] * s
            torch.mul(n, weight, out=y[part])
            if dy is not None:
                m = (n * dx[part]).mean(-1, keepdim=True)
                torch.mul((dx[part] - n * m).mul_(s), weight, out=dy[part])
        return y, dy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_y, g_dy):
        x, weight, dx = ctx.saved_tensors
        g_x, g_dx = torch.empty_like(x), None if dx is None else torch.empty_like(x)
        g_weight = torch.zeros_like(weight)
        for part in _row_chunks(x):
            s = torch.rsqrt(x[part].square().mean(-1, keepdim=True) + RMS_EPS)
            n = x[part] * s
            a = g_y[part] * weight
            g_weight += (g_y[part] * n).sum(0)
            g_n = a
            if g_dx is not None:
                # dy = s (dx - n m') w with m' = mean(n dx); below, b = w g_dy.
                b, d = g_dy[part] * weight, dx[part]
                m = (n * d).mean(-1, keepdim=True)
                u = d - n * m
                g_weight += (g_dy[part] * u * s).sum(0)
                bn = (b * n).mean(-1, keepdim=True)
                # s as a factor of dy; n through u and through m'.
                g_s = (b * u).mean(-1, keepdim=True)
                g_dx[part] = s * (b - n * bn)
                g_n = a - s * (b * m + d * bn) - n * g_s * s
            # x through n: s (g - n mean(g n)); the term of s itself is in the last summand above,
            # since ds/dx = -s^2 n / D.
            g_x[part] = s * (g_n - n * (a * n).mean(-1, keepdim=True))
            if g_dx is not None:
                inner = (g_n - a + n * g_s * s) * n
                g_x[part] -= s * n * inner.mean(-1, keepdim=True)
        return g_x, g_weight, g_dx


def gelu(x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """Tanh-GELU and its derivative along `dx`."""
    return _Gelu.apply(x, dx)


def _gelu_derivatives(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """gelu(x), gelu'(x), gelu''(x)."""
    k, c = math.sqrt(2 / math.pi), 0.044715
    square = x.square()
    tanh = torch.tanh(x * (k + k * c * square))
    slope = k + 3 * k * c * square  # of tanh's argument
    bell = 1 - tanh.square()
    half = 0.5 * (1 + tanh)
    first = half + 0.5 * x * bell * slope
    second = bell * (slope + x * (3 * k * c * x - tanh * slope.square()))
    return x * half, first, second


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dx):
        ctx.save_for_backward(x, dx)
        y, dy = torch.empty_like(x), torch.empty_like(x)
        flat = [t.view(-1, x.shape[-1]) for t in (x.contiguous(), dx.contiguous(), y, dy)]
        for part in _row_chunks(flat[0]):
            value, first, _ = _gelu_derivatives(flat[0][part])
            flat[2][part] = value
            torch.mul(first, flat[1][part], out=flat[3][part])
        return y, dy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_y, g_dy):
        x, dx = ctx.saved_tensors
        g_x, g_dx = torch.empty_like(x), torch.empty_like(x)
        rows = [t.reshape(-1, x.shape[-1]) for t in (x, dx, g_y, g_dy)]
        out = [t.view(-1, x.shape[-1]) for t in (g_x, g_dx)]
        for part in _row_chunks(rows[0]):
            _, first, second = _gelu_derivatives(rows[0][part])
            torch.mul(first, rows[3][part], out=out[1][part])
            out[0][part] = first * rows[2][part] + second * rows[1][part] * rows[3][part]
        return g_x, g_dx


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """``reference.rotary.rotate`` of the queries and keys among `qkv` [B, L, 3D]; cos, sin
    [L, W / 2]."""
    return _Rotate.apply(qkv, cos, sin, num_heads)


def _rotated(qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    cos, sin = cos[:, None, None], sin[:, None, None]
    batch, length, width = qkv.shape
    for part in _chunks(batch, length * width, qkv.device):
        pairs = [x[part].unflatten(-1, (3, num_heads, 2, -1)) for x in (qkv, out)]
        low, high = pairs[0][:, :, :2].unbind(-2)  # [b, L, 2, H, W / 2]
        turned_low, turned_high = pairs[1][:, :, :2].unbind(-2)
        torch.mul(low, cos, out=turned_low).addcmul_(high, sin, value=-1)
        torch.mul(high, cos, out=turned_high).addcmul_(low, sin)
        pairs[1][:, :, 2] = pairs[0][:, :, 2]
    return out


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, num_heads):
        ctx.save_for_backward(cos, sin)
        ctx.num_heads = num_heads
        return _rotated(qkv, cos, sin, num_heads)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin, ctx.num_heads), None, None, None


def attention(
    qkv: Tensor, d_qkv: Tensor, query_scale: Tensor, num_heads: int, drop: Drop | None
) -> tuple[Tensor, Tensor]:
    """``reference.attention`` and its derivative along `d_qkv`: [B, L, 3D] -> [B, L, D] each.

    `drop` multiplies probabilities [B, H * L, L] by the factors of its mask; None is no dropout.
    """
    return _Attention.apply(qkv, d_qkv, query_scale, num_heads, drop)


def _heads(x: Tensor, scale: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries times their scale, keys and values [b, H, L, W]."""
    q, k, v = x.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return q * scale[:, None, :, None], k, v


def _dropped(x: Tensor, drop: Drop | None, part: slice) -> Tensor:
    return x if drop is None else drop(x.flatten(1, 2), part).view(x.shape)


class _Attention(torch.autograd.Function):
    """S = q k', T = dS = dq k' + q dk'; P = softmax(S), dP = P (T - sum(P T));
    out = M P v, d out = M dP v + M P dv, for the mask's factors M."""

    @staticmethod
    def probabilities(q, k, dq, dk):
        p = torch.softmax(q @ k.mT, dim=-1)
        t = torch.baddbmm((dq @ k.mT).flatten(0, 1), q.flatten(0, 1), dk.flatten(0, 1).mT).view(
            p.shape
        )
        t -= (p * t).sum(-1, keepdim=True)  # T - sum(P T)
        return p, t

    @staticmethod
    def forward(ctx, qkv, d_qkv, query_scale, num_heads, drop):
        ctx.save_for_backward(qkv, d_qkv, query_scale)
        ctx.num_heads, ctx.drop = num_heads, drop
        batch, length, width = qkv.shape
        out = qkv.new_empty(batch, length, width // 3)
        d_out = torch.empty_like(out)
        for part in _chunks(batch, num_heads * length * length, qkv.device):
            scale = query_scale[part]
            q, k, v = _heads(qkv[part], scale, num_heads)
            dq, dk, dv = _heads(d_qkv[part], scale, num_heads)
            p, t = _Attention.probabilities(q, k, dq, dk)
            dropped, d_dropped = (_dropped(x, drop, part) for x in (p, t.mul_(p)))
            out[part] = (dropped @ v).transpose(1, 2).flatten(2)
            d_out[part] = (d_dropped @ v + dropped @ dv).transpose(1, 2).flatten(2)
        return out, d_out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g_out, g_d_out):
        qkv, d_qkv, query_scale = ctx.saved_tensors
        num_heads, drop = ctx.num_heads, ctx.drop
        batch, length, _ = qkv.shape
        g_qkv, g_d_qkv = torch.empty_like(qkv), torch.empty_like(d_qkv)
        for part in _chunks(batch, num_heads * length * length, qkv.device):
            scale = query_scale[part]
            q, k, v = _heads(qkv[part], scale, num_heads)
            dq, dk, dv = _heads(d_qkv[part], scale, num_heads)
            p, t = _Attention.probabilities(q, k, dq, dk)
            go, gdo = (
                g[part].unflatten(-1, (num_heads, -1)).transpose(1, 2) for g in (g_out, g_d_out)
            )
            dropped, d_dropped = (_dropped(x, drop, part) for x in (p, t * p))
            g_v = dropped.mT @ go + d_dropped.mT @ gdo
            g_dv = dropped.mT @ gdo
            g_p = _dropped(go @ v.mT + gdo @ dv.mT, drop, part)
            g_dp = _dropped(gdo @ v.mT, drop, part)
            # dP = P (T - r), r = sum(P T): T's own mean cancels in what P receives.
            mean = (g_dp * p).sum(-1, keepdim=True)
            g_t = (g_dp - mean) * p
            g_p += (g_dp - mean) * t
            g_s = (g_p - (g_p * p).sum(-1, keepdim=True)) * p
            g_q, g_dq = g_s @ k + g_t @ dk, g_t @ k
            g_k, g_dk = g_s.mT @ q + g_t.mT @ dq, g_t.mT @ q
            for target, parts in ((g_qkv, (g_q, g_k, g_v)), (g_d_qkv, (g_dq, g_dk, g_dv))):
                view = target[part].unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
                torch.mul(parts[0], scale[:, None, :, None], out=view[0])
                view[1], view[2] = parts[1], parts[2]
        return g_qkv, g_d_qkv, None, None, None
