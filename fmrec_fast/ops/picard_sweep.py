"""The sampler's network at all points of a guessed trajectory: one sweep of Picard iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrec_fast import noise as stream
from fmrec_fast.backend import Backend, choose, use_backend
from fmrec_fast.ops._checks import check_float, check_padding, check_shape, request_rows
from fmrec_fast.ops.encoder import (
    check_precision,
    encoder,
)
from fmrec_fast.ops.euler_sampler import (
    CPU_ROWS,
    SamplerWeights,
    check_equal_padding,
    network_declined,
    run_cpp,
    run_triton,
)
from fmrec_fast.ops.noise_fusion import noise_fusion
from fmrec_fast.reference import picard_sweep as reference
from fmrec_fast.reference.encoder import NORM_EPS
from fmrec_fast.reference.euler_sampler import tie_padding

# Sequences that the definition takes together on a GPU, which bounds its memory.
GPU_ROWS = 4096


def picard_sweep(
    e: Tensor,
    mask: Tensor,
    x: Tensor,
    taus: Tensor,
    weights: SamplerWeights,
    *,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
    noise: Tensor | None = None,
    precision: str = "float32",
    padding: str = "published",
) -> Tensor:
    """The network at all q points of a guessed trajectory, as one batch of B q sequences.

    The Euler sampler's step i evaluates the network at x_i. Given guesses of all x_i nothing makes
    the steps wait for one another; the new trajectory is a prefix sum over the predictions
    (`fmrec_fast.picard`).

    Equivalent PyTorch::

        for i in range(q):
            E = noise_fusion(e, x[:, i], taus[i], delta=..., seed=seed, rows=rows, step=i)
            pred[:, i] = layer_norm(encoder(E, mask, ...)[0])

    Args:
        e: item embeddings [B, L, D]; mask: [B, L].
        x: guessed trajectory [B, q, D]; taus: time embeddings of the q steps [q, D].
        seed, rows: key the stream's lam (a seed of None is drawn), whose step word is i; `noise`
            gives lam explicitly [q, B, L, D].
        precision: of the encoder's matrix products, see `encoder`.
        padding: 'published' or 'tied', as in `euler_sampler`.

    Returns:
        [B, q, D]. The kernels are not differentiable and run where no gradient is needed.

    Raises:
        TypeError, ValueError: dtypes, shapes, `precision` or `padding` are off.
        BackendError: a named backend cannot run.
    """
    sizes: dict[str, int] = {}
    check_shape("e", e, "B L D", sizes)
    check_shape("mask", mask, "B L", sizes)
    check_shape("x", x, "B q D", sizes)
    check_shape("taus", taus, "q D", sizes)
    check_float(e=e, mask=mask, x=x, taus=taus, noise=noise)
    check_precision(precision)
    check_padding(padding)
    tied = padding == "tied"
    if tied:
        check_equal_padding(e, mask)
    if noise is not None:
        check_shape("noise", noise, "q B L D", sizes)
    else:
        seed = stream.as_seed(seed, e.device)
        rows = request_rows(rows, e.shape[0], e.device)
    tensors = [e, x, taus, weights.norm_weight, weights.norm_bias]
    tensors += weights.parameters()
    if noise is not None:
        tensors.append(noise)
    declined = ""
    if weights.attention != "published":
        declined = f"its kernel has the published attention only, got {weights.attention!r}"
    elif sizes["q"] == 0:
        declined = "there is no step to take"
    else:
        declined = network_declined(e, tensors, weights, precision, tied)
    backend = choose("picard_sweep", *tensors, declined=declined)
    if backend is not Backend.REFERENCE and torch.compiler.is_compiling():
        return torch.ops.fmrec_fast.picard_sweep(
            e,
            mask,
            x,
            taus,
            *weights.flat(),
            seed,
            rows,
            noise,
            precision,
            padding,
            backend.value,
        )
    if backend is not Backend.REFERENCE:
        out = x.new_empty(x.shape)
        inputs = (e, mask, x, taus, weights, seed, rows, noise)
        if backend is Backend.CPP:
            return run_cpp("picard_sweep", *inputs, precision, tied, out)
        from fmrec_fast.kernels import picard_sweep as kernels

        return run_triton(kernels.picard_sweep, *inputs, precision, tied, out)

    most = CPU_ROWS if e.device.type == "cpu" else GPU_ROWS
    pieces = [slice(i, i + most) for i in range(0, len(e), most)] or [slice(None)]
    parts = [
        _composed(
            e[piece],
            mask[piece],
            x[piece],
            taus,
            weights,
            seed,
            None if rows is None else rows[piece],
            None if noise is None else noise[:, piece],
            max(1, most // max(len(e), 1)),
            precision,
            tied,
        )
        for piece in pieces
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _composed(
    e: Tensor,
    mask: Tensor,
    x: Tensor,
    taus: Tensor,
    weights: SamplerWeights,
    seed: Tensor | None,
    rows: Tensor | None,
    noise: Tensor | None,
    steps_at_once: int,
    precision: str,
    tied: bool,
) -> Tensor:
    """The definition over the ops noise_fusion and encoder."""

    def fuse(x_i: Tensor, i: int) -> Tensor:
        lam = None if noise is None else noise[i]
        fused = noise_fusion(
            e, x_i, taus[i], delta=weights.delta, seed=seed, rows=rows, step=i, lam=lam
        )
        return tie_padding(fused, mask) if tied else fused

    def encode(fused: Tensor) -> Tensor:
        last, _ = encoder(
            fused,
            mask.repeat(len(fused) // max(len(mask), 1), 1),
            weights.blocks,
            num_heads=weights.num_heads,
            attention=weights.attention,
            precision=precision,
            variant=weights.variant,
        )
        return F.layer_norm(last, last.shape[-1:], weights.norm_weight, weights.norm_bias, NORM_EPS)

    return reference.picard_sweep(x, fuse, encode, steps_at_once=steps_at_once)


# --- for torch.compile and torch.export -----------------------------------------------------------


@torch.library.custom_op("fmrec_fast::picard_sweep", mutates_args=())
def _registered(
    e: Tensor,
    mask: Tensor,
    x: Tensor,
    taus: Tensor,
    parameters: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_heads: int,
    delta: float,
    seed: Tensor | None,
    rows: Tensor | None,
    noise: Tensor | None,
    precision: str,
    padding: str,
    backend: str,
) -> Tensor:
    weights = SamplerWeights.from_flat(parameters, norm_weight, norm_bias, num_heads, delta)
    options = {"precision": precision, "padding": padding}
    with use_backend(backend):
        return picard_sweep(e, mask, x, taus, weights, seed=seed, rows=rows, noise=noise, **options)


@_registered.register_fake
def _(e, mask, x, *_):
    return x.new_empty(x.shape)
