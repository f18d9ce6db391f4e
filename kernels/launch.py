"""What the launches of the persistent kernels share: packed weights, constants, compile cases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton

from fmrec_fast.config import PRECISIONS
from fmrec_fast.kernels import plans
from fmrec_fast.kernels.plans import Plan, TilePlan, family
from fmrec_fast.reference.encoder import BlockWeights, rounded
from fmrec_fast.reference.rotary import angles

if TYPE_CHECKING:
    from fmrec_fast.ops.euler_sampler import SamplerWeights

# No launch multiplies and adds in one rounding unless the kernel says tl.fma.
OPTIONS = {"enable_fp_fusion": False}
# Programs that share the sequences where Triton interprets: fewer than sequences in the tests.
INTERPRETED_PROGRAMS = 2
# How operands are multiplied; AMD's matrix units take float32 as it is.
INPUTS = {
    "cuda": {"float32": "3xtf32", "tf32": "tf32", "bf16": "bf16"},
    "hip": {"float32": "ieee", "tf32": "tf32", "bf16": "bf16"},
}


def pack(
    blocks: list[BlockWeights], width: int, precision: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks' parameters as the kernels read them: matrices, rounded, and vectors.

    Packed anew for every call: a few hundred kilobytes to a few megabytes, two small kernels.

    Raises:
        ValueError: a parameter has not the shape that D = `width` asks for.
    """
    wide = {"w1_weight": (4 * width, width), "w2_weight": (width, 4 * width)}
    wide["w1_bias"] = (4 * width,)
    for w in blocks:
        for name, tensor in w._asdict().items():
            if name == "inv_freq" or tensor is None:  # RMS norms have no bias
                continue
            matrix = name.endswith("_weight") and not name.startswith("norm")
            expected = wide.get(name, (width, width) if matrix else (width,))
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{name} must be {expected}, got {tuple(tensor.shape)}")
    matrices = [
        getattr(w, f"{name}_weight").detach().reshape(-1)
        for w in blocks
        for name in ("query", "key", "value", "output", "w1", "w2")
    ]
    nothing = blocks[0].norm1_weight.new_zeros(width)
    vectors = [
        nothing if getattr(w, name) is None else getattr(w, name).detach()
        for w in blocks
        for name in (
            "norm1_weight", "norm1_bias", "query_bias", "key_bias", "value_bias", "output_bias",
            "norm2_weight", "norm2_bias", "w1_bias", "w2_bias",
        )
    ]  # fmt: skip
    packed = torch.cat(matrices)
    packed = packed.bfloat16() if precision == "bf16" else rounded(packed, precision)
    return packed, torch.cat(vectors)


