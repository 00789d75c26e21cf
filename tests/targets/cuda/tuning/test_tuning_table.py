"""Tuning tables: what a build takes from one, which errors name what is wrong, how entries are added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmopt.errors import ConfigError
from targets.cuda.options import parse_options
from targets.cuda.tuning import find_linear, quantized_form
from targets.cuda.tuning.table import builtin, load_table, read, write

ENTRIES = {"gemv": {"bfloat16 1x64x64": {"rows": 2, "us": 3.0}}}


def test_a_table_is_read_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "sm_80.json"
    assert write(path, 80, "triton 3.9.0", ENTRIES) == 1
    assert write(path, 80, "triton 3.9.0", {"gemv": {"bfloat16 1x8x8": {"rows": 1, "us": 1.0}}}) == 2
    assert write(path, 80, "triton 4.0.0", ENTRIES) == 1
    assert set(read(path, 80)) == {"triton 3.9.0", "triton 4.0.0"}
    loaded = load_table(80, "triton 3.9.0", path)
    assert set(loaded.table["gemv"]) == {"bfloat16 1x64x64", "bfloat16 1x8x8"}
    assert loaded.note("triton 3.9.0") == "triton 3.9.0"
    assert list(tmp_path.iterdir()) == [path]


def test_new_measurements_take_the_place_of_old_ones(tmp_path: Path) -> None:
    path = tmp_path / "sm_80.json"
    write(path, 80, "triton 3.9.0", ENTRIES)
    write(path, 80, "triton 3.9.0", {"gemv": {"bfloat16 1x64x64": {"rows": 4, "us": 2.0}}})
    assert load_table(80, "triton 3.9.0", path).table["gemv"]["bfloat16 1x64x64"] == {"rows": 4, "us": 2.0}


def test_a_named_table_of_another_compiler_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "sm_80.json"
    write(path, 80, "triton 3.9.0", ENTRIES)
    with pytest.raises(ConfigError, match=r"no entries of triton 4\.0\.0.*triton 3\.9\.0"):
        load_table(80, "triton 4.0.0", path)


def test_the_builtin_table_of_another_compiler_is_said_to_be_one() -> None:
    known = next(iter(read(builtin(90), 90)))
    loaded = load_table(90, "triton 99.0")
    assert loaded.table
    assert loaded.note("triton 99.0") == f"{known} (nothing was measured with triton 99.0)"
    assert load_table(80, "triton 99.0").note("triton 99.0").startswith("none")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"arch": 80, "compilers": {"t": {"gemv": {"1x1x1": 3}}}}'])
def test_what_is_no_table_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.json: not a tuning table"):
        load_table(80, "triton 3.9.0", path)
    with pytest.raises(ConfigError, match="not a tuning table"):
        write(path, 80, "triton 3.9.0", ENTRIES)
    assert path.read_text() == text


def test_a_table_of_another_architecture_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sm_80.json"
    write(path, 80, "triton 3.9.0", ENTRIES)
    with pytest.raises(ConfigError, match="of sm_80, not of sm_90"):
        read(path, 90)


def test_entries_of_one_way_to_sum_serve_no_other() -> None:
    """Neither at the measured shape nor near it."""
    v = {"format": "fp8_e4m3", "bits": 8, "block_k": 4096, "round": "fp8_e4m3"}
    forms = [quantized_form({**v, **more}, 4096) for more in ({}, {"interval": 0}, {"interval": 256})]
    assert forms == ["w8a8-fp8", "w8a8-fp8-fast", "w8a8-fp8-every256"]
    assert quantized_form({**v, "interval": 128}, 4096) == forms[0]
    for known in forms:
        table = {"gemm": {f"{known} 2048x4096x4096": {"BM": 128, "us": 3.0}}}
        for n in (4096, 8192):
            served = [form for form in forms if find_linear(table, "gemm", form, 2048, n, 4096)]
            assert served == [known]


def test_the_option_names_a_file() -> None:
    assert parse_options({"tuning": "own.json"}).tuning == Path("own.json")
    with pytest.raises(ConfigError, match=r"target_options\.tuning"):
        parse_options({"tuning": 3})


TABLE = {"gemm": {
    "bfloat16 128x4096x4096": {"BM": 1, "us": 10.0}, "bfloat16 128x8192x4096": {"BM": 2, "us": 20.0},
    "bfloat16 128x8192x4096 gated": {"BM": 3, "us": 20.0}, "bfloat16 32x4096x4096": {"BM": 4, "us": 9.0},
}}  # fmt: skip


def test_a_measured_shape_has_its_configuration() -> None:
    found = find_linear(TABLE, "gemm", "bfloat16", 128, 8192, 4096)
    assert found == ({"BM": 2}, "tuned", 20.0)
    gated = find_linear(TABLE, "gemm", "bfloat16", 128, 8192, 4096, "gated")
    assert gated is not None
    assert gated.config == {"BM": 3}


def test_the_nearest_measured_shape_lends_its_own_and_says_so() -> None:
    found = find_linear(TABLE, "gemm", "float16", 128, 6000, 4096)
    assert found is not None
    assert (found.config, found.note) == ({"BM": 2}, "as tuned for 128x8192x4096")
    assert 10 < found.us < 20
    few = find_linear(TABLE, "gemm", "bfloat16", 16, 4096, 4096)
    assert few is not None
    assert few.config == {"BM": 4}


def test_far_shapes_and_other_kernels_lend_nothing() -> None:
    assert find_linear(TABLE, "gemm", "bfloat16", 128, 4096 * 64, 4096) is None
    assert find_linear(TABLE, "gemm", "bfloat16", 4096, 4096, 4096) is None
    assert find_linear(TABLE, "gemv", "bfloat16", 128, 4096, 4096) is None
    assert find_linear(TABLE, "gemm", "float32", 128, 4000, 4096) is None


def test_the_builtin_table_is_well_formed() -> None:
    for compiler, kernels in read(builtin(90), 90).items():
        assert compiler.startswith("triton ")
        assert json.dumps(kernels)
        for kernel, entries in kernels.items():
            assert kernel.startswith(("gem", "attention", "moe"))
            assert all(config.get("us", 1) > 0 for config in entries.values())
