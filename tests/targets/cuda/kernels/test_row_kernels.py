"""Embedding, norms, gates, rotary and KV writes, arithmetic and copies, against the dialect's references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import llmopt.ir.ops  # noqa: F401 registers the dialect
from targets.cuda.kernels import elementwise, embedding, gate, norm, rotary
from tests.targets.cuda.kernels.harness import close, run

BF16, FP16 = torch.bfloat16, torch.float16
ops: Any = torch.ops.llmopt


def normal(*shape: int, dtype: torch.dtype = BF16, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.parametrize("c", [1, 7, 100])
def test_embedding_and_index_select(c: int) -> None:
    table, ids = normal(11, c), torch.tensor([[3, 0, 10, 3]])
    (out,) = run(embedding.KERNELS[0], "aten.embedding.default", {"weight": table, "indices": ids}, [((1, 4, c), BF16)])
    assert torch.equal(out, table[ids])
    values = {"self": normal(1, 5, c), "dim": 1, "index": torch.tensor([4, 1])}
    (out,) = run(embedding.KERNELS[0], "aten.index_select.default", values, [((1, 2, c), BF16)])
    assert torch.equal(out, values["self"][:, [4, 1]])  # type: ignore[index]


def test_an_index_of_a_padding_row_reads_inside_the_table() -> None:
    ids = torch.tensor([[2, -9, 10**12]])
    values = {"weight": normal(3, 8), "indices": ids}
    (out,) = run(embedding.KERNELS[0], "aten.embedding.default", values, [((1, 3, 8), BF16)])
    assert torch.equal(out[0, 0], values["weight"][2])
    assert not out.isnan().any()


@pytest.mark.parametrize("c", [1, 33, 96, 2050])
@pytest.mark.parametrize(("offset", "wide"), [(0.0, False), (1.0, True)])
def test_rms_norm(c: int, offset: float, wide: bool) -> None:
    x, weight = normal(1, 3, c), normal(c, seed=1)
    values = {"x": x, "weight": weight, "eps": 1e-6, "offset": offset, "mul_in_fp32": wide}
    (out,) = run(norm.KERNEL, "llmopt.rms_norm", values, [((1, 3, c), BF16)])
    close(out, ops.rms_norm(x.double().float(), weight.float(), 1e-6, offset, True), 3)


def test_rms_norm_of_heads_inside_a_fused_projection() -> None:
    fused = normal(1, 5, 4 * 24 + 7, dtype=FP16)
    heads = fused[:, :, :96].view(1, 5, 4, 24)
    values = {"x": heads, "weight": None, "eps": 1e-5, "offset": 0.0, "mul_in_fp32": False}
    (out,) = run(norm.KERNEL, "llmopt.rms_norm", values, [((1, 5, 4, 24), FP16)])
    close(out, ops.rms_norm(heads.float(), None, 1e-5, 0.0, False))


@pytest.mark.parametrize("rows", [1, 300])
def test_add_norms_keep_the_sum(rows: int) -> None:
    x, r, w, b = normal(1, rows, 40), normal(1, rows, 40, seed=1), normal(40), normal(40, seed=2)
    shape = ((1, rows, 40), BF16)
    values = {"x": x, "residual": r, "weight": w, "eps": 1e-5, "offset": 0.0, "mul_in_fp32": False}
    out, total = run(norm.KERNEL, "llmopt.add_rms_norm", values, [shape, shape])
    assert torch.equal(total, x + r)
    close(out, ops.rms_norm(total.float(), w.float(), 1e-5, 0.0, True), 3)
    values = {"x": x, "residual": r, "weight": w, "bias": b, "eps": 1e-5}
    out, total = run(norm.KERNEL, "llmopt.add_layer_norm", values, [shape, shape])
    close(out, torch.nn.functional.layer_norm(total.double(), (40,), w.double(), b.double(), 1e-5))


def test_layer_norm_far_from_zero() -> None:
    x = normal(1, 2, 100, dtype=FP16) + 300
    values = {"input": x, "normalized_shape": (100,), "weight": None, "bias": None, "eps": 1e-5, "cudnn_enable": True}
    (out,) = run(norm.KERNEL, "aten.layer_norm.default", values, [((1, 2, 100), FP16)])
    close(out, torch.nn.functional.layer_norm(x.double(), (100,)))


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_gated_activation(kind: str) -> None:
    x = normal(1, 3, 2 * 70) * 4
    (out,) = run(gate.KERNEL, "llmopt.gated_activation", {"x": x, "kind": kind}, [((1, 3, 70), BF16)])
    close(out, ops.gated_activation(x.double(), kind))


def test_rotary_table_far_out() -> None:
    positions, inv_freq = torch.tensor([[0, 5, 131071]]), 10000 ** -(torch.arange(6) / 6)
    values: dict[str, Any] = {
        "positions": positions, "inv_freq": inv_freq, "scale": 1.5, "inv_freq_long": None, "scale_long": 1.0,
        "switch": 0, "lengths": None, "dtype": "float32",
    }  # fmt: skip
    shapes = [((1, 3, 6), torch.float32)] * 2
    for found, expected in zip(run(rotary.KERNELS[0], "llmopt.rotary_table", values, shapes), table(values)):
        close(found, expected, 4)
    values |= {"inv_freq_long": inv_freq / 3, "scale_long": 2.0, "switch": 4, "lengths": torch.tensor([[4, 6, 4]])}
    for found, expected in zip(run(rotary.KERNELS[0], "llmopt.rotary_table", values, shapes), table(values)):
        close(found, expected, 4)


def table(v: dict[str, Any]) -> Any:
    return ops.rotary_table(*[v[n] for n in ("positions", "inv_freq", "scale", "inv_freq_long", "scale_long",
                                             "switch", "lengths")], torch.float32)  # fmt: skip


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("d", "f"), [(16, 8), (24, 6), (20, 10)])
def test_rope_and_kv_write(interleaved: bool, d: int, f: int) -> None:
    rows, heads, shared, size, dv = 5, 6, 2, 4, 12
    fused = normal(1, rows, (heads + shared) * d + shared * dv)
    q, k, v = fused.split([heads * d, shared * d, shared * dv], -1)
    q, k = (x.unflatten(-1, (-1, d)).transpose(1, 2) for x in (q, k))
    v = v.unflatten(-1, (-1, dv)).transpose(1, 2)
    cos, sin = normal(1, rows, f), normal(1, rows, f, seed=1)
    slots = torch.tensor([9, -1, 0, 7, 2])
    states = [normal(3, shared, size, n) for n in (d, dv)]
    values = {"q": q, "k": k, "v": v, "cos": cos, "sin": sin, "k_state": states[0], "v_state": states[1],
              "slot_mapping": slots, "interleaved": interleaved}  # fmt: skip
    found = run(
        rotary.KERNELS[1],
        "llmopt.rope_kv_write",
        values,
        [((1, heads, rows, d), BF16)],
        in_place=("k_state", "v_state"),
    )
    live = slots >= 0
    wide = [x.float() for x in (q, k, v, cos, sin, *states)]
    rotated = ops.rope(wide[0], wide[3], wide[4], interleaved)
    close(found[0], rotated)
    keys = ops.rope(wide[1], wide[3], wide[4], interleaved)[:, :, live]
    expected = ops.kv_write(wide[5], wide[6], keys, wide[2][:, :, live], slots[live])
    close(found[1], expected[0])
    assert torch.equal(found[2].float(), expected[1])
    (alone,) = run(rotary.KERNELS[1], "llmopt.rope", {"x": q, "cos": cos, "sin": sin, "interleaved": interleaved},
                   [((1, heads, rows, d), BF16)])  # fmt: skip
    assert torch.equal(alone, found[0])
    halves = {n: values[n] for n in ("k_state", "v_state", "k", "v", "slot_mapping")}
    plain = run(rotary.KERNELS[1], "llmopt.kv_write", halves, in_place=("k_state", "v_state"))
    assert torch.equal(
        plain[0].float(), ops.kv_write(wide[5], wide[6], wide[1][:, :, live], wide[2][:, :, live], slots[live])[0]
    )


@pytest.mark.parametrize("op", sorted(elementwise.OPS))
def test_elementwise(op: str) -> None:
    a, b = normal(2, 3, 5), normal(3, 1, seed=1).abs() + 0.5
    overload = getattr(getattr(torch.ops.aten, op.split(".")[1]), op.split(".")[2])
    values: dict[str, Any] = {"self": a}
    names = [argument.name for argument in overload._schema.arguments]
    if "other" in names:
        values["other"] = b if op.endswith("Tensor") else 1.5
    if "alpha" in names:
        values["alpha"] = 2
    (out,) = run(elementwise.KERNELS[0], op, values, [((2, 3, 5), BF16)])
    close(out, overload(**{n: x.double() if isinstance(x, Tensor) else x for n, x in values.items()}))


def test_tiny_arguments_keep_their_digits() -> None:
    x = torch.tensor([1e-6, -3e-3, 0.019, 0.021, 9.0, -50.0])
    (out,) = run(elementwise.KERNELS[0], "aten.tanh.default", {"self": x}, [((6,), torch.float32)])
    assert torch.allclose(out, x.tanh(), rtol=1e-5, atol=0)


def test_copies() -> None:
    x = normal(2, 3, 4, 5)
    turned = x.permute(2, 0, 3, 1)
    copy = elementwise.KERNELS[1]
    (out,) = run(copy, "aten.reshape.default", {"self": turned, "shape": (4, 30)}, [((4, 30), BF16)])
    assert torch.equal(out, turned.reshape(4, 30))
    (out,) = run(copy, "aten.to.dtype", {"self": x, "dtype": "float32"}, [((2, 3, 4, 5), torch.float32)])
    assert torch.equal(out, x.float())
    parts = (normal(2, 3, 4), normal(2, 1, 4, seed=1))
    (out,) = run(copy, "aten.cat.default", {"tensors": parts, "dim": -2}, [((2, 4, 4), BF16)])
    assert torch.equal(out, torch.cat(parts, -2))
