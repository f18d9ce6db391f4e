"""Attention of short sequences with dropout on its probabilities, and its gradient, on chip.

    s = (query_scale q) k^T; p = softmax(s); out = drop(p) v

qkv [B, L, 3D] and query_scale [B, L], contiguous float32; out [B, L, D]; rows int64 [B], seed int64
scalar on the device, or None without dropout. No key is hidden: a query whose scale is 0 attends
uniformly. Scores and masks never reach device memory; the gradient computes both anew from qkv, so
that nothing is kept but the inputs.

The stream's position of the mask is head * L + query, its channel the key. A tile of queries meets
all T >= L keys at once, so that the softmax needs no second pass.
"""

import functools
import os

import torch
import triton
import triton.language as tl

from fmrec_fast.kernels.philox import load_seed, philox

# Keys T -> (queries to a tile, threads), forward and backward: what compiles without spilling.
FORWARD = {16: (16, 128), 32: (32, 128), 64: (32, 128), 128: (16, 256)}
BACKWARD = {16: (16, 128), 32: (16, 128), 64: (16, 256), 128: (16, 256)}
# What FMREC_FAST_AUTOTUNE=1 tries: (queries to a tile, threads).
SEARCH = [(m, t) for m in (16, 32, 64) for t in (64, 128, 256)]

WARP = 64 if torch.version.hip else 32
# How float32 is multiplied, on NVIDIA and AMD.
PRECISION = ("tf32x3", "ieee")
OPTIONS = {"enable_fp_fusion": False}
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(p_x, o_row, o_w, stride, length, DH: tl.constexpr):
    """[rows, W] of one head, 0 beyond the sequence and the head."""
    m_x = (o_row < length)[:, None] & (o_w < DH)[None, :]
    return tl.load(p_x + o_row[:, None] * stride + o_w[None, :], mask=m_x, other=0.0)


@triton.jit
def load_queries(p_q, p_scale, o_query, o_w, stride, length, DH: tl.constexpr):
    """The queries' scales [M], and the queries times them [M, W]."""
    b_scale = tl.load(p_scale + o_query, mask=o_query < length, other=0.0)
    return b_scale, load_rows(p_q, o_query, o_w, stride, length, DH) * b_scale[:, None]


@triton.jit
def load_keys(p_q, o_w, width, length, DH: tl.constexpr, T: tl.constexpr):
    """Keys and values of the head whose queries lie at p_q: [T, W] each."""
    o_key = tl.arange(0, T)
    b_k = load_rows(p_q + width, o_key, o_w, 3 * width, length, DH)
    b_v = load_rows(p_q + 2 * width, o_key, o_w, 3 * width, length, DH)
    return b_k, b_v


