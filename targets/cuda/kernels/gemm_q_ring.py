"""Linear layer of up to 64 rows over weights of 4 and 8 bits, which stream through a ring in shared memory (sm_90).

Written in Gluon, which lets one warp start the copies before the wait for x, and divides the work evenly: on an H200
the linears of an 8B layer over int4 take 62 us at 32 rows, where ``gemm_q`` takes 81 (ADR 36).
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
from ..fusion import ABSENT, LINEAR_Q
from ..kernel import CallSite, Scratch, Selection, TmaOperand
from ..pack import chunk_of, parts_of
from ..tuning import find_linear, linear_form, quantized_form
from ._common import SM_COUNT, cdiv, launch, modelled_us, nbytes, pow2
from ._dequantize import HALFWORDS
from ._eight_bits import scheme
from ._linear import SHARED
from ._ring import empty, fill, first_unit
from ._ring_twin import gemm_q_ring_twin
from .gemm_q import as_elements, read_rows
from .gemm_q_few import form_of

MOST_ROWS = 64
"""Rows of x at most: of 128, ``gemm_q`` is faster (measured on an H200)."""
REGISTERS = {2048: 96, 4096: 112, 8192: 128}
"""Of a thread at most, by a tile's sums: two programs of 256 threads fit a multiprocessor."""
FILLER_REGISTERS = gl.constexpr(24)
"""Of a thread of the warp that fills the ring; the others get what it leaves."""
UNTUNED_US = 3.0
"""Added to the modelled time of a shape nobody measured, which leaves it to kernels that were."""


