"""Linears of one row joined into chains: which are, what is left alone, and a model's logits over them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from cuda.bindings.driver import CUlaunchAttributeID

from llmopt.artifact import Artifact, WeightsPlan
from llmopt.errors import ResourceError
from llmopt.launch import Cubin, Launch, LaunchPlan, plan_file
from llmopt.program import Function, OpCall, Ref
from llmopt.recipe import load_recipe
from llmopt.runtime.executors.cuda import driver, load
from llmopt.runtime.executors.cuda.launches import BoundLaunch
from llmopt.target import LoadOptions
from targets.cuda.build import choices
from targets.cuda.chain import CHAIN, chained
from targets.cuda.eight_bits import LINEAR_8
from targets.cuda.fusion import ATTENTION, LINEAR, LINEAR_Q, fused
from targets.cuda.kernels import gemm_q_few, linear_chain
from targets.cuda.kernels._common import SM_COUNT
from targets.cuda.pack import stored
from targets.cuda.select import discover
from targets.cuda.tuning import candidates
from targets.cuda.tuning.build import program_cases
from tests.architectures import make_checkpoint
from tests.captured import folder
from tests.targets.cuda.fake_builds import compile_without_compiler
from tests.targets.cuda.fake_driver import FakeDriver
from tests.targets.cuda.models import OPTIONS, Model, interpreted, lowered, planned, reference
from tests.targets.cuda.test_cuda_architectures import few_logits
from tests.targets.cuda.test_cuda_fusion import dims, text
from tests.targets.cuda.test_cuda_plan import TOLERANCE
from tests.targets.models import worst

OPS = (ATTENTION, LINEAR, LINEAR_Q, LINEAR_8, CHAIN)
RECIPES = ("int4-cuda", "fp8-cuda", "w8a8-cuda")
WIDE = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
"""Rows of whole chunks of 128 columns."""


@cache
def wide(recipe: str, architecture: str = "llama") -> Model:
    path = make_checkpoint(architecture, folder() / f"wide-{architecture}", **WIDE)
    return lowered(path, load_recipe(recipe).text.replace("- smoothquant\n", ""))


def joined(function: Function, rows: int = 1, arch: int = 90) -> Function:
    """As a bucket of so many rows runs it."""
    return chained(fused(function, dims(rows), OPS, arch), dims(rows), OPS, arch)


def decode(recipe: str, architecture: str = "llama") -> Function:
    return wide(recipe, architecture).program.functions["decode"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_layer_is_attention_and_a_chain(recipe: str) -> None:
    first = ["norm_round", "linear_8"] if recipe in ("fp8-cuda", "w8a8-cuda") else ["rms_norm", "linear_q"]
    layers = ["attention", "linear_chain", "attention", "linear_chain"]
    function = joined(decode(recipe))
    assert text(function) == ["embedding", "rotary_table", *first, *layers, "linear norm"]
    assert [call.args["count"] for call in function.calls if call.op == CHAIN] == [4, 3]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_over_chains_computes_what_the_reference_computes(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SM_COUNT, 90, 8)
    launches: list[Any] = []
    twin = linear_chain.TWIN

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return twin[grid]

    monkeypatch.setattr(linear_chain, "TWIN", Counted())
    found = wide(recipe)
    made = interpreted(found, discover(), replace(OPTIONS, decode_buckets=(1,)))
    vocab_size = found.program.vocab_size
    assert worst(few_logits(made, vocab_size), few_logits(reference(found), vocab_size)) <= TOLERANCE
    assert launches


def test_only_one_row_is_chained_and_only_where_chains_run() -> None:
    function = decode("int4-cuda")
    for made in (
        joined(function, 2),
        joined(function, arch=80),
        joined(decode("int8-cuda")),
        joined(wide("int4-cuda").program.functions["extend"]),
    ):
        assert not any(call.op == CHAIN for call in made.calls)


def watched(function: Function, name: str, after: str) -> Function:
    """The function with one more reader of a value, right after another one is made."""
    at = next(i for i, call in enumerate(function.calls) if after in call.outputs)
    spy = OpCall("aten.alias.default", {"self": Ref(name)}, ("spy",))
    types = {**function.types, "spy": function.types[name]}
    return replace(function, calls=(*function.calls[: at + 1], spy, *function.calls[at + 1 :]), types=types)


def test_what_another_call_reads_in_between_is_left_alone() -> None:
    """Reading a sum before the chain's last linear keeps that chain apart; reading it after does not."""
    plain = decode("int4-cuda")
    chains = [call for call in joined(plain).calls if call.op == CHAIN]
    first, last = chains[0].outputs[0], chains[0].outputs[-1]
    counts = [
        [call.args["count"] for call in joined(watched(plain, first, after)).calls if call.op == CHAIN]
        for after in (first, last)
    ]
    assert counts == [[3], [4, 3]]


