"""The transformer stack, last position out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fmrec_fast import extension
from fmrec_fast.backend import (
    Backend,
    candidate,
    choose,
    constant_when_compiled,
    use_backend,
)
from fmrec_fast.config import ATTENTIONS
from fmrec_fast.forward_mode import NO_RULE, is_dual
from fmrec_fast.ops._checks import check_float, check_shape
from fmrec_fast.ops.attention import attention as attention_op
from fmrec_fast.ops.dropout import StreamDropout
from fmrec_fast.ops.feed_forward import feed_forward
from fmrec_fast.ops.feed_forward import joins as feed_forward_joins
from fmrec_fast.ops.linear import check_precision, linear
from fmrec_fast.ops.rms_norm import rms_norm
from fmrec_fast.ops.self_attention import joins as self_attention_joins
from fmrec_fast.ops.self_attention import self_attention_and_last
from fmrec_fast.reference import encoder as reference
from fmrec_fast.reference.encoder import (
    FAVE,
    FMREC,
    Attend,
    BlockWeights,
    CrossWeights,
    Drop,
    Feed,
    Paths,
    SelfAttend,
    Variant,
    dropout_sites,
    no_drop,
    no_paths,
)
from fmrec_fast.reference.rotary import angles


def encoder(
    x: Tensor,
    mask: Tensor,
    blocks: list[BlockWeights],
    *,
    num_heads: int,
    attention: str = "published",
    tap: int | None = None,
    drop: Drop = no_drop,
    p: float = 0.0,
    prune: bool = True,
    variant: Variant = FMREC,
    paths: Paths = no_paths,
    cross: Sequence[CrossWeights] | None = None,
    context: Tensor | None = None,
    precision: str = "float32",
    first_key_bias: Tensor | None = None,
    linear_precision: str = "float32",
) -> tuple[Tensor, Tensor | None]:
    """Pre-norm transformer blocks over a fused history (paper, section 4.2).

    Equivalent PyTorch, per block (norms with eps 1e-12, tanh-GELU)::

        x = x + drop(attn(norm1(x))); x = x + drop(ffn(norm2(x))); x = drop(x)

    Only the last position's output leaves, so of the last block only that position is computed
    (`prune`); with dropout from the stream that is the same function to the last mask.

    Args:
        x: [B, L, D].
        mask: [B, L] floating point, 1 at real positions. Under 'published' attention a padded
            query attends uniformly and no key is hidden.
        blocks: parameters, first block first.
        num_heads: H, divides D.
        attention: 'published' or 'causal'.
        tap: index of a block whose output at the last position is returned too.
        drop: dropout, with probability `p`; none by default.
        variant: `FMREC`, or `FAVE`: RMS norms, rotary embedding, no dropout after the block; its
            weights have no biases of norms, and `inv_freq`.
        paths: drop path: (block, branch) -> factors of the rows [B], or None.
        cross, context: Fave's cross-attention steps, one a block, over `context` [B, L, D].
        precision: of the matrix products' operands: 'float32', 'tf32' or 'bf16', or closer. The
            definition rounds both operands and multiplies in float32; all else is float32. The C++
            kernel rounds those of the linear layers alone, and only on AMX: for 'bf16' to bfloat16,
            for 'tf32' to sums of two (a product is off by at most 2^-16 of itself, TF32's by
            2^-10); elsewhere it multiplies in float32. `torch.set_float32_matmul_precision` does
            not change what a kernel does.
        first_key_bias: [B], added to the scores of the first position as a key: log(n) makes it
            stand for n equal positions. Published attention only.
        linear_precision: that of the op `linear` for the linear layers alone, with gradients of the
            same precision: for training. Only with `precision` 'float32'.

    Returns:
        ([B, D], [B, D] of block `tap` or None). Differentiable; the kernels run only where no
        gradient is needed.

    Raises:
        TypeError, ValueError: dtypes, shapes, heads, or one of the options are off.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("x", x, "B L D", sizes)
    check_shape("mask", mask, "B L", sizes)
    check_float(x=x, mask=mask)
    if sizes["L"] == 0:
        raise ValueError(f"x must have at least one position, got shape {tuple(x.shape)}")
    if not blocks:
        raise ValueError("blocks must hold at least one block, got none")
    if num_heads < 1 or sizes["D"] % num_heads:
        raise ValueError(f"num_heads must divide D = {sizes['D']}, got {num_heads}")
    if attention not in ATTENTIONS:
        raise ValueError(f"attention must be one of {ATTENTIONS}, got {attention!r}")
    if tap is not None and not 0 <= tap < len(blocks):
        raise ValueError(f"tap must be in 0 .. {len(blocks) - 1}, got {tap}")
    if any((block.norm1_bias is None) != (variant.norm == "rms") for block in blocks):
        raise ValueError(f"blocks must have the norms of {variant}, got others")
    if any((block.inv_freq is None) == variant.rotary for block in blocks):
        raise ValueError(f"blocks must have inv_freq where {variant} is rotary, and only there")
    if (cross is None) != (context is None) or (cross is not None and len(cross) != len(blocks)):
        raise ValueError("cross must have one step a block, and come with a context")
    if first_key_bias is not None:
        check_shape("first_key_bias", first_key_bias, "B", sizes)
        check_float(x=x, first_key_bias=first_key_bias)
        if attention != "published":
            raise ValueError(f"first_key_bias needs 'published' attention, got {attention!r}")
        if variant.rotary:
            raise ValueError(f"first_key_bias needs blocks that do not rotate, got {variant}")
    check_precision(precision)
    if linear_precision != "float32" and precision != "float32":
        raise ValueError(
            f"only one of precision and linear_precision may differ from 'float32', got "
            f"{precision!r} and {linear_precision!r}"
        )
    parameters = [tensor for block in blocks for tensor in block.tensors()]
    declined = (
        "" if linear_precision == "float32" else "its kernel has one precision for all products"
    )
    declined = (
        declined
        or _declined(x, parameters, attention, drop, p)
        or kernel_declines(x, num_heads, precision, rotary=variant.rotary)
        or variant_declined(blocks, x.device)
    )
    if not declined and (paths is not no_paths or cross is not None):
        declined = "its kernel has no drop path and no cross-attention"
    if first_key_bias is not None and candidate(x.device) is Backend.TRITON:
        declined = declined or "its Triton kernel has no key bias"
    backend = choose("encoder", x, *parameters, declined=declined)
    if backend is not Backend.REFERENCE and torch.compiler.is_compiling():
        return _compiled(x, mask, parameters, num_heads, tap, first_key_bias, precision, backend)
    if backend is Backend.CPP:
        return _encoder_cpp(x, mask, blocks, num_heads, tap, first_key_bias, precision)
    if backend is Backend.TRITON:
        return _encoder_triton(x, mask, blocks, num_heads, tap, precision)
    read: list[Tensor] = []
    out, tapped = reference.encoder(
        x,
        mask,
        blocks,
        num_heads=num_heads,
        attention=attention,
        tap=tap,
        drop=drop,
        p=p,
        prune=prune,
        variant=variant,
        paths=paths,
        cross=cross,
        context=context,
        linear=partial(linear, precision=linear_precision),
        norm=_norm,
        attend=_attend(drop, p),
        self_attend=_self_attend(x, drop, linear_precision, tap, read),
        feed=_feed(x, drop, linear_precision),
        precision=precision,
        first_key_bias=first_key_bias,
    )
    return out, read[0] if read else tapped


