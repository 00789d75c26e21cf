"""The compiler: a checkpoint and a recipe in, an artifact out. ``compile_checkpoint`` is the whole flow."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmopt.artifact import BuildInfo, Manifest, WeightsPlan, write_artifact
from llmopt.errors import ConfigError
from llmopt.frontend import Captured, Checkpoint, capture, load_checkpoint
from llmopt.frontend.keeping import require_support
from llmopt.frontend.ledger import take_ledger
from llmopt.golden import record_golden
from llmopt.ir.check import PassChecker
from llmopt.ir.module import Module
from llmopt.ir.pass_manager import PassContext, PassManager, PassRecord, split_at_fork
from llmopt.ir.samples import CPU, Calibration
from llmopt.lower.fork import fork
from llmopt.lower.lowering import lower
from llmopt.lower.memory import type_bytes
from llmopt.lower.readers import readers
from llmopt.program import Program
from llmopt.recipe import CalibrationOptions, Recipe
from llmopt.registry import load_target
from llmopt.report.page import accuracy_page
from llmopt.report.proof import key_figures, prove, rounded, sensitivity
from llmopt.runtime.chat import check_chat_template
from llmopt.samples import draw_samples, tokenizer_of
from llmopt.target import BuildContext, Target, TargetFiles

SENSITIVITY_WINDOWS = 2
"""Held-out windows each layer is measured on alone."""


@dataclass(frozen=True)
class CompileOptions:
    """What a build may be told beside the recipe.

    ``dump_ir``: folder for the IR's text after each pass. ``check_passes``: replay golden inputs around each pass.
    ``weights``: inside the artifact, in a directory, or drawn from a seed at load. ``calibration``: instead of the
    recipe's. ``sensitivity``: measure what each quantized layer costs alone. ``device``: where torch calibrates and
    proves; the rest needs no GPU.
    """

    max_context: int | None = None
    dump_ir: Path | None = None
    check_passes: bool = False
    weights: WeightsPlan = field(default_factory=WeightsPlan)
    calibration: CalibrationOptions | None = None
    sensitivity: bool = False
    device: torch.device = CPU
    progress: Callable[[str, int, int], None] = lambda what, done, total: None


@dataclass
class Stopwatch:
    """Seconds of each stage, by name."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        """Close a stage."""
        now = time.perf_counter()
        self.seconds[stage], self.last = round(now - self.last, 3), now


@dataclass(frozen=True)
class Compiled:
    """What a build did: the artifact's manifest, what report.json holds, and what only the build log knows (times)."""

    manifest: Manifest
    report: dict[str, Any]
    log: dict[str, Any]


def compile_checkpoint(
    path: Path,
    recipe: Recipe,
    destination: Path,
    options: CompileOptions = CompileOptions(),
) -> Compiled:
    """Compile the checkpoint directory ``path`` into the artifact ``destination``.

    Timings go to ``<destination>.build.json`` beside it, never inside: equal inputs give equal bytes. What calibration
    computed waits in ``<destination>.calibration`` until the artifact is written; an interrupted build takes it up
    again. Raises any LlmoptError; nothing is left at ``destination`` then.
    """
    watch = Stopwatch()
    target = load_target(recipe.target)
    context = pass_context(target, recipe)
    checkpoint = load_checkpoint(path)
    check_chat_template(checkpoint.tokenizer_files)
    captured = capture(checkpoint, recipe.torch_dtype, options.max_context or recipe.max_context, recipe.dequantize)
    watch.lap("capture")
    samples = draw_samples(
        checkpoint,
        recipe,
        options.calibration or recipe.calibration,
        destination.with_name(destination.name + ".calibration"),
        captured.module.config.max_context,
        options.progress,
        options.device,
    )
    if samples is not None:
        windows = samples.windows.calibration
        calibration = Calibration(windows, samples.folder, samples.key, options.progress, options.device)
        context = replace(context, calibration=calibration)
        watch.lap("samples")
    checker = PassChecker() if options.check_passes else None
    records = run_passes(captured, target, recipe, context, options, checker)
    watch.lap("passes")
    program = lower(captured.module)
    weights = readers(program, captured.module.weights)
    files = target.build(program, weights, BuildContext(recipe.target_options, options.progress))
    watch.lap("build")
    golden = record_golden(program, weights) if options.weights.kind != "random" else []
    watch.lap("golden")
    report = describe(checkpoint, captured.module, records, program, files)
    if samples is not None and captured.module.is_quantized and options.weights.kind != "random":
        report["accuracy"] = prove_build(checkpoint, captured.module, samples.windows.held_out, options)
        watch.lap("proof")
    manifest = write_artifact(
        destination,
        info=BuildInfo(
            model=str(checkpoint.config.get("model_type")),
            target=target.name,
            dtype=recipe.dtype,
            source=checkpoint.digest,
            eos_token_ids=captured.module.config.eos_token_ids,
            bos_token_id=captured.module.config.bos_token_id,
            accuracy=key_figures(report["accuracy"]) if "accuracy" in report else {},
        ),
        program=program,
        files=files,
        tokenizer_files=checkpoint.tokenizer_files,
        recipe_text=recipe.text,
        report=json.dumps(report, indent=1, sort_keys=True) + "\n",
        extra_files=accuracy_files(report, checkpoint, destination.name),
        weights=options.weights,
        golden=golden,
        progress=options.progress,
    )
    watch.lap("write")
    if samples is not None:
        shutil.rmtree(samples.folder)
    log: dict[str, Any] = {
        "seconds": watch.seconds,
        "passes": [asdict(r) for r in records],
        "checkpoint": str(path.resolve()),
        "target": dict(files.log),
    }
    log["drifts"] = [asdict(d) for d in checker.drifts] if checker else None
    destination.with_name(destination.name + ".build.json").write_text(json.dumps(log, indent=1) + "\n")
    return Compiled(manifest, report, log)


