"""``llmopt compile``: a checkpoint and a recipe in, an artifact out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llmopt.cli.output import accuracy_lines, emit_json, emit_pairs, emit_table, human_bytes, progress_bar

if TYPE_CHECKING:
    import torch

    from llmopt.artifact import WeightsPlan
    from llmopt.compiler import Compiled


@click.command("compile")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("-r", "--recipe", required=True, help="Recipe file, or the name of a built-in one (int4-cpu).")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the artifact.")
@click.option(
    "--max-context", type=click.IntRange(1), help="Longest sequence; default: the recipe's, else the model's."
)
@click.option("--weights", "weights_option", default="inside", show_default=True,
              help="Where weights go: 'inside', a directory beside it, or 'random:SEED' (drawn at load).")  # fmt: skip
@click.option("--dump-ir", type=click.Path(path_type=Path, file_okay=False), help="Write the IR here after each pass.")
@click.option("--check-passes", is_flag=True, help="Replay golden inputs around each pass; exit 7 when one drifts.")
@click.option("--calibration", type=click.Path(path_type=Path), help="Text or .jsonl file to calibrate and prove on.")
@click.option(
    "--calibration-tokens", type=click.IntRange(2), help="Tokens to calibrate on; default: the recipe's, or 32768."
)
@click.option(
    "--device", default="cpu", show_default=True, help="Where torch calibrates and proves: cpu, cuda, cuda:1."
)
@click.option("--sensitivity", is_flag=True, help="Measure what each quantized layer costs alone (slow).")
@click.option("--json", "as_json", is_flag=True, help="Print the report and the build log as JSON.")
def compile_command(
    checkpoint: Path,
    recipe: str,
    output: Path,
    max_context: int | None,
    weights_option: str,
    dump_ir: Path | None,
    check_passes: bool,
    calibration: Path | None,
    calibration_tokens: int | None,
    device: str,
    sensitivity: bool,
    as_json: bool,
) -> None:
    """Compile a Hugging Face checkpoint directory into an artifact.

    Exit codes: 3 recipe, 4 checkpoint, 5 model cannot be captured, 6 pass, 7 drift, 8 target, 10 resources.
    """
    plan = weights_plan(weights_option)
    require_compile_extra()
    from llmopt.compiler import CompileOptions, compile_checkpoint
    from llmopt.recipe import load_recipe

    with progress_bar(not as_json) as progress:
        loaded = load_recipe(recipe)
        given = {"text": calibration and str(calibration), "tokens": calibration_tokens}
        samples = loaded.calibration.model_copy(update={k: v for k, v in given.items() if v is not None})
        place = torch_device(device)
        options = CompileOptions(max_context, dump_ir, check_passes, plan, samples, sensitivity, place, progress)
        compiled = compile_checkpoint(checkpoint, loaded, output, options)
    if as_json:
        emit_json({"artifact": str(output), "report": compiled.report, "log": compiled.log})
    else:
        show(compiled, output)


def weights_plan(option: str) -> WeightsPlan:
    """``inside``, ``random:SEED`` or a directory. Raises ConfigError for a seed that is not a number."""
    from llmopt.artifact import WeightsPlan
    from llmopt.errors import ConfigError

    if option == "inside":
        return WeightsPlan()
    kind, colon, seed = option.partition(":")
    if kind == "random" and colon:
        if not seed.isdecimal():
            raise ConfigError(f"the seed {seed!r} is not a number", where="--weights", hint="write random:0")
        return WeightsPlan("random", seed=int(seed))
    return WeightsPlan("external", Path(option))


def torch_device(name: str) -> torch.device:
    """The device of that name. Raises ConfigError when it is none of torch's, ResourceError when it is not there."""
    import torch

    from llmopt.errors import ConfigError, ResourceError

    where = f"--device {name}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError("no such device", where=where, hint="cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"nothing is calibrated on {device.type}", where=where, hint="cpu, cuda or cuda:1")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        what = f"torch {torch.__version__} sees {count} CUDA devices"
        raise ResourceError(what, where=where, hint="a CUDA build of torch and a GPU, or leave it out")
    return device


def require_compile_extra() -> None:
    """Raises ResourceError when torch or transformers is not installed: the bare package is the runtime."""
    from importlib.util import find_spec

    from llmopt.errors import ResourceError

    if missing := [name for name in ("torch", "transformers") if find_spec(name) is None]:
        raise ResourceError(f"compiling needs {' and '.join(missing)}", hint="pip install 'llmopt[compile]'")


def show(compiled: Compiled, output: Path) -> None:
    """Passes, coverage, sizes and seconds, for people."""
    rows = [(p["name"], p["rewrites"], p["nodes_after"], f"{p['ms']:.1f}") for p in compiled.log["passes"]]
    emit_table(("pass", "rewrites", "nodes", "ms"), rows)
    size, ledger = compiled.report["bytes"], compiled.report["ledger"]
    seconds: dict[str, Any] = compiled.log["seconds"]
    emit_pairs(
        [
            ("coverage", coverage_line(ledger)),
            ("weights", f"{human_bytes(size['checkpoint'])} -> {human_bytes(size['weights'])}"),
            ("KV cache", f"{human_bytes(size['kv_per_token'])} a token"),
            ("golden", f"{len(compiled.manifest.golden)} sequences"),
            ("time", ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())),
            ("artifact", output),
        ]
    )
    if found := compiled.report.get("accuracy"):
        emit_pairs(accuracy_lines(found), title="accuracy on held-out text")


def coverage_line(ledger: dict[str, Any]) -> str:
    """Shares of FLOPs by how they are compiled."""
    shares = ledger["flops"]
    return ", ".join(f"{shares[kind]:.2%} {kind}" for kind in ("compiled", "generic", "eager")) + " (share of FLOPs)"
