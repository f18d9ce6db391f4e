"""What the network of whole sequences (`transformer`) and the one in tiles (`tiles`) are made of.

PRECISION is that of the products' operands: "float32", "tf32" (rounded to nearest here, as the
matrix units would truncate) or "bf16"; accumulators, norms, softmax and residuals are float32.
INPUT says how they are multiplied: "3xtf32" or "ieee" for float32, "tf32", "bf16".

Weights come in two tensors of all blocks (`launch.pack`): matrices [blocks, 12 D^2], each [out, in]
row by row, and vectors [blocks, 13 D] in float32.
"""

import triton
import triton.language as tl

from fmrec_fast.kernels.philox import four_normals

LOG2E = tl.constexpr(1.4426950408889634)
NORM_EPS = tl.constexpr(1e-12)
RMS_EPS = tl.constexpr(1e-8)
# Where a block's parameters lie, in units of D^2 and of D.
KEY, VALUE, OUTPUT, W1, W2 = (tl.constexpr(i) for i in (1, 2, 3, 4, 8))
MATRICES = tl.constexpr(12)
NORM1, B_QUERY, B_VALUE, B_OUTPUT, NORM2, B1, B2 = (tl.constexpr(i) for i in (0, 2, 4, 5, 6, 8, 12))
VECTORS = tl.constexpr(13)


@triton.jit
def operand(b_x, PRECISION: tl.constexpr, INPUT: tl.constexpr):
    """float32 values as operands of a product, rounded to nearest."""
    if PRECISION == "tf32":  # which the matrix units would cut off
        bits = (b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
        b_x = bits.to(tl.float32, bitcast=True)
    elif PRECISION == "bf16":
        if INPUT == "bf16":
            b_x = b_x.to(tl.bfloat16)
        else:  # Triton's interpreter, whose conversion cuts off and which cannot multiply them
            bits = b_x.to(tl.int32, bitcast=True)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
            b_x = bits.to(tl.float32, bitcast=True)
    return b_x


@triton.jit
def product(b_a, b_b, b_c, INPUT: tl.constexpr):
    """a b + c in float32."""
    if INPUT == "bf16":
        b_c = tl.dot(b_a, b_b, b_c)
    elif INPUT == "3xtf32":
        # a = a_high + a_low, so too b; the matrix units drop a_low and b_low by themselves, so
        # that a is read where it lies. Left out is a_low b_low, 2^-22 of the product.
        b_low = b_a - high_bits(b_a)
        b_high = high_bits(b_b)
        b_c = tl.dot(b_low, b_high, b_c, input_precision="tf32")
        b_c = tl.dot(b_a, b_b - b_high, b_c, input_precision="tf32")
        b_c = tl.dot(b_a, b_high, b_c, input_precision="tf32")
    else:  # weights in bf16 too, where Triton interprets
        b_c = tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_c, input_precision=INPUT)
    return b_c


@triton.jit
def high_bits(b_x):
    """The leading 10 bits of the mantissa, the rest cut off."""
    return (b_x.to(tl.int32, bitcast=True) & -0x2000).to(tl.float32, bitcast=True)


@triton.jit
def norm_columns(b_x, p_weight, D: tl.constexpr, RMS: tl.constexpr):
    """Layer or RMS norm of each column of [D, T]; the layer norm's bias lies behind the weight."""
    o_d = tl.arange(0, D)
    if RMS:
        b_scale = tl.rsqrt(tl.sum(b_x * b_x, 0) / D + RMS_EPS)  # [T]
        b_x = b_x * b_scale[None, :] * tl.load(p_weight + o_d)[:, None]
    else:
        b_x -= (tl.sum(b_x, 0) / D)[None, :]
        b_scale = tl.rsqrt(tl.sum(b_x * b_x, 0) / D + NORM_EPS)  # [T]
        b_weight, b_bias = tl.load(p_weight + o_d), tl.load(p_weight + D + o_d)  # [D]
        b_x = b_x * b_scale[None, :] * b_weight[:, None] + b_bias[:, None]
    return b_x


@triton.jit
def norm_row(b_x, b_weight, b_bias, D: tl.constexpr):
    """Layer norm of one row [D]."""
    b_x -= tl.sum(b_x, 0) / D
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / D + NORM_EPS) * b_weight + b_bias


@triton.jit
def rms_norm_row(b_x, b_weight, D: tl.constexpr):
    """RMS norm of one row [D]."""
    return b_x * tl.rsqrt(tl.sum(b_x * b_x, 0) / D + RMS_EPS) * b_weight


