"""The first half of a transformer block in training, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from fmrec_fast import extension, memory
from fmrec_fast.backend import Backend, choose, log_run
from fmrec_fast.forward_mode import NO_RULE, is_dual, is_wrapped
from fmrec_fast.ops._checks import check_float, check_shape, request_rows
from fmrec_fast.ops.linear import check_precision, multiplies
from fmrec_fast.reference import self_attention as reference

# The C++ kernel's widths are multiples of it, and fewer rows than this are not worth packing for.
WIDTH, FEWEST_ROWS = 16, 64


def self_attention(
    x: Tensor,
    query_scale: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    p: float,
    *,
    num_heads: int,
    seed: Tensor,
    rows: Tensor | None = None,
    site: int = 0,
    last_only: bool = False,
    precision: str = "float32",
) -> Tensor:
    """Norm, multi-head self-attention, residual and the dropouts of a block, in one pass (paper,
    section 4.2).

    Equivalent PyTorch, each drop with a mask of its own (see `dropout`) at the sites `site`
    (probabilities, as [B, H * L, L]) and ``site + 1``, heads as columns side by side::

        normed = F.layer_norm(x, (D,), norm_weight, norm_bias, 1e-12)
        q, k, v = (heads(F.linear(normed, *layer)) for layer in (query, key, value))
        probabilities = torch.softmax((query_scale[:, None, :, None] * q) @ k.mT, dim=-1)
        out = x + drop(F.linear(side_by_side(drop(probabilities) @ v), *output))
        out[:, -1:] if last_only else out

    The C++ kernels take a few sequences through all of it while they are in the cache, forward and
    backward: queries, keys, values and scores are never in memory, and what is kept for the
    backward pass is `x` and the masks, a bit an element. Queries that are scaled by 0 at a
    sequence's beginning (padding) are not computed. With `last_only` there are no keys and values
    either: (W_k^T q) . normed_t are scores that softmax cannot tell from the keys', so that the
    key's bias, on which nothing depends, gets a gradient of exactly 0.

    Args:
        x: [B, L, D].
        query_scale: [B, L]: the mask times (D / H) ** -0.5. No key is hidden; a query whose scale
            is 0 attends uniformly.
        norm_weight, norm_bias, and the layers' biases: [D]; their weights: [D, D], [out, in].
        p: probability of dropping, in [0, 1).
        num_heads: H, divides D.
        seed: int64 scalar tensor (already derived for this use).
        rows: int64 [B]; None is 0 .. B-1.
        site: the first of the two sites.
        last_only: only the last position leaves.
        precision: of the linear layers' products, as in `feed_forward`; the kernel of the last
            position always multiplies in float32.

    Returns:
        [B, L, D], or [B, 1, D] with `last_only`. Differentiable in all that is floating point; the
        kernels run only where `query_scale` needs no gradient. On a CPU the results do not depend
        on the number of threads.

    Raises:
        TypeError, ValueError: dtypes, shapes, devices, heads or p are off.
        BackendError: a named backend cannot run.
    """
    weights = (
        *(norm_weight, norm_bias, query_weight, query_bias, key_weight, key_bias),
        *(value_weight, value_bias, output_weight, output_bias),
    )
    out, _ = self_attention_and_last(
        x,
        query_scale,
        weights,
        p,
        num_heads=num_heads,
        seed=seed,
        rows=rows,
        site=site,
        last_only=last_only,
        precision=precision,
    )
    return out


def self_attention_and_last(
    x: Tensor,
    query_scale: Tensor,
    weights: tuple[Tensor, ...],
    p: float,
    *,
    num_heads: int,
    seed: Tensor,
    rows: Tensor | None = None,
    site: int = 0,
    last_only: bool = False,
    precision: str = "float32",
) -> tuple[Tensor, Tensor]:
    """`self_attention` (its parameters in a tuple) and ``x[:, -1]``.

    The C++ kernel's backward pass adds the gradient of the latter to that of `x` where it has just
    written it; a slice's own makes zeros as large as `x`, and a sum with them.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B L D", sizes)
    check_shape("query_scale", query_scale, "B L", sizes)
    named = dict(zip(NAMES, weights, strict=True))
    for name, weight in named.items():
        is_matrix = name.endswith("weight") and name != "norm_weight"
        check_shape(name, weight, "D D" if is_matrix else "D", sizes)
    check_float(x=x, query_scale=query_scale, **named)
    if sizes["L"] == 0:
        raise ValueError(f"x must have at least one position, got shape {tuple(x.shape)}")
    if num_heads < 1 or sizes["D"] % num_heads:
        raise ValueError(f"num_heads must divide D = {sizes['D']}, got {num_heads}")
    if not 0 <= p < 1:
        raise ValueError(f"p must be in [0, 1), got {p}")
    check_precision(precision)
    rows = request_rows(rows, x.shape[0], x.device)
    declined = ""
    if is_dual(x, query_scale, *weights):
        declined = NO_RULE
    elif torch.is_grad_enabled() and query_scale.requires_grad:
        declined = "its kernel has no gradient of query_scale, and one is needed"
    elif not multiplies(precision):
        declined = f"without AMX its kernel multiplies in float32 only, got precision {precision!r}"
    elif not covers(sizes["D"], num_heads, last_only):
        what = "a head's width" if last_only and sizes["D"] % WIDTH == 0 else "D"
        declined = (
            f"its kernel takes widths that are multiples of {WIDTH}, {what} is not: D = "
            f"{sizes['D']}, H = {num_heads}"
        )
    elif not torch.compiler.is_compiling() and x.shape[0] * x.shape[1] < FEWEST_ROWS:
        declined = f"its kernel is for at least {FEWEST_ROWS} rows"
    constants = (site, p, num_heads, last_only, precision)
    if choose("self_attention", x, *weights, declined=declined) is Backend.CPP:
        if torch.compiler.is_compiling():
            out, _ = torch.ops.fmrec_fast.self_attention(
                x, query_scale, *weights, rows, seed, *constants
            )
            return out, x[:, -1]
        return _SelfAttention.apply(x, query_scale, *weights, rows, seed, constants)
    out = reference.self_attention(
        x,
        query_scale,
        **named,
        p=p,
        num_heads=num_heads,
        seed=seed,
        rows=rows,
        site=site,
        last_only=last_only,
        precision=precision,
    )
    return out, x[:, -1]


