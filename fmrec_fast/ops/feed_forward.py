"""The second half of a transformer block in training, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fmrec_fast import extension, memory
from fmrec_fast.backend import Backend, choose, log_run
from fmrec_fast.forward_mode import NO_RULE, is_dual, is_wrapped
from fmrec_fast.ops._checks import check_float, check_shape, request_rows
from fmrec_fast.ops.linear import check_precision, multiplies
from fmrec_fast.reference import feed_forward as reference

# The C++ kernel's widths are multiples of it, and fewer rows than this are not worth packing for.
WIDTH, FEWEST_ROWS = 16, 64


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    p: float,
    *,
    seed: Tensor,
    rows: Tensor | None = None,
    site: int = 0,
    position_offset: int = 0,
    position_stride: int = 1,
    precision: str = "float32",
) -> Tensor:
    """Norm, feed-forward, residual and the dropouts of a block, in one pass.

    Equivalent PyTorch, each drop with a mask of its own (see `dropout`) at the sites `site`,
    ``site + 1`` and ``site + 2``::

        normed = F.layer_norm(x, (D,), norm_weight, norm_bias, 1e-12)
        inner = drop(F.gelu(F.linear(normed, w1, b1), approximate="tanh"))
        drop(x + drop(F.linear(inner, w2, b2)))

    The C++ kernels take a chunk of rows through all of it while it is in the cache, forward and
    backward: nothing as wide as the inner layer is ever in memory, and what is kept for the
    backward pass is `x` and the masks, a bit an element.

    Args:
        x: [B, P, D].
        norm_weight, norm_bias: [D].
        w1: [F, D]; b1: [F].
        w2: [D, F]; b2: [D].
        p: probability of dropping, in [0, 1).
        seed, rows, position_offset, position_stride: as in `dropout`.
        site: the first of the three sites.
        precision: of the products, as in `linear`. 'float32' on AMX is as close as PyTorch's own:
            sums of bfloat16s, or of float16s (`amx_fp16`), or, while no weight is far above the
            others, of integers, whose error is a part of a row's largest number.

    Returns:
        [B, P, D]. Differentiable in all that is floating point. On a CPU the results do not depend
        on the number of threads.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices or p are off.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B P D", sizes)
    check_shape("norm_weight", norm_weight, "D", sizes)
    check_shape("norm_bias", norm_bias, "D", sizes)
    check_shape("w1", w1, "F D", sizes)
    check_shape("b1", b1, "F", sizes)
    check_shape("w2", w2, "D F", sizes)
    check_shape("b2", b2, "D", sizes)
    weights = (norm_weight, norm_bias, w1, b1, w2, b2)
    names = ("norm_weight", "norm_bias", "w1", "b1", "w2", "b2")
    check_float(x=x, **dict(zip(names, weights, strict=True)))
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    check_precision(precision)
    rows = request_rows(rows, x.shape[0], x.device)
    declined = ""
    if is_dual(x, *weights):
        declined = NO_RULE
    elif not multiplies(precision):
        declined = f"without AMX its kernel multiplies in float32 only, got precision {precision!r}"
    elif not covers(sizes["D"], sizes["F"]):
        declined = (
            f"its kernel takes widths that are multiples of {WIDTH}, got {sizes['D']} and "
            f"{sizes['F']}"
        )
    elif not torch.compiler.is_compiling() and x.shape[0] * x.shape[1] < FEWEST_ROWS:
        declined = f"its kernel is for at least {FEWEST_ROWS} rows"
    constants = (site, position_offset, position_stride, p, precision)
    if choose("feed_forward", x, *weights, declined=declined) is Backend.CPP:
        if torch.compiler.is_compiling():
            return torch.ops.fmrec_fast.feed_forward(x, *weights, rows, seed, *constants)[0]
        return _FeedForward.apply(x, *weights, rows, seed, constants)
    return reference.feed_forward(
        x,
        *weights,
        p,
        seed=seed,
        rows=rows,
        site=site,
        position_offset=position_offset,
        position_stride=position_stride,
        precision=precision,
    )


def covers(width: int, inner: int) -> bool:
    """Whether the C++ kernel takes these widths."""
    return width > 0 and inner > 0 and width % WIDTH == 0 and inner % WIDTH == 0


def joins(x: Tensor, inner: int, precision: str) -> bool:
    """Whether a block is to call the op: where its own kernel would run, on [B, P, D]."""
    if not covers(x.shape[-1], inner) or not multiplies(precision):
        return False
    if torch.compiler.is_compiling():
        return True
    return x.shape[0] * x.shape[1] >= FEWEST_ROWS and not (is_wrapped(x) or is_dual(x))


