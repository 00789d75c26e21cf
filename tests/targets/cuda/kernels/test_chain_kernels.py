"""Chains of linears: the twin against float64, the CUDA form's cubins, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from llmopt.ir.ops.activation import ACTIVATIONS
from targets.cuda.cache import CubinCache, Job
from targets.cuda.chain import ALONE, CHAIN, LINK
from targets.cuda.compile import compile_all, compiler_version
from targets.cuda.kernel import Selection
from targets.cuda.kernels.linear_chain import KERNEL, programs_of
from targets.cuda.pack import pack_codes
from tests.targets.cuda.kernels.harness import close, run, select
from tests.targets.cuda.kernels.test_cubins import bf16, dense

BF16 = torch.bfloat16
FORMS: list[dict[str, Any]] = [
    {"bits": 4, "group": 128},
    {"bits": 4, "group": 256, "scales": torch.float16},
    {"bits": 8, "group": None},
    {"bits": 8, "group": 128},
    {"bits": 8, "group": None, "format": "fp8_e4m3"},
    {"bits": 8, "group": None, "format": "fp8_e4m3", "round": "fp8_e4m3", "scales": torch.float32},
    {"bits": 8, "group": None, "round": "int8", "scales": torch.float32},
]
LAYER: list[dict[str, Any]] = [
    {"n": 256, "k": 512, "residual": True},
    {"n": 512, "k": 256, "norm": True, "gate": "silu", "bias": True},
    {"n": 256, "k": 512, "residual": 0},
    {"n": 48, "k": 256, "norm": True, "bias": True},
]


def chain(form: dict[str, Any], layer: list[dict[str, Any]], seed: int = 0) -> dict[str, Any]:
    """A chain's operands, codes unpacked."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random).to(BF16)

    kind = {"format": "int", "round": None, "scales": BF16, **form}
    v: dict[str, Any] = {"count": len(layer), "x": 3 * draw(1, 1, layer[0]["k"]), "bits": kind["bits"]}
    v |= {"format": kind["format"], "block_k": kind["group"], "round": kind["round"]}
    for i, link in enumerate(layer):
        k, gate = link["k"], link.get("gate")
        rows = link["n"] * (2 if gate else 1)
        codes = torch.randint(0, 2 ** kind["bits"], (rows, k), generator=random, dtype=torch.uint8)
        if kind["format"] == "fp8_e4m3":
            codes = draw(rows, k).to(torch.float8_e4m3fn)
        groups = k // kind["group"] if kind["group"] else 1
        scales = (torch.rand((rows, groups), generator=random) / 2 ** kind["bits"] / k**0.5 + 0.001).to(kind["scales"])
        residual = draw(1, 1, link["n"]) if link.get("residual") is True else link.get("residual")
        own = {**ALONE, "codes": codes, "scales": scales, "bias": draw(rows) if link.get("bias") else None,
               "input_scale": None, "norm": draw(k) if link.get("norm") else None, "eps": 1e-5, "gate": gate,
               "residual": residual, **link.get("how", {})}  # fmt: skip
        v |= {f"{i}/{name}": own[name] for name in LINK}
    return v