def test_values_are_made_before_they_are_read() -> None:
    for recipe in RECIPES:
        found = wide(recipe)
        function = found.program.functions["decode"]
        known = {*function.inputs, *found.program.weights}
        for call in joined(function).calls:
            assert set(call.refs()) <= known, call
            known |= set(call.outputs)


def test_linears_that_would_be_chained_are_tuned_alone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(candidates.CODES, "gemm_q_few", lambda m, n, k, gated: [gemm_q_few.shape_tiles(gated)])
    cases = program_cases(stored(wide("int4-cuda").program), OPTIONS, 90, "llama", "^gemm_q_few int4g128 1x")
    assert len({case.key for case in cases}) == 4


def test_a_recipe_may_leave_linears_apart() -> None:
    program = stored(wide("int4-cuda").program)
    resident = [planned(program, discover(), replace(OPTIONS, linear_chains=on))[1].resident for on in (True, False)]
    assert resident[0] > resident[1] == 0


def test_a_chain_that_its_kernel_refuses_is_left_apart_and_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = wide("int4-cuda")
    monkeypatch.setattr(linear_chain, "SHARED", 1024)
    plan, launches = planned(stored(found.program), discover())
    assert launches.resident == 0
    said = choices(plan)
    (entry,) = said["decode 1x1"][CHAIN]
    assert (entry["kernel"], entry["calls"]) == ("none", 0)
    assert entry["reason"].endswith("do not hold its share")
    assert CHAIN not in said["decode 4x4"]


def test_a_gpu_with_fewer_multiprocessors_is_refused_before_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_checkpoint("llama", folder() / "wide-llama", **WIDE)
    made = compile_without_compiler(path, tmp_path / "a", WeightsPlan("random"), load_recipe("int4-cuda").text)
    resident = LaunchPlan.from_json((made / plan_file(90)).read_text()).resident
    assert resident > 1
    monkeypatch.setattr(driver, "cu", FakeDriver(multiprocessors=resident))
    load(Artifact.open(made), LoadOptions("cuda"))
    monkeypatch.setattr(driver, "cu", small := FakeDriver(multiprocessors=resident - 1))
    with pytest.raises(ResourceError, match=f"{resident - 1} multiprocessors, .* need {resident} at once .*chains"):
        load(Artifact.open(made), LoadOptions("cuda"))
    assert "cuMemAlloc" not in small.calls


def test_programs_that_wait_for_each_other_start_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else two such launches, each with half its programs, would wait for ever."""
    monkeypatch.setattr(driver, "cu", FakeDriver())
    kernel = Cubin("k.cubin", "k", 32, 0, 0, 0)
    for resident, pdl in ((True, True), (True, False), (False, True), (False, False)):
        bound = BoundLaunch(Launch("k", (4, 1, 1), (), pdl, resident=resident), kernel, 1, lambda name: 0, 0)
        together = CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_COOPERATIVE
        ids = [attribute.id for attribute in bound.config.attrs]
        assert len(ids) == bound.config.numAttrs == resident + pdl
        assert (together in ids) == resident
