"""Packed weights: exact inverse, and MatMulNBits and QMoE against the dialect's own arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import llmopt.ir.ops  # noqa: F401
from llmopt.errors import TargetError
from llmopt.ir.weights import Constant
from llmopt.lower.readers import Reader, to_numpy
from llmopt.program import Function, OpCall, Program, Ref, StatePlan, TensorType, WeightType
from targets.onnxruntime import rules  # noqa: F401
from targets.onnxruntime.emitter import Emitter
from targets.onnxruntime.pack import kernel_block, nibbles, pack_codes, pack_zeros, unpack_codes, unpack_zeros
from targets.onnxruntime.readers import materialize


@given(
    st.sampled_from([2, 4, 8]),
    st.sampled_from([16, 32, 64, 128]),
    st.integers(1, 300),
    st.integers(1, 5),
    st.integers(0, 99),
)
def test_packing_has_an_exact_inverse(bits: int, block: int, columns: int, rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    packed = pack_codes(codes, bits, block)
    assert packed.shape == (rows, -(-columns // block), block * bits // 8)
    np.testing.assert_array_equal(unpack_codes(packed, bits, columns), codes)
    np.testing.assert_array_equal(unpack_zeros(pack_zeros(codes, bits), bits, columns), codes)


def test_nibbles_are_exact() -> None:
    codes = np.arange(256, dtype=np.uint8)
    high, low = nibbles(codes)
    np.testing.assert_array_equal(high.astype(int) * 16 + low, codes)


@pytest.mark.parametrize(("group", "columns", "block"), [(32, 96, 32), (96, 192, 32), (768, 768, 128), (40, 40, 16),
                                                         (72, 72, 16), (24, 48, None), (512, 1024, 256)])  # fmt: skip
def test_kernel_block(group: int, columns: int, block: int | None) -> None:
    assert kernel_block(group, columns) == block


def run(op: str, x: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], level: int, **options: Any) -> Any:
    """One call of a dialect op through the target: inputs ``x`` and weights by argument name."""
    schema = getattr(torch.ops.llmopt, op).default._schema
    refs: dict[str, Any] = {n: Ref(n) for n in x} | {n: Ref(f"w.{n}") for n in weights} | options
    call = OpCall(f"llmopt.{op}", {a.name: refs.get(a.name) for a in schema.arguments}, ("y",), "layer")
    given = {a.name: {**x, **weights, **options}.get(a.name) for a in schema.arguments}
    expected = getattr(torch.ops.llmopt, op)(**given)

    def kind(t: torch.Tensor) -> TensorType:
        return TensorType(tuple(t.shape), str(t.dtype).removeprefix("torch."))

    types = {n: kind(t) for n, t in x.items()} | {"y": kind(expected)}
    function = Function("step", tuple(x), (call,), ("y",), types)
    table = {f"w.{n}": Reader(Constant(t), kind(t)) for n, t in weights.items()}
    program = Program({"step": function}, {}, {n: WeightType(r.type) for n, r in table.items()}, StatePlan(), {}, 8, 8)
    emitter = Emitter(program, function, table, level)
    for name in x:
        emitter.values[name] = emitter.graph.input(name, types[name].dtype, types[name].shape)
    emitter.run()
    emitter.graph.node("Identity", emitter.values["y"], outputs=("out",))
    emitter.graph.output("out", types["y"].dtype, types["y"].shape)
    emitter.graph.prune()
    model = emitter.graph.model("step", {})
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    arrays = {n: materialize(r) for n, r in emitter.graph.external.items()}
    settings.add_external_initializers(list(arrays), [ort.OrtValue.ortvalue_from_numpy(a) for a in arrays.values()])
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    found = session.run(None, {n: to_numpy(t) for n, t in x.items()})[0]
    return float(np.abs(found - expected.numpy()).max() / expected.abs().max())


def matrix(shape: tuple[int, ...], bits: int, group: int, zeros: bool, prefix: str = "") -> dict[str, torch.Tensor]:
    """Random codes, scales and, if asked, zeros."""
    blocks = (*shape[:-1], -(-shape[-1] // group))
    values = {
        "codes": torch.randint(0, 1 << bits, shape, dtype=torch.uint8),
        "scales": torch.rand(blocks) * 0.1 + 0.01,
        "zeros": torch.randint(0, 1 << bits, blocks, dtype=torch.uint8) if zeros else None,
    }
    return {f"{prefix}{n}": v for n, v in values.items() if v is not None}


LINEARS = [(bits, group, columns, zeros, level)
           for bits, group, columns in [(4, 32, 96), (4, 64, 128), (4, 128, 256), (8, 96, 96), (8, 32, 64), (8, 40, 40),
                                        (8, 72, 72), (3, 32, 64), (2, 32, 64), (5, 64, 64), (6, 64, 128), (7, 32, 64)]
           for zeros in (False, True) for level in (0, 4)]  # fmt: skip


@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(("bits", "group", "columns", "zeros", "level"), LINEARS)
def test_linear_q(bits: int, group: int, columns: int, zeros: bool, level: int, rows: int) -> None:
    """Exact to rounding with fp32 activations; within int8 rounding of them at level 4."""
    torch.manual_seed(bits * group + zeros)
    weights = matrix((48, columns), bits, group, zeros) | {"bias": torch.randn(48)}
    x = {"x": torch.randn(1, rows, columns)}
    error = run("linear_q", x, weights, level, format="int", bits=bits, block_n=1, block_k=group)
    assert error <= (2e-6 if level == 0 else 3e-2)


def test_a_wrong_zero_is_caught() -> None:
    """Negative control: a zero point off by one is far outside the tolerance."""
    torch.manual_seed(0)
    weights, x = matrix((48, 64), 4, 32, True), {"x": torch.randn(1, 3, 64)}
    y = torch.ops.llmopt.linear_q(x["x"], *weights.values(), None, None, "int", 4, 1, 32)
    weights["zeros"] = weights["zeros"] ^ 1
    other = torch.ops.llmopt.linear_q(x["x"], *weights.values(), None, None, "int", 4, 1, 32)
    assert (y - other).abs().max() / y.abs().max() > 1e-3


EXPERTS = [(4, 32, 0), (4, 16, 0), (3, 32, 0), (4, 32, 4), (8, 32, 4), (8, 96, 4)]


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai"])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("bits", "group", "level"), [(4, 32, 0), (4, 16, 0), (3, 32, 0), (4, 32, 4), (8, 32, 4), (8, 96, 4)]
)
def test_quantized_experts(activation: str, zeros: bool, bits: int, group: int, level: int) -> None:
    torch.manual_seed(1)
    experts, hidden, width = 5, 96, 32 if group <= 32 else 96
    weights = matrix((experts, 2 * width, hidden), bits, group, zeros, "gate_up_")
    weights |= matrix((experts, hidden, width), bits, group, zeros, "down_")
    for name in ("gate_up_scales", "down_scales"):
        weights[name] /= 1 << bits
    weights |= {"gate_up_bias": torch.randn(experts, 2 * width), "down_bias": torch.randn(experts, hidden)}
    index = torch.stack([torch.randperm(experts)[:2] for _ in range(7)])
    x = {"x": torch.randn(7, hidden), "index": index, "weight": torch.rand(7, 2)}
    blocks = {"gate_up_block_k": group, "down_block_k": group}
    error = run("moe_experts_q", x, weights, level, activation=activation, format="int", bits=bits, block_n=1, **blocks)
    assert error <= (2e-6 if level == 0 else 5e-2)


@pytest.mark.parametrize("activation", ["silu", "swiglu_oai", "gelu_tanh", "gelu", "relu"])
@pytest.mark.parametrize("biases", [False, True])
def test_experts(activation: str, biases: bool) -> None:
    """Contrib MoE and the dense form alike; routing weights that are zero or do not sum to one included."""
    torch.manual_seed(2)
    weights = {"gate_up": torch.randn(5, 48, 32) * 0.2, "down": torch.randn(5, 32, 24) * 0.2}
    if biases:
        weights |= {"gate_up_bias": torch.randn(5, 48), "down_bias": torch.randn(5, 32)}
    index = torch.stack([torch.randperm(5)[:2] for _ in range(7)])
    routing = torch.rand(7, 2) * 3
    routing[0, 1], routing[1] = 0.0, 0.0
    x = {"x": torch.randn(7, 32), "index": index, "weight": routing}
    assert run("moe_experts", x, weights, 0, activation=activation) <= 2e-6


@pytest.mark.parametrize(
    ("options", "match"),
    [({"format": "fp8_e4m3"}, "fp8"), ({"block_n": 2}, "2 rows"), ({"block_k": 24}, "groups of 24")],
)
def test_refuses_what_has_no_kernel(options: dict[str, Any], match: str) -> None:
    weights = matrix((48, 48), 4, 24, False)
    given = {"format": "int", "bits": 4, "block_n": 1, "block_k": 24, **options}
    if options.get("block_n") == 2:
        weights["scales"] = weights["scales"][::2]
    with pytest.raises(TargetError, match=match):
        run("linear_q", {"x": torch.randn(1, 2, 48)}, weights, 0, **given)


@pytest.mark.parametrize(
    ("bits", "group", "columns"), [(4, 32, 96), (8, 128, 128), (3, 32, 64), (6, 64, 128), (8, 96, 96)]
)
@pytest.mark.parametrize("zeros", [False, True])
def test_embedding_q(bits: int, group: int, columns: int, zeros: bool) -> None:
    weights = matrix((48, columns), bits, group, zeros)
    x = {"indices": torch.tensor([[3, 0, 47, 3, 11]])}
    options = {"format": "int", "bits": bits, "block_n": 1, "block_k": group, "dtype": torch.float32}
    assert run("embedding_q", x, weights, 0, **options) == 0.0


@pytest.mark.parametrize(("change", "words"), [({"block_n": 2}, "2 rows a block"), ({"block_k": 24}, "groups of 24")])
def test_embeddings_that_the_operator_lacks(change: dict[str, int], words: str) -> None:
    options = {"format": "int", "bits": 4, "block_n": 1, "block_k": 32, "dtype": torch.float32} | change
    weights = matrix((48, 96), 4, options["block_k"], False)
    weights["scales"] = weights["scales"][:: options["block_n"]]
    with pytest.raises(TargetError, match=words):
        run("embedding_q", {"indices": torch.tensor([[3, 0]])}, weights, 0, **options)
