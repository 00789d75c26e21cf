"""Linears of one row over codes, one after another in one launch: weights stream on while a linear waits for x.

In CUDA C++ (``linear_chain.cu``), for threads keep queues of their own in shared memory, of which Triton's loops know
nothing, and programs meet between two linears: on an H200 the linears of an 8B layer over int4, norms included, take 37
us in one launch where launches of their own take 41 and the norms' (ADR 37). Floor: the codes' bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..chain import ARCHS, CHAIN, COLUMNS, ROWS
from ..kernel import Argument, CallSite, KernelLaunch, Scratch, Selection, Specialization, Strided
from ._chain_twin import ChainTwin
from ._common import ACTIVATIONS, LAUNCH_US, POINTERS, SM_COUNT, cdiv, modelled_us, nbytes
from ._eight_bits import scheme
from ._linear import SHARED

WARPS, DEPTH, REGISTERS = 16, 4, 96
"""Of a program, entries of a warp's queue at most, and registers of a thread at most (measured; ADR 37)."""
ENTRY = 1024
"""Bytes of an entry."""
MOST_TILES = 32
"""Of 16 rows that a program may have of a linear: of more than 16 of a half the sums leave registers."""
FORMS = {("int", 4): "INT4", ("int", 8): "INT8", ("fp8_e4m3", 8): "FP8"}
ROUNDS = {None: "NOT_ROUNDED", "int8": "INT8", "fp8_e4m3": "FP8"}
SCALES = {"float32": "FLOAT32", "bfloat16": "BFLOAT16", "float16": "FLOAT16"}
MEETING_US = 2.2
"""From a linear's last output to the next one's first product, on an H200."""
OPERANDS = ("codes", "scales", "bias", "x", "norm", "residual", "x_scale", "out")
"""Members of a Link in the source, in order."""
ELEMENTS = {"codes": "char", "scales": "void", "x_scale": "float", "out": "u16"}
"""C++ types of what they point to, where not 16 bits; an output is no constant."""


@dataclass(frozen=True)
class Linear:
    """What the source knows of one linear: n rows of the weight, k columns, and tiles of 16 rows a program has."""

    n: int
    k: int
    tiles: int
    gate: str | None
    norm: tuple[bool, float, float] | None

    @property
    def text(self) -> str:
        """As an initializer."""
        fp32, eps, offset = self.norm or (False, 0.0, 0.0)
        flags = f"{int(self.norm is not None)}, {int(fp32)}, {eps!r}f, {float(offset)!r}f"
        return f"{{{self.n}, {self.k}, {self.tiles}, {(self.gate or 'none').upper()}, {flags}}}"


def programs_of(units: list[tuple[int, int]], most: int) -> int:
    """Programs that share tiles of so many rows and bytes most evenly: fewest where equal."""
    return min(range(1, most + 1), key=lambda count: (sum(cdiv(tiles, count) * size for tiles, size in units), count))