def kernel_declines(
    e: Tensor, num_heads: int, precision: str, *, tied: bool = False, rotary: bool = False
) -> str:
    """Why the candidate backend's kernel has no such network; empty where it has.

    Args:
        e: [B, L, D]: its sizes and its device.
        tied: whether the padding is; rotary: whether the blocks rotate.
    """
    if candidate(e.device) is Backend.TRITON:
        return _no_plan(e.shape[1], e.shape[2], num_heads, precision, e.device, tied, rotary)
    return ""


@constant_when_compiled
def _no_plan(
    length: int, width: int, num_heads: int, precision: str, device: torch.device,
    tied: bool, rotary: bool,
) -> str:  # fmt: skip
    from fmrec_fast.kernels.plans import family, plan

    found = plan(length, width, num_heads, precision, *family(device), tied, rotary)
    return found if isinstance(found, str) else ""


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd would record a use of `tensors` now."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def pack(
    blocks: list[BlockWeights],
    num_heads: int,
    length: int | None = None,
    precision: str = "float32",
) -> Any:
    """The blocks' parameters, copied into the order that the C++ kernels read, for histories of
    `length` positions and products of this `precision`, see `encoder`.

    A copy, of the weights as they are now: `packing` keeps it for as long as they stay so.
    """
    arrays = [
        tuple(None if part is None else part.detach().contiguous().numpy() for part in block[:-1])
        for block in blocks
    ]
    rotary, inv_freq = None, blocks[0].inv_freq
    if inv_freq is not None:
        if length is None:
            raise ValueError("blocks with rotary embedding are packed for a length, got None")
        rotary = torch.cat(angles(inv_freq.detach(), length), dim=-1).numpy()
    return extension.load().PackedEncoder(arrays, num_heads, rotary, precision)


