"""A trained model through the artifact: perplexity and greedy text against Hugging Face, exact and quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from llmopt.artifact import Artifact
from llmopt.compiler import compile_checkpoint
from llmopt.recipe import load_recipe, parse_recipe
from llmopt.report.accuracy import paired_bootstrap, perplexity
from llmopt.report.evaluate import score
from llmopt.runtime.executors import load_executor
from llmopt.runtime.params import GenerationParams
from llmopt.runtime.protocol import SamplingParams
from llmopt.runtime.session import open_session
from llmopt.target import LoadOptions
from tests.e2e.classics import held_out_windows, load, nll, round_linears

MODEL = "classics-14m"
OPTIONS = LoadOptions(max_sequences=4, max_context=512, threads=2)


def build(shared: Path, folder: Path, quantize: str = "", level: int = 0) -> Path:
    """The artifact of fp32-cpu, with a quantize_weights entry put in and an accuracy level."""
    text = load_recipe("fp32-cpu").text.replace("- fuse_gate_up\n", f"- fuse_gate_up\n{quantize}")
    if level:
        text = text.replace("target_options: {}", f"target_options: {{accuracy_level: {level}}}")
    compile_checkpoint(shared / "models" / MODEL, parse_recipe(text), folder / "artifact")
    return folder / "artifact"


def artifact_nll(path: Path, windows: Any) -> Any:
    """Per-token nats of an artifact."""
    return np.stack(score(load_executor(Artifact.open(path), OPTIONS), windows).nll)


@pytest.fixture(scope="module")
def windows(shared: Path) -> Any:
    return held_out_windows(shared, MODEL)


@pytest.fixture(scope="module")
def few(windows: Any) -> Any:
    """Enough to tell roundings apart, where both sides compute the same ones."""
    return windows[:6]


@pytest.fixture(scope="module")
def exact(shared: Path, windows: Any) -> Any:
    """Hugging Face's nats in fp32."""
    return nll(load(shared, MODEL), windows)


# Hugging Face's figures are computed once, by one worker.
SAME_WORKER = pytest.mark.xdist_group("exact figures of classics")


@pytest.mark.slow
@SAME_WORKER
def test_fp32_perplexity_equals_hugging_face(shared: Path, tmp_path: Path, windows: Any, exact: Any) -> None:
    found = perplexity(artifact_nll(build(shared, tmp_path), windows))
    assert f"{found:.4g}" == f"{perplexity(exact):.4g}"
    assert found == pytest.approx(perplexity(exact), rel=1e-5)


@pytest.mark.slow
@SAME_WORKER
def test_int8_is_within_two_tenths_of_a_percent(shared: Path, tmp_path: Path, windows: Any, exact: Any) -> None:
    found = artifact_nll(build(shared, tmp_path, "- quantize_weights: {bits: 8}\n"), windows)
    change = paired_bootstrap(found, exact)
    assert -0.002 < change.low <= change.high < 0.002


SCHEMES = {
    "g32": (32, True),
    "g32-zero": (32, False),
    "g128": (128, True),
    "g128-zero": (128, False),
}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_int4_equals_a_simulation_of_its_rounding(shared: Path, tmp_path: Path, few: Any, scheme: str) -> None:
    group, symmetric = SCHEMES[scheme]
    options = f"{{bits: 4, group_size: {group}, symmetric: {str(symmetric).lower()}}}"
    found = perplexity(artifact_nll(build(shared, tmp_path, f"- quantize_weights: {options}\n"), few))
    simulated = perplexity(nll(round_linears(load(shared, MODEL), 4, group, symmetric), few))
    assert f"{found:.3g}" == f"{simulated:.3g}"
    assert found == pytest.approx(simulated, rel=1e-3)


@pytest.mark.slow
def test_rounding_of_another_group_size_is_told_apart(shared: Path, few: Any) -> None:
    fine, coarse = (perplexity(nll(round_linears(load(shared, MODEL), 4, g, True), few)) for g in (32, 128))
    assert coarse > fine * 1.002


@pytest.mark.slow
def test_greedy_text_equals_generate(shared: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(shared / "models" / MODEL / "tokenizer.json"))
    text = (shared / "data" / "classics-heldout.txt").read_text(encoding="utf-8")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    prompts = [ids[i * 400 : i * 400 + 3 + i] for i in range(20)]
    params = GenerationParams(sampling=SamplingParams(temperature=0), max_tokens=64, ignore_eos=True)
    with open_session(build(shared, tmp_path), OPTIONS) as session:
        found = [list(c.tokens) for c in session.engine.generate(prompts, params)]
    model = load(shared, MODEL)
    for tokens, prompt in zip(found, prompts, strict=True):
        assert tokens == greedy(model, [*prompt, *tokens])[len(prompt) - 1 : -1]
    for tokens, prompt in zip(found[:2], prompts[:2], strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=64, min_new_tokens=64, do_sample=False, eos_token_id=None
        )
        assert tokens == expected[0, len(prompt) :].tolist()


@torch.no_grad()
def greedy(model: Any, tokens: list[int]) -> list[int]:
    """The likeliest token after each of ``tokens``: what ``generate`` would take, if they are its own, at once."""
    likeliest: list[int] = model(torch.tensor([tokens])).logits[0].argmax(-1).tolist()
    return likeliest