def room(linears: list[Linear], depth: int, columns: int, group: int) -> int:
    """Bytes of shared memory: queues, x, an entry's zero, sums, and scales."""
    k, tiles = max(link.k for link in linears), max(link.tiles >> (link.gate is not None) for link in linears)
    entry, scales = (ENTRY + 32, 0) if group else (ENTRY, sum(64 * link.tiles for link in linears))
    return WARPS * depth * entry + 2 * k + 4 * (k // columns) + 4 * WARPS * (16 * tiles + 1) + scales


def deepest(linears: list[Linear], columns: int, group: int) -> int:
    """Entries of a warp's queue that shared memory has room for; 0 for too few."""
    depths = [depth for depth in range(2, DEPTH + 1) if room(linears, depth, columns, group) <= SHARED]
    return max(depths, default=0)


@dataclass(frozen=True)
class LinearChain:
    """``cuda.linear_chain`` on sm_90."""

    name: str = "linear_chain"
    ops: tuple[str, ...] = (CHAIN,)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        if site.arch not in ARCHS:
            return f"not measured on sm_{site.arch}"
        links = [link_values(v, i, site.outputs) for i in range(v["count"])]
        if wrong := next((why for link in links if (why := refusal(link))), ""):
            return wrong
        types = {link["scales"].dtype for link in links}
        if len(types) > 1 or (v["block_k"] and "float32" in types):
            return "scales of several types, or of groups in float32"
        group, columns = v["block_k"] or 0, 128 if v["bits"] == 4 else 64
        shapes = [(link["codes"].shape[0], link["x"].shape[-1], link["gate"] is not None) for link in links]
        units = [(n // (2 * ROWS if gated else ROWS), k * (1 + gated)) for n, k, gated in shapes]
        programs = programs_of(units, SM_COUNT[site.arch])
        linears = [
            Linear(n, k, cdiv(count, programs) * (1 + gated), link["gate"], norm_of(link))
            for link, (n, k, gated), (count, _) in zip(links, shapes, units, strict=True)
        ]
        depth = deepest(linears, columns, group)
        if not depth or max(link.tiles for link in linears) > MOST_TILES:
            return "a program's shared memory or registers do not hold its share"
        constants = {
            "FORM": FORMS[v["format"], v["bits"]], "ROUND": ROUNDS[v["round"]], "NOT_ROUNDED": -1,
            "SCALES": SCALES[links[0]["scales"].dtype], "GROUP": group, "WARPS": WARPS, "DEPTH": depth,
            "COUNT": len(links), "LINEARS": ", ".join(link.text for link in linears),
        }  # fmt: skip
        made = launch(links, programs, constants, room(linears, depth, columns, group))
        why = f"{scheme({**v, 'block_n': 1, 'block_k': group or 1 << 30}, 1 << 30)}, {len(links)} linears, "
        why += f"{programs} programs, queues of {depth} KiB a warp"
        met = LAUNCH_US + MEETING_US * len(links)
        return Selection((made,), why, met + modelled_us(made.bytes, site.arch, 0, efficiency=0.95))


def link_values(v: Mapping[str, Any], i: int, outputs: tuple[Strided, ...]) -> dict[str, Any]:
    """The operands of linear i: x and residual may be an earlier one's output."""
    own = {name.partition("/")[2]: arg for name, arg in v.items() if name.startswith(f"{i}/")}
    residual = own["residual"]
    own["residual"] = outputs[residual] if isinstance(residual, int) else residual
    return {**own, "x": outputs[i - 1] if i else v["x"], "out": outputs[i], "x_scale": own["input_scale"]}


def refusal(link: Mapping[str, Any]) -> str:
    """Why a linear's operands are not what the source reads; empty if they are."""
    dense = [link[name] for name in ("codes", "bias", "norm", "residual", "out") if link[name] is not None]
    if any(not x.contiguous for x in dense) or link["x"].strides[-1] != 1:
        return "an operand is strided"
    if any(x.offset * (1 if x is link["codes"] else 2) % 16 for x in (link["x"], link["codes"], link["scales"])):
        return "an operand is not aligned"
    if any(x is not None and x.dtype != "bfloat16" for x in (link["bias"], link["norm"], link["residual"])):
        return "an operand is not bfloat16"
    if link["gate"] is not None and link["gate"] not in ACTIVATIONS:
        return f"activation {link['gate']}"
    rows, columns = link["out"].shape[-1], link["x"].shape[-1]
    return f"{rows} outputs of {columns} columns" if rows % ROWS or columns % COLUMNS else ""


def norm_of(link: Mapping[str, Any]) -> tuple[bool, float, float] | None:
    """The RMSNorm before a linear: whether in fp32 throughout, its epsilon and its offset."""
    return None if link["norm"] is None else (link["mul_in_fp32"], link["eps"], link["offset"])


def launch(links: list[dict[str, Any]], programs: int, constants: Mapping[str, Any], shared: int) -> KernelLaunch:
    """The launch: a pointer for each operand there is, once, and how the source finds them by linear."""
    names: dict[str, str] = {}
    pointers: dict[str, tuple[str, Argument]] = {}
    members: list[str] = []
    for i, link in enumerate(links):
        for operand in OPERANDS:
            x = link[operand]
            if x is None:
                members.append("nullptr")
            else:
                name = names.setdefault(x.buffer, f"{operand}_{i}") if x.offset == 0 else f"{operand}_{i}"
                pointers.setdefault(name, (POINTERS[x.dtype], x))
                members.append(f"({'' if operand == 'out' else 'const '}{ELEMENTS.get(operand, 'u16')} *){name}")
    texts = {"LINKS": grouped(members), "PARAMETERS": ", ".join(f"void *{name}" for name in pointers)}
    signature = (*((name, type_) for name, (type_, _) in pointers.items()), ("counters", "*i32"))
    counters = Scratch("counters", 4 * len(links), zeroed=True)
    moved = sum(nbytes(link["codes"], link["scales"], link["out"]) for link in links) + nbytes(links[0]["x"])
    spec = Specialization(
        __name__, "linear_chain", signature, (*constants.items(), *texts.items()), num_warps=WARPS, pdl=True,
        registers=REGISTERS, source="linear_chain.cu", shared=shared,
    )  # fmt: skip
    return KernelLaunch(spec, (programs, 1, 1), (*(arg for _, arg in pointers.values()), counters), moved, True)


def grouped(members: list[str]) -> str:
    """Initializers of links, of a member each."""
    size = len(OPERANDS)
    return ", ".join("{" + ", ".join(members[i : i + size]) + "}" for i in range(0, len(members), size))


KERNEL = LinearChain()
TWIN = ChainTwin()
"""What stands in for it in the interpreter."""
