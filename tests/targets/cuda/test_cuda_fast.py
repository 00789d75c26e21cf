"""The option fp8_fast_accumulation: which linears of which steps it marks, and what the artifact says of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmopt.program import Function
from llmopt.recipe import load_recipe
from targets.cuda.build import choices, plan_arch
from targets.cuda.eight_bits import ALL_COLUMNS, LINEAR_8, QUANTIZED
from targets.cuda.fusion import fused
from targets.cuda.options import CudaOptions, parse_options
from targets.cuda.pack import stored
from targets.cuda.select import discover
from tests.targets.cuda.models import model

FP8 = load_recipe("fp8-cuda").text
INT8 = FP8.replace("format: fp8_e4m3", "bits: 8", 1).replace("format: fp8_e4m3", "format: int8", 1)


def function(name: str, text: str = FP8) -> Function:
    return model("llama", text=text).program.functions[name]


def marks(function: Function, rows: int, fast: bool, arch: int = 90) -> set[Any]:
    """The intervals of the linears over codes of a step whose rows all give logits."""
    dims = {"T": rows, "N": rows, "M": rows, "W_full": 4, "B_full": 16}
    calls = fused(function, dims, (LINEAR_8,), arch, fast).calls
    found = {call.args.get("interval") for call in calls if call.op == LINEAR_8}
    assert found
    return found


def options(word: str | None) -> CudaOptions:
    return parse_options({"fp8_fast_accumulation": word} if word else {})


@pytest.mark.parametrize(
    ("word", "decode", "extend"),
    [(None, False, False), ("never", False, False), ("prefill", False, True), ("always", True, True)],
)
def test_the_words(word: str | None, decode: bool, extend: bool) -> None:
    found = options(word)
    assert (found.accumulates_fast("decode"), found.accumulates_fast("extend")) == (decode, extend)


@pytest.mark.parametrize("name", ["decode", "extend"])
def test_linears_of_many_rows_are_marked(name: str) -> None:
    assert marks(function(name), 129, fast=True) == {ALL_COLUMNS}
    assert marks(function(name), 128, fast=True) == marks(function(name), 2048, fast=False) == {None}


def test_only_sums_of_fp8_over_all_columns_are() -> None:
    assert marks(function("extend", INT8), 256, fast=True) == {None}
    whole = function("extend")
    calls = tuple(replace(c, args={**c.args, "block_k": 32}) if c.op == QUANTIZED else c for c in whole.calls)
    assert marks(replace(whole, calls=calls), 256, fast=True) == {None}


def test_only_gpus_that_sum_in_few_bits_have_two_ways() -> None:
    for arch in (89, 100):
        assert marks(function("extend"), 256, True, arch) == {None}


def test_the_manifest_says_which_sums_were_chosen() -> None:
    """One sequence gives one row of logits, so the last layer has linears of one row."""
    some = {"decode_buckets": [256], "extend_buckets": [128, 256], "extend_sequences": [1]}
    made = parse_options({**some, "fp8_fast_accumulation": "prefill"})
    found = choices(plan_arch(stored(model("llama", text=FP8).program), 90, made, discover(), {}))
    for where, fast in (("extend 256x1", True), ("extend 128x1", False), ("decode 256x256", False)):
        reasons = [entry["reason"] for entry in found[where][LINEAR_8] if "one row" not in entry["reason"]]
        assert reasons
        assert all(("fp8 with fast accumulation, a channel" in reason) == fast for reason in reasons), reasons