def variant_declined(blocks: list[BlockWeights], device: torch.device) -> str:
    """Why the kernel that would run here does not cover the blocks' norms or rotation; empty where
    it does."""
    if not blocks:
        return ""
    first, rms = blocks[0].inv_freq, blocks[0].norm1_bias is None
    if torch.compiler.is_compiling():
        # Whether all angles are the same is looked at when the program runs.
        if rms != (first is not None):
            return "its registered op has RMS norms with rotary embedding, and only with it"
        return ""
    if candidate(device) is Backend.TRITON:
        if rms != (first is not None):
            return "its Triton kernel has RMS norms with rotary embedding, and only with it"
        return ""
    if first is None or first.device.type != "cpu":  # looking would wait for another device
        return ""
    if any(other.inv_freq is None or not first.equal(other.inv_freq) for other in blocks[1:]):
        return "its kernel rotates all blocks by the same angles"
    return ""


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The definition's norm; the RMS norm by its op."""
    return rms_norm(x, weight) if bias is None else reference.norm(x, weight, bias)


def _attend(drop: Drop, p: float) -> Attend | None:
    """The attention op where it can draw the masks of `drop`, else None."""
    if isinstance(drop, StreamDropout):
        return partial(attention_op, seed=drop.seed, rows=drop.rows)
    return _attend_without_dropout if drop is no_drop or p == 0 else None


def _self_attend(
    x: Tensor, drop: Drop, precision: str, tap: int | None, read: list[Tensor]
) -> SelfAttend | None:
    """A block's first half as one op: on a CPU, where masks come from the stream. `read` gets the
    last position of block `tap`'s output from the op that reads it, which has its gradient for
    less than a slice has it."""
    if candidate(x.device) is not Backend.CPP or not isinstance(drop, StreamDropout):
        return None
    reads = None if tap is None else dropout_sites(tap + 1)[0]

    def self_attend(
        x: Tensor,
        w: BlockWeights,
        query_scale: Tensor,
        *,
        num_heads: int,
        p: float,
        site: int,
        last_only: bool,
    ) -> Tensor | None:
        if w.norm1_bias is None or not self_attention_joins(x, num_heads, last_only, precision):
            return None
        weights = (
            *(w.norm1_weight, w.norm1_bias, w.query_weight, w.query_bias, w.key_weight),
            *(w.key_bias, w.value_weight, w.value_bias, w.output_weight, w.output_bias),
        )
        out, last = self_attention_and_last(
            x,
            query_scale,
            weights,
            p,
            num_heads=num_heads,
            seed=drop.seed,
            rows=drop.rows,
            site=site,
            last_only=last_only,
            precision=precision,
        )
        if site == reads:
            read.append(last)
        return out

    return self_attend


def _feed(x: Tensor, drop: Drop, precision: str) -> Feed | None:
    """A block's second half as one op, likewise."""
    if candidate(x.device) is not Backend.CPP or not isinstance(drop, StreamDropout):
        return None

    def feed(
        x: Tensor, w: BlockWeights, *, p: float, site: int, position_offset: int
    ) -> Tensor | None:
        if w.norm2_bias is None or not feed_forward_joins(x, w.w1_weight.shape[0], precision):
            return None
        return feed_forward(
            x,
            w.norm2_weight,
            w.norm2_bias,
            w.w1_weight,
            w.w1_bias,
            w.w2_weight,
            w.w2_bias,
            p,
            seed=drop.seed,
            rows=drop.rows,
            site=site,
            position_offset=position_offset,
            precision=precision,
        )

    return feed


