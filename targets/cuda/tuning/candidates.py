"""Which configurations of a kernel are worth timing for a call, and the key its entry gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import product
from math import prod
from typing import Any

from ..eight_bits import ALL_COLUMNS, INTERVAL
from ..kernel import CallSite
from ..kernels.attention import tuning_key as attention_key
from ..kernels.gemm_cluster import FEWEST_ROWS, MOST_ROWS, tilings
from ..kernels.moe import tuning_key
from ..kernels.moe_q import unpacked, width_of
from ..pack import STACKS, of_stack
from . import linear_form, linear_key, quantized_form

Config = dict[str, Any]

GEMV = (
    (1, 1024, 4), (1, 2048, 4), (1, 2048, 8), (1, 4096, 8), (2, 1024, 2), (2, 1024, 4), (2, 2048, 4), (2, 2048, 8),
    (4, 1024, 4), (4, 1024, 8), (4, 2048, 8), (4, 4096, 16),
)  # fmt: skip
"""Outputs, columns a step and warps of a one-row program; a norm's reads are shared by several outputs."""

PERSISTENT = ((128, 256, 64, 3, 8), (128, 256, 64, 4, 8), (128, 128, 64, 4, 8), (256, 128, 64, 4, 8))


FEW = ((16, 4, 1), (16, 8, 1), (32, 2, 1), (32, 4, 1), (32, 8, 1), (32, 4, 2), (64, 1, 4), (64, 2, 4), (64, 4, 4))
"""Rows of codes a program, warps that divide K and warps that divide the rows, of ``gemm_q_few``."""


