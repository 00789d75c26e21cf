"""Linear layer of up to 64 rows whose weights, or codes of 4 and 8 bits, the copy engine streams through a ring.

Written in Gluon, which lets one warp start the copies before the wait for x, and divides the tiles' columns evenly over
the multiprocessors: on an H200 the linears of an 8B layer over int4 take 62 us at 32 rows where ``gemm_q``
takes it 81 (ADR 36).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.language.extra.cuda import gdc_launch_dependents

from ..eight_bits import QUANTIZED
from ..fusion import ABSENT, LINEAR, LINEAR_Q
from ..kernel import Argument, CallSite, KernelLaunch, Scratch, Selection, Strided, TmaOperand
from ..pack import chunk_of, parts_of
from ..tuning import Tuned, find_linear, linear_form, quantized_form
from ._common import SM_COUNT, cdiv, launch, modelled_us, nbytes, pow2
from ._eight_bits import scheme
from ._linear import SHARED, read_linear
from ._ring import FORMS, empty, fill, first_unit
from ._ring_twin import gemm_ring_twin
from .gemm_q import as_elements, read_rows
from .gemm_q_few import form_of

UNTUNED_US = 3.0
MOST_ROWS = 64
"""Rows of x at most: a program holds all of a tile's sums."""
REGISTERS, MANY_SUMS = (96, 112), 2048
"""Of a thread at most, so that programs fit beside each other: with few sums a tile and with many."""
FILLER_REGISTERS = gl.constexpr(24)
"""Of a thread of the warp that fills the ring; the others get what it leaves."""


