"""Rotary position embedding: the table of a step, rotation of queries, and the write of rotated keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl

from ..kernel import CallSite, Selection, Strided
from ._common import cdiv, launch, modelled_us, nbytes, pdl_release, pdl_wait, pow2, rows_of
from ._states import encode, unreadable


@triton.jit
def rotary_table(
    positions, inv_freq, inv_freq_long, lengths, cos, sin,
    scale: tl.constexpr, scale_long: tl.constexpr, switch: tl.constexpr,
    F: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """cos, sin (T, F) of positions (T,) · inv_freq (F,); rows of sequences longer than ``switch`` use the long table.

    Floor: the two outputs. Angles reach tens of thousands of radians: sine and cosine reduce their argument in full.
    """
    f = tl.arange(0, BLOCK)
    frequency = tl.load(inv_freq + f, mask=f < F, other=0.0).to(tl.float32)
    row = tl.program_id(0).to(tl.int64)
    pdl_release(PDL)
    pdl_wait(PDL)
    factor = scale
    if inv_freq_long is not None:
        long = tl.load(lengths + row) > switch
        slow = tl.load(inv_freq_long + f, mask=f < F, other=0.0).to(tl.float32)
        frequency = tl.where(long, slow, frequency)
        factor = tl.where(long, scale_long, scale)
    angle = tl.load(positions + row).to(tl.float32) * frequency
    tl.store(cos + row * F + f, (tl.cos(angle) * factor).to(cos.dtype.element_ty), mask=f < F)
    tl.store(sin + row * F + f, (tl.sin(angle) * factor).to(sin.dtype.element_ty), mask=f < F)


@dataclass(frozen=True)
class RotaryTable:
    """``llmopt.rotary_table``."""

    name: str = "rotary_table"
    ops: tuple[str, ...] = ("llmopt.rotary_table",)

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        cos, sin = site.outputs
        if v["inv_freq_long"] is not None and v["lengths"] is None:
            return "the long table needs every row's sequence length"
        f, long = cos.shape[-1], v["inv_freq_long"]
        tensors = {
            "positions": v["positions"], "inv_freq": v["inv_freq"], "inv_freq_long": long,
            "lengths": None if long is None else v["lengths"], "cos": cos, "sin": sin,
        }  # fmt: skip
        if any(t is not None and not t.contiguous for t in tensors.values()):
            return "strided operands"
        constants = {
            "scale": float(v["scale"]),
            "scale_long": float(v["scale_long"]),
            "switch": v["switch"],
            "F": f,
            "BLOCK": pow2(f),
        }
        moved = nbytes(cos, sin)
        made = launch(site.arch, rotary_table, (cos.shape[-2],), tensors, constants, warps=1, moved=moved)
        return Selection((made,), "one row a program", modelled_us(moved, site.arch))


@triton.jit
def rotate_heads(
    x, target, scales, cos, sin, row, h, ok,
    X_HEAD: tl.constexpr, X_ROW: tl.constexpr, OUT_HEAD: tl.constexpr, TABLE: tl.constexpr,
    D: tl.constexpr, F: tl.constexpr, INTERLEAVED: tl.constexpr, BF: tl.constexpr, BREST: tl.constexpr,
):  # fmt: skip
    """Rotates the first 2F dims of heads ``h`` (a column of indices) of one row into ``target``, copies the rest; as
    codes where there are ``scales`` of the heads, of what x's type would hold."""
    source = x + h * X_HEAD + row * X_ROW
    place = target + h * OUT_HEAD
    dtype: tl.constexpr = x.dtype.element_ty
    kept: tl.constexpr = target.dtype.element_ty
    scale = None if scales is None else tl.load(scales + h, mask=ok, other=1.0)
    if F > 0:
        f = tl.arange(0, BF)[None, :]
        low = 2 * f if INTERLEAVED else f
        high = 2 * f + 1 if INTERLEAVED else f + F
        live = ok & (f < F)
        c = tl.load(cos + row * TABLE + f, mask=f < F, other=0.0).to(tl.float32)
        s = tl.load(sin + row * TABLE + f, mask=f < F, other=0.0).to(tl.float32)
        a = tl.load(source + low, mask=live, other=0.0).to(tl.float32)
        b = tl.load(source + high, mask=live, other=0.0).to(tl.float32)
        tl.store(place + low, encode((a * c - b * s).to(dtype), scale, kept), mask=live)
        tl.store(place + high, encode((b * c + a * s).to(dtype), scale, kept), mask=live)
    if 2 * F < D:
        d = 2 * F + tl.arange(0, BREST)[None, :]
        rest = tl.load(source + d, mask=ok & (d < D))
        tl.store(place + d, encode(rest, scale, kept), mask=ok & (d < D))