def exact(v: dict[str, Any]) -> list[Tensor]:
    """Its outputs in float64, rounded to bfloat16 where kernels do."""
    outputs: list[Tensor] = []
    for i in range(v["count"]):
        link = {name: v[f"{i}/{name}"] for name in LINK}
        x = (outputs[-1] if outputs else v["x"]).to(BF16).double()
        if link["norm"] is not None:
            y = x * (x.square().mean() + link["eps"]).rsqrt()
            offset = link["norm"].double() + link["offset"]
            x = (
                (y * offset if link["mul_in_fp32"] else y.to(BF16).double() * offset.to(BF16).double())
                .to(BF16)
                .double()
            )
        if v["round"] is not None:
            limit = 448.0 if v["round"] == "fp8_e4m3" else 127.0
            scale = (x.abs().max().float() / limit).double()
            codes = (x / scale).float()
            rounded = codes.to(torch.float8_e4m3fn).double() if v["round"] == "fp8_e4m3" else codes.round().double()
            x = rounded * scale
        codes, scales = link["codes"], link["scales"].double()
        numbers = codes.double() - (2 ** (v["bits"] - 1) if v["format"] == "int" else 0)
        out = x @ (numbers * scales.repeat_interleave(codes.shape[1] // scales.shape[1], 1)).T
        if link["bias"] is not None:
            out = out + link["bias"].double()
        if link["gate"] is not None:
            gates, ups = out.chunk(2, -1)
            out = ACTIVATIONS[link["gate"]](gates) * ups
        if link["residual"] is not None:
            residual = outputs[link["residual"]] if isinstance(link["residual"], int) else link["residual"]
            out = out.to(BF16).double() + residual.to(BF16).double()
        outputs.append(out)
    return outputs


def stored(v: dict[str, Any]) -> dict[str, Any]:
    """The operands as pack.py stores them."""
    packed = dict(v)
    for i in range(v["count"]):
        codes = v[f"{i}/codes"]
        if v["round"] is None:
            raw = pack_codes(codes.view(torch.uint8).numpy(), v["bits"], 128, v["format"])
            packed[f"{i}/codes"] = torch.from_numpy(raw)
        elif v["format"] == "int":
            packed[f"{i}/codes"] = (codes ^ 128).view(torch.int8)
        packed[f"{i}/scales"] = v[f"{i}/scales"].T.contiguous()
    return packed


def compute(v: dict[str, Any]) -> list[Tensor]:
    shapes = []
    for i in range(v["count"]):
        n = v[f"{i}/codes"].shape[0] // (1 if v[f"{i}/gate"] is None else 2)
        shapes.append(((1, 1, n), BF16))
    return run(KERNEL, CHAIN, stored(v), shapes)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_layer(form: dict[str, Any]) -> None:
    v = chain(form, LAYER)
    for found, right in zip(compute(v), exact(v), strict=True):
        close(found, right, ROUNDED if form.get("round") else 3.0)


ROUNDED = 16.0
"""Roundings where a row's last bit may move a code."""
OTHERS: list[dict[str, Any]] = [
    {"gate": "gelu_tanh", "norm": True, "how": {"offset": 1.0, "mul_in_fp32": True}},
    {"gate": "gelu", "bias": True},
    {"gate": "relu"},
]


@pytest.mark.parametrize("link", OTHERS, ids=lambda link: link["gate"])
def test_other_gates_and_norms(link: dict[str, Any]) -> None:
    v = chain(FORMS[0], [{"n": 128, "k": 256}, {"n": 16, "k": 128, **link}])
    for found, right in zip(compute(v), exact(v), strict=True):
        close(found, right, 3.0)


def test_a_code_that_is_off_shows() -> None:
    v = chain(FORMS[0], LAYER)
    right = exact(v)
    v["2/codes"] = v["2/codes"].roll(1, 1)
    with pytest.raises(AssertionError, match="error"):
        close(compute(v)[2], right[2], 3.0)


def test_programs_share_tiles_evenly() -> None:
    """Of an 8B layer 128 have as many each; 132 would have no less."""
    units = [(256, 4096), (896, 8192), (256, 14336), (384, 4096)]
    assert programs_of(units, 132) == 128
    assert programs_of(units, 100) == 100
    assert programs_of([(1, 128)], 132) == 1


def of_8b(bits: int = 4, format: str = "int", round: str | None = None, **changes: Any) -> Any:
    """A call over the linears of an 8B layer."""
    shapes = [(4096, 4096, None, True), (28672, 4096, "silu", None), (4096, 14336, None, 0), (6144, 4096, None, None)]
    v: dict[str, Any] = {"count": 4, "x": bf16("x", 1, 1, 4096), "bits": bits, "format": format, "round": round}
    v["block_k"] = 128 if bits == 4 else None
    outputs = []
    for i, (n, k, gate, residual) in enumerate(shapes):
        dtype = "uint8" if round is None else "int8" if round == "int8" else "float8_e4m3fn"
        table = bf16(f"s{i}", k // 128, n) if bits == 4 else dense(f"s{i}", "float32", 1, n)
        own = {**ALONE, "codes": dense(f"c{i}", dtype, n, k * bits // 8), "scales": table, "bias": None, "gate": gate,
               "input_scale": None, "norm": bf16(f"n{i}", k) if i % 2 else None, "eps": 1e-5,
               "residual": bf16("r", 1, 1, n) if residual is True else residual}  # fmt: skip
        v |= {f"{i}/{name}": own[name] for name in LINK}
        outputs.append(bf16(f"o{i}", 1, 1, n // 2 if gate else n))
    return CHAIN, {**v, **changes}, tuple(outputs)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"x": bf16("x", 1, 1, 4000)}, "4096 outputs of 4000 columns"),
    ({"1/bias": dense("b", "float32", 28672)}, "an operand is not bfloat16"),
    ({"1/gate": "swiglu_oai"}, "activation swiglu_oai"),
    ({"0/scales": dense("s", "float16", 32, 4096)}, "scales of several types, or of groups in float32"),
]


@pytest.mark.parametrize(("changes", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_what_the_source_does_not_read_is_refused(changes: dict[str, Any], why: str) -> None:
    assert select(KERNEL, *of_8b(**changes)) == why


def test_other_architectures_are_refused() -> None:
    for arch in (80, 89, 100):
        assert select(KERNEL, *of_8b(), arch=arch) == f"not measured on sm_{arch}"


def test_cubins_leave_room_for_attention_beside_them(cubins: CubinCache) -> None:
    """Shared memory and registers of its program for one row: 118 KiB and 128 of 128 threads."""
    jobs = []
    for form in ((4,), (8, "fp8_e4m3", "fp8_e4m3"), (8, "int", "int8")):
        found = select(KERNEL, *of_8b(*form))
        assert isinstance(found, Selection), found
        jobs.append(Job(found.launches[0].specialization, 90, compiler_version()))
    built = compile_all(jobs, cubins, lambda *_: None)
    for job in jobs:
        assert built[job].spills == 0, job.label
        assert built[job].shared + (118 << 10) <= 226 << 10, job.label
        assert built[job].registers * built[job].threads <= (64 - 16) << 10, job.label
