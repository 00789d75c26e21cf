"""Trained models for the GPU tests: artifacts, and what Hugging Face computes of them in fp32 and in bfloat16."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from llmopt.compiler import compile_checkpoint
from llmopt.recipe import load_recipe, parse_recipe
from llmopt.report.accuracy import token_nll
from llmopt.report.evaluate import split_windows
from llmopt.runtime.protocol import IntArray

ROOT = Path(__file__).resolve().parents[4]
EMBEDDED, CLASSICS = "classics-2m", "classics-14m"
OPTIONS = (
    "target_options: {}",
    "target_options: {decode_buckets: [1, 32], extend_buckets: [512], extend_sequences: [1, 32]}",
)
WINDOW, WINDOWS, PROMPTS, NEW, TOP = 512, 32, 20, 64, 8


def shared() -> Path:
    """Where the larger models and texts lie, if they do."""
    return Path(os.environ.get("LLMOPT_SHARED", ROOT.parent / "shared"))


def build_trained(folder: Path, wanted: list[str]) -> None:
    """The embedded model's artifact; classics-14m's with its references, where that model is at hand."""
    recipe = parse_recipe(load_recipe("bf16-cuda").text.replace(*OPTIONS))
    if not wanted or EMBEDDED in wanted:
        compile_checkpoint(ROOT / "models" / EMBEDDED, recipe, folder / EMBEDDED)
    if (not wanted or CLASSICS in wanted) and (source := shared() / "models" / CLASSICS).is_dir():
        compile_checkpoint(source, recipe, folder / CLASSICS)
        ids = token_ids(source, shared() / "data" / "classics-heldout.txt")
        np.savez(folder / f"{CLASSICS}.npz", **references(source, ids))


def token_ids(model: Path, text: Path) -> IntArray:
    """The text's tokens."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return np.array(tokenizer.encode(text.read_text("utf-8"), add_special_tokens=False).ids, np.int64)


def load(model: Path, dtype: torch.dtype) -> Any:
    """The checkpoint with eager attention."""
    return AutoModelForCausalLM.from_pretrained(model, dtype=dtype, attn_implementation="eager").eval()


@torch.no_grad()
def logits_of(model: Any, tokens: IntArray) -> npt.NDArray[np.float32]:
    """(tokens, vocab) logits of one sequence."""
    found: npt.NDArray[np.float32] = model(torch.tensor(tokens)[None], use_cache=False).logits[0].float().numpy()
    return found


def references(source: Path, ids: IntArray) -> dict[str, npt.NDArray[Any]]:
    """What the test compares with.

    ``windows`` and the nats of each token in both precisions; ``logits`` (fp32) of the first window with the bfloat16
    model's error in each row; greedy ``tokens`` of the bfloat16 model after each prompt, with the TOP tokens and
    logits that fp32 gives at each of them, and the largest error bfloat16 makes there.
    """
    exact, rounded = load(source, torch.float32), load(source, torch.bfloat16)
    windows = split_windows(ids, WINDOW, WINDOW * WINDOWS)
    nll: dict[str, list[Any]] = {"exact": [], "rounded": []}
    for window in windows:
        for name, model in (("exact", exact), ("rounded", rounded)):
            nll[name].append(token_nll(logits_of(model, window[:-1]), window[1:]))
    logits = logits_of(exact, windows[0][:-1])
    error = np.linalg.norm(logits_of(rounded, windows[0][:-1]) - logits, axis=1)
    prompts = [ids[i * 400 : i * 400 + 3 + i] for i in range(PROMPTS)]
    greedy, top, values, worst = [], [], [], 0.0
    for prompt in prompts:
        tokens = generate(rounded, prompt)
        greedy.append(tokens)
        path = np.concatenate((prompt, tokens[:-1]))
        at = logits_of(exact, path)[-NEW:]
        worst = max(worst, float(np.abs(logits_of(rounded, path)[-NEW:] - at).max()))
        top.append(np.argsort(-at, axis=1)[:, :TOP])
        values.append(np.take_along_axis(at, top[-1], 1))
    found = {"windows": windows, "nll_exact": np.stack(nll["exact"]), "nll_rounded": np.stack(nll["rounded"])}
    found |= {"logits": logits, "error": error, "greedy": np.stack(greedy), "top": np.stack(top)}
    found |= {"values": np.stack(values), "worst": np.array(worst)}
    return {**found, **{f"prompt_{i}": p for i, p in enumerate(prompts)}}


def generate(model: Any, prompt: IntArray) -> IntArray:
    """NEW greedy tokens."""
    found = model.generate(
        torch.from_numpy(prompt)[None], max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    tokens: IntArray = found[0, len(prompt) :].numpy()
    return tokens
