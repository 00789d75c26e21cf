"""LaunchPlan: its text is canonical, round-trips, and refuses what is not one."""

from __future__ import annotations

import json

import pytest

from llmopt.errors import ArtifactError
from llmopt.launch import Bucket, Cubin, Launch, LaunchPlan, Pointer, Scalar, TensorMap, View, plan_file

MAP = TensorMap("w.weight", 256, "bfloat16", (64, 128), (256, 2), (64, 64), 128)


def plan() -> LaunchPlan:
    args = (Pointer("input_ids"), Pointer("x", 512), Scalar("i32", 7), Scalar("fp32", 0.5), MAP)
    launches = (Launch("gemv_1", (3, 2, 1), args, True, 4096, "model.layers.0"),)
    view = View("logits", "bfloat16", (1, 96), (96, 1))
    bucket = Bucket(
        "decode", {"M": 1, "N": 1, "T": 1}, {"input_ids": View("input_ids", "int64", (1, 1), (1, 1))}, launches,
        launches, launches[:0], {"x": 0, "logits": 512}, 1024, view, View("sampled", "int32", (1,), (1,), 64),
        View("reports", "int32", (1, 41), (41, 1)), ((0, 256),),
    )  # fmt: skip
    cubin = Cubin("kernels/sm_90/gemv_1.cubin", "gemv", 128, 2048, 40, 0)
    return LaunchPlan(90, {"gemv_1": cubin}, (bucket,), {"last_tokens": View("last_tokens", "int32", (4,), (1,))})


def test_a_plan_survives_its_text() -> None:
    text = plan().to_json()
    assert LaunchPlan.from_json(text) == plan()
    assert LaunchPlan.from_json(text).to_json() == text


def test_the_arena_serves_the_largest_bucket() -> None:
    assert plan().arena_bytes == 1024
    assert LaunchPlan(90, {}, ()).arena_bytes == 0
    assert plan_file(90) == "launch/sm_90.json"


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: raw.pop("arch"),
        lambda raw: raw.update(format=1),
        lambda raw: raw["buckets"][0].pop("launches"),
        lambda raw: raw["buckets"][0]["launches"][0]["args"].append(["texture", "x"]),
        lambda raw: raw["kernels"]["gemv_1"].update(color="red"),
    ],
)
def test_another_text_is_refused(change: object) -> None:
    raw = json.loads(plan().to_json())
    change(raw)  # type: ignore[operator]
    with pytest.raises(ArtifactError):
        LaunchPlan.from_json(json.dumps(raw))


def test_no_json_is_refused() -> None:
    with pytest.raises(ArtifactError, match="malformed"):
        LaunchPlan.from_json("{")
