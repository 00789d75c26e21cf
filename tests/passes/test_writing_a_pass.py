"""The pass of docs/writing-a-pass.md works as the page says."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ir.handmade import Builder, aten
from tests.passes.running import checked, logits, ops, rewrites


@pytest.fixture(scope="module")
def fold_scale(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The page's module, imported from a file as a pass is."""
    page = (root / "docs" / "writing-a-pass.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- the test of this page runs the next block -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 1
    path = tmp_path_factory.mktemp("passes") / "fold_scale.py"
    path.write_text(blocks[0], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("fold_scale", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fold_scale"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fold_scale"]


def scaled(scale: float, bias: bool = False) -> Any:
    """A scaled LM head."""
    b = Builder()
    return b.finish(b.call(aten.mul.Tensor, b.linear(b.embed(8), "head", 17, bias), scale))


def test_fires_and_numerics_unchanged(fold_scale: Any) -> None:
    module = scaled(0.5)
    before = logits(module)
    assert rewrites(module, fold_scale.PASS()) == 1
    torch.testing.assert_close(logits(module), before)
    assert ops(module) == ["aten.embedding", "aten.linear"]
    assert sorted(module.weights) == ["embed.weight", "head.weight.scaled"]
    checked(scaled(0.5), fold_scale.PASS())


def test_must_not_fire(fold_scale: Any) -> None:
    assert rewrites(scaled(0.5, bias=True), fold_scale.PASS()) == 0
    assert rewrites(scaled(2.0), fold_scale.PASS()) == 0
    assert rewrites(scaled(2.0), fold_scale.PASS(largest=4.0)) == 1