def prove_build(checkpoint: Checkpoint, module: Module, held_out: Tensor, options: CompileOptions) -> dict[str, Any]:
    """The proof's figures, to six digits: the passes' module beside the checkpoint in fp32."""
    baseline = capture(checkpoint, torch.float32, options.max_context, ("*",)).module
    result = prove(baseline, module, held_out, options.progress, options.device)
    if options.sensitivity:
        alone = sensitivity(module, held_out[:SENSITIVITY_WINDOWS], options.progress, options.device)
        for layer in result["layers"]:
            layer["kl"] = alone[layer["name"]]
    figures: dict[str, Any] = rounded(result)
    return figures


def accuracy_files(report: dict[str, Any], checkpoint: Checkpoint, title: str) -> dict[str, bytes]:
    """accuracy.html, when accuracy was measured."""
    if "accuracy" not in report:
        return {}
    page = accuracy_page(report["accuracy"], title, tokenizer_of(checkpoint), report.get("notes", {}))
    return {"accuracy.html": page.encode()}


def pass_context(target: Target, recipe: Recipe) -> PassContext:
    """What the passes may know; raises ConfigError when the target cannot compute in the recipe's dtype."""
    if recipe.dtype not in target.info.dtypes:
        known = ", ".join(target.info.dtypes)
        raise ConfigError(f"target {target.name} does not compute in {recipe.dtype}", hint=f"it can: {known}")
    return PassContext(target.info, recipe.torch_dtype)


def run_passes(
    captured: Captured,
    target: Target,
    recipe: Recipe,
    context: PassContext,
    options: CompileOptions,
    checker: PassChecker | None,
) -> list[PassRecord]:
    """Common passes on the captured function, the fork, then the passes that name functions."""
    require_support(captured.module, target.info)
    manager = PassManager(options.dump_ir, checker)
    common, forked = split_at_fork(recipe.passes)
    records = manager.run(captured.module, common, context)
    fork(captured.module, target.info.functions)
    records += manager.run(captured.module, forked, context)
    captured.module.prune_weights()
    return records


def describe(
    checkpoint: Checkpoint,
    module: Module,
    records: list[PassRecord],
    program: Program,
    files: TargetFiles,
) -> dict[str, Any]:
    """report.json: the passes' rewrites, the ledger of what they left, sizes in bytes before and after."""
    last = module.functions[program.entry_points["extend"]]
    notes = {"notes": module.notes} if module.notes else {}
    return notes | {
        "passes": [{k: v for k, v in asdict(r).items() if k != "ms"} for r in records],
        "ledger": take_ledger(last.graph).to_json(),
        "bytes": {
            "checkpoint": sum(w.nbytes for w in checkpoint.files.values()),
            "weights": sum(type_bytes(reader.type, {}) for reader in files.weights.values()),
            "kv_per_token": kv_bytes_per_token(program),
        },
    }


def kv_bytes_per_token(program: Program) -> float:
    """Bytes of state a token takes in the groups that grow with the sequence (rings do not)."""
    return sum(g.block_bytes() / g.block_size for g in program.states.groups if g.kind in ("paged", "slots"))
