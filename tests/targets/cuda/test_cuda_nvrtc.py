"""Kernels in CUDA C++: what NVRTC refuses, what changes a cache entry, and a machine without it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from llmopt.errors import ResourceError, TargetError
from targets.cuda import nvrtc
from targets.cuda.cache import CubinCache, Job
from targets.cuda.compile import compile_all, compiler_version
from targets.cuda.kernel import Specialization

SOURCE = '#include "part.cuh"\nextern "C" __global__ void fill(float *out) { out[threadIdx.x] = VALUE; }\n'


@pytest.fixture
def fill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Specialization]:
    """A kernel in files of its own."""
    (tmp_path / "filling.py").write_text("")
    (tmp_path / "filling.cu").write_text(SOURCE)
    (tmp_path / "part.cuh").write_text("#define VALUE 1.f\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield Specialization("filling", "fill", (("out", "*fp32"),), (), source="filling.cu", shared=64)
    sys.modules.pop("filling", None)


def cubin(spec: Specialization, cubins: CubinCache) -> bytes:
    job = Job(spec, 90, compiler_version())
    made = compile_all([job], cubins, lambda *_: None)[job]
    assert (made.symbol, made.threads, made.shared, made.spills) == ("fill", 128, 64, 0)
    return made.cubin


def test_a_source_is_compiled_again_when_what_it_includes_changes(fill: Specialization, tmp_path: Path) -> None:
    first = CubinCache(tmp_path / "cache")
    made = cubin(fill, first)
    again = CubinCache(tmp_path / "cache")
    assert cubin(fill, again) == made
    assert (len(first.log), again.log) == (1, [])
    (tmp_path / "part.cuh").write_text("#define VALUE 2.f\n")
    third = CubinCache(tmp_path / "cache")
    assert cubin(fill, third) != made
    assert third.log == ["compiled filling.fill() sm_90: filling.cu or what it includes changed"]


def test_what_the_compiler_refuses_is_named(fill: Specialization, tmp_path: Path) -> None:
    wrong = Job(replace(fill, constexprs=(("float", "nothing"),)), 90, compiler_version())
    with pytest.raises(TargetError, match=r"filling\.fill.*nothing"):
        compile_all([wrong], CubinCache(tmp_path / "cache"), lambda *_: None)


def test_a_machine_without_nvrtc_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    nvrtc.nvrtc_version.cache_clear()
    with pytest.raises(ResourceError, match=r"NVRTC, which is not installed .*cuda-compile"):
        nvrtc.nvrtc_version()
