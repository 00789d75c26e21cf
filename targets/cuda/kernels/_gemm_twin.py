"""What ``gemm_ring`` and ``gemm_cluster`` compute, in PyTorch: Triton's interpreter knows no rings or clusters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..pack import unpack_codes
from ._chain_twin import ACTIVATE


class GemmTwin:
    """Called as a Triton function is, with tensors for pointers."""

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        """The launch of a grid, whose size changes nothing."""
        return run


def run(**v: Any) -> None:
    """x times the weight, whose groups' scales join it in the operands' type, in fp32, and the epilogue."""
    x, out, n = v["x"].base, v["out"], v["N"]
    rows = min(v["rows"], int(v["bounds"][v["LAST"]])) if "bounds" in v else v["rows"]
    total = x[:rows].float() @ weight(v).float().T
    if "x_scales" in v:
        total = total * v["x_scales"][: 1 if v["STATIC"] else rows][:, None]
    if "scales" in v:
        total = total * v["scales"][: -(-n // v["SHARED"])].float().repeat_interleave(v["SHARED"])[:n]
    if "bias" in v:
        total = total + v["bias"][:n].float()
    if v["GATE"] != "NONE":
        gates, ups = total.chunk(2, 1)
        total = ACTIVATE[v["GATE"].lower()](gates) * ups
    total = total.to(out.dtype)
    if "residual" in v:
        total = total.float() + v["residual"][: total.numel()].view_as(total).float()
    out[: total.numel()] = total.to(out.dtype).flatten()


def weight(v: dict[str, Any]) -> Any:
    """(N, K) as the tensor cores get it, in the type of x."""
    import torch

    type_, form = v["x"].base.dtype, v["FORM"]
    stored = v["weight"].base
    if form == "NUMBERS":
        return stored
    if form == "FP8_BY_FP8":
        return stored.contiguous().view(type_)
    bits, format = (4 if form == "INT4" else 8), "fp8_e4m3" if form == "FP8" else "int"
    packed = stored.contiguous().view(torch.uint8).numpy()
    codes = torch.from_numpy(unpack_codes(packed, bits, v["CHUNK"], format))
    if form == "FP8":
        numbers = codes.view(torch.float8_e4m3fn).float()
    elif "zeros" in v:
        numbers = codes.float() - spread(v["zeros"].base, v)
    else:
        numbers = codes.float() - (1 << (bits - 1))
    return (numbers * spread(v["groups"].base, v) if "groups" in v else numbers).to(type_)


def spread(table: Any, v: dict[str, Any]) -> Any:
    """A table of groups (K / GROUP, N) over all columns (N, K)."""
    return table.T.float().repeat_interleave(v["GROUP"], 1)
