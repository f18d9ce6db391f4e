"""Rotary embedding of one head on chip: what `kernels/transformer.py` needs for Fave's blocks.

A head's channels j and j + D/H/2 are turned by the position's angle j; p_rotary [2, L, D/H/2] holds
cosines and sines.
"""

import triton
import triton.language as tl


@triton.jit
def channels(o_w, p_rotary, DH: tl.constexpr, W: tl.constexpr):
    """Which of a head's channels the rows o_w of [W, T] hold; DH where there is none.

    Halves that are rotated together are filled up each by itself, so that they stay halves.
    """
    if W != DH:
        if p_rotary is not None:
            o_pair = o_w % (W // 2)
            o_w = tl.where(o_pair < DH // 2, o_w // (W // 2) * (DH // 2) + o_pair, DH)
    return o_w


@triton.jit
def rotation(p_rotary, o_j, o_t, length, DH: tl.constexpr):
    """Cosines and sines of the angles o_j at the positions o_t: [o_j, o_t] each."""
    o_angle = o_t[None, :] * (DH // 2) + o_j[:, None]
    m_angle = (o_j < DH // 2)[:, None] & ((o_t >= 0) & (o_t < length))[None, :]
    b_cos = tl.load(p_rotary + o_angle, mask=m_angle, other=0.0)
    b_sin = tl.load(p_rotary + length * (DH // 2) + o_angle, mask=m_angle, other=0.0)
    return b_cos, b_sin


@triton.jit
def rotate(b_x, b_cos, b_sin, W: tl.constexpr, T: tl.constexpr):
    """The two halves of [W, T] as pairs, turned by the angles [W / 2, T]."""
    b_low, b_high = tl.split(tl.permute(tl.reshape(b_x, (2, W // 2, T)), (1, 2, 0)))
    b_pair = tl.join(b_low * b_cos - b_high * b_sin, b_high * b_cos + b_low * b_sin)
    return tl.reshape(tl.permute(b_pair, (2, 0, 1)), (W, T))
