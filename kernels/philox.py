"""The package's noise stream on the device: what `fmrec_fast.noise` defines, in registers.

Counter words (channel // 4, position, step, row), each uint32; key = the 64-bit seed, low word
first; ten Philox4x32 rounds, the words of `tl.philox`. They become four uniforms as in
`tl.uint_to_uniform_float` and two Box-Muller pairs as in `tl.pair_uniform_to_normal`: the
standard normals of channels 4c .. 4c+3 in that order, float32, equal to rounding.

Two things are written out here because Triton's own spend more instructions: one 32 x 32 -> 64
bit product gives both halves that a round needs (one IMAD.WIDE, not IMAD.HI and IMAD), and sine
and cosine share one argument reduction, without the branches and the local array that libdevice
keeps for arguments far beyond 2 pi.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(10)
M0 = tl.constexpr(0xD2511F53)
M1 = tl.constexpr(0xCD9E8D57)
W0 = tl.constexpr(0x9E3779B9)
W1 = tl.constexpr(0xBB67AE85)

# Adding it to a small float32 and taking it away again rounds to the nearest integer, which the
# low bits of the sum hold.
ROUNDER = tl.constexpr(12582912.0)
# pi / 2 in three parts; the products of the first two with 0 .. 4 are exact.
HALF_PI_A = tl.constexpr(1.5703125)
HALF_PI_B = tl.constexpr(0.0004837512969970703)
HALF_PI_C = tl.constexpr(7.54979e-08)
# sin r = r + r^3 S(r^2), cos r = 1 - r^2 / 2 + r^4 C(r^2); least maximum error on |r| <= pi / 4.
S0, S1, S2 = (
    tl.constexpr(-0.16666655242443085),
    tl.constexpr(0.008332166820764542),
    tl.constexpr(-0.0001951565791387111),
)
C0, C1, C2 = (
    tl.constexpr(0.04166664555668831),
    tl.constexpr(-0.0013887352542951703),
    tl.constexpr(2.443660923745483e-05),
)


@triton.jit
def load_seed(p_seed):
    """The two key words of an int64 scalar: uint32, low word first."""
    seed = tl.load(p_seed).to(tl.uint64, bitcast=True)
    return (seed & 0xFFFFFFFF).to(tl.uint32), (seed >> 32).to(tl.uint32)


@triton.jit
def philox(k0, k1, c0, c1, c2, c3):
    """Philox4x32-10: the four words of each counter; everything uint32."""
    for _ in tl.static_range(ROUNDS):
        product0 = c0.to(tl.uint64) * M0
        product1 = c2.to(tl.uint64) * M1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        k0 = tl.add(k0, W0, sanitize_overflow=False)
        k1 = tl.add(k1, W1, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def normal_pair(u1, u2):
    """Box-Muller: r cos a and r sin a with r = sqrt(-2 log u1), a = 2 pi u2; float32."""
    radius = tl.sqrt(-2.0 * tl.log(tl.maximum(u1, 1.0e-7)))
    angle = 6.283185307179586 * u2
    # angle = quarters * pi / 2 + r, |r| <= pi / 4.
    rounded = tl.fma(u2, 4.0, ROUNDER)
    quarters = rounded - ROUNDER
    quadrant = rounded.to(tl.int32, bitcast=True)
    r = tl.fma(quarters, -HALF_PI_A, angle)
    r = tl.fma(quarters, -HALF_PI_B, r)
    r = tl.fma(quarters, -HALF_PI_C, r)
    t = r * r
    sine = tl.fma(tl.fma(tl.fma(S2, t, S1), t, S0) * t, r, r)
    cosine = tl.fma(tl.fma(tl.fma(tl.fma(C2, t, C1), t, C0), t, -0.5), t, 1.0)
    odd = (quadrant & 1) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    # cos is negative in quadrants 1 and 2, sin in 2 and 3.
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    y = tl.where((quadrant & 2) != 0, -y, y)
    return radius * x, radius * y


@triton.jit
def four_normals(k0, k1, b_group, b_position, step, row):
    """Standard normals of the four channels of each group.

    Args:
        k0, k1: the key words (`load_seed`).
        b_group, b_position: uint32 of one shape [...].
        step, row: uint32 scalars.

    Returns:
        float32 [..., 2, 2]; [..., i, k] belongs to channel 4 group + 2 i + k.
    """
    b_step = b_position * 0 + step
    b_row = b_position * 0 + row
    w0, w1, w2, w3 = philox(k0, k1, b_group, b_position, b_step, b_row)
    n0, n1 = normal_pair(tl.uint_to_uniform_float(w0), tl.uint_to_uniform_float(w1))
    n2, n3 = normal_pair(tl.uint_to_uniform_float(w2), tl.uint_to_uniform_float(w3))
    return tl.join(tl.join(n0, n2), tl.join(n1, n3))
