"""All q steps of the sampler as one unit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmrec_fast import extension, flow
from fmrec_fast import noise as stream
from fmrec_fast.backend import Backend, candidate, choose, use_backend
from fmrec_fast.ops._checks import check_float, check_padding, check_shape, request_rows
from fmrec_fast.ops.encoder import (
    check_precision,
    encoder,
    kernel_declines,
    needs_gradient,
    pack,
    unflatten,
    variant_declined,
    variant_of,
)
from fmrec_fast.ops.noise_fusion import euler_noise_fusion, noise_fusion
from fmrec_fast.reference import euler_sampler as reference
from fmrec_fast.reference.encoder import FMREC, NORM_EPS, BlockWeights, Variant
from fmrec_fast.reference.noise_fusion import euler_update

if TYPE_CHECKING:
    from fmrec_fast.packing import Weights

# Rows that the definition takes together on a CPU: more, and the activations leave the caches.
CPU_ROWS = 32


@dataclass(frozen=True)
class SamplerWeights:
    """What a sampler step reads of the network; the decoder is not among it."""

    blocks: list[BlockWeights]
    norm_weight: Tensor
    norm_bias: Tensor
    num_heads: int
    attention: str
    delta: float
    variant: Variant = FMREC
    kept: Weights | None = field(default=None, repr=False, compare=False)

    @cached_property
    def _packed(self) -> dict[str, Any]:
        """By precision, what `packed_for` gave."""
        return {}

    def parameters(self) -> list[Tensor]:
        """Those of the blocks, one block after another."""
        return [tensor for block in self.blocks for tensor in block.tensors()]

    def flat(self) -> tuple[list[Tensor], Tensor, Tensor, int, float]:
        """What a registered op takes in its place: published attention."""
        return self.parameters(), self.norm_weight, self.norm_bias, self.num_heads, self.delta

    @staticmethod
    def from_flat(
        parameters: Sequence[Tensor],
        norm_weight: Tensor,
        norm_bias: Tensor,
        num_heads: int,
        delta: float,
    ) -> SamplerWeights:
        """The inverse of `flat`."""
        blocks = unflatten(parameters)
        numbers = (num_heads, "published", delta)
        return SamplerWeights(blocks, norm_weight, norm_bias, *numbers, variant_of(blocks))

    def packed_for(self, length: int, precision: str) -> Any:
        """The blocks as the C++ kernels read them, for products of this `precision`; with rotary
        embedding, for histories of `length` positions. Else found or packed once for this object:
        it is made for one call of the sampler and does not outlive it, so that no change of a
        weight is missed."""
        if self.variant.rotary:
            return self._pack(length, precision)
        if precision not in self._packed:
            self._packed[precision] = self._pack(None, precision)
        return self._packed[precision]

    def _pack(self, length: int | None, precision: str) -> Any:
        if self.kept is not None:
            return self.kept.state().packed(self.num_heads, length, precision)
        return pack(self.blocks, self.num_heads, length, precision)


def euler_sampler(
    e: Tensor,
    mask: Tensor,
    z0: Tensor,
    taus: Tensor,
    weights: SamplerWeights,
    *,
    times: Tensor,
    seed: Tensor | None = None,
    rows: Tensor | None = None,
    noise: Tensor | None = None,
    lam_of_step: Callable[[], Tensor] | None = None,
    trajectory: str = "straight",
    target: str = "data",
    return_trajectory: bool = False,
    precision: str = "float32",
    padding: str = "published",
) -> Tensor:
    """The Euler sampler of eq. 23, from noise to the embedding of the next item.

    Equivalent PyTorch::

        x = z0
        for i in range(q):
            E = noise_fusion(e, x, taus[i], delta=..., seed=seed, rows=rows, step=i)
            pred = layer_norm(encoder(E, mask, ...)[0])
            x = x + (pred - z0) / q          # the initial z0, each time

    Args:
        e: item embeddings [B, L, D]; mask: [B, L]; z0: [B, D].
        taus: time embeddings of the q steps [q, D].
        times: the q times in [0, 1], read only by the options that are not published.
        seed, rows: key the stream's lam (a seed of None is drawn); `noise` gives lam explicitly
            [q, B, L, D]; `lam_of_step` is called once a step for it (the published host draws).
        trajectory, target: 'straight' and 'data' as published.
        return_trajectory: all q + 1 points instead of the last.
        precision: of the encoder's matrix products, see `encoder`.
        padding: 'published', or 'tied': the leading padded positions of a row, whose embeddings
            must be equal (on CPU this is checked), share the lam of position 0. Being equal,
            they are computed as one token; see `reference.euler_sampler.tie_padding`.

    Returns:
        [B, D], or [q + 1, B, D]. Not differentiable: call under ``torch.no_grad()``.

    Raises:
        TypeError, ValueError: dtypes or shapes do not agree.
        BackendError: a named backend cannot run.
    """
    check_precision(precision)
    sizes: dict[str, int] = {}
    check_shape("e", e, "B L D", sizes)
    check_shape("mask", mask, "B L", sizes)
    check_shape("z0", z0, "B D", sizes)
    check_shape("taus", taus, "q D", sizes)
    check_float(e=e, mask=mask, z0=z0, taus=taus, noise=noise)
    if noise is not None:
        check_shape("noise", noise, "q B L D", sizes)
    elif lam_of_step is None:
        seed = stream.as_seed(seed, e.device)
        rows = request_rows(rows, e.shape[0], e.device)
    check_padding(padding)
    tied = padding == "tied"
    if tied:
        check_equal_padding(e, mask)
    tensors = [e, z0, taus, weights.norm_weight, weights.norm_bias]
    tensors += weights.parameters()
    if noise is not None:
        tensors.append(noise)
    declined = ""
    velocity = (trajectory, target) == ("straight", "velocity")
    able = candidate(e.device) is Backend.CPP and not torch.compiler.is_compiling()
    if weights.attention != "published" or not (
        (trajectory, target) == ("straight", "data") or (velocity and able)
    ):
        declined = (
            "its kernel has 'published' attention, 'straight' trajectory and target 'data' (in "
            "C++ 'velocity' too) only, "
            f"got {weights.attention!r}, {trajectory!r} and {target!r}"
        )
    elif noise is None and lam_of_step is not None:
        declined = "its kernel does not draw lam as published"
    elif sizes["q"] == 0 or not weights.blocks:
        declined = "there is no step to take, or no block to run"
    else:
        declined = network_declined(e, tensors, weights, precision, tied)
    backend = choose("euler_sampler", *tensors, declined=declined)
    if backend is not Backend.REFERENCE and torch.compiler.is_compiling():
        return torch.ops.fmrec_fast.euler_sampler(
            e,
            mask,
            z0,
            taus,
            *weights.flat(),
            seed,
            rows,
            noise,
            return_trajectory,
            padding,
            precision,
            backend.value,
        )
    if backend is not Backend.REFERENCE:
        points = (sizes["q"] + 1,) if return_trajectory else ()
        out = z0.new_empty((*points, *z0.shape))
        inputs = (e, mask, z0, taus, weights, seed, rows, noise)
        if backend is Backend.CPP:
            return run_cpp("euler_sampler", *inputs, precision, tied, out, velocity=velocity)
        from fmrec_fast.kernels import euler_sampler as kernels

        return run_triton(kernels.euler_sampler, *inputs, precision, tied, out)
    # A compiled program is for any batch: it neither looks for padding nor cuts.
    cut = e.device.type == "cpu" and not torch.compiler.is_compiling()
    grouped = weights.attention == "published" and not weights.variant.rotary
    if tied and cut and lam_of_step is None and grouped:
        return _grouped_by_length(
            e, mask, z0, taus, weights, times, seed, rows, noise, trajectory, target,
            return_trajectory, precision,
        )  # fmt: skip

    pieces = [slice(None)]
    if cut and lam_of_step is None:  # whose draws are for the whole batch
        pieces = [slice(i, i + CPU_ROWS) for i in range(0, len(e), CPU_ROWS)] or pieces
    parts = [
        _composed(
            e[piece],
            mask[piece],
            z0[piece],
            taus,
            weights,
            times,
            seed,
            None if rows is None else rows[piece],
            None if noise is None else noise[:, piece],
            lam_of_step,
            trajectory,
            target,
            return_trajectory,
            precision,
            tied=tied,
        )
        for piece in pieces
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)


def _composed(
    e: Tensor,
    mask: Tensor,
    z0: Tensor,
    taus: Tensor,
    weights: SamplerWeights,
    times: Tensor,
    seed: Tensor | None,
    rows: Tensor | None,
    noise: Tensor | None,
    lam_of_step: Callable[[], Tensor] | None,
    trajectory: str,
    target: str,
    return_trajectory: bool,
    precision: str,
    *,
    tied: bool = False,
    padded: int | None = None,
) -> Tensor:
    """The definition over the ops noise_fusion and encoder.

    Args:
        tied: one lam for the leading padded positions of a row.
        padded: how many there are, the same in every row (at least 1): they become one token.
    """
    kept: Any = slice(None)
    kept_mask, first_key_bias = mask, None
    if padded is not None:
        kept = torch.cat((torch.zeros(1, dtype=torch.int64), torch.arange(padded, e.shape[1])))
        kept_mask, first_key_bias = mask[:, kept], e.new_full((len(e),), math.log(padded))

    def lam_of(i: int) -> dict[str, Any]:
        lam = None if noise is None else noise[i]
        if noise is None and lam_of_step is not None:
            lam = lam_of_step()
        return {"delta": weights.delta, "seed": seed, "rows": rows, "step": i, "lam": lam}

    def network(fused: Tensor) -> Tensor:
        options: dict[str, Any] = {
            "num_heads": weights.num_heads,
            "attention": weights.attention,
            "precision": precision,
            "variant": weights.variant,
        }
        if padded is not None:
            last, _ = encoder(
                fused[:, kept], kept_mask, weights.blocks, first_key_bias=first_key_bias, **options
            )
        else:
            if tied:
                fused = reference.tie_padding(fused, mask)
            last, _ = encoder(fused, mask, weights.blocks, **options)
        return F.layer_norm(last, last.shape[-1:], weights.norm_weight, weights.norm_bias, NORM_EPS)

    q = taus.shape[0]
    published = trajectory == "straight" and target == "data"
    if published and q > 0 and candidate(e.device) is Backend.TRITON:
        # There each update is one pass with the noise fusion that follows it.
        x, fused = z0, noise_fusion(e, z0, taus[0], **lam_of(0))
        points = [z0]
        for i in range(1, q):
            x, fused = euler_noise_fusion(e, x, network(fused), z0, taus[i], steps=q, **lam_of(i))
            points.append(x)
        points.append(euler_update(x, network(fused) - z0, q))
        return torch.stack(points) if return_trajectory else points[-1]

    def step_network(x: Tensor, i: int) -> Tensor:
        return network(noise_fusion(e, x, taus[i], **lam_of(i)))

    def velocity_of(pred: Tensor, x: Tensor, i: int) -> Tensor:
        if target == "velocity":
            return pred
        return flow.velocity(pred, z0, times[i], trajectory)

    return reference.euler_sampler(
        z0, step_network, velocity_of, q, return_trajectory=return_trajectory
    )


def network_declined(
    e: Tensor, tensors: Sequence[Tensor], weights: SamplerWeights, precision: str, tied: bool
) -> str:
    """Why the kernels of the sampler's network do not cover a call; empty where they do."""
    if needs_gradient(*tensors):
        return "its kernel has no backward pass, and a gradient is needed"
    if tied and weights.variant.rotary:
        return "its kernel has no rotary embedding with padding 'tied'"
    rotary = weights.variant.rotary
    return kernel_declines(
        e, weights.num_heads, precision, tied=tied, rotary=rotary
    ) or variant_declined(weights.blocks, e.device)


