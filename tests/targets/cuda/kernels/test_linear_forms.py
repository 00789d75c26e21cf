"""The tiled linear kernels with a gated activation or a residual joined, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmopt.program import OpCall
from targets.cuda.fusion import ABSENT, LINEAR
from targets.cuda.kernel import CallSite, Selection
from targets.cuda.kernels import gemm, gemm_persistent
from tests.targets.cuda.kernels.harness import Memory, close, execute, run, select

BF16 = torch.bfloat16
FORMS: list[dict[str, Any]] = [
    {"gate": "silu"}, {"gate": "gelu_tanh", "bias": True}, {"residual": True}, {"residual": True, "bias": True},
    {"gate": "relu", "residual": True},
]  # fmt: skip
TILES = {
    "gemm": {"BM": 16, "BN": 64, "BK": 32, "SPLIT": 2, "SWAP": 1, "TMA": 1, "AHEAD": 64, "warps": 4, "stages": 3},
    "gemm_pointers": {
        "BM": 32,
        "BN": 32,
        "BK": 32,
        "SPLIT": 1,
        "SWAP": 0,
        "TMA": 0,
        "AHEAD": 0,
        "warps": 4,
        "stages": 3,
    },
    "gemm_persistent": {"BM": 32, "BN": 64, "BK": 32, "GROUP": 2, "PARTS": 1, "warps": 4, "stages": 3},
}
KERNELS = {"gemm": gemm, "gemm_pointers": gemm, "gemm_persistent": gemm_persistent}


def operands(m: int, n: int, k: int, *, gate: str | None = None, bias: bool = False, residual: bool = False) -> Any:
    """x (1, m, k), weight (n, k), what is joined; n counts gates and ups."""
    random = torch.Generator().manual_seed(m * 7919 + n * 31 + k)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(BF16)

    columns = n if gate is None else n // 2
    return {
        **ABSENT, "input": 3 * draw(1, m, k), "weight": draw(n, k) / k**0.5, "bias": draw(n) if bias else None,
        "gate": gate, "residual": draw(1, m, columns) if residual else None,
    }  # fmt: skip


def exact(v: dict[str, Any]) -> Tensor:
    """The call in float64, rounded nowhere."""
    bias = None if v["bias"] is None else v["bias"].double()
    out = torch.nn.functional.linear(v["input"].double(), v["weight"].double(), bias)
    if v["gate"] is not None:
        a, b = out.chunk(2, dim=-1)
        act = {"silu": torch.nn.functional.silu, "relu": torch.relu}.get(v["gate"])
        out = (act(a) if act else torch.nn.functional.gelu(a, approximate="tanh")) * b
    return out if v["residual"] is None else out + v["residual"].double()


def compute(name: str, v: dict[str, Any]) -> Tensor:
    """What a kernel makes of a call with small tiles."""
    kernel, (m, k), n = KERNELS[name].KERNEL, v["input"].shape[1:], v["weight"].shape[0]
    form, columns = ("", n) if v["gate"] is None else (" gated", n // 2)
    tuning = {kernel.name: {f"bfloat16 {m}x{n}x{k}{form}": TILES[name]}}
    (out,) = run(kernel, LINEAR, v, [((1, m, columns), BF16)], tuning=tuning)
    return out


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(form))
@pytest.mark.parametrize("name", TILES)
def test_forms(name: str, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gemm_persistent.SM_COUNT, 90, 5)
    m = 19 if (name.startswith("gemm_p") and name.endswith("s")) or name == "gemm" else 70
    v = operands(m, 176, 136, **form)
    close(compute(name, v), exact(v))


def test_tall_tiles_in_parts() -> None:
    v = operands(130, 192, 64, gate="silu", residual=True)
    tiles = {**TILES["gemm_persistent"], "BM": 64, "BN": 128, "PARTS": 4}
    tuning = {"gemm_persistent": {"bfloat16 130x192x64 gated": tiles}}
    (out,) = run(gemm_persistent.KERNEL, LINEAR, v, [((1, 130, 96), BF16)], tuning=tuning)
    close(out, exact(v))


def test_swapped_gates_and_ups_are_noticed() -> None:
    v = operands(70, 176, 136, gate="silu")
    out = compute("gemm_persistent", v)
    v["weight"] = v["weight"].roll(88, 0)
    with pytest.raises(AssertionError, match="error"):
        close(out, exact(v))


def test_a_norm_is_refused() -> None:
    memory = Memory()
    v = {**operands(70, 176, 136), "norm": torch.ones(136)}
    placed = {name: memory.put(name, x) if isinstance(x, Tensor) else x for name, x in v.items()}
    out = memory.put("out", torch.empty(1, 70, 176))
    for module in (gemm, gemm_persistent):
        assert select(module.KERNEL, LINEAR, placed, [out]) == "it does not normalize its input"


@pytest.mark.parametrize("real", [1, 70, 130])
def test_rows_that_pad_a_step_are_not_computed(real: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tiles that hold one of the step's real rows are written."""
    monkeypatch.setitem(gemm_persistent.SM_COUNT, 90, 5)
    v = operands(130, 96, 136)
    memory = Memory()
    placed = {key: memory.put(key, x) if isinstance(x, Tensor) else x for key, x in v.items()}
    memory.put("cu_seqlens", torch.tensor([0, 1, real], dtype=torch.int32))
    out = memory.put("out", torch.full((1, 130, 96), float("nan")).to(BF16))
    tuning = {"gemm_persistent": {"bfloat16 130x96x136": TILES["gemm_persistent"]}}
    call = OpCall(LINEAR, {}, ("out",))
    site = CallSite(call, {}, placed, (out,), {"T": 130, "N": 2}, "extend", 90, tuning)
    found = gemm_persistent.KERNEL.select(site)
    assert isinstance(found, Selection)
    for launch in found.launches:
        execute(launch, memory)
    memory.check_guards()
    written = memory.get(out)[0]
    close(written[:real], exact(v)[0, :real])
    assert written[-(-real // 32) * 32 :].isnan().all()
