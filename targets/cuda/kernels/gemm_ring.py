"""Linear layer of 2 rows and more whose weights, numbers or codes, stream through a ring in shared memory (sm_90).

In CUDA C++ (``gemm_ring.cu``). One thread starts all copies, the weights' before the wait for x, and no barrier of the
whole program stands between a slot's arrival and its products: Triton and Gluon put one there. Parts of K meet in a
cluster's shared memory or in memory. On an H200 the linears of an 8B layer over int4 take 50 us at 32 rows and 101 at
128, where ``gemm_q_ring``, the Gluon kernel before it, took 62 and ``gemm_q`` 153 (ADR 38). Floor: the weights' bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from llmopt.program import dtype_bytes

from ..eight_bits import INTERVAL, LINEAR_8, QUANTIZED
from ..fusion import ABSENT, LINEAR, LINEAR_Q, PLAIN_LINEAR
from ..kernel import Argument, CallSite, KernelLaunch, Scratch, Selection, Specialization, Strided, TmaOperand
from ..pack import chunk_of, parts_of
from ..tuning import Tuned, find_linear, quantized_form
from ._common import cdiv, modelled_us, nbytes, pow2, type_of
from ._eight_bits import read_linear_8, scheme
from ._gemm_twin import GemmTwin
from ._linear import Linear, read_linear, row_bounds
from .gemm_q import as_elements, read_rows

ARCH = 90
MOST_ROWS = 128
"""Rows of x that a program takes; more are more programs."""
SHARED_BYTES = 227 << 10
"""Of a multiprocessor, less what the system keeps of it for a program."""
MOST_STAGES = 12
REGISTERS = {(1, 1): 240, (2, 1): 216, (4, 1): 112, (1, 2): 224, (2, 2): 104, (1, 4): 96}
"""Of a thread that multiplies, by warpgroups of a program and programs of a multiprocessor."""
FLOPS = 0.6e9
"""Operations a microsecond of shapes nobody measured."""
FORMS = {"int4": "INT4", "int8": "INT8", "fp8_e4m3": "FP8"}
TYPES = {"float32": "FLOAT32", "bfloat16": "BFLOAT16", "float16": "FLOAT16"}
ELEMENTS = {"bfloat16": '"bf16"', "float16": '"f16"', "float8_e4m3fn": '"e4m3"'}


@dataclass(frozen=True)
class Weight:
    """What is multiplied: ``stored`` (N, elements of 16 bits); of codes their form, packing's chunk and columns of a
    scale, and the tables of groups or the scales of rows, ``shared`` rows each; where x is codes too, its scales, one
    if ``static``, and columns of products that the tensor cores sum."""

    stored: Strided
    form: str = "NUMBERS"
    chunk: int = 64
    group: int = 0
    groups: Strided | None = None
    zeros: Strided | None = None
    scales: Strided | None = None
    shared: int = 1
    x_scales: Strided | None = None
    static: bool = False
    interval: int = INTERVAL
    scheme: str = ""

    @property
    def coded(self) -> bool:
        """Whether it is codes that become weights in registers."""
        return self.form in FORMS.values()

    def columns(self, row: int) -> int:
        """Columns that ``row`` bytes of a row hold."""
        return {"NUMBERS": row // 2, "INT4": 2 * row}.get(self.form, row)


@dataclass(frozen=True)
class GemmRing:
    """``aten.linear`` and ``cuda.linear`` (without its norm), ``llmopt.linear_q`` and ``cuda.linear_q`` on sm_90."""

    name: str = "gemm_ring"
    ops: tuple[str, ...] = (PLAIN_LINEAR, LINEAR, QUANTIZED, LINEAR_Q, LINEAR_8)

    def select(self, site: CallSite) -> Selection | str:
        if site.arch != ARCH:
            return f"sm_{site.arch} has other tensor cores"
        found = read(site)
        if isinstance(found, str):
            return found
        linear, weight, key = found
        if wrong := unmovable(linear, weight):
            return wrong
        tuned = find_linear(site.tuning, self.name, key, linear.m, linear.n, linear.k, linear.form)
        c = fitted(tuned.config if tuned else shape_tiles(linear, weight), linear, weight)
        if isinstance(c, str):
            return c
        made = launch(linear, weight, c, row_bounds(site, linear.m))
        return Selection((made,), reason(linear, weight, c, tuned), tuned.us if tuned else untuned_us(linear, weight))


def read(site: CallSite) -> tuple[Linear, Weight, str] | str:
    """The linear, its weight and the first word of its tuning key, or why this kernel cannot do it."""
    if "weight" in site.values:
        linear = read_linear(site)
        if isinstance(linear, str):
            return linear
        if linear.dtype not in ("bfloat16", "float16") or linear.x.dtype != linear.dtype:
            return f"weights of {linear.dtype}"
        return linear, Weight(linear.weight), linear.dtype
    if "x_scale" in site.values:
        return read_both_codes(site)
    v: Any = {**ABSENT, **site.values}
    rows = read_rows(v, site.outputs[0])
    if isinstance(rows, str):
        return rows
    x, out, residual = rows
    weight = read_codes(v, x)
    if isinstance(weight, str):
        return weight
    n, k = weight.stored.shape[0], x.shape[1]
    return (
        Linear(x, replace(weight.stored, shape=(n, k)), v["bias"], v["gate"], residual, out),
        weight,
        quantized_form(v, k),
    )


def read_both_codes(site: CallSite) -> tuple[Linear, Weight, str] | str:
    """The same of codes of x by codes of the weight."""
    found = read_linear_8(site)
    if isinstance(found, str):
        return found
    if found.dtype != "float8_e4m3fn" or found.group < found.k or found.k % 16 or not found.weight.contiguous:
        return f"{found.scheme}, codes by codes, of {found.k} columns"
    if found.out.dtype not in ("bfloat16", "float16"):
        return f"results of {found.out.dtype}"
    weight = Weight(
        as_elements(found.weight, "int16"), "FP8_BY_FP8", group=found.group, scales=found.scales, shared=found.shared,
        x_scales=found.x_scale, static=found.static, interval=found.interval, scheme=found.scheme,
    )  # fmt: skip
    return found, weight, quantized_form(site.values, found.k)


def read_codes(v: Mapping[str, Any], x: Strided) -> Weight | str:
    """The weight of a linear over codes, or why it is not read."""
    k, group, zeros = x.shape[1], v["block_k"], v["zeros"]
    form = v["format"] if v["format"] != "int" else f"int{v['bits']}"
    chunk, grouped = chunk_of(v["bits"], group, k), group != k or zeros is not None
    if form not in FORMS or chunk < 64 or k % chunk or v["codes"].dtype != "uint8":
        return f"{form} codes in chunks of {chunk} columns"
    if grouped and (v["block_n"] != 1 or v["scales"].dtype != x.dtype):
        return f"scales of {v['block_n']}x{group} in {v['scales'].dtype}"
    if grouped and group != k and group % 128 and 128 % group:
        return f"groups of {group} columns"
    if zeros is not None and zeros.dtype != "uint8":
        return f"zero points of {zeros.dtype}"
    parts = parts_of(v["bits"], chunk, k)
    assert parts == (4 if v["bits"] == 4 else 2)
    tables = {"scales": v["scales"], "shared": v["block_n"]}
    if grouped:
        tables = {"groups": row_major(v["scales"]), "zeros": None if zeros is None else row_major(zeros)}
    return Weight(as_elements(v["codes"], "int16"), FORMS[form], chunk, group, scheme=scheme(v, k), **tables)


def row_major(table: Strided) -> Strided:
    """A table, the stride of whose rows says nothing where there is one row."""
    return replace(table, strides=(table.shape[1], 1)) if table.shape[0] == 1 else table


def unmovable(linear: Linear, weight: Weight) -> str:
    """Why the copy engine or the epilogue cannot move an operand; empty if they can."""
    tables = [x for x in (weight.groups, weight.zeros) if x is not None]
    operands = [linear.x, weight.stored, *tables]
    if any(x.strides[0] * dtype_bytes(x.dtype) % 16 or x.offset * dtype_bytes(x.dtype) % 16 for x in operands):
        return "the copy engine cannot move the operands"
    if linear.gate is not None and linear.n % 2:
        return "gates and ups differ in number"
    if not linear.dense or linear.out.shape[1] % 2 or linear.out.offset % 2:
        return "the results are strided"
    return "" if linear.residual is None or linear.residual.offset % 2 == 0 else "the residual is not aligned"


def shape_tiles(linear: Linear, weight: Weight) -> dict[str, int]:
    """Tile and parts of K of a shape nobody measured: what won at the nearest measured ones (ADR 38)."""
    gated, tall, many = linear.gate is not None, linear.n >= 16384, linear.m > 64
    if many and (tall or linear.m > MOST_ROWS) and not weight.x_scales:
        return {"BN": 256, "WARPGROUPS": 2, "PROGRAMS": 1, "SPLIT": 1, "CLUSTERED": 0, "ROW": 64}
    if many:
        split = 2 if cdiv(linear.n, 128) > 32 else 3
        return {"BN": 128, "WARPGROUPS": 2, "PROGRAMS": 1, "SPLIT": split, "CLUSTERED": 1, "ROW": 64}
    if tall or (gated and not weight.coded):
        groups = 2 if weight.coded else 1
        return {"BN": 128, "WARPGROUPS": groups, "PROGRAMS": 2, "SPLIT": 1, "CLUSTERED": 0, "ROW": 64}
    split = 4 if linear.k >= 2 * linear.n else 2
    return {"BN": 64, "WARPGROUPS": 1, "PROGRAMS": 2, "SPLIT": split, "CLUSTERED": int(split == 2), "ROW": 64}


def slot_bytes(c: Mapping[str, int], linear: Linear, weight: Weight) -> int:
    """Of x, weight and tables of a unit, as the source lays them out."""
    columns, own = weight.columns(c["ROW"]), c["BN"] // (1 if linear.gate is None else 2)
    line = cdiv(2 * own, 256) * 256 * (1 if linear.gate is None else 2)
    tables = (weight.groups is not None) + (weight.zeros is not None)
    lines = tables * max(1, columns // weight.group) if tables else 0
    return cdiv((1 if weight.x_scales else 2) * c["BM"] * columns + c["BN"] * c["ROW"] + lines * line, 1024) * 1024


def sent_bytes(c: Mapping[str, int], linear: Linear, weight: Weight) -> int:
    """Of a cluster's parts of K, shares rounded up, as the source lays them out."""
    halves = 2 if linear.gate is not None and not weight.coded else 1
    return c["SPLIT"] * halves * 512 * cdiv(c["BN"] // 16 // halves * c["BM"] // 8, c["SPLIT"])


def sent_behind(c: Mapping[str, int]) -> bool:
    """Whether what a cluster sends lies behind the ring: of few rows it is little, and nobody waits for the ring."""
    return bool(c["CLUSTERED"]) and c["BM"] <= 64


def behind_ring(c: Mapping[str, int], linear: Linear, weight: Weight) -> int:
    """Bytes behind the ring and its barriers: a word or a barrier, and what lies there of what a cluster sends."""
    return 16 + (sent_bytes(c, linear, weight) if sent_behind(c) else 0)


def fitted(config: Mapping[str, int], linear: Linear, weight: Weight) -> dict[str, int] | str:
    """A configuration with as many slots as fit, no part of K empty, and a unit no shorter than the packing's chunk; or
    why there is none."""
    c = {**config, "BM": min(MOST_ROWS, max(8, pow2(linear.m)))}
    aligned = weight.groups is None or weight.group % 256 == 0 or 256 % weight.group == 0 or weight.group == linear.k
    c["ROW"] = 128 if weight.form != "INT4" else c["ROW"] if aligned else 64
    if linear.gate is not None and not weight.coded and c["BN"] != 128 * c["WARPGROUPS"]:
        return "gates and ups are not two blocks of a warpgroup"
    if weight.x_scales and weight.interval and c["BM"] * c["BN"] // c["WARPGROUPS"] > 128 * 64:
        return "sums of codes by codes leave no registers"
    units = cdiv(linear.k, weight.columns(c["ROW"]))
    c["SPLIT"] = min(c["SPLIT"], units)
    c["CLUSTERED"] = int(c["CLUSTERED"] and c["SPLIT"] > 1)
    slot = slot_bytes(c, linear, weight)
    room = SHARED_BYTES // c["PROGRAMS"] - 1024 - behind_ring(c, linear, weight)
    c["STAGES"] = min(MOST_STAGES, room // (slot + 16), max(2, cdiv(units, c["SPLIT"])))
    if c["CLUSTERED"] and not sent_behind(c):  # but where the ring was
        c["STAGES"] = max(c["STAGES"], cdiv(sent_bytes(c, linear, weight), slot))
    if c["STAGES"] < 2 or c["STAGES"] * (slot + 16) > room:
        return "a program's shared memory does not hold its ring"
    return c


def launch(linear: Linear, weight: Weight, c: Mapping[str, int], bounds: Mapping[str, Any]) -> KernelLaunch:
    """The launch of a configuration."""
    own = c["BN"] // (1 if linear.gate is None else 2)
    box = 64 if linear.gate is not None and not weight.coded else own
    tiles, tiles_of_rows = cdiv(linear.out.shape[1], own), cdiv(linear.m, c["BM"])
    grid, memory = tiles * tiles_of_rows * c["SPLIT"], c["SPLIT"] > 1 and not c["CLUSTERED"]
    given: dict[str, Argument | None] = {
        "x": TmaOperand(linear.x, (c["BM"], 128 // dtype_bytes(linear.x.dtype)), spare=True),
        "weight": TmaOperand(weight.stored, (box, c["ROW"] // 2), c["ROW"]),
        "groups": TmaOperand(weight.groups, (1, own), 0) if weight.groups is not None else None,
        "zeros": TmaOperand(weight.zeros, (1, own), 0) if weight.zeros is not None else None,
        "scales": weight.scales, "x_scales": weight.x_scales, "bias": linear.bias, "residual": linear.residual,
        "out": linear.out, "bounds": bounds["bounds"],
        "partial": Scratch("partial", 4 * grid * c["BM"] * c["BN"]) if memory else None,
        "counter": Scratch("counter", 4 * tiles * tiles_of_rows, zeroed=True) if memory else None,
    }  # fmt: skip
    present = {name: arg for name, arg in given.items() if arg is not None}
    scratch = {"partial": "*fp32", "counter": "*i32"}
    signature = tuple((name, type_of(arg, scratch.get(name, ""), True)) for name, arg in present.items())
    constants = {
        "FORM": weight.form, "TYPE": TYPES[linear.out.dtype], "ELEMENT": ELEMENTS[linear.x.dtype],
        "DEPTH": '"k32"' if weight.x_scales else '"k16"', "MAJOR": '""' if weight.x_scales else '", 0, 0"',
        "INTERVAL": weight.interval, "STATIC": int(weight.static), "N": linear.n, "K": linear.k,
        "GATE": (linear.gate or "none").upper(), "CHUNK": weight.chunk, "GROUP": weight.group,
        "ZEROS": int(weight.zeros is not None), "SHARED": weight.shared,
        "SCALES": TYPES[weight.scales.dtype] if weight.scales is not None else "FLOAT32",
        "TILES_OF_ROWS": tiles_of_rows, "LAST": bounds["last"] or 0,
        "REGISTERS": REGISTERS[c["WARPGROUPS"], c["PROGRAMS"]], "BEHIND": int(sent_behind(c)),
        **{name: c[name] for name in ("BM", "BN", "WARPGROUPS", "PROGRAMS", "SPLIT", "CLUSTERED", "ROW", "STAGES")},
        **{macro: expression(macro, name, given[name]) for macro, name in OPTIONAL.items()},
        "PARAMETERS": ", ".join(parameter(name, arg) for name, arg in present.items()),
    }  # fmt: skip
    warps, shared = 4 * c["WARPGROUPS"] + 4, c["STAGES"] * (slot_bytes(c, linear, weight) + 16)
    shared += behind_ring(c, linear, weight)
    spec = Specialization(
        __name__, "gemm_ring", (*signature, ("rows", "i32")), tuple(constants.items()), num_warps=warps, pdl=True,
        source="gemm_ring.cu", shared=shared,
    )  # fmt: skip
    operands = (weight.stored, weight.groups, weight.zeros, weight.scales, weight.x_scales)
    moved = nbytes(linear.x, *operands, linear.residual, linear.out)
    return KernelLaunch(spec, (grid, 1, 1), (*present.values(), linear.m), moved)


OPTIONAL = {
    "SCALES_OF_GROUPS": "groups", "ZEROS_OF_GROUPS": "zeros", "SCALES_OF_ROWS": "scales", "SCALES_OF_X": "x_scales",
    "BIAS": "bias", "RESIDUAL": "residual", "BOUNDS": "bounds", "PARTIAL": "partial", "COUNTER": "counter",
}  # fmt: skip
"""Operands that a linear may lack, by what the source calls them."""
POINTED = {
    "scales": "const void",
    "x_scales": "const float",
    "out": "u16",
    "bounds": "const int",
    "partial": "float4",
    "counter": "u32",
}
"""C++ types of what pointers point to, where not numbers that are only read."""


def parameter(name: str, arg: Argument) -> str:
    """A parameter's declaration in C++."""
    return f"DESCRIPTOR({name})" if isinstance(arg, TmaOperand) else f"{POINTED.get(name, 'const u16')} *{name}"


def expression(macro: str, name: str, arg: Argument | None) -> str:
    """An operand that may lack, as an expression in C++."""
    if arg is None:
        return f"(({POINTED.get(name, 'const u16')} *)nullptr)" if "GROUPS" not in macro else "nullptr"
    return f"&{name}" if isinstance(arg, TmaOperand) else name


def reason(linear: Linear, weight: Weight, c: Mapping[str, int], tuned: Tuned | None) -> str:
    """Why and how, in words."""
    parts = f", K in {c['SPLIT']} parts of a {'cluster' if c['CLUSTERED'] else 'tile'}" if c["SPLIT"] > 1 else ""
    what = f"{weight.scheme or linear.dtype}, {linear.joined}ring of {c['STAGES']} slots, "
    return f"{what}{c['BN']}x{c['BM']} tiles{parts}, {tuned.note if tuned else 'modelled'}"


def untuned_us(linear: Linear, weight: Weight) -> float:
    """Time of a shape nobody measured: the weights' bytes at two thirds of the memory's speed, or the products at
    FLOPS."""
    moved = nbytes(linear.x, weight.stored, weight.groups, weight.zeros, linear.residual, linear.out)
    flops = 2 * linear.m * linear.n * linear.k
    return max(modelled_us(moved, ARCH, efficiency=0.65), flops / FLOPS) + 1


KERNEL = GemmRing()
TWIN = GemmTwin()
"""What stands in for it in the interpreter."""
