"""Linear layer of 129 to 1023 rows on sm_90: a cluster's programs share the weight's boxes by multicast.

In CUDA C++ (``gemm_cluster.cu``). Tiles are of the width that divides the work most evenly, where Triton knows powers
of two; a box of the weight leaves L2 once for two tiles of rows, where each of Triton's programs reads it; parts of K
meet in a cluster's shared memory. On an H200 the linears of an 8B layer take 175 us at 256 rows, one after another,
where ``gemm`` and ``gemm_persistent`` take 192 (ADR 39). Floor: 2·M·N·K operations, or the weight's bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..fusion import LINEAR, PLAIN_LINEAR
from ..kernel import Argument, CallSite, KernelLaunch, Selection, Specialization, TmaOperand
from ..tuning import Tuned, find_linear
from ._common import LAUNCH_US, cdiv, type_of
from ._gemm_twin import GemmTwin
from ._linear import SHARED, Linear, read_linear, row_bounds
from .gemm_ring import ARCH, ELEMENTS, TYPES, expression, parameter

BM, BK = 128, 64
"""Rows of a tile and columns of a unit."""
FEWEST_ROWS, MOST_ROWS = 129, 1023
"""Fewer are ``gemm_ring``'s. More take ``gemm_persistent`` as long alone and 1% less under the card's power cap."""
WIDTHS = (96, 128, 144, 160, 192, 208, 224, 256)
"""Rows of the weight that a tile has: of the instruction's widths, those that ``multiply_wide`` spells out."""
CLUSTERS = {1: 132, 2: 66, 4: 30}
"""How many clusters of so many programs an H200 runs at once, by its driver's word."""
STAGING = 8 * 16 * 144
"""Bytes of shared memory that results pass through."""
CYCLES, L2_BYTES, MHZ = 6000, 45.0, 1600.0
"""Of a tile beside its products; from L2 to a multiprocessor a cycle at most; a second's cycles under the power cap, in
millions (measured; ADR 39)."""


