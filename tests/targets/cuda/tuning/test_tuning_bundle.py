"""Bundles of candidates: what is timed for a call, the files, damage, and how the best is picked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmopt.errors import ArtifactError, ExecutorError, ResourceError
from targets.cuda.kernel import Kernel, Strided
from targets.cuda.kernels import (
    gemm,
    gemm_persistent,
    gemm_q,
    gemm_w8a8,
    gemm_w8a8_persistent,
    gemv,
    gemv_w8a8,
    moe,
    moe_q,
)
from targets.cuda.options import CudaOptions
from targets.cuda.tuning.build import entry as describe
from targets.cuda.tuning.build import program_cases, site_cases
from targets.cuda.tuning.bundle import FILE, FORMAT, Buffer, open_bundle
from targets.cuda.tuning.candidates import candidates
from targets.cuda.tuning.timing import FILLED, finite, measure, winners
from tests.targets.cuda.models import model
from tests.targets.cuda.tuning.cases import (
    FakeTimer,
    bundle,
    codes_site,
    entry,
    experts_site,
    linear_site,
    quantized_experts_site,
    quantized_site,
)


def ignore(what: str, done: int, total: int) -> None:
    """No progress."""


@pytest.mark.parametrize(
    ("kernel", "m", "gate", "least"),
    [
        (gemv.KERNEL, 1, None, 8), (gemv.KERNEL, 1, "silu", 8), (gemm.KERNEL, 8, None, 4), (gemm.KERNEL, 8, "silu", 1),
        (gemm.KERNEL, 128, None, 2),
        (gemm.KERNEL, 256, None, 3), (gemm_persistent.KERNEL, 2048, "silu", 4),
    ],
)  # fmt: skip
def test_every_candidate_is_served_as_asked(kernel: Kernel, m: int, gate: str | None, least: int) -> None:
    site = linear_site(m, 8192, 4096, gate)
    found = candidates(kernel.name, site)
    assert found is not None
    assert len(found[1]) >= least
    cases = list(site_cases(kernel, site, "llama", "layer"))
    assert [case.config for case in cases] == found[1]
    assert len({case.selection.launches for case in cases}) == len(cases)
    for case in cases:
        assert "tuned" in case.selection.reason
        assert case.flops == 2 * m * 8192 * 4096
        made = describe(case, ())
        assert made.buffers["weight"].kind == "pool"
        assert made.check == {"m": m, "n": 8192, "k": 4096, "gate": gate, "residual": False}


def test_experts_are_tried_with_rows_spread_over_them() -> None:
    cases = list(site_cases(moe.KERNEL, experts_site(64, 8), "mixtral", "layer"))
    assert len(cases) >= 3
    assert {case.key for case in cases} == {"bfloat16 64x2 of 8 256x64"}
    assert all(case.selection.reason.endswith("tuned") for case in cases)
    index = cases[0].data["index"]
    assert len(index) == 128
    assert set(index) == set(range(8))
    assert all(a != b for a, b in zip(index[::2], index[1::2]))
    made = describe(cases[0], ())
    assert made.buffers["index"].dtype == "int64"
    assert {name for name, buffer in made.buffers.items() if buffer.kind == "pool"} == {"gate_up", "down"}


def test_quantized_experts_are_tried_over_packed_weights() -> None:
    cases = list(site_cases(moe_q.KERNEL, quantized_experts_site(64, 8), "mixtral", "layer"))
    assert len(cases) >= 4
    assert {case.key for case in cases} == {"int4g64 64x2 of 8 256x64"}
    assert len({case.selection.launches for case in cases}) == len(cases)
    assert all(case.selection.reason.endswith("tuned") for case in cases)
    codes, scales, rows = 8 * (128 * 256 + 256 * 64) // 2, 8 * 2 * (128 * 4 + 256), 64 * 2 * 2 * 256
    assert {(case.bytes, case.flops) for case in cases} == {(codes + scales + rows, 6 * 64 * 2 * 256 * 64)}
    made = describe(cases[0], ())
    pools = {name for name, buffer in made.buffers.items() if buffer.kind == "pool"}
    assert pools == {"gate_up_codes", "down_codes"}


@pytest.mark.parametrize(("m", "gate", "least"), [(1, None, 6), (1, "silu", 6), (32, None, 6), (256, "silu", 3)])
def test_quantized_linears_are_tried_over_packed_weights(m: int, gate: str | None, least: int) -> None:
    site = quantized_site(m, 8192, 4096, gate)
    cases = list(site_cases(gemm_q.KERNEL, site, "llama", "layer"))
    assert len(cases) >= least
    assert {case.key for case in cases} == {f"int4g128 {m}x8192x4096{' gated' if gate else ''}"}
    assert len({case.selection.launches for case in cases}) == len(cases)
    assert all(case.selection.reason.endswith("tuned") for case in cases)
    assert all(case.bytes > 8192 * 4096 // 2 for case in cases)
    made = describe(cases[0], ())
    assert {name for name, buffer in made.buffers.items() if buffer.kind == "pool"} == {"codes"}
    assert made.check is None


@pytest.mark.parametrize(
    ("kernel", "m", "gate", "group", "least"),
    [
        (gemv_w8a8.KERNEL, 1, None, 0, 8), (gemv_w8a8.KERNEL, 1, "silu", 128, 8), (gemm_w8a8.KERNEL, 8, None, 0, 4),
        (gemm_w8a8.KERNEL, 8, "silu", 128, 1), (gemm_w8a8.KERNEL, 128, None, 0, 3),
        (gemm_w8a8.KERNEL, 256, "silu", 0, 2),
        (gemm_w8a8_persistent.KERNEL, 2048, "silu", 128, 3),
    ],
)  # fmt: skip
def test_linears_over_codes_are_tried(kernel: Kernel, m: int, gate: str | None, group: int, least: int) -> None:
    cases = list(site_cases(kernel, codes_site(m, 8192, 4096, gate, group), "llama", "layer"))
    assert len(cases) >= least
    form = f"w8a8-fp8{'g128' if group else ''}"
    assert {case.key for case in cases} == {f"{form} {m}x8192x4096{' gated' if gate else ''}"}
    assert len({case.selection.launches for case in cases}) == len(cases)
    assert all(case.selection.reason.endswith("tuned") for case in cases)
    made = describe(cases[0], ())
    assert {name for name, buffer in made.buffers.items() if buffer.kind == "pool"} == {"codes"}
    assert made.buffers["x"].dtype in FILLED


def test_what_fills_codes_holds_no_nan() -> None:
    bits = finite(np.arange(1 << 16, dtype=np.uint16))
    assert not {0x7F, 0xFF} & set((bits & 0xFF).tolist())
    assert (bits == np.arange(1 << 16)).mean() > 0.99


def test_other_kernels_have_nothing_to_try() -> None:
    assert candidates("gate", linear_site(8, 64, 64)) is None
    assert candidates("gemm_persistent", linear_site(8, 64, 64)) == ("bfloat16 8x64x64", [])


def test_a_bundle_is_read_back_as_written(tmp_path: Path) -> None:
    made = bundle(tmp_path, entry("bfloat16 1x8x8", {"rows": 1}))
    found = open_bundle(tmp_path)
    assert found == made
    assert found.read_cubin("cubins/k.cubin") == b"cubin"


def test_the_block_tables_of_a_long_context_take_little_room(tmp_path: Path) -> None:
    made = entry("bfloat16 1x8x8", {"rows": 1})
    table = tuple(i % 2048 for i in range(256 * 2048))
    written = replace(made, buffers={**made.buffers, "table": Buffer(4 * len(table), "data", "int32", table)})
    found = bundle(tmp_path, written)
    assert open_bundle(tmp_path) == found
    assert (tmp_path / FILE).stat().st_size < 50_000


def test_damage_is_named(tmp_path: Path) -> None:
    bundle(tmp_path, entry("bfloat16 1x8x8", {"rows": 1}))
    (tmp_path / "cubins/k.cubin").write_bytes(b"other")
    with pytest.raises(ArtifactError, match=r"k\.cubin is not what was built"):
        open_bundle(tmp_path).read_cubin("cubins/k.cubin")
    (tmp_path / "cubins/k.cubin").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_bundle(tmp_path).read_cubin("cubins/k.cubin")
    text = (tmp_path / FILE).read_text()
    for broken, words in (
        (text[: len(text) // 2], "malformed"), (text.replace('"data": ""', '"data": "?"', 1), "malformed"),
        (text.replace('"data": ""', '"data": "AAAA"', 1), "malformed"),
        (text.replace(f'"format": {FORMAT}', '"format": 9'), f"format {FORMAT}, found 9"),
        ("[]", "malformed"), (json.dumps({**json.loads(text), "digests": {}}), "names no cubin"),
    ):  # fmt: skip
        (tmp_path / FILE).write_text(broken)
        with pytest.raises(ArtifactError, match=words):
            open_bundle(tmp_path)
    (tmp_path / FILE).unlink()
    with pytest.raises(ArtifactError, match="not a bundle"):
        open_bundle(tmp_path)


def test_the_fastest_right_configuration_wins(tmp_path: Path) -> None:
    made = bundle(
        tmp_path, entry("a", {"time": 5}), entry("a", {"time": 1, "error": 0.5}), entry("a", {"time": 3}),
        entry("a", {"time": 2, "error": float("nan")}), entry("b", {"time": 9, "error": None}),
        entry("a", {"fail": "executor: cuLaunchKernelEx failed"}), entry("a", {"time": 4}),
    )  # fmt: skip
    timer = FakeTimer()
    rows, failed = measure(made, timer, ignore)
    assert timer.seen == [float("inf"), 5, 5, 3, float("inf"), 3, 3]
    assert winners(rows) == {"gemv": {"a": {"time": 3, "us": 3.0}, "b": {"time": 9, "error": None, "us": 9.0}}}
    assert [row.right for row in rows] == [True, False, True, False, True, True]
    assert len(failed) == 1
    assert "cuLaunchKernelEx failed" in failed[0]


@pytest.mark.parametrize(
    ("what", "kind"),
    [("executor: a kernel failed; the engine is dead", ExecutorError), ("resource: no", ResourceError)],
)
def test_a_lost_gpu_ends_the_timing(tmp_path: Path, what: str, kind: type[Exception]) -> None:
    made = bundle(tmp_path, entry("a", {"time": 5}), entry("a", {"fail": what}))
    with pytest.raises(kind):
        measure(made, FakeTimer(), ignore)


def test_a_program_gives_each_shape_once_with_its_integers() -> None:
    options = CudaOptions(decode_buckets=(1, 8), extend_buckets=(16,), extend_sequences=(1,))
    cases = program_cases(model("llama-tied").program, options, 90, "llama")
    kinds = {case.kernel for case in cases}
    assert {"gemv", "attention"} <= kinds
    tried = [(case.kernel, case.key, str(case.config)) for case in cases]
    assert len(set(tried)) == len(tried)
    assert {case.site.call.op for case in cases if case.kernel == "attention"} == {
        "cuda.attention", "llmopt.cached_attention",
    }  # fmt: skip
    for case in cases:
        made = describe(case, ())
        known = {arg.buffer for launch in case.selection.launches for arg in launch.args if isinstance(arg, Strided)}
        assert known <= set(made.buffers)
        for name, buffer in made.buffers.items():
            held = len(buffer.data) * {"int32": 4, "int64": 8}.get(buffer.dtype, 0)
            assert held <= buffer.bytes, name
    only = program_cases(model("llama-tied").program, options, 90, "llama", "^gemv bfloat16 1x")
    assert {case.kernel for case in only} == {"gemv"}