def run_cpp(
    kernel: str,
    e: Tensor,
    mask: Tensor,
    x: Tensor,
    taus: Tensor,
    weights: SamplerWeights,
    seed: Tensor | None,
    rows: Tensor | None,
    noise: Tensor | None,
    precision: str,
    tied: bool,
    out: Tensor,
    **options: bool,
) -> Tensor:
    """The extension's `kernel`, which fills `out`, from z0 or the guessed points `x`."""

    def array(tensor: Tensor) -> Any:
        return tensor.detach().contiguous().numpy()

    getattr(extension.load(), kernel)(
        weights.packed_for(e.shape[1], precision),
        *(array(t) for t in (weights.norm_weight, weights.norm_bias, e, mask, x, taus)),
        None if noise is None else array(noise),
        None if rows is None else array(rows),
        None if seed is None else int(seed),
        weights.delta,
        out.numpy(),
        torch.get_num_threads(),
        tied,
        **options,
    )
    return out


def run_triton(
    kernel: Callable[..., None],
    e: Tensor,
    mask: Tensor,
    x: Tensor,
    taus: Tensor,
    weights: SamplerWeights,
    seed: Tensor | None,
    rows: Tensor | None,
    noise: Tensor | None,
    precision: str,
    tied: bool,
    out: Tensor,
) -> Tensor:
    """The Triton launcher `kernel`, likewise."""
    inputs = (t.contiguous() for t in (e, mask, x, taus))
    lam = None if noise is None else noise.contiguous()
    kernel(*inputs, weights, lam, rows, seed, precision, tied, out)
    return out


