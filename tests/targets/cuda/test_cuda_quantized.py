"""Quantized models on the cuda target: packing, what is refused, and a model's logits against the reference's."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmopt.artifact import Artifact, WeightsPlan
from llmopt.errors import TargetError
from llmopt.ir.weights import Constant
from llmopt.launch import LaunchPlan, plan_file
from llmopt.lower.readers import Reader
from llmopt.program import Function, OpCall, Ref, TensorType, WeightType
from llmopt.recipe import load_recipe
from targets.cuda.build import changed
from targets.cuda.kernels._common import SM_COUNT
from targets.cuda.options import CudaOptions
from targets.cuda.pack import (
    EXPERTS,
    CodesLayout,
    Packed,
    SignedLayout,
    TableLayout,
    pack_codes,
    stored,
    unpack_codes,
)
from targets.cuda.select import discover
from tests.frontend.quantized import gpt_oss_pair
from tests.targets.cuda.fake_builds import compile_without_compiler
from tests.targets.cuda.models import Model, interpreted, lowered, model, reference
from tests.targets.cuda.test_cuda_architectures import few_logits
from tests.targets.cuda.test_cuda_plan import TOLERANCE
from tests.targets.models import worst

EMBEDDED = Path(__file__).parents[3] / "models" / "classics-2m"
EMBEDDING = "model.embed_tokens.weight"
OPTIONS = CudaOptions(decode_buckets=(1, 4), extend_buckets=(16,), extend_sequences=(4,))
INT4 = load_recipe("int4-cuda").text.replace("group_size: 128", "group_size: 32")
INT8 = load_recipe("int8-cuda").text
FP8 = INT8.replace("{bits: 8}", "{format: fp8_e4m3}")
TEXTS = {
    "int4": INT4,
    "zeros": INT4.replace("group_size: 32", "group_size: 32\n    symmetric: false"),
    "int8": INT8,
    "fp8": FP8,
    "int8 head and table": INT4.replace(
        "- rewrite", "- quantize_weights:\n    bits: 8\n    lm_head: true\n    embeddings: true\n- rewrite"
    ),
}


FORMS = [(4, 32, "int"), (4, 64, "int"), (4, 128, "int"), (8, 32, "int"), (8, 128, "int"), (8, 64, "fp8_e4m3")]


@given(st.sampled_from(FORMS), st.integers(1, 4), st.integers(1, 5), st.data())
def test_unpacking_gives_the_codes_again(form: tuple[int, int, str], chunks: int, n: int, data: st.DataObject) -> None:
    bits, chunk, format = form
    random = np.random.default_rng(data.draw(st.integers(0, 99)))
    codes = random.integers(0, 2**bits, (n, chunks * chunk), np.uint8)
    stored = pack_codes(codes, bits, chunk, format)
    assert stored.nbytes == codes.size * bits // 8
    assert np.array_equal(unpack_codes(stored, bits, chunk, format), codes)


@pytest.mark.parametrize("max_bytes", [1, 40, 1 << 20])
def test_codes_that_meet_codes_are_less_128(max_bytes: int) -> None:
    codes = torch.randint(0, 256, (5, 64), dtype=torch.uint8)
    read = Packed(Reader(Constant(codes), TensorType((5, 64), "uint8")), SignedLayout())
    found = np.concatenate(list(read.chunks(max_bytes)))
    assert (read.type, found.dtype) == (TensorType((5, 64), "int8"), np.int8)
    assert np.array_equal(SignedLayout().unpack(found), codes.numpy())
    assert np.array_equal(found.astype(int) + 128, codes.numpy())


def test_the_packing_is_the_documented_one() -> None:
    codes = np.zeros((1, 64), np.uint8)
    codes[0, [1, 17, 33, 49]] = 5, 6, 7, 8
    assert pack_codes(codes, 4, 64).view("<u2")[0, :3].tolist() == [0, 0x8765, 0]
    assert pack_codes(codes, 4, 32)[0, [1, 17]].tolist() == [0x65, 0x87]
    assert not np.array_equal(unpack_codes(pack_codes(codes, 4, 64), 4, 32), codes)
    assert pack_codes(np.array([[0, 128, 255]], np.uint8), 8, 128).view(np.int8).tolist() == [[-128, 0, 127]]
    codes[0, [1, 33]] = 128 + 1, 128 + 2
    assert pack_codes(codes, 8, 64).view("<u2")[0, :2].tolist() == [0x8080, 0x0201]


@pytest.mark.parametrize("max_bytes", [1, 40, 1 << 20])
def test_weights_are_packed_while_they_are_read(max_bytes: int) -> None:
    codes, scales = torch.randint(0, 16, (5, 64), dtype=torch.uint8), torch.rand(5, 2).bfloat16()
    read = Packed(Reader(Constant(codes), TensorType((5, 64), "uint8")), CodesLayout(4, 32))
    table = Packed(Reader(Constant(scales), TensorType((5, 2), "bfloat16")), TableLayout())
    assert (read.type, table.type) == (TensorType((5, 32), "uint8"), TensorType((2, 5), "bfloat16"))
    assert np.array_equal(np.concatenate(list(read.chunks(max_bytes))), pack_codes(codes.numpy(), 4, 32))
    assert np.array_equal(np.concatenate(list(table.chunks(max_bytes))).astype("f4"), scales.float().numpy().T)


@pytest.mark.parametrize("max_bytes", [1, 1 << 20])
def test_each_expert_is_packed_as_one_matrix(max_bytes: int) -> None:
    codes, scales = torch.randint(0, 16, (3, 5, 64), dtype=torch.uint8), torch.rand(3, 5, 2)
    read = Packed(Reader(Constant(codes), TensorType((3, 5, 64), "uint8")), CodesLayout(4, 32, "mxfp4"))
    table = Packed(Reader(Constant(scales), TensorType((3, 5, 2), "float32")), TableLayout())
    assert (read.type, table.type) == (TensorType((3, 5, 32), "uint8"), TensorType((3, 2, 5), "float32"))
    found, tables = (np.concatenate(list(packed.chunks(max_bytes))) for packed in (read, table))
    for expert in range(3):
        assert np.array_equal(found[expert], pack_codes(codes[expert].numpy(), 4, 32))
        assert np.array_equal(tables[expert], scales[expert].numpy().T)


def call(**args: Any) -> OpCall:
    given = {"codes": Ref("w.codes"), "scales": Ref("w.scales"), "zeros": None, "g_idx": None, "format": "int"}
    return OpCall("llmopt.linear_q", {**given, "bits": 4, "block_n": 1, "block_k": 32, **args}, ("y",), "layers.0.up")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"bits": 3}, "int weights of 3 bits"),
        ({"format": "mxfp4", "block_n": 1, "block_k": 64}, "MXFP4 weights in groups of 64"),
        ({"block_n": 128}, "blocks of 128 rows"),
        ({"g_idx": Ref("w.g_idx")}, "another order than their groups"),
        ({"block_k": 16}, "groups of 16 of 96 columns"),
    ],
)
def test_what_no_kernel_reads_is_refused(args: dict[str, Any], message: str) -> None:
    weights = {"w.codes": WeightType(TensorType((4, 96), "uint8"))}
    function = Function("decode", (), (call(**args),), (), {})
    program = replace(model("llama", text=INT4).program, weights=weights, functions={"decode": function})
    with pytest.raises(TargetError, match=f"layers.0.up: cuda cannot run .*{message}"):
        stored(program)


def test_a_plan_keeps_the_types_of_packed_weights() -> None:
    found = model("llama", text=INT4)
    program = stored(found.program)
    plan = LaunchPlan(90, {}, (), packed=changed(found.program, program))
    assert LaunchPlan.from_json(plan.to_json()).stored(found.program) == program
    assert any(name.endswith(".codes") for name in plan.packed)
    assert not any("lm_head" in name or "embed" in name for name in plan.packed)


@pytest.mark.parametrize("kind", ["embedded", "random"])
@pytest.mark.parametrize(("recipe", "ratio"), [("int4-cuda", 4), ("int8-cuda", 2)])
def test_the_recipes_compile_the_embedded_model(recipe: str, ratio: int, kind: Any, tmp_path: Path) -> None:
    text = load_recipe(recipe).text.replace("group_size: 128", "group_size: 64")  # 128 does not divide its 192
    made = compile_without_compiler(EMBEDDED, tmp_path / "made", WeightsPlan(kind, 7), text)
    artifact = Artifact.open(made)
    plan, store = (LaunchPlan.from_json(artifact.file(plan_file(90)).read_text()), artifact.weight_store())
    for name, weight in plan.stored(artifact.program).weights.items():
        found = store.get(name)
        assert (store.dtype(name), found.shape) == (weight.type.dtype, weight.type.shape), name
        if name.endswith(".codes"):
            assert found.nbytes * ratio == 2 * prod(artifact.program.weights[name].type.shape)  # type: ignore[arg-type]
    assert store.dtype("lm_head.weight" if "lm_head.weight" in store.names() else EMBEDDING) == "bfloat16"
    served = artifact.manifest.notes["choices"]["sm_90"]["decode 1x1"]
    choices = [*served["cuda.linear_q"], *served["llmopt.linear_q"]]
    assert {choice["kernel"] for choice in choices} == {"gemv_q"}
    assert artifact.manifest.notes["proven"]["sm_90"] == "run on NVIDIA H200"
    assert all(choice["reason"].startswith(recipe[:4]) and "modelled" in choice["reason"] for choice in choices)


def worst_logits(found: Model, scheme: str) -> float:
    """Largest error of the kernels over a model's weights against the reference over the scheme's own."""
    good = model("llama", text=TEXTS[scheme])
    vocab_size = good.program.vocab_size
    return worst(
        few_logits(interpreted(found, discover(), OPTIONS), vocab_size), few_logits(reference(good), vocab_size)
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheme", TEXTS)
def test_a_quantized_model_computes_what_the_reference_computes(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SM_COUNT, 90, 8)
    assert worst_logits(model("llama", text=TEXTS[scheme]), scheme) <= TOLERANCE


@pytest.mark.slow
def test_a_gpt_oss_runs_on_the_codes_it_is_stored_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SM_COUNT, 90, 8)
    found = lowered(gpt_oss_pair(tmp_path).path)
    assert sum(call.op == EXPERTS for call in found.program.functions["decode"].calls) == 2
    expected = few_logits(reference(found), found.program.vocab_size)
    assert worst(few_logits(interpreted(found, discover(), OPTIONS), found.program.vocab_size), expected) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize(("suffix", "axis"), [(".zeros", 0), (".scales", 1)])
def test_a_wrong_zero_point_or_group_is_noticed(suffix: str, axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SM_COUNT, 90, 8)
    found = model("llama", text=TEXTS["zeros"])
    name = next(name for name in found.weights if name.endswith(suffix))
    wrong = Reader(Constant(found.weights[name].weight.tensor().roll(1, axis)), found.weights[name].type)
    assert worst_logits(replace(found, weights={**found.weights, name: wrong}), "zeros") > TOLERANCE