NAMES = (
    *("norm_weight", "norm_bias", "query_weight", "query_bias", "key_weight", "key_bias"),
    *("value_weight", "value_bias", "output_weight", "output_bias"),
)


def covers(width: int, num_heads: int, last_only: bool) -> bool:
    """Whether the C++ kernel takes this width and its heads."""
    if width <= 0 or width % WIDTH:
        return False
    return not last_only or width // num_heads % WIDTH == 0


def joins(x: Tensor, num_heads: int, last_only: bool, precision: str) -> bool:
    """Whether a block is to call the op: where its own kernel would run, on [B, L, D]."""
    if not covers(x.shape[-1], num_heads, last_only) or not multiplies(precision):
        return False
    if torch.compiler.is_compiling():
        return True
    return x.shape[0] * x.shape[1] >= FEWEST_ROWS and not (is_wrapped(x) or is_dual(x))


def _shapes(
    x: Tensor, p: float, num_heads: int, last_only: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the result, and of the masks that are kept: 64-bit words, none without dropout."""
    batch, length, width = x.shape
    leaving = (batch, 1 if last_only else length)
    words = -(-width // 64) + (0 if last_only else num_heads * (length // 64 + 1))
    return (*leaving, width), (*leaving, words if p > 0 else 0)


def _forward(
    x: Tensor, query_scale: Tensor, weights: tuple[Tensor, ...], rows: Tensor, seed: Tensor,
    site: int, p: float, num_heads: int, last_only: bool, precision: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result and the masks. All contiguous."""
    shape, words = _shapes(x, p, num_heads, last_only)
    out = memory.empty(*shape)
    kept = torch.empty(words, dtype=torch.int64)
    extension.load().self_attention_forward(
        x.detach().numpy(),
        query_scale.detach().numpy(),
        [weight.detach().numpy() for weight in weights],
        rows.numpy(),
        int(seed),
        site,
        p,
        kept.numpy() if p > 0 else None,
        out.numpy(),
        num_heads,
        last_only,
        torch.get_num_threads(),
        precision,
    )
    return out, kept


def _backward(
    grad: Tensor, x: Tensor, query_scale: Tensor, weights: tuple[Tensor, ...], rows: Tensor,
    kept: Tensor, seed: Tensor, site: int, p: float, num_heads: int, last_only: bool,
    precision: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of `x` and the ten parameters. All contiguous."""
    d_x = memory.empty(*x.shape)
    d_weights = [torch.empty_like(weight) for weight in weights]
    extension.load().self_attention_backward(
        grad.contiguous().numpy(),
        x.detach().numpy(),
        query_scale.detach().numpy(),
        [weight.detach().numpy() for weight in weights],
        rows.numpy(),
        int(seed),
        site,
        p,
        kept.numpy() if p > 0 else None,
        d_x.numpy(),
        [d_weight.numpy() for d_weight in d_weights],
        num_heads,
        last_only,
        torch.get_num_threads(),
        precision,
    )
    return d_x, *d_weights


class _SelfAttention(torch.autograd.Function):
    """The C++ kernels; the masks are kept, a bit an element, all else is computed anew."""

    @staticmethod
    def forward(ctx, x, query_scale, *rest):
        ctx.set_materialize_grads(False)
        *weights, rows, seed, constants = rest
        x, query_scale, rows, *weights = (t.contiguous() for t in (x, query_scale, rows, *weights))
        out, kept = _forward(x, query_scale, tuple(weights), rows, seed, *constants)
        ctx.save_for_backward(x, query_scale, rows, kept, seed, *weights)
        ctx.constants = constants
        return out, x[:, -1].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_last):
        x, query_scale, rows, kept, seed, *weights = ctx.saved_tensors
        if grad is None:  # only the last position is used
            d_x = torch.zeros_like(x)
            d_x[:, -1] = grad_last
            return d_x, *[None] * 14
        d_x, *d_weights = _backward(
            grad, x, query_scale, tuple(weights), rows, kept, seed, *ctx.constants
        )
        if grad_last is not None:
            d_x[:, -1] += grad_last
        return d_x, None, *d_weights, None, None, None


# --- for torch.compile and torch.export -----------------------------------------------------------


@torch.library.custom_op("fmrec_fast::self_attention", mutates_args=(), device_types="cpu")
def _registered(
    x: Tensor,
    query_scale: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    query_weight: Tensor,
    query_bias: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    value_weight: Tensor,
    value_bias: Tensor,
    output_weight: Tensor,
    output_bias: Tensor,
    rows: Tensor,
    seed: Tensor,
    site: int,
    p: float,
    num_heads: int,
    last_only: bool,
    precision: str,
) -> tuple[Tensor, Tensor]:
    log_run("self_attention", "cpp")
    weights = (
        *(norm_weight, norm_bias, query_weight, query_bias, key_weight, key_bias),
        *(value_weight, value_bias, output_weight, output_bias),
    )
    x, query_scale, rows, *given = (t.contiguous() for t in (x, query_scale, rows, *weights))
    return _forward(
        x, query_scale, tuple(given), rows, seed, site, p, num_heads, last_only, precision
    )


@torch.library.custom_op("fmrec_fast::self_attention_backward", mutates_args=(), device_types="cpu")
def _registered_backward(
    grad: Tensor,
    x: Tensor,
    query_scale: Tensor,
    weights: list[Tensor],
    rows: Tensor,
    kept: Tensor,
    seed: Tensor,
    site: int,
    p: float,
    num_heads: int,
    last_only: bool,
    precision: str,
) -> list[Tensor]:
    x, query_scale, rows, *given = (t.contiguous() for t in (x, query_scale, rows, *weights))
    fixed = (kept.contiguous(), seed, site, p, num_heads, last_only, precision)
    return list(_backward(grad, x, query_scale, tuple(given), rows, *fixed))


@_registered.register_fake
def _(x, query_scale, *rest):
    p, num_heads, last_only, _ = rest[-4:]
    shape, words = _shapes(x, p, num_heads, last_only)
    return x.new_empty(shape), x.new_empty(words, dtype=torch.int64)


@_registered_backward.register_fake
def _(grad, x, query_scale, weights, rows, kept, seed, site, p, num_heads, last_only, precision):
    return [t.new_empty(t.shape) for t in (x, *weights)]


def _setup(ctx, inputs, output):
    x, query_scale, *weights = inputs[:12]
    rows, seed = inputs[12:14]
    ctx.save_for_backward(x, query_scale, rows, output[1], seed, *weights)
    ctx.constants = inputs[14:]


def _gradients(ctx, grad, _):
    x, query_scale, rows, kept, seed, *weights = ctx.saved_tensors
    d_x, *d_weights = torch.ops.fmrec_fast.self_attention_backward(
        grad, x, query_scale, weights, rows, kept, seed, *ctx.constants
    )
    return d_x, None, *d_weights, *[None] * 7


_registered.register_autograd(_gradients, setup_context=_setup)