def _forward(
    x: Tensor, weights: tuple[Tensor, ...], rows: Tensor, seed: Tensor, constants: tuple
) -> tuple[Tensor, Tensor]:
    """The result and the masks [B, P, 64-bit words], none without dropout. `x` and the weights are
    contiguous."""
    *sites, p, precision = constants
    out = memory.empty(*x.shape)
    words = -(-(len(weights[2]) + 2 * x.shape[2]) // 64) if p > 0 else 0
    kept = torch.empty(*x.shape[:2], 0, dtype=torch.int64)
    if words:
        kept = memory.empty(*x.shape[:2], 2 * words).view(torch.int64)
    extension.load().feed_forward_forward(
        x.detach().numpy(),
        *(weight.detach().numpy() for weight in weights),
        rows.numpy(),
        int(seed),
        *sites,
        p,
        kept.numpy() if words else None,
        out.numpy(),
        torch.get_num_threads(),
        precision,
    )
    return out, kept


def _backward(
    grad: Tensor, x: Tensor, weights: tuple[Tensor, ...], kept: Tensor, p: float, precision: str
) -> tuple[Tensor, ...]:
    """The gradients of `x` and the six parameters. All contiguous."""
    gradients = (memory.empty(*x.shape), *(torch.empty_like(weight) for weight in weights))
    extension.load().feed_forward_backward(
        grad.contiguous().numpy(),
        x.numpy(),
        *(weight.numpy() for weight in weights[:-1]),
        p,
        kept.numpy() if kept.shape[2] else None,
        *(gradient.numpy() for gradient in gradients),
        torch.get_num_threads(),
        precision,
    )
    return gradients


class _FeedForward(torch.autograd.Function):
    """The C++ kernels; the masks are kept, a bit an element, the inner layer is not."""

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, w1, b1, w2, b2, rows, seed, constants):
        x, *weights = (t.contiguous() for t in (x, norm_weight, norm_bias, w1, b1, w2, b2))
        out, kept = _forward(x, tuple(weights), rows, seed, constants)
        ctx.save_for_backward(x, *weights, kept)
        ctx.constants = constants[-2:]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, *weights, kept = ctx.saved_tensors
        return *_backward(grad, x, tuple(weights), kept, *ctx.constants), None, None, None


# --- for torch.compile and torch.export -----------------------------------------------------------


@torch.library.custom_op("fmrec_fast::feed_forward", mutates_args=(), device_types="cpu")
def _registered(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    rows: Tensor,
    seed: Tensor,
    site: int,
    position_offset: int,
    position_stride: int,
    p: float,
    precision: str,
) -> tuple[Tensor, Tensor]:
    log_run("feed_forward", "cpp")
    weights = tuple(t.contiguous() for t in (norm_weight, norm_bias, w1, b1, w2, b2))
    constants = (site, position_offset, position_stride, p, precision)
    return _forward(x.contiguous(), weights, rows.contiguous(), seed, constants)


@torch.library.custom_op("fmrec_fast::feed_forward_backward", mutates_args=(), device_types="cpu")
def _registered_backward(
    grad: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    kept: Tensor,
    p: float,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    weights = tuple(t.contiguous() for t in (norm_weight, norm_bias, w1, b1, w2, b2))
    return _backward(grad, x.contiguous(), weights, kept.contiguous(), p, precision)  # type: ignore


@_registered.register_fake
def _(x, norm_weight, norm_bias, w1, b1, w2, b2, rows, seed, site, offset, stride, p, precision):
    words = -(-(w1.shape[0] + 2 * x.shape[2]) // 64) if p > 0 else 0
    return x.new_empty(x.shape), x.new_empty(*x.shape[:2], words, dtype=torch.int64)


@_registered_backward.register_fake
def _(grad, x, norm_weight, norm_bias, w1, b1, w2, b2, kept, p, precision):
    weights = (norm_weight, norm_bias, w1, b1, w2, b2)
    return tuple(t.new_empty(t.shape) for t in (x, *weights))


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.constants = inputs[-2:]


def _gradients(ctx, grad, _):
    gradients = torch.ops.fmrec_fast.feed_forward_backward(grad, *ctx.saved_tensors, *ctx.constants)
    return *gradients, *[None] * 7


_registered.register_autograd(_gradients, setup_context=_setup)
