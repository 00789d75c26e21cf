"""``linear_chain`` in PyTorch: what its CUDA form computes, for Triton's interpreter, which runs one program after
another and so none that meet."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ..pack import unpack_codes

UNIT = re.compile(r"\{([^{}]*)\}")


class ChainTwin:
    """Called as a Triton function is, with tensors for pointers."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """The launch of a grid, whose size changes nothing."""
        return run


def run(**v: Any) -> None:
    """Each linear in turn: x normed and rounded as the kernel does, codes times x in fp32, scaled, and the epilogue."""
    import torch

    for row, members in zip(UNIT.findall(v["LINEARS"]), UNIT.findall(v["LINKS"]), strict=True):
        n, k, _, gate, normed, fp32, eps, offset = (part.strip().rstrip("f") for part in row.split(","))
        codes, scales, bias, x, norm, residual, x_scale, out = (operand(v, part) for part in members.split(","))
        n, k = int(n), int(k)
        a = x[:k].float()
        if int(normed):
            a = rms_norm(a, norm[:k].float(), int(fp32), float(eps), float(offset))
        a, used = rounded(a, v["ROUND"], x_scale)
        sums = weight(codes, v, n, k) * a
        if group := v["GROUP"]:
            table = scales[: k // group * n].view(k // group, n).float()
            total = (sums.view(n, k // group, group).sum(2) * table.T).sum(1) * used
        else:
            total = sums.sum(1) * used * scales[:n].float()
        if bias is not None:
            total = total + bias[:n].float()
        if gate.lower() != "none":
            gates, ups = total.chunk(2)
            total = ACTIVATE[gate.lower()](gates) * ups
        if residual is not None:
            total = total.bfloat16().float() + residual[: len(total)].float()
        out[: len(total)] = total.to(torch.bfloat16)


def operand(v: dict[str, Any], member: str) -> Any:
    """The tensor that a member of a link points to."""
    name = member.split(")")[-1].strip()
    return None if name == "nullptr" else v[name]


def rms_norm(x: Any, weight: Any, fp32: int, eps: float, offset: float) -> Any:
    """Normed x as bfloat16 holds it."""
    y = x * (x.square().mean() + eps).rsqrt()
    y = y * (weight + offset) if fp32 else y.bfloat16().float() * (weight + offset).bfloat16().float()
    return y.bfloat16().float()


def rounded(x: Any, form: str, static: Any) -> tuple[Any, Any]:
    """Codes of x as numbers and their scale; x itself and 1 where it is not rounded."""
    import torch

    if form == "NOT_ROUNDED":
        return x, 1.0
    limit = 448.0 if form == "FP8" else 127.0
    scale = x.abs().max() / limit if static is None else static[0]
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = (x / scale).clamp(-limit, limit)
    return (codes.to(torch.float8_e4m3fn).float() if form == "FP8" else codes.round()), scale


def weight(codes: Any, v: dict[str, Any], n: int, k: int) -> Any:
    """(n, k) numbers of the codes, less their zero point."""
    import torch

    form, plain = v["FORM"], v["ROUND"] != "NOT_ROUNDED"
    bits = 4 if form == "INT4" else 8
    stored = codes.view(torch.uint8)[: n * k * bits // 8].view(n, -1)
    if not plain:
        format = "fp8_e4m3" if form == "FP8" else "int"
        stored = torch.from_numpy(unpack_codes(stored.numpy(), bits, 128, format))
    elif form == "INT8":
        stored = stored ^ 128
    if form == "FP8":
        return stored.contiguous().view(torch.float8_e4m3fn).float()
    return stored.float() - (8 if bits == 4 else 128)


def activations() -> dict[str, Callable[[Any], Any]]:
    """The gates' activations."""
    from torch.nn import functional

    def gelu_tanh(x: Any) -> Any:
        return functional.gelu(x, approximate="tanh")

    return {"silu": functional.silu, "gelu": functional.gelu, "gelu_tanh": gelu_tanh, "relu": functional.relu}


ACTIVATE = activations()