@dataclass(frozen=True)
class Tiling:
    """BN rows of the weight a tile; SHARE tiles of rows that share them and SPLIT parts of K in a cluster."""

    BN: int
    SHARE: int = 1
    SPLIT: int = 1

    @property
    def slot(self) -> int:
        """Bytes of a unit in shared memory."""
        return (BM + self.BN) * 2 * BK

    def stages(self, k: int) -> int:
        """Slots of the ring: no more than a program has units, nor fewer than hold its sums."""
        most = (SHARED - STAGING - 1024) // (self.slot + 16)
        wanted = max(2, cdiv(cdiv(k, BK), self.SPLIT), cdiv(4 * BM * self.BN, self.slot) if self.SPLIT > 1 else 0)
        return min(most, wanted)

    def own(self, gated: bool) -> int:
        """Outputs of a tile."""
        return self.BN // 2 if gated else self.BN

    def tiles(self, m: int, n: int, gated: bool) -> int:
        """Clusters that have something to do."""
        return cdiv(m, BM * self.SHARE) * cdiv(n // 2 if gated else n, self.own(gated))

    def fits(self, m: int, n: int, k: int, gated: bool) -> bool:
        """Whether blocks of 8 outputs and K can be divided so, the ring holds sums, and all parts run at once."""
        whole = self.own(gated) % (8 * self.SPLIT) == 0 and cdiv(k, BK) >= self.SPLIT
        held = 4 * BM * self.BN <= self.stages(k) * self.slot
        once = self.tiles(m, n, gated) <= CLUSTERS[self.SHARE * self.SPLIT]
        return whole and (self.SPLIT == 1 or (held and once))

    def modelled_us(self, m: int, n: int, k: int, gated: bool) -> float:
        """Rounds of tiles at the tensor cores' rate, or at L2's."""
        rounds = cdiv(self.tiles(m, n, gated), CLUSTERS[self.SHARE * self.SPLIT])
        unit = max(4.0 * self.BN, 2 * BK * (BM + self.BN / self.SHARE) / L2_BYTES)
        return LAUNCH_US + rounds * (unit * cdiv(cdiv(k, BK), self.SPLIT) + CYCLES) / MHZ


def tilings(m: int, n: int, k: int, gated: bool) -> list[Tiling]:
    """All that fit m rows by a weight (n, k), the fastest by the model first."""
    ways = ((1, 1), (2, 1), (1, 2), (2, 2), (1, 4))
    found = [Tiling(width, share, split) for width in WIDTHS for share, split in ways]
    fitting = [tiling for tiling in found if tiling.fits(m, n, k, gated)]
    return sorted(fitting, key=lambda tiling: tiling.modelled_us(m, n, k, gated))


@dataclass(frozen=True)
class GemmCluster:
    """``aten.linear`` and ``cuda.linear`` (without its norm) of 129 to 1023 rows on sm_90."""

    name: str = "gemm_cluster"
    ops: tuple[str, ...] = (PLAIN_LINEAR, LINEAR)

    def select(self, site: CallSite) -> Selection | str:
        if site.arch != ARCH:
            return f"sm_{site.arch} has other tensor cores"
        linear = read_linear(site)
        if isinstance(linear, str):
            return linear
        if wrong := refusal(linear):
            return wrong
        shape = (cdiv(linear.m, BM) * BM, linear.n, linear.k, linear.gate is not None)
        tuned = find_linear(site.tuning, self.name, linear.dtype, *shape[:3], linear.form)
        if tuned and (tuned.note != "tuned" or not Tiling(**tuned.config).fits(*shape)):
            tuned = None  # what suits other tiles of rows leaves multiprocessors idle: the model knows better
        tiling = Tiling(**tuned.config) if tuned else tilings(*shape)[0]
        made = launch(linear, tiling, row_bounds(site, linear.m))
        return Selection((made,), reason(linear, tiling, tuned), tuned.us if tuned else tiling.modelled_us(*shape))


def refusal(linear: Linear) -> str:
    """Why this kernel cannot do a linear; empty if it can."""
    if linear.dtype not in ("bfloat16", "float16") or linear.x.dtype != linear.dtype:
        return f"weights of {linear.dtype}"
    if not FEWEST_ROWS <= linear.m <= MOST_ROWS:
        return f"{linear.m} rows"
    if linear.residual is not None:
        return "it adds no residual"
    if not linear.movable(ARCH) or (linear.bias is not None and linear.bias.offset % 2):
        return "the copy engine cannot move the operands"
    if linear.n != linear.out.shape[1] * (1 if linear.gate is None else 2):
        return "gates and ups differ in number"
    return "" if linear.dense else "the results are strided"


def launch(linear: Linear, tiling: Tiling, bounds: Mapping[str, Any]) -> KernelLaunch:
    """The launch of a tiling: programs that walk the tiles, or as many as there are parts."""
    box = tiling.BN // (2 if linear.gate is not None and tiling.SHARE == 1 else tiling.SHARE)
    given: dict[str, Argument | None] = {
        "x": TmaOperand(linear.x, (BM, BK), spare=True), "weight": TmaOperand(linear.weight, (box, BK)),
        "bias": linear.bias, "out": linear.out, "bounds": bounds["bounds"],
    }  # fmt: skip
    present = {name: arg for name, arg in given.items() if arg is not None}
    stages = tiling.stages(linear.k)
    constants = {
        "FORM": "NUMBERS", "SCALES": "FLOAT32", "ZEROS": 0, "TYPE": TYPES[linear.dtype],
        "ELEMENT": ELEMENTS[linear.dtype], "DEPTH": '"k16"', "MAJOR": '", 0, 0"', "N": linear.n, "K": linear.k,
        "GATE": (linear.gate or "none").upper(), "BN": tiling.BN, "SHARE": tiling.SHARE, "SPLIT": tiling.SPLIT,
        "STAGES": stages, "LAST": bounds["last"] or 0,
        **{name.upper(): expression(name.upper(), name, given[name]) for name in ("bias", "bounds")},
        "PARAMETERS": ", ".join(parameter(name, arg) for name, arg in present.items()),
    }  # fmt: skip
    signature = (*((name, type_of(arg, "", True)) for name, arg in present.items()), ("rows", "i32"))
    spec = Specialization(
        __name__, "gemm_cluster", signature, tuple(constants.items()), num_warps=12, pdl=True,
        source="gemm_cluster.cu", shared=stages * (tiling.slot + 16) + STAGING + 16,
    )  # fmt: skip
    cluster, tiles = tiling.SHARE * tiling.SPLIT, tiling.tiles(linear.m, linear.n, linear.gate is not None)
    programs = cluster * (tiles if tiling.SPLIT > 1 else min(tiles, CLUSTERS[cluster]))
    return KernelLaunch(spec, (programs, 1, 1), (*present.values(), linear.m), linear.moved)


def reason(linear: Linear, tiling: Tiling, tuned: Tuned | None) -> str:
    """Why and how, in words."""
    shared = f", {tiling.SHARE} tiles of rows share the weight" if tiling.SHARE > 1 else ""
    parts = f", K in {tiling.SPLIT} parts of a cluster" if tiling.SPLIT > 1 else ""
    return f"{linear.joined}{BM}x{tiling.BN} tiles{shared}{parts}, {tuned.note if tuned else 'modelled'}"


KERNEL = GemmCluster()
TWIN = GemmTwin()
"""What stands in for it in the interpreter."""