def cdiv(a: int, b: int) -> int:
    """``a / b`` rounded up."""
    return -(-a // b)


def gemv(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """One row."""
    for rows, block, warps in GEMV:
        if m == 1 and block <= max(k, 1024):
            yield {"rows": rows, "block": block, "warps": warps}


def gemm(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """2 to 512 rows: programs between 0.75 (less for small weights) and 6 a multiprocessor."""
    if m <= 64:
        bm = max(16, 1 << (m - 1).bit_length())
        tried = [
            ((bm, 64, 128, 1, 4, 4), (1, 2, 4)),
            ((bm, 64, 256, 1, 4, 3), (1, 2)),
            ((bm, 128, 128, 1, 4, 4), (1, 2)),
        ]
    elif m <= 128:
        tried = [((128, 64, 128, 0, 4, 4), (1, 2, 4, 8)), ((128, 128, 64, 0, 8, 5), (1, 2, 4))]
    else:
        tried = [
            ((128, 128, 64, 0, 8, 5), (1, 2, 4)),
            ((128, 128, 64, 0, 4, 3), (1, 2)),
            ((256, 128, 64, 0, 8, 4), (1, 2)),
            ((128, 64, 128, 0, 4, 4), (1, 2, 4)),
        ]
    for (bm, bn, bk, swap, warps, stages), split in ((shape, split) for shape, splits in tried for split in splits):
        programs = cdiv(n, bn) * cdiv(m, bm) * split
        narrow = gated and swap and bn < 128
        if (
            2 <= m <= 512
            and not narrow
            and programs >= (96 if n >= 4096 else 48)
            and cdiv(k, split) >= 2 * bk
            and (programs <= 400 or (split == 1 and (programs <= 800 or bn == 128)))
        ):
            yield {"BM": bm, "BN": bn, "BK": bk, "SPLIT": split, "SWAP": swap, "warps": warps, "stages": stages,
                   "AHEAD": 256 if m <= 64 else 0}  # fmt: skip


def gemm_persistent(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """From 128 rows on."""
    for bm, bn, bk, stages, warps in PERSISTENT:
        if m >= 128 and cdiv(m, bm) * cdiv(n, bn) >= 64:
            yield {"BM": bm, "BN": bn, "BK": bk, "GROUP": 8, "PARTS": 2 if bn == 256 or bm == 256 else 1,
                   "warps": warps, "stages": stages}  # fmt: skip


def gemm_q(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """Any rows over codes of weights: programs between 0.75 and 8 a multiprocessor. The last of a shape: whether
    weights are scaled before the product."""
    bm = max(16, 1 << (m - 1).bit_length())
    if m <= 64:
        shapes = [(bm, 64, 4, 3, 0), (bm, 64, 4, 5, 0), (bm, 128, 4, 3, 0), (bm, 128, 4, 4, 0), (bm, 128, 8, 3, 0)]
    else:  # four warps spill over tiles of 128x128
        shapes = [(64, 64, 4, 3, 0), (128, 64, 4, 3, 0), (128, 64, 4, 4, 0), (64, 128, 8, 3, 1), (128, 128, 8, 3, 1)]
    for (rows, columns, warps, stages, scaled), split in product(shapes, (1, 2, 4, 8)):
        programs = cdiv(n, columns) * cdiv(m, rows) * split
        narrow = gated and columns < 128
        if not narrow and k >= 512 * split and programs >= 96 and (programs <= 1056 or split == 1):
            yield {"BM": rows, "BN": columns, "SPLIT": split, "AHEAD": 256 if m <= 64 else 0, "SCALED": scaled,
                   "warps": warps, "stages": stages}  # fmt: skip


def gemv_q(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """One row over codes, of weights alone or of both sides: 8 or 16 bytes of each output's codes a thread."""
    for warps, each, rows in product((1, 2, 4), (1, 2), (1, 2, 4, 8, 16)):
        held = rows * each * (2 if gated else 1)
        if m == 1 and 4 <= held <= 16 and k >= 512 * warps:
            yield {"rows": rows, "block": 32 * each * warps, "warps": warps}


def gemm_q_few(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """Up to 16 rows over codes of weights: 6 to 64 warps a multiprocessor that have two chunks each at least, of 16
    rows each where more than 8 rows of x leave few registers."""
    for (bn, k_warps, row_warps), depth, split in product(FEW, (1, 2), (1, 2, 4)):
        warps, each = cdiv(n, bn) * split * k_warps * row_warps, bn // row_warps
        long = k >= 256 * k_warps * depth * split
        if m <= 16 and long and 132 * 6 <= warps <= 132 * 64 and not (gated and bn < 32) and (m <= 8 or each == 16):
            yield {"BN": bn, "K_WARPS": k_warps, "ROW_WARPS": row_warps, "DEPTH": depth, "SPLIT": split}


RING = (
    (64, 1, 1),
    (64, 1, 2),
    (64, 1, 4),
    (128, 1, 1),
    (128, 1, 2),
    (128, 2, 1),
    (128, 2, 2),
    (256, 2, 1),
    (256, 4, 1),
)
"""Rows of the weight and warpgroups of a program, programs of a multiprocessor, of ``gemm_ring``."""
CLUSTERS = {1: 132, 2: 66, 3: 39, 4: 30, 5: 22}
"""How many clusters of so many programs an H200 runs at once, by its driver's word."""


def gemm_ring(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """From 2 rows on over codes of weights: programs that all run at once, for 0.6 of the multiprocessors or more; or
    whole tiles."""
    for (bn, groups, programs), split, clustered in product(RING, (1, 2, 3, 4, 5, 8), (0, 1)):
        tiles = cdiv(n, bn) * cdiv(m, 128)
        fits = tiles <= CLUSTERS.get(split, 0) * programs if clustered else tiles * split <= 132 * programs
        whole = split == 1 and tiles <= 132 * 8 * cdiv(m, 128)
        narrow = m > 64 and (programs > 2 or groups > 2)  # sums of 128 rows want registers
        if (
            m > 1
            and clustered <= (split > 1)
            and tiles * split >= 80
            and (fits or whole)
            and k >= 512 * split
            and not narrow
        ):
            for row in (64, 128) if m <= 32 else (64,):
                yield {"BN": bn, "WARPGROUPS": groups, "PROGRAMS": programs, "SPLIT": split, "CLUSTERED": clustered,
                       "ROW": row}  # fmt: skip


def ring_of_numbers(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """The same over numbers, one program a multiprocessor: where two have room, a launch that follows another puts two
    on some and none on others, and an 8B step of 32 rows takes 4.82 ms for 4.51. Few rows over tall weights are left to
    ``gemm``: alone an 8B model's gates and ups take 54 us at 8 rows for 57, in a step 1 us more."""
    if m > 64 or n < 16384:
        yield from (c for c in gemm_ring(m, n, k, gated) if c["PROGRAMS"] == 1 and c["ROW"] == 64)


def gemm_cluster(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """The four tilings that the model likes most, and two more where it gives them a tenth more than the first."""
    if FEWEST_ROWS <= m <= MOST_ROWS:
        found = tilings(m, n, k, gated)
        best = found[0].modelled_us(m, n, k, gated)
        yield from (asdict(t) for i, t in enumerate(found[:6]) if i < 4 or t.modelled_us(m, n, k, gated) <= 1.1 * best)


def gemm_w8a8(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """Rows of codes: the tiles of ``gemm``, whose steps of K take as many bytes."""
    ahead = 512 if m <= 64 else 0
    if m <= 64:
        bm = max(16, 1 << (m - 1).bit_length())
        tried = [
            ((bm, 64, 128, 1, 4, 4), (1, 2, 4)),
            ((bm, 64, 128, 1, 4, 6), (1, 2)),
            ((bm, 128, 128, 1, 4, 4), (1, 2)),
        ]
    elif m <= 128:
        tried = [((128, 64, 128, 0, 4, 4), (1, 2, 4, 8)), ((128, 128, 128, 0, 8, 4), (1, 2, 4))]
    else:
        tried = [((128, 128, 128, 0, 8, 4), (1, 2, 4)), ((128, 64, 128, 0, 4, 4), (1, 2, 4))]
    for (rows, columns, depth, swap, warps, stages), split in ((s, split) for s, splits in tried for split in splits):
        narrow = gated and swap and columns < 128
        if m <= 512 and not narrow and fills(m, n, k, rows, columns, depth, split):
            yield {"BM": rows, "BN": columns, "BK": depth, "SPLIT": split, "SWAP": swap, "AHEAD": ahead, "warps": warps,
                   "stages": stages}  # fmt: skip


def fills(m: int, n: int, k: int, rows: int, columns: int, depth: int, split: int) -> bool:
    """Whether tiles are many enough, their parts of K long enough, and parts of K not a waste."""
    programs = cdiv(n, columns) * cdiv(m, rows) * split
    return programs >= 48 and cdiv(k, split) >= 2 * depth and (programs <= 800 or split == 1)


def fast_gemm(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """65 to 512 rows of sums that stay in the tensor cores: wider tiles. Four warps would spill over 128x128."""
    for (columns, warps, stages), splits in (
        ((64, 4, 4), (1, 2, 4, 8)), ((128, 8, 4), (1, 2, 4)), ((256, 8, 4), (1, 2)),
    ):  # fmt: skip
        for split in splits:
            if 64 < m <= 512 and fills(m, n, k, 128, columns, 128, split):
                yield {"BM": 128, "BN": columns, "BK": 128, "SPLIT": split, "SWAP": 0, "AHEAD": 0, "warps": warps,
                       "stages": stages}  # fmt: skip


def gemm_w8a8_persistent(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """From 128 rows on; wider tiles spill where sums of FP8 take twice the registers."""
    tried = (
        (128, 128, 3, 8),
        (128, 128, 4, 8),
        (128, 128, 4, 16),
        (64, 128, 5, 8),
        (128, 256, 3, 8),
        (128, 256, 3, 16),
    )
    for columns, depth, stages, tall in tried:
        if m >= 128 and cdiv(m, 128) * cdiv(n, columns) >= 64:
            yield {"BM": 128, "BN": columns, "BK": depth, "TALL": tall, "PARTS": 1, "warps": 8, "stages": stages}


FAST = (
    (128, 256, 128, 3, 2, 8), (128, 256, 128, 4, 2, 8), (128, 256, 128, 4, 4, 8), (128, 256, 128, 4, 2, 16),
    (128, 256, 64, 4, 2, 8), (128, 256, 64, 6, 2, 8), (256, 128, 128, 3, 2, 8), (256, 128, 128, 4, 2, 8),
    (128, 128, 128, 4, 1, 8),
)  # fmt: skip
"""A tile's rows and columns, columns of a step, load stages, parts of the epilogue, rows of tiles sharing weights."""


def fast_persistent(m: int, n: int, k: int, gated: bool) -> Iterator[Config]:
    """From 128 rows on, of sums that stay in the tensor cores: as wide as bfloat16's."""
    for bm, bn, bk, stages, parts, tall in FAST:
        if m >= 128 and cdiv(m, bm) * cdiv(n, bn) >= 64 and not (gated and parts == 4):
            yield {"BM": bm, "BN": bn, "BK": bk, "TALL": tall, "PARTS": parts, "warps": 8, "stages": stages}


CODES: dict[str, Callable[[int, int, int, bool], Iterator[Config]]] = {
    "gemm_q": gemm_q,
    "gemm_q_few": gemm_q_few,
    "gemm_ring": gemm_ring,
    "gemv_q": gemv_q,
    "gemv_w8a8": gemv_q,
    "gemm_w8a8": gemm_w8a8,
    "gemm_w8a8_persistent": gemm_w8a8_persistent,
}
SUMS = {
    ("gemm_w8a8", ALL_COLUMNS): fast_gemm,
    ("gemm_w8a8_persistent", ALL_COLUMNS): fast_persistent,
    ("gemm_w8a8_persistent", 256): gemm_w8a8_persistent,
    ("gemm_w8a8_persistent", 512): gemm_w8a8_persistent,
}
"""What else is tried of kernels over FP8 codes, by the columns whose products the tensor cores sum."""
LINEARS: dict[str, Callable[[int, int, int, bool], Iterator[Config]]] = {
    "gemv": gemv,
    "gemm": gemm,
    "gemm_cluster": gemm_cluster,
    "gemm_persistent": gemm_persistent,
    "gemm_ring": ring_of_numbers,
}


def attention(rows: int, sequences: int, decode: bool, size: int) -> Iterator[Config]:
    """Key tiles, stages and parts of the keys; descriptors where a KV block holds whole key tiles."""
    if decode:
        splits = (8, 16, 32) if rows == 1 else (4, 8) if rows <= 4 else (1, 2, 4) if rows <= 32 else (1,)
        tiles = ((64, 3, 2), (64, 3, 4), (64, 4, 4), (32, 3, 2), (32, 3, 4), (32, 4, 4))
        for parts, (keys, stages, warps) in product(splits, tiles):
            tma = int(size % keys == 0)
            yield {"BM": 16, "BN": keys, "SPLITS": parts, "warps": warps, "stages": stages, "TMA": tma}
        return
    for lines, keys, warps, stages in ((128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)):
        if size % keys == 0 or keys == 64:
            yield {"BM": lines, "BN": keys, "SPLITS": 1, "warps": warps, "stages": stages, "TMA": int(size % keys == 0)}


def moe(pairs: int, experts: int) -> Iterator[Config]:
    """Tiles around the pairs an expert gets on average."""
    each = cdiv(pairs, experts)
    rows = [r for r in (16, 32, 64, 128) if r // 4 <= each or r == 16]
    for bm, (bn, bk, stages) in product(rows[-2:], ((64, 128, 3), (128, 64, 4), (128, 128, 3))):
        yield {"BM": bm, "BN": bn, "BK": bk, "warps": 8 if bm == 128 or bn == 128 else 4, "stages": stages}


def experts_q(pairs: int, experts: int) -> Iterator[Config]:
    """The same over codes, whose packing fixes the depth of a step."""
    each = cdiv(pairs, experts)
    rows = [r for r in (16, 32, 64) if r // 4 <= each or r == 16]
    for bm, (bn, stages) in product(rows[-2:], ((64, 3), (64, 5), (128, 3), (128, 5))):
        yield {"BM": bm, "BN": bn, "warps": 8 if bm == 64 or bn == 128 else 4, "stages": stages}


def candidates(kernel: str, site: CallSite) -> tuple[str, list[Config]] | None:
    """The key of a call in a kernel's entries and the configurations to time; None for what is not tuned."""
    v = site.values
    if kernel in LINEARS and "weight" in v:
        (n, k), gated = v["weight"].shape, v.get("gate") is not None
        m = prod(v["input"].shape[:-1])
        found = list(LINEARS[kernel](m, n, k, gated))
        return linear_key(v["weight"].dtype, m, n, k, linear_form(v)), found
    if kernel in CODES and "codes" in v:
        n, k, m = v["codes"].shape[0], v["x"].shape[-1], prod(v["x"].shape[:-1])
        key = linear_key(quantized_form(v, k), m, n, k, linear_form(v))
        tried = SUMS.get((kernel, v.get("interval", INTERVAL)), CODES[kernel])
        return key, list(tried(m, n, k, v.get("gate") is not None))
    if kernel == "attention" and not v["ring"]:
        rows, sequences, size = v["q"].shape[2], v["block_table"].shape[0], v["k_state"].shape[2]
        decode = site.function == "decode" and sequences == rows
        return attention_key(v, decode), list(attention(rows, sequences, decode, size))
    if kernel == "moe":
        rows, choices = v["index"].shape
        return tuning_key(v["x"].dtype, v["index"], v["down"]), list(moe(rows * choices, v["down"].shape[0]))
    if kernel == "moe_q":
        gate_up, down = (of_stack(v, stack) for stack in STACKS)
        rows, choices = v["index"].shape
        key = tuning_key(quantized_form(gate_up, width_of(gate_up)), v["index"], unpacked(down))
        return key, list(experts_q(rows * choices, down["codes"].shape[0]))
    return None