def _attend_without_dropout(
    qkv: Tensor,
    query_scale: Tensor,
    *,
    num_heads: int,
    p: float,
    site: int,
    inv_freq: Tensor | None,
) -> Tensor:
    return attention_op(qkv, query_scale, num_heads=num_heads, inv_freq=inv_freq)


def _declined(x: Tensor, parameters: list[Tensor], attention: str, drop: Drop, p: float) -> str:
    """Why no kernel covers a call; empty where they may."""
    if attention != "published":
        return f"its kernel has the published attention only, got {attention!r}"
    if drop is not no_drop and p > 0:
        return "its kernel has no dropout"
    if is_dual(x):
        return NO_RULE
    if needs_gradient(x, *parameters):
        return "its kernel has no backward pass, and a gradient is needed"
    return ""


def _encoder_cpp(
    x: Tensor,
    mask: Tensor,
    blocks: list[BlockWeights],
    num_heads: int,
    tap: int | None,
    first_key_bias: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor | None]:
    out = x.new_empty(x.shape[0], x.shape[2])
    tapped = None if tap is None else torch.empty_like(out)
    extension.load().encoder_forward(
        pack(blocks, num_heads, x.shape[1], precision),
        x.detach().contiguous().numpy(),
        mask.detach().contiguous().numpy(),
        -1 if tap is None else tap,
        out.numpy(),
        None if tapped is None else tapped.numpy(),
        torch.get_num_threads(),
        None if first_key_bias is None else first_key_bias.detach().contiguous().numpy(),
    )
    return out, tapped


def _encoder_triton(
    x: Tensor,
    mask: Tensor,
    blocks: list[BlockWeights],
    num_heads: int,
    tap: int | None,
    precision: str,
) -> tuple[Tensor, Tensor | None]:
    from fmrec_fast.kernels import encoder as kernels

    out = x.new_empty(x.shape[0], x.shape[2])
    tapped = None if tap is None else torch.empty_like(out)
    kernels.encoder(
        x.contiguous(), mask.contiguous(), blocks, num_heads, precision, tap, out, tapped
    )
    return out, tapped


# --- for torch.compile and torch.export -----------------------------------------------------------


def unflatten(parameters: Sequence[Tensor]) -> list[BlockWeights]:
    """The blocks whose tensors `parameters` are, one after another.

    FMRec's, or Fave's: these have no biases of norms, so that the second tensor is a matrix, and
    angles per position.
    """
    names = list(BlockWeights._fields)
    if len(parameters) > 1 and parameters[1].ndim == 2:
        names = [name for name in names if not name.startswith("norm") or "bias" not in name]
        empty: dict[str, Tensor | None] = {"norm1_bias": None, "norm2_bias": None}
    else:
        names.remove("inv_freq")
        empty = {}
    size = len(names)
    return [
        BlockWeights(**dict(zip(names, parameters[i : i + size], strict=True)), **empty)  # type: ignore[arg-type]
        for i in range(0, len(parameters), size)
    ]


def variant_of(blocks: Sequence[BlockWeights]) -> Variant:
    """`FAVE` where the blocks rotate, else `FMREC`."""
    return FAVE if blocks and blocks[0].inv_freq is not None else FMREC


def _compiled(
    x: Tensor,
    mask: Tensor,
    parameters: list[Tensor],
    num_heads: int,
    tap: int | None,
    first_key_bias: Tensor | None,
    precision: str,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    out, tapped = torch.ops.fmrec_fast.encoder(
        x, mask, parameters, num_heads, tap, first_key_bias, precision, backend.value
    )
    return out, None if tap is None else tapped


@torch.library.custom_op("fmrec_fast::encoder", mutates_args=())
def _registered(
    x: Tensor,
    mask: Tensor,
    parameters: Sequence[Tensor],
    num_heads: int,
    tap: int | None,
    first_key_bias: Tensor | None,
    precision: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    blocks = unflatten(parameters)
    with use_backend(backend):
        out, tapped = encoder(
            x,
            mask,
            blocks,
            num_heads=num_heads,
            variant=variant_of(blocks),
            tap=tap,
            first_key_bias=first_key_bias,
            precision=precision,
        )
    return out, x.new_empty(0) if tapped is None else tapped


@_registered.register_fake
def _(x, mask, parameters, num_heads, tap, first_key_bias, precision, backend):
    out = x.new_empty(x.shape[0], x.shape[2])
    return out, x.new_empty(0) if tap is None else torch.empty_like(out)
