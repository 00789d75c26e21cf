"""The build: options, kernel choice with reasons, cache with reasons, bytes that don't depend on where or when."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmopt.errors import ConfigError, TargetError
from llmopt.launch import LaunchPlan
from llmopt.target import BuildContext
from targets.cuda import cache, proven
from targets.cuda.build import build
from targets.cuda.cache import CubinCache, Job
from targets.cuda.compile import compile_all, compiler_version
from targets.cuda.kernel import CallSite, Selection, Specialization
from targets.cuda.options import CudaOptions, parse_options
from targets.cuda.select import discover
from tests.targets.cuda.models import model, planned
from tests.targets.cuda.simple import KERNELS

ONE = CudaOptions(decode_buckets=(1,), extend_buckets=(16,), extend_sequences=(1,))
FEED = Specialization(
    "targets.cuda.kernels.greedy", "feed_tokens", (("ids", "*i64"), ("last", "*i32"), ("out", "*i64")),
    (("T", 1), ("BLOCK", 1)), num_warps=1,
)  # fmt: skip


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ({"arch": [90]}, "did you mean archs"),
        ({"archs": [91]}, "arch 91 is not supported"),
        ({"archs": 90}, "expected a list"),
        ({"decode_buckets": [0]}, "at least 1"),
        ({"decode_buckets": [True]}, "at least 1"),
        ({"jobs": -1}, "at least 0"),
        ({"fp8_fast_accumulation": "decode"}, "expected one of never, prefill, always, found 'decode'"),
        ({"fp8_fast_accumulation": True}, "expected one of never, prefill, always, found True"),
        ({"fp8_fast_accumulation": ["always"]}, "expected one of never"),
        ({"linear_chains": 1}, "expected true or false, found 1"),
        ({"fp8_fast_accumulate": "always"}, "did you mean fp8_fast_accumulation"),
        ({"extend_buckets": [16], "extend_sequences": [1, 32]}, r"32 sequences do not fit .* 16 rows.*add an entry"),
    ],
)
def test_bad_options_are_refused_by_name(raw: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_options(raw)


def test_options_are_sorted_sets() -> None:
    assert parse_options({"archs": [90, 80, 90], "extend_buckets": [64, 16]}) == CudaOptions(
        archs=(80, 90), extend_buckets=(16, 64), extend_sequences=(1, 16)
    )


def test_sequences_that_fit_are_kept() -> None:
    assert parse_options({"extend_sequences": [64], "extend_buckets": [64]}).extend_sequences == (64,)
    assert parse_options({}).extend_sequences == CudaOptions.extend_sequences


class Picky:
    """Refuses everything, with a reason."""

    name, ops = "picky", ("aten.linear.default",)

    def select(self, site: CallSite) -> Selection | str:
        return "it is Tuesday"


def test_a_call_nothing_serves_names_itself_and_every_reason() -> None:
    kernels = (*(k for k in KERNELS if k.name != "linear"), Picky())
    with pytest.raises(TargetError, match=r"layers\.0.*aten\.linear\.default.*sm_90: picky: it is Tuesday"):
        planned(model("llama").program, kernels, ONE)


def test_the_cheapest_kernel_wins_and_the_others_are_kept() -> None:
    class Costly:
        name, ops = "costly", ("aten.linear.default",)

        def select(self, site: CallSite) -> Selection | str:
            return Selection((), "slow", 9.0)

    class Free(Costly):
        name = "free"

        def select(self, site: CallSite) -> Selection | str:
            return Selection((), "fast", 0.5)

    plan, _ = planned(model("llama").program, (*KERNELS, Picky(), Costly(), Free()), ONE)
    linears = [choice for call, choice in plan.buckets[0].choices if call.op == "aten.linear.default"]
    assert {c.kernel for c in linears} == {"free"}
    assert linears[0].refused == ("picky: it is Tuesday", "linear: 1 us", "costly: 9 us")


def test_equal_calls_are_selected_once() -> None:
    asked: list[str] = []

    class Counting:
        def __init__(self, kernel: Any) -> None:
            self.kernel, self.name, self.ops = kernel, kernel.name, kernel.ops

        def select(self, site: CallSite) -> Selection | str:
            asked.append(site.call.op)
            return self.kernel.select(site)  # type: ignore[no-any-return]

    planned(model("llama").program, tuple(map(Counting, KERNELS)), replace(ONE, extend_buckets=(16,)))
    per_bucket = asked.count("llmopt.rope_kv_write") / 2
    assert per_bucket == 1, "two layers differ in nothing but names"


def test_every_kernel_file_is_discovered_and_names_are_unique() -> None:
    names = [kernel.name for kernel in discover()]
    assert {"feed", "greedy"} <= set(names)
    assert len(names) == len(set(names))


def job() -> Job:
    cache.source_digest.cache_clear()
    return Job(FEED, 90, compiler_version())


def test_a_cubin_is_compiled_once_and_a_miss_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silent = lambda what, done, total: None  # noqa: E731
    first = CubinCache(tmp_path)
    made = compile_all([job(), job()], first, silent)
    assert first.log == ["compiled greedy.feed_tokens(T=1, BLOCK=1) sm_90: never compiled before"]
    assert made[job()].cubin[:4] == b"\x7fELF"
    assert made[job()].registers > 0
    second = CubinCache(tmp_path)
    assert compile_all([job()], second, silent) == made
    assert second.log == []
    digest = cache.source_digest
    for edited, words in (
        (FEED.module, "kernels.greedy.py or what it imports changed"),
        ("targets.cuda.worker", "the compile worker changed"),
    ):
        monkeypatch.setattr(cache, "source_digest", lambda m, edited=edited: "edited" if m == edited else digest(m))
        third = CubinCache(tmp_path)
        assert third.get(job_unchecked()) is None
        assert third.log == [f"compiled greedy.feed_tokens(T=1, BLOCK=1) sm_90: {words}"]
        monkeypatch.undo()
    fourth = CubinCache(tmp_path)
    assert fourth.get(Job(FEED, 90, "0.0")) is None
    assert f"Triton {compiler_version()} became 0.0" in fourth.log[0]
    (tmp_path / f"{job().key()}.cubin").write_bytes(b"damaged")
    fifth = CubinCache(tmp_path)
    assert fifth.get(job()) is None
    assert "damaged" in fifth.log[0]


def job_unchecked() -> Job:
    return Job(FEED, 90, compiler_version())


def test_a_kernel_triton_refuses_is_named(tmp_path: Path) -> None:
    wrong = replace(FEED, constexprs=(("T", 1),))
    with pytest.raises(TargetError, match=r"feed_tokens.*BLOCK"):
        compile_all([Job(wrong, 90, compiler_version())], CubinCache(tmp_path), lambda what, done, total: None)


def test_two_builds_with_caches_of_their_own_give_equal_bytes(tmp_path: Path) -> None:
    found = model("llama")
    # A few kernels are enough: the whole set is compiled by the tests of the architectures.
    few = replace(found.program, functions={n: replace(f) for n, f in found.program.functions.items()})
    builds = [
        build(few, found.weights, ONE, BuildContext({}), CubinCache(tmp_path / name), KERNELS) for name in ("a", "b")
    ]
    assert builds[0].files == builds[1].files
    assert builds[0].notes == builds[1].notes
    plan = LaunchPlan.from_json(builds[0].files["launch/sm_90.json"].decode())
    assert {k.file for k in plan.kernels.values()} == {n for n in builds[0].files if n.endswith(".cubin")}
    assert not any(str(Path.cwd()).encode() in data for data in builds[0].files.values())


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90])
def test_the_repository_kernels_compile(arch: int, cubins: CubinCache) -> None:
    """The interpreter accepts what the compiler refuses (a loop variable that changes its type)."""
    found, options = model("llama"), replace(ONE, archs=(arch,))
    made = build(found.program, found.weights, options, BuildContext({}), cubins)
    kernels = made.notes["kernels"][f"sm_{arch}"]
    assert kernels
    assert not [name for name, kernel in kernels.items() if kernel["spills"]]


def test_kernels_that_came_after_the_last_run_on_a_gpu_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proven.proven(90, [FEED]) == "run on NVIDIA H200"
    assert proven.proven(80, [FEED]) == "built, never run"
    monkeypatch.setattr(proven, "NEVER_RUN", ("greedy",))
    assert proven.proven(90, [FEED]) == "run on NVIDIA H200, but for feed_tokens: built, never run"
