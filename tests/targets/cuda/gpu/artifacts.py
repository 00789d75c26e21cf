"""Builds what the GPU tests run, with no GPU: python -m tests.targets.cuda.gpu.artifacts FOLDER [CASE …]

FOLDER/CASE is an artifact of a tiny model in bfloat16; FOLDER/CASE.npz holds token sequences, the logits that the
reference target computes of the same bfloat16 weights in fp32, and the errors it makes itself in bfloat16. The tests
take FOLDER from LLMOPT_GPU_ARTIFACTS, so that the machine with the GPU needs neither torch nor a compiler.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig

from llmopt.compiler import CompileOptions, compile_checkpoint, pass_context
from llmopt.frontend import capture, load_checkpoint
from llmopt.ir.pass_manager import PassManager
from llmopt.lower.lowering import lower
from llmopt.lower.readers import readers
from llmopt.recipe import load_recipe, parse_recipe
from llmopt.registry import load_executor_module, load_target
from llmopt.runtime.protocol import FloatArray, IntArray
from llmopt.target import LoadOptions
from tests.architectures import ARCHITECTURES, base, make_checkpoint, make_model
from tests.frontend.quantized import gpt_oss_pair
from tests.targets.cuda.gpu.cases import CASES, CODED, CONTEXT, LENGTHS, RUNS, WIDE_K, rms_errors
from tests.targets.cuda.gpu.trained import build_trained
from tests.targets.ragged import RaggedDriver

OPTIONS = "target_options: {}"
BUCKETS = "target_options: {decode_buckets: [4], extend_buckets: [16], extend_sequences: [8]}"
FAST = BUCKETS.replace("extend_buckets: [16]", "extend_buckets: [128], fp8_fast_accumulation: prefill")
"""With fast accumulation, for which a step must have more than 64 rows, real or not."""
TARGET = ("target: cuda\n", "target: reference\n")
ONE = BUCKETS.replace("decode_buckets: [4]", "decode_buckets: [1]")
CHAINED = {"hidden_size": 256, "intermediate_size": 384, "head_dim": 64}
"""Rows of whole chunks of 128 columns, and a step of one row."""
SKEW = {"skewed": (4.0,), "empty": (4.0, 3.0)}
"""Router weights of the first experts on the channel that is large and positive in every token: under ``skewed`` one
expert is everyone's first choice, under ``empty`` two are everyone's choice and the others get no token."""

PLAIN = load_recipe("bf16-cuda").text
INT4 = load_recipe("int4-cuda").text.replace("group_size: 128", "group_size: 32")
INT8, FP8 = load_recipe("int8-cuda").text, load_recipe("fp8-cuda").text
KV8 = load_recipe("bf16-kv8-cuda").text.replace("format: fp8_e4m3", "format: fp8_e4m3\n    scales: unit")
QUANTIZERS = {
    "int4": INT4,
    "zeros": INT4.replace("group_size: 32", "group_size: 32\n    symmetric: false"),
    "int4_128": INT4.replace("group_size: 32", "group_size: 128"),
    "zeros_64": INT4.replace("group_size: 32", "group_size: 64\n    symmetric: false"),
    "int8": INT8,
    "fp8_weights": INT8.replace("bits: 8", "format: fp8_e4m3"),
    "fp8": FP8,
    "fp8_fast": FP8,
    "w8a8": load_recipe("w8a8-cuda").text.replace("- smoothquant\n", ""),
    "kv_fp8": KV8,
    "kv_int8": KV8.replace("format: fp8_e4m3", "format: int8"),
    "mxfp4": PLAIN,
}
"""The recipes of CODED, by the end of a case's name."""


def cases() -> dict[str, Callable[[], Any]]:
    """A model of each architecture, and the two with routers of their own under uneven loads."""
    found: dict[str, Callable[[], Any]] = {n: lambda c=c: make_model(c()) for n, c in ARCHITECTURES.items()}
    for name in ("mixtral", "qwen3_moe"):
        for load, pull in SKEW.items():
            found[f"{name}-{load}"] = lambda n=name, p=pull: skew(make_model(ARCHITECTURES[n]()), p)
    return found