@gluon.jit
def gemm_ring(
    x, weight, groups, scales, bias, residual, out, partial, counter, M,
    N: gl.constexpr, K: gl.constexpr, GATE: gl.constexpr, FORM: gl.constexpr, WIDTH: gl.constexpr,
    PARTS: gl.constexpr, SHARED: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    G: gl.constexpr, STAGES: gl.constexpr, PROGRAMS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias, fp32 sums; see ``_linear`` for the gated and residual forms.

    M at most BM; a tile is BN rows of the weight (with GATE half gates, half ups), a slot of the ring has G boxes of
    WIDTH elements of K of them. FORM None: elements are weights. Else they are halfwords of PARTS codes each (pack.py),
    x meets them in boxes of WIDTH columns, and ``groups`` (K / (PARTS · WIDTH), N) are their scales; or ``scales`` are
    of whole rows (GROUP = K), one for SHARED rows. x, weight and groups are descriptors with boxes (BM, WIDTH),
    (BN, WIDTH) and (1, BN), BN / 2 where gated. Grid (PROGRAMS,). Floor: the bytes of weight.
    """
    STEPS: gl.constexpr = (K + G * PARTS * WIDTH - 1) // (G * PARTS * WIDTH)
    TILES: gl.constexpr = (N + BN - 1) // BN
    UNITS: gl.constexpr = TILES * STEPS
    BOX: gl.constexpr = gl.NVMMASharedLayout(2 * WIDTH, 16, 2)
    w_ring = gl.allocate_shared_memory(weight.dtype, [STAGES * G, BN, WIDTH], BOX)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * G * PARTS, BM, WIDTH], BOX)
    SCALED: gl.constexpr = groups is not None
    s_ring = x_ring  # not read without scales
    if SCALED:
        LINE: gl.constexpr = gl.NVMMASharedLayout(0, 16, 2)
        s_ring = gl.allocate_shared_memory(groups.dtype, [STAGES * G, 1, BN], LINE)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(free.index(slot), count=1)
    if PDL:
        gdc_launch_dependents()
    begin = first_unit(gl.program_id(0), UNITS, PROGRAMS)
    end = first_unit(gl.program_id(0) + 1, UNITS, PROGRAMS)
    gl.warp_specialize(
        [
            (empty, (w_ring, x_ring, s_ring, full, free, scales, bias, residual, out, partial, counter, begin, end, M,
                     N, K, STEPS, UNITS, GATE, FORM, SHARED, GROUP, BM, BN, PARTS, G, STAGES, PROGRAMS, SCALED, PDL)),
            (fill, (x, weight, groups, w_ring, x_ring, s_ring, full, free, begin, end,
                    N, STEPS, GATE, BM, BN, WIDTH, PARTS, G, STAGES, PDL)),
        ],
        [1], [FILLER_REGISTERS],
    )  # fmt: skip


def shape_tiles(arch: int, *, gated: bool, dense: bool) -> dict[str, int]:
    """Tile and ring of a shape nobody measured: two programs a multiprocessor, or one with a deeper ring."""
    c = {"BN": 128 if gated else 64, "G": 2 if dense else 1, "STAGES": 6}
    return {**c, "PROGRAMS": SM_COUNT.get(arch, 132) * (1 if dense else 2)}


@dataclass(frozen=True)
class Box:
    """How weights lie in the ring: halfwords a box along K, parts of a halfword, bytes of a slot beside weights and x
    a row of a tile; ``form``: of the codes, None for weights."""

    form: str | None
    width: int
    parts: int
    scale_bytes: int

    def slot_bytes(self, bm: int, bn: int, boxes: int) -> int:
        """Of a slot of the ring, with its barriers."""
        return boxes * (2 * self.width * (bn + self.parts * bm) + self.scale_bytes * bn) + 16


def fitted(c: Mapping[str, Any], box: Box, m: int, n: int, k: int, arch: int) -> dict[str, Any]:
    """A configuration with as many slots as fit beside the programs of the same multiprocessor, and no program idle."""
    bm = max(8, pow2(m))
    units = cdiv(n, c["BN"]) * cdiv(k, c["G"] * box.parts * box.width)
    beside = cdiv(c["PROGRAMS"], SM_COUNT.get(arch, 132))
    room = SHARED // beside - 4 * bm * c["BN"]  # the epilogue turns a tile in shared memory
    slots = min(c["STAGES"], room // box.slot_bytes(bm, c["BN"], c["G"]))
    return {**c, "BM": bm, "STAGES": max(2, slots), "PROGRAMS": min(c["PROGRAMS"], units)}


def ring_launch(
    arch: int, c: Mapping[str, Any], box: Box, copied: tuple[Strided, Strided, Strided | None],
    tensors: dict[str, Argument | None], constants: dict[str, Any], moved: int,
) -> KernelLaunch:  # fmt: skip
    """The launch; ``copied``: x, what holds the weight, and scales of groups."""
    x, weight, groups = copied
    n, gated = constants["N"], constants["GATE"] is not None
    rows, swizzle = c["BN"] // 2 if gated else c["BN"], 2 * box.width
    tensors |= {
        "x": TmaOperand(x, (c["BM"], box.width), swizzle),
        "weight": TmaOperand(weight, (rows, box.width), swizzle),
        "groups": TmaOperand(groups, (1, rows), 0) if groups is not None else None,
        "M": x.shape[0],
        "partial": Scratch("partial", 8 * c["PROGRAMS"] * c["BM"] * c["BN"]),
        "counter": Scratch("counter", 4 * cdiv(n, c["BN"]), zeroed=True),
    }
    constants |= {"FORM": box.form, "WIDTH": box.width, "PARTS": box.parts}
    constants |= {name: c[name] for name in ("BM", "BN", "G", "STAGES", "PROGRAMS")}
    return launch(
        arch, gemm_ring, (c["PROGRAMS"],), tensors, constants, moved=moved,
        registers=REGISTERS[c["BN"] * c["BM"] > MANY_SUMS],
        scratch={"partial": "*fp32", "counter": "*i32"},
    )  # fmt: skip


def selection(made: KernelLaunch, what: str, c: Mapping[str, Any], tuned: Tuned | None, arch: int) -> Selection:
    """The launch with its reason and time; of a shape nobody measured, one that leaves it to kernels that were."""
    why = f"{what}ring of {c['STAGES']} slots, {c['PROGRAMS']} programs, {tuned.note if tuned else 'modelled'}"
    return Selection((made,), why, tuned.us if tuned else UNTUNED_US + modelled_us(made.bytes, arch, efficiency=0.5))


def refusal(m: int, arch: int, gate: str | None, n: int, x: Strided) -> str | None:
    """Why a call is none for the ring, whatever its weights."""
    if arch != 90:
        return f"sm_{arch} has other tensor cores"
    if m > MOST_ROWS:
        return f"more than {MOST_ROWS} rows"
    if gate is not None and n % 2:
        return "gates and ups differ in number"
    if x.dtype not in ("bfloat16", "float16"):
        return f"activations of {x.dtype}"
    return "the rows are not aligned" if x.strides[0] % 8 or x.offset % 8 else None


@dataclass(frozen=True)
class GemmRing:
    """``aten.linear`` and ``cuda.linear`` (without its norm) of up to 64 rows on sm_90."""

    name: str = "gemm_ring"
    ops: tuple[str, ...] = ("aten.linear.default", LINEAR)

    def select(self, site: CallSite) -> Selection | str:
        linear = read_linear(site)
        if isinstance(linear, str):
            return linear
        m, n, k, gate = linear.m, linear.n, linear.k, linear.gate
        if why := refusal(m, site.arch, gate, n, linear.x):
            return why
        if not linear.dense or linear.dtype != linear.x.dtype:
            return "the results are strided, or weight and x differ in dtype"
        if k % 8 or linear.weight.offset % 8:
            return "the copy engine cannot move the weight"
        tuned = find_linear(site.tuning, self.name, linear.dtype, m, n, k, linear.form)
        box = Box(None, 64, 1, 0)
        untuned = shape_tiles(site.arch, gated=gate is not None, dense=True)
        c = fitted(tuned.config if tuned else untuned, box, m, n, k, site.arch)
        tensors: dict[str, Argument | None] = {
            "scales": None, "bias": linear.bias, "residual": linear.residual, "out": linear.out,
        }  # fmt: skip
        constants = {"N": n, "K": k, "GATE": gate, "SHARED": 1, "GROUP": 0}
        made = ring_launch(site.arch, c, box, (linear.x, linear.weight, None), tensors, constants, linear.moved)
        return selection(made, linear.joined, c, tuned, site.arch)


@dataclass(frozen=True)
class GemmQRing:
    """``llmopt.linear_q`` and ``cuda.linear_q`` of up to 64 rows on sm_90."""

    name: str = "gemm_q_ring"
    ops: tuple[str, ...] = (QUANTIZED, LINEAR_Q)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = {**ABSENT, **site.values}
        codes, gate, bits, scales = v["codes"], v["gate"], v["bits"], v["scales"]
        rows = read_rows(v, site.outputs[0])
        if isinstance(rows, str):
            return rows
        x, out, residual = rows
        (m, k), n, group = x.shape, codes.shape[0], v["block_k"]
        if why := refusal(m, site.arch, gate, n, x):
            return why
        chunk, form, grouped = chunk_of(bits, group, k), form_of(v), group != k
        if form not in FORMS["bf16"] or chunk < 64 or k % chunk or codes.dtype != "uint8" or codes.offset:
            return f"{form} codes in chunks of {chunk} columns"
        if grouped and (group != chunk or v["block_n"] != 1 or n % 8 or scales.dtype not in ("bfloat16", "float16")):
            return f"scales of {v['block_n']}x{group} in {scales.dtype}"
        tuned = find_linear(site.tuning, self.name, quantized_form(v, k), m, n, k, linear_form(v))
        parts = parts_of(bits, chunk, k)
        box = Box(form, chunk // parts, parts, 2 if grouped else 0)
        untuned = shape_tiles(site.arch, gated=gate is not None, dense=False)
        c = fitted(tuned.config if tuned else untuned, box, m, n, k, site.arch)
        tensors: dict[str, Argument | None] = {
            "scales": None if grouped else scales, "bias": v["bias"], "residual": residual, "out": out,
        }  # fmt: skip
        constants = {"N": n, "K": k, "GATE": gate, "SHARED": v["block_n"], "GROUP": group}
        copied = (x, as_elements(codes, "int16"), scales if grouped else None)
        moved = nbytes(x, codes, scales, residual, out)
        made = ring_launch(site.arch, c, box, copied, tensors, constants, moved)
        return selection(made, f"{scheme(v, k)}, ", c, tuned, site.arch)


KERNELS = (GemmRing(), GemmQRing())
TWIN = gemm_ring_twin
"""What Triton's interpreter runs in its place."""