def rotations(
    blocks: list[BlockWeights], length: int, width: int, num_heads: int
) -> torch.Tensor | None:
    """Cosines and sines of the blocks' rotary embeddings, [blocks, 2, L, D / H / 2]; None without.

    Raises:
        ValueError: `inv_freq` is not of D / H / 2 angles.
    """
    if blocks[0].inv_freq is None:
        return None
    frequencies = [w.inv_freq.detach() for w in blocks if w.inv_freq is not None]
    expected = [(width // num_heads // 2,)] * len(blocks)
    if [tuple(f.shape) for f in frequencies] != expected:
        found = [None if w.inv_freq is None else tuple(w.inv_freq.shape) for w in blocks]
        raise ValueError(f"inv_freq of the blocks must be {expected}, got {found}")
    parts = angles(torch.stack(frequencies).flatten(), length)  # [L, blocks * D / H / 2] each
    table = torch.stack(parts).unflatten(-1, (len(blocks), -1))
    return table.permute(2, 0, 1, 3).contiguous()


def settings(
    e: torch.Tensor, num_heads: int, precision: str, tied: bool, rotary: bool
) -> tuple[Plan | TilePlan, dict[str, object]]:
    """The plan of a launch over e [B, L, D]; its constants and compiler options.

    Raises:
        ValueError: no plan fits (`plans.plan`).
    """
    kind, shared = family(e.device)
    found = plans.plan(*e.shape[1:], num_heads, precision, kind, shared, tied, rotary)
    if isinstance(found, str):
        raise ValueError(found)
    how = "ieee" if triton.knobs.runtime.interpret else INPUTS[kind.split(":")[0]][precision]
    constants = {"D": e.shape[2], "H": num_heads, "PRECISION": precision, "INPUT": how}
    warps = found.threads // (64 if torch.version.hip else 32)
    options = {"num_warps": warps, "num_stages": found.STAGES, **OPTIONS}
    return found, {**plans.constants(found), **constants, **options}


def scratch(
    e: torch.Tensor, found: TilePlan, items: int, precision: str
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """How many programs share `items` sequences of e [B, L, D], and their scratch (see `tiles`)."""
    programs = INTERPRETED_PROGRAMS
    if e.device.type == "cuda":
        programs = torch.cuda.get_device_properties(e.device).multi_processor_count
        programs *= found.programs
    programs = min(items, programs)
    rows = triton.cdiv(e.shape[1], found.T) * found.T
    stream = e.new_empty(programs, rows, e.shape[2])
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    return programs, stream, e.new_empty(programs, 2 * (rows + found.T), e.shape[2], dtype=dtype)


# Families of devices, and the shared memory of the smallest device of each.
FAMILIES = (
    ("cuda:80", 166912), ("cuda:90", 232448), ("cuda:100", 232448), ("hip:gfx942", 65536)
)  # fmt: skip


def launch_network(
    kernels: tuple[Any, Any],
    programs: int,
    e: torch.Tensor,
    mask: torch.Tensor,
    points: torch.Tensor,
    taus: torch.Tensor,
    weights: SamplerWeights,
    noise: torch.Tensor | None,
    rows: torch.Tensor | None,
    seed: torch.Tensor | None,
    precision: str,
    tied: bool,
    out: torch.Tensor,
    **constants: Any,
) -> None:
    """Launch the kernel for whole sequences, or the one in tiles, of a sampler's network: one
    program for each of `programs` evaluations or trajectories that start at `points`."""
    if programs == 0:
        return
    batch, length, width = e.shape
    rotates = weights.blocks[0].inv_freq is not None
    chosen, shape = settings(e, weights.num_heads, precision, tied, rotates)
    matrices, vectors = pack(weights.blocks, width, precision)
    norm = torch.cat((weights.norm_weight, weights.norm_bias))
    inputs = (e, mask, points, taus, matrices, vectors)
    others = (norm, noise, rows, seed, out)
    sizes = (batch, length, taus.shape[0], len(weights.blocks), float(weights.delta))
    constants |= shape
    whole, tiled = kernels
    with torch.cuda.device_of(e):  # Triton launches on the current device
        if isinstance(chosen, TilePlan):
            grid, *memory = scratch(e, chosen, programs, precision)
            tiled[(grid,)](*inputs, *others, *memory, *sizes, TIED=tied, **constants)
        else:
            rotary = rotations(weights.blocks, length, width, weights.num_heads)
            whole[(programs,)](*inputs, rotary, *others, *sizes, **constants)


def compile_cases(
    kernel,
    pointers: str,
    scalars: str,
    constants: dict[str, object],
    *,
    fave: bool = False,
) -> list[dict]:
    """What `budget` compiles: the paper's sizes in each precision, as planned for each target;
    FMRec's blocks, or Fave's."""
    if fave:
        pointers += " p_rotary"
    else:
        constants = constants | {"p_rotary": None}
    name = "[fave]" if fave else ""
    return _cases(kernel, name, (50, 128, 4), False, pointers, scalars, constants)


def tiled_cases(
    kernel, pointers: str, scalars: str, constants: dict[str, object], *, widest: bool = False
) -> list[dict]:
    """In tiles, tied padding at the paper's width; with `widest` 200 positions of the widest
    network too. The kernels differ by little around the network."""
    given = (pointers, scalars, constants)
    cases = _cases(kernel, "[128]", (200, 128, 4), True, *given)
    return cases + (_cases(kernel, "[256]", (200, 256, 4), True, *given) if widest else [])


def _cases(
    kernel,
    name: str,
    sizes: tuple[int, int, int],
    tied: bool,
    pointers: str,
    scalars: str,
    constants: dict[str, object],
) -> list[dict]:
    cases = []
    for kind, shared in FAMILIES:
        for precision in PRECISIONS:
            asked = (*sizes, precision, kind, shared, tied, "p_rotary" in pointers)
            found = plans.plan(*asked)
            if not isinstance(found, TilePlan if tied else Plan):  # tuned to the other kernel
                found = plans.pinned(*asked)
            if isinstance(found, str):
                raise ValueError(found)
            case = compile_case(
                kernel, pointers, scalars, constants, found, *sizes[1:], precision, kind
            )
            cases.append(case | {"name": kernel.__name__ + name})
    return cases


def compile_case(
    kernel,
    pointers: str,
    scalars: str,
    constants: dict[str, object],
    chosen: Plan | TilePlan,
    width: int,
    num_heads: int,
    precision: str,
    kind: str,
) -> dict:
    """One plan of a persistent kernel, as `budget` compiles it."""
    types = dict.fromkeys(pointers.split(), "*fp32") | dict.fromkeys(scalars.split(), "i32")
    types |= {name: "*i64" for name in ("p_rows", "p_seed") if name in types}
    types |= {"delta": "fp32"} if "delta" in types else {}
    operand = "*bf16" if precision == "bf16" else "*fp32"
    types |= {name: operand for name in ("p_matrices", "p_rest") if name in types}
    how = INPUTS[kind.split(":")[0]][precision]
    shape = {"D": width, "H": num_heads, "PRECISION": precision, "INPUT": how}
    return {
        "kernel": kernel,
        "signature": types,
        "constants": constants | plans.constants(chosen) | shape,
        "threads": chosen.threads,
        "options": {"num_stages": chosen.STAGES, **OPTIONS},
        "dtypes": [precision],
        "target": kind,
    }
