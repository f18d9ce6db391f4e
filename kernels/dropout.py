"""Dropout with masks from the stream, tanh-GELU before it and residual after it; its gradient.

    out[b, i, c] = residual[b, i, c] + where(kept, f(x[b, i, c]) * scale, 0)
    kept = word (c % 4) of Philox at (c // 4, offset + stride * i, site, rows[b]) >= threshold

f is the identity or tanh-GELU; the gradient is the same pass over `grad` with f(x) replaced by
grad * f'(at). x, out, residual, at [B, P, C], contiguous float32, bfloat16 or float16; arithmetic
is float32; rows int64 [B]; seed int64 scalar on the device. Masks are generated in registers,
forward and backward, never stored.

The unit of work is a group: the four channels of one Philox call, and in float32 one 128-bit access
(see `noise_fusion`).
"""

import functools
import os

import torch
import triton
import triton.language as tl

from fmrec_fast.kernels.philox import load_seed, philox

# The pinned configuration, as that of noise fusion; not tuned by measurement.
PINNED = {"GROUPS": 128}
THREADS = 128
# What FMREC_FAST_AUTOTUNE=1 tries: (constants, threads).
SEARCH = [({"GROUPS": g}, g // k) for g in (64, 128, 256, 512) for k in (1, 2)]

WARP = 64 if torch.version.hip else 32
OPTIONS = {"enable_fp_fusion": False}
MAX_GRID_Y = 65535

# What stands before the mask.
IDENTITY, GELU, GELU_GRADIENT = 0, 1, 2
_GELU = tl.constexpr(GELU)
_GELU_GRADIENT = tl.constexpr(GELU_GRADIENT)


@triton.jit
def gelu_sigmoid(x):
    """s with GELU(x) = x s: 1 / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    # -2 sqrt(2 / pi) log2(e), and 0.044715 times that.
    exponent = x * (x * x * -0.1029432397 - 2.302208198)
    return 1.0 / (1.0 + tl.exp2(tl.minimum(exponent, 100.0)))


@triton.jit
def gelu_derivative(x):
    """s + x s (1 - s) d(2 u)/dx."""
    s = gelu_sigmoid(x)
    return s + x * s * (1.0 - s) * (x * x * 0.2140644888 + 1.595769122)


@triton.jit(do_not_specialize=["batch", "length", "site", "offset", "stride", "threshold", "scale"])
def dropout_kernel(
    p_x,
    p_at,
    p_residual,
    p_rows,
    p_seed,
    p_out,
    batch,
    length,
    site,
    offset,
    stride,
    threshold,
    scale,
    C: tl.constexpr,
    ACTIVATION: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One program: GROUPS groups of one row b. Grid (tiles, y, z), b = z * |y| + y."""
    b = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    if b >= batch:
        return
    # Groups per position; the last may reach beyond C.
    G: tl.constexpr = (C + 3) // 4
    first = tl.program_id(0) * GROUPS
    b_group = (first + tl.arange(0, GROUPS)).to(tl.uint32)  # [GROUPS]
    o_slot = (first * 4 + tl.arange(0, 4 * GROUPS)).to(tl.uint32)  # [4 GROUPS]
    m_x = o_slot < length.to(tl.uint32) * (4 * G)
    if C % 4 == 0:
        o_x = o_slot
    else:
        o_channel = o_slot % (4 * G)
        o_x = o_slot // (4 * G) * C + o_channel
        m_x = m_x & (o_channel < C)
    start = b * length * C
    b_x = tl.load(p_x + start + o_x, mask=m_x, other=0.0).to(tl.float32)  # [4 GROUPS]
    if ACTIVATION == _GELU:
        b_x = b_x * gelu_sigmoid(b_x)
    if ACTIVATION == _GELU_GRADIENT:
        b_at = tl.load(p_at + start + o_x, mask=m_x, other=0.0).to(tl.float32)  # [4 GROUPS]
        b_x = b_x * gelu_derivative(b_at)
    row = tl.load(p_rows + b).to(tl.uint32)
    k0, k1 = load_seed(p_seed)
    b_position = b_group // G * stride.to(tl.uint32) + offset.to(tl.uint32)
    b_zero = b_group * 0
    w0, w1, w2, w3 = philox(
        k0, k1, b_group % G, b_position, b_zero + site.to(tl.uint32), b_zero + row
    )
    b_word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (4 * GROUPS,))
    # Selected away, not multiplied by 0: NaN and infinity drop too.
    b_out = tl.where(b_word >= threshold.to(tl.uint32), b_x * scale, 0.0)
    if RESIDUAL:
        b_residual = tl.load(p_residual + start + o_x, mask=m_x, other=0.0)  # [4 GROUPS]
        b_out += b_residual.to(tl.float32)
    tl.store(p_out + start + o_x, b_out, mask=m_x)


def dropout(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    rows: torch.Tensor,
    seed: torch.Tensor,
    site: int,
    offset: int,
    stride: int,
    threshold: int,
    scale: float,
    out: torch.Tensor,
    *,
    gelu: bool = False,
    gelu_at: torch.Tensor | None = None,
) -> None:
    """out = residual + dropout(f(x)); `gelu_at` makes it the gradient at these inputs."""
    batch, length, channels = x.shape
    if length * (channels + 3) >= 2**31:
        raise ValueError(f"one row must have less than 2**31 elements, got {length} x {channels}")
    if x.numel() == 0:
        return
    groups = length * triton.cdiv(channels, 4)
    kernel, constants = _tuned()
    words = (_word(number) for number in (site, offset, stride, threshold))
    arguments = (batch, length, *words, float(scale))
    activation = GELU_GRADIENT if gelu_at is not None else GELU if gelu else IDENTITY
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(x):
        kernel[lambda meta: _grid(triton.cdiv(groups, meta["GROUPS"]), batch)](
            x,
            x if gelu_at is None else gelu_at,
            x if residual is None else residual,
            rows.contiguous(),
            seed,
            out,
            *arguments,
            C=channels,
            ACTIVATION=activation,
            RESIDUAL=residual is not None,
            **constants,
            **OPTIONS,
        )


def _word(number: int) -> int:
    """The low 32 bits as the int32 with the same bits: one type for every number."""
    return (number + 2**31) % 2**32 - 2**31


def _grid(tiles: int, batch: int) -> tuple[int, int, int]:
    """(tiles, y, z) with y * z >= batch; y and z each have 16 bits."""
    z = triton.cdiv(batch, MAX_GRID_Y)
    return tiles, triton.cdiv(batch, z), z


@functools.cache
def _tuned() -> tuple:
    """The kernel, and the pinned constants; under FMREC_FAST_AUTOTUNE=1 a search over configs."""
    if os.environ.get("FMREC_FAST_AUTOTUNE", "0") != "1" or triton.knobs.runtime.interpret:
        return dropout_kernel, {**PINNED, "num_warps": THREADS // WARP}
    configs = [triton.Config(c, num_warps=max(t // WARP, 1)) for c, t in SEARCH]
    return triton.autotune(configs, key=["length", "C"])(dropout_kernel), {}


def _compile_case(name: str, activation: int, residual: bool) -> dict:
    pointers = dict.fromkeys(("p_x", "p_at", "p_residual", "p_out"), "*{dtype}")
    pointers |= {"p_rows": "*i64", "p_seed": "*i64"}
    scalars = dict.fromkeys("batch length site offset stride threshold".split(), "i32")
    return {
        "kernel": dropout_kernel,
        "name": name,
        "signature": pointers | scalars | {"scale": "fp32"},
        "constants": {"C": 128, "ACTIVATION": activation, "RESIDUAL": residual, **PINNED},
        "threads": THREADS,
        "options": OPTIONS,
    }


COMPILE_CASES = [
    _compile_case("dropout_kernel[residual]", IDENTITY, True),
    _compile_case("dropout_kernel[gelu]", GELU, False),
    _compile_case("dropout_kernel[gelu-gradient]", GELU_GRADIENT, False),
]
