"""Every binding of fmrec_fast._C under random calls: right ones are served, wrong ones refused.

Arrays lie between guard bytes, so that a write outside them shows even without a sanitizer.
`make sanitize` runs this file, with the other tests of the extension, under AddressSanitizer and
UndefinedBehaviorSanitizer.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmrec_fast import extension
from fmrec_fast.config import PRECISIONS

if not extension.available():
    pytest.skip(str(extension.reason()), allow_module_level=True)

C = extension.load()
GUARD = 64
GUARD_BYTE = 0xA5
# What an output holds before the call: a NaN that no arithmetic makes.
UNWRITTEN = np.uint32(0x7FC0DEAD)
# Facts about the build, and the choice of instruction set; they take no array.
WITHOUT_ARRAYS = {"build_info", "isa", "openmp", "set_isa", "supported_isas"}
WITHOUT_ARRAYS |= {"item_cross_entropy_cache", "floats", "release_memory", "same_values"}

sizes = st.integers(0, 7)
INT64 = np.iinfo(np.int64)
words = st.integers(INT64.min, INT64.max)


@dataclass
class Argument:
    """One array argument: its memory, and what a wrong one may look like."""

    array: np.ndarray
    memory: np.ndarray
    role: str
    limit: int | None = None
    before: bytes = b""

    def guards_hold(self) -> bool:
        edge = self.memory[:GUARD], self.memory[-GUARD:]
        return all((part == GUARD_BYTE).all() for part in edge)


@dataclass
class Call:
    """The arguments of one call, all of them right."""

    draw: Any
    arrays: dict[str, Argument] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)

    def _place(self, name: str, values: np.ndarray, role: str, limit: int | None = None):
        memory = np.full(values.nbytes + 2 * GUARD, GUARD_BYTE, np.uint8)
        inner = memory[GUARD : GUARD + values.nbytes]
        array = inner.view(values.dtype).reshape(values.shape)
        array[...] = values
        self.arrays[name] = Argument(array, memory, role, limit)

    def floats(self, name: str, *shape: int) -> None:
        """An input of float32, now and then with values that are not finite."""
        rng = np.random.default_rng(self.draw(st.integers(0, 99)))
        values = rng.standard_normal(shape).astype(np.float32)
        odd = self.draw(st.sampled_from([None, None, np.nan, np.inf, -np.inf, 1e-42, 3e38]))
        if odd is not None:
            values[rng.random(shape) < 0.2] = odd
        self._place(name, values, "input")

    def integers(self, name: str, *shape: int, limit: int | None = None) -> None:
        """An input of int64: any value, or 0 .. limit - 1."""
        rng = np.random.default_rng(self.draw(st.integers(0, 99)))
        low, high = (INT64.min, INT64.max) if limit is None else (0, max(limit, 1))
        self._place(name, rng.integers(low, high, shape), "input", limit)

    def flags(self, name: str, *shape: int) -> None:
        rng = np.random.default_rng(self.draw(st.integers(0, 99)))
        self._place(name, rng.random(shape) < 0.7, "input")

    def output(self, name: str, *shape: int) -> None:
        """Every element of it must be written."""
        self._place(name, np.full(shape, UNWRITTEN).view(np.float32), "output")

    def integer_output(self, name: str, *shape: int) -> None:
        """The same of int64."""
        values = np.full((*shape[:-1], 2 * shape[-1]), UNWRITTEN).view(np.int64)
        self._place(name, values, "output")

    def sums(self, name: str, *shape: int) -> None:
        """It is added to."""
        self._place(name, np.zeros(shape, np.float32), "sums")

    def double_sums(self, name: str, *shape: int) -> None:
        """The same of float64."""
        self._place(name, np.zeros(shape), "sums")

    def maybe(self, name: str) -> bool:
        """Whether an argument that may be None is given."""
        if self.draw(st.booleans()):
            return True
        self.plain[name] = None
        return False

    def arguments(self) -> dict[str, Any]:
        return {name: a.array for name, a in self.arrays.items()} | self.plain


def sizes_of(call: Call, names: str) -> list[int]:
    return [call.draw(sizes) for _ in names.split()]


def blocks_of(call: Call, width: int, count: int) -> list[tuple[np.ndarray, ...]]:
    rng = np.random.default_rng(call.draw(st.integers(0, 99)))
    square, vector = (width, width), (width,)
    norm = [vector, vector]
    shapes = [*norm, *[square, vector] * 4, *norm]
    shapes += [(4 * width, width), (4 * width,), (width, 4 * width), vector]
    return [
        tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        for _ in range(count)
    ]


def packed(call: Call, length: int) -> int:
    """A stack of the narrowest width and its neighbours, at times Fave's; returns the width."""
    width = call.draw(st.sampled_from([16, 32, 48]))
    heads = call.draw(st.sampled_from([1, 2]))
    blocks = blocks_of(call, width, call.draw(st.integers(1, 2)))
    rotary = None
    if call.draw(st.booleans()):  # RMS norms, rotated queries and keys
        norm_biases = (1, 11)
        blocks = [tuple(None if i in norm_biases else a for i, a in enumerate(b)) for b in blocks]
        rotary = np.random.default_rng(0).standard_normal((length, width // heads), np.float32)
    precision = call.draw(st.sampled_from(PRECISIONS))
    call.plain["packed"] = C.PackedEncoder(blocks, heads, rotary, precision)
    return width


def noise_fusion_forward(call: Call) -> None:
    b, length, d = sizes_of(call, "B L D")
    call.floats("e", b, length, d)
    call.floats("shift", b, d)
    call.integers("rows", b)
    call.output("out", b, length, d)
    call.plain |= {"seed": call.draw(words), "step": call.draw(words), "delta": 0.1}


def noise_fusion_backward(call: Call) -> None:
    b, length, d = sizes_of(call, "B L D")
    call.floats("grad", b, length, d)
    call.integers("rows", b)
    call.output("d_shift", b, d)
    call.plain |= {"seed": call.draw(words), "step": call.draw(words), "delta": 0.1}


def noise_lambda(call: Call) -> None:
    b, length, d = sizes_of(call, "B L D")
    call.integers("rows", b)
    call.output("out", b, length, d)
    call.plain |= {"seed": call.draw(words), "step": call.draw(words), "delta": 0.1}


def stream_normals(call: Call) -> None:
    b, d = sizes_of(call, "B D")
    call.integers("rows", b)
    call.output("out", b, call.draw(st.sampled_from([d, 2043 + d])))  # one run and two
    call.plain |= {"seed": call.draw(words), "step": call.draw(words)}


def stream_words(call: Call) -> None:
    call.integer_output("out", call.draw(st.integers(0, 600)))
    call.plain |= {"seed": call.draw(words), "first": call.draw(words)}


def dropout(call: Call) -> None:
    shape = sizes_of(call, "B P C")
    call.floats("x", *shape)
    call.integers("rows", shape[0])
    call.output("out", *shape)
    for name in ("residual", "gelu_at"):
        if call.maybe(name):
            call.floats(name, *shape)
    call.plain |= {name: call.draw(words) for name in ("seed", "site")}
    call.plain |= {f"position_{name}": call.draw(words) for name in ("offset", "stride")}
    call.plain |= {"p": call.draw(st.floats(0, 0.999)), "gelu": call.draw(st.booleans())}
    if call.maybe("row_scale"):
        call.floats("row_scale", shape[0])
    if "residual" not in call.arrays and call.maybe("dx"):
        call.floats("dx", *shape)
        call.output("d_out", *shape)
        call.plain["gelu"] = "gelu_at" not in call.arrays
        if not call.plain["gelu"]:
            call.floats("d_grad", *shape)


def linear_precision(call: Call) -> None:
    names = ["float32", "tf32", *(["bf16"] if C.isa().startswith("amx") else [])]
    call.plain["precision"] = call.draw(st.sampled_from(names))


def linear_forward(call: Call) -> None:
    m, i, o = call.draw(sizes), *(16 * call.draw(st.integers(1, 4)) for _ in "IO")
    call.floats("x", m, i)
    call.floats("weight", o, i)
    call.floats("bias", o)
    call.output("out", m, o)
    linear_precision(call)


def linear_backward(call: Call) -> None:
    m, i, o = call.draw(sizes), *(16 * call.draw(st.integers(1, 4)) for _ in "IO")
    call.floats("grad", m, o)
    call.floats("x", m, i)
    call.floats("weight", o, i)
    for name, shape in (("d_x", (m, i)), ("d_weight", (o, i)), ("d_bias", (o,))):
        if call.maybe(name):
            call.output(name, *shape)
    linear_precision(call)


def feed_forward(call: Call, weights: str) -> tuple[int, int, int, int]:
    """What both directions take; returns (B, P, D, F)."""
    b, positions = sizes_of(call, "B P")
    d, f = (16 * call.draw(st.integers(1, 3)) for _ in "DF")
    call.floats("x", b, positions, d)
    shapes = {"w1": (f, d), "b1": (f,), "w2": (d, f)}
    for name in weights.split():
        call.floats(name, *shapes.get(name, (d,)))
    call.plain["p"] = call.draw(st.floats(0, 0.999))
    linear_precision(call)
    return b, positions, d, f


def feed_forward_forward(call: Call) -> None:
    b, positions, d, f = feed_forward(call, "norm_weight norm_bias w1 b1 w2 b2")
    call.integers("rows", b)
    if call.plain["p"] > 0 or call.maybe("kept"):
        call.integer_output("kept", b, positions, (f + 2 * d + 63) // 64)
    call.output("out", b, positions, d)
    call.plain |= {name: call.draw(words) for name in ("seed", "site")}
    call.plain |= {f"position_{name}": call.draw(words) for name in ("offset", "stride")}


def feed_forward_backward(call: Call) -> None:
    b, positions, d, f = feed_forward(call, "norm_weight norm_bias w1 b1 w2")
    call.floats("grad", b, positions, d)
    if call.plain["p"] > 0 or call.maybe("kept"):
        call.integers("kept", b, positions, (f + 2 * d + 63) // 64)
    call.output("d_x", b, positions, d)
    shapes = {"d_w1": (f, d), "d_b1": (f,), "d_w2": (d, f)}
    for name in ("d_norm_weight", "d_norm_bias", "d_w1", "d_b1", "d_w2", "d_b2"):
        call.output(name, *shapes.get(name, (d,)))


def dropout_layer_norm(call: Call) -> tuple[int, int, int]:
    """What both directions take; returns (B, P, D)."""
    b, positions = sizes_of(call, "B P")
    d = 16 * call.draw(st.integers(1, 5))
    call.floats("x", b, positions, d)
    call.floats("weight", d)
    call.plain["p"] = call.draw(st.floats(0, 0.999))
    return b, positions, d


def dropout_layer_norm_forward(call: Call) -> None:
    b, positions, d = dropout_layer_norm(call)
    call.floats("bias", d)
    call.integers("rows", b)
    if call.plain["p"] > 0 or call.maybe("kept"):
        call.integer_output("kept", b, positions, (d + 63) // 64)
    call.output("out", b, positions, d)
    call.plain |= {name: call.draw(words) for name in ("seed", "site")}
    call.plain |= {f"position_{name}": call.draw(words) for name in ("offset", "stride")}


def dropout_layer_norm_backward(call: Call) -> None:
    b, positions, d = dropout_layer_norm(call)
    call.floats("grad", b, positions, d)
    if call.plain["p"] > 0 or call.maybe("kept"):
        call.integers("kept", b, positions, (d + 63) // 64)
    call.output("d_x", b, positions, d)
    for name in ("d_weight", "d_bias"):
        call.output(name, d)


LAYERS = ("query", "key", "value", "output")
PARAMETERS = ["norm_weight", "norm_bias"]
PARAMETERS += [f"{layer}_{part}" for layer in LAYERS for part in ("weight", "bias")]
# Arguments that are lists of arrays: each array is one here.
LISTS = {"parameters": PARAMETERS, "d_parameters": [f"d_{name}" for name in PARAMETERS]}
LISTS |= {name: [f"{name}_{i}" for i in range(2)] for name in ("ids", "gradients")}


def self_attention(call: Call) -> tuple[int, int, int, int]:
    """What both directions take; returns (B, L, positions that leave, D)."""
    (b,) = sizes_of(call, "B")
    length = call.draw(st.sampled_from([1, 2, 3, 7, 162]))
    heads, last_only = call.draw(st.sampled_from([1, 2])), call.draw(st.booleans())
    d = 16 * heads * call.draw(st.integers(1, 2))
    call.floats("x", b, length, d)
    call.floats("query_scale", b, length)
    for name in PARAMETERS:
        is_matrix = name.endswith("weight") and name != "norm_weight"
        call.floats(name, *((d, d) if is_matrix else (d,)))
    call.integers("rows", b)
    call.plain |= {name: call.draw(words) for name in ("seed", "site")}
    call.plain |= {"p": call.draw(st.floats(0, 0.999)), "num_heads": heads, "last_only": last_only}
    linear_precision(call)
    return b, length, 1 if last_only else length, d


def kept_words(call: Call, length: int, d: int) -> int:
    """Of a position: the branch's mask, and of all positions the probabilities' of each head."""
    of_heads = call.plain["num_heads"] * (length // 64 + 1)
    return -(-d // 64) + (0 if call.plain["last_only"] else of_heads)


def self_attention_forward(call: Call) -> None:
    b, length, positions, d = self_attention(call)
    if call.plain["p"] > 0 or call.maybe("kept"):
        call.integer_output("kept", b, positions, kept_words(call, length, d))
    call.output("out", b, positions, d)


def self_attention_backward(call: Call) -> None:
    b, length, positions, d = self_attention(call)
    call.floats("grad", b, positions, d)
    if call.plain["p"] > 0 or call.maybe("kept"):
        call.integers("kept", b, positions, kept_words(call, length, d))
    call.output("d_x", b, length, d)
    for name in PARAMETERS:
        call.output(f"d_{name}", *call.arrays[name].array.shape)


def history_loss_forward(call: Call) -> None:
    b, v, h, m = sizes_of(call, "B V H M")
    m = m if b and v else 0
    call.floats("hidden", b, h)
    call.floats("weight", v, h)
    call.floats("bias", v)
    call.integers("rows", m, limit=b)
    call.integers("cols", m, limit=v)
    call.floats("label", m)
    call.flags("use", m)
    call.output("residual", m)


def history_loss_backward(call: Call) -> None:
    b, v, h, m = sizes_of(call, "B V H M")
    m = m if b and v else 0
    call.floats("hidden", b, h)
    call.floats("weight", v, h)
    call.integers("rows", m, limit=b)
    call.integers("cols", m, limit=v)
    call.floats("g", m)
    call.flags("use", m)
    if call.maybe("d_hidden"):
        call.output("d_hidden", b, h)
    for name, shape in (("d_weight", (v, h)), ("d_bias", (v,))):
        if call.maybe(name):
            call.output(name, *shape)


def table_gradient(call: Call) -> None:
    v, d = sizes_of(call, "V D")
    for i in range(2):
        n = call.draw(st.sampled_from([0, 1, 5, 700])) if v else 0
        call.integers(f"ids_{i}", n, limit=v)
        call.floats(f"gradients_{i}", n, d)
    call.output("out", v, d)


def history_cells(call: Call) -> None:
    b, length, v = sizes_of(call, "B L V")
    call.integers("sequence", b, length, limit=v + 1)
    call.plain |= {"num_items": v + 1, "seed": call.draw(words)}
    call.plain["mask_ratio"] = call.draw(st.sampled_from([0.0, 0.5, 1.0, 50.0]))


def item_cross_entropy(call: Call) -> int:
    """What both directions take; returns B."""
    b, v, d = sizes_of(call, "B V D")
    v = max(v, 1)
    call.floats("rep", b, d)
    call.floats("weight", v, d)
    call.integers("target", b)  # one that is no item is met nowhere
    for name in ("bias", "smoothing"):
        if call.maybe(name):
            call.floats(name, v)
    if call.maybe("cache"):
        call.sums("cache", C.item_cross_entropy_cache(b, v))
    call.plain["scale"] = call.draw(st.sampled_from([1.0, -2.0, 0.0]))
    return b


def item_cross_entropy_forward(call: Call) -> None:
    call.double_sums("statistics", 4, item_cross_entropy(call))


def item_cross_entropy_backward(call: Call) -> None:
    call.floats("rows", 5, item_cross_entropy(call))
    call.plain["filter"] = call.draw(st.sampled_from([0.0, 0.1]))
    rep, weight = (call.arrays[name].array.shape for name in ("rep", "weight"))
    for name, shape in (("d_rep", rep), ("d_weight", weight), ("d_bias", weight[:1])):
        if call.maybe(name):
            call.output(name, *shape)


def encoder_forward(call: Call) -> None:
    b, length = call.draw(sizes), call.draw(st.integers(1, 9))
    width = packed(call, length)
    call.floats("x", b, length, width)
    call.floats("mask", b, length)
    call.output("out", b, width)
    call.plain["tap"] = -1
    if call.maybe("tapped"):
        call.output("tapped", b, width)
        call.plain["tap"] = 0


def euler_sampler(call: Call) -> None:
    b, length, q = call.draw(sizes), call.draw(st.integers(1, 9)), call.draw(st.integers(1, 3))
    width = packed(call, length)
    call.floats("norm_weight", width)
    call.floats("norm_bias", width)
    call.floats("e", b, length, width)
    call.floats("mask", b, length)
    call.floats("z0", b, width)
    call.floats("taus", q, width)
    call.output("out", *([q + 1] if call.draw(st.booleans()) else []), b, width)
    call.plain["velocity"] = call.draw(st.booleans())
    if call.maybe("noise"):
        call.floats("noise", q, b, length, width)
        call.plain |= {"rows": None, "seed": None}
    else:
        call.integers("rows", b)
        call.plain["seed"] = call.draw(words)
    call.plain |= {"delta": 1e-3, "tied": call.draw(st.booleans())}


def picard_sweep(call: Call) -> None:
    euler_sampler(call)
    del call.arrays["z0"], call.arrays["out"], call.plain["velocity"]
    b, _, width = call.arrays["e"].array.shape
    q = len(call.arrays["taus"].array)
    call.floats("x", b, q, width)
    call.output("out", b, q, width)


def recommend(call: Call) -> None:
    b, length, q = call.draw(sizes), call.draw(st.integers(1, 9)), call.draw(st.integers(1, 4))
    width = packed(call, length)
    items = call.draw(st.integers(1, 80))
    k = call.draw(st.integers(0, min(items, 9)))
    for name in ("norm_weight", "norm_bias", "embedded_weight", "embedded_bias"):
        call.floats(name, width)
    call.floats("items", items, width)
    call.integers("ids", b, length, limit=items)
    call.floats("taus", q, width)
    call.integers("rows", b)
    if call.maybe("exclude"):
        call.integers("exclude", b, call.draw(sizes), limit=items)
    call.output("scores", b, k)
    call.integer_output("best", b, k)
    call.plain |= {"seed": call.draw(words), "start_seed": call.draw(words), "delta": 1e-3}
    call.plain |= {"tied": call.draw(st.booleans())}
    velocity = call.draw(st.booleans())
    call.plain |= {"velocity": velocity, "keep": call.draw(st.sampled_from([0.0, 0.6, 1.0]))}
    call.plain |= {"start": call.draw(st.sampled_from(["noise", "anchor", "anchor in history"]))}
    call.plain |= {"tolerance": 0.0 if velocity else call.draw(st.sampled_from([0.0, 1e-5]))}


def sample(call: Call) -> None:
    recommend(call)
    for name in ("scores", "best"):
        del call.arrays[name]
    call.arrays.pop("exclude", None)
    call.plain.pop("exclude", None)
    b, width = len(call.arrays["ids"].array), call.arrays["norm_weight"].array.shape[0]
    call.output("out", b, width)
    if call.draw(st.booleans()):
        del call.arrays["rows"]
        call.plain["rows"] = None


def attention_forward(call: Call) -> None:
    b, length, heads = call.draw(sizes), call.draw(sizes), call.draw(st.integers(1, 3))
    width = heads * 16
    call.floats("qkv", b, length, 3 * width)
    call.floats("query_scale", b, length)
    call.integers("rows", b)
    call.output("out", b, length, width)
    call.plain |= {"seed": call.draw(words), "site": call.draw(words)}
    call.plain |= {"p": call.draw(st.sampled_from([0.0, 0.3])), "num_heads": heads}
    if call.maybe("rotary"):
        call.floats("rotary", length, width // heads)
    if call.maybe("d_qkv"):
        call.floats("d_qkv", b, length, 3 * width)
        call.output("d_out", b, length, width)
    else:
        call.plain["d_out"] = None


def attention_backward(call: Call) -> None:
    attention_forward(call)
    del call.arrays["out"]
    shape = call.arrays["qkv"].array.shape
    call.floats("grad", *shape[:2], shape[2] // 3)
    call.output("g_qkv", *shape)
    if call.arrays.pop("d_out", None) is None:
        del call.plain["d_out"]
        call.plain |= {"d_grad": None, "g_d_qkv": None}
    else:
        call.floats("d_grad", *shape[:2], shape[2] // 3)
        call.output("g_d_qkv", *shape)


def rms_norm_forward(call: Call) -> None:
    rows, d = call.draw(sizes), call.draw(st.integers(1, 20))
    call.floats("x", rows, d)
    call.floats("weight", d)
    call.output("out", rows, d)
    if call.maybe("dx"):
        call.floats("dx", rows, d)
        call.output("d_out", rows, d)
    else:
        call.plain["d_out"] = None


def rms_norm_backward(call: Call) -> None:
    rms_norm_forward(call)
    shape = call.arrays.pop("out").array.shape
    call.floats("grad", *shape)
    call.output("g_x", *shape)
    call.output("g_weight", shape[1])
    if call.arrays.pop("d_out", None) is None:
        del call.plain["d_out"]
        call.plain |= {"d_grad": None, "g_dx": None}
    else:
        call.floats("d_grad", *shape)
        call.output("g_dx", *shape)


def ranking(call: Call) -> tuple[int, int]:
    """What both rankings take; returns B and V."""
    b, v, d, e = sizes_of(call, "B V D E")
    call.floats("rep", b, d)
    call.floats("weight", v, d)
    if call.maybe("bias"):
        call.floats("bias", v)
    if not v:
        call.plain["exclude"] = None
    elif call.maybe("exclude"):
        call.integers("exclude", b, e, limit=v)
    return b, v


def item_topk(call: Call) -> None:
    b, v = ranking(call)
    k, c = call.draw(st.integers(0, 9)), call.draw(sizes)
    call.plain["scale"] = None
    if call.draw(st.booleans()):
        call._place("weight", np.ones(call.arrays["weight"].array.shape, np.int8), "input")
        call.plain.pop("scale")
        call.floats("scale", v)
    if v and call.maybe("candidates"):
        shape = call.draw(st.sampled_from([(c,), (b, c)]))
        call.integers("candidates", *shape, limit=v)
    elif not v:
        call.plain["candidates"] = None
    call.output("scores", b, k)
    call.integer_output("ids", b, k)


def target_rank(call: Call) -> None:
    b, v = ranking(call)
    if not v:
        for name in ("rep", "exclude"):
            if name in call.arrays:
                array = call.arrays[name].array
                call._place(name, array[:0].copy(), "input")
        b = 0
    # A target whose score is given may be an item of another table.
    given = call.maybe("of_target")
    if given:
        call.floats("of_target", b)
    call.integers("target", b, limit=None if given else v)
    call.integer_output("ranks", b)


CALLS = {
    f.__name__: f
    for f in (
        noise_fusion_forward,
        noise_fusion_backward,
        noise_lambda,
        stream_normals,
        stream_words,
        dropout,
        dropout_layer_norm_forward,
        dropout_layer_norm_backward,
        linear_forward,
        linear_backward,
        feed_forward_forward,
        feed_forward_backward,
        self_attention_forward,
        self_attention_backward,
        history_loss_forward,
        history_loss_backward,
        table_gradient,
        history_cells,
        item_cross_entropy_forward,
        item_cross_entropy_backward,
        encoder_forward,
        euler_sampler,
        picard_sweep,
        recommend,
        sample,
        attention_forward,
        attention_backward,
        rms_norm_forward,
        rms_norm_backward,
        item_topk,
        target_rank,
    )
}
CALLS["stream_uniforms"] = stream_normals
# What they give is as large as the data has it; they write into no argument, and take no threads.
GIVING = {"history_cells"}


def test_every_binding_is_fuzzed():
    functions = {name for name in dir(C) if inspect.isroutine(getattr(C, name))}
    assert functions - WITHOUT_ARRAYS == set(CALLS)


def run(name: str, arguments: dict[str, Any]) -> Any:
    """Calls it; lists of arrays are put together."""
    for gathered, members in LISTS.items():
        if members[-1] in arguments:
            arguments[gathered] = [arguments.pop(member) for member in members]
    return getattr(C, name)(**arguments)


def build(name: str, data) -> Call:
    call = Call(data.draw)
    CALLS[name](call)
    if name not in GIVING:
        call.plain["num_threads"] = data.draw(st.integers(1, 3))
    for argument in call.arrays.values():
        argument.before = argument.memory.tobytes()
    return call


def assert_memory_is_sound(call: Call) -> None:
    for name, argument in call.arrays.items():
        assert argument.guards_hold(), f"written outside {name}"
        if argument.role == "input":
            assert argument.memory.tobytes() == argument.before, f"input {name} was changed"


QUICK = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)


@pytest.mark.parametrize("name", sorted(CALLS))
@QUICK
@given(data=st.data())
def test_right_calls_are_served(name, data):
    call = build(name, data)
    given = run(name, call.arguments())
    assert (given is not None) == (name in GIVING)
    assert_memory_is_sound(call)
    for argument, a in call.arrays.items():
        if a.role == "output":
            assert not (a.array.view(np.uint32) == UNWRITTEN).any(), f"{argument} is not filled"


def corrupted(call: Call, data) -> dict[str, Any]:
    """The arguments with one of them wrong, in a way that no call may take."""
    arguments = call.arguments()
    name = data.draw(st.sampled_from(sorted(call.arrays)))
    argument = call.arrays[name]
    array = argument.array
    ways = ["type", "dtype", "byte order", "rank", "list"]
    if array.size:
        ways += ["misaligned"]
    if array.size > 1 and max(array.shape) > 1:
        ways += ["reversed"]
    if argument.role != "input":
        ways += ["read-only"]
    if argument.limit is not None and array.size:
        ways += ["id"] * 4
    way = data.draw(st.sampled_from(ways))
    if way == "type":
        arguments[name] = data.draw(st.sampled_from([3, "x", object(), b"\0" * 8]))
    elif way == "list":
        arguments[name] = array.tolist()
    elif way == "dtype":
        other = [np.float64, np.float16, np.int32, np.int64, np.float32, np.complex64, np.int8]
        taken = [array.dtype] + ([np.dtype(np.uint8)] if array.dtype == bool else [])
        dtype = data.draw(st.sampled_from([d for d in other if np.dtype(d) not in taken]))
        arguments[name] = np.zeros(array.shape, dtype)
    elif way == "byte order":
        if array.dtype.itemsize == 1:
            arguments[name] = array[None]
        else:
            arguments[name] = array.astype(array.dtype.newbyteorder())
    elif way == "rank":
        # A trajectory [q + 1, B, D] may be asked for in place of [B, D]: two more axes never are.
        arguments[name] = array[None, None]
    elif way == "misaligned":
        memory = np.zeros(array.nbytes + 1, np.uint8)
        if array.dtype.itemsize == 1:
            arguments[name] = array[None]
        else:
            arguments[name] = memory[1:].view(array.dtype).reshape(array.shape)
    elif way == "reversed":
        axis = int(np.argmax(array.shape))
        arguments[name] = np.flip(array, axis)
    elif way == "read-only":
        view = array.view()
        view.flags.writeable = False
        arguments[name] = view
    else:
        wrong = array.copy()
        bad = [-1, argument.limit, argument.limit + 1, INT64.min, INT64.max, 2**32]
        if name in ("exclude", "candidates"):  # -1 fills them up
            bad.remove(-1)
        wrong.flat[data.draw(st.integers(0, array.size - 1))] = data.draw(st.sampled_from(bad))
        arguments[name] = wrong
        # A cell that is switched off is not looked at.
        if "use" in arguments:
            arguments["use"] = np.ones_like(arguments["use"])
    return arguments


@pytest.mark.parametrize("name", sorted(CALLS))
@QUICK
@given(data=st.data())
def test_wrong_arrays_are_refused(name, data):
    call = build(name, data)
    with pytest.raises((TypeError, ValueError), match=r"\w"):
        run(name, corrupted(call, data))
    assert_memory_is_sound(call)


@pytest.mark.parametrize("name", sorted(CALLS))
@QUICK
@given(data=st.data())
def test_other_shapes_are_refused_or_agree(name, data):
    # Growing or shrinking one axis of one array: refused, unless nothing else has that axis.
    call = build(name, data)
    arguments = call.arguments()
    wrong = data.draw(st.sampled_from(sorted(n for n in call.arrays if call.arrays[n].array.ndim)))
    array = call.arrays[wrong].array
    axis = data.draw(st.integers(0, array.ndim - 1))
    shape = list(array.shape)
    shape[axis] = data.draw(st.integers(0, 80).filter(lambda n: n != array.shape[axis]))
    filled = np.zeros(shape, array.dtype)
    arguments[wrong] = filled
    try:
        run(name, arguments)
    except (TypeError, ValueError) as error:
        assert str(error)
    assert_memory_is_sound(call)


@pytest.mark.parametrize("name", sorted(CALLS))
@QUICK
@given(data=st.data())
def test_wrong_numbers_are_refused(name, data):
    call = build(name, data)
    arguments = call.arguments()
    bad: dict[str, list] = {}
    if "num_threads" in arguments:
        bad["num_threads"] = [0, -1, -(2**31), "2", None, 2**40]
    integers = {"seed", "start_seed", "step", "first", "site", "position_offset", "num_items"}
    integers = (integers | {"position_stride"}) & set(arguments)
    for word in integers:
        if arguments[word] is not None:
            bad[word] = [2**63, -(2**63) - 1, 1.5, "1", True, np.zeros(2, np.int64), np.float32(1)]
    if "p" in arguments:
        bad["p"] = [-0.1, 1.0, float("nan"), float("inf"), "a", None]
    if "num_items" in arguments:
        bad["num_items"] += [0, -1, -(2**63)]
    if "mask_ratio" in arguments:
        bad["mask_ratio"] = [-0.5, float("nan"), float("inf"), "1", None]
    if "tap" in arguments and arguments["tap"] >= 0:
        bad["tap"] = [2, 2**31 - 1, -2, "0"]
    if "num_heads" in arguments:
        bad["num_heads"] = [0, -1, 7, 2**31 - 1, "1"]
    wrong = data.draw(st.sampled_from(sorted(bad)))
    arguments[wrong] = data.draw(st.sampled_from(bad[wrong]))
    with pytest.raises((TypeError, ValueError), match=r"\w"):
        run(name, arguments)
    assert_memory_is_sound(call)


@QUICK
@given(data=st.data())
def test_weights_to_pack_are_checked(data):
    call = Call(data.draw)
    blocks = blocks_of(call, 16, data.draw(st.integers(1, 2)))
    heads: Any = 2
    at, part = data.draw(st.integers(0, len(blocks) - 1)), data.draw(st.integers(0, 15))
    block = list(blocks[at])
    way = data.draw(st.sampled_from(["shape", "dtype", "order", "missing", "heads", "none"]))
    if way == "shape":
        block[part] = np.zeros([n + 1 for n in block[part].shape], np.float32)
    elif way == "dtype":
        block[part] = block[part].astype(np.float64)
    elif way == "order":
        block[part] = np.repeat(block[part], 2, axis=-1)[..., ::2]
    elif way == "missing":
        del block[part]
    elif way == "none":
        block[part] = None
    else:
        heads = data.draw(st.sampled_from([0, -1, 3, 5, 17, "2", None, 2**40]))
    blocks[at] = tuple(block)
    with pytest.raises((TypeError, ValueError), match=r"\w"):
        C.PackedEncoder(blocks, heads)


@pytest.mark.parametrize("shape", [(-1,), (3, -1), (2**31, 2**31), ("2",), 3, None, (1.5,)])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises((TypeError, ValueError), match=r"\w"):
        C.floats(shape)


@QUICK
@given(shape=st.lists(st.integers(0, 40), max_size=4))
def test_new_arrays_have_their_shape(shape):
    array = C.floats(shape)
    assert array.shape == tuple(shape) and array.dtype == np.float32
    array[...] = 1.0