@triton.jit
def turned_heads(
    at, ok, norm, cos, sin, row, D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, TABLE: tl.constexpr,
    INTERLEAVED: tl.constexpr, eps: tl.constexpr, offset: tl.constexpr, MUL_FP32: tl.constexpr,
):  # fmt: skip
    """(L, BD) heads at the pointers ``at`` (L, 1), of one row: normed where there is ``norm`` (D,), then rotated.

    Rounded where the calls alone would round. Each element is read with the one it turns with, rather than exchanged.
    """
    d = tl.arange(0, BD)[None, :]
    turns = d < 2 * F
    if INTERLEAVED:
        low = d % 2 == 0
        frequency = d // 2
        partner = tl.where(turns, d + 1 - 2 * (d % 2), d)
    else:
        low = d < F
        frequency = tl.where(low, d, d - F)
        partner = tl.where(turns, tl.where(low, d + F, d - F), d)
    dtype: tl.constexpr = at.dtype.element_ty
    x = tl.load(at + d, mask=ok & (d < D), other=0.0).to(tl.float32)
    y = tl.load(at + partner, mask=ok & (d < D), other=0.0).to(tl.float32)
    if norm is not None:
        root = tl.rsqrt(tl.sum(x * x, 1)[:, None] / D + eps)
        w = tl.load(norm + d, mask=d < D, other=0.0).to(tl.float32) + offset
        u = tl.load(norm + partner, mask=d < D, other=0.0).to(tl.float32) + offset
        if MUL_FP32:
            x = (x * root * w).to(dtype).to(tl.float32)
            y = (y * root * u).to(dtype).to(tl.float32)
        else:
            x = ((x * root).to(dtype).to(tl.float32) * w.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
            y = ((y * root).to(dtype).to(tl.float32) * u.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    c = tl.load(cos + row * TABLE + frequency, mask=turns, other=1.0).to(tl.float32)
    s = tl.load(sin + row * TABLE + frequency, mask=turns, other=0.0).to(tl.float32)
    return (x * c + tl.where(low, -y, y) * s).to(dtype)


@triton.jit
def rope_kv(
    q, k, v, cos, sin, k_state, v_state, k_scale, v_scale, slots, q_out,
    H: tl.constexpr, HK: tl.constexpr, T: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr,
    S: tl.constexpr, TABLE: tl.constexpr, INTERLEAVED: tl.constexpr,
    Q_HEAD: tl.constexpr, Q_ROW: tl.constexpr, K_HEAD: tl.constexpr, K_ROW: tl.constexpr,
    V_HEAD: tl.constexpr, V_ROW: tl.constexpr,
    HEADS: tl.constexpr, BF: tl.constexpr, BREST: tl.constexpr, BV: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row of a step: q_out (H, T, D) = rotated q; rotated k and plain v go to their slot of the states.

    States are (B, HK, S, D) and (B, HK, S, DV), of codes where there are ``k_scale`` and ``v_scale`` (HK,); a row whose
    slot is negative is not written. Absent q: only the write; absent k: only the rotation; F 0: no rotation. A program
    does HEADS heads of q, k or v of one row. Floor: every operand once.
    """
    pdl_release(PDL)
    row = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    h = tl.arange(0, HEADS)[:, None]
    pdl_wait(PDL)
    Q_PARTS: tl.constexpr = 0 if q is None else (H + HEADS - 1) // HEADS
    K_PARTS: tl.constexpr = (HK + HEADS - 1) // HEADS
    if q is not None:
        if part < Q_PARTS:
            at = part * HEADS + h
            rotate_heads(
                q, q_out + row * D, None, cos, sin, row, at, at < H, Q_HEAD, Q_ROW, T * D, TABLE, D, F, INTERLEAVED, BF,
                BREST,
            )  # fmt: skip
    if k is not None:
        if part >= Q_PARTS:
            slot = tl.load(slots + row).to(tl.int64)
            if slot >= 0:
                first = slot // S * HK * S + slot % S
                if part < Q_PARTS + K_PARTS:
                    at = (part - Q_PARTS) * HEADS + h
                    rotate_heads(
                        k, k_state + first * D, k_scale, cos, sin, row, at, at < HK, K_HEAD, K_ROW, S * D, TABLE, D, F,
                        INTERLEAVED, BF, BREST,
                    )  # fmt: skip
                else:
                    at = (part - Q_PARTS - K_PARTS) * HEADS + h
                    d = tl.arange(0, BV)[None, :]
                    ok = (at < HK) & (d < DV)
                    value = tl.load(v + at * V_HEAD + row * V_ROW + d, mask=ok)
                    scale = None if v_scale is None else tl.load(v_scale + at, mask=at < HK, other=1.0)
                    value = encode(value, scale, v_state.dtype.element_ty)
                    tl.store(v_state + first * DV + at * (S * DV) + d, value, mask=ok)


@dataclass(frozen=True)
class RopeKvWrite:
    """``llmopt.rope_kv_write`` and its halves; q, k, v may be views of a fused projection."""

    name: str = "rope_kv"
    ops: tuple[str, ...] = ("llmopt.rope_kv_write", "llmopt.rope", "llmopt.kv_write")

    def select(self, site: CallSite) -> Selection | str:
        v: Any = site.values
        q = v["x"] if site.call.op == "llmopt.rope" else v.get("q")
        k, x, cos, sin = v.get("k"), v.get("v"), v.get("cos"), v.get("sin")
        for name, operand in (("q", q), ("k", k), ("v", x)):
            if operand is not None and operand.strides[-1] != 1:
                return f"{name} is not dense in its last axis"
        tables = None if cos is None else (rows_of(cos), rows_of(sin))
        if tables is not None and (tables[0] is None or tables[0] != tables[1]):
            return "the rotary tables are not laid out alike"
        if k is not None and (refusal := unreadable(v, site.arch)) is not None:
            return refusal
        model: Strided = q if q is not None else k
        _, heads, rows, d = model.shape
        groups = 0 if k is None else k.shape[1]
        dv = 0 if x is None else x.shape[3]
        f = 0 if cos is None else cos.shape[-1]
        share = 4 if rows < 64 else 16
        parts = (0 if q is None else cdiv(heads, share)) + 2 * cdiv(groups, share)
        tensors = {
            "q": q, "k": k, "v": x, "cos": cos, "sin": sin, "slots": v.get("slot_mapping"),
            **{name: v.get(name) for name in ("k_state", "v_state", "k_scale", "v_scale")},
            "q_out": None if q is None else site.outputs[0],
        }  # fmt: skip
        constants = {
            "H": heads if q is not None else 0, "HK": groups, "T": rows, "D": d, "DV": dv, "F": f,
            "S": v["k_state"].shape[2] if k is not None else 1,
            "TABLE": tables[0][1] if tables is not None and tables[0] is not None else 0,
            "INTERLEAVED": bool(v.get("interleaved", False)),
            **strides("Q", q), **strides("K", k), **strides("V", x),
            "HEADS": share, "BF": pow2(f), "BREST": pow2(max(d - 2 * f, 1)), "BV": pow2(max(dv, 1)),
        }  # fmt: skip
        moved = 2 * nbytes(q, k, x) + nbytes(cos, sin)
        made = launch(site.arch, rope_kv, (rows, parts), tensors, constants, warps=1 if share == 4 else 4, moved=moved)
        return Selection((made,), f"{share} heads of a row a program", modelled_us(moved, site.arch))


def strides(name: str, x: Strided | None) -> dict[str, int]:
    """Head and row strides of an operand (1, H, T, D)."""
    return {f"{name}_HEAD": 0 if x is None else x.strides[1], f"{name}_ROW": 0 if x is None else x.strides[2]}


KERNELS = (RotaryTable(), RopeKvWrite())