@torch.no_grad()
def skew(model: Any, pull: tuple[float, ...]) -> Any:
    """The model with channel 0 large in every embedding, and routers that look at it."""
    model.get_input_embeddings().weight[:, 0] = 2.0
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter[0] = 1.0
        if name.endswith("gate.weight") and parameter.shape[0] < 16:
            parameter[:, 0] = 0.0
            parameter[: len(pull), 0] = torch.tensor(pull)
    return model


def sequences(vocab_size: int) -> list[IntArray]:
    """Random tokens."""
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, n).astype(np.int64) for n in LENGTHS]


def reference_logits(checkpoint: Path, text: str, dtype: str, tokens: list[IntArray], run: int) -> list[FloatArray]:
    """Logits of each sequence through the reference target, fed as in a run: longrope depends on the chunks."""
    recipe = parse_recipe(text.replace(*TARGET).replace("dtype: bfloat16", f"dtype: {dtype}"))
    module = capture(load_checkpoint(checkpoint), recipe.torch_dtype, CONTEXT).module
    PassManager().run(module, recipe.passes, pass_context(load_target("reference"), recipe))
    module.prune_weights()
    program = lower(module)
    tensors = {name: reader.weight.tensor() for name, reader in readers(program, module.weights).items()}
    options = LoadOptions(max_sequences=len(tokens), max_context=CONTEXT)
    executor = load_executor_module("reference").ReferenceExecutor(program, tensors, options)
    prompts, chunk = RUNS[run]
    return RaggedDriver(executor).logits(tokens, list(prompts), chunk)


def build(case: str, checkpoint: Path, text: str, folder: Path, options: str = BUCKETS) -> None:
    """One artifact and what it is to compute. ``text``: a recipe for cuda in bfloat16."""
    tokens = sequences(load_checkpoint(checkpoint).config["vocab_size"])
    arrays: dict[str, Any] = {f"tokens_{i}": t for i, t in enumerate(tokens)}
    for run in range(len(RUNS)):
        expected = reference_logits(checkpoint, text, "float32", tokens, run)
        rounded = reference_logits(checkpoint, text, "bfloat16", tokens, run)
        arrays[f"rms_{run}"] = rms_errors(case, rounded, expected)
        arrays |= {f"logits_{run}_{i}": x for i, x in enumerate(expected)}
    size = 64 if case.startswith("llama_wide") else 16  # else several blocks a sequence
    several = re.sub(r"block_size: \d+", f"block_size: {size}", text)
    recipe = parse_recipe(several.replace(OPTIONS, options))
    compile_checkpoint(checkpoint, recipe, folder / case, CompileOptions(max_context=CONTEXT))
    np.savez(folder / f"{case}.npz", **arrays)


def build_plain(case: str, model: Any, folder: Path) -> None:
    """A case in bfloat16."""
    with TemporaryDirectory() as place:
        model.to(torch.bfloat16).save_pretrained(place)
        build(case, Path(place), PLAIN, folder)


def build_coded(case: str, folder: Path) -> None:
    """A case over codes."""
    architecture, _, quantizer = case.rpartition("-")
    with TemporaryDirectory() as place:
        checkpoint = Path(place)
        if quantizer == "mxfp4":
            checkpoint = gpt_oss_pair(checkpoint).path
        elif architecture == "llama_wide":
            config = LlamaConfig(**base(hidden_size=WIDE_K // 8, intermediate_size=WIDE_K))
            make_model(config, torch.bfloat16).save_pretrained(checkpoint)
        elif architecture == "llama_chain":
            make_checkpoint("llama", checkpoint, torch.bfloat16, **CHAINED)
        else:
            make_checkpoint(architecture, checkpoint, torch.bfloat16)
        options = {"llama_chain": ONE, "llama_wide": FAST if quantizer == "fp8_fast" else BUCKETS}
        build(case, checkpoint, QUANTIZERS[quantizer], folder, options.get(architecture, BUCKETS))


def main(folder: Path, wanted: list[str]) -> None:
    """Build the wanted cases and trained models, or all."""
    folder.mkdir(parents=True, exist_ok=True)
    makers = cases()
    for case in CASES:
        if not wanted or case in wanted:
            build_plain(case, makers[case](), folder)
            print(case, np.load(folder / f"{case}.npz")["rms_0"], flush=True)
    for case in CODED:
        if not wanted or case in wanted:
            build_coded(case, folder)
            print(case, np.load(folder / f"{case}.npz")["rms_0"], flush=True)
    build_trained(folder, wanted)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