def check_equal_padding(e: Tensor, mask: Tensor) -> None:
    """On the CPU, the leading padded positions of a row must hold equal embeddings.

    Raises:
        ValueError: names the first that does not.
    """
    # Elsewhere looking would wait for the device, and a compiled program does not look.
    if e.device.type != "cpu" or torch.compiler.is_compiling() or e.numel() == 0:
        return
    bits = e.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[e.element_size()])
    different = (bits != reference.tie_padding(bits, mask)).any(-1)
    if different.any():
        row, position = different.nonzero()[0].tolist()
        raise ValueError(
            "padding='tied' needs equal embeddings e at the leading padded positions of a row, "
            f"got another at e[{row}, {position}] than at e[{row}, 0]"
        )


def _grouped_by_length(
    e: Tensor,
    mask: Tensor,
    z0: Tensor,
    taus: Tensor,
    weights: SamplerWeights,
    times: Tensor,
    seed: Tensor | None,
    rows: Tensor | None,
    noise: Tensor | None,
    trajectory: str,
    target: str,
    return_trajectory: bool,
    precision: str,
) -> Tensor:
    """Tied padding: rows with equally many padded positions together, which are then one token."""
    points = (taus.shape[0] + 1,) if return_trajectory else ()
    out = z0.new_empty((*points, *z0.shape))
    padded = reference.leading_padding(mask).clamp(min=1)  # one position is a token already
    for count in padded.unique().tolist():
        for index in (padded == count).nonzero()[:, 0].split(CPU_ROWS * e.shape[1]):
            out[..., index, :] = _composed(
                e[index],
                mask[index],
                z0[index],
                taus,
                weights,
                times,
                seed,
                None if rows is None else rows[index],
                None if noise is None else noise[:, index],
                None,
                trajectory,
                target,
                return_trajectory,
                precision,
                padded=count,
            )
    return out


# --- for torch.compile and torch.export -----------------------------------------------------------


@torch.library.custom_op("fmrec_fast::euler_sampler", mutates_args=())
def _registered(
    e: Tensor,
    mask: Tensor,
    z0: Tensor,
    taus: Tensor,
    parameters: Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    num_heads: int,
    delta: float,
    seed: Tensor | None,
    rows: Tensor | None,
    noise: Tensor | None,
    return_trajectory: bool,
    padding: str,
    precision: str,
    backend: str,
) -> Tensor:
    weights = SamplerWeights.from_flat(parameters, norm_weight, norm_bias, num_heads, delta)
    with use_backend(backend):
        return euler_sampler(
            e,
            mask,
            z0,
            taus,
            weights,
            times=taus[:, 0],  # not read by what has a kernel
            seed=seed,
            rows=rows,
            noise=noise,
            return_trajectory=return_trajectory,
            padding=padding,
            precision=precision,
        )


@_registered.register_fake
def _(
    e, mask, z0, taus, parameters, norm_weight, norm_bias, num_heads, delta, seed, rows, noise,
    return_trajectory, padding, precision, backend,
):  # fmt: skip
    points = (taus.shape[0] + 1,) if return_trajectory else ()
    return z0.new_empty((*points, *z0.shape))
