"""Token feedback and greedy drawing, so that a step starts without the host having seen the last one's tokens.

ids (1, T) int64, last (S,) int32; logits (1, M, V), slots (M,) int32. Floor: the logits read once; the LM head has
just left them in L2. Drawing takes two launches: a maximum for each stretch of the vocabulary, then one a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from llmopt.program import dtype_bytes

from ..kernel import CallSite, KernelLaunch, Scratch, Selection, Specialization

FLOATS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}

STRETCH = 2048
"""Vocabulary entries a program: 63 programs a row at 128k, enough loads in flight for one row."""


@triton.jit
def feed_tokens(ids, last, out, T: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < T
    token = tl.load(ids + row, mask=inside, other=0)
    kept = tl.load(last + (-1 - token), mask=inside & (token < 0), other=0).to(tl.int64)
    tl.store(out + row, tl.where(token < 0, kept, token), mask=inside)


@triton.jit
def stretch_max(logits, slots, peaks, places, V: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Largest entry of a stretch and the lowest id that has it; a NaN counts as infinity."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(slots + row) >= 0:
        v = part * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(logits + row * V + v, mask=v < V, other=float("-inf")).to(tl.float32)
        x = tl.where(x == x, x, float("inf"))
        peak = tl.max(x)
        tl.store(peaks + row * PARTS + part, peak)
        tl.store(places + row * PARTS + part, tl.min(tl.where(x == peak, v, V)))


@triton.jit
def draw_max(peaks, places, slots, last, out, PARTS: tl.constexpr, PP: tl.constexpr):
    """The row's token, lowest id among equals; -1 (and nothing stored for the next step) when it is not finite."""
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    token = -1
    if slot >= 0:
        p = tl.arange(0, PP)
        x = tl.load(peaks + row * PARTS + p, mask=p < PARTS, other=float("-inf"))
        at = tl.load(places + row * PARTS + p, mask=p < PARTS, other=2147483647)
        peak = tl.max(x)
        if (peak < float("inf")) & (peak > float("-inf")):
            token = tl.min(tl.where(x == peak, at, 2147483647))
            tl.store(last + slot, token)
    tl.store(out + row, token)


@dataclass(frozen=True)
class Feed:
    """llmopt.feed_tokens."""

    name: str = "feed"
    ops: tuple[str, ...] = ("llmopt.feed_tokens",)

    def select(self, site: CallSite) -> Selection | str:
        """One launch over all rows."""
        ids, (out,) = site.values["ids"], site.outputs
        rows = ids.shape[1]
        block = min(256, pow2(rows))
        signature = (("ids", "*i64"), ("last", "*i32"), ("out", "*i64"))
        spec = Specialization(__name__, "feed_tokens", signature, (("T", rows), ("BLOCK", block)), num_warps=1)
        launch = KernelLaunch(spec, (-(-rows // block), 1, 1), (ids, site.values["last"], out), 16 * rows)
        return Selection((launch,), "the only one", 2.0)


@dataclass(frozen=True)
class Greedy:
    """llmopt.greedy."""

    name: str = "greedy"
    ops: tuple[str, ...] = ("llmopt.greedy",)

    def select(self, site: CallSite) -> Selection | str:
        """Two launches over dense logits."""
        logits, slots, last = site.values["logits"], site.values["slots"], site.values["last"]
        if not logits.contiguous or logits.dtype not in FLOATS:
            return f"{logits.dtype} logits, or strided"
        rows, vocabulary = logits.shape[-2:]
        parts = -(-vocabulary // STRETCH)
        peaks, places = Scratch("peaks", 4 * rows * parts), Scratch("places", 4 * rows * parts)
        scan = Specialization(
            __name__,
            "stretch_max",
            (("logits", FLOATS[logits.dtype]), ("slots", "*i32"), ("peaks", "*fp32"), ("places", "*i32")),
            (("V", vocabulary), ("PARTS", parts), ("BLOCK", STRETCH)),
        )
        draw = Specialization(
            __name__,
            "draw_max",
            (("peaks", "*fp32"), ("places", "*i32"), ("slots", "*i32"), ("last", "*i32"), ("out", "*i32")),
            (("PARTS", parts), ("PP", pow2(parts))),
            num_warps=1,
        )
        moved = rows * vocabulary * dtype_bytes(logits.dtype)
        launches = (
            KernelLaunch(scan, (rows, parts, 1), (logits, slots, peaks, places), moved),
            KernelLaunch(draw, (rows, 1, 1), (peaks, places, slots, last, site.outputs[0])),
        )
        return Selection(launches, "maxima by stretch, then by row", 4.0)


def pow2(n: int) -> int:
    """The power of two at or above ``n``."""
    return 1 << (n - 1).bit_length()


KERNELS = (Feed(), Greedy())