@gluon.jit
def gemm_q_ring(
    x, codes, groups, scales, bias, residual, out, partial, counter, M,
    N: gl.constexpr, K: gl.constexpr, GATE: gl.constexpr, FORM: gl.constexpr, WIDTH: gl.constexpr,
    PARTS: gl.constexpr, SHARED: gl.constexpr, GROUP: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
    STAGES: gl.constexpr, PROGRAMS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out (M, N) = x (M, K) · weight (N, K)ᵀ + bias, fp32 sums; see ``_linear`` for the gated and residual forms.

    M at most BM; a tile is BN rows of the weight (with GATE half gates, half ups). ``codes``: halfwords of PARTS codes
    each (pack.py), WIDTH of them a chunk. ``groups`` (K / (PARTS · WIDTH), N): a scale a row and chunk; or ``scales``
    are of whole rows (GROUP = K), one for SHARED rows. x, codes and groups are descriptors with boxes (BM, WIDTH),
    (BN, WIDTH) and (1, BN), BN / 2 where gated. The ring has STAGES slots. Grid (PROGRAMS,). Floor: the codes' bytes.
    """
    CHUNKS: gl.constexpr = K // (PARTS * WIDTH)
    UNITS: gl.constexpr = (N + BN - 1) // BN * CHUNKS
    BOX: gl.constexpr = gl.NVMMASharedLayout(2 * WIDTH, 16, 2)
    c_ring = gl.allocate_shared_memory(codes.dtype, [STAGES, BN, WIDTH], BOX)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * PARTS, BM, WIDTH], BOX)
    s_ring = x_ring  # not read where scales are of whole rows
    if groups is not None:
        LINE: gl.constexpr = gl.NVMMASharedLayout(0, 16, 2)
        s_ring = gl.allocate_shared_memory(groups.dtype, [STAGES, 1, BN], LINE)
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
            (empty, (c_ring, x_ring, s_ring, full, free, scales, bias, residual, out, partial, counter, begin, end, M,
                     N, K, CHUNKS, UNITS, GATE, FORM, SHARED, GROUP, BM, BN, PARTS, STAGES, PROGRAMS, PDL)),
            (fill, (x, codes, groups, c_ring, x_ring, s_ring, full, free, begin, end,
                    N, CHUNKS, GATE, BM, BN, WIDTH, PARTS, STAGES, PDL)),
        ],
        [1], [FILLER_REGISTERS],
    )  # fmt: skip


def shape_tiles(arch: int, gated: bool) -> dict[str, int]:
    """Tile and ring of a shape nobody measured: two programs a multiprocessor."""
    return {"BN": 128 if gated else 64, "STAGES": 4, "PROGRAMS": 2 * SM_COUNT.get(arch, 132)}


def fitted(c: Mapping[str, int], m: int, units: int, columns: int, scaled: bool, arch: int) -> dict[str, int]:
    """A configuration with as many slots as fit beside the programs of the same multiprocessor, and no program idle.

    ``columns``: of x that meet a unit; ``scaled``: whether each unit has scales of its own."""
    bm = max(8, pow2(m))
    slot = bm * columns * 2 + c["BN"] * (c["WIDTH"] + scaled) * 2 + 16
    room = SHARED // cdiv(c["PROGRAMS"], SM_COUNT.get(arch, 132)) - 4 * bm * c["BN"]  # the epilogue turns a tile there
    return {**c, "BM": bm, "STAGES": max(2, min(c["STAGES"], room // slot)), "PROGRAMS": min(c["PROGRAMS"], units)}


@dataclass(frozen=True)
class GemmQRing:
    """``llmopt.linear_q`` and ``cuda.linear_q`` of up to 64 rows on sm_90."""

    name: str = "gemm_q_ring"
    ops: tuple[str, ...] = (QUANTIZED, LINEAR_Q)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = {**ABSENT, **site.values}
        codes, gate, scales = v["codes"], v["gate"], v["scales"]
        rows = read_rows(v, site.outputs[0])
        if isinstance(rows, str):
            return rows
        x, out, residual = rows
        (m, k), n = x.shape, codes.shape[0]
        chunk, form, grouped = chunk_of(v["bits"], v["block_k"], k), form_of(v), v["block_k"] != k
        if site.arch != 90:
            return f"sm_{site.arch} has other tensor cores"
        if m > MOST_ROWS:
            return f"more than {MOST_ROWS} rows"
        if form not in HALFWORDS["bf16"] or chunk < 64 or k % chunk or codes.dtype != "uint8":
            return f"{form} codes in chunks of {chunk} columns"
        if grouped and (v["block_k"] != chunk or v["block_n"] != 1 or scales.dtype not in ("bfloat16", "float16")):
            return f"scales of {v['block_n']}x{v['block_k']} in {scales.dtype}"
        if x.strides[0] % 8 or x.offset % 8 or codes.offset or (grouped and n % 8):
            return "the copy engine cannot move the operands"
        if gate is not None and n % 2:
            return "gates and ups differ in number"
        tuned = find_linear(site.tuning, self.name, quantized_form(v, k), m, n, k, linear_form(v))
        c = dict(tuned.config) if tuned else shape_tiles(site.arch, gate is not None)
        parts, tiles = parts_of(v["bits"], chunk, k), cdiv(n, c["BN"])
        width = c["WIDTH"] = chunk // parts
        c = fitted(c, m, tiles * (k // chunk), chunk, grouped, site.arch)
        box = c["BN"] if gate is None else c["BN"] // 2
        tensors = {
            "x": TmaOperand(x, (c["BM"], width), 2 * width, spare=True),
            "codes": TmaOperand(as_elements(codes, "int16"), (box, width), 2 * width),
            "groups": TmaOperand(scales, (1, box), 0) if grouped else None, "scales": None if grouped else scales,
            "bias": v["bias"], "residual": residual, "out": out, "M": m,
            "partial": Scratch("partial", 8 * c["PROGRAMS"] * c["BM"] * c["BN"]),
            "counter": Scratch("counter", 4 * tiles, zeroed=True),
        }  # fmt: skip
        constants = {
            "N": n, "K": k, "GATE": gate, "FORM": form, "PARTS": parts, "SHARED": v["block_n"], "GROUP": v["block_k"],
            **{name: c[name] for name in ("WIDTH", "BM", "BN", "STAGES", "PROGRAMS")},
        }  # fmt: skip
        moved = nbytes(x, codes, scales, residual, out)
        made = launch(
            site.arch, gemm_q_ring, (c["PROGRAMS"],), tensors, constants, moved=moved,
            registers=REGISTERS[max(2048, c["BN"] * c["BM"])], scratch={"partial": "*fp32", "counter": "*i32"},
        )  # fmt: skip
        why = f"{scheme(v, k)}, ring of {c['STAGES']} slots, {c['PROGRAMS']} programs"
        why += f", {tuned.note}" if tuned else ", modelled"
        untuned_us = UNTUNED_US + modelled_us(moved, site.arch, efficiency=0.5)
        return Selection((made,), why, tuned.us if tuned else untuned_us)


KERNEL = GemmQRing()
TWIN = gemm_q_ring_twin
"""What Triton's interpreter runs in its place."""