@triton.jit
def probabilities(b_q, b_k, length, M: tl.constexpr, T: tl.constexpr, PRECISION: tl.constexpr):
    """softmax(q k^T), [M, T]; 0 for keys beyond the sequence."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
    b_s = tl.where((tl.arange(0, T) < length)[None, :], b_s, float("-inf"))
    b_s = tl.exp2((b_s - tl.max(b_s, 1)[:, None]) * LOG2E)
    return b_s / tl.sum(b_s, 1)[:, None]


@triton.jit
def kept(
    p_rows, p_seed, b, head, o_query, site, threshold, length, T: tl.constexpr, M: tl.constexpr
):
    """Which probabilities [M, T] are not dropped."""
    k0, k1 = load_seed(p_seed)
    row = tl.load(p_rows + b).to(tl.uint32)
    b_group = tl.broadcast_to(tl.arange(0, T // 4).to(tl.uint32)[None, :], (M, T // 4))
    b_position = (head * length + o_query).to(tl.uint32)
    b_position = tl.broadcast_to(b_position[:, None], (M, T // 4))
    b_zero = b_group * 0
    w0, w1, w2, w3 = philox(k0, k1, b_group, b_position, b_zero + site.to(tl.uint32), b_zero + row)
    b_word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (M, T))
    return b_word >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["heads", "length", "site", "threshold", "factor"])
def forward_kernel(
    p_qkv,
    p_scale,
    p_rows,
    p_seed,
    p_out,
    heads,
    length,
    site,
    threshold,
    factor,
    DH: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
):
    """One program: M queries of one head of row b. Grid (B H, tiles)."""
    index = tl.program_id(0)
    b, head = (index // heads).to(tl.int64), index % heads
    width = heads * DH
    o_query = tl.program_id(1) * M + tl.arange(0, M)
    o_w = tl.arange(0, W)
    p_q = p_qkv + b * length * 3 * width + head * DH
    _, b_q = load_queries(p_q, p_scale + b * length, o_query, o_w, 3 * width, length, DH)  # [M, W]
    b_k, b_v = load_keys(p_q, o_w, width, length, DH, T)  # [T, W]
    b_p = probabilities(b_q, b_k, length, M, T, PRECISION)
    if DROP:
        m_kept = kept(p_rows, p_seed, b, head, o_query, site, threshold, length, T, M)
        b_p = tl.where(m_kept, b_p * factor, 0.0)
    b_out = tl.dot(b_p, b_v, input_precision=PRECISION)
    o_out = b * length * width + o_query[:, None] * width + head * DH + o_w[None, :]
    tl.store(p_out + o_out, b_out, mask=(o_query < length)[:, None] & (o_w < DH)[None, :])


@triton.jit(do_not_specialize=["heads", "length", "site", "threshold", "factor"])
def backward_kernel(
    p_grad,
    p_qkv,
    p_scale,
    p_rows,
    p_seed,
    p_d_qkv,
    heads,
    length,
    site,
    threshold,
    factor,
    DH: tl.constexpr,
    W: tl.constexpr,
    T: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
    M: tl.constexpr,
):
    """One program: one head of row b, M queries at a time. Grid (B H,)."""
    index = tl.program_id(0)
    b, head = (index // heads).to(tl.int64), index % heads
    width = heads * DH
    o_key, o_w = tl.arange(0, T), tl.arange(0, W)
    p_grad += b * length * width + head * DH
    p_q = p_qkv + b * length * 3 * width + head * DH
    p_d_q = p_d_qkv + b * length * 3 * width + head * DH
    b_k, b_v = load_keys(p_q, o_w, width, length, DH, T)  # [T, W]
    b_d_k = tl.zeros((T, W), tl.float32)
    b_d_v = tl.zeros((T, W), tl.float32)
    for start in tl.range(0, length, M, num_stages=1):
        o_query = start + tl.arange(0, M)
        b_scale, b_q = load_queries(
            p_q, p_scale + b * length, o_query, o_w, 3 * width, length, DH
        )  # [M], [M, W]
        b_grad = load_rows(p_grad, o_query, o_w, width, length, DH)
        b_p = probabilities(b_q, b_k, length, M, T, PRECISION)
        b_d_p = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)  # [M, T]
        b_dropped = b_p
        if DROP:
            m_kept = kept(p_rows, p_seed, b, head, o_query, site, threshold, length, T, M)
            b_dropped = tl.where(m_kept, b_p * factor, 0.0)
            b_d_p = tl.where(m_kept, b_d_p * factor, 0.0)
        b_d_v = tl.dot(tl.trans(b_dropped), b_grad, b_d_v, input_precision=PRECISION)
        b_d_s = b_p * (b_d_p - tl.sum(b_p * b_d_p, 1)[:, None])
        b_d_k = tl.dot(tl.trans(b_d_s), b_q, b_d_k, input_precision=PRECISION)
        b_d_q = tl.dot(b_d_s, b_k, input_precision=PRECISION) * b_scale[:, None]
        m_query = (o_query < length)[:, None] & (o_w < DH)[None, :]
        tl.store(p_d_q + o_query[:, None] * (3 * width) + o_w[None, :], b_d_q, mask=m_query)
    m_key = (o_key < length)[:, None] & (o_w < DH)[None, :]
    o_key = o_key[:, None] * (3 * width) + o_w[None, :]
    tl.store(p_d_q + width + o_key, b_d_k, mask=m_key)
    tl.store(p_d_q + 2 * width + o_key, b_d_v, mask=m_key)


def forward(
    qkv: torch.Tensor,
    query_scale: torch.Tensor,
    rows: torch.Tensor,
    seed: torch.Tensor | None,
    site: int,
    threshold: int,
    factor: float,
    num_heads: int,
    out: torch.Tensor,
) -> None:
    """Launch; `factor` is 1 / (1 - p). Shapes as above."""
    batch, length = qkv.shape[:2]
    if qkv.numel():
        tensors = (qkv, query_scale, rows, seed, out)
        grid = lambda meta: (batch * num_heads, triton.cdiv(length, meta["M"]))  # noqa: E731
        _launch("forward", grid, tensors, site, threshold, factor, num_heads)


def backward(
    grad: torch.Tensor,
    qkv: torch.Tensor,
    query_scale: torch.Tensor,
    rows: torch.Tensor,
    seed: torch.Tensor | None,
    site: int,
    threshold: int,
    factor: float,
    num_heads: int,
    d_qkv: torch.Tensor,
) -> None:
    """Launch; likewise."""
    if qkv.numel():
        tensors = (grad, qkv, query_scale, rows, seed, d_qkv)
        grid = (qkv.shape[0] * num_heads,)
        _launch("backward", grid, tensors, site, threshold, factor, num_heads)


def _launch(which: str, grid, tensors, site, threshold, factor, num_heads) -> None:
    length, head_width = tensors[-1].shape[1], tensors[-1].shape[2] // num_heads
    if which == "backward":
        head_width //= 3
    kernel, pinned = _tuned(which, max(triton.next_power_of_2(length), 16))
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
        kernel[grid](
            *tensors,
            num_heads,
            length,
            _word(site),
            _word(threshold),
            float(factor),
            **_constants(length, head_width, tensors[-2] is not None),
            **pinned,
            **OPTIONS,
        )


def _word(number: int) -> int:
    """The low 32 bits as the int32 with the same bits: one type for every number."""
    return (number + 2**31) % 2**32 - 2**31


def _constants(length: int, head_width: int, drop: bool, hip: bool = bool(torch.version.hip)):
    keys, width = (max(triton.next_power_of_2(n), 16) for n in (length, head_width))
    return {"DH": head_width, "W": width, "T": keys, "DROP": drop, "PRECISION": PRECISION[hip]}


@functools.cache
def _tuned(which: str, keys: int) -> tuple:
    """The kernel, and the pinned constants; under FMREC_FAST_AUTOTUNE=1 a search over configs."""
    kernel = forward_kernel if which == "forward" else backward_kernel
    if os.environ.get("FMREC_FAST_AUTOTUNE", "0") != "1" or triton.knobs.runtime.interpret:
        queries, threads = (FORWARD if which == "forward" else BACKWARD)[keys]
        return kernel, {"M": queries, "num_warps": threads // WARP}
    configs = [triton.Config({"M": m}, num_warps=max(t // WARP, 1)) for m, t in SEARCH]
    return triton.autotune(configs, key=["length", "DH", "DROP"])(kernel), {}


def _compile_cases(which: str) -> list[dict]:
    """With dropout: the paper's size, the widest head, the longest sequences."""
    kernel, table = (forward_kernel, FORWARD) if which == "forward" else (backward_kernel, BACKWARD)
    pointers = "p_qkv p_scale p_out" if which == "forward" else "p_grad p_qkv p_scale p_d_qkv"
    signature = dict.fromkeys(pointers.split(), "*fp32") | {"p_rows": "*i64", "p_seed": "*i64"}
    signature |= dict.fromkeys("heads length site threshold".split(), "i32") | {"factor": "fp32"}
    cases = []
    for length, width in ((50, 32), (50, 64), (100, 32)):
        for hip in (False, True):
            constants = _constants(length, width, True, hip)
            queries, threads = table[constants["T"]]
            cases.append(
                {
                    "kernel": kernel,
                    "name": f"{kernel.__name__}[{length},{width}]",
                    "signature": signature,
                    "constants": constants | {"M": queries},
                    "threads": threads,
                    "options": OPTIONS,
                    "dtypes": ["float32"],
                    "backends": ("hip",) if hip else ("cuda",),
                }
            )
    return cases


COMPILE_CASES = _compile_cases("forward") + _compile_cases("backward")