@triton.jit
def gelu(b_x):
    """tanh-GELU as h / (1 + exp(-2u)), u = sqrt(2 / pi) (h + 0.044715 h^3)."""
    b_u = b_x * (0.7978845608028654 + 0.035677408136300125 * b_x * b_x)
    return b_x / (1.0 + tl.exp2(b_u * (-2.0 * LOG2E)))


@triton.jit
def column_of(b_x, column, T: tl.constexpr):
    """Column `column` of [D, T]."""
    return tl.sum(tl.where((tl.arange(0, T) == column)[None, :], b_x, 0.0), 1)


@triton.jit
def feed_forward(
    b_x,
    p_matrices,
    p_vectors,
    D: tl.constexpr,
    T: tl.constexpr,
    RMS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    INPUT: tl.constexpr,
):
    """x + ffn(norm(x)) of each column of [D, T], CHUNK inner channels at a time."""
    o_d = tl.arange(0, D)
    b_h = operand(norm_columns(b_x, p_vectors + NORM2 * D, D, RMS), PRECISION, INPUT)
    b_x += tl.load(p_vectors + B2 * D + o_d)[:, None]
    for first in tl.range(0, 4 * D, CHUNK, num_stages=STAGES):
        o_c = first + tl.arange(0, CHUNK)
        b_w1 = tl.load(p_matrices + W1 * D * D + o_c[:, None] * D + o_d[None, :])  # [CHUNK, D]
        b_w2 = tl.load(p_matrices + W2 * D * D + o_d[:, None] * (4 * D) + o_c[None, :])
        b_inner = product(b_w1, b_h, tl.zeros((CHUNK, T), tl.float32), INPUT)
        b_inner = gelu(b_inner + tl.load(p_vectors + B1 * D + o_c)[:, None])  # [CHUNK, T]
        b_x = product(b_w2, operand(b_inner, PRECISION, INPUT), b_x, INPUT)
    return b_x


@triton.jit
def feed_forward_row(
    b_x,
    p_matrices,
    p_vectors,
    D: tl.constexpr,
    RMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The same of one row [D], on the ordinary units."""
    o_d = tl.arange(0, D)
    b_weight = tl.load(p_vectors + NORM2 * D + o_d)
    if RMS:
        b_h = rms_norm_row(b_x, b_weight, D)
    else:
        b_h = norm_row(b_x, b_weight, tl.load(p_vectors + NORM2 * D + D + o_d), D)
    b_x += tl.load(p_vectors + B2 * D + o_d)
    for first in tl.range(0, 4 * D, CHUNK, num_stages=1):
        o_c = first + tl.arange(0, CHUNK)
        b_w1 = tl.load(p_matrices + W1 * D * D + o_c[:, None] * D + o_d[None, :])  # [CHUNK, D]
        b_w2 = tl.load(p_matrices + W2 * D * D + o_d[:, None] * (4 * D) + o_c[None, :])
        b_inner = tl.sum(b_w1.to(tl.float32) * b_h[None, :], 1)
        b_inner = gelu(b_inner + tl.load(p_vectors + B1 * D + o_c))  # [CHUNK]
        b_x += tl.sum(b_w2.to(tl.float32) * b_inner[None, :], 1)
    return b_x


@triton.jit
def fuse_rows(
    p_e,
    p_noise,
    b_shift,
    k0,
    k1,
    row,
    step,
    delta,
    b_position,
    m_row,
    D: tl.constexpr,
    T: tl.constexpr,
):
    """E = e + lam * shift at T positions of one sequence, [T, D], 0 outside m_row.

    lam comes from p_noise unless that is None.
    """
    o_d = tl.arange(0, D)
    o_e = b_position[:, None] * D + o_d[None, :]
    m_e = m_row[:, None]
    b_e = tl.load(p_e + o_e, mask=m_e, other=0.0)  # [T, D]
    if p_noise is not None:
        b_lam = tl.load(p_noise + o_e, mask=m_e, other=0.0)  # [T, D]
    else:
        G: tl.constexpr = D // 4
        b_group = tl.broadcast_to(tl.arange(0, G).to(tl.uint32)[None, :], (T, G))
        b_place = tl.broadcast_to(b_position.to(tl.uint32)[:, None], (T, G))
        b_normal = four_normals(k0, k1, b_group, b_place, tl.cast(step, tl.uint32), row)
        b_lam = tl.fma(tl.reshape(b_normal, (T, D)), delta, delta)
    b_x = tl.fma(b_lam, tl.broadcast_to(b_shift[None, :], (T, D)), b_e)
    return tl.where(m_e, b_x, 0.0)
