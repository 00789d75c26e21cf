"""Calibration windows from files: sizes, seeds, held-out part, bad input; and those a model writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from llmopt.calibration.text import LEAST, read_text, read_windows
from llmopt.errors import RequestError
from llmopt.frontend import load_checkpoint
from llmopt.self_text import write_windows

TEXT = " ".join(f"The old house number {i} stood alone at the end of the lane." for i in range(3000))


@pytest.fixture
def tokenizer(embedded_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(embedded_model / "tokenizer.json"))


def test_windows_have_the_sizes_asked_for_and_depend_on_the_seed_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "t.txt"
    path.write_text(TEXT)
    found = read_windows(path, tokenizer, 64 * 40, 64, seed=3)
    assert found.calibration.shape == (40, 64)
    assert found.held_out.shape == (5, 65)
    again, other = (read_windows(path, tokenizer, 64 * 40, 64, seed=s) for s in (3, 4))
    assert torch.equal(found.calibration, again.calibration)
    assert not torch.equal(found.calibration, other.calibration)
    assert len(read_windows(path, tokenizer, 64, 64).held_out) == LEAST


def test_no_window_is_in_both_parts(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "t.txt"
    path.write_text(TEXT)
    found = read_windows(path, tokenizer, 64 * 40, 64)
    seen = {tuple(w.tolist()) for w in found.calibration}
    assert not seen & {tuple(w[:-1].tolist()) for w in found.held_out}


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(json.dumps({"text": t}) for t in ("one", "two")) + "\n\n")
    assert read_text(path) == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"too short", r"the text has \d+ tokens, calibration and its held-out part need 585"),
        ("b.txt", b"ok \xff", "not UTF-8 at byte 3"),
        ("c.jsonl", b'{"text": "x"}\n{"txt": 1}', r"c\.jsonl, line 2: a line is a JSON object"),
        ("d.jsonl", b'{"text": 5}', r"d\.jsonl, line 1: \"text\" is not a string"),
    ],
)
def test_bad_text_is_named(tmp_path: Path, tokenizer: Tokenizer, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RequestError, match=message):
        read_windows(tmp_path / name, tokenizer, 320, 64)
    with pytest.raises(RequestError, match="cannot read the text"):
        read_windows(tmp_path / "missing", tokenizer, 320, 64)


def test_a_model_writes_its_own_windows(embedded_model: Path) -> None:
    checkpoint = load_checkpoint(embedded_model)
    found, again = (write_windows(checkpoint, 2 * 12, 12, seed=5) for _ in range(2))
    assert found.calibration.shape == (2, 12)
    assert found.held_out.shape == (LEAST, 13)
    assert torch.equal(found.calibration, again.calibration)
    assert len(found.calibration.unique()) > 10
    assert not torch.equal(found.calibration, write_windows(checkpoint, 2 * 12, 12, seed=6).calibration)
